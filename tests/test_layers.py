"""The layer convention and the encoding, against plain transformers."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch.nn import functional
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
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


def gpt_neo(window: int) -> GPTNeoForCausalLM:
    """One block of two reaches back so many tokens, by the place in the row."""
    config = GPTNeoConfig(
        vocab_size=99, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, initializer_range=0.2,
        attention_types=[[["global", "local"], 1]], window_size=window,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return GPTNeoForCausalLM(config).eval()


def in_template(count: int, tokens: int = 64) -> list[Prompt]:
    """Words of two tokens after a long template."""
    ids = torch.randint(99, (tokens + 2 * count,), generator=torch.Generator().manual_seed(1)).tolist()
    ends = [ids[start : start + 2] for start in range(tokens, tokens + 2 * count, 2)]
    return [Prompt((*ids[:tokens], *end), tokens, tokens + 2) for end in ends]


def test_a_window_by_the_place_in_the_row_is_seen():
    model = gpt_neo(window=100)
    assert packs(model, in_template(3, tokens=2))
    assert not packs(model, in_template(40))  # longer prompts make longer rows, which are tried again
    assert packs(model, in_template(40, tokens=2))
    some = in_template(40)
    for row, vectors in zip(some, encode(model, some).unbind(dim=1), strict=True):
        expected = torch.cat([v for _, v in pooled_states(model, stacked([row]), all_layers(2))])
        torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_convolution_along_the_row_is_seen(dtype):
    """However little it carries over: the weights are as small as they are when training begins."""
    config = Lfm2Config(**SMALL, num_key_value_heads=2, layer_types=["conv", *["full_attention"] * 4])
    model = Lfm2ForCausalLM(config).eval()
    blocks: Any = model.model.layers
    blocks[0].conv.out_proj.weight.data.mul_(0.1)
    assert not packs(model.to(dtype), prompts())


def test_no_row_is_longer_than_the_one_that_was_tried():
    for longest in (1, 4, 20, 66):
        for count in (3, 40, 300):
            some = [Prompt(prompt.ids[-longest:], 0, 1) for prompt in in_template(count)]
            assert packed(some).input_ids.shape[1] <= layers._longest_row(longest)


def test_the_trial_changes_nothing_and_raises_nothing():
    model = llama().train()
    weights, generator = {k: v.clone() for k, v in model.state_dict().items()}, torch.random.get_rng_state()
    assert packs(model, prompts())
    assert torch.equal(generator, torch.random.get_rng_state())
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())
    broken: Any = llama()
    broken.get_decoder().forward = None
    assert not packs(broken, prompts())


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
    packs(model, prompts(10))  # tries the model
    tokens = []
    model.get_decoder().register_forward_pre_hook(
        lambda _m, _a, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    twice = encode(model, prompts(10) + prompts(10))
    encode(model, prompts(10))
    assert sum(tokens) == 2 * len(beginnings(prompts(10)))
    assert torch.equal(twice[:, :10], twice[:, 10:])


def test_encoding_leaves_the_mode_as_it_was_and_dropout_off():
    model = llama().train()
    first = encode(model, prompts(5))
    assert model.training
    assert torch.equal(first, encode(model, prompts(5)))


def with_special_tokens(form: str) -> PreTrainedTokenizerFast:
    """A token a character of a and b, and what the form puts around a text."""
    special = ["<unk>", "<s>", "</s>", "[gMASK]", "<sop>"]
    vocabulary = {token: number for number, token in enumerate([*special, "a", "b"])}
    characters: Any = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    characters.post_processor = TemplateProcessing(
        single=form, special_tokens=[(token, vocabulary[token]) for token in special]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["[gMASK]", "<sop>"],
    )  # fmt: skip


class TestTokenize:
    def test_a_template_pools_the_words_own_tokens(self, tiny):
        (prompt,) = tokenize(["maji"], tiny.tokenizer, template="the {word} is")
        assert (prompt.start, prompt.stop, len(prompt.ids)) == (4, 8, 11)

    def test_last_pools_the_last_token_of_the_prompt(self, tiny):
        (prompt,) = tokenize(["maji"], tiny.tokenizer, template="the {word} is", pooling="last")
        assert (prompt.start, prompt.stop) == (10, 11)

    @pytest.mark.parametrize(
        ("form", "around"),
        [
            ("$A", (0, 0)),  # SmolLM2's
            ("<s> $A", (1, 0)),  # Gemma's
            ("</s> $A", (1, 0)),  # XGLM's, which is not its BOS
            ("[gMASK] <sop> $A", (2, 0)),  # GLM-4's
            ("<s> $A </s>", (1, 1)),  # BERT's
            ("$A </s>", (0, 1)),
        ],
    )
    def test_special_tokens_that_the_tokenizer_adds_are_left_out(self, form, around):
        before, after = around
        tokenizer = with_special_tokens(form)
        for word, own in (("ab", 2), ("é", 1), ("<s>", 1), ("</s>a", 2), ("a</s>", 2)):  # é is unknown
            (bare,) = tokenize([word], tokenizer)
            assert (bare.start, bare.stop, len(bare.ids)) == (before, before + own, before + own + after)
            (whole,) = tokenize([word], tokenizer, exclude_bos=False)
            assert (whole.ids, whole.start, whole.stop) == (bare.ids, 0, len(bare.ids))
            (last,) = tokenize([word], tokenizer, pooling="last")
            assert (last.start, last.stop) == (bare.stop - 1, bare.stop)
            (last,) = tokenize([word], tokenizer, pooling="last", exclude_bos=False)
            assert (last.start, last.stop) == (len(bare.ids) - 1, len(bare.ids))
            for exclude in (True, False):
                for template, start in (("{word}b", 0), ("b{word}", 1), ("b{word}b", 1)):
                    (prompt,) = tokenize([word], tokenizer, template=template, exclude_bos=exclude)
                    assert (prompt.start, prompt.stop) == (before + start, before + start + own)
        with pytest.raises(UserError, match="yields no token"):
            tokenize([""], tokenizer)

    def test_a_mask_that_counts_a_words_own_unknown_tokens_loses_none_of_them(self):
        """As tokenizers without the fast library mask, by their list of special tokens."""
        tokenizer = with_special_tokens("<s> $A </s>")

        def all_masked(texts: list[str], **how: Any) -> dict[str, Any]:
            encoded = dict(tokenizer(texts, **how))
            if "special_tokens_mask" in encoded:
                special = tokenizer.all_special_ids
                encoded["special_tokens_mask"] = [[int(id in special) for id in ids] for ids in encoded["input_ids"]]
            return encoded

        found = tokenize(["é", "éa", "aé", "<s>a"], all_masked)
        assert [(prompt.start, prompt.stop) for prompt in found] == [(1, 2), (1, 3), (1, 3), (1, 3)]

    def test_a_word_without_tokens_is_named(self, tiny):
        with pytest.raises(UserError, match=r"the word '' yields no token"):
            tokenize(["maji", ""], tiny.tokenizer)
