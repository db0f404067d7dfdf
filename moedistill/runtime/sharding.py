"""Tensors that may be cut among processes (`DTensor`): cutting a network, reading all of a tensor, writing into one.

A tensor that is not sharded is its own whole, and passes through every function here unchanged.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Pieces:
    """A saved tensor as it lies in files, piece by piece, mapped and not read.

    Args:
        pieces: with the place of their first element in the whole; they cover it.
    """

    dtype: torch.dtype
    shape: torch.Size
    pieces: Sequence[tuple[tuple[int, ...], Tensor]]

    def __getitem__(self, wanted: Slices) -> Tensor:
        """A part of the whole, read into memory."""
        if not wanted:
            return self.pieces[0][1].clone()
        result = torch.empty([each.stop - each.start for each in wanted], dtype=self.dtype)
        for offset, piece in self.pieces:
            ends = [start + size for start, size in zip(offset, piece.shape, strict=True)]
            both = [(max(w.start, o), min(w.stop, e)) for w, o, e in zip(wanted, offset, ends, strict=True)]
            if all(start < stop for start, stop in both):
                here = tuple(slice(a - w.start, b - w.start) for (a, b), w in zip(both, wanted, strict=True))
                there = tuple(slice(a - o, b - o) for (a, b), o in zip(both, offset, strict=True))
                result[here] = piece[there]
        return result

    def whole(self) -> Tensor:
        """All of it, in memory."""
        return self[tuple(slice(0, size) for size in self.shape)]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is cut among processes."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: "Tensor | Pieces") -> Tensor:
    """All of a tensor. Of a sharded one it is gathered: every process must ask for it, in the same order."""
    if isinstance(tensor, Pieces):
        return tensor.whole()
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def whole_tree(tree: Any) -> Any:
    """Nested dicts, lists and tuples with all their tensors whole."""
    return _pytree.tree_map_only((Tensor, Pieces), whole, tree)


def part(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this process; the same memory."""
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return local


def place_of(tensor: Tensor) -> tuple[Slices, tuple[int, ...]]:
    """Where in the whole this process's part of a sharded tensor is: as slices, and its first element."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = tensor
    shape, offset = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True)), tuple(offset)


def cut_like(value: "Tensor | Pieces", like: Tensor) -> Tensor:
    """A tensor cut among processes as `like` is; each one keeps its part of the `value` that it has.

    Where `like` is whole, so is the result.
    """
    if not is_sharded(like):
        return whole(value) if isinstance(value, Pieces) else value
    if not isinstance(value, Pieces) and is_sharded(value):
        return value
    from torch.distributed.tensor import DTensor

    sharded: Any = like
    slices, _ = place_of(like)
    mine = value[slices]
    local = torch.empty(mine.shape, dtype=like.dtype, device=like.device).copy_(mine)  # not in a mapped file
    return DTensor.from_local(
        local, sharded.device_mesh, sharded.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def fill(target: Tensor, value: "Tensor | Pieces") -> None:
    """Writes all of `value` into `target`, whichever of them is sharded."""
    if not is_sharded(target):
        target.copy_(whole(value))
    elif not isinstance(value, Pieces) and is_sharded(value):
        part(target).copy_(part(value))
    else:
        part(target).copy_(value[place_of(target)[0]])


def rest(network: nn.Module) -> None:
    """Lets a network hold its own parameters: after a forward, FSDP2 leaves gathered copies in their place, which would
    ignore whatever is written to them.
    """
    if hasattr(network, "reshard"):
        for module in network.modules():
            reshard: Any = getattr(module, "reshard", None)
            if reshard is not None:
                reshard()


def gather_root(network: nn.Module) -> None:
    """Lets a sharded network hold whole what is in none of its blocks, for use outside of its forward pass."""
    unshard: Any = getattr(network, "unshard", None)
    if unshard is not None:
        unshard()


def units(network: nn.Module) -> Iterator[nn.Module]:
    """What of a network is gathered at a time: the items of its outermost lists of modules, such as blocks."""
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from (module for module in child if next(module.parameters(), None) is not None)
        else:
            yield from units(child)


def shard(network: nn.Module, mesh: "DeviceMesh") -> None:
    """Cuts a network's parameters among the processes of a mesh, by FSDP2; names and modules stay what they were.

    To be called once, after everything is attached, and before anything computes. Each unit is gathered when it is
    called, and let go after; what is in none of them is gathered for the whole forward and backward pass.
    """
    from torch.distributed.fsdp import fully_shard

    for unit in units(network):
        fully_shard(unit, mesh=mesh)
    fully_shard(network, mesh=mesh, reshard_after_forward=False)


def materialise(network: nn.Module, device: torch.device) -> None:
    """Gives parameters on torch's meta device memory, with any numbers in it; buffers, which are real, keep theirs."""
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers() if not buffer.is_meta}
    network.to_empty(device=device)
    for name, buffer in network.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])
