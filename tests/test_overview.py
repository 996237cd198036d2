"""A whole sweep side by side: figures show every job, in colour the best, and tables say what they count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from src import summary
from src.overview import BEST, MOST, _settings, draw_overview
from src.plots import STYLE
from src.results import LAYER_COLUMNS, write_table


def job(folder: Path, number: int, *, depth: int = 4, trained: bool = True) -> dict[str, Any]:
    rows = [
        (layer, stage, "control", "csls_p_at_1", 0.1 + 0.01 * number * (stage == "after"))
        for stage in ("before", "after")
        for layer in [*range(depth + 1), "final"]
    ]
    write_table(folder / str(number) / "layers.csv", LAYER_COLUMNS, rows if trained else [])
    found = {
        "name": f"r{number} $x$ <b>",
        "verdict": "drawn together",
        "results_version": 2,
        "folder": str(folder / str(number)),
    }
    if trained:
        scalars = {"margin_gain": 0.01 * number, "csls_p_at_1_before": 0.1, "csls_p_at_1_after": 0.1 + 0.01 * number}
        found |= {f"control/{key}": value for key, value in scalars.items()}
        found["baseline/best_layer_csls_p_at_1_before"] = 0.12
    return found


def test_both_figures_are_pictures_whose_height_grows_with_the_jobs(tmp_path: Path) -> None:
    few = draw_overview([job(tmp_path, n) for n in range(2)], tmp_path / "few", "a sweep")
    many = draw_overview([job(tmp_path, n) for n in range(MOST + 5)], tmp_path / "many", "a sweep")
    assert [path.name for path in few] == ["settings.png", "layers.png"]
    heights = [imread(paths[0]).shape[0] for paths in (few, many)]
    assert heights[0] < heights[1] < 1600
    colours = np.unique((imread(many[1])[:, :, :3] * 255).round().reshape(-1, 3), axis=0)
    assert (colours == (0, 114, 178)).all(axis=1).any()  # the best job's
    assert len(colours) > BEST


def test_names_lie_inside_and_the_untouched_model_s_best_layer_is_marked(tmp_path: Path) -> None:
    jobs = [
        job(tmp_path, n) | {"name": f"r{n} L1-18 infonce@final a_model_with_a_long_name seed={n}"} for n in range(3)
    ]
    del jobs[2]["results_version"], jobs[2]["baseline/best_layer_csls_p_at_1_before"]  # of an earlier version
    with rc_context(STYLE):
        figure = _settings(jobs, "a sweep")
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
    (axes,) = figure.axes
    assert all(label.get_window_extent(renderer).x0 >= 0 for label in (*axes.get_yticklabels(), axes.xaxis.label))
    assert all(label.get_text().endswith("(drawn together)") for label in axes.get_yticklabels())
    assert [float(line.get_xdata()[0]) for line in axes.lines if line.get_marker() == "|"] == [0.12, 0.12]  # pyright: ignore
    assert axes.get_xlabel() == (
        "retrieval, CSLS P@1 by word or pair: open before, filled after; bar: best untouched layer"
    )


def test_the_table_at_the_end_leaves_room_for_names_and_says_what_it_counts(tmp_path: Path) -> None:
    name = "r16 L1-18 infonce@final, 36 letters!"
    jobs: list[dict[str, Any]] = [job(tmp_path, n) | {"name": name, "params": {"rank": str(n)}} for n in range(3)]
    jobs[1]["control_unalike/csls_p_at_1_after"] = 0.042
    text = summary.as_text(jobs)
    assert all(len(line) <= 110 for line in text.splitlines())
    (row,) = [line.split() for line in text.splitlines() if "0.042" in line]
    assert row == [*name.split(), "drawn", "together", "+0.0100", "0.100", "0.110", "0.042", "0.120", "–"]
    assert "P@1 counts words. " in text and text.splitlines()[1].split() == ["margin", "P@1", "P@1", "P@1",
        "untouched", "specificity"]  # fmt: skip
    assert "| P@1 unalike | untouched best |" in summary.as_markdown(jobs)
    for older in jobs[1:], jobs:
        for each in older:
            each.pop("results_version", None)
        some = "words, but pairs in these jobs of an earlier version: "
        assert ("P@1 counts " + (some if older is not jobs else "pairs (these jobs")) in summary.as_markdown(jobs)


def test_seeds_counted_otherwise_are_not_averaged(tmp_path: Path) -> None:
    jobs: list[dict[str, Any]] = [
        job(tmp_path, n) | {"params": {"train.seed": str(n)}, "control/csls_p_at_1_gain": 0.1} for n in range(3)
    ]
    assert summary.seed_rows(jobs)[0][0].endswith("3 seeds")
    del jobs[2]["results_version"]
    assert summary.seed_rows(jobs)[0][0].endswith("2 seeds")


def test_models_of_several_depths_have_no_common_axis_and_pilots_no_figure(tmp_path: Path) -> None:
    assert [path.name for path in draw_overview([job(tmp_path, 1), job(tmp_path, 2, depth=6)], tmp_path, "")] == [
        "settings.png"
    ]
    assert draw_overview([job(tmp_path, 3, trained=False)], tmp_path, "") == []
    assert draw_overview([], tmp_path, "") == []
