"""Metrics of any backbone: samples against the reference's from the same noise."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moedistill.components.fields import PositiveFloat
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


class MedianDistance(PairedDistance):
    """The median of what `PairedDistance` takes the mean of: samples that landed in another mode do not rule it."""

    def value(self, rows: Tensor) -> float:
        return float(rows.quantile(0.5))


@dataclass(kw_only=True)
class MedianDistanceConfig(MetricConfig):
    """Median distance to the reference's samples from the same noise."""

    def build(self) -> MedianDistance:
        return MedianDistance()


class Flips(PairedDistance):
    """Share of samples whose mean squared difference to the reference's is above `beyond`: they are of another mode."""

    share: ClassVar[bool] = True

    def __init__(self, beyond: float) -> None:
        self.beyond = beyond

    def rows(self, inputs: MetricInputs) -> Tensor:
        return (super().rows(inputs) > 1000.0 * self.beyond).double()


@dataclass(kw_only=True)
class FlipsConfig(MetricConfig):
    """Share of samples that are far from the reference's from the same noise.

    Args:
        beyond: how far is far, as a mean square of latents; of two independent samples it is twice their variance.
    """

    beyond: PositiveFloat = 0.5

    def build(self) -> Flips:
        return Flips(self.beyond)


PART = 2**16
"""Elements of a sample at a time."""


class Diversity(Metric):
    """Mean distance (root mean square of latents) of two samples of equal condition, over that of the reference's.

    Below 1 samples are more alike than the reference's. NaN where no two samples have a condition in common.

    Rows: which condition, which of its samples, then the distances to each of these, and the same of the reference's.
    Intervals need several samples of each condition.
    """

    def rows(self, inputs: MetricInputs) -> Tensor:
        groups: dict[bytes, list[int]] = {}
        for number in range(len(inputs.latents)):
            groups.setdefault(_condition(inputs.conditioning, number), []).append(number)
        size = max(map(len, groups.values()))
        rows = torch.zeros(len(inputs.latents), 2 + 2 * size, dtype=torch.float64)
        for number, members in enumerate(groups.values()):
            rows[members, 0] = number
            rows[members, 1] = torch.arange(len(members), dtype=torch.float64)
            for start, latents in ((2, inputs.latents), (2 + size, inputs.reference_latents)):
                rows[members, start : start + len(members)] = _distances(latents.flatten(1), members)
        return rows

    def value(self, rows: Tensor) -> float:
        size = rows.shape[1] // 2 - 1
        group, place = rows[:, 0].long(), rows[:, 1].long()
        # How often each sample was drawn; a pair of one sample with itself is none.
        drawn = torch.zeros(int(group.max()) + 1, size, dtype=torch.float64)
        drawn.index_put_((group, place), torch.ones(len(rows), dtype=torch.float64), accumulate=True)
        distances = torch.zeros(2, *drawn.shape, size, dtype=torch.float64)
        distances[:, group, place] = rows[:, 2:].unflatten(1, (2, size)).transpose(0, 1)
        samples, reference = torch.einsum("gi,agij,gj->a", drawn, distances, drawn)
        return float(samples / reference)


def _distances(flat: Tensor, members: list[int]) -> Tensor:
    """Root mean square of the difference of each two of these rows, float64; by parts, as all of them may be large."""
    squares = torch.zeros(len(members), len(members), dtype=torch.float64)
    for part in flat.split(PART, dim=1):
        values = part[members].double().cpu()
        squares += torch.cdist(values, values).square()
    return (squares / flat.shape[1]).sqrt()


def _condition(conditioning: Mapping[str, Tensor], number: int) -> bytes:
    """What stands for one sample's conditioning; equal where that is."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(conditioning):
        digest.update(name.encode())
        digest.update(conditioning[name][number].contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


@dataclass(kw_only=True)
class DiversityConfig(MetricConfig):
    """Mean distance of samples of equal condition, relative to the reference's."""

    def build(self) -> Diversity:
        return Diversity()


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
