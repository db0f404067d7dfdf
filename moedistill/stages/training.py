"""What a training step may touch: what is trained, the teacher, draws, losses, and `update`."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moedistill.data.loading import Batch
from moedistill.errors import UserError
from moedistill.flow.routers import segment_of
from moedistill.losses.base import AdversarialLoss, Loss, LossConfig, ProbeLayout, StepTensors
from moedistill.losses.optim import OptimizerConfig
from moedistill.losses.probe import Probe, probe
from moedistill.model import conditioning
from moedistill.model.conditioning import Conditioning
from moedistill.model.ema import EMA
from moedistill.model.live_parameters import LiveParameters
from moedistill.model.mixture import Mixture
from moedistill.recipe.keys import TrainingStageConfig
from moedistill.runtime.randomness import Draws
from moedistill.runtime.sharding import Pieces, cut_like, gather_root, is_sharded, whole, whole_tree
from moedistill.stages.levels import Levels
from moedistill.stages.restoring import misfit_of_state
from moedistill.stages.run import Run

STUDENT = "student"
"""The name under which a stage of the core trains its expert."""


class Behaviour(nn.Module):
    """One expert of a mixture as a module of its own: what accelerate wraps, once for each expert that is trained.

    DDP is told to leave everything else alone, which need not even be on the device.
    """

    def __init__(self, mixture: Mixture, expert: str) -> None:
        super().__init__()
        self.mixture, self.expert = mixture, expert
        own = set(map(id, mixture.experts[expert].parameters.values()))
        tensors = [*self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False)]
        self._ddp_params_and_buffers_to_ignore = [name for name, tensor in tensors if id(tensor) not in own]

    def forward(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Velocity `[B, C, T, H, W]`, float32, of the expert at `sigma` `[B]`."""
        with self.mixture.using(self.expert):
            velocity: Tensor = self.mixture(x, sigma, cond)
            return velocity


@dataclass
class Trainable:
    """Something that a stage trains: an expert of the mixture, or a module of its own, such as a critic.

    Attributes:
        parameters: by name, as they are now.
        module: what to call, as wrapped for distribution.
        expert: its name; None for a module.
        bare: the module itself, whose weights are saved with the stage; None for an expert, whose are saved as such.
        average: of its parameters, if it keeps one.
        sharded: whether its parameters are cut among processes.
    """

    parameters: LiveParameters
    module: nn.Module
    optimizer: Any
    scheduler: Any
    max_grad_norm: float | None
    expert: str | None = None
    bare: nn.Module | None = None
    average: EMA | None = None
    sharded: bool = False


@dataclass
class Term:
    """A loss of the stage, with its recipe entry and the name under which its critic, if it has one, is trained."""

    name: str
    config: LossConfig
    loss: Loss


class NotFinite(UserError):
    """A number that a stage recorded, or measured, is not finite.

    Attributes:
        step: the earliest one with such a number.
        metrics: all numbers of that step.
        broken: the names of those that are not.
    """

    def __init__(self, stage: str, step: int, metrics: dict[str, float], broken: list[str]) -> None:
        self.step, self.metrics, self.broken = step, metrics, broken
        super().__init__(f"stage {stage}, step {step}: {', '.join(f'{name} = {metrics[name]}' for name in broken)}")


MOST_STEPS = 1000
"""So many steps' numbers are kept at most before they are looked at."""


class Training:
    """One training stage under way. A step reads and calls what is here, and nothing else.

    Attributes:
        expert: the one that the stage is about; it is active while a step runs.
        segment: its noise range; of an expert that the router does not name, the whole trajectory.
        teacher_name: the teacher's network that serves it, as an expert of the mixture.
        step, steps: optimiser steps done, and to do.
        draw: this micro-batch's random numbers.
        trained: what the stage trains, by name.
        levels: errors and gradients by noise level.
    """

    def __init__(self, run: Run, config: TrainingStageConfig, step: int = 0) -> None:
        self.run, self.config, self.expert, self.steps = run, config, config.expert, config.steps
        self.recipe, self.trajectory, self.mixture = run.recipe, run.mixture.trajectory, run.mixture
        self.accelerator = run.accelerator
        self.device = run.accelerator.device
        self.guidance = run.recipe.backbone.guidance
        self.segment = segment_of(self.expert, self.mixture.router, self.trajectory)
        self.teacher_name = self._teacher_name()
        self.step = step
        self.trained: dict[str, Trainable] = {}
        self.terms: list[Term] = []
        self.draw = Draws(run.recipe.seed, config.name, 0, [0])
        self.dataset = run.dataset
        self.levels = Levels(self.trajectory, self.device)
        self._recorded: dict[str, list[Tensor]] = {}
        self._steps: list[tuple[int, list[str], Tensor]] = []
        self._frame_axes: dict[str, int] = {}
        layout = self.recipe.backbone.layout() if config.latent_frames is not None else None
        for name, each in layout.conditioning.items() if layout is not None else ():
            if each.frame_axis is not None:
                self._frame_axes[name] = each.frame_axis + 1

    def _teacher_name(self) -> str:
        router = self.mixture.router
        if router is None or self.expert not in router.experts:
            return self.mixture.teacher_of(self.expert)
        # Of several, the one that serves the whole segment; the recipe was checked for that.
        top = self.trajectory.points_in(self.segment)[-1]
        return self.mixture.teacher_at(self.trajectory.sigma(top))

    # -- set-up -------------------------------------------------------------------------------------------------------

    def trains(
        self,
        name: str,
        what: str | nn.Module,
        optimizer: OptimizerConfig,
        *,
        ema: float | None = None,
        updates: int | None = None,
    ) -> None:
        """Makes something trainable: `update(name, loss)` then steps it, and nothing else.

        Args:
            name: of the trainable in `update`, metrics and checkpoints; a stage may have any number.
            what: an expert's name, or a module that the stage brings.
            ema: keep an exponential moving average of an expert with this decay.
            updates: optimiser steps in the whole stage, over which its learning rate is scheduled; the stage's `steps`,
                if not given.

        Raises:
            ValueError: the stage's config does not list the expert in `trained_experts`; the module has no parameter
                that takes a gradient.
        """
        assert name not in self.trained, f"{name!r} is trained already"
        updates = self.steps if updates is None else updates
        if isinstance(what, str):
            if what not in self.config.trained_experts():
                # A checkpoint holds what is listed, and the next stage starts what is not listed anew.
                config = type(self.config).__name__
                raise ValueError(f"expert {what!r} is to be trained; {config}.trained_experts() must list it")
            expert = self.mixture.experts[what]
            # Wrapped while its own parameters alone take gradients: only those are exchanged between processes.
            self._bring(what)
            self.mixture.train_only(what)
            trainable = self._prepared(Behaviour(self.mixture, what), expert.parameters, optimizer, updates)
            trainable.expert, trainable.average = what, self._average(what, ema)
        else:
            assert ema is None, "averages are of experts"
            self._place(what)
            parameters = LiveParameters(what, [key for key, each in what.named_parameters() if each.requires_grad])
            if not parameters:
                raise ValueError(f"{name!r}: no parameter of {type(what).__name__} takes a gradient")
            trainable = self._prepared(what, parameters, optimizer, updates)
            trainable.bare = what
        self.trained[name] = trainable
        self.mixture.train_only(*(each.expert for each in self.trained.values() if each.expert is not None))

    def check_set_up(self) -> None:
        """ValueError if `setup` left out what the stage says that it trains."""
        there = {trainable.expert for trainable in self.trained.values()}
        if missing := [name for name in self.config.trained_experts() if name not in there]:
            raise ValueError(f"setup makes no {' and no '.join(map(repr, missing))} trainable; call training.trains")
        if not self.trained:
            raise ValueError("setup makes nothing trainable; call training.trains")

    def add_losses(self, configs: Sequence[LossConfig], layout: ProbeLayout | None) -> None:
        """Builds the stage's losses, and makes their critics trainable under the loss's name."""
        for config in configs:
            kinds = [term.config.kind for term in self.terms]
            name = config.kind if config.kind not in kinds else f"{config.kind}_{kinds.count(config.kind) + 1}"
            loss = self._built(config, layout)
            if isinstance(loss, AdversarialLoss):
                updates = max(0, self.steps - config.start) * loss.critic_updates
                self.trains(name, loss.critic, loss.optimizer, updates=updates)
            self.terms.append(Term(name, config, loss))

    def _bring(self, expert: str) -> None:
        self.mixture.bring(expert)

    def _place(self, module: nn.Module) -> None:
        module.to(self.device)

    def _built(self, config: LossConfig, layout: ProbeLayout | None) -> Loss:
        return config.build(layout)

    def _prepared(
        self, module: nn.Module, parameters: LiveParameters, config: OptimizerConfig, updates: int
    ) -> Trainable:
        optimizer, scheduler = config.build(parameters.values(), updates)
        # Everything is where it has to be; accelerate would move what waits on the host.
        sharded = any(is_sharded(parameter) for parameter in parameters.values())
        if sharded and config.states != "float32":
            raise ValueError(
                f"optimizer.states: {config.states} does not go with weights that are cut among processes: moments are "
                "in blocks, which would be cut, too; leave it out"
            )
        wrapped = module if sharded else self.accelerator.prepare(module, device_placement=[False])
        optimizer = self.accelerator.prepare(optimizer, device_placement=[False])
        return Trainable(parameters, wrapped, optimizer, scheduler, config.max_grad_norm, sharded=sharded)

    def _average(self, expert: str, decay: float | None) -> EMA | None:
        if decay is None:
            self.mixture.ema.pop(expert, None)  # of an earlier stage: these weights move on without it
            return None
        average = EMA(self.mixture.experts[expert].parameters, decay, on_host=self.mixture.averages_on_host)
        if self.step:  # resuming
            if expert not in self.mixture.ema:
                raise ValueError(f"the checkpoint's ema.json is damaged: it has no average of expert {expert!r}")
            average.load(self.mixture.ema[expert].average)
        self.mixture.ema[expert] = average
        return average

    # -- what a step calls --------------------------------------------------------------------------------------------

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, *, of: str = STUDENT) -> Tensor:
        """An expert in training, with gradients to its own weights and to `x`."""
        velocity: Tensor = self.trained[of].module(x, sigma, cond)
        if of == STUDENT and self.accelerator.scaler is None:  # a scaler's scale would be in the gradients
            share = 1 / (len(x) * self.recipe.training.gradient_accumulation_steps)
            self.levels.watch(velocity, sigma, share)
        return velocity

    @torch.no_grad()
    def teacher(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The teacher with its guidance, without gradients."""
        with self.mixture.using(self.teacher_name):
            return self.mixture.guided(x, sigma, cond, self.guidance)

    @torch.no_grad()
    def target(self, x: Tensor, sigma: Tensor, cond: Conditioning, *, ema: bool = False, of: str = STUDENT) -> Tensor:
        """An expert in training, or its average, without gradients."""
        trainable = self.trained[of]
        assert trainable.expert is not None
        with self.mixture.using(trainable.expert):
            if not ema:
                return self.mixture(x, sigma, cond)
            assert trainable.average is not None
            with trainable.average.swapped():
                return self.mixture(x, sigma, cond)

    def probe(
        self,
        prediction: Tensor,
        target: Tensor,
        end: Tensor,
        cond: Conditioning,
        stride: int,
        data: Tensor | None = None,
    ) -> Probe:
        """Teacher features of prediction and target, both re-noised from their landing `end` `[B]` with equal draws.

        The noise level is a trajectory point drawn uniformly from the landing up to the last starting point but one
        of the segment (DCM, section 3.3). See `moedistill.losses.probe.probe`.
        """
        points, mixture = self.trajectory.points, self.mixture
        start = torch.searchsorted(points, end.cpu())
        top = self.trajectory.points_in(self.segment)[-1]
        sigma = points[self.draw.integers("probe_point", start, top)].to(self.device)
        blocks = mixture.backbone.blocks[::stride]

        def read(x: Tensor) -> list[Tensor]:
            with mixture.using(self.teacher_name):
                return mixture.hidden_states(x, sigma, cond, blocks)

        def unembed(hidden: Tensor, x: Tensor) -> Tensor:
            with mixture.using(self.teacher_name):
                return mixture.unembed(hidden, x, sigma, cond)

        return probe(
            prediction,
            target,
            end=end,
            sigma=sigma,
            noise=self.draw.normal("probe_noise", target.shape[1:]),
            read=read,
            unembed=unembed,
            grid=mixture.backbone.token_grid(target.shape),
            data=data,
            data_noise=None if data is None else self.draw.normal("probe_data_noise", data.shape[1:]),
        )

    def objective(self, tensors: StepTensors) -> Tensor:
        """The weighted sum of the stage's losses; each term is recorded under its name."""
        self.levels.add_errors(tensors.sigma, tensors.difference)
        total = torch.zeros((), device=self.device)
        for term, weight in self._active_terms():
            value = term.loss(tensors).float()
            self.record(f"loss/{term.name}", value)
            total = total + weight * value
        self.record("loss", total)
        return total

    @property
    def probe_wanted(self) -> bool:
        """Whether a loss that counts at this step reads the probe."""
        return any(term.config.needs_probe for term, _ in self._active_terms())

    @property
    def data_probe_wanted(self) -> bool:
        """Whether a loss that counts at this step reads the probe of the data."""
        return any(term.config.needs_data_probe for term, _ in self._active_terms())

    def update_critics(self, tensors: StepTensors) -> None:
        """`critic_updates` optimiser steps of every critic, on the same features without gradients."""
        detached = tensors.detached()
        for term, _ in self._active_terms():
            if isinstance(term.loss, AdversarialLoss):
                for _ in range(term.loss.critic_updates):
                    value = term.loss.critic_loss(self.trained[term.name].module, detached)
                    self.record(f"loss/{term.name}_critic", value)
                    self.update(term.name, value)

    def _active_terms(self) -> Iterator[tuple[Term, float]]:
        for term in self.terms:
            weight = term.config.weight_at(self.step, self.steps)
            if weight > 0:
                yield term, weight

    def update(self, name: str, loss: Tensor) -> None:
        """Backward, and, at the end of an accumulation: clip, step, zero. The same for the student and every critic.

        No gradient reaches what else is being trained, whatever the loss went through.
        """
        trainable = self.trained[name]
        self._backward(trainable, loss)
        if self.accelerator.sync_gradients:
            parameters = list(trainable.parameters.values())
            limit = trainable.max_grad_norm if trainable.max_grad_norm is not None else float("inf")
            self.record(f"grad_norm/{name}", self._clip(trainable, parameters, limit))
            trainable.optimizer.step()
            trainable.scheduler.step()
            trainable.optimizer.zero_grad()
            if trainable.average is not None:
                trainable.average.update()

    def _clip(self, trainable: Trainable, parameters: list[nn.Parameter], limit: float) -> Tensor:
        norm: Tensor
        if self.accelerator.scaler is None:
            norm = self.accelerator.clip_grad_norm_(parameters, limit)
        else:  # accelerate would take the scale out of what others have accumulated, too
            self.accelerator.unscale_gradients(trainable.optimizer)
            norm = nn.utils.clip_grad_norm_(parameters, limit)
        return norm

    def _backward(self, trainable: Trainable, loss: Tensor) -> None:
        if not trainable.sharded:
            self.accelerator.backward(loss, inputs=list(trainable.parameters.values()))
            return
        # The graph is of gathered copies, which cannot be named: what reaches others is taken back.
        others = [other for other in self.trained.values() if other is not trainable]
        kept = [(parameter, parameter.grad) for other in others for parameter in other.parameters.values()]
        for parameter, _ in kept:
            parameter.grad = None
        if kept and trainable.expert is not None:  # looking at them let go of what the backward pass may want
            gather_root(self.mixture.experts[trainable.expert].shared.network)
        self.accelerator.backward(loss)
        for parameter, gradient in kept:
            parameter.grad = gradient

    def record(self, name: str, value: Tensor) -> None:
        """Adds a number to this step's metrics; those of micro-batches and ranks are averaged."""
        self._recorded.setdefault(name, []).append(whole(torch.as_tensor(value).detach()).float())

    @property
    def learning_rate(self) -> float:
        """For the next step, of what the stage named first."""
        return float(next(iter(self.trained.values())).scheduler.get_last_lr()[0])

    # -- what the loop calls ------------------------------------------------------------------------------------------

    def begin(self, batch: Batch) -> Batch:
        """Addresses the draws to this batch's samples, moves it to the device, prepares it, and drops text as asked."""
        self.draw = Draws(self.recipe.seed, self.config.name, self.step, batch.positions, self.device)
        latents, cond = self.prepare(batch.latents, batch.conditioning)
        dropout = self.recipe.data.text_dropout if self.recipe.data else 0.0
        if dropout:
            drop = (self.draw.uniform("conditioning_dropout") < dropout).to(self.device)
            cond = conditioning.where(drop, self.mixture.backbone.null_conditioning(cond), cond)
        batch.latents, batch.conditioning = latents, cond
        return batch

    def prepare(self, latents: Tensor, cond: Conditioning) -> tuple[Tensor, dict[str, Tensor]]:
        """What the dataset gave, on the device, cut to the stage's `latent_frames` and prepared by the backbone."""
        latents, cond = latents.to(self.device), conditioning.to(cond, self.device)
        limit = self.config.latent_frames
        for name, axis in self._frame_axes.items():  # what is itself a video, such as image latents, is cut with it
            if limit is not None and name in cond:
                cond = {**cond, name: cond[name].narrow(axis, 0, min(limit, cond[name].shape[axis]))}
        latents, prepared = self.mixture.backbone.prepare(latents[:, :, :limit], cond)
        return latents, dict(prepared)

    def micro_batch(self) -> Any:
        """The context of one micro-batch: gradients are exchanged only in the last one of a step."""
        return self.accelerator.accumulate(*(trainable.module for trainable in self.trained.values()))

    def end_step(self) -> None:
        """Counts an optimiser step, and keeps the averages of what was recorded in it."""
        self.step += 1
        self._keep_averages()

    def _keep_averages(self) -> None:
        """On the device, where nobody waits for them."""
        names = sorted(self._recorded)
        if names:
            means = torch.stack([torch.stack(self._recorded[name]).mean() for name in names])
            self._steps.append((self.step, names, means))
        self._recorded = {}

    @property
    def metrics_are_due(self) -> bool:
        """Whether to look at this step's numbers at once: on a CPU; on a GPU that would be to wait for it."""
        return self.device.type == "cpu" or len(self._steps) >= MOST_STEPS

    def take_metrics(self) -> dict[str, float]:
        """The last step's numbers, averaged over micro-batches and ranks. All since the last call are looked at.

        Raises:
            NotFinite: one of them is not finite.
        """
        self._keep_averages()
        steps, self._steps, metrics = self._steps, [], dict[str, float]()
        if not steps:
            return metrics
        means = torch.cat([means for _, _, means in steps])
        values = iter(self.accelerator.reduce(means, reduction="mean").tolist())
        for step, names, _ in steps:
            metrics = {name: next(values) for name in names}
            self.check_finite(step, metrics)
        return metrics

    def forget_metrics(self) -> None:
        """Drops what was recorded."""
        self._recorded, self._steps = {}, []

    def check_finite(self, step: int, metrics: dict[str, float]) -> None:
        """Raises `NotFinite` where a number of a step is not finite."""
        # A gradient scaler looks for its scale among overflows, and skips those steps.
        scaled = self.accelerator.scaler is not None
        broken = [
            name
            for name, value in metrics.items()
            if not math.isfinite(value) and not (scaled and name.startswith("grad_norm"))
        ]
        if broken:
            raise NotFinite(self.config.name, step, metrics, broken)

    def state(self) -> dict[str, Any]:
        """Everything but the experts that an exact continuation needs; what is sharded stays so."""
        return {
            "trained": {
                name: {
                    "optimizer": trainable.optimizer.state_dict(),
                    "scheduler": trainable.scheduler.state_dict(),
                }
                for name, trainable in self.trained.items()
            },
            "critics": {
                name: trainable.bare.state_dict()
                for name, trainable in self.trained.items()
                if trainable.bare is not None
            },
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {},
        }

    def load_state(self, state: Any) -> None:
        """Takes over what `state` gave, sharded or not, after `setup` built the same things; ValueError for others'."""
        if fault := misfit_of_state(state, self.trained, self.accelerator.scaler):
            raise ValueError(f"does not fit what is trained: {fault}")
        for name, trainable in self.trained.items():
            saved = state["trained"][name]["optimizer"]
            own = list(trainable.parameters.values())
            moments = {
                number: {key: _cut_as(value, own[number]) for key, value in each.items()}
                for number, each in saved["state"].items()
            }
            groups = whole_tree(saved["param_groups"])
            trainable.optimizer.load_state_dict({**saved, "state": moments, "param_groups": groups})
            trainable.scheduler.load_state_dict(whole_tree(state["trained"][name]["scheduler"]))
            if trainable.bare is not None:
                held = trainable.bare.state_dict()
                saved = state["critics"][name]
                trainable.bare.load_state_dict(
                    {key: cut_like(value, held.get(key, value)) for key, value in saved.items()}
                )
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def release(self) -> None:
        """Lets go of what was wrapped and of the optimisers, so that the next stage starts from the bare mixture."""
        self.accelerator.free_memory()
        self.trained.clear()
        self.mixture.train_only()


def _cut_as(value: Any, parameter: Tensor) -> Any:
    """What an optimiser keeps of a parameter: cut as that is if it is of its shape, else whole."""
    if isinstance(value, Tensor | Pieces) and value.shape == parameter.shape:
        return cut_like(value, parameter)
    return whole_tree(value)
