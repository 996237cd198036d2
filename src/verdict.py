"""What the evidence of a run amounts to: one label and its reason in plain words. One function decides."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from src.specificity import FEWEST, LEFT_OUT

WORSE = 0.2  # a fall in P@1 with a McNemar p below this blocks a claim: blocking takes less evidence than claiming
ENOUGH = 30  # words that aren't look-alikes, for a claim about translation rather than spelling


@dataclass(frozen=True)
class SplitEvidence:
    """What one split shows at one layer; gains are after less before, P@1 by CSLS, p-values uncorrected.

    P@1, `words_won` and `words_lost` count source words. The `specificity_` fields are of the raw cosines. The
    `scaled_` ones are of cosines in units of the spread of their words' mismatches: a change that only spreads or
    squeezes all cosines has no scaled gain. The verdict wants both to agree: `specificity_harm_pvalue`, `near_pvalue`
    and the `left_out_` ones (without the 5 % that gained most) are already the larger of the two.
    """

    n_pairs: int | float
    n_words: int | float
    pair_cosine_before: float
    pair_cosine_after: float
    pair_cosine_gain: float
    pair_cosine_gain_pct: float
    margin_before: float
    margin_after: float
    margin_gain: float
    csls_p_at_1_before: float
    csls_p_at_1_after: float
    words_won: int | float
    words_lost: int | float
    t_pvalue: float
    wilcoxon_pvalue: float
    cohens_dz: float
    gain_ci_low: float
    gain_ci_high: float
    mcnemar_pvalue: float
    specificity_pairs: int | float
    specificity_gain: float
    specificity_sd: float
    specificity_pvalue: float
    specificity_harm_pvalue: float
    scaled_specificity_gain: float
    scaled_specificity_sd: float
    scaled_specificity_pvalue: float
    left_out_specificity_pvalue: float
    near_gain: float
    near_pvalue: float
    left_out_near_pvalue: float
    share_gained: float


@dataclass(frozen=True)
class Verdict:
    """A run's label, the reason in one or two sentences, and the Holm-adjusted p-values it rests on."""

    label: Literal["aligned", "drawn together", "memorised", "inflated", "harmed", "none"]
    reason: str
    adjusted: dict[str, float]


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
    perplexities: Mapping[str, tuple[float, float, float]] | None = None,
    unalike: SplitEvidence | None = None,
    alpha: float = 0.05,
) -> Verdict:
    """Gives a run its label: harmed, else aligned or drawn together, else memorised, else inflated, else none.

    Two questions, two Holm families, each wrong in at most `alpha` of the runs: claims (specificity of control and of
    train) and alarms (control's specificity downwards and McNemar). A specificity p-value is the larger of the raw and
    the scaled one, so both must pass. What is asked only after such a claim needs no family of its own: near words,
    once control has beaten random matchings; whether train gained more than control, once train has and control
    hasn't, at Holm's first level (p × 2).

    Claims rest on `unalike`, the control words that aren't look-alikes of their translations, where ENOUGH are left;
    None where no spelling is known. "Not worse" means that the margin rose, and that P@1 rose, or fell by no more than
    chance explains (McNemar p of at least 0.2). The t-test, uncorrected, can earn no more than `inflated`.
    Perplexity increases are relative (0.1 = 10 %). `perplexities` has each language's, with its 95 % interval: harm is
    a lower bound above what is allowed, by chance alone in 2.5 % of runs a language at the most. Without them the
    worst increase itself, `perplexity_increase`, decides. One that isn't finite is harm.
    """
    claimed = claimed_of(control, unalike)
    p = _adjusted(
        {
            "control/specificity_pvalue": _specificity_pvalue(claimed),
            "train/specificity_pvalue": _specificity_pvalue(train),
        }
    ) | _adjusted(
        {
            "control/specificity_harm_pvalue": control.specificity_harm_pvalue,
            "control/mcnemar_pvalue": control.mcnemar_pvalue,
        }
    )
    p["train/excess_pvalue"] = max(p["train/specificity_pvalue"], min(1.0, 2 * excess_pvalue(train, control)))
    lost = _perplexity_harm(perplexity_increase, perplexities or {}, max_perplexity_increase)
    if harm := lost or _harm(control, p, alpha):
        return Verdict("harmed", harm, p)
    label, reason = _gain(train, control, claimed, unalike, p, alpha)
    return Verdict(label, reason + _open_question(perplexities or {}, max_perplexity_increase), p)


def claimed_of(control: SplitEvidence, unalike: SplitEvidence | None) -> SplitEvidence:
    """What claims rest on: the control words that aren't look-alikes, where ENOUGH of them are left."""
    return control if unalike is None or unalike.n_words < ENOUGH else unalike


def excess_pvalue(train: SplitEvidence, control: SplitEvidence) -> float:
    """One-sided p-value that trained pairs gained more, beyond random matchings, than unseen ones.

    Welch's t-test, in which the train split counts as if as many pairs as control has had been drawn from it, so that
    its size alone decides nothing. The larger p-value of raw and scaled gains.
    """
    n = min(train.specificity_pairs, control.specificity_pairs)
    if n < FEWEST:
        return 1.0
    found = []
    for kind in ("specificity", "scaled_specificity"):
        means, deviations = (
            [getattr(split, f"{kind}_{what}") for split in (train, control)] for what in ("gain", "sd")
        )
        if not any(deviations):
            found.append(0.5**n if means[0] > means[1] else 1.0)
            continue
        welch = stats.ttest_ind_from_stats(
            means[0],
            deviations[0],
            n,
            means[1],
            deviations[1],
            control.specificity_pairs,
            equal_var=False,
            alternative="greater",
        )
        found.append(max(float(welch.pvalue), sys.float_info.min))
    return max(found)


def _specificity_pvalue(split: SplitEvidence) -> float:
    return max(split.specificity_pvalue, split.scaled_specificity_pvalue)


def _adjusted(family: dict[str, float]) -> dict[str, float]:
    return dict(zip(family, holm(list(family.values())), strict=True))


def _perplexity_harm(
    increase: float | None, perplexities: Mapping[str, tuple[float, float, float]], allowed: float
) -> str:
    """What the language model lost, in a sentence; empty where no harm is shown."""
    if increase is not None and (not math.isfinite(increase) or (not perplexities and increase > allowed)):
        return f"Perplexity changed by {increase:+.0%}; {allowed:+.0%} is allowed."
    if not perplexities:
        return ""
    language, (change, low, high) = max(perplexities.items(), key=lambda item: item[1][1])
    if low <= allowed:
        return ""
    return f"Perplexity in {language} changed by {change:+.0%} [{low:+.0%}, {high:+.0%}]; {allowed:+.0%} is allowed."


def _harm(control: SplitEvidence, p: dict[str, float], alpha: float) -> str:
    """What harm was done to unseen words, in a sentence; empty where none is shown."""
    lost = control.csls_p_at_1_after < control.csls_p_at_1_before
    if lost and (pvalue := p["control/mcnemar_pvalue"]) < alpha:
        return f"Retrieval of unseen words fell ({_retrieval(control)}, p = {pvalue:.2g} after Holm)."
    if control.specificity_gain < 0 and (pvalue := p["control/specificity_harm_pvalue"]) < alpha:
        gain = f"specificity gain {control.specificity_gain:+.3g}, p = {pvalue:.2g} after Holm"
        return f"Unseen pairs drew apart, compared with random matchings ({gain})."
    return ""


def _gain(
    train: SplitEvidence,
    control: SplitEvidence,
    claimed: SplitEvidence,
    unalike: SplitEvidence | None,
    p: dict[str, float],
    alpha: float,
) -> tuple[Literal["aligned", "drawn together", "memorised", "inflated", "none"], str]:
    """The label and its reason, of a run that did no harm."""
    unseen, seen = (
        f"specificity gain {split.specificity_gain:+.3g}, p = {p[f'{name}/specificity_pvalue']:.2g} after Holm"
        for name, split in (("control", claimed), ("train", train))
    )
    specific, learnt = (
        p[f"{name}/specificity_pvalue"] < alpha and split.specificity_gain > 0
        for name, split in (("control", claimed), ("train", train))
    )
    who = "Unseen pairs" if claimed is control else "Unseen pairs that aren't look-alikes"
    if specific:
        gain = f"{who} drew together beyond random matchings ({unseen})"
        if min(control.margin_gain, claimed.margin_gain) <= 0:
            return "none", f"{gain}, but with the pairs that share words the margin did not rise."
        for split in (control, claimed):
            if split.csls_p_at_1_after < split.csls_p_at_1_before and split.mcnemar_pvalue < WORSE:
                return "none", f"{gain}, but too many words lost their place as nearest ({_retrieval(split)})."
        if doubt := _doubt(claimed, unalike, alpha):
            return "drawn together", f"{gain}, {doubt}. Retrieval is no worse ({_retrieval(claimed)})."
        near = f"near words (p = {claimed.near_pvalue:.2g})"
        return "aligned", f"{gain} and beyond {near}, and retrieval is no worse ({_retrieval(claimed)})."
    if control.specificity_gain > 0 and (whole := _specificity_pvalue(control)) < alpha and claimed is not control:
        gain = f"{who} gained no more than random matchings explain ({unseen})"
        return "none", f"{gain}; with the look-alikes unseen pairs did (p = {whole:.2g}), so spelling may explain it."
    if learnt:
        gain = f"Trained pairs drew together beyond random matchings ({seen})"
        more = f"p = {p['train/excess_pvalue']:.2g} after Holm"
        if p["train/excess_pvalue"] < alpha:
            return "memorised", f"{gain} and more than unseen ones ({more}), which show no such gain ({unseen})."
        return "none", (
            f"{gain}. {who} show no such gain ({unseen}), but it isn't shown either that they gained less ({more})."
        )
    for name, split, specificity in ((who, claimed, unseen), ("Trained pairs", train, seen)):
        if split.pair_cosine_gain > 0 and split.cohens_dz >= 0 and split.t_pvalue < alpha:
            gain = f"{name} have a cosine higher by {split.pair_cosine_gain:.3g} (t-test p = {split.t_pvalue:.2g})"
            return "inflated", f"{gain}, but gained no more than random matchings explain ({specificity})."
    return "none", f"{who} gained no more than random matchings explain ({unseen})."


def _doubt(claimed: SplitEvidence, unalike: SplitEvidence | None, alpha: float) -> str:
    """Why a gain beyond random matchings may be about something else than translation; empty where it isn't."""
    if claimed.near_pvalue >= alpha or claimed.near_gain <= 0:
        near = f"near words, p = {claimed.near_pvalue:.2g}"
        return f"but not beyond {near}: topic, length, spelling or hubs may explain it"
    if unalike is not None and unalike.n_words < ENOUGH:
        left = f"only {unalike.n_words:.0f} unseen words aren't look-alikes"
        return f"but {left}; {ENOUGH} are needed to tell translation from spelling"
    for name in ("left_out_specificity_pvalue", "left_out_near_pvalue"):
        if (pvalue := getattr(claimed, name)) >= alpha:
            shown = f"p = {pvalue:.2g}; {claimed.share_gained:.0%} of all gained"
            return f"but not without the {LEFT_OUT:.0%} of them that gained most ({shown}): a few words may carry it"
    return ""


def _open_question(perplexities: Mapping[str, tuple[float, float, float]], allowed: float) -> str:
    unsure = {language: found for language, found in perplexities.items() if found[1] <= allowed < found[2]}
    if not unsure:
        return ""
    language, (_, low, high) = max(unsure.items(), key=lambda item: item[1][2])
    return (
        f" It can't be told whether perplexity in {language} rose by more than the {allowed:.0%} allowed "
        f"(95 % interval {low:+.0%} to {high:+.0%})."
    )


def _retrieval(split: SplitEvidence) -> str:
    words = f"{split.n_words:.0f} words: " if split.n_words else ""
    return f"{words}CSLS P@1 {split.csls_p_at_1_before:.3f} before, {split.csls_p_at_1_after:.3f} after"
