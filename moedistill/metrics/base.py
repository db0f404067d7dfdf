"""The contract of a metric, and the metrics that every backbone has: a function of samples, their reference, real data.

A metric is one row of numbers per sample, and a function of such rows. So a report can resample the rows, for
intervals and paired differences, without sampling a video again.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moedistill.fields import Config

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class MetricInputs:
    """What a metric may look at. Videos are float32 `[N, C, T, H, W]` in [0, 1], latents `[N, C, T, H, W]`.

    Attributes:
        videos, latents: the candidate's samples.
        reference_videos, reference_latents: the reference's samples from the same noise and conditioning.
        conditioning: what was asked for, by name, batch first.
        fps: frames per second of the videos.
        shared: where metrics keep what several of them need, such as a network's features, under a name of their own.
    """

    videos: "Tensor"
    latents: "Tensor"
    reference_videos: "Tensor"
    reference_latents: "Tensor"
    conditioning: "Mapping[str, Tensor]"
    fps: float = 8.0
    shared: "dict[str, Tensor]" = field(default_factory=dict, repr=False)


class Metric(ABC):
    """A number about generated samples."""

    @abstractmethod
    def rows(self, inputs: MetricInputs) -> "Tensor":
        """What the number is made of, one row per sample: float64 `[N, D]`."""

    def value(self, rows: "Tensor") -> float:
        """The number, of any subset or resampling of the rows; here their mean."""
        return float(rows.mean())

    def __call__(self, inputs: MetricInputs) -> float:
        return self.value(self.rows(inputs))


@dataclass(kw_only=True)
class MetricConfig(Config, ABC):
    """Recipe keys of a metric."""

    @abstractmethod
    def build(self) -> Metric: ...

    def look_ahead(self) -> None:
        """ValueError where a file or program that the metric needs is missing; called before anything is trained."""


# -- shared by metrics ------------------------------------------------------------------------------------------------


def frechet_distance(features_a: "Tensor", features_b: "Tensor") -> float:
    """Fréchet distance of the Gaussians fitted to two sets of features `[N, D]` (Dowson and Landau, 1982).

        |m_a - m_b|² + tr(C_a + C_b - 2·(C_a^½ C_b C_a^½)^½)

    Both roots are taken of symmetric matrices by their eigenvalues, in float64.

    Raises:
        ValueError: fewer than two samples on a side.
    """
    import torch

    for side in (features_a, features_b):
        if len(side) < 2:
            raise ValueError(f"the Fréchet distance needs at least 2 samples on each side, not {len(side)}")
    mean_a, covariance_a = _moments(features_a.double())
    mean_b, covariance_b = _moments(features_b.double())
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance_a)
    root_a = (eigenvectors * eigenvalues.clamp_min(0.0).sqrt()) @ eigenvectors.T
    cross = torch.linalg.eigvalsh(root_a @ covariance_b @ root_a).clamp_min(0.0).sqrt().sum()
    squared_distance = (mean_a - mean_b).square().sum()
    distance = squared_distance + covariance_a.trace() + covariance_b.trace() - 2.0 * cross
    return max(0.0, float(distance))  # rounding can bring equal sets to -1e-5


def _moments(samples: "Tensor") -> "tuple[Tensor, Tensor]":
    mean = samples.mean(0)
    centred = samples - mean
    return mean, centred.T @ centred / (len(samples) - 1)


# Both go video by video: in float64 a batch of large ones would not fit.


def edge_energy(videos: "Tensor") -> "Tensor":
    """Mean square of the differences between neighbouring pixels, along both axes: float64 `[N]`."""
    import torch

    def energy(video: "Tensor") -> "Tensor":
        return video.diff(dim=-1).square().mean() + video.diff(dim=-2).square().mean()

    return torch.stack([energy(video.double()) for video in videos])


def unrest(videos: "Tensor") -> "Tensor":
    """Mean distance (Wasserstein-1) between the grey values of consecutive frames: float64 `[N]`.

    It compares how often each grey value occurs, not where. What only moves keeps its grey values, so motion counts
    nothing, and what fades, changes shape or gains speckle counts.
    """
    import torch

    def distance(video: "Tensor") -> "Tensor":
        grey_values = video.flatten(2).sort(dim=-1).values
        return grey_values.diff(dim=1).abs().mean()

    return torch.stack([distance(video.double()) for video in videos])


# -- metrics of any backbone ------------------------------------------------------------------------------------------


class PairedDistance(Metric):
    """Mean squared difference of the latents to the reference's from the same noise, times 1000; lower is closer."""

    def rows(self, inputs: MetricInputs) -> "Tensor":
        difference = inputs.latents.double() - inputs.reference_latents.double()
        return 1000.0 * difference.square().flatten(1).mean(1, keepdim=True)


@dataclass(kw_only=True)
class PairedDistanceConfig(MetricConfig):
    """Distance to the reference's samples from the same noise."""

    def build(self) -> PairedDistance:
        return PairedDistance()


class Relative(Metric):
    """The sum over the samples, column 0, over that of the reference's, column 1. NaN where both are 0."""

    def value(self, rows: "Tensor") -> float:
        samples, reference = rows.sum(0)
        return float(samples / reference)


class RelativeSharpness(Relative):
    """Edge energy over that of the reference's videos: below 1 is blurred, above 1 is speckled or too contrasty."""

    def rows(self, inputs: MetricInputs) -> "Tensor":
        import torch

        return torch.stack([edge_energy(inputs.videos), edge_energy(inputs.reference_videos)], dim=1)


@dataclass(kw_only=True)
class RelativeSharpnessConfig(MetricConfig):
    """Edge energy, relative to the reference's videos."""

    def build(self) -> RelativeSharpness:
        return RelativeSharpness()


class RelativeFlicker(Relative):
    """Unrest from frame to frame over that of the reference's videos: above 1 flickers, below 1 stands still.

    NaN for videos of one frame.
    """

    def rows(self, inputs: MetricInputs) -> "Tensor":
        import torch

        return torch.stack([unrest(inputs.videos), unrest(inputs.reference_videos)], dim=1)


@dataclass(kw_only=True)
class RelativeFlickerConfig(MetricConfig):
    """Unrest from frame to frame, relative to the reference's videos."""

    def build(self) -> RelativeFlicker:
        return RelativeFlicker()
