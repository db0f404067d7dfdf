"""Checkpoints: written to a temporary folder, synced, then renamed, so that one either is there whole or is not there.

A checkpoint is a folder of trees. A tree is nested dicts, lists and tuples of numbers, strings and tensors; its tensors
go to `NAME.safetensors` and the rest to `NAME.json`.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moedistill.errors import UserError
from moedistill.runtime.writing import TEMPORARY as _TEMPORARY
from moedistill.runtime.writing import disk_errors, new_file, sync

_PLAIN = (bool, int, float, str, type(None))


def _pack(tree: Any, tensors: dict[str, Tensor], path: str) -> Any:
    if isinstance(tree, Tensor):
        while path in tensors:  # the keys 1 and "1", or "a/b" and b in a, make the same path
            path += "'"
        tensors[path] = tree.detach().cpu().contiguous().clone()
        return {"$tensor": path}
    if isinstance(tree, Mapping):
        for key in tree:
            if not isinstance(key, _PLAIN):
                raise TypeError(f"cannot save a key of type {type(key).__name__} at {path}")
        packed = {key: _pack(value, tensors, f"{path}/{key}") for key, value in tree.items()}
        plain = all(isinstance(key, str) and not key.startswith("$") for key in packed)
        return packed if plain else {"$items": [list(item) for item in packed.items()]}
    if isinstance(tree, (list, tuple)):
        values = [_pack(value, tensors, f"{path}/{i}") for i, value in enumerate(tree)]
        return values if isinstance(tree, list) else {"$tuple": values}
    if isinstance(tree, _PLAIN):
        return tree
    raise TypeError(f"cannot save {type(tree).__name__} at {path}")


def _unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(packed, list):
        return [_unpack(value, tensors) for value in packed]
    if not isinstance(packed, dict):
        return packed
    if "$tensor" in packed:
        return tensors[packed["$tensor"]]
    if "$items" in packed:
        return {key: _unpack(value, tensors) for key, value in packed["$items"]}
    if "$tuple" in packed:
        return tuple(_unpack(value, tensors) for value in packed["$tuple"])
    return {key: _unpack(value, tensors) for key, value in packed.items()}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file with the permissions that other new files get; safetensors makes it private.

    Raises:
        WriteError: there is no room for it, or the disk refuses otherwise.
    """
    with disk_errors(path, size_of(tensors)):
        save_file(dict(tensors), path, metadata=metadata)
        umask = os.umask(0)
        os.umask(umask)
        path.chmod(0o666 & ~umask)


def size_of(tree: Any) -> int:
    """Bytes of a tree's tensors, on all devices."""
    if isinstance(tree, Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, Mapping):
        tree = tree.values()
    return sum(map(size_of, tree)) if isinstance(tree, Iterable) and not isinstance(tree, str) else 0


def save_tree(folder: Path, name: str, tree: Any) -> None:
    """Writes one tree, and syncs its files to the disk.

    Raises:
        TypeError: the tree holds anything but numbers, strings, None and tensors.
    """
    tensors: dict[str, Tensor] = {}
    packed = _pack(tree, tensors, "")
    if tensors:
        save_tensors(folder / f"{name}.safetensors", tensors)
        sync(folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(packed, indent=1))
    sync(folder / f"{name}.json")


def load_tree(folder: Path, name: str) -> Any:
    """The tree that `save_tree` wrote, on the CPU, equal bit for bit.

    Raises:
        UserError: a file is missing or damaged.
    """
    file = folder / f"{name}.safetensors"
    try:
        tensors = load_file(file) if file.exists() else {}
        return _unpack(json.loads((folder / f"{name}.json").read_text()), tensors)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"the checkpoint {folder} is not complete or damaged ({name}: {type(error).__name__}: {error}); "
            f"go on from an earlier one, with --resume-from"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Replaces a file by one with this content, all at once; WriteError where the disk refuses."""
    with new_file(path) as temporary:
        temporary.write_text(text)


class Checkpoints:
    """The checkpoints of one run, of which the newest `keep` stay.

    Their names sort by progress: `STAGE-NUMBER_STAGE-NAME_STEP`.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self._keep = folder, keep

    def save(self, name: str, trees: Mapping[str, Any]) -> Path:
        """Writes a checkpoint, then removes what is older than the newest `keep`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.remove_leftovers()
        temporary, final = self.folder / f"{_TEMPORARY}{name}", self.folder / name
        if final.exists():  # a run that was resumed from an earlier one comes past here again, with equal content
            return final
        temporary.mkdir()
        for tree_name, tree in trees.items():
            save_tree(temporary, tree_name, tree)
        sync(temporary)
        temporary.rename(final)
        sync(self.folder)
        for old in self.all()[: -self._keep]:
            self._remove(old)
        return final

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith("."))

    def remove_leftovers(self) -> None:
        """Removes what a crash left half written or half deleted."""
        for path in self.folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(path)

    def _remove(self, path: Path) -> None:
        # Out of sight first: a checkpoint that is being deleted must not look like one.
        doomed = path.with_name(f"{_TEMPORARY}{path.name}-old")
        path.rename(doomed)
        shutil.rmtree(doomed)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest one of a run's folder.

    Raises:
        UserError: there is none.
    """
    if path.name.startswith(_TEMPORARY):
        raise UserError(f"{path} was never finished: the run was stopped while it was written; choose another one")
    if (path / "state.json").is_file():
        return path
    if not path.is_dir():
        raise UserError(f"no checkpoint at {path}: there is no such folder")
    found = Checkpoints(path / "checkpoints", keep=1).all()
    if not found:
        raise UserError(
            f"no checkpoint in {path}: neither state.json nor a checkpoints folder with a complete one in it; "
            f"a run that was stopped before its first checkpoint starts afresh, without --resume"
        )
    return found[-1]
