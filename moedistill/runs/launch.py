"""A run in several processes: accelerate's launcher, and what is said where one of them is lost."""

import logging
import math
import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

from moedistill.errors import UserError
from moedistill.runs.commands import RunCommand
from moedistill.runtime.checkpoint import find_checkpoint
from moedistill.runtime.devices import find_device

PLACE = "MOEDISTILL_PLACE"
"""Environment: the file in which the main process tells its launcher where the run lies."""


def launch(arguments: Sequence[str], processes: int, device: str | None, timeout: float, command: RunCommand) -> int:
    """Runs `moedistill` with `arguments` in so many processes of this machine; gives the exit code.

    Args:
        device: that is named in the arguments, if one is.
        timeout: seconds that a process has to end, once another one is lost or a signal came.
        command: what a message says of this run.

    Raises:
        UserError: there are not so many devices; or a process was lost: which, how, and how to go on.
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
        "--multi_gpu", f"--num_processes={processes}", "--num_machines=1", "--main_process_port=0",
        "--mixed_precision=no", "--dynamo_backend=no", "-m", "moedistill", *arguments,
    ]  # fmt: skip
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # here is said what there is to say
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "place"
        os.environ |= {PLACE: str(place), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(timeout))}
        try:
            launch_command(launch_command_parser().parse_args(given))
        except ChildFailedError as error:
            failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
            # The others end because of it; one that was ended from outside is the first.
            failure = next((each for each in failures if each.exitcode < 0), failures[0])
            if failure.exitcode > 0:  # it has said why
                return int(failure.exitcode)
            ended = f"process {failure.local_rank} of this run (pid {failure.pid}) was ended by"
            name = signal.Signals(-failure.exitcode).name
            raise UserError(f"{ended} {name}; {_where_to_go_on(place, command)}") from error
        except SignalException as error:
            return 128 + int(error.sigval)
    return 0


def tell_launcher(folder: Path) -> None:
    """Says to a launcher of ours, if there is one, where the run of this process lies."""
    if launched_here():
        Path(os.environ[PLACE]).write_text(str(folder), encoding="utf-8")


def launched_here() -> bool:
    """Whether a launcher of ours waits for this process, and says how it ended."""
    return PLACE in os.environ


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


def _where_to_go_on(place: Path, command: RunCommand) -> str:
    try:
        folder = Path(place.read_text(encoding="utf-8"))
    except OSError:
        return "it had not begun yet"
    try:
        newest = find_checkpoint(folder)
    except UserError:
        return f"nothing is saved yet; begin it anew with: {command.begin(folder)}"
    return f"saved is {newest}; go on with: {command.go_on(folder)}"
