"""A disk that is full or turns read-only: the job's, the cache's, MLflow's. The disks are real, see tests/mounts.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from src import study
from tests import mounts
from tests.conftest import run_command
from tests.mounts import Disk, disk

TINY = (
    "model=tiny", "dataset.limit=40", "dataset.control_size=10", "train.epochs=1", "lora.layers=[1,2,3,4]",
    "eval.permutations=99", "eval.probes=false", "eval.measures=[pair_cosine,mismatched_cosine,margin,csls_p_at_1]",
)  # fmt: skip
UNTRACKED = (*TINY, "tracking=off")
needs_mounts = pytest.mark.skipif(not mounts.can_mount(), reason="run in a namespace by the last test of this file")

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs the command in this process, in a folder of its own; returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        status = run_command(monkeypatch, *arguments)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


def temporary(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name not in (".hydra", ".upload.lock")]


# --- the job's folder ---------------------------------------------------------------------------------------


@needs_mounts
def test_a_job_whose_disk_has_no_room_for_the_adapter_fails_and_the_sweep_goes_on(cli: Cli, tmp_path: Path) -> None:
    first, second = (tmp_path / "sweep" / number for number in "01")
    with disk(first, "200k"):
        status, out, err = cli("-m", *UNTRACKED, "lora.rank=64,2", f"hydra.sweep.dir={tmp_path}/sweep")
        said = f"{first}/adapter can't be written: its disk is full; free some space, or choose another hydra.run.dir"
        assert status == 1 and "1 failed, 1 done" in out
        assert len(err.splitlines()) == 1 and said in err
        assert json.loads((first / "failed.json").read_text())["error"].startswith(said)
        assert not (first / "adapter").exists() and not temporary(first)
        assert (second / "results.json").exists() and (second / "adapter" / "adapter_model.safetensors").exists()
        statuses = [job["status"] for job in json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]]
        assert statuses == ["failed", "done"]


@needs_mounts
def test_a_job_whose_disk_has_no_room_for_the_results_fails(cli: Cli, tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "180k") as small:
        folder = small.folder / "job"
        status, out, err = cli(*UNTRACKED, "lora.rank=1", f"hydra.run.dir={folder}")
        assert (status, out) == (1, "")
        assert err.startswith(f"error: the job failed: {folder}/plots/") and len(err.splitlines()) == 1
        assert "png can't be written: its disk is full; free some space, or choose another hydra.run.dir" in err
        assert (folder / "adapter" / "adapter_model.safetensors").exists() and not temporary(folder)
        assert not (folder / "results.json").exists() and (folder / "failed.json").exists()


def full_after_training(monkeypatch: pytest.MonkeyPatch, small: Disk) -> None:
    """Until the disk is freed."""
    train = study.train_adapter
    monkeypatch.setattr(study, "train_adapter", lambda *arguments: (train(*arguments), small.fill())[0])


@needs_mounts
def test_a_job_says_so_where_its_disk_has_no_block_left(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with disk(tmp_path / "disk", "1m") as small:
        folder = small.folder / "0"
        with monkeypatch.context() as patch:
            full_after_training(patch, small)
            status, out, err = cli(*UNTRACKED, "lora.rank=1", f"hydra.run.dir={folder}")
        assert (status, out, len(err.splitlines())) == (1, "", 1)
        assert err.startswith(f"error: the job failed: {folder}/adapter can't be written: its disk is full; free some")
        assert not (folder / "adapter").exists() and not temporary(folder)
        small.free()
        (folder / ".adapter.x.tmp").mkdir()  # as a killed job leaves it
        assert cli(*UNTRACKED, "lora.rank=1", f"hydra.run.dir={folder}")[0] == 0
        assert (folder / "results.json").exists() and not (folder / "failed.json").exists() and not temporary(folder)


@needs_mounts
def test_a_sweep_ends_in_good_order_where_its_disk_has_no_block_left(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with disk(tmp_path / "disk", "1m") as small:
        full_after_training(monkeypatch, small)
        status, out, err = cli("-m", *UNTRACKED, "lora.rank=1", f"hydra.sweep.dir={small.folder}")
        warning, failed = err.splitlines()
        assert status == 1 and "1 jobs: 1 failed" in out
        assert warning.startswith(f"warning: {small.folder}/sweep.json can't be written: its disk is full; free some")
        assert failed == f"error: failed: r1 L1,2,3,4 triplet: its disk is full; {small.folder}/0/run.log"
        assert not temporary(small.folder)


@needs_mounts
@pytest.mark.parametrize("mode", ["run", "sweep"])
def test_a_disk_that_is_full_at_the_start_is_told_in_a_line(cli: Cli, tmp_path: Path, mode: str) -> None:
    with disk(tmp_path / "disk", "64k") as small:
        small.fill()
        where = [f"hydra.run.dir={small.folder}/a"] if mode == "run" else ["-m", f"hydra.sweep.dir={small.folder}/a"]
        status, _, err = cli(*UNTRACKED, *where)
        assert status == 1 and len(err.splitlines()) == 1
        assert err.startswith(f"error: the job failed: {small.folder}/a")
        assert "can't be written: its disk is full; free some space, or choose another hydra.run.dir" in err


# --- where nobody is root -----------------------------------------------------------------------------------

if not mounts.can_mount():

    def test_all_this_in_a_namespace() -> None:
        done = mounts.in_namespace(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__)
        if done is None:
            pytest.skip("mounting needs root, or a kernel that gives users namespaces of their own")
        assert done.returncode == 0, done.stdout
