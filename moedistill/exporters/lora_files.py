"""What a LoRA file carries of an adapter: low-rank changes of linears and changes of their biases, and nothing else.

A linear that was trained in full is carried exactly, its change D as the pair of D and an identity. Scales are inside
the pairs and what stacks on another adapter is one with it, so that a file is loaded at strength 1, by tools that read
alphas and by those that do not.

One file of native names serves diffusers, ComfyUI and LightX2V for Wan. What each of them does with other files decides
the rules here: diffusers knows no alpha of the layers that are copied, wants a bias for every layer or for none, and
takes unequal ranks for certain from a header alone.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from moedistill.exporters.files import Rounding
from moedistill.exporters.source import Pair
from moedistill.model.native_names import NativeTensor
from moedistill.runtime.checkpoint import save_tensors
from moedistill.runtime.writing import new_file

DIFFUSERS_HEADER = "lora_adapter_metadata"
"""Where diffusers looks for the ranks and scales of a file."""


class Change(Protocol):
    """An expert as a change of weights; `ExpertSource` is one."""

    name: str
    pairs: Mapping[str, Pair]
    copies: Mapping[str, Tensor]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of all tensors of the network, by name."""

    def original(self, name: str) -> Tensor:
        """The tensor that is changed."""


class LinearChange(NamedTuple):
    """What is added to one linear: `b @ a` to its weight, `bias` to its bias. All float32.

    Attributes:
        path: of the linear.
        parts: of the network's own linears that it stands for; more than one where the makers fuse them.
        a, b: `[r, in]` and `[out, r]`.
        bias: `[out]`; None if the expert changes no bias at all.
        copied: whether some of it was trained in full, and no low rank is meant.
    """

    path: str
    parts: tuple[str, ...]
    a: Tensor
    b: Tensor
    bias: Tensor | None
    copied: bool


@dataclass(frozen=True)
class LoraNames:
    """How a consumer writes the tensors of a linear's change.

    Args:
        prefix: before the linear's path.
        down, up, bias: after it, for `a`, `b` and the bias.
        alpha: after it, for the rank, so that tools which divide by it find a scale of 1; None for none.
        renamed: paths that the consumer has another name for, or their beginnings.
    """

    prefix: str
    down: str
    up: str
    bias: str
    alpha: str | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)

    def of(self, change: LinearChange) -> dict[str, Tensor]:
        """A linear's change by the consumer's names."""
        path = next(
            (new + change.path[len(old) :] for old, new in self.renamed.items() if change.path.startswith(old)),
            change.path,
        )
        tensors = {f"{self.prefix}{path}{self.down}": change.a, f"{self.prefix}{path}{self.up}": change.b}
        if change.bias is not None:
            tensors[f"{self.prefix}{path}{self.bias}"] = change.bias
        if self.alpha is not None and not change.copied:
            tensors[f"{self.prefix}{path}{self.alpha}"] = torch.tensor(float(len(change.a)))
        return tensors


NATIVE = LoraNames("diffusion_model.", ".lora_down.weight", ".lora_up.weight", ".diff_b", alpha=".alpha")
DIFFUSERS = LoraNames("transformer.", ".lora_A.weight", ".lora_B.weight", ".lora_B.bias")


def own_names(shapes: Mapping[str, tuple[int, ...]]) -> list[NativeTensor]:
    """The tensors of a network under its own names."""
    return [NativeTensor(name, shape, (name,)) for name, shape in shapes.items()]


def not_in_a_lora(expert: Change) -> list[str]:
    """The parameters that the expert changes and no LoRA carries: those of norms, convolutions and of no module."""
    shapes = expert.shapes
    return [name for name in expert.copies if len(shapes.get(f"{_path_of(name)}.weight", ())) != 2]


def linear_changes(expert: Change, tensors: Sequence[NativeTensor]) -> Iterator[LinearChange]:
    """What the expert changes, linear by linear under the names of `tensors`, which are all of the network's.

    Raises:
        ValueError: it changes what no LoRA carries.
    """
    if unfit := not_in_a_lora(expert):
        raise ValueError(
            f"expert {expert.name!r} trains {', '.join(unfit)} in full, which no LoRA carries; export it merged"
        )
    paths = {*expert.pairs, *map(_path_of, expert.copies)}
    with_biases = any(name.endswith(".bias") for name in expert.copies)
    for tensor in tensors:
        parts = tuple(map(_path_of, tensor.parts))
        if tensor.name.endswith(".weight") and paths.intersection(parts):
            pairs = [_pair(expert, part) for part in parts]
            yield LinearChange(
                path=_path_of(tensor.name),
                parts=parts,
                a=torch.cat([pair.a for pair in pairs]),
                b=tensor.join(_side_by_side([pair.b for pair in pairs])),
                bias=tensor.join([_bias(expert, part) for part in parts]) if with_biases else None,
                copied=not expert.pairs.keys() >= paths.intersection(parts),
            )


def _path_of(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")


def _pair(expert: Change, path: str) -> Pair:
    """A linear's change; of one that is left as it is, of rank 0."""
    if path in expert.pairs:
        return expert.pairs[path]
    name = f"{path}.weight"
    out, into = expert.shapes[name]
    if name not in expert.copies:
        return Pair(torch.zeros(0, into), torch.zeros(out, 0))
    change = expert.copies[name].float() - expert.original(name).float()
    return Pair(torch.eye(into), change) if into <= out else Pair(change, torch.eye(out))


def _side_by_side(bs: Sequence[Tensor]) -> list[Tensor]:
    """Several `b` `[out, r]`, each with columns of zeros where the others have theirs: `[out, sum of r]`."""
    ranks = [b.shape[1] for b in bs]
    return [functional.pad(b, (sum(ranks[:k]), sum(ranks[k + 1 :]))) for k, b in enumerate(bs)]


def _bias(expert: Change, path: str) -> Tensor:
    """The change of a linear's bias: nought where it has not changed."""
    name = f"{path}.bias"
    if name in expert.copies:
        return expert.copies[name].float() - expert.original(name).float()
    return torch.zeros(expert.shapes[f"{path}.weight"][0])


def write_lora(
    file: Path,
    changes: Iterator[LinearChange],
    names: LoraNames,
    *,
    dtype: torch.dtype,
    metadata: Mapping[str, str] | None = None,
) -> float:
    """Writes a LoRA file; with a header by which diffusers knows ranks and scales, if the linears are its own.

    Returns:
        What the dtype costs: the root mean square of the rounding over that of the values.

    Raises:
        WriteError: there is no room for it, or the disk refuses otherwise.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[tuple[str, ...], int] = {}
    rounding = Rounding()
    biased = False
    for change in changes:
        ranks[change.parts] = len(change.a)
        biased = change.bias is not None
        for name, tensor in names.of(change).items():
            tensors[name] = tensor if tensor.ndim == 0 else rounding.to(dtype, tensor)  # an alpha stays exact
    header = {"format": "pt", **(metadata or {})}
    if all(len(parts) == 1 for parts in ranks):
        header[DIFFUSERS_HEADER] = json.dumps(_peft_header({path: rank for (path,), rank in ranks.items()}, biased))
    with new_file(file) as new:
        save_tensors(new, tensors, metadata=header)
    return rounding.error


def _peft_header(ranks: Mapping[str, int], biased: bool) -> dict[str, object]:
    """The arguments of peft's LoraConfig, as diffusers stores them: every scale, alpha over rank, is 1."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # In a list a path stands for every one that ends in it; and as a pattern, unless it says that it begins there.
    unusual = {f"^{path}": rank for path, rank in ranks.items() if rank != usual}
    config = {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": unusual,
        "alpha_pattern": unusual,
        "target_modules": "|".join(map(re.escape, ranks)),
        "lora_bias": biased,
    }
    return {f"transformer.{name}": value for name, value in config.items()}
