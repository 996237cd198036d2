"""What MLflow's UI shows of a sweep: columns with their order and widths, and charts, as its saved views hold them.

None of it is documented: the keys are those that the UI of MLflow 3.17 writes itself, and tests/test_browser.py looks
at what comes of them in a browser.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_LAYER_CHARTS = ("csls_p_at_1", "margin", "pair_cosine")  # of unseen words after training, a line for each job
_GIVEN = {"attributes.`Run Name`": 260, "runDateAndNestInfo": 130, "duration": 80}  # column, pixels


def sweep_view(parent: str, where: str, columns: Sequence[str], order: str) -> dict[str, Any]:
    """The runs table and the charts of a sweep: the runs that the filter `where` finds, the largest `order` first.

    `columns` are MLflow's names, as params.`lora.rank`, in the order in which they are to stand; `parent` is the run
    of the sweep itself.
    """
    names = [column.partition("`")[2].rstrip("`") for column in columns]
    widths = {column: max(90, 8 * len(name) + 34) for column, name in zip(columns, names, strict=True)}
    params = [name for column, name in zip(columns, names, strict=True) if column.startswith("params.")]
    metrics = [name for column, name in zip(columns, names, strict=True) if column.startswith("metrics.")]
    sections = {"result": list(_result_charts(params, metrics)), "layers": list(_layer_charts())}
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


def _section(name: str) -> dict[str, Any]:
    return {"uuid": name, "name": name, "display": True, "isReordered": True, "deleted": False, "isGenerated": False}


def _result_charts(params: Sequence[str], metrics: Sequence[str]) -> Iterator[dict[str, Any]]:
    for metric in [metric for metric in metrics if not metric.endswith("_before")][:2]:  # of which all jobs have one
        yield {"type": "BAR", "metricKey": metric, "runsCountToCompare": 30}
    if params:
        chosen = {"selectedParams": list(params), "selectedMetrics": list(metrics[:1])}
        yield {"type": "PARALLEL", "showAllRuns": False, "runsCountToCompare": 30, **chosen}


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
