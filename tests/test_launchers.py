"""Sweeps in other processes, each launcher for real: joblib, submitit, a Slurm of one node, Ray; and how they end."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from omegaconf import OmegaConf

from src import workers
from src.errors import UserError
from src.results import read_table
from tests import slurm
from tests.conftest import ROOT
from tests.test_sweep import TINY, documents, family, runs
from tests.test_tracking import job_folder, run_python

RAY = ROOT / ".venv-ray/bin/python"
LONG = 100_000  # epochs: a job that only a signal ends


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlruns/mlflow.db"


class Command:
    """A sweep under way in processes that are known by a variable of their environment, wherever they hang."""

    def __init__(self, store: str, folder: Path, arguments: list[str], python: str, environment: dict[str, str]):
        self.mark = uuid.uuid4().hex
        self.store, self.folder = store, folder
        self.environment = environment | {"PYTHONPATH": str(ROOT), "TLI_TEST": self.mark}
        self.environment.pop("OMP_NUM_THREADS", None)  # it would hide whether threads are divided
        place = [f"tracking.uri={store}", f"tracking.experiment={folder.name}"]
        self.process = subprocess.Popen(
            [python, "-m", "src.run", "-m", *TINY, *place, *arguments],
            cwd=folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=240)
        return self.process.returncode, out, err

    def wait_until(self, happened: Callable[[], bool]) -> None:
        limit = time.monotonic() + 240
        while not happened():
            assert self.process.poll() is None and time.monotonic() < limit, self.end()
            time.sleep(0.2)

    def open_jobs(self) -> int:
        """How many of the sweep's jobs have an open run."""
        file = Path(self.store.removeprefix("sqlite:///"))
        if not file.exists():
            return 0
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=30)) as database:
            (count,) = database.execute(
                "SELECT COUNT(*) FROM runs JOIN tags USING (run_uuid) JOIN experiments USING (experiment_id) "
                "WHERE status = 'RUNNING' AND key = 'mlflow.parentRunId' AND experiments.name = ?",
                (self.folder.name,),
            ).fetchone()
        return count

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("TLI_TEST") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture
def start(store: str, tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts sweeps in the test's own folder; at the end, whatever became of them, none of their processes is left."""
    started: list[Command] = []

    def begin(*arguments: str, python: str = sys.executable, environment: dict[str, str] | None = None) -> Command:
        started.append(Command(store, tmp_path, list(arguments), python, dict(environment or os.environ)))
        return started[-1]

    yield begin
    for command in started:
        for process in command.processes():
            process.kill()
        command.process.communicate()


def check_tracked(store: str, folder: Path, expected: int) -> None:
    """All finished jobs are in the store, whole: every scalar, every point of every series, the right parameters."""
    from mlflow import MlflowClient

    client = MlflowClient(store)
    found = runs(store, folder)
    jobs = [file.parent for file in folder.glob("multirun/*/*/*/results.json")]
    assert len(jobs) == expected
    for job in jobs:
        results = json.loads((job / "results.json").read_text())
        run = found[results["mlflow_run_id"]]
        assert run.info.status == "FINISHED"
        scalars = {key: value for key, value in results.items() if "/" in key and isinstance(value, float)}
        assert scalars.items() <= run.data.metrics.items() and len(scalars) > 20
        assert run.data.params["lora.rank"] == results["params"]["lora.rank"]
        assert run.inputs.dataset_inputs[0].dataset.digest == results["dataset"]["digest"][:36]
        series = [key for key in run.data.metrics if key.startswith(("pilot/", "before_", "after_"))]
        points = sum(len(client.get_metric_history(run.info.run_id, key)) for key in series)
        assert points == len(read_table(job / "layers.csv"))


def loads(sweep: Path) -> list[str]:
    """What the jobs of a sweep say about loading a model: one line each time."""
    texts = [file.read_text() for file in sweep.glob("*/run.log")]
    return [line for text in texts for line in text.splitlines() if "src.models: loading tiny" in line]


def latest(folder: Path) -> Path:
    return max(file.parent for file in folder.glob("multirun/*/*/sweep.json"))


# --- joblib -------------------------------------------------------------------------------------------------


def test_joblib_ends_with_its_workers_and_goes_on_where_it_stood(
    start: Callable[..., Command], store: str, tmp_path: Path
) -> None:
    first = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "lora.rank=1,2", f"train.epochs=1,{LONG}")
    sweep = start(*first)

    def both_at_a_long_one() -> bool:  # a job that is done has its run open for a while, too
        done = {file.parent for file in tmp_path.glob("multirun/*/*/*/results.json")}
        busy = {file.parent for file in tmp_path.glob("multirun/*/*/*/.worker")}
        return len(done) == len(busy - done) == sweep.open_jobs() == 2

    sweep.wait_until(both_at_a_long_one)
    assert len(sweep.processes()) >= 3
    sweep.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    status, out, err = sweep.end()
    assert status == 143 and time.monotonic() - began < 30, err
    assert sweep.processes() == []
    assert "4 jobs: 2 done, 2 killed" in out and "Traceback" not in err
    assert all(line.startswith("error: ") for line in err.splitlines()), err
    parent, children = family(runs(store, tmp_path))
    assert parent.info.status == "KILLED"
    assert sorted(run.info.status for run in children) == ["FINISHED", "FINISHED", "KILLED", "KILLED"]
    loading = loads(latest(tmp_path))
    each = max(len(os.sched_getaffinity(0)) // 2, 1)
    assert len(loading) == 2 and all(line.endswith(f"with {each} threads") for line in loading), loading

    status, out, err = start(*first[:2], "lora.rank=1,2,3,4,5,6").end()
    assert (status, err) == (0, "")
    assert out.count("already done: ") == 2 and "6 jobs: 6 done" in out
    assert len(loads(latest(tmp_path))) <= 2  # four jobs
    check_tracked(store, tmp_path, 6)
    for number in range(2, 6):  # what a job printed stands together
        place = out.index(f"\njob {number}: r{number + 1} L1 triplet\n")
        assert out.index("results  ", place) == out.index(f"results  {latest(tmp_path)}/{number}\n")


# --- submitit -----------------------------------------------------------------------------------------------


def test_submitit_local_starts_so_many_at_once_and_a_ctrl_c_ends_them(
    start: Callable[..., Command], store: str, tmp_path: Path
) -> None:
    arguments = ("hydra/launcher=submitit_local", "hydra.sweeper.max_batch_size=2", f"train.epochs=1,2,{LONG}")
    sweep = start(*arguments, "lora.rank=1")
    sweep.wait_until(lambda: len(list(tmp_path.glob("multirun/*/*/2"))) == 1 and sweep.open_jobs() == 1)
    check_tracked(store, tmp_path, 2)
    os.killpg(sweep.process.pid, signal.SIGINT)  # as a terminal does it: to all at once
    status, out, err = sweep.end()
    assert status == 130 and "3 jobs: 2 done, 1 killed" in out
    assert sweep.processes() == []
    assert err.splitlines()[0] == "error: interrupted" and len(err.splitlines()) == 2
    parent, children = family(runs(store, tmp_path))
    assert parent.info.status == "KILLED"
    assert sorted(run.info.status for run in children) == ["FINISHED", "FINISHED", "KILLED"]
    assert [line.endswith("with 1 threads") for line in loads(latest(tmp_path))] == [True] * 3
    printed = [file.read_text() for file in latest(tmp_path).glob(".submitit/*/*_log.out")]
    assert sum("verdict: " in text for text in printed) == 2


@pytest.mark.skipif(bool(slurm.missing()), reason=str(slurm.missing()))
def test_a_failed_job_on_slurm_stops_no_other(start: Callable[..., Command], store: str, tmp_path: Path) -> None:
    arguments = ("hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=1")
    with slurm.slurm() as environment:
        status, out, err = start(*arguments, "train.learning_rate=3e38,1e-4", environment=environment).end()
        assert status == 1 and "2 jobs: 1 failed, 1 done" in out, err
    (document,) = documents(tmp_path)
    assert [job["status"] for job in document["jobs"]] == ["failed", "done"]
    assert document["jobs"][0]["error"] in err
    _, children = family(runs(store, tmp_path))
    assert sorted(run.info.status for run in children) == ["FAILED", "FINISHED"]
    check_tracked(store, tmp_path, 1)
    assert len(list(latest(tmp_path).glob(".submitit/*/*_submission.sh"))) >= 1
    assert [line.endswith("with 1 threads") for line in loads(latest(tmp_path))] == [True] * 2


# --- Ray ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not RAY.exists(), reason="no .venv-ray: make ray")
def test_ray_keeps_its_workers_and_to_this_machine(start: Callable[..., Command], store: str, tmp_path: Path) -> None:
    arguments = ("hydra/launcher=ray", "hydra.launcher.ray.init.num_cpus=2", "lora.rank=1,2,3")
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # short: sockets lie in it
        own = {"RAY_TMPDIR": folder, "RAY_AUTH_TOKEN": uuid.uuid4().hex + uuid.uuid4().hex}
        sweep = start(*arguments, python=str(RAY), environment=os.environ | own)
        check_ray(sweep, store, tmp_path)


def check_ray(sweep: Command, store: str, tmp_path: Path) -> None:
    sweep.wait_until(lambda: sweep.open_jobs() > 0)
    sockets = []
    for process in sweep.processes():
        with suppress(psutil.NoSuchProcess):  # git, asked for the commit, is gone by now
            sockets += [one for one in process.net_connections() if one.status == "LISTEN"]
    assert sockets and {one.laddr.ip.removeprefix("::ffff:") for one in sockets} == {"127.0.0.1"}
    status, out, err = sweep.end()
    assert (status, err) == (0, "")
    assert "3 jobs: 3 done" in out and out.count("verdict: ") == 3
    check_tracked(store, tmp_path, 3)
    loading = loads(latest(tmp_path))
    assert len(loading) <= 2 and all(line.endswith("with 1 threads") for line in loading)
    assert sweep.processes() == []


# --- the store, and what isn't installed ---------------------------------------------------------------------


def test_six_processes_log_to_one_store_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    code = """
import multiprocessing, os, sys
import torch
import mlflow, mlflow.store.tracking.sqlalchemy_store  # before the fork, so that all six meet at the database
from pathlib import Path
from src import tracking

def job(number):
    store = tracking.Store(sys.argv[1], "tli")
    together.wait()
    for turn in range(3):
        description = {"name": f"{number} {turn}", "config_hash": "a", "git_commit": "b", "model_revision": "c",
                       "params": {"number": str(number)},
                       "dataset": {"name": "words", "digest": str(turn), "source": "x"}}
        with tracking.tracked(Path(sys.argv[2 + 3 * number + turn]), store, description):
            pass

fork = multiprocessing.get_context("fork")
together = fork.Barrier(6)
jobs = [fork.Process(target=job, args=(number,)) for number in range(6)]
[job.start() for job in jobs]
[job.join() for job in jobs]
print([job.exitcode for job in jobs])
"""
    from mlflow import MlflowClient

    from src import tracking

    uri = f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    tracking.check(uri, "tli")
    folders = [job_folder(tmp_path / str(number), uri, steps=200 + number) for number in range(18)]
    done = run_python(code, uri, *map(str, folders))
    assert (done.stdout.strip(), done.stderr) == (str([0] * 6), "")
    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name("tli").experiment_id])  # pyright: ignore
    assert {run.info.run_name for run in found} == {f"{number} {turn}" for number in range(6) for turn in range(3)}
    for run in found:
        number, turn = map(int, str(run.info.run_name).split())
        assert run.info.status == "FINISHED" and run.data.params["number"] == str(number)
        assert run.inputs and run.inputs.dataset_inputs[0].dataset.digest == str(turn)
        steps = 200 + 3 * number + turn
        losses = client.get_metric_history(run.info.run_id, "train/loss")
        assert sorted((point.step, point.value) for point in losses) == [(i, 1 / i) for i in range(1, steps + 1)]
        for key in ("pilot/margin", "before_control/pair_cosine", "after_train/mismatched_cosine"):
            assert len(client.get_metric_history(run.info.run_id, key)) == 6
        assert {"adapter", "plots", "layers.csv"} <= {file.path for file in client.list_artifacts(run.info.run_id)}


def test_a_launcher_that_is_not_installed_is_named_with_its_extra(start: Callable[..., Command]) -> None:
    status, out, err = start("hydra/launcher=ray", "lora.rank=1,2").end()
    assert (status, out) == (2, "")
    assert err == (
        "error: hydra/launcher=ray needs the extra ray, which isn't installed: "
        "make ray, then .venv-ray/bin/python -m src.run …\n"
    )
    target = "hydra_plugins.hydra_absent_launcher.absent_launcher.AbsentLauncher"
    choices: dict[str, Any] = {"choices": {"hydra/launcher": "absent"}}
    config = OmegaConf.create({"hydra": {"launcher": {"_target_": target}, "runtime": choices}})
    with pytest.raises(UserError, match=r"the extra absent.*pip install 'hydra-absent-launcher>=1\.2,<1\.3'"):
        workers.prepare(config)
