"""The run that a report ranks first, in detail: words by their spelling, what costs no training, what training cost."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from src.report_board import NOTHING, signed
from src.report_data import Job

MAPS = {  # key of the baseline, what a reader calls it
    "centred": "untouched, each language centred",
    "lsar": "untouched, without the languages' direction (LSAR)",
    "procrustes": "untouched, rotated (Procrustes)",
}


@dataclass(frozen=True)
class Detail:
    """A small table with a sentence or two on how to read it; the first `words` columns are text."""

    heading: str
    about: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    words: int = 1


def details(job: Job) -> list[Detail]:
    """What the job's results allow; an earlier version's have neither spelling nor baselines."""
    return [detail for detail in (_by_spelling(job), _without_training(job), _perplexity(job)) if detail]


def _by_spelling(job: Job) -> Detail | None:
    """Retrieval of the control words by how much they look like their translation."""
    keys = (re.fullmatch(r"spelling/([\d.]+)_to_([\d.]+)_n_words", key) for key in job.results)
    strata = sorted((float(key[1]), key[1], key[2]) for key in keys if key)
    if not strata:
        return None
    whens = [when for when in ("before", "after") if job.number_at(f"control/csls_p_at_1_{when}") is not None]

    def row(name: str, prefix: str) -> tuple[str, ...]:
        scores = (job.number_at(f"{prefix}csls_p_at_1_{when}") for when in whens)
        count = signed(job.number_at(f"{prefix}n_words"), ".0f")
        return name, count, *(signed(score, ".3f") for score in scores)

    rows = [
        row(f"{low} to {high}" + (" (look-alikes)" if high == "1" else ""), f"spelling/{low}_to_{high}_")
        for _, low, high in strata
    ]
    about = (
        "P@1 of the control words by how much their spelling shares with their translation's, from 0 (no letter) to 1. "
        "A gain that is about translation shows in the upper rows, too: look-alikes can be found by their letters."
    )
    if (score := job.number_at("baseline/spelling_csls_p_at_1")) is not None:
        about += f" Spelling alone, without any model, finds {score:.3f} of all words."
    columns = ("likeness", "words", *(f"P@1 {when}" for when in whens))
    return Detail("By spelling", about, columns, [*rows, row("all words", "control/")])


def _without_training(job: Job) -> Detail | None:
    """What the trained output must be read beside."""
    layer = (job.results.get("params") or {}).get("eval.layer", NOTHING)
    free = [
        (name, str(where), score)
        for name, where, key in (
            ("untouched", layer, "control/csls_p_at_1_before"),
            ("untouched, best layer", _layer(job, "untouched"), "baseline/best_layer_csls_p_at_1_before"),
            *((name, layer, f"baseline/{key}_csls_p_at_1") for key, name in MAPS.items()),
            ("spelling alone", NOTHING, "baseline/spelling_csls_p_at_1"),
        )
        if (score := job.number_at(key)) is not None
    ]
    if len(free) < 2:
        return None
    trained = [
        (name, str(where), score)
        for name, where, key in (
            ("trained", layer, "control/csls_p_at_1_after"),
            ("trained, best layer", _layer(job, "trained"), "baseline/best_layer_csls_p_at_1_after"),
        )
        if (score := job.number_at(key)) is not None
    ]
    about = "P@1 of the same control words. The best layers were chosen, and the maps fitted, on the words to train on."
    if trained:
        name, _, best = max(free, key=lambda row: row[2])
        than = "more than" if trained[0][2] > best else "no more than"
        about += (
            f" Training is worth what it adds to the best row without it. Here the trained model finds {than} that row "
            f"({trained[0][2]:.3f}; {name}: {best:.3f})."
        )
    rows = [(name, where, f"{score:.3f}") for name, where, score in (*free, *trained)]
    return Detail("Without training", about, ("vectors", "layer", "P@1"), rows, words=2)


def _layer(job: Job, model: str) -> str:
    return job.results.get(f"best_{model}_layer", NOTHING)


def _perplexity(job: Job) -> Detail | None:
    """What the language model lost, language by language."""
    rows = list(_languages(job))
    about = (
        "Perplexity on held-out text of each language: lower is better. Where the 95 % interval of the change is on "
        "both sides of 0, chance may explain it."
    )
    columns = ("language", "before", "after", "change", "95 % interval")
    return Detail("Perplexity", about, columns, rows) if rows else None


def _languages(job: Job) -> Iterator[tuple[str, ...]]:
    for key in sorted(job.results):
        if not (found := re.fullmatch(r"(lm/perplexity_(.+))_after", key)):
            continue
        before, after, change = (job.number_at(f"{found[1]}_{what}") for what in ("before", "after", "change"))
        if change is None and before and after is not None:  # of an earlier version
            change = after / before - 1
        low, high = (job.number_at(f"{found[1]}_change_{end}") for end in ("low", "high"))
        interval = NOTHING if low is None or high is None else f"{signed(100 * low, '+.1f')} … {_percent(high)}"
        yield found[2], signed(before, ".4g"), signed(after, ".4g"), _percent(change), interval


def _percent(value: float | None) -> str:
    return signed(value, "+.1%").replace("%", " %")
