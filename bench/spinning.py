"""How long should idle threads spin before they sleep? python -m bench.spinning [--repeats 3], ten minutes.

An epoch with the loss at layer 2 and one with it at the output, on SmolLM2-135M, each count in a process of its own, in
turns: with the cores free, and with another program on one of them. See src.process.wait_briefly.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

COUNTS = ("0", "2000", "20000", "300000")  # asleep at once, ours where others want the cores, longer, libgomp's own


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.spinning", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--here", action="store_true", help="measure once, with what GOMP_SPINCOUNT says; prints JSON")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure()))
        return
    from bench.speed import table

    seconds: dict[str, dict[str, list[float]]] = {}
    for _ in range(arguments.repeats):
        for count in COUNTS:
            environment = os.environ | {"GOMP_SPINCOUNT": count}
            command = [sys.executable, "-m", "bench.spinning", "--here"]
            said = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout
            for what, spent in json.loads(said.splitlines()[-1]).items():
                seconds.setdefault(what, {}).setdefault(f"GOMP_SPINCOUNT={count}", []).append(spent)
    for what, rows in seconds.items():
        print(f"\n{what}:\n")
        table(rows, "GOMP_SPINCOUNT=2000")


def measure() -> dict[str, float]:
    """Seconds of each epoch, after one at layer 2 that isn't timed."""
    from bench.speed import AT_LAYER_2, AT_OUTPUT, epoch, prepared, setting

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    early, output = prepared(setting(*AT_LAYER_2)), prepared(setting(*AT_OUTPUT))
    epoch(early, [1, 2], (2,))
    alone, _ = epoch(early, [1, 2], (2,))
    with another_program():
        shared, _ = epoch(early, [1, 2], (2,))
    at_output, _ = epoch(output, [1, 2, 3, 4], ("final",))
    return {
        "Loss at layer 2": alone,
        "Loss at layer 2, another program on one core": shared,
        "Loss at the output": at_output,
    }


@contextmanager
def another_program() -> Iterator[None]:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        busy.kill()
        busy.wait()


if __name__ == "__main__":
    main()
