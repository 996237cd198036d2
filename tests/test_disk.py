"""A disk that is full or turns read-only: the job's, the cache's, MLflow's. The disks are real, see tests/mounts.py."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest
import torch

from src import baseline, models, study, sync, tracking, vectors
from src.errors import DiskError
from src.layers import tokenize
from src.models import LoadedModel
from src.vectors import encode_words
from tests import mounts
from tests.conftest import Cli, model_config, quant_config
from tests.mounts import Disk, bound, disk, read_only
from tests.test_tracking import client

TINY = (
    "model=tiny", "dataset.limit=40", "dataset.control_size=10", "train.epochs=1", "lora.layers=[1,2,3,4]",
    "eval.permutations=99", "eval.probes=false", "eval.measures=[pair_cosine,mismatched_cosine,margin,csls_p_at_1]",
)  # fmt: skip
UNTRACKED = (*TINY, "tracking=off")
needs_mounts = pytest.mark.skipif(not mounts.can_mount(), reason="run in a namespace by the last test of this file")


def temporary(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name not in (".hydra", ".upload.lock", ".opening.lock")]


def test_an_error_of_the_disk_comes_whole_out_of_a_worker() -> None:
    """Launchers hand it on as a pickle."""
    error = DiskError(errno.ENOSPC, "No space left on device", "/data/adapter", "free some space")
    handed = pickle.loads(pickle.dumps(error))
    assert type(handed) is DiskError and str(handed) == str(error) and handed.errno == errno.ENOSPC


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
        assert status == 1 and "1 job: 1 failed" in out
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


# --- the cache ----------------------------------------------------------------------------------------------


def numbers(folder: Path) -> dict[str, float]:
    found = json.loads((folder / "results.json").read_text())
    return {key: value for key, value in found.items() if isinstance(value, float) and not key.startswith("time/")}


@needs_mounts
def test_a_full_or_read_only_cache_costs_a_warning_and_nothing_else(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str) -> tuple[int, str]:
        monkeypatch.setattr(models, "_held", {})  # as in a new process
        status, _, err = cli(*UNTRACKED, f"hydra.run.dir={tmp_path}/{name}")
        assert status == 0
        return len(err.splitlines()), err

    cache = tmp_path / "cache"
    monkeypatch.setenv("TLI_CACHE", str(cache))
    with disk(cache, "4m") as small:
        assert run("whole")[0] == 0
        with read_only(cache):
            assert run("hits")[0] == 0  # nothing is to be written
        for made in ("encodings", "measures"):
            shutil.rmtree(cache / made)
        small.fill()
        lines, err = run("full")
        assert lines == 1 and err.startswith(f"warning: the cache {cache} keeps nothing of this run: its disk is full;")
        assert "TLI_CACHE" in err and "not kept" in (tmp_path / "full" / "run.log").read_text()
        assert not list(cache.rglob("*.tmp"))
        small.free()
        shutil.rmtree(cache / "encodings")  # locks
        monkeypatch.setattr(baseline, "_warned", set())
        with read_only(cache):
            lines, err = run("read-only")
        assert lines == 1 and "its disk is read-only; make it writable, or have TLI_CACHE name another folder" in err
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "full") == numbers(tmp_path / "read-only")
    assert len(numbers(tmp_path / "whole")) > 30


@needs_mounts
def test_a_model_that_the_cache_has_no_room_for_is_told_in_a_line(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("TLI_CACHE", str(cache))
    monkeypatch.setattr(models, "_held", {})
    with disk(cache, "100k"):
        status, _, err = cli(*UNTRACKED, f"hydra.run.dir={tmp_path}/job")
        assert status == 1 and len(err.splitlines()) == 1
        assert err.startswith(f"error: the job failed: {cache}/models/tiny-4-")
        assert "can't be written: its disk is full; free some space, or have TLI_CACHE name another folder" in err
        assert [file.suffix for file in (cache / "models").iterdir()] == [".lock"]


@needs_mounts
def test_a_download_that_finds_no_room_names_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with disk(tmp_path / "hub", "64k") as small:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(small.folder))
        monkeypatch.setattr(models, "_from_hub", lambda _: (small.folder / "weights").write_bytes(bytes(100_000)))
        said = f"^{small.folder} can't be written: its disk is full; free some space, or have HF_HUB_CACHE name another"
        with pytest.raises(DiskError, match=said):
            models.load_model(model_config(source="hub", id="nobody/nothing"), quant_config())


@needs_mounts
def test_vectors_of_many_words_find_room_elsewhere(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tokenize(["maji", "nyumba", "mti"], tiny.tokenizer)
    expected = encode_words(tiny.model, prompts).at(2, slice(3))
    monkeypatch.setenv("TLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(vectors, "IN_MEMORY", 0)
    with disk(tmp_path / "cache", "64k") as small:
        small.fill()
        assert torch.equal(encode_words(tiny.model, prompts).at(2, slice(3)), expected)
        monkeypatch.setattr(tempfile, "tempdir", str(small.folder))
        with pytest.raises(DiskError, match="its disk is full; free some space, or have TLI_CACHE"):
            encode_words(tiny.model, prompts)


# --- MLflow's store -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    """A small disk with an MLflow database on it, and its artifacts on another one."""
    root = tmp_path_factory.mktemp("store")
    with disk(root / "mlruns", "8m") as small, disk(root / "mlruns" / "artifacts", "8m"):
        tracking.check(f"sqlite:///{small.folder}/mlflow.db", "tli")
        yield small


@needs_mounts
@pytest.mark.parametrize("trouble", ["database full at the start", "database full", "artifacts full", "read-only"])
def test_a_job_survives_its_store_and_is_uploaded_once(
    cli: Cli,
    store: Disk,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trouble: str,
) -> None:
    uri, name = f"sqlite:///{store.folder}/mlflow.db", trouble.replace(" ", "_")
    place = Disk(store.folder / "artifacts") if trouble.startswith("artifacts") else store
    with ExitStack() as until, monkeypatch.context() as patch:

        def begin() -> None:
            if trouble == "read-only":
                until.enter_context(read_only(store.folder))
            else:
                place.fill()
                until.callback(place.free)

        train = study.train_adapter
        if trouble == "database full at the start":
            begin()
        else:
            patch.setattr(study, "train_adapter", lambda *arguments: (train(*arguments), begin())[0])
        where = [f"hydra.run.dir={tmp_path}/jobs/0", f"tracking.uri={uri}", f"tracking.experiment={name}"]
        status, out, err = cli(*TINY, *where)
    reason = "it can't be written" if trouble == "read-only" else "its disk is full"
    later = f"{tmp_path}/jobs/0 is not uploaded: `python -m src.sync` does it later"
    assert (status, err) == (0, f"warning: tracking: {uri}: {reason}; {later}\n")
    assert "verdict" in out and later in (tmp_path / "jobs" / "0" / "run.log").read_text()

    assert [sync.main([str(tmp_path / "jobs")]) for _ in range(2)] == [0, 0]
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0].partition(": ")[2], *lines[1:]) == ("recorded", "1 recorded", "1 already recorded")
    (run,) = client(uri).search_runs([client(uri).get_experiment_by_name(name).experiment_id])
    assert run.info.status == "FINISHED" and run.data.metrics["control/margin_gain"]
    assert (Path(run.info.artifact_uri) / "adapter" / "adapter_model.safetensors").exists()


@needs_mounts
@pytest.mark.parametrize("writable", ["nothing", "the database alone", "all but the artifacts"])
def test_a_read_only_store_is_refused_before_the_model_loads(
    cli: Cli, store: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writable: str
) -> None:
    monkeypatch.setattr(models, "load_model", None)
    database, artifacts = store.folder / "mlflow.db", store.folder / "artifacts"
    closed = artifacts if writable == "all but the artifacts" else store.folder
    with read_only(closed), bound(database) if writable == "the database alone" else nullcontext():
        status, _, err = cli(*TINY, f"hydra.run.dir={tmp_path}/job", f"tracking.uri=sqlite:///{database}")
    assert (status, len(err.splitlines())) == (2, 1)
    assert err.startswith(f"error: tracking.uri: {database} can't be used as MLflow's database ({closed} is read-only)")


# --- where nobody is root -----------------------------------------------------------------------------------

if not mounts.can_mount():

    def test_all_this_in_a_namespace() -> None:
        done = mounts.in_namespace(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__)
        if done is None:
            pytest.skip("mounting needs root, or a kernel that gives users namespaces of their own")
        assert done.returncode == 0, done.stdout
