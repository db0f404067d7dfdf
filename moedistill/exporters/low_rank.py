"""What a LoRA cannot carry as it is: a full expert, cut to a rank; and copies of what is no linear."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moedistill.exporters.source import ExpertSource, Pair
from moedistill.runtime.randomness import torch_seed

OVERSAMPLED = 8
"""Directions that the randomised decomposition looks at beyond the rank; it then keeps the largest."""


@dataclass
class LowRank:
    """An expert as low-rank changes and copies, whichever kind it is; see `ExpertSource` for their meaning.

    Attributes:
        errors: of what was cut, by group of layers: the norm of what is left out over that of the whole change.
    """

    name: str
    pairs: Mapping[str, Pair]
    copies: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    original: Callable[[str], Tensor]
    errors: Mapping[str, float] = field(default_factory=dict)


def as_linears(expert: ExpertSource, config: Any) -> LowRank:
    """An adapter whose copies are linears alone, where the model's plugin knows how; see `linear_copies`."""
    copies = config.linear_copies(dict(expert.copies), expert.original)
    return LowRank(expert.name, expert.pairs, copies, expert.shapes, expert.original)


def cut_to_rank(expert: ExpertSource, rank: int, groups: Mapping[str, str], whole: tuple[str, ...]) -> LowRank:
    """A full expert, or an adapter on one, as a change of the pretrained network of at most a rank.

    The linears inside of the modules `whole` are kept whole, and so are all biases. Of the rest only linears' weights
    are kept, each cut to the rank by its largest singular values.

    Args:
        groups: patterns of linears' paths by the names that the errors are told by.
    """
    pairs: dict[str, Pair] = {}
    copies: dict[str, Tensor] = {}
    lost: dict[str, list[float]] = {}
    base = expert.pretrained
    for name, shape in expert.shapes.items():
        path, inside = name.rpartition(".")[0], name.startswith(tuple(f"{path}." for path in whole))
        change = expert.tensor(name).float() - base(name).float()
        size = change.square().sum(dtype=torch.float64).item()
        if not size:
            continue
        is_linear = len(expert.shapes.get(f"{path}.weight", ())) == 2
        left_out = 0.0
        if is_linear and (inside or name.endswith(".bias")):
            copies[name] = expert.tensor(name).float()
        elif len(shape) == 2 and name.endswith(".weight"):
            pairs[path] = _largest(change, rank, torch_seed(0, "svd", name))
            left_out = (change - pairs[path].b @ pairs[path].a).square().sum(dtype=torch.float64).item()
        else:
            left_out = size
        sums = lost.setdefault(_group(path, groups, inside), [0.0, 0.0])
        sums[0] += left_out
        sums[1] += size
    expert.release()
    errors = {group: (part / size) ** 0.5 for group, (part, size) in lost.items()}
    return LowRank(expert.name, pairs, copies, expert.shapes, base, errors)


def _largest(change: Tensor, rank: int, seed: int) -> Pair:
    """The best approximation of a matrix of at most a rank, by a randomised decomposition that is always the same."""
    wanted = min(rank, *change.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(change, q=min(wanted + OVERSAMPLED, *change.shape), niter=4)
    return Pair((v[:, :wanted] * s[:wanted].sqrt()).T.contiguous(), u[:, :wanted] * s[:wanted].sqrt())


def _group(path: str, groups: Mapping[str, str], inside: bool) -> str:
    if inside:
        return "time-dependent"
    return next((group for group, pattern in groups.items() if re.fullmatch(pattern, path)), "other")
