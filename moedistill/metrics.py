"""The contract of a metric: a named function of generated samples, their reference and real data."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
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
    """

    videos: "Tensor"
    latents: "Tensor"
    reference_videos: "Tensor"
    reference_latents: "Tensor"
    conditioning: "Mapping[str, Tensor]"


class Metric(ABC):
    """A number about generated samples."""

    @abstractmethod
    def __call__(self, inputs: MetricInputs) -> float: ...


@dataclass(kw_only=True)
class MetricConfig(Config, ABC):
    """Recipe keys of a metric."""

    @abstractmethod
    def build(self) -> Metric: ...


class PairedDistance(Metric):
    """Mean squared difference of the latents to the reference's from the same noise, times 1000; lower is closer."""

    def __call__(self, inputs: MetricInputs) -> float:
        difference = inputs.latents.float() - inputs.reference_latents.float()
        return 1000.0 * float(difference.square().mean())


@dataclass(kw_only=True)
class PairedDistanceConfig(MetricConfig):
    """Distance to the reference's samples from the same noise."""

    def build(self) -> PairedDistance:
        return PairedDistance()
