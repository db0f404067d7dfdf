"""Two runs in one folder, a run resumed while it runs, and folders that hold something else."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

from .case import (
    EVERY,
    Fault,
    Part,
    Reference,
    Result,
    at_event,
    check_end,
    finish,
    follow,
    kill_now,
    newest,
    reference_of,
    sound,
    steps_saved,
    succeeded,
)  # fmt: skip
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


FOREIGN: Mapping[str, str] = {
    "metrics.jsonl": "mine",
    "metrics.jsonl ": '{"epoch": 1, "loss": 0.5}\n{"epoch": 2, "loss": 0.25}\n',  # of another project
    "recipe.yaml": "mine",
    "result.json": "mine",
    "evaluate/mine.txt": "mine",
    "export/export.json": "mine",
    "notes.txt": "mine",
    "checkpoints/epoch=3.ckpt": "mine",
    "checkpoints/checkpoint-500/state.json": '{"epoch": 3}',
    "checkpoints/00_semantic_00000002/state.json": '{"epoch": 3}',
    "checkpoints/01_detail_00000009/model.safetensors": "mine",
}
"""Files that may be in a folder that is no run's."""


def _used_output(reference: Reference, moves: Random, folder: Path) -> Result:
    """A folder that holds the user's own files, or another project's run: refused, or left as it is."""
    name = moves.choice(sorted(FOREIGN))
    mine = folder / "run" / name.strip()
    mine.parent.mkdir(parents=True)
    mine.write_text(FOREIGN[name], encoding="utf-8")
    if moves.random() < 0.3:
        (folder / "run" / "checkpoints").mkdir(exist_ok=True)
    before = set((folder / "run").rglob("*"))
    outcome = sound(run_command(*reference.arguments(), folder=folder), f"a folder with {mine.name}")
    what = f"`run --output` into a folder with {mine.relative_to(folder)}"
    if not mine.exists() or mine.read_text(encoding="utf-8") != FOREIGN[name]:
        raise Fault("lost", f"{what}: the user's file is not what it was")
    if new := sorted(set((folder / "run").rglob("*")) - before):
        raise Fault("wrong", f"{what}: writes {new[0].name} in there")
    if outcome.refused:
        follow(outcome, folder, what)
        return Result("refused")
    check_end(reference, next(path for path in folder.glob("run*") if newest(path) is not None))
    return Result("right")


def _samples_stage(reference: Reference, moves: Random, folder: Path) -> Result:
    """Somebody samples a stopped run, which has a stage `samples`; then it goes on."""
    run = folder / "run"
    first = Command(*reference.arguments(), folder=folder)
    first.wait_for(lambda: steps_saved(run) >= 2 * EVERY, 30)
    if stopped := moves.random() < 0.5:
        first.signal(signal.SIGTERM)
        sound(first.end(), "SIGTERM", signal.SIGTERM)
    else:
        first.signal(signal.SIGSTOP)
    sampled = sound(run_command("sample", "run", "--prompt", "7 up", folder=folder), "sample of a run under way")
    mine = _videos(folder)
    if stopped:
        finish(reference, folder)
    else:
        first.signal(signal.SIGCONT)
        succeeded(first.end(), "lost", "sampled from while it ran")
        check_end(reference, run)
    return _survived(sampled, mine, "sampled before the run's own stage `samples`")


def _sampled_then_removed(reference: Reference, moves: Random, folder: Path) -> Result:
    """Samples of a checkpoint that is then removed, as newer ones are kept, are the user's."""
    first = Command(*reference.arguments(), folder=folder)
    first.wait_for(lambda: steps_saved(folder / "run") >= EVERY, 30)
    first.signal(signal.SIGSTOP)
    source = newest(folder / "run")
    assert source is not None
    sampled = sound(
        run_command("sample", f"run/checkpoints/{source.name}", "--prompt", "7 up", folder=folder), "sample"
    )
    mine = _videos(folder)
    first.signal(signal.SIGCONT)
    succeeded(first.end(), "lost", "one of its checkpoints was sampled")
    return _survived(sampled, mine, f"sampled {source.name}, which the run has removed since")


def _removed_while_sampled(reference: Reference, moves: Random, folder: Path) -> Result:
    """The run removes the checkpoint that is being read."""
    first = Command(*reference.arguments(), folder=folder)
    first.wait_for(lambda: steps_saved(folder / "run") >= EVERY, 30)
    first.signal(signal.SIGSTOP)
    source = newest(folder / "run")
    assert source is not None
    at = 1 + moves.randrange(12)
    output = ["--output", "out"] if moves.random() < 0.5 else []
    command = Command(
        "sample", f"run/checkpoints/{source.name}", "--prompt", "7 up", *output, folder=folder,
        prepare=at_event(at, kill_now(signal.SIGSTOP)),
    )  # fmt: skip
    command.wait_for(lambda: False, 0.7)  # it is at a stop then, or has ended
    first.signal(signal.SIGCONT)
    succeeded(first.end(), "lost", "one of its checkpoints was being sampled")
    command.signal(signal.SIGCONT)
    sampled = sound(command.end(), f"sample at event {at}, its checkpoint removed")
    if not sampled.refused and not _videos(folder):
        raise Fault("lost", f"sample, its checkpoint removed at event {at}: done, and there is no video")
    return Result("refused" if sampled.refused else "right")


def _videos(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*.mp4")}


def _survived(sampled: Outcome, mine: Mapping[Path, bytes], what: str) -> Result:
    if sampled.refused:
        return Result("refused")
    if not mine:
        raise Fault("lost", f"{what}: there is no video")
    for path, content in mine.items():
        if not path.is_file() or path.read_bytes() != content:
            raise Fault("lost", f"{what}: {path.name} in {path.parent.name} is not what it was")
    return Result("right")


NAMES = (
    "x" * 300, "a/" * 3000, "a" * 255, "ä" * 200, "\udcff", "", " ", ".", "..", "/", "/dev/null", "/dev/full",
    "/dev/zero", "/proc/new", "/proc/self/mem", "/sys/new", "file", "file/below", "link", "link/below", "fifo",
    "fifo/below", "a\nb", "\x1b[31m", "😀", "~", "%s {} {0}", "CON:", "nowhere",
)  # fmt: skip
"""Names that no folder can have, or that look as if."""


def _odd_names(reference: Reference, moves: Random, folder: Path) -> Result:
    """One of them as the output, or the source, of a command: done, or refused in a line or two."""
    (folder / "file").write_text("mine", encoding="utf-8")
    (folder / "link").symlink_to("link")
    (folder / "nowhere").symlink_to("no/such/folder")
    os.mkfifo(folder / "fifo")
    name = moves.choice(NAMES)
    source, recipe = reference.run, reference.recipe
    commands: list[list[object]] = [
        [*reference.arguments()[:4], f"--output={name}"], [*reference.arguments()[:4], f"--output={name}", "--resume"],
        ["sample", source, "--prompt", "7 up", f"--output={name}"], ["sample", "--prompt", "7 up", "--", name],
        [*reference.arguments()[:4], f"--resume-from={name}"], ["report", "--", name],
        [*reference.arguments()[:4], f"--resume-from={source}", f"--output={name}"],
        ["data", "check", "--recipe", recipe, "--", name], ["validate", "--", name], ["cp", "dcm_digits", "--", name],
        ["run", "--device", "cpu", "--", name], ["analyze", recipe, f"--output={name}"],
    ]  # fmt: skip
    before = set(folder.parent.iterdir())
    outcome = sound(run_command(*moves.choice(commands), folder=folder, seconds=40), f"the name {name[:40]!r}")
    if outcome.refused and max(map(len, outcome.refusal().splitlines())) > 1500:
        raise Fault("traceback", f"`{outcome.command[:100]}`: a line of more than 1500 letters")
    if outcome.refused:
        follow(outcome, folder, f"the name {name[:40]!r}")
    if (folder / "file").read_text(encoding="utf-8") != "mine":
        raise Fault("lost", f"`{outcome.command}` has written over a file")
    for made in set(folder.parent.iterdir()) - before:
        shutil.rmtree(made) if made.is_dir() else made.unlink()
    return Result("refused" if outcome.refused else "right")


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
    (folder / "out" / "notes.txt").write_text("mine", encoding="utf-8")
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
    _finished_output, _used_samples, _odd_names, _samples_stage, _odd_names, _sampled_then_removed, _used_output,
    _removed_while_sampled, _odd_names,
)  # fmt: skip


def _attack(number: int, moves: Random, folder: Path) -> Result:
    return ATTACKS[number % len(ATTACKS)](reference_of(folder), moves, folder)


PART = Part("folders", "two runs, used folders, odd names", 120, 260, _attack)
