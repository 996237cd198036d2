"""What a run's numbers were made on and with: the machine, the packages, the code."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from src.files import digest, file_digest

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "mlflow", "hydra-core", "scipy", "numpy")
_ROOT = Path(__file__).parent.parent


def machine(device: str) -> dict[str, Any]:
    """The processor, its cores, the threads in use, the GPU if `device` is one, and the platform."""
    import torch

    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.startswith("cuda") else {}
    threads = torch.get_num_threads()
    return {"cpu": _cpu(), "cores": os.cpu_count(), "threads": threads, "platform": platform.platform(), **gpu}


def cpu_vendor() -> str:
    """As Linux names it: AuthenticAMD, GenuineIntel, …; empty where it names none, or isn't there."""
    return _cpuinfo("vendor_id")


def lacks_bfloat16() -> bool:
    """Whether Linux lists this processor's instructions, and none for bfloat16 is among them."""
    listed = _cpuinfo("flags") or _cpuinfo("Features")  # x86 or ARM
    return bool(listed) and "bf16" not in listed


def _cpu() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


@cache
def _cpuinfo(key: str) -> str:
    """What Linux says of the first core; empty where it doesn't."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


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
