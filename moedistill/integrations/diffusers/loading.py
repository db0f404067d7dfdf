"""Reading what diffusers saved, and keeping the precision that its classes ask for."""

import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file; ValueError where it cannot be read."""
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    return content


def transformers_of(pipeline_class: Any) -> list[str]:
    """The names by which a pipeline's class calls its networks."""
    return [name for name in inspect.signature(pipeline_class).parameters if name.startswith("transformer")]


def from_pretrained(cls: Any, folder: Path, what: str, **arguments: Any) -> Any:
    """What a class of diffusers loads from a folder: never pickles, never from the network.

    Raises:
        ValueError: it cannot; begins with `what`.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)  # older releases know no other
        try:
            return cls.from_pretrained(folder, **arguments, use_safetensors=True, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{what}: {str(error).strip().splitlines()[0]}") from error


def _islands(network: nn.Module) -> list[str]:
    return list(getattr(network, "_keep_in_fp32_modules", None) or ())


def cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network in `dtype`, but for what its class keeps in float32, as `from_pretrained` does it."""
    for name, parameter in network.named_parameters():
        if not set(name.split(".")) & set(_islands(network)):
            parameter.data = parameter.data.to(dtype)
    return network


class _Island(nn.Module):
    """Runs a module outside of autocast: what a model's class keeps in float32 is computed in float32.

    A mixin for the module's own class: it is copied with the module, moves no weight to another name, and can be
    compiled, which entering autocast in one hook and leaving it in another cannot.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        device = next((arg.device.type for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return super().forward(*args, **kwargs)


def keep_float32_islands(network: nn.Module) -> list[Callable[[], None]]:
    """Makes islands of what the network's class keeps in float32; returns what makes each again what it was."""
    names = set(_islands(network))
    modules = [module for path, module in network.named_modules() if path.rpartition(".")[2] in names]
    return [_make_island(module) for module in modules if not isinstance(module, _Island)]


def _make_island(module: nn.Module) -> Callable[[], None]:
    cls = type(module)
    # Under its old name: classes are known by it, such as those of blocks to be compiled or sharded.
    members = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    module.__class__ = type(cls.__name__, (_Island, cls), members)
    return lambda: setattr(module, "__class__", cls)
