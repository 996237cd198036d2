"""A sweep's report: what it says, what it survives, and that a browser needs nothing but the file."""

from __future__ import annotations

import csv
import itertools
import json
import re
import subprocess
import sys
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from src import report
from src.errors import UserError
from src.evidence import SplitEvidence, holm
from src.report_best import details
from src.report_board import caveats, columns, command, finding, leaderboard
from src.report_data import find, read_sweep
from src.report_sums import estimate, grid, in_order, main_effects, over_seeds
from src.results import LAYER_COLUMNS, RESULTS_VERSION, write_sealed, write_table

ROOT = Path(__file__).resolve().parents[1]
SWEPT = {"lora.layers": ["[1]", "[1,2]", "[2,4]"], "lora.rank": ["4", "16"], "train.seed": ["0", "1"]}
DEPTH = 6


def synthetic_results(overrides: dict[str, str], gain: float, verdict: str, pvalue: float) -> dict[str, Any]:
    """A results.json with every scalar of a trained run; the numbers are made up."""
    evidence = dict.fromkeys((field.name for field in fields(SplitEvidence)), 0.0)
    evidence |= {
        "pair_cosine_before": 0.31, "pair_cosine_after": 0.40, "pair_cosine_gain": 0.09, "pair_cosine_gain_pct": 29.0,
        "margin_before": 0.10, "margin_after": 0.10 + gain, "margin_gain": gain,
        "csls_p_at_1_before": 0.25, "csls_p_at_1_after": 0.25 + 2 * gain,
        "t_pvalue": 1e-20, "wilcoxon_pvalue": 1e-12, "cohens_dz": 1.5, "gain_ci_low": 0.08, "gain_ci_high": 0.10,
        "mcnemar_pvalue": 0.2, "specificity_gain": gain, "specificity_pvalue": pvalue / 2,
        "specificity_harm_pvalue": 0.9, "scaled_specificity_gain": gain, "scaled_specificity_pvalue": pvalue,
        "near_gain": gain / 2, "near_pvalue": pvalue, "left_out_specificity_pvalue": pvalue,
        "left_out_near_pvalue": pvalue, "share_gained": 0.8, "n_pairs": 40, "n_words": 32,
    }  # fmt: skip
    unalike = evidence | {"n_pairs": 30, "n_words": 24, "csls_p_at_1_before": 0.15, "csls_p_at_1_after": 0.15 + gain}
    strata = {"0_to_0.2": (10, 0.1), "0.2_to_0.4": (8, 0.15), "0.4_to_0.6": (6, 0.2), "0.6_to_1": (8, 0.55)}
    return {
        "name": f"r{overrides.get('lora.rank', '16')} L{overrides.get('lora.layers', '[1,2]')[1:-1]} triplet",
        "config_hash": "0123456789abcdef",
        "params": {"model.name": "synthetic", "model.id": "null", "eval.layer": "final", "eval.permutations": "10000"}
        | overrides,
        "model_revision": "none",
        "dataset": {"name": "builtin", "digest": "0", "source": "made up", "languages": "swahili-english"}
        | {"train": "80", "control": "40"},
        "versions": {"python": "3.11"},
        "git_commit": "0" * 40,
        "results_version": RESULTS_VERSION,
        **{f"{split}/{name}": value for split in ("train", "control") for name, value in evidence.items()},
        **{f"control_unalike/{name}": value for name, value in unalike.items()},
        **{f"spelling/{name}_n_words": count for name, (count, _) in strata.items()},
        **{f"spelling/{name}_csls_p_at_1_before": score for name, (_, score) in strata.items()},
        **{f"spelling/{name}_csls_p_at_1_after": score + gain for name, (_, score) in strata.items()},
        "claimed_on": "control_unalike",
        "best_untouched_layer": "4",
        "best_trained_layer": "final",
        "baseline/best_layer_csls_p_at_1_before": 0.281,
        "baseline/best_layer_csls_p_at_1_after": 0.25 + 2 * gain,
        "baseline/centred_csls_p_at_1": 0.26,
        "baseline/lsar_csls_p_at_1": 0.255,
        "baseline/procrustes_csls_p_at_1": 0.31,
        "baseline/spelling_csls_p_at_1": 0.219,
        "lm/perplexity_english_before": 20.0,
        "lm/perplexity_english_after": 20.4,
        "lm/perplexity_english_change": 0.02,
        "lm/perplexity_english_change_low": -0.004,
        "lm/perplexity_english_change_high": 0.05,
        "time/total_s": 12.5,
        "verdict": verdict,
        "verdict_reason": "A made-up reason.",
        "mlflow_run_id": None,
    }


def of_version_1(results: dict[str, Any]) -> dict[str, Any]:
    """What an earlier version would have written: without words, look-alikes, near words and baselines."""
    names = "n_pairs|n_words|words_won|words_lost|near_\\w+|left_out_\\w+|share_gained|specificity_sd"
    newer = rf"control_unalike/.*|spelling/.*|baseline/.*|best_.*|claimed_on|results_version|.*_change.*|.*/({names})"
    return {key: value for key, value in results.items() if not re.fullmatch(newer, key)}


def synthetic_layers(gain: float, depth: int = DEPTH) -> list[tuple[Any, ...]]:
    rows = []
    for place, layer in enumerate([*range(depth + 1), "final"]):
        for measure, base in (("csls_p_at_1", 0.25), ("margin", 0.1), ("pair_cosine", 0.9)):
            height = base * (0.4 + place * (depth - place / 2) / depth**2 * 1.6)
            rows.append((layer, "pilot", "all", measure, height))
            for split in ("train", "control"):
                rows.append((layer, "before", split, measure, height))
                rows.append((layer, "after", split, measure, height + gain * min(1, place / 3)))
    return rows


def write_job(
    folder: Path, overrides: dict[str, str], gain: float = 0.05, verdict: str = "aligned", pvalue: float = 0.001
) -> dict[str, Any]:
    results = synthetic_results(overrides, gain, verdict, pvalue)
    (folder / ".hydra").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    lines = "".join(f"- {json.dumps(f'{key}={value}')}\n" for key, value in overrides.items())
    (folder / ".hydra" / "overrides.yaml").write_text(lines or "[]\n")
    write_table(folder / "layers.csv", LAYER_COLUMNS, synthetic_layers(gain))
    return results


def write_sweep(folder: Path, swept: dict[str, list[str]] = SWEPT) -> dict[str, Any]:
    """A sweep of all combinations, two levels of rank and seed apart by known gains; returns its sweep.json."""
    jobs = []
    for number, levels in enumerate(itertools.product(*swept.values())):
        overrides = {"model": "tiny"} | dict(zip(swept, levels, strict=True))
        gain = 0.02 * number / 11 + (0.03 if overrides.get("lora.rank") == "16" else -0.01)
        verdict = "harmed" if gain < -0.005 else "inflated" if gain < 0.03 else "aligned"
        write_job(folder / str(number), overrides, gain, verdict, 0.002 if number == 11 else 0.02 + 0.01 * number)
        jobs.append(
            {
                "number": number,
                "overrides": [f"{key}={value}" for key, value in overrides.items()],
                "config_hash": "0123456789abcdef",
                "folder": str(number),
                "status": "done",
                "error": None,
                "reused": False,
            }
        )
    arguments = " ".join(f"'{key}={','.join(levels)}'" for key, levels in swept.items())
    sweep = {
        "id": "/".join(folder.parts[-2:]),
        "mlflow_run_id": None,
        "command": f"python -m src.run -m model=tiny {arguments}",
        "overrides": ["model=tiny", *(f"{key}={','.join(levels)}" for key, levels in swept.items())],
        "swept": swept,
        "started": "2031-01-02T03:04:05",
        "ended": "2031-01-02T04:05:06",
        "jobs": jobs,
    }
    (folder / "sweep.json").write_text(json.dumps(sweep))
    return sweep


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "multirun" / "2031-01-02" / "03-04-05"
    place.mkdir(parents=True)
    write_sweep(place)
    return place


class Page(HTMLParser):
    """A page's tags, the text a reader sees, and its scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts, self._inside = "", [""], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = "" if tag == self._inside else self._inside

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def figures(self) -> list[dict[str, Any]]:
        found = (
            re.match(r"Plotly.newPlot\('figure-\d+', Object.assign\((.*), \{config: ", each) for each in self.scripts
        )
        return [json.loads(match[1]) for match in found if match]


def made(folder: Path, *arguments: str) -> Path:
    assert report.main([str(folder), *arguments]) == 0
    return folder / "report.html"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that says why there is no report."""
    assert report.main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def change(place: Path, number: int, **values: Any) -> None:
    """Edits a job's entry in sweep.json."""
    sweep = json.loads((place / "sweep.json").read_text())
    sweep["jobs"][number] |= values
    (place / "sweep.json").write_text(json.dumps(sweep))


# --- what it says -------------------------------------------------------------------------------------------


def test_ranks_and_corrects_over_the_sweeps_runs(folder: Path) -> None:
    sweep = read_sweep(folder)
    by_number = sorted(sweep.ranked, key=lambda job: job.number)
    scaled = [job.results["control/scaled_specificity_pvalue"] for job in by_number]  # the larger one: see the verdict
    assert [job.holm for job in by_number] == holm(scaled)
    assert [job.number for job in sweep.ranked if job.holds] == [11]
    assert sweep.ranked[0].number == 11
    assert [job.verdict for job in sweep.ranked] == ["aligned"] * 6 + ["inflated"] * 4 + ["harmed"] * 2
    gains = [job.gain("csls_p_at_1") or 0 for job in sweep.ranked]
    assert gains[:6] == sorted(gains[:6], reverse=True)
    assert finding(sweep).startswith("1 of 12 trained runs is aligned once 12 tries are allowed for. Ranked first: ")


def edit(folder: Path, number: int, **values: Any) -> None:
    """Changes a job's results.json; None takes a key away."""
    file = folder / str(number) / "results.json"
    results = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in results.items() if value is not None}))


def claim(folder: Path, number: int, verdict: str, near: float) -> None:
    """A verdict that beats random matchings by far, and near words at `near`."""
    keys = ("specificity_pvalue", "scaled_specificity_pvalue", "left_out_specificity_pvalue", "left_out_near_pvalue")
    pvalues = {f"control_unalike/{key}": 1e-4 for key in keys} | {"control_unalike/near_pvalue": near}
    edit(folder, number, verdict=verdict, **pvalues)


def test_a_claim_is_counted_as_what_holds_over_all_tries(folder: Path) -> None:
    claim(folder, 1, "drawn together", 0.6)
    claim(folder, 3, "aligned", 0.04)  # against near words, that is no longer true of 12 tries
    claim(folder, 9, "aligned", 1e-4)
    sweep = read_sweep(folder)
    assert [(job.number, job.holds_as) for job in sweep.ranked if job.holds] == [
        *[(11, "aligned"), (9, "aligned")],
        *[(3, "drawn together"), (1, "drawn together")],
    ]
    start = "2 of 12 trained runs are aligned once 12 tries are allowed for, 2 more are only drawn together. "
    assert finding(sweep).startswith(start)
    verdicts = {job.number: row[2] for job, row in zip(sweep.ranked, leaderboard(sweep), strict=True)}
    assert verdicts[9] == verdicts[11] == "▲ aligned"
    assert verdicts[3] == "▲ aligned (drawn together after Holm)" and verdicts[7] == "▲ aligned (not after Holm)"
    assert verdicts[1] == "● drawn together"
    for number in (9, 11):
        edit(folder, number, verdict="none")
    start = "None of 12 trained runs is aligned, 2 are only drawn together, once 12 tries are allowed for. "
    assert finding(read_sweep(folder)).startswith(start)
    for number in (1, 3):
        edit(folder, number, verdict="inflated")
    start = "None of 12 trained runs is aligned or drawn together once 12 tries are allowed for. "
    assert finding(read_sweep(folder)).startswith(start)


def test_a_verdict_s_place_goes_before_its_gains(folder: Path) -> None:
    edit(folder, 0, verdict="drawn together")
    edit(folder, 11, verdict="harmed")
    found = [job.verdict for job in read_sweep(folder).ranked]
    assert found == ["aligned"] * 5 + ["drawn together"] + ["inflated"] * 4 + ["harmed"] * 2


def test_the_leaderboard_tells_words_look_alikes_and_the_untouched_model_apart(folder: Path) -> None:
    sweep = read_sweep(folder)
    first = dict(zip(columns(sweep), leaderboard(sweep)[0], strict=True))
    assert first["P@1 by word (32 words)"] == "0.250 → 0.350"
    assert first["P@1, not look-alikes (24 words)"] == "0.150 → 0.200"
    assert first["best untouched layer"] == "4: 0.281"
    edit(folder, 11, **{"control_unalike/n_words": 20, "control_unalike/specificity_gain": 0.7})
    sweep = read_sweep(folder)  # the splits differ: each cell has its own count
    first = dict(zip(columns(sweep), leaderboard(sweep)[0], strict=True))
    assert first["P@1, not look-alikes"] == "0.150 → 0.200 (20 words)"
    assert first["specificity gain"] == "+0.7000"  # where the verdict reads it, and so p


def test_the_best_run_stands_beside_spelling_and_what_costs_no_training(folder: Path) -> None:
    spelling, free, perplexity = details(read_sweep(folder).ranked[0])
    assert spelling.rows == [
        ("0 to 0.2", "10", "0.100", "0.150"),
        ("0.2 to 0.4", "8", "0.150", "0.200"),
        ("0.4 to 0.6", "6", "0.200", "0.250"),
        ("0.6 to 1 (look-alikes)", "8", "0.550", "0.600"),
        ("all words", "32", "0.250", "0.350"),
    ]
    assert spelling.about.endswith("Spelling alone, without any model, finds 0.219 of all words.")
    assert [row[1:] for row in free.rows] == [
        *[("final", "0.250"), ("4", "0.281"), ("final", "0.260"), ("final", "0.255"), ("final", "0.310")],
        *[("–", "0.219"), ("final", "0.350"), ("final", "0.350")],
    ]
    assert "finds more than that row (0.350; untouched, rotated (Procrustes): 0.310)" in free.about
    assert perplexity.rows == [("english", "20", "20.4", "+2.0 %", "−0.4 … +5.0 %")]
    edit(folder, 11, **{"baseline/procrustes_csls_p_at_1": 0.4, "baseline/spelling_csls_p_at_1": None})
    edit(folder, 11, **{"spelling/0.2_to_0.4_n_words": None})
    spelling, free, _ = details(read_sweep(folder).ranked[0])
    assert "no more than that row (0.350; untouched, rotated (Procrustes): 0.400)" in free.about
    assert len(spelling.rows) == 4 and "Spelling alone" not in spelling.about
    page = Page(made(folder))
    for words in ("Ranked first: layers [2,4], rank 16, seed 1", "By spelling", "Without training", "Perplexity"):
        assert words in page.text
    made(folder, "--format", "md")
    text = (folder / "report.md").read_text()
    assert "| 0.6 to 1 (look-alikes) | 8 | 0.550 | 0.600 |" in text and "## Without training, layers" in text


def test_jobs_of_an_earlier_version_are_shown_as_counted_by_pair(folder: Path) -> None:
    for number in range(12):
        file = folder / str(number) / "results.json"
        file.write_text(json.dumps(of_version_1(json.loads(file.read_text()))))
    sweep = read_sweep(folder)
    assert (sweep.unit, sweep.older, sweep.ranked[0].number) == ("pair", [], 11)
    assert [job.holm for job in sweep.ranked] == [job.aligned_holm for job in sweep.ranked]
    assert finding(sweep).startswith("1 of 12 trained runs is aligned, by an earlier version's rules, once 12 tries")
    assert "P@1 by pair" in columns(sweep) and leaderboard(sweep)[0][5:7] == ("–", "–")
    assert [detail.rows for detail in details(sweep.ranked[0])] == [[("english", "20", "20.4", "+2.0 %", "–")]]
    page = Page(made(folder))
    assert "Counted by pair: these runs are of an earlier version" in page.text
    assert "Gain in retrieval (CSLS P@1 by pair)" in page.text and "By spelling" not in page.text


def test_jobs_counted_by_pair_are_not_ranked_among_others(folder: Path) -> None:
    best = folder / "11" / "results.json"
    best.write_text(json.dumps(of_version_1(json.loads(best.read_text()))))
    sweep = read_sweep(folder)
    assert (sweep.unit, [job.number for job in sweep.older], sweep.ranked[-1].number) == ("word", [11], 11)
    assert len(sweep.comparable) == 11
    assert leaderboard(sweep)[-1][2] == "▲ aligned (by pair)"
    assert finding(sweep).startswith("None of 12 trained runs is aligned or drawn together once 12 tries")
    assert "By an earlier version's rules, 1 more is aligned." in finding(sweep)
    assert caveats(sweep)[0].startswith("Counted by pair, of an earlier version: job 11. ")
    assert sum(len(each.values) for each in main_effects(sweep, "margin")["lora.rank"]) == 11
    page = Page(made(folder))
    assert "Counted by pair, of an earlier version: job 11." in page.text
    assert len(page.figures()[-1]["data"]) == 12  # the untouched model once, and the runs that can be compared
    made(folder, "--format", "csv")
    with (folder / "report.csv").open(encoding="utf-8", newline="") as file:
        assert [row["counted_by"] for row in csv.DictReader(file)] == ["word"] * 11 + ["pair"]


def test_a_higher_gain_does_not_outrank_a_verdict(folder: Path) -> None:
    results = json.loads((folder / "3" / "results.json").read_text())
    results |= {"verdict": "inflated", "control/csls_p_at_1_after": 0.99}
    (folder / "3" / "results.json").write_text(json.dumps(results))
    assert [job.number for job in read_sweep(folder).ranked].index(3) == 5


def test_the_command_repeats_the_best_run(folder: Path) -> None:
    best = read_sweep(folder).ranked[0]
    line = "python -m src.run model=tiny 'lora.layers=[2,4]' lora.rank=16 train.seed=1"
    assert command(best) == line
    assert line in Page(made(folder)).text


def test_page_shows_all_runs_and_their_figures(folder: Path) -> None:
    page = Page(made(folder))
    for words in (
        "Leaderboard",
        "lora.layers × lora.rank",
        "What each parameter does",
        "Seeds",
        "▲ aligned",
        "● drawn together",
        "look-alikes",
        "p, Holm",
    ):
        assert words in page.text
    assert sum(tag == "tr" for tag, _ in page.tags) >= 13
    figures = page.figures()
    kinds = [figure["data"][0]["type"] for figure in figures]
    assert kinds == ["heatmap"] * 2 + ["scatter"] * 6
    places = {attributes.get("id") for tag, attributes in page.tags if tag == "div"}
    assert {f"figure-{place}" for place in range(8)} <= places
    lines = figures[-1]["data"]
    assert len(lines) == 13  # the untouched model once, and every run
    assert lines[0]["legendgroup"] == "untouched" and lines[-1]["legendgroup"] == "best run"
    assert figures[-1]["layout"]["xaxis"]["ticktext"] == ["0", "1", "2", "3", "4", "5", "6", "final"]


def test_page_needs_no_network(folder: Path) -> None:
    page = Page(made(folder))
    assert not [tag for tag, attributes in page.tags if {"src", "href", "srcset", "data"} & attributes.keys()]
    assert not {"link", "iframe", "img", "object"} & {tag for tag, _ in page.tags}
    style = re.findall(r"<style>(.*?)</style>", made(folder).read_text(), re.DOTALL)
    assert style and not re.search(r"@import|url\(", "".join(style))
    assert sum(len(script) > 1_000_000 for script in page.scripts) == 1


def test_names_are_text_not_markup(folder: Path) -> None:
    evil = "</script><script>alert(1)</script><b>%{y}&amp;"
    honest = Page(made(folder))
    for number in range(12):
        job = folder / str(number)
        results = json.loads((job / "results.json").read_text())
        results["verdict_reason"] = results["dataset"]["name"] = results["params"]["model.id"] = evil
        (job / "results.json").write_text(json.dumps(results))
        overrides = [f"dataset.path={evil}{number}"]
        (job / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
        change(folder, number, overrides=overrides)
    sweep = json.loads((folder / "sweep.json").read_text()) | {"swept": {"dataset.path": []}, "id": evil}
    (folder / "sweep.json").write_text(json.dumps(sweep))
    page = Page(made(folder))
    assert sum(tag == "script" for tag, _ in page.tags) == sum(tag == "script" for tag, _ in honest.tags) - 4
    assert "b" not in {tag for tag, _ in page.tags}
    assert evil in page.text
    figures = page.figures()
    assert len(figures) == 4
    assert "%{y}" not in "".join(line["hovertemplate"].split("<br>")[0] for line in figures[-1]["data"])
    assert all("<script" not in line["meta"] for line in figures[-1]["data"])


def test_passwords_stay_out(folder: Path) -> None:
    for number in range(12):
        (folder / str(number) / ".hydra" / "overrides.yaml").write_text(
            "- tracking.uri=http://anna:geheim@example.org\n"
        )
        change(folder, number, overrides=["tracking.uri=http://anna:geheim@example.org"])
    page = made(folder).read_text()
    assert "tracking.uri=http://example.org" in page
    assert "geheim" not in page


# --- sums ---------------------------------------------------------------------------------------------------


def test_main_effects_are_means_with_intervals(folder: Path) -> None:
    effects = main_effects(read_sweep(folder), "margin")
    assert {key: [each.name for each in levels] for key, levels in effects.items()} == SWEPT
    low, high = effects["lora.rank"]
    assert high.mean - low.mean == pytest.approx(0.04 + 0.02 * 2 / 11)
    assert [len(each.values) for each in (low, high)] == [6, 6]
    interval = estimate("", [1.0, 2.0, 3.0]).interval
    assert interval == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert estimate("", [1.0]).interval is None


def test_seeds_are_pooled_by_setting(folder: Path) -> None:
    found = over_seeds(read_sweep(folder), "margin")
    assert [each.name for each in found][:3] == ["layers [1], rank 4", "layers [1], rank 16", "layers [1,2], rank 4"]
    assert {len(each.values) for each in found} == {2}


def test_grid_leaves_a_lost_job_empty(folder: Path) -> None:
    for number in (0, 1):
        (folder / str(number) / "results.json").unlink()
        change(folder, number, status="failed", error="it broke")
    found = grid(read_sweep(folder), "margin")
    assert found and (found.y, found.x) == ("lora.layers", "lora.rank")
    assert (found.y_levels, found.x_levels) == (SWEPT["lora.layers"], SWEPT["lora.rank"])
    assert found.cells[0][0] is None
    assert found.cells[2][1] == pytest.approx(0.03 + 0.02 * 10.5 / 11)


def test_seeds_come_last_in_names(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"train.seed": ["0", "1"], "lora.rank": ["4", "16"]})
    assert read_sweep(tmp_path).ranked[0].label == "rank 16, seed 1"


def test_levels_sort_as_a_reader_expects() -> None:
    levels = ["all", "[1,2]", "16", "4", "2e-4", "[1]", "auto"]
    assert sorted(levels, key=in_order) == ["2e-4", "[1]", "[1,2]", "4", "16", "all", "auto"]


# --- what it survives ---------------------------------------------------------------------------------------


def test_damaged_and_failed_jobs_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "2" / "results.json").write_text('{"verdict": "alig')
    (folder / "3" / "results.json").unlink()
    change(folder, 3, status="failed", error="loss is not finite at step 7")
    (folder / "4" / "results.json").unlink()
    change(folder, 4, status="pending")
    (folder / "4" / "failed.json").write_text('{"error": "killed before sweep.json knew"}')
    (folder / "5" / "layers.csv").write_text("layer,stage,split,measure,value\nseven,after,control,margin,1\n")
    change(folder, 6, config_hash="another")
    page = Page(made(folder))
    warnings = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in warnings] == [" job 2", " job 5", " job 6"]
    for words in (
        "2/results.json is damaged",
        "loss is not finite at step 7",
        "killed before",
        "5/layers.csv is damaged",
    ):
        assert words in page.text
    assert len(read_sweep(folder).ranked) == 8
    assert "8 done, 4 without results" in page.text


def test_a_damaged_sweep_file_is_done_without(folder: Path) -> None:
    (folder / "sweep.json").write_text('{"jobs": [{"numb')
    sweep = read_sweep(folder)
    assert sweep.notes[0].startswith("sweep.json is damaged")
    assert sweep.swept == tuple(SWEPT)
    assert len(sweep.ranked) == 12


def test_a_sweep_file_whose_digest_differs_is_done_without(folder: Path) -> None:
    file = folder / "sweep.json"
    write_sealed(file, json.loads(file.read_text()))
    assert not read_sweep(folder).notes
    file.write_text(file.read_text().replace('"number": 3', '"number": 13'))
    found = read_sweep(folder)
    said = "sweep.json is damaged (its digest differs): jobs were found by their folders"
    assert (found.notes, len(found.ranked)) == ([said], 12)


def test_a_sweep_copied_from_another_machine(folder: Path) -> None:
    for number in range(12):
        change(folder, number, folder=f"/gone/multirun/2031-01-02/03-04-05/{number}")
    assert len(read_sweep(folder).ranked) == 12


def test_reused_jobs_lie_in_another_sweep(folder: Path, tmp_path: Path) -> None:
    (folder / "0").rename(tmp_path / "elsewhere")
    change(folder, 0, folder=str(tmp_path / "elsewhere"), reused=True)
    assert len(read_sweep(folder).ranked) == 12


@pytest.mark.parametrize("inner", ["", "0"])
def test_a_single_run_is_a_sweep_of_one(tmp_path: Path, inner: str) -> None:
    place = tmp_path / "multirun" / "2031-01-01" / "00-00-00"
    write_job(place / "0", {"model": "tiny"})
    page = Page(made(place / inner))
    assert page.text.count("Aligned. A made-up reason.") == 1
    assert "python -m src.run model=tiny" in page.text
    assert len(page.figures()) == 2


def test_a_pilot_has_no_gains(tmp_path: Path) -> None:
    results = write_job(tmp_path / "0", {"train": "none"}, verdict="none")
    kept = {key: value for key, value in results.items() if "/" not in key or key.endswith("csls_p_at_1_before")}
    (tmp_path / "0" / "results.json").write_text(json.dumps(kept))
    rows = [row for row in synthetic_layers(0) if row[1] == "pilot"]
    write_table(tmp_path / "0" / "layers.csv", LAYER_COLUMNS, rows)
    page = Page(made(tmp_path))
    assert "Nothing was trained" in page.text
    assert [len(figure["data"]) for figure in page.figures()] == [1, 1]
    kept = {key: value for key, value in results.items() if "_after" not in key}
    (tmp_path / "0" / "results.json").write_text(json.dumps(kept))
    free = next(detail for detail in details(read_sweep(tmp_path).ranked[0]) if detail.heading == "Without training")
    assert [row[0] for row in free.rows][-1] == "spelling alone" and "Here the trained" not in free.about


def test_where_nothing_can_be_shown(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nonesuch: no such sweep or folder" in refused(capsys, "nonesuch")
    with pytest.raises(UserError, match="no sweeps yet"):
        find(None, tmp_path / "bare")
    (tmp_path / "bare").mkdir()
    assert "bare: holds no run and no sweep's jobs" in refused(capsys, str(tmp_path / "bare"))
    for number in range(12):
        (folder / str(number) / "results.json").write_text("[]")
    assert "none of its 12 jobs has results; job 0: " in refused(capsys, str(folder))
    (folder / "sweep.json").write_text('{"jobs": []}')
    assert "03-04-05: holds no run and no sweep's jobs" in refused(capsys, str(folder))
    assert not list(folder.glob("report*"))


def test_out_that_cannot_be_written(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert "choose another place with --out" in refused(capsys, str(folder), "--out", str(tmp_path / "file" / "a.html"))


def test_finds_by_id_path_or_latest(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "multirun"
    assert find(None, root) == find("2031-01-02/03-04-05", root) == find(str(folder), root) == folder
    write_job(root / "2031-01-03" / "00-00-00" / "0", {})
    assert find(None, root) == folder  # a single run is no sweep
    (folder / "sweep.json").unlink()
    assert find(None, root) == root / "2031-01-03" / "00-00-00"


# --- other forms, and the command ---------------------------------------------------------------------------


def test_csv_and_parquet_hold_the_same(folder: Path) -> None:
    from pyarrow import parquet

    made(folder, "--format", "csv")
    made(folder, "--format", "parquet")
    with (folder / "report.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    table = parquet.read_table(folder / "report.parquet").to_pylist()
    assert len(rows) == len(table) == 12
    assert rows[0]["lora.layers"] == table[0]["lora.layers"] == "[2,4]"
    assert rows[0].keys() == table[0].keys()
    assert float(rows[0]["control/margin_gain"]) == table[0]["control/margin_gain"]
    assert table[0]["pvalue_holm"] == pytest.approx(0.024)
    assert [row["place"] for row in table] == list(range(1, 13))
    assert (table[0]["holds_as"], table[0]["best_untouched_layer"], table[-1]["holds_as"]) == ("aligned", "4", None)
    assert table[0]["claimed_on"] == "control_unalike" and table[0]["control_unalike/n_words"] == 24


def test_markdown_shows_names_as_they_are(folder: Path) -> None:
    change(folder, 11, overrides=["model=tiny", "lora.layers=[2,4]", "lora.rank=a|b*<i>", "train.seed=1"])
    made(folder, "--format", "md")
    text = (folder / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| 1 |"))
    assert r"rank a\|b\*\<i\>" in row
    assert len(re.findall(r"(?<!\\)\|", row)) == 13
    assert "    python -m src.run model=tiny" in text


def test_the_command_prints_the_path_and_leaves_mlflow_alone(folder: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from src import report; assert not {'torch', 'plotly'} & sys.modules.keys();"
        f"assert report.main(['--out', {str(tmp_path / 'here.html')!r}]) == 0; assert 'mlflow' not in sys.modules"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"{tmp_path / 'here.html'}\n")
    assert (tmp_path / "here.html").stat().st_size > 1_000_000
    assert not list(folder.glob("*.tmp")) and not (folder / "report.html").exists()
