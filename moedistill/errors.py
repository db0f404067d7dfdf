"""Errors that are the user's to fix, and how they are shown: no traceback, one screen, exit code 2."""

import difflib
import signal
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

SCREEN_LINES = 24
SCREEN_WIDTH = 100
COUNTED = 5
"""How many different values are listed by name."""


class UserError(Exception):
    """The user's mistake; the message gives the value, the rule and the way out. The command exits with code 2."""


class SaidElsewhere(UserError):
    """The user's mistake, which another process of the same run has shown already."""


class LostProcess(UserError):
    """Another process of the same run is gone, or does not answer; the command exits with 3."""

    exit_code = 3


class WriteError(UserError):
    """A result cannot be written: the disk is full, or nobody may write there."""


class Interrupted(BaseException):
    """A signal stopped what was under way, which has left nothing half-written; the command exits with 128 + signal.

    Like KeyboardInterrupt it is no Exception, so that no library takes it for a failure of its own.
    """

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message or f"stopped by {signal.Signals(signum).name}")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        return 128 + self.signum


@contextmanager
def user_errors(where: str) -> Iterator[None]:
    """Turns a ValueError of the block, which only a user can cause, into a UserError that says where it came from."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe.

    Attributes:
        path: dotted path of the key, as `--set` takes it; empty for the file as a whole.
        message: the value and the rule.
        where: `file:line`, or the `--set` that brought the value; empty where a recipe is not from a file.
        hint: the way out, if it is not plain from the message.
    """

    path: str
    message: str
    where: str = ""
    hint: str = ""

    def lines(self) -> list[str]:
        """The problem as lines of at most `SCREEN_WIDTH` characters."""
        head = ": ".join(part for part in (self.where, self.path, self.message) if part)
        text = [_wrap(head, "  ")]
        if self.hint:
            text.append(_wrap(self.hint, "      "))
        return [line for lines in text for line in lines]


class RecipeError(UserError):
    """Everything that is wrong with a recipe, as far as it can be seen at once.

    Attributes:
        problems: one `Problem` each; `str()` of the error shows as many as fit on one screen.
    """

    def __init__(self, problems: Sequence[Problem], source: str = "recipe") -> None:
        self.problems = list(problems)
        self.source = source
        super().__init__(str(self))

    def __str__(self) -> str:
        count = len(self.problems)
        lines = [f"{shorten(self.source, 80)}: {count} problem{'s' if count != 1 else ''}"]
        for shown, problem in enumerate(self.problems):
            new = problem.lines()
            # One line stays free for "and N more", one for the prompt.
            if len(lines) + len(new) > SCREEN_LINES - 2 and shown > 0:
                lines.append(f"  … and {count - shown} more")
                break
            lines += new[: SCREEN_LINES - 3]
        return "\n".join(lines)


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name most like `word`, if one is like it at all."""
    names = {name.lower(): name for name in names}
    found = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.6)
    return names[found[0]] if found else None


def suggest(word: str, names: Iterable[str]) -> str:
    """`did you mean 'x'?` or nothing, and the names allowed: the end of a message about an unknown name."""
    names = sorted(names)
    match = nearest(word, names)
    allowed = shorten(", ".join(names), 400) if names else "none"
    return f"did you mean {match!r}? allowed: {allowed}" if match else f"allowed: {allowed}"


def shorten(text: str, length: int) -> str:
    """`text`, printable and cut in the middle to `length` characters."""
    text = "".join(char if char.isprintable() else "�" for char in text)
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return f"{text[:half]}…{text[len(text) - half :]}"


def counted(counts: Mapping[Any, int]) -> str:
    """Values with how often each is there, the most frequent first."""
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    shown = [f"{value} × {count}" for value, count in ranked[:COUNTED]]
    return ", ".join(shown + [f"and {len(ranked) - COUNTED} more"] * (len(ranked) > COUNTED)) or "none"


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        shorten(text, 800), SCREEN_WIDTH, initial_indent=indent, subsequent_indent="      ", break_on_hyphens=False
    )
