"""Jobs in other processes: which launcher can start them, what a worker does about a signal, and how all are ended."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from importlib.util import find_spec
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import psutil

from src import console
from src.errors import UserError
from src.files import write_text

if TYPE_CHECKING:
    from omegaconf import DictConfig

PATIENCE = 10  # seconds that a worker may take to close its run
_AT_WORK = ".worker"  # in a job's folder while a process is at it: that process's number


def prepare(config: DictConfig) -> None:
    """Makes sure that the chosen launcher can start the sweep's jobs, and not more at once than there are cores.

    Raises UserError where its plug-in isn't installed.
    """
    from omegaconf import open_dict, read_write

    target = config.hydra.launcher._target_
    plugin = re.match(r"hydra_plugins\.(hydra_(\w+)_launcher)\.", target)
    if plugin and not _installed(f"hydra_plugins.{plugin[1]}"):
        raise UserError(
            f"hydra/launcher={config.hydra.runtime.choices['hydra/launcher']} needs the extra {plugin[2]}, which isn't "
            f"installed: pip install 'hydra-{plugin[2]}-launcher>=1.2,<1.3'"
        )
    if target.endswith(".LocalLauncher") and config.hydra.sweeper.max_batch_size is None:
        with read_write(config), open_dict(config):  # submitit would start all of the sweep's jobs at once
            config.hydra.sweeper.max_batch_size = _cores()


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # no plug-in at all
        return False


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ignore_signals() -> None:
    """From now on SIGINT and SIGTERM do nothing here, until other handlers are set."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # not SIG_IGN: Python complains where a signal is on its way already


# --- in a worker --------------------------------------------------------------------------------------------


@contextmanager
def at_work(folder: Path, name: str) -> Iterator[None]:
    """Around a job in a worker: notes in the job's folder which process is at it, and keeps its output in one piece.

    A signal ends a job here as it would in the only process, by a SystemExit, in time to close its run; then the whole
    worker goes, before it takes another job.
    """
    from tqdm import tqdm

    console.alone = False
    tqdm.set_lock(RLock())  # its own is for several processes, and one that ends at once leaves a warning about it
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end_worker)
    write_text(folder / _AT_WORK, str(os.getpid()))
    print(f"{name} …", flush=True)
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        if text := printed.getvalue():
            print(f"\n{name}\n{text}", end="", flush=True)
        (folder / _AT_WORK).unlink(missing_ok=True)
        if _ended:
            os._exit(_ended[0])  # a pool would take the SystemExit for the job's result, and go on


_ended: list[int] = []  # the exit status that a signal asks of this worker


def _end_worker(number: int, _: Any) -> None:
    ignore_signals()  # a terminal's Ctrl-C comes twice: by itself, and from the sweep's process
    _ended.append(128 + number)
    sys.exit(128 + number)


# --- in the sweep's own process -----------------------------------------------------------------------------


def end(folders: Sequence[Path]) -> None:
    """Ends those descendants of this process that are at a job in `folders`; by force what takes over PATIENCE.

    Jobs that a cluster runs are nobody's descendants here, and go on.
    """
    children = {child.pid: child for child in psutil.Process().children(recursive=True)}
    busy = [children[number] for folder in folders if (number := _process(folder)) in children]
    for process in busy:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, stubborn = psutil.wait_procs(busy, timeout=PATIENCE)
    for process in stubborn:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(stubborn, timeout=PATIENCE)


def _process(folder: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int((folder / _AT_WORK).read_text(encoding="utf-8"))
    return None
