"""How a process of ours begins and ends: its threads, the garbage collector, its environment."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

LOAD = Path("/proc/loadavg")


def wait_briefly() -> None:
    """Has torch's idle threads spin briefly before they sleep where others want the cores; call it ahead of torch.

    Waking them costs more than most operations of a small batch, and libgomp has them spin for milliseconds. That pays
    as long as each has a core: else they wait for one another while they spin (docs/performance.md). What the user has
    set stays.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys() and not _cores_are_free():
        os.environ["GOMP_SPINCOUNT"] = "2000"


def _cores_are_free() -> bool:
    """Whether there is a core for each of our threads beside what runs here; False where that can't be told."""
    cores = os.cpu_count() or 1
    own = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(own) if own.isdigit() else cores
    try:  # more than once, as some run for a moment only; one of those running asks
        return any(_running() - 1 + threads <= cores for _ in range(5))
    except (OSError, ValueError, IndexError):
        return False


def _running() -> int:
    """How many threads of the whole machine run or wait for a core, in a moment (man 5 proc_loadavg)."""
    time.sleep(0.002)
    return int(LOAD.read_text(encoding="ascii").split()[3].partition("/")[0])


@contextmanager
def importing() -> Iterator[None]:
    """Around imports of large libraries: the garbage collector rests, and then takes what they made as there to stay.

    It would look at all of it again and again: a small run takes 9.9 s instead of 11.8, and half a second less is
    spent in every few jobs of a sweep. A job's own objects would be taken so, too: import before there are any.
    """
    known = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
            gc.collect()  # else an import's caught exceptions would stay, and through their frames the job around it
            gc.freeze()
        gc.enable()


@cache
def leave_quickly() -> None:
    """Keeps the garbage collector from a last look at all that the libraries have made, which takes a second."""
    atexit.register(gc.freeze)


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Sets environment variables for the block; afterwards they are as they were."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
