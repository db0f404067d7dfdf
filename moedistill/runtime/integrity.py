"""What is read back is what was written, or `Damaged` names the file and says what is wrong with it."""

import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moedistill.errors import UserError, shorten
from moedistill.runtime.sharding import Pieces
from moedistill.runtime.signals import Interruption

_CHUNK = 1 << 20


class Damaged(UserError):
    """A file is not what was written.

    Attributes:
        path: the file.
        why: what is wrong with it, as the end of a sentence, in one line.
    """

    def __init__(self, path: Path, why: str) -> None:
        self.path, self.why = path, shorten(" ".join(why.split()), 300)
        super().__init__(f"{path} {self.why}")


def size_of(path: Path) -> int:
    """Bytes of a file. Damaged where there is none, or what is there is no file: a pipe would be read for ever."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise Damaged(path, "is missing") from None
    except OSError as error:
        raise Damaged(path, f"cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise Damaged(path, "is no file" if not stat.S_ISDIR(found.st_mode) else "is a folder, not a file")
    return found.st_size


def sum_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal. About 0.75 s for a GB, which takes 2.7 s to write (one core of 2026)."""
    size_of(path)
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise Damaged(path, f"cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """What a JSON file holds; Damaged where it cannot be read, or is no JSON."""
    size_of(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Damaged(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise Damaged(path, f"is damaged: it is no JSON ({error})") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; Damaged where it cannot be read, or is none."""
    size_of(path)
    try:
        return load_file(path)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        Interruption.check()
        raise Damaged(path, f"is damaged: it is no safetensors file ({error})") from error


def misfit(saved: Any, own: Any, path: str = "") -> str | None:
    """In what a saved tree is not like `own`: keys, lengths, types, or tensors' dtypes and shapes; None if it is.

    Numbers may differ, and whole ones may stand for fractions. `...` in `own` is anything.
    """
    if own is ...:
        return None
    here = f"{path!r} " if path else ""
    if isinstance(own, Tensor):
        if not isinstance(saved, Tensor | Pieces):
            return f"{here}is {_kind(saved)}, and must be a tensor"
        if (saved.dtype, saved.shape) != (own.dtype, own.shape):
            return f"{here}is {form(saved)}, and must be {form(own)}"
        return None
    if isinstance(own, Mapping):
        if not isinstance(saved, Mapping):
            return f"{here}is {_kind(saved)}, and must be a mapping"
        parts = [("missing", own.keys() - saved.keys()), ("not known", saved.keys() - own.keys())]
        if named := [f"{_some(keys)} {'is' if len(keys) == 1 else 'are'} {what}" for what, keys in parts if keys]:
            return (f"in {path!r} " if path else "") + " and ".join(named)
        found = (misfit(saved[key], own[key], f"{path}.{key}" if path else str(key)) for key in own)
        return next((each for each in found if each), None)
    if isinstance(own, (list, tuple)):
        if not isinstance(saved, (list, tuple)) or len(saved) != len(own):
            return f"{here}is {_kind(saved)}, and must be a list of {len(own)}"
        found = (misfit(one, other, f"{path}.{k}") for k, (one, other) in enumerate(zip(saved, own, strict=True)))
        return next((each for each in found if each), None)
    alike = type(saved) is type(own) or (type(saved), type(own)) in ((int, float), (float, int))
    return None if alike else f"{here}is {_kind(saved)}, and must be {_kind(own)}"


def form(tensor: "Tensor | Pieces") -> str:
    """A tensor's dtype and shape: "float32 [2, 3]"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _kind(value: Any) -> str:
    if isinstance(value, Tensor | Pieces):
        return form(value)
    if value is None or isinstance(value, bool | int | float | str):
        return shorten(repr(value), 40)
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, list | tuple) else "")


def _some(keys: Any) -> str:
    """Some of the keys, for a message."""
    named = sorted(map(repr, keys))
    return ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
