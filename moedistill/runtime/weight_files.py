"""Folders of weights as diffusers lays them out: in parts, and there whole or not at all."""

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moedistill.errors import UserError
from moedistill.runtime.lock import in_turn
from moedistill.runtime.writing import TEMPORARY, disk_errors, sync

SHARD = 4 * 2**30
"""Bytes of a file of weights, at most; a tensor that is larger has one of its own."""


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
        held = {key: tensors[key].clone(memory_format=torch.contiguous_format) for key in names}
        save_file(held, folder / file, metadata={"format": "pt"})
        del held  # before the next ones are made
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


@contextmanager
def whole_folder(dest: Path) -> Iterator[Path]:
    """A folder to write to; at the end of the block it is `dest`, all at once. If the block raises, nothing is left.

    One process at a time: others wait, and find it there.

    Raises:
        UserError: `dest` is there, and not empty.
        WriteError: the disk is full, or refuses otherwise.
    """
    dest = dest.absolute()
    with disk_errors(dest):
        dest.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{TEMPORARY}{dest.name}-"
    with in_turn(dest.with_name(f".{dest.name}.lock")) as alone:
        if os.path.lexists(dest) and (dest.is_symlink() or not dest.is_dir() or any(dest.iterdir())):
            raise UserError(f"{dest} is there already; choose another DEST, a new or an empty folder")
        for left in dest.parent.glob(f"{glob.escape(prefix)}*") if alone else ():  # by one that was killed
            shutil.rmtree(left, ignore_errors=True)
        with disk_errors(dest):
            temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=dest.parent))
            temporary.chmod(0o777 & ~_umask())
        try:
            with disk_errors(dest):
                yield temporary
                for path in (*temporary.rglob("*"), temporary):
                    sync(path)
                if dest.is_dir():
                    dest.rmdir()
                temporary.replace(dest)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
