"""DCM's adversarial loss: discriminator heads on the teacher's features of re-noised samples."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Gt, Le
from torch import Tensor, nn
from torch.func import functional_call

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

    def forward(self, hidden: Sequence[Tensor], grid: tuple[int, int, int]) -> list[Tensor]:
        """Logits `[B·T', 1, H', W']` per head, of states `[B, T'·H'·W', hidden_size]` per tap and their grid."""
        return [
            head(states.unflatten(1, grid).flatten(0, 1).permute(0, 3, 1, 2)).float()
            for head, states in zip(self.heads, hidden, strict=True)
        ]


class GAN(AdversarialLoss):
    """Hinge GAN between the student's prediction (fake) and its own consistency target, or data (real)."""

    def __init__(self, config: "GANConfig", layout: ProbeLayout) -> None:
        self.critic: nn.Module = Discriminator(layout, config.width, config.groups)
        self.critic_updates = config.critic_updates
        self.optimizer = config.optimizer
        self._clip = config.clip
        self._data = config.needs_data_probe

    def __call__(self, tensors: StepTensors) -> Tensor:
        assert tensors.probe is not None
        # The critic's weights as constants: the student's gradients pass through them and leave none behind.
        weights = {name: weight.detach() for name, weight in self.critic.named_parameters()}
        logits = functional_call(self.critic, weights, (tensors.probe.hidden_prediction, tensors.probe.grid))
        return hinge_generator(logits, clip=self._clip)

    def critic_loss(self, critic: nn.Module, tensors: StepTensors) -> Tensor:
        probe = tensors.probe
        assert probe is not None
        # One call on both halves: a wrapped module may be called once per backward.
        hidden_target = probe.hidden_data if self._data else probe.hidden_target
        both = [torch.cat([fake, real]) for fake, real in zip(probe.hidden_prediction, hidden_target, strict=True)]
        logits = critic(both, probe.grid)
        fake, real = zip(*(head.chunk(2) for head in logits), strict=True)
        return hinge_critic(list(fake), list(real))


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
