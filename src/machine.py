"""What a run's numbers were made on and with: the machine, the packages, the code."""

from __future__ import annotations

import atexit
import gc
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from src.files import digest, file_digest

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "mlflow", "hydra-core", "scipy", "numpy")
_ROOT = Path(__file__).parent.parent


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

    It would look at all of it again and again: a run's imports take 5.1 s instead of 6.8, and half a second less is
    spent in every few jobs of a sweep.
    """
    known = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
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


def machine(device: str) -> dict[str, Any]:
    """The processor, its cores, the threads in use, the GPU if `device` is one, and the platform."""
    import torch

    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.startswith("cuda") else {}
    threads = torch.get_num_threads()
    return {"cpu": _cpu(), "cores": os.cpu_count(), "threads": threads, "platform": platform.platform(), **gpu}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str]:
    """What the numbers were made with: Python, the main packages."""
    found = {name: version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}


def git_commit() -> str:
    """The project's commit, with "+changes" where the working tree differs from it; "unknown" outside of git."""
    try:
        commit = _git("rev-parse", "HEAD").decode().strip()
        return commit + ("+changes" if _git("diff", "HEAD") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def git_changes() -> str | None:
    """The digest of what code and settings differ in from the commit, new files included; None for nothing."""
    places = ("--", "src", "conf", "hydra_plugins")
    try:
        changed = _git("diff", "HEAD", *places)
        new = sorted(_git("ls-files", "-z", "--others", "--exclude-standard", *places).split(b"\0")[:-1])
        if not changed and not new:
            return None
        return digest(changed, *(part for name in new for part in (name, file_digest(_ROOT / os.fsdecode(name)))))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, check=True).stdout
