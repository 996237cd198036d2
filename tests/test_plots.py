"""Figures are whole, legible and say what the numbers say, also where curves coincide or nothing was trained."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from src import plots
from src.plots import MISMATCHED, PAIRS, draw_all

TITLE = "$5 model\\frac · Kiswahili – 日本語 · LoRA in layers [1, 2]"
NAMES = [*range(19), "final"]


def rows(stage: str, split: str, **measures: Any) -> list[dict[str, str]]:
    return [
        {"layer": str(name), "stage": stage, "split": split, "measure": measure, "value": str(value)}
        for measure, values in measures.items()
        for name, value in zip(NAMES, np.broadcast_to(values, len(NAMES)), strict=True)
    ]


def trained(mismatched: Any, gap: Any, gain: Any) -> dict[str, Any]:
    """A trained run's tables: the gap of pairs over mismatches, and what training added to it."""
    share = np.linspace(0.1, 0.4, len(NAMES))
    layers = []
    for stage, splits in (("pilot", ["all"]), ("before", ["train", "control"]), ("after", ["train", "control"])):
        for split in splits:
            more = gain if stage == "after" else 0.0
            level = {"pair_cosine": mismatched + gap + more, "mismatched_cosine": mismatched}
            found = {"csls_p_at_1": share + (stage == "after") * 0.2, "nn_p_at_1": share * 0.5}
            layers += rows(stage, split, **level, **found)
    ranks = [(2, 1), (2, 1), (5, 9), (1, 1)]
    pairs = [
        {"source": f"maji{i}", "target": f"水{i}", "split": split, "cosine_before": "0.3",
         "cosine_after": str(0.25 + 0.1 * i), "rank_before": str(old), "rank_after": str(new)}
        for split in ("train", "control") for i, (old, new) in enumerate(ranks)
    ]  # fmt: skip
    null = {split: np.random.default_rng(0).normal(0, 0.01, 1000) for split in ("train", "control")}
    return {"layers": layers, "pairs": pairs, "null": null, "observed": {"train": 0.05, "control": 0.0}}


def usual() -> dict[str, Any]:
    return trained(np.full(len(NAMES), 0.3), np.linspace(0.02, 0.4, len(NAMES)), np.linspace(0, 0.1, len(NAMES)))


def sink() -> dict[str, Any]:
    """Attention sinks: all cosines are 0.9999, and pairs' are no higher, here and there lower."""
    return trained(np.full(len(NAMES), 0.9999), np.linspace(-1e-6, 5e-5, len(NAMES)), 1e-6)


def unchanged() -> dict[str, Any]:
    """An adapter without effect."""
    case = trained(np.full(len(NAMES), 0.5), 0.2, 0.0)
    return case | {
        "null": {"train": np.zeros(100), "control": np.zeros(100)},
        "observed": {"train": 0.0, "control": 0.0},
    }


def figures(case: dict[str, Any]) -> dict[str, Figure | None]:
    table = plots.by_layer(case["layers"])
    with plots.matplotlib.rc_context(plots.STYLE):
        return {
            "similarity.png": plots.similarity(table, "run"),
            "retrieval.png": plots.retrieval(table, case["pairs"], "run"),
            "scatter.png": plots.scatter(case["pairs"], "run"),
            "specificity.png": plots.specificity(case["null"], case["observed"], "run"),
        }


def headline(figure: Figure | None) -> str:
    assert figure is not None
    return " ".join(figure.texts[0].get_text().split())


@pytest.mark.parametrize("case", [usual, sink, unchanged])
def test_draws_all_four_whole(case, tmp_path: Path) -> None:
    draw_all(tmp_path, title=TITLE, **case())
    written = draw_all(tmp_path, title=TITLE, **case())  # over the old ones
    assert [path.name for path in written] == ["similarity.png", "retrieval.png", "scatter.png", "specificity.png"]
    assert sorted(tmp_path.rglob("*")) == sorted([tmp_path / "plots", *written])
    for path in written:
        picture = imread(path)
        assert picture.shape[1] == 1200
        assert picture[..., :3].std() > 0.05


@pytest.mark.parametrize("case", [usual, sink, unchanged])
def test_words_lie_inside_and_apart(case) -> None:
    for name, figure in figures(case()).items():
        assert figure is not None
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        outside = [
            tick.label1
            for axes in figure.axes
            for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))
            for tick in axis.get_major_ticks()
            if not low <= tick.get_loc() <= high  # never drawn
        ]
        boxes = [
            (text.get_text(), text.get_window_extent(renderer))
            for text in figure.findobj(Text)
            if isinstance(text, Text) and text.get_text() and text.get_visible() and text not in outside
        ]
        whole = figure.bbox
        for text, box in boxes:
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= whole.x1 and box.y1 <= whole.y1, (name, text)
        for (one, a), (other, b) in itertools.combinations(boxes, 2):
            width = min(a.x1, b.x1) - max(a.x0, b.x0)
            height = min(a.y1, b.y1) - max(a.y0, b.y0)
            assert width <= 1 or height <= 2, (name, one, other)


def test_headlines_say_what_is_seen() -> None:
    found = figures(usual())
    assert headline(found["similarity.png"]) == (
        "Pairs stand out most from mismatches at the final layer (gap 0.4); "
        "training moved the gap of words never trained on most at the final layer: 0.4 → 0.5"
    )
    assert headline(found["retrieval.png"]) == (
        "Of 4 words never trained on, at best 60 % after training (at the final layer) and 40 % before "
        "(at the final layer) find their translation by CSLS P@1, by chance 25 %"
    )
    assert headline(found["scatter.png"]) == (
        "Of 4 pairs never trained on, 3 became more alike; the translation's rank got better for 2 and worse for 1"
    )
    above = np.floor(1000 * np.mean(usual()["null"]["control"] < 0)) / 10
    assert headline(found["specificity.png"]) == (
        f"The gain of true pairs exceeds that of {above:g} % of random matchings on words never trained on, "
        "and 100 % of random matchings on trained words"
    )


def test_chance_counts_words_each_right_with_any_of_its_translations() -> None:
    case = usual()
    control = [row for row in case["pairs"] if row["split"] == "control"]
    control[1]["source"] = control[0]["source"]  # maji0: 水0, 水1; maji2: 水2; maji3: 水3, which is listed twice
    control.append(dict(control[3], source="maji4"))
    case["pairs"] = [*(row for row in case["pairs"] if row["split"] == "train"), *control]
    found = figures(case)["retrieval.png"]
    assert headline(found).startswith("Of 4 words never trained on, ")
    assert headline(found).endswith("by chance 35 %")  # 2, 1, 2 and 2 of 5 pairs
    assert found is not None
    chance = [line for line in found.axes[0].lines if line.get_linestyle() == ":"]
    assert [list(map(float, line.get_ydata())) for line in chance] == [[35.0, 35.0]]  # pyright: ignore


def test_retrieval_stands_beside_the_best_untouched_layer_as_chosen_on_the_trained_words() -> None:
    case = usual()
    for row in case["layers"]:
        if (row["stage"], row["measure"]) == ("before", "csls_p_at_1"):
            best = {"train": "11", "control": "12"}[row["split"]]  # the control words' own best would flatter it
            row["value"] = "0.5" if row["layer"] == best else "0.3" if row["layer"] == "11" else "0.1"
    found = figures(case)["retrieval.png"]
    assert found is not None
    panel = found.axes[0]
    assert "layer 11 before" in [text.get_text() for text in panel.texts]
    dashed = [line for line in panel.lines if line.get_linestyle() == "--"]
    assert [list(map(float, line.get_ydata())) for line in dashed] == [[30.0, 30.0]]  # pyright: ignore
    case["layers"] = [row for row in case["layers"] if (row["stage"], row["split"]) != ("before", "train")]
    found = figures(case)["retrieval.png"]
    assert found is not None
    assert not [text for text in found.axes[0].texts if "layer" in text.get_text()]


def test_coinciding_cosines_both_show_and_their_gap_is_readable() -> None:
    figure = figures(sink())["similarity.png"]
    assert figure is not None
    assert "at 20 of 20 layers both have cosines above 0.9 (gap below 0.01)" in headline(figure)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].reshape(-1, 3)
    for colour in (PAIRS, MISMATCHED):
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels.astype(int) - rgb).max(axis=1) < 3).sum() > 300
    gaps = figure.axes[2]
    assert gaps.get_yscale() == "log"
    drawn, crosses = (np.asarray(line.get_ydata(), dtype=float) for line in gaps.lines)
    assert drawn[-1] == pytest.approx(5e-5, rel=1e-3) and gaps.get_ylim()[0] < drawn.min()
    assert len(crosses) == 1 and any("zero or less" in text.get_text() for text in gaps.texts)


def test_an_untrained_run_has_the_pilots_figures_alone(tmp_path: Path) -> None:
    case = usual()
    layers = [row for row in case["layers"] if row["stage"] == "pilot"]
    pairs = [row | {"cosine_after": "", "rank_after": ""} for row in case["pairs"]]
    written = draw_all(tmp_path, layers=layers, pairs=pairs, null={}, observed={}, title=TITLE)
    assert [path.name for path in written] == ["similarity.png", "retrieval.png"]
    only_cosine = [row for row in layers if "cosine" in row["measure"]]
    written = draw_all(tmp_path / "b", layers=only_cosine, pairs=[], null={}, observed={}, title=TITLE)
    assert [path.name for path in written] == ["similarity.png"]
    assert draw_all(tmp_path / "c", layers=[], pairs=[], null={}, observed={}, title=TITLE) == []


def test_layers_stand_in_order_with_final_last() -> None:
    shuffled = list(reversed(rows("pilot", "all", pair_cosine=np.arange(20.0), mismatched_cosine=0.0)))
    table = plots.by_layer(shuffled)
    assert table.names == [str(name) for name in NAMES]
    np.testing.assert_array_equal(table.values["pilot", "all", "pair_cosine"], np.arange(20.0))
