"""Reading what diffusers saved, and keeping the precision that its classes ask for."""

import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moedistill.runtime.reading import read_text, reason


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file; ValueError where it cannot be read."""
    try:
        content: dict[str, Any] = json.loads(read_text(file))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {reason(error)}") from error
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


class _Island:
    """Runs a module outside of autocast: what a model's class keeps in float32 is computed in float32."""

    def __init__(self) -> None:
        self._open: list[torch.autocast] = []

    def enter(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        device = next((arg.device.type for arg in args if isinstance(arg, Tensor)), "cpu")
        context = torch.autocast(device, enabled=False)
        context.__enter__()
        self._open.append(context)

    def leave(self, _module: nn.Module, _args: object, _output: object) -> None:
        self._open.pop().__exit__(None, None, None)


def keep_float32_islands(network: nn.Module) -> list[RemovableHandle]:
    """Hooks, which are copied with the network."""
    names, handles = set(_islands(network)), []
    for path, module in network.named_modules():
        if path.rpartition(".")[2] in names:
            island = _Island()
            handles.append(module.register_forward_pre_hook(island.enter))
            handles.append(module.register_forward_hook(island.leave, always_call=True))
    return handles
