"""Sweeps through the real command on the tiny model, read back from the folders and through MLflow's client."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from src import summary
from src.console import signed
from src.files import held
from src.plan import done_jobs, sweep_id, sweep_root
from src.results import is_repetition, outcome, repetition, specificity_pvalue
from tests.conftest import ROOT, Cli, call_command, run_command

TINY = (
    "model=tiny", "dataset.limit=40", "dataset.control_size=10", "train.epochs=1", "lora.layers=[1]",
    "eval.permutations=99", "eval.probes=false", "eval.measures=[pair_cosine,mismatched_cosine,margin,csls_p_at_1]",
)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlruns/mlflow.db"


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], store: str) -> Cli:
    """Runs the command in this process, in a folder and an MLflow experiment of its own: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        return call_command(monkeypatch, capsys, *line(store, tmp_path, *arguments)[1:])

    return call


def line(store: str, folder: Path, *arguments: str) -> list[str]:
    flags = [argument for argument in arguments if argument == "-m"]
    own = [argument for argument in arguments if argument != "-m"]
    return ["src.run", *flags, *TINY, f"tracking.uri={store}", f"tracking.experiment={folder.name}", *own]


def background(store: str, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    whole = [sys.executable, "-m", *line(store, folder, *arguments)]
    return subprocess.Popen(whole, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def runs(store: str, folder: Path) -> dict[str, Any]:
    """The experiment's runs by id."""
    from mlflow import MlflowClient

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name(folder.name)
    assert experiment
    return {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}


def family(found: dict[str, Any]) -> tuple[Any, list[Any]]:
    """(the one parent, its children)"""
    children = [run for run in found.values() if "mlflow.parentRunId" in run.data.tags]
    (parent,) = [run for run in found.values() if run not in children]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    return parent, children


def documents(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("multirun/*/*/sweep.json"))]


def wait_for(process: subprocess.Popen[str], folder: Path, pattern: str, count: int) -> None:
    limit = time.monotonic() + 240
    while len(list(folder.glob(pattern))) < count:
        assert process.poll() is None and time.monotonic() < limit, process.communicate()
        time.sleep(0.02)


def test_a_sweep_is_one_parent_with_a_child_for_each_job(cli: Cli, store: str, tmp_path: Path) -> None:
    status, out, err = cli("-m", "lora.rank=2,4", "objective=triplet,infonce")
    assert (status, err) == (0, "")
    (document,) = documents(tmp_path)
    names = ["r2 L1 triplet", "r2 L1 infonce", "r4 L1 triplet", "r4 L1 infonce"]
    assert [(job["number"], job["name"], job["status"], job["reused"]) for job in document["jobs"]] == [
        (number, name, "done", False) for number, name in enumerate(names)
    ]
    assert document["swept"] == {"lora.rank": ["2", "4"], "objective": ["triplet", "infonce"]}
    assert document["ended"] and "lora.rank=2,4" in document["command"]
    assert f"python -m src.report {document['id']}" in out and "4 jobs: 4 done" in out
    assert [out.count(part) for part in ("\nverdict: ", "\nresults  ", "pair cosine")] == [4, 4, 0]

    parent, children = family(runs(store, tmp_path))
    assert parent.info.run_id == document["mlflow_run_id"]
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    assert {run.info.run_name for run in children} == {*names} and len(children) == 4
    assert {run.data.tags["sweep"] for run in (parent, *children)} == {document["id"]}
    assert parent.data.tags["command"] == document["command"]
    assert "| r4 L1 infonce | " in parent.data.tags["mlflow.note.content"]
    check_view_and_table(store, parent, out)

    # The same command again has nothing to do: no folder, no run.
    before = runs(store, tmp_path).keys()
    status, out, _ = cli("-m", "lora.rank=2,4", "objective=triplet,infonce")
    assert status == 0 and "nothing to do" in out and "viewStateShareKey" in out
    assert runs(store, tmp_path).keys() == before and len(documents(tmp_path)) == 1

    # A larger sweep does what is missing, and its view shows the others' runs, too.
    status, out, _ = cli("-m", "lora.rank=2,4,8", "sweep.dry_run=true")
    assert (status, out.count("already done"), out.count("would run")) == (0, 2, 1)
    assert len(documents(tmp_path)) == 1
    status, out, _ = cli("-m", "lora.rank=2,4,8")
    assert (status, out.count("already done: ")) == (0, 2)
    assert [job["reused"] for job in documents(tmp_path)[1]["jobs"]] == [True, True, False]
    found = runs(store, tmp_path)
    assert len(found.keys() - before) == 2  # the new parent and the one new job
    state = saved_view(store, found[documents(tmp_path)[1]["mlflow_run_id"]])
    from mlflow import MlflowClient

    shown = MlflowClient(store).search_runs([parent.info.experiment_id], state["searchFilter"])
    assert sorted(str(run.info.run_name) for run in shown) == [
        "r2 L1 triplet", "r4 L1 triplet", "r8 L1 triplet", "sweep of lora.rank"
    ]  # fmt: skip


def check_view_and_table(store: str, parent: Any, out: str) -> None:
    from mlflow import MlflowClient

    state = saved_view(store, parent)
    assert {"params.`lora.rank`", "params.`objective.name`", "metrics.`control/margin_gain`"} <= {
        *state["selectedColumns"]
    }
    assert state["runsExpanded"] == {parent.info.run_id: True} and state["orderByKey"] in state["selectedColumns"]
    assert f"workflowType=machine_learning&viewStateShareKey={parent.info.run_id}" in out
    shown = MlflowClient(store).search_runs([parent.info.experiment_id], state["searchFilter"])
    assert len(shown) == 5
    table = Path(parent.info.artifact_uri) / "summary.json"
    assert {file.name for file in (table.parent / "overview").iterdir()} == {"settings.png", "layers.png"}
    rows = json.loads(table.read_text())["data"]
    assert sorted(row[0] for row in rows) == ["r2 L1 infonce", "r2 L1 triplet", "r4 L1 infonce", "r4 L1 triplet"]
    for row in rows:  # each number is the one of its folder
        results = json.loads((Path(row[-1]) / "results.json").read_text())
        results["control/specificity_pvalue"] = specificity_pvalue(results, "control")
        assert row[2:-1] == [results.get(key) for key in summary.COLUMNS]


def saved_view(store: str, parent: Any) -> dict[str, Any]:
    from mlflow import MlflowClient

    tags = MlflowClient(store).get_experiment(parent.info.experiment_id).tags
    shared = json.loads(tags[f"mlflow.sharedViewState.{parent.info.run_id}"])
    return json.loads(zlib.decompress(base64.b64decode(shared["state"].removeprefix("deflate;"))))


def test_a_sweep_that_was_killed_goes_on_where_it_stood(cli: Cli, store: str, tmp_path: Path) -> None:
    arguments = ("-m", "lora.rank=1,2,3,4")
    ended = background(store, tmp_path, *arguments)
    wait_for(ended, tmp_path, "multirun/*/*/*/results.json", 1)
    ended.send_signal(signal.SIGTERM)
    out, err = ended.communicate(timeout=240)
    assert ended.returncode == 143, err
    (document,) = documents(tmp_path)
    statuses = [job["status"] for job in document["jobs"]]
    assert statuses[0] == "done" and statuses[-1] == "pending" and document["ended"]
    assert "not started" in out and "viewStateShareKey" in out
    parent, children = family(runs(store, tmp_path))
    assert parent.info.status == "KILLED" and "RUNNING" not in {run.info.status for run in children}

    killed = background(store, tmp_path, *arguments)
    done = statuses.count("done")
    wait_for(killed, tmp_path, "multirun/*/*/*/results.json", done + 1)
    killed.kill()
    killed.communicate(timeout=240)
    assert documents(tmp_path)[1]["ended"] is None
    written = {file: file.stat().st_mtime_ns for file in tmp_path.glob("multirun/*/*/*/results.json")}
    assert len(written) < 4

    status, out, err = cli(*arguments)
    assert (status, err) == (0, "")
    assert {file: file.stat().st_mtime_ns for file in written} == written  # none was done again
    files = [json.loads(file.read_text()) for file in tmp_path.glob("multirun/*/*/*/results.json")]
    assert sorted(results["params"]["lora.rank"] for results in files) == ["1", "2", "3", "4"]
    assert [job["status"] for job in documents(tmp_path)[2]["jobs"]] == ["done"] * 4
    again, children = family(runs(store, tmp_path))  # all in the run of the first attempt
    assert (again.info.run_id, again.info.status) == (parent.info.run_id, "FINISHED")
    finished = [run for run in children if run.info.status == "FINISHED"]
    assert sorted(run.data.params["lora.rank"] for run in finished) == ["1", "2", "3", "4"]
    assert {run.info.status for run in children} <= {"FINISHED", "KILLED"}
    assert {run.data.tags["sweep"] for run in children} == {documents(tmp_path)[2]["id"]}


def test_a_failed_job_stops_no_other_and_is_done_again(cli: Cli, store: str, tmp_path: Path) -> None:
    arguments = ("-m", "train.learning_rate=3e38,1e-4")
    status, out, err = cli(*arguments)
    assert status == 1
    (document,) = documents(tmp_path)
    assert [job["status"] for job in document["jobs"]] == ["failed", "done"]
    folder = Path(document["jobs"][0]["folder"])
    assert err.count("error:") == 1 and f"{folder}/run.log" in err and document["jobs"][0]["error"] in err
    assert "Traceback" in (folder / "run.log").read_text()
    assert "2 jobs: 1 failed, 1 done" in out
    parent, children = family(runs(store, tmp_path))
    assert parent.info.status == "FAILED"
    assert sorted(run.info.status for run in children) == ["FAILED", "FINISHED"]
    assert min(str(run.info.run_name) for run in children) == "r16 L1 triplet learning_rate=0.0001"

    status, out, _ = cli(*arguments)
    assert (status, out.count("already done: ")) == (1, 1)
    assert len(family(runs(store, tmp_path))[1]) == 3  # the failed one once more


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-m", "lora.layers=[1],[3]", "objective.layer=2,4"], "lora.layers=[3] objective.layer=2: lora.layers=[3]: "),
        (["-m", "lora.layers=[1],[9]", "sweep.dry_run=true"], "refused: 1 of 2 jobs; none was started"),
        (["-m", "lora.nokey=1,2"], "nokey"),
        (["-m", "+lora.nokey=1,2"], "lora.nokey is no key"),
        (["-m", "lora.rank=range(4,4)"], "the sweep is empty: lora.rank has no values"),
        (["-m", "lora.rank=shuffle(2,4)"], "lora.rank=shuffle(2,4): can't be shuffled"),
        (["-m", "lora.rank=2,4", "train.seed=1,2", "hydra.sweep.subdir=r${lora.rank}"], "than one job would write to"),
        (["-m", "lora.rank=2,4", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2.0"], "hydra.launcher.n_jobs=2.0: "),
        (["-m", "lora.rank=2,4", "hydra.sweeper.max_batch_size=0"], "hydra.sweeper.max_batch_size=0: give a whole"),
        (["-m", "lora.rank=interval(1,4)"], "does not support"),
        (["-m", "lora.rank=4,4"], "two jobs are the same: lora.rank=4 and lora.rank=4"),
        (["-m", "objective.temperature=0.1,1"], "isn't read with objective=triplet: add objective=infonce"),
        (["-m", "quant.compute_dtype=float32,bfloat16"], "compute_dtype isn't read with quant=none: add quant=nf4"),
        (["-m", "train.epochs=0", "lora.rank=4,8"], "lora.rank isn't read with train.epochs=0: leave it out"),
        (["-m", "lora.rank=4,8", "tracking.experiment=a,b"], "tracking and sweep can't be swept"),
        (["-m", "lora.rank=4,8", "dataset=file", "dataset.path=absent.tsv"], "absent.tsv"),
        (["dataset.path=words.tsv"], "dataset.path=words.tsv isn't read with dataset.source=builtin: add dataset=file"),
        (["dataset=freedict", "dataset.source_column=a"], "dataset.source_column=a isn't read"),
        (["experiment=no_sweep"], "layer_sweep"),
        (["lora.layers=[9]"], "lora.layers=[9]: 9 is not possible"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_anything_is_made(
    cli: Cli, tmp_path: Path, arguments: list[str], said: str
) -> None:
    status, out, err = cli(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and said in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("sweeper", "value"), [("basic", "2,4"), ("optuna", "choice(2,4)")])
def test_the_sweeper_s_own_params_may_stand_on_the_command_line(cli: Cli, sweeper: str, value: str) -> None:
    params = '+hydra.sweeper.params={lora.rank:"' + value + '"}'
    status, out, err = cli("-m", f"hydra/sweeper={sweeper}", params, "sweep.dry_run=true")
    assert (status, err) == (0, "") and ("r2 L1 triplet" in out or "lora.rank: 2, 4" in out)


@pytest.mark.parametrize(("arguments", "key"), [(["lora.rank=2"], "run"), (["-m", "lora.rank=2,4"], "sweep")])
def test_a_folder_in_which_another_command_is_at_work_is_refused(
    cli: Cli, tmp_path: Path, arguments: list[str], key: str
) -> None:
    command = [*arguments, f"hydra.{key}.dir={tmp_path}/mine", "tracking.backend=off"]
    handle = held(tmp_path / "mine")
    assert handle
    said = f"error: hydra.{key}.dir: another command is at work in {tmp_path}/mine; choose another folder\n"
    assert cli(*command) == (2, "", said)
    assert list((tmp_path / "mine").iterdir()) == []
    os.close(handle)
    assert cli(*command)[::2] == (0, "")
    handle = held(tmp_path / "mine")  # it has let go of it
    assert handle
    os.close(handle)


def test_a_sweep_without_anything(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(monkeypatch, "-m") == 2
    assert "the sweep is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "jobs"),
    [("layer", 8), ("rank", 6), ("quant", 2), ("objective", 6), ("seed", 5), ("model", 2)],
)
def test_the_sweeps_in_conf_are_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, jobs: int
) -> None:
    monkeypatch.chdir(tmp_path)
    status = run_command(monkeypatch, f"experiment={name}_sweep", "sweep.dry_run=true")
    lines = capsys.readouterr().out.splitlines()
    assert status == 0 and len(set(lines)) == jobs + 1 and lines[-1] == f"{jobs} jobs, 0 of them done already"


def test_jobs_that_set_a_new_key_are_told_apart(cli: Cli) -> None:
    texts = ",".join(str(file) for file in sorted((ROOT / "data" / "text").iterdir())[:2])
    status, out, _ = cli("-m", f"+eval.text.swahili={texts}", "sweep.dry_run=true")
    first, second, _ = out.splitlines()
    assert status == 0 and first != second and " swahili=" in first


def test_a_job_whose_settings_have_changed_since_the_plan_is_refused(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from src import study

    prepare, rate = study.prepare, tmp_path / "conf" / "train" / "mine.yaml"

    def edited_meanwhile(*args: Any) -> study.Study:
        rate.write_text(rate.read_text().replace("1.0e-3", "1.0e-4"))
        return prepare(*args)

    rate.parent.mkdir(parents=True)
    rate.write_text("defaults: [default, _self_]\nlearning_rate: 1.0e-3\n")
    monkeypatch.setattr(study, "prepare", edited_meanwhile)
    arguments = ("-m", "lora.rank=2,3", "train=mine", f"hydra.searchpath=[file://{rate.parents[1]}]", "tracking=off")
    status, out, err = cli(*arguments)
    assert status == 1 and "2 jobs: 1 done, 1 failed" in out and err.count("a file of conf/ has changed") == 1
    status, out, _ = cli(*arguments)
    assert status == 0 and "2 jobs: 2 done" in out and "already done" not in out


@pytest.mark.parametrize(("swept", "loaded"), [("model.n_layers=4,5", 2), ("lora.rank=2,3", 1)])
def test_nothing_of_a_job_stays_in_memory(tmp_path: Path, swept: str, loaded: int) -> None:
    """Neither an earlier model, of which there may be room for one, nor what the first job has encoded."""
    code = """
import gc, sys, weakref
from src import run, tracking
gc.set_threshold(0)  # nothing is freed by chance
models, vectors, opened = [], [], tracking.open_store

def alive(kept):
    return [number for number, one in enumerate(kept) if one()]

def watch():
    from src import models as module, study
    load, ask = module._load, module.load_model

    def loaded(*args):
        print("models before loading:", alive(models))
        found = load(*args)
        models.append(weakref.ref(found.model))
        return found

    def asked(*args):  # from the second job on
        found = ask(*args)
        gc.collect()
        print("vectors of earlier jobs:", alive(vectors))
        return found

    def encoded(encode):
        def kept(*args, **kwargs):
            found = encode(*args, **kwargs)
            vectors.append(weakref.ref(found.vectors))
            return found
        return kept

    module._load, module.load_model = loaded, asked
    study.encode_before, study.encode_after = encoded(study.encode_before), encoded(study.encode_after)

def job_begins(config, root, folder=None):
    if folder and not models:
        watch()
    return opened(config, root, folder)

tracking.open_store = job_begins
sys.exit(run.main())
"""
    arguments = ["-m", *TINY, swept, "tracking=off"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    said = [line for line in done.stdout.splitlines() if line.startswith(("models before", "vectors of"))]
    assert sorted(said) == [*["models before loading: []"] * loaded, "vectors of earlier jobs: []"]


def test_jobs_are_done_again_where_their_pairs_changed_or_force_asks(cli: Cli, tmp_path: Path) -> None:
    words = tmp_path / "words.tsv"
    words.write_text("".join(f"word{number}\tort{number}\n" for number in range(40)))
    arguments = ("-m", "dataset=file", f"dataset.path={words}", "lora.rank=1", "tracking=off", "train=none")
    arguments += ("dataset.source_language=x", "dataset.target_language=y", "hydra.sweep.dir=multirun/a/b")

    def times() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in tmp_path.glob("multirun/a/b/*/results.json")}

    assert cli(*arguments)[0] == 0
    first = times()
    words.write_text(words.read_text().replace("ort7\n", "anders\n"))
    assert cli(*arguments)[0] == 0
    second = times()
    assert cli(*arguments)[0] == 0 and times() == second
    assert cli(*arguments, "sweep.force=true")[0] == 0
    third = times()
    assert first.keys() == second.keys() == third.keys() and len(first) == 1
    assert all(first[file] < second[file] < third[file] for file in first)
    status, _, err = cli(*arguments, "lora.alpha=8")
    assert status == 2 and "holds the results of another job or version" in err


def test_seeds_are_averaged_with_student_s_interval() -> None:
    def results(name: str, rank: str, seed: str, gain: float) -> dict[str, Any]:
        setting = {"lora.rank": rank, "train.seed": seed, "dataset.seed": seed, "tracking.uri": seed}
        numbers = {"control/margin_gain": gain, "control/csls_p_at_1_gain": 0.5}
        return {"name": f"{name} seed={seed}", "verdict": "aligned", "params": setting, **numbers}

    found = [results("r4 L1", "4", str(seed), gain) for seed, gain in enumerate([1.0, 2.0, 3.0])]
    rows = summary.seed_rows([*found, results("r8 L1", "8", "0", 9.0)])
    # mean 2, standard error 1/√3, t(0.975, 2) = 4.3027: 2 ± 2.4841
    assert rows == [
        ["r4 L1, 3 seeds", "aligned 3", "+2.0000 [-0.4841, +4.4841]", "+0.5000 [+0.5000, +0.5000]"],
    ]
    found[2]["train_batch_size_used"] = 32  # memory ran out: another setting than was asked for
    assert [row[0] for row in summary.seed_rows(found)] == ["r4 L1, 2 seeds"]


def test_a_summary_shows_the_verdict_s_p_and_no_verdict_of_a_pilot() -> None:
    pvalues = {"control/specificity_pvalue": 0.03, "control/scaled_specificity_pvalue": 0.3}
    trained = {"name": "a", "verdict": "none", "control/margin_gain": -2e-05, **pvalues}
    rows = summary.job_rows([trained, {"name": "b", "verdict": "none", "control/csls_p_at_1_before": 0.1}])
    assert rows == [
        ["a", "none", -2e-05, None, None, None, None, 0.3],
        ["b", None, None, 0.1, None, None, None, None],
    ]
    first, second = summary.as_text([{**trained, "params": {}}]).splitlines()[1:], signed(0.00051)
    assert "-2.0e-05" in first[2] and "0.3" in first[2] and (second, signed(0)) == ("+0.0005", "+0.0000")


def test_only_whole_job_folders_count_as_done(tmp_path: Path) -> None:
    root = tmp_path / "multirun"
    good = {"config_hash": "a", "dataset": {"digest": "d"}, "inputs_digest": "i"}
    for number, text in enumerate(['{"config_hash": "a", "data', json.dumps(good), "[]", "", '{"config_hash": "a"}']):
        (root / "day" / "time" / str(number)).mkdir(parents=True)
        (root / "day" / "time" / str(number) / "results.json").write_text(text)
    again = repetition(root / "day" / "time" / "1")
    shutil.copytree(root / "day" / "time" / "1", again)
    assert is_repetition(again) and not is_repetition(root / "day" / "time" / "1")
    assert done_jobs(root) == {("a", "d", "i"): [root / "day/time/1"]}
    assert sweep_root(root / "day/time") == root and sweep_id(root / "day/time") == "day/time"
    assert sweep_root(tmp_path / "own") == tmp_path / "own" and sweep_id(tmp_path / "own") == str(tmp_path / "own")
    assert outcome(tmp_path / "absent") == ("pending", None) and outcome(tmp_path) == ("killed", None)
