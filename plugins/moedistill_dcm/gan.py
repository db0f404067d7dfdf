"""DCM's adversarial loss: discriminator heads on the teacher's features of re-noised samples."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch.nn.functional as F
from annotated_types import Gt, Le
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from moedistill import AdversarialLoss, LossConfig, OptimizerConfig, PositiveInt, ProbeLayout, StepTensors
from moedistill_dcm.losses import hinge_critic, hinge_generator


class Head(nn.Module):
    """Logits of one tap, frame by frame: h = φ(conv1 f); h = φ(conv2 h) + h; conv_out h, with φ = LeakyReLU∘GroupNorm.

    All convolutions are 1×1, so any resolution and any number of frames will do.
    """

    def __init__(self, hidden_size: int, width: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(hidden_size, width, 1)
        self.norm1 = nn.GroupNorm(groups, width)
        self.conv2 = nn.Conv2d(width, width, 1)
        self.norm2 = nn.GroupNorm(groups, width)
        self.conv_out = nn.Conv2d(width, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Logits `[B·T', 1, H', W']` of features `[B·T', hidden_size, H', W']`."""
        hidden = F.leaky_relu(self.norm1(self.conv1(features)), 0.01)
        hidden = F.leaky_relu(self.norm2(self.conv2(hidden)), 0.01) + hidden
        logits: Tensor = self.conv_out(hidden)
        return logits


class Discriminator(nn.Module):
    """One head per tap."""

    def __init__(self, layout: ProbeLayout, width: int, groups: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(layout.hidden_size, width, groups) for _ in range(layout.num_taps))

    def forward(self, hidden: Sequence[Tensor], grid: tuple[int, int, int], constant: bool = False) -> list[Tensor]:
        """Logits `[B·T', 1, H', W']` of states `[B, T'·H'·W', hidden_size]` per tap, and of others behind them.

        What a head keeps for the backward pass is computed there once more, so that one head's is there at a time.

        Args:
            grid: of the tokens.
            constant: take the weights for constants: gradients pass to the states, and leave none behind.
        """
        taps = len(self.heads)
        return [
            self._logits(head, states, grid, constant)
            for first in range(0, len(hidden), taps)
            for head, states in zip(self.heads, hidden[first : first + taps], strict=True)
        ]

    @staticmethod
    def _logits(head: nn.Module, states: Tensor, grid: tuple[int, int, int], constant: bool) -> Tensor:
        weights = {name: weight.detach() for name, weight in head.named_parameters()} if constant else None

        def run(states: Tensor) -> Tensor:
            features = states.unflatten(1, grid).flatten(0, 1).permute(0, 3, 1, 2)
            logits: Tensor = head(features) if weights is None else functional_call(head, weights, (features,))
            return logits.float()

        made: Tensor = checkpoint(run, states, use_reentrant=False, preserve_rng_state=False)
        return made


class GAN(AdversarialLoss):
    """Hinge GAN between the student's prediction (fake) and its own consistency target, or data (real)."""

    def __init__(self, config: "GANConfig", layout: ProbeLayout) -> None:
        self.critic: nn.Module = Discriminator(layout, config.width, config.groups)
        self.critic_updates = config.critic_updates
        self.optimizer = config.optimizer
        self._clip = config.clip
        self._data = config.needs_data_probe

    def __call__(self, tensors: StepTensors) -> Tensor:
        probe = tensors.probe
        assert probe is not None
        logits = self.critic(probe.hidden_prediction, probe.grid, constant=True)
        return hinge_generator(logits, clip=self._clip)

    def critic_loss(self, critic: nn.Module, tensors: StepTensors) -> Tensor:
        probe = tensors.probe
        assert probe is not None
        # One call on both: a wrapped module may be called once per backward.
        hidden_target = probe.hidden_data if self._data else probe.hidden_target
        logits = critic([*probe.hidden_prediction, *hidden_target], probe.grid)
        taps = len(hidden_target)
        return hinge_critic(logits[:taps], logits[taps:])


@dataclass(kw_only=True)
class GANConfig(LossConfig):
    """Hinge GAN with a head of its own on each tapped teacher block.

    Args:
        width: channels of the heads.
        groups: of their group norms; divides `width`.
        clip: relu(1 - D) as in the released training (true), or 1 - D as the paper writes it (false).
        real: what the critic takes for real: the student's own consistency `target`, as in DCM, or the `data`, which
            costs a forward pass of the teacher more. Prediction and target are nearly equal, and a critic tells them
            apart only slowly.
        critic_updates: critic steps per student step.
        optimizer: of the critic.
    """

    width: Annotated[int, Gt(0), Le(1_000_000)] = 1024
    groups: PositiveInt = 32
    clip: bool = True
    real: Literal["target", "data"] = "target"
    critic_updates: Annotated[int, Gt(0), Le(1000)] = 1
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5, betas=(0.0, 0.999)))
    needs_probe: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.width % self.groups:
            raise ValueError(f"width {self.width} is not a multiple of groups {self.groups}")

    @property
    def needs_data_probe(self) -> bool:
        return self.real == "data"

    def build(self, layout: ProbeLayout | None) -> GAN:
        assert layout is not None
        return GAN(self, layout)
