"""Weights under their makers' names, as a network of a library's class: tensor by tensor, and strict both ways.

What is to be made is known from names and shapes alone; so a file that does not fit is refused before a number is read.
Then one tensor after the other is read, made and written; in memory is a part of the result, `SHARD` bytes at most.
"""

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import click
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moedistill.errors import WriteError, shorten
from moedistill.integrations.diffusers.loading import UNREAD, load_model, load_tokenizer
from moedistill.runtime.lock import in_turn
from moedistill.runtime.reading import check_file, reason
from moedistill.runtime.writing import TEMPORARY, disk_errors, refuse_used

CONVERTED = "diffusers"
"""The folder in a model's published one that is made of it."""
SHARD = 4 * 2**30
"""Bytes of a file of weights, at most; a tensor that is larger has one of its own."""


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
    """The tensors of a safetensors file, read one at a time."""

    def __init__(self, file: Path) -> None:
        """ValueError where it cannot be read."""
        try:
            check_file(file)
            self._tensors = safe_open(file, "pt").__enter__()
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read {file}: {shorten(reason(error), 200)}") from error
        self.file, self.names = file, set(self._tensors.keys())

    def __getitem__(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read {name} of {self.file}: {shorten(reason(error), 200)}") from error
        return tensor

    def shape(self, name: str) -> list[int]:
        """Of a tensor; ValueError where there is none of that name."""
        if name not in self.names:
            raise ValueError(f"{self.file} has no {name}; it is not the file that it must be, or of another model")
        shape: list[int] = self._tensors.get_slice(name).get_shape()
        return shape

    def on_meta(self, name: str) -> Tensor:
        """A tensor without its numbers."""
        shape = self.shape(name)
        few = self._tensors.get_slice(name)[:0] if shape else self[name]  # for its dtype
        return torch.empty(shape, dtype=few.dtype, device="meta")


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
    for piece in pieces:
        missing += [name for name in piece.sources if name not in tensors]
        used += piece.sources
        if all(name in tensors for name in piece.sources):
            try:
                made |= zip(piece.targets, piece.make(*(tensors[name] for name in piece.sources)), strict=True)
            except (RuntimeError, ValueError) as error:
                shapes = ", ".join(f"{name} {list(tensors[name].shape)}" for name in piece.sources)
                raise ValueError(f"{what}: {shapes} is not what {type(network).__name__} is made of") from error
    own = network.state_dict()
    faults = {
        "is missing": missing,
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


class _ByName(Protocol):
    def __getitem__(self, name: str) -> Tensor: ...


def write_shards(folder: Path, layout: Mapping[str, Tensor], tensors: _ByName) -> None:
    """Writes a network's tensors as diffusers saves them: one file or, above `SHARD` bytes, several with an index.

    Args:
        layout: all of them, on the meta device.
        tensors: gives one after the other, by name.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    name = "diffusion_pytorch_model"
    plan = split_torch_state_dict_into_shards(
        dict(layout), filename_pattern=f"{name}{{suffix}}.safetensors", max_shard_size=SHARD
    )
    for file, names in plan.filename_to_tensors.items():
        save_file({key: tensors[key].clone() for key in names}, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


@contextmanager
def whole_folder(dest: Path) -> Iterator[Path]:
    """A folder to write to; at the end of the block it is `dest`, all at once. If the block raises, nothing is left.

    Raises:
        UserError: `dest` is in use.
        WriteError: the disk is full, or refuses otherwise.
    """
    refuse_used(dest, option="DEST")
    dest = dest.absolute()
    temporary = dest.with_name(f"{TEMPORARY}{dest.name}")
    try:
        with disk_errors(dest):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            if dest.exists():
                dest.rmdir()
            temporary.replace(dest)
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(temporary)
        raise


def converted_once(source: Path, kind: str, convert: Callable[[Path, Path], None]) -> Path:
    """The folder `CONVERTED` in `source`, made at the first use by `convert(source, folder)`; others wait meanwhile."""
    dest = source / CONVERTED
    if dest.is_dir():
        return dest
    elsewhere = f"moedistill convert {kind} {source} FOLDER, and set backbone.pretrained to that folder"
    try:
        with in_turn(source / ".converting"):
            if not dest.is_dir():
                click.echo(f"{source} is as published: converting it, once, to {dest}", err=True)
                convert(source, dest)
    except WriteError as error:
        raise WriteError(f"{error}. To convert it elsewhere: {elsewhere}") from error
    return dest


def convert_text_model(model_class: Any, tokenizer_class: Any, source: Path, model: Path, tokenizer: Path) -> None:
    """Writes a text encoder of transformers and its tokenizer, which lie in one folder, to two new ones.

    The encoder keeps the dtype that it is stored in; what a whole model has beside it is left away.

    Raises:
        ValueError: they cannot be loaded.
    """
    what = f"cannot load the text encoder in {source}"
    loaded = load_model(model_class, source, what, unread=UNREAD, torch_dtype="auto", use_safetensors=None)
    loaded.save_pretrained(model)
    load_tokenizer(tokenizer_class, source, what).save_pretrained(tokenizer)


def _some(names: Collection[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
