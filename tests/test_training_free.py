"""Baselines without training, against the papers' steps written out, and where each is known to help or not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from src.measures import measure
from src.training_free import best_layer, centred, language_direction, training_free, without_direction


def lsar_by_the_paper(means: np.ndarray, rank: int) -> np.ndarray:
    """The language-specific basis (d × rank) of L languages' means (d × L), by the algorithm of Xie et al. (2022).

    Their two singular value decompositions: the first for the best fit of a shared vector plus a rank-r rest, the
    second after the shared vector has been made orthogonal to the rest.
    """
    ones = np.ones(means.shape[1])
    shared = means @ ones / len(ones)
    left, sizes, right = np.linalg.svd(means - np.outer(shared, ones), full_matrices=False)
    best_fit = np.outer(shared, ones) + (left[:, :rank] * sizes[:rank]) @ right[:rank]
    orthogonal = np.linalg.pinv(best_fit).T @ ones
    orthogonal /= orthogonal @ orthogonal
    left, _, _ = np.linalg.svd(best_fit - np.outer(orthogonal, ones), full_matrices=False)
    assert np.allclose(left[:, :rank].T @ orthogonal, 0, atol=1e-9)
    return left[:, :rank]


def pairs(n: int, seed: int, *, noise: float = 0.5, width: int = 16) -> tuple[Tensor, Tensor]:
    """Unit vectors of n pairs that share a concept."""
    draw = torch.Generator().manual_seed(seed)
    concept, a, b = (torch.randn(n, width, generator=draw) for _ in range(3))
    return normalize(concept + noise * a), normalize(concept + noise * b)


def alone(n: int) -> Tensor:
    return torch.arange(n)[:, None]


def csls(source: Tensor, target: Tensor) -> float:
    return measure(source, target, alone(len(source)), names=["csls_p_at_1"])["csls_p_at_1"]


@pytest.mark.parametrize("seed", range(5))
def test_lsar_removes_what_the_papers_algorithm_removes(seed: int) -> None:
    source, target = pairs(40, seed)
    source, target = normalize(source + torch.arange(16) / 8), normalize(target - torch.ones(16))
    basis = lsar_by_the_paper(torch.stack([source.mean(0), target.mean(0)], dim=1).double().numpy(), rank=1)
    direction = language_direction(source.mean(0), target.mean(0))
    for vectors in (source, target):
        left = vectors.double().numpy()
        left = left - left @ basis @ basis.T
        left /= np.linalg.norm(left, axis=1, keepdims=True)
        assert np.allclose(without_direction(vectors, direction).numpy(), left, atol=1e-6)


def test_after_lsar_the_languages_do_not_differ_in_their_mean_along_the_direction() -> None:
    source, target = pairs(40, 0)
    source = normalize(source + torch.ones(16))
    direction = language_direction(source.mean(0), target.mean(0))
    assert direction.norm() == pytest.approx(1, abs=1e-6)
    for vectors in (source, target):
        assert (without_direction(vectors, direction).double() @ direction).abs().max() < 1e-6


def test_centring_by_its_definition() -> None:
    source, _ = pairs(30, 1)
    mean = torch.linspace(-1, 1, 16)
    expected = source.numpy() - mean.numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.allclose(centred(source, mean).numpy(), expected, atol=1e-6)


def test_what_has_no_direction_becomes_zero_and_not_noise() -> None:
    same = normalize(torch.ones(3, 4))
    assert not centred(same, same[0]).any()
    assert not language_direction(same[0], same[0]).any()
    assert torch.allclose(without_direction(same, torch.zeros(4)), same)
    assert not without_direction(same, same[0]).any()


def test_the_same_word_keeps_the_same_vector_wherever_it_stands() -> None:
    word = normalize(torch.randn(1, 577, generator=torch.Generator().manual_seed(0)))
    vectors = word.repeat(131, 1)
    direction = normalize(torch.randn(577, generator=torch.Generator().manual_seed(1)), dim=0)
    for moved in (centred(vectors, direction), without_direction(vectors, direction)):
        assert (moved == moved[0]).all()


def test_a_language_that_lies_apart_is_brought_back() -> None:
    """One constant added to each language hides the pairs; every baseline but the untouched one undoes it."""
    offset = torch.zeros(16)
    offset[0] = 4
    train, control = (
        (normalize(source + offset), normalize(target - offset)) for source, target in (pairs(300, 2), pairs(100, 3))
    )
    scores = training_free(train, control, alone(100))
    assert set(scores) == {"centred_csls_p_at_1", "lsar_csls_p_at_1", "procrustes_csls_p_at_1"}
    assert scores["centred_csls_p_at_1"] > csls(*control)
    assert scores["lsar_csls_p_at_1"] > csls(*control)


def test_only_procrustes_undoes_a_rotation() -> None:
    turn, _ = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(4)))
    train, control = ((source @ turn, target) for source, target in (pairs(300, 5), pairs(100, 6)))
    scores = training_free(train, control, alone(100))
    assert scores["procrustes_csls_p_at_1"] > 0.8
    assert max(scores["centred_csls_p_at_1"], scores["lsar_csls_p_at_1"]) < 0.2


def test_the_maps_are_fitted_on_train_and_not_on_control() -> None:
    offset = torch.linspace(-1, 1, 16)
    source, target = pairs(200, 7)
    train = normalize(source + offset), normalize(target - offset)
    control = pairs(80, 8, noise=1.0)
    means = train[0].mean(0), train[1].mean(0)
    direction = language_direction(*means)
    scores = training_free(train, control, alone(80))
    assert scores["centred_csls_p_at_1"] == csls(centred(control[0], means[0]), centred(control[1], means[1]))
    assert scores["lsar_csls_p_at_1"] == csls(*(without_direction(vectors, direction) for vectors in control))
    own = centred(control[0], control[0].mean(0)), centred(control[1], control[1].mean(0))
    assert scores["centred_csls_p_at_1"] != csls(*own)


def test_the_best_layer_is_the_lowest_of_the_best() -> None:
    assert best_layer({0: 0.1, 7: 0.5, "final": 0.5, 3: 0.5}) == 3
    assert best_layer({"final": 0.5, 7: 0.5}) == 7
    assert best_layer({"final": 0.6, 7: 0.5}) == "final"
    with pytest.raises(ValueError, match="no layers"):
        best_layer({})
