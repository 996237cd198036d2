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
from bench.nulls import Change, moved
from src import evidence, paired, specificity
from src.evidence import SplitEvidence, gather_evidence, holm, judge, specificity_test
from src.paired import gain_interval, mcnemar, paired_tests

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
    together = specificity.specificity_tests([specificity.change(*pair) for pair in measured], 300, 3)
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
    t_pvalue, wilcoxon_pvalue, effect = paired_tests(gains, np.arange(80))
    assert t_pvalue == pytest.approx(stats.ttest_rel(gains + 1, np.ones(80)).pvalue)
    assert wilcoxon_pvalue == pytest.approx(np.asarray(stats.wilcoxon(gains))[1])
    assert effect == pytest.approx(gains.mean() / gains.std(ddof=1))
    low, high = gain_interval(gains, np.arange(80), 0)
    expected = stats.t.interval(0.95, 79, gains.mean(), gains.std(ddof=1) / 80**0.5)
    assert (low, high) == pytest.approx(expected, abs=0.03)


def test_pairs_of_one_word_are_one_observation():
    """Each word three times over: nothing may become surer than with each word once."""
    gains, words = RNG.normal(0.1, 1, 60), np.arange(60)
    once = (*paired_tests(gains, words), *gain_interval(gains, words, 0))
    thrice = (*paired_tests(gains.repeat(3), words.repeat(3)), *gain_interval(gains.repeat(3), words.repeat(3), 0))
    assert thrice == pytest.approx(once)
    naive = paired_tests(gains.repeat(3), np.arange(180))
    assert naive[0] < once[0] / 2  # what counting by pair would claim


def test_the_interval_is_around_the_mean_of_all_pairs():
    """One word with many pairs weighs as much as its pairs do, in the mean and in its interval."""
    words = np.concatenate([np.zeros(40, dtype=int), np.arange(1, 21)])
    gains = np.where(words == 0, 1.0, 0.0) + RNG.normal(0, 0.01, 60)
    low, high = gain_interval(gains, words, 0)
    assert low < gains.mean() < high
    assert high - low > 0.5  # with or without that word


def test_degenerate_gains_have_defined_answers(monkeypatch):
    monkeypatch.setattr(paired, "RESAMPLES", 500)
    fifty = np.arange(50)
    assert paired_tests(np.zeros(50), fifty) == (1, 1, 0)
    assert gain_interval(np.zeros(50), fifty, 0) == (0, 0)
    same = np.full(50, -0.1)
    t_pvalue, wilcoxon_pvalue, effect = paired_tests(same, fifty)
    assert t_pvalue == 2.0**-49
    assert 0 < wilcoxon_pvalue < 1e-6
    assert effect == -1e6
    assert gain_interval(same, fifty, 0) == pytest.approx((-0.1, -0.1))
    assert paired_tests(np.array([0.1, 0.2, 0.3]), np.arange(3))[:2] == (1, 1)
    assert paired_tests(RNG.normal(size=9), np.arange(9) // 3)[:2] == (1, 1)  # three words
    assert gain_interval(np.array([0.1, 0.2, 0.3]), np.arange(3), 0) == (-2, 2)
    assert paired_tests(RNG.normal(1, 1e-3, 5000), np.arange(5000))[0] > 0  # a p-value is never 0
    opposed = np.tile([0.1, -0.1], 6)  # of each word's two pairs one rises as the other falls
    assert gain_interval(opposed, np.arange(12) // 2, 0) == (0, 0)
    for n in range(1, 12):
        for gains in (np.eye(1, n)[0], np.round(RNG.normal(size=n)), RNG.normal(size=n) * 1e-12):
            for words in (np.arange(n), np.arange(n) // 2):
                found = np.array([*paired_tests(gains, words), *gain_interval(gains, words, 0)])
                assert np.isfinite(found).all()


def test_mcnemar_by_hand():
    before, after = (np.array(bits, dtype=bool) for bits in ([1, 1, 1, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0, 1, 1]))
    assert mcnemar(before, after) == pytest.approx(2 * (1 + 6) / 2**6)  # five lost, one won
    assert mcnemar(before, before) == 1


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
    assert (found.n_pairs, found.n_words, found.specificity_pairs) == (60, 60, 60)
    json.dumps(dataclasses.asdict(found), allow_nan=False)
    back, _ = gather_evidence(*after, *before, alone(60), permutations=500)
    assert back.specificity_harm_pvalue == 1 / 501


def thrice(vectors: tuple[Tensor, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
    """Every source three times, each with its own target and two more."""
    source, target = vectors
    return source.repeat_interleave(3, dim=0), torch.stack([target, *targets], dim=1).flatten(0, 1)


def test_a_word_with_three_translations_has_one_vote():
    """By pair the same words win three times over, and McNemar is that much surer of itself."""
    n, draw = 40, torch.Generator().manual_seed(3)
    others = unit(torch.randn(2, n, 32, generator=draw).flatten(0, 1)).unflatten(0, (2, n))
    before, after = (thrice(vectors(n, noise=noise), others) for noise in (1.5, 0.8))
    relevant = (torch.arange(3 * n) // 3 * 3)[:, None] + torch.arange(3)
    found, _ = gather_evidence(*before, *after, relevant, permutations=100)
    assert (found.n_pairs, found.n_words) == (3 * n, n)
    assert found.words_won > 5
    assert found.words_won - found.words_lost == round(n * (found.csls_p_at_1_after - found.csls_p_at_1_before))
    assert found.mcnemar_pvalue == pytest.approx(
        stats.binomtest(int(found.words_won), int(found.words_won + found.words_lost)).pvalue
    )
    assert found.specificity_pairs == n


def test_several_translations_do_not_make_the_null_surer(monkeypatch):
    """Counted by pair, McNemar gave p < 0.05 in 31 % of such splits."""
    monkeypatch.setattr(paired, "RESAMPLES", 20)
    splits = (moved(Change(translations=3))(np.random.default_rng(seed), 150) for seed in range(80))
    found = [gather_evidence(*split.vectors, split.relevant, permutations=10)[0] for split in splits]
    for name in ("mcnemar_pvalue", "t_pvalue"):
        surer = sum(getattr(one, name) < 0.05 for one in found)
        assert stats.binomtest(surer, 80, 0.05, alternative="greater").pvalue > 0.01


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


def change_of(gains: np.ndarray) -> specificity.Change:
    return specificity.change(np.zeros_like(gains), gains)


def test_a_gain_of_a_few_words_does_not_survive_without_them():
    gains = 0.1 * np.random.default_rng(0).normal(size=(60, 60))
    few = gains + np.diag([2.0] * 3 + [0.0] * 57)
    assert specificity.left_out_pvalue(change_of(few)) > 0.05
    assert specificity.left_out_pvalue(change_of(gains + 0.2 * np.eye(60))) < 1e-4
    assert specificity.left_out_pvalue(change_of(np.zeros((60, 60)))) == 1


def test_parts_of_a_split_choose_among_all_targets():
    before, after = vectors(60, noise=1.5), vectors(60, noise=1.0)
    among = np.arange(60) % 3 == 0
    part, _ = gather_evidence(*before, *after, alone(60), permutations=100, among=among)
    hits = (evidence.csls_ranks(*after, alone(60)) == 1).numpy()
    assert (part.n_pairs, part.n_words) == (20, 20)
    assert part.csls_p_at_1_after == pytest.approx(hits[among].mean())
    assert part.pair_cosine_after == pytest.approx((after[0] * after[1]).sum(1)[among].mean().item(), abs=1e-6)
    whole, _ = gather_evidence(*before, *after, alone(60), permutations=100)
    everything, _ = gather_evidence(*before, *after, alone(60), permutations=100, among=np.ones(60, dtype=bool))
    assert whole == everything


# The verdict

NOTHING = SplitEvidence(**{field.name: 0.0 for field in dataclasses.fields(SplitEvidence)})
NOTHING = dataclasses.replace(
    NOTHING, **{field.name: 1.0 for field in dataclasses.fields(SplitEvidence) if field.name.endswith("pvalue")}
)
DRAWN = dataclasses.replace(  # beyond random matchings
    NOTHING,
    n_words=63,
    specificity_pairs=63,
    specificity_gain=0.03,
    specificity_sd=0.06,
    specificity_pvalue=0.001,
    scaled_specificity_gain=0.3,
    scaled_specificity_sd=0.6,
    scaled_specificity_pvalue=0.002,
    margin_gain=0.03,
)
SPECIFIC = dataclasses.replace(  # and beyond near words
    DRAWN, near_gain=0.02, near_pvalue=0.001, left_out_specificity_pvalue=0.01, left_out_near_pvalue=0.01
)
NOTHING = dataclasses.replace(NOTHING, n_words=63, specificity_pairs=63, specificity_sd=0.06, scaled_specificity_sd=0.6)
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
        # near words, and few ones
        (SPECIFIC, DRAWN, None, "drawn together"),
        (NOTHING, DRAWN, None, "drawn together"),
        (DRAWN, SPECIFIC, None, "aligned"),  # near words are asked about for unseen pairs alone
        (SPECIFIC, but(SPECIFIC, near_pvalue=0.06), None, "drawn together"),
        (SPECIFIC, but(SPECIFIC, near_gain=-0.01), None, "drawn together"),
        (SPECIFIC, but(SPECIFIC, left_out_specificity_pvalue=0.06), None, "drawn together"),
        (SPECIFIC, but(SPECIFIC, left_out_near_pvalue=0.06), None, "drawn together"),
        # memorised before inflated, and only where trained pairs gained more
        (SPECIFIC, NOTHING, None, "memorised"),
        (but(SPECIFIC, specificity_pairs=600), but(NOTHING, specificity_gain=0.02), None, "none"),
        (but(SPECIFIC, specificity_pairs=600), but(NOTHING, scaled_specificity_gain=0.2), None, "none"),
        (SPECIFIC, but(NOTHING, specificity_pairs=4), None, "none"),
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


def test_the_reasons_say_what_was_shown():
    reason = verdict(SPECIFIC, DRAWN).reason
    assert "beyond random matchings" in reason and "not beyond near words" in reason
    reason = verdict(SPECIFIC, but(SPECIFIC, left_out_near_pvalue=0.3, share_gained=0.4)).reason
    assert "a few words may carry it" in reason and "p = 0.3; 40% of all gained" in reason
    assert "63 words" in verdict(SPECIFIC, SPECIFIC).reason
    assert "isn't shown either that they gained less" in verdict(SPECIFIC, but(NOTHING, specificity_gain=0.02)).reason


def test_memorised_is_a_test_and_not_a_difference_in_significance():
    """The same gain in both, which only the larger split can show, is no memorising."""
    seen = but(SPECIFIC, specificity_pairs=623)
    unseen = but(NOTHING, specificity_gain=0.03, scaled_specificity_gain=0.3, specificity_pvalue=0.06)
    found = verdict(seen, unseen)
    assert found.label == "none"
    assert found.adjusted["train/excess_pvalue"] == 1
    # Welch's test of 0.03 ± 0.06 against 0 ± 0.06, 63 pairs each, by scipy
    expected = stats.ttest_ind_from_stats(0.03, 0.06, 63, 0.0, 0.06, 63, equal_var=False, alternative="greater").pvalue
    assert verdict(SPECIFIC, NOTHING).adjusted["train/excess_pvalue"] == pytest.approx(max(2 * expected, 0.002 * 2))


UNALIKE = but(SPECIFIC, n_words=40)


@pytest.mark.parametrize(
    ("control", "unalike", "label"),
    [
        (SPECIFIC, UNALIKE, "aligned"),
        (SPECIFIC, but(UNALIKE, near_pvalue=0.3), "drawn together"),
        (SPECIFIC, but(UNALIKE, specificity_pvalue=0.3), "none"),  # look-alikes alone gained
        (NOTHING, but(NOTHING, n_words=40, **RISEN), "inflated"),
        (but(NOTHING, **RISEN), but(NOTHING, n_words=40), "none"),  # the cosine of look-alikes alone rose
        (NOTHING, UNALIKE, "none"),  # with the look-alikes the margin did not rise
        (but(NOTHING, margin_gain=0.01), UNALIKE, "aligned"),
        (SPECIFIC, but(UNALIKE, **FALLEN, mcnemar_pvalue=0.1), "none"),
        (SPECIFIC, but(UNALIKE, n_words=29), "drawn together"),
        (SPECIFIC, but(NOTHING, n_words=29), "drawn together"),  # too few to ask: all words, and no more than this
        (NOTHING, but(UNALIKE, n_words=29), "none"),
    ],
)
def test_claims_rest_on_words_that_are_no_look_alikes(control, unalike, label):
    found = verdict(NOTHING, control, unalike=unalike)
    assert found.label == label
    if unalike.n_words == 29 and label == "drawn together":
        assert "only 29 unseen words aren't look-alikes" in found.reason
    if unalike.n_words == 40:
        assert "that aren't look-alikes" in found.reason or "with the pairs that share words" in found.reason
    if control is SPECIFIC and unalike.specificity_pvalue == 0.3:
        assert "with the look-alikes unseen pairs did (p = 0.002), so spelling may explain it" in found.reason


def test_a_rise_of_one_word_s_many_pairs_is_no_rise_of_the_words():
    """One word with 100 rising pairs beside falling ones: the mean of pairs rises, that of words falls."""
    risen = but(NOTHING, pair_cosine_gain=0.3, t_pvalue=1e-5, cohens_dz=-0.6)
    assert verdict(NOTHING, risen).label == "none"


@pytest.mark.parametrize(
    ("increase", "interval", "label", "told"),
    [
        (0.12, (0.11, 0.13), "harmed", "Perplexity in Swahili changed by +12% [+11%, +13%]; +10% is allowed."),
        (0.12, (0.08, 0.16), "aligned", "Swahili rose by more than the 10% allowed (95 % interval +8% to +16%)"),
        (0.08, (0.05, 0.12), "aligned", "Swahili rose by more than the 10% allowed (95 % interval +5% to +12%)"),
        (0.08, (0.05, 0.09), "aligned", ""),
        (0.1, (0.1, 0.1), "aligned", ""),
        (math.inf, (0.0, 0.1), "harmed", ""),
        (0.12, None, "harmed", "Perplexity changed by +12%;"),
    ],
)
def test_perplexity_harms_where_its_interval_does(increase, interval, label, told):
    found = judge(
        SPECIFIC,
        SPECIFIC,
        perplexity_increase=increase,
        perplexities=interval and {"English": (0.01, 0.0, 0.02), "Swahili": (increase, *interval)},
        max_perplexity_increase=0.1,
    )
    assert found.label == label
    assert told in found.reason
    assert ("can't be told" in found.reason) == ("rose by" in told)


def test_each_language_is_told_with_its_own_interval():
    known, unsure = (0.08, 0.05, 0.09), (0.02, -0.04, 0.12)
    reason = verdict(SPECIFIC, SPECIFIC, perplexities={"English": known, "Swahili": unsure}).reason
    assert "perplexity in Swahili" in reason and "-4% to +12%" in reason and "English" not in reason
    harmed = verdict(SPECIFIC, SPECIFIC, perplexities={"English": (0.3, 0.2, 0.4), "Swahili": unsure})
    assert harmed.label == "harmed" and "English changed by +30% [+20%, +40%]" in harmed.reason


def test_alpha_is_heard():
    assert judge(SPECIFIC, SPECIFIC, perplexity_increase=None, max_perplexity_increase=0.1, alpha=0.001).label == "none"


# Calibration: whole simulated runs, smaller and fewer than in bench/calibration.py


def outcome_of(name: str, seed: int, pairs: tuple[int, int] = (80, 63)):
    scenario = next(scenario for scenario in scenarios() if scenario.name == name)
    return simulate(scenario, seed, pairs=pairs, permutations=200)


def called(labels: set[str], name: str, runs: int, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(paired, "RESAMPLES", 100)  # no verdict reads the interval
    return sum(outcome_of(name, seed).label in labels for seed in range(runs))


NULLS = [
    "all cosines rise alike",
    "random moves",
    "train pairs memorised",
    "all cosines spread out",
    "sink: random moves",
]
NEARLY = [  # something happened, but nothing to each word and its own translation
    "to the means of classes of 5",
    "to the means of classes of n/4",
    "10 % become strong hubs",
    "to the spelling, a third look-alikes",
    "6 of 63 pairs aligned",
]


@pytest.mark.parametrize("name", NULLS)
def test_nulls_are_rarely_called_aligned_or_drawn_together(name, monkeypatch):
    """At most 5 % of 30 runs, but for chance: 6 and more have p = 0.003."""
    assert called({"aligned", "drawn together"}, name, 30, monkeypatch) <= 5


@pytest.mark.parametrize("name", NEARLY)
def test_what_near_words_share_is_rarely_called_aligned(name, monkeypatch):
    """At most 5 % of 20 runs, but for chance (5 and more have p = 0.003); without the near words it would be most."""
    assert called({"aligned"}, name, 20, monkeypatch) <= 4


def test_true_effects_are_found(monkeypatch):
    """At least 90 % of 40 runs, but for chance; a strong one is called aligned."""
    found = called({"aligned", "drawn together"}, "true effect, d_z = 0.5", 40, monkeypatch)
    assert stats.binomtest(found, 40, 0.9, alternative="less").pvalue > 0.01
    assert called({"aligned"}, "true effect, d_z = 0.8", 20, monkeypatch) >= 17


def test_the_same_process_in_both_splits_is_rarely_called_memorised(monkeypatch):
    """A difference in significance alone earned it in up to 78 % of such runs."""
    monkeypatch.setattr(paired, "RESAMPLES", 100)
    labels = [outcome_of("the same weak effect, 623 and 63 pairs", seed, (300, 40)).label for seed in range(60)]
    assert stats.binomtest(labels.count("memorised"), 60, 0.05, alternative="greater").pvalue > 0.01
    assert called({"memorised"}, "train pairs memorised", 40, monkeypatch) >= 34
