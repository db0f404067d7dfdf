"""Tensors on their way into a file: what their dtype costs, and a large file written one tensor at a time."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moedistill.runtime.writing import disk_errors, new_file

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""What safetensors calls a dtype."""


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
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # so that the tensors' bytes are aligned
    rounding = Rounding()
    with new_file(file) as new, disk_errors(file, end), new.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            assert tensor.shape == tuple(shape), f"{name} is {list(tensor.shape)}, not {list(shape)}"
            stored = rounding.to(dtype, tensor.detach().cpu())
            out.write(stored.flatten().view(torch.uint8).numpy().data)
    return rounding.error
