"""Files that later steps rely on: written whole or not at all, made once, checked by digest."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


def cache_dir() -> Path:
    """Folder of converted models and cached encodings: $TLI_CACHE, else tli-lab in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("TLI_CACHE"):
        return Path(own).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").resolve() / "tli-lab"


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success its file is flushed to disk and renamed to `path`.

    A reader sees the old file or the whole new one; after an error or a kill `path` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp's 0600 would shut colleagues out of a shared folder
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, atomically."""
    with written_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Returns `folder`, first filling it with `make(temporary folder)` if it isn't there.

    Processes that ask at the same time wait for one of them to do the work; a folder that exists is whole.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
                work = Path(temporary) / "work"
                work.mkdir()
                make(work)
                work.replace(folder)
    return folder


def digest(*parts: str | bytes) -> str:
    """SHA-256 over the parts, in hex; ("ab", "c") and ("a", "bc") differ."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little"))
        sha.update(data)
    return sha.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_state(folder: Path) -> str:
    """Changes whenever a file of the folder is written; to hash gigabytes at each start would cost more than a run."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return digest(*(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files))[:16]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
