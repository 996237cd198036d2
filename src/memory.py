"""Memory that runs out, on a CPU or a GPU: a second attempt with half the batch, and then what to do about it."""

from __future__ import annotations

import errno
import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from src import console
from src.errors import OutOfMemoryError

log = logging.getLogger(__name__)
Found = TypeVar("Found")

_SAID = (  # by torch's CPU allocator, the system, the C++ library, oneDNN, CUDA and its libraries
    "DefaultCPUAllocator: ",
    "not enough memory",
    "Cannot allocate memory",
    "bad_alloc",
    "could not create a memory object",
    "could not create a primitive",
    "CUDA out of memory",
    "_ALLOC_FAILED",
)
_ADVICE = {
    "training": "lower train.batch_size or objective.layer, set quant=nf4, or free memory",
    "encoding": "shorten eval.template, set quant=nf4, choose a smaller model, or free memory",
    "this job": "set quant=nf4, choose a smaller model, set dataset.limit, or free memory",
}
retries: list[str] = []  # of the job at work, for results.json


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there was no memory left; torch has a type of its own for a GPU's alone."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID)


def halved(what: str, unit: str, size: int, attempt: Callable[[int], Found], *, least: int = 1) -> tuple[Found, int]:
    """(attempt(size), size); where memory runs out, the same with half the size, which is noted, once.

    Raises OutOfMemoryError where that isn't enough, or would be less than `least`.
    """
    try:
        return attempt(size), size
    except Exception as error:
        if not ran_out(error):
            raise
        if size // 2 < least:
            raise _failure(what, error, f"{unit}={size}") from error
    # Here and not above: the error holds on to the tensors of the attempt.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = size // 2
    retries.append(f"{what} with {unit}={half} instead of {size}")
    log.warning("out of memory: %s", retries[-1])
    console.warn(f"out of memory: {retries[-1]}")
    try:
        return attempt(half), half
    except Exception as error:
        if ran_out(error):
            raise _failure(what, error, f"{unit}={size} and {half}") from error
        raise


@contextmanager
def told() -> Iterator[None]:
    """Around a job. Raises OutOfMemoryError, with advice, in place of whatever error says that memory ran out."""
    retries.clear()
    try:
        yield
    except Exception as error:
        if ran_out(error):
            raise _failure("this job", error) from error
        raise


def _failure(what: str, error: Exception, tried: str = "") -> OutOfMemoryError:
    where = f"{what} ({tried})" if tried else what
    said = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return OutOfMemoryError(f"out of memory in {where}: {_ADVICE[what]} [{said[:160]}]")
