"""What a run puts beside its retrieval: baselines, look-alikes, strata; against plain code on the same vectors."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bench.speed import prepared, setting, silent
from src import conclusion, study
from src.evidence import gather_evidence
from src.measures import csls_ranks, measure
from src.models import adapter
from src.spelling import word_similarity
from src.study import Encoding, Study
from src.vectors import encode_words

Encoded = tuple[Study, Encoding, Encoding]
PERPLEXITY = {
    "lm/perplexity_english_change": 0.08,
    "lm/perplexity_english_change_low": 0.05,
    "lm/perplexity_english_change_high": 0.09,
    "lm/perplexity_swahili_change": 0.02,
    "lm/perplexity_swahili_change_low": -0.04,
    "lm/perplexity_swahili_change_high": 0.12,
}


@pytest.fixture(scope="module")
def encoded() -> Encoded:
    """A study on the tiny model, and its vectors before and after a short training."""
    it = prepared(setting("model=tiny", "dataset.limit=160", "dataset.control_size=60", "eval.permutations=199"))
    before = Encoding(encode_words(it.loaded.model, it.source + it.target), it)
    with adapter(it.loaded.model, it.config.lora, [1, 2], seed=0) as model:
        study.train_adapter(it, model, (2,), None, silent)
        return it, before, study.encode_after(it, model, before, None, silent)


@pytest.fixture
def concluded(encoded: Encoded, own_cache) -> dict[str, Any]:
    assert own_cache.is_dir()  # what an earlier version measured must not stand in
    it, before, after = encoded
    layers = study.measure_after(it, study.measure_before(it, before, silent), after, [1], silent)
    return conclusion.conclude(it, before, after, layers, PERPLEXITY)[0]


def test_the_best_layers_are_chosen_on_train_and_read_on_control(encoded: Encoded, concluded):
    it, before, after = encoded
    for encoding, when, key in ((before, "before", "untouched"), (after, "after", "trained")):
        assert isinstance(encoding, Encoding)
        by_layer = [
            [
                measure(*encoding.at(index, it.rows(split)), it.relevant(split), names=["csls_p_at_1"])["csls_p_at_1"]
                for split in ("train", "control")
            ]
            for index in range(len(it.layers))
        ]
        best = int(np.argmax([train for train, _ in by_layer]))
        assert concluded[f"best_{key}_layer"] == str(it.layers[best])
        assert concluded[f"baseline/best_layer_csls_p_at_1_{when}"] == by_layer[best][1]
    assert f"layer {concluded['best_untouched_layer']} retrieves" in concluded["verdict_reason"]


def test_look_alikes_and_the_rest_are_the_control_words(encoded: Encoded, concluded):
    it, before, after = encoded
    likeness = word_similarity([(pair.source, pair.target) for pair in it.words.control])
    alike, unalike = (concluded[f"control_{part}/n_words"] for part in ("lookalike", "unalike"))
    assert alike + unalike == concluded["control/n_words"]
    assert alike == len({pair.source for pair, like in zip(it.words.control, likeness, strict=True) if like >= 0.6})
    rows = it.rows("control")
    expected, _ = gather_evidence(
        *before.at(it.eval_index, rows),
        *after.at(it.eval_index, rows),
        it.relevant("control"),
        permutations=199,
        best_layer=before.at(it.layers.index(conclusion._layer(concluded["best_untouched_layer"])), rows),
        spellings=[(pair.source, pair.target) for pair in it.words.control],
        among=likeness < 0.6,
    )
    assert concluded["control_unalike/near_pvalue"] == expected.near_pvalue
    assert concluded["control_unalike/csls_p_at_1_after"] == expected.csls_p_at_1_after
    assert concluded["claimed_on"] == ("control_unalike" if unalike >= 30 else "control")


def test_the_strata_add_up(encoded: Encoded, concluded):
    it, _, after = encoded
    strata = [key.removesuffix("_n_words") for key in concluded if key.startswith("spelling/") and "n_words" in key]
    counts = [concluded[f"{name}_n_words"] for name in strata]
    assert sum(counts) == concluded["control/n_words"]
    hits = [concluded[f"{name}_csls_p_at_1_after"] for name in strata]
    assert np.dot(counts, hits) / sum(counts) == pytest.approx(concluded["control/csls_p_at_1_after"])
    first = {}
    for place, pair in enumerate(it.words.control):
        first.setdefault(pair.source, place)
    ranks = csls_ranks(*after.at(it.eval_index, it.rows("control")), it.relevant("control"))
    assert (ranks[list(first.values())] == 1).double().mean().item() == concluded["control/csls_p_at_1_after"]


def test_every_number_is_finite_and_every_baseline_there(concluded):
    json.dumps(concluded, allow_nan=False)
    for name in ("centred", "lsar", "procrustes", "spelling"):
        assert 0 <= concluded[f"baseline/{name}_csls_p_at_1"] <= 1
    for name in ("control/specificity_pvalue", "train/specificity_pvalue", "train/excess_pvalue"):
        assert 0 < concluded[f"holm/{name}"] <= 1


@pytest.mark.usefixtures("own_cache")
def test_the_worst_language_decides_about_perplexity(encoded: Encoded):
    """English is known to be within +10 %; Swahili may be beyond, so that can't be told."""
    it, before, after = encoded
    layers = study.measure_after(it, study.measure_before(it, before, silent), after, [1], silent)
    found, _ = conclusion.conclude(it, before, after, layers, PERPLEXITY)
    assert found["verdict"] != "harmed"
    assert "perplexity in swahili" in found["verdict_reason"] and "-4% to +12%" in found["verdict_reason"]
    worse = PERPLEXITY | {"lm/perplexity_english_change_low": 0.11, "lm/perplexity_english_change": 0.13}
    found, _ = conclusion.conclude(it, before, after, layers, worse)
    assert found["verdict"] == "harmed"


@pytest.mark.usefixtures("own_cache")
def test_a_pilot_has_its_baselines_too(encoded: Encoded):
    it, before, _ = encoded
    found, specificity = conclusion.conclude(it, before, None, [], {})
    assert specificity == {}
    assert found["verdict"] == "none"
    assert found["baseline/best_layer_csls_p_at_1_before"] >= 0
    assert found["control/n_words"] <= found["control/n_pairs"] == 60


@pytest.mark.usefixtures("own_cache")
def test_without_csls_among_the_measures_the_best_layer_is_still_chosen(encoded: Encoded):
    it, _, after = encoded
    evaluation = replace(it.config.eval, measures=["margin"])
    fewer = replace(it, config=replace(it.config, eval=evaluation))
    known = conclusion._best_layer(it, after, study.measure_after(it, [], after, [1], silent), "after")
    assert conclusion._best_layer(fewer, after, study.measure_after(fewer, [], after, [1], silent), "after") == known
