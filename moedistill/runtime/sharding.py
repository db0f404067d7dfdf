"""Tensors that may be sharded (`DTensor`): reading all of one, writing into one, and what of it lies here.

A tensor that is not sharded is its own whole, and passes through every function here unchanged.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is cut among processes."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Of a sharded one it is gathered: every process must ask for it, in the same order."""
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def whole_tree(tree: Any) -> Any:
    """Nested dicts, lists and tuples with all their tensors whole."""
    return _pytree.tree_map_only(Tensor, whole, tree)


def part(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this process; the same memory."""
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return local


def cut_like(value: Tensor, like: Tensor) -> Tensor:
    """A tensor cut among processes as `like` is; each one keeps its part of the `value` that it has."""
    if not is_sharded(like) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Writes all of `value` into `target`, whichever of them is sharded."""
    target.copy_(cut_like(value, target) if is_sharded(target) else whole(value))


def rest(network: nn.Module) -> None:
    """Lets a network hold its own parameters: after a forward, FSDP2 leaves gathered copies in their place, which would
    ignore whatever is written to them.
    """
    if hasattr(network, "reshard"):
        for module in network.modules():
            reshard: Any = getattr(module, "reshard", None)
            if reshard is not None:
                reshard()
