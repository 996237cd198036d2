"""Did the true pairs gain more than matchings among near words: of one topic, alike in length or in spelling?

Moving words to their topic's mean beats random matchings without any knowledge of pairs. So each pair's gain is
compared with those of pairings in which a near word replaces its source or its target. Near words come from the whole
split, not only from the tested pairs: those share no words, and most of a word's topic would be missing among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from src.specificity import FEWEST, double_centred, greater_than_zero, left_out, scaled
from src.spelling import similarities, spelling_vectors

with suppress(ModuleNotFoundError):  # shapes are checked in tests; a bare GPU machine need not have jaxtyping
    from jaxtyping import Bool, Float, Int

NEAR = 5  # near words of each kind, on each side of a pair; of those that training drew nearest it is 1
TESTED = 500  # pairs at most; more are sampled
ALL = 5_000  # words that are all looked at; of more, the nearest by vectors of each pair
ROWS = 64  # pairs at once, where there are more words than that

Vectors = tuple[np.ndarray, np.ndarray]  # sources and targets, n × d each; what is used of them becomes float64


@dataclass(frozen=True)
class NearResult:
    """Mean gain of the true pairs less that of their near words, and the one-sided p-values.

    `pvalue_left_out` is the p-value without the words that gained most.
    """

    gain: float
    pvalue: float
    pvalue_left_out: float


NOTHING = NearResult(0.0, 1.0, 1.0)


def near_test(
    before: Vectors,
    after: Vectors,
    relevant: Int[np.ndarray, "n k"],
    tested: Int[np.ndarray, " t"],
    *,
    best_layer: Vectors | None = None,
    spellings: Sequence[tuple[str, str]] | None = None,
    seed: int = 0,
) -> NearResult:
    """Tests whether the tested pairs gained more than matchings among near words, for each kind of near words.

    `before` and `after` are the unit vectors of all n pairs, `relevant` their listed translations as in
    `measures.measure`; none of these serves as a near word. The kinds are
    - neighbours in the untouched model, at this layer and at its `best_layer`;
    - the one word of the same language that training drew nearest, which finds a topic that moved as a whole, even
      where the untouched model hides it;
    - given `spellings`, words alike in length and in spelling similarity.

    A pair's score is the share of its near words that gained less. If only what near words share had moved, the score
    would average ½. Shares are compared, not gains, so that no few words decide; Student's t over the pairs. What
    spelling and length explain of the gains is taken away first. The largest p-value counts, over the kinds and over
    raw and scaled cosines.
    """
    if len(tested) > TESTED:
        tested = np.sort(np.random.default_rng(seed).permutation(tested)[:TESTED])
    if len(tested) < FEWEST:
        return NOTHING
    untouched = [before] + ([best_layer] if best_layer else [])
    sides = [
        _Side.of(place, before, after, relevant, tested, [kind[place] for kind in untouched], spellings)
        for place in (0, 1)  # near sources, near targets
    ]
    whole, left, beyond = [], [], []
    for form in range(2):  # raw, scaled
        own = sum(np.diag(side.gains[form]) for side in sides)
        kept = np.argsort(own)[: -left_out(len(tested))]
        for kind in range(len(sides[0].near)):
            scores, gains = zip(*(side.compared(form, kind) for side in sides), strict=True)
            score = (scores[0] + scores[1]) / 2 - 0.5
            whole.append(greater_than_zero(score))
            left.append(greater_than_zero(score[kept]))
            beyond += [float((gains[0] + gains[1]).mean() / 2)] * (form == 0)
    return NearResult(min(beyond), max(whole), max(left))


@dataclass(frozen=True)
class _Side:
    """The t tested pairs against candidates for one of their two words; the first t candidates are their own words."""

    gains: tuple[Float[np.ndarray, "t m"], Float[np.ndarray, "t m"]]  # raw, scaled; double-centred, without form
    near: list[Int[np.ndarray, "t _"]]  # candidates, for each kind
    allowed: Bool[np.ndarray, "t m"]  # candidates that are no listed translation

    @classmethod
    def of(
        cls,
        place: int,
        before: Vectors,
        after: Vectors,
        relevant: Int[np.ndarray, "n k"],
        tested: Int[np.ndarray, " t"],
        untouched: Sequence[Float[np.ndarray, "n d"]],
        spellings: Sequence[tuple[str, str]] | None,
    ) -> _Side:
        """Compares with near sources (`place` 0) or near targets (1)."""
        chosen = _candidates([*untouched, after[place]], tested)
        allowed = _no_translations(relevant, tested, chosen, place)
        old, new = (_cosines(sides[1 - place], tested, sides[place], chosen) for sides in (before, after))
        gains = [new - old, scaled(new, allowed) - scaled(old, allowed)]
        near = [_nearest(-_cosines(kind, tested, kind, chosen), allowed) for kind in untouched]
        own = [_cosines(sides[place], tested, sides[place], chosen) for sides in (before, after)]
        near.append(_nearest(-double_centred(own[1] - own[0]), allowed, most=1))
        form: list[np.ndarray] = []
        if spellings:
            words, others = [spellings[row][1 - place] for row in tested], [spellings[row][place] for row in chosen]
            form = _form(words, others)
            near.append(_nearest(_unlike(form[0], np.array([len(word) for word in others])), allowed))
        raw, in_spread = (_without_form(double_centred(gain), form, allowed) for gain in gains)
        return cls((raw, in_spread), near, allowed)

    def compared(self, form: int, kind: int) -> tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"]]:
        """(share of a pair's near words that gained less, its gain beyond their mean)."""
        gains, near = self.gains[form], self.near[kind]
        own, others = np.diag(gains)[:, None], np.take_along_axis(gains, near, axis=1)
        counted = np.take_along_axis(self.allowed, near, axis=1)  # a row may have fewer near words than there is room
        number = np.maximum(1, counted.sum(axis=1))
        less = np.where(counted, (own > others) + 0.5 * (own == others), 0).sum(axis=1) / number
        less[~counted.any(axis=1)] = 0.5
        return less, np.where(counted, own - others, 0).sum(axis=1) / number


def _candidates(kinds: Sequence[Float[np.ndarray, "n d"]], tested: Int[np.ndarray, " t"]) -> Int[np.ndarray, " m"]:
    """The pairs whose words may be near ones: the tested first, then one for each other word."""
    first = {hash(row.tobytes()): number for number, row in zip(tested.tolist(), kinds[0][tested], strict=True)}
    for number, row in enumerate(kinds[0]):
        first.setdefault(hash(row.tobytes()), number)
    others = np.setdiff1d(np.fromiter(first.values(), int), tested)
    if len(others) + len(tested) <= ALL:
        return np.concatenate([tested, others])
    nearest = set()
    for kind in kinds:
        words = kind[others].T
        for start in range(0, len(tested), ROWS):
            similar = kind[tested[start : start + ROWS]] @ words
            nearest.update(others[np.argpartition(-similar, NEAR, axis=1)[:, :NEAR]].ravel().tolist())
    return np.concatenate([tested, np.array(sorted(nearest))])


def _cosines(
    source: Float[np.ndarray, "n d"],
    rows: Int[np.ndarray, " t"],
    target: Float[np.ndarray, "n d"],
    columns: Int[np.ndarray, " m"],
) -> Float[np.ndarray, "t m"]:
    return source[rows].astype(np.float64) @ target[columns].astype(np.float64).T


def _no_translations(
    relevant: Int[np.ndarray, "n k"], tested: Int[np.ndarray, " t"], chosen: Int[np.ndarray, " m"], place: int
) -> Bool[np.ndarray, "t m"]:
    """Whether a candidate in the place of a pair's source (0) or target (1) makes no listed pair."""
    column = np.full(len(relevant) + 1, -1)  # the last is where the padding points
    if place == 1:  # the pair's source with another target
        column[chosen] = np.arange(len(chosen))
        listed = column[relevant[tested]]
        rows, places = np.nonzero(listed >= 0)
        pairs = rows, listed[rows, places]
    else:  # another source with the pair's target
        column[tested] = np.arange(len(tested))
        listed = column[relevant[chosen]]
        candidates, places = np.nonzero(listed >= 0)
        pairs = listed[candidates, places], candidates
    allowed = np.ones((len(tested), len(chosen)), dtype=bool)
    allowed[pairs] = False
    allowed[np.arange(len(tested)), np.arange(len(tested))] = False
    return allowed


def _nearest(
    distances: Float[np.ndarray, "t m"], allowed: Bool[np.ndarray, "t m"], most: int = NEAR
) -> Int[np.ndarray, "t k"]:
    distances = np.where(allowed, distances, np.inf)
    k = min(most, distances.shape[1])
    return np.argpartition(distances, k - 1, axis=1)[:, :k]


# --- spelling and length ------------------------------------------------------------------------------------


def _form(words: Sequence[str], others: Sequence[str]) -> list[Float[np.ndarray, "t m"]]:
    """How alike the words and the others are: in letters, in length, and in n-grams of letters."""
    lengths = [np.array([len(word) for word in some]) for some in (words, others)]
    found = [similarities(words, others).astype(np.float64), np.abs(np.subtract.outer(*lengths)).astype(np.float64)]
    if ngrams := spelling_vectors(words, others):
        found.append((ngrams[0].double() @ ngrams[1].double().T).numpy())
    return found


def _unlike(similarity: Float[np.ndarray, "t m"], lengths: Int[np.ndarray, " m"]) -> Float[np.ndarray, "t m"]:
    """How unlike each candidate is to a pair's own word (the first t) in length and in likeness to the other word."""
    own = len(similarity)
    in_length = np.subtract.outer(lengths[:own], lengths) / max(float(lengths.std()), 1e-12)
    in_likeness = (similarity - np.diag(similarity)[:, None]) / max(float(similarity.std()), 1e-12)
    return in_length**2 + in_likeness**2


def _without_form(
    gains: Float[np.ndarray, "t m"], form: Sequence[Float[np.ndarray, "t m"]], allowed: Bool[np.ndarray, "t m"]
) -> Float[np.ndarray, "t m"]:
    """The gains less what the words' forms explain of them: least squares on the mismatches, applied to all cells.

    What letters do to wrong pairs they do to true ones, so a gain that comes from them alone leaves nothing.
    """
    if not form:
        return gains
    kinds = [double_centred(each) for each in form]
    known = np.stack([kind[allowed] for kind in kinds], axis=1)
    weights = np.linalg.lstsq(known.T @ known, known.T @ gains[allowed], rcond=None)[0]
    return gains - sum(weight * kind for weight, kind in zip(weights, kinds, strict=True))
