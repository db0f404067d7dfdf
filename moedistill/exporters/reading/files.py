"""What a safetensors file holds, a tensor at a time."""

from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moedistill.errors import shorten


class TensorFile:
    """Names, header and tensors of a file.

    It is opened anew for each tensor: the pages of one that stays open count as this process's memory.

    Raises:
        ValueError: it is no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, "pt") as opened:
                self.names: list[str] = list(opened.keys())
                self.header: Mapping[str, str] = opened.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read {path}: {shorten(str(error), 200)}") from error

    def __contains__(self, name: str) -> bool:
        return name in self._known

    @cached_property
    def _known(self) -> Collection[str]:
        return frozenset(self.names)

    def tensor(self, name: str) -> Tensor:
        """One tensor as it is stored."""
        with safe_open(self.path, "pt") as opened:
            found: Tensor = opened.get_tensor(name)
        return found

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, none of which is read."""
        with safe_open(self.path, "pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in self.names}

    @cached_property
    def coarsest(self) -> torch.dtype:
        """The dtype of least precision among the tensors that are no single numbers."""
        with safe_open(self.path, "pt") as opened:
            found = {opened.get_slice(name).get_dtype() for name in self.names if self.shapes[name]}
        return next((dtype for code, dtype in _COARSEST_FIRST if code in found), torch.float32)


_COARSEST_FIRST = (("BF16", torch.bfloat16), ("F16", torch.float16))
