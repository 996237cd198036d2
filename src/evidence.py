"""Is a gain about translation, or did everything move? All tests of one split at one layer, and the verdict of a run.

Every answer is a finite number. Fewer than five words can't tell, so there a p-value is 1 and an interval is the whole
range of a cosine's gain, except McNemar's, which is exact for any n.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from src.measures import csls_ranks, measure, pair_cosines, source_words
from src.near import NOTHING, near_test
from src.paired import gain_interval, mcnemar, paired_tests
from src.specificity import (
    Change,
    SpecificityResult,
    change,
    left_out_pvalue,
    scaled,
    specificity_test,
    specificity_tests,
)
from src.verdict import SplitEvidence, Verdict, holm, judge

with suppress(ModuleNotFoundError):  # shapes are checked in tests; a bare GPU machine need not have jaxtyping
    from jaxtyping import Bool, Float, Int

__all__ = ["SpecificityResult", "SplitEvidence", "Verdict", "gather_evidence", "holm", "judge", "specificity_test"]

MOST = 2_000  # pairs in the n × n tests; more are sampled


def gather_evidence(
    source_before: Float[Tensor, "n d"],
    target_before: Float[Tensor, "n d"],
    source_after: Float[Tensor, "n d"],
    target_after: Float[Tensor, "n d"],
    relevant: Int[Tensor, "n k"],
    *,
    permutations: int = 10_000,
    seed: int = 0,
    best_layer: tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]] | None = None,
    spellings: Sequence[tuple[str, str]] | None = None,
    among: Bool[np.ndarray, " n"] | None = None,
) -> tuple[SplitEvidence, SpecificityResult]:
    """Runs all tests on the unit vectors of one split at one layer; see `measures.measure` for `relevant`.

    P@1 and McNemar count source words; the t-test, Wilcoxon, d_z and the interval take a word's pairs together. The
    specificity tests use pairs no two of which share a word or are listed translations of each other (moving one word
    moves all its pairs, which random matchings would tear apart), at most 2,000 of them, sampled by `seed`.

    `near.near_test` says which words are near. It also takes the untouched model's source and target vectors at its
    `best_layer`, and the pairs' `spellings`. `among` says which pairs to report on. Retrieval still chooses among all
    targets, so it must hold all pairs of a word or none. Raises ValueError for no pairs or a vector that isn't finite.
    """
    split = _Split(source_before, target_before, source_after, target_after, relevant, best_layer, spellings)
    hits = [
        (csls_ranks(source, target, relevant) == 1).cpu().numpy()
        for source, target in ((source_before, target_before), (source_after, target_after))
    ]
    words = source_words(source_before, relevant).numpy()
    chosen = np.arange(len(words)) if among is None else np.flatnonzero(among)
    rng = np.random.default_rng(seed)
    tested = chosen[_unshared(_restricted(relevant.cpu().numpy(), chosen))]
    tested = np.sort(rng.permutation(tested)[:MOST])
    raw, fields = _specificity(split, tested, permutations, seed)
    return SplitEvidence(**_paired(split, chosen, words, hits, seed), **fields), raw


@dataclass(frozen=True)
class _Split:
    """Everything that is known of a split's pairs."""

    source_before: Tensor
    target_before: Tensor
    source_after: Tensor
    target_after: Tensor
    relevant: Tensor
    best_layer: tuple[Tensor, Tensor] | None
    spellings: Sequence[tuple[str, str]] | None


def _paired(
    split: _Split,
    chosen: Int[np.ndarray, " m"],
    words: Int[np.ndarray, " n"],
    hits: Sequence[Bool[np.ndarray, " n"]],
    seed: int,
) -> dict[str, float]:
    """The chosen pairs' levels before and after, and what the paired tests say of them."""
    own = torch.arange(len(chosen))[:, None]
    sides = [(split.source_before, split.target_before), (split.source_after, split.target_after)]
    if len(chosen) < len(words):  # else a copy of every vector
        rows = torch.from_numpy(chosen).to(split.relevant.device)
        sides = [(source[rows], target[rows]) for source, target in sides]
    levels = [measure(source, target, own, names=["pair_cosine", "margin"]) for source, target in sides]
    old, new = (level["pair_cosine"] for level in levels)
    before, after = (pair_cosines(source, target).cpu().numpy() for source, target in sides)
    gains, words = after - before, words[chosen]
    first = np.unique(words, return_index=True)[1]
    hit_before, hit_after = (hit[chosen][first] for hit in hits)
    low, high = gain_interval(gains, words, seed)
    t_pvalue, wilcoxon_pvalue, effect = paired_tests(gains, words)
    return {
        "n_pairs": len(chosen),
        "n_words": len(first),
        "pair_cosine_before": old,
        "pair_cosine_after": new,
        "pair_cosine_gain": new - old,
        "pair_cosine_gain_pct": 100 * (new - old) / abs(old) if old else 0.0,
        "margin_before": levels[0]["margin"],
        "margin_after": levels[1]["margin"],
        "margin_gain": levels[1]["margin"] - levels[0]["margin"],
        "csls_p_at_1_before": float(hit_before.mean()),
        "csls_p_at_1_after": float(hit_after.mean()),
        "words_won": int((hit_after & ~hit_before).sum()),
        "words_lost": int((hit_before & ~hit_after).sum()),
        "t_pvalue": t_pvalue,
        "wilcoxon_pvalue": wilcoxon_pvalue,
        "cohens_dz": effect,
        "gain_ci_low": low,
        "gain_ci_high": high,
        "mcnemar_pvalue": mcnemar(hit_before, hit_after),
    }


def _specificity(
    split: _Split, tested: Int[np.ndarray, " m"], permutations: int, seed: int
) -> tuple[SpecificityResult, dict[str, float]]:
    """The raw specificity test, and what random matchings and near words say, of pairs that share no word."""
    rows = torch.from_numpy(tested).to(split.relevant.device)
    a, b, c, d = (
        vectors[rows].double().cpu().numpy()
        for vectors in (split.source_before, split.target_before, split.source_after, split.target_after)
    )
    before, after = a @ b.T, c @ d.T
    changes = [change(before, after), change(scaled(before), scaled(after))]
    raw, in_spread = specificity_tests(changes, permutations, seed)
    moved = all(each.spread for each in changes)  # by more than rounding
    near = NOTHING
    if moved:
        near = near_test(
            _arrays(split.source_before, split.target_before),
            _arrays(split.source_after, split.target_after),
            split.relevant.cpu().numpy(),
            tested,
            best_layer=split.best_layer and _arrays(*split.best_layer),
            spellings=split.spellings,
            seed=seed,
        )
    gains = changes[0].pair_gains
    return raw, {
        "near_gain": near.gain,
        "near_pvalue": near.pvalue,
        "left_out_near_pvalue": near.pvalue_left_out,
        "specificity_gain": raw.gain,
        "specificity_pvalue": raw.pvalue,
        "specificity_harm_pvalue": max(raw.pvalue_less, in_spread.pvalue_less),
        "scaled_specificity_gain": in_spread.gain,
        "scaled_specificity_pvalue": in_spread.pvalue,
        "left_out_specificity_pvalue": max(left_out_pvalue(each) for each in changes),
        "share_gained": float((gains > 0).mean()) if changes[0].spread else 0.0,
        "specificity_pairs": len(tested),
        "specificity_sd": _deviation(changes[0]),
        "scaled_specificity_sd": _deviation(changes[1]),
    }


def _arrays(source: Tensor, target: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """NumPy's view of the vectors, which it can't have of bfloat16."""
    a, b = (side.float() if side.dtype == torch.bfloat16 else side for side in (source, target))
    return a.cpu().numpy(), b.cpu().numpy()


def _deviation(change: Change) -> float:
    """The standard deviation of the pairs' gains, 0 where nothing moved."""
    return float(change.pair_gains.std(ddof=1)) if change.spread else 0.0


def _restricted(relevant: Int[np.ndarray, "n k"], chosen: Int[np.ndarray, " m"]) -> Int[np.ndarray, "m k"]:
    """The listed translations among the chosen pairs alone, by their new numbers."""
    number = np.full(len(relevant) + 1, -1)  # the last is where the padding points
    number[chosen] = np.arange(len(chosen))
    return number[relevant[chosen]]


def _unshared(relevant: Int[np.ndarray, "n k"]) -> Int[np.ndarray, " m"]:
    """Pairs no two of which share a word or a listed translation; those with the fewest such ties are taken first."""
    mates: list[list[int]] = [[] for _ in relevant]
    for row, place in np.argwhere((relevant >= 0) & (relevant != np.arange(len(relevant))[:, None])):
        mates[row].append(relevant[row, place])
        mates[relevant[row, place]].append(row)
    taken = np.zeros(len(relevant), dtype=bool)
    for pair in sorted(range(len(relevant)), key=lambda pair: len(mates[pair])):
        taken[pair] = not taken[mates[pair]].any()
    return np.flatnonzero(taken)
