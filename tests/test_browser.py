"""What a person sees of a sweep in MLflow: headless Chromium on `python -m src.ui`, on a real sweep of the tiny model.

Needs Debian's chromium and chromium-driver (tests/debian.sh installs them). With TLI_SCREENSHOTS=1 it sweeps more jobs
and writes the pictures that the README shows: docs/images/ui_table.png, ui_chart.png and ui_compare.png.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from src import summary
from tests.conftest import ROOT

webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
DRIVER, BROWSER = shutil.which("chromedriver"), shutil.which("chromium")
pytestmark = pytest.mark.skipif(not (DRIVER and BROWSER), reason="apt-get install chromium chromium-driver")

PICTURES = ROOT / "docs" / "images" if os.environ.get("TLI_SCREENSHOTS") else None
QUICK = (
    "lora.rank=2,4", "lora.layers=[1],[1,2]", "dataset.limit=40", "dataset.control_size=10", "train.epochs=1",
    "eval.permutations=99", "eval.probes=false", "eval.measures=[pair_cosine,mismatched_cosine,margin,csls_p_at_1]",
)  # fmt: skip
SHOWN = (
    "lora.layers=[1],[1,2],[1,2,3,4]", "objective=triplet,infonce", "objective.layer=final", "dataset.limit=120",
    "dataset.control_size=40", "train.epochs=3", "train.learning_rate=1e-3", "eval.permutations=999",
)  # fmt: skip
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--no-proxy-server", "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
MEASURES = ("csls_p_at_1", "margin", "pair_cosine")  # of which every job's layers are drawn
PATIENCE = 90  # seconds; pages load in one or two where the machine is idle
SETTINGS = {"mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true"}  # as if its chat had been closed before


class Sweep:
    """A sweep that was run, and the UI that shows it."""

    def __init__(self, folder: Path, printed: str, server: str) -> None:
        (file,) = folder.glob("multirun/*/*/sweep.json")
        self.document = json.loads(file.read_text())
        self.jobs = summary.read_results(self.document["jobs"])
        self.links = [
            line.rpartition("then ")[2].replace("http://127.0.0.1:5000", server)
            for line in printed.splitlines()
            if line.startswith("in MLflow")
        ]
        self.server = server
        self.name = f"sweep of {' × '.join(self.document['swept'])}"
        self.swept = [key if "." in key else f"{key}.name" for key in self.document["swept"]]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    folder = tmp_path_factory.mktemp("sweep")
    uri = f"sqlite:///{folder}/mlruns/mlflow.db"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    own = ("model=tiny", f"tracking.uri={uri}", *(SHOWN if PICTURES else QUICK))
    command = [sys.executable, "-m", "src.run", "-m", *own]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "src.ui", "--uri", uri, "--port", port]
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as ui:
        assert ui.stdout
        try:
            server = ui.stdout.readline().split()[0]
            yield Sweep(folder, done.stdout, server)
        finally:
            ui.send_signal(signal.SIGTERM)
            ui.wait(timeout=20)


@pytest.fixture(scope="module")
def browser(sweep: Sweep, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))  # a path given: nothing is looked up or fetched
    try:
        driver.get(f"{sweep.server}/health")
        for key, value in SETTINGS.items():
            driver.execute_script("localStorage.setItem(arguments[0], arguments[1])", key, value)
        yield driver
    finally:
        driver.quit()


def look(browser: Any, url: str, width: int, height: int) -> None:
    """Opens a page in a window whose inside has this size in pixels."""
    view = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", view)
    browser.get("about:blank")  # else a change behind the # alone would not load anything
    browser.get(url)


def until(browser: Any, found: Callable[[], Any]) -> Any:
    """What `found` returns once it is true."""
    limit = time.monotonic() + PATIENCE
    while not (value := found()):
        assert time.monotonic() < limit, text(browser)
        time.sleep(0.3)
    return value


def text(browser: Any) -> str:
    return browser.execute_script("return document.body.innerText")


def keep(browser: Any, name: str) -> None:
    if PICTURES:
        time.sleep(3)  # what still moves comes to rest
        browser.save_screenshot(str(PICTURES / name))


def cells(browser: Any) -> dict[str, list[str]]:
    """The runs table by column, its rows from top to bottom."""
    script = """
        const found = {};
        for (const cell of document.querySelectorAll('.ag-cell[col-id]')) {
            const row = +cell.closest('.ag-row').getAttribute('row-index');
            (found[cell.getAttribute('col-id')] ??= []).push([row, cell.innerText.trim().split('\\n').pop()]);
        }
        return found;
    """
    return {column: [text for _, text in sorted(rows)] for column, rows in browser.execute_script(script).items()}


def charts(browser: Any) -> dict[str, list[dict[str, Any]]]:
    """The drawn charts by the metric or the title that stands over them, each as its traces."""
    script = """
        return [...document.querySelectorAll('.js-plotly-plot')].filter(plot => plot.data).map(plot => [
            plot.closest('[data-testid="experiment-view-compare-runs-card"]')?.innerText.split('\\n')[0] ?? '',
            plot.data.map(({type, name, x, y, dimensions, marker}) => ({
                type, name, colour: marker?.color, x: x && [...x], y: y && [...y],
                labels: dimensions?.map(one => one.label)}))]);
    """
    return dict(browser.execute_script(script))


def test_the_printed_link_opens_the_table(sweep: Sweep, browser: Any) -> None:
    look(browser, sweep.links[-1], 3200, 900)  # wide: columns beyond the window's edge aren't drawn
    names = [job["name"] for job in sweep.jobs]
    shown = until(
        browser, lambda: len((table := cells(browser)).get("attributes.`Run Name`", [])) > len(names) and table
    )
    metrics = [f"metrics.`{key}`" for key in summary.COLUMNS]
    wanted = [*(f"params.`{key}`" for key in sweep.swept), "tags.`verdict`", *metrics]
    headers = browser.execute_script(
        "return [...document.querySelectorAll('.ag-header-cell')].sort((a, b) => a.getBoundingClientRect().x"
        " - b.getBoundingClientRect().x).map(cell => [cell.getAttribute('col-id'), cell.innerText.trim()])"
    )
    assert [name for column, name in headers if column in wanted] == [*sweep.swept, "verdict", *summary.COLUMNS]

    best_first = sorted(sweep.jobs, key=lambda job: -job["control/margin_gain"])
    assert shown["attributes.`Run Name`"] == [*(job["name"] for job in best_first), sweep.name]
    assert shown["tags.`verdict`"] == [*(job["verdict"] for job in best_first), "-"]
    for key in sweep.swept:
        assert shown[f"params.`{key}`"] == [*(job["params"][key] for job in best_first), "-"]
    for key in summary.COLUMNS:
        *numbers, last = shown[f"metrics.`{key}`"]
        assert [float(number) for number in numbers] == pytest.approx([job[key] for job in best_first])
        assert last == "-"
    look(browser, sweep.links[-1], 1600, 660)
    until(browser, lambda: len(cells(browser).get("metrics.`control/margin_gain`", [])) > len(names))
    keep(browser, "ui_table.png")


def test_its_charts_are_those_of_the_result_and_of_the_layers(sweep: Sweep, browser: Any) -> None:
    look(browser, f"{sweep.links[-1]}&compareRunsMode=CHART", 1600, 1220)
    results = [key for key in summary.COLUMNS if not key.endswith("_before")]  # that is the same of all jobs
    wanted = [*results, *(f"after_control/{name}" for name in MEASURES)]
    shown = until(browser, lambda: {*wanted} <= {*(drawn := charts(browser))} and drawn)
    assert list(shown)[: len(wanted)] == wanted
    for key in results:
        (bars,) = shown[key]
        assert sorted(bars["x"]) == pytest.approx(sorted(job[key] for job in sweep.jobs))  # no bar for the sweep's run
    for measure in MEASURES:
        lines = {trace["name"]: trace for trace in shown[f"after_control/{measure}"]}
        assert {*lines} == {job["name"] for job in sweep.jobs}
        for job in sweep.jobs:
            assert lines[job["name"]]["x"] == list(range(6))  # layers 0 to 4, and final
            assert lines[job["name"]]["y"] == pytest.approx(over_layers(job, measure))
        assert len({line["colour"] for line in lines.values()}) == len(sweep.jobs)  # which is which
    keep(browser, "ui_chart.png")


def over_layers(job: dict[str, Any], measure: str) -> list[float]:
    """What the job's folder says of its control split after training, layer by layer."""
    wanted = {"stage": "after", "split": "control", "measure": measure}
    rows = csv.DictReader((Path(job["folder"]) / "layers.csv").read_text().splitlines())
    return [float(row["value"]) for row in rows if wanted.items() <= row.items()]


def test_the_jobs_side_by_side(sweep: Sweep, browser: Any) -> None:
    runs = quote(json.dumps([job["mlflow_run_id"] for job in sweep.jobs]))
    experiment = sweep.links[-1].partition("/experiments/")[2].partition("/")[0]
    mode = "workflowType=machine_learning"
    look(browser, f"{sweep.server}/#/compare-runs?runs={runs}&experiments=%5B%22{experiment}%22%5D&{mode}", 1600, 900)
    until(browser, lambda: f"Comparing {len(sweep.jobs)} Runs from 1 Experiment" in text(browser))
    (plot,) = until(browser, lambda: charts(browser).values())
    assert plot[0]["labels"][-1] == "control/margin_gain"  # which job was best, before anything is chosen
    assert sweep.swept[0] in plot[0]["labels"]  # three of the params that differ
    keep(browser, "ui_compare.png")
    for key in sweep.swept:
        assert [unspaced(value) for value in compared(browser, key)] == [
            unspaced(job["params"][key]) for job in sweep.jobs
        ]
    for key in summary.COLUMNS:  # shown with three decimals
        assert [float(value) for value in compared(browser, key)] == pytest.approx(
            [job[key] for job in sweep.jobs], abs=6e-4
        )


def compared(browser: Any, name: str) -> list[str]:
    """The row `name` of the compare page, from left to right; the long table draws only the rows that are in sight."""
    script = """
        for (const row of document.querySelectorAll('tr')) {
            const [label, ...values] = [...row.children].map(cell => cell.innerText.trim());
            if (label === arguments[0]) return values;
        }
        const grids = [...document.querySelectorAll('.ReactVirtualized__Grid')];
        if (grids.length < 2) return null;
        const [labels, values] = grids.map(grid => [...grid.querySelectorAll(':scope > div > div')]);
        const label = labels.find(cell => cell.innerText.trim() === arguments[0]);
        if (!label) {  // on, and from the bottom to the top again
            const left = grids[1].scrollHeight - grids[1].clientHeight - grids[1].scrollTop;
            grids[1].scrollTop = left > 1 ? grids[1].scrollTop + 200 : 0;
            return null;
        }
        return values.filter(cell => cell.style.top === label.style.top)
            .sort((a, b) => parseInt(a.style.left) - parseInt(b.style.left)).map(cell => cell.innerText.trim());
    """
    return until(browser, lambda: browser.execute_script(script, name))


def unspaced(value: str) -> str:
    return "".join(value.split())


def test_a_job_s_link_opens_its_run_with_a_chart_over_the_layers(sweep: Sweep, browser: Any) -> None:
    job, link = sweep.jobs[0], sweep.links[0]
    assert job["mlflow_run_id"] in link
    look(browser, link, 1600, 900)
    until(browser, lambda: "control/margin_gain" in text(browser) and sweep.name in text(browser))  # of its parent
    assert job["name"] in text(browser) and job["verdict_reason"] in text(browser)
    look(browser, link.replace("?", "/model-metrics?"), 1600, 900)
    trace = until(browser, lambda: charts(browser).get("csls_p_at_1"))[0]
    assert (trace["x"], trace["y"]) == (list(range(6)), pytest.approx(over_layers(job, "csls_p_at_1")))
