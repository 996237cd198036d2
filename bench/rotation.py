"""Does rounding decide procrustes_p_at_1? python -m bench.rotation. SmolLM2-135M, the built-in pairs, every layer.

The rotation in float32 and in float64, with one thread and with all: two numbers that should be one.
"""

from __future__ import annotations

import time
import warnings

import torch
from torch import Tensor

from bench.speed import prepared, setting
from src.layers import encode
from src.measures import csls_ranks


def main() -> None:
    warnings.simplefilter("ignore")
    it = prepared(setting())
    n, train = len(it.pairs), len(it.words.train)
    vectors, relevant = encode(it.loaded.model, [*it.source, *it.target]), it.relevant("control")
    threads = torch.get_num_threads()
    print(f"{threads} threads, torch {torch.__version__}, {len(vectors)} layers, {train} pairs fitted\n")
    print("| | layers that differ with one thread | ms a layer |\n|---|---|---|")
    for dtype in (torch.float32, torch.float64):
        found: list[list[float]] = []
        for count in (1, threads):
            torch.set_num_threads(count)
            began = time.perf_counter()
            rotated = [
                _rotated(layer[train:n].to(dtype), layer[:train].to(dtype), layer[n : n + train].to(dtype))
                for layer in vectors
            ]
            seconds = time.perf_counter() - began
            targets = vectors[:, n + train :]
            found.append([_hits(a, b, relevant) for a, b in zip(rotated, targets, strict=True)])
        differing = sum(a != b for a, b in zip(*found, strict=True))
        print(f"| {dtype} | {differing} | {1000 * seconds / len(vectors):.0f} |", flush=True)


def _rotated(vectors: Tensor, source: Tensor, target: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(source.T @ target)
    return torch.linalg.multi_dot([vectors, left, right]).float()


def _hits(rotated: Tensor, target: Tensor, relevant: Tensor) -> float:
    return (csls_ranks(rotated, target, relevant) == 1).double().mean().item()


if __name__ == "__main__":
    main()
