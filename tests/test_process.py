"""What a process does about its imports and its end."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from src import process
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


@pytest.mark.parametrize(
    ("load", "threads", "spins"),
    [
        ("0.10 0.20 0.30 1/80 99", "", None),  # who asks, and nobody else: libgomp's own
        ("0.10 0.20 0.30 2/80 99", "", "2000"),
        ("0.10 0.20 0.30 2/80 99", "1", None),  # another program, and a core for each
        ("no such system", "", "2000"),
    ],
)
def test_threads_spin_briefly_unless_the_cores_are_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: str, threads: str, spins: str | None
) -> None:
    (tmp_path / "loadavg").write_text(load)
    monkeypatch.setattr(process, "LOAD", tmp_path / "loadavg")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it's as it was afterwards
        monkeypatch.delenv(name)
    process.wait_briefly()
    assert os.environ.get("GOMP_SPINCOUNT") == spins
    os.environ["GOMP_SPINCOUNT"] = "7"
    process.wait_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "7"


@pytest.mark.skipif(not process.LOAD.exists(), reason="Linux says how many threads run")
def test_busy_programs_are_seen() -> None:
    cores = os.cpu_count() or 1
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    code = "from src import process; process.wait_briefly(); import os; print(os.environ['GOMP_SPINCOUNT'])"
    kept = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    try:
        done = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True, check=True)
    finally:
        for program in busy:
            program.kill()
            program.wait()
    assert done.stdout == "2000\n"
