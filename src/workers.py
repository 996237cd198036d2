"""Jobs in other processes: which launcher can start them, what a worker does about a signal, and how all are ended."""

from __future__ import annotations

import io
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Event, RLock, Thread
from typing import TYPE_CHECKING, Any

import psutil
from filelock import FileLock, Timeout

from src import console
from src.config import ROOT
from src.errors import UserError
from src.files import cache_dir, write_text
from src.interrupts import arrived, ignore_signals, on_signals, raise_surely
from src.process import leave_quickly

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Of Ray, where the user hasn't set them: print what workers say as it is, no account of jobs that we ended, report to
# nobody. A Ray of our own also stays on loopback, in spite of its name for that, and asks for a token.
_RAY = {
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_OWN_RAY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
PATIENCE = 10  # seconds that a worker may take to close its run
OWNER = "TLI_SWEEP_PROCESS"  # in the environment of workers that end with it: the number of the sweep's process
WORKERS = "TLI_SWEEP_WORKERS"  # in their environment, too: how many there are
AT_WORK = ".worker"  # in a job's folder while a process is at it: that process's number


def prepare(config: DictConfig) -> None:
    """Makes sure that the chosen launcher can start the sweep's jobs, and not more at once than there are cores.

    Raises UserError where its plug-in isn't installed, or the number of jobs at once is none.
    """
    from omegaconf import open_dict, read_write

    target = config.hydra.launcher._target_
    plugin = re.match(r"hydra_plugins\.(hydra_(\w+)_launcher)\.", target)
    if plugin and not _installed(f"hydra_plugins.{plugin[1]}"):
        name, extra = config.hydra.runtime.choices["hydra/launcher"], plugin[2]
        how = f"pip install 'hydra-{extra}-launcher>=1.2,<1.3'"
        if extra == "ray":  # pip alone would put an older cloudpickle under the others
            how = "make ray, then .venv-ray/bin/python -m src.run …"
        raise UserError(f"hydra/launcher={name} needs the extra {extra}, which isn't installed: {how}")
    _refuse_odd_counts(config)
    if target.endswith(".LocalLauncher") and config.hydra.sweeper.get("max_batch_size", 0) is None:
        with read_write(config), open_dict(config):  # submitit would start all of the sweep's jobs at once
            config.hydra.sweeper.max_batch_size = _cores()
    if target.endswith((".JoblibLauncher", ".LocalLauncher")):
        asked = config.hydra.launcher.get("n_jobs") or config.hydra.sweeper.get("max_batch_size") or 1
        os.environ |= {OWNER: str(os.getpid()), WORKERS: str(asked if asked > 0 else _cores())}


def _refuse_odd_counts(config: DictConfig) -> None:
    """Raises UserError where how many jobs run at once is no number of jobs: launchers would find out one by one."""
    n_jobs, most = config.hydra.launcher.get("n_jobs"), config.hydra.sweeper.get("max_batch_size")
    if n_jobs is not None and (type(n_jobs) is not int or n_jobs == 0):
        raise UserError(f"hydra.launcher.n_jobs={n_jobs}: give a whole number, or -1 for one job a core")
    if most is not None and (type(most) is not int or most < 1):
        raise UserError(f"hydra.sweeper.max_batch_size={most}: give a whole number, or null for all jobs at once")


def start(config: DictConfig) -> None:
    """Starts Ray, where it is chosen, ahead of its launcher: Ray takes SIGTERM for itself, and here we take it back.

    Raises UserError where Ray refuses its settings, or there is no cluster to join.
    """
    from omegaconf import OmegaConf

    if not config.hydra.launcher._target_.endswith(".RayLauncher"):
        return
    init: Any = OmegaConf.to_container(config.hydra.launcher.ray.init, resolve=True)
    for key, value in (_RAY | (_OWN_RAY if init["address"] is None else {})).items():
        os.environ.setdefault(key, value)  # read when Ray is imported
    if init["address"] is not None:  # its workers were started long ago and elsewhere
        init.setdefault("runtime_env", {"env_vars": {"PYTHONPATH": str(ROOT)}})
    ours = signal.getsignal(signal.SIGTERM)
    try:
        import_module("ray").init(**init)
    except (ConnectionError, ValueError, TypeError) as error:
        raise UserError(f"hydra.launcher.ray.init: {error}") from error
    signal.signal(signal.SIGTERM, ours)


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # no plug-in at all
        return False


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- in a worker --------------------------------------------------------------------------------------------


@contextmanager
def lent_threads() -> Iterator[None]:
    """Around what this machine's other workers wait for: torch has their threads, too, but no more than the cores.

    Where they are at something else, one at a time has them all: else each would crowd the others out.
    """
    import torch

    own, workers = torch.get_num_threads(), int(os.environ.get(WORKERS, "1"))
    lent = FileLock(cache_dir() / ".threads.lock")
    with suppress(Timeout, OSError):
        if workers > 1:
            lent.acquire(timeout=0)
    try:
        torch.set_num_threads(max(own, min(own * workers, _cores())) if lent.is_locked else own)
        yield
    finally:
        torch.set_num_threads(own)
        lent.release()


@contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """Around a job in a worker: notes in the job's folder which process is at it.

    A signal ends the block as it would in the only process, by a SystemExit, in time to close the run. The worker
    stays: pools complain of one that goes, and there is no further job for it in a sweep that was ended.
    """
    on_signals(_end_job)
    if pool := sys.modules.get("joblib.externals.loky.process_executor"):
        pool.__dict__["_MAX_MEMORY_LEAK_SIZE"] = math.inf  # else a worker that grows by 300 MB is replaced
    write_text(folder / AT_WORK, str(os.getpid()))
    _watch_sweep()
    leave_quickly()
    try:
        yield
    except SystemExit:
        arrived()
    finally:
        (folder / AT_WORK).unlink(missing_ok=True)
        if _alone.is_set():
            os._exit(1)


@cache
def _watch_sweep() -> None:
    """Ends this worker soon after the sweep's process, whose SIGKILL leaves no other trace here.

    Else its job would go on beside the sweep that was resumed, and be done twice.
    """
    if number := os.environ.get(OWNER):
        Thread(target=_end_after, args=(int(number),), daemon=True).start()


def _end_after(number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(number)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.2)
    _alone.set()
    os.kill(os.getpid(), signal.SIGTERM)  # closes the run of the job that it is at
    time.sleep(PATIENCE)
    os._exit(1)


_alone = Event()  # set once the sweep's process is gone


def _end_job(number: int) -> None:
    ignore_signals()  # a terminal's Ctrl-C comes twice: by itself, and from the sweep's process
    raise_surely(SystemExit(128 + number))


@contextmanager
def in_one_piece(title: str) -> Iterator[None]:
    """Prints what the block prints at its end, under the title, as other workers print, too; no progress bars."""
    from tqdm import tqdm

    console.alone = False
    tqdm.set_lock(RLock())  # its own is for several processes, and a warning remains of it where one is ended
    print(f"{title} …", flush=True)
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        if text := printed.getvalue():
            print(f"\n{title}\n{text}", end="", flush=True)


# --- in the sweep's own process -----------------------------------------------------------------------------


def end(folders: Sequence[Path]) -> None:
    """Ends the jobs in `folders` that descendants of this process are at; a process that takes over PATIENCE dies.

    Jobs that a cluster runs are nobody's descendants here, and go on.
    """
    children = {child.pid: child for child in psutil.Process().children(recursive=True)}
    busy = {folder: children[number] for folder in folders if (number := _process(folder)) in children}
    for process in busy.values():
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    limit = time.monotonic() + PATIENCE
    while busy and time.monotonic() < limit:
        time.sleep(0.05)
        busy = {folder: process for folder, process in busy.items() if process.is_running() and _process(folder)}
    for process in busy.values():
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(list(busy.values()), timeout=PATIENCE)  # only a run whose process is gone is closed for it


def _process(folder: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int((folder / AT_WORK).read_text(encoding="utf-8"))
    return None
