"""The tracking store and `python -m src.sync`, read back through MLflow's own client from real sqlite stores."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from src import sync, tracking
from src.errors import UserError
from src.files import digest

N_LAYERS = 4
MEASURES = ("pair_cosine", "mismatched_cosine", "margin")
ROOT = Path(__file__).resolve().parents[1]


def job_folder(folder: Path, uri: str, run_id: str | None = None, *, steps: int = 30) -> Path:
    """A finished job as src.run leaves it, with made-up numbers."""
    (folder / ".hydra").mkdir(parents=True)
    config = {
        "model": {"id": "tiny"},
        "lora": {"layers": [1, 2], "rank": 8, "init": None},
        "train": {"learning_rate": 1e-4},
        "tracking": {"backend": "local", "uri": uri, "experiment": "tli"},
    }
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / ".hydra" / "overrides.yaml").write_text("- tracking.uri=http://anna:geheim@example.org\n")
    rows = ["layer,stage,split,measure,value"]
    for stage, split in [("pilot", "all"), *((a, b) for a in ("before", "after") for b in ("train", "control"))]:
        for place, layer in enumerate([*range(N_LAYERS + 1), "final"]):
            rows += [f"{layer},{stage},{split},{name},{place + 0.25 * index}" for index, name in enumerate(MEASURES)]
    rows.append("0,pilot,all,mrr,nan")
    (folder / "layers.csv").write_text("\n".join(rows) + "\n")
    (folder / "training.csv").write_text("step,loss\n" + "".join(f"{i},{1 / i}\n" for i in range(1, steps + 1)))
    (folder / "pairs.csv").write_text("source,target,split,cosine_before,cosine_after,rank_before,rank_after\n")
    (folder / "run.log").write_text("loaded\nstore http://anna:geheim@example.org\n")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "bias": "none"}))
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"\0" * 1000)
    (folder / "plots").mkdir()
    (folder / "plots" / "layers.png").write_bytes(b"\x89PNG")
    results = {
        "train/pair_cosine_before": 0.25,
        "control/t_pvalue": float("nan"),
        "time/total_s": 12,
        "config_hash": "abc",
        "verdict": "none",
        "verdict_reason": "nothing moved",
        "name": "r8 L1,2 triplet",
        "params": {"lora.layers": "[1, 2]", "lora.n_layers": "2"},
        "model_revision": "tiny",
        "git_commit": "c0ffee",
        "versions": {"torch": "2"},
        "mlflow_run_id": run_id,
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh database; copying it is quicker than making it."""
    root = tmp_path_factory.mktemp("template")
    uri = tracking.store_uri(None, root)
    tracking.check(uri, "tli")
    return root / "mlruns" / "mlflow.db"


@pytest.fixture
def uri(template: Path, tmp_path: Path) -> str:
    root = tmp_path / "a project"  # a space in the path must do no harm
    (root / "mlruns").mkdir(parents=True)
    shutil.copy(template, root / "mlruns" / "mlflow.db")
    with closing(sqlite3.connect(root / "mlruns" / "mlflow.db")) as store, store:  # a copy would count as moved
        store.execute("UPDATE experiments SET artifact_location = ?", (f"{root}/mlruns/artifacts/0",))
    return tracking.store_uri(None, root)


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


def begin(uri: str, **changes: Any) -> str:
    settings: dict[str, Any] = {"name": "a", "params": {}, "tags": {}, "dataset": None, "parent": None}
    return tracking.start(uri, "tli", **(settings | changes))


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client(uri).get_metric_history(run_id, key))


def run_python(code: str, *arguments: str, **keywords: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, **keywords)


def test_import_is_light() -> None:
    done = run_python("import sys, src.tracking, src.sync, src.ui; print({'mlflow', 'torch'} & set(sys.modules))")
    assert done.stdout.strip() == "set()", done.stderr


def test_store_uri(tmp_path: Path) -> None:
    assert tracking.store_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    assert tracking.store_uri("sqlite:///x/a.db", tmp_path) == f"sqlite:///{tmp_path}/x/a.db"
    assert tracking.store_uri("sqlite:////x/a.db", tmp_path) == "sqlite:////x/a.db"
    assert tracking.store_uri("http://h:5000/", tmp_path) == "http://h:5000"
    with pytest.raises(UserError, match=r"tracking\.uri=postgresql://h/db: give") as error:
        tracking.store_uri("postgresql://anna:geheim@h/db", tmp_path)
    assert "geheim" not in str(error.value)
    with pytest.raises(UserError, match=r"holds \? or %"):
        tracking.store_uri(None, tmp_path / "50% done")


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("http://anna:geheim@h:1/p", "http://h:1/p"),
        ("https://token@h", "https://h"),
        ("at http://a:p@s@h, then https://b:q@i", "at http://h, then https://i"),
        ("sqlite:////home/a@b/c.db", "sqlite:////home/a@b/c.db"),
    ],
)
def test_public_uri(text: str, public: str) -> None:
    assert tracking.public_uri(text) == public


def test_run_is_visible_at_once(uri: str) -> None:
    parent = begin(uri, name="sweep")
    params = {f"p{index}": str(index) for index in range(230)}
    secrets = {"long": "x" * 9000, "tracking.uri": "http://anna:geheim@h"}
    dataset = {"name": "swa-eng", "digest": digest("words"), "source": "words.tsv", "licence": "CC0"}
    run_id = begin(uri, params=params | secrets, tags={"git_commit": "c0ffee"}, dataset=dataset, parent=parent)
    run = client(uri).get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.data.params.pop("long") == "x" * 5999 + "…"
    assert run.data.params.pop("tracking.uri") == "http://h"
    assert run.data.params == params
    assert run.data.tags["pid"] == str(os.getpid()) and run.data.tags["host"] == socket.gethostname()
    assert run.data.tags["mlflow.user"] == getpass.getuser()
    assert run.data.tags["mlflow.source.git.commit"] == "c0ffee" and run.data.tags["mlflow.parentRunId"] == parent
    (entry,) = run.inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("swa-eng", digest("words")[:36])
    assert json.loads(entry.dataset.profile) == dataset
    tracking.finish(run_id, uri, "FAILED")
    assert client(uri).get_run(run_id).info.status == "FAILED"
    experiment = run.info.experiment_id
    assert tracking.run_link(uri, run_id).endswith(
        f"http://127.0.0.1:5000/#/experiments/{experiment}/runs/{run_id}?workflowType=machine_learning"
    )


def test_upload_projects_the_whole_folder(uri: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_id = begin(uri)
    folder = job_folder(tmp_path / "job", uri, run_id, steps=1200)
    tracking.upload(folder, run_id, uri)
    store = client(uri)
    run = store.get_run(run_id)
    series = {f"{s}/{m}" for s in ("pilot", *SPLITS) for m in MEASURES}
    assert set(run.data.metrics) == series | {"train/pair_cosine_before", "time/total_s", "train/loss"}
    for key in series:
        offset = 0.25 * MEASURES.index(key.partition("/")[2])
        assert history(uri, run_id, key) == [(step, step + offset) for step in range(N_LAYERS + 2)]
    assert history(uri, run_id, "train/loss") == [(step, 1 / step) for step in range(1, 1201)]
    assert run.data.tags["verdict"] == "none" and run.data.tags["config_hash"] == "abc"
    assert run.data.tags["mlflow.note.content"] == "**none** nothing moved"
    assert {file.path for file in store.list_artifacts(run_id)} == {
        *("layers.csv", "pairs.csv", "training.csv", "results.json", "run.log", "layers.json"),
        *("adapter", "config", "plots"),
    }
    place = Path(run.info.artifact_uri)
    assert place.is_relative_to(tmp_path / "a project" / "mlruns" / "artifacts" / "tli")
    assert (place / "adapter" / "adapter_model.safetensors").read_bytes() == b"\0" * 1000
    assert not [file for file in place.rglob("*") if file.is_file() and b"geheim" in file.read_bytes()]
    table = json.loads((place / "layers.json").read_text())
    assert table["columns"][:4] == ["layer", *(f"pilot/{name}" for name in MEASURES)]
    assert table["data"][0][:4] == ["0", 0, 0.25, 0.5] and table["data"][-1][:4] == ["final", 5, 5.25, 5.5]
    assert len(table["data"]) == N_LAYERS + 2
    (model,) = store.search_logged_models([run.info.experiment_id])
    assert (model.model_type, str(model.status), model.params["r"]) == ("peft", "READY", "8")
    assert (Path(model.artifact_location) / "adapter_config.json").exists()
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    assert capfd.readouterr() == ("", "")


SPLITS = tuple(f"{stage}_{split}" for stage in ("before", "after") for split in ("train", "control"))


def test_upload_again_adds_nothing(uri: str, tmp_path: Path) -> None:
    run_id = begin(uri)
    folder = job_folder(tmp_path / "job", uri, run_id)
    tracking.upload(folder, run_id, uri)
    client(uri).delete_tag(run_id, "uploaded")  # as if the first upload had been cut off at its end
    assert tracking.upload_state(folder, run_id, uri) == "missing"
    tracking.upload(folder, run_id, uri)
    assert tracking.upload_state(folder, run_id, uri) == "uploaded"
    run = client(uri).get_run(run_id)
    assert len(history(uri, run_id, "train/loss")) == 30
    assert len(history(uri, run_id, "pilot/margin")) == N_LAYERS + 2
    assert len(client(uri).search_logged_models([run.info.experiment_id])) == 1
    assert len(run.outputs.model_outputs) == 1


def test_upload_trouble_is_one_line(uri: str, tmp_path: Path) -> None:
    folder = job_folder(tmp_path / "job", uri)
    with pytest.raises(tracking.TrackingError, match=r"^sqlite:.*not found$"):
        tracking.upload(folder, "0" * 32, uri)


def test_orphans_are_closed(uri: str) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    mine, dead, elsewhere, reused = (begin(uri) for _ in range(4))
    client(uri).set_tag(dead, "pid", str(gone.pid))
    client(uri).set_tag(elsewhere, "host", "another-host")
    client(uri).set_tag(elsewhere, "pid", "999999999")
    client(uri).set_tag(reused, "process_start", "1.00")
    assert tracking.close_orphans(uri, "tli") == 2
    status = {name: client(uri).get_run(name).info.status for name in (dead, mine, elsewhere, reused)}
    assert status == {dead: "KILLED", mine: "RUNNING", elsewhere: "RUNNING", reused: "KILLED"}


def test_a_run_that_ends_while_orphans_are_looked_for_keeps_its_end(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = begin(uri)

    def ended_just_now(_: object) -> bool:  # its process, after the list of open runs was made
        tracking.finish(run_id, uri, "FINISHED")
        return False

    monkeypatch.setattr(tracking, "_alive", ended_just_now)
    assert tracking.close_orphans(uri, "tli") == 0
    assert client(uri).get_run(run_id).info.status == "FINISHED"


def test_finishing_again_leaves_the_end_alone(uri: str) -> None:
    run_id = begin(uri)
    tracking.finish(run_id, uri, "FINISHED")
    ended = client(uri).get_run(run_id).info.end_time
    time.sleep(0.01)
    tracking.finish(run_id, uri, "FINISHED")
    assert client(uri).get_run(run_id).info.end_time == ended


def test_eight_processes_on_a_fresh_folder(tmp_path: Path) -> None:
    code = """
import multiprocessing, sys
import mlflow, mlflow.store.tracking.sqlalchemy_store  # before the fork, so that all eight meet at the database
from src import tracking

def job(uri):
    tracking.check(uri, "tli")
    run = tracking.start(uri, "tli", name="a", params={"a": "b"}, tags={}, dataset=None, parent=None)
    tracking.finish(run, uri, "FINISHED")

jobs = [multiprocessing.get_context("fork").Process(target=job, args=sys.argv[1:]) for _ in range(8)]
[job.start() for job in jobs]
[job.join() for job in jobs]
print([job.exitcode for job in jobs])
"""
    uri = tracking.store_uri(None, tmp_path)
    done = run_python(code, uri)
    assert (done.stdout.strip(), done.stderr) == (str([0] * 8), "")
    assert len(client(uri).search_runs([client(uri).get_experiment_by_name("tli").experiment_id])) == 8


def test_check_refuses_what_mlflow_would_spoil(uri: str, tmp_path: Path) -> None:
    junk = tmp_path / "junk.db"
    junk.write_text("no database, but long enough to be looked at as one\n" * 20)
    with pytest.raises(UserError, match=r"junk\.db is damaged \(file is not a database\); restore a backup"):
        tracking.check(f"sqlite:///{junk}", "tli")
    with closing(sqlite3.connect(tmp_path / "other.db")) as store, store:
        store.execute("CREATE TABLE a (b)")
    with pytest.raises(UserError, match=r"other\.db can't be used as MLflow's database"):
        tracking.check(f"sqlite:///{tmp_path}/other.db", "tli")
    file = tracking.database(uri)
    assert file
    with closing(sqlite3.connect(file)) as store, store:
        store.execute("UPDATE alembic_version SET version_num = 'old'")
    with pytest.raises(UserError, match="mlflow db upgrade"):
        tracking.check(uri, "tli")


def test_check_names_a_deleted_experiment(uri: str) -> None:
    begin(uri)
    client(uri).delete_experiment(client(uri).get_experiment_by_name("tli").experiment_id)
    with pytest.raises(UserError, match=r"tracking\.experiment=tli was deleted"):
        tracking.check(uri, "tli")


def test_absent_server_is_one_line_soon() -> None:
    with socket.socket() as taken:  # bound but not listening: refuses
        taken.bind(("127.0.0.1", 0))
        uri = f"http://anna:geheim@127.0.0.1:{taken.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(
            UserError, match=r"^tracking\.uri=http://127\.0\.0\.1:\d+: no answer; start it .*$"
        ) as error:
            tracking.check(uri, "tli")
    assert time.monotonic() - began < 10 and "geheim" not in str(error.value)


def test_silent_server_is_one_line_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_PATIENCE", "2")
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        began = time.monotonic()
        with pytest.raises(UserError, match="no answer"):
            tracking.check(f"http://127.0.0.1:{mute.getsockname()[1]}", "tli")
    assert time.monotonic() - began < 10


def test_a_server_that_asks_for_a_password_says_how_to_give_one() -> None:
    class Guarded(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Guarded) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(UserError, match=r"asks for a password: set MLFLOW_TRACKING_USERNAME and"):
                tracking.check(f"http://127.0.0.1:{server.server_port}", "tli")
        finally:
            server.shutdown()
            thread.join()


# --- python -m src.sync -------------------------------------------------------------------------------------


def test_sync_records_what_is_missing_once(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there, cut_off = begin(uri, name="there"), begin(uri, name="cut off")
    tracking.upload(job_folder(tmp_path / "jobs" / "0", uri, there), there, uri)
    job_folder(tmp_path / "jobs" / "1", uri, cut_off)
    never_opened = job_folder(tmp_path / "jobs" / "2", uri, None)
    (job_folder(tmp_path / "jobs" / "3", uri, None) / "results.json").write_text('{"verdict": ')
    assert sync.main([str(tmp_path / "jobs")]) == 1
    first = capsys.readouterr()
    assert [line.partition(": ")[2] for line in first.out.splitlines()[:-1]] == ["recorded"] * 2
    assert first.out.splitlines()[-1] == "1 already recorded, 1 failed, 2 recorded"
    assert first.err.startswith(f"{tmp_path}/jobs/3: results.json is damaged")
    assert client(uri).get_run(cut_off).info.status == "FINISHED"
    opened = json.loads((never_opened / "results.json").read_text())["mlflow_run_id"]
    assert client(uri).get_run(opened).data.params["lora.n_layers"] == "2"
    assert client(uri).get_run(opened).data.tags["git_commit"] == "c0ffee"
    assert len(history(uri, opened, "train/loss")) == 30

    client(uri).delete_run(cut_off)
    (tmp_path / "jobs" / "3" / "results.json").unlink()
    assert sync.main([str(tmp_path / "jobs")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 already recorded, 1 left alone (its run was deleted)"
    experiment = client(uri).get_experiment_by_name("tli").experiment_id
    assert len(client(uri).search_runs([experiment])) == 2


def test_sync_leaves_untracked_jobs(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = job_folder(tmp_path / "jobs" / "0", uri)
    config = folder / ".hydra" / "config.yaml"
    config.write_text(config.read_text().replace("backend: local", "backend: 'off'"))
    assert sync.main([str(tmp_path / "jobs")]) == 0
    assert "not tracked" in capsys.readouterr().out
    assert sync.main([str(tmp_path / "jobs"), "--uri", uri]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 recorded"


def test_moved_store_is_named_and_mended(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_id = begin(uri)
    tracking.upload(job_folder(tmp_path / "job", uri, run_id), run_id, uri)
    assert tracking.moved(uri) == set()
    (tmp_path / "a project").rename(tmp_path / "moved")
    new = tracking.store_uri(None, tmp_path / "moved")
    with pytest.raises(UserError, match=r"was moved; run `python -m src\.sync --relocate"):
        tracking.check(new, "tli")
    assert client(new).list_artifacts(run_id) == []
    assert sync.main(["--relocate", "--uri", new]) == 0
    assert "paths now point below" in capsys.readouterr().out
    assert len(client(new).list_artifacts(run_id)) == 9
    (model,) = client(new).search_logged_models([client(new).get_run(run_id).info.experiment_id])
    assert Path(model.artifact_location).is_dir()
    assert len(list((tmp_path / "moved" / "mlruns").glob("mlflow.db.*.bak"))) == 1
    tracking.check(new, "tli")
