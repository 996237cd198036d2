"""Searches through the real command on the tiny model, read back from folders, from MLflow and from Optuna."""

from __future__ import annotations

import json
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from src import report, search
from src.evidence import holm
from src.report_data import read_sweep
from src.results import read_table
from tests.conftest import Cli
from tests.test_sweep import background, cli, documents, family, runs, store, wait_for

__all__ = ["cli", "store"]  # fixtures
SEARCH = ("-m", "hydra/sweeper=optuna")
RATE = "train.learning_rate=tag(log,interval(1e-5,1e-3))"


def study_of(document: dict[str, Any]) -> optuna.Study:
    search = document["search"]
    return optuna.load_study(study_name=search["study"], storage=f"sqlite:///{search['storage']}")


def states(document: dict[str, Any]) -> list[TrialState]:
    return [trial.state for trial in study_of(document).trials]


def results(job: dict[str, Any]) -> dict[str, Any]:
    return json.loads((Path(job["folder"]) / "results.json").read_text())


def test_a_search_is_one_parent_with_a_child_for_each_trial(cli: Cli, store: str, tmp_path: Path) -> None:
    arguments = (*SEARCH, "lora.rank=choice(2,4)", RATE)
    status, out, err = cli(*arguments, "hydra.sweeper.n_trials=2")
    assert (status, err) == (0, "")
    (document,) = documents(tmp_path)
    jobs = document["jobs"]
    assert [(job["number"], job["trial"], job["status"], job["reused"]) for job in jobs] == [
        (number, number, "done", False) for number in range(2)
    ]
    assert set(document["swept"]) == {"lora.rank", "train.learning_rate"}
    found = [results(job) for job in jobs]
    rates = [float(one["params"]["train.learning_rate"]) for one in found]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates) and len(set(rates)) == 2
    assert Path(document["search"]["storage"]) == Path(store.removeprefix("sqlite:///")).with_name("optuna.db")
    trials = study_of(document).trials
    assert [trial.value for trial in trials] == [one["control/margin_gain"] for one in found]

    best = max(range(2), key=lambda number: found[number]["control/margin_gain"])
    assert f"best       {jobs[best]['name']}: control/margin_gain" in out and "on another split" in out
    (confirm,) = [line for line in out.splitlines() if line.endswith("dataset.seed=1")]
    assert f"train.learning_rate={rates[best]}" in confirm and "2 of 2 trials" in out

    parent, children = family(runs(store, tmp_path))
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    assert {run.info.run_name for run in children} == {job["name"] for job in jobs} and len(children) == 2
    assert all(len(str(run.info.run_name)) < 50 for run in children)
    assert "on another split" in parent.data.tags["mlflow.note.content"]
    assert report.main([str(tmp_path / "multirun" / document["id"]), "--format", "md"]) == 0

    status, out, _ = cli(*arguments, "hydra.sweeper.n_trials=2")
    assert status == 0 and "nothing to do" in out and len(documents(tmp_path)) == 1
    status, out, err = cli(*arguments, "hydra.sweeper.n_trials=5", "sweep.dry_run=true")
    assert (status, err) == (0, "") and len(documents(tmp_path)) == 1
    assert "lora.rank: 2, 4" in out and "1e-05 … 0.001, log" in out and out.count("already done") == 2
    assert out.endswith("5 trials, 2 of them done already; 3 would run\n")
    table = Path(jobs[1]["folder"]) / "pairs.csv"
    table.write_text(table.read_text()[:-10])
    status, out, err = cli(*arguments, "hydra.sweeper.n_trials=5", "sweep.dry_run=true")
    assert status == 0 and out.endswith("5 trials, 1 of them done already; 4 would run\n")
    said = "pairs.csv is damaged (its digest differs): this trial doesn't count as done"
    assert err == f"warning: {table.parent}: {said}\n"


def test_a_search_that_was_killed_goes_on_where_it_stood(cli: Cli, store: str, tmp_path: Path) -> None:
    arguments = (*SEARCH, RATE, "hydra.sweeper.n_trials=3")
    killed = background(store, tmp_path, *arguments)
    try:
        wait_for(killed, tmp_path, "multirun/*/*/1/.hydra", 1)
        killed.send_signal(signal.SIGSTOP)  # it must not get any further while the other command starts
        status, _, err = cli(*arguments)
        assert (status, err.count("\n")) == (2, 1) and "under way in another process" in err
    finally:
        killed.kill()
        killed.communicate(timeout=240)
    (document,) = documents(tmp_path)
    assert document["ended"] is None and states(document) == [TrialState.COMPLETE, TrialState.RUNNING]
    (written,) = tmp_path.glob("multirun/*/*/*/results.json")
    before = written.stat().st_mtime_ns
    with closing(sqlite3.connect(document["search"]["storage"])) as connection, connection:
        # As if the kill had come between the first job's end and its being told.
        connection.execute("UPDATE trials SET state = 'RUNNING' WHERE number = 0")
        connection.execute("DELETE FROM trial_values")

    status, out, err = cli(*arguments)
    assert (status, err) == (0, "")
    assert written.stat().st_mtime_ns == before
    again = documents(tmp_path)[1]
    assert [job["status"] for job in again["jobs"]] == ["done"] * 3 and "3 of 3 trials" in out
    told = study_of(again).trials
    assert [trial.state for trial in told] == [
        TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE,
    ]  # fmt: skip
    assert told[0].value == json.loads(written.read_text())["control/margin_gain"]
    assert told[2].params == told[1].params and told[3].params not in (told[0].params, told[1].params)
    parent, children = family(runs(store, tmp_path))
    assert (parent.info.run_id, parent.info.status) == (document["mlflow_run_id"], "FINISHED")
    ended = [run.info.status for run in children]  # one more where the kill came after the second job's run was opened
    assert ended.count("FINISHED") == 3 and ended.count("KILLED") == len(ended) - 3 <= 1


def test_what_is_done_is_not_run_again(cli: Cli, tmp_path: Path) -> None:
    assert cli("-m", "lora.rank=2", "tracking=off")[0] == 0
    arguments = (*SEARCH, "lora.rank=choice(2,4)", "tracking=off", "hydra.sweeper.n_jobs=3")
    status, out, err = cli(*arguments, "hydra.sweeper.n_trials=9")
    assert (status, err) == (0, "")
    document = documents(tmp_path)[-1]
    assert {(results(job)["params"]["lora.rank"], job["reused"]) for job in document["jobs"]} == {
        ("2", True), ("4", False),
    }  # fmt: skip
    assert len(list(tmp_path.glob("multirun/*/*/*/results.json"))) == 2
    assert states(document) == [TrialState.COMPLETE] * 9 and "9 of 9 trials, 7 of them with another's setting" in out
    assert Path(document["search"]["storage"]) == tmp_path / "multirun" / "optuna.db"

    arguments += ("hydra.sweeper.n_trials=1", "sweep.force=true", "hydra.sweep.dir=multirun/a/b")
    assert cli(*arguments)[0] == 0
    assert states(documents(tmp_path)[-1]) == [TrialState.COMPLETE]
    assert len(list(tmp_path.glob("multirun/*/*/*/results.json"))) == 3
    status, _, err = cli(*arguments, "lora.alpha=8")
    assert status == 2 and "holds another sweep" in err
    file = tmp_path / "multirun" / "a" / "b" / "sweep.json"
    file.write_text(file.read_text()[:-100])
    status, _, err = cli(*arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert (
        err.startswith(f"error: hydra.sweep.dir: {file.parent}: sweep.json is damaged (") and "; move sweep.json" in err
    )


def test_a_trial_with_a_low_margin_is_pruned(cli: Cli, store: str, tmp_path: Path) -> None:
    arguments = (*SEARCH, "train.epochs=2", "train.learning_rate=interval(1e-5,0.01)")
    arguments += ("hydra.sweeper.warmup_trials=3", "hydra.sweeper.warmup_epochs=0")
    assert cli(*arguments, "hydra.sweeper.n_trials=1")[0] == 0
    study = study_of(documents(tmp_path)[0])
    for rate in (1e-4, 2e-4, 0.008):  # the last hurts the margin; two of the three before it don't
        study.enqueue_trial({"train.learning_rate": rate})
    status, out, err = cli(*arguments, "hydra.sweeper.n_trials=4")
    assert (status, err) == (0, "") and "4 jobs: 3 done, 1 pruned" in out
    document = documents(tmp_path)[1]
    pruned = document["jobs"][3]
    assert states(document) == [TrialState.COMPLETE] * 3 + [TrialState.PRUNED]
    assert pruned["status"] == "pruned" and "after epoch 1 of 2" in pruned["error"]
    said = json.loads((Path(pruned["folder"]) / "pruned.json").read_text())
    good = [list(trial.intermediate_values.values()) for trial in study.trials[:3]]
    assert said["epoch"] == 1 and said["margin"] < sorted(margins[0] for margins in good)[1]
    last = results(document["jobs"][1])["control/margin_after"]
    assert len(good[1]) == 2 and good[1][1] == pytest.approx(last, abs=1e-6)

    parent, children = family(runs(store, tmp_path))
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"} and len(children) == 4
    (run,) = [run for run in children if run.info.run_name == pruned["name"]]
    assert run.data.tags["pruned"] == pruned["error"] and "verdict" not in run.data.tags
    assert series(store, run) == [(1, said["margin"])]
    (run,) = [run for run in children if run.info.run_name == document["jobs"][1]["name"]]
    assert series(store, run) == list(enumerate(good[1], start=1))
    sweep = read_sweep(tmp_path / "multirun" / document["id"])
    assert (len(sweep.ranked), sweep.tries) == (3, 4)
    pvalues = [job.pvalue or 0.0 for job in sweep.ranked]
    assert [job.holm for job in sweep.ranked] == list(holm([*pvalues, 1.0]))[:3]

    study.enqueue_trial({"train.learning_rate": 0.008})
    status, out, err = cli(*arguments, "hydra.sweeper.n_trials=5")
    assert (status, err) == (0, "") and len(list(tmp_path.glob("multirun/*/*/*/run.log"))) == 4
    assert study.trials[-1].state == TrialState.PRUNED and "5 of 5 trials, 1 of them with another's setting" in out


def test_a_trial_that_began_anew_for_want_of_memory_is_not_pruned(
    monkeypatch: pytest.MonkeyPatch, cli: Cli, tmp_path: Path
) -> None:
    """Optuna would judge the second attempt by what the first one reported."""
    arguments = (*SEARCH, "train.epochs=2", "train.learning_rate=interval(1e-5,0.01)")
    arguments += ("hydra.sweeper.warmup_trials=2", "hydra.sweeper.warmup_epochs=0")
    assert cli(*arguments, "hydra.sweeper.n_trials=1")[0] == 0
    study = study_of(documents(tmp_path)[0])
    for rate in (1e-4, 0.008):  # the last hurts the margin
        study.enqueue_trial({"train.learning_rate": rate})
    assert cli(*arguments, "hydra.sweeper.n_trials=2")[0] == 0

    judge = search.judge

    def short_of_memory(*args: Any) -> search.Judge:
        judged, calls = judge(*args), []

        def one(epoch: int, margin: float) -> dict[str, Any] | None:
            calls.append(epoch)
            if len(calls) > 1:
                return judged(epoch, margin)
            judged(epoch, 9.0)  # so good that the attempt goes on, and so that none can be better than it
            raise MemoryError

        return one

    monkeypatch.setattr(search, "judge", short_of_memory)
    status, out, err = cli(*arguments, "hydra.sweeper.n_trials=3")
    assert status == 0 and "3 jobs: 3 done" in out and "train.batch_size=" in err
    job = documents(tmp_path)[-1]["jobs"][-1]
    rows = read_table(Path(job["folder"]) / "search.csv")
    margins = [float(row["control_margin"]) for row in rows]
    others = [list(trial.intermediate_values.values()) for trial in study.trials[:2]]
    assert [row["epoch"] for row in rows] == ["1", "2"] and margins[0] < min(values[0] for values in others)


def series(store: str, run: Any) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    history = MlflowClient(store).get_metric_history(run.info.run_id, "search/control_margin")
    return [(metric.step, metric.value) for metric in history]


def test_a_failed_trial_stops_no_other(cli: Cli, tmp_path: Path) -> None:
    status, out, err = cli(
        *SEARCH, "lora.rank=int(interval(1,1000))", "train.learning_rate=3e38", "tracking=off",
        "hydra.sweeper.n_trials=2",
    )  # fmt: skip
    assert status == 1 and err.count("error: failed: ") == 2 and "2 jobs: 2 failed" in out
    assert states(documents(tmp_path)[0]) == [TrialState.FAIL] * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lora.rank=4"], "there is nothing to search"),
        (["lora.rank=2,4", "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0: must be at least 1"),
        (["lora.rank=2,4", "hydra.sweeper.n_trials=many"], "hydra.sweeper.n_trials: Value 'many'"),
        (["lora.rank=2,4", "hydra.sweeper.direction=up"], "hydra.sweeper.direction=up: must be"),
        (["lora.rank=2,4", "hydra.sweeper.metric=control/luck"], "hydra.sweeper.metric=control/luck: no such number"),
        (["dataset.seed=1,2", "train.epochs=0"], "hydra.sweeper.metric=control/margin_gain: no such number"),
        (["lora.rank=interval(4,64)"], "lora.rank is a whole number: write int(interval(4,64))"),
        (["lora.rank=int(interval(0,8))"], "lora.rank=0: must be at least 1"),
        (["lora.dropout=interval(0.1,0.1)"], "lora.dropout: interval(0.1,0.1) must rise"),
        (["lora.dropout=tag(log,interval(0,0.1))"], "must rise, from above 0"),
        (["lora.dropout=tag(lin,interval(0,0.1))"], "the one tag is log"),
        (["lora.layers=choice([1],[9])"], "lora.layers=[9]: 9 is not possible"),
        (["lora.rank=range(4,4)"], "has no values"),
        (["lora.rank=shuffle(2,4)"], "can't be shuffled"),
        (["lora.rank=2,4", "hydra.sweep.subdir=r${lora.rank}"], "more than one job would write to"),
        (["lora.rank=2,4", "lora.alpha=-1"], "lora.alpha=-1.0: must be above 0"),
        (["objective.one_way=choice(true,false)"], "objective.one_way isn't read with objective=triplet: add"),
        (["tracking.experiment=choice(a,b)"], "tracking and sweep can't be swept"),
        (["lora.rank=2,4", "hydra.sweeper._target_=hydra_plugins.x.Other"], "only basic and optuna"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_anything_is_made(
    cli: Cli, tmp_path: Path, arguments: list[str], said: str
) -> None:
    status, out, err = cli(*SEARCH, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and said in err
    assert list(tmp_path.iterdir()) == []


def test_the_search_in_conf_is_whole(cli: Cli) -> None:
    status, out, err = cli("experiment=search", "sweep.dry_run=true")
    assert (status, err) == (0, "") and out.endswith("20 trials, 0 of them done already; 20 would run\n")
