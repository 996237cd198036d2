"""What a split can't keep apart: control words that a trained word gives away in part, counted for the reader.

`src.pairs.split` puts no word on both sides. Three kinds of hint remain: words spelt like their translation, trained
words inside longer entries, and inflections. Case and marks are left out everywhere, as in the split.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from src.pairs import Pair, without_marks, word_key

FEWEST_LETTERS = 5  # a shorter common beginning is chance
SHARE = Fraction(3, 5)  # of the longer word: "amorcer" and "amorçage" share 5 letters of 8
EXAMPLES = 3  # in a warning


@dataclass(frozen=True)
class Leakage:
    """What the control pairs share with the train pairs, and out of how many; words are distinct spellings.

    `identical`: control source words spelt like one of their translations. `multiword`: a control entry of several
    words, and a trained word of its side within it, one for each such pair. `source_inflections` and
    `target_inflections`: a control word, and a trained word of its side that begins alike.
    """

    control_pairs: int
    source_words: int
    target_words: int
    identical: tuple[str, ...]
    multiword: tuple[tuple[str, str], ...]
    source_inflections: tuple[tuple[str, str], ...]
    target_inflections: tuple[tuple[str, str], ...]

    def counts(self) -> dict[str, int]:
        """How many there are of each kind, by its name."""
        return {
            "identical": len(self.identical),
            "multiword": len(self.multiword),
            "source_inflections": len(self.source_inflections),
            "target_inflections": len(self.target_inflections),
        }


def find_leakage(train: Sequence[Pair], control: Sequence[Pair]) -> Leakage:
    """Compares a split's control pairs with its train pairs, in time that grows with their letters alone.

    Inflections are guessed from spelling: entries of one word with a common beginning of at least FEWEST_LETTERS
    letters that is at least SHARE of the longer word. Some of them are other words ("general", "generate"), and
    languages that inflect at the beginning, such as Swahili, have more than are found.
    """
    sources, targets = _distinct(pair.source for pair in control), _distinct(pair.target for pair in control)
    trained_sources, trained_targets = [pair.source for pair in train], [pair.target for pair in train]
    return Leakage(
        control_pairs=len(control),
        source_words=len(sources),
        target_words=len(targets),
        identical=_distinct(p.source for p in control if without_marks(p.source) == without_marks(p.target)),
        multiword=_within(control, trained_sources, trained_targets),
        source_inflections=_beginning_alike(sources, trained_sources),
        target_inflections=_beginning_alike(targets, trained_targets),
    )


def warnings(leakage: Leakage) -> list[str]:
    """One line for each kind of which there are any: what is counted, how many of how many, and the first examples."""
    sources, targets = (leakage.source_words, "source words"), (leakage.target_words, "target words")
    alike = "share their first letters with a trained word (inflections?)"
    return [
        *_warning(leakage.identical, *sources, "are spelt like one of their translations"),
        *_warning(leakage.multiword, leakage.control_pairs, "pairs", "contain a trained word within a longer entry"),
        *_warning(leakage.source_inflections, *sources, alike),
        *_warning(leakage.target_inflections, *targets, alike),
    ]


def _warning(found: Sequence[str | tuple[str, str]], total: int, counted: str, what: str) -> list[str]:
    examples = list(dict.fromkeys(one if isinstance(one, str) else f"{one[0]} – {one[1]}" for one in found))
    shown = ", ".join(examples[:EXAMPLES]) + (", …" if len(examples) > EXAMPLES else "")
    return [f"{len(found)} of {total} control {counted} ({len(found) / total:.1%}) {what}: {shown}"] if found else []


def _distinct(words: Iterable[str]) -> tuple[str, ...]:
    """The first spelling of each word, in their order."""
    first: dict[str, str] = {}
    for word in words:
        first.setdefault(word_key(word), word)
    return tuple(first.values())


def _within(
    control: Sequence[Pair], trained_sources: Sequence[str], trained_targets: Sequence[str]
) -> tuple[tuple[str, str], ...]:
    """For each control pair with a trained word in an entry of several words: that entry and the longest such word."""
    known = [{without_marks(word): word for word in words} for words in (trained_sources, trained_targets)]
    found = []
    for pair in control:
        for entry, trained in zip((pair.source, pair.target), known, strict=True):
            parts = [part for part in re.split(r"[\s'’-]+", without_marks(entry)) if part]
            hits = [part for part in parts if part in trained]
            if len(parts) > 1 and hits:
                found.append((entry, trained[max(hits, key=len)]))  # of "in accordance with" not the "in"
                break
    return tuple(found)


def _beginning_alike(words: Sequence[str], trained: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Each word that begins like a trained one, and the one with which it shares the most letters."""
    by_beginning: dict[str, str] = {}
    for word in trained:
        for beginning in _beginnings(word):
            by_beginning.setdefault(beginning, word)
    hits = ((word, next((by_beginning[b] for b in _beginnings(word) if b in by_beginning), None)) for word in words)
    return tuple((word, hit) for word, hit in hits if hit)


def _beginnings(word: str) -> Iterator[str]:
    """The beginnings that are long enough to tell, the longest first; none of what isn't one word of letters alone.

    Two words share one of these exactly if their common beginning is long enough for both.
    """
    letters = without_marks(word)
    if letters.isalpha():
        for length in range(len(letters), max(FEWEST_LETTERS, math.ceil(SHARE * len(letters))) - 1, -1):
            yield letters[:length]
