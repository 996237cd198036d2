"""The leaderboard of a sweep in words and numbers, for the page and for Markdown."""

from __future__ import annotations

from src import summary
from src.report_data import ALPHA, Job, Sweep
from src.tracking import public_uri

# Okabe & Ito's colours; the shape says the same again.
VERDICTS = {  # colour, plotly's name of the shape, the shape
    "aligned": ("#009E73", "triangle-up", "▲"),
    "memorised": ("#E69F00", "square", "■"),
    "inflated": ("#CC79A7", "diamond", "◆"),
    "harmed": ("#D55E00", "triangle-down", "▼"),
    "none": ("#6B6B6B", "circle-open", "○"),
}
COLUMNS = (
    "#", "setting", "verdict", "CSLS P@1", "its gain", "margin gain", "cosine gain", "specificity gain", "p", "p, Holm",
)  # fmt: skip


def command(job: Job) -> str:
    """The line that repeats a run."""
    return summary.command([public_uri(override) for override in job.overrides])


def finding(sweep: Sweep) -> str:
    """What the sweep shows, in a sentence or two."""
    best, tries = sweep.ranked[0], sweep.tries
    if not tries:
        return "Nothing was trained: these are pilots, which show where the two languages meet in the untouched model."
    if tries == 1:
        return f"{best.verdict.capitalize()}. {best.results.get('verdict_reason', '')}".strip()
    holding = sum(job.holds for job in sweep.ranked)
    many = f"{holding} of {tries} trained runs" if holding else f"None of {tries} trained runs"
    text = f"{many} drew unseen words together beyond chance once {tries} tries are allowed for."
    return f"{text} Ranked first: {best.label} ({best.verdict})."


def leaderboard(sweep: Sweep) -> list[tuple[str, ...]]:
    """The leaderboard as text, best run first; the columns are COLUMNS."""
    return [_cells(place, job) for place, job in enumerate(sweep.ranked, start=1)]


def _cells(place: int, job: Job) -> tuple[str, ...]:
    before, after = (job.number_at(f"control/csls_p_at_1_{when}") for when in ("before", "after"))
    change = signed(before, ".3f") if after is None else f"{signed(before, '.3f')} → {signed(after, '.3f')}"
    unsure = " (not after Holm)" if job.verdict == "aligned" and not job.holds else ""
    return (
        str(place),
        job.label,
        f"{VERDICTS.get(job.verdict, ('', '', '?'))[2]} {job.verdict}{unsure}",
        change,
        signed(job.gain("csls_p_at_1"), "+.3f"),
        signed(job.gain("margin"), "+.4f"),
        signed(job.gain("pair_cosine"), "+.4f"),
        signed(job.number_at("control/specificity_gain"), "+.4f"),
        signed(job.pvalue, ".2g"),
        signed(job.holm, ".2g"),
    )


def signed(value: float | None, form: str) -> str:
    """The number in the given format, with a real minus sign; a dash where there is none."""
    return "–" if value is None else format(value, form).replace("-", "−")


def caveats(sweep: Sweep) -> list[str]:
    """What a reader of the leaderboard must not overlook."""
    tries, found = sweep.tries, []
    if tries > 1:
        found.append(
            f"The best of {tries} runs looks better than it is, as it was picked on the same control words: "
            "repeat it with another dataset.seed before you rely on it."
        )
    permutations = [job.results.get("params", {}).get("eval.permutations", "") for job in sweep.trained]
    fewest = min((int(number) for number in permutations if str(number).isdecimal()), default=0)
    if fewest and tries >= ALPHA * (1 + fewest):
        found.append(
            f"With {fewest:,} permutations no p-value can be below {1 / (1 + fewest):.2g}, which Holm over {tries} "
            f"runs lifts to {ALPHA} or more: raise eval.permutations."
        )
    return found
