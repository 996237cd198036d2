"""Small disks that fill up, and folders that turn read-only: real mounts, by root or in a namespace of one's own."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path


class Disk:
    """A small file system in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self) -> None:
        """Takes every free block."""
        with (self.folder / "filler").open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    def free(self) -> None:
        (self.folder / "filler").unlink()


@contextmanager
def disk(folder: Path, size: str) -> Iterator[Disk]:
    """Mounts an empty disk of this size on `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    _call("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
    try:
        yield Disk(folder)
    finally:
        _call("umount", "--lazy", folder)


@contextmanager
def bound(path: Path) -> Iterator[None]:
    """A mount of its own for a file or folder, which may be unlike what is around it: writable in what is read-only."""
    _call("mount", "--bind", path, path)
    try:
        yield
    finally:
        _call("umount", "--lazy", path)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody can write to the files of `folder` meanwhile, root neither; those that are open for writing stay so."""
    with bound(folder):
        _call("mount", "-o", "remount,bind,ro", folder)
        yield


@cache
def can_mount() -> bool:
    try:
        with disk(Path(tempfile.mkdtemp()), "4k"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def in_namespace(*command: str) -> subprocess.CompletedProcess[str] | None:
    """Runs a command where it may mount, and nobody else sees it; None where the kernel allows nobody that."""
    own = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        subprocess.run([*own, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return subprocess.run([*own, *command], capture_output=True, text=True, check=False, env=os.environ)


def _call(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)
