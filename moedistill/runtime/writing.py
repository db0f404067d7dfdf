"""Writing results: whole or not at all, never over what is not ours, and one line where the disk refuses."""

import errno
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path

from safetensors import SafetensorError

from moedistill.errors import UserError, WriteError

TEMPORARY = ".tmp-"
"""Before the name of what is not finished."""

_WAYS_OUT = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there, or raise your quota",
    errno.EFBIG: "the limit is the file system's, or that of `ulimit -f`",
    errno.EACCES: "allow writing there, or choose another place",
    errno.EPERM: "allow writing there, or choose another place",
    errno.EROFS: "choose another place: this file system can only be read",
    errno.EIO: "look at the disk, or choose another place",
}

_OF_THE_DISK = {
    *_WAYS_OUT,
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EBUSY, errno.ETXTBSY, errno.EXDEV, errno.EMLINK, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS),
    *(errno.ENOLCK, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ENOTCONN, errno.EMFILE, errno.ENFILE, errno.EPIPE),
}
"""What a path, a file system or an open file may say; not what a network does, such as a refused connection."""


@contextmanager
def disk_errors(place: Path, size: int | None = None) -> Iterator[None]:
    """Turns an error of the disk in the block into a WriteError in one line, for `place`.

    Args:
        size: in bytes, where it is known: then the room for it is looked at first.
    """
    if size is not None and (free := free_bytes(place)) is not None and free < size:
        message = f"it needs {_bytes(size)}, and {_bytes(free)} are free; make room there"
        raise WriteError(f"cannot write {_shown(place)}: {message}")
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _errno(error)
        if number not in _OF_THE_DISK:
            raise
        facts = [] if size is None else [f"{_bytes(size)} needed"]
        if number in (errno.ENOSPC, errno.EDQUOT) and (free := free_bytes(place)) is not None:
            facts.append(f"{_bytes(free)} free there")
        why = os.strerror(number) + (f" ({', '.join(facts)})" if facts else "")
        way_out = f"; {_WAYS_OUT[number]}" if number in _WAYS_OUT else ""
        raise WriteError(f"cannot write {_shown(place)}: {why}{way_out}") from error


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to; at the end of the block it takes the place of `path`, all at once.

    If the block raises, nothing is left of it, and `path` is what it was. Several in one `ExitStack` appear together at
    its end, the first entered last. A link or a device, such as /dev/stdout, is written to as it is.

    Raises:
        WriteError: the disk is full, or refuses otherwise.
    """
    with disk_errors(path):
        as_it_is = path.is_symlink() or (path.exists() and not path.is_file())
    if as_it_is:
        with disk_errors(path):
            yield path
        return
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        with disk_errors(path):
            yield temporary
            sync(temporary)
            temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def sync(path: Path) -> None:
    """Has a file's, or a folder's, content written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Makes an output folder; UserError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --output") from error


def is_there(path: Path) -> bool:
    """Whether there is anything; UserError where that cannot be seen, or where it is no name that a file can have."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path.is_symlink()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"cannot write to {path}: {why}; choose another --output") from error
    return True


def numbered(path: Path) -> Iterator[Path]:
    """This path, `path-2`, `path-3` …"""
    return chain([path], (path.with_name(f"{path.name}-{number}") for number in count(2)))


def make_numbered(folder: Path, but: Collection[str] = ()) -> Path:
    """Makes a folder that was not there: this one, or the first of `folder-2`, `folder-3` … that nobody else makes.

    Args:
        but: names that it must not have.
    """
    make_folder(folder.parent)
    for candidate in (path for path in numbered(folder) if path.name not in but):
        try:
            candidate.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot write to {candidate}: {error.strerror}; choose another --output") from error
        return candidate
    raise AssertionError("unreachable")


def refuse_used(folder: Path, but: Collection[str] = ()) -> None:
    """UserError where an output folder holds anything but hidden files and logs, as of `> FOLDER/log.txt`.

    Args:
        but: other names that do no harm.
    """
    if not is_there(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --output, a new or an empty folder")
    with disk_errors(folder):
        found = sorted(path.name for path in folder.iterdir() if path.name not in but and not _harmless(path))
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        names = f"{', '.join(found[:3])}{more}"
        raise UserError(f"{folder} is not empty ({names}); choose another --output, a new or an empty folder")


def _harmless(path: Path) -> bool:
    return path.name.startswith(".") or path.suffix in (".log", ".out", ".err") or path.name == "log.txt"


def _errno(error: Exception) -> int | None:
    """The system's number of an error; safetensors only says it."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def free_bytes(place: Path) -> int | None:
    """Bytes free where `place` is to lie; None where the file system does not tell."""
    there = next((path for path in (place, *place.absolute().parents) if os.path.exists(path)), Path("/"))
    try:
        usage = shutil.disk_usage(there)
    except OSError:
        return None
    return usage.free if usage.total else None


def _bytes(size: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}" if size < 1000 * factor else f"{size / factor:.0f} {unit}"
    return f"{size} bytes"


def _shown(path: Path) -> Path:
    return Path(*(part.removeprefix(TEMPORARY) for part in path.parts))
