"""Files that later steps rely on: written whole or not at all, made once, checked by digest."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from src.errors import DiskError

_DISK = {
    errno.ENOSPC: "its disk is full",
    errno.EDQUOT: "the quota of its disk is used up",
    errno.EROFS: "its disk is read-only",
}

log = logging.getLogger(__name__)
SUMS = "SHA256SUMS"
_LOADED = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja", ".py")


def cache_dir() -> Path:
    """Folder of converted models and cached encodings: $TLI_CACHE, else tli-lab in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("TLI_CACHE"):
        return Path(own).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").resolve() / "tli-lab"


def disk_error(error: Exception, path: Path, variable: str | None = None) -> DiskError | None:
    """What to tell of an error in writing `path` that is a full or read-only disk's; None for any other.

    `variable` is the environment's that says where such files go; none for a job's.
    """
    number = error.errno if isinstance(error, OSError) else None
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors has it in words only
        number = int(found[1])
    if number not in _DISK or isinstance(error, DiskError):
        return error if isinstance(error, DiskError) else None
    mend = "make it writable" if number == errno.EROFS else "free some space"
    if variable is None and path.is_relative_to(cache_dir()):
        variable = "TLI_CACHE"
    other = f"have {variable} name another folder" if variable else "choose another hydra.run.dir (or hydra.sweep.dir)"
    return DiskError(number, _DISK[number], str(path), f"{mend}, or {other}")


@contextmanager
def room_for(path: Path, variable: str | None = None) -> Iterator[None]:
    """Around what writes `path`. Raises DiskError where its disk is full or read-only."""
    try:
        yield
    except Exception as error:
        if found := disk_error(error, path, variable):
            raise found from error
        raise


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success its file is flushed to disk and renamed to `path`.

    A reader sees the old file or the whole new one; after an error or a kill `path` is untouched. Raises DiskError.
    """
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            _flush(temporary)
            temporary.chmod(0o666 & ~_umask())  # mkstemp's 0600 would shut colleagues out of a shared folder
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def filled_atomically(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder; on success its files are flushed and it's renamed to `folder`, which mustn't exist."""
    with room_for(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp") as temporary:
            work = Path(temporary) / "work"  # TemporaryDirectory's own mode would shut colleagues out
            work.mkdir()
            yield work
            for file in work.rglob("*"):
                _flush(file)
            work.replace(folder)


def held(folder: Path) -> int | None:
    """Makes the folder this process's alone, until it ends or os.close is given what this returns.

    None where the file system has no such lock. Raises BlockingIOError where another process holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)  # of the folder itself: nothing is left in it
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return handle


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, atomically."""
    with written_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Returns `folder`, first filling it with `make(temporary folder)` if it isn't there.

    Processes that ask at the same time wait for one of them to do the work. Its SHA256SUMS tells whether it is as it
    was made; a damaged folder is named in the log and made again.
    """
    if _as_made(folder):  # asked without the lock, which a read-only cache would refuse
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not _as_made(folder):
            remove_leftovers(folder)
            if folder.exists():
                log.warning("%s is damaged (it differs from its %s): made again", folder, SUMS)
                aside = folder.with_name(f".{folder.name}.damaged")  # at once: half of it, without sums, would pass
                folder.rename(aside)
                shutil.rmtree(aside)
            with filled_atomically(folder) as work:
                make(work)
                (work / SUMS).write_text(_sums(work), encoding="utf-8")
    return folder


def remove_leftovers(path: Path) -> None:
    """Takes away what killed attempts at `path` have left beside it; for who holds the lock under which it's made."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def _as_made(folder: Path) -> bool:
    """Whether the folder is there and its files agree with its SHA256SUMS; earlier versions wrote none."""
    try:
        return folder.exists() and (folder / SUMS).read_bytes() == _sums(folder).encode()
    except FileNotFoundError:
        return True


def _sums(folder: Path) -> str:
    """The folder's files as `sha256sum -c` reads them. 540 MB take 0.4 s of one core."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    return "".join(f"{file_digest(path)}  {path.name}\n" for path in files)


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


def folder_contents(folder: Path) -> str:
    """SHA-256 over what a model is loaded from: weights, settings, tokenizer.

    A gigabyte takes a second, so the cache keeps it for as long as `folder_state` stays: a file that is changed and
    given its old size and time is noticed only where the cache doesn't know the folder, as for src.reproduce.
    """
    memo = cache_dir() / "contents" / digest(str(folder.resolve()), folder_state(folder))
    with suppress(OSError, ValueError):
        found, check = memo.read_text(encoding="utf-8").split()
        if check == digest(found):
            return found
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in _LOADED)
    found = digest(*(part for file in files for part in (file.name, file_digest(file))))
    with suppress(OSError):  # a cache that can't be written costs time alone
        write_text(memo, f"{found} {digest(found)}\n")
    return found


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
