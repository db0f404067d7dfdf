"""Compares models that share the run's weights: the teacher, the student, and mixtures of both, by named metrics."""

import hashlib
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from annotated_types import MinLen
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moedistill.components.fields import Component, NonEmptyStr, NonNegativeInt, PositiveInt, WhichWeights
from moedistill.data.loading import collate
from moedistill.data.prompts import read_prompts
from moedistill.flow.process import guide, velocity_of
from moedistill.flow.sampling_points import SampleConfig
from moedistill.media import contact_sheet, side_by_side, words_of, write_mp4
from moedistill.metrics.base import Metric, MetricConfig, MetricInputs
from moedistill.model import conditioning
from moedistill.model.backbone import TEACHER
from moedistill.model.conditioning import Conditioning
from moedistill.model.sample_in_batches import followings, sample_in_batches
from moedistill.recipe.keys import Finding, StageConfig, TrainingStageConfig
from moedistill.recipe.sampling import notes_on, sampling_sigmas, trained_before, trajectory_of, untrained_notes
from moedistill.runtime.checkpoint import save_tensors
from moedistill.runtime.randomness import Draws, generator
from moedistill.runtime.reading import check_file, reason
from moedistill.runtime.writing import make_folder, new_file
from moedistill.stages.base import Stage
from moedistill.stages.share import Share

if TYPE_CHECKING:
    from rich.table import Table

    from moedistill.recipe.keys import Recipe
    from moedistill.stages.run import Run


ROWS = "rows.safetensors"
"""In the stage's folder: what each metric made of each sample, float64 `[N, D]`, as "kind/candidate"."""

VIDEOS = "videos"
"""In the stage's folder: a video of each candidate and sample shown, and `videos.json`, which says what they are."""

WIDTH = 80
"""Characters of a printed table where there is no terminal to ask."""
NUMBER = 10
"""Characters of the widest number that is printed."""

ORIGIN = "evaluation"
"""In the metadata of stored samples: seed, number, and what made each candidate's, as JSON."""


@dataclass(kw_only=True)
class Candidate:
    """One model to evaluate.

    Args:
        name: in the table.
        model: the `student` (experts by the router), the `teacher` (guided, everywhere), or the `exact` velocity of the
            data, where the dataset offers their posterior mean, guided as the teacher: how far that is from the truth.
        steps: so many; short for sample: {steps: n}.
        sample: its own steps, as in the recipe's `sample`, which it takes if it has neither.
        stand_ins: experts to run in place of others, such as {detail: teacher}.
    """

    name: NonEmptyStr
    model: Literal["student", "teacher", "exact"] = "student"
    steps: PositiveInt | None = None
    sample: SampleConfig | None = None
    stand_ins: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps is not None and self.sample is not None:
            raise ValueError(f"steps {self.steps} and sample: give one of them, or neither for the recipe's own")

    def own_sample(self) -> SampleConfig | None:
        """Its own steps; None where it takes the recipe's."""
        return self.sample if self.steps is None else SampleConfig(steps=self.steps)

    def chosen(self, recipe: "Recipe") -> SampleConfig:
        """Its own steps, or the recipe's."""
        chosen = self.own_sample() or recipe.sample
        assert chosen is not None, "refused by check"
        return chosen

    def path(self, recipe: "Recipe") -> tuple[Tensor, float]:
        """Its sigmas `[n + 1]` down to 0, and its eta; a number of steps is spread over a student's phases."""
        chosen = self.chosen(recipe)
        of_student = self.own_sample() is None or self.model == "student"
        sigmas = sampling_sigmas(recipe, chosen) if of_student else chosen.resolve(trajectory_of(recipe))
        return sigmas, chosen.eta


@dataclass(kw_only=True)
class EvaluateConfig(StageConfig):
    """Samples every candidate from the same noise and conditioning, and measures it.

    Args:
        samples: how many.
        batch_size: samples at a time.
        seed: of noise and conditioning; the same for all runs, so that they can be compared in pairs.
        candidates: what to compare.
        reference: the candidate that paired metrics compare with.
        reference_samples: the `latents.safetensors` of an evaluation with the same seed, samples and conditioning, to
            take the reference's samples from; null to sample them. It must have had the same backbone, guidance and
            steps too. The teacher's many steps are then made once for many runs.
        metrics: what to measure.
        prompts: what to ask for, in turn: a list, or a file as `data: {kind: prompts}` takes it; null for the
            conditioning of samples spread evenly over the data.
        weights: the experts' `trained` weights or their `ema`.
        pictures: samples shown in the contact sheet and the animation, and as videos; 0 for none.
        save_latents: keep all samples as latents, in safetensors.
    """

    samples: PositiveInt = 512
    batch_size: PositiveInt = 64
    seed: NonNegativeInt = 0
    candidates: list[Candidate]
    reference: NonEmptyStr
    reference_samples: NonEmptyStr | None = None
    metrics: list[Annotated[MetricConfig, Component("metric")]]
    prompts: Annotated[list[str], MinLen(1)] | NonEmptyStr | None = None
    weights: WhichWeights = "trained"
    pictures: NonNegativeInt = 6
    save_latents: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"conditioning"})

    def build(self) -> "EvaluateStage":
        return EvaluateStage(self)

    def used_experts(self) -> list[str]:
        return [expert for candidate in self.candidates for expert in candidate.stand_ins.values()]

    def look_ahead(self, recipe: "Recipe") -> None:
        for metric in self.metrics:
            metric.look_ahead()
        if isinstance(self.prompts, str):
            read_prompts(self.prompts)
        if self.reference_samples is not None:
            stored_samples(self, recipe)

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
            if candidate.own_sample() is None and recipe.sample is None:
                yield f"candidates.{number}.steps", "is missing, and the recipe has no sample list to take"
            yield from _misfits(recipe, number, candidate)
            if candidate.model == "student" and recipe.router is None and not recipe.experts:
                yield f"candidates.{number}.model", "student needs a router; use teacher"
            if candidate.model == "exact" and recipe.data and "posterior_mean" not in recipe.data.provides:
                message = f"exact needs a posterior mean, which {recipe.data.kind!r} data do not provide; use teacher"
                yield f"candidates.{number}.model", message
            if candidate.model != "student" and candidate.stand_ins:
                message = f"has no effect: {candidate.model} runs everywhere; use model: student"
                yield f"candidates.{number}.stand_ins", message
            for name in [*candidate.stand_ins, *candidate.stand_ins.values()]:
                if name != TEACHER and name not in (recipe.experts or {}):
                    yield f"candidates.{number}.stand_ins", f"unknown expert {name!r}"
        if self.weights == "ema" and not any(getattr(stage, "ema_decay", None) is not None for stage in recipe.stages):
            yield "weights", "ema: no stage keeps an average; give one ema_decay"

    def tiny(self) -> "EvaluateConfig":
        return self.replace(samples=min(self.samples, 8), pictures=min(self.pictures, 2), reference_samples=None)


def _misfits(recipe: "Recipe", number: int, candidate: Candidate) -> Iterable[Finding]:
    """What in a candidate's own steps does not fit the trajectory; nothing where that is broken itself."""
    sample = candidate.own_sample()
    try:
        trajectory = trajectory_of(recipe)
    except (AttributeError, ValueError):
        return
    try:
        if sample is not None:
            sample.resolve(trajectory)
    except ValueError as error:
        yield f"candidates.{number}.{'sample' if candidate.steps is None else 'steps'}", str(error)


def _exact_velocity(run: "Run", until: Mapping[float, float], x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
    """(x - E[x0 | x]) / sigma, with the teacher's classifier-free guidance: v_c + (scale - 1)·(v_c - v_u).

    `until` says where the jump from a sigma ends.
    """
    dataset, mixture = run.dataset, run.mixture
    assert dataset is not None
    # All samples are at one sigma: the sampler's.
    router = mixture.teacher_router
    base = mixture.bases[0] if router is None else router.expert_at(float(sigma[0]))
    guidance, level = run.recipe.backbone.guidance, float(sigma[0])
    scale = 1 + (guidance.classifier_free_scale(base) - 1) * mixture.share_guided(guidance, level, until[level])
    mean = dataset.posterior_mean(x, sigma, cond)
    if scale != 1.0:
        # Velocities at one x differ as the means do.
        null = dataset.posterior_mean(x, sigma, mixture.backbone.null_conditioning(cond))
        mean = guide(mean, null, scale)
    return velocity_of(x, mean, sigma)


def _checked(rows: Tensor, kind: str, samples: int) -> Tensor:
    """`rows`, where they are as a metric must give them."""
    if rows.ndim != 2 or len(rows) != samples or rows.dtype != torch.float64:
        raise ValueError(
            f"metric {kind}: its rows are {str(rows.dtype).removeprefix('torch.')} {list(rows.shape)}; they must be "
            f"float64 [{samples}, D], one row for each sample"
        )
    return rows


class EvaluateStage(Stage):
    """See `EvaluateConfig`."""

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config

    def look_ahead(self, run: "Run") -> None:
        if (prompts := self.prompts()) is not None:
            run.mixture.backbone.encode(prompts[: self.config.samples])
        run.mixture.backbone.look_ahead(pipeline=False)
        metrics = [metric.build() for metric in self.config.metrics]
        if asking := [metric for metric in metrics if type(metric).look_ahead is not Metric.look_ahead]:
            _, cond = self.inputs(run)
            for metric in asking:
                metric.look_ahead(cond)

    def prompts(self) -> Sequence[str] | None:
        """What is asked for, in turn; None where the data say it."""
        prompts = self.config.prompts
        return read_prompts(prompts) if isinstance(prompts, str) else prompts

    def execute(self, run: "Run") -> None:
        """All processes sample, so many batches each; the main one has the rest to do."""
        config, mixture = self.config, run.mixture
        backbone = mixture.backbone
        noise, cond = self.inputs(run)

        latents: dict[str, Tensor] = {}
        for candidate in config.candidates:
            if candidate.name == config.reference and config.reference_samples is not None:
                if run.main:
                    latents[candidate.name] = stored_samples(config, run.recipe, cond).to(noise.device)
                continue
            run.say(f"  sampling {config.samples} × {candidate.name}")
            if candidate.model == "student":
                trained, (sigmas, _) = trained_before(run.recipe, config.name), candidate.path(run.recipe)
                notes = untrained_notes(run.recipe, trained, sigmas, candidate.stand_ins)
                notes += notes_on(run.recipe, candidate.chosen(run.recipe)) if not candidate.stand_ins else []
                for note in notes:
                    run.say(f"    note: {note}")
            latents[candidate.name] = self._sample(run, candidate, noise, cond)
        if not run.main:
            return
        videos = {name: backbone.decode(samples).cpu() for name, samples in latents.items()}
        latents = {name: samples.cpu() for name, samples in latents.items()}
        cond = conditioning.to(cond, "cpu")

        table: dict[str, dict[str, float]] = {name: {} for name in latents}
        rows: dict[str, Tensor] = {}
        metrics = [(metric.kind, metric.build()) for metric in config.metrics]
        for name in latents:
            inputs = MetricInputs(
                videos[name], latents[name], videos[config.reference], latents[config.reference], cond, backbone.fps
            )
            for kind, metric in metrics:
                measured = _checked(metric.rows(inputs), kind, config.samples)
                rows[f"{kind}/{name}"] = measured
                table[name][kind] = float(metric.value(measured))

        run.metrics[config.name] = table
        self._write(run, table, rows, videos, latents, cond)

    def inputs(self, run: "Run") -> tuple[Tensor, dict[str, Tensor]]:
        """Noise `[N, C, T, H, W]` and conditioning of the samples, by the stage's seed alone."""
        config, backbone = self.config, run.mixture.backbone
        draw = Draws(config.seed, "evaluate", 0, range(config.samples), run.accelerator.device)
        noise = draw.normal("noise", backbone.latent_shape())
        if (prompts := self.prompts()) is not None:
            asked = [prompts[i % len(prompts)] for i in range(config.samples)]
            cond = dict(backbone.encode(asked))
        else:
            assert run.dataset is not None
            # Evenly spread over the data, so that no class is missed by chance, in random order.
            spread = np.arange(config.samples) * len(run.dataset) // config.samples
            chosen = generator(config.seed, "evaluate", "conditioning").permutation(spread)
            # One by one: the videos themselves are not wanted, and may be of many shapes.
            prepared = [backbone.prepare(*collate([run.dataset[int(i)]]))[1] for i in chosen]
            cond = conditioning.stack([{name: value[0] for name, value in one.items()} for one in prepared])
        return noise, conditioning.to(cond, run.accelerator.device)

    def _sample(self, run: "Run", candidate: Candidate, noise: Tensor, cond: dict[str, Tensor]) -> Tensor:
        recipe, mixture = run.recipe, run.mixture
        stand_ins = dict(candidate.stand_ins)
        if candidate.model == "teacher" and mixture.router is not None:
            stand_ins = {segment.expert: TEACHER for segment in mixture.router.segments}
        sigmas, eta = candidate.path(recipe)

        def sampled(start: int) -> Tensor:
            """The batch that begins with this sample."""
            batch = slice(start, start + self.config.batch_size)

            def fresh_noise(step: int, rows: range) -> Tensor:
                own = range(start + rows.start, start + rows.stop)
                return Draws(self.config.seed, "evaluate", step, own, noise.device).normal(
                    "fresh_noise", noise.shape[1:]
                )

            drawn: Any = {"eta": eta, "fresh_noise": fresh_noise, "batch_size": self.config.batch_size}
            inputs = noise[batch], conditioning.select(cond, batch), sigmas
            if candidate.model == "exact":
                return sample_in_batches(partial(_exact_velocity, run, followings(sigmas)), *inputs, **drawn)
            guidance, weights = recipe.backbone.guidance, self.config.weights
            return mixture.generate(*inputs, stand_ins=stand_ins, guidance=guidance, weights=weights, **drawn)

        share, starts = Share.of(run.accelerator), range(0, len(noise), self.config.batch_size)
        made = {number: sampled(starts[number]).cpu() for number in share.items(len(starts))}
        return torch.cat([noise[:0].cpu(), *share.together(made).values()]).to(noise.device)

    def _write(
        self,
        run: "Run",
        table: dict[str, dict[str, float]],
        rows: dict[str, Tensor],
        videos: dict[str, Tensor],
        latents: dict[str, Tensor],
        cond: dict[str, Tensor],
    ) -> None:
        config, folder = self.config, run.folder(self.config.name)
        with ExitStack() as files:  # all or none

            def new(name: str) -> Path:
                return files.enter_context(new_file(folder / name))

            text = json.dumps({"samples": config.samples, "candidates": table}, indent=1)
            new("metrics.json").write_text(text, encoding="utf-8")
            save_tensors(new(ROWS), {name: measured.contiguous() for name, measured in rows.items()})
            if config.save_latents:
                # Copies: a backbone's conditioning may be views of one tensor, which cannot be saved.
                asked = {f"conditioning.{k}": v.contiguous().clone() for k, v in cond.items()}
                made = {one.name: fingerprint(config, run.recipe, one.name) for one in config.candidates}
                # One entry: safetensors writes several in any order, and equal runs are to write equal files.
                origin = json.dumps({"seed": config.seed, "samples": config.samples, "made": made})
                save_tensors(new("latents.safetensors"), {**latents, **asked}, {ORIGIN: origin})
            if config.pictures:
                captions = run.mixture.backbone.captions(conditioning.select(cond, slice(config.pictures)))
                shown = {name: video[: config.pictures] for name, video in videos.items()}
                contact_sheet(new("contact_sheet.png"), shown, captions)
                side_by_side(new("side_by_side.webp"), shown)
                make_folder(folder / VIDEOS)
                named = {name: f"{number}{words_of(name)}.mp4" for number, name in enumerate(shown)}
                mp4s = {name: [f"{k:02}_{each}" for k in range(len(shown[name]))] for name, each in named.items()}
                for name, each in mp4s.items():
                    for file, video in zip(each, shown[name], strict=True):
                        write_mp4(new(f"{VIDEOS}/{file}"), video, fps=run.mixture.backbone.fps)
                about = {"captions": captions, "seed": config.seed, "files": mp4s}
                new(f"{VIDEOS}/videos.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        show_table(f"{config.name}: {config.samples} samples", table)
        run.say(f"  {folder}")


def fingerprint(config: EvaluateConfig, recipe: "Recipe", name: str) -> str:
    """A hash of the settings that make a candidate's samples, but for noise and conditioning.

    Those of the teacher are the backbone and the sigmas of its steps; the exact velocity is of the data too, and a
    student of the whole recipe. Weights are known by their settings only: other ones in the same file go unnoticed.
    """
    [candidate] = [one for one in config.candidates if one.name == name]
    sigmas, eta = candidate.path(recipe)
    resolved = recipe.resolved()
    whole = [key for key in resolved if key not in ("name", "description", "stages", "sample")]
    kept = {"teacher": ["backbone"], "exact": ["backbone", "data"], "student": whole}
    settings: dict[str, Any] = {key: resolved[key] for key in kept[candidate.model]}
    settings |= {"model": candidate.model, "sigmas": [round(value, 6) for value in sigmas.tolist()], "eta": eta}
    if candidate.model == "student":
        stages = zip(recipe.stages, resolved["stages"], strict=True)
        trained = [
            {key: value for key, value in plain.items() if key != "preview"}
            for stage, plain in stages
            if isinstance(stage, TrainingStageConfig)
        ]
        settings |= {"stages": trained, "stand_ins": candidate.stand_ins, "weights": config.weights}
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()


def stored_samples(config: EvaluateConfig, recipe: "Recipe", cond: Mapping[str, Tensor] | None = None) -> Tensor:
    """The reference's samples from `config.reference_samples`, `[N, C, T, H, W]`.

    Raises:
        ValueError: the file is missing or lacks them, or they are of another model, other steps, noise or conditioning.
    """
    what = f"reference_samples {config.reference_samples}"
    assert config.reference_samples is not None
    try:
        check_file(config.reference_samples)
        with safe_open(config.reference_samples, "pt") as file:
            names, origin = list(file.keys()), json.loads((file.metadata() or {}).get(ORIGIN, "{}"))
            wanted_names = {config.reference, *(f"conditioning.{name}" for name in cond or {})}
            stored = {name: file.get_tensor(name) for name in names if name in wanted_names}
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{what}: cannot be read ({reason(error)}); give an evaluation's latents.safetensors"
        ) from error
    if config.reference not in stored:
        others = ", ".join(name for name in names if not name.startswith("conditioning."))
        raise ValueError(f"{what}: it has no {config.reference!r}; there are {others}")
    drawn, wanted = (origin.get("seed"), origin.get("samples")), (config.seed, config.samples)
    if drawn != wanted:
        raise ValueError(
            f"{what}: made with seed {drawn[0]} and {drawn[1]} samples, not seed {wanted[0]} and {wanted[1]}; "
            "use the same, or leave the key out"
        )
    if origin["made"].get(config.reference) != fingerprint(config, recipe, config.reference):
        raise ValueError(
            f"{what}: its {config.reference!r} was made with other settings (backbone, guidance or steps); "
            "use the same, or leave the key out"
        )
    for name, value in (cond or {}).items():
        other = stored.get(f"conditioning.{name}")
        if other is None or not torch.equal(other, value.cpu()):
            raise ValueError(f"{what}: made for other conditioning ({name} differs); leave the key out")
    return stored[config.reference]


def show_table(title: str, table: dict[str, dict[str, float]]) -> None:
    """Prints metrics by model: a line for each model; where that is too wide, a line for each metric."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(width=None if Console().is_terminal else WIDTH)

    def fits(drawn: "Table") -> bool:
        return Measurement.get(console, console.options.update(width=10_000), drawn).maximum <= console.width

    def by_metric(models: Sequence[str]) -> "Table":
        folded = ["\n".join(textwrap.wrap(model, NUMBER, break_long_words=False)) for model in models]
        rows = [
            (kind.replace("_", " "), *(f"{table[model][kind]:.4g}" for model in models)) for kind in table[models[0]]
        ]
        return _drawn(title, ["metric", *folded], rows)

    models, kinds = list(table), list(next(iter(table.values())))
    lines = [(model, *(f"{table[model][kind]:.4g}" for kind in kinds)) for model in models]
    if fits(drawn := _drawn(title, ["model", *(kind.replace("_", " ") for kind in kinds)], lines)):
        console.print(drawn)
        return
    while models:
        # As many models side by side as there is room for.
        some = 1
        while some < len(models) and fits(by_metric(models[: some + 1])):
            some += 1
        console.print(by_metric(models[:some]))
        models = models[some:]


def _drawn(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> "Table":
    from rich.table import Table

    drawn = Table(title=title, title_justify="left")
    for number, column in enumerate(head):
        drawn.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    return drawn
