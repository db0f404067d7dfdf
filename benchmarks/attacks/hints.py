"""Commands that messages print as the way out, run as they are printed: the run ends as the uninterrupted one.

A run is stopped before its first checkpoint, in stages before the first that trains, after a checkpoint, in a branch,
with `--set`, in folders of odd names; or it is refused, for a changed recipe, a used folder, or data at fault.
"""

import json
import shutil
import signal
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from . import data
from .case import (
    EVERY,
    SIGNALS,
    Fault,
    Part,
    Reference,
    Result,
    at_event,
    check_end,
    count_events,
    kill_now,
    newest,
    small_recipe,
    sound,
    steps_saved,
    succeeded,
)  # fmt: skip
from .warm import Command, Outcome, run_command

POLITE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FIRST = ("before", "before_evaluate", "before_export")
"""Stages before the first that trains."""


@cache
def _plain(folder: Path) -> Reference:
    return Reference(folder / "reference")


@cache
def _early(folder: Path) -> Reference:
    """The small run with stages before those that train."""
    candidates = [{"name": "teacher", "model": "teacher"}]
    first: list[dict[str, Any]] = [
        {"name": "before", "kind": "sample", "prompts": ["3 right"]},
        {
            "name": "before_evaluate", "kind": "evaluate", "samples": 4, "pictures": 1, "candidates": candidates,
            "reference": "teacher", "metrics": [{"kind": "paired_distance"}],
        },
        {"name": "before_export", "kind": "export"},
    ]  # fmt: skip
    recipe = small_recipe()
    return Reference(folder / "reference-early", {**recipe, "stages": first + recipe["stages"]})


@cache
def _other_seed(folder: Path) -> Reference:
    return Reference(folder / "reference-seed", small_recipe(seed=3))


def _followed(outcome: Outcome, folder: Path, why: str) -> bool:
    """Runs the command that is printed, which has to be done; false if none is printed."""
    hint = outcome.hint()
    if hint is None:
        return False
    succeeded(run_command(*hint, folder=folder), "lost", f"{why}; then, as printed")
    return True


def _must_follow(outcome: Outcome, folder: Path, why: str, *again: object) -> None:
    """`again`: the command itself, for where it says that nothing has begun."""
    if again and "start it again" in outcome.output:
        succeeded(run_command(*again, folder=folder), "lost", f"{why}; then once more")
    elif not _followed(outcome, folder, why):
        raise Fault("lost", f"{why}: no command to go on is printed: {outcome.output[-300:]}")


def _before_the_first_checkpoint(moves: Random, folder: Path) -> Result:
    """Stopped in a stage before those that train, and gone on with as the run, or `--resume`, says."""
    reference, run = _early(folder.parent), folder / "run"
    signum = moves.choice(SIGNALS)
    within = f"run/{moves.choice(FIRST)}"
    at = 1 + moves.randrange(count_events(reference, folder, within=within))
    what = f"{signum.name} at event {at} in {within}"
    prepare = at_event(at, kill_now(signum), within=within)
    stopped = sound(run_command(*reference.arguments(), folder=folder, prepare=prepare), what, signum)
    if stopped.code in (0, 2) or steps_saved(run):
        raise Fault("wrong", f"{what}: exit code {stopped.code}, and {newest(run)} is there: {stopped.refusal()[:300]}")
    if signum in POLITE and stopped.output and moves.random() < 0.5:
        _must_follow(stopped, folder, what)
    else:
        how = moves.choice([["--resume"], ["--resume-from", "run"], []])
        arguments = reference.arguments(*how) if how != ["--resume-from", "run"] else [*reference.arguments()[:4], *how]
        outcome = sound(run_command(*arguments, folder=folder), what)
        if outcome.refused and not _followed(outcome, folder, f"{what}, {' '.join(how)}"):
            if how:
                raise Fault("lost", f"{what}, {' '.join(how)}: no way on is printed: {outcome.refusal()[:300]}")
            return Result("refused")  # with another --output
    check_end(reference, run)
    return Result("right")


def _before_anything(moves: Random, folder: Path) -> Result:
    """Stopped at any moment before the first checkpoint of a run that trains at once."""
    reference, run = _plain(folder.parent), folder / "run"
    signum = moves.choice(POLITE)
    command = Command(*reference.arguments(), folder=folder)
    command.wait_for(run.exists, 20)
    command.wait_for(lambda: False, moves.uniform(0, 0.3 * reference.seconds))
    command.signal(signum)
    stopped = sound(command.end(), signum.name, signum)
    if stopped.code == 0:
        return Result("right", counts=("runs that were done before they were stopped",))
    _must_follow(stopped, folder, signum.name, *reference.arguments())
    check_end(reference, run)
    return Result("right")


def _stopped(reference: Reference, moves: Random, folder: Path, *arguments: object, run: str = "run") -> Outcome:
    """The run, stopped after a checkpoint, politely."""
    step, signum = moves.choice([EVERY, 2 * EVERY, 4 * EVERY]), moves.choice(POLITE)
    command = Command(*(arguments or reference.arguments()), folder=folder)
    command.wait_for(lambda: steps_saved(folder / run) >= step, 30)
    command.signal(signum)
    return sound(command.end(), f"{signum.name} after step {step}", signum)


def _used_folder(moves: Random, folder: Path) -> Result:
    """A stopped run's folder, given as a new one."""
    reference = _plain(folder.parent)
    _stopped(reference, moves, folder)
    outcome = sound(run_command(*reference.arguments(), folder=folder), "a stopped run's folder")
    if not outcome.refused:
        raise Fault("lost", "`run --output` into a stopped run's folder, without --resume, is done")
    _must_follow(outcome, folder, "a stopped run's folder")
    check_end(reference, folder / "run")
    return Result("refused")


def _changed_recipe(moves: Random, folder: Path) -> Result:
    reference = _plain(folder.parent)
    _stopped(reference, moves, folder)
    changes = ["seed=5", "training.batch_size=1", "backbone.width=32", "stages.semantic.optimizer.lr=0.01",
               "trajectory.shift=3.0", "stages.semantic.losses.0.weight=2"]  # fmt: skip
    change = moves.choice(changes)
    outcome = sound(run_command(*reference.arguments("--resume", "--set", change), folder=folder), change)
    if not outcome.refused:
        raise Fault("wrong", f"--resume with --set {change} is done")
    _must_follow(outcome, folder, f"--resume with --set {change}")
    check_end(reference, folder / "run")
    return Result("refused")


def _overrides(moves: Random, folder: Path) -> Result:
    """What was changed with --set is in the folder's recipe, so the printed command has no need of it."""
    reference = _plain(folder.parent)
    stopped = _stopped(reference, moves, folder, *reference.arguments("--set", "seed=3"))
    _must_follow(stopped, folder, "stopped, with --set seed=3")
    check_end(_other_seed(folder.parent), folder / "run")
    return Result("right")


def _odd_names(moves: Random, folder: Path) -> Result:
    reference = _plain(folder.parent)
    names = ["my run's", "-run", "--resume", "ä → b", "$HOME", "a;b & c", '"', "#1", "~", "*", "a\\b", "runs/a=b/[1]"]
    name = moves.choice(names)
    arguments = [*reference.arguments()[:4], f"--output={name}"]
    stopped = _stopped(reference, moves, folder, *arguments, run=name)
    _must_follow(stopped, folder, f"stopped in {name!r}")
    check_end(reference, folder / name)
    return Result("right")


def _branch(moves: Random, folder: Path) -> Result:
    """A run from a checkpoint of another folder, stopped before or after its own first checkpoint."""
    reference = _plain(folder.parent)
    _stopped(reference, moves, folder)
    source = newest(folder / "run")
    assert source is not None
    whole = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    from_it = ["run", reference.recipe, "--device", "cpu", "--resume-from", f"run/checkpoints/{source.name}"]
    command = Command(*from_it, "--output", "other", folder=folder)
    if moves.random() < 0.5:
        command.wait_for((folder / "other").exists, 30)
    else:
        command.wait_for(lambda: steps_saved(folder / "other") > steps_saved(folder / "run"), 30)
    signum = moves.choice(POLITE)
    command.signal(signum)
    stopped = sound(command.end(), f"a branch, {signum.name}", signum)
    if stopped.code != 0:
        _must_follow(stopped, folder, f"a branch, stopped by {signum.name}", *from_it, "--output", "other")
    check_end(reference, folder / "other")
    if changed := [path for path, content in whole.items() if not path.is_file() or path.read_bytes() != content]:
        raise Fault("lost", f"a branch changed {changed[0]} of the run that it is from")
    return Result("right")


def _data_at_fault(moves: Random, folder: Path) -> Result:
    """The sample that stops a run is mended, and the printed command goes on: as if it had always been whole."""
    bad = moves.choice([data.FEW, data.MANY - 1])
    recipe = data.recipe("wan", 1, data.MANY)
    recipe["training"] |= {"checkpoint_every": moves.choice([1, None]), "keep_checkpoints": 2}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    nan = float("nan")

    def make(bad: int | None) -> None:
        samples = [data.sample("wan", i % 10) for i in range(data.MANY)]
        if bad is not None:
            samples[bad]["latents"][0, 0, 0, 0] = nan
        shutil.rmtree(folder / "set", ignore_errors=True)
        (folder / "set").mkdir()
        data.write_own(folder / "set", samples)

    def made(bad: int | None) -> None:
        if (outcome := run_command(folder=folder, main=lambda: make(bad))).code != 0:
            raise RuntimeError(outcome.output)

    arguments = ["run", "recipe.yaml", "--device", "cpu", "--output"]
    made(None)
    succeeded(run_command(*arguments, "whole", folder=folder), "lost", "a sound set")
    made(bad)
    outcome = sound(run_command(*arguments, "run", folder=folder), f"NaN in sample {bad}")
    if not outcome.refused:
        raise Fault("wrong", f"NaN in sample {bad}: trained on without a word")
    made(None)
    _must_follow(outcome, folder, f"NaN in sample {bad}, and then mended")
    ends = [newest(folder / run) for run in ("run", "whole")]
    weights = [end / "experts.safetensors" for end in ends if end is not None]
    if len(weights) < 2 or weights[0].read_bytes() != weights[1].read_bytes():
        raise Fault("wrong", f"NaN in sample {bad}, mended, gone on with: it ends otherwise than on the sound set")
    return Result("refused")


ATTACKS: Sequence[Callable[[Random, Path], Result]] = (
    _before_the_first_checkpoint, _used_folder, _before_the_first_checkpoint, _changed_recipe, _before_anything,
    _before_the_first_checkpoint, _branch, _odd_names, _before_the_first_checkpoint, _overrides, _data_at_fault,
    _odd_names,
)  # fmt: skip


def _attack(number: int, moves: Random, folder: Path) -> Result:
    return ATTACKS[number % len(ATTACKS)](moves, folder)


PART = Part("hints", "commands that messages print", 60, 180, _attack)
