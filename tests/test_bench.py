"""The benchmarks' own premises: that they run, and that the script they measure against does the same training."""

import re
import sys

import pytest

from bench import gpu, peers
from bench.scale import made_up
from bench.speed import LAYER_2, prepared, setting, silent
from src import study
from src.models import adapter
from src.packaged import packaged_folder


def test_the_plain_script_has_the_same_losses() -> None:
    config = setting(
        "lora.dropout=0", "lora.layers=[1,2]", "train.epochs=1", "dataset.limit=100", "dataset.control_size=20"
    )
    it = prepared(config)
    with adapter(it.loaded.model, config.lora, [1, 2], seed=0) as model:
        ours, _ = study.train_adapter(it, model, (2,), silent)
    model, tokenizer = peers.peft_model(packaged_folder(str(config.model.id)), LAYER_2)
    theirs = peers.train_peft(model, tokenizer, [(pair.source, pair.target) for pair in it.words.train], LAYER_2)
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
