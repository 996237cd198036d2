"""What lies below the first adapted block is run once, and nothing else changes by it."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel

from src import below, layers, study
from src.below import run_below
from src.layers import Prompt, blocks, encode, packed, pooled_states
from src.models import adapter
from src.results import read_table
from src.training import Objective, Schedule, train
from src.vectors import encode_words
from tests.test_layers import gemma, gpt2, llama, prompts
from tests.test_training import LORA, OWN, words

SHORT = [prompt for prompt in prompts() if len(prompt.ids) <= 4]  # Gemma's window


def sure_gpt2() -> GPT2LMHeadModel:
    """Without GPT-2's own dropout."""
    model = gpt2()
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"):
        setattr(model.config, key, 0.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def attention(model: nn.Module, number: int) -> nn.Module:
    found = blocks(model)[number - 1].self_attn
    assert isinstance(found, nn.Module)
    return found


def counted(model: Any) -> list[int]:
    """How often each block is run from now on; a skipped one isn't, though its hooks are called."""
    counts = [0] * len(blocks(model))

    def count(index: int, forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[index] += 1
            return forward(*args, **kwargs)

        return call

    for index, block in enumerate(blocks(model)):
        block.forward = count(index, block.forward)
    return counts


@pytest.mark.parametrize("make", [llama, gemma, sure_gpt2])
@pytest.mark.parametrize("layer", [1, 3, 4])
def test_a_forward_goes_on_from_known_hidden_states_to_the_same_vectors(make, layer):
    model = make().eval()
    known = run_below(model, SHORT, layer)
    assert known
    above = [*range(layer + 1, 6), "final"]
    whole = encode(model, SHORT, layers=above)
    counts = counted(model)
    torch.testing.assert_close(encode(model, SHORT, layers=above, below=known), whole, atol=1e-5, rtol=0)
    assert counts == [0] * layer + [1] * (5 - layer)
    some = SHORT[3:9]  # in another order, other trees
    torch.testing.assert_close(
        encode(model, some[::-1], layers=above, below=known), whole[:, 3:9].flip(1), atol=1e-5, rtol=0
    )
    assert all("forward" in block.__dict__ for block in blocks(model))  # what stood in a block's place is put back


def test_known_hidden_states_are_what_the_blocks_are_given():
    """Others in their place would be seen."""
    model = llama()
    known = run_below(model, SHORT, 3)
    assert known
    batch = packed(SHORT, known)
    before = dict(pooled_states(model, batch, [4]))[4]
    known.states.mul_(0).add_(torch.randn_like(known.states))
    assert not torch.allclose(dict(pooled_states(model, batch, [4]))[4], before, atol=0.1)


def test_a_layer_that_is_not_above_them_runs_all_blocks():
    model = llama()
    known = run_below(model, SHORT, 3)
    for some in ([2, 5], [3, 5]):
        expected = encode(model, SHORT, layers=some)
        torch.testing.assert_close(encode(model, SHORT, layers=some, below=known), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("objective", [Objective("triplet", (3, "final")), Objective("infonce", ("final",))])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_training_gives_the_same_losses_and_adapter_and_runs_the_blocks_below_once(tiny, objective, dropout):
    from dataclasses import replace

    source, target = words(tiny)
    plan = Schedule(epochs=3, batch_size=4, learning_rate=1e-2)
    found = {}
    for way in ("whole", "resumed"):
        known = run_below(tiny.model, source + target, 2) if way == "resumed" else None
        assert (known is not None) == (way == "resumed")
        before = encode_words(tiny.model, source + target)
        with adapter(tiny.model, replace(LORA, dropout=dropout), [3], seed=1) as model:
            calls = []
            hook = attention(model, 2).register_forward_hook(lambda *_, calls=calls: calls.append(1))
            losses = train(model, source, target, OWN, objective, plan, below=known)
            hook.remove()
            weights = [weight.detach().clone() for weight in model.parameters() if weight.requires_grad]
            after = encode_words(model, source + target, known=(known, before) if known else None)
        found[way] = losses, weights, after.array.copy(), len(calls), before.array.copy()
    (losses, weights, vectors, calls, before), (again, same, resumed, none, _) = found["whole"], found["resumed"]
    assert calls >= len(losses) > 0
    assert none == 0
    assert again == pytest.approx(losses, abs=1e-5)
    for mine, other in zip(same, weights, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)
    np.testing.assert_allclose(resumed, vectors, atol=1e-4)
    assert np.array_equal(resumed[:3], before[:3])
    assert not np.allclose(resumed[3:], before[3:], atol=1e-2)


def test_one_layer_s_states_serve_the_next_job_and_no_other_words(tiny, monkeypatch):
    source, target = words(tiny)
    runs = []
    make = below._states
    monkeypatch.setattr(below, "_states", lambda *arguments: runs.append(arguments[2]) or make(*arguments))
    first = run_below(tiny.model, source + target, 2)
    done = len(runs)
    assert run_below(tiny.model, source + target, 2) is first
    assert len(runs) == done
    assert run_below(tiny.model, source, 2) is not first
    other = run_below(tiny.model, source, 3)
    assert other and other.layer == 3


def test_nothing_is_kept_where_a_forward_could_not_go_on(monkeypatch):
    assert run_below(llama(), SHORT, 0) is None  # nothing is below
    assert run_below(gpt2(), SHORT, 2) is None  # it drops out while it trains
    assert run_below(gemma(), [Prompt((1, 2, 3, 4, 5), 0, 5)], 2) is None  # longer than its window
    crossed = llama()
    reached: dict[str, Any] = {}
    attention(crossed, 1).register_forward_hook(lambda _m, _a, output: reached.update(first=output[0]))
    blocks(crossed)[4].register_forward_hook(lambda _m, _a, output: output + reached.pop("first", 0))
    assert run_below(crossed, SHORT, 2) is None  # its last block reads what the first has left
    assert run_below(crossed, SHORT, 2) is None
    monkeypatch.setattr(below, "MOST", 1000)
    assert run_below(llama(), SHORT, 2) is None
    monkeypatch.undo()

    def full(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(layers, "packed", full)
    model = llama()
    monkeypatch.setattr(below, "packed", full)
    monkeypatch.setattr(below, "packs", lambda *_: True)
    assert run_below(model, SHORT, 2) is None  # no memory


def test_a_run_with_them_finds_what_one_without_finds(cli, tmp_path, monkeypatch):
    found = {}
    for way in ("with", "without"):
        if way == "without":
            monkeypatch.setattr(study, "run_below", lambda *_: None)
        folder = tmp_path / way
        arguments = ["model=tiny", "lora.layers=[3]", "dataset.limit=80", "dataset.control_size=20", "tracking=off"]
        status, _, said = cli(*arguments, "eval.probes=false", "train.learning_rate=1e-2", f"hydra.run.dir={folder}")
        assert (status, said) == (0, "")
        rows = read_table(folder / "layers.csv")
        found[way] = {tuple(row.values())[:4]: float(row["value"]) for row in rows}
    assert found["with"] == pytest.approx(found["without"], abs=1e-4)
    for (layer, stage, *rest), value in found["with"].items():
        if stage == "after" and rest == ["control", "pair_cosine"]:
            before = found["with"][layer, "before", *rest]
            assert (value == before) == (layer in {"0", "1", "2"})
