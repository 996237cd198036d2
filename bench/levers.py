"""What each idea for speed is worth: python -m bench.levers [--repeats 5]. SmolLM2-135M, 1,372 words.

Each row is encoding at every layer with one thing changed, and at the end an epoch with the loss at the output; they
take turns within one process.
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from bench.speed import AT_OUTPUT, OUTPUT, epoch, prepared, setting, table, take_turns
from src import layers
from src.linear import multiply_by_onednn, product
from src.models import adapter


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.levers", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.compiler.config.force_disable_caches = True  # else an earlier call's would make the first ones quick
    it = prepared(setting("lora.layers=[1,2]"))
    prompts, model = [*it.source, *it.target], it.loaded.model
    half = copy.deepcopy(model).to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
    compiled = _compiled(copy.deepcopy(model), above=0)
    packed = _packed_for_onednn(copy.deepcopy(model))
    began = time.perf_counter()
    layers.encode(compiled, prompts)
    first = time.perf_counter() - began

    def encode(own: Any = model, **changed: Any) -> Callable[[], Any]:
        def call() -> Any:
            with patch.dict(vars(layers), changed):
                return layers.encode(own, prompts)

        return call

    by_onednn = copy.deepcopy(model)
    multiply_by_onednn(by_onednn)

    rows = {
        "as it is": encode(),
        "products by torch's own choice, MKL": encode(_by_torch(copy.deepcopy(model))),
        "products by oneDNN": encode(by_onednn),
        "batches of 512 tokens": encode(TOKEN_BUDGET=512),
        "rows of 128 tokens": encode(_ROW=128),
        "rows as long as the batch": encode(_ROW=10**6),
        "nothing shared: a row a word, batches of equal length": encode(packs=lambda *_: False),
        "torch.compile, block by block, MKL": encode(compiled),
        "weights packed for oneDNN, a second copy": encode(packed),
        "weights and activations in bfloat16": encode(half),
    }
    table(take_turns(rows, repeats), "as it is")
    print(f"\ntorch.compile's first call: {first:.1f} s")
    with adapter(model, it.config.lora, [1, 2], seed=0) as adapted:
        seconds = take_turns({"beside the weights": encode(adapted)}, repeats)
        merged = copy.deepcopy(adapted).merge_and_unload()  # pyright: ignore[reportCallIssue]
        seconds |= take_turns({"merged": encode(merged)}, repeats)
    print("\nWith an adapter in blocks 1 and 2:\n")
    table(seconds, "beside the weights")
    _compiled_training(repeats)


def _compiled_training(repeats: int) -> None:
    """An epoch whose loss is at the output, as it is, and with the blocks above the adapters compiled."""
    it = prepared(setting(*AT_OUTPUT))
    adapted = OUTPUT.adapted
    model = _compiled(copy.deepcopy(it.loaded.model), above=max(adapted))
    compiled = replace(it, loaded=replace(it.loaded, model=model))
    plain, other = (partial(epoch, own, adapted, ("final",)) for own in (it, compiled))
    first, losses = other()
    apart = max(abs(a - b) for a, b in zip(losses, plain()[1], strict=True))
    print("\nAn epoch with the loss at the output, adapters in blocks 1 to 4:\n")
    table(take_turns({"as it is": plain, "the blocks above compiled": other}, repeats), "as it is")
    print(f"\nIts first epoch: {first:.1f} s; losses differ by at most {apart:.1e}")


def _compiled(model: Any, *, above: int) -> Any:
    """The model whose blocks above the one of that number are compiled, each by itself."""
    for block in layers.blocks(model)[above:]:
        block.compile(dynamic=True)
    return model


def _by_torch(model: Any) -> Any:
    """The model before `linear.multiply_by_onednn`."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.__class__ = torch.nn.Linear
    return model


def _packed_for_onednn(model: Any) -> Any:
    """A second copy of each matrix, in the order that oneDNN reads it."""
    for module in layers.blocks(model).modules():
        if isinstance(module, torch.nn.Linear):
            weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), None)
            module.forward = partial(product, weight=weight)  # pyright: ignore[reportAttributeAccessIssue]
    return model


if __name__ == "__main__":
    main()
