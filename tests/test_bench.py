"""The benchmarks' own premises: that they run, and that the script they measure against does the same training."""

import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from bench import gpu, peers
from bench.scale import made_up
from bench.speed import LAYER_2, LAYER_16, prepared, setting, silent
from src import study
from src.models import adapter
from src.packaged import packaged_folder


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    yield
    logging.disable(logging.NOTSET)  # the benchmarks silence warnings


@pytest.mark.parametrize("task", [LAYER_2, replace(LAYER_16, read=-1)])  # at layer 16 all cosines are alike
def test_the_plain_script_has_the_same_losses(task: peers.Task) -> None:
    config = setting("lora.dropout=0", "train.epochs=1", "dataset.limit=100", "dataset.control_size=20")
    it = prepared(config)
    adapted = task.adapted
    with adapter(it.loaded.model, config.lora, adapted, seed=0) as model:
        below = study.run_below_adapter(it, adapted)
        assert (below is not None) == (adapted[0] > 1)
        ours, _ = study.train_adapter(it, model, (2,) if task.read == 2 else ("final",), below, silent)
    model, tokenizer = peers.peft_model(packaged_folder(str(config.model.id)), task)
    theirs = peers.train_peft(model, tokenizer, [(pair.source, pair.target) for pair in it.words.train], task)
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert len(ours) > 1
    assert ours != pytest.approx(ours[:1] * len(ours), abs=1e-3)


def test_the_gpu_script_runs_with_a_tiny_shape(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--shape", "tiny", "--repeats", "1"])
    monkeypatch.setattr(gpu, "PAIRS", 40)
    monkeypatch.setattr(gpu, "TRAINED", 30)
    gpu.main()
    printed = capsys.readouterr().out
    assert re.findall(r"^### (.*)$", printed, re.M) == ["bf16", "nf4"]
    assert len(re.findall(r"^\| (?:encode|an epoch) .* \| \d+\.\d{3} \| .* \| \d+\.\d \|$", printed, re.M)) == 6


def test_made_up_words_are_distinct() -> None:
    pairs = made_up(5_000)
    assert len(set(pairs)) == 5_000
