"""What the model can do, before and after: perplexity of a text, and word translation through its own output."""

from __future__ import annotations

import copy
import math
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Cache, PreTrainedTokenizerBase

from src.errors import NumbersError, UserError
from src.finite import likely_cause
from src.layers import Progress, evaluating, text_config
from src.pairs import Pair, word_key

with suppress(ModuleNotFoundError):  # shapes are checked in tests; a bare GPU machine need not have jaxtyping
    from jaxtyping import Int

# One forward makes at most this many logits: 64 MB in float32, or 64 positions of Gemma's 262,144 entries.
_LOGITS = 2**24
_ROWS = 64  # sequences in one forward; each brings a copy of the prompt's keys and values
_POSITIONS = 256  # tokens of a text in one forward
_MAX_TOKENS = 1024
_LARGEST = math.log(sys.float_info.max)


def perplexity(model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """Token-level perplexity of a causal language model on the start of `text`: exp(−mean log-probability).

    Reads at most 1,024 tokens, fewer if the model's context is shorter. A BOS token that the tokenizer adds is given,
    not scored. The text goes through piece by piece over one key-value cache, by the model's own forward (so soft caps
    and logit scales apply), and no more than 2²⁴ logits exist at once. Raises UserError if there is nothing to score.
    """
    context = getattr(text_config(model), "max_position_embeddings", None) or _MAX_TOKENS
    ids = tokenizer(text, truncation=True, max_length=min(_MAX_TOKENS, context))["input_ids"]
    if len(ids) < 2:
        raise UserError(f"perplexity: {text!r} is less than two tokens long: give a longer text")
    tokens = torch.tensor([ids], device=_device(model))
    size = max(1, min(_POSITIONS, _LOGITS // text_config(model).vocab_size))
    with evaluating(model):
        cache, total = None, 0.0
        for start in range(0, len(ids) - 1, size):
            piece = tokens[:, start : min(start + size, len(ids) - 1)]
            output = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            following = tokens[0, start + 1 : start + 1 + piece.shape[1]]
            total += cross_entropy(output.logits[0].float(), following, reduction="sum").item()
    surprise = total / (len(ids) - 1)
    return math.inf if surprise > _LARGEST else math.exp(surprise)


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
