"""The contract of a metric: a function of samples, their reference, real data.

A metric is one row of numbers per sample, and a function of such rows. So a report can resample the rows, for
intervals and paired differences, without sampling a video again. A metric of pairs names the other sample in its rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from moedistill.components.fields import Config

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
    """A number about generated samples.

    Attributes:
        share: whether it is a proportion, in [0, 1]: intervals then do not go beyond.
    """

    share: ClassVar[bool] = False

    def look_ahead(self, conditioning: "Mapping[str, Tensor]") -> None:  # noqa: B027 (most have nothing to say)
        """ValueError where nothing can be measured of samples of this conditioning; called before training."""

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
