"""Word pairs: read, cleaned, and split so that no word of the control pairs is trained on, with or without accents."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from src import files
from src.dictionaries import Row, clean, freedict_index, freedict_pairs, read_rows
from src.errors import UserError

if TYPE_CHECKING:
    from src.config import DatasetConfig

with suppress(ModuleNotFoundError):  # shapes are checked in tests; a bare GPU machine need not have jaxtyping
    from jaxtyping import Int

BUILT_IN = Path(__file__).resolve().parents[1] / "data" / "swahili_english.tsv"
LONGEST_WORD = 1000  # characters; anything longer is a file in the wrong format

_LANGUAGES = {
    "afr": "Afrikaans", "ara": "Arabic", "bre": "Breton", "ces": "Czech", "ckb": "Central Kurdish", "cym": "Welsh",
    "dan": "Danish", "deu": "German", "ell": "Greek", "eng": "English", "epo": "Esperanto", "fin": "Finnish",
    "fra": "French", "gla": "Scottish Gaelic", "gle": "Irish", "hin": "Hindi", "hrv": "Croatian", "hun": "Hungarian",
    "isl": "Icelandic", "ita": "Italian", "jpn": "Japanese", "kha": "Khasi", "kmr": "Northern Kurdish",
    "kur": "Kurdish", "lat": "Latin", "lit": "Lithuanian", "mkd": "Macedonian", "nld": "Dutch", "nor": "Norwegian",
    "oci": "Occitan", "pol": "Polish", "por": "Portuguese", "rom": "Romany", "rus": "Russian", "san": "Sanskrit",
    "slk": "Slovak", "spa": "Spanish", "srp": "Serbian", "swe": "Swedish", "swh": "Swahili", "tur": "Turkish",
    "wol": "Wolof",
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A word and one of its translations."""

    source: str
    target: str


@dataclass(frozen=True)
class Lexicon:
    """Cleaned, distinct pairs, where they come from, and the SHA-256 of their words."""

    pairs: tuple[Pair, ...]
    source_language: str
    target_language: str
    origin: str
    digest: str


@dataclass(frozen=True)
class Split:
    """A lexicon's pairs, each in one of two sides that share no word."""

    train: tuple[Pair, ...]
    control: tuple[Pair, ...]


def read_pairs(
    *,
    source: Literal["builtin", "freedict", "file"],
    path: str | None = None,
    pair: str | None = None,
    source_column: str | None = None,
    target_column: str | None = None,
    source_language: str | None = None,
    target_language: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Lexicon:
    """Reads a word list and cleans it, keeping at most `limit` pairs (whole words, drawn by `seed`).

    `builtin` is the list in data/, `freedict` the dictionary `pair` or the index at `path`, `file` the list at `path`
    with these columns. UserError names the file and line, or the key, that needs mending.

    What a list may hold, and what becomes of it: UTF-8, or UTF-16 with its mark; any line ends; empty lines are
    skipped. Words come in NFC, without invisible characters (control, zero-width and direction marks, soft hyphens; but
    with the joiners where they are spelling), inner whitespace as single spaces. A pair listed twice counts once; a
    word's several translations are all right ones; upper case, emoji and formulas are text like any other. Refused:
    other encodings, binary data, empty cells, cells beyond the header, columns or keys named twice, letters that an
    earlier conversion lost (U+FFFD), more than LONGEST_WORD characters.
    """
    if limit is not None and limit < 1:
        raise UserError(f"dataset.limit={limit}: must be at least 1, or null for all pairs")
    match source:
        case "builtin":
            origin, languages = f"data/{BUILT_IN.name}", ("Swahili", "English")
            rows = read_rows(BUILT_IN, None, None)
        case "freedict":
            index = freedict_index(pair, path)
            origin, languages = str(index), _languages(index)
            rows = freedict_pairs(index)
        case "file":
            if path is None:
                raise UserError("dataset.path is not set: give the word list, a .tsv, .csv, .jsonl or .txt file")
            origin, languages = path, ("source", "target")
            rows = read_rows(Path(path), source_column, target_column)
    pairs = _cleaned(rows, origin)
    if not pairs:
        raise UserError(f"{origin}: holds no word pairs")
    if limit is not None and limit < len(pairs):
        pairs = _sample(pairs, limit, seed)
    return Lexicon(
        pairs=tuple(pairs),
        source_language=source_language or languages[0],
        target_language=target_language or languages[1],
        origin=origin,
        digest=files.digest(*(word for pair in pairs for word in (pair.source, pair.target))),
    )


def read_words(config: DatasetConfig) -> tuple[Lexicon, Split]:
    """The cleaned pairs that the config names, and their split. Raises UserError naming the file, line or key."""
    values = asdict(config)
    control_size = values.pop("control_size")
    lexicon = read_pairs(**values)
    return lexicon, split(lexicon, control_size=control_size, seed=config.seed)


def split(lexicon: Lexicon, *, control_size: int, seed: int) -> Split:
    """Sets `control_size` pairs aside such that no word, of either language, is on both sides.

    Spellings that differ in case or accents alone are one word here (`without_marks`). Pairs linked by a shared word
    stay together. Inflections of a word may still part: `src.leakage` counts them. The draw depends on `seed` and the
    pairs alone, not on their order or the Python version. UserError says which sizes are possible when this one is not.
    """
    groups = [[lexicon.pairs[i] for i in group] for group in _linked(lexicon.pairs)]
    groups.sort(key=lambda group: files.digest(str(seed), *min((pair.source, pair.target) for pair in group)))
    sizes = [len(group) for group in groups]
    largest = len(lexicon.pairs) - 2  # both sides need two pairs: a mismatched cosine is between two
    chosen = _adding_up(sizes, control_size) if 2 <= control_size <= largest else None
    if chosen is None:
        raise UserError(_possible_sizes(lexicon, sizes, control_size, largest))
    control = {pair for number in chosen for pair in groups[number]}
    return Split(
        train=tuple(pair for pair in lexicon.pairs if pair not in control),
        control=tuple(pair for pair in lexicon.pairs if pair in control),
    )


def relevant(pairs: Sequence[Pair], listed: Sequence[Pair]) -> Int[np.ndarray, "n k"]:
    """Row i: the columns j, i among them, whose target is a listed translation of source i; padded with -1."""
    columns: dict[str, list[int]] = defaultdict(list)
    for column, pair in enumerate(pairs):
        columns[word_key(pair.target)].append(column)
    translations: dict[str, set[str]] = defaultdict(set)
    for pair in (*listed, *pairs):
        translations[word_key(pair.source)].add(word_key(pair.target))
    rows = [sorted(c for word in translations[word_key(pair.source)] for c in columns.get(word, ())) for pair in pairs]
    table = np.full((len(rows), max(map(len, rows), default=0)), -1, dtype=np.int64)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table


def word_key(word: str) -> str:
    """What makes two spellings the same word: NFC, whatever the case."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", word).casefold())


def without_marks(word: str) -> str:
    """The word without case, accents, vowel points or other marks that Unicode combines with a letter; in NFC.

    What makes two words look the same to the split and to `src.spelling`; `word_key` tells them apart where right
    answers are listed. Letters of their own, such as "ø" or "œ", stay.
    """
    letters = unicodedata.normalize("NFD", word_key(word))
    return unicodedata.normalize("NFC", "".join(letter for letter in letters if not unicodedata.combining(letter)))


def _languages(index: Path) -> tuple[str, str]:
    codes = re.fullmatch(r"(?:freedict-)?([a-z]{3})-([a-z]{3})", index.stem)
    if codes is None:
        return "source", "target"
    return _LANGUAGES.get(codes[1], codes[1]), _LANGUAGES.get(codes[2], codes[2])


def _cleaned(rows: Iterable[Row], origin: str) -> list[Pair]:
    pairs: dict[Pair, None] = {}
    for row in rows:
        where = f"{origin}, line {row.line}" if row.line else origin
        for side, word in (("source", row.source), ("target", row.target)):
            if len(word) > LONGEST_WORD:
                raise UserError(f"{where}: the {side} has {len(word)} characters, more than a word ({LONGEST_WORD})")
            if re.search(r"[\ud800-\udfff]", word):
                raise UserError(f"{where}: the {side} holds half of a surrogate pair; write the character itself")
            if re.search(r"[\ufffd-\uffff]", word):
                raise UserError(f"{where}: the {side} has lost a letter (U+FFFD stands there); convert the file anew")
        pair = Pair(clean(row.source), clean(row.target))
        if not pair.source or not pair.target:
            raise UserError(f"{where}: the {'target' if pair.source else 'source'} is empty; fill it or drop the line")
        pairs[pair] = None
    return list(pairs)


def _sample(pairs: list[Pair], limit: int, seed: int) -> list[Pair]:
    """Exactly `limit` pairs: source words with all their translations, so that every right answer stays listed.

    Only where no whole word fits any more does one lose translations.
    """
    words: dict[str, list[int]] = defaultdict(list)
    for i, pair in enumerate(pairs):
        words[word_key(pair.source)].append(i)
    order = sorted(words, key=lambda word: files.digest("limit", str(seed), word))
    kept: set[int] = set()
    left_out: list[int] = []
    for word in order:
        members = words[word]
        if len(kept) + len(members) <= limit:
            kept.update(members)
        else:
            left_out += members
    kept.update(left_out[: limit - len(kept)])
    return [pair for i, pair in enumerate(pairs) if i in kept]


def _linked(pairs: Sequence[Pair]) -> list[list[int]]:
    """The connected components of the graph whose nodes are words and whose edges are pairs, as pair indices.

    A word is one node whichever language it stands in: a string trained on as source is no unseen target. Accents
    don't tell words apart here: "marché" and "marche" stay on one side.
    """
    parent: dict[str, str] = {}

    def root(word: str) -> str:
        parent.setdefault(word, word)
        while parent[word] != word:
            parent[word] = word = parent[parent[word]]
        return word

    for pair in pairs:
        parent[root(without_marks(pair.source))] = root(without_marks(pair.target))
    groups: dict[str, list[int]] = defaultdict(list)
    for i, pair in enumerate(pairs):
        groups[root(without_marks(pair.source))].append(i)
    return list(groups.values())


def _adding_up(sizes: list[int], total: int) -> list[int] | None:
    """Positions of sizes that add up to `total`, early ones first where that works; None if no choice does."""
    chosen: list[int] = []
    left = total
    for position, size in enumerate(sizes):
        if size <= left:
            chosen.append(position)
            left -= size
    if left == 0:
        return chosen
    positions: dict[int, list[int]] = defaultdict(list)
    for position, size in enumerate(sizes):
        positions[size].append(position)
    distinct = sorted(positions)
    sums = [1]  # sums[i], bit s: some choice among the i smallest distinct sizes adds up to s
    for size in distinct:
        sums.append(_with_sizes(sums[-1], size, len(positions[size]), total))
    if not sums[-1] >> total & 1:
        return None
    chosen, left = [], total
    for i in reversed(range(len(distinct))):
        size, count = distinct[i], 0
        while not sums[i] >> (left - count * size) & 1:
            count += 1
        chosen += positions[size][:count]
        left -= count * size
    return chosen


def _with_sizes(sums: int, size: int, count: int, largest: int) -> int:
    """The sums up to `largest` when up to `count` more of this size may be added, in log(count) shifts."""
    step = 1
    while count > 0:
        step = min(step, count)
        sums |= sums << size * step
        sums &= (1 << largest + 1) - 1
        count -= step
        step *= 2
    return sums


def _possible_sizes(lexicon: Lexicon, sizes: list[int], wanted: int, largest: int) -> str:
    sums = 1
    for size, count in Counter(sizes).items():
        sums = _with_sizes(sums, size, count, max(largest, 0))
    possible = [total for total in range(2, largest + 1) if sums >> total & 1]
    start = f"dataset.control_size={wanted}: {lexicon.origin} has {len(lexicon.pairs)} pairs"
    if not possible:
        return f"{start}, too few that share no word to set any two aside; give a longer list"
    if wanted < possible[0] or wanted > possible[-1]:
        return f"{start}, so it can be {possible[0]} to {possible[-1]}"
    below = max(total for total in possible if total < wanted)
    above = min(total for total in possible if total > wanted)
    return (
        f"{start}, and those that share a word stay together, so it can be {possible[0]} to {possible[-1]} "
        f"but not this; {below} and {above} are the nearest"
    )
