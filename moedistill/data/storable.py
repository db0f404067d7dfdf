"""Which tensors may be stored, and which of them can be learned from."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from moedistill.errors import shorten

LATENTS = "latents"
"""The name of a sample's latents; all its other tensors are conditioning."""

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {
    **FLOATS, "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64,
}  # fmt: skip
"""What tensors may be stored in, by safetensors' names."""


class Unusable(ValueError):
    """Why a stored tensor cannot be used."""


def misshapen(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> str:
    """What is wrong with latents; nothing, if nothing is."""
    if len(shape) != 4 or 0 in shape:
        return f"has latents {list(shape)}, which must be [C, T, H, W]"
    return "" if dtype.is_floating_point else f"has latents of {dtype}, which must be floating-point numbers"


def is_text_only(shape: object) -> bool:
    """Whether this is the shape of a sample without latents, `[C, 0, H, W]`, as an index gives it."""
    if not isinstance(shape, list) or len(shape) != 4 or not all(type(size) is int for size in shape):
        return False
    channels, frames, *size = shape
    return frames == 0 and min(channels, *size) > 0


def check_usable(name: str, value: Tensor) -> None:
    """Unusable for a tensor that is not plain numbers, as one out of a `.pt` file may be."""
    if value.layout != torch.strided or value.is_nested:
        raise Unusable(f"has {name} that are sparse or nested; store a dense tensor")
    if value.device.type == "meta":
        raise Unusable(f"has {name} {list(value.shape)} without numbers (a meta tensor); make it again")
    if value.dtype not in DTYPES.values():
        raise Unusable(other_dtype(name, str(value.dtype)))


def check_stored(name: str, value: Tensor) -> None:
    """Unusable for a tensor that is larger than what its file holds."""
    stored, claimed = value.untyped_storage().nbytes(), value.numel() * value.element_size()
    if claimed > stored:
        raise Unusable(
            f"has {name} {list(value.shape)}, {claimed:,} bytes, of which {stored:,} are stored (an expanded tensor); "
            "store a contiguous copy"
        )


def other_dtype(name: str, dtype: str) -> str:
    """What is wrong with a tensor that is stored in another dtype than `DTYPES`."""
    wanted = ", ".join(str(one).removeprefix("torch.") for one in FLOATS.values())
    return f"has {shorten(name, 60)} of {dtype}; it must be of {wanted}, or of whole numbers"


def bad_numbers(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Which of a sample's tensors cannot be learned from, and why."""
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            yield name, "NaN or infinite"
        elif name == LATENTS and value.numel() and not value.any():
            yield name, "all zero, which is no video"


def unlearnable(tensors: Mapping[str, Tensor]) -> str:
    """Why a sample cannot be learned from; nothing, if it can."""
    try:
        for name, value in tensors.items():
            check_usable(name, value)
    except Unusable as error:
        return str(error)
    return next((f"has {name} that are {reason}" for name, reason in bad_numbers(tensors)), "")
