"""The losses, by hand and by direction."""

import math

import pytest
import torch
from torch.nn import functional

from src.objectives import infonce_loss, nearest_wrong, triplet_loss


def unit(*rows: list[float]) -> torch.Tensor:
    return functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=-1)


NONE = torch.zeros(2, 2, dtype=torch.bool)


def test_triplet_by_hand():
    anchor, positive, negative = unit([1, 0], [1, 0]), unit([1, 0], [0, 1]), unit([0, 1], [1, 0])
    # cosines 1 and 0: relu(0.3 - 1 + 0) = 0; cosines 0 and 1: 0.3 - 0 + 1 = 1.3; the mean of both
    assert triplet_loss(anchor, positive, negative, margin=0.3).item() == pytest.approx(0.65)


def test_infonce_by_hand():
    source, target = unit([1, 0], [0, 1]), unit([1, 0], [0, 1])
    # every row and column: own logit 1/0.5 = 2, the other 0
    expected = math.log(math.exp(2) + 1) - 2
    assert infonce_loss(source, target, NONE, temperature=0.5).item() == pytest.approx(expected)


def test_infonce_masks_listed_translations():
    source, target = unit([1, 0], [0, 1]), unit([1, 0], [1, 0.1])
    also_right = torch.tensor([[True, True], [False, True]])  # target 1 is right for source 0 as well
    masked = infonce_loss(source, target, also_right, temperature=0.1)
    # source 0 has no negative left: its loss is 0; target 1 has none either
    logits = source @ target.T / 0.1
    forward = (0 + functional.cross_entropy(logits[1:], torch.tensor([1]))) / 2
    backward = (functional.cross_entropy(logits.T[:1], torch.tensor([0])) + 0) / 2
    assert masked.item() == pytest.approx(((forward + backward) / 2).item())


@pytest.mark.parametrize("loss", ["triplet", "infonce"])
def test_a_better_pair_lowers_the_loss(loss):
    torch.manual_seed(3)
    source, other = functional.normalize(torch.randn(2, 8, 16), dim=-1)
    far = functional.normalize(torch.randn(8, 16), dim=-1)

    def value(closeness: float) -> float:
        target = functional.normalize(closeness * source + (1 - closeness) * far, dim=-1)
        if loss == "triplet":
            return triplet_loss(source, target, other, margin=1.0).item()
        return infonce_loss(source, target, torch.zeros(8, 8, dtype=torch.bool), temperature=0.1).item()

    values = [value(closeness) for closeness in (0.0, 0.3, 0.6, 0.9)]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1]


def test_one_way_moves_the_source_alone():
    source = torch.randn(4, 8, requires_grad=True)
    target = torch.randn(4, 8, requires_grad=True)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    infonce_loss(
        functional.normalize(source), functional.normalize(target), mask, temperature=0.1, one_way=True
    ).backward()
    assert source.grad is not None
    assert target.grad is None


def test_the_nearest_wrong_is_never_a_right_translation():
    source, target = unit([1, 0]), unit([1, 0], [1, 0.1], [0, 1])
    right = torch.tensor([[True, False, False]])
    assert nearest_wrong(source, target, right).tolist() == [1]
    assert nearest_wrong(source, target, torch.tensor([[True, True, False]])).tolist() == [2]
