"""The locked packages: their licences are listed and allowed, and a known vulnerability fails the audit."""

import json
import re

from tests.audit import EXCEPTIONS, LIST, family, licence, locked, read


def test_every_locked_package_is_listed_and_nothing_else():
    rows = re.findall(r"^\| ([\w.-]+) \| (\S+) \| (.+) \|$", LIST.read_text(encoding="utf-8"), re.MULTILINE)
    listed = [(package, version) for package, version, _ in rows if package not in ("Package", "---")]
    assert listed == locked(), "run python -m tests.audit licences"


def test_every_licence_is_of_an_allowed_family():
    rows = re.findall(r"^\| ([\w.-]+) \| \d\S* \| (.*) \|$", LIST.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == len(locked())
    assert not [(package, name) for package, name in rows if family(package, name) is None]
    told = {package: licence(package) for package, _ in rows}
    assert not [package for package, name in rows if told[package] and told[package] != name]
    assert set(EXCEPTIONS) <= set(told)


def test_a_copyleft_licence_is_allowed_by_name_alone():
    assert family("new", "GPL-3.0-only") is None and family("new", "") is None
    assert family("new", "LGPL-3.0-only") and family("pyglossary", "GPL-3.0-or-later")


def test_a_known_vulnerability_fails_and_missing_data_does_not():
    hole = {"id": "PYSEC-2099-1", "fix_versions": ["2.0"]}
    known = {"dependencies": [{"name": "one", "version": "1.0", "vulns": [hole]}]}
    assert read(json.dumps(known), "") == (1, ["audit: one 1.0: PYSEC-2099-1, mended in 2.0"])
    none = {"dependencies": [{"name": "one", "skip_reason": "not found on PyPI"}]}
    assert read(json.dumps(none), "", "unknown") == (0, ["unknown"])
    assert read("", "requests.exceptions.ConnectionError: refused", "unknown")[0] == 0
    assert read("", "the lock can't be parsed")[0] == 1
