"""The training loop: one joint forward a step over a batch's distinct words, up to the layer that the loss reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from src.errors import NumbersError, UserError
from src.finite import likely_cause
from src.layers import (
    Below,
    Layer,
    Progress,
    Prompt,
    distinct_prompts,
    encode,
    packed,
    packs,
    pooled_states,
    stacked,
)
from src.objectives import infonce_loss, nearest_wrong, triplet_loss

with suppress(ModuleNotFoundError):  # shapes are checked in tests; a bare GPU machine need not have jaxtyping
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Objective:
    """What is minimised, at which layers (their losses add up)."""

    name: Literal["triplet", "infonce"]
    layers: tuple[Layer, ...]
    margin: float = 0.3
    negatives: Literal["random", "batch", "baseline"] = "random"
    temperature: float = 0.05
    one_way: bool = False


@dataclass(frozen=True)
class Schedule:
    """How it is minimised: AdamW, a linear warm-up over the given share of the steps, then a linear decay to 0."""

    epochs: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.1
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0


def train(
    model: nn.Module,
    source: Sequence[Prompt],
    target: Sequence[Prompt],
    relevant: Int[np.ndarray, "n k"],
    objective: Objective,
    schedule: Schedule,
    *,
    below: Below | None = None,
    progress: Progress | None = None,
    after_epoch: Callable[[int], None] | None = None,
) -> list[float]:
    """Trains the model's trainable weights in place; returns the loss of every optimizer step.

    `source[i]` and `target[i]` are pair i; `relevant` row i lists the pairs whose target is a right translation of
    source i, padded with -1, and none of them ever serves as its negative. Each step begins with the hidden states that
    `below` holds, where all losses are read above them. `after_epoch` is called with the number of each epoch that
    ends, from 1; it may encode (`layers.encode` leaves modes and random numbers alone) or raise.

    Raises NumbersError when a loss, a gradient or the adapter after a step isn't finite, naming the step; UserError
    when a source has every pair's target among its translations.
    """
    if (relevant >= 0).sum(axis=1).max() >= len(source):
        raise UserError(
            "dataset: a source word has every target of the train split as its translation; add other pairs"
        )
    torch.manual_seed(schedule.seed)  # dropout
    rng = np.random.default_rng(schedule.seed)  # order of the pairs and random negatives
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=schedule.learning_rate, weight_decay=0.0, fused=True)
    steps = _steps(len(source), schedule)
    pace = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _pace(step, len(steps), schedule.warmup))
    right = _RightTranslations(relevant)
    fixed = _baseline_negatives(model, source, target, right, objective) if _needs_baseline(objective) else None
    joint = packs(model, [*source, *target])
    losses, advice = [], _advice_at_first(objective)
    order = np.arange(len(source))
    model.train()
    for step, (epoch_start, size) in enumerate(progress(steps, "Training") if progress else steps):
        if epoch_start == 0:
            order = rng.permutation(len(source))
        pairs = order[epoch_start : epoch_start + size]
        negatives = _negatives(pairs, right, fixed, rng, objective)
        with torch.autocast(_device_type(model), torch.bfloat16, enabled=schedule.precision == "bfloat16"):
            among = right.among(pairs)
            loss = batch_loss(model, source, target, pairs, negatives, among, objective, joint=joint, below=below)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        pace.step()
        losses.append(_finite(loss, weights, model, f"{step + 1} of {len(steps)}", "" if step else advice))
        if after_epoch and (step + 1) % (len(steps) // schedule.epochs) == 0:
            after_epoch((step + 1) * schedule.epochs // len(steps))
    model.eval()
    return losses


def batch_loss(
    model: nn.Module,
    source: Sequence[Prompt],
    target: Sequence[Prompt],
    pairs: Int[np.ndarray, " n"],
    negatives: Int[np.ndarray, " n"] | None,
    also_right: Bool[np.ndarray, "n n"],
    objective: Objective,
    *,
    joint: bool = True,
    below: Below | None = None,
) -> Float[Tensor, ""]:
    """The objective on one batch of pairs, summed over its layers.

    `negatives[i]` is the pair whose target is anchor i's negative; None takes the hardest in the batch. `joint`
    packs all words into one batch, which begins with the hidden states that `below` holds; without it there is a
    forward for each token count (see `layers.packs`).
    """
    prompts = [source[i] for i in pairs] + [target[i] for i in pairs]
    if negatives is not None:
        prompts += [target[i] for i in negatives]
    distinct, row_of = distinct_prompts(prompts)
    total = torch.zeros(())
    for states in _states(model, distinct, objective.layers, below, joint=joint).values():
        rows = states[torch.tensor(row_of, device=states.device)]
        anchor, positive = rows[: len(pairs)], rows[len(pairs) : 2 * len(pairs)]
        mask = torch.from_numpy(also_right).to(states.device)
        match objective.name:
            case "triplet":
                if negatives is None:
                    usable = ~mask.all(dim=1)  # an anchor whose batch holds right translations alone waits its turn
                    negative = positive[nearest_wrong(anchor.detach(), positive.detach(), mask)][usable]
                    anchor, positive = anchor[usable], positive[usable]
                else:
                    negative = rows[2 * len(pairs) :]
                loss = triplet_loss(anchor, positive, negative, margin=objective.margin)
            case "infonce":
                loss = infonce_loss(
                    anchor, positive, mask, temperature=objective.temperature, one_way=objective.one_way
                )
        total = total.to(loss.device) + loss
    return total


def _states(
    model: nn.Module, prompts: Sequence[Prompt], layers: Sequence[Layer], below: Below | None, *, joint: bool
) -> dict[Layer, Float[Tensor, "prompts d"]]:
    if joint:
        return dict(pooled_states(model, packed(prompts, below), layers))
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt.ids), []).append(i)
    parts = [dict(pooled_states(model, stacked([prompts[i] for i in rows]), layers)) for rows in by_length.values()]
    back = torch.tensor([i for rows in by_length.values() for i in rows]).argsort()
    return {layer: torch.cat([part[layer] for part in parts])[back] for layer in parts[0]}


class _RightTranslations:
    """Which pairs' targets are right for which pairs' sources, without an n × n matrix."""

    def __init__(self, relevant: Int[np.ndarray, "n k"]) -> None:
        self._relevant = relevant

    def __len__(self) -> int:
        return len(self._relevant)

    def mark(self, anchors: Int[np.ndarray, " n"], others: Int[np.ndarray, " m"]) -> Bool[np.ndarray, "n m"]:
        """Whether pair others[j]'s target is right for pair anchors[i]'s source."""
        return (self._relevant[anchors][:, :, None] == others[None, None, :]).any(axis=1)

    def among(self, pairs: Int[np.ndarray, " n"]) -> Bool[np.ndarray, "n n"]:
        return self.mark(pairs, pairs)

    def draw_wrong(self, pairs: Int[np.ndarray, " n"], rng: np.random.Generator) -> Int[np.ndarray, " n"]:
        """A random wrong pair for each: uniform among those that aren't right."""
        drawn = rng.integers(len(self), size=len(pairs))
        while (again := (self._relevant[pairs] == drawn[:, None]).any(axis=1)).any():
            drawn[again] = rng.integers(len(self), size=int(again.sum()))
        return drawn


def _negatives(
    pairs: Int[np.ndarray, " n"],
    right: _RightTranslations,
    fixed: Int[np.ndarray, " all"] | None,
    rng: np.random.Generator,
    objective: Objective,
) -> Int[np.ndarray, " n"] | None:
    if objective.name == "infonce" or objective.negatives == "batch":
        return None
    return right.draw_wrong(pairs, rng) if fixed is None else fixed[pairs]


def _needs_baseline(objective: Objective) -> bool:
    return objective.name == "triplet" and objective.negatives == "baseline"


def _baseline_negatives(
    model: nn.Module,
    source: Sequence[Prompt],
    target: Sequence[Prompt],
    right: _RightTranslations,
    objective: Objective,
) -> Int[np.ndarray, " n"]:
    """Each source's nearest wrong target before training, at the deepest layer of the loss, in blocks of rows."""
    layer = objective.layers[-1]
    vectors = encode(model, [*source, *target], layers=[layer])[0]
    anchors, others = vectors[: len(source)], vectors[len(source) :]
    every = np.arange(len(source))
    nearest = [
        nearest_wrong(anchors[rows], others, torch.from_numpy(right.mark(every[rows], every)))
        for rows in (slice(start, start + 256) for start in range(0, len(source), 256))
    ]
    return torch.cat(nearest).numpy()


def _steps(n_pairs: int, schedule: Schedule) -> list[tuple[int, int]]:
    """(first place in the epoch's order, number of pairs) of every step; a last batch of one pair joins the one before.

    One pair alone has no in-batch negative.
    """
    starts = list(range(0, n_pairs, schedule.batch_size))
    if len(starts) > 1 and n_pairs - starts[-1] == 1:
        starts.pop()
    ends = [*starts[1:], n_pairs]
    return [(start, end - start) for start, end in zip(starts, ends, strict=True)] * schedule.epochs


def _pace(step: int, n_steps: int, warmup: float) -> float:
    rising = math.ceil(warmup * n_steps)
    return (step + 1) / rising if step < rising else (n_steps - step) / max(1, n_steps - rising)


def _finite(loss: Tensor, weights: Sequence[Tensor], model: nn.Module, step: str, advice: str) -> float:
    """The loss, once it, its gradient and the adapter that came of it are known to be finite: one look at the device.

    A norm isn't finite where one of its numbers isn't, or where their squares leave float32: too large to train with.
    """
    gradient = get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    adapter = get_total_norm([weight.detach() for weight in weights])
    found = torch.stack([loss.detach(), *(norm.to(loss.device, loss.dtype) for norm in (gradient, adapter))]).tolist()
    for what, value in zip(("loss", "gradient", "adapter"), found, strict=True):
        if not math.isfinite(value):
            cause = likely_cause(model)
            if advice and what != "adapter":
                cause = advice
            raise NumbersError(f"the {what} is not a finite number at step {step}: {cause}")
    return found[0]


def _advice_at_first(objective: Objective) -> str:
    """What to do where the first step isn't finite already, so that the learning rate can't be the cause."""
    sharp = ["raise objective.temperature"] if objective.name == "infonce" else []
    return ", or ".join([*sharp, "set train.precision=float32 and model.dtype=float32"])


def _device_type(model: nn.Module) -> str:
    return next(model.parameters()).device.type
