"""How far does spelling alone give a translation away? Letters shared by two words, and a baseline of n-grams.

Case and marks are left out everywhere: "Éléphant" and "elephant" are spelt alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from src.pairs import without_marks, word_key

with suppress(ModuleNotFoundError):  # shapes are checked in tests; a bare GPU machine need not have jaxtyping
    from jaxtyping import Float

LOOK_ALIKE = 0.6  # similarity from which a word and its translation count as look-alikes
STRATA = (0.0, 0.2, 0.4, LOOK_ALIKE)  # the lower bounds of the report's strata; the last one holds the look-alikes

# Of n-grams of 1 to 5 characters, within words or across them, these find the most train pairs of fra-eng.
NGRAMS = (1, 3)  # characters: shortest and longest
MOST_NGRAMS = 4_096  # the most frequent ones, where the words have more
MOST_WORDS = 20_000  # a side; their dense vectors hold 330 MB


def similarity(source: str, target: str) -> float:
    """The share of letters that two words have in common, in order, from 0 to 1; 0 where either has no letters.

    Twice the length of the longest common subsequence over the sum of the lengths (rapidfuzz's normalised Indel
    similarity), without case and marks.
    """
    from rapidfuzz.distance import LCSseq

    a, b = without_marks(source), without_marks(target)
    # Not by Indel.normalized_similarity: it subtracts from 1, and 1 − 0.8 in float64 is less than the stratum's 0.2.
    return 2 * LCSseq.similarity(a, b) / (len(a) + len(b)) if a and b else 0.0


def similarities(sources: Sequence[str], targets: Sequence[str]) -> Float[np.ndarray, "n m"]:
    """`similarity` of every source with every target, in float32; it holds 4·n·m bytes."""
    from rapidfuzz import process
    from rapidfuzz.distance import Indel

    a, b = ([without_marks(word) for word in words] for words in (sources, targets))
    table = process.cdist(a, b, scorer=Indel.normalized_similarity, dtype=np.float32)
    # rapidfuzz calls two empty words the same, but they share no letter
    table[np.ix_([not word for word in a], [not word for word in b])] = 0
    return table


def word_similarity(pairs: Sequence[tuple[str, str]]) -> Float[np.ndarray, " n"]:
    """For each (source, target): the largest `similarity` of the source with any target it has among these pairs.

    All pairs of one source word, whatever its case, have the same value: one translation that looks like the word is
    enough to find it by.
    """
    largest: dict[str, float] = defaultdict(float)
    for source, target in pairs:
        word = word_key(source)
        largest[word] = max(largest[word], similarity(source, target))
    return np.array([largest[word_key(source)] for source, _ in pairs], dtype=np.float64)


def spelling_vectors(
    sources: Sequence[str],
    targets: Sequence[str],
    fitted_on: tuple[Sequence[str], Sequence[str]] | None = None,
) -> tuple[Float[Tensor, "n f"], Float[Tensor, "m f"]] | None:
    """Unit vectors (float32) of words that know their spelling and no language: tf-idf of character n-grams.

    What is retrieved with them is the spelling baseline. The n-grams and their weights come from the words of both
    languages in `fitted_on`, or else from the words themselves. A word without letters has the zero vector.
    None where there are more than MOST_WORDS sources, or no word to fit on has a letter.
    """
    if len(sources) > MOST_WORDS:
        return None
    from sklearn.feature_extraction.text import TfidfVectorizer  # half a second

    fitted_sources, fitted_targets = fitted_on or (sources, targets)
    known = [plain for word in (*fitted_sources, *fitted_targets) if (plain := without_marks(word))]
    if not known:
        return None
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=NGRAMS, max_features=MOST_NGRAMS, lowercase=False).fit(
        known
    )

    def vectors(words: Sequence[str]) -> Tensor:
        weights = vectorizer.transform([without_marks(word) for word in words])
        return torch.from_numpy(weights.astype(np.float32).toarray())

    return vectors(sources), vectors(targets)
