"""The figures of a sweep's report, for plotly: they read on a phone, in print and for colour-blind eyes."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from src.report_board import VERDICTS
from src.report_data import Job, Sweep
from src.report_sums import Estimate, Grid

INK, QUIET, RULE, MEAN = "#222222", "#8A8A8A", "#E6E6E6", "#0072B2"
LONGEST = 28  # characters of a level on an axis
MOST_MARKERS = 12  # layers that are marked one by one
SMALL = 0.01  # gains below this need more digits
ROW = 24  # pixels of a row in a dot plot


def plain(text: str) -> str:
    """Text that plotly shows as it is, tags and all."""
    return html.escape(text, quote=False)


def _axis_text(text: str) -> str:
    half = LONGEST // 2
    return plain(text if len(text) <= LONGEST else f"{text[:half]}…{text[-half:]}")


def _figure(height: int, x: str, y: str = "") -> go.Figure:
    figure = go.Figure()
    axis = {"gridcolor": RULE, "linecolor": QUIET, "zerolinecolor": QUIET, "automargin": True, "title_standoff": 6}
    axis["exponentformat"] = "none"  # plotly's own would write 0.0005 as 500µ
    figure.update_layout(
        template="none",
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12, "color": INK},
        margin={"l": 8, "r": 10, "t": 8, "b": 8},
        height=height,
        dragmode=False,  # a finger that moves over a figure scrolls the page
        hoverlabel={"align": "left", "bgcolor": "white"},
        xaxis={"title": x, **axis},
        yaxis={"title": y, **axis},
    )
    return figure


def curves(sweep: Sweep, measure: str, axis: str) -> go.Figure | None:
    """One line for each run over the layers, on the words never trained on; pilots show all words; None without."""
    stages = {"after": ("control", "after"), "before": ("control", "before"), "pilot": ("all", "pilot")}
    lines = {
        stage: [(job, _points(job, *where, measure)) for job in sweep.comparable] for stage, where in stages.items()
    }
    if not any(points for job_points in lines.values() for _, points in job_points):
        return None
    names = sorted({layer for found in lines.values() for _, points in found for layer in points}, key=_depth)
    figure = _figure(340, "layer", axis)
    seen: set[str] = set()
    untouched = lines["before"] if any(points for _, points in lines["before"]) else lines["pilot"]
    drawn = set()
    for job, points in untouched:
        if points and (key := tuple(points.items())) not in drawn:
            figure.add_trace(_line(job, points, names, "untouched", seen))
            drawn.add(key)
    best = next((job for job, points in lines["after"] if points), None)
    for job, points in reversed(lines["after"]):  # the best is drawn last, over the others
        if points:
            figure.add_trace(_line(job, points, names, job.verdict, seen, best=job is best and len(sweep.trained) > 1))
    every = max(1, round((len(names) - 1) / 8))
    shown = [place for place, name in enumerate(names) if place % every == 0 and name != "final"]
    if names[-1] == "final":
        last = len(names) - 1
        shown = [place for place in shown if last - place > every / 2] + [last]
    figure.update_xaxes(tickvals=shown, ticktext=[names[place] for place in shown], showgrid=False, zeroline=False)
    figure.update_layout(hovermode="closest", legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    return figure


def _points(job: Job, split: str, stage: str, measure: str) -> dict[str, float]:
    return {
        row["layer"]: float(row["value"])
        for row in job.layers
        if row["split"] == split and row["stage"] == stage and row["measure"] == measure
    }


def _depth(layer: str) -> tuple[bool, int]:
    return (True, 0) if layer == "final" else (False, int(layer))


def _line(
    job: Job, points: dict[str, float], names: Sequence[str], kind: str, seen: set[str], *, best: bool = False
) -> go.Scatter:
    """One run's line; the first of its kind stands in the legend for all."""
    colour, symbol, _ = VERDICTS.get(kind, (QUIET, "circle", ""))
    layers = sorted(points, key=_depth)
    legend = "best run" if best else kind
    first = legend not in seen
    seen.add(legend)
    name = "untouched model" if kind == "untouched" else f"{job.label} ({job.verdict})"
    return go.Scatter(
        x=[names.index(layer) for layer in layers],
        y=[points[layer] for layer in layers],
        mode="lines" if kind == "untouched" or (len(names) > MOST_MARKERS and not best) else "lines+markers",
        line={
            "color": INK if best else colour,
            "width": 3.5 if best else 1.5,
            "dash": "dash" if kind == "untouched" else "solid",
        },
        marker={"symbol": symbol, "size": 9 if best else 6, "color": colour},
        opacity=1 if best or kind == "untouched" else 0.8,
        name=plain(legend),
        legendgroup=legend,
        showlegend=first,
        text=[plain(layer) for layer in layers],
        meta=plain(name),  # not in the template, as a name may hold %{…}
        hovertemplate="%{meta}<br>layer %{text}: %{y:.3f}<extra></extra>",
    )


def heat(found: Grid) -> go.Figure:
    """Mean gains over two parameters; white is none, blue more, orange less."""
    limit = max((abs(cell) for row in found.cells for cell in row if cell is not None), default=0) or 1
    figure = _figure(70 + 34 * len(found.y_levels), plain(found.x), plain(found.y))
    figure.add_trace(
        go.Heatmap(
            z=found.cells,
            text=[
                [f"{plain(found.y)} {plain(row)}<br>{plain(found.x)} {plain(column)}" for column in found.x_levels]
                for row in found.y_levels
            ],
            texttemplate="%{z:+.3f}" if limit >= SMALL else "%{z:+.5f}",
            colorscale=[[0, "#E28A4B"], [0.5, "#FFFFFF"], [1, "#5FA8D8"]],  # black text reads on all of them
            textfont={"color": INK},
            zmin=-limit,
            zmax=limit,
            xgap=2,
            ygap=2,
            showscale=False,
            hoverongaps=False,
            hovertemplate="%{text}<br>%{z:+.4f}<extra></extra>",
        )
    )
    figure.update_xaxes(showgrid=False, zeroline=False, **_ticks(found.x_levels))
    figure.update_yaxes(showgrid=False, zeroline=False, autorange="reversed", **_ticks(found.y_levels))
    return figure


def _ticks(levels: Sequence[str]) -> dict[str, Any]:
    """Ticks by place, as two long levels may look alike when cut."""
    return {"tickvals": list(range(len(levels))), "ticktext": [_axis_text(level) for level in levels]}


def dots(groups: dict[str, list[Estimate]], axis: str) -> go.Figure:
    """A row for each estimate: its runs as small dots, their mean as a diamond, the interval as a line."""
    places: list[tuple[str, Estimate | None]] = []
    for heading, estimates in groups.items():
        if heading:
            places.append((f"<b>{_axis_text(heading)}</b>", None))
        places += [(_axis_text(found.name), found) for found in estimates]
    rows = [(place, found) for place, (_, found) in enumerate(places) if found]
    figure = _figure(80 + ROW * len(places), axis)
    reach = [found.interval[1] - found.mean if found.interval else 0 for _, found in rows]
    figure.add_trace(
        go.Scatter(
            x=[found.mean for _, found in rows],
            y=[place for place, _ in rows],
            mode="markers",
            marker={"color": MEAN, "symbol": "diamond", "size": 9},
            error_x={"array": reach, "color": MEAN, "thickness": 2.5, "width": 0},
            text=[plain(found.name) for _, found in rows],
            hovertemplate="%{text}: mean %{x:+.4f}<extra></extra>",
        )
    )
    figure.add_trace(
        go.Scatter(
            x=[value for _, found in rows for value in found.values],
            y=[place for place, found in rows for _ in found.values],
            mode="markers",
            marker={"color": INK, "size": 5, "opacity": 0.5},
            hovertemplate="%{x:+.4f}<extra>one run</extra>",
        )
    )
    # The axis holds every run; a wide interval of few runs may leave it, which its caption says.
    values = [0.0, *(value for _, found in rows for value in found.values)]
    pad = 0.15 * (max(values) - min(values) or 1)
    figure.update_xaxes(range=[min(values) - pad, max(values) + pad], nticks=5, zeroline=True)
    figure.update_yaxes(
        tickvals=list(range(len(places))),
        ticktext=[name for name, _ in places],
        range=[len(places) - 0.4, -0.6],
        showgrid=False,
        zeroline=False,
    )
    figure.update_layout(showlegend=False)
    return figure
