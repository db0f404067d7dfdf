"""Conditioning is an opaque mapping of batched tensors; these are the only things the core does with it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Conditioning = Mapping[str, Tensor]
"""Tensors by name, batch first. What they mean is the backbone's affair."""


def stack(samples: Sequence[Conditioning]) -> dict[str, Tensor]:
    """One batched mapping of unbatched ones.

    Raises:
        ValueError: they differ in names or shapes.
    """
    shapes = [{name: list(value.shape) for name, value in sample.items()} for sample in samples]
    different = next((other for other in shapes if other != shapes[0]), None)
    if different is not None:
        raise ValueError(
            f"the conditioning of samples differs, {shapes[0]} and {different}, so they make no batch: give all "
            "prompts the same padded length"
        )
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def concat(first: Conditioning, second: Conditioning) -> dict[str, Tensor]:
    """Both batches, one after the other."""
    return {name: torch.cat([first[name], second[name]]) for name in first}


def where(mask: Tensor, yes: Conditioning, no: Conditioning) -> dict[str, Tensor]:
    """`yes` where `mask` `[B]` is true, `no` elsewhere."""
    return {name: torch.where(mask.view(-1, *[1] * (yes[name].ndim - 1)), yes[name], no[name]) for name in yes}


def select(cond: Conditioning, rows: slice | Tensor) -> dict[str, Tensor]:
    """Some of the batch's rows: a range, or where a bool `[B]` is true."""
    return {name: value[rows] for name, value in cond.items()}


def to(cond: Conditioning, device: torch.device | str) -> dict[str, Tensor]:
    """The same on `device`."""
    return {name: value.to(device) for name, value in cond.items()}
