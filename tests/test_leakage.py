"""Hints that a split leaves: each kind on words where a reader sees it, by its definition, and in large lists."""

from __future__ import annotations

from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.leakage import FEWEST_LETTERS, SHARE, find_leakage, warnings
from src.pairs import Pair, read_pairs, split


def pairs(*lines: str) -> list[Pair]:
    """From "source = target"."""
    return [Pair(*line.split(" = ")) for line in lines]


def test_a_word_spelt_like_one_of_its_translations_is_identical() -> None:
    control = pairs("Réputation = reputation", "Réputation = fame", "taxi = cab", "cab = taxi", "chien = dog")
    found = find_leakage([], control)
    assert found.identical == ("Réputation",)
    assert (found.control_pairs, found.source_words, found.target_words) == (5, 4, 5)


def test_a_trained_word_within_a_longer_entry_of_its_side() -> None:
    train = pairs("marée = tide", "love = amour", "in = dans", "accordance = accord", "eau = water")
    control = pairs(
        "marée haute = flood",
        "faire = make love",  # "love" was trained on, but as a source
        "selon = in accordance with",
        "l’eau-de-vie = brandy",
        "haute-marée = high tide",  # both sides, one pair
        "marée = ebb",  # no longer entry
        "marées hautes = floods",  # "marées" is another word
    )
    expected = (("marée haute", "marée"), ("l’eau-de-vie", "eau"), ("haute-marée", "marée"))
    assert find_leakage(train, control).multiword == expected
    english = [Pair(pair.target, pair.source) for pair in train]
    assert find_leakage(english, control[2:3]).multiword == (("in accordance with", "accordance"),)  # and not "in"


@pytest.mark.parametrize(
    ("word", "trained", "expected"),
    [
        ("amorçage", "amorcer", True),
        ("amorcer", "Amorçage", True),
        ("absolutely", "absolute", True),
        ("chest", "chestnut", True),  # a wrong guess: spelling can't tell
        ("cats", "cat", False),  # four letters are chance
        ("comme", "commencement", False),
        ("interest", "interpret", False),
        ("going on", "going up", False),  # entries of several words begin alike by chance
        ("книгами", "книгам", True),
    ],
)
def test_words_that_begin_alike(word: str, trained: str, expected: bool) -> None:
    found = find_leakage([Pair(trained, "y")], [Pair(word, "x")])
    assert found.source_inflections == (((word, trained),) if expected else ())
    found = find_leakage([Pair("y", trained)], [Pair("x", word)])
    assert found.target_inflections == (((word, trained),) if expected else ())
    assert not find_leakage([Pair("y", trained)], [Pair(word, "x")]).source_inflections  # the other language


ENDINGS = st.text("ab", max_size=9)


@given(st.lists(ENDINGS, max_size=6, unique=True), st.lists(ENDINGS, max_size=6, unique=True))
def test_beginnings_are_found_as_by_comparing_each_with_each(control: list[str], trained: list[str]) -> None:
    def alike(one: str, other: str) -> bool:
        common = len(list(takewhile(lambda two: two[0] == two[1], zip(one, other, strict=False))))
        return common >= FEWEST_LETTERS and common >= SHARE * max(len(one), len(other))

    control, trained = ([f"sta{ending}" for ending in endings] for endings in (control, trained))
    found = find_leakage([Pair(word, "y") for word in trained], [Pair(word, "x") for word in control])
    assert [word for word, _ in found.source_inflections] == [w for w in control if any(alike(w, t) for t in trained)]
    assert all(alike(word, hit) for word, hit in found.source_inflections)


def test_words_are_counted_once_whatever_their_case_and_their_translations() -> None:
    control = pairs("amorçage = priming", "Amorçage = initiation", "amorçage = bait")
    found = find_leakage(pairs("amorcer = prime"), control)
    assert (found.source_words, found.counts()) == (
        1,
        {"identical": 0, "multiword": 0, "source_inflections": 1, "target_inflections": 0},
    )


def test_warnings_say_what_is_counted_and_out_of_how_many() -> None:
    train = pairs("amorcer = prime", "marée = tide", "supporter = bear", "finir = finish")
    control = pairs("amorçage = baits", "marée haute = flood", "marée haute = high", "fini = finished", "taxi = taxi")
    assert warnings(find_leakage(train, control)) == [
        "1 of 4 control source words (25.0%) are spelt like one of their translations: taxi",
        "2 of 5 control pairs (40.0%) contain a trained word within a longer entry: marée haute – marée",
        "1 of 4 control source words (25.0%) share their first letters with a trained word (inflections?): "
        "amorçage – amorcer",
        "1 of 5 control target words (20.0%) share their first letters with a trained word (inflections?): "
        "finished – finish",
    ]
    many = [Pair(f"{letter}bcdefs", f"{letter}") for letter in "abcd"]
    line = warnings(find_leakage([Pair(f"{letter}bcdef", "x") for letter in "abcd"], many))[0]
    assert line.endswith(": abcdefs – abcdef, bbcdefs – bbcdef, cbcdefs – cbcdef, …")
    assert warnings(find_leakage(train, pairs("chien = dog"))) == []
    assert warnings(find_leakage([], [])) == []


def test_the_built_in_list_has_little() -> None:
    halves = split(read_pairs(source="builtin"), control_size=63, seed=0)
    found = find_leakage(halves.train, halves.control)
    assert (found.source_words, found.target_words) == (63, 63)
    assert found.counts() == {"identical": 0, "multiword": 0, "source_inflections": 3, "target_inflections": 0}
    assert found.source_inflections == (("chungwa", "chungu"), ("kuvunja", "kuvuna"), ("kulalamika", "kulala"))


def test_many_words_are_compared() -> None:
    """Every pair with every other would be 400 million comparisons."""

    def stem(number: int) -> str:
        return "".join(chr(ord("a") + int(digit)) for digit in f"{number:06}")

    train = [Pair(f"{stem(i)}yy", f"train{i}") for i in range(40_000)]
    control = [Pair(f"{stem(i)}zz", f"in train{i}") for i in range(10_000)]
    assert find_leakage(train, control).counts() == {
        "identical": 0,
        "multiword": 10_000,
        "source_inflections": 10_000,
        "target_inflections": 0,
    }


def test_numbered_words_are_no_inflections() -> None:
    assert find_leakage([Pair("item1", "word1")], [Pair("item12", "word12")]).counts()["source_inflections"] == 0
