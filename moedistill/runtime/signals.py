"""Ctrl-C, SIGTERM, SIGHUP: while training, finish the step and save; elsewhere stop at once. Exit code 128 + signal."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, ClassVar

from moedistill.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

SAME_SECONDS = 1.0
"""Signals closer together than this are one: launchers pass on a Ctrl-C that the terminal has sent to all already."""


class Interruption:
    """While the context is open, a signal raises `Interrupted`; within `deferred`, the first one is only noted.

    Does nothing outside of the main thread, where Python allows no signal handlers. What the process was started to
    ignore, as by nohup, stays ignored. Contexts may be nested; the innermost decides.

    Args:
        message: what to tell the user when a signal raises; if nothing, its name.

    Attributes:
        signum: the signal that was noted, or 0.
    """

    _innermost: "ClassVar[Interruption | None]" = None

    def __init__(self, message: Callable[[], str] = str) -> None:
        self.signum = 0
        self._message = message
        self._noted_at = 0.0
        self._deferring = False
        self._previous: dict[int, Any] = {}
        self._outer: Interruption | None = None

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._outer, Interruption._innermost = Interruption._innermost, self
            for signum in SIGNALS:
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread():
            if self._outer is not None and self.signum:  # the same signal once more is not a second one there
                self._outer.signum, self._outer._noted_at = self.signum, self._noted_at
            Interruption._innermost = self._outer
            for signum, handler in self._previous.items():
                signal.signal(signum, handler if handler is not None else signal.SIG_DFL)

    @classmethod
    def check(cls) -> None:
        """Raises what a signal has raised already, where compiled code has made an error of its own of that."""
        one = cls._innermost
        if one is not None and one.signum and not one._deferring:
            raise Interrupted(one.signum, one._message())

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
