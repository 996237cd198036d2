"""The layer convention and the encoding, against plain transformers."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from src import layers
from src.errors import UserError
from src.layers import Prompt, all_layers, encode, packed, packs, pooled_states, stacked, tokenize, tree_size

SMALL: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
}


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, initializer_range=0.2)).eval()


def gemma() -> Gemma3ForCausalLM:
    config = Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=4, initializer_range=0.2)
    return Gemma3ForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=5, n_head=4, initializer_range=0.2)).eval()


def prompts(count: int = 40) -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        ids = torch.randint(99, (1 + i % 9,), generator=generator).tolist()
        made.append(Prompt(tuple(ids), min(i % 2, len(ids) - 1), len(ids)))
    return made


@pytest.mark.parametrize("make", [llama, gemma, gpt2])
def test_encoding_equals_plain_hidden_states_of_one_unpadded_word(make):
    model = make()
    vectors = encode(model, prompts())
    for i, prompt in enumerate(prompts()):
        plain = model(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states
        expected = [functional.normalize(h[0, prompt.start : prompt.stop].mean(0), dim=-1) for h in plain]
        # transformers' last entry is normed: it is our "final", and our layer N is not among its entries
        torch.testing.assert_close(vectors[:5, i], torch.stack(expected[:5]), atol=1e-5, rtol=0)
        torch.testing.assert_close(vectors[6, i], expected[5], atol=1e-5, rtol=0)
    assert layers.step("final", 5) == 6
    assert all_layers(5) == [0, 1, 2, 3, 4, 5, "final"]


@pytest.mark.parametrize("make", [llama, gpt2])
def test_layer_n_is_the_residual_stream_before_the_final_norm(make):
    model = make()
    seen = {}
    layers.blocks(model)[-1].register_forward_hook(
        lambda _m, _a, output: seen.update(last=output[0] if isinstance(output, tuple) else output)
    )
    prompt = prompts()[7]
    model(torch.tensor([prompt.ids]))
    expected = functional.normalize(seen["last"][0, prompt.start : prompt.stop].mean(0), dim=-1)
    torch.testing.assert_close(encode(model, [prompt])[5, 0], expected, atol=1e-5, rtol=0)


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(40)), budget=st.integers(1, 64), side=st.sampled_from(["left", "right"]))
def test_vectors_depend_neither_on_batch_size_nor_order_nor_padding_side(order, budget, side, tiny_module):
    model, tokenizer, words, reference = tiny_module
    tokenizer.padding_side = side
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "TOKEN_BUDGET", budget)
        vectors = encode(model, tokenize([words[i] for i in order], tokenizer))
    torch.testing.assert_close(vectors, reference[:, list(order)], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def tiny_module():
    from src.models import load_model
    from tests.conftest import model_config, quant_config

    loaded = load_model(model_config(), quant_config())
    words = ["maji", "nyumba kubwa", "a", "über", *(chr(97 + i % 26) * (1 + i % 7) for i in range(36))]
    return loaded.model, loaded.tokenizer, words, encode(loaded.model, tokenize(words, loaded.tokenizer))


def beginnings(some: list[Prompt]) -> set[tuple[int, ...]]:
    return {prompt.ids[:end] for prompt in some for end in range(1, len(prompt.ids) + 1)}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [llama, gemma, gpt2])
def test_a_packed_forward_keeps_prompts_apart(make, attention, monkeypatch):
    model = make()
    model.set_attn_implementation(attention)
    some = [prompt for prompt in prompts(160) if len(prompt.ids) <= 4]  # Gemma's window
    some += [Prompt((*prompt.ids[:2], 7, 8), 1, 4) for prompt in some if len(prompt.ids) > 2]
    assert packs(model, some)
    with monkeypatch.context() as patch:
        patch.setattr(layers, "_ROW", 10**6)
        assert packed(some).input_ids.numel() == len(beginnings(some))
    batch = packed(some)
    assert len(batch.input_ids) > 1
    together = dict(pooled_states(model, batch, [2, "final"]))
    for i, prompt in enumerate(some):
        apart = dict(pooled_states(model, stacked([prompt]), [2, "final"]))
        for layer in (2, "final"):
            torch.testing.assert_close(together[layer][i], apart[layer][0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("lengths", [range(1, 7), range(20, 21), range(5, 61), range(150, 201)])
@pytest.mark.parametrize("common", [0, 12])
def test_rows_pad_and_repeat_little(lengths, common):
    """In rows of a fixed size, prompts of many lengths would be padded by two thirds."""
    generator = np.random.default_rng(0)
    words = [generator.integers(99, 9999, generator.choice(lengths)).tolist() for _ in range(100)]
    some = [Prompt((1,) * common + tuple(ids), 0, 1) for ids in words]
    assert packed(some).input_ids.numel() <= 1.25 * tree_size(some)


def test_a_sliding_window_shorter_than_a_prompt_is_not_packed():
    assert not packs(gemma(), [Prompt((1, 2, 3, 4, 5), 0, 5)])
    assert packs(gemma(), [Prompt((1, 2, 3, 4), 0, 4)])


def test_batches_of_trees_keep_to_the_budget():
    some = prompts(200)
    batches = layers.similar_batches(some, 30)
    assert sorted(row for rows in batches for row in rows) == list(range(200))
    sizes = [packed([some[row] for row in rows]).input_ids.numel() for rows in batches]
    assert max(sizes) <= 30
    assert sum(sizes) < sum(len(prompt.ids) for prompt in set(some))
    assert layers.similar_batches([Prompt((1, 2, 3), 0, 3), Prompt((4, 5), 0, 2)], 2) == [[0], [1]]


def test_packs_sees_a_model_that_mixes_packed_prompts():
    model = llama()
    decoder: Any = model.get_decoder()
    plain = decoder.forward
    decoder.forward = lambda **given: plain(
        **{key: given[key] for key in given if key != "attention_mask"}
    )  # forgets which token sees which
    assert not packs(model, prompts())
    reference = llama()
    reference.load_state_dict(model.state_dict())
    torch.testing.assert_close(encode(model, prompts()), encode(reference, prompts()), atol=1e-5, rtol=0)


def test_stopping_early_runs_no_deeper_block_and_gives_the_full_forwards_vectors():
    model = llama()
    ran = []
    for number, block in enumerate(layers.blocks(model), start=1):
        block.register_forward_hook(lambda _m, _a, _o, number=number: ran.append(number))
    batch = stacked([Prompt((1, 2, 3), 0, 3)])
    early = dict(pooled_states(model, batch, [0, 2]))
    assert ran == [1, 2]
    full = dict(pooled_states(model, batch, all_layers(5)))
    assert torch.equal(early[2], full[2])
    assert torch.equal(early[0], full[0])


def test_layer_0_alone_runs_no_block():
    model = llama()
    ran = []
    layers.blocks(model)[0].register_forward_hook(lambda *_: ran.append(1))
    assert list(dict(pooled_states(model, stacked([Prompt((1, 2), 0, 2)]), [0]))) == [0]
    assert not ran


def test_each_distinct_prompt_is_run_once(monkeypatch):
    monkeypatch.setattr(layers, "_ROW", 128)  # one row, which is not padded
    model = llama()
    tokens = []
    model.get_decoder().register_forward_pre_hook(
        lambda _m, _a, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    twice = encode(model, prompts(10) + prompts(10))
    checked = sum(tokens[:2])  # by packs
    encode(model, prompts(10))
    assert sum(tokens) - checked == 2 * len(beginnings(prompts(10)))
    assert torch.equal(twice[:, :10], twice[:, 10:])


def test_encoding_leaves_the_mode_as_it_was_and_dropout_off():
    model = llama().train()
    first = encode(model, prompts(5))
    assert model.training
    assert torch.equal(first, encode(model, prompts(5)))


class TestTokenize:
    def test_a_template_pools_the_words_own_tokens(self, tiny):
        (prompt,) = tokenize(["maji"], tiny.tokenizer, template="the {word} is")
        assert (prompt.start, prompt.stop, len(prompt.ids)) == (4, 8, 11)

    def test_last_pools_the_last_token_of_the_prompt(self, tiny):
        (prompt,) = tokenize(["maji"], tiny.tokenizer, template="the {word} is", pooling="last")
        assert (prompt.start, prompt.stop) == (10, 11)

    def test_bos_is_left_out_only_where_there_is_one(self, tiny):
        (bare,) = tokenize(["maji"], tiny.tokenizer)
        assert (bare.start, bare.stop) == (0, 4)

        class WithBos(SimpleNamespace):
            def __call__(self, texts, **_):
                return {"input_ids": [[7, 1, 2] for _ in texts]}

        with_bos = WithBos(bos_token_id=7)
        assert tokenize(["x"], with_bos)[0].start == 1
        assert tokenize(["x"], with_bos, exclude_bos=False)[0].start == 0

    def test_a_word_without_tokens_is_named(self, tiny):
        with pytest.raises(UserError, match=r"the word '' yields no token"):
            tokenize(["maji", ""], tiny.tokenizer)
