"""What a training step may touch: the student, the teacher, draws, losses, and `update`."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moedistill.errors import UserError
from moedistill.flow.process import add_noise, renoise
from moedistill.flow.trajectory import Segment
from moedistill.losses.base import AdversarialLoss, Loss, LossConfig, ProbeLayout, StepTensors
from moedistill.losses.optim import OptimizerConfig
from moedistill.losses.probe import Probe
from moedistill.model import conditioning
from moedistill.model.conditioning import Conditioning
from moedistill.model.ema import EMA
from moedistill.runtime.randomness import Draws
from moedistill.stages.run import Run

if TYPE_CHECKING:
    from moedistill.data.loading import Batch
    from moedistill.recipe.keys import TrainingStageConfig


@dataclass
class Trained:
    """Something with parameters, an optimiser and a learning-rate schedule: the student, or a critic."""

    parameters: Sequence[nn.Parameter]
    optimizer: Any
    scheduler: Any
    max_grad_norm: float | None


@dataclass
class Term:
    """A loss of the stage, with its recipe entry."""

    name: str
    config: LossConfig
    loss: Loss
    critic: nn.Module | None = None


class Training:
    """One training stage under way. A step reads and calls what is here, and nothing else.

    Attributes:
        segment: the noise range of the expert in training.
        teacher_name: the teacher's network that serves it, as an expert of the student.
        step, steps: optimiser steps done, and to do.
        draw: this micro-batch's random numbers.
        model: the student as wrapped for distribution; call it as `velocity`.
    """

    def __init__(self, run: Run, config: "TrainingStageConfig", step: int = 0) -> None:
        self.run, self.config, self.expert, self.steps = run, config, config.expert, config.steps
        self.recipe, self.trajectory, self.mixture = run.recipe, run.mixture.trajectory, run.mixture
        self.accelerator = run.accelerator
        self.device = run.accelerator.device
        self.guidance = run.recipe.backbone.guidance
        assert run.mixture.router is not None
        self.segment: Segment = run.mixture.router.segment(self.expert)
        # Of several, the one that serves the whole segment; the recipe was checked for that.
        top = self.trajectory.points_in(self.segment)[-1]
        self.teacher_name = self.mixture.teacher_at(self.trajectory.sigma(top))
        self.step = step
        self.model: nn.Module = self.mixture
        self.trained: dict[str, Trained] = {}
        self.terms: list[Term] = []
        self.ema: EMA | None = None
        self.draw = Draws(run.recipe.seed, config.name, 0, [0])
        self.dataset = run.dataset
        self._recorded: dict[str, list[Tensor]] = {}

    # -- set-up -------------------------------------------------------------------------------------------------------

    def train_student(self, optimizer: OptimizerConfig, ema_decay: float | None) -> None:
        """Makes the stage's expert trainable, as "student"."""
        self.mixture.train_only(self.expert)
        expert = self.mixture.experts[self.expert]
        self.model = self._prepare("student", self.mixture, list(expert.parameters.values()), optimizer, self.steps)
        if ema_decay is None:
            self.mixture.ema.pop(self.expert, None)  # of an earlier stage: these weights move on without it
        else:
            self.ema = EMA(expert.parameters, ema_decay)
            if self.step:  # resuming
                self.ema.load(self.mixture.ema[self.expert].average)
            self.mixture.ema[self.expert] = self.ema

    def add_losses(self, configs: Sequence[LossConfig], layout: ProbeLayout | None) -> None:
        """Builds the stage's losses, and makes their critics trainable under the loss's name."""
        for config in configs:
            kinds = [term.config.kind for term in self.terms]
            name = config.kind if config.kind not in kinds else f"{config.kind}_{kinds.count(config.kind) + 1}"
            loss = config.build(layout)
            term = Term(name, config, loss)
            if isinstance(loss, AdversarialLoss):
                loss.critic.to(self.device)
                updates = max(0, self.steps - config.start) * loss.critic_updates
                term.critic = self._prepare(name, loss.critic, list(loss.critic.parameters()), loss.optimizer, updates)
            self.terms.append(term)

    def _prepare(
        self, name: str, module: nn.Module, parameters: list[nn.Parameter], config: OptimizerConfig, steps: int
    ) -> nn.Module:
        optimizer, scheduler = config.build(parameters, steps)
        wrapped, optimizer = self.accelerator.prepare(module, optimizer)
        self.trained[name] = Trained(parameters, optimizer, scheduler, config.max_grad_norm)
        return wrapped

    # -- what a step calls --------------------------------------------------------------------------------------------

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The expert in training."""
        return self.model(x, sigma, cond)

    @torch.no_grad()
    def teacher(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The teacher with its guidance, without gradients."""
        with self.mixture.using(self.teacher_name):
            return self.mixture.guided(x, sigma, cond, self.guidance)

    @torch.no_grad()
    def target(self, x: Tensor, sigma: Tensor, cond: Conditioning, *, ema: bool = False) -> Tensor:
        """The expert in training, or its average, without gradients."""
        if not ema:
            return self.mixture(x, sigma, cond)
        assert self.ema is not None
        with self.ema.swapped():
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

        Of `data`, if given, too: noised to `end`, and from there as the others.

        The noise level is a trajectory point drawn uniformly from the landing up to the last starting point but one
        of the segment (DCM, section 3.3).
        """
        points = self.trajectory.points
        start = torch.searchsorted(points, end.cpu())
        top = self.trajectory.points_in(self.segment)[-1]
        sigma = points[self.draw.integers("probe_point", start, top)].to(self.device)
        noise = self.draw.normal("probe_noise", target.shape[1:])
        fake, real = (renoise(y, noise, end, sigma) for y in (prediction, target))
        blocks = self.mixture.backbone.blocks[::stride]
        with self.mixture.using(self.teacher_name):
            hidden_prediction = self.mixture.hidden_states(fake, sigma, cond, blocks)
            with torch.no_grad():
                hidden_target = self.mixture.hidden_states(real, sigma, cond, blocks)
                hidden_data = []
                if data is not None:
                    landed = add_noise(data, self.draw.normal("probe_data_noise", data.shape[1:]), end)
                    hidden_data = self.mixture.hidden_states(renoise(landed, noise, end, sigma), sigma, cond, blocks)

        def unembed(hidden: Tensor, x: Tensor) -> Tensor:
            with self.mixture.using(self.teacher_name):
                return self.mixture.unembed(hidden, x, sigma, cond)

        grid = self.mixture.backbone.token_grid(target.shape)
        return Probe(hidden_prediction, hidden_target, fake, real, grid, unembed, hidden_data)

    def objective(self, tensors: StepTensors) -> Tensor:
        """The weighted sum of the stage's losses; each term is recorded under its name."""
        total = torch.zeros((), device=self.device)
        for term, weight in self._active_terms():
            value = term.loss(tensors)
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
                    value = term.loss.critic_loss(term.critic or term.loss.critic, detached)
                    self.record(f"loss/{term.name}_critic", value)
                    self.update(term.name, value)

    def _active_terms(self) -> Iterator[tuple[Term, float]]:
        for term in self.terms:
            weight = term.config.weight_at(self.step, self.steps)
            if weight > 0:
                yield term, weight

    def update(self, name: str, loss: Tensor) -> None:
        """Backward, and, at the end of an accumulation: clip, step, zero. The same for the student and every critic."""
        trained = self.trained[name]
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            limit = trained.max_grad_norm if trained.max_grad_norm is not None else float("inf")
            self.record(f"grad_norm/{name}", self.accelerator.clip_grad_norm_(trained.parameters, limit))
            trained.optimizer.step()
            trained.scheduler.step()
            trained.optimizer.zero_grad()
            if name == "student" and self.ema is not None:
                self.ema.update()

    def record(self, name: str, value: Tensor) -> None:
        """Adds a number to this step's metrics; those of micro-batches and ranks are averaged."""
        self._recorded.setdefault(name, []).append(torch.as_tensor(value).detach().float())

    @property
    def learning_rate(self) -> float:
        """Of the student, for the next step."""
        return float(self.trained["student"].scheduler.get_last_lr()[0])

    # -- what the loop calls ------------------------------------------------------------------------------------------

    def begin(self, batch: "Batch") -> "Batch":
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
        frames, limit = latents.shape[2], self.config.latent_frames
        # Conditioning that is itself a video, such as image latents, is cut with it.
        videos = {name for name, value in cond.items() if value.ndim == 5 and value.shape[2] == frames}
        cond = {name: value[:, :, :limit] if name in videos else value for name, value in cond.items()}
        latents, prepared = self.mixture.backbone.prepare(latents[:, :, :limit], cond)
        return latents, dict(prepared)

    def micro_batch(self) -> Any:
        """The context of one micro-batch: gradients are exchanged only in the last one of a step."""
        wrapped = [self.model, *(term.critic for term in self.terms if term.critic is not None)]
        return self.accelerator.accumulate(*wrapped)

    def take_metrics(self) -> dict[str, float]:
        """The averages of what was recorded since `forget_metrics`, over micro-batches and ranks.

        Raises:
            UserError: a number is not finite.
        """
        names = sorted(self._recorded)
        means = torch.stack([torch.stack(self._recorded[name]).mean() for name in names])
        values: list[float] = self.accelerator.reduce(means, reduction="mean").tolist()
        metrics = dict(zip(names, values, strict=True))
        # A gradient scaler looks for its scale among overflows, and skips those steps.
        scaled = self.accelerator.scaler is not None
        broken = [
            f"{name} = {value}"
            for name, value in metrics.items()
            if not math.isfinite(value) and not (scaled and name.startswith("grad_norm"))
        ]
        if broken:
            raise UserError(
                f"stage {self.config.name}, step {self.step}: {', '.join(broken)}. Lower the learning rate or check "
                "the data; the last checkpoint is intact, --resume goes on from it"
            )
        return metrics

    def forget_metrics(self) -> None:
        """Starts the next step's averages."""
        self._recorded = {}

    def state(self) -> dict[str, Any]:
        """Everything but the experts that an exact continuation needs."""
        return {
            "trained": {
                name: {"optimizer": trained.optimizer.state_dict(), "scheduler": trained.scheduler.state_dict()}
                for name, trained in self.trained.items()
            },
            "critics": {
                term.name: term.loss.critic.state_dict()
                for term in self.terms
                if isinstance(term.loss, AdversarialLoss)
            },
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over what `state` gave, after `setup` built the same things."""
        for name, trained in self.trained.items():
            trained.optimizer.load_state_dict(state["trained"][name]["optimizer"])
            trained.scheduler.load_state_dict(state["trained"][name]["scheduler"])
        for term in self.terms:
            if isinstance(term.loss, AdversarialLoss):
                term.loss.critic.load_state_dict(state["critics"][term.name])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def release(self) -> None:
        """Undoes the wrapping, so that the next stage starts from the bare student."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        self.mixture.train_only(None)
