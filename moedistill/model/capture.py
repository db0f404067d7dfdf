"""Hidden states of a network's blocks, by forward hooks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def capture(network: nn.Module, blocks: Sequence[str]) -> Iterator[list[object]]:
    """Collects the outputs of `blocks` (dotted paths), in the order in which they run, while the context is open.

    The hooks only store. A block that is recomputed for activation checkpointing is not stored twice.
    """
    outputs: list[object] = []

    def store(_module: nn.Module, _args: object, output: object) -> None:
        recomputing = torch._C._current_graph_task_id() != -1
        if not recomputing:
            outputs.append(output)

    modules = [network.get_submodule(path) for path in blocks]
    handles = [module.register_forward_hook(store) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
