"""Time and memory of measures and tests: python -m bench.retrieval [100000] (words; takes minutes)."""

from __future__ import annotations

import sys
import threading
import time

import numpy as np
import psutil
import torch

from src.evidence import specificity_test
from src.measures import MEASURES, measure, retrieval_ranks

WIDTH = 576


class PeakMemory:
    """Highest resident memory of this process inside the block, above where it began, in MiB."""

    def __enter__(self) -> PeakMemory:
        self._process, self._done = psutil.Process(), threading.Event()
        self._start = self.peak = self._process.memory_info().rss
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()
        self.mib = (self.peak - self._start) / 2**20


def words(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    source = torch.randn(n, WIDTH)
    target = torch.randn(n, WIDTH).add_(source)
    for vectors in (source, target):
        vectors.div_(vectors.norm(dim=1, keepdim=True))
    other = torch.arange(n).roll(1).where(torch.arange(n) % 10 == 0, -1)  # a tenth has two translations
    return source, target, torch.stack([torch.arange(n), other], dim=1)


def main() -> None:
    sizes = [1_000, 10_000, *map(int, sys.argv[1:])]
    measure(*words(100))  # warm up
    print(f"width {WIDTH}, float32, {torch.get_num_threads()} threads, all measures but Procrustes\n")
    print("| words | seconds | peak memory above the inputs, MiB | ranks alone, s |\n|---|---|---|---|")
    for n in sizes:
        inputs = words(n)
        with PeakMemory() as memory:
            start = time.perf_counter()
            measure(*inputs)
            seconds = time.perf_counter() - start
        start = time.perf_counter()
        retrieval_ranks(*inputs)
        ranks = time.perf_counter() - start
        print(f"| {n:,} | {seconds:.2f} | {memory.mib:.0f} | {ranks:.2f} |", flush=True)

    inputs = words(686)
    for label, names, fitted_on in (
        ("all but Procrustes", MEASURES, None),
        ("Procrustes alone", ("procrustes_p_at_1",), inputs[:2]),
    ):
        start = time.perf_counter()
        for _ in range(60):
            measure(*inputs, names=names, fitted_on=fitted_on)
        print(f"\n30 layers × 686 pairs, before and after, {label}: {time.perf_counter() - start:.2f} s")

    before, after = np.random.default_rng(0).normal(size=(2, 700, 700))
    start = time.perf_counter()
    specificity_test(before, after)
    print(f"\nspecificity test, 700 pairs, 10,000 permutations: {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
