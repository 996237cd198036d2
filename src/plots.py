"""Figures of one run, drawn from its tables into the job folder's plots/: each states in its headline what it shows."""

from __future__ import annotations

import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from src.files import written_atomically

# Okabe & Ito's colours, told apart by colour-blind readers too; each stands for one thing in all figures.
BEFORE, AFTER, PAIRS, MISMATCHED = "#E69F00", "#0072B2", "#009E73", "#CC79A7"
WORSE, QUIET, INK = "#D55E00", "#8A8A8A", "#222222"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "text.usetex": False, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": QUIET, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
    "axes.titlelocation": "left", "xtick.color": INK, "ytick.color": INK, "lines.linewidth": 2,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#E6E6E6", "axes.axisbelow": True,
    "axes.titley": 1.0,  # where it stands anyway: to find that out, matplotlib lays out all ticks once more
}  # fmt: skip
WIDTH, HEIGHT, DPI = 8, 4.8, 150  # inches and dots per inch: 1,200 pixels wide
PERCENT = FuncFormatter(lambda value, _: f"{value:g} %")
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")  # no exponent set apart in a corner
NO_GAP = 0.01  # a margin below this can't be seen between two curves; however high they are
SPLITS = {"control": "words never trained on", "train": "trained words"}


@dataclass(frozen=True)
class Layers:
    """The rows of layers.csv as arrays: one value a layer, in order, NaN where there is none."""

    names: list[str]
    values: dict[tuple[str, str, str], np.ndarray]  # by stage, split, measure

    def has(self, stage: str, split: str, *measures: str) -> bool:
        return all((stage, split, measure) in self.values for measure in measures)

    def gap(self, stage: str, split: str) -> np.ndarray:
        return self.values[stage, split, "pair_cosine"] - self.values[stage, split, "mismatched_cosine"]


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
    table = by_layer(layers)
    draw = {
        "similarity.png": lambda: similarity(table, title),
        "retrieval.png": lambda: retrieval(table, pairs, title),
        "scatter.png": lambda: scatter(pairs, title),
        "specificity.png": lambda: specificity(null, observed, title),
    }
    return write_figures(folder / "plots", draw)


def write_figures(folder: Path, draw: Mapping[str, Callable[[], Figure | None]]) -> list[Path]:
    """Draws figures in the project's style, by their files' names; returns the files of those that there are."""
    written = []
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A title in a script the font lacks shows boxes; that is no reason to fail or to worry anybody.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        for name, make in draw.items():
            if figure := make():
                with written_atomically(folder / name) as temporary:
                    # the quickest compression: a third less time than the usual, for a tenth more bytes
                    figure.savefig(temporary, format="png", dpi=DPI, pil_kwargs={"compress_level": 1})
                written.append(folder / name)
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
        if all(table.has(stage, split, "pair_cosine", "mismatched_cosine") for stage, split, _ in curves)
    ]
    if not panels:
        return None
    figure, axes = new_figure(_similarity_headline(table), title, (2, len(panels)), heights=(2.3, 1.0), sharex=True)
    for (heading, curves), (top, bottom) in zip(panels, axes.T, strict=True):
        top.set_title(heading)
        labels, gaps = [], []
        for stage, split, when in curves:
            pair, mismatched = (table.values[stage, split, m] for m in ("pair_cosine", "mismatched_cosine"))
            look = {"linestyle": "--" if stage == "before" else "-"}
            x = np.arange(len(pair))
            if stage != "before":
                top.fill_between(x, mismatched, pair, color=PAIRS, alpha=0.15, linewidth=0)
            # Drawn over the pairs' line, and thinner: where they coincide, both still show.
            top.plot(x, pair, color=PAIRS, linewidth=3.5 if stage != "before" else 2, **look)
            top.plot(x, mismatched, color=MISMATCHED, linewidth=1.5, **look)
            labels += [(f"pairs{when}", pair[-1], PAIRS), (f"mismatched{when}", mismatched[-1], MISMATCHED)]
            gaps.append((f"gap{when}", table.gap(stage, split), look))
        low = min(0, *(np.nanmin(line.get_ydata()) for line in top.lines))
        top.set_ylim(low * 1.05, 1.04)
        end_labels(top, labels)
        _draw_gaps(bottom, gaps)
        layer_axis(bottom, table.names)
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
    axes.yaxis.set_major_formatter(PLAIN)
    axes.axhspan(floor / 1.5, NO_GAP, color="#F0F0F0", zorder=0)
    labels = [(label, max(gap[-1], floor), PAIRS) for label, gap, _ in gaps]
    for _, gap, look in gaps:
        axes.plot(np.maximum(gap, floor), color=PAIRS, **look)
        none = np.flatnonzero(gap <= 0)
        axes.plot(none, np.full(len(none), floor), "x", color=WORSE, markersize=5, clip_on=False)
    if any((gap <= 0).any() for _, gap, _ in gaps):
        labels.append(("× zero or less", floor, WORSE))
    end_labels(axes, labels)


def _similarity_headline(table: Layers) -> str:
    said = []
    if table.has("pilot", "all", "pair_cosine", "mismatched_cosine"):
        pair, gap = table.values["pilot", "all", "pair_cosine"], table.gap("pilot", "all")
        best = int(np.nanargmax(gap))
        said.append(f"Pairs stand out most from mismatches at {_layer(table, best)} (gap {gap[best]:.2g})")
        alike = int(((pair > 0.9) & (gap < NO_GAP)).sum())
        if alike:
            said.append(f"at {alike} of {len(gap)} layers both have cosines above 0.9 (gap below {NO_GAP})")
    if table.has("after", "control", "pair_cosine", "mismatched_cosine"):
        before, after = table.gap("before", "control"), table.gap("after", "control")
        most = int(np.nanargmax(np.abs(after - before)))
        where = f"{_layer(table, most)}: {before[most]:.2g} → {after[most]:.2g}"
        said.append(f"training moved the gap of words never trained on most at {where}")
    text = "; ".join(said)
    return text[:1].upper() + text[1:]


# --- retrieval ----------------------------------------------------------------------------------------------


def retrieval(table: Layers, pairs: Sequence[Mapping[str, Any]], title: str) -> Figure | None:
    """Share of words whose nearest neighbour is a translation, over the layers, by CSLS and by plain cosine.

    A dashed line beside a trained run's curves marks the untouched model's best layer.
    """
    trained = any(stage == "after" for stage, _, _ in table.values)
    curves = [("after", "control", AFTER), ("before", "control", BEFORE)] if trained else [("pilot", "all", AFTER)]
    panels = [
        (heading, measure)
        for heading, measure in (("CSLS P@1", "csls_p_at_1"), ("nearest neighbour P@1 (plain cosine)", "nn_p_at_1"))
        if all(table.has(stage, split, measure) for stage, split, _ in curves)
    ]
    if not panels:
        return None
    words, chance = _chance([row for row in pairs if row["split"] == "control" or not trained])
    headline = _retrieval_headline(table, curves, panels[0], words, chance)
    figure, axes = new_figure(headline, title, (1, len(panels)), sharey=True)
    measures = {measure for _, measure in panels}
    tallest = max(np.nanmax(values) for (*_, measure), values in table.values.items() if measure in measures)
    axes[0, 0].set_ylim(0, 106 * max(tallest, 0.01))
    for (heading, measure), panel in zip(panels, axes[0], strict=True):
        panel.set_title(heading)
        labels = []
        for stage, split, colour in curves:
            values = 100 * table.values[stage, split, measure]
            panel.plot(values, color=colour)
            labels.append((f"unseen {stage}" if trained else "all words", values[-1], colour))
            if trained and table.has(stage, "train", measure):
                train = 100 * table.values[stage, "train", measure]
                panel.plot(train, color=colour, linewidth=1, alpha=0.5)
                labels.append((f"trained {stage}", train[-1], colour))
        if words:
            panel.axhline(100 * chance, color=INK, linewidth=1, linestyle=":")
            labels.append(("chance", 100 * chance, INK))
        if trained and (best := _best_untouched(table, measure)):
            layer, score = best  # what a layer of the untouched model reaches without any training
            panel.axhline(100 * score, color=INK, linewidth=1, linestyle="--")
            labels.append((f"layer {layer} before", 100 * score, INK))
        panel.yaxis.set_major_formatter(PERCENT)
        end_labels(panel, labels)
        layer_axis(panel, table.names)
    axes[0, 0].set_ylabel("words that find a translation")
    return figure


def _chance(pairs: Sequence[Mapping[str, Any]]) -> tuple[int, float]:
    """(source words, P@1 of a blind guess): a word is right with any of the pairs that hold a translation of it."""
    listed: dict[str, set[str]] = {}
    for row in pairs:
        listed.setdefault(row["source"], set()).add(row["target"])
    if not listed:
        return 0, 0.0
    count = Counter(row["target"] for row in pairs)
    right = [sum(count[target] for target in targets) / len(pairs) for targets in listed.values()]
    return len(listed), sum(right) / len(right)


def _best_untouched(table: Layers, measure: str) -> tuple[str, float] | None:
    """(layer, P@1 on the control words) of the untouched model's best layer, chosen on the words to train on."""
    train, control = (table.values.get(("before", split, measure)) for split in ("train", "control"))
    if train is None or control is None or np.isnan(train).all():
        return None
    best = int(np.nanargmax(train))
    return table.names[best], float(control[best])


def _retrieval_headline(
    table: Layers, curves: Sequence[tuple[str, str, str]], panel: tuple[str, str], words: int, chance: float
) -> str:
    heading, measure = panel
    found = []
    for stage, split, _ in curves:
        values = table.values[stage, split, measure]
        best = int(np.nanargmax(values))
        when = " after training" if stage == "after" else " before" if stage == "before" else ""
        found.append(f"{100 * values[best]:.0f} %{when} (at {_layer(table, best)})")
    who = "words never trained on" if len(found) > 1 else "words"
    of = f"{words:,} {who}" if words else f"all {who}" if who == "words" else who
    by_chance = f", by chance {100 * chance:.2g} %" if words else ""
    return f"Of {of}, at best {' and '.join(found)} find their translation by {heading}{by_chance}"


# --- pairs and tests ----------------------------------------------------------------------------------------


def scatter(pairs: Sequence[Mapping[str, Any]], title: str) -> Figure | None:
    """Cosine of every control pair before and after, coloured by what became of the translation's rank."""
    columns = ("cosine_before", "cosine_after", "rank_before", "rank_after")
    rows = [[float(r[c]) for c in columns] for r in pairs if r["split"] == "control" and r["cosine_after"] != ""]
    if not rows:
        return None
    before, after, old, new = np.array(rows).T
    kinds = (
        ("rank better", new < old, AFTER, "^"),
        ("rank worse", new > old, WORSE, "v"),
        ("rank unchanged", new == old, QUIET, "o"),
    )
    up, more, less = (int(mask.sum()) for mask in (after > before, new < old, new > old))
    headline = (
        f"Of {len(rows)} pairs never trained on, {up} became more alike; "
        f"the translation's rank got better for {more} and worse for {less}"
    )
    figure, ((axes,),) = new_figure(headline, title, (1, 1), height=5.4)
    low, high = min(before.min(), after.min()), max(before.max(), after.max())
    edge = max(0.06 * (high - low), 1e-4)
    limits = (low - edge, high + edge)
    axes.axline((low, low), slope=1, color=INK, linewidth=1, linestyle=":")
    axes.set(xlim=limits, ylim=limits, xlabel="cosine before", ylabel="cosine after", aspect="equal", anchor="W")
    axes.ticklabel_format(useOffset=False)
    axes.grid(visible=True)
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
    splits = [split for split in SPLITS if split in null and split in observed and len(null[split])]
    if not splits:
        return None
    shares = {split: np.floor(1000 * np.mean(null[split] < observed[split])) / 10 for split in splits}  # 100 is all
    said = [f"{share:g} % of random matchings on {SPLITS[split]}" for split, share in shares.items()]
    headline = f"The gain of true pairs exceeds that of {', and '.join(said)}"
    figure, axes = new_figure(headline, title, (1, len(splits)))
    for split, panel in zip(splits, axes[0], strict=True):
        gains, true = np.asarray(null[split]), observed[split]
        panel.set_title(SPLITS[split])
        reach = max(np.abs(gains).max(), abs(true), 1e-6)
        width = max(np.ptp(gains), reach / 50)
        reached = (gains.mean() - width / 2, gains.mean() + width / 2)
        panel.hist(gains, bins=40, range=reached, color="#BBBBBB", histtype="stepfilled")  # one shape, not 40
        panel.axvline(true, color=AFTER, linewidth=2.5)
        panel.set_xlim(min(gains.min(), true) - 0.15 * reach, max(gains.max(), true) + 0.15 * reach)
        top = panel.get_ylim()[1]
        panel.set_ylim(0, 1.25 * top)
        left_half = true < sum(panel.get_xlim()) / 2
        panel.annotate(
            f"true pairs\n{true:+.2g}", (true, 1.23 * top), (5 if left_half else -5, 0), textcoords="offset points",
            ha="left" if left_half else "right", va="top", color=AFTER, fontweight="bold",
        )  # fmt: skip
        away = -1 if true >= gains.mean() else 1
        panel.text(gains.mean() + away * 1.5 * gains.std(), 0.5 * top, "random ", ha="right" if away < 0 else "left")
        panel.locator_params(axis="x", nbins=4)
        panel.xaxis.set_major_formatter(PLAIN)
        panel.set_xlabel("gain of matched over mismatched cosine")
    axes[0, 0].set_ylabel("random matchings")
    return figure


# --- small parts --------------------------------------------------------------------------------------------


def by_layer(rows: Iterable[Mapping[str, Any]]) -> Layers:
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


def _layer(table: Layers, index: int) -> str:
    name = table.names[index]
    return "the final layer" if name == "final" else f"layer {name}"


def new_figure(
    headline: str,
    title: str,
    shape: tuple[int, int],
    *,
    height: float = HEIGHT,
    heights: Sequence[float] = (1.0,),
    **shared,
) -> tuple[Figure, np.ndarray]:
    """A figure with its headline, the run's name in small print, and room right of each panel for the curves' names."""
    figure = Figure(figsize=(WIDTH, height))
    lines = [part for line in headline.splitlines() for part in textwrap.wrap(line, 86)]
    plain = {"va": "top", "parse_math": False}  # a dollar sign in a name is no mathematics
    figure.text(0.015, 0.98, "\n".join(lines), fontsize=10.5, fontweight="bold", linespacing=1.3, **plain)
    under = 0.98 - len(lines) * 0.21 / height - 0.05 / height
    figure.text(0.015, under, textwrap.shorten(title, 130, placeholder=" …"), fontsize=8.5, color="#666666", **plain)
    axes = figure.subplots(*shape, squeeze=False, height_ratios=heights if shape[0] > 1 else None, **shared)
    wide = shape[1] > 1
    figure.subplots_adjust(
        left=0.1, right=0.85, top=under - 0.55 / height, bottom=0.5 / height, wspace=0.6 if wide else 0, hspace=0.14
    )
    return figure, axes


def layer_axis(axes: Axes, names: Sequence[str]) -> None:
    """Ticks at round layers and at "final"; none so near to "final" that the two would touch."""
    last = len(names) - 1
    step = next((step for step in (1, 2, 4, 5, 10, 20) if len(names) / step <= 8), 40)
    ticks = [i for i in range(0, len(names), step) if i == last or names[last] != "final" or last - i > 0.11 * last]
    ticks = sorted({*ticks, last})
    axes.set_xticks(ticks, [names[i] for i in ticks])
    axes.set_xlim(-0.02 * last - 0.1, last + 0.02 * last + 0.1)
    axes.set_xlabel("layer")


def end_labels(axes: Axes, labels: Sequence[tuple[str, float, str]]) -> None:
    """Names right of the curves' ends, (text, y, colour), moved apart where they would overlap."""
    figure = axes.get_figure(root=True)
    assert figure
    to_axes = axes.transAxes.inverted()
    placed = sorted(
        (float(np.nan_to_num(to_axes.transform(axes.transData.transform((0, y)))[1])), text, colour)
        for text, y, colour in labels
    )
    room = 0.155 / (axes.get_position().height * figure.get_size_inches()[1])  # a line of text, in axes
    heights = []
    for at, _, _ in placed:
        heights.append(max(at, heights[-1] + room) if heights else at)
    for i in range(len(heights)):  # push back down what was pushed out of the top
        heights[i] = min(heights[i], 1 - room * (len(heights) - 1 - i))
    for height, (_, text, colour) in zip(heights, placed, strict=True):
        axes.text(1.03, height, text, color=colour, transform=axes.transAxes, va="center", fontsize=8)
