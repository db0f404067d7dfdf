"""Writes a set of stored samples in our own layout: shards of tensors, and an index that comes last.

    SET/index.json                              {"format": "moedistill-latents", "version": 2, "samples": […], …}
    SET/samples-00000-1f2e3d4c5b6a.safetensors  the tensors of many samples: `0000/latents`, `0000/prompt_embeds` …
    SET/negative-6a5b4c3d2e1f.safetensors       the negative prompt's conditioning, if it is stored

Each of `samples` has the `file` it lies in, the `key` before its tensors' names, the `shape` (C, T, H, W) of its
latents, and whatever else is known of it, such as its `caption`. Samples of texts alone have no latents, and the shape
(C, 0, H, W); a set is of texts alone, or none of it is.

A shard's name carries a hash of its tensors. So a set that is written anew never writes over what the old index
names, which stays valid until the new one takes its place; and what was written before an interruption is found again.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moedistill.data.storable import LATENTS, is_text_only, misshapen, unlearnable
from moedistill.runtime.checkpoint import save_tensors, write_text
from moedistill.runtime.reading import MIB
from moedistill.runtime.signals import Interruption
from moedistill.runtime.writing import TEMPORARY, disk_errors, new_file, sync

INDEX = "index.json"
FORMAT = "moedistill-latents"
VERSION = 2

SHARD_BYTES = 512 * MIB
SHARD_SAMPLES = 256
"""The most samples in a shard. Whoever reads one sample reads the names of all first, which takes 1 ms for so many."""

OWN_NAME = re.compile(rf"({re.escape(TEMPORARY)})?(samples-\d{{5,}}|negative)-[0-9a-f]{{12}}\.safetensors")


@dataclass
class Item:
    """A sample to be written.

    Attributes:
        entry: what the index is to say of it beside `file`, `key` and `shape`: a caption, where it is from, or
            anything else that JSON can hold. A sample of text alone gives its `shape` itself, `[C, 0, H, W]`.
        load: gives its tensors by name, without a batch dimension; called once, when they are written.
    """

    entry: dict[str, Any]
    load: Callable[[], Mapping[str, Tensor]]


def write_set(
    folder: str | Path,
    items: Iterable[Item],
    *,
    negative: Mapping[str, Tensor] | None = None,
    made_for: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    shard_samples: int = SHARD_SAMPLES,
) -> None:
    """Writes a set, or writes one anew, whose files are a pure function of the items. One shard is held in memory.

    Args:
        folder: is made if need be. A set that is there stays as it was until this one is complete.
        items: taken one by one, and stored in this order.
        negative: the negative prompt's conditioning, without a batch dimension.
        made_for: what the set was made for, kept in the index.
        shard_bytes: a shard's tensors take no more, but for a larger one of a single sample.
        shard_samples: nor has a shard more samples.

    Raises:
        ValueError: a sample is not as it must be, or there is none.
        WriteError: there is no room, or the disk refuses otherwise.
    """
    folder = Path(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    for number, shard in enumerate(_shards(items, shard_bytes, shard_samples)):
        file = _write_tensors(folder, f"samples-{number:05}", shard.tensors)
        entries += [{**entry, "file": file} for entry in shard.entries]
    if not entries:
        raise ValueError(f"there are no samples to write to {folder}")
    negative_file = None if negative is None else _write_tensors(folder, "negative", copies(negative))
    sync(folder)
    index = {"format": FORMAT, "version": VERSION, "negative": negative_file}
    write_text(folder / INDEX, _index_text(index if made_for is None else {**index, "made_for": made_for}, entries))
    _remove_unnamed(folder, {negative_file, *(entry["file"] for entry in entries)})


@dataclass
class _Shard:
    entries: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    size: int = 0


def _shards(items: Iterable[Item], most_bytes: int, most_samples: int) -> Iterator[_Shard]:
    shard, has_latents = _Shard(), None
    for i, item in enumerate(items):
        tensors = item.load()
        shape = _shape(i, item.entry, tensors)
        if has_latents is None:
            has_latents = LATENTS in tensors
        elif has_latents != (LATENTS in tensors):
            here, before = ("latents", "none") if LATENTS in tensors else ("no latents", "some")
            raise ValueError(f"sample {i} has {here}, and those before have {before}: write two sets")
        size = sum(value.nbytes for value in tensors.values())
        if shard.entries and (shard.size + size > most_bytes or len(shard.entries) == most_samples):
            yield shard
            shard = _Shard()
        own = {"file": "", "key": f"{len(shard.entries):04}", "shape": shape}
        shard.entries.append({**own, **item.entry, **own})  # first in the line, whatever the entry says of them
        shard.tensors |= {f"{own['key']}/{name}": value for name, value in copies(tensors).items()}
        shard.size += size
    if shard.entries:
        yield shard


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What can be saved, as a view of something larger, or of the same tensor as another, cannot."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _shape(i: int, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """The sample's shape; ValueError where it is no sample."""
    shape: Any = list(tensors[LATENTS].shape) if LATENTS in tensors else entry.get("shape")
    if LATENTS in tensors:
        problem = misshapen(shape, tensors[LATENTS].dtype)
    else:
        rule = f"has no {LATENTS}, and the shape {shape}; that of a text alone is [C, 0, H, W]"
        problem = "" if is_text_only(shape) else rule
    if not problem and tensors.keys() <= {LATENTS} and entry.get("caption") is None:
        problem = "has neither conditioning nor a caption; give one of them"
    if problem := problem or unlearnable(tensors):
        raise ValueError(f"sample {i} {problem}")
    return shape


def _write_tensors(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> str:
    """Writes a file, if it is not there, and gives its name."""
    digest = _digest(tensors, tensors.__getitem__)
    file = folder / f"{stem}-{digest[:12]}.safetensors"
    if not is_as_named(file):
        with new_file(file) as temporary:
            save_tensors(temporary, tensors)
    return file.name


def _digest(names: Iterable[str], get: Callable[[str], Tensor]) -> str:
    """The sha256 of tensors, with their names, dtypes and shapes."""
    total = hashlib.sha256()
    for name in sorted(names):
        value = get(name)
        total.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def is_as_named(file: Path) -> bool:
    """Whether a set's file holds what its name says: all of it is read."""
    try:
        with safe_open(file, "pt") as tensors:
            return file.stem.endswith(f"-{_digest(tensors.keys(), tensors.get_tensor)[:12]}")
    except Exception:  # It is not there, or damaged, which could raise anything: what was in it is made again.
        Interruption.check()
        return False


def _index_text(head: Mapping[str, Any], entries: Iterable[Mapping[str, Any]]) -> str:
    """The index, a sample a line."""
    lines = ",\n".join(_json(entry) for entry in entries)
    return f'{_json(head)[:-1]}, "samples": [\n{lines}\n]}}\n'


def _json(value: Any) -> str:
    """In one line, with letters as they are, but for halves of letters, which a file's name may hold and UTF-8 not."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)


def _remove_unnamed(folder: Path, named: set[str | None]) -> None:
    """Removes shards of an earlier set or attempt, known by their names; never anything else."""
    for file in folder.iterdir():
        if OWN_NAME.fullmatch(file.name) and file.name not in named:
            with suppress(OSError):  # the new set is complete without
                file.unlink()
