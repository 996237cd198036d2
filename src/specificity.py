"""Did the true pairs gain more than random matchings of the same words?

The test reads G, the change of the n × n cosines, after its row and column means are taken away ("double-centred"):
what a word gains with every partner says nothing about its own.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from scipy import stats
from torch import Tensor, finfo, float64

with suppress(ModuleNotFoundError):  # shapes are checked in tests; a bare GPU machine need not have jaxtyping
    from jaxtyping import Bool, Float, Int

FEWEST = 5  # pairs: their 24 matchings reach no p below 0.04
LEFT_OUT = 0.05  # share of the words, those that gained most, that a claim must survive without
CACHED = 200_000  # numbers drawn and added up at once: what a cache holds


@dataclass(frozen=True)
class SpecificityResult:
    """Mean gain of the true pairs less that of all others, its one-sided p-values, and the gains of random matchings.

    `pvalue` asks whether the true matching gained more than random ones do, `pvalue_less` whether it gained less.
    """

    gain: float
    pvalue: float
    pvalue_less: float
    null: np.ndarray


@dataclass(frozen=True)
class Change:
    """What the similarities gained, double-centred, and its root mean square: 0 if no more than rounding error."""

    gains: Float[np.ndarray, "n n"]
    spread: float

    @property
    def pair_gains(self) -> Float[np.ndarray, " n"]:
        """Each pair's gain beyond those of its words' other partners."""
        n = len(self.gains)
        return np.diag(self.gains) * (n / (n - 1) if n > 1 else 1.0)


def specificity_test(
    before: Float[np.ndarray, "n n"] | Float[Tensor, "n n"],
    after: Float[np.ndarray, "n n"] | Float[Tensor, "n n"],
    *,
    permutations: int = 10_000,
    seed: int = 0,
) -> SpecificityResult:
    """Tests whether the true pairs (the diagonals) gained more than randomly matched ones, by permuting the matching.

    Matchings are compared by their mean gain over its standard error, after row and column means are taken away:
    exact where all matchings are alike under the null, and still right (Chung & Romano 2013) where some words move
    more wildly than others and translations do so together; the bare mean gain then finds effects that aren't there.
    A change within the rounding error of the inputs' type is none: p-values 1. Raises ValueError if not finite.
    """
    return specificity_tests([change(before, after)], permutations, seed)[0]


def change(before: np.ndarray | Tensor, after: np.ndarray | Tensor) -> Change:
    """What two matrices of similarities differ by. Raises ValueError if one isn't finite."""
    old, new = _array(before), _array(after)
    if not (np.isfinite(old).all() and np.isfinite(new).all()):
        raise ValueError("a similarity isn't finite")
    gains = double_centred(new - old)
    spread = float(np.sqrt(np.mean(gains**2))) if len(gains) > 1 else 0.0
    rounding = 4 * max(_epsilon(before), _epsilon(after)) * max(np.abs(old).max(initial=0), np.abs(new).max(initial=0))
    return Change(gains, spread if spread > rounding else 0.0)


def scaled(
    similarities: Float[np.ndarray, "n m"], mismatches: Bool[np.ndarray, "n m"] | None = None
) -> Float[np.ndarray, "n m"]:
    """Similarities, double-centred, in units of the spread that each one's row and column have over mismatches.

    `mismatches` says which cells are these; None is all of a square matrix but its diagonal. One spread for all would
    not do: where some words' cosines vary more than others' (at an attention sink, those of long words), the error of
    that one spread shifts the gains of all pairs together, and no permutation sees it.
    """
    if mismatches is None:
        mismatches = ~np.eye(len(similarities), dtype=bool)
    centred = double_centred(similarities)
    squares = np.where(mismatches, centred**2, 0)
    rows, columns = (np.sqrt(squares.sum(axis) / np.maximum(1, mismatches.sum(axis))) for axis in (1, 0))
    unit = np.outer(rows, columns) / max(np.sqrt(squares.sum() / max(1, mismatches.sum())), 1e-12)
    return np.divide(centred, unit, out=np.zeros_like(centred), where=unit > 1e-12)


def double_centred(matrix: Float[np.ndarray, "n m"]) -> Float[np.ndarray, "n m"]:
    """The matrix without its row and column means."""
    if not len(matrix):
        return matrix
    return matrix - matrix.mean(0) - matrix.mean(1, keepdims=True) + matrix.mean()


# --- random matchings ---------------------------------------------------------------------------------------


def specificity_tests(changes: Sequence[Change], permutations: int, seed: int) -> list[SpecificityResult]:
    """`specificity_test` of several changes of the same pairs; drawing the matchings takes longest, so once for all."""
    n, rng = len(changes[0].gains), np.random.default_rng(seed)
    nulls = np.zeros((len(changes), 2, permutations))
    moved = [i for i, change in enumerate(changes) if change.spread]
    rows = max(1, CACHED // max(1, n))
    for start in range(0, permutations if moved else 0, rows):
        part = slice(start, min(start + rows, permutations))
        # numpy shuffles integers of the machine's own size fastest
        cells = rng.permuted(np.broadcast_to(np.arange(n), (part.stop - start, n)), axis=1)
        cells += np.arange(0, n * n, n)
        for i in moved:
            nulls[i, :, part] = _matched(changes[i], cells)
    return [_compared(change, *null) for change, null in zip(changes, nulls, strict=True)]


def _compared(change: Change, gains: Float[np.ndarray, " p"], scores: Float[np.ndarray, " p"]) -> SpecificityResult:
    """The true matching against the random ones' mean gains, and these over their standard errors."""
    if not change.spread:
        return SpecificityResult(0.0, 1.0, 1.0, gains)
    n = len(change.gains)
    unbias = n / (n - 1)  # from "above the mean of all entries" to "above the mean of the others"
    observed_gain, observed = (float(x[0]) for x in _matched(change, np.arange(0, n * n, n + 1)[None]))
    slack = 1e-9 * max(1.0, abs(observed))  # equal sums that were added up in another order are ties
    more = (1 + int((scores >= observed - slack).sum())) / (1 + len(scores))
    less = (1 + int((scores <= observed + slack).sum())) / (1 + len(scores))
    if n < FEWEST:
        more = less = 1.0
    return SpecificityResult(observed_gain * unbias, more, less, gains * unbias)


def _matched(change: Change, cells: Int[np.ndarray, "p n"]) -> tuple[Float[np.ndarray, " p"], Float[np.ndarray, " p"]]:
    """Mean gain of each matching, and that over its standard error (floored, so that none is divided by 0).

    A row of `cells` holds where the pairs of one matching stand in the matrix, counted row by row.
    """
    n = len(change.gains)
    gains = change.gains.ravel()[cells]
    mean = gains.mean(1)
    variance = np.einsum("ij,ij->i", gains, gains) / n - mean**2
    return mean, mean / np.sqrt(np.maximum(variance, (1e-6 * change.spread) ** 2) / n)


def left_out_pvalue(change: Change) -> float:
    """One-sided p-value of the true pairs' gain without the LEFT_OUT of them that gained most (at least one).

    By Student's t, which the studentised permutation test agrees with: this asks how much rests on a few words.
    """
    if not change.spread:
        return 1.0
    kept = np.sort(np.argsort(change.pair_gains)[: -left_out(len(change.gains))])
    return greater_than_zero(np.diag(double_centred(change.gains[np.ix_(kept, kept)])))


def left_out(n: int) -> int:
    """How many of n words a claim must survive without."""
    return math.ceil(LEFT_OUT * n)


def greater_than_zero(values: Float[np.ndarray, " n"]) -> float:
    """One-sided p-value of Student's t-test that the mean is above 0; 1 for fewer than FEWEST values, never 0."""
    n = len(values)
    if n < FEWEST:
        return 1.0
    mean, deviation = float(values.mean()), float(values.std(ddof=1))
    if deviation <= 1e-12 * max(abs(mean), 1e-300):
        return 0.5**n if mean > 0 else 1.0
    return max(float(stats.t.sf(mean / deviation * np.sqrt(n), n - 1)), sys.float_info.min)


# --- small parts --------------------------------------------------------------------------------------------


def _array(similarities: np.ndarray | Tensor) -> Float[np.ndarray, "n n"]:
    if isinstance(similarities, Tensor):
        return similarities.detach().to("cpu", float64).numpy()
    return similarities.astype(np.float64)


def _epsilon(similarities: np.ndarray | Tensor) -> float:
    if isinstance(similarities, Tensor):
        return finfo(similarities.dtype).eps
    kind = similarities.dtype if np.issubdtype(similarities.dtype, np.floating) else np.float64
    return float(np.finfo(kind).eps)
