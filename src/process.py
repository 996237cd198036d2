"""How a process of ours begins and ends: its threads, the garbage collector, its environment."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


def wait_briefly() -> None:
    """Lets torch's idle threads spin for some microseconds before they sleep; to be called before torch is imported.

    Waking them costs more than most operations of a small batch: an epoch at layer 2 takes 0.6 of the time that threads
    take which sleep at once, and 1.5 times theirs where another program keeps one of two cores; with libgomp's own long
    spinning it is 0.54 and 1.8 (medians of 5). What the user has set stays.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "2000"


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
