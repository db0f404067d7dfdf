"""The command in processes of its own, which can be signalled and killed.

They are forked from a server that has imported everything already: importing takes seconds, a fork does not.
"""

import atexit
import gc
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "moedistill.cli", "moedistill.runs.loop", "moedistill.stages.consistency", "moedistill.stages.evaluate",
        "moedistill_dcm.gan", "moedistill_digits.backbone", "moedistill_digits.data",
        "accelerate.tracking", "peft", "sklearn.datasets", "rich.progress", "torch._dynamo",
    ]
)  # fmt: skip


def _main(arguments, log, environment):
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # for data workers, as in a process that was started plainly
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.update(environment)
    gc.freeze()  # the end of each stage collects garbage: it need not look at modules
    from moedistill.cli import main

    main(arguments)


class Command:
    """`moedistill ARGUMENTS…`, under way; its output goes to the file `log`."""

    def __init__(self, *arguments, log, **environment):
        self.log = Path(log)
        self._process = _context.Process(
            target=_main, args=([str(argument) for argument in arguments], str(log), environment)
        )
        self._process.start()
        atexit.register(self._process.kill)  # should a test fail
        self.pid = self._process.pid

    @property
    def output(self):
        return self.log.read_text() if self.log.exists() else ""

    @property
    def running(self):
        return self._process.is_alive()

    def signal(self, signum, *, workers=True):
        """To it and its workers, as a terminal and a batch system do, or to it alone."""
        if workers:
            os.killpg(self.pid, signum)
        else:
            os.kill(self.pid, signum)

    def wait_for(self, condition, seconds=300.0):
        """Until `condition()` is true; the process must not end before."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.running, f"exit code {self.exit_code()}\n{self.output}"
            assert time.monotonic() < end, self.output
            time.sleep(0.005)

    def exit_code(self, seconds=300.0):
        """Waits for its end; negative where a signal ended it."""
        self._process.join(seconds)
        assert not self.running, f"still running after {seconds} s\n{self.output}"
        return self._process.exitcode


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start_pair(arguments, folder, **environment):
    """The command in two processes, as a launcher starts them."""
    return start_together(arguments, folder, 2, **environment)


def start_together(arguments, folder, processes, **environment):
    """The command in so many processes, as a launcher starts them."""
    port = str(free_port())
    return [
        Command(
            *arguments, log=folder / f"log-{rank}", RANK=str(rank), LOCAL_RANK=str(rank),
            WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
            **environment,
        )
        for rank in range(processes)
    ]  # fmt: skip
