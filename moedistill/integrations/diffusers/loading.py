"""Reading what diffusers saved, and keeping the precision that its classes ask for."""

import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moedistill.errors import shorten
from moedistill.integrations.diffusers.bars import bars_as_switched
from moedistill.integrations.diffusers.misfit import misfit
from moedistill.runtime.reading import read_text, reason
from moedistill.runtime.signals import Interruption

UNREAD = ("lm_head", "decoder", "vision_model", "visual_projection", "text_projection", "logit_scale")
"""What whole models of transformers have beside their text encoders, and lies behind what a prompt is encoded to."""


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError where there is none."""
    try:
        content = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {file}: {shorten(reason(error), 200)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold an object, not {shorten(repr(content), 60)}; get the file again")
    return content


def with_defaults(cls: Any, file: Path) -> dict[str, Any]:
    """A config file of diffusers, and the class's own default where it leaves a value out; ValueError for another's."""
    found = read_json(file)
    if (own := found.get("_class_name", cls.__name__)) != cls.__name__:
        raise ValueError(f"{file} is of class {shorten(str(own), 60)}, not {cls.__name__}; it is another model's")
    return {**defaults(cls), **found}


def defaults(cls: Any) -> dict[str, Any]:
    """The arguments of a class and their defaults."""
    return {name: given.default for name, given in inspect.signature(cls).parameters.items()}


def read_tensors(folder: Path, names: Sequence[str]) -> list[Tensor]:
    """Tensors out of a folder's safetensors files, by name, without the rest; ValueError where one is not there."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                found |= {name: tensors.get_tensor(name) for name in set(names) & set(tensors.keys())}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read {file}: {shorten(str(error), 200)}") from error
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"no safetensors file in {folder} has {' or '.join(missing)}; get the whole model's folder")
    return [found[name] for name in names]


def transformers_of(pipeline_class: Any) -> list[str]:
    """The names by which a pipeline's class calls its networks."""
    return [name for name in inspect.signature(pipeline_class).parameters if name.startswith("transformer")]


def from_pretrained(cls: Any, folder: Path, what: str, **arguments: Any) -> Any:
    """What a class of diffusers or transformers loads from a folder: never from the network.

    Safetensors alone, unless the arguments say otherwise; of what is pickled both libraries read tensors, and no code.

    Raises:
        ValueError: it cannot; begins with `what`.
    """
    return _load(cls, folder, what, {"use_safetensors": True, "local_files_only": True, **arguments})


def load_processor(cls: Any, folder: Path, what: str) -> Any:
    """A tokenizer or an image processor of transformers, from a folder.

    Raises:
        ValueError: it cannot be loaded; begins with `what`.
    """
    return _load(cls, folder, what, {})  # it would keep any arguments, and save them


def _load(cls: Any, folder: Path, what: str, arguments: Mapping[str, Any]) -> Any:
    with warnings.catch_warnings(), bars_as_switched():
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)  # older releases know no other
        try:
            return cls.from_pretrained(folder, **arguments)
        except Exception as error:  # a damaged file or config could raise anything
            Interruption.check()
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            reason = first.split(" If you want to instead overwrite")[0]  # advice that would hide the fault
            raise ValueError(f"{what}: {shorten(reason, 400)}") from error


def load_model(
    cls: Any, folder: Path, what: str, *, ignored: Iterable[str] = (), unread: Iterable[str] = (), **arguments: Any
) -> Any:
    """A network that a class of diffusers or transformers loads from a folder, every tensor of it and no other.

    The libraries use weights that do not fit, with a warning: what is missing is then random or no number at all, and
    what is left over has no effect.

    Args:
        what: what the message of an error begins with.
        ignored: regular expressions of the names that may be missing or left over.
        unread: modules that may be left over, all their tensors, where the class has none of that name.

    Raises:
        ValueError: it cannot be loaded, it is quantised, or its tensors are not those of the class.
    """
    _check_not_quantised(folder, what)
    model, found = from_pretrained(cls, folder, what, **arguments, output_loading_info=True)
    missing, left_over = set(found["missing_keys"]), set(found["unexpected_keys"])
    own = set(model.state_dict())
    if (stored := _in_shards(folder, arguments.get("variant"))) is not None:
        missing |= own - stored
        left_over |= stored - own
    modules = set(unread) - {name.partition(".")[0] for name in own}
    left_over = {name for name in left_over if name.partition(".")[0] not in modules}
    tensors = chain(model.named_parameters(), model.named_buffers())
    missing = _without(missing, ignored) | {name for name, tensor in tensors if tensor.is_meta}
    left_over = _without(left_over, [*ignored, *(getattr(cls, "_keys_to_ignore_on_load_unexpected", None) or ())])
    if missing or left_over:
        raise ValueError(f"{what}: {misfit(cls, folder, sorted(missing), sorted(left_over))}")
    if whole := sorted(name for name in _whole_numbers(folder) & own if model.state_dict()[name].is_floating_point()):
        raise ValueError(f"{what}: {shorten(', '.join(whole), 200)} is stored in whole numbers; get the weights again")
    return model


def _check_not_quantised(folder: Path, what: str) -> None:
    file = folder / "config.json"
    if quantised := read_json(file).get("quantization_config") if file.is_file() else None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        by = f", by {method}" if method else ""
        raise ValueError(f"{what}: it is quantised{by} ({file}); get the weights in bfloat16 or float32")


def stored_tensors(
    network: nn.Module, folder: Path, what: str, *, ignored: Iterable[str] = (), variant: str | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a network of diffusers' in its folder, by name, mapped and not read: every one of it and no other.

    Args:
        network: without weights; the names and shapes are its own.

    Raises:
        ValueError: as `load_model`; begins with `what`.
    """
    _check_not_quantised(folder, what)
    own, ignored = network.state_dict(), list(ignored)
    if (index := _index(folder, variant)) is not None:
        files = sorted({folder / shard for shard in read_json(index)["weight_map"].values()})
    else:
        files = [folder / f"diffusion_pytorch_model{f'.{variant}' if variant is not None else ''}.safetensors"]
    if absent := [file for file in files if not file.is_file()]:
        raise ValueError(f"{what}: there is no {absent[0]}; get the whole model's folder")
    place: dict[str, Path] = {}
    dtypes: dict[str, str] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as stored:
                place |= dict.fromkeys(stored.keys(), file)
                dtypes |= {name: stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{what}: cannot read {file}: {shorten(str(error), 200)}") from error
    missing, left_over = _without(set(own) - set(place), ignored), _without(set(place) - set(own), ignored)
    if missing or left_over:
        raise ValueError(f"{what}: {misfit(type(network), folder, sorted(missing), sorted(left_over))}")
    if whole := sorted(name for name in own if "F" not in dtypes.get(name, "F") and own[name].is_floating_point()):
        raise ValueError(f"{what}: {shorten(', '.join(whole), 200)} is stored in whole numbers; get the weights again")
    for file in files:
        with safe_open(file, "pt") as stored:
            for name in sorted(set(stored.keys()) & set(own)):
                tensor = stored.get_tensor(name)
                if tensor.shape != own[name].shape:
                    shapes = f"{list(tensor.shape)} in {file.name}, and {list(own[name].shape)} in the network"
                    raise ValueError(f"{what}: {name} is {shapes}; its config.json is another model's")
                yield name, tensor


def check_kinds(cls: Any, config: Mapping[str, Any], file: Path) -> None:
    """ValueError where a config has an argument of another kind than the class's default: a list for a number."""
    for name, parameter in inspect.signature(cls).parameters.items():
        default, value = parameter.default, config.get(name)
        number = isinstance(default, int | float) and isinstance(value, list | dict | str)
        if number or (isinstance(default, str) and value is not None and not isinstance(value, str)):
            raise ValueError(f"{file}: {name} is {shorten(repr(value), 60)}, where {cls.__name__} has {default!r}")


def _whole_numbers(folder: Path) -> set[str]:
    """The names of the tensors in a folder that are stored in integers or booleans."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names |= {name for name in tensors.keys() if "F" not in tensors.get_slice(name).get_dtype()}  # noqa: SIM118
    return names


def _without(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    allowed = [re.compile(pattern) for pattern in patterns]
    return {name for name in names if not any(pattern.search(name) for pattern in allowed)}


def _index(folder: Path, variant: str | None) -> Path | None:
    """The index of a network of diffusers' that is saved in parts; None where it is not."""
    first = "diffusion_pytorch_model.safetensors"
    known = [f"{first}.index.json"]
    if variant is not None:
        known = [f"{first}.index.{variant}.json", f"{first}.{variant}.index.json"]  # the second in older folders
    return next((folder / name for name in known if (folder / name).is_file()), None)


def _in_shards(folder: Path, variant: str | None) -> set[str] | None:
    """The names of the tensors in a network of diffusers' that is saved in parts; None where it is not.

    Of such a folder diffusers reports what the index says, which need not be what its files have.
    """
    index = _index(folder, variant)
    if index is None:
        return None
    names: set[str] = set()
    for shard in set(read_json(index)["weight_map"].values()):
        with safe_open(folder / shard, "pt") as tensors:
            names |= set(tensors.keys())
    return names


def variant_in(folder: Path, variant: str | None) -> str | None:
    """`variant`, if the folder has files of it: a model's other components may have none."""
    return variant if variant is not None and any(folder.glob(f"*.{variant}.*")) else None


def load_text_encoders(
    folder: Path,
    names: Iterable[str],
    what: str,
    *,
    ignored: Mapping[str, Sequence[str]],
    variant: str | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Those components of a saved pipeline, of the ones named, that are networks of transformers."""
    import transformers

    file, loaded = folder / "model_index.json", {}
    index = read_json(file) if file.is_file() else {}  # without one the pipeline's class says what is wrong
    for name in names:
        entry = index.get(name, [None, None])
        if not isinstance(entry, list) or len(entry) != 2:
            raise ValueError(f"{file}: {name} must be [library, class], not {shorten(repr(entry), 60)}; get it again")
        library, class_name = entry
        cls: Any = getattr(transformers, str(class_name), None) if library == "transformers" else None
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            loaded[name] = load_text_model(
                cls, folder / name, f"{what} ({name})", ignored=ignored.get(name, ()), variant=variant, dtype=dtype
            )
    return loaded


def load_text_model(
    cls: Any, folder: Path, what: str, *, ignored: Iterable[str], variant: str | None, dtype: torch.dtype
) -> Any:
    """A text encoder of transformers; see `load_model`."""
    variant = variant_in(folder, variant)
    return load_model(cls, folder, what, ignored=ignored, unread=UNREAD, torch_dtype=dtype, variant=variant)


def islands(network: nn.Module) -> list[str]:
    """Names of the modules that a network's class keeps in float32."""
    return list(getattr(network, "_keep_in_fp32_modules", None) or ())


def cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network in `dtype`, but for what its class keeps in float32, as `from_pretrained` does it."""
    for name, parameter in network.named_parameters():
        if not set(name.split(".")) & set(islands(network)):
            parameter.data = parameter.data.to(dtype)
    return network


class _Island(nn.Module):
    """Runs a module outside of autocast: what a model's class keeps in float32 is computed in float32.

    A mixin for the module's own class: it is copied with the module, moves no weight to another name, and can be
    compiled, which entering autocast in one hook and leaving it in another cannot.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By the module's own class: that of the island has its name, and would not be found by it."""
        how: Any = super().__reduce_ex__(protocol)
        return _new_island, type(self).__bases__[1:], *how[2:]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        device = next((arg.device.type for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return super().forward(*args, **kwargs)


def keep_float32_islands(network: nn.Module) -> list[Callable[[], None]]:
    """Makes islands of what the network's class keeps in float32; returns what makes each again what it was."""
    names = set(islands(network))
    modules = [module for path, module in network.named_modules() if path.rpartition(".")[2] in names]
    return [_make_island(module) for module in modules if not isinstance(module, _Island)]


def _make_island(module: nn.Module) -> Callable[[], None]:
    cls: Any = type(module)
    module.__class__ = _island(cls)
    return lambda: setattr(module, "__class__", cls)


@cache
def _island(cls: Any) -> Any:
    """One class for all islands of a class: what is compiled for a block is compiled for the classes in it."""
    # Under its old name: classes are known by it, such as those of blocks to be compiled or sharded.
    return type(cls.__name__, (_Island, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def _new_island(cls: Any) -> Any:
    island = _island(cls)
    return island.__new__(island)
