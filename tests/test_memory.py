"""Memory that runs out: really, by a limit on this process; a second attempt with half the batch, then advice."""

from __future__ import annotations

import csv
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from src.errors import OutOfMemoryError
from src.memory import halved, ran_out, told
from tests.conftest import ROOT, run_command

LARGE = (  # some 410 MB for a training step of all pairs, 210 for half of them; 170 and 90 to encode
    "model=tiny", "dataset.limit=600", "dataset.control_size=40", "train.epochs=1", "eval.permutations=99",
    "eval.probes=false", "tracking=off", "lora.layers=[1]", "objective=infonce", "objective.layer=4",
    f"eval.template='{{word}} {'x' * 40}'",
)  # fmt: skip
# Addresses reserved for threads' own heaps count from the start: a limit wouldn't see that they are used. And a limit
# that comes later, as none does in life, would leave libgomp no room for its first thread, and it ends the process.
ONE_HEAP = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}


def job(root: Path) -> Path:
    (found,) = root.glob("multirun/*/*/0")
    return found


def found(folder: Path) -> tuple[dict, list[float]]:
    with (folder / "training.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    return json.loads((folder / "results.json").read_text()), losses


def test_encoding_and_training_go_on_with_half_the_batch(tmp_path, monkeypatch):
    """The run is told of, and gives what a run in such batches gives from the start.

    The limit is one of addresses: what is freed counts until malloc gives it back, which it does at once for large
    pieces where it doesn't learn to keep them.
    """
    (tmp_path / "short").mkdir()
    environment = ONE_HEAP | {"TLI_CACHE": str(tmp_path / "cache")}
    environment["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    done = subprocess.run(
        [sys.executable, "-m", "tests.limited", "encode_before=130,train_adapter=310", *LARGE, "train.batch_size=256"],
        cwd=tmp_path / "short", env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = ["encoding with prompts a batch=", "training with train.batch_size=128 instead of 256"]
    results, losses = found(job(tmp_path / "short"))
    log = (job(tmp_path / "short") / "run.log").read_text()
    for words in said:
        assert words in results["oom_retry"] and words in done.stderr and words in log
    assert results["train_batch_size_used"] == 128 and results["params"]["train.batch_size"] == "256"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TLI_CACHE", str(tmp_path / "cache"))
    assert run_command(monkeypatch, *LARGE, "train.batch_size=128") == 0
    usual, others = found(job(tmp_path))
    assert usual["oom_retry"] is None and usual["train_batch_size_used"] == 128
    assert losses == pytest.approx(others, abs=1e-5)
    assert results["control/margin_after"] == pytest.approx(usual["control/margin_after"], abs=1e-5)


def test_a_job_whose_half_batch_is_too_much_fails_with_advice(tmp_path):
    """A program of its own: this one may have kept, from earlier tests, all the memory that it needs."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.limited", "train_adapter=5", *LARGE, "train.batch_size=256"],
        cwd=tmp_path, env=ONE_HEAP, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    told_of = json.loads((job(tmp_path) / "failed.json").read_text())
    assert told_of["kind"] == "OutOfMemoryError"
    assert "out of memory in training (train.batch_size=256 and 128): lower train.batch_size" in told_of["error"]
    assert "quant=nf4" in done.stderr
    assert not (job(tmp_path) / "results.json").exists()


def too_much(size: int) -> torch.Tensor:
    return torch.empty(size * 2**52)


def test_the_second_attempt_has_the_memory_of_the_first():
    """The first attempt's error and frames are gone by then, and what they held."""
    alive: list[bool] = []

    class Held:
        def __del__(self) -> None:
            alive.remove(True)

    def attempt(size: int) -> int:
        assert not alive
        alive.append(True)
        held = Held()
        if size == 8:
            too_much(size)
        del held
        return size

    with told():
        assert halved("training", "train.batch_size", 8, attempt) == (4, 4)


def test_a_batch_that_cannot_be_halved_and_errors_of_other_kinds_are_not_tried_again():
    tried: list[int] = []

    def attempt(size: int) -> torch.Tensor:
        tried.append(size)
        return too_much(size)

    with pytest.raises(OutOfMemoryError, match=r"\(train.batch_size=3\): lower train.batch_size"):
        halved("training", "train.batch_size", 3, attempt, least=2)
    with pytest.raises(ZeroDivisionError):
        halved("training", "train.batch_size", 4, lambda size: tried.append(size) or 1 // 0)
    assert tried == [3, 4]


def test_memory_that_runs_out_elsewhere_is_told_with_advice():
    with (
        pytest.raises(OutOfMemoryError, match=r"out of memory in this job: set quant=nf4.*can't allocate memory"),
        told(),
    ):
        too_much(1)


def test_what_says_that_memory_ran_out():
    """Of CUDA the error's type alone: raised by hand, as no GPU is here."""
    with pytest.raises(RuntimeError) as by_torch:
        too_much(1)
    with pytest.raises(MemoryError) as by_python:
        bytearray(2**62)
    assert ran_out(by_torch.value) and ran_out(by_python.value)
    assert ran_out(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert ran_out(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert ran_out(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert not ran_out(OSError(errno.ENOSPC, "No space left on device")) and not ran_out(RuntimeError("a shape"))
