"""What a LoRA file changes in a network: read by name and shape, whoever wrote it.

Understood are the names that diffusers and peft, ComfyUI, LightX2V and kohya's scripts write: pairs of low-rank factors
with or without their alpha, and whole changes of weights and biases (`.diff`, `.diff_b`, `.diff_m`), of modules under
the makers' names or those here. A tensor that is none of these is refused.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moedistill.exporters.source import Pair
from moedistill.importing.files import Shape, WeightFiles, listed
from moedistill.model.native_names import NativeNames, NativeTensor

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "lora_unet_")

ENDINGS = {
    "down": (".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", "_lora.down.weight", ".lora.down.weight"),
    "up": (".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", "_lora.up.weight", ".lora.up.weight"),
    "alpha": (".alpha",),
    "diff": (".diff",),
    "diff_b": (".diff_b",),
    "up_bias": (".lora_B.bias",),
    "diff_m": (".diff_m",),
}
"""By what a tensor is: how its name may end."""

MODULATION = ".modulation"
"""The parameter of a module that `.diff_m` is a change of."""

OVER, PRETRAINED = "moedistill_over", "pretrained"
"""The key of a header under which exports say what a change is one of, and what most are changes of."""

ADAPTERS = "lora_adapter_metadata"
"""The key of a header under which diffusers has an adapter's ranks and alphas."""


@dataclass
class Changes:
    """What a file changes, by parameter of the network.

    Attributes:
        pairs: low-rank changes of weights, the scale inside `b`.
        wholes: changes of any parameter; those that are zero throughout are left out.
        keys: the file's own names of what changes a parameter.
    """

    pairs: dict[str, Pair] = field(default_factory=dict)
    wholes: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, list[str]] = field(default_factory=dict)

    def added_to(self, name: str, weight: Tensor) -> Tensor:
        """A parameter with its changes, float32."""
        changed = weight.float()
        if name in self.pairs:
            a, b = self.pairs[name]
            changed = changed + b @ a
        return changed + self.wholes[name].float() if name in self.wholes else changed


Found = dict[str, dict[str, str]]
"""By path: the names of its tensors by what they are."""


def read_changes(files: WeightFiles, names: NativeNames | None, shapes: Mapping[str, Shape]) -> Changes:
    """What a LoRA file changes in a network.

    Args:
        names: what the makers call its parameters; None where the names here alone are known.
        shapes: of its parameters, by name here.

    Raises:
        ValueError: with every name of what is of no kind known here, changes nothing that the network has, misses its
            counterpart, or has another shape.
    """
    if (over := files.metadata.get(OVER, PRETRAINED)) != PRETRAINED:
        raise ValueError(
            f"{files.place} says that it is a change of {over!r}, and not of the pretrained weights; start "
            "from the run or export that it was made of (experts.X.init), or export that with --merge"
        )
    by_path, unknown = _by_path(files)
    here = {name: NativeTensor(name, shape, (name,)) for name, shape in shapes.items()}
    native = {tensor.name: tensor for tensor in names.tensors(shapes)} if names is not None else {}
    tables = [_Table(native), _Table(here)]
    # Some names stand for another module in the other table: a file has all of its names in one of them.
    table = max(tables, key=lambda table: sum(table.weight(path) is not None for path in by_path))
    strange = [key for path, kinds in by_path.items() for key in table.strangers(path, kinds)]
    if unknown or strange:
        raise ValueError(
            f"{files.place}: {listed([*unknown, *strange])} changes nothing that the recipe's network has, or is of a "
            "kind that is not known here"
        )
    changes, faults, scales = Changes(), list[str](), _Scales(files)
    for path, kinds in by_path.items():
        try:
            for name, change, keys in _changes_of(path, kinds, files, table, scales):
                into: dict[str, Any] = changes.pairs if isinstance(change, Pair) else changes.wholes
                if name in into:
                    raise ValueError(f"{', '.join(keys)} changes what {', '.join(changes.keys[name])} does")
                changes.keys.setdefault(name, []).extend(keys)
                if isinstance(change, Pair) or change.any():
                    into[name] = change
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError(f"{files.place}: {'; '.join(faults)}; get the file again, or the recipe of its model")
    return changes


def _by_path(files: WeightFiles) -> tuple[Found, list[str]]:
    """Kinds and keys by path, which is as the file has it, less its prefix; and keys of no known kind."""
    found: Found = {}
    unknown = []
    for key in files:
        kinds = ((kind, end) for kind, ends in ENDINGS.items() for end in ends if key.endswith(end))
        kind, end = next(kinds, ("", ""))
        if not kind:
            unknown.append(key)
            continue
        path = key.removesuffix(end)
        path = path.removeprefix(next((prefix for prefix in PREFIXES if path.startswith(prefix)), ""))
        if kind == "diff_m":
            kind, path = "diff", path + MODULATION
        if (other := found.setdefault(path, {}).setdefault(kind, key)) != key:
            raise ValueError(f"{files.place}: {other} and {key} are the same under two names; keep one of them")
    return found, unknown


class _Table:
    """Parameters by the paths that files have: with dots, or with underlines in place of them, as kohya's scripts."""

    def __init__(self, tensors: Mapping[str, NativeTensor]) -> None:
        self._tensors = {name.replace(".", "_"): tensor for name, tensor in tensors.items()} | dict(tensors)

    def weight(self, path: str) -> NativeTensor | None:
        """The weight of a module, or a parameter that is in none."""
        return self._tensors.get(f"{path}.weight") or self._tensors.get(f"{path}_weight") or self._tensors.get(path)

    def bias(self, path: str) -> NativeTensor | None:
        return self._tensors.get(f"{path}.bias") or self._tensors.get(f"{path}_bias")

    def strangers(self, path: str, kinds: Mapping[str, str]) -> list[str]:
        """The keys of a path that change nothing in the table."""
        lost = {"diff_b", "up_bias"} if self.bias(path) is None else set()
        return [key for kind, key in kinds.items() if kind in lost or self.weight(path) is None]


def _changes_of(
    path: str, kinds: Mapping[str, str], files: WeightFiles, table: _Table, scales: "_Scales"
) -> Iterator[tuple[str, Pair | Tensor, list[str]]]:
    """Parameters here, what is added to each, and the keys that say so; ValueError where they do not go together."""
    weight, bias = table.weight(path), table.bias(path)
    assert weight is not None
    if {"down", "up"} <= kinds.keys():
        scale = scales.of(weight.parts[0].removesuffix(".weight"), kinds)
        yield from _pairs_of(weight, files, kinds["down"], kinds["up"], scale)
    elif kinds.keys() & {"down", "up", "alpha", "up_bias"}:
        raise ValueError(f"{', '.join(kinds.values())} lacks its counterpart")
    else:
        scale = 1.0
    for kind, target, factor in (("diff", weight, 1.0), ("diff_b", bias, 1.0), ("up_bias", bias, scale)):
        if kind in kinds and target is not None:
            change = factor * files[kinds[kind]].float()
            if change.shape != target.shape:
                raise ValueError(f"{kinds[kind]} is {list(change.shape)} and must be {list(target.shape)}")
            for name, part in target.split(change).items():
                yield name, part, [kinds[kind]]


def _pairs_of(
    weight: NativeTensor, files: WeightFiles, down: str, up: str, scale: float
) -> Iterator[tuple[str, Pair, list[str]]]:
    a, b = files[down].float(), files[up].float()
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or (len(b), a.shape[1]) != weight.shape:
        raise ValueError(f"{down} {list(a.shape)} and {up} {list(b.shape)} change no {list(weight.shape)}")
    for name, part in weight.split(scale * b).items():
        # Of linears that the makers have as one each may have factors of its own.
        used = part.any(0) if len(weight.parts) > 1 else slice(None)
        yield name, Pair(a[used], part[:, used]), [down, up]


class _Scales:
    """What the product of a pair is multiplied with: alpha / rank, 1 where a file says nothing of an alpha."""

    def __init__(self, files: WeightFiles) -> None:
        """ValueError where the header says what cannot be understood."""
        self._files = files
        self._said: dict[str, Any] = {}
        try:
            said = json.loads(files.metadata.get(ADAPTERS, "{}"))
            self._said = {key.removeprefix("transformer."): value for key, value in said.items()}
            self._default = float(self._said["lora_alpha"]) if "lora_alpha" in self._said else None
            patterns = self._said.get("alpha_pattern") or {}
            # As peft takes them: for the whole end of a module's path.
            self._patterns = [(re.compile(rf"(.*\.)?({key})"), float(value)) for key, value in patterns.items()]
        except (ValueError, TypeError, AttributeError, re.error, RecursionError) as error:
            raise ValueError(f"{files.place}: {ADAPTERS} of its header cannot be understood ({error})") from error
        if self._said.get("use_dora"):
            raise ValueError(f"{files.place}: it is a DoRA, which is not known here; merge it elsewhere")

    def of(self, path: str, kinds: Mapping[str, str]) -> float:
        """Of a module; a header has its path here, whatever the file's own names are."""
        rank = math.prod(self._files.shapes[kinds["down"]][:1])
        if not rank:
            raise ValueError(f"{kinds['down']} has rank 0")
        if "alpha" in kinds:
            alpha = self._files[kinds["alpha"]]
            if alpha.numel() != 1:
                raise ValueError(f"{kinds['alpha']} is {list(alpha.shape)} and must be one number")
            return alpha.item() / rank
        if self._default is None:
            return 1.0
        said = next((value for pattern, value in self._patterns if pattern.fullmatch(path)), self._default)
        return said / (math.sqrt(rank) if self._said.get("use_rslora") else rank)
