"""Bilingual word lists as files hold them: TSV, CSV, JSONL, MUSE's text, and FreeDict's dictionaries."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import unicodedata
import zlib
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from src import console
from src.errors import UserError

DICTD = Path("/usr/share/dictd")  # where Debian's dict-freedict-* packages put their files

MOST_COLUMNS = 1000  # a header with more is no header

# Control characters, soft hyphens, zero-width spaces, fillers, marks that reorder text and tag characters: nobody sees
# them, and a tokenizer does. The joiners U+200C and U+200D are spelling in Arabic's and India's scripts, so only there
# kept.
_INVISIBLE = re.compile(
    r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u034f\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb"
    r"\U000e0000-\U000e007f]|(?<![\u0600-\u1cff])[\u200c\u200d]"
)


class Row(NamedTuple):
    """One pair as its file has it, not yet cleaned, and the line it begins on."""

    line: int
    source: str
    target: str


def clean(text: str) -> str:
    """A word in NFC without invisible characters, and with single spaces inside only."""
    return " ".join(unicodedata.normalize("NFC", _INVISIBLE.sub("", text)).split())


def read_rows(path: Path, source_column: str | None, target_column: str | None) -> Iterator[Row]:
    """Yields the pairs of a .tsv, .csv, .jsonl or .txt file.

    Column names default to "source" and "target". A .tsv without them has two columns and no header, unless a name
    was asked for; a .txt is MUSE's format, two words a line with a space or a tab between them. UserError names the
    file and, where there is one, the line.
    """
    columns = (source_column or "source", target_column or "target")
    chosen = source_column is not None or target_column is not None
    if columns[0] == columns[1]:
        raise UserError(f"dataset.source_column and dataset.target_column are both {columns[0]!r}: name two columns")
    match path.suffix.lower():
        case ".tsv":
            yield from _table(path, _tab_separated(_text(path)), columns, header_required=chosen)
        case ".csv":
            yield from _table(path, _comma_separated(path, _text(path)), columns, header_required=True)
        case ".jsonl":
            yield from _json_lines(path, _text(path), columns)
        case ".txt":
            if chosen:
                raise UserError(f"{path}: a .txt has no columns to choose; save it as .tsv, or name none")
            yield from _muse(path, _text(path))
        case other:
            raise UserError(f"{path}: can't tell the format from {other!r}; name it .tsv, .csv, .jsonl or .txt")


def _text(path: Path) -> str:
    try:
        if not path.exists():
            raise UserError(f"{path}: no such file; check dataset.path")
        if not path.is_file():
            raise UserError(f"{path}: not a file but a {'folder' if path.is_dir() else 'device'}; check dataset.path")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "UTF-16" if utf16 else "UTF-8"
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        before = data[: error.start].decode(encoding, "replace")
        what = "holds binary data" if "\0" in before else f"not {encoding}"
        raise UserError(f"{path}, line {_line(before)}: {what}; save it as plain text in UTF-8") from error
    if "\0" in text:
        before = text[: text.index("\0")]
        raise UserError(f"{path}, line {_line(before)}: holds binary data; save it as plain text in UTF-8")
    if not text.strip():
        raise UserError(f"{path}: is empty")
    return text


def _line(before: str) -> int:
    return len(re.findall(r"\r\n?|\n", before)) + 1


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines that aren't blank, split where an editor splits them and not at Unicode's other separators."""
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if line.strip():
            yield number, line


def _tab_separated(text: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in _lines(text):
        yield number, line.split("\t")  # a quotation mark is a character like any other


def _comma_separated(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        reason = "a quotation mark isn't closed" if "unexpected end" in str(error) else error
        raise UserError(f"{path}, line {line}: not CSV ({reason})") from error


def _table(
    path: Path, rows: Iterator[tuple[int, list[str]]], columns: tuple[str, str], *, header_required: bool
) -> Iterator[Row]:
    first = next(rows, None)
    if first is None:
        return
    names = [clean(cell).casefold() for cell in first[1][:MOST_COLUMNS]]
    wanted = [clean(column).casefold() for column in columns]
    if all(column in names for column in wanted):
        if twice := [column for column in wanted if names.count(column) > 1]:
            raise UserError(f"{path}, line {first[0]}: has two columns {twice[0]}; rename one")
        left, right = (names.index(column) for column in wanted)
    elif header_required:
        raise _no_columns(path, columns, first[1])
    else:
        left, right = 0, 1
        if len(names) > 2:
            raise _no_columns(path, columns, first[1])
        rows = chain([first], rows)
        _say_once(f"{path} has no line that names its columns: {' – '.join(map(clean, first[1]))} counts as a pair")
    for line, cells in rows:
        if max(left, right) >= len(cells):
            raise UserError(f"{path}, line {line}: has {len(cells)} of {max(left, right) + 1} columns")
        if any(cell.strip() for cell in cells[len(first[1]) :]):  # else an unquoted comma would cut a translation short
            raise UserError(f"{path}, line {line}: has {len(cells)} columns where the first line has {len(first[1])}")
        yield Row(line, cells[left], cells[right])


@cache
def _say_once(message: str) -> None:
    console.say(message)


def _no_columns(where: object, columns: tuple[str, str], found: list[str]) -> UserError:
    shown = ", ".join(" ".join(name.split())[:40] for name in found[:12])
    advice = "give them these names, or theirs in dataset.source_column and dataset.target_column"
    if len(found) == 1 and ";" in found[0]:
        advice = "it is separated by semicolons: save it with commas, or as .tsv with tabs"
    return UserError(f"{where}: has no columns {columns[0]} and {columns[1]} but {shown}; {advice}")


def _json_lines(path: Path, text: str, columns: tuple[str, str]) -> Iterator[Row]:
    for number, line in _lines(text):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            reason = f" ({error})" if type(error) is ValueError else ""
            raise UserError(f"{where}: not JSON{reason}; wants one object a line") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: wants an object such as {{{columns[0]!r}: …, {columns[1]!r}: …}}")
        if not all(column in row for column in columns):
            raise _no_columns(where, columns, list(row))
        source, targets = row[columns[0]], row[columns[1]]
        targets = targets if isinstance(targets, list) else [targets]
        if not isinstance(source, str) or not all(isinstance(target, str) for target in targets):
            raise UserError(f"{where}: {columns[0]} must be text, and {columns[1]} text or a list of texts")
        for target in targets or [""]:
            yield Row(number, source, target)


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses a key given twice, of which json would drop one."""
    found = dict(members)
    if len(found) < len(members):
        raise ValueError("a key stands there twice")
    return found


def _muse(path: Path, text: str) -> Iterator[Row]:
    for number, line in _lines(text):
        words = line.split("\t") if "\t" in line else line.split()
        if len(words) != 2:
            raise UserError(
                f"{path}, line {number}: has {len(words)} words, wants 2 with a space (or, for phrases, a tab) between"
            )
        yield Row(number, words[0], words[1])


# FreeDict --------------------------------------------------------------------------------------------------------

_NOTES = re.compile(r"\([^()]*\)|\[[^\[\]]*\]|<[^<>]*>")  # "(of a tree)", "[mus]", "<n, masc>"
_INFLECTED = re.compile(r"<[^<>]*\b(infl|cop|agr)\b")  # forms of a word that has its own entry
_NO_TRANSLATION = re.compile(r"[A-Za-z ]+:(\s|$)|Plural of\b|Inflection of\b|see\b.*\{")  # "Synonyms: {…}"
_UNUSABLE = re.compile(r"[(){}\[\]<>\"/=|:\d]|\.\.|…|\ufffd|\bsth\b|\bsb\b|\betc\b|^-|-$")


def freedict_index(pair: str | None, path: str | None) -> Path:
    """The dictd index of a FreeDict dictionary, given as a path or as a pair such as "fra-eng"; UserError if absent."""
    if path is not None:
        index = Path(path)
        if index.suffix != ".index" or not index.is_file():
            raise UserError(f"dataset.path={path}: no such dictionary; give a dictd file that ends in .index")
        return index
    if pair is None or not re.fullmatch(r"[a-z]{3}-[a-z]{3}", pair):
        raise UserError(f"dataset.pair={pair}: must be two three-letter codes such as fra-eng")
    index = DICTD / f"freedict-{pair}.index"
    if not index.is_file():
        raise UserError(
            f"dataset.pair={pair}: no FreeDict dictionary here; "
            f"apt-get install dict-freedict-{pair}, or set dataset.path to its .index file"
        )
    return index


def freedict_entries(index: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields each headword of a FreeDict dictionary with its translations, notes and grammar taken off.

    UserError if the files are damaged.
    """
    # Of pyglossary only this: its Glossary scans all plug-ins, which fills the terminal, and both it and its DictDB
    # seek back and forth in the compressed file, which takes minutes where reading it in one piece takes a second.
    from pyglossary.plugin_lib.dictdlib import b64_decode

    try:
        fields = [line.split("\t") for line in index.read_text(encoding="utf-8").rstrip("\n").split("\n")]
        places = {(b64_decode(start), b64_decode(size)) for _, start, size, *_ in fields}
        packed = index.with_suffix(".dict.dz")
        data = gzip.decompress(packed.read_bytes()) if packed.exists() else index.with_suffix(".dict").read_bytes()
        texts = [data[start : start + size].decode() for start, size in sorted(places)]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{index}: damaged, or its .dict.dz is missing; install the dictionary again") from error
    for text in texts:
        head, _, body = text.partition("\n")
        translations = _translations(body)
        if head.startswith("00-database") or _INFLECTED.search(head) or not translations:
            continue
        for headword in re.split(r"\s+[/<(\[]", head)[0].split(", "):
            yield headword.replace("‐", "-").strip(), translations


def freedict_pairs(index: Path) -> Iterator[Row]:
    """Yields a FreeDict dictionary's pairs of at most three words a side, of one word where an entry has such.

    A translation spelt like its headword is left out: any model finds it, so it measures nothing. The line is 0.
    """
    for headword, translations in freedict_entries(index):
        if _UNUSABLE.search(headword) or len(headword.split()) > 3:
            continue
        usable = [
            text
            for text in translations
            if not _UNUSABLE.search(text) and len(text.split()) <= 3 and text.casefold() != headword.casefold()
        ]
        for text in [text for text in usable if " " not in text] or usable:
            yield Row(0, headword, text)


def _translations(body: str) -> list[str]:
    found: dict[str, None] = {}
    lines = iter(body.split("\n"))
    for line in lines:
        if line.lstrip().startswith('"'):  # an example; where its translation stands on the next line, that is indented
            if line.count('"') == 2 and line.rstrip().endswith('"'):
                next(lines, None)
            continue
        text = re.sub(r"^\s*(\d+\.|;)\s*", "", line).strip()
        if _NO_TRANSLATION.match(text):
            continue
        while (bare := _NOTES.sub(" ", text)) != text:
            text = bare
        for part in re.split(r"[,;]", text.replace("‐", "-")):
            if word := " ".join(part.split()).strip(" .!?"):
                found[word] = None
    return list(found)
