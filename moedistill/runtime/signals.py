"""Ctrl-C and SIGTERM: while training, finish the step and save; elsewhere stop at once. Exit code 128 + signal."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from moedistill.errors import Interrupted

SAME_SECONDS = 1.0
"""Signals closer together than this are one: launchers pass on a Ctrl-C that the terminal has sent to all already."""


class Interruption:
    """While the context is open, a signal raises `Interrupted`; within `deferred`, the first one is only noted.

    Does nothing outside of the main thread, where Python allows no signal handlers.

    Args:
        message: what to tell the user when a signal raises.

    Attributes:
        signum: the signal that was noted, or 0.
    """

    def __init__(self, message: Callable[[], str]) -> None:
        self.signum = 0
        self._message = message
        self._noted_at = 0.0
        self._deferring = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """The block reads `signum` and stops where it likes, at its end at the latest; a second signal raises."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self.signum:
            raise Interrupted(self.signum, self._message())

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        first = not self.signum
        if not first and now - self._noted_at < SAME_SECONDS:
            return
        self.signum, self._noted_at = signum, now
        if not (first and self._deferring):
            raise Interrupted(signum, self._message())
