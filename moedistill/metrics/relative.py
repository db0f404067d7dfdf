"""Metrics of any backbone: samples against the reference's from the same noise."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moedistill.metrics.base import Metric, MetricConfig, MetricInputs
from moedistill.metrics.statistics import edge_energy, unrest


class PairedDistance(Metric):
    """Mean squared difference of the latents to the reference's from the same noise, times 1000; lower is closer."""

    def rows(self, inputs: MetricInputs) -> Tensor:
        difference = inputs.latents.double() - inputs.reference_latents.double()
        return 1000.0 * difference.square().flatten(1).mean(1, keepdim=True)


@dataclass(kw_only=True)
class PairedDistanceConfig(MetricConfig):
    """Distance to the reference's samples from the same noise."""

    def build(self) -> PairedDistance:
        return PairedDistance()


class Relative(Metric):
    """The sum over the samples, column 0, over that of the reference's, column 1. NaN where both are 0."""

    def value(self, rows: Tensor) -> float:
        samples, reference = rows.sum(0)
        return float(samples / reference)


class RelativeSharpness(Relative):
    """Edge energy over that of the reference's videos: below 1 is blurred, above 1 is speckled or too contrasty."""

    def rows(self, inputs: MetricInputs) -> Tensor:
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

    def rows(self, inputs: MetricInputs) -> Tensor:
        return torch.stack([unrest(inputs.videos), unrest(inputs.reference_videos)], dim=1)


@dataclass(kw_only=True)
class RelativeFlickerConfig(MetricConfig):
    """Unrest from frame to frame, relative to the reference's videos."""

    def build(self) -> RelativeFlicker:
        return RelativeFlicker()
