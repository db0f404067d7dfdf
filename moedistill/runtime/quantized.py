"""Tensors in 8 bits (torchao's): known as such, what they are made of, and as floating point again.

torchao is not imported here: who has such a tensor has imported it.
"""

import sys

from torch import Tensor, nn


def is_quantized(tensor: Tensor) -> bool:
    """Whether a tensor only looks as if it were floating point, and holds whole numbers and scales."""
    torchao = sys.modules.get("torchao.utils")
    return torchao is not None and isinstance(tensor, torchao.TorchAOBaseTensor)


def quantized_in(module: nn.Module) -> list[str]:
    """The names of a module's parameters that are quantised."""
    return [name for name, parameter in module.named_parameters() if is_quantized(parameter)]


def plain(tensor: Tensor) -> Tensor:
    """A tensor as floating point, in its dtype; one that is not quantised is itself."""
    return tensor.dequantize() if is_quantized(tensor) else tensor


def held(tensor: Tensor) -> list[Tensor]:
    """The tensors that have memory: of a quantised one its whole numbers and scales, else itself."""
    if not is_quantized(tensor):
        return [tensor]
    inner: list[str] = tensor.__tensor_flatten__()[0]  # type: ignore[attr-defined]
    return [each for name in inner for each in held(getattr(tensor, name))]
