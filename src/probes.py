"""What the model can do, before and after: perplexity of a text, and word translation through its own output."""

from __future__ import annotations

import copy
import math
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Cache, PreTrainedTokenizerBase

from src.errors import NumbersError, UserError
from src.finite import likely_cause
from src.layers import Progress, evaluating, text_config
from src.pairs import Pair, word_key

with suppress(ModuleNotFoundError):  # shapes are checked in tests; a bare GPU machine need not have jaxtyping
    from jaxtyping import Float, Int

# One forward makes at most this many logits: 64 MB in float32, or 64 positions of Gemma's 262,144 entries.
_LOGITS = 2**24
_ROWS = 64  # sequences in one forward; each brings a copy of the prompt's keys and values
_POSITIONS = 256  # tokens of a text in one forward
_MAX_TOKENS = 2048
_LARGEST = math.log(sys.float_info.max)
LARGEST_CHANGE = 1e6  # of a perplexity, relative; JSON can't hold an infinite one
# What training does to one token it may do to its neighbours too, so the bootstrap draws blocks of neighbours (Künsch
# 1989). Blocks must outlast that dependence, and be many: a length of about n^⅓, 12 for 1,800 tokens, trades the one
# for the other (Künsch; Hall, Horowitz & Jing 1995). 32, a sentence or more, is on the safe side: too long a block
# costs a little precision, too short a one makes the interval too narrow.
_BLOCK = 32
FEWEST_TOKENS = 5 * _BLOCK  # of a text
_RESAMPLES = 10_000


def perplexity(model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """Token-level perplexity of a causal language model on the start of `text`: exp(−mean log-probability).

    `token_log_probabilities` says what is read and scored. Infinite where a float can't hold it.
    """
    return perplexity_of(token_log_probabilities(model, tokenizer, text))


def perplexity_of(log_probabilities: Sequence[float]) -> float:
    """exp(−mean) of natural logarithms; infinite where a float can't hold it. Raises ValueError for none."""
    if not log_probabilities:
        raise ValueError("perplexity of no tokens")
    surprise = -math.fsum(log_probabilities) / len(log_probabilities)
    return math.inf if surprise > _LARGEST else math.exp(surprise)


def token_log_probabilities(model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str) -> list[float]:
    """Natural log-probability of each token of `text` but the first, given the tokens before it.

    Reads at most 2,048 tokens. Where the model's context is shorter, they go through in consecutive windows of the
    context, so the same text gives as many scores. A BOS that the tokenizer adds is given at the start of every window
    and never scored; without one, a window is given the token before it. A window goes through piece by piece over one
    key-value cache, by the model's own forward (so soft caps and logit scales apply), and no more than 2²⁴ logits exist
    at once. Raises UserError if there is nothing to score.
    """
    ids = tokenizer(text, truncation=True, max_length=_MAX_TOKENS)["input_ids"]
    if len(ids) < 2:
        raise UserError(f"perplexity: {text!r} is less than two tokens long: give a longer text")
    context = getattr(text_config(model), "max_position_embeddings", None) or _MAX_TOKENS
    has_bos = ids[0] == tokenizer.bos_token_id
    scores: list[float] = []
    with evaluating(model):
        for start in range(0, len(ids) - 1, context):
            scored = ids[start + 1 : start + 1 + context]
            scores += _window_scores(model, [ids[0 if has_bos else start], *scored])
    return scores


def _window_scores(model: nn.Module, ids: list[int]) -> list[float]:
    """Log-probability of every token but the first, of a window that fits into the model's context without its last."""
    tokens = torch.tensor(ids, device=_device(model))
    size = max(1, min(_POSITIONS, _LOGITS // text_config(model).vocab_size))
    cache, scores = None, []
    for start in range(0, len(ids) - 1, size):
        following = tokens[start + 1 : start + 1 + size]
        piece = tokens[None, start : start + len(following)]
        output = model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        scores += (-cross_entropy(output.logits[0].float(), following, reduction="none")).tolist()
    return scores


def perplexity_change(before: Sequence[float], after: Sequence[float], *, seed: int = 0) -> tuple[float, float, float]:
    """Relative change of the perplexity (0.04 is +4 %) and its 95 % interval, from the same tokens' log-probabilities.

    The change is exp(mean(before − after)) − 1. The interval is a circular block bootstrap's over the tokens' paired
    differences, reproducible by `seed`. With fewer than 160 tokens (five blocks) nothing can be told: it is then the
    whole range, from −1 to LARGEST_CHANGE, where larger changes are cut off too. Equal inputs give (0, 0, 0).
    Raises ValueError for no tokens, for different numbers of them, and for a log-probability that isn't finite.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"perplexity change of {len(before)} and {len(after)} tokens")
    rises = np.asarray(before, dtype=np.float64) - np.asarray(after, dtype=np.float64)
    if not np.isfinite(rises).all():
        raise ValueError("a token's log-probability is not a finite number")
    if not rises.any():
        return 0.0, 0.0, 0.0
    change = _relative(rises.mean())
    if len(rises) < FEWEST_TOKENS:
        return change, -1.0, LARGEST_CHANGE
    # A percentile interval of few blocks is too short: its spread lacks the factor k/(k − 1), and a normal's tails are
    # thinner than Student's t. Hesterberg's (2015, "What teachers should know about the bootstrap") wider quantiles
    # make up for both.
    blocks = len(rises) / _BLOCK
    tail = stats.norm.cdf(stats.t.ppf(0.025, blocks - 1) * math.sqrt(blocks / (blocks - 1)))
    low, high = np.quantile(_block_means(rises, _BLOCK, seed), (tail, 1 - tail))
    return change, min(_relative(low), change), max(_relative(high), change)


def _block_means(values: Float[np.ndarray, " n"], block: int, seed: int) -> Float[np.ndarray, " resamples"]:
    """Means of resamples as long as `values`, joined of blocks from random places; the end goes on at the beginning.

    Going round gives every token the same chance (Politis & Romano 1992): the means scatter around the sample's own.
    """
    whole, rest = divmod(len(values), block)
    sums = np.concatenate([[0.0], np.cumsum(np.concatenate([values, values[:block]]))])
    place = np.arange(len(values))
    starts = np.random.default_rng(seed).integers(len(values), size=(_RESAMPLES, whole + 1))
    totals = (sums[place + block] - sums[place])[starts[:, :whole]].sum(axis=1)
    return (totals + (sums[place + rest] - sums[place])[starts[:, whole]]) / len(values)


def _relative(rise: float) -> float:
    """The relative change of a perplexity whose logarithm rises by this much, as far as LARGEST_CHANGE."""
    return min(math.expm1(min(rise, _LARGEST)), LARGEST_CHANGE)


def translation_accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    examples: Sequence[Pair],
    queries: Sequence[Pair],
    listed: Sequence[Pair],
    source_language: str,
    target_language: str,
    candidates: int = 10,
    seed: int = 0,
    progress: Progress | None = None,
) -> float:
    """Share of query words whose translation is the likeliest of `candidates` continuations of a few-shot prompt.

    The prompt is the `examples`, then `Swahili: maji⏎English:`; each distinct query word counts once, with the first
    translation `queries` gives it. The wrong candidates are drawn, by `seed`, from the other queries' targets, then
    from those of `listed` (the whole word list), and are never a listed translation of the word; chance is
    1/candidates. A tie counts as wrong. Raises UserError if there is no word to ask for or no wrong candidate for one.
    """
    choices = candidate_words(queries, listed, candidates=candidates, seed=seed)
    words = list(choices)
    lines = "".join(f"{source_language}: {p.source}\n{target_language}: {p.target}\n" for p in examples)
    # The shared part ends in "Swahili:", not before it, so that it is never empty, examples or not.
    opening, closing = f"{source_language}:", f"\n{target_language}:"
    tails = [_continuation(tokenizer, opening, f" {word}{closing}") for word in words]
    # The newline belongs to the answer: its score is then the log-probability of the whole answer, so summing over
    # tokens is fair to long and short ones alike, where a sum without it would let "cat" win as the beginning of
    # "category". Dividing by the length would ask for likely tokens instead of a likely answer.
    answers = [[_continuation(tokenizer, closing, f" {choice}\n") for choice in choices[word]] for word in words]
    right = 0
    batches = list(_batches(model, [len(tail) for tail in tails], logits_each=[1] * len(tails)))
    with evaluating(model):
        shared = torch.tensor([tokenizer(lines + opening)["input_ids"]], device=_device(model))
        prompt = model(input_ids=shared, use_cache=True, logits_to_keep=1).past_key_values
        for batch in progress(batches, "Translating words") if progress else batches:
            scores = _scores(model, prompt, [tails[i] for i in batch], [answers[i] for i in batch])
            if not all(math.isfinite(score) for row in scores for score in row):
                raise NumbersError(f"a translation's log-probability is not a finite number: {likely_cause(model)}")
            # The right one stands first. Strictly above all others: a tie is no sign of knowing.
            right += sum(all(row[0] > other for other in row[1:]) for row in scores)
    return right / len(words)


def candidate_words(
    queries: Sequence[Pair], listed: Sequence[Pair], *, candidates: int, seed: int
) -> dict[str, list[str]]:
    """For each distinct query word its candidate translations, the right one first, the same for the same seed."""
    translations: defaultdict[str, set[str]] = defaultdict(set)
    for pair in (*queries, *listed):
        translations[word_key(pair.source)].add(word_key(pair.target))
    near = {word_key(pair.target): pair.target for pair in queries}
    far = {word_key(pair.target): pair.target for pair in listed if word_key(pair.target) not in near}
    draw = random.Random(seed)
    choices: dict[str, list[str]] = {}
    for pair in queries:
        if pair.source in choices:
            continue
        wrong: list[str] = []
        for pool in (near, far):
            usable = [word for key, word in pool.items() if key not in translations[word_key(pair.source)]]
            wrong += draw.sample(usable, min(len(usable), candidates - 1 - len(wrong)))
        if not wrong:
            raise UserError(f"word translation: no wrong answer to choose from for {pair.source!r}: give more pairs")
        choices[pair.source] = [pair.target, *wrong]
    if not choices:
        raise UserError("word translation: no words to ask for: dataset.control_size must be at least 1")
    return choices


def _scores(
    model: nn.Module, prompt: Cache, tails: list[list[int]], answers: list[list[list[int]]]
) -> list[list[float]]:
    """Log-probability of every answer after prompt + tail; the tails are of one length, so nothing is padded."""
    device = _device(model)
    asked = _rows(prompt, torch.zeros(len(tails), dtype=torch.long, device=device))
    # An answer's first token is scored at its query's last position, and its last token need not be read: a one-token
    # answer with its newline costs one position.
    output = model(
        input_ids=torch.tensor(tails, device=device), past_key_values=asked, use_cache=True, logits_to_keep=1
    )
    first = output.logits[:, -1].float().log_softmax(dim=-1)
    flat = [(i, j) for i, row in enumerate(answers) for j in range(len(row))]
    lengths = [len(answers[i][j]) for i, j in flat]
    scores = [[0.0] * len(row) for row in answers]
    for batch in _batches(model, lengths, logits_each=[length - 1 for length in lengths]):
        tokens = torch.tensor([answers[i][j] for i, j in (flat[k] for k in batch)], device=device)
        owners = torch.tensor([flat[k][0] for k in batch], device=device)
        total = first[owners, tokens[:, 0]]
        if tokens.shape[1] > 1:
            output = model(input_ids=tokens[:, :-1], past_key_values=_rows(asked, owners), use_cache=True)
            losses = cross_entropy(output.logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            total = total - losses.view(len(batch), -1).sum(dim=1)
        for k, score in zip(batch, total.tolist(), strict=True):
            i, j = flat[k]
            scores[i][j] = score
    return scores


def _continuation(tokenizer: PreTrainedTokenizerBase, before: str, text: str) -> list[int]:
    """Tokens of `text` as they stand behind `before`, the same two strings' ends whatever came earlier.

    A piece tokenized alone may gain a beginning-of-text space (Llama 2), so it is tokenized behind what it follows,
    which is cut off again. Where the two melt into one token it is tokenized alone: less usual, but read alike for
    every candidate.
    """
    start = tokenizer(before, add_special_tokens=False)["input_ids"]
    whole = tokenizer(before + text, add_special_tokens=False)["input_ids"]
    if whole[: len(start)] == start:
        return whole[len(start) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _batches(model: nn.Module, lengths: Sequence[int], *, logits_each: Sequence[int]) -> Iterator[list[int]]:
    """Positions of equal lengths together, as many as one forward may hold."""
    groups: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for position, key in enumerate(zip(lengths, logits_each, strict=True)):
        groups[key].append(position)
    for (_, logits), group in sorted(groups.items()):
        size = max(1, min(_ROWS, _LOGITS // (max(1, logits) * text_config(model).vocab_size)))
        yield from (group[i : i + size] for i in range(0, len(group), size))


def _rows(cache: Cache, rows: Int[Tensor, " n"]) -> Cache:
    """A new cache whose row i is row rows[i] of `cache`, which stays as it is."""
    chosen = copy.deepcopy(cache)
    chosen.reorder_cache(rows.long())  # pyright: ignore[reportArgumentType]
    return chosen


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
