"""Sweeps: every job is known and checked before the first one starts; what is done already isn't done again.

python -m src.run -m lora.layers='[1],[2],[1,2]' lora.rank=4,16 objective=triplet,infonce
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from filelock import FileLock
from hydra.experimental.callback import Callback

from src import console, summary, tracking, workers
from src.config import ROOT, read_config, run_name
from src.errors import DiskError, UserError
from src.files import held
from src.plan import Plan, plan, sweep_id, sweep_root, without_hydra
from src.process import environment
from src.results import FAILED, SETTLED, SWEEP, DamageError, outcome, read_document, write_sealed

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from src.search import Search


@dataclass
class Sweep:
    """A sweep under way: its folder, what sweep.json says, where it is tracked, and what proposes its jobs, if so."""

    folder: Path
    document: dict[str, Any]
    store: tracking.Store | None
    search: Search | None


_current: Sweep | None = None  # of this process; Hydra keeps nothing of a callback's that main could ask
failures = 0  # of the sweep that this process closed
place = Path()  # of the run or sweep under way, where Hydra makes its folders
_hold: int | None = None  # on that place


class SweepCallback(Callback):
    """What Hydra calls around a run or a sweep."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Refuses a bad config before Hydra makes a job folder."""
        global place
        with _passed_on():
            place = Path(config.hydra.run.dir)
            read = read_config(without_hydra(config))
            if read.sweep.dry_run:
                print(f"would run  {run_name(read)}")
                raise SystemExit(0)
            _take("hydra.run.dir", place)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Checks and plans all jobs, and opens the sweep's run."""
        with _passed_on():
            begin(config)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:  # noqa: ARG002 (Hydra names its arguments)
        """Sums up; after an interruption `close` is called by main instead."""
        with _passed_on():
            close()


def _take(key: str, folder: Path) -> None:
    """Holds the folder until `close`. Raises UserError where another command is at work there."""
    global _hold
    try:
        _hold = held(folder)
    except BlockingIOError as error:
        raise UserError(f"{key}: another command is at work in {folder}; choose another folder") from error


@contextmanager
def _passed_on() -> Iterator[None]:
    """Hydra makes warnings of a callback's exceptions and goes on; as a SystemExit's code they reach main."""
    try:
        yield
    except Exception as error:
        raise SystemExit(error) from error


# --- before the first job -----------------------------------------------------------------------------------


def begin(config: DictConfig) -> None:
    """Plans the sweep and opens it, or ends the program where there is nothing to run. Raises UserError."""
    global _current, failures, place
    _current, failures, place = None, 0, Path(config.hydra.sweep.dir)
    from omegaconf import read_write

    workers.prepare(config)
    search = _search(config)
    planned = search.plan if search else plan(config)
    if planned.first.sweep.dry_run:
        print(search.preview()) if search else _print_plan(planned.jobs)
        raise SystemExit(0)
    store = tracking.open_store(planned.first.tracking, ROOT)
    _take("hydra.sweep.dir", planned.folder)
    if search:
        search.open()
    else:
        with read_write(config):
            config.hydra.sweeper._target_ = "hydra_plugins.tli_grid.GridSweeper"
    for job in planned.jobs:
        if job["status"] == "done":
            tracking.complete(store, Path(job["folder"]))
        else:
            (Path(job["folder"]) / FAILED).unlink(missing_ok=True)
    earlier = None if planned.first.sweep.force else _interrupted(planned, search, store)
    workers.start(config)
    document = {
        "id": sweep_id(planned.folder),
        "mlflow_run_id": None,
        "opening": uuid4().hex,  # as in a job's results.json
        "name": _name(planned, config),
        "command": tracking.public_uri(shlex.join(["python", "-m", "src.run", *sys.argv[1:]])),
        "overrides": [tracking.public_uri(override) for override in planned.overrides],
        "swept": planned.swept,
        "started": _now(),
        "ended": None,
        "jobs": planned.jobs,
    }
    opened = Sweep(planned.folder, document, store, search)
    try:
        _open(opened, earlier)
        _current = opened
    except KeyboardInterrupt:
        if store:
            tracking.abandon(store, document["mlflow_run_id"], document["opening"], "KILLED")
        raise


def _open(sweep: Sweep, earlier: Mapping[str, Any] | None) -> None:
    """Opens the sweep's run, and writes sweep.json, from where its jobs know the run. Raises DiskError."""
    root = sweep_root(sweep.folder)
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".opening.lock"):  # of two that go on with the same sweep, one opens a run of its own
        if sweep.store:
            with tracking.warned(f"the sweep's run: {tracking.later(sweep.folder)}"):
                sweep.document["mlflow_run_id"] = open_run(sweep.store, sweep.document, earlier)
    _write(sweep)


def _search(config: DictConfig) -> Search | None:
    """The search that was asked for; None for a grid."""
    if not config.hydra.sweeper._target_.endswith(".SearchSweeper"):
        return None
    try:
        from src.search import Search
    except ModuleNotFoundError as error:
        raise UserError("hydra/sweeper=optuna needs the extra `search`: pip install 'optuna>=5,<6'") from error
    return Search(config)


def _all_done(jobs: Sequence[Mapping[str, Any]]) -> bool:
    return all(job["status"] == "done" for job in jobs)


def _interrupted(planned: Plan, search: Search | None, store: tracking.Store | None) -> dict[str, Any] | None:
    """The earlier sweep that this one goes on with; ends the program where nothing is left to do."""
    earlier = _earlier(planned, search)
    if earlier is None:
        return None
    if search and (search.missing or not earlier["ended"]):
        return earlier
    if not search and not _all_done(earlier["jobs"]):
        return earlier
    if not search and not _all_done(planned.jobs):
        return None  # its pairs have changed since, or a folder was deleted
    link = None
    with tracking.warned("no link to the sweep"):
        link = _complete(earlier, sweep_root(planned.folder) / earlier["id"], store)
    _print_end(earlier, link)
    if search:
        search.close()
        print(
            "nothing to do: every trial is done; a larger hydra.sweeper.n_trials goes on, sweep.force=true starts anew"
        )
    else:
        print("nothing to do: every job is done; sweep.force=true repeats them")
    raise SystemExit(0)


def _earlier(planned: Plan, search: Search | None) -> dict[str, Any] | None:
    """What the newest sweep of these very jobs wrote, or of this search."""
    wanted = search.study if search else {job["config_hash"] for job in planned.jobs}
    files = sweep_root(planned.folder).rglob(SWEEP)
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            document = read_document(file.parent)
        except DamageError as error:
            console.warn(f"{file.parent}: {error}: no sweep goes on from it; its jobs count by their own folders")
        except OSError:  # gone by now
            pass
        else:
            study = document.get("search", {}).get("study")
            if (study or {job.get("config_hash") for job in document["jobs"]}) == wanted:
                return document
    return None


def entry(found: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A job's entry in sweep.json; a search that goes on has gaps in its numbers."""
    return next(job for job in found["jobs"] if job["number"] == number)


def under_way() -> Sweep:
    """The sweep that `begin` has opened."""
    assert _current
    return _current


def here() -> bool:
    """Whether this is the sweep's own process, which started the command, and not a launcher's worker."""
    return _current is not None


def _print_plan(jobs: Sequence[Mapping[str, Any]]) -> None:
    for job in jobs:
        print(f"already done  {job['name']}  {job['folder']}" if job["reused"] else f"would run     {job['name']}")
    print(f"{_count(jobs)}, {sum(job['reused'] for job in jobs)} of them done already")


# --- the sweep's run in MLflow ------------------------------------------------------------------------------


def _name(planned: Plan, config: DictConfig) -> str:
    chosen = config.hydra.runtime.choices.get("experiment")
    return chosen or f"sweep of {' × '.join(planned.swept) or 'one job'}"


def open_run(store: tracking.Store, document: Mapping[str, Any], earlier: Mapping[str, Any] | None = None) -> str:
    """The parent of the jobs' runs, which find it in sweep.json. A resumed sweep goes on in its old run."""
    tags = {"sweep": document["id"], "command": document["command"]}
    before = earlier["mlflow_run_id"] if earlier else None
    return tracking.open_sweep(store, document["name"], tags, document["opening"], before)


def record(document: Mapping[str, Any], folder: Path, store: tracking.Store | None) -> str | None:
    """Draws an ended sweep's overview, brings its run up to date and closes it: a link. Raises TrackingError."""
    from src.overview import draw_overview  # it imports matplotlib, which --help needn't wait for

    found = summary.read_results(document["jobs"])
    figures: list[Path] = []
    with _as_room_allows():
        figures = draw_overview(found, folder / "overview", document["id"])
    if store is None or document["mlflow_run_id"] is None:
        return None
    statuses, search = {job["status"] for job in document["jobs"]}, document.get("search")
    cut_off = {"killed", "pending"} & statuses or (search and search["told"] < search["n_trials"])
    tracking.close_sweep(
        store,
        document["mlflow_run_id"],
        status="KILLED" if cut_off else "FINISHED" if statuses <= {*SETTLED} else "FAILED",
        ended=document["ended"],
        note=_note(document, found),
        columns=["name", "verdict", *summary.COLUMNS, "folder"],
        rows=[[*row, results["folder"]] for results in found for row in summary.job_rows([results])],
        figures=figures,
    )
    return _view(document, store)


def _complete(document: Mapping[str, Any], folder: Path, store: tracking.Store | None) -> str | None:
    """A link to an ended sweep, recorded once more if its own process was ended before it could."""
    if store and (run := document["mlflow_run_id"]):
        if tracking.sweep_state(store, run, document["id"], document["ended"]) == "missing":
            return record(document, folder, store)
        return _view(document, store)
    return None


def _view(document: Mapping[str, Any], store: tracking.Store | None) -> str | None:
    """A link that opens the UI on the sweep: its jobs with what was swept and what came out, the best first."""
    if not store or not document["mlflow_run_id"]:
        return None
    found = summary.read_results(document["jobs"])
    params = [key if "." in key else f"{key}.name" for key in document["swept"]]
    columns = [f"params.`{key}`" for key in params if all(key in results["params"] for results in found)]
    columns += ["tags.`verdict`", *(f"metrics.`{key}`" for key in summary.COLUMNS)]
    runs = [results["mlflow_run_id"] for results in found if results["mlflow_run_id"]]
    return tracking.sweep_link(
        store, document["mlflow_run_id"], document["id"], runs, columns, order="metrics.`control/margin_gain`"
    )


# --- a job's place in the sweep ----------------------------------------------------------------------------


@contextmanager
def placed(found: Mapping[str, Any], number: int) -> Iterator[None]:
    """Tells tracking which sweep the job belongs to and what it is called, wherever the job runs."""
    named = {tracking.NAME: entry(found, number)["name"]}
    if found["mlflow_run_id"]:
        named |= {tracking.PARENT: found["mlflow_run_id"], tracking.SWEEP: found["id"]}
    with environment(**named):
        yield


def withdraw(folder: Path) -> None:
    """Takes away the folder that Hydra has made for a job that is not to start, so that it counts as pending."""
    if {file.name for file in folder.iterdir()} <= {".hydra", "run.log", workers.AT_WORK}:
        shutil.rmtree(folder)


# --- after the last job -------------------------------------------------------------------------------------


def stop() -> None:
    """For a signal: no further job starts, wherever it waits, and those at work in processes of ours end now."""
    if _current is None:
        return
    _current.document["ended"] = _now()
    with _as_room_allows():
        _write(_current)
    workers.end([Path(job["folder"]) for job in _current.document["jobs"]])


def close() -> None:
    """After the last job or an interruption: writes down and prints how a sweep ended, and lets go of the folder."""
    global _current, _hold
    sweep, _current = _current, None
    try:
        if sweep:
            _close(sweep)
    except KeyboardInterrupt:  # a signal at this late hour: main closes it once more
        _current = sweep
        raise
    if _hold is not None:
        os.close(_hold)
        _hold = None


def _close(sweep: Sweep) -> None:
    global failures
    if sweep.search:
        sweep.search.close()
    jobs = sweep.document["jobs"]
    for job in jobs:
        job["status"], job["error"] = outcome(Path(job["folder"]))
    if sweep.document["ended"]:  # by a signal, which may have come within a finished job's upload
        for job in jobs:
            if job["status"] == "done" and not job["reused"]:
                tracking.complete(sweep.store, Path(job["folder"]))
    sweep.document["ended"] = _now()
    with _as_room_allows():
        _write(sweep)
    failures = sum(job["status"] not in SETTLED for job in jobs)
    link = None
    with tracking.warned(f"the sweep's run: {tracking.later(sweep.folder)}"):
        link = record(sweep.document, sweep.folder, sweep.store)
        if "killed" in {job["status"] for job in jobs}:
            tracking.close_lost(sweep.store)
    _print_end(sweep.document, link)


@contextmanager
def _as_room_allows() -> Iterator[None]:
    """A full disk doesn't keep a sweep from ending in good order."""
    try:
        yield
    except DiskError as error:
        console.warn(str(error))


def write() -> None:
    """Brings sweep.json up to date: a search's jobs come one by one."""
    assert _current
    _write(_current)


def _write(sweep: Sweep) -> None:
    if sweep.search:
        sweep.document["search"] = sweep.search.describe()
    write_sealed(sweep.folder / SWEEP, sweep.document)


def _note(document: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown description of the sweep's run."""
    lost = [job for job in document["jobs"] if job["status"] != "done"]
    parts = [f"```\n{document['command']}\n```", summary.as_markdown(found)]
    if search := document.get("search"):
        parts.append(f"```\n{summary.best_setting(search, document['jobs'], found)}```")
    parts += [f"- {job['status']}: {job['name']} {job['error'] or ''}".rstrip() for job in lost[:10]]
    return "\n\n".join([*parts, f"Report: `python -m src.report {document['id']}`"])


def _print_end(document: Mapping[str, Any], link: str | None) -> None:
    jobs = document["jobs"]
    print()
    if found := summary.read_results(jobs):
        print(summary.as_text(found))
    for job in jobs:
        if job["status"] in ("failed", "killed"):
            why = f": {job['error']}" if job["error"] else ""
            console.fail(f"{job['status']}: {job['name']}{why}; {job['folder']}/run.log")
    counts = Counter({"done": "done", "pending": "not started"}.get(job["status"], job["status"]) for job in jobs)
    print(f"{_count(jobs)}: {', '.join(f'{count} {status}' for status, count in counts.most_common()) or 'none'}")
    if counts["killed"] or counts["not started"]:
        print("the same command goes on from here")
    if search := document.get("search"):
        print(summary.best_setting(search, jobs, found), end="")
    print(f"report     python -m src.report {document['id']}")
    if link:
        print(f"in MLflow  {link}")


def _count(jobs: Sequence[Any]) -> str:
    return "1 job" if len(jobs) == 1 else f"{len(jobs)} jobs"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
