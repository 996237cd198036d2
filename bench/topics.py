"""Do topics fool the verdict on real vectors? `python -m bench.topics` (a minute; needs dict-freedict-fra-eng).

Gemma-3-270M's vectors of French and English words are moved, without any training, towards the means of classes: words
that are neighbours at some layer of the untouched model, or classes drawn at random. That is topic and no translation.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from bench.speed import prepared, setting, silent
from src import study
from src.evidence import gather_evidence, judge
from src.spelling import LOOK_ALIKE, word_similarity
from src.study import SPLITS, Encoding, SplitName, Study

SIZES = (3, 5, 10)  # pairs in a class
STEP = 0.5  # of the way to the mean


def classes(vectors: np.ndarray, size: int) -> np.ndarray:
    """The class of each row: a row that has none yet, in random order, takes its nearest that have none."""
    cosines, found, number = vectors @ vectors.T, np.full(len(vectors), -1), 0
    for row in np.random.default_rng(0).permutation(len(vectors)):
        if found[row] < 0:
            free = np.flatnonzero(found < 0)
            found[free[np.argsort(-cosines[row, free])][:size]] = number
            number += 1
    return found


def moved(it: Study, before: Encoding, split: SplitName, layer: int | None, size: int) -> tuple[Tensor, Tensor]:
    """The split's words, each a STEP nearer to the mean of its class; None is classes drawn at random."""
    source, target = before.at(it.eval_index, it.rows(split))
    if layer is None:
        group = np.random.default_rng(0).permutation(len(source)) // size
    else:
        group = classes(before.at(layer, it.rows(split))[1].numpy(), size)
    means = torch.stack(
        [torch.cat([source[group == one], target[group == one]]).mean(0) for one in range(max(group) + 1)]
    )
    pairs, mean = it.pairs[it.rows(split)], means[group]

    def first(words: list[str]) -> list[int]:
        """A word of several pairs moves with the first."""
        return [words.index(word) for word in words]

    a, b = first([pair.source for pair in pairs]), first([pair.target for pair in pairs])
    return normalize(source + STEP * (mean[a] - source), dim=1), normalize(target + STEP * (mean[b] - target), dim=1)


def main() -> None:
    it = prepared(setting("experiment=early_adapter_output_loss"))
    before = study.encode_before(it, silent)
    spellings = [(pair.source, pair.target) for pair in it.words.control]
    alike = word_similarity(spellings) >= LOOK_ALIKE
    print("| classes are neighbours at layer | pairs in a class | verdict | p, random matchings | p, near words |")
    print("|---|---|---|---|---|")
    for layer in (4, 11, it.eval_index, None):
        for size in SIZES:
            after = {split: moved(it, before, split, layer, size) for split in SPLITS}
            vectors = {split: (*before.at(it.eval_index, it.rows(split)), *after[split]) for split in SPLITS}
            train, _ = gather_evidence(*vectors["train"], it.relevant("train"), permutations=1_000)
            control, unalike = (
                gather_evidence(
                    *vectors["control"],
                    it.relevant("control"),
                    permutations=1_000,
                    best_layer=before.at(4, it.rows("control")),
                    spellings=spellings,
                    among=among,
                )[0]
                for among in (None, ~alike)
            )
            found = judge(train, control, perplexity_increase=None, max_perplexity_increase=0.1, unalike=unalike)
            random = max(unalike.specificity_pvalue, unalike.scaled_specificity_pvalue)
            where = "none: drawn at random" if layer is None else str(it.layers[layer])
            print(f"| {where} | {size} | {found.label} | {random:.2g} | {unalike.near_pvalue:.2g} |", flush=True)


if __name__ == "__main__":
    main()
