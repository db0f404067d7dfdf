"""How far a long work on data is, said now and then."""

import time
from collections.abc import Callable

SAYING = 10.0
"""Seconds between lines."""

Say = Callable[[str], None]


def silent(line: str) -> None:
    """Says nothing."""


class Progress:
    """Says how much of a work is done, and about how long the rest takes.

    Args:
        what: is done, such as "clips are encoded".
        total: how many things there are.
    """

    def __init__(self, what: str, total: int, say: Say) -> None:
        self._what, self._total, self._say, self._done = what, total, say, 0
        self._start = self._said = time.monotonic()

    def step(self) -> None:
        """One more is done."""
        self._done += 1
        now = time.monotonic()
        if now - self._said >= SAYING:
            left = (now - self._start) / self._done * (self._total - self._done)
            self._say(f"{self._done} of {self._total} {self._what}, about {left / 60:.0f} min to go")
            self._said = now
