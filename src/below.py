"""What lies below the first adapted block stays the untouched model's: it is run once a job, not at every step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import nn

from src.layers import (
    TOKEN_BUDGET,
    Batch,
    Below,
    Prompt,
    Tree,
    blocks,
    distinct_prompts,
    evaluating,
    forward,
    packed,
    packs,
    pooled_states,
    read_states,
    similar_batches,
    text_config,
    trial_prompts,
    width,
)
from src.memory import ran_out

log = logging.getLogger(__name__)
MOST = 2**30  # bytes that the hidden states may take
# Of each model the last ones, by their layer and prompts: the next job of a sweep often wants the same.
_kept: WeakKeyDictionary[nn.Module, tuple[int, list[Prompt], Below]] = WeakKeyDictionary()


def run_below(model: nn.Module, prompts: Sequence[Prompt], layer: int) -> Below | None:
    """The hidden states of all the prompts' tokens at a layer that nothing below is trained for.

    None where a forward can't go on from them to the same result: the prompts aren't packed (`layers.packs`), the
    model drops out at random while it trains, or a block reads what another one below the layer has left; and where
    they would take more than MOST.
    """
    if layer == 0 or _drops_out(model) or not packs(model, prompts):
        return None
    distinct, _ = distinct_prompts(prompts)
    *key, below = _kept.pop(blocks(model), (None, None, None))
    if key != [layer, distinct]:
        try:
            below = _states(model, distinct, layer) if _goes_on(model, layer) else None
        except Exception as error:
            if not ran_out(error):
                raise
            log.warning("no memory for the hidden states at layer %d: all blocks run at every step", layer)
            below = None
    if below:
        _kept[blocks(model)] = (layer, distinct, below)
    return below


def _states(model: nn.Module, prompts: Sequence[Prompt], layer: int) -> Below | None:
    rows, like = Tree(prompts).nodes, next(model.parameters())  # the embeddings, of the hidden states' type
    if len(rows) * width(model) * like.element_size() > MOST:
        return None
    below = Below(layer, rows, torch.empty(len(rows), width(model), dtype=like.dtype, device=like.device))

    def keep(batch: Batch, hidden: torch.Tensor) -> None:
        assert batch.tokens is not None
        real = batch.tokens >= 0
        below.states[batch.tokens[real].to(like.device)] = hidden[real.to(hidden.device)].to(below.states)

    with evaluating(model):
        for places in similar_batches(prompts, TOKEN_BUDGET):
            batch = packed([prompts[place] for place in places], below)
            with read_states(model, [layer], lambda _, hidden, batch=batch: keep(batch, hidden)):
                forward(model, batch)
    return below


def _goes_on(model: nn.Module, layer: int) -> bool:
    """Whether a forward that begins at the layer ends where a whole one does."""
    prompts = trial_prompts(model)
    with evaluating(model):
        whole = dict(pooled_states(model, packed(prompts), ["final"]))["final"]
        resumed = dict(pooled_states(model, packed(prompts, _states(model, prompts, layer)), ["final"]))["final"]
    return torch.allclose(whole, resumed, rtol=0, atol=1e-5)


def _drops_out(model: nn.Module) -> bool:
    """Whether the model itself, and not only its adapter, drops out at random while it trains."""
    values = text_config(model).to_dict().items()
    return any("drop" in key and isinstance(value, float) and value > 0 for key, value in values)
