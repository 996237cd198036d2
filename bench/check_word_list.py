"""Compares data/swahili_english.tsv with FreeDict's Swahili dictionaries: python -m bench.check_word_list

Needs `apt-get install dict-freedict-swh-eng dict-freedict-eng-swh`. It compares and copies nothing: FreeDict is GPL.
"""

from __future__ import annotations

import sys
from collections import defaultdict

from src import console
from src.dictionaries import freedict_entries, freedict_index
from src.errors import UserError
from src.pairs import Pair, read_pairs

AMERICAN = {"neighbour": "neighbor", "colour": "color", "harbour": "harbor"}  # FreeDict has both spellings


def main() -> None:
    """Prints how many pairs the dictionaries confirm, differ on and lack, and those they differ on."""
    swahili, english = _dictionary("swh-eng"), _dictionary("eng-swh")
    pairs = read_pairs(source="builtin").pairs
    confirmed, differing, lacking = [], [], []
    for pair in pairs:
        words = _headwords(pair)
        targets = {pair.target, AMERICAN.get(pair.target, pair.target)}
        here = set().union(*(swahili.get(word, set()) for word in words))
        if targets & here or any(words & english.get(target, set()) for target in targets):
            confirmed.append(pair)
        elif here:
            differing.append((pair, here))
        else:
            lacking.append(pair)
    print(f"{len(pairs)} pairs: {len(confirmed)} confirmed, {len(differing)} differ, {len(lacking)} not in FreeDict")
    for pair, here in differing:
        print(f"  differs: {pair.source} = {pair.target}; FreeDict has {', '.join(sorted(here))}")
    print(f"  not in FreeDict: {', '.join(pair.source for pair in lacking)}")


def _dictionary(pair: str) -> dict[str, set[str]]:
    words: dict[str, set[str]] = defaultdict(set)
    for headword, translations in freedict_entries(freedict_index(pair, None)):
        words[headword.casefold()].update(text.casefold() for text in translations)
    return dict(words)


def _headwords(pair: Pair) -> set[str]:
    """The word as FreeDict may list it: it has verbs by their stem, "la" for kula and "enda" for kwenda."""
    is_verb = pair.source.startswith(("ku", "kw")) and len(pair.source) > 3
    return {pair.source, pair.source[2:]} if is_verb else {pair.source}


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        console.fail(str(error))
        sys.exit(2)
