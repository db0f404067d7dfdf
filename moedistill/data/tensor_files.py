"""Safetensors files of many samples, of which the last few that were read stay open."""

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

from moedistill.data.storable import DTYPES, Unusable, other_dtype
from moedistill.runtime.reading import MIB, check_file
from moedistill.runtime.signals import Interruption

MOST_OPEN = 128
"""How many files stay open. To open one is to read the names of all its tensors, which takes a millisecond or two."""
MOST_BYTES = 4096 * MIB
"""How large they are together, or it is one alone: what was read of an open file counts as the process's memory, though
it is the disk's cache.
"""


class TensorFile:
    """The tensors of a safetensors file by key: `k/latents` has the key `k`. They are mapped: what is not used of them
    is not read.
    """

    def __init__(self, path: Path) -> None:
        check_file(path)
        self._tensors: Any = safe_open(path, "pt").__enter__()
        self._names: list[str] = list(self._tensors.keys())
        self._by_key: dict[str, list[str]] = {}
        for name in self._names:
            self._by_key.setdefault(name.partition("/")[0], []).append(name)

    def names(self, key: str | None) -> dict[str, str]:
        """By a sample's own names of its tensors, those in the file; without a key the whole file is one sample."""
        if key is None:
            return {name: name for name in self._names}
        return {name[len(key) + 1 :]: name for name in self._by_key.get(key, ()) if name != key}

    def tensors(self, key: str | None) -> dict[str, Tensor]:
        """A sample's tensors; Unusable for a dtype that is not taken."""
        names = self.names(key)
        for own, name in names.items():
            if (dtype := self._tensors.get_slice(name).get_dtype()) not in DTYPES:
                raise Unusable(other_dtype(own, dtype))
        return {own: self._tensors.get_tensor(name) for own, name in names.items()}


class _Identity(NamedTuple):
    """What tells that a file is the one that was opened."""

    device: int
    inode: int
    size: int
    modified: int


class OpenFiles:
    """Files by path, opened on demand. Of a damaged one it is kept what opening it raised: it is looked at once, too.

    A process that gets it by pickling opens its own.
    """

    def __init__(self) -> None:
        self._opened: OrderedDict[Path, tuple[_Identity, TensorFile | Exception]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_opened": OrderedDict()}

    def get(self, path: Path) -> TensorFile:
        """The file as it is now. Raises what opening raises."""
        status = os.stat(path)
        # What is not there any more as it was mapped must not be touched: the process would be killed by SIGBUS.
        identity = _Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        known, found = self._opened.get(path, (None, None))
        if found is None or known != identity:
            found = _try_to_open(path)
            self._opened[path] = (identity, found)
        self._opened.move_to_end(path)
        if known != identity:
            self._close_oldest()
        if isinstance(found, Exception):
            raise found.with_traceback(None)
        return found

    def _close_oldest(self) -> None:
        size = sum(identity.size for identity, _ in self._opened.values())
        while len(self._opened) > MOST_OPEN or (size > MOST_BYTES and len(self._opened) > 1):
            _, (identity, _) = self._opened.popitem(last=False)
            size -= identity.size


def _try_to_open(path: Path) -> TensorFile | Exception:
    try:
        return TensorFile(path)
    except OSError:  # may pass, such as too many open files
        raise
    except Exception as error:  # What a damaged file raises could be anything.
        Interruption.check()
        return error
