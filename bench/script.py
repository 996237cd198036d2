"""Peer (a) as a whole program: load, encode, train, encode again, t-tests. python -m bench.script FOLDER [BLOCK ...]"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from bench import peers
from bench.peers import Task
from src.pairs import read_pairs, split


def main() -> None:
    from scipy import stats

    warnings.simplefilter("ignore")
    words = split(read_pairs(source="builtin"), control_size=63, seed=0)
    adapted = [int(block) for block in sys.argv[2:]] or [1, 2]
    task = Task(tuple(block - 1 for block in adapted), read=max(adapted), loss="triplet", epochs=3)
    model, tokenizer = peers.peft_model(Path(sys.argv[1]), task)
    pairs = [(pair.source, pair.target) for pair in words.train + words.control]
    everything = [word for pair in pairs for word in pair]
    before = peers.encode_peft(model, tokenizer, everything)
    peers.train_peft(model, tokenizer, pairs[: len(words.train)], task)
    after = peers.encode_peft(model, tokenizer, everything)
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        cosines = [(vectors[0::2] * vectors[1::2]).sum(1) for vectors in (old, new)]
        for name, rows in (("train", slice(len(words.train))), ("control", slice(len(words.train), None))):
            was, now = (values[rows] for values in cosines)
            print(layer, name, was.mean().item(), now.mean().item(), stats.ttest_rel(now, was).pvalue)


if __name__ == "__main__":
    main()
