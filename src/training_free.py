"""Baselines that cost no training: fitted or chosen on the train pairs, judged on control.

Read a trained adapter's retrieval beside them: where they reach as much, the untouched model already held it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor

from src.layers import Layer
from src.measures import measure

with suppress(ModuleNotFoundError):  # shapes are checked in tests; a bare GPU machine need not have jaxtyping
    from jaxtyping import Float, Int

SMALLEST = 1e-6  # a shorter rest of a unit vector is rounding, and has no direction


def training_free(
    train: tuple[Float[Tensor, "m d"], Float[Tensor, "m d"]],
    control: tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]],
    relevant: Int[Tensor, "n k"],
) -> dict[str, float]:
    """CSLS P@1 of the control pairs after three maps that are fitted on the train pairs, at one layer.

    `train` and `control` are the unit vectors of (sources, targets), row by row a pair; `relevant` is as in
    `src.measures.measure`, which raises ValueError for no pairs and for vectors that aren't finite. The keys:
    `centred_csls_p_at_1` (each language less its train mean), `lsar_csls_p_at_1` (Xie et al. 2022) and
    `procrustes_csls_p_at_1` (Schönemann 1966).
    """
    means = train[0].mean(0, dtype=torch.float64), train[1].mean(0, dtype=torch.float64)
    rest = language_direction(*means)
    moved = {
        "centred_csls_p_at_1": (centred(control[0], means[0]), centred(control[1], means[1])),
        "lsar_csls_p_at_1": (without_direction(control[0], rest), without_direction(control[1], rest)),
    }
    scores = {
        name: measure(source, target, relevant, names=["csls_p_at_1"])["csls_p_at_1"]
        for name, (source, target) in moved.items()
    }
    rotated = measure(*control, relevant, names=["procrustes_p_at_1"], fitted_on=train)
    return scores | {"procrustes_csls_p_at_1": rotated["procrustes_p_at_1"]}


def best_layer(scores: Mapping[Layer, float]) -> Layer:
    """The layer with the largest score, of equal ones the lowest; `final` is the highest. ValueError for no scores.

    Give it scores of the train pairs: chosen on control, the best of many layers would flatter itself.
    """
    if not scores:
        raise ValueError("no layers to choose from")
    return min(scores, key=lambda layer: (-scores[layer], layer == "final", 0 if layer == "final" else layer))


def centred(vectors: Float[Tensor, "n d"], mean: Float[Tensor, " d"]) -> Float[Tensor, "n d"]:
    """Unit vectors, in float32, after the mean is taken away; one that equals the mean becomes zero."""
    return _unit(vectors.double() - mean.double()).float()


def language_direction(source_mean: Float[Tensor, " d"], target_mean: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """What LSAR removes from two languages: the unit vector along the difference of their means; zero where equal.

    LSAR (Xie et al., EMNLP 2022, arXiv 2401.05792) splits the languages' means into a part that all share and a
    low-rank part that tells them apart, orthogonal to the first. The shared part is the point nearest to the origin
    on the plane through the means. Two means span a line: what is left of either then lies along their difference,
    and the rank is 1.
    """
    return _unit((source_mean.double() - target_mean.double())[None])[0]


def without_direction(vectors: Float[Tensor, "n d"], direction: Float[Tensor, " d"]) -> Float[Tensor, "n d"]:
    """Unit vectors, in float32, after their projection on the unit vector `direction` is taken away."""
    vectors, direction = vectors.double(), direction.double()
    # Summed row by row, not by a matrix product, whose rounding depends on the row: the same word stays the same.
    along = (vectors * direction).sum(1, keepdim=True)
    return _unit(vectors - along * direction).float()


def _unit(vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    norms = vectors.norm(dim=1, keepdim=True)
    return vectors / norms.where(norms > SMALLEST, torch.inf)
