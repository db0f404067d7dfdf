"""One step of a training stage without numbers: the stage's own `setup` and `step`, on tensors that have none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moedistill.data.base import Dataset, Sample
from moedistill.data.loading import Batch
from moedistill.losses.base import Loss, LossConfig, ProbeLayout, StepTensors
from moedistill.losses.optim import OptimizerConfig
from moedistill.model.backbone import Backbone
from moedistill.model.conditioning import Conditioning
from moedistill.model.live_parameters import LiveParameters
from moedistill.model.mixture import Mixture
from moedistill.recipe.keys import Recipe, TrainingStageConfig
from moedistill.runs.build import attach_experts, flow_of
from moedistill.runs.planning.depths import at_depth, blocks_of, depths_to_try, extended, stacks
from moedistill.runs.planning.imagined import Imagined
from moedistill.runs.planning.tracker import OTHER, Passage, Tracker
from moedistill.runtime.randomness import Draws
from moedistill.stages.base import TrainingStage
from moedistill.stages.run import Run
from moedistill.stages.training import STUDENT, Trainable, Training

WEIGHTS, MOMENTS, AVERAGES = "weights", "moments", "averages"
GRADIENTS, OF_CRITICS = "gradients", "gradients of critics"

WATCHED = (OTHER, GRADIENTS, OF_CRITICS)
"""What comes and goes within a step; the rest stands."""


@dataclass(frozen=True)
class Moment:
    """What a moment of a step takes, of what comes and goes, in bytes.

    Attributes:
        where: the part of the step.
        activations: and whatever else an operation leaves behind that is no gradient of a weight.
        gradients, of_critics: of the weights of experts, and of critics.
    """

    where: str
    activations: float
    gradients: float
    of_critics: float


@dataclass(frozen=True)
class Step:
    """A step of one micro-batch on one process.

    Attributes:
        moments: those of which one may take the most.
        flops: of networks, losses and critics.
        forwards: samples that a network evaluates, as `Mixture.forwards` counts them.
    """

    moments: Sequence[Moment]
    flops: float
    forwards: int


class Watched(Training):
    """A training stage under way whose step a tracker sees in parts, and whose gradients, moments and averages it knows
    from other tensors.
    """

    def __init__(self, run: Run, config: TrainingStageConfig, tracker: Tracker) -> None:
        super().__init__(run, config)
        self.tracker = tracker
        self.mixture.register_forward_pre_hook(self._open)
        self.mixture.register_forward_hook(self._close)
        stride = config.probe.block_stride if config.probe is not None else 1
        for network in self.mixture.networks:
            for path, module in blocks_of(network, stride):
                tracker.place(module, path)

    def trains(self, name: str, what: Any, optimizer: OptimizerConfig, **options: Any) -> None:
        super().trains(name, what, optimizer, **options)
        trainable = self.trained[name]
        kind = GRADIENTS if trainable.expert is not None else OF_CRITICS

        def note(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self.tracker.hold(parameter.grad, kind)

        for parameter in trainable.parameters.values():
            self.tracker.hold(parameter, WEIGHTS)
            parameter.register_post_accumulate_grad_hook(note)
        if trainable.average is not None:
            for value in trainable.average.average.values():
                self.tracker.hold(value, AVERAGES)

    def _open(self, *_: Any) -> None:
        """Every forward of a network is a part of its own."""
        self._forward = self.tracker.passage(self.tracker.under_way)
        self._forward.__enter__()

    def _close(self, *_: Any) -> None:
        self._forward.__exit__(None, None, None)

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, *, of: str = STUDENT) -> Tensor:
        with self.tracker.passage(f"forward of {self.trained[of].expert}"):
            return super().velocity(x, sigma, cond, of=of)

    def teacher(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        with self.tracker.passage("forward of the teacher"):
            return super().teacher(x, sigma, cond)

    def target(self, x: Tensor, sigma: Tensor, cond: Conditioning, *, ema: bool = False, of: str = STUDENT) -> Tensor:
        with self.tracker.passage("forward of the target"):
            return super().target(x, sigma, cond, ema=ema, of=of)

    def probe(self, *args: Any, **kwargs: Any) -> Any:
        with self.tracker.passage("the probe's forwards"):
            return super().probe(*args, **kwargs)

    def objective(self, tensors: StepTensors) -> Tensor:
        with self.tracker.passage("losses"):
            return super().objective(tensors)

    def update_critics(self, tensors: StepTensors) -> None:
        with self.tracker.passage("forward of critics"):
            super().update_critics(tensors)

    def update(self, name: str, loss: Tensor) -> None:
        with self.tracker.passage(f"update of {self._called(name)}"):
            super().update(name, loss)

    def _backward(self, trainable: Trainable, loss: Tensor) -> None:
        name = next(name for name, each in self.trained.items() if each is trainable)
        with self.tracker.passage(f"backward of {self._called(name)}"):
            super()._backward(trainable, loss)

    def _called(self, name: str) -> str:
        return self.trained[name].expert or f"critic {name}"


class FakeTraining(Watched):
    """A training stage under way in which no tensor has numbers. Moments are there from the first step on, as they are
    in all later ones.
    """

    def __init__(self, run: Run, config: TrainingStageConfig, imagined: Imagined, batch: int) -> None:
        super().__init__(run, config, imagined.tracker)
        self._imagined = imagined
        self.draw = FakeDraws(imagined, batch, self._telling_point())

    def _telling_point(self) -> int:
        """A starting point that asks the most of a step: its teacher is guided, and its target is run."""
        points = torch.tensor(self.trajectory.points_in(self.segment))
        guided = points[self.guidance.guides(self.trajectory.num_steps - points)]
        return int((guided if len(guided) else points)[-1])

    def _place(self, module: nn.Module) -> None:
        self._imagined.inhabit(module, WEIGHTS)

    def _built(self, config: LossConfig, layout: ProbeLayout | None) -> Loss:
        with torch.device("meta"):
            return config.build(layout)

    def _prepared(
        self, module: nn.Module, parameters: LiveParameters, config: OptimizerConfig, updates: int
    ) -> Trainable:
        dtype = self.mixture.autocast_dtype
        if dtype is not None:  # as accelerate does it
            _autocast(module, dtype)
        optimizer: Any = FakeAdamW(list(parameters.values()), self.tracker)
        return Trainable(parameters, module, optimizer, FakeScheduler(), config.max_grad_norm)


def _autocast(module: nn.Module, dtype: torch.dtype) -> None:
    from accelerate.utils import convert_outputs_to_fp32

    forward = torch.autocast("cpu", dtype, cache_enabled=False)(module.forward)
    module.forward = convert_outputs_to_fp32(forward)


class FakeAdamW:
    """What AdamW allocates, parameter by parameter, as torch's does without `foreach`."""

    def __init__(self, parameters: Sequence[nn.Parameter], tracker: Tracker) -> None:
        self._moments = [
            (each, torch.empty_like(each).detach(), torch.empty_like(each).detach()) for each in parameters
        ]
        for _, *moments in self._moments:
            for moment in moments:
                tracker.hold(moment, MOMENTS)

    @torch.no_grad()
    def step(self) -> None:
        for parameter, first, second in self._moments:
            if parameter.grad is not None:
                first.lerp_(parameter.grad, 0.1)
                second.mul_(0.9).addcmul_(parameter.grad, parameter.grad, value=0.1)
                denominator = (second.sqrt() / 0.9).add_(1e-8)
                parameter.addcdiv_(first, denominator, value=-0.1)

    def zero_grad(self) -> None:
        for parameter, _, _ in self._moments:
            parameter.grad = None


class FakeScheduler:
    def step(self) -> None:
        pass


class FakeAccelerator:
    """What a step asks of accelerate, in one process."""

    device, sync_gradients, scaler = torch.device("cpu"), True, None
    num_processes, process_index, is_main_process = 1, 0, True

    def backward(self, loss: Tensor, **options: Any) -> None:
        loss.backward(**options)

    def clip_grad_norm_(self, parameters: Sequence[Tensor], limit: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, limit, foreach=False)


class FakeDraws(Draws):
    """Noise without numbers; what is drawn of points is `point` wherever it can be, and the highest elsewhere."""

    def __init__(self, imagined: Imagined, batch: int, point: int) -> None:
        super().__init__(0, "", 0, range(batch))
        self._imagined, self._batch, self._point = imagined, batch, point

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        return self._imagined.empty(self._batch, *shape)

    def uniform(self, name: str) -> Tensor:
        return torch.full((self._batch,), 0.5, dtype=torch.float64)

    def integers(self, name: str, low: int | Tensor, high: int | Tensor) -> Tensor:
        top = torch.as_tensor(high).expand(self._batch) - 1
        return torch.where((top >= self._point) & (self._point >= torch.as_tensor(low)), self._point, top)


class NoData(Dataset):
    """Stands in for data that need not be there."""

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Sample:
        raise IndexError(index)

    def posterior_mean(self, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return torch.empty_like(x)


def empty_mixture(recipe: Recipe, backbone: Backbone) -> Mixture:
    """The recipe's mixture on a backbone without weights; what experts add has none either."""
    return attach_experts(recipe, backbone, flow_of(recipe), without_memory=True)


def empty_run(recipe: Recipe, mixture: Mixture) -> Run:
    """A run that has nothing but a mixture without weights."""
    accelerator: Any = FakeAccelerator()
    return Run(recipe, Path(), accelerator, mixture, NoData())


def fake_step(
    recipe: Recipe, config: TrainingStageConfig, skeleton: Backbone, batch: int, *, as_cuda: bool = True
) -> Step:
    """A step of a micro-batch of `batch` samples: at a few depths, and what follows for all of the network's blocks.

    Raises:
        ValueError: the stage cannot be set up, or the backbone does not say what samples look like.
    """
    tried = depths_to_try(skeleton, config.probe.block_stride if config.probe is not None else 1)
    tries = [_step_at(recipe, config, at_depth(skeleton, depths), batch, as_cuda) for depths in tried]
    full = stacks(skeleton.network)
    moments = [
        Moment(where, *extended([peaks[where, part, by] for peaks, _, _ in tries], tried, full))
        for where, part, by in tries[0][0]
        if all((where, part, by) in peaks for peaks, _, _ in tries)
    ]
    [flops] = extended([[flops] for _, flops, _ in tries], tried, full)
    return Step(moments, flops, tries[0][2])


def fake_forward(recipe: Recipe, skeleton: Backbone) -> Step:
    """One evaluation of one sample by the guided teacher, without gradients: what sampling takes beside the weights."""
    tried = depths_to_try(skeleton, 1)
    tries = [_forward_at(recipe, at_depth(skeleton, depths)) for depths in tried]
    full = stacks(skeleton.network)
    most, flops = extended([[alive, flops] for alive, flops, _ in tries], tried, full)
    return Step([Moment("forward of a network", most, 0, 0)], flops, tries[0][2])


def _forward_at(recipe: Recipe, backbone: Backbone) -> tuple[float, float, int]:
    mixture, imagined = empty_mixture(recipe, backbone), Imagined((OTHER,))
    with imagined.entered() as tracker, torch.no_grad():
        imagined.inhabit(mixture, WEIGHTS)
        shape = backbone.latent_shape()
        set_null(recipe, backbone, imagined)
        cond = fake_conditioning(recipe, shape, imagined, 1)
        with tracker.passage("forward"), mixture.using(next(iter(mixture.experts))):
            mixture.guided(imagined.empty(1, *shape), torch.ones(1), cond, mixture.guidance)
    return (
        max(float(alive[0]) for each in tracker.passages for alive in each.most.values()),
        tracker.flops,
        mixture.forwards,
    )


Peaks = Mapping[tuple[str, str, str], tuple[int, ...]]


def _step_at(
    recipe: Recipe, config: TrainingStageConfig, backbone: Backbone, batch: int, as_cuda: bool
) -> tuple[Peaks, float, int]:
    mixture, imagined = empty_mixture(recipe, backbone), Imagined(WATCHED, as_cuda=as_cuda)
    run, stage = empty_run(recipe, mixture), config.build()
    assert isinstance(stage, TrainingStage)
    mixture.settle(*config.trained_experts())
    with imagined.entered() as tracker, torch.random.fork_rng(devices=[]):
        imagined.inhabit(mixture, WEIGHTS)
        training = FakeTraining(run, config, imagined, batch)
        stage.setup(training)
        made = fake_batch(recipe, config, backbone, imagined, batch)
        set_null(recipe, backbone, imagined)
        with tracker.passage("between"):
            stage.step(training, made)
    return peaks(tracker.passages), float(tracker.flops), mixture.forwards


def peaks(passages: Sequence[Passage]) -> Peaks:
    """Where each part of a step takes the most, in all and of activations, by its place among the blocks.

    What is alive rises or falls with each block; so its ends decide, and each of them is linear in their number.
    """
    found: dict[tuple[str, str, str], tuple[int, ...]] = {}
    times: dict[str, int] = {}
    for passage in passages:
        times[passage.name] = number = times.get(passage.name, 0) + 1
        for by, most in (("all", passage.most), ("activations", passage.most_of_first)):
            found |= {(passage.name, f"{number} {place}", by): alive for place, alive in most.items() if passage.name}
    return found


def fake_batch(recipe: Recipe, config: TrainingStageConfig, backbone: Backbone, imagined: Imagined, size: int) -> Batch:
    """A prepared micro-batch of the size that the recipe says, with the longest text."""
    channels, frames, *rest = backbone.latent_shape()
    shape = (channels, min(frames, config.latent_frames or frames), *rest)
    return Batch(
        imagined.empty(size, *shape), fake_conditioning(recipe, shape, imagined, size), list(range(size)), True
    )


def fake_conditioning(recipe: Recipe, latents: Sequence[int], imagined: Imagined, size: int) -> dict[str, Tensor]:
    """What a sample must have besides latents `(C, T, H, W)`. Masks and numbers are real: networks look at them."""
    layout = recipe.backbone.layout()
    if layout is None:
        raise ValueError(f"backbone {recipe.backbone.kind!r} does not say what samples look like (layout)")
    made: dict[str, Tensor] = {}
    for name, each in layout.conditioning.items():
        if not each.required:
            continue
        shape = [own or other for own, other in zip(each.shape, (0, *latents[1:]), strict=False)]
        shape = [size, *(shape if each.role == "video" else (own or 1 for own in each.shape))]
        if each.role == "mask":
            made[name] = torch.ones(*shape, dtype=torch.bool)
        elif each.whole or each.role == "scalar":
            made[name] = torch.ones(*shape, dtype=torch.int64 if each.whole else torch.float32)
        else:
            made[name] = imagined.empty(*shape, dtype=getattr(torch, recipe.backbone.dtype))
    return made


def set_null(recipe: Recipe, backbone: Backbone, imagined: Imagined) -> None:
    """Gives the backbone a negative prompt, if it takes one."""
    cond = fake_conditioning(recipe, backbone.latent_shape(), imagined, 1)
    try:
        backbone.set_null({name: value[0] for name, value in cond.items()})
    except ValueError:  # it makes its own
        return
