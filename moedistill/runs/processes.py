"""A run's processes: how many of which kind, what one does for all of them, and that one of them is lost."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import moedistill
from moedistill.errors import Interrupted, LostProcess, SaidElsewhere, shorten
from moedistill.runs.launch import told_last

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


def described(accelerator: "Accelerator", dtype: str, *, sharded: bool = False) -> str:
    """Processes, kind, backend, devices and precision, in a few words: "2 processes (DDP over gloo), cpu, float32"."""
    import torch

    count, device = accelerator.num_processes, accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if count == 1 and not sharded:
        return f"1 process, {name}, {dtype}"
    kind, backend = "FSDP2" if sharded else "DDP", torch.distributed.get_backend()
    return f"{count} process{'es' if count > 1 else ''} ({kind} over {backend}), {name}, {dtype}"


def versions() -> dict[str, str]:
    """Of what computes."""
    import platform
    from importlib.metadata import version

    return {
        "moedistill": moedistill.__version__,
        "Python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "accelerate", "peft")},
    }


@contextmanager
def leaving() -> Iterator[None]:
    """For the whole of a process's work: at its end the processes part, all at once where nothing went wrong.

    Raises:
        LostProcess: another one is gone, or does not answer; says how to go on.
    """
    from torch import distributed

    try:
        yield
        if distributed.is_initialized():
            distributed.barrier()
    except RuntimeError as error:
        if not distributed.is_initialized() or (why := lost(error)) is None:
            raise
        ends = f"process {distributed.get_rank()} ends, as another one is gone or does not answer ({why})"
        raise LostProcess("; ".join(part for part in (ends, told_last()) if part)) from error
    finally:
        if distributed.is_initialized() and distributed.get_backend() == "gloo":
            distributed.destroy_process_group()
    if distributed.is_initialized():  # of NCCL in good order alone: it waits for what never comes
        distributed.destroy_process_group()


LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out", "connection refused")
"""What torch.distributed says, in any case, where another process is gone or does not answer."""


def lost(error: BaseException) -> str | None:
    """What an error says of another process that is gone, or does not answer; None where it says nothing of that."""
    import torch

    text = " ".join(str(error).split())
    of_processes = isinstance(error, torch.distributed.DistError) or "gloo" in text or "NCCL" in text
    if isinstance(error, RuntimeError) and of_processes and any(sign in text.lower() for sign in LOST):
        text = text.rpartition("] ")[2] if "] " in text else text
        return shorten(text.partition(". ")[0], 160)
    return None


def on_main(accelerator: "Accelerator", work: Callable[[], T]) -> T:
    """What `work` gives, which the main process alone does, on all processes; they must all come here.

    Raises:
        SaidElsewhere: on the others, where `work` raised on the main process: nobody waits for what never comes.
        Interrupted: likewise, where a signal stopped it.
    """
    from accelerate.utils import broadcast_object_list

    if accelerator.num_processes == 1:
        return work()
    result: T | None = None
    failure: tuple[str, int] | None = None
    try:
        if accelerator.is_main_process:
            result = work()
    except BaseException as error:
        failure = str(error) or type(error).__name__, getattr(error, "signum", 0)
        raise
    finally:
        result, failure = broadcast_object_list([result, failure])
    if failure is not None:
        message, signum = failure
        raise Interrupted(signum, message) if signum else SaidElsewhere(message)
    return result
