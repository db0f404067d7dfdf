"""Exponential moving average of an expert's trained weights, float32."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from moedistill.runtime.sharding import cut_like, fill, is_sharded, part

WhichWeights = Literal["trained", "ema"]
"""An expert's weights as trained, or, where it has one, their average."""


class EMA:
    """average ← decay·average + (1 - decay)·weights, after each optimiser step.

    Args:
        parameters: by name, looked up anew at each use (an expert's are); the average starts as their values.
        decay: in [0, 1).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self._live = parameters
        self.average: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the live weights in."""
        for name, parameter in self._live.items():
            self._part(name, parameter).lerp_(part(parameter), 1.0 - self.decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges live weights and average; doing it twice changes nothing. Only what is sharded is copied."""
        for name, parameter in self._live.items():
            if is_sharded(parameter):  # where another tensor is put in its place, it stays what it was
                mine, theirs = part(parameter), self._part(name, parameter)
                kept = mine.clone()
                mine.copy_(theirs)
                theirs.copy_(kept)
            else:
                parameter.data, self.average[name] = self.average[name], parameter.data

    @torch.no_grad()
    def load(self, average: Mapping[str, Tensor]) -> None:
        """Takes over a saved average."""
        for name, value in self.average.items():
            fill(value, average[name])

    def _part(self, name: str, parameter: Tensor) -> Tensor:
        """What of an average lies here; it is cut as its parameter is, which may have been cut after it was loaded."""
        self.average[name] = cut_like(self.average[name], parameter)
        return part(self.average[name])

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The block runs with the average in place of the live weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()
