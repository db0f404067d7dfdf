"""Two runs in one folder, a run resumed while it runs, and folders that hold something else."""

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from .case import Fault, Part, Reference, Result, check_end, finish, newest, reference_of, sound, steps_saved, succeeded
from .warm import Command, Outcome, run_command


def _one_second() -> None:
    """For a child: it is always the same second."""
    time.strftime = lambda *_: "20260101-000000"  # type: ignore[assignment]


def _all_whole(reference: Reference, folder: Path, outcomes: list[Outcome]) -> Result:
    """All are done, each in a folder of its own."""
    for outcome in outcomes:
        succeeded(outcome, "lost", "started in the same second as another")
    runs = [path for path in (folder / "runs" / "attacked").iterdir() if path.is_dir()]
    if len(runs) != len(outcomes):
        raise Fault("lost", f"{len(outcomes)} runs, all done, have {len(runs)} folders: {', '.join(map(str, runs))}")
    for run in runs:
        check_end(reference, run)
    return Result("right")


def _same_second(reference: Reference, moves: Random, folder: Path) -> Result:
    arguments = ("run", reference.recipe, "--device", "cpu")
    number = moves.choice([2, 2, 3])
    commands = []
    for _ in range(number):
        commands.append(Command(*arguments, folder=folder, prepare=_one_second))
        time.sleep(moves.choice([0, 0.05, 0.3]))
    return _all_whole(reference, folder, [command.end() for command in commands])


def _same_output(reference: Reference, moves: Random, folder: Path) -> Result:
    """One is done, the other refused."""
    first = Command(*reference.arguments(), folder=folder)
    time.sleep(moves.choice([0, 0.02, 0.1, 0.5]))
    second = Command(*reference.arguments(), folder=folder)
    return _one_of(reference, folder, [first.end(), second.end()])


def _resumed_while_it_runs(reference: Reference, moves: Random, folder: Path) -> Result:
    step = moves.choice([2, 4])
    first = Command(*reference.arguments(), folder=folder)
    first.wait_for(lambda: steps_saved(folder / "run") >= step, 30)
    how = moves.choice([reference.arguments("--resume"), [*reference.arguments()[:4], "--resume-from", "run"]])
    second = Command(*how, folder=folder)
    return _one_of(reference, folder, [first.end(), second.end()])


def _one_of(reference: Reference, folder: Path, outcomes: list[Outcome]) -> Result:
    for outcome in outcomes:
        sound(outcome, "two in one folder")
    refused = [outcome for outcome in outcomes if outcome.refused]
    if len(refused) != 1:
        codes = [outcome.code for outcome in outcomes]
        raise Fault("wrong", f"two runs in one folder at a time, and exit codes {codes}")
    check_end(reference, folder / "run")
    return Result("refused")


def _read_while_it_runs(reference: Reference, moves: Random, folder: Path) -> Result:
    """`sample` and `report` read a run that is under way."""
    first = Command(*reference.arguments(), folder=folder)
    first.wait_for(lambda: steps_saved(folder / "run") >= 4, 30)
    sampled = run_command("sample", "run", "--prompt", "3 right", "--output", "out", folder=folder)
    sound(run_command("report", "run", folder=folder), "report while it runs")
    succeeded(first.end(), "lost", "sampled from while it ran")
    succeeded(sampled, "lost", "sample while it runs")
    check_end(reference, folder / "run")
    return Result("right")


def _stale_lock(reference: Reference, moves: Random, folder: Path) -> Result:
    """Whoever held the folder was killed."""
    step = moves.choice([2, 4, 6])
    first = Command(*reference.arguments(), folder=folder)
    first.wait_for(lambda: steps_saved(folder / "run") >= step, 30)
    first.signal(signal.SIGKILL)
    first.end()
    finish(reference, folder)
    return Result("right")


def _used_output(reference: Reference, moves: Random, folder: Path) -> Result:
    """A folder that holds the user's own files, or another run."""
    (folder / "run").mkdir()
    names = ["metrics.jsonl", "recipe.yaml", "result.json", "evaluate/mine.txt", "export/export.json", "notes.txt"]
    mine = folder / "run" / moves.choice(names)
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    outcome = sound(run_command(*reference.arguments(), folder=folder), f"a folder with {mine.name}")
    if not mine.exists() or mine.read_text() != "mine":
        raise Fault("lost", f"`run --output` into a folder with {mine.relative_to(folder)}: the user's file is gone")
    if outcome.refused:
        return Result("refused")
    check_end(reference, next(path for path in folder.glob("run*") if newest(path) is not None))
    return Result("right")


def _finished_output(reference: Reference, moves: Random, folder: Path) -> Result:
    """The folder of a finished run: refused, and as it was."""
    shutil.copytree(reference.run, folder / "run")
    outcome = sound(run_command(*reference.arguments(), folder=folder), "a finished run's folder")
    if not outcome.refused:
        raise Fault("lost", "`run --output` into a finished run's folder, without --resume, is done")
    check_end(reference, folder / "run")
    return Result("refused")


def _used_samples(reference: Reference, moves: Random, folder: Path) -> Result:
    """`sample --output` twice into one folder, or into one with the user's files: nothing vanishes."""
    command = ["sample", reference.run, "--output", "out", "--prompt"]
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("mine")
    if moves.random() < 0.5:
        (folder / "out" / "notes.txt").unlink()
        (folder / "out").rmdir()
        succeeded(run_command(*command, "3 right", folder=folder), "lost", "sample")
    before = {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
    outcome = sound(run_command(*command, "7 up", folder=folder), "sample into a used folder")
    for path, content in before.items():
        if not path.is_file() or path.read_bytes() != content:
            raise Fault("lost", f"`sample --output` into a used folder: {path.name} is not what it was")
    return Result("refused" if outcome.refused else "right")


ATTACKS: tuple[Callable[[Reference, Random, Path], Result], ...] = (
    _same_second, _same_output, _resumed_while_it_runs, _read_while_it_runs, _stale_lock, _used_output,
    _finished_output, _used_samples,
)  # fmt: skip


def _attack(number: int, moves: Random, folder: Path) -> Result:
    return ATTACKS[number % len(ATTACKS)](reference_of(folder), moves, folder)


PART = Part("folders", "two runs, and used folders", 40, 200, _attack)
