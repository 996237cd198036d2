"""`python -m src.ui` as a person starts it, and tracking through the server that it is."""

from __future__ import annotations

import json
import socket
import urllib.request
from pathlib import Path

import psutil
import pytest

from src import tracking, ui
from tests.test_tracking import client, history, job_folder
from tests.trouble import served

ROOT = Path(__file__).resolve().parents[1]


def get(url: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=20) as answer:
        return answer.read()


def test_no_store_yet_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ui.main(["--uri", f"sqlite:///{tmp_path}/mlruns/mlflow.db"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no store yet" in line
    assert not (tmp_path / "mlruns").exists()


def test_a_server_needs_no_ui(capsys: pytest.CaptureFixture[str]) -> None:
    assert ui.main(["--uri", "http://anna:geheim@example.org"]) == 2
    assert capsys.readouterr().err == "error: http://example.org is a server already: open it in a browser\n"


def test_taken_port_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mlflow.db").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert ui.main(["--uri", f"sqlite:///{tmp_path}/mlflow.db", "--port", port]) == 2
    assert capsys.readouterr().err == f"error: --port {port}: taken, or refused by browsers; choose another\n"


def test_serves_until_sigterm_and_leaves_nothing_behind(tmp_path: Path) -> None:
    local = tracking.store_uri(None, tmp_path)
    tracking.check(local, "tli")
    run_id = tracking.start(local, "tli", name="a", params={}, tags={}, dataset=None, parent=None)
    tracking.upload(job_folder(tmp_path / "job", local, run_id), run_id, local)
    elsewhere = tmp_path / "cwd"
    elsewhere.mkdir()
    with served(local, elsewhere) as (process, server):
        assert process.stdout
        experiment = process.stdout.readline().split()[-1]
        assert experiment.startswith(server) and experiment.endswith("?workflowType=machine_learning")
        assert b"<html" in get(server)
        assert get(f"{server}/get-artifact?path=layers.csv&run_uuid={run_id}").startswith(b"layer,stage")
        track_through(server, tmp_path)
        family = psutil.Process(process.pid).children(recursive=True)
    assert family and not [child for child in family if child.is_running()]
    assert process.returncode == 0
    assert list(elsewhere.iterdir()) == []


def track_through(server: str, tmp_path: Path) -> None:
    """The whole of tracking against a server, in an experiment that the server itself places."""
    tracking.check(server, "remote")
    dataset = {"name": "words", "digest": "0" * 64, "source": "words.tsv"}
    run_id = tracking.start(server, "remote", name="b", params={"a": "b"}, tags={}, dataset=dataset, parent=None)
    folder = job_folder(tmp_path / "remote", server, run_id)
    tracking.upload(folder, run_id, server)
    tracking.upload(folder, run_id, server)
    tracking.finish(run_id, server, "FINISHED")
    run = client(server).get_run(run_id)
    assert (run.info.status, run.data.params["a"], run.data.tags["verdict"]) == ("FINISHED", "b", "none")
    assert len(history(server, run_id, "train/loss")) == 30
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    table = json.loads(get(f"{server}/get-artifact?path=layers.json&run_uuid={run_id}"))
    assert table["data"][-1][0] == "final"
    (model,) = client(server).search_logged_models([run.info.experiment_id])
    assert str(model.status) == "READY"
    assert [
        path for path in (tmp_path / "mlruns" / "artifacts").rglob("adapter_model.safetensors") if "models" in str(path)
    ]
    mode = "workflowType=machine_learning"
    assert tracking.run_link(server, run_id) == f"{server}/#/experiments/{run.info.experiment_id}/runs/{run_id}?{mode}"
