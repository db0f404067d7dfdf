"""Disks that fill up, and files that cannot be written: one line, and the run goes on when there is room.

Three ways, by turns: a file system of its own, too small (where the system allows one); a limit on the size of a file;
an error as the n-th file is opened, renamed or made.
"""

import ctypes
import errno
import os
import resource
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

from .case import (
    EVERY,
    Fault,
    Part,
    Reference,
    Result,
    at_event,
    count_events,
    finish,
    reference_of,
    sound,
    steps_done,
    steps_saved,
)
from .warm import run_command

ERRORS = (errno.ENOSPC, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EROFS)
NEW_USER, NEW_MOUNTS, PRIVATE = 0x10000000, 0x00020000, 0x4000 | (1 << 18)
REMOUNT, DETACH = 32, 2


def _attack(number: int, moves: Random, folder: Path) -> Result:
    reference = reference_of(folder)
    if number % 3 == 0 and _may_mount(folder):
        return _small_file_system(reference, moves, folder)
    if number % 3 == 1:
        sizes = [path.stat().st_size for path in reference.run.rglob("*") if path.is_file()]
        limit = moves.choice([moves.randrange(1, max(sizes)), moves.choice(sizes) - 1, 4096])
        what, prepare = f"no file beyond {limit} bytes", _limit(limit)
    else:
        code = moves.choice(ERRORS)
        at = 1 + moves.randrange(count_events(reference, folder, writing=True))
        what, prepare = f"{errno.errorcode[code]} at event {at}", at_event(at, _raise(code), writing=True)
    outcome = sound(run_command(*reference.arguments(), folder=folder, prepare=prepare), what)
    _nothing_lost(folder, what)
    if outcome.code == 2 and outcome.refusal().count("\n") > 2:
        raise Fault("traceback", f"{what}: more than a line or two: {outcome.refusal()[:300]}")
    hint = outcome.hint() if moves.random() < 0.5 else None
    finish(reference, folder, hint=hint)
    return Result("refused" if outcome.refused else "right", counts=("commands followed as printed",) if hint else ())


def _nothing_lost(folder: Path, what: str) -> None:
    done, saved = steps_done(folder / "run"), steps_saved(folder / "run")
    if done - saved > EVERY:
        raise Fault("lost", f"{what}: {done} steps done, {saved} saved")


def _limit(size: int) -> Callable[[], None]:
    """For a child: no file may grow beyond so many bytes. Python ignores the signal and gets the error."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _raise(code: int) -> Callable[[str], None]:
    def act(what: str) -> None:
        event, _, path = what.partition(" ")
        if code not in (errno.ENOSPC, errno.EDQUOT) or event in ("open", "os.mkdir", "os.rename"):
            raise OSError(code, os.strerror(code), path)

    return act


def _small_file_system(reference: Reference, moves: Random, folder: Path) -> Result:
    """The run on a tmpfs that is too small for it; then on the same one, larger.

    A child has the mount to itself and starts the commands; what became of it, it writes beside.
    """
    used = sum(path.stat().st_blocks * 512 for path in reference.run.rglob("*") if path.is_file())
    size = moves.randrange(4096, int(used * 1.2))
    place, verdict, log, what = folder / "disk", folder / "verdict", folder / "log", f"a disk of {size} bytes"
    place.mkdir()

    def attack() -> None:
        _mount(place, size)
        try:
            outcome = sound(run_command(*reference.arguments(), folder=place, log=log), what)
            _nothing_lost(place, what)
            _mount(place, 100 * used, REMOUNT)
            finish(reference, place, log)
            verdict.write_text("refused" if outcome.refused else "right", encoding="utf-8")
        except Fault as fault:
            verdict.write_text(f"{fault.verdict}\n{fault}", encoding="utf-8")

    outcome = run_command(folder=folder, main=attack, seconds=180)
    if not verdict.exists():
        raise RuntimeError(outcome.output)
    word, _, reason = verdict.read_text(encoding="utf-8").partition("\n")
    return Result(word, reason, counts=("file systems that were too small",))


@cache
def _may_mount(folder: Path) -> bool:
    """Whether this system lets us have a file system of our own."""
    place = folder.parent / "mountable"
    place.mkdir(exist_ok=True)
    outcome = run_command(folder=place, main=lambda: _mount(place, 10**6))
    shutil.rmtree(place)
    return outcome.code == 0


def _mount(place: Path, size: int, flags: int = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if not flags:
        user, group = os.getuid(), os.getgid()
        if user and not libc.unshare(NEW_USER):
            Path("/proc/self/setgroups").write_text("deny", encoding="utf-8")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1", encoding="utf-8")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1", encoding="utf-8")
        _checked(libc.unshare(NEW_MOUNTS))
        _checked(libc.mount(b"none", b"/", None, PRIVATE, None))
    _checked(libc.mount(b"tmpfs", bytes(place), b"tmpfs", flags, f"size={size}".encode()))


def _checked(code: int) -> None:
    if code:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


PART = Part("disk", "full disks", 60, 260, _attack)
