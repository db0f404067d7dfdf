"""Safetensors files written tensor by tensor: what they hold together need not fit into memory."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moedistill.runtime.writing import disk_errors

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def stream_tensors(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    make: Callable[[str], Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file whose tensors `make` gives one after the other, by name; they are cast to `dtype`.

    The bytes are those that `save_tensors` writes of the same tensors.

    Raises:
        WriteError: there is no room for it, or the disk refuses otherwise.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in sorted(shapes):
        begin, end = end, end + math.prod(shapes[name]) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shapes[name]), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with disk_errors(path, end), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in sorted(shapes):
            tensor = make(name).detach().to("cpu", dtype).contiguous()
            assert tuple(tensor.shape) == tuple(shapes[name]), name
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
