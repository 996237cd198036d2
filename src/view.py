"""What MLflow's UI shows of a sweep: columns with their order and widths, and charts, as its saved views hold them.

None of it is documented: the keys are those that the UI of MLflow 3.17 writes itself, and tests/test_browser.py looks
at what comes of them in a browser.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_LAYER_CHARTS = ("csls_p_at_1", "margin", "pair_cosine")  # of unseen words after training, a line for each job
_GIVEN = {"attributes.`Run Name`": 230, "runDateAndNestInfo": 145, "duration": 80}  # column, pixels
_COLOURS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#e377c2", "#bcbd22", "#17becf", "#000000"),
)
GREY = "#9e9e9e"  # for the sweep's own run, of which no chart has anything


def sweep_view(parent: str, where: str, columns: Sequence[str], order: str) -> dict[str, Any]:
    """The runs table and the charts of a sweep: the runs that the filter `where` finds, the largest `order` first.

    `columns` are MLflow's names, as params.`lora.rank`, in the order in which they are to stand; `parent` is the run
    of the sweep itself.
    """
    names = [column.partition("`")[2].rstrip("`") for column in columns]
    widths = {column: max(90, round(6.4 * len(name)) + 30) for column, name in zip(columns, names, strict=True)}
    widths[order] = widths.get(order, 90) + 25  # the sign of the sorted column
    metrics = [name for column, name in zip(columns, names, strict=True) if column.startswith("metrics.")]
    sections = {"result": list(_result_charts(metrics)), "layers": list(_layer_charts())}
    return {
        "selectedColumns": list(columns),
        "columnOrder": [*_GIVEN, *columns],
        "columnWidths": _GIVEN | widths,
        "orderByKey": order,
        "orderByAsc": False,
        "searchFilter": where,
        "runsExpanded": {parent: True},
        "runsHiddenMode": "SHOW_ALL",  # else the charts leave out all but the first ten jobs
        "compareRunSections": [_section(name) for name in sections],
        "compareRunCharts": [
            chart | {"metricSectionId": name, "uuid": f"{name} {number}", "deleted": False, "isGenerated": False}
            for name, charts in sections.items()
            for number, chart in enumerate(charts)
        ],
        "isAccordionReordered": True,  # else the UI sorts its own sections between these
    }


def colour(number: int) -> str:
    """The tag mlflow.runColor of a sweep's job: by itself, MLflow gives the same colour to several of ten runs."""
    return _COLOURS[number % len(_COLOURS)]


def _section(name: str) -> dict[str, Any]:
    return {"uuid": name, "name": name, "display": True, "isReordered": True, "deleted": False, "isGenerated": False}


def _result_charts(metrics: Sequence[str]) -> Iterator[dict[str, Any]]:
    # No parallel coordinates: of a param that is partly a number, as objective.layer=2,final, they leave out the rest.
    for metric in metrics:
        if not metric.endswith("_before"):  # of which all jobs have the same
            yield {"type": "BAR", "metricKey": metric, "runsCountToCompare": 30}


def _layer_charts() -> Iterator[dict[str, Any]]:
    for measure in _LAYER_CHARTS:
        key = f"after_control/{measure}"
        yield {
            "type": "LINE",
            "metricKey": key,
            "runsCountToCompare": 30,
            "xAxisKey": "step",
            "useGlobalXaxisKey": False,
            "lineSmoothness": 0,
            "useGlobalLineSmoothing": False,
            "xAxisScaleType": "linear",
            "scaleType": "linear",
            "yAxisKey": "metric",
            "yAxisExpressions": [],
            "displayPoints": True,
        }
