"""The leaderboard of a sweep in words and numbers, for the page and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from src import summary
from src.report_data import ALPHA, CLAIMS, Job, Sweep
from src.tracking import public_uri

NOTHING = "–"  # in a cell
# Okabe & Ito's colours; the shape says the same again.
VERDICTS = {  # colour, plotly's name of the shape, the shape
    "aligned": ("#009E73", "triangle-up", "▲"),
    "drawn together": ("#0072B2", "circle", "●"),
    "memorised": ("#E69F00", "square", "■"),
    "inflated": ("#CC79A7", "diamond", "◆"),
    "harmed": ("#D55E00", "triangle-down", "▼"),
    "none": ("#6B6B6B", "circle-open", "○"),
}


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
    rules = ", by an earlier version's rules," if sweep.unit == "pair" else ""
    aligned, together = (sum(job.holds_as == claim for job in sweep.comparable) for claim in CLAIMS)
    many, allowed = f"of {tries} trained runs", f"once {tries} tries are allowed for"
    if aligned:
        also = f", {together} more {_are(together)} only drawn together" if together else ""
        text = f"{aligned} {many} {_are(aligned)} aligned{rules} {allowed}{also}."
    elif together:
        text = f"None {many} is aligned, {together} {_are(together)} only drawn together, {allowed}."
    else:
        text = f"None {many} is aligned or drawn together {allowed}."
    if older := sum(job.holds for job in sweep.older):
        text += f" By an earlier version's rules, {older} more {_are(older)} aligned."
    return f"{text} Ranked first: {best.label} ({best.verdict})."


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def columns(sweep: Sweep) -> tuple[str, ...]:
    """The headings of the leaderboard."""
    of_all, of_unalike = (_words(_counts(sweep, part)) for part in ("control", "control_unalike"))
    return (
        "#",
        "setting",
        "verdict",
        f"P@1 by {sweep.unit}{of_all}",
        "its gain",
        f"P@1, not look-alikes{of_unalike}",
        "best untouched layer",
        "margin gain",
        "cosine gain",
        "specificity gain",
        "p",
        "p, Holm",
    )


def leaderboard(sweep: Sweep) -> list[tuple[str, ...]]:
    """The leaderboard as text, best run first; the headings are `columns`."""
    return [_cells(sweep, place, job) for place, job in enumerate(sweep.ranked, start=1)]


def _cells(sweep: Sweep, place: int, job: Job) -> tuple[str, ...]:
    p_at_1, of_unalike = (
        change(job, f"{part}/csls_p_at_1") + _words([job.number_at(f"{part}/n_words")] if len(counts) > 1 else [])
        for part in ("control", "control_unalike")
        for counts in [_counts(sweep, part)]
    )
    return (
        str(place),
        job.label,
        _verdict(job, by_pair=job in sweep.older),
        p_at_1,
        signed(job.gain("csls_p_at_1"), "+.3f"),
        of_unalike,
        untouched_best(job),
        signed(job.gain("margin"), "+.4f"),
        signed(job.gain("pair_cosine"), "+.4f"),
        signed(job.number_at(f"{job.claimed}/specificity_gain"), "+.4f"),
        signed(job.pvalue, ".2g"),
        signed(job.holm, ".2g"),
    )


def _verdict(job: Job, *, by_pair: bool) -> str:
    """The verdict with its shape, what Holm over the tries leaves of its claim, and whether pairs were counted."""
    notes = ["by pair"] if by_pair else []
    if job.verdict in CLAIMS and job.holds_as != job.verdict:
        notes.append(f"{job.holds_as or 'not'} after Holm")
    shape = VERDICTS.get(job.verdict, ("", "", "?"))[2]
    return f"{shape} {job.verdict}" + (f" ({', '.join(notes)})" if notes else "")


def change(job: Job, key: str) -> str:
    """A score before and after training; before alone where nothing was trained."""
    before, after = (signed(job.number_at(f"{key}_{when}"), ".3f") for when in ("before", "after"))
    return before if after == NOTHING else f"{before} → {after}"


def untouched_best(job: Job) -> str:
    """The best layer of the untouched model and its P@1."""
    score = job.number_at("baseline/best_layer_csls_p_at_1_before")
    return NOTHING if score is None else f"{job.results.get('best_untouched_layer', '?')}: {score:.3f}"


def _counts(sweep: Sweep, part: str) -> Sequence[float | None]:
    """The different numbers of words in a part of the control split, over the sweep's jobs."""
    return sorted({count for job in sweep.ranked if (count := job.number_at(f"{part}/n_words")) is not None})


def _words(counts: Sequence[float | None]) -> str:
    """How many words, in brackets; empty where jobs differ or don't say."""
    return f" ({counts[0]:.0f} words)" if len(counts) == 1 and counts[0] is not None else ""


def signed(value: float | None, form: str) -> str:
    """The number in the given format, with a real minus sign; a dash where there is none."""
    return NOTHING if value is None else format(value, form).replace("-", "−")


def caveats(sweep: Sweep) -> list[str]:
    """What a reader of the leaderboard must not overlook."""
    tries, found = sweep.tries, []
    if sweep.unit == "pair":
        found.append(
            "Counted by pair: these runs are of an earlier version, in which a word with several translations counted "
            "several times and “aligned” didn't rule out near words. Run them again to compare them with new ones."
        )
    if older := sweep.older:
        which = f"job{'s' * (len(older) > 1)} {', '.join(str(job.number) for job in older)}"
        found.append(
            f"Counted by pair, of an earlier version: {which}. A word with several translations counted several times, "
            "and “aligned” didn't rule out near words. The leaderboard has them last, whatever their gains, and "
            "figures leave them out. Run them again to compare them."
        )
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
