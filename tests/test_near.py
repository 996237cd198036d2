"""Gains against those of near words: topics that move as a whole, spelling, and what a pair gains by itself."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from src import near
from src.near import near_test

RNG = np.random.default_rng(0)
WIDTH = 48


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def alone(n: int) -> np.ndarray:
    return np.arange(n)[:, None]


def topics(
    n: int, size: int, *, visible: float = 0.5, seed: int = 0
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """(source and target vectors, the topic of each pair): pairs share a concept, topics a part of it."""
    rng = np.random.default_rng(seed)
    topic = np.arange(n) // size
    shared = unit(rng.normal(size=(topic.max() + 1, WIDTH)))[topic]
    concept = unit(np.sqrt(visible) * shared + np.sqrt(1 - visible) * unit(rng.normal(size=(n, WIDTH))))
    sides = (unit(concept + unit(rng.normal(size=(n, WIDTH)))) for _ in range(2))
    a, b = sides
    return (a, b), topic


def to_topics(before: tuple[np.ndarray, np.ndarray], topic: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Every word moves towards the mean of its topic."""
    both = before[0] + before[1]
    mean = np.stack([both[topic == each].mean(0) / 2 for each in range(topic.max() + 1)])[topic]
    noise = (0.05 * unit(RNG.normal(size=mean.shape)) for _ in range(2))
    a, b = (unit(side + step * (mean - side) + each) for side, each in zip(before, noise, strict=True))
    return a, b


def to_partners(before: tuple[np.ndarray, np.ndarray], step: float) -> tuple[np.ndarray, np.ndarray]:
    """Every word moves towards its own translation."""
    a, b = before
    return unit(a + step * b), unit(b + step * a)


@pytest.mark.parametrize("size", [5, 15])
@pytest.mark.parametrize("visible", [0.0, 0.5])
@pytest.mark.parametrize("step", [0.2, 0.6])
def test_topics_that_move_as_a_whole_are_no_translation(size, visible, step):
    before, topic = topics(120, size, visible=visible)
    found = near_test(before, to_topics(before, topic, step), alone(120), np.arange(120))
    assert found.pvalue > 0.05


def test_pairs_that_move_together_are():
    before, _ = topics(120, 5)
    found = near_test(before, to_partners(before, 0.3), alone(120), np.arange(120))
    assert found.gain > 0.05
    assert found.pvalue < 1e-6
    assert found.pvalue_left_out < 1e-6


def test_near_words_are_looked_for_beyond_the_tested_pairs():
    """One tested pair of each topic: among these alone, topics would have no second word."""
    before, topic = topics(200, 5, visible=0.0, seed=1)
    after = to_topics(before, topic, 0.6)
    tested = np.arange(0, 200, 5)
    assert near_test(before, after, alone(200), tested).pvalue > 0.05
    among = ((before[0][tested], before[1][tested]), (after[0][tested], after[1][tested]))
    assert near_test(*among, alone(len(tested)), np.arange(len(tested))).pvalue < 0.001


def test_many_words_are_searched_as_few_are(monkeypatch):
    before, topic = topics(200, 5, seed=2)
    for after in (to_topics(before, topic, 0.4), to_partners(before, 0.3)):
        whole = near_test(before, after, alone(200), np.arange(200))
        monkeypatch.setattr(near, "ALL", 50)
        monkeypatch.setattr(near, "TESTED", 60)
        part = near_test(before, after, alone(200), np.arange(200))
        assert (whole.pvalue < 0.01) == (part.pvalue < 0.01)
        monkeypatch.undo()


def test_a_listed_translation_is_no_near_word():
    """Every source has two translations, and both came nearer: neither may speak against the other."""
    rng = np.random.default_rng(3)
    source = unit(rng.normal(size=(60, WIDTH))).repeat(2, axis=0)
    target = unit(source + 1.5 * unit(rng.normal(size=(120, WIDTH))))
    relevant = (np.arange(120) // 2 * 2)[:, None] + np.arange(2)
    after = to_partners((source, target), 0.4)[1]
    found = near_test((source, target), (source, after), relevant, np.arange(0, 120, 2))
    assert found.pvalue < 1e-6
    allowed = near._no_translations(relevant, np.array([0, 2]), np.array([0, 2, 1, 3, 4]), 1)
    assert allowed.tolist() == [[False, True, False, True, True], [True, False, True, False, True]]
    allowed = near._no_translations(relevant, np.array([0, 2]), np.array([0, 2, 4, 6, 8]), 0)
    assert allowed.tolist() == [[False, True, True, True, True], [True, False, True, True, True]]


def test_the_best_layer_knows_topics_that_this_one_hides():
    """Neighbours at the best layer are one more kind of near words, so they can only make the answer stricter."""
    before, topic = topics(100, 4, visible=0.0, seed=4)
    shown = unit(unit(RNG.normal(size=(25, WIDTH)))[topic] + 0.3 * unit(RNG.normal(size=(100, WIDTH))))
    after = to_topics(before, topic, 0.5)
    blind = near_test(before, after, alone(100), np.arange(100))
    told = near_test(before, after, alone(100), np.arange(100), best_layer=(shown, shown))
    assert told.pvalue >= blind.pvalue


def spelt(n: int) -> list[tuple[str, str]]:
    """A third of the pairs begin alike."""
    rng = np.random.default_rng(5)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    pairs = []
    for number in range(n):
        source, target = ("".join(rng.choice(letters, 7)) for _ in range(2))
        pairs.append((source, source[:3] + target[3:] if number % 3 == 0 else target))
    return pairs


def test_what_spelling_explains_is_taken_away():
    """Gains that follow the share of common letter pairs: without the spellings they look like translation."""
    n, words = 300, spelt(300)
    codes: dict[str, np.ndarray] = {}

    def letters(word: str) -> np.ndarray:
        rng = np.random.default_rng(len(codes))
        found = [codes.setdefault(one + other, rng.normal(size=WIDTH)) for one, other in pairwise(word)]
        return np.sum(found, axis=0)

    a, b = (unit(RNG.normal(size=(n, 2 * WIDTH))) for _ in range(2))
    c, d = (
        unit(np.hstack([side[:, :WIDTH], 0.6 * unit(np.array([letters(pair[place]) for pair in words]))]))
        for place, side in enumerate((a, b))
    )
    before, after = (a, b), (c, d)
    assert near_test(before, after, alone(n), np.arange(n)).pvalue < 0.05
    assert near_test(before, after, alone(n), np.arange(n), spellings=words).pvalue > 0.05
    real = to_partners(before, 0.3)
    assert near_test(before, real, alone(n), np.arange(n), spellings=words).pvalue < 1e-6


def test_a_gain_of_a_few_words_is_found_to_be_one():
    before, _ = topics(100, 5, seed=6)
    after = tuple(side.copy() for side in to_partners(before, 0.5))
    for old, new in zip(before, after, strict=True):
        new[4:] = unit(old[4:] + 0.1 * unit(RNG.normal(size=(96, WIDTH))))
    found = near_test(before, (after[0], after[1]), alone(100), np.arange(100))
    assert found.pvalue_left_out > 0.05


@pytest.mark.parametrize("n", [1, 2, 4, 5, 7])
def test_few_pairs_and_no_change_have_defined_answers(n):
    before, _ = topics(n, 5, seed=n)
    same = near_test(before, before, alone(n), np.arange(n))
    assert (same.gain, same.pvalue, same.pvalue_left_out) == (0, 1, 1)
    found = near_test(before, to_partners(before, 0.5), alone(n), np.arange(n), spellings=spelt(n))
    assert np.isfinite([found.gain, found.pvalue, found.pvalue_left_out]).all()
    assert found.pvalue == 1 or n >= 5


def test_a_source_whose_every_target_is_listed_has_no_near_word():
    before, _ = topics(6, 3, seed=8)
    relevant = np.tile(np.arange(6), (6, 1))
    found = near_test(before, to_partners(before, 0.5), relevant, np.arange(6))
    assert (found.gain, found.pvalue) == (0, 1)


def test_vectors_may_be_torch_s_own_memory():
    before, _ = topics(20, 5)
    arrays = tuple(torch.from_numpy(side).numpy() for side in before)
    assert near_test((arrays[0], arrays[1]), to_partners(before, 0.3), alone(20), np.arange(20)).pvalue < 0.05
