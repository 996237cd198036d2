"""Likeness of spelling by its definition, with marks and case left out, and the baseline that knows no language."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src import spelling
from src.measures import measure
from src.pairs import Pair, read_pairs, relevant, split, without_marks
from src.spelling import LOOK_ALIKE, STRATA, similarities, similarity, spelling_vectors, word_similarity

WORDS = st.text(st.sampled_from("abcdeéèçÉ ñ"), max_size=8)


def longest_common(a: str, b: str) -> int:
    """Length of the longest common subsequence, by the textbook's table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(WORDS, WORDS)
def test_similarity_is_twice_the_common_letters_over_all_letters(source: str, target: str) -> None:
    a, b = without_marks(source), without_marks(target)
    letters = len(a) + len(b)
    assert similarity(source, target) == (2 * longest_common(a, b) / letters if letters else 0)
    assert similarity(target, source) == similarity(source, target)


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("éléphant", "ELEPHANT", 1.0),
        ("musique", "music", 8 / 12),
        ("chien", "dog", 0.0),
        ("ab", "cdefghib", 0.2),  # 1 − 8 / 10 would be just below the stratum's bound
        ("", "dog", 0.0),
        ("", "", 0.0),
        ("\u0301", "\u0301", 0.0),  # a mark alone is no letter
        ("книга", "kniga", 0.0),
        ("שָׁלוֹם", "שלום", 1.0),
    ],
)
def test_similarity_of_some_words(source: str, target: str, expected: float) -> None:
    assert similarity(source, target) == expected


@given(st.lists(WORDS, max_size=5), st.lists(WORDS, max_size=5))
def test_a_table_holds_the_similarity_of_each_with_each(sources: list[str], targets: list[str]) -> None:
    table = similarities(sources, targets)
    assert table.shape == (len(sources), len(targets)) and table.dtype == np.float32
    for i, source in enumerate(sources):
        for j, target in enumerate(targets):
            assert table[i, j] == np.float32(similarity(source, target))


def test_the_table_and_the_single_value_fall_into_the_same_stratum() -> None:
    """Every possible value 2·k/m of words of up to 20 letters, some of which float32 and float64 round differently."""
    for common in range(10):
        for more in range(20):
            source, target = "a" * common + "b", "a" * common + "c" * (more + 1)
            single, table = similarity(source, target), similarities([source], [target])[0, 0]
            assert [single >= bound for bound in STRATA] == [table >= bound for bound in STRATA]


def test_a_word_is_as_similar_as_its_most_similar_translation() -> None:
    pairs = [("musique", "melody"), ("chien", "hound"), ("musique", "music"), ("Musique", "tune")]
    expected = [similarity("musique", "music"), similarity("chien", "hound"), similarity("musique", "music")]
    assert word_similarity(pairs).tolist() == [*expected, similarity("musique", "music")]  # case makes no other word
    assert word_similarity([]).shape == (0,)


def test_the_strata_end_with_the_look_alikes() -> None:
    assert STRATA[0] == 0 and STRATA[-1] == LOOK_ALIKE and list(STRATA) == sorted(STRATA)


# The baseline ----------------------------------------------------------------------------------------------------


def baseline(pairs: list[Pair]) -> float:
    vectors = spelling_vectors([pair.source for pair in pairs], [pair.target for pair in pairs])
    assert vectors is not None
    return measure(*vectors, torch.from_numpy(relevant(pairs, [])), names=["csls_p_at_1"])["csls_p_at_1"]


def test_the_baseline_finds_words_by_their_letters_alone() -> None:
    alike = ["éléphant elephant", "musique music", "problème problem", "couleur color", "intéressant interesting"]
    unlike = ["chien dog", "maison house", "boire drink", "fenêtre window", "jeune young"]
    assert baseline([Pair(*line.split()) for line in alike]) == 1
    assert baseline([Pair(*line.split()) for line in unlike]) < 0.5


def test_vectors_are_of_length_one_and_deaf_to_case_and_marks() -> None:
    vectors = spelling_vectors(["Éléphant", "musique"], ["elephant", "the music"])
    assert vectors is not None
    source, target = vectors
    assert source.dtype == torch.float32 and source.shape == target.shape
    assert torch.allclose(torch.cat(vectors).norm(dim=1), torch.ones(4))
    assert torch.equal(source[0], target[0])


def test_weights_come_from_the_words_fitted_on() -> None:
    train, control = (["chat", "chatte"], ["cat", "chat"]), (["chat", "\u0301"], ["cat", "chaz"])
    fitted = spelling_vectors(*control, fitted_on=train)
    trained = spelling_vectors(["chat"], ["chat"], fitted_on=train)
    alone = spelling_vectors(*control)
    assert fitted is not None and alone is not None and trained is not None
    assert fitted[0].shape[1] == trained[0].shape[1] != alone[0].shape[1]
    assert torch.equal(fitted[0][0], trained[0][0])
    assert not fitted[0][1].any()  # a word without letters


def test_the_most_frequent_ngrams_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spelling, "MOST_NGRAMS", 5)
    vectors = spelling_vectors(["banana", "ananas"], ["banana", "pineapple"])
    assert vectors is not None and vectors[0].shape == (2, 5)


def test_there_is_no_baseline_of_too_many_words_or_without_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spelling_vectors(["\u0301"], ["\u0301"]) is None
    monkeypatch.setattr(spelling, "MOST_WORDS", 1)
    assert spelling_vectors(["a"], ["b"]) is not None
    assert spelling_vectors(["a", "b"], ["c", "d"]) is None


def test_swahili_and_english_share_hardly_any_letters() -> None:
    lexicon = read_pairs(source="builtin")
    control = split(lexicon, control_size=63, seed=0).control
    assert (word_similarity([(pair.source, pair.target) for pair in control]) < LOOK_ALIKE).all()
    assert baseline(list(control)) < 0.1
