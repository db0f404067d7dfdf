"""Tensors in a folder that several processes write, each its part, and that any number of processes reads.

The files are those of torch.distributed.checkpoint's safetensors storage: `shard-0000N-…safetensors` is of process N,
from 1, and its header says where in the whole each piece lies. Nothing in them is unpickled.
"""

import inspect
import json
import re
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moedistill.runtime.integrity import Damaged, size_of
from moedistill.runtime.sharding import Pieces
from moedistill.runtime.signals import Interruption

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SHARD = re.compile(r"shard-([0-9]{5})-model-00001-of-00001\.safetensors")
PLACES = "DCP_SHARDING_INFO"
"""In a shard's header: JSON of the first elements of its pieces, by name."""


def shard_name(process: int) -> str:
    """The file of a process, numbered from 0."""
    return f"shard-{process + 1:05d}-model-00001-of-00001.safetensors"


def write_shards(folder: Path, tensors: Mapping[str, Tensor], group: "ProcessGroup") -> "Future[Any]":
    """Begins to write tensors, whole or sharded, to a folder that all processes see; they must all come here.

    They are copied before this returns, so training may go on. What is whole is written by one of the processes.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, async_save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    begun: Any = async_save(dict(tensors), storage_writer=writer, process_group=group)
    return getattr(begun, "upload_completion", begun)


def can_write_shards() -> bool:
    """Whether the installed torch can do what `write_shards` asks for."""
    from torch.distributed import checkpoint

    writer = getattr(checkpoint, "HuggingFaceStorageWriter", None)
    return writer is not None and "save_distributed" in inspect.signature(writer).parameters


def has_shards(folder: Path) -> bool:
    """Whether tensors in a folder were written by several processes."""
    return any(SHARD.fullmatch(path.name) for path in folder.glob("shard-*"))


def read_shards(folder: Path) -> dict[str, Pieces]:
    """The tensors in a folder's shards, by name, mapped and not read.

    Raises:
        Damaged: a file cannot be read, or pieces are missing.
    """
    found: dict[str, list[tuple[tuple[int, ...], Tensor]]] = {}
    files = sorted(path for path in folder.glob("shard-*") if SHARD.fullmatch(path.name))
    for file in files:
        size_of(file)
        try:
            with safe_open(file, "pt") as shard:
                places = json.loads(shard.metadata()[PLACES])
                for name in shard.keys():  # noqa: SIM118  it is no mapping
                    piece = shard.get_tensor(name)
                    offset = tuple(map(int, places[name]["saved_offsets"]))
                    if len(offset) != piece.ndim or any(start < 0 for start in offset):
                        raise ValueError(f"{name} of {piece.ndim} dimensions begins at {list(offset)}")
                    found.setdefault(name, []).append((offset, piece))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            Interruption.check()
            raise Damaged(file, f"is damaged: it is no shard of a checkpoint ({error})") from error
    return {name: _joined(name, pieces, folder) for name, pieces in found.items()}


def _joined(name: str, pieces: list[tuple[tuple[int, ...], Tensor]], folder: Path) -> Pieces:
    """Pieces as one tensor, if they are all of it, and each element once."""
    ends = ([start + size for start, size in zip(offset, piece.shape, strict=True)] for offset, piece in pieces)
    shape = torch.Size(max(sizes) for sizes in zip(*ends, strict=True))
    if (
        len({(piece.dtype, piece.ndim) for _, piece in pieces}) > 1
        or sum(piece.numel() for _, piece in pieces) != shape.numel()
    ):
        raise Damaged(folder, f"is damaged: the pieces of {name} in its shards do not make a whole")
    return Pieces(pieces[0][1].dtype, shape, pieces)
