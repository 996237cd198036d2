"""The contrastive objectives, as pure functions of unit vectors."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor
from torch.nn import functional

with suppress(ModuleNotFoundError):  # shapes are checked in tests; a bare GPU machine need not have jaxtyping
    from jaxtyping import Bool, Float, Int


def triplet_loss(
    anchor: Float[Tensor, "n d"], positive: Float[Tensor, "n d"], negative: Float[Tensor, "n d"], *, margin: float
) -> Float[Tensor, ""]:
    """Mean of max(0, margin + d(anchor, positive) - d(anchor, negative)) with d = 1 - cosine (TLI, section 3)."""
    cosine_positive = (anchor * positive).sum(-1)
    cosine_negative = (anchor * negative).sum(-1)
    return functional.relu(margin - cosine_positive + cosine_negative).sum() / max(1, len(anchor))


def infonce_loss(
    source: Float[Tensor, "n d"],
    target: Float[Tensor, "n d"],
    also_right: Bool[Tensor, "n n"],
    *,
    temperature: float,
    one_way: bool = False,
) -> Float[Tensor, ""]:
    """InfoNCE over in-batch negatives (van den Oord et al. 2018), the mean of both directions (Radford et al. 2021).

    `also_right[i, j]` marks pairs i ≠ j whose target is a right translation of source i: they are no negatives.
    `one_way` moves the source alone: the target is detached and only the source looks for its target.
    """
    if one_way:
        target = target.detach()
    logits = source @ target.T / temperature
    off_diagonal = ~torch.eye(len(source), dtype=torch.bool, device=source.device)
    logits = logits.masked_fill(also_right & off_diagonal, float("-inf"))
    own = torch.arange(len(source), device=source.device)
    forward = functional.cross_entropy(logits, own)
    return forward if one_way else (forward + functional.cross_entropy(logits.T, own)) / 2


def nearest_wrong(
    source: Float[Tensor, "n d"], target: Float[Tensor, "m d"], right: Bool[Tensor, "n m"]
) -> Int[Tensor, " n"]:
    """For each source the index of the nearest target that is no right translation: the hard negative."""
    return (source @ target.T).masked_fill(right, float("-inf")).argmax(dim=1)
