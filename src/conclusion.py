"""What a run found at the evaluation layer: evidence for each split, baselines that cost no training, the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any, Literal

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

# Reported for look-alikes and for the rest; the whole control split reports every field.
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
    free = _training_free(study, before, layers)
    found: dict[str, Any] = dict(free) | _spelling_baseline(study, first)
    if after is None:
        nothing = {"verdict": "none", "verdict_reason": "Nothing was trained."}
        scalars = _pilot_scalars(study, before) | _strata(study, before, None, likeness, first)
        return found | scalars | nothing, {}
    best, score = _best_layer(study, after, layers, "after")
    found |= {"best_trained_layer": str(best), "baseline/best_layer_csls_p_at_1_after": score}
    best_index = study.layers.index(_layer(free["best_untouched_layer"]))
    evidence, specificity = {}, {}
    for split in SPLITS:
        evidence[split], specificity[split] = _evidence(study, before, after, split, best_index)
    alike = likeness >= LOOK_ALIKE
    parts = {
        name: evidence["control"] if among.all() else _evidence(study, before, after, "control", best_index, among)[0]
        for name, among in (("lookalike", alike), ("unalike", ~alike))
        if among.any()
    }
    unalike = parts.get("unalike") or _nothing_left(evidence["control"])
    perplexities = _perplexities(probes)
    verdict = judge(
        evidence["train"],
        evidence["control"],
        perplexity_increase=max((change for change, _, _ in perplexities.values()), default=None),
        max_perplexity_increase=study.config.eval.max_perplexity_increase,
        perplexities=perplexities,
        unalike=unalike,
    )
    claimed = claimed_of(evidence["control"], unalike)
    found["claimed_on"] = "control" if claimed is evidence["control"] else "control_unalike"
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
    """The evidence where every control word is a look-alike: control's, with no words."""
    return replace(control, n_words=0, n_pairs=0)


def _spellings(study: Study, split: SplitName) -> list[tuple[str, str]]:
    return [(pair.source, pair.target) for pair in study.pairs[study.rows(split)]]


def _beside(found: Mapping[str, Any], layer: Layer) -> str:
    """What the retrieval after training must be read beside."""
    best, score = found["best_untouched_layer"], found["baseline/best_layer_csls_p_at_1_before"]
    trained = found["control/csls_p_at_1_after"]
    return (
        f"Before training, layer {best} retrieves {score:.3f} of the unseen words; after it, layer {layer} retrieves "
        f"{trained:.3f}."
    )


# --- baselines that cost no training ------------------------------------------------------------------------


def _training_free(study: Study, before: Encoding, layers: Sequence[LayerRow]) -> dict[str, Any]:
    """Control's CSLS P@1 at the untouched model's best layer, and after maps fitted on train; cached."""
    inputs = (
        encoding_key(study.loaded, study.source + study.target),
        study.lexicon.digest,
        study.config.dataset.seed,
        len(study.words.train),
        study.config.eval.layer,
    )

    def make() -> dict[str, Any]:
        best, score = _best_layer(study, before, layers, "before")
        train, control = (before.at(study.eval_index, study.rows(split)) for split in SPLITS)
        maps = training_free(train, control, study.relevant("control"))
        return {
            "best_untouched_layer": str(best),
            "baseline/best_layer_csls_p_at_1_before": score,
        } | {f"baseline/{name}": value for name, value in maps.items()}

    return baseline_values("training_free", study.loaded, repr(inputs), make)


def _best_layer(
    study: Study, encoding: Encoding, layers: Sequence[LayerRow], stage: Literal["before", "after"]
) -> tuple[Layer, float]:
    """(the layer with the best CSLS P@1 on train, its CSLS P@1 on control)."""
    scores: dict[Layer, float] = {
        layer: value for layer, *which, value in layers if which == [stage, "train", "csls_p_at_1"]
    }
    if not scores:  # a pilot, or eval.measures leaves it out
        listed = study.relevant("train")
        scores = {
            layer: _csls(encoding.at(index, study.rows("train")), listed) for index, layer in enumerate(study.layers)
        }
    best = best_layer(scores)
    vectors = encoding.at(study.layers.index(best), study.rows("control"))
    return best, _csls(vectors, study.relevant("control"))


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


def _perplexities(probes: Mapping[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Each language's relative change of the perplexity, and the 95 % interval's bounds."""
    names = [key.removesuffix("_change") for key in probes if key.startswith("lm/") and key.endswith("_change")]
    return {
        name.removeprefix("lm/perplexity_"): tuple(
            probes[f"{name}_{what}"] for what in ("change", "change_low", "change_high")
        )
        for name in names
    }
