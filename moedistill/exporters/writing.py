"""Networks on their way into folders, as diffusers saves them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moedistill.exporters.files import Rounding
from moedistill.exporters.source import ExpertSource
from moedistill.runtime.weight_files import write_shards
from moedistill.runtime.writing import disk_errors


class _Rounded:
    """A network's tensors by name, each made and rounded when it is asked for."""

    def __init__(self, make: Callable[[str], Tensor], layout: dict[str, Tensor]) -> None:
        self._make, self._layout = make, layout
        self.rounding = Rounding()

    def __getitem__(self, name: str) -> Tensor:
        return self.rounding.to(self._layout[name].dtype, self._make(name))


def write_network(
    expert: ExpertSource, network: Any, folder: Path, dtype: torch.dtype, *, under: bool = False
) -> float:
    """Writes the plain network that an expert equals to the new `folder`, as a class of diffusers saves it.

    In memory is one file of it, `SHARD` bytes at most, and what is mapped of the expert. What the network's class keeps
    in float32 is stored so.

    Args:
        network: its class and config, without weights.
        under: not the expert itself, but what it is a change of.

    Returns:
        What the dtype costs; see `Rounding`.

    Raises:
        WriteError: the disk is full, or refuses otherwise.
    """
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    layout = {}
    for name, own in network.state_dict().items():
        own_dtype = torch.float32 if kept & set(name.split(".")) else dtype
        layout[name] = torch.empty(own.shape, dtype=own_dtype if own.is_floating_point() else own.dtype, device="meta")
    tensors = _Rounded(expert.original if under else expert.tensor, layout)
    with disk_errors(folder, sum(tensor.nbytes for tensor in layout.values())):
        folder.mkdir(parents=True)
        network.save_config(folder)
        write_shards(folder, layout, tensors)
    expert.release()
    return tensors.rounding.error
