"""Latents and text embeddings that were computed before: published preprocessed sets, and a layout of our own.

Both hold what the VAE and the text encoders gave, unscaled; `Backbone.prepare` scales latents and unpacks text.

The published layout is a `videos2caption.json`, a list of entries with `latent_path`, `prompt_embed_path` and
`prompt_attention_mask` (names of `.pt` files in the folders `latent/`, `prompt_embed/` and `prompt_attention_mask/`
beside it) and `caption`. Our own, which `write_latents` makes, is a folder with an `index.json` and one safetensors
file for each sample, with `latents` `[C, T, H, W]` and every conditioning tensor by its name.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from moedistill.components.fields import NonEmptyStr
from moedistill.data.base import Dataset, DatasetConfig, Sample
from moedistill.errors import shorten
from moedistill.model import conditioning
from moedistill.runtime.checkpoint import save_tensors, write_text
from moedistill.runtime.randomness import Draws
from moedistill.runtime.reading import LARGEST_INDEX, check_file, read_text, reason
from moedistill.runtime.signals import Interruption
from moedistill.runtime.writing import disk_errors, sync

if TYPE_CHECKING:
    from moedistill.model.backbone import Backbone

PUBLISHED_INDEX = "videos2caption.json"
INDEX = "index.json"
FORMAT = "moedistill-latents"
VERSION = 1
LATENTS = "latents"

SYNTHETIC_SAMPLES = 8

TEXT_FILES = {
    "prompt_embeds": ("prompt_embed_path", "prompt_embed"),
    "prompt_attention_mask": ("prompt_attention_mask", "prompt_attention_mask"),
}
"""Of each conditioning tensor of a published set: the entry's key with its file name, and the folder it lies in."""

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {
    **FLOATS, "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64,
}  # fmt: skip
"""What tensors may be stored in, by safetensors' names."""

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


class _Unusable(ValueError):
    """Why a stored tensor cannot be used."""


# -- where samples are stored -----------------------------------------------------------------------------------------


class Store(ABC):
    """Stored samples by index, read on demand. Whatever is wrong with one is a `SampleError`.

    Attributes:
        index: the index file.
        layout: its kind, for people.
        masks: names of the conditioning tensors that say which tokens of a text count, as far as the layout says so.
    """

    layout: str
    masks: Sequence[str] = ()

    def __init__(self, index: Path, entries: Sequence[Any]) -> None:
        self.index, self._entries = index, entries

    def __len__(self) -> int:
        return len(self._entries)

    @abstractmethod
    def files(self, i: int) -> list[Path]:
        """All files of a sample, the latents' first."""

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
        problem = _misshapen(latents.shape, latents.dtype)
        if problem:
            raise self._error(i, problem, file)
        return latents

    def _error(self, i: int, reason: str, file: Path | None = None) -> SampleError:
        return SampleError(f"sample {i}", file or self.index, reason)

    @contextmanager
    def _reading(self, i: int | None, file: Path) -> Iterator[None]:
        sample = "the negative prompt" if i is None else f"sample {i}"
        try:
            check_file(file)
            yield
        except SampleError:
            raise
        except _Unusable as error:
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
        return [self._latents_file(i), *self._text_files(i).values()]

    def has_text(self, i: int) -> bool:
        return "prompt_embeds" in self._text_files(i)

    def shape(self, i: int) -> tuple[int, ...]:
        return tuple(self._latents(i, mmap=True).shape)

    def header(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self._load(i, mmap=True)

    def read(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self._load(i, mmap=False)

    def _load(self, i: int, *, mmap: bool) -> tuple[Tensor, dict[str, Tensor]]:
        latents = self._latents(i, mmap=mmap)
        files = self._text_files(i) if self.has_text(i) else {}
        return latents, {name: self._tensor(i, name, file, mmap=mmap) for name, file in files.items()}

    def _latents(self, i: int, *, mmap: bool) -> Tensor:
        file = self._latents_file(i)
        return self._checked(i, file, self._tensor(i, LATENTS, file, mmap=mmap))

    def _tensor(self, i: int, name: str, file: Path, *, mmap: bool) -> Tensor:
        with self._reading(i, file):
            value = _load_pt(file, mmap=mmap)
            _check_usable(name, value)
            _check_stored(name, value)
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
    """What `write_latents` wrote."""

    layout = "moedistill"

    def __init__(self, index: Path, entries: Sequence[Any], negative: str | None) -> None:
        super().__init__(index, entries)
        self._negative = None if negative is None else index.parent / negative

    def files(self, i: int) -> list[Path]:
        return [self._file(i, "file", self.index.parent)]

    def has_text(self, i: int) -> bool:
        [file] = self.files(i)
        with self._reading(i, file), safe_open(file, "pt") as tensors:
            return any(name != LATENTS for name in tensors.keys())  # noqa: SIM118 (it is no mapping)

    def shape(self, i: int) -> tuple[int, ...]:
        shape = self._value(i, "shape")
        if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
            raise self._error(i, f"has shape: {shorten(repr(shape), 60)}, which must be a list of four sizes")
        shape = shape[1:] if len(shape) == 5 and shape[0] == 1 else shape
        problem = _misshapen(shape)
        if problem:
            raise self._error(i, problem)
        return tuple(shape)

    def header(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self._load(i, _map_safetensors)

    def read(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self._load(i, _load_safetensors)

    def _load(self, i: int, load: Callable[[Path], dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        [file] = self.files(i)
        with self._reading(i, file):
            tensors = load(file)
        if LATENTS not in tensors:
            raise self._error(i, f"has no tensor {LATENTS!r}", file)
        latents = self._checked(i, file, tensors.pop(LATENTS))
        if tuple(latents.shape) != self.shape(i):
            problem = f"has latents {list(latents.shape)}, but the index says {list(self.shape(i))}"
            raise self._error(i, problem, file)
        return latents, tensors

    def negative(self) -> dict[str, Tensor] | None:
        if self._negative is None:
            return None
        with self._reading(None, self._negative):
            return _load_safetensors(self._negative)

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
        store = OwnStore(index, *_own_index(index, content))
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
        hint = f"; its {INDEX} is written last: let what makes the set run to its end" if unfinished else ""
        raise ValueError(f"{path} holds neither {PUBLISHED_INDEX} nor {INDEX}{hint}")
    return found[0]


def _own_index(index: Path, content: Any) -> tuple[list[Any], str | None]:
    """Entries, and the file of the negative prompt."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(
            f"{index} is neither a list of samples, as {PUBLISHED_INDEX}, nor an index with format: {FORMAT}"
        )
    if content.get("version") != VERSION:
        raise ValueError(f"{index} has version {content.get('version')!r}, this moedistill reads {VERSION}; update it")
    samples, negative = content.get("samples"), content.get("negative")
    if not isinstance(samples, list) or not (negative is None or (isinstance(negative, str) and negative)):
        raise ValueError(f"{index}: samples must be a list, and negative a file's name or null; make the set again")
    return samples, negative


def _misshapen(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> str:
    """What is wrong with latents; nothing, if nothing is."""
    if len(shape) != 4 or 0 in shape:
        return f"has latents {list(shape)}, which must be [C, T, H, W]"
    return "" if dtype.is_floating_point else f"has latents of {dtype}, which must be floating-point numbers"


def _load_pt(file: Path, *, mmap: bool = False) -> Tensor:
    """The one tensor in a `.pt` file, on the CPU; with `mmap` its numbers are not read, if its format allows that."""
    try:
        value = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except RuntimeError as error:
        if not mmap or "mmap can only be used" not in str(error):
            raise
        value = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(value, Tensor):
        raise TypeError(f"it holds a {type(value).__name__}, not a tensor")
    return value.detach()


def _load_safetensors(file: Path) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in _map_safetensors(file).items()}


def _map_safetensors(file: Path) -> dict[str, Tensor]:
    """The file's tensors, mapped: what is not used of them is not read. _Unusable for a dtype that is not taken."""
    with safe_open(file, "pt") as tensors:
        names = list(tensors.keys())
        for name in names:
            if (dtype := tensors.get_slice(name).get_dtype()) not in DTYPES:
                raise _Unusable(_other_dtype(name, dtype))
        return {name: tensors.get_tensor(name) for name in names}


def _check_usable(name: str, value: Tensor) -> None:
    """_Unusable for a tensor that is not plain numbers, as one out of a `.pt` file may be."""
    if value.layout != torch.strided or value.is_nested:
        raise _Unusable(f"has {name} that are sparse or nested; store a dense tensor")
    if value.device.type == "meta":
        raise _Unusable(f"has {name} {list(value.shape)} without numbers (a meta tensor); make it again")
    if value.dtype not in DTYPES.values():
        raise _Unusable(_other_dtype(name, str(value.dtype)))


def _check_stored(name: str, value: Tensor) -> None:
    """_Unusable for a tensor that is larger than what its file holds."""
    stored, claimed = value.untyped_storage().nbytes(), value.numel() * value.element_size()
    if claimed > stored:
        raise _Unusable(
            f"has {name} {list(value.shape)}, {claimed:,} bytes, of which {stored:,} are stored (an expanded tensor); "
            "store a contiguous copy"
        )


def _other_dtype(name: str, dtype: str) -> str:
    wanted = ", ".join(str(one).removeprefix("torch.") for one in FLOATS.values())
    return f"has {shorten(name, 60)} of {dtype}; it must be of {wanted}, or of whole numbers"


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
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if (folder / INDEX).exists():
        raise ValueError(f"{folder} holds a set already; choose another folder, or remove its {INDEX}")
    entries = []
    for i, (sample, caption) in enumerate(zip_longest(samples, captions or (), fillvalue=None)):
        if sample is None or (captions is not None and caption is None):
            raise ValueError(f"sample {i} has no {'latents' if sample is None else 'caption'}: give one for each")
        problem = _misshapen(sample.latents.shape, sample.latents.dtype)
        if not problem and LATENTS in sample.conditioning:
            problem = f"has a conditioning tensor {LATENTS!r}, the name of the latents; choose another"
        if not problem and not sample.conditioning and caption is None:
            problem = "has neither conditioning nor a caption; give one of them"
        problem = problem or _unlearnable({**sample.conditioning, LATENTS: sample.latents})
        if problem:
            raise ValueError(f"sample {i} {problem}")
        entry = {"file": f"{i:08}.safetensors", "shape": list(sample.latents.shape)}
        _write_safetensors(folder / str(entry["file"]), {LATENTS: sample.latents, **sample.conditioning})
        entries.append(entry if caption is None else {**entry, "caption": caption})
    if not entries:
        raise ValueError(f"there are no samples to write to {folder}")
    name = None
    if negative is not None:
        name = "negative.safetensors"
        _write_safetensors(folder / name, negative)
    sync(folder)
    index = {"format": FORMAT, "version": VERSION, "samples": entries, "negative": name}
    write_text(folder / INDEX, json.dumps(index, indent=1, ensure_ascii=False))


def _unlearnable(tensors: Mapping[str, Tensor]) -> str:
    """Why a sample cannot be learned from; nothing, if it can."""
    try:
        for name, value in tensors.items():
            _check_usable(name, value)
    except _Unusable as error:
        return str(error)
    return next((f"has {name} that are {reason}" for name, reason in bad_numbers(tensors)), "")


def _write_safetensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    # Clones: what is a view of something larger, or of the same tensor as another, cannot be saved.
    save_tensors(file, {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()})
    sync(file)


# -- datasets ---------------------------------------------------------------------------------------------------------


class LatentsDataset(Dataset):
    """Stored samples: latents as float32, conditioning as it is stored. Captions without it are encoded here, once.

    Raises:
        ValueError: an entry of the index is broken, a file is missing, or a caption cannot be encoded.
    """

    def __init__(self, store: Store, backbone: "Backbone") -> None:
        self._store, self._unpack = store, backbone.unpack
        self._shapes: dict[int, tuple[int, ...]] = {}
        captions = [_caption_to_encode(store, i) for i in range(len(store))]
        self._captions = {i: caption for i, caption in enumerate(captions) if caption is not None}
        self._encoded = _encode(backbone, list(dict.fromkeys(self._captions.values())))
        self._negative = store.negative()

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: int) -> Sample:
        latents, cond = self._store.read(index)
        latents = latents.float()
        for name, fault in bad_numbers({LATENTS: latents, **cond}):
            raise SampleError(f"sample {index}", self._store.files(index)[0], f"has {name} that are {fault}")
        if index in self._captions:
            return Sample(latents, self._encoded[self._captions[index]])
        # Here, not in `prepare`: what is padded to one length can be batched.
        batch = self._unpack({name: value[None] for name, value in cond.items()})
        return Sample(latents, {name: value[0] for name, value in batch.items()})

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


def bad_numbers(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Which of a sample's tensors cannot be learned from, and why."""
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            yield name, "NaN or infinite"
        elif name == LATENTS and not value.any():
            yield name, "all zero, which is no video"


def _caption_to_encode(store: Store, i: int) -> str | None:
    """The caption of a sample that has no conditioning; None if it has. Its files are there."""
    for file in store.files(i):
        if reason := absent(file):
            raise SampleError(f"sample {i}", file, reason)
    caption = store.caption(i)
    if store.has_text(i):
        return None
    if caption is None:
        raise SampleError(f"sample {i}", store.files(i)[0], "has neither stored text embeddings nor a caption")
    return caption


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
        return SyntheticDataset(backbone) if self.path is None else LatentsDataset(open_store(self.path), backbone)

    def look_ahead(self) -> None:
        if self.path is not None:
            open_store(self.path)

    def tiny(self) -> "LatentsConfig":
        return self.replace(path=None)
