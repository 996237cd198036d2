"""SIGINT and SIGTERM: what is raised for them arrives where it should, and never within what must stay whole."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_undivided = 0  # how many such blocks the main thread is in, where Python runs handlers
_waiting: list[Callable[[], None]] = []  # for the end of the outermost
_raised: BaseException | None = None  # by `raise_surely`, until it has arrived


def on_signals(action: Callable[[int], None]) -> None:
    """From now on SIGINT and SIGTERM call `action` with their number; within `undivided` blocks, at their end."""

    def handler(number: int, _: Any) -> None:
        if _undivided:
            _waiting.append(partial(action, number))
        else:
            action(number)

    for number in _SIGNALS:
        signal.signal(number, handler)


def ignore_signals() -> None:
    """From now on SIGINT and SIGTERM do nothing here, until other handlers are set."""
    for number in _SIGNALS:
        signal.signal(number, lambda *_: None)  # not SIG_IGN: Python complains where a signal is on its way already


@contextmanager
def undivided() -> Iterator[None]:
    """Around what no signal may cut in two: SQLite's lock, say, stays with a query that was left in the middle."""
    global _undivided
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _undivided += 1
    try:
        yield
    finally:
        _undivided -= 1
        if _waiting and not _undivided:
            first = _waiting[0]
            _waiting.clear()
            first()


def raise_surely(error: BaseException) -> NoReturn:
    """Raises out of a signal's handler, and again every tenth of a second that nobody is at it, until `arrived`.

    Python drops what is raised in a finalizer or in a weak reference's callback, and libraries swallow exceptions.
    """
    global _raised

    def again(*_: Any) -> None:
        handled = sys.exc_info()[1]  # by any frame, the innermost first
        while handled is not None and handled is not error:
            handled = handled.__context__
        if handled is None and not _undivided:
            raise error

    def dropped(what: Any) -> None:
        if what.exc_value is not error:
            sys.__unraisablehook__(what)

    _raised = error
    signal.signal(signal.SIGALRM, again)
    sys.unraisablehook = dropped
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    raise error


def under_way() -> BaseException | None:
    """What `raise_surely` raises and hasn't arrived: an exception met instead is what a library has made of it."""
    return _raised


def arrived() -> None:
    """What `raise_surely` raises is where it should be; for the block that handles it, or one that ends."""
    global _raised
    signal.setitimer(signal.ITIMER_REAL, 0)
    _raised = None
