"""What a case is, how it ended, and the small run that most parts attack."""

import contextlib
import json
import os
import re
import shutil
import signal
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from .warm import Outcome, run_command

VERDICTS = ("refused", "right", "traceback", "hang", "lost", "wrong")
"""The last four are faults: see `Result`."""


@dataclass(frozen=True)
class Result:
    """How a case ended.

    Attributes:
        verdict: `refused`: in one screen, exit code 2. `right`: done, and what came out is right. Faults: `traceback`
            (also any other exit code, and a refusal longer than a screen), `hang`, `lost` (steps beyond the last
            checkpoint, a checkpoint or file that vanished, a run that does not go on), `wrong` (done without a word,
            but on wrong bits).
        reason: of a fault.
        counts: what else is counted, such as kills.
    """

    verdict: str
    reason: str = ""
    counts: tuple[str, ...] = ()


class Fault(Exception):
    """Ends a case with a fault: a verdict and its reason."""

    def __init__(self, verdict: str, reason: str) -> None:
        super().__init__(reason)
        self.verdict = verdict


@dataclass(frozen=True)
class Part:
    """Attacks of one kind.

    Attributes:
        cases: how many there are in full.
        seconds: what all of them may take on one busy core; the parts together stay within an hour.
        attack: runs one, in an empty folder; everything about it comes from its number and the `Random`.
    """

    name: str
    title: str
    cases: int
    seconds: int
    attack: Callable[[int, Random, Path], Result]


def sound(outcome: Outcome, what: str = "", *signals: int) -> Outcome:
    """The outcome, if it is none that must never be; `what` was done to it, and `signals` were sent."""
    if fault := outcome.fault(*signals):
        raise Fault(fault[0], f"{what}: {fault[1]}" if what else fault[1])
    return outcome


def succeeded(outcome: Outcome, verdict: str, why: str) -> Outcome:
    """The outcome of a command that has to succeed."""
    if sound(outcome, why).refused:
        raise Fault(verdict, f"{why}: `{outcome.command}` refuses: {outcome.refusal()[:500]}")
    return outcome


def follow(outcome: Outcome, folder: Path, why: str, **options: Any) -> Outcome | None:
    """What becomes of the command that a message prints as the way out, run as it is printed; None without one.

    A fault if it is refused with the very message that it was to help out of, or as a command that cannot be read.
    """
    hint = outcome.hint()
    if hint is None:
        return None
    after = sound(run_command(*hint, folder=folder, **options), f"{why}, then the command that is printed")
    said = after.refusal()
    if after.refused and (said == outcome.refusal() or "Usage: " in after.output):
        raise Fault("lost", f"{why}: prints `{after.command}`, which is refused as before: {said[:300]}")
    return after


# -- the small run ----------------------------------------------------------------------------------------------------

EVERY, STEPS = 2, 6
"""Steps between checkpoints, and of each of its two stages."""
NAME = re.compile(r"(\d\d)_(.+)_(\d{8})")
"""Of a checkpoint."""


def small_recipe(**changes: Any) -> dict[str, Any]:
    """DCM on a miniature of digits, with everything that has a state or writes files: about a second."""
    optimizer = {"lr": 1e-3, "schedule": "cosine", "warmup": 2}
    stage = {"kind": "consistency", "steps": STEPS, "optimizer": optimizer, "ema_decay": 0.9}
    huber = {"kind": "huber"}
    gan = {"kind": "gan", "weight": 0.1, "width": 8, "groups": 2, "optimizer": {"lr": 1e-3, "betas": [0.0, 0.999]}}
    matching = {"kind": "feature_matching", "weight": 0.1}
    recipe: dict[str, Any] = {
        "name": "attacked",
        "backbone": {"kind": "digits", "pretrained": None, "width": 16, "num_layers": 2, "num_heads": 2},
        "trajectory": {"kind": "flow_matching", "num_steps": 8, "shift": 5.0},
        "router": {"kind": "timestep", "experts": ["semantic", "detail"], "boundaries": [{"point": 4}]},
        "experts": {
            "semantic": {"kind": "full"},
            "detail": {"kind": "lora", "from": "semantic", "rank": 2, "alpha": 4},
        },
        "data": {"kind": "digits", "styles_per_digit": 1},
        "training": {
            "batch_size": 2, "log_every": 1, "checkpoint_every": EVERY, "keep_checkpoints": 3, "num_threads": 1,
            "monitor": {"every": 3, "samples": 1, "levels": 2},
        },
        "stages": [
            {"name": "semantic", "expert": "semantic", **stage, "losses": [huber]},
            {
                "name": "detail", "expert": "detail", **stage, "losses": [huber, gan, matching],
                "probe": {"block_stride": 1},
            },
            {"name": "samples", "kind": "sample", "prompts": ["3 right"]},
            {
                "name": "evaluate", "kind": "evaluate", "samples": 4, "pictures": 1, "save_latents": True,
                "candidates": [{"name": "student"}, {"name": "teacher", "model": "teacher"}],
                "reference": "teacher", "metrics": [{"kind": "paired_distance"}],
            },
            {"name": "export", "kind": "export"},
        ],
        "sample": {"points": [8, 4]},
    }  # fmt: skip
    return {**recipe, **changes}


class Reference:
    """The uninterrupted run, and how long it takes; made once for each part, by a child like any other.

    Args:
        recipe: `small_recipe()` if not given.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.run = folder / "run"
        self.recipe = folder / "recipe.yaml"
        done = folder / "done.json"
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self.recipe.write_text(json.dumps(recipe or small_recipe()), encoding="utf-8")
            outcome = run_command("run", self.recipe, "--output", "run", "--device", "cpu", folder=folder)
            if outcome.code != 0:
                raise RuntimeError(f"the run that is to be attacked does not run by itself:\n{outcome.output}")
            done.write_text(json.dumps({"seconds": outcome.seconds}), encoding="utf-8")
        self.seconds: float = json.loads(done.read_text(encoding="utf-8"))["seconds"]

    def arguments(self, *more: object) -> list[object]:
        """Of the command that runs it in the folder `run`."""
        return ["run", self.recipe, "--device", "cpu", "--output", "run", *more]

    def differs(self, run: Path, *, reports: bool = True) -> str:
        """In what a finished run differs from the uninterrupted one: weights, moments, files; empty if in nothing.

        Args:
            reports: compare metrics and pictures as well.
        """
        ended, expected = newest(run), newest(self.run)
        if ended is None or expected is None or ended.name != expected.name:
            return f"its last checkpoint is {ended and ended.name}"
        files = ["experts", "ema", "training"]
        pairs = [(ended / f"{name}.safetensors", expected / f"{name}.safetensors") for name in files]
        stages = ("export/semantic.safetensors", "export/detail.safetensors", "evaluate/latents.safetensors")
        pairs += [(run / name, self.run / name) for name in stages]
        for one, other in pairs:
            if not one.is_file():
                return f"{one} is missing"
            if other.is_file() and (name := _differing_tensor(one, other)):
                return f"{name} in {one}"
        if not reports:
            return ""
        if lines(run) != lines(self.run):
            return "metrics.jsonl"
        if (run / "evaluate/metrics.json").read_bytes() != (self.run / "evaluate/metrics.json").read_bytes():
            return "evaluate/metrics.json"
        # But for the curves, which show a process's memory, too.
        pictures = [path.relative_to(self.run) for path in self.run.rglob("*.png") if path.name != "curves.png"]
        different = [path for path in pictures if not _same_bytes(run / path, self.run / path)]
        return str(different[0]) if different else ""


@cache
def _reference(folder: Path) -> Reference:
    return Reference(folder)


def reference_of(case: Path) -> Reference:
    """The one of all cases; `case` is a case's folder."""
    return _reference(case.parent / "reference")


def newest(run: Path) -> Path | None:
    """The newest checkpoint by its name, if it has a state; one that was written whole is about to get its name."""
    found = [
        path for path in run.glob("checkpoints/*") if NAME.fullmatch(path.name) and (path / "state.json").is_file()
    ]
    # Asked once: a run that goes on gives it its name at any moment.
    written = [path.with_name(name) for path in run.glob("checkpoints/.tmp-*") if (name := _written(path))]
    return max([*found, *written], key=lambda path: path.name, default=None)


def _written(folder: Path) -> str:
    """The name of the checkpoint that is whole in a temporary folder: its sums come last. Nothing if it is not."""
    name = folder.name.removeprefix(".tmp-")
    if not NAME.fullmatch(name):
        return ""
    try:
        state, _ = (json.loads((folder / file).read_text(encoding="utf-8")) for file in ("state.json", "sums.json"))
    except (FileNotFoundError, ValueError):
        return ""
    return name if name == f"{state['stage']:02d}_{state['stage_name']}_{state['step']:08d}" else ""


def lines(run: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, whole ones."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def steps_done(run: Path) -> int:
    """Optimiser steps of all stages so far that metrics.jsonl tells of."""
    return max((_steps(line["stage"], line["step"]) for line in lines(run)), default=0)


def steps_saved(run: Path) -> int:
    """Optimiser steps of all stages in the newest checkpoint."""
    checkpoint = newest(run)
    match = NAME.fullmatch(checkpoint.name) if checkpoint is not None else None
    return _steps(match[2], int(match[3])) if match else 0


def _steps(stage: str, step: int) -> int:
    return {"semantic": 0, "detail": STEPS}[stage] + step


def leftovers(run: Path) -> list[str]:
    """What is half written."""
    return sorted(str(path.relative_to(run)) for path in run.rglob(".tmp-*"))


def finish(reference: Reference, folder: Path, log: Path | None = None, hint: Sequence[str] | None = None) -> None:
    """Goes on with a stopped run until it is done; its end must be that of the uninterrupted one.

    Args:
        hint: the arguments of the command that it printed for this; by default those that a user would choose.
    """
    run = folder / "run"
    saved, name = steps_saved(run), newest(run)
    command = hint or reference.arguments(*(["--resume"] if name is not None else []))
    outcome = succeeded(run_command(*command, folder=folder, log=log), "lost", f"stopped at step {saved}")
    if name is not None and name.name not in outcome.output:
        raise Fault("lost", f"`{outcome.command}` does not go on from {name.name}: {outcome.output[:300]}")
    check_end(reference, run)


def check_end(reference: Reference, run: Path) -> None:
    if newest(run) is None:
        raise Fault("lost", "done, and there is no checkpoint any more")
    if different := reference.differs(run):
        raise Fault("wrong", f"ended otherwise than the uninterrupted run: {different}")
    if left := leftovers(run):
        raise Fault("lost", f"half-written files are left: {', '.join(left)}")


def tensors(file: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes by name; ValueError for what is no safetensors file."""
    data = file.read_bytes()
    if len(data) < 8:
        raise ValueError(f"{file} is too short")
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    return {
        name: (each["dtype"], each["shape"], body[slice(*each["data_offsets"])])
        for name, each in header.items()
        if name != "__metadata__"
    }


def _differing_tensor(one: Path, other: Path) -> str:
    if _same_bytes(one, other):
        return ""
    a, b = tensors(one), tensors(other)
    return next((name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)), "")


def _same_bytes(one: Path, other: Path) -> bool:
    return one.is_file() and one.read_bytes() == other.read_bytes()


# -- moments ----------------------------------------------------------------------------------------------------------


def at_event(
    number: int | None, act: Callable[[str], object], *, writing: bool = False, within: str = "run"
) -> Callable[[], None]:
    """For a child: calls `act` as it is about to do the `number`-th thing to the files of a folder, or any.

    These are Python's audit events, so no name of a function is used: files opened, renamed, removed, folders made.

    Args:
        writing: count only what changes something.
        within: the run's folder, or one in it.
    """

    def prepare() -> None:
        import sys

        count, root = 0, os.path.join(os.getcwd(), within)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event in _EVENTS and _below(root, arguments) and not (writing and _reads(event, arguments)):
                count += 1
                if number in (None, count):
                    act(f"{event} {arguments[0]}")

        sys.addaudithook(hook)

    return prepare


_EVENTS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"})


def _below(root: str, arguments: tuple[Any, ...]) -> bool:
    path = arguments[0]
    if not isinstance(path, str | os.PathLike):
        return False
    full = os.path.abspath(os.fspath(path))
    return full == root or full.startswith(f"{root}{os.sep}")


def _reads(event: str, arguments: tuple[Any, ...]) -> bool:
    return event == "open" and not int(arguments[2]) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)


def count_events(reference: Reference, folder: Path, *, writing: bool = False, within: str = "run") -> int:
    """How many there are in the whole run."""
    file = reference.folder / f"events-{writing}-{within.replace('/', '-')}.json"
    if not file.exists():
        place = folder / "counting"
        place.mkdir(exist_ok=True)
        tally = place / "tally"

        def act(_: str) -> None:
            with open(tally, "a", encoding="utf-8") as out:
                out.write(".")

        prepare = at_event(None, act, writing=writing, within=within)
        succeeded(run_command(*reference.arguments(), folder=place, prepare=prepare), "lost", "counting events")
        file.write_text(str(len(tally.read_text(encoding="utf-8"))), encoding="utf-8")
        shutil.rmtree(place)
    return int(file.read_text(encoding="utf-8"))


def kill_now(signum: int) -> Callable[[str], None]:
    return lambda _: os.kill(os.getpid(), signum)


def kill_soon(signum: int, seconds: float) -> Callable[[str], None]:
    """A short while after the event: within what reads or writes the file, also in compiled code."""

    def act(_: str) -> None:
        pid = os.getpid()
        if os.fork() == 0:
            time.sleep(seconds)
            os.kill(pid, signum)
            os._exit(0)

    return act


SIGNALS = (signal.SIGKILL,) * 7 + (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
