"""Frozen linears in 8 bits: whole numbers with a float32 scale for each row, by torchao.

Quantised are the linears of a network's blocks, which hold nearly all of its weights. What is around them (embeddings,
the modules that depend on time, the last projection) is small, and stays as it is.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moedistill.runtime.quantized import is_quantized, plain


def linears_of_blocks(network: nn.Module, copied: Iterable[str], float32: Iterable[str]) -> list[str]:
    """Dotted paths of the linears in a network's lists of blocks.

    Args:
        copied: dotted paths of modules whose linears are left out.
        float32: names of modules, wherever they are, whose linears are left out.
    """
    lists = tuple(f"{name}." for name, module in network.named_children() if isinstance(module, nn.ModuleList))
    outside, names = tuple(f"{path}." for path in copied), frozenset(float32)
    return [
        path
        for path, module in network.named_modules()
        if type(module) is nn.Linear
        and path.startswith(lists)
        and not f"{path}.".startswith(outside)
        and not names & set(path.split("."))
    ]


def check_torchao() -> None:
    """ValueError where torchao is not installed, or too old."""
    try:
        from torchao.quantization import FqnToConfig, Int8Tensor  # noqa: F401
    except ImportError as error:
        raise ValueError(f"quantization: int8 needs torchao: pip install 'moedistill[int8]' ({error})") from error


def loading_config(paths: Collection[str]) -> Any:
    """What makes diffusers quantise the linears at `paths`, each as it is read, and nothing else."""
    from diffusers import TorchAoConfig
    from torchao.quantization import FqnToConfig

    return TorchAoConfig(FqnToConfig(dict.fromkeys(paths, _weights_alone())))


def quantize(network: nn.Module, paths: Collection[str]) -> None:
    """Quantises the linears at `paths`, in place."""
    from torchao.quantization import quantize_

    chosen = frozenset(paths)
    quantize_(network, _weights_alone(), filter_fn=lambda _, path: path in chosen)


def _weights_alone() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(set_inductor_config=False)


def freeze(network: nn.Module, paths: Collection[str]) -> None:
    """Lets the quantised linears at `paths` run as `Int8Linear`.

    Raises:
        ValueError: another set of linears is quantised.
    """
    found = {
        path for path, each in network.named_modules() if isinstance(each, nn.Linear) and is_quantized(each.weight)
    }
    if wrong := sorted(found ^ set(paths)):
        raise ValueError(
            f"quantization: int8: {len(wrong)} linears are not as they should be, the first {wrong[0]}; the installed "
            "diffusers or torchao is too old: pip install -U 'moedistill[int8]'"
        )
    for path in paths:
        network.get_submodule(path).__class__ = Int8Linear


class Int8Linear(nn.Linear):
    """A frozen linear with an 8-bit weight.

    torchao's own would keep a floating-point copy of its weight for the backward pass, and does not know autocast.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if torch.is_grad_enabled() and x.requires_grad:
            through: Tensor = _Frozen.apply(x, self.weight, self.bias)
            return through
        return linear(x, self.weight, self.bias)


class _Frozen(torch.autograd.Function):
    """x·Wᵀ + b with gradients to x alone: W is made of its whole numbers again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return gradient @ plain(ctx.weight).to(gradient.dtype), None, None
