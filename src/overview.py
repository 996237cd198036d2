"""Figures of a whole sweep, for its run in MLflow: every job's curve over the layers, and its gain beside others'."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from src.plots import (
    AFTER,
    BEFORE,
    INK,
    MISMATCHED,
    PAIRS,
    QUIET,
    WORSE,
    by_layer,
    end_labels,
    layer_axis,
    new_figure,
    write_figures,
)
from src.results import read_table
from src.summary import counted_by

MOST = 30  # jobs in the figure of settings
NAME = 44  # characters of a job's name and verdict
BEST = 5  # curves with a colour and a name of their own
COLOURS = (AFTER, PAIRS, WORSE, BEFORE, MISMATCHED)
GAIN = "control/margin_gain"


def draw_overview(found: Sequence[Mapping[str, Any]], folder: Path, title: str) -> list[Path]:
    """Writes layers.png and settings.png of the trained jobs into `folder`; nothing where there is none.

    `found` is what `summary.read_results` gives; `title` names the sweep in small print.
    """
    trained = sorted((results for results in found if GAIN in results), key=lambda results: -results[GAIN])
    if not trained:
        return []
    draw = {"settings.png": lambda: _settings(trained, title), "layers.png": lambda: _layers(trained, title)}
    return write_figures(folder, draw)


def _settings(trained: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """A line for each job, from the retrieval of unseen words before training to that after it.

    A bar marks the best layer of the untouched model, beside which the end must be read.
    """
    shown = trained[:MOST]
    counts = Counter(results["verdict"] for results in trained)
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    headline = f"Unseen words before and after training, largest margin gain on top: {verdicts}"
    figure, ((axes,),) = new_figure(headline, title, (1, 1), height=1.6 + 0.26 * len(shown))
    figure.subplots_adjust(left=0.42, right=0.97)
    for row, results in enumerate(shown):
        before, after = (results[f"control/csls_p_at_1_{when}"] for when in ("before", "after"))
        colour = {"aligned": PAIRS, "drawn together": AFTER, "harmed": WORSE}.get(results["verdict"], QUIET)
        axes.plot([before, after], [row, row], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(before, row, "o", color="white", markeredgecolor=colour, markersize=5)
        axes.plot(after, row, "o", color=colour, markersize=6)
        if (untouched := results.get("baseline/best_layer_csls_p_at_1_before")) is not None:
            axes.plot(untouched, row, "|", color=INK, markersize=11, markeredgewidth=1.5)
    labels = [f"{_short(results['name'], NAME - len(results['verdict']))}  ({results['verdict']})" for results in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize=8, parse_math=False)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(visible=True, axis="x")
    known = any("baseline/best_layer_csls_p_at_1_before" in results for results in shown)
    bar = "; bar: best untouched layer" if known else ""
    axes.set_xlabel(f"{_retrieval(trained)}: open before, filled after{bar}", x=1, horizontalalignment="right")
    _as_percent(axes, "x")
    return figure


def _layers(trained: Sequence[Mapping[str, Any]], title: str) -> Figure | None:
    """Retrieval of unseen words over the layers after training, a curve for each job; the untouched model's dashed."""
    tables = [by_layer(read_table(Path(results["folder"]) / "layers.csv")) for results in trained]
    curves = [
        (results, table)
        for results, table in zip(trained, tables, strict=True)
        if table.has("after", "control", "csls_p_at_1") and table.has("before", "control", "csls_p_at_1")
    ]
    if not curves or len({len(table.names) for _, table in curves}) > 1:  # models of several depths have no one axis
        return None
    names = curves[0][1].names
    headline = f"Where do unseen words find their translation? {_count(len(curves))} by margin gain in colour"
    figure, ((axes,),) = new_figure(headline, title, (1, 1))
    figure.subplots_adjust(right=0.7)
    labels = []
    x = np.arange(len(names))
    for rank, (results, table) in reversed(list(enumerate(curves))):
        values = table.values["after", "control", "csls_p_at_1"]
        colour = COLOURS[rank] if rank < BEST else "#CFCFCF"
        axes.plot(x, values, color=colour, linewidth=2 if rank < BEST else 1)
        if rank < BEST:
            labels.append((_short(results["name"], 34), float(values[-1]), colour))
    untouched = {tuple(table.values["before", "control", "csls_p_at_1"]) for _, table in curves}
    for values in untouched:
        axes.plot(x, values, color="black", linewidth=1.4, linestyle="--")
    labels.append(("before training", float(next(iter(untouched))[-1]), "black"))
    layer_axis(axes, names)
    _as_percent(axes, "y")
    axes.set_ylabel(_retrieval([results for results, _ in curves]))
    end_labels(axes, labels)
    return figure


def _count(jobs: int) -> str:
    return f"The best {BEST} of {jobs} jobs" if jobs > BEST else f"{jobs} jobs" if jobs > 1 else "One job"


def _retrieval(found: Sequence[Mapping[str, Any]]) -> str:
    units = " or ".join(sorted({counted_by(results) for results in found}, reverse=True))
    return f"retrieval, CSLS P@1 by {units}"


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _as_percent(axes: Axes, side: str) -> None:
    axis = axes.xaxis if side == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
