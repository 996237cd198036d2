"""The figures of a whole sweep show every job, in colour the best, and nothing where nothing was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.image import imread

from src.overview import BEST, MOST, draw_overview
from src.results import LAYER_COLUMNS, write_table


def job(folder: Path, number: int, *, depth: int = 4, trained: bool = True) -> dict[str, Any]:
    rows = [
        (layer, stage, "control", "csls_p_at_1", 0.1 + 0.01 * number * (stage == "after"))
        for stage in ("before", "after")
        for layer in [*range(depth + 1), "final"]
    ]
    write_table(folder / str(number) / "layers.csv", LAYER_COLUMNS, rows if trained else [])
    found = {"name": f"r{number} $x$ <b>", "verdict": "aligned", "folder": str(folder / str(number))}
    if trained:
        scalars = {"margin_gain": 0.01 * number, "csls_p_at_1_before": 0.1, "csls_p_at_1_after": 0.1 + 0.01 * number}
        found |= {f"control/{key}": value for key, value in scalars.items()}
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


def test_models_of_several_depths_have_no_common_axis_and_pilots_no_figure(tmp_path: Path) -> None:
    assert [path.name for path in draw_overview([job(tmp_path, 1), job(tmp_path, 2, depth=6)], tmp_path, "")] == [
        "settings.png"
    ]
    assert draw_overview([job(tmp_path, 3, trained=False)], tmp_path, "") == []
    assert draw_overview([], tmp_path, "") == []
