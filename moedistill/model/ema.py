"""Exponential moving average of an expert's trained weights, float32."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moedistill.runtime.devices import HOST
from moedistill.runtime.sharding import cut_like, fill, is_sharded, part


class EMA:
    """average ← decay·average + (1 - decay)·weights, after each optimiser step.

    Args:
        parameters: by name, looked up anew at each use (an expert's are); the average starts as their values.
        decay: in [0, 1).
        on_host: it lies there, also while it is updated and used.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float, *, on_host: bool = False) -> None:
        self.decay, self._on_host = decay, on_host
        self._live = parameters
        self.average: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}
        if on_host:
            self.to(HOST)

    @torch.no_grad()
    def update(self) -> None:
        """Takes the live weights in."""
        for name, parameter in self._live.items():
            average = self._part(name, parameter)
            average.lerp_(part(parameter).to(average.device), 1.0 - self.decay)

    def to(self, device: torch.device) -> None:
        """Lays it elsewhere, unless it has to stay on the host, or is cut among processes."""
        for name, average in self.average.items():
            if not is_sharded(average):
                self.average[name] = average.to(HOST if self._on_host else device)

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
        """The block runs with the average in place of the live weights; copied is what lies elsewhere or is sharded."""
        kept = {name: self._exchange(parameter, self._part(name, parameter)) for name, parameter in self._live.items()}
        try:
            yield
        finally:
            for name, parameter in self._live.items():
                self._exchange(parameter, kept[name])
            if any(is_sharded(parameter) and parameter.is_cuda for parameter in self._live.values()):
                torch.cuda.current_stream().synchronize()  # the next gathering reads on a stream of its own

    @staticmethod
    @torch.no_grad()
    def _exchange(parameter: nn.Parameter, value: Tensor) -> Tensor:
        """Gives a parameter other numbers; returns those that it had."""
        if is_sharded(parameter):  # where another tensor is put in its place, it stays what it was
            kept = part(parameter).clone()
            part(parameter).copy_(value)
        else:
            kept = parameter.data
            parameter.data = value.to(parameter.device, parameter.dtype)
        return kept
