"""The loss terms of DCM (arXiv 2506.03123): temporal coherence, hinge losses, feature matching.

Tensors in, float32 scalar out. Latents are `[B, C, T, H, W]`; features and logits come as one tensor per head.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import relu

from moedistill import Loss, LossConfig, PositiveInt, ProbeLayout, StepTensors, at_least_float32, difference_of

Space = Literal["latent", "hidden"]


def temporal_coherence(prediction: Tensor, target: Tensor, lag: int = 3) -> Tensor:
    """Mean squared difference of the changes over `lag` frames, in the prediction and in the target:

        mean(((y_{t+lag} - y_t) - (z_{t+lag} - z_t))²),   y = prediction, z = target, both `[B, C, T, H, W]`

    With T <= lag frames there are no such changes: the loss is 0.
    """
    return temporal_coherence_of(difference_of(prediction, target), lag)


def temporal_coherence_of(difference: Tensor, lag: int = 3) -> Tensor:
    """`temporal_coherence` of a difference `prediction - target` that is already there: the term is linear in it."""
    if difference.ndim != 5:
        raise ValueError(f"latents of shape {list(difference.shape)} must be [B, C, T, H, W]")
    if lag < 1:
        raise ValueError(f"lag {lag} must be at least 1 frame")
    difference = at_least_float32(difference)
    if difference.shape[2] <= lag:
        return difference[:, :, :0].sum().to(torch.float32)  # 0, and still part of the graph
    return (difference[:, :, lag:] - difference[:, :, :-lag]).square().mean().to(torch.float32)


def hinge_generator(logits_per_head: Sequence[Tensor], clip: bool = True) -> Tensor:
    """The student's adversarial loss: mean over heads of `mean(relu(1 - D(fake)))`.

    Without `clip` it is `mean(1 - D(fake))`, as the paper writes it; the released training clips.
    """
    _check_heads(logits_per_head)
    margins = [1 - at_least_float32(logits) for logits in logits_per_head]
    return _mean([(relu(margin) if clip else margin).mean() for margin in margins])


def hinge_critic(fake_per_head: Sequence[Tensor], real_per_head: Sequence[Tensor]) -> Tensor:
    """The critic's loss: mean over heads of `mean(relu(1 + D(fake))) + mean(relu(1 - D(real)))`."""
    _check_heads(fake_per_head, real_per_head)
    return _mean(
        [
            relu(1 + at_least_float32(fake)).mean() + relu(1 - at_least_float32(real)).mean()
            for fake, real in zip(fake_per_head, real_per_head, strict=True)
        ]
    )


def feature_matching(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Mean of `(fake - real)²` over all heads and elements. No gradient reaches `real`."""
    _check_heads(fake, real)
    squares = [difference_of(f, r.detach()).square() for f, r in zip(fake, real, strict=True)]
    total = torch.stack([square.sum() for square in squares]).sum()
    return (total / sum(square.numel() for square in squares)).to(torch.float32)


class TemporalCoherence(Loss):
    """Temporal coherence of prediction and target; says so once when the videos are too short for it."""

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self._warned = False

    def __call__(self, tensors: StepTensors) -> Tensor:
        num_frames = tensors.difference.shape[2]
        if num_frames <= self.lag and not self._warned:
            self._warned = True
            warnings.warn(
                f"temporal_coherence cannot be formed: lag {self.lag} needs more than {self.lag} latent frames, "
                f"and the videos have {num_frames}; the term is 0 for them",
                stacklevel=2,
            )
        return temporal_coherence_of(tensors.difference, self.lag)


@dataclass(kw_only=True)
class TemporalCoherenceConfig(LossConfig):
    """Mean squared difference of the changes over some frames, in the prediction and in the target.

    Args:
        lag: latent frames between which the change is taken.
    """

    lag: PositiveInt = 3

    def build(self, layout: ProbeLayout | None) -> Loss:
        return TemporalCoherence(self.lag)


class FeatureMatching(Loss):
    """Mean squared distance of the teacher's features of prediction and target."""

    def __init__(self, space: Space) -> None:
        self.space = space

    def __call__(self, tensors: StepTensors) -> Tensor:
        probe = tensors.probe
        if probe is None:
            raise ValueError("feature_matching needs teacher features: the stage must have a probe")
        if self.space == "latent":
            return feature_matching(probe.latent_prediction, probe.latent_target)
        return feature_matching(probe.hidden_prediction, probe.hidden_target)


@dataclass(kw_only=True)
class FeatureMatchingConfig(LossConfig):
    """Mean squared distance of the teacher's features of prediction and target.

    Args:
        space: `latent`: each tapped state goes through the teacher's final layers first, as in the released training;
            `hidden`: the tapped states themselves, as the paper says.
    """

    needs_probe: ClassVar[bool] = True

    space: Space = "latent"

    def build(self, layout: ProbeLayout | None) -> Loss:
        return FeatureMatching(self.space)


def _mean(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(losses)).mean().to(torch.float32)


def _check_heads(*per_head: Sequence[Tensor]) -> None:
    counts = [len(heads) for heads in per_head]
    if counts[0] == 0 or len(set(counts)) != 1:
        raise ValueError(
            f"{' and '.join(map(str, counts))} heads: there must be at least one, and as many on each side"
        )
