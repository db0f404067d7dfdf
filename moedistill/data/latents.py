"""Latents and text embeddings that were computed before: published preprocessed sets, and a layout of our own.

Both hold what the VAE and the text encoders gave, unscaled; `Backbone.prepare` scales latents and unpacks text.

The published layout is a `videos2caption.json`, a list of entries with `latent_path`, `prompt_embed_path` and
`prompt_attention_mask` (names of `.pt` files in the folders `latent/`, `prompt_embed/` and `prompt_attention_mask/`
beside it) and `caption`. Our own, which `write_latents` makes, is a folder with an `index.json` and safetensors files
of many samples each (`writing` has it precisely), with `latents` `[C, T, H, W]` and every conditioning tensor by its
name. Of the same layout, version 1, each sample has a file of its own.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moedistill.components.fields import NonEmptyStr
from moedistill.data.base import Dataset, DatasetConfig, Sample
from moedistill.data.pieces import WORK
from moedistill.data.storable import (
    LATENTS,
    Unusable,
    bad_numbers,
    check_stored,
    check_usable,
    is_text_only,
    misshapen,
)
from moedistill.data.tensor_files import OpenFiles, TensorFile
from moedistill.data.writing import FORMAT, INDEX, VERSION, Item, write_set
from moedistill.errors import shorten
from moedistill.model import conditioning
from moedistill.runtime.randomness import Draws
from moedistill.runtime.reading import LARGEST_INDEX, check_file, read_text, reason
from moedistill.runtime.signals import Interruption

if TYPE_CHECKING:
    from moedistill.model.backbone import Backbone

PUBLISHED_INDEX = "videos2caption.json"
VERSIONS = (1, VERSION)
"""Of our own layout, that can be read."""

SYNTHETIC_SAMPLES = 8

TEXT_FILES = {
    "prompt_embeds": ("prompt_embed_path", "prompt_embed"),
    "prompt_attention_mask": ("prompt_attention_mask", "prompt_attention_mask"),
}
"""Of each conditioning tensor of a published set: the entry's key with its file name, and the folder it lies in."""

_MISSING: Any = object()


class SampleError(ValueError):
    """A stored sample that cannot be used.

    Attributes:
        file: what is wrong; for an entry that names no file, the index.
        reason: what is wrong with it.
    """

    def __init__(self, sample: str, file: Path, reason: str) -> None:
        self.file, self.reason = file, reason
        super().__init__(
            f"{sample}: {file} {reason}; get or make the file again, or take the sample out of the index "
            "(`moedistill data check PATH` lists all of them)"
        )


# -- where samples are stored -----------------------------------------------------------------------------------------


class Store(ABC):
    """Stored samples by index, read on demand. Whatever is wrong with one is a `SampleError`.

    Attributes:
        index: the index file.
        layout: its kind, for people.
        masks: names of the conditioning tensors that say which tokens of a text count, as far as the layout says so.
        text_only: whether no sample has latents: all have the shape (C, 0, H, W).
        made_for: what the set says that it was made for, as plain data; empty if it says nothing.
    """

    layout: str
    masks: Sequence[str] = ()
    text_only = False
    made_for: Mapping[str, Any] = {}

    def __init__(self, index: Path, entries: Sequence[Any]) -> None:
        self.index, self._entries = index, entries

    def __len__(self) -> int:
        return len(self._entries)

    @abstractmethod
    def files(self, i: int) -> list[Path]:
        """All files of a sample, the latents' first."""

    def place(self, i: int) -> str:
        """Where a sample is stored, for messages that do not say which one it is."""
        return str(self.files(i)[0])

    @abstractmethod
    def text_files(self, i: int) -> list[Path]:
        """Those that its conditioning lies in."""

    @abstractmethod
    def has_text(self, i: int) -> bool:
        """Whether conditioning is stored with the sample."""

    @abstractmethod
    def shape(self, i: int) -> tuple[int, ...]:
        """Shape (C, T, H, W) of a sample's latents, without reading them."""

    @abstractmethod
    def header(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """What `read` gives, as far as shapes and dtypes: its numbers are not read before they are used."""

    @abstractmethod
    def read(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents `[C, T, H, W]` and conditioning of a sample, in the dtypes they are stored in."""

    @abstractmethod
    def read_conditioning(self, i: int) -> dict[str, Tensor]:
        """Conditioning of a sample alone, in the dtypes it is stored in."""

    def negative(self) -> dict[str, Tensor] | None:
        """The negative prompt's conditioning; None if it is not stored."""
        return None

    def negative_file(self) -> Path | None:
        """Where the negative prompt's conditioning lies."""
        return None

    def caption(self, i: int) -> str | None:
        """The sample's caption, if it has one."""
        caption = self._value(i, "caption", None)
        if caption is not None and not isinstance(caption, str):
            raise self._error(i, f"has the caption {shorten(repr(caption), 60)}, which must be text")
        return caption

    def _value(self, i: int, key: str, default: Any = _MISSING) -> Any:
        entry = self._entries[i]
        if not isinstance(entry, dict):
            raise self._error(i, f"has {shorten(repr(entry), 60)} where a sample's keys must be")
        value = entry.get(key, default)
        if value is _MISSING:
            raise self._error(i, f"gives it no {key!r}")
        return value

    def _file(self, i: int, key: str, folder: Path) -> Path:
        name = self._value(i, key)
        if not isinstance(name, str) or not name or "\0" in name:
            raise self._error(i, f"has {key}: {shorten(repr(name), 60)}, which must be a file's name")
        return folder / name

    def _checked(self, i: int, file: Path, latents: Tensor) -> Tensor:
        # Some preprocessing keeps the batch dimension.
        latents = latents[0] if latents.ndim == 5 and len(latents) == 1 else latents
        problem = misshapen(latents.shape, latents.dtype)
        if problem:
            raise self._error(i, problem, file)
        return latents

    def _error(self, i: int, reason: str, file: Path | None = None) -> SampleError:
        return SampleError(f"sample {i}", file or self.index, reason)

    @contextmanager
    def _reading(self, i: int | None, file: Path) -> Iterator[None]:
        sample = "the negative prompt" if i is None else f"sample {i}"
        try:
            yield
        except SampleError:
            raise
        except Unusable as error:
            raise SampleError(sample, file, str(error)) from error
        except FileNotFoundError as error:
            raise SampleError(sample, file, absent(file)) from error
        except Exception as error:  # What a damaged file raises could be anything.
            Interruption.check()
            first = (str(error).strip().splitlines() or [""])[0]
            reason = f"cannot be read ({type(error).__name__}: {shorten(first, 120)})"
            raise SampleError(sample, file, reason) from error


class PublishedStore(Store):
    """A `videos2caption.json` and its `.pt` files."""

    layout = "published"
    masks = ("prompt_attention_mask",)

    def files(self, i: int) -> list[Path]:
        return [self._latents_file(i), *self.text_files(i)]

    def text_files(self, i: int) -> list[Path]:
        return list(self._text_files(i).values())

    def has_text(self, i: int) -> bool:
        return "prompt_embeds" in self._text_files(i)

    def shape(self, i: int) -> tuple[int, ...]:
        return tuple(self._latents(i, mmap=True).shape)

    def header(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self._load(i, mmap=True)

    def read(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self._load(i, mmap=False)

    def read_conditioning(self, i: int) -> dict[str, Tensor]:
        return self._text(i, mmap=False)

    def _load(self, i: int, *, mmap: bool) -> tuple[Tensor, dict[str, Tensor]]:
        return self._latents(i, mmap=mmap), self._text(i, mmap=mmap)

    def _text(self, i: int, *, mmap: bool) -> dict[str, Tensor]:
        files = self._text_files(i) if self.has_text(i) else {}
        return {name: self._tensor(i, name, file, mmap=mmap) for name, file in files.items()}

    def _latents(self, i: int, *, mmap: bool) -> Tensor:
        file = self._latents_file(i)
        return self._checked(i, file, self._tensor(i, LATENTS, file, mmap=mmap))

    def _tensor(self, i: int, name: str, file: Path, *, mmap: bool) -> Tensor:
        with self._reading(i, file):
            value = _load_pt(file, mmap=mmap)
            check_usable(name, value)
            check_stored(name, value)
        return value

    def _latents_file(self, i: int) -> Path:
        return self._file(i, "latent_path", self.index.parent / "latent")

    def _text_files(self, i: int) -> dict[str, Path]:
        return {
            name: self._file(i, key, self.index.parent / folder)
            for name, (key, folder) in TEXT_FILES.items()
            if self._value(i, key, None) is not None
        }


class OwnStore(Store):
    """What `write_set` wrote, or `write_latents`."""

    layout = "moedistill"

    def __init__(self, index: Path, content: Mapping[str, Any]) -> None:
        super().__init__(index, content["samples"])
        negative = content.get("negative")
        self._negative = None if negative is None else index.parent / negative
        self._files = OpenFiles()
        made_for = content.get("made_for")
        self.made_for = made_for if isinstance(made_for, dict) else {}
        self.text_only = content["version"] > 1 and all(map(_is_text_only, self._entries))

    def files(self, i: int) -> list[Path]:
        return [self._file(i, "file", self.index.parent)]

    def text_files(self, i: int) -> list[Path]:
        return self.files(i)

    def place(self, i: int) -> str:
        return super().place(i) if self._key(i) is None else f"{super().place(i)} (sample {i})"

    def has_text(self, i: int) -> bool:
        with self._opened(i) as (file, key):
            return any(name != LATENTS for name in file.names(key))

    def shape(self, i: int) -> tuple[int, ...]:
        shape = self._value(i, "shape")
        if self.text_only:
            return tuple(shape)
        if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
            raise self._error(i, f"has shape: {shorten(repr(shape), 60)}, which must be a list of four sizes")
        shape = shape[1:] if len(shape) == 5 and shape[0] == 1 else shape
        problem = misshapen(shape)
        if problem:
            raise self._error(i, problem)
        return tuple(shape)

    def header(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        with self._opened(i) as (file, key):
            tensors = file.tensors(key)
        return self._split(i, tensors)

    def read(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        with self._opened(i) as (file, key):
            tensors = {name: value.clone() for name, value in file.tensors(key).items()}
        return self._split(i, tensors)

    def read_conditioning(self, i: int) -> dict[str, Tensor]:
        with self._opened(i) as (file, key):
            return {name: value.clone() for name, value in file.tensors(key).items() if name != LATENTS}

    @contextmanager
    def _opened(self, i: int) -> Iterator[tuple[TensorFile, str | None]]:
        """The file of a sample, and the key of its tensors there."""
        [file], key = self.files(i), self._key(i)
        with self._reading(i, file):
            yield self._files.get(file), key

    def _key(self, i: int) -> str | None:
        key = self._value(i, "key", None)
        if key is not None and (not isinstance(key, str) or not key or "/" in key):
            raise self._error(i, f"has key: {shorten(repr(key), 60)}, which must be text without a slash")
        return key

    def _split(self, i: int, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents and conditioning."""
        [file], key = self.files(i), self._key(i)
        if LATENTS not in tensors and self.text_only:
            return torch.empty(self.shape(i)), tensors
        if LATENTS not in tensors:
            name = LATENTS if key is None else f"{key}/{LATENTS}"
            raise self._error(i, f"has no tensor {name!r}", file)
        latents = self._checked(i, file, tensors.pop(LATENTS))
        if tuple(latents.shape) != self.shape(i):
            problem = f"has latents {list(latents.shape)}, but the index says {list(self.shape(i))}"
            raise self._error(i, problem, file)
        return latents, tensors

    def negative(self) -> dict[str, Tensor] | None:
        if self._negative is None:
            return None
        with self._reading(None, self._negative):
            return {name: value.clone() for name, value in self._files.get(self._negative).tensors(None).items()}

    def negative_file(self) -> Path | None:
        return self._negative


def open_store(path: str | Path) -> Store:
    """The stored samples that `path` means: an index file, or a folder with one.

    Raises:
        ValueError: there is none, it cannot be read, or it holds no samples.
    """
    index = find_index(path)
    try:
        content = json.loads(read_text(index, LARGEST_INDEX))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{index} cannot be read as JSON ({shorten(reason(error), 120)}); get or make it again"
        ) from error
    if isinstance(content, list):
        store: Store = PublishedStore(index, content)
    else:
        _check_own_index(index, content)
        store = OwnStore(index, content)
    if not len(store):
        raise ValueError(f"{index} lists no samples; give a set that has some")
    return store


def find_index(path: str | Path) -> Path:
    """The index file that `path` means: itself, or the one in this folder.

    Raises:
        ValueError: there is none.
    """
    path = Path(path).expanduser()
    if path.exists() and not path.is_dir():
        return path
    if not path.is_dir():
        raise ValueError(f"there is no file or folder {path}; give a {PUBLISHED_INDEX}, or a folder with an {INDEX}")
    found = [path / name for name in (INDEX, PUBLISHED_INDEX) if (path / name).is_file()]
    if not found:
        unfinished = next(path.glob("*.safetensors"), None)
        hint = (
            f"its {INDEX} is written last: let what makes the set run to its end"
            if unfinished or (path / WORK).is_dir()
            else f"of clips, `moedistill data encode {path} SET --recipe RECIPE` makes a set"
        )
        raise ValueError(f"{path} holds neither {PUBLISHED_INDEX} nor {INDEX}; {hint}")
    return found[0]


def _check_own_index(index: Path, content: Any) -> None:
    """ValueError where it is no index of our own layout."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(
            f"{index} is neither a list of samples, as {PUBLISHED_INDEX}, nor an index with format: {FORMAT}"
        )
    if content.get("version") not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise ValueError(f"{index} has version {content.get('version')!r}, this moedistill reads {known}; update it")
    samples, negative = content.get("samples"), content.get("negative")
    if not isinstance(samples, list) or not (negative is None or (isinstance(negative, str) and negative)):
        raise ValueError(f"{index}: samples must be a list, and negative a file's name or null; make the set again")
    of_text = [i for i, entry in enumerate(samples) if content["version"] > 1 and _is_text_only(entry)]
    if of_text and len(of_text) < len(samples):
        raise ValueError(
            f"{index}: {len(of_text)} of {len(samples)} samples have no latents (the first is sample {of_text[0]}); "
            "make a set with latents, and one of texts alone"
        )


def _is_text_only(entry: Any) -> bool:
    return isinstance(entry, dict) and is_text_only(entry.get("shape"))


def _load_pt(file: Path, *, mmap: bool = False) -> Tensor:
    """The one tensor in a `.pt` file, on the CPU; with `mmap` its numbers are not read, if its format allows that."""
    check_file(file)
    try:
        value = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except RuntimeError as error:
        if not mmap or "mmap can only be used" not in str(error):
            raise
        value = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(value, Tensor):
        raise TypeError(f"it holds a {type(value).__name__}, not a tensor")
    return value.detach()


def absent(file: Path) -> str:
    """Why a file cannot be read, if it is none; nothing, if it is one."""
    try:
        return "" if file.is_file() else "is no regular file" if file.exists() else "is missing"
    except OSError as error:  # such as a name that is too long
        return f"cannot be opened ({error.strerror})"


# -- writing ----------------------------------------------------------------------------------------------------------


def write_latents(
    folder: str | Path,
    samples: Iterable[Sample],
    *,
    captions: Sequence[str] | None = None,
    negative: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a set that `data: {kind: latents}` reads. Its index comes last: a set that has one is complete.

    Args:
        folder: is made if need be.
        samples: latents as the VAE gave them, unscaled; they are taken one by one. Conditioning may be empty where
            there are captions: those are encoded when the set is used.
        captions: one for each sample.
        negative: the negative prompt's conditioning, without a batch dimension: what `Backbone.encode_negative` gives.

    Raises:
        ValueError: the folder holds a set already, or a sample is not as it must be.
    """
    folder = Path(folder)
    if (folder / INDEX).exists():
        raise ValueError(f"{folder} holds a set already; choose another folder, or remove its {INDEX}")
    write_set(folder, _items(samples, captions), negative=negative)


def _items(samples: Iterable[Sample], captions: Sequence[str] | None) -> Iterator[Item]:
    for i, (sample, caption) in enumerate(zip_longest(samples, captions or (), fillvalue=None)):
        if sample is None or (captions is not None and caption is None):
            raise ValueError(f"sample {i} has no {'latents' if sample is None else 'caption'}: give one for each")
        if LATENTS in sample.conditioning:
            raise ValueError(f"sample {i} has a conditioning tensor {LATENTS!r}, the latents' name; choose another")
        tensors = {LATENTS: sample.latents, **sample.conditioning}
        yield Item({} if caption is None else {"caption": caption}, partial(dict, tensors))


# -- datasets ---------------------------------------------------------------------------------------------------------


class StoredTexts:
    """The conditioning of stored samples as the model takes it. Captions without any are encoded here, once.

    Raises:
        ValueError: an entry of the index is broken, a file is missing, or a caption cannot be encoded.
    """

    def __init__(self, store: Store, backbone: "Backbone") -> None:
        self._store, self._unpack = store, backbone.unpack
        self._captions = captions_to_encode(store)
        self._encoded = _encode(backbone, list(dict.fromkeys(self._captions.values())))

    def of(self, i: int, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """That of sample `i`, without a batch dimension, of which `stored` was read."""
        if i in self._captions:
            return self._encoded[self._captions[i]]
        # Here, not in `prepare`: what is padded to one length can be batched.
        batch = self._unpack({name: value[None] for name, value in stored.items()})
        return {name: value[0] for name, value in batch.items()}


class LatentsDataset(Dataset):
    """Stored samples: latents as float32, conditioning as it is stored. Captions without it are encoded here, once.

    Raises:
        ValueError: an entry of the index is broken, a file is missing, or a caption cannot be encoded.
    """

    def __init__(self, store: Store, backbone: "Backbone") -> None:
        self._store = store
        self._shapes: dict[int, tuple[int, ...]] = {}
        for i in range(len(store)):
            check_files(i, store.files(i))
        self._texts = StoredTexts(store, backbone)
        self._negative = store.negative()

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: int) -> Sample:
        latents, cond = self._store.read(index)
        latents = latents.float()
        check_numbers(self._store, index, {LATENTS: latents, **cond})
        return Sample(latents, self._texts.of(index, cond))

    def shape(self, index: int) -> tuple[int, ...]:
        if index not in self._shapes:
            self._shapes[index] = self._store.shape(index)
        return self._shapes[index]

    def place(self, index: int) -> str:
        return str(self._store.files(index)[0])

    def caption(self, index: int) -> str:
        return self._store.caption(index) or ""

    def null_conditioning(self) -> Mapping[str, Tensor] | None:
        return self._negative


def check_numbers(store: Store, i: int, tensors: Mapping[str, Tensor]) -> None:
    """SampleError where a sample's tensors cannot be learned from."""
    for name, fault in bad_numbers(tensors):
        file = (store.files(i) if LATENTS in tensors else store.text_files(i))[0]
        raise SampleError(f"sample {i}", file, f"has {name} that are {fault}")


def captions_to_encode(store: Store) -> dict[int, str]:
    """By sample, the captions of those that have no conditioning; SampleError where one has neither."""
    captions = {}
    for i in range(len(store)):
        check_files(i, store.text_files(i))
        caption = store.caption(i)
        if not store.has_text(i):
            if caption is None:
                raise SampleError(f"sample {i}", store.index, "has neither stored text embeddings nor a caption")
            captions[i] = caption
    return captions


def check_files(i: int, files: Iterable[Path]) -> None:
    """SampleError where one of a sample's files is not there."""
    for file in files:
        if reason := absent(file):
            raise SampleError(f"sample {i}", file, reason)


def _encode(backbone: "Backbone", prompts: list[str]) -> dict[str, dict[str, Tensor]]:
    """Conditioning without a batch dimension, on the CPU, by prompt."""
    if not prompts:
        return {}
    batch = conditioning.to(backbone.encode(prompts), "cpu")
    return {prompt: {name: value[row] for name, value in batch.items()} for row, prompt in enumerate(prompts)}


def synthetic_conditioning(backbone: "Backbone") -> dict[str, Tensor]:
    """Conditioning of made-up prompts, batch first."""
    try:
        cond = backbone.encode([f"synthetic {i}" for i in range(SYNTHETIC_SAMPLES)])
    except ValueError:  # A model of classes takes no free text; the empty prompt is the null condition of all.
        cond = backbone.encode([""] * SYNTHETIC_SAMPLES)
    return conditioning.to(cond, "cpu")


class SyntheticDataset(Dataset):
    """Normal latents of the backbone's shape with made-up prompts, for runs that need no meaning."""

    def __init__(self, backbone: "Backbone") -> None:
        self._shape = backbone.latent_shape()
        self._conditioning = synthetic_conditioning(backbone)

    def __len__(self) -> int:
        return SYNTHETIC_SAMPLES

    def __getitem__(self, index: int) -> Sample:
        latents = Draws(0, "synthetic", 0, [index]).normal(LATENTS, self._shape)[0]
        return Sample(latents, {name: value[index] for name, value in self._conditioning.items()})

    def shape(self, index: int) -> tuple[int, ...]:
        return self._shape


@dataclass(kw_only=True)
class LatentsConfig(DatasetConfig):
    """Latents and text embeddings that were computed before.

    Args:
        path: a `videos2caption.json` of a published preprocessed set, a set that `write_latents` wrote, or a folder
            with one of them; null for a few synthetic samples.
    """

    path: NonEmptyStr | None

    def build(self, backbone: "Backbone") -> Dataset:
        return SyntheticDataset(backbone) if self.path is None else LatentsDataset(self._open(self.path), backbone)

    def look_ahead(self) -> None:
        if self.path is not None:
            self._open(self.path)

    def _open(self, path: str) -> Store:
        store = open_store(path)
        if store.text_only:
            raise ValueError(
                f"{store.index} is a set of texts alone, which cannot be trained on; give a set with latents, or read "
                "it with data: {kind: prompts}"
            )
        return store

    def tiny(self) -> "LatentsConfig":
        return self.replace(path=None)
