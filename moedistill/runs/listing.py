"""Every run below some folders, finished or not: what it is, how far it came, what it cost."""

import json
import os
import textwrap
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from moedistill.components.plugins import Plugins, load_plugins
from moedistill.errors import RecipeError, UserError, shorten
from moedistill.recipe.keys import Recipe, TrainingStageConfig
from moedistill.recipe.loading import read_saved
from moedistill.runs.tables import methods, newest_of_each_seed, was_miniature
from moedistill.runtime.checkpoint import Checkpoints, parse_name
from moedistill.stages.evaluate import ROWS, EvaluateConfig
from moedistill.stages.run import COST, METRICS, RESULT

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
    for folder in _found(folders):
        try:
            runs.append(_read(folder, plugins))
        except (OSError, ValueError, UserError) as error:
            reason = f"recipe.yaml: {error.problems[0].message}" if isinstance(error, RecipeError) else str(error)
            unreadable.append(["?", f"cannot be read: {shorten(reason, 200)}", str(folder)])
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


def _found(folders: Sequence[str | Path]) -> list[Path]:
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


def _read(folder: Path, plugins: Plugins) -> ListedRun:
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
    if (folder / METRICS).is_file():
        with (folder / METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()
        for text in lines:
            try:
                line = json.loads(text)
                found.append((stages.index(line["stage"]), int(line["step"])))
            except (ValueError, KeyError, TypeError):  # cut, at the beginning of what was read or by a crash
                continue
    checkpoints = Checkpoints(folder / "checkpoints", keep=1).all()
    for number, name, step in filter(None, (parse_name(path.name) for path in checkpoints)):
        if stages[number : number + 1] == [name]:
            found.append((number, step))
    return max(found)
