"""Paired tests of one split, before against after. The unit is the source word: all its pairs count once together."""

from __future__ import annotations

import sys
from contextlib import suppress

import numpy as np
from scipy import stats

with suppress(ModuleNotFoundError):  # shapes are checked in tests; a bare GPU machine need not have jaxtyping
    from jaxtyping import Bool, Float, Int

FEWEST = 5  # words: with fewer, p-values are 1 and the interval is the whole range of a cosine's gain
RESAMPLES = 10_000  # of the bootstrap
CACHED = 200_000  # numbers added up at once: what a cache holds
LARGEST_EFFECT = 1e6  # stands for an infinite Cohen's d_z, which JSON can't hold


def paired_tests(gains: Float[np.ndarray, " n"], words: Int[np.ndarray, " n"]) -> tuple[float, float, float]:
    """P-values of the paired t-test and of Wilcoxon's signed-rank test (both two-sided), and Cohen's d_z.

    `words` numbers the source word of each pair, from 0. Pairs of one word aren't independent, so its mean gain is one
    observation. If every word gains exactly the same, t is infinite; its p is then that of n equal signs, 2^(1−n), and
    d_z ±10⁶.
    """
    sums, counts = _by_word(gains, words)
    means = sums / counts
    if not np.any(means):
        return 1.0, 1.0, 0.0
    n, mean = len(means), float(means.mean())
    deviation = float(means.std(ddof=1)) if n > 1 else 0.0
    same = deviation <= 1e-12 * abs(mean)
    effect = float(np.copysign(LARGEST_EFFECT, mean)) if same else mean / deviation
    effect = float(np.clip(effect, -LARGEST_EFFECT, LARGEST_EFFECT))
    if n < FEWEST:
        return 1.0, 1.0, effect
    t_pvalue = 2.0 ** (1 - n) if same else 2 * float(stats.t.sf(abs(effect) * np.sqrt(n), n - 1))
    wilcoxon_pvalue = float(np.asarray(stats.wilcoxon(means))[1])
    return max(t_pvalue, sys.float_info.min), max(wilcoxon_pvalue, sys.float_info.min), effect


def gain_interval(gains: Float[np.ndarray, " n"], words: Int[np.ndarray, " n"], seed: int) -> tuple[float, float]:
    """BCa bootstrap 95 % interval (Efron 1987) of the mean gain of all pairs; words are drawn, with all their pairs."""
    sums, counts = _by_word(gains, words)
    if len(sums) < FEWEST:
        return -2.0, 2.0
    mean = float(gains.mean())
    if np.ptp(sums - mean * counts) <= 1e-12 * float(np.abs(gains).max()):  # all words alike
        return mean, mean

    def mean_of_pairs(sums: np.ndarray, counts: np.ndarray, axis: int = -1) -> np.ndarray | np.float64:
        return sums.sum(axis=axis) / counts.sum(axis=axis)

    interval = stats.bootstrap(
        (sums, counts),
        mean_of_pairs,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, CACHED // len(sums)),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def mcnemar(before: Bool[np.ndarray, " n"], after: Bool[np.ndarray, " n"]) -> float:
    """Exact McNemar test, two-sided: of the words whose answer changed, were as many lost as won?"""
    won, lost = int((after & ~before).sum()), int((before & ~after).sum())
    return float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0


def _by_word(
    gains: Float[np.ndarray, " n"], words: Int[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " w"], Float[np.ndarray, " w"]]:
    """(sum of the gains of each word's pairs, number of its pairs)."""
    _, number = np.unique(words, return_inverse=True)
    return np.bincount(number, weights=gains), np.bincount(number).astype(np.float64)
