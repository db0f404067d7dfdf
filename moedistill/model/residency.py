"""Where the tensors of experts lie: what is used on the device, what is not on the host."""

from collections.abc import Mapping
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
        if name in self._there:
            return
        expert: Expert | None = self._experts[name]
        assert expert is not None
        shared = expert.shared
        for tensor in chain(shared.weights.values(), shared.network.buffers()):
            move(tensor, self.device)
        while expert is not None and expert.shared is shared:
            for tensor in expert.parameters.values():
                move(tensor, self.device)
            expert = expert.parent
        self._there.add(name)
