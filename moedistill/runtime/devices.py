"""Where torch computes, and with how many CPU threads."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moedistill.errors import UserError

HOST = torch.device("cpu")
"""Where lies what is not needed on the device."""


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Runs the block with `count` threads within an operation, and restores what was; None leaves it to torch.

    Raises:
        UserError: they are far more than this machine has processors: some systems cannot even start them.
    """
    processors = os.cpu_count() or 1
    if count is not None and count > (most := max(64, 4 * processors)):
        raise UserError(f"training.num_threads {count}: this machine has {processors} processors; give {most} or less")
    previous = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def find_device(name: str | None) -> torch.device:
    """The device that a user named; the accelerator if there is one, else the CPU, if none was named.

    Raises:
        UserError: there is no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name!r}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise UserError(f"--device {name!r}: there are {count} CUDA devices here; choose another, or cpu")
        if device.index is not None:
            torch.cuda.set_device(device)  # accelerate takes the current one
    return device
