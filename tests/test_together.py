"""Commands that start at once in one checkout: what is shared is made once, and no job gets into another's sweep."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from bench.soak_state import job_facts
from tests.conftest import ROOT

SCRIPT = """
import sys
from pathlib import Path
from bench import soak

soak.preload()
from src import baseline, models

place = Path(sys.argv[1])
place.mkdir()

def counted(module, name):
    made = getattr(module, name)
    def wrapped(*args, **kwargs):
        with (place / name).open("a") as file:
            file.write("once ")
        return made(*args, **kwargs)
    setattr(module, name, wrapped)

counted(models, "_save_tiny")
counted(baseline, "encode_words")
soak.SWEEP = (*(word for word in soak.SWEEP if not word.startswith("lora.rank")), "lora.rank=2")
soak.LAUNCHERS["other"] = ("train.seed=1",)
rounds = [soak.Round(place, name, False) for name in ("basic", "basic", "other")]
commands = [soak.start(one) for one in rounds]
for one, command in zip(rounds, commands):
    soak.check_end(one, command, 0)
print([one.wrong for one in rounds])
"""


def test_three_sweeps_at_once_two_of_them_the_same(tmp_path: Path) -> None:
    """A fresh folder, database and cache: two with the same settings do their jobs each for itself, side by side."""
    place = tmp_path / "place"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(place)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str([[], [], []]), [file.read_text() for file in place.glob("said*")]
    # The model's first conversion and its vectors, which all three need, are made by one of them.
    assert (place / "_save_tiny").read_text() == "once "
    assert (place / "encode_words").read_text() == "once "

    sweeps = [json.loads(file.read_text()) for file in place.glob("multirun/*/*/sweep.json")]
    found = [results(job) for sweep in sweeps for job in sweep["jobs"]]
    assert len(sweeps) == 3 and len({sweep["mlflow_run_id"] for sweep in sweeps}) == 3
    names = Counter((one["name"], one["params"]["train.seed"]) for one in found)
    assert names == {("r2 L1 triplet", "0"): 2, ("r2 L2 triplet", "0"): 2, ("r2 L1 triplet", "1"): 1,
                     ("r2 L2 triplet", "1"): 1}  # fmt: skip
    for sweep in sweeps:
        check_tracked(place, sweep)
    same = [sweep["jobs"] for sweep in sweeps if results(sweep["jobs"][0])["params"]["train.seed"] == "0"]
    for one, other in zip(*same, strict=True):  # number for number, file for file
        assert facts(one) == facts(other)


def check_tracked(place: Path, sweep: dict[str, Any]) -> None:
    """Its jobs lie in its own folder, and their runs, finished, in its own."""
    from mlflow import MlflowClient

    assert [job["status"] for job in sweep["jobs"]] == ["done", "done"]
    assert {str(Path(job["folder"]).parent.relative_to(place / "multirun")) for job in sweep["jobs"]} == {sweep["id"]}
    client = MlflowClient(f"sqlite:///{place}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("soak")
    assert experiment and client.get_run(sweep["mlflow_run_id"]).info.status == "FINISHED"
    inside = f"tags.mlflow.parentRunId = '{sweep['mlflow_run_id']}'"
    children = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id], inside)}
    assert children.keys() == {results(job)["mlflow_run_id"] for job in sweep["jobs"]}
    for job in sweep["jobs"]:
        own, run = results(job), children[results(job)["mlflow_run_id"]]
        assert run.info.status == "FINISHED" and run.data.params["train.seed"] == own["params"]["train.seed"]
        numbers = {key: value for key, value in own.items() if "/" in key and isinstance(value, float)}
        assert numbers.items() <= run.data.metrics.items() and len(numbers) > 20


def results(job: dict[str, Any]) -> dict[str, Any]:
    return json.loads((Path(job["folder"]) / "results.json").read_text())


def facts(job: dict[str, Any]) -> dict[str, Any]:
    return dict(job_facts(Path(job["folder"]), results(job)))
