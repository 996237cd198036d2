"""Bad and odd input as tables: each is taken with a stated normalisation, or refused in one line that says where."""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src.config import refuse_odd_options
from src.errors import UserError
from src.pairs import read_pairs
from tests.conftest import run_command
from tests.test_config import composed, config

KULA = [("kula", "eat")]
BOTH = [("kula", "eat"), ("lala", "sleep")]
E_ACUTE = "e\u0301"

# Pair files --------------------------------------------------------------------------------------------------------
# id: (file name, content, what comes of it: the pairs, or what the refusal says)

FILES: dict[str, tuple[str, str | bytes, list[tuple[str, str]] | str]] = {
    # encodings
    "utf-8 with a mark": ("a.tsv", codecs.BOM_UTF8 + b"kula\teat\n", KULA),
    "utf-8 with two marks": ("a.csv", codecs.BOM_UTF8 * 2 + b"source,target\nkula,eat\n", KULA),
    "utf-16 little-endian": ("a.csv", codecs.BOM_UTF16_LE + "source,target\nkula,eat\n".encode("utf-16-le"), KULA),
    "utf-16 big-endian": ("a.csv", codecs.BOM_UTF16_BE + "source,target\nkula,eat\n".encode("utf-16-be"), KULA),
    "utf-16 without a mark": ("a.csv", "source,target\nkula,eat\n".encode("utf-16-le"), "line 1: holds binary data"),
    "utf-32": ("a.csv", "source,target\nkula,eat\n".encode("utf-32"), "line 1: holds binary data"),
    "utf-16 cut in half": ("a.tsv", codecs.BOM_UTF16_LE + b"k\0u\0l", "line 1: not UTF-16"),
    "utf-16 lone surrogate": ("a.tsv", codecs.BOM_UTF16_LE + b"k\0\n\0\x00\xd8k\0", "line 2: not UTF-16"),
    "latin-1": ("a.tsv", "kula\teat\nfenêtre\twindow\n".encode("latin-1"), "line 2: not UTF-8"),
    "windows-1252 quotes": ("a.tsv", b"kula\teat\n\x93kula\x94\teat\n", "line 2: not UTF-8"),
    "shift-jis": ("a.tsv", "猫\tcat\n".encode("shift-jis"), "line 1: not UTF-8"),
    "gbk": ("a.csv", "source,target\n词,word\n".encode("gbk"), "line 2: not UTF-8"),
    "overlong utf-8": ("a.tsv", b"k\xc0\xafla\teat\n", "line 1: not UTF-8"),
    "utf-8 of a surrogate": ("a.tsv", b"k\xed\xa0\x80la\teat\n", "line 1: not UTF-8"),
    "utf-8 cut in a character": ("a.tsv", b"kula\teat\nmoto\tfi\xc3", "line 2: not UTF-8"),
    "latin-1 after old line ends": ("a.tsv", b"kula\teat\rlala\tsl\xe9\r", "line 2: not UTF-8"),
    "an earlier conversion's damage": ("a.tsv", "kula\teat\nfen\ufffdtre\twindow\n", "line 2: the source has lost"),
    "a character that is none": ("a.tsv", "kula\te\uffffat\n", "line 1: the target has lost a letter"),
    # binary data and other formats
    "a NUL": ("a.tsv", b"kula\teat\nla\0la\tsleep\n", "line 2: holds binary data"),
    "a NUL at the very end": ("a.tsv", b"kula\teat\n\0", "line 2: holds binary data"),
    "NULs alone": ("a.tsv", b"\0" * 4096, "line 1: holds binary data"),
    "gzip": ("a.tsv", b"\x1f\x8b\x08\x00kula", "line 1: not UTF-8"),
    "gzip by name": ("a.tsv.gz", b"\x1f\x8b\x08\x00", "can't tell the format from '.gz'"),
    "a spreadsheet by name": ("a.xls", b"kula", "can't tell the format from '.xls'"),
    "a spreadsheet renamed": ("a.csv", b"PK\x03\x04\x14\x00\x06\x00", "line 1: holds binary data"),
    "no suffix": ("words", b"kula\teat\n", "can't tell the format from ''"),
    "json for jsonl": ("a.json", b"{}", "can't tell the format from '.json'"),
    "a web page": ("a.tsv", b"<html>\n<body>\n", "line 1: has 1 of 2 columns"),
    # long lines and cells
    "10 MB without a tab": ("a.tsv", b"x" * 10_000_000, "line 1: has 1 of 2 columns"),
    "10 MB in a cell": ("a.tsv", b"kula\teat\nkula\t" + b"x" * 10_000_000, "line 2: the target has 10000000"),
    "10 MB of tabs": ("a.tsv", b"kula\teat\n" + b"\t" * 10_000_000 + b"x", "line 2: has 10000001 columns"),
    "10 MB of csv": ("a.csv", b"source,target\nkula," + b"x" * 10_000_000, "line 2: not CSV"),
    "10 MB of header": ("a.csv", b"x" * 100_000 + b"," * 10_000_000, "has no columns source and target but xxx"),
    "10 MB of open quotation": ("a.csv", b'source,target\nkula,"' + b"eat\n" * 2_500_000, "line 2: not CSV"),
    "10 MB of json": ("a.jsonl", b'{"source": "' + b"x" * 10_000_000 + b'", "target": "y"}', "line 1: the source has"),
    "10 MB of json keys": ("a.jsonl", b'{"' + b"x" * 10_000_000 + b'": 1}', "line 1: has no columns source and target"),
    "10 MB of one word": ("a.txt", b"x" * 10_000_000, "line 1: has 1 words"),
    "10 MB of spaces": ("a.tsv", b" " * 10_000_000, "is empty"),
    "10 MB of spaces around": ("a.tsv", b" " * 5_000_000 + b"kula\teat", "line 1: the source has"),
    "1000 characters": ("a.tsv", "x" * 1000 + "\teat", [("x" * 1000, "eat")]),
    "1000 emoji": ("a.tsv", "🍎" * 1000 + "\tapple", [("🍎" * 1000, "apple")]),
    # line ends
    "windows": ("a.tsv", b"kula\teat\r\nlala\tsleep\r\n", BOTH),
    "old mac": ("a.tsv", b"kula\teat\rlala\tsleep\r", BOTH),
    "mixed": ("a.tsv", b"kula\teat\r\n\n\rlala\tsleep", BOTH),
    "doubled carriage returns": ("a.csv", b"source,target\r\r\nkula,eat\r\r\nlala,sleep\r\r\n", BOTH),
    "unicode's own line ends": ("a.tsv", "ku\u2028la\te\u2029at\n", [("ku la", "e at")]),
    "a form feed and a vertical tab": ("a.tsv", "ku\x0cla\te\x0bat\n", [("ku la", "e at")]),
    "the line is told after blank ones": ("a.tsv", b"\n\r\n\rkula\teat\n\nlala\n", "line 6: has 1 of 2 columns"),
    # marks that nobody sees
    "right-to-left marks": ("a.tsv", "\u200fכלב\u200f\t\u200edog\u200e\n", [("כלב", "dog")]),
    "an override of direction": ("a.tsv", "\u202eatal\u202c\tsleep\n", [("atal", "sleep")]),
    "isolates": ("a.tsv", "\u2067kula\u2069\t\u2066eat\u2069\n", KULA),
    "an Arabic letter mark": ("a.tsv", "\u061cكلب\tdog\n", [("كلب", "dog")]),
    "a zero-width space": ("a.tsv", "ku\u200bla\teat\n", KULA),
    "a word joiner": ("a.tsv", "ku\u2060la\teat\n", KULA),
    "a mark inside": ("a.tsv", "ku\ufeffla\teat\n", KULA),
    "soft hyphens": ("a.tsv", "ku\u00adla\tea\u00adt\n", KULA),
    "hangul's filler": ("a.tsv", "ku\u3164la\teat\n", KULA),
    "a grapheme joiner": ("a.tsv", "ku\u034fla\teat\n", KULA),
    "annotation marks": ("a.tsv", "\ufff9kula\ufffb\teat\n", KULA),
    "tag characters": ("a.tsv", "kula\U000e0041\U000e007f\teat\n", KULA),
    "a terminal's colours": ("a.tsv", "\x1b[31mkula\teat\n", [("[31mkula", "eat")]),
    "invisible alone": ("a.tsv", "kula\teat\n\u200b\u200e\tsleep\n", "line 2: the source is empty"),
    "a filler alone": ("a.tsv", "kula\t\u3164\n", "line 1: the target is empty"),
    "in the header": ("a.tsv", "\u200bsource\ttar\u00adget\nkula\teat\n", KULA),
    "joiners where they are spelling": ("a.tsv", "می\u200cخواهم\tI want\n", [("می\u200cخواهم", "I want")]),
    "joiners where they are not": ("a.tsv", "ku\u200cla\te\u200dat\n", KULA),
    # spaces
    "spaces of all kinds": ("a.tsv", "\u00a0ku\u2003\u3000la \te\u202fat\n", [("ku la", "e at")]),
    "spaces alone": ("a.tsv", "kula\t\u00a0\u3000\n", "line 1: the target is empty"),
    "spaces in the header": ("a.csv", " Source , TARGET \nkula,eat\n", KULA),
    # letters
    "nfd": ("a.tsv", f"{E_ACUTE}le\u0300ve\tpupil\n", [("élève", "pupil")]),
    "nfc and nfd twins": ("a.tsv", f"caf{E_ACUTE}\tcoffee\ncafé\tcoffee\n", [("café", "coffee")]),
    "twins by an invisible mark": ("a.tsv", "kula\teat\nku\u200bla\teat\n", KULA),
    "twins by spaces": ("a.tsv", "kula\tto eat\nkula\tto  eat \n", [("kula", "to eat")]),
    "twins by case stay two": ("a.tsv", "Kula\teat\nkula\teat\n", [("Kula", "eat"), ("kula", "eat")]),
    "hangul jamo": ("a.tsv", "\u1112\u1161\u11ab\tone\n", [("한", "one")]),
    "marks in another order": ("a.tsv", "q\u0307\u0323\tq\nq\u0323\u0307\tq\n", [("q\u0323\u0307", "q")]),
    "a mark without a letter": ("a.tsv", "\u0301\tacute\n", [("\u0301", "acute")]),
    "a hundred marks on a letter": ("a.tsv", "z" + "\u0337" * 100 + "\tz\n", [("z" + "\u0337" * 100, "z")]),
    "the ohm is an omega": ("a.tsv", "\u2126\tohm\n", [("Ω", "ohm")]),
    "ligatures stay": ("a.tsv", "ﬁn\tend\n", [("ﬁn", "end")]),
    "emoji": ("a.tsv", "🍎\tapple\n", [("🍎", "apple")]),
    "emoji with a skin": ("a.tsv", "👍🏾\tgood\n", [("👍🏾", "good")]),
    "a flag": ("a.tsv", "🇹🇿\tTanzania\n", [("🇹🇿", "Tanzania")]),
    "beyond the first plane": ("a.tsv", "𒀀\twater\n𞤀\ta\n", [("𒀀", "water"), ("𞤀", "a")]),
    "digits and marks": ("a.tsv", "1\tone\n?\tquestion mark\n", [("1", "one"), ("?", "question mark")]),
    "the same word on both sides": ("a.tsv", "redio\tredio\n", [("redio", "redio")]),
    # rows
    "listed twice": ("a.tsv", "kula\teat\nkula\teat\nkula\teat\n", KULA),
    "several translations": ("a.tsv", "kula\teat\nkula\tdine\n", [("kula", "eat"), ("kula", "dine")]),
    "several words of one translation": ("a.tsv", "kula\teat\nla\teat\n", [("kula", "eat"), ("la", "eat")]),
    "both ways round": ("a.tsv", "kula\teat\neat\tkula\n", [("kula", "eat"), ("eat", "kula")]),
    "no target": ("a.tsv", b"kula\teat\nlala\t\n", "line 2: the target is empty"),
    "no source": ("a.csv", b"source,target\nkula,eat\n,sleep\n", "line 3: the source is empty"),
    "an unquoted comma": ("a.csv", b"source,target\nkula,eat, dine\n", "line 2: has 3 columns where the first"),
    "commas at the end": ("a.csv", b"source,target\nkula,eat,,\n", KULA),
    "a third cell under a header": ("a.tsv", b"source\ttarget\nkula\teat\tdine\n", "line 2: has 3 columns where"),
    "a tab at the end": ("a.tsv", b"source\ttarget\nkula\teat\t\n", KULA),
    "a short row": ("a.csv", b"id,source,target\n1,kula,eat\n2,lala\n", "line 3: has 2 of 3 columns"),
    # columns
    "one column": ("a.csv", b"source\nkula\n", "has no columns source and target but source"),
    "other names": ("a.csv", b"swahili,english\nkula,eat\n", "but swahili, english; give them these names"),
    "semicolons": ("a.csv", b"source;target\nkula;eat\n", "but source;target; it is separated by semicolons"),
    "excel's separator line": ("a.csv", b"sep=,\nsource,target\nkula,eat\n", "no columns source and target but sep=,"),
    "a column twice": ("a.csv", b"source,target,Target\nkula,eat,dine\n", "line 1: has two columns target"),
    "a column twice in a tsv": ("a.tsv", b"source\tsource\ttarget\nku\tla\teat\n", "line 1: has two columns source"),
    "a header alone": ("a.tsv", b"source\ttarget\n", "holds no word pairs"),
    "three columns without a header": ("a.tsv", b"1\tkula\teat\n", "has no columns source and target but 1, kula, eat"),
    "spaces for tabs": ("a.tsv", b"kula eat\n", "line 1: has 1 of 2 columns"),
    # formulas and quotation marks
    "a formula": ("a.csv", 'source,target\n"=HYPERLINK(""http://x"")",+1\n', [('=HYPERLINK("http://x")', "+1")]),
    "formulas' first signs": ("a.tsv", "=1+1\t@SUM(A1)\n-kula\t|eat\n", [("=1+1", "@SUM(A1)"), ("-kula", "|eat")]),
    "markup": ("a.tsv", "<b>kula</b>\t&amp;\n", [("<b>kula</b>", "&amp;")]),
    "an open quotation": ("a.csv", b'source,target\n"kula,eat\n', "line 2: not CSV"),
    "text behind a quotation": ("a.csv", b'source,target\n"ku"la,eat\n', "line 2: not CSV"),
    "a quotation mark inside": ("a.csv", b'source,target\nku"la,eat\n', [('ku"la', "eat")]),
    "quotation marks in a tsv": ("a.tsv", b'"kula"\teat\n', [('"kula"', "eat")]),
    "a line break in a cell": ("a.csv", b'source,target\n"ku\nla",eat\nx,\n', "line 4: the target is empty"),
    # jsonl
    "json: a key twice": ("a.jsonl", b'{"source": "a", "source": "kula", "target": "eat"}', "line 1: not JSON (a key"),
    "json: null": ("a.jsonl", b'{"source": null, "target": "eat"}', "line 1: source must be text"),
    "json: a number": ("a.jsonl", b'{"source": "kula", "target": 1e999}', "line 1: source must be text, and target"),
    "json: a truth": ("a.jsonl", b'{"source": true, "target": "eat"}', "line 1: source must be text"),
    "json: a list in a list": ("a.jsonl", b'{"source": "kula", "target": [["eat"]]}', "line 1: source must be text"),
    "json: a list of sources": ("a.jsonl", b'{"source": ["kula"], "target": "eat"}', "line 1: source must be text"),
    "json: an object": ("a.jsonl", b'{"source": {}, "target": "eat"}', "line 1: source must be text"),
    "json: an empty text in a list": ("a.jsonl", b'{"source": "a", "target": ["b", ""]}', "the target is empty"),
    "json: a number of 10,000 digits": ("a.jsonl", b'{"source": ' + b"9" * 10_000 + b"}", "line 1: not JSON"),
    "json: a NUL": ("a.jsonl", b'{"source": "ku\\u0000la", "target": "eat"}', KULA),
    "json: half of a pair": ("a.jsonl", b'{"source": "a", "target": "\\udc00"}', "line 1: the target holds half of a"),
    "json: single quotes": ("a.jsonl", b"{'source': 'kula', 'target': 'eat'}", "line 1: not JSON"),
    "json: a comma at the end": ("a.jsonl", b'{"source": "kula", "target": "eat"},\n', "line 1: not JSON"),
    "json: over several lines": ("a.jsonl", b'{\n"source": "kula", "target": "eat"}', "line 1: not JSON"),
    "json: one list of all": ("a.jsonl", b'[{"source": "kula", "target": "eat"}]', "line 1: wants an object"),
    "json: keys in another case": ("a.jsonl", b'{"Source": "kula", "target": "eat"}', "line 1: has no columns source"),
    # muse
    "muse: a phrase": ("a.txt", b"kula to eat\n", "line 1: has 3 words"),
    "muse: a phrase with a tab": ("a.txt", b"kula\tto eat\n", [("kula", "to eat")]),
    "muse: a word alone": ("a.txt", b"kula eat\nlala\n", "line 2: has 1 words"),
    "muse: a hard space": ("a.txt", "kula to\u00a0eat\n", "line 1: has 3 words"),
    # nothing
    "empty": ("a.jsonl", b"", "is empty"),
    "a mark alone": ("a.tsv", codecs.BOM_UTF8, "is empty"),
    "blank lines": ("a.csv", b"\r\n\r\n \n", "is empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_pair_file_is_read_as_stated_or_refused_with_its_line(tmp_path: Path, case: str) -> None:
    name, content, expected = FILES[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(expected, list):
        lexicon = read_pairs(source="file", path=str(path))
        assert [(pair.source, pair.target) for pair in lexicon.pairs] == expected
        return
    with pytest.raises(UserError) as refused:
        read_pairs(source="file", path=str(path))
    said = str(refused.value)
    assert said.startswith(str(path)) and expected in said
    assert "\n" not in said and len(said) < 400 + len(str(path))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"path": "x" * 5000 + ".tsv"}, "can't be read (File name too long)"),
        ({"path": "loop.tsv"}, "loop.tsv: no such file"),
        ({"path": "pipe.tsv"}, "pipe.tsv: not a file but a device"),
        ({"path": "a.csv", "source_column": "target"}, "source_column and dataset.target_column are both 'target'"),
        ({"path": "a.csv", "source_column": "nosuch"}, "has no columns nosuch and target but source, target"),
        ({"path": "a.csv", "source_column": ""}, None),
        ({"path": "a.txt", "source_column": "source"}, "a.txt: a .txt has no columns to choose"),
    ],
)  # fmt: skip
def test_places_and_columns_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], said: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop.tsv").symlink_to("loop.tsv")
    os.mkfifo("pipe.tsv")
    Path("a.csv").write_text("source,target\nkula,eat\n")
    Path("a.txt").write_text("kula eat\n")
    if said is None:  # an empty name is none
        assert len(read_pairs(source="file", **options).pairs) == 1  # pyright: ignore[reportArgumentType]
        return
    with pytest.raises(UserError, match=re.escape(said)):
        read_pairs(source="file", **options)  # pyright: ignore[reportArgumentType]


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=80), st.text(max_size=60).map(str.encode)), suffix=st.sampled_from("tcjm"))
def test_no_bytes_at_all_give_anything_but_clean_pairs_or_one_line(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / {"t": "a.tsv", "c": "a.csv", "j": "a.jsonl", "m": "a.txt"}[suffix]
    path.write_bytes(content)
    try:
        pairs = read_pairs(source="file", path=str(path)).pairs
    except UserError as error:
        assert str(error).startswith(str(path)) and len(str(error).splitlines()) == 1
        return
    assert pairs and len(set(pairs)) == len(pairs)
    for word in (word for pair in pairs for word in (pair.source, pair.target)):
        assert word and word == unicodedata.normalize("NFC", " ".join(word.split()))
        assert not {unicodedata.category(character) for character in word} & {"Cc", "Cs", "Zl", "Zp"}


CELLS = st.text(st.characters(exclude_categories=["C"], exclude_characters="\ufffd\u034f\u3164\uffa0"), min_size=1)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CELLS, CELLS).filter(lambda pair: all(cell.strip() for cell in pair)), min_size=1))
def test_the_formats_agree_on_what_a_list_holds(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("source", "target"), *rows])
    lines = [json.dumps({"source": source, "target": target}) for source, target in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = [read_pairs(source="file", path=str(tmp_path / name)).pairs for name in ("a.csv", "a.jsonl")]
    assert found[0] == found[1]
    assert {unicodedata.normalize("NFC", " ".join(source.split())) for source, _ in rows} == {
        pair.source for pair in found[0]
    }


# Overrides ---------------------------------------------------------------------------------------------------------
# id: what is written on the command line: what the refusal says

REFUSED = {
    # types
    "lora.rank=1.5": "'1.5' of type 'float' could not be converted to Integer",
    "lora.rank=true": "lora.rank=true",
    "lora.rank=many": "lora.rank=many",
    "lora.rank=null": "field 'lora.rank' is not Optional",
    "lora.rank=": "lora.rank=; Value ''",
    "lora.rank=1e3": "lora.rank=1e3",
    "lora.rank={a:1}": "lora.rank={a:1}",
    "lora.alpha=many": "lora.alpha=many",
    "lora.use_dora=perhaps": "'perhaps' is not a valid bool",
    "model.trust_remote_code=maybe": "'maybe' is not a valid bool",
    "sweep.dry_run=maybe": "sweep.dry_run=maybe",
    "dataset.limit=1e2": "dataset.limit=1e2",
    "dataset.seed=null": "dataset.seed",
    "train.epochs=0.5": "train.epochs=0.5",
    "train.learning_rate=true": "train.learning_rate=true",
    "eval.template=null": "eval.template",
    "lora.layers='1'": "lora.layers=1: 1 is not possible",
    "lora.layers=null": "lora.layers=None: None is not possible",
    "lora.layers=1-3": "lora.layers=1-3",
    "lora.layers=nan": "lora.layers=nan",
    # lists and tables where scalars belong, and the other way round
    "lora.rank=[1,2]": "lora.rank=[1,2]",
    "lora.alpha=[1]": "lora.alpha=[1]",
    "model.id=[a]": "model.id=[a]",
    "model.id={a:b}": "model.id={a:b}",
    "dataset.path=[a]": "dataset.path=[a]",
    "tracking.uri=[a]": "tracking.uri=[a]",
    "tracking.experiment=[a]": "tracking.experiment=[a]",
    "eval.template=[a]": "eval.template=[a]",
    "lora.layers=[[1,2]]": "lora.layers=[[1, 2]]: [1, 2] is not possible",
    "lora.layers=[{a:1}]": "lora.layers=[{'a': 1}]",
    "lora.layers={a:1}": "lora.layers={a:1}",
    "lora.layers=[null]": "None is not possible",
    "objective.layer=[[2]]": "objective.layer=[[2]]: [2] is not possible",
    "objective.layer={a:1}": "objective.layer={'a': 1}",
    "eval.layer=[[1]]": "eval.layer=[[1]]",
    "lora.target_modules=q_proj": "lora.target_modules=q_proj",
    "lora.target_modules=[[q_proj]]": "lora.target_modules=[['q_proj']]: ['q_proj'] is no name",
    "lora.target_modules=['']": "lora.target_modules=['']: '' is no name",
    "lora.target_modules=[q_proj,q_proj]": "holds a name twice",
    "eval.measures=pair_cosine": "eval.measures=pair_cosine",
    "eval.measures=[[pair_cosine]]": "eval.measures=[['pair_cosine']]: ['pair_cosine'] is no name",
    "eval.measures=[mrr,mrr]": "eval.measures=['mrr', 'mrr']: holds a name twice",
    "eval.text=[a]": "eval.text=[a]",
    "+eval.text.swahili=[a]": "eval.text.swahili=[a]",
    "sweep=1": "sweep=1",
    # ranges
    "lora.rank=99999999999999999999999999": "lora.rank=99999999999999999999999999: must be at least 1 and at most 4096",
    "lora.alpha=inf": "lora.alpha=inf: must be finite",
    "lora.alpha=nan": "lora.alpha=nan: must be above 0",
    "lora.dropout=nan": "lora.dropout=nan",
    "objective.temperature=inf": "objective.temperature=inf: must be finite",
    "train.learning_rate=inf": "train.learning_rate=inf: must be finite",
    "train.learning_rate=0": "train.learning_rate=0.0: must be above 0",
    "train.epochs=10000000000": "train.epochs=10000000000: must be at least 0 and at most 1000000",
    "train.batch_size=99999999999999999999": "train.batch_size=99999999999999999999",
    "train.warmup=2": "train.warmup=2.0: must be at least 0 and at most 1",
    "train.seed=4294967296": "train.seed=4294967296: must be at least 0 and at most 4294967295",
    "dataset.seed=-1": "dataset.seed=-1",
    "dataset.limit=3": "dataset.limit=3: must be at least 4",
    "eval.permutations=98": "eval.permutations=98: must be at least 99 and at most 10000000",
    "eval.max_perplexity_increase=-1": "eval.max_perplexity_increase=-1.0",
    "model.n_layers=0": "model.n_layers=0: must be at least 1",
    "model.n_layers=-3": "model.n_layers=-3: must be at least 1",
    # interpolations
    "lora.rank=${lora.nosuch}": "lora.rank: Interpolation key 'lora.nosuch' not found",
    "lora.rank=${nosuch.key}": "lora.rank: Interpolation key 'nosuch.key' not found",
    "lora.rank=${lora.alpha}": "lora.rank: While dereferencing interpolation '${lora.alpha}'",
    "lora.rank=${lora.rank}": "lora.rank: Recursive interpolation detected",
    "lora.rank=${oc.env:NOSUCH_VARIABLE}": "Environment variable 'NOSUCH_VARIABLE' not found",
    "lora.rank=${nosuch:1}": "lora.rank: Unsupported interpolation type nosuch",
    "lora.rank=${": "lora.rank=${: can't be read as key=value",
    "lora.layers=[${lora.nosuch}]": "lora.layers[0]: Interpolation key 'lora.nosuch' not found",
    "dataset.path=${tracking}": "dataset.path",
    "lora.rank=???": "lora.rank has no value: give one, as lora.rank=…",
    # unknown keys
    "+a=1": "a is no key of this project",
    "+a.b=1": "a is no key of this project",
    "+lora.new.deep=4": "lora.new is no key of this project",
    "++lora.new=4": "lora.new is no key of this project",
    "+lora.rank=4": "An item is already at 'lora.rank'",
    "+lora=x": "Could not find 'lora/x'",
    "+model=tiny": "Multiple values for model",
    "LORA.RANK=4": "Key 'LORA' not in 'Config'",
    "lora/rank=4": "lora/rank",
    "objective@train=infonce": "objective@train",
    "~nosuch": "'nosuch' does not exist",
    "~lora.rank": "~lora.rank",
    "hydra.nosuch=1": "hydra.nosuch",
    # groups
    "lora=4": "lora=4: lora is a group; choose one of default",
    "lora=null": "lora=null: lora is a group; choose one of default",
    "lora=[1]": "lora=[1]: lora is a group",
    "lora={rank:4}": "lora={rank:4}: lora is a group",
    "model=true": "model=true: model is a group; choose one of gemma3_270m, hub",
    "model=[tiny,hub]": "model=[tiny,hub]: model is a group",
    "experiment=[1]": "experiment=[1]: experiment is a group",
    "hydra=null": "hydra=null: hydra is a group; choose single keys, as hydra.key=value",
    "~model": "model is a group; choose one of gemma3_270m",
    "~lora": "lora is a group; choose one of default",
    "model=": "Could not find 'model/'",
    "model=Tiny": "Could not find 'model/Tiny'",
    "model=/etc/passwd": "Could not find 'model//etc/passwd'",
    "objective=bce": "Could not find 'objective/bce'",
    # grammar
    "=4": "=4: names no key",
    "lora.rank": "lora.rank: can't be read as key=value",
    "lora..rank=4": "lora..rank=4: can't be read as key=value",
    "lora.rank =4": "lora.rank =4: can't be read as key=value",
    "lora.layers=[1": "lora.layers=[1: can't be read as key=value",
    "lora.layers=[1,]": "lora.layers=[1,]: can't be read as key=value",
    'lora.rank="4': 'lora.rank="4: can\'t be read as key=value',
    "lora.rank=4;rm": "lora.rank=4;rm: can't be read as key=value",
    "lora.rank=4,8": "To sweep over it, add --multirun",
    "lora.layers=range(1,3)": "requires --multirun",
    # names
    "tracking.experiment=..": "tracking.experiment='..': must be a plain name",
    "tracking.experiment=/": "tracking.experiment='/': must be a plain name",
    "tracking.experiment=a/../../b": "must be a plain name",
    "tracking.experiment=" + "x" * 300: "must be a plain name of up to 200 characters",
    "tracking.experiment='a\tb'": "tracking.experiment='a\\tb'",
    "tracking.experiment='\udcff'": "tracking.experiment='\\udcff': holds a character that no text has",
    "dataset.source_language=../../x": "dataset.source_language: '../../x' can't name a language",
    "dataset.target_language='a\nb'": "dataset.target_language: 'a\\nb' can't name a language",
    "+eval.text._target_=os.system": "eval.text._target_: '_target_' can't name a language",
    "+eval.text.swahili=" + "x" * 300: "there is no such file",
    "model=hub model.id=" + "x" * 300: "can't be a folder or a hub id (File name too long)",
    "dataset=file dataset.path='\udcff.tsv'": "dataset.path='\\udcff.tsv': holds a character that no text has",
    # values that would run code, were they instantiated
    "+_target_=os.system": "_target_ is no key of this project",
    "+model._target_=os.system": "model._target_ is no key of this project",
    "+dataset._target_=os.system": "dataset._target_ is no key of this project",
}  # fmt: skip

TAKEN = {
    "lora.rank='8'": ("lora", "rank", 8),
    "lora.rank= 4": ("lora", "rank", 4),
    "++lora.rank=4": ("lora", "rank", 4),
    "lora.rank=${objective_rank} +objective_rank=4": None,  # the helper key is refused
    "lora.alpha=8": ("lora", "alpha", 8.0),
    "lora.alpha=${lora.rank}": ("lora", "alpha", 16.0),
    "lora.layers=2": ("lora", "layers", 2),
    "lora.layers=${objective.layer} objective.layer=2": ("lora", "layers", 2),
    "lora.use_dora=yes": ("lora", "use_dora", True),
    "lora.target_modules=[1]": ("lora", "target_modules", ["1"]),
    "model=hub model.id=5": ("model", "id", "5"),
    "model='tiny'": ("model", "name", "tiny"),
    "eval.template='{word} {other} {'": ("eval", "template", "{word} {other} {"),
    "dataset.source_language='Central Kurdish'": ("dataset", "source_language", "Central Kurdish"),
    "tracking.experiment='my words'": ("tracking", "experiment", "my words"),
    "~experiment": ("lora", "rank", 16),
}


def words_of(line: str) -> list[str]:
    """The overrides on a line; a space inside quotes or before `=` parts none."""
    return re.split(r" (?=\+?\w[\w.]*=)", line) if not line.startswith("lora.rank =") else [line]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs the command in this process, in a folder of its own: (exit status, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TLI_DEBUG", raising=False)

    def call(*arguments: str) -> tuple[int, str]:
        return run_command(monkeypatch, *arguments), capsys.readouterr().err

    return call


@pytest.mark.parametrize("line", REFUSED)
def test_an_override_is_refused_by_its_key_before_a_folder_is_made(
    cli: Callable[..., tuple[int, str]], tmp_path: Path, line: str
) -> None:
    status, err = cli(*words_of(line))
    assert status == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert REFUSED[line] in err
    assert "Traceback" not in err and "Exception" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", TAKEN)
def test_an_override_is_taken_as_stated(line: str) -> None:
    refuse_odd_options(words_of(line))
    if TAKEN[line] is None:
        with pytest.raises(UserError, match="objective_rank is no key"):
            config(*words_of(line))
        return
    group, key, value = TAKEN[line]  # pyright: ignore[reportGeneralTypeIssues]
    found = getattr(getattr(config(*words_of(line)), group), key)
    assert found == value and type(found) is type(value)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_value_at_all_gets_past_the_checks_with_anything_but_a_user_error(data: st.DataObject, base) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from src.config import read_config

    tried = base.copy()
    group = data.draw(st.sampled_from(sorted(tried)))
    key = data.draw(st.sampled_from(sorted(tried[group])))
    try:
        OmegaConf.update(tried, f"{group}.{key}", data.draw(VALUES), merge=False)
    except OmegaConfBaseException:
        return  # told by Hydra, as the tables above show
    try:
        read = read_config(tried)
    except UserError as error:  # printed in one line, whatever line ends the value holds
        assert str(error).strip()
        return
    assert type(getattr(getattr(read, group), key)) is not dict or key == "text"


@pytest.fixture(scope="module")
def base():
    return composed()


# Tracebacks --------------------------------------------------------------------------------------------------------

BAD_JOB = ("model=tiny", "tracking=off", "dataset=file", "dataset.path=absent.tsv")


@pytest.mark.parametrize("asked", ["flag", "variable", "no"])
def test_a_traceback_is_shown_where_it_is_asked_for_and_is_always_in_the_log(
    cli: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    if asked == "variable":
        monkeypatch.setenv("TLI_DEBUG", "1")
    else:
        monkeypatch.setenv("TLI_DEBUG", "")  # so that what the flag sets is taken back after the test
    status, err = cli(*BAD_JOB, *(["--debug"] if asked == "flag" else []))
    assert status == 2
    assert err.splitlines()[-1] == "error: absent.tsv: no such file; check dataset.path"
    assert err.count("Traceback (most recent call last)") == (0 if asked == "no" else 1)
    assert err.count("\n") == 1 or asked != "no"
    (log,) = tmp_path.rglob("run.log")
    assert "Traceback (most recent call last)" in log.read_text() and "absent.tsv" in log.read_text()


def test_a_sweeps_failed_jobs_show_theirs_too(
    cli: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLI_DEBUG", "")
    few = ["-m", "model=tiny", "tracking=off", "eval.probes=false", "lora.target_modules=[nosuch],[none]"]
    status, err = cli(*few, "train.epochs=1", "dataset.limit=20", "dataset.control_size=4", "--debug")
    assert status == 1
    assert err.count("Traceback (most recent call last)") == 2
    logs = list(tmp_path.rglob("run.log"))
    assert len(logs) == 2 and all("Traceback (most recent call last)" in log.read_text() for log in logs)


def test_bad_settings_show_theirs_before_there_is_a_job(
    cli: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLI_DEBUG", "")
    assert "Traceback" not in cli("lora.rank=0")[1]
    assert cli("lora.rank=0", "--debug")[1].count("Traceback (most recent call last)") >= 1


def test_help_tells_of_it_and_of_the_groups(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ConfigStore, "__deepcopy__", None, raising=False)  # what the command puts there goes again
    assert run_command(monkeypatch, "--help") == 0
    printed = capsys.readouterr().out
    for told in ("--debug", "\nobjective: infonce, triplet", "\nquant: int8, nf4, none\n"):
        assert told in printed
