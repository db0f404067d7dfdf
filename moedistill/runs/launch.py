"""A run in several processes: accelerate's launcher, and what is said where one of them is lost."""

import ctypes
import logging
import math
import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

from moedistill.errors import LostProcess, UserError
from moedistill.runtime.devices import find_device

STOPPING = 1200.0
"""Seconds that processes have to end after a signal, at most: to save 144 GiB takes half of that."""
PLACE, PROCESSES = "MOEDISTILL_PLACE", "MOEDISTILL_PROCESSES"
"""Environment: the file in which the main process tells its launcher how to go on, and how many they are."""
LOGS = ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api")


def launch(arguments: Sequence[str], processes: int, device: str | None, timeout: float, again: str) -> int:
    """Runs `moedistill` with `arguments` in so many processes of this machine; gives the exit code.

    Args:
        device: that is named in the arguments, if one is.
        timeout: the recipe's.
        again: the command.

    Raises:
        UserError: there are not so many devices; or a process was lost, or does not answer: which, how, and how to go
            on.
    """
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    there = torch.cuda.device_count()
    if find_device(device).type == "cuda" and there < processes:
        raise UserError(
            f"--num-processes {processes}: there are {there} CUDA devices here; give {there}, or --device cpu"
        )
    given = [
        "--multi_gpu", f"--num_processes={processes}", "--num_machines=1", "--machine_rank=0", "--gpu_ids=all",
        "--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no", "-m", "moedistill", *arguments,
    ]  # fmt: skip
    for name in LOGS:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # here is said what there is to say
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "place"
        os.environ |= {PLACE: str(place), PROCESSES: str(processes)}
        os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(math.ceil(min(timeout, STOPPING)))
        try:
            launch_command(launch_command_parser().parse_args(given))
        except ChildFailedError as error:
            failures = list(error.failures.values())
            # Who has an exit code of its own has said why; the others end because of it, or are ended.
            of_others = (LostProcess.exit_code, 128 + signal.SIGTERM)
            if own := [each.exitcode for each in failures if each.exitcode > 0 and each.exitcode not in of_others]:
                return int(own[0])
            message = "the processes of this run do not answer each other"
            if ended := [each for each in failures if each.exitcode < 0]:
                first, name = ended[0], signal.Signals(-ended[0].exitcode).name
                message = f"process {first.local_rank} of this run (pid {first.pid}) was ended by {name}"
            on = place.read_text(encoding="utf-8") if place.is_file() else f"it had not begun; start it with: {again}"
            raise UserError(f"{message}; {on}") from error
        except SignalException as error:
            return 128 + int(error.sigval)
    return 0


_told = ""


def tell_launcher(how_to_go_on: str) -> None:
    """Says what is saved, and how to go on, to a launcher of ours, if there is one; of the main process."""
    global _told
    _told = how_to_go_on
    if launched_here():
        Path(os.environ[PLACE]).write_text(how_to_go_on, encoding="utf-8")


def told_last() -> str:
    """What `tell_launcher` was told in this process, if anything."""
    return _told


def launched_here() -> int | None:
    """Of how many processes this is one, if a launcher of ours waits for it and says how it ended."""
    return int(os.environ[PROCESSES]) if PLACE in os.environ else None


def end_with_launcher() -> None:
    """Asks the system for a SIGTERM when the launcher is killed: nobody would ever end this process. (Linux alone.)"""
    if launched_here() is not None and hasattr(prctl := ctypes.CDLL(None), "prctl"):
        prctl.prctl(1, int(signal.SIGTERM), 0, 0, 0)  # PR_SET_PDEATHSIG


def check_launch(processes: int) -> None:
    """UserError where a launcher was asked for more processes than there are.

    `accelerate launch --cpu --num_processes 2` starts one, and says nothing; it has set where the others were to be
    found, and not how many there are.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if processes == 1 and launched and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "the launcher was asked for several processes and has started one, as accelerate's --cpu does; start them "
            "by `moedistill run … --num-processes N`, or by `accelerate launch --multi_gpu`, and with --device cpu"
        )
