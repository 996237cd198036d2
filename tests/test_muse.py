"""The same words scored by us, by MUSE's rule and by VecMap's: one vote a source word, and what becomes of ties.

The words lie on a circle, so that each nearest neighbour can be checked by eye. The rules are restated from
`get_word_translation_accuracy` in MUSE's src/evaluation/word_translation.py (Conneau et al. 2018) and from `main` in
VecMap's eval_translation.py (Artetxe et al. 2018).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from src.measures import measure
from src.pairs import Pair, read_pairs, relevant

# MUSE's format, "source target" a line: 11 source words, of which 6 have two translations, and 16 target words.
MUSE_FILE = """\
weka put
weka place
tia put
pata get
pata obtain
kula eat
lala sleep
maji water
nyumba house
nyumba home
mti tree
moto fire
moto hot
mkono hand
mkono arm
jua sun
jua know
"""
SOURCES = {  # degrees; after each, its nearest target and whether that is a translation
    "weka": 0,  # put, 4° off: right
    "tia": 10,  # put, 6°: right
    "pata": 40,  # obtain, 4°: right
    "kula": 80,  # tree, 4°: wrong
    "lala": 120,  # sleep, 4°: right
    "maji": 150,  # home, 10°: wrong
    "nyumba": 180,  # house, 4°: right
    "mti": 210,  # house, 26°: wrong
    "moto": 240,  # hot, 4°: right
    "mkono": 270,  # fire, 8°: wrong
    "jua": 310,  # sun, 3°: right
}
TARGETS = {
    "put": 4, "place": 350, "get": 55, "obtain": 36, "eat": 95, "sleep": 124, "water": 171, "house": 184, "home": 140,
    "tree": 76, "fire": 262, "hot": 244, "hand": 281, "arm": 259, "sun": 313, "know": 30,
}  # fmt: skip
BY_WORD = 7 / 11
BY_PAIR = 12 / 17  # as each pair had a vote: words with two translations, mostly found, counted twice


def vectors(angles: dict[str, int], words: Sequence[str]) -> Tensor:
    radians = torch.tensor([angles[word] for word in words], dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1).float()


def read(folder: Path, text: str) -> list[Pair]:
    path = folder / "swa-eng.0-5000.txt"
    path.write_text(text, encoding="utf-8")
    return list(read_pairs(source="file", path=str(path)).pairs)


def by_us(pairs: list[Pair], sources: dict[str, int], targets: dict[str, int]) -> dict[str, float]:
    ours = vectors(sources, [pair.source for pair in pairs]), vectors(targets, [pair.target for pair in pairs])
    return measure(*ours, torch.from_numpy(relevant(pairs, [])), names=["nn_p_at_1", "csls_p_at_1"])


def scores(method: str, sources: dict[str, int], targets: dict[str, int]) -> Tensor:
    """Of each source word with each target word, every word once: cosines, or CSLS with 10 neighbours."""
    cosines = vectors(sources, list(sources)) @ vectors(targets, list(targets)).T
    if method == "nn":
        return cosines
    return 2 * cosines - cosines.topk(10, 1).values.mean(1, keepdim=True) - cosines.topk(10, 0).values.mean(0)


def by_muse(pairs: list[Pair], table: Tensor, sources: dict[str, int], targets: dict[str, int]) -> float:
    """A pair hits if its target is the first of `topk`; a source word is found if any of its pairs hits."""
    first = table.topk(10, 1).indices[:, 0].tolist()
    found: dict[str, int] = {}
    for pair in pairs:
        hit = first[list(sources).index(pair.source)] == list(targets).index(pair.target)
        found[pair.source] = min(found.get(pair.source, 0) + hit, 1)
    return sum(found.values()) / len(found)


def by_vecmap(pairs: list[Pair], table: Tensor, sources: dict[str, int], targets: dict[str, int]) -> float:
    """A source word is found if the target that `argmax` gives it is in the set of its translations."""
    listed: dict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        listed[pair.source].add(pair.target)
    best = table.numpy().argmax(axis=1)  # numpy: the first of equal ones
    return sum(list(targets)[best[list(sources).index(word)]] in listed[word] for word in listed) / len(listed)


def test_a_muse_file_is_read_as_muse_reads_it(tmp_path: Path) -> None:
    expected = [tuple(line.split()) for line in MUSE_FILE.splitlines()]
    assert [(pair.source, pair.target) for pair in read(tmp_path, MUSE_FILE)] == expected
    assert [(pair.source, pair.target) for pair in read(tmp_path, MUSE_FILE.replace(" ", "\t"))] == expected


def test_words_are_counted_and_not_pairs(tmp_path: Path) -> None:
    pairs = read(tmp_path, MUSE_FILE)
    ours = by_us(pairs, SOURCES, TARGETS)["nn_p_at_1"]
    assert ours == pytest.approx(BY_WORD, abs=1e-12) and ours != pytest.approx(BY_PAIR, abs=0.01)
    table = scores("nn", SOURCES, TARGETS)
    assert by_muse(pairs, table, SOURCES, TARGETS) == pytest.approx(BY_WORD, abs=1e-12)
    assert by_vecmap(pairs, table, SOURCES, TARGETS) == pytest.approx(BY_WORD, abs=1e-12)


def test_csls_of_words_with_one_translation_each_agrees(tmp_path: Path) -> None:
    first = {pair.source: pair for pair in reversed(read(tmp_path, MUSE_FILE))}
    pairs = list(first.values())
    targets = {pair.target: TARGETS[pair.target] for pair in pairs}
    expected = pytest.approx(8 / 11, abs=1e-12)  # "home", which took "maji", is gone
    assert by_us(pairs, SOURCES, targets)["csls_p_at_1"] == expected
    assert by_muse(pairs, scores("csls", SOURCES, targets), SOURCES, targets) == expected


def test_a_word_with_two_translations_counts_once_as_a_csls_neighbour(tmp_path: Path) -> None:
    """Neighbourhoods of pairs instead of words would lose one of these few: "nyumba" (6 of 11)."""
    pairs = read(tmp_path, MUSE_FILE)
    assert by_us(pairs, SOURCES, TARGETS)["csls_p_at_1"] == pytest.approx(7 / 11, abs=1e-12)
    table = scores("csls", SOURCES, TARGETS)
    assert by_muse(pairs, table, SOURCES, TARGETS) == pytest.approx(7 / 11, abs=1e-12)
    assert by_vecmap(pairs, table, SOURCES, TARGETS) == pytest.approx(7 / 11, abs=1e-12)


def test_a_tie_is_wrong_for_us_and_a_matter_of_order_for_them(tmp_path: Path) -> None:
    """ "lay" lies exactly where "sleep" does, so that "lala" has two nearest targets, of which one is right."""
    pairs = read(tmp_path, f"{MUSE_FILE}taga lay\n")
    sources = {**SOURCES, "taga": 290}  # itself wrong: its nearest is "hand"
    found, missed = pytest.approx(7 / 12, abs=1e-12), pytest.approx(6 / 12, abs=1e-12)
    for targets, vecmaps in (({**TARGETS, "lay": 124}, found), ({"lay": 124, **TARGETS}, missed)):
        table = scores("nn", sources, targets)
        assert by_us(pairs, sources, targets)["nn_p_at_1"] == missed
        assert by_vecmap(pairs, table, sources, targets) == vecmaps  # the first in the vocabulary
        assert by_muse(pairs, table, sources, targets) in (found, missed)  # torch promises no order of equal ones
