"""One writer in a folder, by a lock that cannot outlive its process.

What decides is `flock` on the open file `.lock`: the kernel lets go of it when the process ends, even by kill -9, and
not before, even if it is only stopped. So on one machine there is nothing stale to tell from what is alive; the file's
content, who holds it, is for people. NFS passes flock on to other machines, too. Some file systems keep it to one
machine, or have none. There the file's time tells: its holder touches it every `HEARTBEAT` seconds, and what another
machine has left is watched for `WATCH` seconds, by that file system's own clock; if nobody touches it, nobody holds it.
What this machine left before it was started anew is known by its name and that time, and is not watched.
(Without any flock, two that start in the same moment are not told apart.)
"""

import errno
import fcntl
import json
import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from moedistill.errors import UserError, shorten
from moedistill.runtime.writing import disk_errors, is_there, make_folder, make_numbered

NAME = ".lock"
HEARTBEAT = 15.0
WATCH = 3 * HEARTBEAT

_NO_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}

_held: set[int] = set()
"""Descriptors of the locks of this process."""


@contextmanager
def claimed(folder: Path, *, numbered: bool = False, but: Collection[str] = ()) -> Iterator[Path]:
    """The folder, made if need be and locked while the block runs; a new one that is left empty by an error goes away.

    Args:
        numbered: take a new folder: this one or, where it is there already, `folder-2` and so on.
        but: names that a numbered one must not have.

    Raises:
        UserError: another process writes there, or nobody can.
    """
    new = numbered or not is_there(folder)
    if numbered:
        folder = make_numbered(folder, but)
    else:
        make_folder(folder)
    try:
        with locked(folder):
            yield folder
    except BaseException:
        if new:
            with suppress(OSError):  # what holds a file stays
                folder.rmdir()
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock while the block runs.

    Raises:
        UserError: another process holds it, in one line that says which, and what to do.
    """
    path = folder / NAME
    with disk_errors(path):
        descriptor = _take(path)
    _held.add(descriptor)
    over = threading.Event()
    try:
        with disk_errors(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(_this_process()).encode(), 0)
            os.fsync(descriptor)
        threading.Thread(target=_beat, args=(path, over), daemon=True).start()
        yield
    finally:
        over.set()
        if descriptor in _held:  # not in a forked child
            _held.remove(descriptor)
            with suppress(OSError):
                path.unlink()  # before it is let go: afterwards it may be another's
            os.close(descriptor)


def is_held(folder: Path) -> bool:
    """Whether a process writes in a folder now. It looks, and does not wait.

    Where flock does not reach the holder's machine, one that was touched a short while ago is held.
    """
    try:
        descriptor = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        touched_lately = time.time() - os.fstat(descriptor).st_mtime < WATCH
        elsewhere = _read(descriptor).get("machine") not in (None, _machine())
        # Shared, and for a moment: two that look do not take each other for a holder.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return touched_lately and elsewhere
    except BlockingIOError:
        return True
    except OSError:
        return touched_lately
    finally:
        os.close(descriptor)


@contextmanager
def in_turn(path: Path) -> Iterator[bool]:
    """One process after the other: waits while another is in such a block of the same `path`, a file beside the work.

    Gives whether nobody else can be in it: where a file system has no flock, nobody waits.
    """
    descriptor = None
    while descriptor is None:
        with disk_errors(path):
            opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        alone = False
        with suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_EX)
            alone = True
        # One that was removed between our opening and locking it protects nothing.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(opened), path.stat()):
                descriptor = opened
        if descriptor is None:
            os.close(opened)
    try:
        yield alone
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _take(path: Path) -> int:
    """The lock's file, open and locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            holder = _read(descriptor)
            flock = _flock(descriptor)
            if flock is False:
                raise _refusal(path, holder)
            dead = not holder or (flock and (holder.get("machine") == _machine() or _rebooted(descriptor, holder)))
            if not dead and _beats(path, holder):
                raise _refusal(path, holder)
        except BaseException:
            os.close(descriptor)
            raise
        # One that its holder removed between our opening and locking it protects nothing.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)


def _rebooted(descriptor: int, holder: Mapping[str, Any]) -> bool:
    """Whether the lock is of this machine, before it was started last.

    Another machine may have the same name; but if it lived, it would have touched the file since.
    """
    if holder.get("host") != platform.node() or not hasattr(time, "CLOCK_BOOTTIME"):
        return False
    started = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return os.fstat(descriptor).st_mtime < started - HEARTBEAT


def _flock(descriptor: int) -> bool | None:
    """Whether we have it now; None where there is no such thing."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        return None
    return True


def _beats(path: Path, holder: Mapping[str, Any]) -> bool:
    """Whether the lock's file is touched while we watch."""
    click.echo(f"{path.parent}: is {_named(holder)} still writing there? watching for {WATCH:.0f} s", err=True)
    end, before = time.monotonic() + WATCH, _touched(path)
    while time.monotonic() < end:
        time.sleep(WATCH / 50)
        if _touched(path) != before:
            return path.exists()
    return False


def _touched(path: Path) -> int:
    """When; 0 if it is gone. Opened for it, because network file systems cache times, but ask again when opening."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def _beat(path: Path, over: threading.Event) -> None:
    while not over.wait(HEARTBEAT):
        with suppress(OSError):
            os.utime(path)


def _this_process() -> dict[str, Any]:
    program = Path(sys.argv[0] or "python")
    name = program.parent.name if program.name == "__main__.py" else program.name
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "machine": _machine(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join([name, *sys.argv[1:]]),
    }


def _machine() -> str:
    """Names the running kernel: flock is what its processes, also in containers, have in common."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return platform.node()


def _read(descriptor: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(descriptor, 100_000, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _named(holder: Mapping[str, Any]) -> str:
    if not holder:
        return "another process"
    command = shorten(str(holder.get("command")), 120)
    return f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('since')}: {command})"


def _refusal(path: Path, holder: Mapping[str, Any]) -> UserError:
    return UserError(
        f"{path.parent} is in use by {_named(holder)}; wait for it or stop it, or choose another --output. "
        f"It can be read meanwhile"
    )


def _let_go() -> None:
    # A forked child shares the open file, and so the lock: a data worker must not keep it when its run is killed.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
