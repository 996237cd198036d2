"""The page of a sweep's report: one HTML file that needs no network, for a desk, a phone and a printer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from src.report_best import details
from src.report_board import VERDICTS, caveats, columns, command, finding, leaderboard, signed
from src.report_data import Job, Sweep
from src.report_figures import curves, dots, heat
from src.report_sums import Estimate, grid, main_effects, over_seeds

SIDE_BY_SIDE = 4  # columns of a heat map that is legible at half the page's width
FIRST = 20  # runs of the leaderboard that show at once


def page(sweep: Sweep) -> str:
    """The whole page, plotly included."""
    from plotly.offline import get_plotlyjs

    title = f"{'Sweep' if len(sweep.ranked) + len(sweep.others) > 1 else 'Run'} {sweep.id}"
    figures = _Figures()
    body = "\n".join(
        part
        for part in (
            f"<h1>{escape(title)}</h1><p class=lead>{escape(finding(sweep))}</p>{_facts(sweep)}",
            _notes(sweep.notes),
            _best(sweep.ranked[0]),
            _leaderboard(sweep),
            _details(sweep),
            _heat(sweep, figures),
            _effects(sweep, figures),
            _seeds(sweep, figures),
            _curves(sweep, figures),
            _others(sweep.others),
            GLOSSARY,
        )
        if part
    )
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    # The library comes last, so that text and tables are there while a phone still reads it.
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{style}</style>\n</head>\n'
        f"<body>\n<main>\n{body}\n</main>\n<script>{get_plotlyjs()}</script>\n{figures.scripts()}\n"
        f"<script>{PRINTING}</script>\n</body>\n</html>\n"
    )


class _Figures:
    """The page's figures: a place for each in the text, and their scripts for its end."""

    def __init__(self) -> None:
        self._made: list[str] = []

    def place(self, figure: Any, caption: str) -> str:
        name = f"figure-{len(self._made)}"
        config = '{"displayModeBar": false, "responsive": true}'
        spec = figure.to_json().replace("<", "\\u003c")  # no name may end the script
        self._made.append(f"<script>Plotly.newPlot('{name}', Object.assign({spec}, {{config: {config}}}))</script>")
        height = f"height: {figure.layout.height}px"
        return (
            f'<figure><figcaption>{escape(caption)}</figcaption><div id="{name}" class="plot" style="{height}" '
            f'role="img" aria-label="{escape(caption)}"></div></figure>'
        )

    def scripts(self) -> str:
        return "\n".join(self._made)


def _section(heading: str, *parts: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>\n{''.join(parts)}</section>"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _text(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], words: int, kind: str = "") -> str:
    """A table of escaped cells that scrolls sideways; the first `words` columns are text, `kind` a class."""
    heads = "".join(
        f"<th{'' if place < words else ' class=n'}>{escape(name)}</th>" for place, name in enumerate(columns)
    )
    lines = [
        "".join(f"<td{'' if place < words else ' class=n'}>{_cell(cell)}</td>" for place, cell in enumerate(row))
        for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return (
        f'<div class="scroll {kind}" tabindex="0"><table><thead><tr>{heads}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    for verdict, (colour, _, shape) in VERDICTS.items():
        if text.startswith(f"{shape} {verdict}"):
            return f'<span style="color: {colour}">{shape}</span>{escape(text.removeprefix(shape))}'
    return escape(text)


def _facts(sweep: Sweep) -> str:
    done, lost = len(sweep.ranked), len(sweep.others)
    facts = {"runs": f"{done} done" + (f", {lost} without results" if lost else "")} | sweep.facts
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>' for name, fact in facts.items())}</dl>"


def _notes(notes: Sequence[str]) -> str:
    lines = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f"<aside><strong>Not everything could be read.</strong><ul>{lines}</ul></aside>" if notes else ""


def _best(best: Job) -> str:
    reason = _text(str(best.results.get("verdict_reason", "")))
    where = f"<p class=small>Its folder: {escape(str(best.folder))}</p>"
    return _section("Settings to copy", reason, f"<pre>{escape(command(best))}</pre>", where)


def _leaderboard(sweep: Sweep) -> str:
    about = (
        "Measured on the control words, which no adapter was trained on. First what is aligned, then what is only "
        "drawn together, each as far as it holds over all tries; last what is harmed. Otherwise by the gain in "
        "retrieval, then in margin. Read retrieval beside the untouched model's best layer, which costs no training."
    )
    rows, headings = leaderboard(sweep), columns(sweep)
    shown, rest = (_table(headings, part, words=3, kind="board") for part in (rows[:FIRST], rows[FIRST:]))
    more = f"<details><summary>{len(rows) - FIRST} more</summary>{rest}</details>" if rows[FIRST:] else ""
    return _section("Leaderboard", _text(about), *map(_text, caveats(sweep)), shown, more)


def _details(sweep: Sweep) -> str:
    best = sweep.ranked[0]
    parts = [
        f"<div><h3>{escape(detail.heading)}</h3>{_text(detail.about)}"
        f"{_table(detail.columns, detail.rows, detail.words)}</div>"
        for detail in details(best)
    ]
    heading = f"Ranked first: {best.label}" if len(sweep.ranked) > 1 else "In detail"
    return _section(heading, f'<div class="pair">{"".join(parts)}</div>') if parts else ""


def _heat(sweep: Sweep, figures: _Figures) -> str:
    found = {measure: cells for measure in sweep.measures if (cells := grid(sweep, measure)) and cells.x_levels}
    if not found:
        return ""
    first = next(iter(found.values()))
    plots = [figures.place(heat(cells), f"Gain in {sweep.measures[measure]}") for measure, cells in found.items()]
    heading = f"{first.y} × {first.x}"
    about = (
        f"Mean gain on the control words of the runs with each {first.y} and {first.x}; an empty cell has no result."
    )
    layout = "pair" if len(first.x_levels) <= SIDE_BY_SIDE else ""
    return _section(heading, _text(about), f'<div class="{layout}">{"".join(plots)}</div>')


def _effects(sweep: Sweep, figures: _Figures) -> str:
    found = {measure: main_effects(sweep, measure) for measure in sweep.measures}
    if not any(levels for effects in found.values() for levels in effects.values()):
        return ""
    about = (
        "Gain on the control words at each level of a parameter, over all runs at that level: each run a dot, their "
        "mean a diamond, its 95 % interval a line (one that reaches the frame goes on beyond it). The other parameters "
        "vary within a level, so overlapping intervals don't rule out an effect."
    )
    rows = [(key, *_estimate(each)) for key, levels in found["margin"].items() for each in levels]
    numbers = (
        f"<details><summary>Margin gains in numbers</summary>{_table(('parameter', *ESTIMATE), rows, 2)}</details>"
    )
    return _section("What each parameter does", _text(about), _dot_plots(sweep, found, figures), numbers)


def _seeds(sweep: Sweep, figures: _Figures) -> str:
    if len(sweep.trained) < 2:
        return ""
    found = {measure: {"": over_seeds(sweep, measure)} for measure in sweep.measures}
    if not any(groups[""] for groups in found.values()):
        text = (
            "Every setting ran with one seed, so how far chance scatters its gain is unknown; sweep train.seed=0,1,2."
        )
        return _section("Seeds", _text(text))
    about = "Runs that differ by a seed only: each seed a dot, the mean a diamond, its 95 % interval a line."
    numbers = "".join(
        f"<details><summary>{escape(_capital(sweep.measures[measure]))} in numbers</summary>"
        f"{_table(ESTIMATE, map(_estimate, groups['']), 1)}</details>"
        for measure, groups in found.items()
    )
    return _section("Seeds", _text(about), _dot_plots(sweep, found, figures), numbers)


ESTIMATE = ("level", "runs", "mean gain", "95 % interval")


def _estimate(found: Estimate) -> tuple[str, ...]:
    low, high = found.interval or (None, None)
    interval = f"{signed(low, '+.4f')} … {signed(high, '+.4f')}" if found.interval else "–"
    return found.name, str(len(found.values)), signed(found.mean, "+.4f"), interval


def _dot_plots(sweep: Sweep, found: dict[str, dict[str, list[Estimate]]], figures: _Figures) -> str:
    plots = [
        figures.place(dots(groups, "gain"), f"Gain in {sweep.measures[measure]}")
        for measure, groups in found.items()
        if any(groups.values())
    ]
    return f'<div class="pair">{"".join(plots)}</div>'


def _curves(sweep: Sweep, figures: _Figures) -> str:
    plots = [
        figures.place(figure, f"{_capital(what)} at every layer")
        for measure, what in sweep.measures.items()
        if (figure := curves(sweep, measure, what.partition(" (")[0].partition(" over")[0]))
    ]
    about = (
        "Layer 0 is the input embeddings, layer k the residual stream after block k, “final” what the last norm "
        "makes of it. On the control words; a pilot's line is of all words. A tap on the legend hides or shows runs."
    )
    return _section("Every run, layer by layer", _text(about), *plots) if plots else ""


def _others(others: Sequence[Job]) -> str:
    lines = (f"job {job.number}, {job.label}: {job.status}. {job.problem}" for job in others)
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return _section("Jobs without results", f"<ul>{items}</ul>") if others else ""


def _glossary() -> str:
    terms = {
        "▲ aligned": "unseen pairs drew together more than random matchings and more than matchings among near words, "
        "on words that aren't look-alikes, not because of a few words; neither margin nor retrieval fell",
        "● drawn together": "more than random matchings only: topic, length, spelling or hubs may explain it",
        "■ memorised": "trained pairs drew together and more than unseen ones, which show nothing",
        "◆ inflated": "cosines rose, but those of wrong pairs as much: nothing about translation",
        "▼ harmed": "unseen pairs drew apart, their retrieval fell, or the model's perplexity rose too far",
        "○ none": "no change that chance doesn't explain",
        "CSLS P@1": "share of words whose nearest neighbour, hubs corrected for, is a listed translation; by word: a "
        "word with several translations counts once, right with any of them",
        "look-alikes": "words that share at least 0.6 of their letters, in order, with a listed translation (French "
        "“hôtel”, English “hotel”), case and marks left out: their letters alone can give the translation away",
        "near words": "words close to each other in the model, or alike in length and spelling: a gain about "
        "translation is larger for a word's translation than for that of a near word",
        "best untouched layer": "the layer of the model before training with the highest P@1 on the trained words, "
        "and its P@1 on the control words",
        "margin": "mean cosine of pairs less that of all mismatches",
        "cosine": "mean cosine of pairs alone, which rises for wrong pairs too",
        "specificity": "gain of the true pairs beyond that of random matchings; p is the larger of the raw and "
        "the scaled test's. As for the verdict, of the words that aren't look-alikes where there are enough",
        "p, Holm": "p corrected for the number of trained runs, which bounds the chance of any false finding "
        "among them; a verdict itself knows of its own run only. A run still counts as aligned if the p-values of near "
        "words pass the same correction",
    }
    return _section(
        "How to read this",
        f"<dl>{''.join(f'<dt>{_cell(term)}</dt><dd>{escape(meaning)}</dd>' for term, meaning in terms.items())}</dl>",
    )


GLOSSARY = _glossary()

# A sheet of paper is narrower than a desk's window, and plotly draws for a given width: here A4's or Letter's.
PRINTING = """
const plots = () => document.querySelectorAll('.plot');
addEventListener('beforeprint', () => {
  plots().forEach(plot => Plotly.relayout(plot, {autosize: false, width: plot.closest('.pair') ? 320 : 660}));
  document.querySelectorAll('details').forEach(part => part.open = true);
});
addEventListener('afterprint', () => plots().forEach(plot => Plotly.relayout(plot, {autosize: true, width: null})));
if (matchMedia('(pointer: fine)').matches)  // with a mouse, one drags to zoom and double-clicks to go back
  plots().forEach(plot => { if (plot.layout.legend) Plotly.relayout(plot, {dragmode: 'zoom'}); });
"""
