"""Where the tensors of experts lie: what is used on the device, what is not on the host."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moedistill.runtime.devices import HOST
from moedistill.runtime.quantized import is_quantized

if TYPE_CHECKING:
    from moedistill.model.experts import Expert


def move(tensor: Tensor, device: torch.device) -> None:
    """Puts a tensor's numbers elsewhere; it stays the tensor that it is."""
    if tensor.device == device:
        return
    moved = tensor.detach().to(device)
    if is_quantized(tensor):  # made of several: nothing can take its place but another such
        torch.utils.swap_tensors(tensor, nn.Parameter(moved, requires_grad=False))
    else:
        tensor.data = moved


class Residency:
    """Keeps on the device the experts that were used since everything was parked, and the others on the host.

    Args:
        experts: all of a mixture, whose networks are on the host.
        device: where they compute.
    """

    def __init__(self, experts: "Mapping[str, Expert]", device: torch.device) -> None:
        self._experts, self.device = experts, device
        self._there: set[str] = set()

    def park(self) -> None:
        """Everything to the host."""
        self._there.clear()
        for network in {expert.shared.network: None for expert in self._experts.values()}:
            for tensor in chain(network.parameters(), network.buffers()):
                move(tensor, HOST)

    def bring(self, name: str) -> None:
        """What an expert computes with, to the device: its network, and what it and its parents attached there."""
        if name not in self._there:
            for tensor in self._used_by(name):
                move(tensor, self.device)
            self._there.add(name)

    @contextmanager
    def visiting(self) -> Iterator[None]:
        """What the block brings goes back afterwards, so that what was there keeps the room that it had."""
        before = set(self._there)
        try:
            yield
        finally:
            kept = {id(tensor) for name in before for tensor in self._used_by(name)}
            for name in self._there - before:
                for tensor in self._used_by(name):
                    if id(tensor) not in kept:
                        move(tensor, HOST)
            self._there = before

    def _used_by(self, name: str) -> Iterator[Tensor]:
        expert: Expert | None = self._experts[name]
        assert expert is not None
        shared = expert.shared
        yield from chain(shared.weights.values(), shared.network.buffers())
        while expert is not None and expert.shared is shared:
            yield from expert.parameters.values()
            expert = expert.parent
