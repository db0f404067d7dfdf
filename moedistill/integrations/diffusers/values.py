"""Whether what a model's config files say is of the kind that is asked for: anything could stand in them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moedistill.errors import shorten


def check_arguments(found: Mapping[str, Any], like: Mapping[str, Any], optional: Sequence[str], file: Path) -> None:
    """Holds the arguments of a network in a config file against others of its class.

    Args:
        like: by name, values of the kind that they must be.
        optional: names of whole numbers that may be null.

    Raises:
        ValueError: one of them is of another kind.
    """
    for name, own in {**dict.fromkeys(optional, 1), **like}.items():
        value = found.get(name, own)
        if not _fits(value, own) and not (name in optional and value is None):
            raise ValueError(
                f"{file}: {name} must be {_kind(own)}, not {shorten(repr(value), 60)}; get the model's own file again"
            )


def numbers(value: Any, name: str, channels: int, source: str) -> Tensor:
    """One number or a list of one for each channel, float32; ValueError, which begins with `source`, for others."""
    listed = value if isinstance(value, (list, tuple)) else [value]
    fitting = len(listed) == channels or listed is not value
    if not fitting or not all(_fits(one, 1.0) for one in listed):
        raise ValueError(
            f"{source}: {name} must be a number, or {channels} of them, one for each channel of the latents, not "
            f"{shorten(repr(value), 60)}; get the model's own VAE"
        )
    return torch.tensor(value, dtype=torch.float32)


def _fits(value: Any, own: Any) -> bool:
    if isinstance(own, (list, tuple)):
        return isinstance(value, (list, tuple)) and len(value) == len(own) and all(map(_fits, value, own))
    if isinstance(own, (bool, str)):
        return isinstance(value, type(own))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return own is None and value is None
    return math.isfinite(value) and (isinstance(own, float) or (isinstance(value, int) and value > 0))


def _kind(own: Any) -> str:
    if isinstance(own, (list, tuple)):
        return f"a list of {len(own)} whole numbers above 0"
    if isinstance(own, bool):
        return "true or false"
    if isinstance(own, str):
        return "a text"
    return "a number" if isinstance(own, float) else "a whole number above 0"
