"""Puts together what each stage of a recipe takes on each process: what stands, and what a step adds to it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from moedistill.data.loading import share_of_batch
from moedistill.errors import user_errors
from moedistill.model.mixture import Mixture
from moedistill.recipe.building import to_plain
from moedistill.recipe.keys import Recipe, StageConfig, TrainingStageConfig
from moedistill.runs.planning.count import GIB, Standing, count
from moedistill.runs.planning.fake_step import Moment, Step, empty_mixture, empty_run, fake_forward, fake_step
from moedistill.stages.rehearsal import Part
from moedistill.stages.training import Training

CARDS = (24, 32, 40, 48, 80, 141)
"""GiB of memory of GPUs that there are."""


def spare(memory: float) -> float:
    """What of a GPU's memory, GiB, is left for the CUDA context, NCCL and the allocator's gaps: a fifth, 10 at most."""
    return min(10.0, memory / 5)


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes on each process, in bytes.

    Attributes:
        micro_batch: samples at a time.
        weights: that are not trained.
        trained: of experts and critics, float32.
        gradients: of all that is trained.
        moments, averages: on the device.
        distribution: DDP's buckets, or what FSDP2 gathers.
        activations: at the peak, with what operations leave in passing; so weights, trained, moments, averages,
            distribution, activations and `gradients_at_peak` are the peak.
        peak: the most on the device.
        where: the part of a step that it is in.
        host: on the host of each process; while a checkpoint is written, that comes on top in the main one, or, of
            what is sharded, twice its part in each.
        checkpoint: on disk.
        flops: of an optimiser step, on each process.
        evaluations: samples that networks evaluate in it, on each process.
    """

    name: str
    kind: str
    expert: str | None
    micro_batch: int
    weights: int
    trained: int
    gradients: int
    moments: int
    averages: int
    distribution: int
    activations: int
    gradients_at_peak: int
    peak: int
    where: str
    host: int
    checkpoint: int
    flops: int
    evaluations: int


@dataclass(frozen=True)
class Remedy:
    """A change that takes less.

    Attributes:
        settings: of `--set`; none for something that is no key.
        gpus: with so many processes.
        cost: what it costs, for people.
        peak: the largest of all stages then, in bytes.
        fits: whether that is enough.
    """

    settings: Sequence[str]
    gpus: int
    cost: str
    peak: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What a recipe takes, and whether it fits.

    Attributes:
        recipe: its name.
        gpus: processes, one on each.
        gpu_memory: GiB of each.
        spare: GiB of it that are left free.
        fits: whether every stage does.
        cards: whether it fits GPUs of other memory, by their GiB.
        numbers: the peak by the number of GPUs, of those that share the batch evenly and were looked at.
        remedies: what would take less, the cheapest first.
        missing: what is not there yet and would help, for people.
    """

    recipe: str
    gpus: int
    gpu_memory: float
    spare: float
    fits: bool
    stages: Sequence[StagePlan]
    cards: dict[str, bool]
    numbers: dict[str, int]
    remedies: Sequence[Remedy] = ()
    missing: str = ""

    @property
    def peak(self) -> int:
        """The largest of all stages."""
        return max(stage.peak for stage in self.stages)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


class Planner:
    """Plans variants of a recipe; what was tried once is not tried again."""

    def __init__(self) -> None:
        self._steps: dict[str, dict[tuple[int, int], Step]] = {}
        self._mixtures: dict[str, Mixture] = {}
        self._parts: dict[str, dict[str, list[Part]]] = {}

    def stages(self, recipe: Recipe, gpus: int, *, about: bool = False) -> list[StagePlan]:
        """All stages with so many processes.

        Args:
            about: of steps that were tried with two sizes of a batch, take those of a third from both, by a straight
                line: what a step takes is proportional to the tokens, but for a constant part.

        Raises:
            UserError: the batch cannot be shared among them; the backbone cannot be built, or a stage not set up.
        """
        with user_errors(f"{gpus} GPUs" if gpus > 1 else "training"):
            batch = share_of_batch(recipe.training.batch_size, recipe.training.gradient_accumulation_steps, gpus)
        with user_errors("experts"):
            standing = count(recipe, self._mixture(recipe), gpus, self._parts.setdefault(_key(recipe), {}))
        return [self._stage(recipe, config, standing[config.name], batch, gpus, about) for config in recipe.stages]

    def _mixture(self, recipe: Recipe) -> Mixture:
        key = _key(recipe)
        if key not in self._mixtures:
            with user_errors("backbone"):
                skeleton = recipe.backbone.skeleton()
            self._mixtures[key] = empty_mixture(recipe, skeleton)
        return self._mixtures[key]

    def _stage(
        self, recipe: Recipe, config: StageConfig, standing: Standing, batch: int, gpus: int, about: bool
    ) -> StagePlan:
        with user_errors(f"stage {config.name}"):
            step = self._step(recipe, config, batch, about)
        training, cut = recipe.training, gpus if recipe.training.sharding == "fsdp2" else 1

        accumulating = training.gradient_accumulation_steps > 1

        def gradients(moment: Moment) -> int:
            """All there, where those of earlier micro-batches are kept."""
            return standing.gradients if accumulating else int(moment.gradients / cut + moment.of_critics)

        most = max(step.moments, key=lambda moment: moment.activations + gradients(moment))
        micro_batches = training.gradient_accumulation_steps if isinstance(config, TrainingStageConfig) else 1
        return StagePlan(
            name=config.name,
            kind=config.kind,
            expert=config.expert if isinstance(config, TrainingStageConfig) else None,
            micro_batch=batch if isinstance(config, TrainingStageConfig) else 1,
            weights=standing.weights,
            trained=standing.trained,
            gradients=standing.gradients,
            moments=standing.moments,
            averages=standing.averages,
            distribution=standing.shared,
            activations=int(most.activations),
            gradients_at_peak=gradients(most),
            peak=standing.device + int(most.activations) + gradients(most),
            where=most.where,
            host=standing.host,
            checkpoint=standing.checkpoint,
            flops=int(step.flops * micro_batches),
            evaluations=step.forwards * micro_batches,
        )

    def _step(self, recipe: Recipe, config: StageConfig, batch: int, about: bool) -> Step:
        own = self._what_matters(recipe, config) if isinstance(config, TrainingStageConfig) else None
        batch = batch if own is not None else 1
        key = json.dumps([own, recipe.training.gradient_checkpointing, _key(recipe, size=False)])
        tried, size = self._steps.setdefault(key, {}), (batch * _latents(recipe, config), batch)
        if size not in tried:
            if about and (found := between(tried, size[0])) is not None:
                return found
            skeleton = recipe.backbone.skeleton()
            if isinstance(config, TrainingStageConfig):
                tried[size] = fake_step(recipe, config, skeleton, batch)
            else:
                tried[size] = fake_forward(recipe, skeleton)
        return tried[size]

    def _what_matters(self, recipe: Recipe, config: TrainingStageConfig) -> dict[str, Any]:
        """Of a stage for what its step takes: of its phases, whether a jump from the highest point has a target."""
        own = {**to_plain(config), **dict.fromkeys(("name", "optimizer", "steps", "latent_frames"))}
        if "phases" in own:
            training = Training(empty_run(recipe, self._mixture(recipe)), config)
            own["phases"] = training.trajectory.points_in(training.segment)[-1] - 1 in config.landings(recipe)
        return own


def _latents(recipe: Recipe, config: StageConfig) -> int:
    """Latents of a sample, of one channel; 1 where its size cannot be chosen."""
    shape = getattr(recipe.backbone, "latent_shape", None)
    if shape is None:
        return 1
    _, frames, height, width = shape()
    return int(min(frames, getattr(config, "latent_frames", None) or frames) * height * width)


def between(tried: Mapping[tuple[int, int], Step], size: int) -> Step | None:
    """The step of a size by a straight line through two others; None where there are none, or they are not alike."""
    if len({low for low, _ in tried}) < 2:
        return None
    (low, _), (high, _) = ends = min(tried), max(tried)
    first, last = (tried[end] for end in ends)
    if [moment.where for moment in first.moments] != [moment.where for moment in last.moments]:
        return None
    share = (size - low) / (high - low)
    moments = [
        replace(one, activations=one.activations + share * (other.activations - one.activations))
        for one, other in zip(first.moments, last.moments, strict=True)
    ]
    return Step(moments, first.flops + share * (last.flops - first.flops), first.forwards)


def _key(recipe: Recipe, *, size: bool = True) -> str:
    """What the mixture depends on; of steps without the size of videos."""
    plain = to_plain(recipe)
    if not size:
        plain["backbone"].pop("video", None)
    return json.dumps([plain[part] for part in ("backbone", "trajectory", "experts", "router")])


def numbers_that_go(recipe: Recipe) -> list[int]:
    """Numbers of processes among which the batch can be shared evenly."""
    share = recipe.training.batch_size // recipe.training.gradient_accumulation_steps
    return [number for number in range(1, share + 1) if share % number == 0]


def fits(peak: float, memory: float) -> bool:
    """Whether so many bytes fit a GPU of so many GiB, with what is to be left free."""
    return peak <= (memory - spare(memory)) * GIB


def plan(recipe: Recipe, *, gpus: int | None = None, gpu_memory: float = 80.0, planner: Planner | None = None) -> Plan:
    """What a recipe takes on each of `gpus` processes.

    Args:
        gpus: if not given, 1; of a sharded recipe the fewest that fit, or the most among which the batch can be shared.
        gpu_memory: of each, GiB.

    Raises:
        UserError: a mistake in the recipe, or a number of GPUs that cannot share its batch.
    """
    planner = planner or Planner()
    numbers = [gpus] if gpus is not None else numbers_that_go(recipe)
    if recipe.training.sharding == "none":
        numbers = numbers[:1]
    peaks: dict[int, int] = {}
    # The least at a time first, and the most: then a line is known.
    for number in dict.fromkeys([numbers[-1], *numbers]):
        peaks[number] = max(stage.peak for stage in planner.stages(recipe, number, about=True))
        if not fits(peaks[numbers[-1]], gpu_memory) or (number != numbers[-1] and fits(peaks[number], gpu_memory)):
            break
    chosen = min((number for number in peaks if fits(peaks[number], gpu_memory)), default=numbers[-1])
    stages = planner.stages(recipe, chosen)
    peak = peaks[chosen] = max(stage.peak for stage in stages)
    return Plan(
        recipe=recipe.name,
        gpus=chosen,
        gpu_memory=gpu_memory,
        spare=spare(gpu_memory),
        fits=fits(peak, gpu_memory),
        stages=stages,
        cards={str(card): fits(peak, card) for card in CARDS},
        numbers={str(number): peaks[number] for number in sorted(peaks)},
    )
