"""Perplexity and word translation agree with the model's plain forward, whatever the chunks and batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from src import probes
from src.errors import UserError
from src.pairs import Pair
from src.probes import candidate_words, perplexity, translation_accuracy

CHARACTERS = "\n :abcdefghijklmnopqrstuvwxyzSE"
TEXT = "the old man sat by the river and watched the boats go by until the rain came"
PAIRS = [
    Pair("maji", "water"),
    Pair("jua", "sun"),
    Pair("mti", "tree"),
    Pair("samaki", "fish"),
    Pair("nyumba", "house"),
]
LANGUAGES: dict[str, Any] = {"source_language": "S", "target_language": "E"}


def characters(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a character; with a BOS where asked."""
    vocabulary = {token: i for i, token in enumerate(["<bos>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # pyright: ignore
    if bos:
        template = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
        tokenizer.post_processor = template  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>")


def llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gemma() -> PreTrainedModel:
    """With a window shorter than the text and a soft cap that bends the logits."""
    config = Gemma3TextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=256, initializer_range=0.3, sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], final_logit_softcapping=1.5,
    )  # fmt: skip
    return Gemma3ForCausalLM(config)


def log_probabilities(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Of every token but the first, by one plain forward."""
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("make", [llama, gemma])
@pytest.mark.parametrize("bos", [False, True])
def test_perplexity_is_the_plain_forwards(make, bos: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = make(), characters(bos)
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) == len(TEXT) + bos
    expected = math.exp(-log_probabilities(model, ids).mean().item())
    for logits in (2**24, 40 * 7, 1):  # in one piece, in pieces of seven, token by token
        monkeypatch.setattr(probes, "_LOGITS", logits)
        assert perplexity(model, tokenizer, TEXT) == pytest.approx(expected, rel=1e-5)


def test_perplexity_stops_at_the_context_and_refuses_nothing_to_score() -> None:
    model, tokenizer = llama(), characters()
    model.config.max_position_embeddings = 20
    assert perplexity(model, tokenizer, TEXT) == perplexity(model, tokenizer, TEXT[:20])
    assert perplexity(model, tokenizer, TEXT) != perplexity(model, tokenizer, TEXT[:19])
    with pytest.raises(UserError, match="longer text"):
        perplexity(model, tokenizer, "a")


@pytest.mark.parametrize("make", [llama, gemma])
def test_scores_are_the_plain_forwards(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every question is asked one by one in plain text; accuracy follows from those scores."""
    model, tokenizer = make(), characters(bos=True)
    examples, queries = PAIRS[:2], [*PAIRS[2:], Pair("ndege", "bird"), Pair("mkono", "hand"), Pair("moto", "fire")]
    choices = candidate_words(queries, PAIRS, candidates=5, seed=3)
    expected = {}
    for word, answers in choices.items():
        for answer in answers:
            start = f"S: maji\nE: water\nS: jua\nE: sun\nS: {word}\nE:"
            whole = tokenizer(f"{start} {answer}\n")["input_ids"]
            told = log_probabilities(model, whole)[len(tokenizer(start)["input_ids"]) - 1 :]
            assert len(told) == len(answer) + 2
            expected[word, answer] = told.sum().item()
    seen: list[list[float]] = []
    plain = probes._scores
    monkeypatch.setattr(probes, "_scores", lambda *given: seen.append(plain(*given)) or seen[-1])  # pyright: ignore
    monkeypatch.setattr(probes, "_LOGITS", 40 * 12)  # a few rows at a time
    accuracy = translation_accuracy(
        model, tokenizer, examples=examples, queries=queries, listed=PAIRS, candidates=5, seed=3, **LANGUAGES
    )
    rows = [row for batch in seen for row in batch]
    in_order = sorted(choices, key=len)  # batches go by length
    for word, row in zip(in_order, rows, strict=True):
        assert row == pytest.approx([expected[word, answer] for answer in choices[word]], abs=1e-4)
    right = [max(answers, key=lambda a: expected[word, a]) == answers[0] for word, answers in choices.items()]
    assert accuracy == sum(right) / len(right)


def test_ties_are_wrong_and_whole_answers_are_compared() -> None:
    """Where every token is equally likely, answers of one length tie, and only a shorter one beats them."""
    model = llama()
    nn.init.zeros_(model.lm_head.weight)  # pyright: ignore
    equal = [Pair(*words) for words in (("a", "xyz"), ("b", "vwx"), ("c", "tuv"), ("d", "rst"))]
    ask = {"examples": PAIRS[:1], "candidates": 4, **LANGUAGES}
    assert translation_accuracy(model, characters(), queries=equal, listed=equal, **ask) == 0
    short = [Pair("a", "xy"), *equal[1:]]
    assert translation_accuracy(model, characters(), queries=short, listed=short, **ask) == 1 / 4


def test_candidates_are_the_same_for_a_seed_and_never_listed_translations() -> None:
    queries = [Pair("big", "kubwa"), Pair("house", "nyumba"), Pair("big", "nene"), Pair("water", "maji")]
    listed = [*queries, Pair("house", "maji"), Pair("sun", "jua"), Pair("tree", "mti")]
    for seed in range(20):
        choices = candidate_words(queries, listed, candidates=4, seed=seed)
        assert choices == candidate_words(queries, listed, candidates=4, seed=seed)
        assert {word: row[0] for word, row in choices.items()} == {"big": "kubwa", "house": "nyumba", "water": "maji"}
        assert all(len(row) == len(set(row)) for row in choices.values())
        # big: two others' targets and one more from the list; house: "maji" is one of its translations.
        assert set(choices["big"]) - {"jua", "mti"} == {"kubwa", "nyumba", "maji"} and len(choices["big"]) == 4
        assert set(choices["house"]) - {"jua", "mti"} == {"nyumba", "kubwa", "nene"}
    assert len({str(candidate_words(queries, listed, candidates=4, seed=seed)) for seed in range(20)}) > 1
    with pytest.raises(UserError, match="no wrong answer"):
        candidate_words(queries[:1], queries[:1], candidates=4, seed=0)
    with pytest.raises(UserError, match="no words"):
        candidate_words([], listed, candidates=4, seed=0)


def test_works_with_an_adapter_and_leaves_every_mode_as_it_was() -> None:
    base, tokenizer = llama(), characters()
    before = perplexity(base, tokenizer, TEXT)
    adapted = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], lora_dropout=0.5)
    )
    adapted.train()
    base.lm_head.eval()
    modes = [module.training for module in adapted.modules()]
    assert perplexity(adapted, tokenizer, TEXT) == before  # no dropout, and an adapter that starts at zero
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    assert perplexity(adapted, tokenizer, TEXT) != before
    ask = {"examples": PAIRS[:1], "queries": PAIRS[1:], "listed": PAIRS, "candidates": 3, **LANGUAGES}
    steps = []
    shown = translation_accuracy(
        adapted, tokenizer, progress=lambda items, words: steps.append((len(items), words)) or items, **ask
    )
    assert shown == translation_accuracy(adapted, tokenizer, **ask)
    assert steps == [(2, "Translating words")]  # two words of three letters, two of six
    assert [module.training for module in adapted.modules()] == modes
    assert any(modes) and not all(modes)


def test_a_piece_is_tokenized_as_it_stands_behind_the_text() -> None:
    """A tokenizer that puts a space before every text (Llama 2) puts none in the middle."""
    tokenizer = Tokenizer(models.WordLevel({"▁": 0, "E": 1, ":": 2, "a": 3}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore
        [pre_tokenizers.Metaspace(split=False), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert fast("E: a")["input_ids"] == [0, 1, 2, 0, 3]
    assert probes._continuation(fast, "E:", " a") == [0, 3]
    assert probes._continuation(fast, "E:", "a") == [3]  # alone it would be [0, 3]
