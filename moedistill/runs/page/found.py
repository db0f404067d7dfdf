"""What lies in a run's folder, as the page shows it. Whatever is missing, or damaged, is left out."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moedistill.components.plugins import Plugins
from moedistill.recipe.keys import Recipe, TrainingStageConfig
from moedistill.recipe.sampling import trajectory_of
from moedistill.runs.callbacks.curves import Series, first_steps, read_series
from moedistill.runs.listing import ListedRun, find_runs, read_run
from moedistill.runs.tables import methods
from moedistill.stages.evaluate import VIDEOS, EvaluateConfig
from moedistill.stages.export import ExportConfig
from moedistill.stages.preview import ABOUT
from moedistill.stages.run import COST, ENVIRONMENT, LEVELS, MEMORY, METRICS, PREVIEWS
from moedistill.stages.sample import SampleStageConfig

MOMENTS = 6
"""Moments of training whose previews are shown side by side, at most: the first, the last, and some between."""


DAMAGE = (KeyError, TypeError, ValueError, IndexError, AttributeError)
"""What is raised where a file holds something else than was written."""


@dataclass(frozen=True)
class VideoSet:
    """Videos to look at side by side: one of each model, or moment, for each caption, from the same noise.

    Attributes:
        title: the stage that made them.
        seed: of the noise.
        captions: of the rows.
        columns: files by label, one for each caption.
    """

    title: str
    seed: int
    captions: list[str]
    columns: dict[str, list[Path]]


@dataclass(frozen=True)
class Levels:
    """Errors and gradients of one stage's samples by trajectory point, of some of its steps.

    Attributes:
        points, error, gradient: ascending points; the root mean square, and the mean norm, of all samples there.
    """

    points: list[int]
    error: list[float]
    gradient: list[float]


@dataclass(frozen=True)
class FoundRun:
    """A run as it lies there.

    Attributes:
        name: what tells it apart from the others on the page.
        environment: where it ran, by what versions; empty if it did not say so.
        cost: of its training stages, as `RunResult.cost`.
        metrics, memory: lines by stage and name, of steps counted through the stages.
        evaluated, sampled, previews: videos of an evaluation's candidates, of prompts, and of stages as they trained.
        exported: files, by the folder of the run that they lie in.
    """

    name: str
    listed: ListedRun
    environment: dict[str, Any]
    cost: dict[str, dict[str, float]]
    metrics: dict[tuple[str, str], Series]
    memory: dict[tuple[str, str], Series]
    evaluated: list[VideoSet]
    sampled: list[VideoSet]
    previews: list[VideoSet]
    exported: dict[str, list[Path]]

    @property
    def folder(self) -> Path:
        """The run's."""
        return self.listed.folder

    @property
    def recipe(self) -> Recipe:
        """As it was run."""
        return self.listed.recipe

    @property
    def training(self) -> list[TrainingStageConfig]:
        """Its stages that train."""
        return [stage for stage in self.recipe.stages if isinstance(stage, TrainingStageConfig)]

    @property
    def processes(self) -> int:
        """How many it had; 1 where it did not say so."""
        return int(self.environment.get("num_processes", 1))

    def levels(self, stage: TrainingStageConfig, first: int, last: int) -> Levels:
        """What was noted by noise level in the lines of the stage's steps `first` to `last`."""
        points = len(trajectory_of(self.recipe).points)
        samples, squares, norms = ([0.0] * points for _ in range(3))
        for line in _lines(self.folder / LEVELS):
            with suppress(*DAMAGE):  # cut by a crash, or not ours
                if line["stage"] == stage.name and first <= line["step"] <= last:
                    rows = list(zip(line["point"], line["samples"], line["error"], line["gradient"], strict=True))
                    for point, count, error, gradient in rows:
                        squares[point] += count * error**2
                        norms[point] += count * gradient
                        samples[point] += count
        there = [point for point in range(points) if samples[point]]
        return Levels(
            there,
            [(squares[point] / samples[point]) ** 0.5 for point in there],
            [norms[point] / samples[point] for point in there],
        )


def find(folders: Sequence[str | Path], plugins: Plugins) -> list[FoundRun]:
    """The runs in `folders` and below them, in the order of their paths.

    Raises:
        UserError: a folder does not exist, there is no run in it, or one cannot be read.
        ValueError: a file of a run is damaged.
    """
    listed = [read_run(folder, plugins) for folder in find_runs(folders)]
    names = {}
    for method, alike in methods(listed).items():
        seeds = [run.recipe.seed for run in alike]
        for run in alike:
            seed = f", seed {run.recipe.seed}" if len(listed) > 1 else ""
            names[run.folder] = method + seed + (f", {run.folder.name}" if seeds.count(run.recipe.seed) > 1 else "")
    return [_found(names[run.folder], run) for run in listed]


def _found(name: str, run: ListedRun) -> FoundRun:
    first = first_steps([(stage.name, getattr(stage, "steps", 0)) for stage in run.recipe.stages])
    return FoundRun(
        name=name,
        listed=run,
        environment=_mapping(run.folder / ENVIRONMENT),
        cost=_mapping(run.folder / COST),
        metrics=read_series(run.folder / METRICS, first),
        memory=read_series(run.folder / MEMORY, first),
        evaluated=_evaluated(run),
        sampled=_sampled(run),
        previews=_previews(run),
        exported=_exported(run),
    )


def _exported(run: ListedRun) -> dict[str, list[Path]]:
    """Of the stages that export, and of what was exported afterwards, which lies in `export`."""
    stages = [stage.name for stage in run.recipe.stages if isinstance(stage, ExportConfig)]
    return {
        name: sorted(file for file in (run.folder / name).rglob("[!.]*") if file.is_file())
        for name in dict.fromkeys([*stages, "export"])
    }


def _evaluated(run: ListedRun) -> list[VideoSet]:
    sets = []
    for stage in run.recipe.stages:
        if not isinstance(stage, EvaluateConfig):
            continue
        folder = run.folder / stage.name / VIDEOS
        with suppress(*DAMAGE):
            about = _mapping(folder / "videos.json")
            columns = {name: _inside(folder, files) for name, files in about["files"].items()}
            sets.append(_set(stage.name, about["seed"], _texts(about["captions"]), columns))
    return sets


def _sampled(run: ListedRun) -> list[VideoSet]:
    sets = []
    for stage in run.recipe.stages:
        if not isinstance(stage, SampleStageConfig):
            continue
        folder = run.folder / stage.name
        with suppress(*DAMAGE):
            about = _mapping(folder / "samples.json")
            label = f"{len(about['sigmas']) - 1} steps"
            columns = {label: _inside(folder, about["files"])}
            sets.append(_set(stage.name, about["seed"], _texts(about["prompts"]), columns))
    return sets


def _previews(run: ListedRun) -> list[VideoSet]:
    """Of each stage: the teacher's, in many steps and in few, then moments of training."""
    sets = []
    for stage in run.recipe.stages:
        folders = sorted(path.parent for path in (run.folder / PREVIEWS / stage.name).glob(f"*/{ABOUT}"))
        found = [(folder, _mapping(folder / ABOUT)) for folder in folders]
        with suppress(*DAMAGE):
            last = [about for folder, about in found if folder.name.startswith("step_")][-1]
            # Those of earlier prompts or other noise are not to be compared with the last one.
            alike = [each for each in found if all(each[1].get(key) == last[key] for key in ("prompts", "seed"))]
            moments = [each for each in alike if each[0].name.startswith("step_")]
            teachers = [each for each in alike if each not in moments]
            teachers.sort(key=lambda each: -len(each[1]["sigmas"]))
            if len(moments) > MOMENTS:
                moments = [moments[k * (len(moments) - 1) // (MOMENTS - 1)] for k in range(MOMENTS)]
            columns = {about["label"]: _inside(folder, about["files"]) for folder, about in [*teachers, *moments]}
            sets.append(_set(stage.name, last["seed"], _texts(last["prompts"]), columns))
    return sets


def _set(title: str, seed: int, captions: list[str], columns: dict[str, list[Path]]) -> VideoSet:
    if not columns or any(len(files) != len(captions) for files in columns.values()):
        raise ValueError("every caption has a video of each model")
    return VideoSet(title, seed, captions, columns)


def _inside(folder: Path, names: Sequence[str]) -> list[Path]:
    """Files of these names in the folder itself, wherever else a name may point to."""
    return [folder / Path(name).name for name in names]


def _texts(captions: Sequence[Any]) -> list[str]:
    return [str(caption) or "(no prompt)" for caption in captions]


def _mapping(file: Path) -> dict[str, Any]:
    """What a file of JSON holds; empty where it is not there, or damaged."""
    with suppress(OSError, ValueError):
        content = json.loads(file.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}


def _lines(file: Path) -> list[dict[str, Any]]:
    rows = []
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    for row in text.splitlines():
        with suppress(ValueError):
            rows.append(json.loads(row))
    return [row for row in rows if isinstance(row, dict)]
