"""Sums over a sweep's runs: what each parameter does, how far seeds scatter, gains over two parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from src.report_data import ALPHA, Sweep, named
from src.summary import SEEDS


@dataclass(frozen=True)
class Estimate:
    """A mean over runs, with Student's 95 % interval where there are two or more."""

    name: str
    values: tuple[float, ...]
    mean: float
    interval: tuple[float, float] | None


def estimate(name: str, values: Sequence[float]) -> Estimate:
    """The mean of at least one value."""
    from scipy import stats

    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Estimate(name, tuple(values), mean, None)
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    reach = float(stats.t.ppf(1 - ALPHA / 2, n - 1)) * error
    return Estimate(name, tuple(values), mean, (mean - reach, mean + reach))


def main_effects(sweep: Sweep, measure: str) -> dict[str, list[Estimate]]:
    """For each swept parameter, the gain at each of its levels, over all runs at that level."""
    return {
        key: [estimate(level, gains) for (level,), gains in _grouped(sweep, measure, [key]).items()]
        for key in sweep.swept
    }


def over_seeds(sweep: Sweep, measure: str) -> list[Estimate]:
    """The gain of each setting over the runs that differ by a seed only; empty where no seed was swept."""
    keys = [key for key in sweep.swept if key not in SEEDS]
    if len(keys) == len(sweep.swept):
        return []
    groups = _grouped(sweep, measure, keys)
    names = (named(dict(zip(keys, levels, strict=True)), sweep.swept) or "all runs" for levels in groups)
    return [estimate(name, gains) for name, gains in zip(names, groups.values(), strict=True)]


def _grouped(sweep: Sweep, measure: str, keys: Sequence[str]) -> dict[tuple[str, ...], list[float]]:
    """The runs' gains by their levels of `keys`, in the levels' order."""
    gains: dict[tuple[str, ...], list[float]] = {}
    for job in sweep.comparable:
        if (gain := job.gain(measure)) is not None:
            gains.setdefault(tuple(job.levels[key] for key in keys), []).append(gain)
    return {levels: gains[levels] for levels in sorted(gains, key=lambda levels: list(map(in_order, levels)))}


@dataclass(frozen=True)
class Grid:
    """Mean gains over two parameters: `cells[y][x]`, None where no run ended."""

    x: str
    y: str
    x_levels: list[str]
    y_levels: list[str]
    cells: list[list[float | None]]


def grid(sweep: Sweep, measure: str) -> Grid | None:
    """Layers × rank, or the first two parameters where those weren't swept; None where fewer than two were."""
    keys = [key for key in sweep.swept if key not in SEEDS]
    keys.sort(key=lambda key: {"lora.layers": 0, "lora.rank": 1}.get(key, 2))
    if len(keys) < 2:
        return None
    y, x = keys[:2]
    means = {pair: math.fsum(gains) / len(gains) for pair, gains in _grouped(sweep, measure, [y, x]).items()}
    rows, columns = (sorted({pair[place] for pair in means}, key=in_order) for place in (0, 1))
    return Grid(x, y, columns, rows, [[means.get((row, column)) for column in columns] for row in rows])


def in_order(level: str) -> tuple[Any, ...]:
    """Sorts numbers and lists of numbers by value, ahead of words."""
    numbers = re.findall(r"-?\d+\.?\d*(?:e[+-]?\d+)?", level)
    rest = re.sub(r"[\s\[\],]|-?\d+\.?\d*(?:e[+-]?\d+)?", "", level)
    return (0, [float(number) for number in numbers]) if numbers and not rest else (1, [], level)
