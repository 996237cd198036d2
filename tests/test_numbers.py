"""No number that isn't finite becomes a result: whole runs on models that are damaged, overflow or learn too fast."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from src.errors import NumbersError
from src.finite import check_weights
from src.layers import Prompt, encode
from src.models import load_model
from tests.conftest import model_config, quant_config, run_command

RUN = (
    "model=hub", "model.n_layers=4", "dataset.limit=60", "dataset.control_size=15", "train.epochs=1",
    "eval.permutations=99", "eval.probes=false", "lora.layers=[1,2]", "tracking=off",
)  # fmt: skip
BLOCK = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture
def failed(monkeypatch, tmp_path, capsys) -> Callable[..., str]:
    """Runs the command on the tiny model with other weights; returns what failed.json says, when all else is right."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TLI_CACHE", str(tmp_path / "cache"))

    def call(change: Callable[[dict[str, torch.Tensor]], Any], *arguments: str) -> str:
        folder = tiny_folder(tmp_path / "model", change)
        assert run_command(monkeypatch, *RUN, f"model.id={folder}", *arguments) == 1
        (job,) = tmp_path.glob("multirun/*/*/0")
        assert not (job / "results.json").exists()
        told = json.loads((job / "failed.json").read_text())
        printed = capsys.readouterr()
        assert told["kind"] == "NumbersError" and "verdict" not in printed.out
        assert told["error"] in printed.err and "Traceback" not in printed.err
        return told["error"].removeprefix("NumbersError: ")

    return call


def tiny_folder(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """The tiny model in a folder of its own, with changed weights."""
    loaded = load_model(model_config(), quant_config())
    weights = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
    change(weights)
    loaded.model.save_pretrained(folder, state_dict=weights)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def same(_weights: dict[str, torch.Tensor]) -> None:
    pass


def scaled(name: str, factor: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda weights: weights[name].mul_(factor)


def spoilt(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda weights: weights[name][-1, -1].fill_(value)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("name", [BLOCK, "lm_head.weight"])  # the second is read by no hidden state
def test_a_damaged_weight_is_named(failed, name, bad):
    said = failed(spoilt(name, bad))
    assert said == f"the weight {name} holds numbers that aren't finite: the model's files are damaged, get them anew"


@pytest.mark.parametrize("quant", [quant_config("nf4", double_quant=True), quant_config("nf4"), quant_config("int8")])
def test_a_damaged_weight_is_named_after_quantising(tmp_path, quant):
    folder = tiny_folder(tmp_path, spoilt(BLOCK, math.nan))
    with pytest.raises(NumbersError, match=f"the weight {BLOCK} holds"):
        check_weights(load_model(model_config(source="hub", id=str(folder)), quant).model)


def test_overflow_in_float16_names_the_dtype(failed):
    said = failed(scaled(BLOCK, 2e4), "model.dtype=float16")
    assert said.startswith("hidden states at layer 3 are not finite")
    assert said.endswith("model.dtype=float16 ends at 65504: set bfloat16 or float32")


def test_states_whose_norm_overflows_or_is_zero_are_no_vectors(failed):
    """Divided by an infinite norm, finite numbers make zeros, and zeros a verdict."""
    said = failed(scaled("model.embed_tokens.weight", 1e20))
    assert said.startswith("hidden states at layer 0 are not finite, too large or all zero")
    assert "damaged" in said


def test_zeros_are_no_vectors(tiny):
    embeddings: Any = tiny.model.get_input_embeddings()
    kept = embeddings.weight.data.clone()
    embeddings.weight.data.zero_()
    with pytest.raises(NumbersError, match="layer 0 are not finite, too large or all zero"):
        encode(tiny.model, [Prompt((1, 2), 0, 2)])
    embeddings.weight.data.copy_(kept)


def test_a_learning_rate_beyond_all_is_named_with_its_step(failed):
    assert failed(same, "train.learning_rate=1e30") == (
        "the adapter is not a finite number at step 1 of 3: lower train.learning_rate"
    )


def test_a_gradient_beyond_float32_is_found_though_the_loss_is_finite(failed):
    said = failed(same, "objective=infonce", "objective.temperature=1e-30")
    assert said.startswith("the gradient is not a finite number at step 1 of 3: raise objective.temperature")


def test_an_adapter_that_overflows_after_the_last_step_gives_no_vectors(failed):
    """The only step saw the untouched adapter, and its update is finite; what the model makes of it is not."""
    said = failed(same, "model.dtype=float16", "train.learning_rate=1e6", "train.batch_size=45")
    assert said.startswith("hidden states at layer 1 are not finite")
    assert "lower train.learning_rate; or model.dtype=float16" in said


def test_an_infinite_perplexity_is_no_result(failed):
    said = failed(scaled("lm_head.weight", 1e6), "eval.probes=true")
    assert said.startswith("lm/perplexity_swahili_before is inf")


def test_a_models_weights_are_looked_through_once():
    model = nn.Linear(2, 2)
    check_weights(model)
    model.weight.data.fill_(torch.nan)
    check_weights(model)
    with pytest.raises(NumbersError, match="the weight weight holds"):
        check_weights(copy.deepcopy(model))
