"""Checkpoints: written to a temporary folder, synced, then renamed, so that one either is there whole or is not there.

A checkpoint is a folder of trees. A tree is nested dicts, lists and tuples of numbers, strings and tensors; its tensors
go to `NAME.safetensors`, or, of several processes that each hold a part, all of all trees to a file for each process
(see `shards`), and the rest to `NAME.json`. `sums.json` has the size and the sha256 of every file: what is not
as it was written is refused. A checkpoint of before, without sums, is read as it is.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import click
from safetensors.torch import save_file
from torch import Tensor

from moedistill.errors import UserError
from moedistill.runtime.integrity import Damaged, read_json, read_tensors, size_of, sum_of
from moedistill.runtime.sharding import Pieces, whole_tree
from moedistill.runtime.shards import SHARD, has_shards, read_shards
from moedistill.runtime.writing import TEMPORARY as _TEMPORARY
from moedistill.runtime.writing import disk_errors, new_file, sync

FORMAT = 2
"""Of a checkpoint, in its state; one of before has none, and no sums."""

SUMS = "sums.json"
TREES = ("state", "experts", "ema", "training")
STATE_NAMES = ("stage", "stage_name", "step")
"""What of a state its checkpoint is called by."""
_NAME = re.compile(r"([0-9]{2,})_([A-Za-z0-9_-]+)_([0-9]{8,})")
_PLAIN = (bool, int, float, str, type(None))


def pack(tree: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """What of a tree is JSON; its tensors go to `tensors`, by their paths, as they are.

    Raises:
        TypeError: it holds anything but numbers, strings, None and tensors.
    """
    if isinstance(tree, Tensor):
        while path in tensors:  # the keys 1 and "1", or "a/b" and b in a, make the same path
            path += "'"
        tensors[path] = tree.detach()
        return {"$tensor": path}
    if isinstance(tree, Mapping):
        for key in tree:
            if not isinstance(key, _PLAIN):
                raise TypeError(f"cannot save a key of type {type(key).__name__} at {path}")
        packed = {key: pack(value, tensors, f"{path}/{key}") for key, value in tree.items()}
        plain = all(isinstance(key, str) and not key.startswith("$") for key in packed)
        return packed if plain else {"$items": [list(item) for item in packed.items()]}
    if isinstance(tree, (list, tuple)):
        values = [pack(value, tensors, f"{path}/{i}") for i, value in enumerate(tree)]
        return values if isinstance(tree, list) else {"$tuple": values}
    if isinstance(tree, _PLAIN):
        return tree
    raise TypeError(f"cannot save {type(tree).__name__} at {path}")


def _unpack(packed: Any, tensors: Mapping[str, "Tensor | Pieces"]) -> Any:
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
    """Writes a safetensors file, the same bytes for the same tensors and metadata, with the permissions that other new
    files get; safetensors makes it private.

    Raises:
        WriteError: there is no room for it, or the disk refuses otherwise.
    """
    with disk_errors(path, bytes_of(tensors)):
        save_file(dict(tensors), path, metadata=metadata)
        if metadata is not None and len(metadata) > 1:
            _sort_header(path)
        umask = os.umask(0)
        os.umask(umask)
        path.chmod(0o666 & ~umask)


def _sort_header(path: Path) -> None:
    """Sorts the metadata of a safetensors file, which are in any order: equal tensors then make equal bytes."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))


def bytes_of(tree: Any) -> int:
    """Bytes of a tree's tensors, on all devices."""
    if isinstance(tree, Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, Mapping):
        tree = tree.values()
    return sum(map(bytes_of, tree)) if isinstance(tree, Iterable) and not isinstance(tree, str) else 0


def save_tree(folder: Path, name: str, tree: Any) -> None:
    """Writes one tree, and syncs its files to the disk.

    Raises:
        TypeError: the tree holds anything but numbers, strings, None and tensors.
    """
    tensors: dict[str, Tensor] = {}
    packed = pack(tree, tensors, "")
    if tensors:
        save_tensors(folder / f"{name}.safetensors", _separate(tensors))
        sync(folder / f"{name}.safetensors")
    save_form(folder, name, packed)


def save_form(folder: Path, name: str, packed: Any) -> None:
    """Writes what `pack` gave, and syncs it to the disk."""
    (folder / f"{name}.json").write_text(json.dumps(packed, indent=1), encoding="utf-8")
    sync(folder / f"{name}.json")


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the host, each with a memory of its own, as safetensors wants them; copied where they have none."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        own = tensor.cpu().contiguous()
        storage = own.untyped_storage()
        if storage.nbytes() != own.nbytes or storage.data_ptr() in seen:
            own = own.clone()
        seen.add(storage.data_ptr())
        separate[name] = own
    return separate


def load_tree(folder: Path, name: str, *, verified: bool = False, pieces: bool = False) -> Any:
    """The tree that `save_tree` wrote, or several processes did, on the CPU, equal bit for bit.

    Its files are compared with their sums, if there are any and it was not `verified` before. With `pieces` what
    several processes wrote is not put together: its tensors are `Pieces`.

    Raises:
        Damaged: a file is missing or is not as it was written.
    """
    if not verified:
        verify(folder, name)
    file = folder / f"{name}.safetensors"
    tensors: Mapping[str, Tensor | Pieces] = read_tensors(file) if os.path.lexists(file) else {}
    packed = read_json(folder / f"{name}.json")
    if not tensors and has_shards(folder):
        shards = read_shards(folder)
        tensors = {key.removeprefix(name): each for key, each in shards.items() if key.startswith(f"{name}/")}
    try:
        tree = _unpack(packed, tensors)
        return tree if pieces else whole_tree(tree)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"is damaged: it is no tree of tensors ({type(error).__name__}: {error})"
        raise Damaged(folder / f"{name}.json", reason) from error


def write_sums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Writes size and sha256 of every file in a folder to its `sums.json`; of some the sum may be `known`."""
    known = known or {}
    if unseen := sorted(name for name in known if not (folder / name).is_file()):
        raise OSError(errno.ESTALE, f"{unseen[0]} was written by another process, and is not seen here")
    files = {
        path.name: {"bytes": size_of(path), "sha256": known.get(path.name) or sum_of(path)}
        for path in sorted(folder.iterdir())
    }
    (folder / SUMS).write_text(json.dumps(files, indent=1), encoding="utf-8")
    sync(folder / SUMS)


def _sums(folder: Path) -> dict[str, tuple[int, str]] | None:
    """Size and sha256 by file; None where there are none."""
    if not os.path.lexists(folder / SUMS):
        return None
    read = read_json(folder / SUMS)
    try:
        sums = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in read.items()}
        same = read == {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sums.items()}
        if not same or not all(type(size) is int and Path(name).name == name for name, (size, _) in sums.items()):
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Damaged(folder / SUMS, "is damaged: it does not hold the sums of files") from error
    return sums


def check_files(folder: Path) -> None:
    """Sees quickly, by sizes alone, that all files of a checkpoint are there; Damaged if not."""
    sums = _sums(folder)
    if sums is None:
        for tree in TREES:
            size_of(folder / f"{tree}.json")
        return
    if "state.json" not in sums:
        raise Damaged(folder / SUMS, "is damaged: it does not name state.json")
    for name, (expected, _) in sums.items():
        if (found := size_of(folder / name)) != expected:
            raise Damaged(folder / name, f"is damaged: it has {found:,} bytes, and {expected:,} were written")


def verify(folder: Path, *trees: str) -> None:
    """Compares the files of these trees, or all of a checkpoint, with their sums, if there are any; Damaged if not."""
    sums = _sums(folder)
    if sums is None:
        return
    wanted = [f"{tree}.{suffix}" for tree in trees for suffix in ("json", "safetensors")] if trees else list(sums)
    if trees and trees != ("state",):  # which has no tensors
        wanted += [path.name for path in sorted(folder.glob("shard-*"))]
        wanted += [name for name in sums if SHARD.fullmatch(name) and name not in wanted]
    for name in wanted:
        if name not in sums:
            if name.endswith(".json") or os.path.lexists(folder / name):
                raise Damaged(folder / name, f"is no file of this checkpoint: {SUMS} does not name it")
        elif sum_of(folder / name) != sums[name][1]:
            raise Damaged(folder / name, f"is damaged: it is not what was written (its sha256 is not that of {SUMS})")


def write_text(path: Path, text: str) -> None:
    """Replaces a file by one with this content, all at once; WriteError where the disk refuses."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def checkpoint_name(number: int, stage: str, step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"{number:02d}_{stage}_{step:08d}"


def parse_name(name: str) -> tuple[int, str, int] | None:
    """Number and name of the stage, and the step, of a checkpoint's name; None for any other name."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    parts = int(found[1]), found[2], int(found[3])
    return parts if checkpoint_name(*parts) == name else None


def is_own_name(name: str) -> bool:
    """Whether a name in a run's `checkpoints` is one that runs give: a checkpoint's, finished or not or set aside."""
    return parse_name(re.sub(r"\.set-aside-[0-9]+$|-old$", "", name.removeprefix(_TEMPORARY))) is not None


class Checkpoints:
    """The checkpoints of one run, of which the newest `keep` stay.

    Only folders with a checkpoint's name, STAGE-NUMBER_STAGE-NAME_STEP, that hold one are looked at, and only those
    whose files are all there count; whatever else lies beside them stays as it is.

    Args:
        say: tells the user what was set aside.
    """

    def __init__(self, folder: Path, keep: int, say: Callable[[str], object] = click.echo) -> None:
        self.folder, self._keep, self._say = folder, keep, say

    def save(self, name: str, trees: Mapping[str, Any]) -> Path:
        """Writes a checkpoint, then removes what is older than the newest `keep`.

        A run that went on from an earlier one, perhaps because a later one is damaged, finds those of its first way
        here: they are set aside under another name, neither lost nor taken for the newest.
        """
        temporary = self.begin(name)
        for tree_name, tree in trees.items():
            save_tree(temporary, tree_name, tree)
        write_sums(temporary)
        return self.finish(name)

    def begin(self, name: str) -> Path:
        """The folder in which a checkpoint is written before it gets its name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.remove_leftovers()
        temporary = self.folder / f"{_TEMPORARY}{name}"
        if os.path.lexists(temporary):  # no leftover of ours
            self._set_aside(temporary, f"{temporary} was there already")
        temporary.mkdir()
        return temporary

    def finish(self, name: str) -> Path:
        """Gives a checkpoint, of which all is written, its name, and removes what is older than the newest `keep`."""
        temporary, final = self.folder / f"{_TEMPORARY}{name}", self.folder / name
        sync(temporary)
        for other in [path for path in self.there() if _progress(path) > _progress(final)]:
            self._set_aside(other, f"{other} is of a way not taken")
        if os.path.lexists(final):
            self._set_aside(final, f"{final} was there already")
        temporary.rename(final)
        sync(self.folder)
        for old in self.all()[: -self._keep]:
            self._remove(old)
        return final

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return [path for path in self.there() if _is_complete(path)]

    def there(self) -> list[Path]:
        """All checkpoints, complete or not, oldest first."""
        try:
            found = list(self.folder.iterdir()) if os.path.isdir(self.folder) else []
            return sorted(filter(_is_checkpoint, found), key=_progress)
        except OSError as error:
            raise UserError(f"cannot read {self.folder}: {error.strerror}") from error

    def give_names(self) -> None:
        """What was written whole, when a crash came before its name, gets it."""
        for path in sorted(self.folder.glob(f"{_TEMPORARY}*")):
            name = path.name.removeprefix(_TEMPORARY)
            if path.is_symlink() or not parse_name(name) or os.path.lexists(self.folder / name):
                continue
            if _is_complete(path) and _is_of(path, name):
                path.rename(self.folder / name)
                sync(self.folder)

    def remove_leftovers(self) -> None:
        """Removes what a crash left half written or half deleted; what was written whole gets its name."""
        self.give_names()
        for path in sorted(self.folder.glob(f"{_TEMPORARY}*")):
            name = path.name.removeprefix(_TEMPORARY)
            if not path.is_dir() or path.is_symlink():
                continue
            if parse_name(name.removesuffix("-old")) and name.endswith("-old"):
                self._delete(path)
            elif parse_name(name):
                shutil.rmtree(path)

    def _remove(self, path: Path) -> None:
        # Out of sight first: a checkpoint that is being deleted must not look like one.
        doomed = path.with_name(f"{_TEMPORARY}{path.name}-old")
        if os.path.lexists(doomed):  # no leftover of ours
            self._set_aside(doomed, f"{doomed} was there already")
        path.rename(doomed)
        self._delete(doomed)

    def _delete(self, doomed: Path) -> None:
        """Deletes a checkpoint's own files, sums last, as they say which those are; anything else is set aside."""
        try:
            own = list(_sums(doomed) or ())
        except Damaged:
            own = []
        for name in [*(own or [f"{tree}.{suffix}" for tree in TREES for suffix in ("json", "safetensors")]), SUMS]:
            if not (doomed / name).is_dir() or (doomed / name).is_symlink():
                (doomed / name).unlink(missing_ok=True)
        if any(doomed.iterdir()):
            name = doomed.name.removeprefix(_TEMPORARY).removesuffix("-old")
            self._set_aside(doomed, f"{self.folder / name} is removed, but held more than a checkpoint")
        else:
            doomed.rmdir()

    def _set_aside(self, path: Path, what: str) -> None:
        name = path.name.removeprefix(_TEMPORARY).removesuffix("-old")
        aside = next(new for k in count(1) if not os.path.lexists(new := path.with_name(f"{name}.set-aside-{k}")))
        with disk_errors(aside):
            path.rename(aside)
        self._say(f"{what}: it is {aside.name} now, and stays until you remove it")


def _is_of(folder: Path, name: str) -> bool:
    """Whether what was written to a folder, sums and all, is the checkpoint of this name."""
    try:
        state = read_json(folder / "state.json")
        return os.path.lexists(folder / SUMS) and name == checkpoint_name(*(state[key] for key in STATE_NAMES))
    except (Damaged, KeyError, TypeError, ValueError):
        return False


def _progress(path: Path) -> tuple[int, int]:
    """Stage and step of a checkpoint, by its name."""
    parts = parse_name(path.name)
    assert parts is not None, path
    return parts[0], parts[2]


def _is_checkpoint(path: Path) -> bool:
    """Whether there is a checkpoint, complete or not: a folder by its name that holds a state or sums."""
    if parse_name(path.name) is None or path.is_symlink() or not os.path.isdir(path):
        return False
    return any(os.path.lexists(path / file) for file in ("state.json", SUMS))


def _is_complete(path: Path) -> bool:
    try:
        check_files(path)
    except Damaged:
        return False
    return True


class NoCheckpoint(UserError):
    """There is a folder, but no checkpoint in it."""


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest one of a run's folder.

    Raises:
        NoCheckpoint: there is none in the folder.
        Damaged: not all of its files are there.
        UserError: there is no such folder.
    """
    if path.name.startswith(_TEMPORARY):
        raise UserError(f"{path} was never finished: the run was stopped while it was written; choose another one")
    if not os.path.isdir(path):
        raise UserError(f"no checkpoint at {path}: there is no such folder")
    if not os.path.isdir(path / "checkpoints") and (
        parse_name(path.name) or any(os.path.lexists(path / file) for file in ("state.json", SUMS))
    ):
        found = path
    elif there := Checkpoints(path / "checkpoints", keep=1).there():
        found = there[-1]
    else:
        raise NoCheckpoint(
            f"no checkpoint in {path}: neither state.json nor a checkpoints folder with a complete one in it"
        )
    check_files(found)
    return found


def newest_whole(folder: Path, but: Path) -> Path | None:
    """The newest checkpoint beside others in `folder` whose files are all as they were written, except `but`."""
    for path in reversed(Checkpoints(folder, keep=1).all()):
        try:
            if not (path.name == but.name and path.parent.resolve() == but.parent.resolve()):
                verify(path, *TREES)
                for tree in TREES if not os.path.lexists(path / SUMS) else ():  # what has no sums is read
                    load_tree(path, tree)
                return path
        except Damaged:
            continue
    return None
