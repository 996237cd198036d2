"""Unit vectors of words at all layers: in memory or, where they are many, in a file that is read a layer at a time."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

import numpy as np
import torch
from torch import Tensor, nn

from src.files import cache_dir, room_for
from src.layers import Below, Progress, Prompt, all_layers, depth, distinct_prompts, encoded_batches, width

with suppress(ModuleNotFoundError):  # shapes are checked in tests; a bare GPU machine need not have jaxtyping
    from jaxtyping import Float, Int

IN_MEMORY = 2**30  # bytes; larger encodings go to a file


@dataclass(frozen=True)
class Vectors:
    """Vectors of prompts, each distinct one stored once, in memory or in a file's pages."""

    array: Float[np.ndarray, "layers distinct d"]
    row_of: Int[np.ndarray, " prompts"]
    pages: mmap.mmap | None = None

    def at(self, layer_index: int, rows: slice) -> Float[Tensor, "rows d"]:
        """One layer's vectors of some of the prompts, a copy."""
        found = torch.from_numpy(self.array[layer_index][self.row_of[rows]])
        self.let_go()
        return found

    def let_go(self) -> None:
        """Takes the file's pages out of this process's memory; what was written to them stays in the file."""
        if self.pages:
            self.pages.madvise(mmap.MADV_DONTNEED)


def encode_words(
    model: nn.Module,
    prompts: Sequence[Prompt],
    *,
    known: tuple[Below, Vectors] | None = None,
    file: IO[bytes] | None = None,
    progress: Progress | None = None,
) -> Vectors:
    """Vectors of the prompts at all layers, in `file` where one is given.

    `known` are hidden states to go on from, and the same prompts' vectors, whose layers up to there are copied.
    Raises OSError (DiskError without `file`) at once where the disk can't hold them.
    """
    distinct, row_of = distinct_prompts(prompts, as_batched=True)
    layers = all_layers(depth(model))
    shape, rows = (len(layers), len(distinct), width(model)), np.array(row_of)
    made = _room(shape, rows) if file is None else _room_in(file, shape, rows)
    below, first = None, 0
    if known:
        below, before = known
        first = below.block
        for layer in range(first):
            made.array[layer] = before.array[layer]
            made.let_go()
            before.let_go()
    for places, vectors in encoded_batches(model, distinct, layers[first:], below, progress):
        made.array[first:, places] = vectors.numpy()
        made.let_go()
    return made


def stored(file: IO[bytes], model: nn.Module, prompts: Sequence[Prompt]) -> Vectors:
    """The vectors of these prompts that `encode_words` has left in a file."""
    distinct, row_of = distinct_prompts(prompts, as_batched=True)
    pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return Vectors(np.frombuffer(pages, np.float32).reshape(-1, len(distinct), width(model)), np.array(row_of), pages)


def _room_in(file: IO[bytes], shape: tuple[int, ...], row_of: Int[np.ndarray, " prompts"]) -> Vectors:
    size = 4 * math.prod(shape)
    os.posix_fallocate(file.fileno(), 0, size)  # a disk that fills up later would end the program by a signal
    pages = mmap.mmap(file.fileno(), size)
    return Vectors(np.frombuffer(pages, np.float32).reshape(shape), row_of, pages)


def _room(shape: tuple[int, ...], row_of: Int[np.ndarray, " prompts"]) -> Vectors:
    if 4 * math.prod(shape) <= IN_MEMORY:
        return Vectors(np.empty(shape, np.float32), row_of)
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_dir()) as file:  # nameless: gone with the process, even if that is killed
            return _room_in(file, shape, row_of)
    except OSError:  # full or read-only
        with room_for(cache_dir()), tempfile.TemporaryFile() as file:
            return _room_in(file, shape, row_of)
