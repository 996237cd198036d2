"""A team's store: MLflow's server on a real PostgreSQL, artifacts through the server, and many processes at once.

Needs Debian's postgresql (tests/debian.sh installs it) and psycopg. The 8 × 25 jobs that write at once are copies of
one real job of the tiny model, each with numbers and a log of its own; to keep the test quick, only one in 25 has the
adapter, the figures and the config. They go to the server and to SQLite, each through src.tracking as a job does it.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from src.models import LoadedModel
from tests.conftest import ROOT, free_port
from tests.test_tracking import client, history

BINARIES = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), default=None)
pytest.importorskip("psycopg", reason="pip install psycopg[binary]")
pytestmark = pytest.mark.skipif(BINARIES is None, reason="apt-get install postgresql")

PROCESSES, JOBS = 8, 25
TINY = (
    "model=tiny", "dataset.limit=40", "dataset.control_size=10", "train.epochs=1", "lora.layers=[1]",
    "eval.permutations=99", "eval.probes=false", "eval.measures=[pair_cosine,mismatched_cosine,margin,csls_p_at_1]",
)  # fmt: skip


@dataclass(frozen=True)
class Server:
    """MLflow's address, and the folder in which it keeps artifacts."""

    uri: str
    artifacts: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with database() as store:
        uri = f"http://127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
        command += ["--artifacts-destination", str(folder / "artifacts"), "--host", "127.0.0.1", "-w", "2"]
        environment = os.environ | {"MLFLOW_LOGGING_LEVEL": "WARNING", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (
            (folder / "server.log").open("w") as log,
            running(
                [*command, "--port", uri.rpartition(":")[2]], cwd=folder, env=environment, stdout=log, stderr=log
            ) as process,
        ):
            wait_for(process, lambda: answers(f"{uri}/health"), folder / "server.log")
            yield Server(uri, folder / "artifacts")


@contextmanager
def database() -> Iterator[str]:
    """The URI of an empty database in a PostgreSQL cluster of its own, which refuses to run as root."""
    assert BINARIES
    folder, port = Path(tempfile.mkdtemp(prefix="tli-postgres-")), free_port()
    account: dict[str, Any] = {}
    if os.getuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
        account = {"user": "postgres", "group": "postgres", "extra_groups": []}
    keywords: dict[str, Any] = {"cwd": folder, **account}
    try:
        (folder / "password").write_text("geheim")
        (folder / "password").chmod(0o644)
        make = [BINARIES / "initdb", "-D", folder / "data", "-U", "team", "--pwfile", folder / "password"]
        make += ["--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C.UTF-8", "--no-sync"]
        subprocess.run(make, check=True, capture_output=True, **keywords)
        serve = [BINARIES / "postgres", "-D", folder / "data", "-k", folder, "-h", "127.0.0.1", "-p", str(port)]
        with (folder / "postgres.log").open("w") as log, running(serve, stdout=log, stderr=log, **keywords) as process:
            at = ["-h", "127.0.0.1", "-p", str(port)]
            ready = [BINARIES / "pg_isready", "-q", *at]
            wait_for(process, lambda: subprocess.run(ready, check=False).returncode == 0, folder / "postgres.log")
            known = os.environ | {"PGPASSWORD": "geheim"}
            subprocess.run([BINARIES / "createdb", *at, "-U", "team", "mlflow"], env=known, check=True)
            yield f"postgresql://team:geheim@127.0.0.1:{port}/mlflow"
    finally:
        shutil.rmtree(folder)


@contextmanager
def running(command: list[Any], **keywords: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process that is asked to end, with its children, after the block."""
    with subprocess.Popen(command, start_new_session=True, **keywords) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)  # PostgreSQL's fast end: it waits for no client
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(process: subprocess.Popen[Any], true: Any, log: Path) -> None:
    limit = time.monotonic() + 120
    while not true():
        assert process.poll() is None and time.monotonic() < limit, log.read_text()
        time.sleep(0.2)


def answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(url, timeout=2).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def sweep(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """A real sweep of two jobs, tracked at the server: (what sweep.json says, what was printed)."""
    folder = tmp_path_factory.mktemp("sweep")
    own = ("tracking=server", f"tracking.uri={server.uri}", "tracking.experiment=team", "lora.rank=2,4")
    command = [sys.executable, "-m", "src.run", "-m", *TINY, *own]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    (file,) = folder.glob("multirun/*/*/sweep.json")
    return json.loads(file.read_text()), done.stdout


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def numbers(results: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in results.items() if "/" in key and isinstance(value, int | float)}


def test_a_sweep_through_the_server_is_whole(
    server: Server,
    sweep: tuple[dict[str, Any], str],
    tiny: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft import PeftModel

    monkeypatch.chdir(tmp_path)  # MLflow's download leaves an empty mlflow.db where it is called
    document, printed = sweep
    store = client(server.uri)
    experiment = store.get_experiment_by_name("team").experiment_id
    assert f"{server.uri}/#/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey=" in printed
    runs = {run.info.run_id: run for run in store.search_runs([experiment])}
    parent = runs.pop(document["mlflow_run_id"])
    assert parent.info.status == "FINISHED"
    assert [file.path for file in store.list_artifacts(parent.info.run_id)] == ["overview", "summary.json"]
    assert len(runs) == len(document["jobs"]) == 2
    for folder in (Path(job["folder"]) for job in document["jobs"]):
        results = results_of(folder)
        run = runs[results["mlflow_run_id"]]
        assert run.info.status == "FINISHED" and run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.artifact_uri.startswith("mlflow-artifacts:")
        assert numbers(results).items() <= run.data.metrics.items() and len(numbers(results)) > 20
        place = tmp_path / results["name"]
        place.mkdir()
        for name in ("adapter", "plots", "layers.csv"):
            store.download_artifacts(run.info.run_id, name, str(place))
        for file in (file for file in place.rglob("*") if file.is_file()):
            assert file.read_bytes() == (folder / file.relative_to(place)).read_bytes()
        PeftModel.from_pretrained(tiny.model, str(place / "adapter")).unload()
        assert len(list((place / "plots").iterdir())) > 2
        (model,) = store.search_logged_models([experiment], f"source_run_id = '{run.info.run_id}'")
        assert str(model.status) == "READY" and model.artifact_location.startswith("mlflow-artifacts:")


WRITER = """
import json, os, shutil, sys
from multiprocessing import get_context
from pathlib import Path
import mlflow, mlflow.store.tracking.sqlalchemy_store, src.layers  # once, ahead of the fork
from src import tracking

from src.config import TrackingConfig
from src.results import write_results

uri, template, place, processes, jobs = *sys.argv[1:4], *map(int, sys.argv[4:])
config = TrackingConfig("server" if uri.startswith("http") else "local", uri, "many")

def job(number):
    results = json.loads((Path(template) / "results.json").read_text())
    results["name"] = f"job {number}"
    results.pop("files")
    results["params"]["train.seed"] = str(number)
    folder = Path(place) / str(number)
    store = tracking.open_store(config, Path(place))
    with tracking.tracked(folder, store, results) as run:
        heavy = () if number % jobs == 0 else ("adapter", "plots", ".hydra")
        shutil.copytree(template, folder, ignore=shutil.ignore_patterns(*heavy, ".upload.lock"))
        for key in ("control/margin_gain", "train/margin_gain"):
            results[key] = number + results[key]
        lines = (folder / "layers.csv").read_text().splitlines()
        moved = [f"{start},{float(value) + number}" for start, _, value in (line.rpartition(",") for line in lines[1:])]
        (folder / "layers.csv").write_text("\\n".join([lines[0], *moved]) + "\\n")
        (folder / "run.log").write_text(f"job {number}\\n")
        write_results(folder, results | {"mlflow_run_id": run.id})

def writer(first):
    for number in range(first, first + jobs):
        job(number)

children = [get_context("fork").Process(target=writer, args=(index * jobs,)) for index in range(processes)]
[child.start() for child in children]
[child.join() for child in children]
print([child.exitcode for child in children])
"""


@pytest.mark.parametrize("backend", ["server", "sqlite"])
def test_many_jobs_at_once_lose_nothing(
    server: Server, sweep: tuple[dict[str, Any], str], tmp_path: Path, backend: str
) -> None:
    uri = server.uri if backend == "server" else f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    template, place = sweep[0]["jobs"][0]["folder"], tmp_path / "jobs"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", WRITER, uri, template, str(place), str(PROCESSES), str(JOBS)]
    began = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.strip() == str([0] * PROCESSES)
    print(f"{PROCESSES * JOBS} jobs from {PROCESSES} processes to {backend}: {time.monotonic() - began:.1f} s")

    store = client(uri)
    experiment = store.get_experiment_by_name("many").experiment_id
    runs = {run.info.run_id: run for run in store.search_runs([experiment], max_results=1000)}
    folders = {results_of(folder)["mlflow_run_id"]: folder for folder in place.iterdir() if folder.is_dir()}
    assert len(folders) == PROCESSES * JOBS and runs.keys() == folders.keys()  # each job once, and nothing else
    models = store.search_logged_models([experiment], max_results=100)
    heavy = [run_id for run_id, folder in folders.items() if int(folder.name) % JOBS == 0]
    assert sorted(model.source_run_id for model in models) == sorted(heavy)
    assert {str(model.status) for model in models} == {"READY"}
    artifacts = server.artifacts if backend == "server" else tmp_path / "mlruns" / "artifacts"
    for run_id, folder in folders.items():
        check_run(runs[run_id], folder, artifacts)
        assert history(uri, run_id, "after_control/margin") == margins(folder)


def check_run(run: Any, folder: Path, artifacts: Path) -> None:
    """The run holds this folder's numbers, tags, params and files, and no other's."""
    results = results_of(folder)
    assert (run.info.status, run.info.run_name) == ("FINISHED", f"job {folder.name}")
    assert numbers(results).items() <= run.data.metrics.items()
    assert run.data.params == results["params"] and run.data.params["train.seed"] == folder.name
    tags = {"verdict": results["verdict"], "config_hash": results["config_hash"], "name": f"job {folder.name}"}
    assert tags.items() <= run.data.tags.items()
    (place,) = artifacts.glob(f"*/{run.info.run_id}/artifacts")
    for name in ("results.json", "layers.csv", "run.log", "pairs.csv", "training.csv"):
        assert (place / name).read_bytes() == (folder / name).read_bytes()
    for file in (file for part in ("adapter", "plots") for file in (folder / part).glob("*")):
        assert (place / file.relative_to(folder)).read_bytes() == file.read_bytes()


def margins(folder: Path) -> list[tuple[int, float]]:
    rows = csv.DictReader((folder / "layers.csv").read_text().splitlines())
    wanted = {"stage": "after", "split": "control", "measure": "margin"}
    return [
        (step, float(row["value"])) for step, row in enumerate(row for row in rows if wanted.items() <= row.items())
    ]
