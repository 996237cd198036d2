"""The job folder: what a run found, written whole. Tracking, plots and reports are made from these files."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from src.errors import DiskError, NumbersError, UserError
from src.files import write_text

FAILED, PRUNED = "failed.json", "pruned.json"  # what ended a job, in its folder
SETTLED = ("done", "pruned")  # jobs that a sweep doesn't run again
LAYER_COLUMNS = ("layer", "stage", "split", "measure", "value")
PAIR_COLUMNS = ("source", "target", "split", "cosine_before", "cosine_after", "rank_before", "rank_after")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "mlflow", "hydra-core", "scipy", "numpy")


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
    write_text(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")


# --- how a job ended ----------------------------------------------------------------------------------------


def clear(folder: Path) -> None:
    """Takes an earlier attempt's results out of a job's folder, so that none of them can pass for the new ones.

    Temporary files that a killed attempt has left go, too.
    """
    for left in folder.glob(".*.tmp"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    for name in ("results.json", FAILED, PRUNED, "search.csv", "training.csv", "layers.csv", "pairs.csv"):
        (folder / name).unlink(missing_ok=True)
    for figure in (folder / "plots").glob("*.png"):
        figure.unlink()
    if (folder / "adapter" / "adapter_config.json").exists():
        shutil.rmtree(folder / "adapter")


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
    write_text(folder / PRUNED, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def outcome(folder: Path) -> tuple[str, str | None]:
    """(done, pruned, failed, killed or pending; what ended it) of a job, from its folder."""
    if (folder / "results.json").exists():
        return "done", None
    if (folder / PRUNED).exists():
        return "pruned", json.loads((folder / PRUNED).read_text(encoding="utf-8"))["pruned"]
    if (folder / FAILED).exists():
        said = (folder / FAILED).read_text(encoding="utf-8")
        return "failed", json.loads(said)["error"] if said else "its disk is full"
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


def versions() -> dict[str, str]:
    """What the numbers were made with: Python, the main packages."""
    found = {name: version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}


def git_commit() -> str:
    """The project's commit, with "+changes" where the working tree differs from it; "unknown" outside of git."""
    root = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=root, capture_output=True, check=False)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+changes" if changes.returncode else "")
