"""What a process does about its imports and its end."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from src.process import importing


def test_the_collector_rests_while_libraries_are_imported_and_keeps_what_they_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_library.py").write_text("import gc\nworked = gc.isenabled()\ncycle = []\ncycle.append(cycle)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "a_library", raising=False)
    gc.unfreeze()
    with importing():
        import a_library  # pyright: ignore[reportMissingImports]
    assert not a_library.worked and gc.isenabled() and gc.get_freeze_count()
    gc.unfreeze()
    with importing():  # nothing that wasn't there
        import a_library  # pyright: ignore[reportMissingImports]
    assert gc.isenabled() and not gc.get_freeze_count()
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


def test_a_process_ends_without_a_last_collection() -> None:
    code = """
import gc
from src.process import leave_quickly
leave_quickly()
class Seen:
    def __del__(self): print("collected")
seen = Seen()
seen.cycle = seen
{}
del seen
"""
    for undone, printed in (("", ""), ("import atexit; atexit.unregister(gc.freeze)", "collected\n")):
        ran = subprocess.run([sys.executable, "-c", code.format(undone)], capture_output=True, text=True, check=True)
        assert ran.stdout == printed
