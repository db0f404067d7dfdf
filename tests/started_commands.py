"""The command in processes of its own, which can be signalled and killed.

They are forked from a server that has imported everything already: importing takes seconds, a fork does not. Where the
command is a launcher, its processes are forked from it, as its children.
"""

import atexit
import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "moedistill.cli", "moedistill.runs.loop", "moedistill.stages.consistency", "moedistill.stages.evaluate",
        "moedistill_dcm.gan", "moedistill_digits.backbone", "moedistill_digits.data",
        "accelerate.tracking", "peft", "rich.progress", "torch._dynamo",
        "accelerate.commands.accelerate_cli", "torch.distributed.run",
    ]
)  # fmt: skip


class _Forked:
    """What a launcher starts, `python -u -m moedistill ARGUMENTS…`, as a fork of it; as a `Popen`."""

    def __init__(self, arguments, environment):
        assert arguments[1:4] == ("-u", "-m", "moedistill"), arguments
        self._process = multiprocessing.Process(target=_launched, args=(arguments[4:], environment))
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        self._process.is_alive()  # looks whether it is
        return self._process.exitcode

    def wait(self, seconds=None):
        self._process.join(seconds)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("moedistill", seconds)
        return self.poll()


def _launched(arguments, environment):
    os.setsid()
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):  # not the launcher's own
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["moedistill", *arguments]
    _moedistill()


def _main(program, arguments, folder, log, errors, environment):
    os.setsid()
    os.chdir(folder)
    multiprocessing.set_start_method("fork", force=True)  # for data workers, as in a process that was started plainly
    with open(log, "ab", buffering=0) as said, open(errors, "ab", buffering=0) as wrong:
        os.dup2(said.fileno(), 1)
        os.dup2(wrong.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.update(environment)
    gc.freeze()  # the end of each stage collects garbage: it need not look at modules
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    SubprocessHandler._popen = lambda handler, arguments, environment: _Forked(arguments, environment)
    sys.argv = [program, *arguments]
    sys.exit(PROGRAMS[program]())


def _moedistill():
    from moedistill.cli import main
    from moedistill.runs import loop
    from moedistill.runs.callbacks import curves

    # As in the tests' own process (conftest): a page and curves take as long as many of these runs.
    loop.write_page = curves.draw = lambda *_, **__: None
    main()


def _accelerate():
    from accelerate.commands.accelerate_cli import main

    main()


def _torchrun():
    from torch.distributed.run import main

    main()


PROGRAMS = {"moedistill": _moedistill, "accelerate": _accelerate, "torchrun": _torchrun}
"""By the name of the script that an installation has for each."""


class Command:
    """`PROGRAM ARGUMENTS…`, under way here; its output goes to the file `log`, errors to `errors` if given."""

    def __init__(self, *arguments, log, errors=None, program="moedistill", **environment):
        self.log = Path(log)
        arguments = [str(argument) for argument in arguments]
        files = str(log), str(errors or log)
        self._process = _context.Process(target=_main, args=(program, arguments, os.getcwd(), *files, environment))
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
