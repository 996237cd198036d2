"""A sweep's jobs side by side: the rows, the mean and interval across seeds, and both as text and as Markdown."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from src.console import signed
from src.results import DamageError, specificity_pvalue
from src.results import read_results as read_job

SEEDS = ("train.seed", "dataset.seed")
COLUMNS = {  # key in results.json, what a reader calls it; of the control words, P@1 by word
    "control/margin_gain": "margin gain",
    "control/csls_p_at_1_before": "P@1 before",
    "control/csls_p_at_1_after": "P@1 after",
    "control_unalike/csls_p_at_1_after": "P@1 unalike",
    "baseline/best_layer_csls_p_at_1_before": "untouched best",
    "control/specificity_pvalue": "specificity p",
}
_GAINS = {"margin gain": "control/margin_gain", "P@1 gain": "control/csls_p_at_1_gain"}
_MARKDOWN_ROWS = 25  # a description is cut at 6,000 characters

Cell = str | float | None


def read_results(jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the done ones among a sweep's jobs found, under the sweep's names, with the gain of CSLS P@1 beside it."""
    found = []
    for job in jobs:
        if job["status"] != "done":
            continue
        with suppress(DamageError, OSError):  # since it was done; `outcome` and the plan of the next sweep name it
            results = read_job(Path(job["folder"]), alone=True)
            if "control/csls_p_at_1_after" in results:
                gain = results["control/csls_p_at_1_after"] - results["control/csls_p_at_1_before"]
                results["control/csls_p_at_1_gain"] = gain
            found.append(results | {"name": job["name"], "folder": job["folder"]})
    return found


def counted_by(results: Mapping[str, Any]) -> Literal["word", "pair"]:
    """What retrieval counts in a job's results: words, or pairs in those of an earlier version."""
    return "word" if results.get("results_version", 1) >= 2 else "pair"


def job_rows(found: Sequence[Mapping[str, Any]]) -> list[list[Cell]]:
    """(name, verdict, COLUMNS…) of each job, the largest margin gain first; None where a pilot has nothing."""
    rows: list[list[Cell]] = []
    for results in found:
        numbers = dict(results) | {"control/specificity_pvalue": specificity_pvalue(results, "control")}
        trained = "control/margin_gain" in results
        rows.append([results["name"], results["verdict"] if trained else None, *map(numbers.get, COLUMNS)])
    return sorted(rows, key=lambda row: -row[2] if isinstance(row[2], float) else float("inf"))


def seed_rows(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """(name, verdicts, margin gain, P@1 gain) of each setting that several seeds repeat: mean and 95 % t-interval."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for results in found:
        ignored = (*SEEDS, "tracking.", "sweep.")
        setting = {key: value for key, value in results["params"].items() if not key.startswith(ignored)}
        setting["batch"] = results.get("train_batch_size_used")  # half of what was asked for where memory ran out
        setting["counted by"] = counted_by(results)
        if "control/margin_gain" in results:
            groups.setdefault(json.dumps(setting, sort_keys=True), []).append(results)
    return [_seed_row(members) for members in groups.values() if len(members) > 1]


def _seed_row(members: Sequence[Mapping[str, Any]]) -> list[str]:
    words = [member["name"].split() for member in members]
    common = [word for word in words[0] if all(word in other for other in words)]  # leaves out seed=…
    verdicts = Counter(member["verdict"] for member in members).most_common()
    gains = [_interval([member[key] for member in members]) for key in _GAINS.values()]
    return [
        f"{' '.join(common)}, {len(members)} seeds",
        ", ".join(f"{verdict} {count}" for verdict, count in verdicts),
        *(f"{signed(mean)} [{signed(low)}, {signed(high)}]" for mean, low, high in gains),
    ]


def _interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): Student's 95 % interval of the mean."""
    from scipy import stats

    mean, error = sum(values) / len(values), float(stats.sem(values))
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return mean, mean - reach, mean + reach


def _about(found: Sequence[Mapping[str, Any]]) -> str:
    by_pair = [results["name"] for results in found if counted_by(results) == "pair"]
    some = f"words, but pairs in these jobs of an earlier version: {', '.join(by_pair)}" if by_pair else "words"
    counts = "pairs (these jobs are of an earlier version)" if len(by_pair) == len(found) else some
    return (
        f"P@1 counts {counts}. Unalike: after training, of the words that don't look like their translation. "
        "Untouched best: at the untouched model's best layer."
    )


def as_text(found: Sequence[Mapping[str, Any]]) -> str:
    """Both tables for a terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110, highlight=False, markup=False)
    headings = [heading.replace(" ", "\n", 1) for heading in COLUMNS.values()]  # leaves room for the jobs' names
    tables = [("control words, best margin gain first", ["", "verdict", *headings], _shown(found))]
    if seeds := seed_rows(found):
        tables.append(("across seeds, mean and 95 % interval", ["", "verdicts", *_GAINS], seeds))
    with console.capture() as capture:
        for index, (title, columns, rows) in enumerate(tables):
            if index:
                console.print()
            table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
            for number, column in enumerate(columns):
                table.add_column(column, justify="right" if number > 1 else "left", overflow="fold")
            for row in rows:
                table.add_row(*row)
            console.print(table)
            if not index:
                console.print(_about(found))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def as_markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """Both tables for the description of a tracked sweep; of many jobs only the best."""
    parts = [_markdown(["job", "verdict", *COLUMNS.values()], _shown(found)[:_MARKDOWN_ROWS]), _about(found)]
    if len(found) > _MARKDOWN_ROWS:
        parts.append(f"The best {_MARKDOWN_ROWS} of {len(found)}; summary.json has them all.")
    if seeds := seed_rows(found):
        parts.append(_markdown(["across seeds", "verdicts", *_GAINS], seeds))
    return "\n\n".join(parts)


def best_setting(
    search: Mapping[str, Any], jobs: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]
) -> str:
    """What a search has come to: its best job, and the line that confirms it on words that had no say."""
    repeats = f", {search['repeats']} of them with another's setting" if search["repeats"] else ""
    text = f"{search['told']} of {search['n_trials']} trials{repeats}\n"
    metric, sign = search["metric"], 1 if search["direction"] == "maximize" else -1
    measured = [results for results in found if metric in results]
    if not measured:
        return text
    best = max(measured, key=lambda results: sign * results[metric])
    (overrides,) = [job["overrides"] for job in jobs if job["folder"] == best["folder"]]
    other = f"dataset.seed={int(best['params']['dataset.seed']) + 1}"
    confirm = command([*(one for one in overrides if not one.startswith("dataset.seed=")), other])
    return (
        f"{text}best       {best['name']}: {metric} {best[metric]:.4g}\n"
        "The control words chose it among all tries, so it looks better than it is. Confirm it on another split:\n"
        f"  {confirm}\n"
    )


def command(overrides: Sequence[str]) -> str:
    """The line that runs one job by itself, also where an experiment among its overrides is a sweep."""
    alone = ["hydra.mode=RUN"] if any(override.startswith("experiment=") for override in overrides) else []
    return shlex.join(["python", "-m", "src.run", *overrides, *alone])


def _shown(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    formats: list[Callable[[Any], str]] = [str, str, signed, *["{:.3f}".format] * 4, "{:.2g}".format]
    return [
        ["–" if cell is None else form(cell) for form, cell in zip(formats, row, strict=True)]
        for row in job_rows(found)
    ]


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
