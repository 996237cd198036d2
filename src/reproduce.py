"""`python -m src.reproduce JOB`: runs a past job's settings once more and compares every number."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from src import console
from src.config import ROOT
from src.errors import UserError
from src.files import cache_dir
from src.process import environment
from src.results import RESULTS, DamageError, read_results, read_table, repetition

_KEYS = {  # of a table: the columns that say what its numbers are of
    "layers.csv": ("layer", "stage", "split", "measure"),
    "pairs.csv": ("source", "target", "split"),
    "training.csv": ("step",),
}
_CONDITIONS = (
    "results_version", "versions", "git_commit", "git_changes", "machine", "dataset", "model_revision", "model_digest",
    "inputs_digest", "params", "train_batch_size_used", "oom_retry",
)  # fmt: skip
_ELSEWHERE = ("params.tracking.", "params.sweep.", "params.dataset.path", "params.model.id", "params.eval.text")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 where all numbers are the same, 1 where one differs or the job fails, 2 where there is no job."""
    parser = argparse.ArgumentParser(prog="python -m src.reproduce", description=__doc__)
    parser.add_argument("job", metavar="JOB", help="a job's folder, or <date>/<time>/<job> below multirun/")
    arguments = parser.parse_args(argv)
    try:
        folder = _find(arguments.job)
        then = _read(folder)
        again = repetition(folder)
        if status := _run(folder, again, then):
            return status
        return compare(numbers(folder, then), numbers(again, now := _read(again)), conditions(then, now))
    except UserError as error:
        console.fail(str(error))
        return 2
    except OSError as error:
        console.fail(
            f"{error.filename}: {error.strerror}: the job is repeated beside its folder, which must be writable"
        )
        return 2


def _find(job: str) -> Path:
    for folder in (Path(job), Path("multirun") / job, ROOT / "multirun" / job):
        if (folder / RESULTS).exists():
            return folder.resolve()
    raise UserError(f"{job}: no finished job's folder (no results.json in it)")


def _read(folder: Path) -> dict[str, Any]:
    try:
        return {"results_version": 1} | read_results(folder)
    except (OSError, DamageError) as error:
        raise UserError(f"{folder}: {error}: there is nothing to compare with") from error


def _run(folder: Path, again: Path, then: Mapping[str, Any]) -> int:
    """Runs the job's settings in the folder `again`, untracked, with as many threads as then; the exit status.

    Encodings and measures are made anew, in a cache of its own; converted models are shared.
    """
    from src.run import main as run

    models = cache_dir() / "models"
    models.mkdir(parents=True, exist_ok=True)
    place = str(again).replace("\\", "\\\\").replace("'", "\\'")
    line = ["--config-dir", str(folder / ".hydra"), "--config-name", "config", "tracking=off"]
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".cache") as cache:
        (Path(cache) / "models").symlink_to(models)
        own = {"TLI_CACHE": cache}
        if threads := (then.get("machine") or {}).get("threads"):
            own |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
        with environment(**own), _command(["src.run", *line, f"hydra.run.dir='{place}'"]):
            return run()


@contextmanager
def _command(line: list[str]) -> Iterator[None]:
    kept, sys.argv = sys.argv, line
    try:
        yield
    finally:
        sys.argv = kept


# --- comparing ----------------------------------------------------------------------------------------------


def numbers(folder: Path, results: Mapping[str, Any]) -> dict[str, str]:
    """Every number of a job but its times, and its verdict, by where it stands: "results.json control/margin_gain"."""
    found = {f"results.json {key}": repr(value) for key, value in results.items() if _compared(key)}
    for table, keys in _KEYS.items():
        for line, row in enumerate(read_table(folder / table), start=2):
            what = f"{table} line {line} ({' '.join(row[key] for key in keys)})"
            found |= {f"{what} {column}": cell for column, cell in row.items() if column not in keys and cell}
    return found


def _compared(key: str) -> bool:
    return key == "verdict" or ("/" in key and not key.startswith("time/"))


def conditions(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What the two runs differ in that is no result: versions, commit, machine, words, model, settings."""
    before, after = _flat(then), _flat(now)
    written = [name for name in dict.fromkeys([*before, *after]) if name.partition(".")[0] in then]  # by that version
    names = [name for name in written if not name.startswith(_ELSEWHERE) and before.get(name) != after.get(name)]
    return [f"differs: {name}: {before.get(name)} then, {after.get(name)} now" for name in names]


def _flat(results: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in _CONDITIONS:
        value = results.get(name)
        inner = {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
        found |= inner if name in results else {}
    found.pop("dataset.source", None)
    return found


def compare(then: Mapping[str, str], now: Mapping[str, str], differing: Sequence[str]) -> int:
    """Prints that all is the same, or what differs: conditions first, then numbers, file by file. The exit status."""
    wrong = [name for name in dict.fromkeys([*then, *now]) if then.get(name) != now.get(name)]
    if not wrong:
        print(f"same: {len(then)} numbers")
        return 0
    for line in differing:
        print(line)
    for file in dict.fromkeys(name.split()[0] for name in wrong):
        here = [name for name in wrong if name.split()[0] == file]
        largest = max(here, key=lambda name: _distance(then.get(name), now.get(name)))
        apart = _distance(then.get(largest), now.get(largest))
        print(
            f"differs: {len(here)} of {sum(name.split()[0] == file for name in then)} numbers in {file}, most by "
            f"{apart:.3g}: {largest.partition(' ')[2]}: {then.get(largest, 'none')} then, "
            f"{now.get(largest, 'none')} now"
        )
    return 1


def _distance(then: str | None, now: str | None) -> float:
    try:
        return abs(float(then or "") - float(now or ""))
    except ValueError:  # a verdict, or a number that only one of them has
        return float("inf")


if __name__ == "__main__":
    sys.exit(main())
