"""What a sweep has left in its folder and in its MLflow database, as facts that two sweeps can be compared by.

The database is read with SQL and not through MLflow, so that what is compared doesn't pass through what is tested.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil

Facts = dict[str, Any]
STAGES = ("start", "database", "train", "measure", "write", "upload", "summary")
# Of when, where and by which process, not of what was found.
_RESULTS = {"mlflow_run_id", "opening", "git_commit", "files", "sha256"}
_TAGS = {"host", "opening", "pid", "process_start", "sweep", "uploaded", "git_commit", "mlflow.source.git.commit"}
_TAGS |= {"mlflow.parentRunId", "mlflow.source.name", "mlflow.note.content", "command"}
_LOGS = {"results.json", "run.log", "hydra.yaml", "config.yaml", "overrides.yaml"}  # hold times and folders


def read_facts(folder: Path) -> Facts:
    """Everything that must be the same however often the sweep in `folder` was killed on its way."""
    jobs = {file.parent: json.loads(file.read_text()) for file in sorted(folder.glob("multirun/*/*/*/results.json"))}
    newest = max(folder.glob("multirun/*/*/sweep.json"), key=lambda file: file.stat().st_mtime)
    document = json.loads(newest.read_text())
    facts: Facts = {
        "jobs": sorted(results["name"] for results in jobs.values()),
        "sweep.json": [(job["name"], job["status"]) for job in document["jobs"]],
        "sweep.json ended": document["ended"] is not None,
        "left over": sorted(str(file.relative_to(folder)) for file in _temporary(folder, list(jobs))),
    }
    for job, results in jobs.items():
        facts |= {f"{results['name']}: {key}": value for key, value in job_facts(job, results)}
    facts |= dict(_store_facts(folder, document["mlflow_run_id"]))
    return json.loads(json.dumps(facts).replace(str(folder), "."))


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """One line for each fact that differs."""
    keys = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    return [f"{key}: {str(found.get(key))[:200]} instead of {str(expected.get(key))[:200]}" for key in keys]


def still_open(folder: Path) -> set[tuple[str, str]]:
    """(name, id) of the runs that are RUNNING."""
    return set(_query(folder, "SELECT name, run_uuid FROM runs WHERE status = 'RUNNING'"))


def stage_of(folder: Path, earlier: int) -> str:
    """What a sweep is at, by what lies in its folder; `earlier` is how many sweeps there were before it."""
    sweeps = sorted(folder.glob("multirun/*/*/sweep.json"))
    if len(sweeps) == earlier:
        return "database" if list(folder.glob("mlruns/.mlflow.db.*")) else "start"
    if (sweeps[-1].parent / "overview").exists():
        return "summary"
    reused = {job["number"] for job in json.loads(sweeps[-1].read_text())["jobs"] if job["reused"]}
    jobs = sorted(file.parent for file in sweeps[-1].parent.glob("*/.hydra") if int(file.parent.name) not in reused)
    for name, place in (("results.json", "upload"), ("layers.csv", "write"), ("adapter", "measure")):
        if jobs and (jobs[-1] / name).exists():
            return place
    return "train"


def processes(sessions: Sequence[int]) -> list[psutil.Process]:
    """Those of the sessions that are still there."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def job_facts(job: Path, results: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((key, value) for key, value in results.items() if key not in _RESULTS and not key.startswith("time/"))
    for file in sorted(job.rglob("*")):
        name = str(file.relative_to(job))
        if file.is_file() and file.name not in _LOGS and not name.startswith("."):
            yield name, _digest(file, job.parents[3])
    for name in ("layers.csv", "pairs.csv"):  # the numbers themselves, for whoever looks for a difference
        yield f"{name} as text", (job / name).read_text()


def _temporary(folder: Path, jobs: list[Path]) -> Iterator[Path]:
    """Half-written files: in the jobs that count any at all, in cache and store those that take room."""
    for place in (*jobs, folder / "cache", folder / "mlruns"):
        for file in place.rglob("*.tmp*"):
            if place in jobs or file.is_dir() or file.stat().st_size > 64_000:
                yield file


def _store_facts(folder: Path, parent: str) -> Iterator[tuple[str, Any]]:
    """Of the finished runs alone: a killed attempt may stay as KILLED."""
    runs = _query(folder, "SELECT run_uuid, name, status FROM runs")
    tags = _by_run(folder, "tags")
    yield "runs left open", [name for _, name, status in runs if status == "RUNNING"]
    ended = Counter(status for _, _, status in runs if status not in ("FINISHED", "KILLED"))
    yield "runs that failed", dict(ended)
    finished = {run: name for run, name, status in runs if status == "FINISHED"}
    yield "finished runs", sorted(finished.values())
    yield "the sweep's run is finished", parent in finished
    parents = Counter(tags[run].get("mlflow.parentRunId") == parent for run in finished)
    yield "finished runs in the sweep's", parents[True]
    params, models = _by_run(folder, "params"), _query(folder, "SELECT source_run_id, status FROM logged_models")
    for run, name in finished.items():
        label = f"run {name}"
        yield f"{label}: params", params.get(run, {})
        yield f"{label}: tags", {key: value for key, value in tags[run].items() if key not in _TAGS}
        yield f"{label}: metrics", sorted(_points(folder, run))
        yield f"{label}: inputs", len(_query(folder, f"SELECT 1 FROM inputs WHERE destination_id = '{run}'"))
        yield f"{label}: models", sorted(str(status) for source, status in models if source == run)
        (place,) = folder.glob(f"mlruns/artifacts/*/{run}/artifacts")
        for file in sorted(file for file in place.rglob("*") if file.is_file()):
            same = None if file.name in _LOGS or file.parent.name == "overview" else _digest(file, folder)
            if file.name == "summary.json":  # each row ends with a folder
                same = sorted(row[:-1] for row in json.loads(file.read_text())["data"])
            yield f"{label}: artifact {file.relative_to(place)}", same


def _points(folder: Path, run: str) -> list[tuple[str, int, float]]:
    rows = _query(folder, f"SELECT key, step, value FROM metrics WHERE run_uuid = '{run}'")
    return [(key, step, value) for key, step, value in rows if not key.startswith("time/")]


def _by_run(folder: Path, table: str) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for run, key, value in _query(folder, f"SELECT run_uuid, key, value FROM {table}"):
        found.setdefault(run, {})[key] = value
    return found


def _query(folder: Path, sql: str) -> list[tuple[Any, ...]]:
    file = folder / "mlruns" / "mlflow.db"
    if not file.exists():
        return []
    with closing(sqlite3.connect(file, timeout=30)) as database:
        return database.execute(sql).fetchall()


def _digest(file: Path, folder: Path) -> str:
    """An adapter's settings name the folder of its base model."""
    return hashlib.sha256(file.read_bytes().replace(str(folder).encode(), b".")).hexdigest()


def table(rounds: Sequence[tuple[str, Sequence[tuple[str, str]], bool]], ways: Sequence[str]) -> str:
    """Kills in each stage by launcher and signal, of rounds as (launcher, kills as (way, stage), whether it differs).

    The last column counts the rounds with such a kill in which anything was wrong at the end.
    """
    lines = [f"| launcher | signal | {' | '.join(STAGES)} | kills | rounds that differ |"]
    lines.append("|---" * (len(STAGES) + 4) + "|")
    for launcher in sorted({launcher for launcher, _, _ in rounds}):
        for way in ways:
            mine = [(kills, wrong) for own, kills, wrong in rounds if own == launcher and way in dict(kills)]
            met = Counter(place for kills, _ in mine for other, place in kills if other == way)
            cells = " | ".join(str(met[place]) for place in STAGES)
            lines.append(f"| {launcher} | {way} | {cells} | {met.total()} | {sum(wrong for _, wrong in mine)} |")
    return "\n".join(lines)
