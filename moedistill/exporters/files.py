"""Tensors on their way into a file: what their dtype costs, and a large file written one tensor at a time."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moedistill.runtime.weight_files import write_tensors
from moedistill.runtime.writing import disk_errors, new_file


class Rounding:
    """What is lost where tensors are stored in another dtype."""

    def __init__(self) -> None:
        self._lost = self._all = 0.0

    def to(self, dtype: torch.dtype, tensor: Tensor) -> Tensor:
        """The tensor as it is stored."""
        stored = tensor.to(dtype)
        if tensor.dtype != dtype:
            self._lost += (stored.float() - tensor).norm().item() ** 2
        self._all += tensor.float().norm().item() ** 2
        return stored.contiguous()

    @property
    def error(self) -> float:
        """The root mean square of what was lost over that of the values."""
        return math.sqrt(self._lost / self._all) if self._all else 0.0


def write_one_file(
    file: Path,
    shapes: Mapping[str, Sequence[int]],
    tensors: Iterable[Tensor],
    *,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> float:
    """Writes a safetensors file of any size, one tensor in memory at a time: for tools that take no parts.

    Args:
        shapes: of all tensors by name, in the order of `tensors`.

    Returns:
        What the dtype costs; see `Rounding`.

    Raises:
        WriteError: there is no room for it, or the disk refuses otherwise.
    """
    layout = {name: torch.empty(tuple(shape), dtype=dtype, device="meta") for name, shape in shapes.items()}
    rounding, size = Rounding(), sum(tensor.nbytes for tensor in layout.values())
    with new_file(file) as new, disk_errors(file, size):
        rounded = (rounding.to(dtype, tensor.detach().cpu()) for tensor in tensors)
        write_tensors(new, layout, rounded, {"format": "pt", **metadata})
    return rounding.error
