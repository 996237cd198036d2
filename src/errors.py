"""What ends a job before its time: bad input that the user can mend, a full disk, a search that has seen enough."""

from __future__ import annotations


class UserError(Exception):
    """Bad input, told in one line that names the file, line or key and what to do. Exit status 2."""


class DiskError(OSError):
    """A file that must be kept couldn't be: its disk is full or read-only. One line says what to do. Exit status 1."""

    def __init__(self, number: int, reason: str, path: str, advice: str) -> None:
        super().__init__(number, reason, path)
        self.advice = advice

    def __reduce__(self) -> tuple[type[DiskError], tuple[object, ...]]:  # a launcher's worker hands it on as a pickle
        return DiskError, (self.errno, self.strerror, self.filename, self.advice)

    def __str__(self) -> str:
        return f"{self.filename} can't be written: {self.strerror}; {self.advice}"


class NumbersError(Exception):
    """A number that isn't finite where a result should come from: the job has failed, and no verdict may come of it."""


class OutOfMemoryError(Exception):
    """Memory ran out, also with half the batch where there is one. One line says what to do. Exit status 1."""


class Pruned(Exception):  # noqa: N818 (not an error: the job is neither done nor failed)
    """A search has stopped this job, whose pruned.json says when and why."""
