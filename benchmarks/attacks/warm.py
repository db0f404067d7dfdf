"""The command in children forked from this process, which has imported everything: a fork takes milliseconds.

A child has a process group, a time limit and a memory limit of its own, one thread, and no network; what it says goes
to a file. The parent starts no thread and computes nothing, so that a fork is as good as a fresh start.
"""

import contextlib
import gc
import importlib
import os
import re
import resource
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

MEMORY = 8 * 2**30
"""Bytes of address space that a child may take beyond what it begins with."""
SCREEN = 24
"""Lines that a refusal may have."""
SECONDS = 60.0
HINT = re.compile(r"(?:go on|begin it anew) with: (moedistill .+)")
"""A command that a message prints; it ends the line, and is to be copied as it is."""

_MODULES = (
    "moedistill.cli", "moedistill.runs.loop", "moedistill.runs.sample", "moedistill.runs.tables",
    "moedistill.runs.check", "moedistill.recipe.loading", "moedistill.recipe.json_schema",
    "moedistill.stages.consistency", "moedistill.stages.finetune", "moedistill.stages.evaluate",
    "moedistill.stages.sample", "moedistill.stages.export", "moedistill.metrics.base", "moedistill.data.latents",
    "moedistill_dcm.gan", "moedistill_digits.backbone", "moedistill_digits.data", "moedistill_digits.metrics",
    "moedistill_wan.backbone", "moedistill_ltx.backbone", "moedistill_hunyuan_video.backbone",
    "moedistill_cogvideox.backbone", "moedistill_hunyuan_video_15.backbone", "moedistill_open_sora.backbone",
    "accelerate.tracking", "peft", "rich.progress", "torch._dynamo", "diffusers", "transformers",
    "PIL.Image", "av", "yaml", "jsonschema",
)  # fmt: skip


def warm_up() -> None:
    """Imports everything; once, before the first child."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "COLUMNS": "100"}
    for module in _MODULES:
        importlib.import_module(module)
    from moedistill.components.plugins import load_plugins
    from moedistill.components.registry import REGISTRIES

    components = load_plugins().components
    for registry in REGISTRIES:
        for entry in components.entries(registry):
            components.get(registry, entry.name)
    import torch
    from diffusers import (  # noqa: F401  loaded lazily, by each backbone when it is built
        CogVideoXTransformer3DModel,
        HunyuanVideoTransformer3DModel,
        LTXVideoTransformer3DModel,
        WanTransformer3DModel,
    )

    torch.set_num_threads(1)
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise RuntimeError(f"{threads} threads before the first fork: set OMP_NUM_THREADS=1")
    gc.collect()
    gc.freeze()  # a child's collections need not look at, and so copy, what was imported


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: its exit code; negative where a signal ended it.
        output: what it said, both streams.
        hung: whether it was ended at its time limit.
    """

    command: str
    code: int
    output: str
    hung: bool
    seconds: float

    @property
    def refused(self) -> bool:
        return self.code == 2

    def fault(self, *signals: int) -> tuple[str, str] | None:
        """What must never be, whatever was asked: "hang" or "traceback" and why. `signals` were sent to it."""
        last = (self.output.strip().splitlines() or ["(no output)"])[-1][:300]
        if self.hung:
            return "hang", f"`{self.command}` ran into its time limit of {self.seconds:.0f} s; last line: {last}"
        if "Traceback (most recent call last)" in self.output:
            return "traceback", f"`{self.command}`: {last}"
        allowed = {0, 2} | {-signum if signum == signal.SIGKILL else 128 + signum for signum in signals}
        if self.code not in allowed:
            return "traceback", f"`{self.command}` ended with exit code {self.code}; last line: {last}"
        if self.code == 2 and (lines := self.refusal().count("\n") + 1) > SCREEN:
            return "traceback", f"`{self.command}` refuses with {lines} lines, more than a screen"
        if self.code == 2 and not self.refusal().strip():
            return "traceback", f"`{self.command}` ended with exit code 2 and not a word"
        return None

    def refusal(self) -> str:
        """What is said from the first `error:` on, or all."""
        at = self.output.find("error: ")
        return self.output[max(at, 0) :].strip()

    def hint(self) -> list[str] | None:
        """The arguments of the command that it prints as the way to go on, if it prints one."""
        found = HINT.findall(self.output)
        return shlex.split(found[-1])[1:] if found else None


class Command:
    """`moedistill ARGUMENTS…` under way in a child.

    Args:
        folder: where it runs; paths in `arguments` may be relative to it.
        prepare: is called in the child before the command.
        main: is called in place of the command line.
        log: a file that keeps what it said, after what was there; in `folder` if not given.
    """

    def __init__(
        self,
        *arguments: object,
        folder: Path,
        prepare: Callable[[], object] | None = None,
        main: Callable[[], object] | None = None,
        log: Path | None = None,
    ) -> None:
        self.arguments = [str(argument) for argument in arguments]
        self.log = log or folder / "log"
        self.begun = time.monotonic()
        self._status: int | None = None
        self._said = b""
        sys.stdout.flush()
        sys.stderr.flush()
        # A pipe rather than a file, which a limit on files would concern.
        self._pipe, into = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._pipe)
            _child(self.arguments, folder, into, prepare, main)
        os.close(into)
        os.set_blocking(self._pipe, False)

    def poll(self) -> bool:
        """Whether it has ended."""
        self._read()
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status is not None

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._pipe, 1 << 16):
                self._said += data

    def wait_for(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Until `condition()`; false if it ended before, or the time is over."""
        end = time.monotonic() + seconds
        while not condition():
            if self.poll() or time.monotonic() > end:
                return condition()
            time.sleep(0.002)
        return True

    def signal(self, signum: int) -> None:
        """To it and all that it started, as a terminal and a batch system do."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signum)

    def end(self, seconds: float = SECONDS) -> Outcome:
        """Waits for its end."""
        over = self.begun + seconds
        while not self.poll() and time.monotonic() < over:
            time.sleep(0.002)
        hung = not self.poll()
        took = time.monotonic() - self.begun
        self.signal(signal.SIGKILL)  # what it left behind, too
        if self._status is None:
            _, self._status = os.waitpid(self.pid, 0)
        self._read()
        os.close(self._pipe)
        output, code = self._said.decode(errors="replace"), os.waitstatus_to_exitcode(self._status)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"$ moedistill {' '.join(self.arguments)}\n{output}[exit code {code}]\n")
        return Outcome(" ".join(self.arguments), code, output, hung, took)


def run_command(*arguments: object, folder: Path, seconds: float = SECONDS, **options: object) -> Outcome:
    return Command(*arguments, folder=folder, **options).end(seconds)  # type: ignore[arg-type]


def _child(
    arguments: Sequence[str],
    folder: Path,
    into: int,
    prepare: Callable[[], object] | None,
    main: Callable[[], object] | None,
) -> None:
    code, begun = 70, False
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(into, 1)
        os.dup2(into, 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False, encoding="utf-8") for number in (1, 2))  # noqa: SIM115
        os.chdir(folder)
        begins_with = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (begins_with + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if prepare is not None:
            prepare()
        from moedistill.cli import main as command_line

        code, begun = 0, True
        if main is not None:
            main()
        else:
            command_line(list(arguments))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        code = 1
        if isinstance(error, KeyboardInterrupt) and not begun:
            code = 130  # a signal of ours, before the command
        else:
            traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
