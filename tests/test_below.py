"""What lies below the first adapted block is run once, and nothing else changes by it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bench.speed import setting
from src import below, study
from src.below import run_below
from src.layers import Prompt, blocks, encode, packed, pooled_states
from src.models import adapter
from src.pairs import read_words
from src.results import read_table
from src.training import Objective, Schedule, train
from src.vectors import encode_words
from tests.test_layers import SMALL, gemma, gpt2, llama, prompts
from tests.test_training import LORA, OWN, words

SHORT = [prompt for prompt in prompts() if len(prompt.ids) <= 4]  # Gemma's window


def sure_gpt2() -> GPT2LMHeadModel:
    """Without GPT-2's own dropout."""
    model = gpt2()
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
@pytest.mark.parametrize("block", [2, 4, 5])
def test_a_forward_goes_on_from_known_hidden_states_to_the_same_vectors(make, block):
    model = make().eval()
    known = run_below(model, SHORT, block)
    assert known and known.layer == block - 1
    above = [*range(block, 6), "final"]
    whole = encode(model, SHORT, layers=above)
    counts = counted(model)
    torch.testing.assert_close(encode(model, SHORT, layers=above, below=known), whole, atol=1e-5, rtol=0)
    assert counts == [0] * (block - 1) + [1] * (6 - block)
    turned = SHORT[3:9][::-1]  # in another order, other trees
    expected = whole[:, 3:9].flip(1)
    torch.testing.assert_close(encode(model, turned, layers=above, below=known), expected, atol=1e-5, rtol=0)
    counts[:] = [0] * 5
    torch.testing.assert_close(encode(model, SHORT, layers=above), whole, atol=1e-6, rtol=0)
    assert counts == [1] * 5  # what stood in a block's place, here a test's own forward, is back


def test_known_hidden_states_are_what_the_block_is_given():
    """Others in their place would be seen."""
    model = llama()
    known = run_below(model, SHORT, 4)
    assert known
    batch = packed(SHORT, known)
    before = dict(pooled_states(model, batch, [4]))[4]
    known.states.mul_(0).add_(torch.randn_like(known.states))
    assert not torch.allclose(dict(pooled_states(model, batch, [4]))[4], before, atol=0.1)


def test_a_layer_that_is_not_above_them_runs_all_blocks():
    model = llama()
    known = run_below(model, SHORT, 4)
    for some in ([2, 5], [3, 5]):
        expected = encode(model, SHORT, layers=some)
        torch.testing.assert_close(encode(model, SHORT, layers=some, below=known), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("objective", [Objective("triplet", (3, "final")), Objective("infonce", ("final",))])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_training_gives_the_same_losses_and_adapter_and_runs_the_blocks_below_once(tiny, objective, dropout):
    source, target = words(tiny)
    plan = Schedule(epochs=3, batch_size=4, learning_rate=1e-2)
    found = {}
    for way in ("whole", "resumed"):
        known = run_below(tiny.model, source + target, 3) if way == "resumed" else None
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
        apart = (mine - other).abs()
        assert apart.max() < 1e-3 and (apart > 1e-4).float().mean() < 0.02  # Adam steps on last bits
    np.testing.assert_allclose(resumed, vectors, atol=1e-4)
    assert np.array_equal(resumed[:3], before[:3])
    assert not np.allclose(resumed[3:], before[3:], atol=1e-2)


def test_a_block_s_states_serve_the_next_job_and_no_other_words(tiny):
    source, target = words(tiny)
    first = run_below(tiny.model, source + target, 3)
    assert first
    assert run_below(tiny.model, source + target, 3) is first
    other = run_below(tiny.model, source, 3)
    assert other and len(other.states) < len(first.states)
    deeper = run_below(tiny.model, source, 4)
    assert deeper and deeper.block == 4


def crossed(vocabulary: int) -> Any:
    """A model whose last block reads what its first has left: with the usual size, the trial's order is another."""
    changed: dict[str, Any] = {**SMALL, "vocab_size": vocabulary, "initializer_range": 0.2}
    model = LlamaForCausalLM(LlamaConfig(**changed)).eval()
    left: dict[str, Any] = {}
    attention(model, 1).register_forward_hook(lambda _m, _a, output: left.update(first=output[0]))
    blocks(model)[4].register_forward_hook(lambda _m, _a, output: output + left["first"])
    return model


def shaped() -> Any:
    """A decoder that looks at what a block gives."""
    model = llama()
    inner: Any = blocks(model)[2]
    inner.register_forward_pre_hook(
        lambda _m, args, kwargs: (args, kwargs) if args[0].shape else None, with_kwargs=True
    )
    return model


def noisy() -> Any:
    """Random in training, as a router's jitter is, and not by a name that says so."""
    model = llama()
    mlp: Any = blocks(model)[0]
    mlp.register_forward_hook(
        lambda m, _a, output: output * (1 + 0.01 * torch.rand_like(output)) if m.training else None
    )
    return model


def expect_none(caplog: pytest.LogCaptureFixture, model: Any, some: list[Prompt], block: int, why: str) -> None:
    caplog.clear()
    generator = torch.random.get_rng_state()
    with caplog.at_level("INFO", logger="src.below"):
        assert run_below(model, some, block) is None
    (said,) = caplog.messages
    assert why in said
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert not model.training


def test_nothing_is_kept_where_a_forward_could_not_go_on(caplog, monkeypatch):
    expect_none(caplog, llama(), SHORT, 1, "there are none")
    expect_none(caplog, gpt2(), SHORT, 3, "random in training")  # dropout
    expect_none(caplog, noisy(), SHORT, 3, "random in training")
    expect_none(caplog, gemma(), [Prompt((1, 2, 3, 4, 5), 0, 5)], 3, "can't be packed")  # longer than its window
    for vocabulary in (99, 1200):
        expect_none(caplog, crossed(vocabulary), SHORT, 3, "can't go on from there")
    expect_none(caplog, shaped(), SHORT, 3, "can't go on from there (AttributeError")
    monkeypatch.setattr(below, "MOST_BYTES", 1000)
    expect_none(caplog, llama(), SHORT, 3, "more than 0 MiB")
    monkeypatch.undo()

    def full(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(below, "_states", full)
    expect_none(caplog, llama(), SHORT, 3, "no memory")


def test_bfloat16_training_runs_the_blocks_below_as_it_did(tiny, monkeypatch):
    """Autocast would run them in bfloat16."""
    seen = []
    monkeypatch.setattr(study, "train", lambda *_, below, **__: seen.append(below) or [])
    config = setting("model=tiny", "lora.layers=[3]", "dataset.limit=40", "dataset.control_size=10")
    for precision in ("float32", "bfloat16"):
        own = replace(config, train=replace(config.train, precision=precision))
        lexicon, split = read_words(config.dataset)
        it = study.prepare(own, lexicon, split, tiny)
        known = study.run_below_adapter(it, [3])
        with adapter(tiny.model, config.lora, [3], seed=0) as model:
            study.train_adapter(it, model, (3,), known, lambda items, _: items)
    assert seen[0] is not None
    assert seen[1] is None


def test_a_run_with_them_finds_what_one_without_finds(cli, tmp_path, monkeypatch):
    found = {}
    for way in ("with", "without"):
        if way == "without":  # every block at every step, and all layers measured
            monkeypatch.setattr(study, "run_below", lambda *_: None)
            monkeypatch.setattr(study, "measure_after", measure_all)
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


def measure_all(it: Any, _before: Any, after: Any, _blocks: Any, progress: Any) -> Any:
    return study._measure_layers(it, after, "after", study.SPLITS, progress)
