"""Folders of weights as diffusers lays them out: in parts, and there whole or not at all."""

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
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


CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""What safetensors calls a dtype."""


class _ByName(Protocol):
    def __getitem__(self, name: str) -> Tensor: ...


def write_shards(folder: Path, layout: Mapping[str, Tensor], tensors: _ByName) -> None:
    """Writes a network's tensors as diffusers saves them: one file or, above `SHARD` bytes, several with an index.

    One tensor after the other: libraries that save whole files hold each of them twice.

    Args:
        layout: all of them, on the meta device.
        tensors: gives one after the other, by name.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    name = "diffusion_pytorch_model"
    plan = split_torch_state_dict_into_shards(
        dict(layout), filename_pattern=f"{name}{{suffix}}.safetensors", max_shard_size=SHARD
    )
    for file, names in plan.filename_to_tensors.items():
        # Those of wide dtypes first, so that each begins where its dtype may.
        part = {key: layout[key] for key in sorted(names, key=lambda key: -layout[key].itemsize)}
        write_tensors(folder / file, part, (tensors[key] for key in part), {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def write_tensors(
    file: Path, layout: Mapping[str, Tensor], tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file of any size, one tensor in memory at a time.

    Args:
        layout: all tensors by name, on the meta device, in the order of `tensors`.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in layout.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # so that the tensors' bytes are aligned
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for (name, planned), tensor in zip(layout.items(), tensors, strict=True):
            found, wanted = (tensor.dtype, tensor.shape), (planned.dtype, planned.shape)
            assert found == wanted, f"{name} is {found}, not {wanted}"
            out.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


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
