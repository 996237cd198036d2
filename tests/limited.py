"""The command with little memory left at some steps: python -m tests.limited <step>=<MB>,… <arguments of src.run>.

A step is a function of src/study.py; while it runs, the process may grow by so many megabytes and no more.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from src import layers, linear, run, study


@contextmanager
def limited(megabytes: int) -> Iterator[None]:
    """Lets this process grow by so many megabytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + megabytes * 2**20, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def around(step: Callable[..., Any], megabytes: int) -> Callable[..., Any]:
    def narrowed(*arguments: Any) -> Any:
        with limited(megabytes):
            return step(*arguments)

    return narrowed


def main() -> int:
    linear.library = lambda: "torch"  # as under a limit from the start
    layers.TOKEN_BUDGET = 2**16  # the tiny model's usual batches take too little memory to run out of it
    for word in sys.argv.pop(1).split(","):
        step, megabytes = word.split("=")
        setattr(study, step, around(getattr(study, step), int(megabytes)))
    return run.main()


if __name__ == "__main__":
    sys.exit(main())
