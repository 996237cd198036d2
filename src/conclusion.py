"""What a run found at the evaluation layer: evidence for each split, baselines that cost no training, the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from src.baseline import baseline_values, encoding_key
from src.evidence import SpecificityResult, SplitEvidence, gather_evidence, judge
from src.layers import Layer
from src.measures import csls_ranks, measure, source_words
from src.spelling import LOOK_ALIKE, STRATA, spelling_vectors, word_similarity
from src.study import SPLITS, Encoding, LayerRow, SplitName, Study
from src.training_free import best_layer, training_free
from src.verdict import claimed_of

# What is told of the look-alikes and of the others; the whole control split has everything.
_OF_A_PART = (
    "n_pairs", "n_words", "margin_before", "margin_after", "margin_gain", "csls_p_at_1_before", "csls_p_at_1_after",
    "words_won", "words_lost", "mcnemar_pvalue", "specificity_gain", "specificity_pvalue", "scaled_specificity_pvalue",
    "near_gain", "near_pvalue", "left_out_specificity_pvalue", "left_out_near_pvalue", "share_gained",
)  # fmt: skip


def conclude(
    study: Study,
    before: Encoding,
    after: Encoding | None,
    layers: Sequence[LayerRow],
    probes: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, SpecificityResult]]:
    """(scalars at the evaluation layer with the verdict, specificity test of each split); a pilot has no evidence.

    `layers` are the rows of layers.csv, `probes` what was found of the model's output.
    """
    likeness, first = word_similarity(_spellings(study, "control")), _first_pairs(study, before)
    free = _training_free(study, before)
    found: dict[str, Any] = dict(free) | _spelling_baseline(study, first)
    if after is None:
        nothing = {"verdict": "none", "verdict_reason": "Nothing was trained."}
        scalars = _pilot_scalars(study, before) | _strata(study, before, None, likeness, first)
        return found | scalars | nothing, {}
    found |= _best_trained_layer(study, after, layers)
    best_index = study.layers.index(_layer(free["best_untouched_layer"]))
    evidence, specificity = {}, {}
    for split in SPLITS:
        evidence[split], specificity[split] = _evidence(study, before, after, split, best_index)
    alike = likeness >= LOOK_ALIKE
    parts = {
        name: _evidence(study, before, after, "control", best_index, among)[0]
        for name, among in (("lookalike", alike), ("unalike", ~alike))
        if among.any()
    }
    unalike = parts.get("unalike") or _nothing_left(evidence["control"])
    verdict = judge(
        evidence["train"],
        evidence["control"],
        perplexity_increase=_largest(probes, "change"),
        max_perplexity_increase=study.config.eval.max_perplexity_increase,
        perplexity_interval=_perplexity_interval(probes),
        unalike=unalike,
    )
    found["claimed_on"] = "control_unalike" if claimed_of(evidence["control"], unalike) is unalike else "control"
    for split, values in evidence.items():
        found |= {f"{split}/{name}": value for name, value in asdict(values).items()}
    for name, values in parts.items():
        found |= {f"control_{name}/{key}": getattr(values, key) for key in _OF_A_PART}
    found |= _strata(study, before, after, likeness, first)
    found |= {f"holm/{name}": value for name, value in verdict.adjusted.items()}
    reason = f"{verdict.reason} {_beside(found, study.config.eval.layer)}"
    return found | {"verdict": verdict.label, "verdict_reason": reason}, specificity


def _evidence(
    study: Study,
    before: Encoding,
    after: Encoding,
    split: SplitName,
    best_index: int,
    among: np.ndarray | None = None,
) -> tuple[SplitEvidence, SpecificityResult]:
    rows = study.rows(split)
    return gather_evidence(
        *before.at(study.eval_index, rows),
        *after.at(study.eval_index, rows),
        study.relevant(split),
        permutations=study.config.eval.permutations,
        best_layer=before.at(best_index, rows),
        spellings=_spellings(study, split),
        among=among,
    )


def _nothing_left(control: SplitEvidence) -> SplitEvidence:
    """Stands for the words that aren't look-alikes where there are none."""
    return type(control)(**(asdict(control) | {"n_words": 0, "n_pairs": 0}))


def _spellings(study: Study, split: SplitName) -> list[tuple[str, str]]:
    return [(pair.source, pair.target) for pair in study.pairs[study.rows(split)]]


def _beside(found: Mapping[str, Any], layer: Layer) -> str:
    """What the retrieval after training must be read beside."""
    best, score = found["best_untouched_layer"], found["baseline/best_layer_csls_p_at_1_before"]
    trained = found["control/csls_p_at_1_after"]
    return f"Untouched, layer {best} retrieves {score:.3f} of the unseen words; trained, layer {layer} {trained:.3f}."


# --- baselines that cost no training ------------------------------------------------------------------------


def _training_free(study: Study, before: Encoding) -> dict[str, Any]:
    """Control's CSLS P@1 at the untouched model's best layer, and after maps fitted on train; cached."""
    inputs = (
        encoding_key(study.loaded, study.source + study.target),
        study.lexicon.digest,
        study.config.dataset.seed,
        len(study.words.train),
        study.config.eval.layer,
    )

    def make() -> dict[str, Any]:
        listed = study.relevant("train")
        scores: dict[Layer, float] = {
            layer: _csls(before.at(index, study.rows("train")), listed) for index, layer in enumerate(study.layers)
        }
        best = best_layer(scores)
        index, rows = study.layers.index(best), study.rows("control")
        train, control = (before.at(study.eval_index, study.rows(split)) for split in SPLITS)
        maps = training_free(train, control, study.relevant("control"))
        return {
            "best_untouched_layer": str(best),
            "baseline/best_layer_csls_p_at_1_before": _csls(before.at(index, rows), study.relevant("control")),
        } | {f"baseline/{name}": value for name, value in maps.items()}

    return baseline_values("training_free", study.loaded, repr(inputs), make)


def _best_trained_layer(study: Study, after: Encoding, layers: Sequence[LayerRow]) -> dict[str, Any]:
    """The same choice, on train, among the trained model's layers."""
    scores: dict[Layer, float] = {
        layer: value
        for layer, stage, split, name, value in layers
        if (stage, split, name) == ("after", "train", "csls_p_at_1")
    }
    if not scores:  # eval.measures leaves it out
        listed = study.relevant("train")
        scores = {
            layer: _csls(after.at(index, study.rows("train")), listed) for index, layer in enumerate(study.layers)
        }
    best = best_layer(scores)
    vectors = after.at(study.layers.index(best), study.rows("control"))
    return {
        "best_trained_layer": str(best),
        "baseline/best_layer_csls_p_at_1_after": _csls(vectors, study.relevant("control")),
    }


def _spelling_baseline(study: Study, first: np.ndarray) -> dict[str, float]:
    """Control's CSLS P@1 by spelling alone; nothing for a list that is too long for it."""
    train, control = (study.words.train, study.words.control)
    fitted_on = ([pair.source for pair in train], [pair.target for pair in train])
    vectors = spelling_vectors([pair.source for pair in control], [pair.target for pair in control], fitted_on)
    if vectors is None:
        return {}
    hits = csls_ranks(*vectors, study.relevant("control")) == 1
    return {"baseline/spelling_csls_p_at_1": hits.numpy()[first].mean().item()}


def _layer(name: str) -> Layer:
    return "final" if name == "final" else int(name)


def _csls(vectors: tuple[Tensor, Tensor], listed: Tensor) -> float:
    return measure(*vectors, listed, names=("csls_p_at_1",))["csls_p_at_1"]


# --- words by how much they look like their translation -----------------------------------------------------


def _strata(
    study: Study, before: Encoding, after: Encoding | None, likeness: np.ndarray, first: np.ndarray
) -> dict[str, float]:
    """Control's CSLS P@1 by source word in each stratum of spelling similarity that has any."""
    rows, listed = study.rows("control"), study.relevant("control")
    encodings = {"before": before} | ({"after": after} if after else {})
    hits = {
        when: (csls_ranks(*encoding.at(study.eval_index, rows), listed) == 1).cpu().numpy()
        for when, encoding in encodings.items()
    }
    found: dict[str, float] = {}
    for low, high in pairwise([*STRATA, np.inf]):
        inside = first[(likeness[first] >= low) & (likeness[first] < high)]
        if len(inside):
            name = f"spelling/{low:g}_to_{min(high, 1):g}"
            found[f"{name}_n_words"] = len(inside)
            found |= {f"{name}_csls_p_at_1_{when}": float(hit[inside].mean()) for when, hit in hits.items()}
    return found


# --- small parts --------------------------------------------------------------------------------------------


def _first_pairs(study: Study, before: Encoding) -> np.ndarray:
    """The first pair of each source word of the control split."""
    source, _ = before.at(study.eval_index, study.rows("control"))
    return np.unique(source_words(source, study.relevant("control")).numpy(), return_index=True)[1]


def _pilot_scalars(study: Study, before: Encoding) -> dict[str, float]:
    names = ("pair_cosine", "margin", "csls_p_at_1")
    found: dict[str, float] = {}
    for split in SPLITS:
        vectors, listed = before.at(study.eval_index, study.rows(split)), study.relevant(split)
        found[f"{split}/n_pairs"] = len(listed)
        found[f"{split}/n_words"] = int(source_words(vectors[0], listed).max()) + 1
        found |= {f"{split}/{name}_before": value for name, value in measure(*vectors, listed, names=names).items()}
    return found


def _largest(probes: Mapping[str, Any], what: str) -> float | None:
    """The largest `change`, `change_low` or `change_high` of a language's perplexity; None where none was measured."""
    values = [value for key, value in probes.items() if key.startswith("lm/perplexity_") and key.endswith(f"_{what}")]
    return max(values, default=None)


def _perplexity_interval(probes: Mapping[str, Any]) -> tuple[float, float] | None:
    """The largest lower and the largest upper bound of the languages' changes: the worst that is shown, and may be."""
    low, high = _largest(probes, "change_low"), _largest(probes, "change_high")
    return None if low is None or high is None else (low, high)
