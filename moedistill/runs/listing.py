"""Every run below some folders, finished or not: what it is, how far it came, what it cost, and how to go on."""

import json
import os
import re
import textwrap
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from moedistill.components.plugins import Plugins, load_plugins
from moedistill.errors import RecipeError, UserError, shorten
from moedistill.recipe.keys import Recipe, TrainingStageConfig
from moedistill.recipe.loading import read_saved
from moedistill.runs.commands import RunCommand
from moedistill.runs.tables import methods, newest_of_each_seed, was_miniature
from moedistill.runtime.checkpoint import Checkpoints, parse_name
from moedistill.runtime.lock import NAME as LOCK
from moedistill.runtime.lock import is_held
from moedistill.stages.evaluate import ROWS, EvaluateConfig
from moedistill.stages.run import COST, ENDED, METRICS, RESULT

LEFT = (METRICS, COST, RESULT, "checkpoints")
"""What, beside recipe.yaml, only a run leaves."""

TAIL = 2**16
"""Bytes at the end of metrics.jsonl: more than its last lines."""


@dataclass
class ListedRun:
    """A run as it lies there.

    Attributes:
        folder: the run's.
        recipe: as it was run.
        smoke: whether it was a miniature.
        state: `finished`, or `unfinished: ` and where it stands.
        cost: steps, forwards and seconds of all training stages that ended.
    """

    folder: Path
    recipe: Recipe
    smoke: bool
    state: str
    cost: dict[str, float]


def list_runs(folders: Sequence[str | Path], plugins: Plugins | None = None) -> list[list[str]]:
    """A run to an item, by method, in the order of their paths: method, seed, cost, state, folder.

    Raises:
        UserError: a folder does not exist, or there is no run in it.
    """
    plugins = plugins or load_plugins()
    runs, unreadable = [], []
    for folder in find_runs(folders):
        try:
            runs.append(read_run(folder, plugins))
        except (OSError, ValueError, UserError) as error:
            unreadable.append(["?", f"cannot be read: {shorten(_reason(error), 200)}", str(folder)])
    grouped = methods(runs)
    evaluated = [run for run in runs if any(run.folder.glob(f"*/{ROWS}"))]
    _, others = newest_of_each_seed(methods(evaluated))
    parts = []
    for method, alike in grouped.items():
        for run in alike:
            cost = ", ".join(f"{number:.0f} {what}" for what, number in run.cost.items())
            older = [f"older than {others[run.folder]} of the same seed: not counted"] if run.folder in others else []
            parts.append([method, f"seed {run.recipe.seed}", cost, run.state, *older, str(run.folder)])
    return parts + unreadable


def list_states(folders: Sequence[str | Path], plugins: Plugins | None = None) -> list[list[str]]:
    """A run to an item, what was written to last first: state, recipe, how far it came, loss, when, folder; of one that
    failed or was stopped why, and of one that can go on the command that does.

    Running is one whose folder is locked; where no process had the time to say why it ended, it was killed.

    Raises:
        UserError: a folder does not exist, or there is no run in it.
    """
    plugins = plugins or load_plugins()
    found = sorted(find_runs(folders), key=_written, reverse=True)
    return [_state_of(folder, plugins) for folder in found]


def _state_of(folder: Path, plugins: Plugins) -> list[str]:
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(_written(folder)))
    try:
        run = read_run(folder, plugins)
        loss = next((f"loss {line['loss']:.3g}" for line in reversed(_logged(folder)) if line.get("loss")), "")
    except (OSError, ValueError, UserError) as error:
        return ["?", f"cannot be read: {shorten(_reason(error), 200)}", written, str(folder)]
    done = not run.state.startswith("unfinished: ")
    word, why = _ended(folder, "finished" if done else "killed")
    if is_held(folder):
        word, why = "running", ""
    place = "after its last step" if done else run.state.removeprefix("unfinished: ")
    name = f"{run.recipe.name} (miniature)" if run.smoke else run.recipe.name
    if word == "finished":
        return [word, name, *filter(None, [loss]), written, str(folder)]
    parts = [word, name, place, *filter(None, [loss]), written, str(folder)]
    if word == "running":
        return parts
    command = RunCommand(run.smoke, plugins=tuple(plugins.files))
    saved = Checkpoints(folder / "checkpoints", keep=1).all()
    on = f"go on with: {command.go_on(folder)}" if saved else f"begin anew with: {command.begin(folder)}"
    return [*parts, *filter(None, [why]), on]


def _ended(folder: Path, otherwise: str) -> tuple[str, str]:
    """How a run ended, and of one that failed why, as far as it could say it; or what it is otherwise."""
    try:
        word, _, why = (folder / ENDED).read_text(encoding="utf-8").strip().partition(": ")
    except (OSError, UnicodeDecodeError):
        return otherwise, ""
    # What was saved then, and the command, is said anew.
    return word, shorten(re.split("; (?:saved is|nothing is saved)", why)[0], 300) if word == "failed" else ""


def _written(folder: Path) -> float:
    """When something in a run's folder was written last."""
    times = [0.0]
    for path in folder.iterdir():
        with suppress(OSError):  # what vanishes, as a run goes on
            times.append(path.stat().st_mtime if path.name != LOCK else 0.0)
    return max(times)


def packed(parts: Iterable[str], width: int | None) -> list[str]:
    """Parts on one line, or on several of at most `width` characters; only what has no blank to break at is longer."""
    lines = [""]
    for part in parts:
        for piece in [part] if width is None else textwrap.wrap(part, width - 2, break_long_words=False) or [""]:
            joined = f"{lines[-1]}  {piece}" if lines[-1] else piece
            if width is None or len(joined) <= width or not lines[-1]:
                lines[-1] = joined
            else:
                lines.append(f"  {piece}")
    return lines


def _reason(error: Exception) -> str:
    return f"recipe.yaml: {error.problems[0].message}" if isinstance(error, RecipeError) else str(error)


def find_runs(folders: Sequence[str | Path]) -> list[Path]:
    """The folders of runs among `folders` and below them, each once, in the order of their paths.

    Raises:
        UserError: a folder does not exist, or there is no run in it.
    """
    found: dict[Path, Path] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder; give runs' folders, or one that holds runs")
        inside = sorted(path.parent for path in folder.rglob("recipe.yaml") if _is_run(path.parent))
        if not inside:
            raise UserError(f"{folder}: there is no run in it (a folder with a recipe.yaml of `moedistill run`)")
        for run in inside:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _is_run(folder: Path) -> bool:
    """Whether a run has been there: it left something, or at least its recipe with every key."""
    if any((folder / name).exists() for name in LEFT) or any(folder.glob(f"*/{ROWS}")):
        return True
    try:
        saved = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(saved, dict) and {each.name for each in fields(Recipe)} <= saved.keys()


def read_run(folder: Path, plugins: Plugins) -> ListedRun:
    """The run in a folder.

    Raises:
        UserError: its recipe cannot be read.
        ValueError: a file is damaged.
    """
    recipe = read_saved(folder / "recipe.yaml", plugins)
    stages, reported = _json(folder / COST).values(), _json(folder / RESULT)
    try:
        cost = {what: sum(float(stage[what]) for stage in stages) for what in ("steps", "forwards", "seconds")}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{COST} is damaged (a stage lacks its numbers)") from error
    return ListedRun(folder, recipe, was_miniature(folder), _state(folder, recipe, reported), cost)


def _json(file: Path) -> dict[str, Any]:
    """What the file holds; ValueError where it is damaged."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name} is damaged ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is damaged (it is no mapping)")
    return content


def _state(folder: Path, recipe: Recipe, reported: Collection[str]) -> str:
    reached = _reached(folder, [stage.name for stage in recipe.stages])
    for number, stage in enumerate(recipe.stages):
        if number < reached[0]:
            continue
        if isinstance(stage, TrainingStageConfig):
            step = reached[1] if number == reached[0] else 0
            if step < stage.steps:
                return f"unfinished: {stage.name} at step {step} of {stage.steps}"
        elif stage.name not in reported:
            return f"unfinished: before the end of {stage.name}"
    evaluates = any(isinstance(stage, EvaluateConfig) for stage in recipe.stages)
    return "finished" if evaluates else "finished, without an evaluation"


def _reached(folder: Path, stages: list[str]) -> tuple[int, int]:
    """Number of the stage and step that metrics or a checkpoint speak of last; (0, 0) where none does."""
    found = [(0, 0)]
    for line in _logged(folder):
        with suppress(ValueError, KeyError, TypeError):  # of another recipe
            found.append((stages.index(line["stage"]), int(line["step"])))
    checkpoints = Checkpoints(folder / "checkpoints", keep=1).all()
    for number, name, step in filter(None, (parse_name(path.name) for path in checkpoints)):
        if stages[number : number + 1] == [name]:
            found.append((number, step))
    return max(found)


def _logged(folder: Path) -> list[dict[str, Any]]:
    """The last lines of metrics.jsonl."""
    if not (folder / METRICS).is_file():
        return []
    with (folder / METRICS).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        texts = file.read().decode("utf-8", "replace").splitlines()
    lines = []
    for text in texts:
        with suppress(ValueError):  # cut, at the beginning of what was read or by a crash
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]
