"""How much of what is real the samples cover, and how densely they lie there, by features of both.

Reliable Fidelity and Diversity Metrics for Generative Models (Naeem et al., 2020), arXiv 2002.09797.
"""

from collections.abc import Callable
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from moedistill.metrics.base import Metric, MetricInputs
from moedistill.metrics.statistics import in_balls, radii

BITS = 52
"""Of an integer that float64 holds exactly."""


class Density(Metric):
    """Mean number of balls around real videos in which a sample lies, over k; 1 where samples are as the real ones.

    Args:
        features: of the samples, `[N, D]`.
        real: those of the real videos, `[M, D]`.
        neighbours: k: a ball reaches to the k-th nearest other real video.
    """

    def __init__(
        self, features: Callable[[MetricInputs], Tensor], real: Callable[[], Tensor], neighbours: int = 5
    ) -> None:
        self.features, self.real, self.neighbours = features, real, neighbours

    @cached_property
    def _balls(self) -> tuple[Tensor, Tensor]:
        """The real features and the radii around them, once for all candidates."""
        real = self.real().cpu()
        return real, radii(real, self.neighbours)

    def _inside(self, inputs: MetricInputs) -> Tensor:
        return in_balls(self.features(inputs).cpu(), *self._balls)

    def rows(self, inputs: MetricInputs) -> Tensor:
        return self._inside(inputs).double().sum(1, keepdim=True) / self.neighbours


class Coverage(Density):
    """Share of the balls around real videos in which a sample lies.

    It grows with the number of samples: compare equal numbers. Rows name a sample's balls, as bits of integers.
    """

    share: ClassVar[bool] = True

    def rows(self, inputs: MetricInputs) -> Tensor:
        inside = self._inside(inputs).double()
        return torch.stack([part @ _weights(part.shape[1]) for part in inside.split(BITS, dim=1)], dim=1)

    def value(self, rows: Tensor) -> float:
        words = np.bitwise_or.reduce(rows.numpy().astype(np.int64), axis=0)
        return sum(int(word).bit_count() for word in words) / len(self.real())


def _weights(bits: int) -> Tensor:
    return 2.0 ** torch.arange(bits, dtype=torch.float64)
