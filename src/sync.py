"""`python -m src.sync`: records finished job folders and sweeps that their tracking store doesn't have yet."""

from __future__ import annotations

import argparse
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src import console, tracking
from src.errors import UserError
from src.results import (
    OUTCOMES,
    PRUNED,
    SWEEP,
    DamageError,
    is_repetition,
    outcome,
    outcome_file,
    read_document,
    read_results,
    write_results,
    write_sealed,
)

ROOT = Path(__file__).resolve().parents[1]
THERE = "already recorded"
UNTRACKED = "not tracked (tracking=off; --uri records it)"
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
        console.fail(str(error))
        return 2


def sync(folders: Sequence[Path], uri: str | None) -> int:
    """Records every job and sweep below `folders` that isn't recorded yet. Raises UserError (folder or store)."""
    if absent := [folder for folder in folders if not folder.is_dir()]:
        raise UserError(f"{absent[0]}: no such folder")
    places = folders or [place for name in ("multirun", "outputs") if (place := ROOT / name).is_dir()]
    outcomes: Counter[str] = Counter()
    sweeps = {file.parent: False for place in places for file in place.rglob(SWEEP)}
    jobs = {file.parent for place in places for name in OUTCOMES for file in place.rglob(name)}
    for folder in sorted(folder for folder in jobs if not is_repetition(folder)):
        became = _told(folder, lambda folder=folder: _sync_job(folder, uri))
        outcomes[became] += 1
        if sweep := _sweep_of(folder):
            sweeps[sweep] = sweeps.get(sweep, False) or became == "recorded"
    for folder, late in sorted(sweeps.items()):
        outcomes[_told(folder, lambda folder=folder, late=late: _sync_sweep(folder, uri, late))] += 1
    del outcomes[""]
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())) or "no finished jobs found")
    return 1 if outcomes["failed"] else 0


def _told(folder: Path, record: Callable[[], str]) -> str:
    """What has become of the folder, once it is printed, unless nothing was to be done; "" where it doesn't count."""
    try:
        became = record()
    except (JobError, tracking.TrackingError, OSError, KeyError, ValueError) as error:
        print(f"{folder}: {error or type(error).__name__}", file=sys.stderr)
        return "failed"
    if became not in ("", THERE, UNTRACKED):
        print(f"{folder}: {became}")
    return became


def _sync_job(folder: Path, uri: str | None) -> str:
    with tracking.upload_lock(folder):
        results, settings = _read(folder)
        if settings["backend"] == "off" and uri is None:
            return UNTRACKED
        if "config_hash" not in results:
            return "left alone (pruned, by an earlier version)"
        store = _store(settings, uri)
        run_id = results.get("mlflow_run_id")
        state = tracking.upload_state(folder, run_id, store.uri) if run_id else "unknown"
        match state:
            case "uploaded":
                return THERE
            case "deleted":
                return "left alone (its run was deleted)"
            case "unknown":
                run_id = _open(folder, results, store)
            case "missing":
                pass
        tracking.upload(folder, str(run_id), store.uri)
        tracking.finish(str(run_id), store.uri, "FINISHED")
    return "recorded"


def _open(folder: Path, results: dict[str, Any], store: tracking.Store) -> str:
    """Finds or creates the run that the job has no id of, and writes its id down."""
    opening = results.get("opening") or uuid4().hex
    run_id = tracking.opened(store.uri, store.experiment, opening)
    if run_id is None:
        name = results["name"]
        if sweep := _sweep_of(folder):
            with suppress(JobError):  # told by _sync_sweep
                jobs = _document(sweep)["jobs"]
                name = next((job["name"] for job in jobs if _own(job, sweep) == folder.resolve()), name)
        run_id = tracking.start(
            store.uri,
            store.experiment,
            name=name,
            params=results["params"],
            tags={key: results[key] for key in ("config_hash", "git_commit", "model_revision")},
            dataset=results.get("dataset"),
            parent=None,  # _sync_sweep gives it one
            opening=opening,
        )
    write_results(folder, results | {"mlflow_run_id": run_id, "opening": opening}, outcome_file(folder).name)
    return run_id


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what the job found, its tracking settings)"""
    file = outcome_file(folder)
    try:
        results = read_results(folder, file.name)
        if file.name != PRUNED and "config_hash" not in results:
            raise DamageError(f"{file.name} is damaged (it holds no job's results)")
    except (OSError, DamageError) as error:
        raise JobError(f"{error}; run the job again") from error
    return results, _settings(folder)


def _settings(folder: Path) -> dict[str, Any]:
    try:
        config = OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "config.yaml"), resolve=True)
        if not isinstance(config, dict) or not {"backend", "uri", "experiment"} <= set(config["tracking"]):
            raise ValueError("no tracking group")
    except (OSError, ValueError, KeyError, OmegaConfBaseException) as error:
        reason = (str(error).splitlines() or ["empty"])[0]
        raise JobError(f".hydra/config.yaml can't be read ({reason}); run the job again") from error
    return config["tracking"]


def _store(settings: Mapping[str, Any], uri: str | None) -> tracking.Store:
    store = tracking.Store(tracking.store_uri(uri or settings["uri"], ROOT), settings["experiment"])
    _check(store)
    return store


@cache
def _check(store: tracking.Store) -> None:
    tracking.check(store.uri, store.experiment)
    tracking.close_lost(store)


# --- sweeps -------------------------------------------------------------------------------------------------


def _sweep_of(folder: Path) -> Path | None:
    """The folder of the sweep that the job belongs to."""
    return next((parent for parent in folder.resolve().parents if (parent / SWEEP).exists()), None)


def _document(sweep: Path) -> dict[str, Any]:
    try:
        found = read_document(sweep)
        if not {"id", "ended", "command"} <= found.keys():
            raise DamageError(f"{SWEEP} is damaged (it's no sweep's)")
    except (OSError, DamageError) as error:
        raise JobError(f"{error}; its jobs count by their own folders: run the same command to sum them up") from error
    return found


def _own(job: Mapping[str, Any], sweep: Path) -> Path | None:
    """The folder of a sweep's job, here also where the whole was moved; None for one that another sweep has done."""
    return None if job["reused"] else sweep.resolve() / Path(job["folder"]).name


def _sync_sweep(folder: Path, uri: str | None, late: bool) -> str:
    """Completes the run of a sweep that has ended; puts jobs that were added `late` below it."""
    found = _document(folder)
    jobs = [own for job in found["jobs"] if (own := _own(job, folder)) and (own / ".hydra" / "config.yaml").exists()]
    if not jobs or not (late or found["ended"]):
        return ""
    settings = _settings(jobs[0])
    if settings["backend"] == "off" and uri is None:
        return ""
    store = _store(settings, uri)
    with tracking.upload_lock(folder):
        found = _with_run(folder, store)
        run_id, ended = found["mlflow_run_id"], found["ended"]
        state = tracking.sweep_state(store, run_id, found["id"], ended or "")
        if state == "deleted" or not (late or state == "missing"):
            return ""
        written = [_read(own)[0] for own in jobs if any((own / name).exists() for name in OUTCOMES)]
        tracking.adopt(store, run_id, [one["mlflow_run_id"] for one in written if one.get("mlflow_run_id")])
        if state == "resumed" or not ended:  # its end is told by the other sweep, or has not come
            return ""
        if not all(outcome(Path(job["folder"]))[0] == "done" for job in found["jobs"] if job["status"] == "done"):
            return "sweep left alone (the folder of one of its jobs is gone or damaged)"
        from src.sweep import record

        record(found, folder, store)
    return "sweep completed"


def _with_run(folder: Path, store: tracking.Store) -> dict[str, Any]:
    """What sweep.json says; the sweep's run is opened where the sweep couldn't."""
    from src.sweep import open_run

    found = {"opening": uuid4().hex, "name": "sweep"} | _document(folder)  # both are absent in an older one
    run_id = found["mlflow_run_id"]
    if run_id is None or tracking.sweep_state(store, run_id, found["id"], "") == "unknown":
        run_id = tracking.opened(store.uri, store.experiment, found["opening"]) or open_run(store, found)
        found["mlflow_run_id"] = run_id
        now = _document(folder)
        if found["ended"] and (now["started"], now["ended"]) == (found["started"], found["ended"]):
            # else a process of the sweep's writes the file
            write_sealed(folder / SWEEP, found)
    return found


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
