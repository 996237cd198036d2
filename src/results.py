"""The job folder: what a run found, written whole. Tracking, plots and reports are made from these files."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.errors import DiskError, NumbersError, UserError
from src.files import digest, file_digest, write_text

RESULTS, SWEEP = "results.json", "sweep.json"
RESULTS_VERSION = 2  # 1 counted retrieval and the paired tests by pair, 2 counts them by source word
_AGAIN = "-again-"  # in the name of a folder in which src.reproduce has repeated a job: it stands for nothing else
FAILED, PRUNED = "failed.json", "pruned.json"  # what ended a job, in its folder
OUTCOMES = (RESULTS, PRUNED)  # a job is done where one of them stands
_TABLES = ("layers.csv", "pairs.csv", "training.csv", "search.csv")
SETTLED = ("done", "pruned")  # jobs that a sweep doesn't run again
LAYER_COLUMNS = ("layer", "stage", "split", "measure", "value")
PAIR_COLUMNS = ("source", "target", "split", "cosine_before", "cosine_after", "rank_before", "rank_after")


def write_job(
    folder: Path,
    results: Mapping[str, Any],
    layers: Sequence[Sequence[Any]],
    pairs: Sequence[Sequence[Any]],
    losses: Sequence[float],
    specificity: Mapping[str, Any],
) -> None:
    """Writes all of a job's tables and figures, and results.json last: where it stands, the job is whole.

    Raises NumbersError for a number that isn't finite: none may pass for a result.
    """
    from src.plots import draw_all

    for key, value in results.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise NumbersError(f"{key} is {value}: not a result")
    write_table(folder / "layers.csv", LAYER_COLUMNS, layers)
    write_table(folder / "pairs.csv", PAIR_COLUMNS, pairs)
    if losses:
        write_table(folder / "training.csv", ("step", "loss"), enumerate(losses, start=1))
    draw_all(
        folder,
        layers=read_table(folder / "layers.csv"),
        pairs=read_table(folder / "pairs.csv"),
        null={split: result.null for split, result in specificity.items()},
        observed={split: result.gain for split, result in specificity.items()},
        title=results["name"],
    )
    write_results(folder, results)


# --- results.json vouches for the folder --------------------------------------------------------------------


class DamageError(ValueError):
    """A file of a job's folder isn't what the job wrote; names it, in the folder's own terms, and says why."""


def write_results(folder: Path, found: Mapping[str, Any], name: str = RESULTS) -> None:
    """Writes what a job found, with the digests of its other files (`files`) and of all the rest (`sha256`).

    Whatever changes such a file later writes it by this, too; then `files` stays as it was.
    """
    if "files" not in found:
        files = {path.relative_to(folder).as_posix(): file_digest(path) for path in _files(folder)}
        found = {"files": files} | dict(found)
    write_sealed(folder / name, found)


def read_results(folder: Path, name: str = RESULTS, *, alone: bool = False) -> dict[str, Any]:
    """What `write_results` wrote, once the digests are seen to agree: of the file itself and, unless `alone`, of all.

    Raises DamageError, and FileNotFoundError where there is no such file. A file of an earlier version has no digests.
    """
    found = _read_sealed(folder / name)
    for file, expected in ({} if alone else found.get("files", {})).items():
        if not (folder / file).is_file():
            raise DamageError(f"{file} is missing")
        if file_digest(folder / file) != expected:
            raise DamageError(f"{file} is damaged (its digest differs)")
    return found


def read_document(folder: Path) -> dict[str, Any]:
    """What a sweep's sweep.json says. Raises DamageError, and FileNotFoundError where there is none."""
    found = _read_sealed(folder / SWEEP)
    try:
        listed = all(isinstance(job["number"], int) for job in found["jobs"])
    except (KeyError, TypeError):
        listed = False
    if not listed:
        raise DamageError(f"{SWEEP} is damaged (it lists no jobs)")
    return found


def write_sealed(file: Path, found: Mapping[str, Any]) -> None:
    """Writes JSON with a digest (`sha256`) of all that it says."""
    rest = {key: value for key, value in found.items() if key != "sha256"}
    text = json.dumps(rest | {"sha256": _own_digest(rest)}, indent=1, ensure_ascii=False)
    write_text(file, text + "\n")


def _read_sealed(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{file.name} is damaged ({' '.join(str(error).split())})") from error
    if not isinstance(found, dict):
        raise DamageError(f"{file.name} is damaged (it holds no keys)")
    rest = {key: value for key, value in found.items() if key != "sha256"}
    if found.keys() & {"sha256", "files"} and found.get("sha256") != _own_digest(rest):
        raise DamageError(f"{file.name} is damaged (its digest differs)")
    return found


def _own_digest(rest: Mapping[str, Any]) -> str:
    return digest(json.dumps(rest, sort_keys=True))


def _files(folder: Path) -> list[Path]:
    """What the numbers and the adapter stand in; figures are drawn from these."""
    listed = [folder / name for name in _TABLES] + sorted((folder / "adapter").rglob("*"))
    return [path for path in listed if path.is_file()]


def repetition(folder: Path) -> Path:
    """Where src.reproduce repeats the job of a folder."""
    return folder.with_name(f"{folder.name}{_AGAIN}{time.strftime('%Y%m%d-%H%M%S')}")


def claimed_split(results: Mapping[str, Any], split: str) -> str:
    """The prefix under which the verdict reads a split; `control_unalike` where enough words aren't look-alikes."""
    return str(results.get("claimed_on", split)) if split == "control" else split


def specificity_pvalue(results: Mapping[str, Any], split: str) -> float | None:
    """The larger of the raw and the scaled test's, as the verdict uses it; None where a pilot has none."""
    names = ("specificity", "scaled_specificity")
    found = (results.get(f"{claimed_split(results, split)}/{name}_pvalue") for name in names)
    return max((float(one) for one in found if isinstance(one, int | float) and math.isfinite(one)), default=None)


def is_repetition(folder: Path) -> bool:
    """Whether src.reproduce has made the folder."""
    return bool(re.search(rf"{_AGAIN}\d{{8}}-\d{{6}}$", folder.name))


# --- how a job ended ----------------------------------------------------------------------------------------


def clear(folder: Path) -> None:
    """Takes an earlier attempt's results out of a job's folder, so that none of them can pass for the new ones.

    Temporary files that a killed attempt has left go, too.
    """
    for left in folder.glob(".*.tmp"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    for name in (RESULTS, FAILED, PRUNED, *_TABLES):
        (folder / name).unlink(missing_ok=True)
    for figure in (folder / "plots").glob("*.png"):
        figure.unlink()
    if (folder / "adapter" / "adapter_config.json").exists():
        aside = (folder / "adapter").rename(folder / ".adapter.tmp")  # at once: a kill would leave half of it
        shutil.rmtree(aside)


def record_failure(folder: Path, error: Exception) -> None:
    """Leaves in a job's folder what ended it, in one line; on a full disk an empty file, which needs no room."""
    said = " ".join(str(error).split())
    if not isinstance(error, UserError | DiskError):
        said = f"{type(error).__name__}: {said}"
    text = json.dumps({"error": said, "kind": type(error).__name__}, ensure_ascii=False) + "\n"
    try:
        write_text(folder / FAILED, text)
    except DiskError:
        (folder / FAILED).touch()


def record_pruned(folder: Path, found: Mapping[str, Any]) -> None:
    """Writes what was found until a search ended the job, with `pruned`, why: all that the job's run needs."""
    write_results(folder, found, PRUNED)


def outcome_file(folder: Path) -> Path:
    """Which of OUTCOMES stands in the folder of a job that is done."""
    return next(folder / name for name in OUTCOMES if (folder / name).exists())


def outcome(folder: Path) -> tuple[str, str | None]:
    """(done, pruned, failed, killed or pending; what ended it) of a job, from its folder; damaged is failed."""
    try:
        if (folder / RESULTS).exists():
            read_results(folder)
            return "done", None
        if (folder / PRUNED).exists():
            return "pruned", str(read_results(folder, PRUNED)["pruned"])
        if (folder / FAILED).exists():
            said = (folder / FAILED).read_text(encoding="utf-8")
            return "failed", str(json.loads(said)["error"]) if said else "its disk is full"
    except DamageError as error:
        return "failed", str(error)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return "failed", f"its folder can't be read ({' '.join(str(error).split())})"
    return ("killed" if folder.exists() else "pending"), None


# --- small parts --------------------------------------------------------------------------------------------


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a CSV file, atomically."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, by column; none where there is no such file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
