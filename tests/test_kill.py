"""A sweep that is ended in each stage of its life goes on to the very numbers of one that nobody disturbed.

`python -m bench.soak` does the same at random moments, hundreds of times.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from src import baseline, files, overview, study, sweep, tracking
from src.baseline import baseline_encoding
from src.layers import tokenize
from src.models import LoadedModel
from tests.conftest import ROOT, Cli
from tests.test_launchers import LONG, Command, start  # noqa: F401 (a fixture)
from tests.test_sweep import cli, family, runs, store  # noqa: F401 (fixtures)

ROUNDS = """
import json, sys
from pathlib import Path
from bench import soak
from bench.soak_state import differences, read_facts

place = Path(sys.argv[1])
soak.preload()
soak.SWEEP = (*(word for word in soak.SWEEP if not word.startswith("lora.rank")), "lora.rank=2")
undisturbed, one = (soak.Round(place / name, "basic", False) for name in ("undisturbed", "killed"))
soak.finish(undisturbed)
for way, stage in json.loads(sys.argv[2]):
    soak.kill(one, way, stage=stage)
soak.finish(one)
one.wrong += differences(read_facts(undisturbed.folder), read_facts(one.folder))
print(json.dumps([undisturbed.wrong + one.wrong, one.kills]))
"""


def test_killed_in_each_stage_it_comes_to_the_same_end(tmp_path: Path) -> None:
    ways = [("SIGKILL", "database"), ("SIGTERM", "train"), ("SIGKILL", "measure"), ("SIGKILL", "upload")]
    ways.append(("SIGKILL", "summary"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ROUNDS, str(tmp_path), json.dumps(ways)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wrong, kills = json.loads(done.stdout.splitlines()[-1])
    assert wrong == []
    assert [way for way, _ in kills] == [way for way, _ in ways]


def test_workers_end_with_a_sweep_that_is_killed(
    start: Callable[..., Command],  # noqa: F811
    store: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    sweep = start("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "lora.rank=1,2", f"train.epochs={LONG}")
    sweep.wait_until(lambda: sweep.open_jobs() >= 1)
    sweep.process.kill()
    sweep.process.communicate()
    limit = time.monotonic() + 30
    while left := sweep.processes():
        assert time.monotonic() < limit, [process.cmdline() for process in left]
        time.sleep(0.1)
    assert sweep.open_jobs() == 0  # they have closed their runs
    assert {run.info.status for run in family(runs(store, tmp_path))[1]} == {"KILLED"}
    assert not list(tmp_path.glob("multirun/*/*/*/results.json"))


# --- a signal in the narrow places --------------------------------------------------------------------------


def interrupted_after(function: Callable[..., Any], times: int = 9) -> Callable[..., Any]:
    """The function, behind which a Ctrl-C comes before its caller has what it returned."""
    calls: list[int] = []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        calls.append(1)
        if len(calls) <= times:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        return found

    return wrapped


@pytest.mark.parametrize(("module", "name"), [(tracking, "start"), (tracking, "_reopened"), (sweep, "_write")])
def test_a_run_is_closed_though_a_signal_came_as_it_was_opened(
    monkeypatch: pytest.MonkeyPatch,
    cli: Cli,  # noqa: F811
    store: str,  # noqa: F811
    tmp_path: Path,
    module: Any,
    name: str,
) -> None:
    arguments = ("-m", "lora.rank=1,2", "train=none")
    if name == "_reopened":
        monkeypatch.setattr(study, "prepare", interrupted_after(study.prepare))
        assert cli(*arguments)[0] == 130
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, name, interrupted_after(getattr(module, name)))
    status, _, err = cli(*arguments)
    assert (status, err) == (130, "error: interrupted\n")
    assert {run.info.status for run in runs(store, tmp_path).values()} == {"KILLED"}


def test_a_signal_in_the_summary_leaves_a_whole_sweep(
    monkeypatch: pytest.MonkeyPatch,
    cli: Cli,  # noqa: F811
    store: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(overview, "draw_overview", interrupted_after(overview.draw_overview, times=1))
    status, out, err = cli("-m", "lora.rank=1", "train=none")
    assert (status, err) == (130, "error: interrupted\n") and "1 job: 1 done" in out
    parent, (child,) = family(runs(store, tmp_path))
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert (Path(parent.info.artifact_uri) / "summary.json").exists()


def test_a_job_whose_upload_a_signal_cut_off_is_uploaded_at_the_sweep_s_end(
    monkeypatch: pytest.MonkeyPatch,
    cli: Cli,  # noqa: F811
    store: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(tracking, "_upload_files", interrupted_after(tracking._upload_files, times=1))
    status, out, err = cli("-m", "lora.rank=1,2", "train=none")
    assert (status, err) == (130, "error: interrupted\n") and "2 jobs: 1 done, 1 not started\nthe same" in out
    parent, (child,) = family(runs(store, tmp_path))
    assert (parent.info.status, child.info.status) == ("KILLED", "FINISHED")
    (folder,) = (file.parent for file in tmp_path.glob("multirun/*/*/*/results.json"))
    assert tracking.upload_state(folder, child.info.run_id, store) == "uploaded"


@pytest.mark.parametrize("statement", ["INSERT INTO params", "INSERT INTO metrics", "SELECT runs."])
def test_a_signal_within_a_query_waits_for_its_end(
    cli: Cli,  # noqa: F811
    store: str,  # noqa: F811
    tmp_path: Path,
    statement: str,
) -> None:
    """SQLite's lock would stay with the query, and nobody could close the runs."""
    met: list[str] = []

    def interrupt(_connection: Any, _cursor: Any, executed: str, *_: Any) -> None:
        if executed.startswith(statement) and not met:
            met.append(executed)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    event.listen(Engine, "after_cursor_execute", interrupt)
    try:
        status, _, err = cli("-m", "lora.rank=1,2", "train=none")
    finally:
        event.remove(Engine, "after_cursor_execute", interrupt)
    assert met and status == 130 and err.startswith("error: interrupted\n") and "warning" not in err
    assert {run.info.status for run in runs(store, tmp_path).values()} <= {"KILLED", "FINISHED"}


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)


class Collected:
    def __del__(self) -> None:  # Python drops an exception of a handler that runs in here
        terminate()


def swallow() -> None:
    with suppress(BaseException):
        terminate()


def make_another_of_it() -> None:
    """As Matplotlib's C++ does: the new exception doesn't know the old one."""
    swallow()
    raise ValueError("Invalid affine transformation matrix")


@pytest.mark.parametrize("place", [Collected, swallow, make_another_of_it])
def test_a_signal_is_not_lost_where_its_exception_is(
    monkeypatch: pytest.MonkeyPatch,
    cli: Cli,  # noqa: F811
    store: str,  # noqa: F811
    tmp_path: Path,
    place: Callable[[], Any],
) -> None:
    measure = study.measure_before

    def met(*args: Any) -> Any:
        place()
        time.sleep(0.5)
        return measure(*args)

    monkeypatch.setattr(study, "measure_before", met)
    status, out, err = cli("-m", "lora.rank=1,2", "train=none")
    assert status == 143 and "2 jobs: 1 killed, 1 not started" in out and "Traceback" not in err
    parent, (child,) = family(runs(store, tmp_path))
    assert (parent.info.status, child.info.status) == ("KILLED", "KILLED")


# --- what a kill leaves -------------------------------------------------------------------------------------


def test_what_killed_processes_left_half_written_goes(tiny: LoadedModel, own_cache: Path, tmp_path: Path) -> None:
    prompts = tokenize(["moja", "mbili"], tiny.tokenizer)
    file = own_cache / "encodings" / f"{baseline.encoding_key(tiny, prompts)}.f32"
    database, model = tmp_path / "mlruns" / "mlflow.db", tmp_path / "models" / "m"
    left = [file.parent / f".{file.name}.abc.tmp", database.parent / ".mlflow.db.abc.tmp-journal"]
    left += [model.parent / ".m.abc.tmp" / "work" / "model.safetensors"]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    other = model.parent / ".other.abc.tmp"
    other.touch()
    baseline_encoding(tiny, prompts)
    tracking.check(f"sqlite:///{database}", "tli")
    files.made_once(model, lambda folder: (folder / "model.safetensors").touch())
    assert [path for path in left if path.exists()] == [] and other.exists()
