"""Simulated splits: what training may do to words, with and without anything to do with translation.

A word's vector is its pair's concept, a part of its own (at right angles, so that moving it leaves the expected cosines
exactly alone) and, where a scenario says so, something else, normalised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from src.spelling import LOOK_ALIKE, similarity

WIDTH = 64  # of the concept, and of the own part
CONCEPT = 0.4  # share of a word's squared length that it has in common with its translation
LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))


@dataclass(frozen=True)
class Simulated:
    """Source and target vectors before and after, the listed translations, and the words' spellings."""

    vectors: tuple[Tensor, Tensor, Tensor, Tensor]
    relevant: Tensor
    spellings: list[tuple[str, str]]


Split = Callable[[np.random.Generator, int], Simulated]  # random numbers and a number of pairs → a split


@dataclass(frozen=True)
class Change:
    """What training does to the words of one split; the defaults move their own parts at random and nothing else."""

    moved: float = 0.3  # share of a word's own part that is drawn anew
    uneven: bool = False  # a few pairs move much, both words alike, and most hardly
    concept: float = 0.0  # squared length that goes from the own part to the concept: real alignment
    only: int | None = None  # so many pairs alone are aligned; None: all
    lift: float = 0.0  # squared length that goes from the own part to one common direction: all cosines rise by it
    common: tuple[float, float] = (0.0, 0.0)  # strength of the common direction before, after, in inner lengths
    length: float = 0.0  # by how much that strength varies among pairs, as an attention sink's does with word length
    clusters: bool = False  # half of the pairs come in threes that share the source word, targets are near-synonyms
    translations: int = 1  # unlike ones that each source word has
    map: float = 0.0  # size of a random linear map that moves all vectors


SINK = Change(common=(30, 30), length=0.5, uneven=True)


def moved(change: Change) -> Split:
    """A split that training changes so; its spellings say nothing."""

    def split(rng: np.random.Generator, n: int) -> Simulated:
        linear = rng.normal(size=(2 * WIDTH + 2, 2 * WIDTH + 2)) / np.sqrt(2 * WIDTH)
        vectors, relevant = _moved(rng, n, change, linear)
        return Simulated(vectors, relevant, words(rng, n))

    return split


def _moved(
    rng: np.random.Generator, n: int, change: Change, linear: np.ndarray
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    group = np.arange(n) // change.translations
    if change.clusters:
        group[: n // 2] = np.arange(n // 2) // 3
    concept, own_source, noise_source = (units(rng, n)[group] for _ in range(3))
    own_target, noise_target = (units(rng, n), units(rng, n))
    if change.clusters:
        own_target, noise_target = (unit(2 * units(rng, n)[group] + each) for each in (own_target, noise_target))
    share = np.full((n, 1), change.moved)
    if change.uneven:
        share = np.clip(0.05 * np.exp(1.5 * rng.normal(size=(n, 1))), 0, 0.9)[group]
    length = np.exp(change.length * rng.normal(size=(n, 1)))[group]
    gained = np.full((n, 1), change.concept)
    if change.only is not None:
        gained[rng.permutation(n)[change.only :]] = 0
    before, after = [], []
    for own, noise in ((own_source, noise_source), (own_target, noise_target)):
        lengths = length * np.exp(change.length / 2 * rng.normal(size=(n, 1)))[group]
        parts = [np.sqrt(CONCEPT) * concept, np.sqrt(1 - CONCEPT) * own, 0 * length, change.common[0] * lengths]
        before.append(unit(np.hstack(parts)))
        if change.map:
            after.append(unit(before[-1] + change.map * before[-1] @ linear))
            continue
        own = unit(np.sqrt(1 - share) * own + np.sqrt(share) * noise)
        parts = [np.sqrt(CONCEPT + gained) * concept, np.sqrt(1 - CONCEPT - gained - change.lift) * own]
        after.append(unit(np.hstack([*parts, np.sqrt(change.lift) + 0 * length, change.common[1] * lengths])))
    reach = 2 if change.clusters else change.translations - 1  # members of a group stand side by side
    relevant = np.stack([np.arange(n) + step for step in range(-reach, reach + 1)], axis=1)
    within = (relevant >= 0) & (relevant < n)
    relevant[~within | (group[relevant.clip(0, n - 1)] != group[:, None])] = -1
    return _tensors(*before, *after), torch.from_numpy(relevant)


def to_class_means(size: int | float, *, step: float, visible: float) -> Split:
    """Every word moves a `step` of the way to the mean of its class: topic, and no knowledge of pairs.

    `size` is a number of pairs or a share of them, `visible` the share of the untouched concepts that a class shares.
    """

    def split(rng: np.random.Generator, n: int) -> Simulated:
        group = rng.permutation(n) // max(1, round(size * n if size < 1 else size))
        shared = units(rng, n)[group]
        concept = unit(np.sqrt(visible) * shared + np.sqrt(1 - visible) * units(rng, n))
        a, b = _untouched(rng, concept)
        sums = np.zeros((n, a.shape[1]))
        np.add.at(sums, group, a + b)
        mean = (sums / (2 * np.maximum(1, np.bincount(group, minlength=n)))[:, None])[group]
        c, d = (unit(side + step * (mean - side) + _jitter(rng, n)) for side in (a, b))
        return _alone(rng, (a, b, c, d))

    return split


def hubs(share: float, *, step: float) -> Split:
    """Some pairs, both words alike, move towards the mean of all words and lie near everything then."""

    def split(rng: np.random.Generator, n: int) -> Simulated:
        a, b = _untouched(rng, units(rng, n))
        chosen = (rng.permutation(n) < max(1, round(share * n)))[:, None]
        middle = unit((a.mean(0) + b.mean(0))[None])
        c, d = (unit(side + np.where(chosen, step * middle, 0) + _jitter(rng, n)) for side in (a, b))
        return _alone(rng, (a, b, c, d))

    return split


def nuisance_shrinks(*, shared: bool, share: float = 0.4, kept: float = 0.5) -> Split:
    """Four directions that say nothing of meaning, as length or frequency do, lose half of their strength.

    `shared`: the words of a pair have the same place along them; else each word has its own.
    """

    def split(rng: np.random.Generator, n: int) -> Simulated:
        directions = unit(rng.normal(size=(4, WIDTH)))
        concept, place = units(rng, n), rng.normal(size=(n, 4))
        sides = []
        for _ in range(2):
            nuisance = unit((place if shared else rng.normal(size=(n, 4))) @ directions)
            own, noise = units(rng, n), units(rng, n)
            for strength, rest in ((share, own), (share * kept, unit(np.sqrt(0.7) * own + np.sqrt(0.3) * noise))):
                parts = [np.sqrt(0.3) * concept, np.sqrt(0.7 - share) * rest, np.sqrt(strength) * nuisance]
                sides.append(unit(np.hstack(parts)))
        a, c, b, d = sides
        return _alone(rng, (a, b, c, d))

    return split


def by_spelling(share: float, *, alike: float) -> Split:
    """A `share` of each word's own part turns into a vector of its letter pairs, which both languages have in common.

    `alike` of the pairs are look-alikes.
    """

    def split(rng: np.random.Generator, n: int) -> Simulated:
        concept, spelt = units(rng, n), words(rng, n, alike)
        before, after = [], []
        for side in range(2):
            own, letters = units(rng, n), _letter_pairs([pair[side] for pair in spelt])
            for sides, part in ((before, own), (after, unit(np.sqrt(1 - share) * own + np.sqrt(share) * letters))):
                sides.append(unit(np.hstack([np.sqrt(CONCEPT) * concept, np.sqrt(1 - CONCEPT) * part])))
        return Simulated(_tensors(*before, *after), torch.arange(n)[:, None], spelt)

    return split


def spelt(split: Split, alike: float) -> Split:
    """The same, with look-alikes among its words."""
    return lambda rng, n: replace(split(rng, n), spellings=words(rng, n, alike))


def words(rng: np.random.Generator, n: int, alike: float = 0.0) -> list[tuple[str, str]]:
    """Spellings: `alike` of the pairs differ in a letter or two, a third of the others begin alike by chance."""
    return [_spelt_alike(rng) if rng.random() < alike else _spelt_otherwise(rng) for _ in range(n)]


def _spelt_alike(rng: np.random.Generator) -> tuple[str, str]:
    source, letters = _word(rng), rng.choice(LETTERS, 10)
    changed = set(rng.integers(len(source), size=1 + len(source) // 7).tolist())
    return source, "".join(letters[i] if i in changed else letter for i, letter in enumerate(source))


def _spelt_otherwise(rng: np.random.Generator) -> tuple[str, str]:
    begins_alike = rng.random() < 1 / 3
    while True:  # chance makes look-alikes of a few short words
        source, target = _word(rng), _word(rng)
        target = source[:2] + target[2:] if begins_alike else target
        if similarity(source, target) < LOOK_ALIKE:
            return source, target


def _word(rng: np.random.Generator) -> str:
    return "".join(rng.choice(LETTERS, rng.integers(4, 11)))


def _letter_pairs(spellings: list[str]) -> np.ndarray:
    """A unit vector of each word: the sum of fixed random vectors of its pairs of letters."""
    rows = []
    for word in spellings:
        found = [one + other for one, other in zip(f" {word}", f"{word} ", strict=True)]
        rows.append(sum(_random_vector(pair) for pair in found))
    return unit(np.array(rows))


@cache
def _random_vector(text: str) -> np.ndarray:
    return np.random.default_rng(crc32(text.encode())).normal(size=WIDTH)


# --- small parts --------------------------------------------------------------------------------------------


def _untouched(rng: np.random.Generator, concept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = (
        unit(np.hstack([np.sqrt(CONCEPT) * concept, np.sqrt(1 - CONCEPT) * units(rng, len(concept))])) for _ in range(2)
    )
    return a, b


def _jitter(rng: np.random.Generator, n: int) -> np.ndarray:
    """Training moves everything a little."""
    return 0.15 * unit(rng.normal(size=(n, 2 * WIDTH)))


def _alone(rng: np.random.Generator, sides: tuple[np.ndarray, ...]) -> Simulated:
    """One translation a word, and spellings that say nothing."""
    n = len(sides[0])
    return Simulated(_tensors(*sides), torch.arange(n)[:, None], words(rng, n))


def _tensors(*sides: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b, c, d = (torch.from_numpy(side.astype(np.float32)) for side in sides)
    return a, b, c, d


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def units(rng: np.random.Generator, n: int) -> np.ndarray:
    return unit(rng.normal(size=(n, WIDTH)))


@cache
def planted(effect: float, change: Change) -> float:
    """The squared length to move into the concept so that the specific gain has this Cohen's d_z, by bisection."""
    low, high = 0.0, 0.3
    for _ in range(12):
        middle = (low + high) / 2
        sides, _ = _moved(np.random.default_rng(1), 5_000, replace(change, concept=middle), np.zeros(0))
        a, b, c, d = (side.double().numpy() for side in sides)
        gains = _specific(c, d) - _specific(a, b)
        low, high = (middle, high) if gains.mean() / gains.std() < effect else (low, middle)
    return low


def _specific(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Each pair's cosine less its words' mean cosines with all others: the diagonal of S, double-centred."""
    return np.einsum("ij,ij->i", source - source.mean(0), target - target.mean(0))
