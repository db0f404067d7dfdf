"""Experts as changes of a tiny network, made without a run."""

import re

import torch

from moedistill.exporters.source import Pair


class TinyChange:
    """Pairs on the linears of `targets`, and new values for all that lies in the modules of `copied`.

    The network's own tensors are drawn anew, so that none is nought or one.
    """

    def __init__(self, network, targets, copied, *, ranks=(2, 3), name="detail"):
        self.name = name
        generator = torch.Generator().manual_seed(1)
        for tensor in network.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
        self.own = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        self.pairs = {}
        for number, path in enumerate(targets):
            out, into = self.own[f"{path}.weight"].shape
            rank = ranks[number % len(ranks)]
            a, b = (torch.randn(*shape, generator=generator) * 0.3 for shape in ((rank, into), (out, rank)))
            self.pairs[path] = Pair(a, b)
        self.copies = {
            key: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
            for key, tensor in self.own.items()
            if any(key.startswith(f"{path}.") for path in copied)
        }

    @property
    def shapes(self):
        return {key: tuple(tensor.shape) for key, tensor in self.own.items()}

    def original(self, name):
        return self.own[name]

    def merged(self):
        """What the expert's own network holds."""
        changed = {f"{path}.weight": self.own[f"{path}.weight"] + b @ a for path, (a, b) in self.pairs.items()}
        return {**self.own, **changed, **self.copies}


def linears(network, pattern):
    found = [path for path, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    return [path for path in found if re.fullmatch(pattern, path)]
