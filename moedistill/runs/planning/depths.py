"""A network with fewer of its equal blocks, and what follows from a few for all: everything is linear in them."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from moedistill.model.backbone import Backbone


def stacks(network: nn.Module) -> dict[str, int]:
    """Dotted paths of the outermost lists of blocks that are alike, and how many those are."""
    found: dict[str, int] = {}
    for path, module in network.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and len({_form(block) for block in module}) == 1:
            found[path] = len(module)
    return found


def _form(block: nn.Module) -> tuple[Any, ...]:
    return type(block), tuple((name, each.shape, each.dtype) for name, each in block.named_parameters())


def blocks_of(network: nn.Module, stride: int) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of all stacks, with where they are: the first, each of the last `stride` ones, and those between."""
    for path, count in stacks(network).items():
        stack: Any = network.get_submodule(path)
        for number, block in enumerate(stack):
            left = count - number
            place = f"last but {left - 1}" if left <= stride else "between" if number else "first"
            yield f"{path} {place}", block


def depths_to_try(backbone: Backbone, stride: int) -> list[dict[str, int]]:
    """Numbers of blocks by stack: a few of each, and then for each stack some more of it alone.

    A stack whose blocks are tapped, every `stride` one, is cut by whole strides. One that would not get much shorter is
    left whole, and so are all of one of several networks that differ.
    """
    first, *others = [stacks(network) for network in backbone.networks.values()]
    if any(other != first for other in others):
        return [{}]
    base, steps = {}, {}
    for path, count in first.items():
        step = stride if any(block.startswith(f"{path}.") for block in backbone.blocks) else 1
        few = 2 * step + count % step
        if count > few + step:
            base[path], steps[path] = few, step
    return [base, *({**base, path: base[path] + step} for path, step in steps.items())]


def at_depth(backbone: Backbone, depths: Mapping[str, int]) -> Backbone:
    """A copy of a backbone with so many blocks of each stack; its parameters should be on meta."""
    with _cut(backbone, depths):
        short = copy.deepcopy(backbone)
    if depths:
        there = {path for path, _ in short.network.named_modules()}
        short.blocks = [block for block in backbone.blocks if block in there]
    return short


@contextmanager
def _cut(backbone: Backbone, depths: Mapping[str, int]) -> Iterator[None]:
    cut: list[tuple[nn.Module, str, nn.Module]] = []
    for network in backbone.networks.values():
        for path, count in depths.items():
            parent, _, name = path.rpartition(".")
            holder, stack = network.get_submodule(parent), network.get_submodule(path)
            cut.append((holder, name, stack))
            setattr(holder, name, nn.ModuleList(list(stack)[:count]))  # type: ignore[call-overload]
    try:
        yield
    finally:
        for holder, name, stack in cut:
            setattr(holder, name, stack)


def extended(
    values: Sequence[Sequence[float]], tried: Sequence[Mapping[str, int]], full: Mapping[str, int]
) -> tuple[float, ...]:
    """What is linear in the numbers of blocks, at `full` ones, of what it is at those that were `tried`."""
    base, *more = values
    result = list(base)
    for value, depths in zip(more, tried[1:], strict=True):
        [path] = [path for path in depths if depths[path] != tried[0][path]]
        times = (full[path] - tried[0][path]) / (depths[path] - tried[0][path])
        result = [sofar + times * (one - least) for sofar, one, least in zip(result, value, base, strict=True)]
    return tuple(result)
