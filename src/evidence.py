"""Is a gain about translation, or did everything move? Tests on one split at one layer, and the verdict of a run.

Every answer is a finite number. Fewer than five pairs can't tell (their 24 matchings reach no p below 0.04), so
there a p-value is 1 and an interval is the whole range of a cosine's gain, except McNemar's, which is exact for any n.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from src.measures import csls_ranks, measure, pair_cosines

with suppress(ModuleNotFoundError):  # shapes are checked in tests; a bare GPU machine need not have jaxtyping
    from jaxtyping import Bool, Float, Int

FEWEST = 5  # pairs
MOST = 2_000  # pairs in the n × n tests; more are sampled
RESAMPLES = 10_000  # of the bootstrap
CACHED = 200_000  # numbers drawn and added up at once: what a cache holds
LARGEST_EFFECT = 1e6  # stands for an infinite Cohen's d_z, which JSON can't hold
WORSE = 0.2  # a fall of P@1 below this p withholds `aligned`: guarding a claim takes less evidence than making one


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
class SplitEvidence:
    """What one split shows at one layer; gains are after less before, P@1 by CSLS, p-values uncorrected.

    The `specificity_` fields are of the raw cosines. The `scaled_` ones are of cosines in units of the spread of
    their words' mismatches: a change that merely spreads or squeezes all cosines has none. The verdict
    wants both to agree; `specificity_harm_pvalue` is already the larger of the two lower tails.
    """

    pair_cosine_before: float
    pair_cosine_after: float
    pair_cosine_gain: float
    pair_cosine_gain_pct: float
    margin_before: float
    margin_after: float
    margin_gain: float
    csls_p_at_1_before: float
    csls_p_at_1_after: float
    t_pvalue: float
    wilcoxon_pvalue: float
    cohens_dz: float
    gain_ci_low: float
    gain_ci_high: float
    mcnemar_pvalue: float
    specificity_gain: float
    specificity_pvalue: float
    specificity_harm_pvalue: float
    scaled_specificity_gain: float
    scaled_specificity_pvalue: float


@dataclass(frozen=True)
class Verdict:
    """A run's label, the reason in one sentence, and the Holm-adjusted p-values it rests on."""

    label: Literal["aligned", "memorised", "inflated", "harmed", "none"]
    reason: str
    adjusted: dict[str, float]


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
    return _specificity_tests([_change(before, after)], permutations, seed)[0]


def gather_evidence(
    source_before: Float[Tensor, "n d"],
    target_before: Float[Tensor, "n d"],
    source_after: Float[Tensor, "n d"],
    target_after: Float[Tensor, "n d"],
    relevant: Int[Tensor, "n k"],
    *,
    permutations: int = 10_000,
    seed: int = 0,
) -> tuple[SplitEvidence, SpecificityResult]:
    """Runs all tests on the unit vectors of one split at one layer; see `measures.measure` for `relevant`.

    The specificity tests use pairs no two of which share a word or are listed translations of each other (moving
    one word moves all its pairs, which random matchings would tear apart), at most 2,000 of them, sampled by `seed`.
    Raises ValueError for no pairs or a vector that isn't finite.
    """
    levels = [
        measure(source, target, relevant, names=["pair_cosine", "margin"])
        for source, target in ((source_before, target_before), (source_after, target_after))
    ]
    old, new = (level["pair_cosine"] for level in levels)
    gains = (pair_cosines(source_after, target_after) - pair_cosines(source_before, target_before)).cpu().numpy()
    hit_before = (csls_ranks(source_before, target_before, relevant) == 1).cpu().numpy()
    hit_after = (csls_ranks(source_after, target_after, relevant) == 1).cpu().numpy()
    rng = np.random.default_rng(seed)
    chosen = _unshared(relevant.cpu().numpy())
    chosen = torch.as_tensor(np.sort(rng.permutation(chosen)[:MOST]), device=source_before.device)
    before = _similarities(source_before[chosen], target_before[chosen])
    after = _similarities(source_after[chosen], target_after[chosen])
    changes = [_change(before, after), _change(_scaled(before), _scaled(after))]
    raw, scaled = _specificity_tests(changes, permutations, seed)
    low, high = _interval(gains, seed)
    t_pvalue, wilcoxon_pvalue, effect = _paired(gains)
    found = SplitEvidence(
        pair_cosine_before=old,
        pair_cosine_after=new,
        pair_cosine_gain=new - old,
        pair_cosine_gain_pct=100 * (new - old) / abs(old) if old else 0.0,
        margin_before=levels[0]["margin"],
        margin_after=levels[1]["margin"],
        margin_gain=levels[1]["margin"] - levels[0]["margin"],
        csls_p_at_1_before=float(hit_before.mean()),
        csls_p_at_1_after=float(hit_after.mean()),
        t_pvalue=t_pvalue,
        wilcoxon_pvalue=wilcoxon_pvalue,
        cohens_dz=effect,
        gain_ci_low=low,
        gain_ci_high=high,
        mcnemar_pvalue=_mcnemar(hit_before, hit_after),
        specificity_gain=raw.gain,
        specificity_pvalue=raw.pvalue,
        specificity_harm_pvalue=max(raw.pvalue_less, scaled.pvalue_less),
        scaled_specificity_gain=scaled.gain,
        scaled_specificity_pvalue=scaled.pvalue,
    )
    return found, raw


def holm(pvalues: Sequence[float]) -> list[float]:
    """Adjusts p-values so that the chance of any false finding among them stays below alpha (Holm 1979)."""
    adjusted, floor = [0.0] * len(pvalues), 0.0
    for position, index in enumerate(sorted(range(len(pvalues)), key=pvalues.__getitem__)):
        floor = max(floor, min(1.0, (len(pvalues) - position) * pvalues[index]))
        adjusted[index] = floor
    return adjusted


def judge(
    train: SplitEvidence,
    control: SplitEvidence,
    *,
    perplexity_increase: float | None,
    max_perplexity_increase: float,
    alpha: float = 0.05,
) -> Verdict:
    """Gives a run its label: harmed, else aligned, else memorised, else inflated, else none.

    Two questions, two Holm families, each wrong in at most `alpha` of the runs: claims (specificity of control and of
    train) and alarms (control's specificity downwards and McNemar). A specificity p-value is the larger of the raw and
    the scaled one, so both must pass. "Not worse" means that the margin rose, and that P@1 rose, or fell by no more
    than chance explains (McNemar p of at least 0.2). The t-test, uncorrected, can earn no more than `inflated`.
    Perplexity increases are relative (0.1 = 10 %), the worst of the languages; one that isn't finite is harm.
    """
    p = _adjusted(
        {
            "control/specificity_pvalue": max(control.specificity_pvalue, control.scaled_specificity_pvalue),
            "train/specificity_pvalue": max(train.specificity_pvalue, train.scaled_specificity_pvalue),
        }
    ) | _adjusted(
        {
            "control/specificity_harm_pvalue": control.specificity_harm_pvalue,
            "control/mcnemar_pvalue": control.mcnemar_pvalue,
        }
    )
    specific, learnt = (
        p[f"{split}/specificity_pvalue"] < alpha and found.specificity_gain > 0
        for split, found in (("control", control), ("train", train))
    )
    lost = control.csls_p_at_1_after < control.csls_p_at_1_before
    retrieval = f"CSLS P@1 {control.csls_p_at_1_before:.3f} before, {control.csls_p_at_1_after:.3f} after"
    unseen = f"specificity gain {control.specificity_gain:+.3g}, p = {p['control/specificity_pvalue']:.2g} after Holm"
    seen = f"specificity gain {train.specificity_gain:+.3g}, p = {p['train/specificity_pvalue']:.2g} after Holm"

    if perplexity_increase is not None and not perplexity_increase <= max_perplexity_increase:
        reason = f"Perplexity changed by {perplexity_increase:+.0%}; {max_perplexity_increase:+.0%} is allowed."
        return Verdict("harmed", reason, p)
    if lost and (pvalue := p["control/mcnemar_pvalue"]) < alpha:
        return Verdict("harmed", f"Retrieval of unseen words fell ({retrieval}, p = {pvalue:.2g} after Holm).", p)
    if control.specificity_gain < 0 and (pvalue := p["control/specificity_harm_pvalue"]) < alpha:
        gain = f"specificity gain {control.specificity_gain:+.3g}, p = {pvalue:.2g} after Holm"
        return Verdict("harmed", f"Unseen pairs drew apart, compared with random matchings ({gain}).", p)
    if specific:
        gain = f"Unseen pairs drew together beyond random matchings ({unseen})"
        if control.margin_gain <= 0:
            return Verdict("none", f"{gain}, but with the pairs that share words the margin did not rise.", p)
        if lost and control.mcnemar_pvalue < WORSE:
            return Verdict("none", f"{gain}, but too many of them lost their place as nearest ({retrieval}).", p)
        return Verdict("aligned", f"{gain}, and retrieval is no worse ({retrieval}).", p)
    if learnt:
        gain = f"Trained pairs drew together beyond random matchings ({seen})"
        return Verdict("memorised", f"{gain}, but unseen pairs did not ({unseen}).", p)
    for split, found, specificity in (("unseen", control, unseen), ("trained", train, seen)):
        if found.pair_cosine_gain > 0 and found.t_pvalue < alpha:
            gain = f"The cosine of {split} pairs rose by {found.pair_cosine_gain:.3g} (t-test p = {found.t_pvalue:.2g})"
            return Verdict("inflated", f"{gain}, but no more than random matchings explain ({specificity}).", p)
    return Verdict("none", f"Unseen pairs gained no more than random matchings explain ({unseen}).", p)


def _adjusted(family: dict[str, float]) -> dict[str, float]:
    return dict(zip(family, holm(list(family.values())), strict=True))


def _array(similarities: np.ndarray | Tensor) -> Float[np.ndarray, "n n"]:
    if isinstance(similarities, Tensor):
        return similarities.detach().to("cpu", torch.float64).numpy()
    return similarities.astype(np.float64)


def _epsilon(similarities: np.ndarray | Tensor) -> float:
    if isinstance(similarities, Tensor):
        return torch.finfo(similarities.dtype).eps
    kind = similarities.dtype if np.issubdtype(similarities.dtype, np.floating) else np.float64
    return float(np.finfo(kind).eps)


def _double_centred(matrix: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """Takes away row and column means: what a word gains with every partner says nothing about its own."""
    if not len(matrix):
        return matrix
    return matrix - matrix.mean(0) - matrix.mean(1, keepdims=True) + matrix.mean()


class _Change(NamedTuple):
    """What the similarities gained, double-centred, and its root mean square: 0 if no more than rounding error."""

    gains: Float[np.ndarray, "n n"]
    spread: float


def _change(before: np.ndarray | Tensor, after: np.ndarray | Tensor) -> _Change:
    old, new = _array(before), _array(after)
    if not (np.isfinite(old).all() and np.isfinite(new).all()):
        raise ValueError("a similarity isn't finite")
    gains = _double_centred(new - old)
    spread = float(np.sqrt(np.mean(gains**2))) if len(gains) > 1 else 0.0
    rounding = 4 * max(_epsilon(before), _epsilon(after)) * max(np.abs(old).max(initial=0), np.abs(new).max(initial=0))
    return _Change(gains, spread if spread > rounding else 0.0)


def _specificity_tests(changes: Sequence[_Change], permutations: int, seed: int) -> list[SpecificityResult]:
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


def _compared(change: _Change, gains: Float[np.ndarray, " p"], scores: Float[np.ndarray, " p"]) -> SpecificityResult:
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


def _matched(change: _Change, cells: Int[np.ndarray, "p n"]) -> tuple[Float[np.ndarray, " p"], Float[np.ndarray, " p"]]:
    """Mean gain of each matching, and that over its standard error (floored, so that none is divided by 0).

    A row of `cells` holds where the pairs of one matching stand in the matrix, counted row by row.
    """
    n = len(change.gains)
    gains = change.gains.ravel()[cells]
    mean = gains.mean(1)
    variance = np.einsum("ij,ij->i", gains, gains) / n - mean**2
    return mean, mean / np.sqrt(np.maximum(variance, (1e-6 * change.spread) ** 2) / n)


def _similarities(source: Float[Tensor, "n d"], target: Float[Tensor, "n d"]) -> Float[np.ndarray, "n n"]:
    return (source.double() @ target.double().T).cpu().numpy()


def _scaled(similarities: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """Similarities, double-centred, in units of the spread that each one's row and column have over mismatches.

    One spread for all would not do: where some words' cosines vary more than others' (at an attention sink, those of
    long words), the error of that one spread shifts the gains of all pairs together, and no permutation sees it.
    """
    n = len(similarities)
    centred = _double_centred(similarities)
    squares = centred**2
    np.fill_diagonal(squares, 0)
    pairs = max(1, n - 1)
    rows, columns = np.sqrt(squares.sum(1) / pairs), np.sqrt(squares.sum(0) / pairs)
    unit = np.outer(rows, columns) / max(np.sqrt(squares.sum() / (pairs * n)), 1e-12)
    return np.divide(centred, unit, out=np.zeros_like(centred), where=unit > 1e-12)


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


def _paired(gains: Float[np.ndarray, " n"]) -> tuple[float, float, float]:
    """P-values of the paired t-test and of Wilcoxon's signed-rank test (both two-sided), and Cohen's d_z.

    If every pair gains exactly the same, t is infinite; its p is then that of n equal signs, 2^(1−n), and d_z ±10⁶.
    """
    if not np.any(gains):
        return 1.0, 1.0, 0.0
    n, mean = len(gains), float(gains.mean())
    deviation = float(gains.std(ddof=1)) if n > 1 else 0.0
    same = deviation <= 1e-12 * abs(mean)
    effect = float(np.copysign(LARGEST_EFFECT, mean)) if same else mean / deviation
    effect = float(np.clip(effect, -LARGEST_EFFECT, LARGEST_EFFECT))
    if n < FEWEST:
        return 1.0, 1.0, effect
    t_pvalue = 2.0 ** (1 - n) if same else 2 * float(stats.t.sf(abs(effect) * np.sqrt(n), n - 1))
    wilcoxon_pvalue = float(np.asarray(stats.wilcoxon(gains))[1])
    return max(t_pvalue, sys.float_info.min), max(wilcoxon_pvalue, sys.float_info.min), effect


def _interval(gains: Float[np.ndarray, " n"], seed: int) -> tuple[float, float]:
    """BCa bootstrap 95 % interval of the mean gain (Efron 1987)."""
    if len(gains) < FEWEST:
        return -2.0, 2.0
    mean = float(gains.mean())
    if gains.std() <= 1e-12 * abs(mean):
        return mean, mean
    rng = np.random.default_rng(seed)
    rows = max(1, CACHED // len(gains))
    found = stats.bootstrap((gains,), np.mean, n_resamples=RESAMPLES, batch=rows, rng=rng).confidence_interval
    return float(found.low), float(found.high)


def _mcnemar(before: Bool[np.ndarray, " n"], after: Bool[np.ndarray, " n"]) -> float:
    """Exact McNemar test, two-sided: of the words whose answer changed, were as many lost as won?"""
    won, lost = int((after & ~before).sum()), int((before & ~after).sum())
    return float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0
