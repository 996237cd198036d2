"""An MLflow server that is down, slow, broken or forgetful: training goes on, and `src.sync` makes it whole.

A real server behind tests/trouble.py's proxy, which fails at chosen requests; the command as a person gives it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from src import models, search, sync, tracking
from src.results import write_sealed
from tests.conftest import Cli, call_command
from tests.test_sweep import TINY, documents
from tests.test_tracking import client
from tests.trouble import Fault, Proxy, Rule, after, always, every_other, in_turn, mlflow_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as uri:
        yield uri


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    for name in ("BACKOFF_FACTOR", "BACKOFF_JITTER"):  # no waiting between MLflow's tries: the tests have no time
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "0")
    proxy = Proxy(server)
    yield proxy
    proxy.close()


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], proxy: Proxy) -> Cli:
    """Runs the command in this process, in a folder and an MLflow experiment of its own: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        own = ("tracking=server", f"tracking.uri={proxy.uri}", f"tracking.experiment={tmp_path.name}")
        return call_command(monkeypatch, capsys, *TINY, *own, *arguments)

    return call


def synced(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of `python -m src.sync FOLDER`."""
    assert sync.main([str(folder)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out.splitlines()[-1]


def runs(server: str, folder: Path) -> list[Any]:
    """All runs of a test's experiment, the oldest first."""
    experiment = client(server).get_experiment_by_name(folder.name)
    return client(server).search_runs([experiment.experiment_id], order_by=["attributes.start_time"])


def check_whole(server: str, run: Any, folder: Path) -> None:
    """The run is closed and holds the job folder, everything once."""
    results = json.loads((folder / "results.json").read_text())
    assert (run.info.run_id, run.info.status) == (results["mlflow_run_id"], "FINISHED")
    assert run.data.params == results["params"] and run.data.tags["verdict"] == results["verdict"]
    numbers = {key: value for key, value in results.items() if "/" in key and isinstance(value, int | float)}
    assert numbers.items() <= run.data.metrics.items() and len(numbers) > 20
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.digest == results["dataset"]["digest"][:36]
    (model,) = client(server).search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    assert str(model.status) == "READY"
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    files = {file.path for file in client(server).list_artifacts(run.info.run_id)}
    assert files >= {"adapter", "config", "plots", "layers.csv", "results.json", "layers.json", "run.log"}
    (loss,) = {len(client(server).get_metric_history(run.info.run_id, "train/loss"))}
    assert loss == len((folder / "training.csv").read_text().splitlines()) - 1


@pytest.mark.parametrize(
    ("fault", "said"), [("down", "no answer"), ("mute", "no answer"), ("500", "it answers with error 500")]
)
def test_a_server_that_is_out_of_order_at_the_start_is_one_line_before_the_model_loads(
    cli: Cli, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, said: str
) -> None:
    monkeypatch.setattr(tracking, "_PATIENCE", "1")
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("the model was loaded"))
    proxy.rule = always(fault)
    for sweep in ([], ["-m", "lora.rank=2,4"]) if fault == "down" else ([],):
        status, out, err = cli(*sweep)
        assert (status, out) == (2, "")
        hint = "start it (`python -m src.ui` starts one on port 5000), or run with tracking=off"
        assert err == f"error: tracking.uri={proxy.uri}: {said}; {hint}\n"
    assert not list(tmp_path.glob("multirun/*/*/sweep.json"))


@pytest.mark.parametrize("fault", ["down", "500", "mute", "cut"])
def test_a_server_lost_in_mid_run_costs_a_warning_and_sync_makes_it_whole(
    cli: Cli,
    server: str,
    proxy: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: Fault,
) -> None:
    if fault == "mute":
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    proxy.rule = always(fault, "safetensors") if fault == "cut" else after(fault, "log-inputs")
    status, out, err = cli()
    (results,) = tmp_path.glob("multirun/*/*/*/results.json")
    folder = results.parent
    why = "it answers with error 500" if fault == "500" else "no answer"
    assert (status, "verdict:" in out, "in MLflow" in out) == (0, True, False)
    assert err == (
        f"warning: tracking: {proxy.uri}: {why}; {folder} is not uploaded: `python -m src.sync` does it later\n"
    )
    if fault != "down":  # one request was tried three times, and nothing after it
        assert len(set(proxy.requests[-3:])) == 1 and proxy.requests.count(proxy.requests[-1]) == 3
    (run,) = runs(server, tmp_path)
    assert run.info.status == "RUNNING"
    if fault == "cut":
        assert sync.main([str(folder)]) == 1
        assert capsys.readouterr() == ("1 failed\n", f"{folder}: {proxy.uri}: no answer\n")

    proxy.rule = lambda _: None
    proxy.up() if fault == "down" else None
    assert synced(tmp_path / "multirun", capsys) == "1 recorded"
    check_nothing_is_left(proxy, tmp_path, capsys, "1 already recorded")
    (run,) = runs(server, tmp_path)
    check_whole(server, run, folder)


def test_a_sweep_goes_on_without_its_server(
    cli: Cli, server: str, proxy: Proxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.rule = after("hang up", "log-inputs")  # when the first job's run has been opened
    status, out, err = cli("-m", "lora.rank=2,4")
    (document,) = documents(tmp_path)
    assert (status, [job["status"] for job in document["jobs"]]) == (0, ["done", "done"])
    assert "2 jobs: 2 done" in out and "in MLflow" not in out
    folders = [Path(job["folder"]) for job in document["jobs"]]
    later = "is not uploaded: `python -m src.sync` does it later"
    gone = f"{proxy.uri}: no answer"
    assert err.splitlines() == [
        f"warning: tracking: {gone}; {folders[0]} {later}",
        f"warning: tracking: {gone}; {folders[1]} {later}",
        f"warning: tracking: {gone}; the sweep's run: {folders[0].parent} {later}",
    ]
    (file,) = tmp_path.glob("multirun/*/*/sweep.json")
    write_sealed(file, document | {"ended": None})  # as it is while other jobs are still at work
    proxy.rule = lambda _: None
    assert synced(tmp_path / "multirun", capsys) == "2 recorded"
    write_sealed(file, document)
    assert synced(tmp_path / "multirun", capsys) == "2 already recorded, 1 sweep completed"
    check_nothing_is_left(proxy, tmp_path, capsys, "2 already recorded")
    check_family(server, tmp_path)

    # What an earlier attempt has left is not told over the end of the later one, whose run it has become.
    earlier = tmp_path / "multirun" / "earlier"
    shutil.copytree(file.parent, earlier / "0")
    write_sealed(earlier / "0" / "sweep.json", document | {"id": "earlier/0", "ended": "yesterday"})
    check_nothing_is_left(proxy, tmp_path, capsys, "4 already recorded")


def check_nothing_is_left(proxy: Proxy, folder: Path, capsys: pytest.CaptureFixture[str], said: str) -> None:
    """`src.sync` only asks."""
    before = len(proxy.requests)
    assert synced(folder / "multirun", capsys) == said
    asked = proxy.requests[before:]
    assert asked and not [line for line in asked if not line.startswith("GET") and not line.endswith("/search")]


def check_family(server: str, folder: Path) -> None:
    """The experiment holds the only sweep below the folder, its jobs and nothing else, each of them whole."""
    (document,) = documents(folder)
    found = {run.info.run_id: run for run in runs(server, folder)}
    parent = found.pop(document["mlflow_run_id"])
    assert parent.info.status == "FINISHED" and "| r2 L1 triplet | " in parent.data.tags["mlflow.note.content"]
    files = {file.path for file in client(server).list_artifacts(parent.info.run_id)}
    assert files == {"overview", "summary.json"}
    assert len(found) == len(document["jobs"])
    for job in document["jobs"]:
        results = json.loads((Path(job["folder"]) / "results.json").read_text())
        run = found[results["mlflow_run_id"]]
        check_whole(server, run, Path(job["folder"]))
        assert run.info.run_name == job["name"] and run.data.tags["mlflow.runColor"]
        assert (run.data.tags["mlflow.parentRunId"], run.data.tags["sweep"]) == (parent.info.run_id, document["id"])


def test_a_sweep_s_run_that_could_not_be_opened_is_made_later(
    cli: Cli, server: str, proxy: Proxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.rule = in_turn("runs/create", "500", "500")
    status, out, err = cli("-m", "lora.rank=2")
    (document,) = documents(tmp_path)
    (file,) = tmp_path.glob("multirun/*/*/sweep.json")
    assert status == 0 and document["mlflow_run_id"] is None and "in MLflow  http" in out
    assert err == (
        f"warning: tracking: {proxy.uri}: it answers with error 500; "
        f"the sweep's run: {file.parent} is not uploaded: `python -m src.sync` does it later\n"
    )
    assert synced(tmp_path / "multirun", capsys) == "1 already recorded, 1 sweep completed"
    check_nothing_is_left(proxy, tmp_path, capsys, "1 already recorded")
    check_family(server, tmp_path)


def test_a_slow_server_that_loses_answers_makes_nothing_twice(
    cli: Cli, server: str, proxy: Proxy, tmp_path: Path
) -> None:
    lost = every_other("lose")
    proxy.rule = lambda request: lost(request) or (0.5 if "safetensors" in request else None)
    status, out, err = cli("-m", "lora.rank=2,4")
    assert (status, err) == (0, "") and "viewStateShareKey" in out
    assert {"POST /api/2.0/mlflow/runs/create", "POST /api/2.0/mlflow/logged-models"} <= {*proxy.requests}
    check_family(server, tmp_path)


def lost_at(part: str, fault: Fault) -> Rule:
    """The request with `part` meets the fault, and then the server is gone."""
    gone = after("down", part)
    return lambda request: gone(request) or (fault if part in request else None)


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(lost_at("runs/create", "lose"), id="answer lost, then gone"),
        pytest.param(in_turn("runs/create", 3.0), id="carried out after the patience has ended"),
    ],
)
def test_a_run_that_was_opened_in_trouble_is_found_again(
    cli: Cli,
    server: str,
    proxy: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rule: Rule,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    proxy.rule = rule
    status, out, err = cli()
    (results,) = tmp_path.glob("multirun/*/*/*/results.json")
    assert status == 0 and "in MLflow" not in out and json.loads(results.read_text())["mlflow_run_id"] is None
    assert err == (
        f"warning: tracking: {proxy.uri}: no answer; "
        f"{results.parent} is not uploaded: `python -m src.sync` does it later\n"
    )
    limit = time.monotonic() + 20
    while not runs(server, tmp_path) and time.monotonic() < limit:
        time.sleep(0.1)
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")
    proxy.rule = lambda _: None
    proxy.down()
    proxy.up()
    assert synced(tmp_path / "multirun", capsys) == "1 recorded"
    check_nothing_is_left(proxy, tmp_path, capsys, "1 already recorded")
    (run,) = runs(server, tmp_path)
    check_whole(server, run, results.parent)


def test_a_pruned_job_is_uploaded_later(
    cli: Cli,
    server: str,
    proxy: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = {"pruned": "too small a margin", "epoch": 1, "margin": 0.25}
    monkeypatch.setattr(search, "judge", lambda *_: lambda *_: said)
    proxy.rule = after("down", "runs/create")  # when the sweep's run has been opened
    arguments = ("hydra/sweeper=optuna", "lora.rank=choice(2,4)", "hydra.sweeper.n_trials=1")
    status, out, err = cli("-m", *arguments)
    (document,) = documents(tmp_path)
    (job,) = document["jobs"]
    assert (status, job["status"], err.count("warning: ")) == (0, "pruned", 2) and "1 job: 1 pruned" in out
    proxy.rule = lambda _: None
    proxy.up()
    assert synced(tmp_path / "multirun", capsys) == "1 recorded, 1 sweep completed"
    check_nothing_is_left(proxy, tmp_path, capsys, "1 already recorded")
    found = {run.info.run_id: run for run in runs(server, tmp_path)}
    assert found.pop(document["mlflow_run_id"]).info.status == "FINISHED"
    (run,) = found.values()
    assert (run.info.status, run.info.run_name) == ("FINISHED", job["name"])
    assert run.data.tags["mlflow.parentRunId"] == document["mlflow_run_id"]
    assert run.data.tags["pruned"] == said["pruned"] and run.data.params["lora.rank"] in ("2", "4")
    assert run.inputs.dataset_inputs and "verdict" not in run.data.tags
