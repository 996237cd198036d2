"""Kills a sweep again and again, lets it go on, and compares what it leaves: python -m bench.soak --kills 200

Each round is a sweep of four jobs in a folder of its own. It is ended at random moments of its whole life by SIGKILL,
SIGTERM or SIGINT, up to four times, each time the same command is given again, and at last it may finish. Then its
jobs, files, adapters and MLflow runs must equal those of a sweep that nobody disturbed, number for number. Prints how
often which signal met which stage; exit status 1 and the rounds' folders for whatever differs.
"""

from __future__ import annotations

import argparse
import atexit
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import psutil

from bench.soak_state import STAGES, differences, processes, read_facts, stage_of, still_open, table

ROOT = Path(__file__).parent.parent
SWEEP = (
    "-m", "model=tiny", "dataset.limit=40", "dataset.control_size=10", "train.epochs=1", "lora.layers=[1],[2]",
    "lora.rank=2,4", "eval.permutations=99", "eval.probes=false", "tracking.experiment=soak",
    "eval.measures=[pair_cosine,mismatched_cosine,margin,csls_p_at_1]",
)  # fmt: skip
LAUNCHERS = {"basic": (), "joblib": ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")}
WAYS = {  # what a round's kills are: signal, whether to the whole process group as a terminal does it
    "SIGKILL": (signal.SIGKILL, False),
    "SIGKILL to all": (signal.SIGKILL, True),
    "SIGTERM": (signal.SIGTERM, False),
    "SIGINT": (signal.SIGINT, False),
    "SIGINT to all": (signal.SIGINT, True),
}
AT_MOST = 4  # kills in a round
IDLE = 150 << 20  # bytes: a worker below has never had a job, hasn't imported torch, and leaves after five minutes
PATIENCE = 600  # seconds that a command may take to end


@dataclass
class Round:
    """One sweep, its kills as (way, stage), and whatever is wrong with how it ended."""

    folder: Path
    launcher: str
    real: bool  # a program of its own, not a fork of this one
    kills: list[tuple[str, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    sessions: list[int] = field(default_factory=list)


@dataclass
class Command:
    """One of a round's commands under way: its process, its beginning, the sweeps and open runs there were before."""

    pid: int
    began: float
    earlier: int
    open: set[tuple[str, str]]
    status: int | None = None

    def ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of what is killed how; moments differ with the machine")
    parser.add_argument("--folder", type=Path, help="for the rounds' folders; default: a temporary one")
    arguments = parser.parse_args()
    place = (arguments.folder or Path(tempfile.mkdtemp(prefix="soak-"))).resolve()
    preload()
    undisturbed = Round(place / "undisturbed", "basic", real=False)
    began = time.monotonic()
    finish(undisturbed)
    whole = time.monotonic() - began
    if undisturbed.wrong:
        raise SystemExit(f"{undisturbed.wrong}: {undisturbed.folder}")
    expected, rng, rounds = read_facts(undisturbed.folder), random.Random(arguments.seed), []
    while (done := sum(len(one.kills) for one in rounds)) < arguments.kills:
        one = Round(place / str(len(rounds)), rng.choice(("basic", "basic", "joblib")), real=rng.random() < 0.15)
        rounds.append(one)
        # Workers import for themselves, and so does a program of its own: it takes longer then.
        play(one, rng, min(AT_MOST, arguments.kills - done), whole * (2 if one.real or one.launcher == "joblib" else 1))
        one.wrong += differences(expected, read_facts(one.folder))
        said = ", ".join(f"{way} in {place}" for way, place in one.kills) or "was quicker"
        print(f"{one.folder} {one.launcher}{', real' * one.real}: {said}: {len(one.wrong)} wrong", flush=True)
        for line in one.wrong[:20]:
            print(f"  {line}", flush=True)
        if not one.wrong:
            shutil.rmtree(one.folder)
    print(table([(one.launcher, one.kills, bool(one.wrong)) for one in rounds], list(WAYS)))
    real = sum(one.real for one in rounds)
    print(f"\n{len(rounds)} sweeps, {real} of them programs of their own; seed {arguments.seed}; "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip
    return int(any(one.wrong for one in rounds))


# --- a round ------------------------------------------------------------------------------------------------


def play(one: Round, rng: random.Random, at_most: int, whole: float) -> None:
    """Kills the sweep up to so many times, then lets it finish. `whole`: seconds that it takes undisturbed."""
    for _ in range(rng.randint(1, at_most)):
        way, wanted = rng.choice(list(WAYS)), rng.choice(STAGES[1:])
        done = len(list(one.folder.glob("multirun/*/*/*/results.json")))
        moment, pause = rng.uniform(0, whole * (1 - done / 5)), rng.uniform(0, 0.1)
        by_stage = rng.random() < 0.4  # some are too short to be met by chance
        if not kill(one, way, stage=wanted if by_stage else None, after=pause if by_stage else moment):
            break
    finish(one)


def kill(one: Round, way: str, *, stage: str | None = None, after: float = 0.0) -> bool:
    """Starts the command and kills it so many seconds after its start, or after it is seen in that stage.

    False where it had come to its end by then.
    """
    command = start(one)
    while not command.ended():
        if stage is None and time.monotonic() - command.began > after:
            break
        if stage and stage_of(one.folder, command.earlier) == stage:
            time.sleep(after)
            break
        time.sleep(0.005)
    met = stage_of(one.folder, command.earlier)
    if command.ended():
        check_end(one, command, 0)
        return False
    number, to_all = WAYS[way]
    (os.killpg if to_all else os.kill)(command.pid, number)
    one.kills.append((way, met))
    check_end(one, command, number)
    return True


def finish(one: Round) -> None:
    """Gives the command and lets it come to its end; then no process of the round may be left."""
    check_end(one, start(one), 0)
    limit = time.monotonic() + 10
    while (alive := processes(one.sessions)) and time.monotonic() < limit:
        time.sleep(0.1)
    for process in alive:
        with suppress(psutil.Error):
            if process.memory_info().rss > IDLE:
                one.wrong.append(f"process left: {process.pid} {' '.join(process.cmdline())[:100]}")
            process.kill()


def check_end(one: Round, command: Command, number: int) -> None:
    """Waits for the end, and whether it is as it should be after that signal (0 for none)."""
    limit = time.monotonic() + PATIENCE
    while not command.ended():
        if time.monotonic() > limit:
            one.wrong.append(f"signal {number}: no end in {PATIENCE} s")
            os.killpg(command.pid, signal.SIGKILL)
            limit += PATIENCE
        time.sleep(0.01)
    if number == signal.SIGKILL:
        return
    # 0: its work was done; -number: Python had only just started, or was about to end
    if command.status not in (128 + number if number else 0, -number, 0):
        one.wrong.append(f"signal {number}: exit status {command.status}")
    # Those that a SIGKILL left open before may stay so where this command ended before it looked for them.
    if number and command.status == 128 + number and (left := still_open(one.folder) - command.open):
        one.wrong.append(f"signal {number} left runs open: {left}")
    said = one.folder / f"said{len(one.sessions) - 1}.txt"
    if "Traceback" in said.read_text():
        one.wrong.append(f"signal {number}: a traceback in {said}")


# --- a command ----------------------------------------------------------------------------------------------


def preload() -> None:
    """Imports once for all forks what the command imports, before any thread of ours exists."""
    from src import tracking

    tracking._settle()
    for name in ("scipy.stats", "transformers.models.llama.modeling_llama", "mlflow.store.tracking.sqlalchemy_store"):
        import_module(name)
    for name in ("study", "results", "plots", "overview", "summary", "sweep"):
        import_module(f"src.{name}")


def start(one: Round) -> Command:
    """Starts the command in a session of its own: as a program, or as a fork of this one, which has imported all."""
    (one.folder / "tmp").mkdir(parents=True, exist_ok=True)
    words = [*SWEEP, f"tracking.uri=sqlite:///{one.folder}/mlruns/mlflow.db", *LAUNCHERS[one.launcher]]
    sys.stdout.flush()
    before = len(list(one.folder.glob("multirun/*/*/sweep.json"))), still_open(one.folder)
    command = Command(os.fork(), time.monotonic(), *before)
    if command.pid:
        one.sessions.append(command.pid)
        return command
    try:
        os.setsid()
        os.chdir(one.folder)
        said = os.open(f"said{len(one.sessions)}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        own = {"TLI_CACHE": one.folder / "cache", "TMPDIR": one.folder / "tmp", "PYTHONPATH": ROOT}
        os.environ |= {name: str(path) for name, path in own.items()}
        if one.real:
            os.execv(sys.executable, [sys.executable, "-m", "src.run", *words])
        tempfile.tempdir = None
        os._exit(_command(words))
    finally:
        os._exit(99)


def _command(words: Sequence[str]) -> int:
    """`python -m src.run`, with what the interpreter does at its end, but for unwinding this program's frames."""
    from src.run import main

    sys.argv = ["src.run", *words]
    try:
        status = main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    sys.exit(main())
