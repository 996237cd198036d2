"""Every measure against its definition written as plain loops, and against what must not fool it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from src import measures
from src.measures import MEASURES, csls_ranks, measure, pair_cosines, retrieval_ranks


def unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=1)


def words(n: int, seed: int, *, width: int = 24, common: float = 0.0, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Pairs that share a concept; a large `common` part drives all cosines towards 1."""
    draw = torch.Generator().manual_seed(seed)
    concept, a, b = (torch.randn(n, width, generator=draw) for _ in range(3))
    return unit(concept + noise * a + common), unit(concept + noise * b + common)


def alone(n: int) -> Tensor:
    return torch.arange(n)[:, None]


def several(n: int, seed: int) -> Tensor:
    """Row i: i itself, somewhere among up to two other columns."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        row = [i, *rng.choice([j for j in range(n) if j != i], size=rng.integers(0, 3), replace=False)]
        rng.shuffle(row)
        rows.append([*row, *[-1] * (3 - len(row))])
    return torch.tensor(rows)


def rank(scores: np.ndarray, right: set[int]) -> int:
    best = max(scores[j] for j in right)
    return 1 + sum(scores[j] >= best for j in range(len(scores)) if j not in right)


def by_definition(source: Tensor, target: Tensor, relevant: Tensor, neighbours: int = 10) -> dict[str, float]:
    a, b = source.double().numpy(), target.double().numpy()
    n = len(a)
    s = a @ b.T
    right = [{int(j) for j in row if j >= 0} for row in relevant]
    near_target = [np.sort(s[i])[::-1][:neighbours].mean() for i in range(n)]
    near_source = [np.sort(s[:, j])[::-1][:neighbours].mean() for j in range(n)]
    csls = np.array([[2 * s[i, j] - near_target[i] - near_source[j] for j in range(n)] for i in range(n)])
    plain = [rank(s[i], right[i]) for i in range(n)]
    by_csls = [rank(csls[i], right[i]) for i in range(n)]
    unique = [
        all(s[i, i] > s[i, j] for j in range(n) if j not in right[i])
        and all(s[i, i] > s[k, i] for k in range(n) if i not in right[k])
        for i in range(n)
    ]
    mismatched = np.mean([s[i, j] for i in range(n) for j in range(n) if i != j])
    centred = [a - a.mean(0), b - b.mean(0)]
    cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(*centred, strict=True)]
    found = {
        "pair_cosine": np.trace(s) / n,
        "mismatched_cosine": mismatched,
        "margin": np.trace(s) / n - mismatched,
        "centred_cosine": np.mean(cosines),
        "nn_p_at_1": np.mean([r == 1 for r in plain]),
        "csls_p_at_1": np.mean([r == 1 for r in by_csls]),
        "csls_p_at_5": np.mean([r <= 5 for r in by_csls]),
        "mrr": np.mean([1 / r for r in plain]),
        "mexa": np.mean(unique),
    }
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("n", [2, 7, 60])  # 7: fewer words than CSLS has neighbours
@pytest.mark.parametrize("common", [0.0, 3.0, 100.0])  # 100: cosines of 0.9999, as at an attention sink
@pytest.mark.parametrize("listed", [alone, lambda n: several(n, 5)])
def test_measures_equal_their_definitions(n, common, listed):
    if n == 2:
        listed = alone
    source, target = words(n, n, common=common)
    relevant = listed(n)
    found = measure(source, target, relevant)
    assert found == pytest.approx(by_definition(source, target, relevant), abs=1e-6)
    assert list(found) == list(MEASURES[:-1])


def test_three_words_by_hand():
    """S = [[0.6, 0.8, 0], [0.8, 0.6, 0], [0, 0, 1]]: the first two words prefer each other's translation."""
    source = torch.eye(3)
    target = torch.tensor([[0.6, 0.8, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    found = measure(
        source, target, alone(3), names=["pair_cosine", "mismatched_cosine", "margin", "nn_p_at_1", "mrr", "mexa"]
    )
    assert found == pytest.approx(
        {
            "pair_cosine": 2.2 / 3,
            "mismatched_cosine": 1.6 / 6,
            "margin": 2.2 / 3 - 1.6 / 6,
            "nn_p_at_1": 1 / 3,
            "mrr": (1 / 2 + 1 / 2 + 1) / 3,
            "mexa": 1 / 3,
        }
    )
    both = torch.tensor([[0, 1], [1, -1], [2, -1]])  # the first word may also be translated as the second is
    assert retrieval_ranks(source, target, both).tolist() == [1, 2, 1]


def test_csls_by_hand_mends_a_hub():
    """Target 0 is near both sources; with one neighbour its crowding of 0.9 gives source 1 its own word back."""
    source = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    hub = torch.tensor([0.9, math.sqrt(1 - 0.9**2), 0.0])  # cosines 0.9 and 0.436
    shy = torch.tensor([0.05, 0.42, math.sqrt(1 - 0.05**2 - 0.42**2)])
    target = torch.stack([hub, shy])
    assert retrieval_ranks(source, target, alone(2)).tolist() == [1, 2]
    assert csls_ranks(source, target, alone(2), neighbours=1).tolist() == [1, 1]


@pytest.mark.parametrize("n", [2, 50, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_collapsed_model_retrieves_nothing(n, dtype):
    vectors = unit(torch.ones(n, 1) * torch.randn(1, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    found = measure(vectors, vectors, alone(n))
    for name in ("nn_p_at_1", "csls_p_at_1", "mexa", "centred_cosine"):
        assert found[name] == 0, name
    assert found["margin"] == pytest.approx(0, abs=1e-9)
    assert retrieval_ranks(vectors, vectors, alone(n)).tolist() == [n] * n


def test_a_word_that_ties_with_a_wrong_one_is_not_retrieved():
    source, target = words(40, 0, noise=0.1)
    target[7] = target[3]
    assert retrieval_ranks(source, target, alone(40))[3] == 2
    assert csls_ranks(source, target, alone(40))[3] == 2
    listed = torch.cat([alone(40), torch.full((40, 1), -1)], dim=1)
    listed[3, 1] = 7
    assert retrieval_ranks(source, target, listed)[3] == 1


def test_rounding_breaks_no_ties():
    """The same vector in two columns can give products that differ in the last digit, by the column's place."""
    for seed in range(20):
        source, target = words(90, seed, noise=0.1)
        found = measure(source[:45].repeat(2, 1), target[:45].repeat(2, 1), alone(90))
        assert found["nn_p_at_1"] == found["csls_p_at_1"] == found["mexa"] == 0


def test_direction():
    """Closer pairs raise every measure; an offset common to all raises only the paper's."""
    far, near = (measure(*words(80, 1, noise=noise), alone(80)) for noise in (1.5, 0.7))
    assert all(near[name] > far[name] for name in MEASURES if name in near and name != "mismatched_cosine")
    source, target = words(80, 1, noise=1.5)
    offset = torch.zeros(24).index_fill_(0, torch.tensor([0]), 20.0)
    moved = measure(unit(source + offset), unit(target + offset), alone(80))
    assert moved["pair_cosine"] > far["pair_cosine"] + 0.3
    assert moved["margin"] < far["margin"] / 10
    assert moved["centred_cosine"] == pytest.approx(far["centred_cosine"], abs=0.05)


@pytest.mark.parametrize("block", [1, 1000, 10_000])
def test_blocks_change_nothing(monkeypatch, block):
    source, target = words(90, 2, common=1.0)
    relevant = several(90, 3)
    whole = measure(source, target, relevant)
    monkeypatch.setattr(measures, "BLOCK", block)
    monkeypatch.setattr(measures, "SCRATCH", block // 3)
    assert measure(source, target, relevant) == pytest.approx(whole, abs=1e-12)


def test_largest_entries_by_groups():
    block = torch.randn(5, 4 * 10 * measures.GROUP + 17, generator=torch.Generator().manual_seed(0))
    block[0, -10:] = 9.0  # beyond the last whole group
    block[1, :10] = 9.0  # all in one group
    expected = block.sort(dim=1, descending=True).values[:, :10].mean(1)
    torch.testing.assert_close(measures._mean_of_largest(block, 10), expected)


def test_procrustes_undoes_a_rotation():
    draw = torch.Generator().manual_seed(0)
    source, target = words(200, 4, noise=0.2)
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=draw))[0]
    turned = target @ rotation
    found = measure(source[100:], turned[100:], alone(100), fitted_on=(source[:100], turned[:100]))
    assert found["nn_p_at_1"] < 0.1
    assert found["procrustes_p_at_1"] > 0.95
    few = measure(source[100:], turned[100:], alone(100), fitted_on=(source[:5], turned[:5]))  # too few to fit
    assert few["procrustes_p_at_1"] < 0.5


@pytest.mark.parametrize("pairs", [90, 10])  # with more than there are dimensions, and with fewer
def test_procrustes_at_an_attention_sink_is_the_exact_map(pairs):
    """Where one direction is thousands of times as long as the rest; float32 would turn these at random."""
    draw = torch.Generator().manual_seed(5)
    sink = 3000 * unit(torch.randn(1, 24, generator=draw))
    source, target = (unit(sink + torch.randn(pairs, 24, generator=draw)) for _ in range(2))
    expected = torch.from_numpy(orthogonal_procrustes(source.double().numpy(), target.double().numpy())[0])
    moved = measures._rotated(source, source, target)
    torch.testing.assert_close(moved, (source.double() @ expected).float(), atol=1e-6, rtol=0)
    assert (moved - moved.mean(0)).std() > 1e-4


def test_procrustes_with_fewer_pairs_than_dimensions_is_the_whole_map_where_pairs_tell_of_it():
    """SciPy's own map, for vectors that the fitted ones span; what is orthogonal to all of them has no place."""
    draw = torch.Generator().manual_seed(0)
    source, target = (unit(torch.randn(10, 24, generator=draw)) for _ in range(2))
    mixed = unit(torch.randn(7, 10, generator=draw) @ source)
    whole = torch.from_numpy(orthogonal_procrustes(source.numpy(), target.numpy())[0])
    torch.testing.assert_close(measures._rotated(mixed, source, target), mixed @ whole, atol=1e-5, rtol=0)
    beside = torch.linalg.qr(source.T, mode="complete")[0][:, 10:].T
    moved = measures._rotated(unit(mixed[:1] + beside[:1]), source, target)
    torch.testing.assert_close(moved, mixed[:1] @ whole, atol=1e-5, rtol=0)
    square = (unit(torch.randn(30, 24, generator=draw)), unit(torch.randn(30, 24, generator=draw)))
    expected = torch.from_numpy(orthogonal_procrustes(square[0].numpy(), square[1].numpy())[0])
    torch.testing.assert_close(measures._rotated(square[0], *square), square[0] @ expected, atol=1e-5, rtol=0)


def test_bfloat16_is_measured_in_float32():
    source, target = (x.bfloat16() for x in words(60, 5))
    assert measure(source, target, alone(60)) == measure(source.float(), target.float(), alone(60))


def test_mismatched_cosine_is_exact_for_many_words():
    """In float32 the sums of 60,000 nearly equal vectors are off in the sixth digit."""
    source, target = words(60_000, 6, common=100.0)
    found = measure(source, target, alone(60_000), names=["mismatched_cosine", "margin"])
    a, b = source.double(), target.double()
    diagonal = (a * b).sum()
    exact = ((a.sum(0) @ b.sum(0) - diagonal) / (60_000 * 59_999)).item()
    assert found["mismatched_cosine"] == pytest.approx(exact, abs=1e-12)
    assert found["margin"] == pytest.approx(diagonal.item() / 60_000 - exact, abs=1e-12)
    torch.testing.assert_close(pair_cosines(source, target), (a * b).sum(1))


def test_one_pair_alone():
    source, target = words(1, 7)
    found = measure(source, target, alone(1))
    assert found["margin"] == 0
    assert found["centred_cosine"] == 0
    assert found["pair_cosine"] == found["mismatched_cosine"]
    assert [found[name] for name in ("nn_p_at_1", "csls_p_at_1", "csls_p_at_5", "mrr", "mexa")] == [1] * 5


def test_only_what_is_asked():
    source, target = words(20, 8)
    assert list(measure(source, target, alone(20), names=["mrr", "margin"])) == ["mrr", "margin"]
    assert measure(source, target, alone(20), names=["procrustes_p_at_1"]) == {}


def test_refusals():
    source, target = words(4, 9)
    with pytest.raises(ValueError, match="no pairs"):
        measure(source[:0], target[:0], alone(0))
    with pytest.raises(ValueError, match="unknown measure 'cosine'"):
        measure(source, target, alone(4), names=["cosine"])
    for bad in (torch.nan, torch.inf, -torch.inf):
        target[2, 3] = bad
        for call in (measure, retrieval_ranks, csls_ranks):
            with pytest.raises(ValueError, match="finite"):
                call(source, target, alone(4))


def test_a_word_with_several_translations_has_one_vote():
    """Two words: one with three translations, found; one with one, not. By pair three of four would be right."""
    source = torch.tensor([[1.0, 0.0, 0.0]] * 3 + [[0.0, 1.0, 0.0]])
    target = unit(torch.tensor([[1.0, 0.1, 0.0], [1.0, 0.0, 0.2], [0.0, 0.0, 1.0], [0.6, 0.0, 1.0]]))
    relevant = torch.tensor([[0, 1, 2], [2, 1, 0], [1, 0, 2], [3, -1, -1]])  # in any order
    assert measures.source_words(source, relevant).tolist() == [0, 0, 0, 1]
    found = measure(source, target, relevant, names=["nn_p_at_1", "csls_p_at_1", "mrr"])
    ranks = retrieval_ranks(source, target, relevant).tolist()
    assert ranks[:3] == [1, 1, 1]
    assert ranks[3] > 1
    assert found["nn_p_at_1"] == found["csls_p_at_1"] == 0.5
    assert found["mrr"] == pytest.approx((1 + 1 / ranks[3]) / 2)
    assert measure(source, target, relevant, fitted_on=(source, target))["procrustes_p_at_1"] in (0, 0.5, 1)


def test_equal_vectors_of_other_words_have_a_vote_each():
    source, target = words(20, 1)
    source[3] = source[7]
    assert measures.source_words(source, alone(20)).tolist() == list(range(20))
    both = torch.cat([alone(20), torch.full((20, 1), -1)], dim=1)
    both[3, 1], both[7, 1] = 7, 3
    assert len(measures.source_words(source, both).unique()) == 19
    source[3, 0] += 0.1
    assert len(measures.source_words(source, both).unique()) == 20
    assert len(target) == 20


def test_a_repeated_source_counts_once_among_a_targets_neighbours():
    """CSLS with each source twice, both translations listed, is CSLS with each once and twice the targets."""
    source, target = words(30, 3, noise=1.2)
    more = unit(torch.randn(30, 24, generator=torch.Generator().manual_seed(9)))
    relevant = torch.stack([torch.arange(30), torch.arange(30) + 30], dim=1)
    twice = csls_ranks(torch.cat([source, source]), torch.cat([target, more]), relevant.repeat(2, 1))
    a, b = source.double(), torch.cat([target, more]).double()
    s = a @ b.T
    csls = 2 * s - s.topk(10, dim=0).values.mean(0)
    expected = [rank(csls[i].numpy(), set(relevant[i].tolist())) for i in range(30)]
    assert twice.tolist() == expected * 2
