"""Weights under their makers' names, as a network of a library's class: tensor by tensor, and strict both ways.

What is to be made is known from names and shapes alone; so a file that does not fit is refused before a number is read.
Then one tensor after the other is read, made and written; in memory is a part of the result, `SHARD` bytes at most.
(Text encoders are transformers' own files, and loaded whole.)
"""

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moedistill.errors import WriteError, shorten
from moedistill.integrations.diffusers.loading import UNREAD, load_model, load_processor
from moedistill.runtime.lock import in_turn
from moedistill.runtime.reading import check_file, reason
from moedistill.runtime.weight_files import write_shards
from moedistill.runtime.writing import disk_errors

CONVERTED = "diffusers"
"""The folder in a model's published one that is made of it."""
MADE_OF = "made_of.json"
"""A file in a converted folder: size and time of each published file, which is another one if they differ."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Of published weights, by safetensors' names."""


@dataclass(frozen=True)
class WeightPiece:
    """Some tensors of the published weights, and what is made of them.

    Args:
        sources, targets: their names there and here.
        make: the targets' tensors of the sources', each in the order of the names; it sees tensors on the meta device
            too.
    """

    sources: Sequence[str]
    targets: Sequence[str]
    make: Callable[..., Sequence[Tensor]]

    @classmethod
    def renamed(cls, source: str, target: str) -> "WeightPiece":
        """One tensor under another name."""
        return cls((source,), (target,), lambda tensor: (tensor,))


class PublishedWeights:
    """The tensors of a safetensors file, floating-point ones, read one at a time."""

    def __init__(self, file: Path) -> None:
        """ValueError where it cannot be read, or holds other numbers."""
        try:
            check_file(file)
            self._tensors = safe_open(file, "pt").__enter__()
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read {file}: {shorten(reason(error), 200)}") from error
        self.file, self.names = file, set(self._tensors.keys())
        dtypes = {name: self._tensors.get_slice(name).get_dtype() for name in sorted(self.names)}
        if others := [f"{name} {dtype}" for name, dtype in dtypes.items() if dtype not in DTYPES]:
            raise ValueError(f"{file} is stored in other numbers ({_some(others)}); get it in bfloat16 or float32")

    def __getitem__(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read {name} of {self.file}: {shorten(reason(error), 200)}") from error
        return tensor

    def shape(self, name: str, ndim: int) -> list[int]:
        """Of a tensor of so many dimensions, none of them empty; ValueError where there is none of that name."""
        shape: list[int] = self._tensors.get_slice(name).get_shape() if name in self.names else []
        if len(shape) != ndim or not all(shape):
            what = f"{name} {shape}" if name in self.names else f"no {name}"
            raise ValueError(f"{self.file} has {what}; it is not the file that it must be, or of another model")
        return shape

    def on_meta(self, name: str) -> Tensor:
        """A tensor without its numbers."""
        dtype = DTYPES[self._tensors.get_slice(name).get_dtype()]
        return torch.empty(self._tensors.get_slice(name).get_shape(), dtype=dtype, device="meta")


def convert_network(
    weights: PublishedWeights, pieces: Iterable[WeightPiece], cls: Any, config: Mapping[str, Any], folder: Path
) -> None:
    """Writes to the new `folder` a network of diffusers' class `cls`, made of `weights` piece by piece.

    Raises:
        ValueError: a tensor is left over, missing or of another shape.
        WriteError: the disk is full, or refuses otherwise.
    """
    pieces = list(pieces)
    with torch.device("meta"):
        network: nn.Module = cls(**config)
    made = check_pieces(pieces, {name: weights.on_meta(name) for name in sorted(weights.names)}, network, weights.file)
    with disk_errors(folder, sum(tensor.nbytes for tensor in made.values())):
        folder.mkdir(parents=True)
        network.save_config(folder)  # type: ignore[operator]
        write_shards(folder, made, _Made(weights, pieces))


def check_pieces(
    pieces: Iterable[WeightPiece], tensors: Mapping[str, Tensor], network: nn.Module, what: object
) -> dict[str, Tensor]:
    """What `pieces` make of `tensors` on the meta device, by name; ValueError unless that is what `network` has."""
    made: dict[str, Tensor] = {}
    used: list[str] = []
    missing: list[str] = []
    twice: list[str] = []
    for piece in pieces:
        missing += [name for name in piece.sources if name not in tensors]
        used += piece.sources
        if all(name in tensors for name in piece.sources):
            try:
                pairs = list(zip(piece.targets, piece.make(*(tensors[name] for name in piece.sources)), strict=True))
            except Exception as error:  # a function of the plugin's, which did not expect these shapes
                shapes = ", ".join(f"{name} {list(tensors[name].shape)}" for name in piece.sources)
                raise ValueError(f"{what}: {shapes} is not what {type(network).__name__} is made of") from error
            twice += [name for name, _ in pairs if name in made]
            made |= pairs
    own = network.state_dict()
    faults = {
        "is missing": missing,
        "would be made twice": twice,
        "is left over": sorted(set(tensors) - set(used)),
        f"would be missing in {type(network).__name__}": [] if missing else sorted(set(own) - set(made)),
        f"is nothing of {type(network).__name__}'s": sorted(set(made) - set(own)),
        "has another shape": [name for name in own if name in made and made[name].shape != own[name].shape],
    }
    if found := [f"{_some(names)} {fault}" for fault, names in faults.items() if names]:
        raise ValueError(f"{what}: {'; '.join(found)}; get the file again, or another model's backbone")
    return made


class _Made:
    """What pieces make of weights, by name. Of a piece with several tensors all are made at once, and the last kept."""

    def __init__(self, weights: PublishedWeights, pieces: Iterable[WeightPiece]) -> None:
        self._weights = weights
        self._piece_of = {target: piece for piece in pieces for target in piece.targets}
        self._last: tuple[WeightPiece, Mapping[str, Tensor]] | None = None

    def __getitem__(self, name: str) -> Tensor:
        piece = self._piece_of[name]
        if self._last is None or self._last[0] is not piece:
            self._last = None
            made = piece.make(*(self._weights[source] for source in piece.sources))
            self._last = piece, dict(zip(piece.targets, made, strict=True))
        return self._last[1][name]


def converted_once(source: Path, kind: str, convert: Callable[[Path, Path], None]) -> Path:
    """The folder `CONVERTED` in `source`, made at the first use by `convert(source, folder)`; others wait meanwhile.

    It is made anew when one of the published files is another one, or was not there.
    """
    dest = source / CONVERTED
    if is_made_of(dest, source):
        return dest
    elsewhere = f"moedistill convert {kind} {source} FOLDER, and set backbone.pretrained to that folder"
    try:
        with in_turn(source / ".converting"):
            if not is_made_of(dest, source):
                anew = "its files have changed" if dest.is_dir() else "once"
                click.echo(f"{source} is as published: converting it ({anew}), to {dest}", err=True)
                shutil.rmtree(dest, ignore_errors=True)
                convert(source, dest)
    except WriteError as error:
        raise WriteError(f"{error}. To convert it elsewhere: {elsewhere}") from error
    return dest


def note_what_it_is_made_of(folder: Path, source: Path) -> None:
    """Writes `MADE_OF` to a converted folder."""
    (folder / MADE_OF).write_text(json.dumps(_files(source), indent=1), encoding="utf-8")


def is_made_of(folder: Path, source: Path) -> bool:
    """Whether a converted folder is there, and of the files that `source` has now."""
    try:
        return bool(json.loads((folder / MADE_OF).read_text(encoding="utf-8")) == _files(source))
    except (OSError, ValueError):
        return False


def _files(source: Path) -> dict[str, list[int]]:
    """Size and time of every published file, by its path; not of what is hidden, or was made of them."""
    found = {}
    for path in sorted(source.rglob("*")):
        place = path.relative_to(source)
        if place.parts[0] != CONVERTED and not any(part.startswith(".") for part in place.parts) and path.is_file():
            found[place.as_posix()] = [path.stat().st_size, path.stat().st_mtime_ns]
    return found


def convert_text_model(model_class: Any, tokenizer_class: Any, source: Path, model: Path, tokenizer: Path) -> None:
    """Writes a text encoder of transformers and its tokenizer, which lie in one folder, to two new ones.

    The encoder keeps the dtype that it is stored in; what a whole model has beside it is left away.

    Raises:
        ValueError: they cannot be loaded.
    """
    what = f"cannot load the text encoder in {source}"
    loaded = load_model(model_class, source, what, unread=UNREAD, torch_dtype="auto", use_safetensors=None)
    loaded.save_pretrained(model)
    load_processor(tokenizer_class, source, what).save_pretrained(tokenizer)


def _some(names: Collection[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
