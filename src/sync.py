"""`python -m src.sync`: records finished job folders that their tracking store doesn't have yet."""

from __future__ import annotations

import argparse
import json
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src import tracking
from src.errors import UserError
from src.files import write_text

ROOT = Path(__file__).resolve().parents[1]
_LOCATIONS = {  # where MLflow keeps absolute paths
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}


class JobError(Exception):
    """A job folder that can't be recorded; says which file and why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line for each job and a total. Exit status 1 if a job couldn't be recorded, 2 for the user's errors."""
    parser = argparse.ArgumentParser(prog="python -m src.sync", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="default: multirun/ and outputs/")
    parser.add_argument("--uri", help="the store to record in, whatever the jobs' own tracking.uri says")
    parser.add_argument("--relocate", action="store_true", help="mend a local store whose folder was moved")
    arguments = parser.parse_args(argv)
    try:
        if arguments.relocate:
            return relocate(tracking.store_uri(arguments.uri, ROOT))
        return sync(arguments.folders, arguments.uri)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def sync(folders: Sequence[Path], uri: str | None) -> int:
    """Records every job below `folders` that isn't recorded yet. Raises UserError (folder or store)."""
    if absent := [folder for folder in folders if not folder.is_dir()]:
        raise UserError(f"{absent[0]}: no such folder")
    places = folders or [place for name in ("multirun", "outputs") if (place := ROOT / name).is_dir()]
    outcomes: Counter[str] = Counter()
    for file in sorted({file for place in places for file in place.rglob("results.json")}):
        try:
            outcome = _sync_job(file.parent, uri)
        except (JobError, tracking.TrackingError, OSError, KeyError, ValueError) as error:
            outcome = "failed"
            print(f"{file.parent}: {error or type(error).__name__}", file=sys.stderr)
        else:
            print(f"{file.parent}: {outcome}")
        outcomes[outcome] += 1
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())) or "no finished jobs found")
    return 1 if outcomes["failed"] else 0


def _sync_job(folder: Path, uri: str | None) -> str:
    with tracking.upload_lock(folder):
        results, config = _read(folder)
        settings = config["tracking"]
        if settings["backend"] == "off" and uri is None:
            return "not tracked (tracking=off; --uri records it)"
        store = tracking.store_uri(uri or settings["uri"], ROOT)
        _check(store, settings["experiment"])
        run_id = results.get("mlflow_run_id")
        state = tracking.upload_state(folder, run_id, store) if run_id else "unknown"
        match state:
            case "uploaded":
                return "already recorded"
            case "deleted":
                return "left alone (its run was deleted)"
            case "unknown":
                run_id = _open(folder, results, config, store)
            case "missing":
                pass
        tracking.upload(folder, str(run_id), store)
        tracking.finish(str(run_id), store, "FINISHED")
    return "recorded"


def _open(folder: Path, results: dict[str, Any], config: Mapping[str, Any], store: str) -> str:
    """Creates the run that the job couldn't, and writes its id into results.json."""
    run_id = tracking.start(
        store,
        config["tracking"]["experiment"],
        name=results["name"],
        params=results["params"],
        tags={key: results[key] for key in ("config_hash", "git_commit", "model_revision")},
        dataset=results.get("dataset"),
        parent=None,
    )
    text = json.dumps(results | {"mlflow_run_id": run_id}, indent=1, ensure_ascii=False)
    write_text(folder / "results.json", text + "\n")
    return run_id


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        if not isinstance(results, dict) or "config_hash" not in results:
            raise ValueError("not a job's results")
    except (OSError, ValueError) as error:
        raise JobError(f"results.json can't be read ({error}); run the job again") from error
    try:
        config = OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "config.yaml"), resolve=True)
        if not isinstance(config, dict) or not {"backend", "uri", "experiment"} <= set(config["tracking"]):
            raise ValueError("no tracking group")
    except (OSError, ValueError, KeyError, OmegaConfBaseException) as error:
        reason = (str(error).splitlines() or ["empty"])[0]
        raise JobError(f".hydra/config.yaml can't be read ({reason}); run the job again") from error
    return results, {str(key): value for key, value in config.items()}


@cache
def _check(store: str, experiment: str) -> None:
    tracking.check(store, experiment)


def relocate(uri: str) -> int:
    """Points a local store that was moved or copied at the artifacts beside it; a copy of the database is kept."""
    file = tracking.database(uri)
    if file is None or not file.exists():
        raise UserError(f"--relocate: no local store at {tracking.public_uri(uri)}")
    strangers = tracking.moved(uri)
    if not strangers:
        print(f"{file}: nothing to mend")
        return 0
    backup = file.with_name(f"{file.name}.{time.strftime('%Y%m%d-%H%M%S')}.bak")
    with closing(sqlite3.connect(file)) as connection:
        with closing(sqlite3.connect(backup)) as copy:
            connection.backup(copy)
        with connection:
            count = sum(_replace(connection, old, str(file.parent / "artifacts")) for old in strangers)
    print(f"{file}: {count} paths now point below {file.parent}; the database as it was: {backup.name}")
    return 0


def _replace(connection: sqlite3.Connection, old: str, new: str) -> int:
    count = 0
    for table, columns in _LOCATIONS.items():
        for column in columns:  # substr and not LIKE: a path may hold % and _
            count += connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                (new, len(old) + 1, len(old) + 1, f"{old}/"),
            ).rowcount
    return count


if __name__ == "__main__":
    sys.exit(main())
