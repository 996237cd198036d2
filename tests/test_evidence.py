"""The tests against scipy and hand-worked cases, the verdict's branches, and a small calibration of the whole claim."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from bench.calibration import scenarios, simulate
from src import evidence
from src.evidence import SplitEvidence, gather_evidence, holm, judge, specificity_test

RNG = np.random.default_rng(0)


def unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=1)


def alone(n: int) -> Tensor:
    return torch.arange(n)[:, None]


def matrices(n: int, gain: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    before = rng.normal(size=(n, n)) / 10
    return before, before + rng.normal(size=(n, n)) / 10 + gain * np.eye(n)


# The specificity test


def test_specificity_gain_by_hand():
    before, after = np.zeros((3, 3)), np.array([[0.3, 0.1, 0.0], [0.0, 0.6, 0.1], [0.1, 0.0, 0.3]])
    assert specificity_test(before, after).gain == pytest.approx(0.4 - 0.05)


def test_specificity_pvalue_is_that_of_all_matchings():
    """With five words all 120 matchings can be gone through: here by the definition, one at a time."""
    for seed in range(5):
        before, after = matrices(5, 0.1, seed)
        change = after - before
        change = change - change.mean(0) - change.mean(1)[:, None] + change.mean()

        def score(matching, change=change):
            gains = [change[i, j] for i, j in enumerate(matching)]
            return np.mean(gains) / np.std(gains)

        scores = [score(matching) for matching in itertools.permutations(range(5))]
        exact = np.mean([each >= score(range(5)) - 1e-12 for each in scores])
        found = specificity_test(before, after, permutations=20_000, seed=seed)
        assert found.pvalue == pytest.approx(exact, abs=0.015)
        assert found.pvalue + found.pvalue_less == pytest.approx(1 + 1 / 120, abs=0.01)


def test_specificity_finds_what_is_there_and_its_opposite():
    for gain, near, far in ((0.1, "pvalue", "pvalue_less"), (-0.1, "pvalue_less", "pvalue")):
        found = specificity_test(*matrices(60, gain), permutations=999)
        assert found.gain == pytest.approx(gain, abs=0.05)
        assert getattr(found, near) == 1 / 1000
        assert getattr(found, far) > 0.99
        assert found.null.shape == (999,)
        assert abs(found.null.mean()) < 0.002


@pytest.mark.parametrize("lift", [0.0, 0.1, -0.3, 1e-7])
@pytest.mark.parametrize("kind", ["float64", "float32", "torch"])
def test_a_lift_of_all_cosines_is_nothing(lift, kind):
    """Their sums differ by rounding alone, and rounding must not decide."""
    before = np.random.default_rng(1).uniform(-1, 1, (80, 80))
    after = before + lift
    if kind == "float32":
        before, after = before.astype(np.float32), after.astype(np.float32)
    if kind == "torch":
        before, after = torch.from_numpy(before).float(), torch.from_numpy(after).float()
    found = specificity_test(before, after, permutations=200)
    assert (found.gain, found.pvalue, found.pvalue_less) == (0, 1, 1)
    rows = np.random.default_rng(2).uniform(size=(80, 1))  # a word that gains with every partner gains nothing
    assert specificity_test(np.zeros((80, 80)), rows + rows.T, permutations=200).pvalue == 1


def test_specificity_of_ties():
    """All but one word unchanged: that word keeps its own partner in a fifth of the matchings."""
    after = np.zeros((5, 5))
    after[2, 2] = 1
    assert specificity_test(np.zeros((5, 5)), after).pvalue == pytest.approx(0.2, abs=0.02)
    identity = specificity_test(np.zeros((20, 20)), np.eye(20), permutations=500)  # every pair gains the same
    assert identity.gain == pytest.approx(1)
    assert identity.pvalue == 1 / 501


def test_specificity_refuses_and_repeats():
    before, after = matrices(30, 0.03)
    assert specificity_test(before, after, permutations=300, seed=3).pvalue == (
        specificity_test(torch.from_numpy(before), torch.from_numpy(after), permutations=300, seed=3).pvalue
    )
    for n in (1, 2, 4):
        found = specificity_test(np.zeros((n, n)), np.eye(n), permutations=50)
        assert (found.pvalue, found.pvalue_less, found.null.shape) == (1, 1, (50,))
    after[0, 1] = math.nan
    with pytest.raises(ValueError, match="finite"):
        specificity_test(before, after)


def test_changes_tested_together_share_matchings_and_nothing_else():
    before, after = matrices(30, 0.03)
    measured = [(before, before), (before, after), (after, before + np.eye(30))]
    together = evidence._specificity_tests([evidence._change(*pair) for pair in measured], 300, 3)
    for pair, found in zip(measured, together, strict=True):
        by_itself = specificity_test(*pair, permutations=300, seed=3)
        assert (found.gain, found.pvalue, found.pvalue_less) == (
            by_itself.gain,
            by_itself.pvalue,
            by_itself.pvalue_less,
        )
        np.testing.assert_array_equal(found.null, by_itself.null)
    assert not np.array_equal(together[0].null, together[1].null)


# The paired tests


def test_paired_tests_equal_scipys():
    gains = RNG.normal(0.1, 1, 80)
    t_pvalue, wilcoxon_pvalue, effect = evidence._paired(gains)
    assert t_pvalue == pytest.approx(stats.ttest_rel(gains + 1, np.ones(80)).pvalue)
    assert wilcoxon_pvalue == pytest.approx(np.asarray(stats.wilcoxon(gains))[1])
    assert effect == pytest.approx(gains.mean() / gains.std(ddof=1))
    low, high = evidence._interval(gains, 0)
    expected = stats.t.interval(0.95, 79, gains.mean(), gains.std(ddof=1) / 80**0.5)
    assert (low, high) == pytest.approx(expected, abs=0.03)


def test_degenerate_gains_have_defined_answers(monkeypatch):
    monkeypatch.setattr(evidence, "RESAMPLES", 500)
    assert evidence._paired(np.zeros(50)) == (1, 1, 0)
    assert evidence._interval(np.zeros(50), 0) == (0, 0)
    same = np.full(50, -0.1)
    t_pvalue, wilcoxon_pvalue, effect = evidence._paired(same)
    assert t_pvalue == 2.0**-49
    assert 0 < wilcoxon_pvalue < 1e-6
    assert effect == -1e6
    assert evidence._interval(same, 0) == pytest.approx((-0.1, -0.1))
    assert evidence._paired(np.array([0.1, 0.2, 0.3]))[:2] == (1, 1)
    assert evidence._interval(np.array([0.1, 0.2, 0.3]), 0) == (-2, 2)
    assert evidence._paired(RNG.normal(1, 1e-3, 5000))[0] > 0  # a p-value is never 0
    for n in range(1, 12):
        for gains in (np.eye(1, n)[0], np.round(RNG.normal(size=n)), RNG.normal(size=n) * 1e-12):
            found = np.array([*evidence._paired(gains), *evidence._interval(gains, 0)])
            assert np.isfinite(found).all()


def test_mcnemar_by_hand():
    before, after = (np.array(bits, dtype=bool) for bits in ([1, 1, 1, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0, 1, 1]))
    assert evidence._mcnemar(before, after) == pytest.approx(2 * (1 + 6) / 2**6)  # five lost, one won
    assert evidence._mcnemar(before, before) == 1


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1, 1]
    assert holm([]) == []


# Evidence of one split


def vectors(n: int, seed: int = 0, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    concept, a, b = (torch.randn(n, 32, generator=draw) for _ in range(3))
    return unit(concept + noise * a), unit(concept + noise * b)


def test_evidence_of_a_split():
    before, after = vectors(60, noise=1.5), vectors(60, noise=1.0)
    found, result = gather_evidence(*before, *after, alone(60), permutations=500)
    cosines = [(a * b).sum(1).double().numpy() for a, b in (before, after)]
    assert found.pair_cosine_before == pytest.approx(cosines[0].mean(), abs=1e-6)
    assert found.pair_cosine_gain_pct == pytest.approx(100 * (cosines[1].mean() / cosines[0].mean() - 1), abs=1e-3)
    assert found.t_pvalue == pytest.approx(stats.ttest_rel(cosines[1], cosines[0]).pvalue, rel=1e-3)
    assert found.gain_ci_low < found.pair_cosine_gain < found.gain_ci_high
    assert found.margin_gain == pytest.approx(found.specificity_gain) == pytest.approx(result.gain)
    assert found.csls_p_at_1_after > found.csls_p_at_1_before
    assert found.specificity_pvalue == result.pvalue == 1 / 501
    assert found.scaled_specificity_gain > 0
    assert found.specificity_harm_pvalue > 0.9
    json.dumps(dataclasses.asdict(found), allow_nan=False)
    back, _ = gather_evidence(*after, *before, alone(60), permutations=500)
    assert back.specificity_harm_pvalue == 1 / 501


def test_no_change_is_no_evidence():
    same = vectors(40)
    found, _ = gather_evidence(*same, *same, alone(40), permutations=100)
    ps = [value for name, value in dataclasses.asdict(found).items() if name.endswith("pvalue")]
    assert ps == [1] * len(ps)
    assert found.cohens_dz == found.specificity_gain == found.scaled_specificity_gain == 0
    assert verdict(found, found).label == "none"


@pytest.mark.parametrize("n", [1, 3, 12])
def test_every_number_is_finite(n):
    collapsed = unit(torch.ones(n, 32))
    for before, after in (
        (vectors(n), vectors(n, 1)),
        (vectors(n), (collapsed, collapsed)),
        ((collapsed, collapsed), vectors(n)),
    ):
        found, _ = gather_evidence(*before, *after, alone(n), permutations=100)
        json.dumps(dataclasses.asdict(found), allow_nan=False)
        if n < 5:
            assert found.specificity_pvalue == found.specificity_harm_pvalue == found.t_pvalue == 1
    with pytest.raises(ValueError, match="no pairs"):
        none = torch.zeros(0, 32)
        gather_evidence(none, none, none, none, torch.zeros(0, 1, dtype=torch.int64))


def test_a_collapse_is_harm():
    collapsed = unit(torch.ones(60, 32))
    found, _ = gather_evidence(*vectors(60), collapsed, collapsed, alone(60), permutations=500)
    assert verdict(found, found).label == "harmed"


def test_spreading_all_cosines_is_not_alignment():
    """Taking half of a common offset away doubles the margin; words have come no nearer to their translations."""
    source, target = vectors(60, noise=1.5)
    offset = torch.zeros(32).index_fill_(0, torch.tensor([0]), 4.0)
    before, after = ((unit(source + c * offset), unit(target + c * offset)) for c in (1.0, 0.5))
    found, _ = gather_evidence(*before, *after, alone(60), permutations=500)
    assert found.margin_gain > 0.02
    assert found.specificity_pvalue == 1 / 501
    assert found.scaled_specificity_pvalue > 0.05
    assert verdict(found, found).label == "none"
    squeezed, _ = gather_evidence(*after, *before, alone(60), permutations=500)
    assert squeezed.margin_gain < -0.02
    assert verdict(squeezed, squeezed).label == "inflated"  # not harmed: the order of neighbours is as it was


def test_pairs_that_share_words_count_once():
    relevant = np.array([[0, 1, -1], [1, 0, -1], [2, -1, -1], [3, 4, 2]])
    relevant = np.vstack([relevant, [[4, -1, -1]]])
    assert evidence._unshared(relevant).tolist() == [0, 2, 4]


def test_large_splits_are_sampled(monkeypatch):
    monkeypatch.setattr(evidence, "MOST", 50)
    before, after = vectors(300), vectors(300, 1)
    first, again, other = (
        gather_evidence(*before, *after, alone(300), permutations=50, seed=seed)[0] for seed in (0, 0, 1)
    )
    assert first == again
    assert first.specificity_gain != other.specificity_gain
    assert first.margin_gain == other.margin_gain


# The verdict

NOTHING = SplitEvidence(**{field.name: 0.0 for field in dataclasses.fields(SplitEvidence)})
NOTHING = dataclasses.replace(
    NOTHING, **{field.name: 1.0 for field in dataclasses.fields(SplitEvidence) if field.name.endswith("pvalue")}
)
SPECIFIC = dataclasses.replace(
    NOTHING, specificity_gain=0.03, specificity_pvalue=0.001, scaled_specificity_pvalue=0.002, margin_gain=0.03
)
RISEN = {"pair_cosine_gain": 0.1, "t_pvalue": 1e-60}
FALLEN = {"csls_p_at_1_before": 0.5, "csls_p_at_1_after": 0.3}
APART = {"specificity_gain": -0.03, "specificity_harm_pvalue": 0.001}
verdict = partial(judge, perplexity_increase=0.05, max_perplexity_increase=0.1)


def but(found: SplitEvidence, **changes: float) -> SplitEvidence:
    return dataclasses.replace(found, **changes)


@pytest.mark.parametrize(
    ("train", "control", "perplexity", "label"),
    [
        (NOTHING, NOTHING, None, "none"),
        (SPECIFIC, SPECIFIC, None, "aligned"),
        (NOTHING, SPECIFIC, None, "aligned"),
        (SPECIFIC, but(SPECIFIC, **RISEN), 0.1, "aligned"),  # exactly what is allowed
        (SPECIFIC, but(SPECIFIC, specificity_pvalue=0.04), None, "aligned"),  # the second in Holm's order
        (NOTHING, but(SPECIFIC, specificity_pvalue=0.04), None, "none"),  # the first: 0.08
        # not worse
        (SPECIFIC, but(SPECIFIC, **FALLEN, mcnemar_pvalue=0.5), None, "aligned"),
        (SPECIFIC, but(SPECIFIC, **FALLEN, mcnemar_pvalue=0.1), None, "none"),
        (SPECIFIC, but(SPECIFIC, margin_gain=-0.01), None, "none"),
        # both geometries must agree
        (NOTHING, but(SPECIFIC, scaled_specificity_pvalue=0.3), None, "none"),
        (NOTHING, but(SPECIFIC, specificity_pvalue=0.3), None, "none"),
        (but(SPECIFIC, scaled_specificity_pvalue=0.3), NOTHING, None, "none"),
        # harm comes first
        (SPECIFIC, SPECIFIC, 0.11, "harmed"),
        (SPECIFIC, SPECIFIC, math.nan, "harmed"),
        (SPECIFIC, SPECIFIC, math.inf, "harmed"),
        (SPECIFIC, but(SPECIFIC, **FALLEN, mcnemar_pvalue=0.001), None, "harmed"),
        (NOTHING, but(NOTHING, **FALLEN, mcnemar_pvalue=0.03), None, "none"),  # 0.06 after Holm
        (SPECIFIC, but(NOTHING, **APART), None, "harmed"),
        (NOTHING, but(NOTHING, **RISEN, **APART), None, "harmed"),
        (NOTHING, but(NOTHING, csls_p_at_1_after=0.4, mcnemar_pvalue=0.001), None, "none"),  # P@1 rose
        (but(NOTHING, **APART), NOTHING, None, "none"),  # harm is control's
        # memorised before inflated
        (SPECIFIC, NOTHING, None, "memorised"),
        (but(SPECIFIC, **RISEN), but(NOTHING, **RISEN), None, "memorised"),
        (but(NOTHING, **RISEN), but(NOTHING, **RISEN), None, "inflated"),
        (but(NOTHING, **RISEN), NOTHING, None, "inflated"),
        (NOTHING, but(NOTHING, **RISEN), None, "inflated"),
        (NOTHING, but(SPECIFIC, **RISEN, scaled_specificity_pvalue=0.3), None, "inflated"),
        (NOTHING, but(NOTHING, pair_cosine_gain=-0.1, t_pvalue=1e-60), None, "none"),
        (NOTHING, but(NOTHING, pair_cosine_gain=0.1, t_pvalue=0.06), None, "none"),
    ],
)
def test_verdict(train, control, perplexity, label):
    found = judge(train, control, perplexity_increase=perplexity, max_perplexity_increase=0.1)
    assert found.label == label
    assert found.reason.endswith(".")
    assert "\n" not in found.reason
    assert all(0 <= p <= 1 for p in found.adjusted.values())


def test_alpha_is_heard():
    assert judge(SPECIFIC, SPECIFIC, perplexity_increase=None, max_perplexity_increase=0.1, alpha=0.001).label == "none"


# Calibration: whole simulated runs, smaller and fewer than in bench/calibration.py


def called_aligned(name: str, runs: int, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(evidence, "RESAMPLES", 100)  # no verdict reads the interval
    scenario = next(scenario for scenario in scenarios() if scenario.name == name)
    outcomes = [simulate(scenario, seed, pairs=(80, 63), permutations=200) for seed in range(runs)]
    return sum(outcome.label == "aligned" for outcome in outcomes)


NULLS = [
    "all cosines rise alike",
    "random moves",
    "train pairs memorised",
    "all cosines spread out",
    "sink: random moves",
]


def test_nulls_are_rarely_called_aligned(monkeypatch):
    """At most 5 % of 200 runs, but for chance."""
    found = sum(called_aligned(name, 40, monkeypatch) for name in NULLS)
    assert stats.binomtest(found, 200, 0.05, alternative="greater").pvalue > 0.01


def test_true_effects_are_called_aligned(monkeypatch):
    """At least 90 % of 40 runs, but for chance."""
    found = called_aligned("true effect, d_z = 0.5", 40, monkeypatch)
    assert stats.binomtest(found, 40, 0.9, alternative="less").pvalue > 0.01
