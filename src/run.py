"""One run of Targeted Lexical Injection: measure every layer, train an early adapter, measure again, judge, track.

python -m src.run lora.layers=[1,2]
python -m src.run -m lora.layers='[1],[2],[1,2]' lora.rank=4,16
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from src import console, interrupts
from src.config import ROOT, Config, config_hash, help_quickly, read_config, refuse_odd_options, register
from src.errors import DiskError, Pruned, UserError
from src.files import disk_error, write_text
from src.past import past_job
from src.process import importing, leave_quickly, wait_briefly
from src.tracking import public_uri

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from omegaconf import DictConfig

    from src.search import Judge

log = logging.getLogger(__name__)


def run(config: Config, folder: Path, judge: Judge | None = None, *, in_sweep: bool = False) -> dict[str, Any]:
    """The whole method: fills the job folder, tracks it, prints the result and returns what results.json holds.

    Of a sweep's job the verdict alone is printed, as the sweep ends with a table of all.
    A search's `judge` hears the control margin after each epoch, and may end the run by saying why, which is Pruned.
    Raises UserError for input that the user can mend, NumbersError where a number isn't finite, OutOfMemoryError.
    """
    with importing():
        from src import conclusion, memory, results, study, tracking
        from src.models import adapter, import_peft, load_model, save_adapter
        from src.pairs import read_words

        if config.train.epochs:
            import_peft()

    clock = _Clock()
    lexicon, words = read_words(config.dataset)
    # A store that can't be written is refused before the model loads.
    store = tracking.open_store(config.tracking, ROOT, folder)
    with clock.timing("load"):
        loaded = load_model(config.model, config.quant)
    it = study.prepare(config, lexicon, words, loaded)
    found: dict[str, Any] = study.describe(it) | study.report_leakage(it, aloud=not in_sweep)

    with tracking.tracked(folder, store, found) as tracked:
        found |= {"mlflow_run_id": tracked.id, "opening": tracked.opening}
        with clock.timing("encode"):
            before = study.encode_before(it, console.progress)
        with clock.timing("measure"):
            layers = study.measure_before(it, before, console.progress)
        probed = study.probe_before(it, console.progress)
        found |= probed.scalars
        after, losses = None, []
        if config.train.epochs:
            blocks, read, why = study.choose_layers(it, before)
            found |= study.describe_layers(it, blocks, read, why)
            with clock.timing("encode"):
                below = study.run_below_adapter(it, blocks)
            with adapter(loaded.model, config.lora, blocks, seed=config.train.seed) as model:

                def after_epoch(epoch: int) -> None:
                    if judge:
                        with clock.timing("judge", within="train"):
                            said = judge(epoch, study.control_margin(it, model, below))
                        if said:
                            results.record_pruned(folder, found | said)
                            raise Pruned(said["pruned"])

                with clock.timing("train"):
                    losses, batch = study.train_adapter(it, model, read, below, console.progress, after_epoch)
                found |= batch
                save_adapter(model, folder / "adapter")
                with clock.timing("encode"):
                    after = study.encode_after(it, model, before, below, console.progress)
                found |= study.probe_after(it, model, probed, console.progress)
            with clock.timing("measure"):
                layers += study.measure_after(it, layers, after, blocks, console.progress)
        with clock.timing("measure"):
            concluded, specificity = conclusion.conclude(it, before, after, layers, found)
        found |= concluded | clock.seconds() | {"oom_retry": "; ".join(memory.retries) or None}
        results.write_job(folder, found, layers, study.pair_rows(it, before, after), losses, specificity)
    print(console.result_table(found, str(config.eval.layer), str(folder), tracked.link, in_short=in_sweep), end="")
    return found


class _Clock:
    """Seconds of the parts of a run, under their MLflow names."""

    def __init__(self) -> None:
        self._start = perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def timing(self, part: str, within: str | None = None) -> Iterator[None]:
        """Adds the block's time to the part's, and takes it off that of the part it interrupts."""
        began = perf_counter()
        yield
        spent = perf_counter() - began
        for name, seconds in ((part, spent), (within, -spent)):
            if name:
                self._seconds[f"time/{name}_s"] = self._seconds.get(f"time/{name}_s", 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        return self._seconds | {"time/total_s": perf_counter() - self._start}


def job(composed: DictConfig) -> None:
    """What Hydra calls for each job, here or in a launcher's worker: one run in Hydra's folder.

    An error is left in failed.json and not raised: Hydra would print an account of its own, and stop a sweep's other
    jobs from being seen.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    _without_credentials(*(folder / ".hydra").glob("*.yaml"), Path(settings.sweep.dir) / "multirun.yaml")
    os.chdir(settings.runtime.cwd)  # where paths of settings begin: not Hydra's folder, nor where a cluster starts
    if settings.mode == RunMode.MULTIRUN:
        _job_of_sweep(composed, folder, Path(settings.sweep.dir), settings.job.num)
    elif error := _attempt(composed, folder):
        _errors.append((folder, error))


def _without_credentials(*written: Path) -> None:
    """Takes passwords out of the settings that Hydra has written down: folders are shared."""
    for file in written:
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if (shown := public_uri(text)) != text:
            write_text(file, shown)


def _job_of_sweep(composed: DictConfig, folder: Path, swept: Path, number: int) -> None:
    """The job, unless the sweep has it already or was ended meanwhile."""
    from src import sweep, workers
    from src.results import read_document

    planned = sweep.entry(read_document(swept), number)
    if planned["status"] == "done":
        print(f"already done: {planned['name']} → {planned['folder']}", flush=True)
        return
    title = f"job {number}: {planned['name']}"
    with ExitStack() as around:
        if not sweep.here():
            around.enter_context(workers.at_work(folder))
        document = read_document(swept)  # read again: who ends the sweep writes that first, and then looks for workers
        if document["ended"]:
            sweep.withdraw(folder)
            return
        if sweep.here():
            print(f"\n{title}")
        else:
            around.enter_context(workers.in_one_piece(title))
        around.enter_context(sweep.placed(document, number))
        _attempt(composed, folder, planned | {"search": document.get("search", {})})


def _attempt(composed: DictConfig, folder: Path, planned: Mapping[str, Any] | None = None) -> Exception | None:
    """Runs the job; returns what went wrong, which is in failed.json then. `planned` is its entry in sweep.json."""
    from src import memory, results

    results.clear(folder)
    logging.captureWarnings(True)  # the libraries' warnings go to run.log
    try:
        config, judge = read_config(composed), None
        if planned and planned["config_hash"] not in (None, config_hash(config)):
            raise UserError("a file of conf/ has changed since the sweep began: give the command once more")
        if planned and planned["search"].get("pruning"):
            from src import search

            judge = search.judge(planned, folder, config.train.epochs)
        with memory.told():
            run(config, folder, judge, in_sweep=planned is not None)
    except Pruned as pruned:
        print(f"pruned: {pruned}")
    except Exception as error:
        if interruption := interrupts.under_way():  # a library has made an exception of its own of it
            raise interruption from error
        log.error("%s", error, exc_info=error)
        try:
            results.record_failure(folder, error)
        except OSError:  # a disk that takes nothing at all: a sweep's end could only say that the job was killed
            if planned:
                console.fail(public_uri(f"{planned['name']}: {error}"))
        _print_traceback(error)
        return error
    return None


_errors: list[tuple[Path, Exception]] = []  # of single runs; Hydra's own main returns nothing
_signals: list[int] = []  # that ended this process


def main() -> int:
    """The command. Exit status: 0, 1 for a failed job, 2 for bad input, 130 or 143 where a signal ended it."""
    import hydra

    from src import sweep

    wait_briefly()  # before torch is imported
    leave_quickly()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hands its errors to us instead of printing its own account of them
    if "--debug" in sys.argv:
        os.environ["TLI_DEBUG"] = "1"  # workers have it from there
    words = [word for word in sys.argv[1:] if word != "--debug"]
    sweep.failures = 0
    _signals.clear()
    try:
        interrupts.on_signals(_interrupted)
        register()
        if {"-h", "--help"} & set(words):
            help_quickly()
        refuse_odd_options(words)
        config_name, words = past_job(words)
        sys.argv[1:] = sorted(words, key=lambda word: word not in ("-m", "--multirun"))  # else `a=1 -m b=2` fails
        hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=config_name)(job)()
    except BrokenPipeError:  # whoever read our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        return 141
    except SystemExit as end:  # Hydra would make a warning of what a callback raises
        if not isinstance(end.code, Exception):
            raise
        return _report(end.code, None)
    except (KeyboardInterrupt, Exception) as error:
        interrupts.arrived()
        if _signals or isinstance(error, KeyboardInterrupt):  # a library may have made an exception of its own of it
            console.fail("interrupted")
            return 128 + max(_signals, default=signal.SIGINT)
        return _report(error, None)
    finally:
        interrupts.arrived()
        sweep.close()  # a sweep that was interrupted
    status = max((_report(error, folder) for folder, error in _errors), default=min(sweep.failures, 1))
    return 128 + max(_signals) if _signals else status  # a library may have swallowed the exception


def _interrupted(number: int) -> None:
    """Ends the workers first: what a launcher does about an exception gives them no time to close their runs."""
    from src import sweep

    interrupts.ignore_signals()  # an impatient second Ctrl-C must not leave workers behind
    _signals.append(number)
    sweep.stop()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # from here on it ends everything at once
    interrupts.raise_surely(KeyboardInterrupt())


def _report(error: Exception, folder: Path | None) -> int:
    """One line on stderr; the traceback as well where --debug or TLI_DEBUG asks for it."""
    from src import sweep

    if folder is None:  # else the job has printed it
        error = disk_error(error, sweep.place) or error  # Hydra's own writing doesn't say where
        _print_traceback(error)
    if isinstance(error, UserError):
        console.fail(public_uri(str(error)))
        return 2
    if folder is None and type(error).__module__.startswith(("hydra.", "omegaconf.")):
        console.fail(public_uri(_hydra_line(error)))
        return 2
    if isinstance(error, DiskError):
        console.fail(f"the job failed: {error}")
        return 1
    where = f"; {folder}/run.log has the traceback" if folder else "; --debug shows the traceback"
    console.fail(public_uri(f"the job failed: {type(error).__name__}: {error}{where}"))
    return 1


def _print_traceback(error: Exception) -> None:
    if os.environ.get("TLI_DEBUG"):
        print(public_uri("".join(traceback.format_exception(error))), end="", file=sys.stderr)


def _hydra_line(error: BaseException) -> str:
    """The telling lines of Hydra's message and of its cause, led by the override that they are about."""
    lines = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines()]
    noise = ("full_key:", "object_type=", "reference_type=", "See https:", "Set the env", "Config search", "provider=")
    said = dict.fromkeys(line for line in lines if len(line) > 1 and not line.startswith((*noise, "Lexer")))
    if override := getattr(error, "override", None):
        return "; ".join([f"{override}: can't be read as key=value", *(line for line in said if override not in line)])
    return "; ".join(said)


if __name__ == "__main__":
    from src.run import main as importable  # workers look for `job` in src.run, not in a `__main__` that is their own

    sys.exit(importable())
