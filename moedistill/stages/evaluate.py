"""Compares models that share the run's weights: the teacher, the student, and mixtures of both, by named metrics."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from annotated_types import MinLen
from torch import Tensor

from moedistill import conditioning
from moedistill.checkpoint import save_tensors
from moedistill.data.loading import collate
from moedistill.data.prompts import read_prompts
from moedistill.experts import TEACHER
from moedistill.fields import Component, NonEmptyStr, NonNegativeInt, PositiveInt
from moedistill.media import contact_sheet, side_by_side
from moedistill.metrics import MetricConfig, MetricInputs
from moedistill.randomness import Draws, generator
from moedistill.stages.base import Finding, Stage, StageConfig
from moedistill.steps import SampleConfig

if TYPE_CHECKING:
    from moedistill.context import Job
    from moedistill.recipe import Recipe


@dataclass(kw_only=True)
class Candidate:
    """One model to evaluate.

    Args:
        name: in the table.
        model: the `student` (experts by the router) or the `teacher` (guided, everywhere).
        steps: spread evenly over the trajectory; null for the recipe's `sample` list.
        stand_ins: experts to run in place of others, such as {detail: teacher}.
    """

    name: NonEmptyStr
    model: Literal["student", "teacher"] = "student"
    steps: PositiveInt | None = None
    stand_ins: dict[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class EvaluateConfig(StageConfig):
    """Samples every candidate from the same noise and conditioning, and measures it.

    Args:
        samples: how many.
        batch_size: samples at a time.
        seed: of noise and conditioning; the same for all runs, so that they can be compared in pairs.
        candidates: what to compare.
        reference: the candidate that paired metrics compare with.
        metrics: what to measure.
        prompts: what to ask for, in turn: a list, or a file as `data: {kind: prompts}` takes it; null for the
            conditioning of samples spread evenly over the data.
        weights: the experts' `trained` weights or their `ema`.
        pictures: samples shown in the contact sheet and the animation; 0 for none.
        save_latents: keep all samples as latents, in safetensors.
    """

    samples: PositiveInt = 512
    batch_size: PositiveInt = 64
    seed: NonNegativeInt = 0
    candidates: list[Candidate]
    reference: NonEmptyStr
    metrics: list[Annotated[MetricConfig, Component("metric")]]
    prompts: Annotated[list[str], MinLen(1)] | NonEmptyStr | None = None
    weights: Literal["trained", "ema"] = "trained"
    pictures: NonNegativeInt = 6
    save_latents: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"conditioning"})

    def build(self) -> "EvaluateStage":
        return EvaluateStage(self)

    def look_ahead(self) -> None:
        if isinstance(self.prompts, str):
            read_prompts(self.prompts)

    def check(self, recipe: "Recipe") -> Iterable[Finding]:
        names = [candidate.name for candidate in self.candidates]
        if len(set(names)) != len(names):
            yield "candidates", f"names must differ, not {', '.join(names)}"
        kinds = [metric.kind for metric in self.metrics]
        if len(set(kinds)) != len(kinds):
            yield "metrics", f"each kind once, not {', '.join(kinds)}: the table is by kind"
        if self.reference not in names:
            yield "reference", f"{self.reference!r} is no candidate; there are {', '.join(names) or 'none'}"
        if not self.metrics and not self.pictures and not self.save_latents:
            yield "metrics", "is empty, with no pictures and no latents: the stage would do nothing"
        for number, candidate in enumerate(self.candidates):
            if candidate.steps is None and recipe.sample is None:
                yield f"candidates.{number}.steps", "is missing, and the recipe has no sample list to take"
            if candidate.steps is not None and candidate.steps > (most := _num_steps(recipe)):
                yield f"candidates.{number}.steps", f"{candidate.steps} is more than the trajectory's {most}"
            if candidate.model == "student" and recipe.router is None and not recipe.experts:
                yield f"candidates.{number}.model", "student needs a router; use teacher"
            if candidate.model == "teacher" and candidate.stand_ins:
                yield f"candidates.{number}.stand_ins", "has no effect: the teacher runs everywhere; use model: student"
            for name in [*candidate.stand_ins, *candidate.stand_ins.values()]:
                if name != TEACHER and name not in (recipe.experts or {}):
                    yield f"candidates.{number}.stand_ins", f"unknown expert {name!r}"
        if self.weights == "ema" and not any(getattr(stage, "ema_decay", None) is not None for stage in recipe.stages):
            yield "weights", "ema: no stage keeps an average; give one ema_decay"

    def tiny(self) -> "EvaluateConfig":
        return self.replace(samples=min(self.samples, 8), pictures=min(self.pictures, 2))


def _num_steps(recipe: "Recipe") -> float:
    """The trajectory's number of steps; no limit where that is not known, which is reported elsewhere."""
    try:
        return recipe.trajectory.build(recipe.backbone.native_sigmas()).num_steps
    except (AttributeError, ValueError):
        return float("inf")


class EvaluateStage(Stage):
    """See `EvaluateConfig`."""

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config

    def execute(self, job: "Job") -> None:
        if not job.main:
            return
        config, mixture = self.config, job.mixture
        backbone = mixture.student.backbone
        noise, cond = self._inputs(job)

        latents: dict[str, Tensor] = {}
        for candidate in config.candidates:
            job.say(f"  sampling {config.samples} × {candidate.name}")
            latents[candidate.name] = self._sample(job, candidate, noise, cond)
        videos = {name: backbone.decode(samples).cpu() for name, samples in latents.items()}
        latents = {name: samples.cpu() for name, samples in latents.items()}
        cond = conditioning.to(cond, "cpu")

        table: dict[str, dict[str, float]] = {}
        measures = [(metric.kind, metric.build()) for metric in config.metrics]
        for name in latents:
            inputs = MetricInputs(
                videos[name], latents[name], videos[config.reference], latents[config.reference], cond
            )
            table[name] = {kind: float(measure(inputs)) for kind, measure in measures}

        job.metrics[config.name] = table
        self._write(job, table, videos, latents, cond)

    def _inputs(self, job: "Job") -> tuple[Tensor, dict[str, Tensor]]:
        """Noise `[N, C, T, H, W]` and conditioning of the samples, by the stage's seed alone."""
        config, backbone = self.config, job.mixture.student.backbone
        draw = Draws(config.seed, "evaluate", 0, range(config.samples), job.accelerator.device)
        noise = draw.normal("noise", backbone.latent_shape())
        if config.prompts is not None:
            prompts = read_prompts(config.prompts) if isinstance(config.prompts, str) else config.prompts
            asked = [prompts[i % len(prompts)] for i in range(config.samples)]
            cond = dict(backbone.encode(asked))
        else:
            assert job.dataset is not None
            # Evenly spread over the data, so that no class is missed by chance, in random order.
            spread = np.arange(config.samples) * len(job.dataset) // config.samples
            chosen = generator(config.seed, "evaluate", "conditioning").permutation(spread)
            # One by one: the videos themselves are not wanted, and may be of many shapes.
            prepared = [backbone.prepare(*collate([job.dataset[int(i)]]))[1] for i in chosen]
            cond = conditioning.stack([{name: value[0] for name, value in one.items()} for one in prepared])
        return noise, conditioning.to(cond, job.accelerator.device)

    def _sample(self, job: "Job", candidate: Candidate, noise: Tensor, cond: dict[str, Tensor]) -> Tensor:
        recipe, mixture = job.recipe, job.mixture
        stand_ins = dict(candidate.stand_ins)
        if candidate.model == "teacher" and mixture.router is not None:
            stand_ins = {segment.expert: TEACHER for segment in mixture.router.segments}
        steps = recipe.sample if candidate.steps is None else SampleConfig(steps=candidate.steps)
        assert steps is not None
        return mixture.generate(
            noise,
            cond,
            steps.resolve(mixture.trajectory),
            stand_ins=stand_ins,
            guidance=recipe.backbone.guidance,
            weights=self.config.weights,
            batch_size=self.config.batch_size,
        )

    def _write(
        self,
        job: "Job",
        table: dict[str, dict[str, float]],
        videos: dict[str, Tensor],
        latents: dict[str, Tensor],
        cond: dict[str, Tensor],
    ) -> None:
        config, folder = self.config, job.output / self.config.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps({"samples": config.samples, "candidates": table}, indent=1))
        if config.save_latents:
            # Copies: a backbone's conditioning may be views of one tensor, which cannot be saved.
            asked = {f"conditioning.{k}": v.contiguous().clone() for k, v in cond.items()}
            save_tensors(folder / "latents.safetensors", {**latents, **asked})
        if config.pictures:
            captions = job.mixture.student.backbone.captions(conditioning.select(cond, slice(config.pictures)))
            shown = {name: video[: config.pictures] for name, video in videos.items()}
            contact_sheet(folder / "contact_sheet.png", shown, captions)
            side_by_side(folder / "side_by_side.webp", shown)
        show_table(f"{config.name}: {config.samples} samples", table)
        job.say(f"  {folder}")


def show_table(title: str, table: dict[str, dict[str, float]]) -> None:
    """Prints metrics by model."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title)
    grid.add_column("model")
    columns = list(next(iter(table.values())))
    for column in columns:
        grid.add_column(column.replace("_", " "), justify="right")
    for name, row in table.items():
        grid.add_row(name, *(f"{row[column]:.4g}" for column in columns))
    Console(width=None if Console().is_terminal else 140).print(grid)
