"""Damaged files: found by their digests, named, made again where they can be, and never trusted."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from src import models, report, sync, tracking, ui
from src.errors import UserError
from src.files import made_once
from src.models import LoadedModel, load_model
from src.results import PRUNED, DamageError, outcome, read_document, read_results, write_results, write_table
from tests.conftest import Cli, call_command, model_config, quant_config, run_command
from tests.test_sweep import TINY, documents
from tests.test_tracking import job_folder


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs the command in this process, untracked, in a folder of its own: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        return call_command(monkeypatch, capsys, *TINY, *arguments)

    return call


def flip(file: Path, chance: random.Random) -> None:
    """Turns one bit of the file."""
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def cut(file: Path, chance: random.Random) -> None:
    """Leaves the first part of the file."""
    file.write_bytes(file.read_bytes()[: chance.randrange(file.stat().st_size)])


# --- a job's folder -----------------------------------------------------------------------------------------

FOUND = {"verdict": "aligned", "control/margin_gain": 0.1 + 0.2, "params": {"lora.rank": "4"}, "none": None, "größe": 1}


@pytest.fixture
def job(tmp_path: Path) -> Path:
    folder = tmp_path / "job"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(bytes(range(256)))
    write_table(folder / "layers.csv", ("layer", "value"), [(1, 0.25), ("final", 0.125)])
    write_table(folder / "training.csv", ("step", "loss"), [(1, 0.5)])
    write_results(folder, FOUND)
    return folder


def test_any_flipped_bit_and_any_cut_of_a_job_s_files_is_noticed(job: Path) -> None:
    assert {key: read_results(job)[key] for key in FOUND} == FOUND and outcome(job) == ("done", None)
    chance = random.Random(0)
    names = ["results.json", "layers.csv", "training.csv", "adapter/adapter_model.safetensors"]
    for name in names:
        whole = (job / name).read_bytes()
        for harm in (flip, cut) * 30:
            harm(job / name, chance)
            try:
                found = read_results(job)
            except DamageError as error:
                assert str(error).startswith(f"{name} is damaged (")
                assert outcome(job) == ("failed", str(error))
            else:  # a blank between two words of the JSON, say: all that it tells is as it was
                assert name == "results.json" and {key: found[key] for key in FOUND} == FOUND
            (job / name).write_bytes(whole)
    for name in names[1:]:
        shutil.move(job / name, job / "away")
        assert outcome(job) == ("failed", f"{name} is missing")
        shutil.move(job / "away", job / name)
    assert outcome(job) == ("done", None)


def test_who_writes_results_again_keeps_what_they_vouch_for(job: Path) -> None:
    cut(job / "layers.csv", random.Random(0))
    write_results(job, read_results(job, alone=True) | {"mlflow_run_id": "r"})
    assert outcome(job) == ("failed", "layers.csv is damaged (its digest differs)")


def test_results_of_earlier_versions_have_no_digests_and_damaged_pruned_jobs_are_done_again(job: Path) -> None:
    found = read_results(job)
    without = {key: value for key, value in found.items() if key not in ("sha256", "files")}
    (job / "results.json").write_text(json.dumps(without))
    assert outcome(job) == ("done", None)
    (job / "results.json").unlink()
    write_results(job, {"pruned": "after epoch 1"}, PRUNED)
    assert outcome(job) == ("pruned", "after epoch 1")
    (job / PRUNED).write_text((job / PRUNED).read_text().replace("epoch 1", "epoch 2"))
    assert outcome(job) == ("failed", "pruned.json is damaged (its digest differs)")
    (job / PRUNED).unlink()
    (job / "failed.json").write_text('{"err')
    assert outcome(job)[0] == "failed" and "can't be read" in str(outcome(job)[1])


def test_a_sweep_does_damaged_jobs_again_and_sync_and_report_leave_them_out(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("-m", "dataset.seed=1,2,4", "tracking=off", "train.epochs=0")
    assert cli(*arguments)[0] == 0
    folders = [Path(job["folder"]) for job in documents(tmp_path)[0]["jobs"]]
    first = read_results(folders[0])
    results = (folders[0] / "results.json").read_text()
    number = str(first["control/margin_before"])
    (folders[0] / "results.json").write_text(results.replace(number, "0.9"))  # well-formed, and wrong
    cut(folders[1] / "layers.csv", random.Random(0))
    said = ["results.json is damaged (its digest differs)", "layers.csv is damaged (its digest differs)"]

    status = sync.main([str(tmp_path / "multirun")])
    printed = capsys.readouterr()
    assert status == 1 and printed.out.endswith("2 failed, 1 not tracked (tracking=off; --uri records it)\n")
    for folder, why in zip(folders, said, strict=False):
        assert f"{folder}: {why}; run the job again" in printed.err
    assert report.main([str(folders[0].parent), "--format", "csv"]) == 0
    printed = capsys.readouterr()
    for folder, why in zip(folders, said, strict=False):
        assert f"{folder}/{why}; run the job again" in printed.err
    assert (folders[0].parent / "report.csv").read_text().count("damaged,,") >= 2

    status, out, err = cli(*arguments)
    assert (status, out.count("already done: "), out.count("\nresults  ")) == (0, 1, 2)
    assert err.splitlines() == [
        f"warning: {folder}: {why}: this job doesn't count as done" for folder, why in zip(folders, said, strict=False)
    ]
    again = [Path(job["folder"]) for job in documents(tmp_path)[1]["jobs"]]
    assert again[2] == folders[2] and {outcome(folder) for folder in again} == {("done", None)}
    assert read_results(again[0])["control/margin_before"] == first["control/margin_before"]


def test_a_sweep_whose_own_file_is_damaged_goes_on_from_its_jobs_folders(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = (*TINY, "-m", "dataset.seed=1,2", "train.epochs=0", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")
    assert run_command(monkeypatch, *command) == 0
    (file,) = tmp_path.glob("multirun/*/*/sweep.json")
    document, chance = read_document(file.parent), random.Random(0)
    assert document.pop("sha256")
    whole, moved = file.read_text(), file.read_text().replace(f"{file.parent}/1", f"{file.parent}/7")
    written = {path: path.stat().st_mtime_ns for path in file.parent.glob("*/results.json")}
    capsys.readouterr()
    harms: list[Callable[[], object]] = [
        lambda: file.write_text("[" * 100_000),
        lambda: file.write_text(json.dumps({"id": "a", "jobs": [1], "ended": "b", "command": "c"})),
        lambda: file.write_text(moved),
    ]
    for harm in harms:
        harm()
        assert sync.main([str(tmp_path / "multirun")]) == 1
        printed = capsys.readouterr()
        assert printed.out == "2 already recorded, 1 failed\n" and printed.err.count("\n") == 1
        assert printed.err.startswith(f"{file.parent}: sweep.json is damaged (")
        assert report.main([str(file.parent), "--format", "csv"]) == 0
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1 and "sweep.json is damaged (" in printed.err
        assert len((file.parent / "report.csv").read_text().splitlines()) == 3
    for spoil in (flip, cut) * 40:
        file.write_text(whole)
        spoil(file, chance)
        try:
            found = read_document(file.parent)
            assert {key: found[key] for key in document} == document
        except DamageError as error:
            assert str(error).startswith("sweep.json is damaged (")
    file.write_text(moved)
    assert run_command(monkeypatch, *command) == 0
    printed = capsys.readouterr()
    assert printed.err == (
        f"warning: {file.parent}: sweep.json is damaged (its digest differs): no sweep goes on from it; "
        "its jobs count by their own folders\n"
    )
    assert printed.out.count("already done: ") == 2 and "2 jobs: 2 done" in printed.out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("multirun/*/*/*/results.json")} == written


# --- MLflow's database --------------------------------------------------------------------------------------


def invert(file: Path, place: int, length: int) -> None:
    content = bytearray(file.read_bytes())
    content[place : place + length] = bytes(byte ^ 0xFF for byte in content[place : place + length])
    file.write_bytes(content)


def page_of(file: Path, table: str) -> tuple[int, int]:
    """(where the table's first page begins, its length)"""
    with closing(sqlite3.connect(file)) as store:
        (size,) = store.execute("PRAGMA page_size").fetchone()
        (number,) = store.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
    return (number - 1) * size, size


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: os.truncate(file, 0),
    "header": lambda file: invert(file, 0, 100),
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "page": lambda file: invert(file, *page_of(file, "metrics")),
}


def test_a_damaged_mlflow_database_is_named_and_left_alone_and_all_can_be_recorded_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tracking.check(f"sqlite:///{tmp_path}/whole.db", "tli")
    for name, harm in DAMAGES.items():
        (tmp_path / name).mkdir()
        file, uri = tmp_path / name / "mlflow.db", f"sqlite:///{tmp_path}/{name}/mlflow.db"
        shutil.copy(tmp_path / "whole.db", file)
        harm(file)
        before = file.read_bytes()
        jobs = job_folder(tmp_path / name / "jobs" / "0", uri, "0123456789abcdef0123456789abcdef").parent
        for status in (
            sync.main([str(jobs)]),
            sync.main(["--relocate", "--uri", uri]),
            ui.main(["--uri", uri]),
            run_command(monkeypatch, *TINY, "-m", "lora.rank=1,2", f"tracking.uri={uri}"),
        ):
            assert status == 2, name
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 4, (name, lines)
        for line in lines:
            assert line.removeprefix("error: ").startswith(f"{file} is damaged ("), line
            assert "; restore a backup of it, or move it away: `python -m src.sync` then records all jobs" in line
        assert file.read_bytes() == before and {path.name for path in file.parent.iterdir()} == {"mlflow.db", "jobs"}
        if name == "page":
            file.rename(tmp_path / "away.db")
            assert sync.main([str(jobs)]) == 0
            assert capsys.readouterr().out.endswith("1 recorded\n")
    assert not (tmp_path / "multirun").exists()


# --- models -------------------------------------------------------------------------------------------------


def test_a_damaged_folder_of_the_cache_is_named_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "model.safetensors").write_bytes(bytes(range(256)))
        (folder / "config.json").write_text("{}")

    def ask() -> int:
        made_once(tmp_path / "model", make)
        assert (tmp_path / "model" / "model.safetensors").read_bytes() == bytes(range(256))
        return len(made)

    assert ask() == ask() == 1 and not caplog.records
    chance, count = random.Random(0), 1
    for name in ("model.safetensors", "config.json", "SHA256SUMS") * 3:
        for harm in (flip, cut):
            harm(tmp_path / "model" / name, chance)
            count += 1
            assert ask() == ask() == count
            assert f"{tmp_path / 'model'} is damaged (it differs from its SHA256SUMS)" in caplog.messages[-1]
    (tmp_path / "model" / "config.json").unlink()
    assert ask() == count + 1


def test_a_model_that_lacks_weights_is_refused_by_name(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(models, "_held", {})
    load_model(model_config(source="hub", id=str(tmp_path)), quant_config())
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(models, "_held", {})
    with pytest.raises(UserError, match=f"lacks the weights {name}; get the model anew"):
        load_model(model_config(source="hub", id=str(tmp_path)), quant_config())
