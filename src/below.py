"""What lies below the first adapted block stays the untouched model's: it is run once a job, not at every step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple
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
    embeddings,
    evaluating,
    forward,
    packed,
    packs,
    pooled_states,
    read_states,
    similar_batches,
    tree_size,
    trial_prompts,
    width,
)
from src.memory import ran_out

log = logging.getLogger(__name__)
MOST_BYTES = 2**30  # that the hidden states may take


class _Kept(NamedTuple):
    prompts: list[Prompt]
    below: Below


kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()  # each model's last: a sweep's next job often wants it


def run_below(model: nn.Module, prompts: Sequence[Prompt], block: int) -> Below | None:
    """The hidden states of all the prompts' tokens that a block is given, below which nothing is to be trained.

    None, which the log explains, where a forward in float32 can't go on from them to the same result, or where they
    would take more than MOST_BYTES.
    """
    stack, (distinct, _) = blocks(model), distinct_prompts(prompts)
    if stack in kept and kept[stack].below.block == block and kept[stack].prompts == distinct:
        return kept[stack].below
    kept.pop(stack, None)  # first, so that two of them never fill the memory
    try:
        why = _obstacle(model, distinct, block)
        if not why:
            with evaluating(model):
                kept[stack] = _Kept(distinct, _states(model, distinct, block))
            return kept[stack].below
    except Exception as error:
        if not ran_out(error):
            raise
        why = "there is no memory for their hidden states"
    log.info("nothing is kept of the blocks below %d: %s", block, why)
    return None


def _obstacle(model: nn.Module, prompts: Sequence[Prompt], block: int) -> str:
    """Why the hidden states that a block is given can't be kept for these prompts; empty where they can."""
    if block == 1:
        return "there are none"
    if tree_size(prompts) * width(model) * embeddings(model).weight.element_size() > MOST_BYTES:
        return f"their hidden states would take more than {MOST_BYTES >> 20} MiB"
    if not packs(model, prompts):
        return "this model's prompts can't be packed"
    return _trial(model, block)


def _trial(model: nn.Module, block: int) -> str:
    """Tries whether a forward that begins at the block ends the same, and whether those below do the same in training.

    Tried and not looked up: what a decoder does between its blocks, what one block leaves for another (a shared KV
    cache), and what it draws at random (dropout, a router's noise) differ by architecture. Between the whole forward
    and the other one runs a third, of more prompts, so that what a block has left behind isn't what it would leave.
    """
    prompts = trial_prompts(model)
    try:
        with evaluating(model):
            whole = dict(pooled_states(model, packed(prompts[1:]), ["final"]))["final"]
            below = _states(model, prompts, block)
            resumed = dict(pooled_states(model, packed(prompts[1:], below), ["final"]))["final"]
            if not torch.allclose(whole, resumed, rtol=0, atol=1e-5):
                return "those above read what they leave"
            model.train()
            with torch.random.fork_rng():
                for seed in range(2):
                    torch.manual_seed(seed)
                    if not torch.equal(_states(model, prompts, block).states, below.states):
                        return "they are random in training"
    except Exception as error:
        if ran_out(error):
            raise
        return f"this model can't go on from there ({type(error).__name__}: {error})"
    return ""


def _states(model: nn.Module, prompts: Sequence[Prompt], block: int) -> Below:
    """On the CPU, where a GPU's memory isn't taken from training; a batch's are moved when it runs."""
    rows = Tree(prompts).nodes
    below = Below(block, rows, torch.empty(len(rows), width(model), dtype=embeddings(model).weight.dtype))

    def keep(batch: Batch, hidden: torch.Tensor) -> None:
        assert batch.tokens is not None
        real = batch.tokens >= 0
        below.states[batch.tokens[real]] = hidden[real.to(hidden.device)].to(below.states)

    for places in similar_batches(prompts, TOKEN_BUDGET):
        batch = packed([prompts[place] for place in places], below)
        with read_states(model, [below.layer], lambda _, hidden, batch=batch: keep(batch, hidden)):
            forward(model, batch)
    return below
