"""Figures of one run, drawn from its tables into the job folder's plots/: each states in its headline what it shows."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from src.files import written_atomically

# Okabe & Ito's colours, told apart by colour-blind readers too; each stands for one thing in all figures.
BEFORE, AFTER, PAIRS, MISMATCHED = "#E69F00", "#0072B2", "#009E73", "#CC79A7"
WORSE, QUIET, INK = "#D55E00", "#8A8A8A", "#222222"
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9, "text.usetex": False, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": QUIET, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
    "axes.titlelocation": "left", "xtick.color": INK, "ytick.color": INK, "lines.linewidth": 2,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#E6E6E6", "axes.axisbelow": True,
}  # fmt: skip
WIDTH, HEIGHT, DPI = 8, 4.8, 150  # inches and dots per inch: 1,200 pixels wide
NO_GAP = 0.01  # a margin below this is none: whatever the pair cosine, it tells no pair from a mismatch
UNSEEN = {"control": "words never trained on", "train": "trained words"}


@dataclass(frozen=True)
class Layers:
    """The rows of layers.csv as arrays: one value a layer, in order, NaN where there is none."""

    names: list[str]
    values: dict[tuple[str, str, str], np.ndarray]

    def of(self, stage: str, split: str, measure: str) -> np.ndarray | None:
        return self.values.get((stage, split, measure))


def draw_all(
    folder: Path,
    *,
    layers: Sequence[Mapping[str, Any]],
    pairs: Sequence[Mapping[str, Any]],
    null: Mapping[str, np.ndarray],
    observed: Mapping[str, float],
    title: str,
) -> list[Path]:
    """Writes the figures that the data allow into folder/plots and returns their paths.

    `layers` and `pairs` are the rows of layers.csv and pairs.csv (numbers may be text, as read back; empty is
    missing), `null` and `observed` the specificity test's gains per split, `title` names the run in small print. An
    untrained run has `similarity.png` and `retrieval.png` of the pilot; a trained one also `scatter.png` and
    `specificity.png`.
    """
    table = _by_layer(layers)
    written = []
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A title in a script the font lacks shows boxes; that is no reason to fail or to worry anybody.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        for name, figure in (
            ("similarity.png", similarity(table, title)),
            ("retrieval.png", retrieval(table, pairs, title)),
            ("scatter.png", scatter(pairs, title)),
            ("specificity.png", specificity(null, observed, title)),
        ):
            if figure is not None:
                with written_atomically(folder / "plots" / name) as temporary:
                    figure.savefig(temporary, format="png", dpi=DPI)
                written.append(folder / "plots" / name)
    return written


# --- similarity ---------------------------------------------------------------------------------------------


def similarity(table: Layers, title: str) -> Figure | None:
    """Cosine of pairs against that of mismatches over the layers, and the gap between them on a log axis.

    The gap has an axis of its own because both cosines can be 0.9999, where one curve hides the other.
    """
    panels = [
        (heading, curves)
        for heading, curves in (
            ("all words, untouched model", [("pilot", "all", "")]),
            ("words never trained on", [("before", "control", " before"), ("after", "control", " after")]),
        )
        if all(table.of(stage, split, "pair_cosine") is not None for stage, split, _ in curves)
    ]
    if not panels:
        return None
    figure, axes = _figure(_similarity_headline(table), title, (2, len(panels)), heights=(2.3, 1), sharex=True)
    for (heading, curves), (top, bottom) in zip(panels, axes.T, strict=True):
        top.set_title(heading)
        labels, gaps = [], []
        for stage, split, when in curves:
            pair = _known(table, stage, split, "pair_cosine")
            mismatched = _known(table, stage, split, "mismatched_cosine")
            look = {"linestyle": "--" if stage == "before" else "-"}
            x = np.arange(len(pair))
            if stage != "before":
                top.fill_between(x, mismatched, pair, color=PAIRS, alpha=0.15, linewidth=0)
            # Drawn over the pairs' line, and thinner: where they coincide, both still show.
            top.plot(x, pair, color=PAIRS, linewidth=3.5 if stage != "before" else 2, **look)
            top.plot(x, mismatched, color=MISMATCHED, linewidth=1.5, **look)
            labels += [(f"pairs{when}", pair[-1], PAIRS), (f"mismatched{when}", mismatched[-1], MISMATCHED)]
            gaps.append((f"gap{when}", pair - mismatched, look))
        low = min(0, *(np.nanmin(line.get_ydata()) for line in top.lines))
        top.set_ylim(low * 1.05, 1.04)
        _end_labels(top, labels)
        _draw_gaps(bottom, gaps)
        _layer_axis(bottom, table.names)
    axes[0, 0].set_ylabel("mean cosine")
    axes[1, 0].set_ylabel("gap (log scale)")
    return figure


def _draw_gaps(axes: Axes, gaps: Sequence[tuple[str, np.ndarray, dict[str, Any]]]) -> None:
    positive = np.concatenate([gap[gap > 0] for _, gap, _ in gaps] + [np.array([NO_GAP / 10])])
    floor = max(10 ** np.floor(np.log10(positive.min())), 1e-6)
    axes.set_yscale("log")
    axes.set_ylim(floor / 1.5, 2)
    axes.yaxis.set_major_locator(LogLocator(numticks=4))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.axhspan(floor / 1.5, NO_GAP, color="#F0F0F0", zorder=0)
    axes.text(0.01, 0.04, f"below {NO_GAP}: cosine can't tell them apart", transform=axes.transAxes, fontsize=7.5)
    for _, gap, look in gaps:
        axes.plot(np.maximum(gap, floor), color=PAIRS, **look)
        negative = np.flatnonzero(gap <= 0)
        axes.plot(negative, np.full(len(negative), floor), "x", color=WORSE, markersize=5, clip_on=False)
    if any((gap <= 0).any() for _, gap, _ in gaps):
        axes.text(0.99, 0.04, "× none, or negative", transform=axes.transAxes, ha="right", fontsize=7.5, color=WORSE)
    _end_labels(axes, [(label, max(gap[-1], floor), PAIRS) for label, gap, _ in gaps])


def _similarity_headline(table: Layers) -> str:
    before, after = (table.of(stage, "control", "margin") for stage in ("before", "after"))
    pair, gap = table.of("pilot", "all", "pair_cosine"), table.of("pilot", "all", "margin")
    said = []
    if pair is not None and gap is not None:
        best = int(np.nanargmax(gap))
        said.append(f"Pairs stand out most from mismatches at {_layer(table, best)} (gap {gap[best]:.2g})")
        blind = int(((pair > 0.9) & (gap < NO_GAP)).sum())
        if blind:
            said.append(f"{blind} of {len(gap)} layers have cosines above 0.9 that tell nothing (gap below {NO_GAP})")
    if before is not None and after is not None:
        most = int(np.nanargmax(np.abs(after - before)))
        said.append(f"training moved the gap most at {_layer(table, most)}: {before[most]:.2g} → {after[most]:.2g}")
    return "; ".join(said)


# --- retrieval ----------------------------------------------------------------------------------------------


def retrieval(table: Layers, pairs: Sequence[Mapping[str, Any]], title: str) -> Figure | None:
    """Share of words whose nearest neighbour is a translation, over the layers, by CSLS and by plain cosine."""
    trained = table.of("after", "control", "csls_p_at_1") is not None
    curves = [("after", "control", AFTER), ("before", "control", BEFORE)] if trained else [("pilot", "all", AFTER)]
    panels = [
        (heading, measure)
        for heading, measure in (("CSLS P@1", "csls_p_at_1"), ("nearest neighbour P@1 (plain cosine)", "nn_p_at_1"))
        if all(table.of(stage, split, measure) is not None for stage, split, _ in curves)
    ]
    if not panels:
        return None
    size = sum(row["split"] == "control" for row in pairs) if trained else len(pairs)
    headline = _retrieval_headline(table, curves, panels[0], size)
    figure, axes = _figure(headline, title, (1, len(panels)), sharey=True)
    for (heading, measure), panel in zip(panels, axes[0], strict=True):
        panel.set_title(heading)
        labels = []
        for stage, split, colour in curves:
            values = _known(table, stage, split, measure)
            panel.plot(values, color=colour)
            labels.append((f"unseen {stage}" if trained else "all words", values[-1], colour))
            train = table.of(stage, "train", measure)
            if trained and train is not None:
                panel.plot(train, color=colour, linewidth=1, alpha=0.5)
                labels.append((f"trained {stage}", train[-1], colour))
        if size:
            panel.axhline(1 / size, color=INK, linewidth=1, linestyle=":")
            labels.append(("chance", 1 / size, INK))
        panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _end_labels(panel, labels)
        _layer_axis(panel, table.names)
    axes[0, 0].set_ylim(0, 1.06 * max(np.nanmax(line.get_ydata()) for panel in axes[0] for line in panel.lines))
    axes[0, 0].set_ylabel("words that find a translation")
    return figure


def _retrieval_headline(
    table: Layers, curves: Sequence[tuple[str, str, str]], panel: tuple[str, str], size: int
) -> str:
    heading, measure = panel
    found = []
    for stage, split, _ in curves:
        values = _known(table, stage, split, measure)
        best = int(np.nanargmax(values))
        found.append(f"{values[best]:.0%} at {_layer(table, best)}")
    chance = f" (chance {1 / size:.1%})" if size else ""
    if len(found) == 1:
        return f"Words find their translation best, {found[0]}{chance}, by {heading}"
    return f"Words never trained on find their translation best, {found[0]} after and {found[1]} before{chance}"


# --- pairs and tests ----------------------------------------------------------------------------------------


def scatter(pairs: Sequence[Mapping[str, Any]], title: str) -> Figure | None:
    """Cosine of every control pair before and after, coloured by what became of the translation's rank."""
    columns = ("cosine_before", "cosine_after", "rank_before", "rank_after")
    rows = [[float(r[c]) for c in columns] for r in pairs if r["split"] == "control" and r["cosine_after"] != ""]
    if not rows:
        return None
    before, after, old, new = np.array(rows).T
    kinds = (
        ("rank unchanged", new == old, QUIET, "o"),
        ("rank better", new < old, AFTER, "^"),
        ("rank worse", new > old, WORSE, "v"),
    )
    up, more, less = (int(mask.sum()) for mask in (after > before, new < old, new > old))
    headline = (
        f"Of {len(rows)} pairs never trained on, {up} became more alike; "
        f"the translation's rank got better for {more} and worse for {less}"
    )
    figure, ((axes,),) = _figure(headline, title, (1, 1), height=5.4)
    low, high = min(before.min(), after.min()), max(before.max(), after.max())
    edge = max(0.06 * (high - low), 1e-4)
    limits = (low - edge, high + edge)
    axes.axline((low, low), slope=1, color=INK, linewidth=1, linestyle=":")
    axes.set(xlim=limits, ylim=limits, xlabel="cosine before", ylabel="cosine after", aspect="equal", anchor="W")
    axes.ticklabel_format(useOffset=False)
    axes.grid(axis="both")
    axes.locator_params(nbins=5)
    dots = {"s": 30 if len(rows) < 500 else 10, "alpha": 0.8 if len(rows) < 500 else 0.4, "linewidths": 0}
    for place, (label, mask, colour, marker) in enumerate(kinds):
        axes.scatter(before[mask], after[mask], color=colour, marker=marker, **dots)
        at = {"transform": axes.transAxes, "clip_on": False}
        axes.plot(1.08, 0.75 - 0.09 * place, marker, color=colour, markersize=8, **at)
        axes.text(1.13, 0.75 - 0.09 * place, f"{label}: {mask.sum()}", color=colour, va="center", fontsize=11, **at)
    axes.text(1.06, 0.4, "above the dotted line:\nmore alike than before", fontsize=9, transform=axes.transAxes)
    return figure


def specificity(null: Mapping[str, np.ndarray], observed: Mapping[str, float], title: str) -> Figure | None:
    """Gains of random matchings, and that of the true one: a change that lifts all cosines alike moves neither."""
    splits = [split for split in UNSEEN if split in null and split in observed and len(null[split])]
    if not splits:
        return None
    said = [
        f"{UNSEEN[split]}: true pairs gained {observed[split]:+.2g} more than mismatches, "
        f"ahead of {_share(np.mean(null[split] < observed[split]))} of random matchings"
        for split in splits
    ]
    figure, axes = _figure("\n".join(text[0].upper() + text[1:] for text in said), title, (1, len(splits)))
    for split, panel in zip(splits, axes[0], strict=True):
        gains, true = np.asarray(null[split]), observed[split]
        panel.set_title(UNSEEN[split])
        reach = max(np.abs(gains).max(), abs(true), 1e-9)
        width = max(np.ptp(gains), reach / 50)
        panel.hist(gains, bins=40, range=(gains.mean() - width / 2, gains.mean() + width / 2), color="#BBBBBB")
        panel.axvline(true, color=AFTER, linewidth=2.5)
        panel.set_xlim(min(gains.min(), true) - 0.15 * reach, max(gains.max(), true) + 0.15 * reach)
        top = panel.get_ylim()[1]
        panel.set_ylim(0, 1.25 * top)
        left, right = panel.get_xlim()
        beyond = true > (left + right) / 2
        side = "right" if beyond else "left"
        panel.annotate("true pairs ", (true, 1.17 * top), (-5 if beyond else 5, 0), textcoords="offset points", ha=side,
                       color=AFTER, fontweight="bold")  # fmt: skip
        panel.text(gains.mean(), 1.03 * top, "random matchings", ha="center", color=QUIET)
        panel.locator_params(axis="x", nbins=5)
        panel.ticklabel_format(axis="x", useOffset=False)
        panel.set_xlabel("gain of matched over mismatched cosine")
    axes[0, 0].set_ylabel("random matchings")
    return figure


# --- small parts --------------------------------------------------------------------------------------------


def _by_layer(rows: Iterable[Mapping[str, Any]]) -> Layers:
    rows = list(rows)
    found = {str(row["layer"]) for row in rows}
    names = [*sorted(found - {"final"}, key=int), *(found & {"final"})]
    place = {name: i for i, name in enumerate(names)}
    values: dict[tuple[str, str, str], np.ndarray] = {}
    for row in rows:
        key = (row["stage"], row["split"], row["measure"])
        array = values.setdefault(key, np.full(len(names), np.nan))
        if row["value"] != "":
            array[place[str(row["layer"])]] = float(row["value"])
    return Layers(names, values)


def _known(table: Layers, stage: str, split: str, measure: str) -> np.ndarray:
    return table.values[stage, split, measure]


def _layer(table: Layers, index: int) -> str:
    name = table.names[index]
    return "the final layer" if name == "final" else f"layer {name}"


def _share(share: float) -> str:
    return "all" if share == 1 else "none" if share == 0 else f"{np.floor(1000 * share) / 10:g} %"


def _figure(
    headline: str,
    title: str,
    shape: tuple[int, int],
    *,
    height: float = HEIGHT,
    heights: Sequence[float] = (1,),
    **shared,
) -> tuple[Figure, np.ndarray]:
    """A figure with its headline, the run's name in small print, and room right of each panel for the curves' names."""
    figure = Figure(figsize=(WIDTH, height))
    lines = [part for line in headline.splitlines() for part in textwrap.wrap(line, 92)]
    plain = {"va": "top", "parse_math": False}  # a dollar sign in a name is no mathematics
    figure.text(0.015, 0.98, "\n".join(lines), fontsize=10.5, fontweight="bold", linespacing=1.3, **plain)
    under = 0.98 - len(lines) * 0.21 / height - 0.05 / height
    figure.text(0.015, under, textwrap.shorten(title, 130, placeholder=" …"), fontsize=8.5, color="#666666", **plain)
    axes = figure.subplots(*shape, squeeze=False, height_ratios=heights if shape[0] > 1 else None, **shared)
    wide = shape[1] > 1
    figure.subplots_adjust(
        left=0.085, right=0.87, top=under - 0.55 / height, bottom=0.5 / height, wspace=0.55 if wide else 0, hspace=0.14
    )
    return figure, axes


def _layer_axis(axes: Axes, names: Sequence[str]) -> None:
    """Ticks at round layers and at "final"; none so near to "final" that the two would touch."""
    last = len(names) - 1
    step = next((step for step in (1, 2, 4, 5, 10, 20) if len(names) / step <= 8), 40)
    ticks = [i for i in range(0, len(names), step) if i == last or names[last] != "final" or last - i > step * 0.8]
    ticks = sorted({*ticks, last})
    axes.set_xticks(ticks, [names[i] for i in ticks])
    axes.set_xlim(-0.02 * last - 0.1, last + 0.02 * last + 0.1)
    axes.set_xlabel("layer")


def _end_labels(axes: Axes, labels: Sequence[tuple[str, float, str]]) -> None:
    """Names right of the curves' ends, (text, y, colour), moved apart where they would overlap."""
    figure = axes.get_figure()
    low, high = axes.get_ylim()
    to_axes = axes.transAxes.inverted()
    placed = sorted(
        (float(np.nan_to_num(to_axes.transform(axes.transData.transform((0, y)))[1])), text, colour)
        for text, y, colour in labels
    )
    room = 0.155 / (axes.get_position().height * figure.get_size_inches()[1])  # a line of text, in axes
    heights = []
    for at, _, _ in placed:
        heights.append(max(at, heights[-1] + room) if heights else at)
    over = max(0, heights[-1] - 1)
    for i in reversed(range(len(heights))):  # push back down what was pushed out of the top
        heights[i] = min(heights[i], 1 - room * (len(heights) - 1 - i)) if over else heights[i]
    for height, (_, text, colour) in zip(heights, placed, strict=True):
        axes.text(1.03, height, text, color=colour, transform=axes.transAxes, va="center", fontsize=8)
