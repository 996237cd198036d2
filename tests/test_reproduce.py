"""A past job is repeated to the same numbers, from its own folder; where it isn't, what differs is said."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from src import models, reproduce
from src.files import digest
from src.models import LoadedModel
from src.plan import done_jobs
from src.results import read_results
from tests.conftest import Cli, call_command
from tests.test_sweep import TINY


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*arguments: str) -> tuple[int, str, str]:
        return call_command(monkeypatch, capsys, *arguments)

    return call


def words(file: Path, changed: str = "ort7") -> None:
    lines = "".join(f"word{number}\tort{number}\n" for number in range(40))
    file.write_text(lines.replace("ort7\n", f"{changed}\n"))


def numbers(folder: Path) -> dict[str, Any]:
    return reproduce.numbers(folder, read_results(folder))


def test_a_job_is_repeated_to_the_last_number_from_anywhere(
    cli: Cli, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "then").mkdir()
    (tmp_path / "now").mkdir()
    monkeypatch.chdir(tmp_path / "then")
    words(Path("words.tsv"))
    file = ("dataset=file", "dataset.path=words.tsv", "dataset.source_language=x", "dataset.target_language=y")
    assert cli(*TINY, *file, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", "lora.rank=2")[0] == 0
    (results,) = tmp_path.glob("then/multirun/*/*/0/results.json")
    job, then = results.parent, read_results(results.parent)
    assert then["machine"].keys() >= {"cpu", "cores", "threads", "platform"} and len(then["git_commit"]) >= 7
    assert {"config_hash", "model_revision", "inputs_digest", "git_changes", "files", "sha256"} <= then.keys()

    # The long form, from elsewhere; further settings and groups come on top of the job's.
    monkeypatch.chdir(tmp_path / "now")
    long = ("--config-dir", str(job / ".hydra"), "--config-name", "config")
    status, out, _ = cli(*long, "train=none", "sweep.dry_run=true")
    assert (status, out) == (0, "would run  pilot tiny\n")
    assert cli(*long)[0] == 0
    (again,) = tmp_path.glob("now/multirun/*/*/0/results.json")
    assert numbers(again.parent) == numbers(job) and len(numbers(job)) > 100
    status, _, err = cli("--config-dir", str(tmp_path), "--config-name", "config")
    assert (status, err.count("\n")) == (2, 1) and "holds no config.yaml" in err

    # The command, which trusts nothing that the cache says.
    (cached,) = (own_cache / "measures").glob("*.json")
    entry = json.loads(cached.read_text())
    entry["values"][0][-1] += 0.5
    cached.write_text(json.dumps(entry | {"sha256": digest(json.dumps(entry["values"]))}))
    assert reproduce.main([str(job)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"same: {len(numbers(job))} numbers"
    assert list(done_jobs(tmp_path / "then").values()) == [[job]]  # the repetition stands for nothing else
    (repeated,) = job.parent.glob("0-again-*")
    assert then["mlflow_run_id"] and not read_results(repeated)["mlflow_run_id"]
    assert not list(job.parent.glob(".cache*"))

    words(tmp_path / "then" / "words.tsv", changed="anders")
    assert reproduce.main([str(job)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("differs: ")]
    assert lines[0].startswith(f"differs: dataset.digest: {then['dataset']['digest']} then, ")
    assert any(" numbers in layers.csv, most by " in line for line in lines[1:])


def test_a_changed_model_is_named_even_where_its_size_and_time_are_the_same(
    cli: Cli, tiny: LoadedModel, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    command = (*TINY, "model.source=hub", f"model.id={folder}", "train.epochs=0", "tracking=off")

    def run(place: str) -> dict[str, Any]:
        monkeypatch.setattr(models, "_held", {})
        assert cli(*command, f"hydra.run.dir={place}")[0] == 0
        return read_results(tmp_path / place)

    then = run("then")
    assert len(then["model_digest"]) == 64
    file = folder / "model.safetensors"
    before, weights = file.stat(), load_file(file)
    weights["model.layers.2.mlp.up_proj.weight"] *= 1.5
    save_file(weights, file, {"format": "pt"})
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    kept = run("kept")  # by the cache, which nothing tells of the change
    assert kept["model_digest"] == then["model_digest"] and numbers(Path("kept")) == numbers(Path("then"))

    monkeypatch.setattr(models, "_held", {})
    assert reproduce.main(["then"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("differs: ")]
    assert any(line.startswith(f"differs: model_digest: {then['model_digest']} then, ") for line in lines)
    assert any(" numbers in layers.csv, most by " in line for line in lines)
    for memo in (own_cache / "contents").iterdir():
        memo.write_text(memo.read_text().replace(then["model_digest"], "0" * 64))
    assert run("again")["model_digest"] not in (then["model_digest"], "0" * 64)
    (said,) = reproduce.conditions(then, then | {"model_revision": "b"})
    assert said == f"differs: model_revision: {then['model_revision']} then, b now"


def test_what_is_no_whole_job_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "results.json").write_text('{"verdi')
    for place, said in (("absent", "no finished job's folder"), ("damaged", "results.json is damaged")):
        assert reproduce.main([str(tmp_path / place)]) == 2
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n")) == ("", 1) and said in printed.err


def test_what_differs_is_named_with_conditions_first(capsys: pytest.CaptureFixture[str]) -> None:
    then = {"versions": {"torch": "2.1", "numpy": "2"}, "machine": {"threads": 2}, "params": {"tracking.uri": "a"}}
    now = {"versions": {"torch": "2.2", "numpy": "2"}, "machine": {"threads": 1}, "params": {"tracking.uri": "b"}}
    now["model_digest"] = "of a later version"  # the earlier one wrote none
    before = {
        "results.json verdict": "'none'",
        "layers.csv line 2 (1 pilot) value": "0.5",
        "layers.csv line 3 value": "1.0",
    }
    after = before | {"layers.csv line 2 (1 pilot) value": "0.75", "layers.csv line 3 value": "1.125"}
    assert reproduce.compare(before, after, reproduce.conditions(then, now)) == 1
    assert capsys.readouterr().out.splitlines() == [
        "differs: versions.torch: 2.1 then, 2.2 now",
        "differs: machine.threads: 2 then, 1 now",
        "differs: 2 of 2 numbers in layers.csv, most by 0.25: line 2 (1 pilot) value: 0.5 then, 0.75 now",
    ]
    assert reproduce.compare(before, before, ["differs: anything"]) == 0
    assert capsys.readouterr().out == "same: 3 numbers\n"
