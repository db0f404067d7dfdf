"""Reading files that a user names: ordinary files alone, and never more of one than it can sensibly hold.

A pipe has no end that one could wait for, nor has /dev/zero; both are refused before a byte is read.
"""

import errno
import os
import stat
from pathlib import Path

MIB = 1 << 20
LARGEST_TEXT = 64 * MIB
"""Bytes of a text that people or tools write: prompts, plugins, JSON beside a model."""
LARGEST_INDEX = 1024 * MIB
"""Bytes of an index of stored samples: a million of them with long captions."""


def open_file(path: str | Path, at_most: int | None) -> int:
    """A descriptor, to be closed, of a regular file with no more than `at_most` bytes, if there is a limit.

    Raises:
        OSError: it is a folder, a pipe or a device, or larger; or what opening a file raises.
    """
    # Without waiting: to open a pipe is to wait for whoever writes to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, f"it is {_kind(status.st_mode)}, not a file", str(path))
        if at_most is not None and status.st_size > at_most:
            raise _too_large(path, at_most)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def check_file(path: str | Path, at_most: int | None = None) -> None:
    """OSError where `open_file` raises it: for what reads the file by itself."""
    os.close(open_file(path, at_most))


def read_bytes(path: str | Path, at_most: int = LARGEST_TEXT) -> bytes:
    """All of a regular file; OSError where it is none, or has more than `at_most` bytes."""
    data = bytearray()
    with os.fdopen(open_file(path, at_most), "rb") as file:
        while block := file.read(MIB):  # not by its size: it may have grown, or be one of /proc's, whose size is 0
            data += block
            if len(data) > at_most:
                raise _too_large(path, at_most)
    return bytes(data)


def read_text(path: str | Path, at_most: int = LARGEST_TEXT) -> str:
    """A regular file as UTF-8, with or without a mark at its start; UnicodeDecodeError where it is not."""
    return read_bytes(path, at_most).decode("utf-8-sig")


def reason(error: Exception) -> str:
    """Why a file could not be read, without the number and the name that an OSError puts around it."""
    return getattr(error, "strerror", None) or str(error)


def _too_large(path: str | Path, at_most: int) -> OSError:
    size = f"{at_most // MIB} MiB" if at_most >= MIB else f"{at_most // 1024} KiB"
    return OSError(errno.EFBIG, f"it is larger than {size}", str(path))


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    return next((name for test, name in kinds.items() if test(mode)), "a device")
