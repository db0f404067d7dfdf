"""Prompts: one a line in a text file, or what a set of stored samples has of text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from moedistill.components.fields import NonEmptyStr
from moedistill.data.base import Dataset, DatasetConfig, Sample
from moedistill.data.latents import (
    Store,
    StoredTexts,
    captions_to_encode,
    check_numbers,
    open_store,
    synthetic_conditioning,
)
from moedistill.errors import shorten
from moedistill.model import conditioning
from moedistill.runtime.reading import read_text, reason

if TYPE_CHECKING:
    from moedistill.model.backbone import Backbone


def read_prompts(path: str | Path) -> list[str]:
    """The prompts in a file, in order: its lines but blank ones and those that begin with '#'; or, of a JSON index of
    stored samples (`videos2caption.json`) or its folder, the captions.

    Raises:
        ValueError: there is no such file, it is not UTF-8, a sample has no caption, or there is no prompt in it.
    """
    path = Path(path).expanduser()
    if _is_set(path):
        return _captions(path)
    if not path.exists():
        raise ValueError(f"there is no file {path}; give a text file with one prompt per line")
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = shorten(reason(error), 120)
        raise ValueError(f"{path} cannot be read as text ({why}); give UTF-8 with one prompt per line") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise ValueError(f"{path} has no prompts; write one per line (those that begin with '#' are skipped)")
    return prompts


def _is_set(path: str | Path) -> bool:
    path = Path(path).expanduser()
    return path.is_dir() or path.suffix == ".json"


def _captions(path: Path) -> list[str]:
    store = open_store(path)
    captions = [store.caption(i) for i in range(len(store))]
    for i, caption in enumerate(captions):
        if caption is None:
            raise ValueError(f"{store.index}: sample {i} has no caption; give a file where each has one")
    return [caption for caption in captions if caption is not None]


class PromptsDataset(Dataset):
    """Conditioning alone: every sample is a video of no frames, `[C, 0, H, W]`.

    Args:
        cond: of all prompts, batch first.
        video: the (C, T, H, W) of the backbone's videos.
    """

    def __init__(self, cond: dict[str, Tensor], video: Sequence[int]) -> None:
        self._conditioning = cond
        channels, _, height, width = video
        self._no_frames = torch.empty(channels, 0, height, width)

    def __len__(self) -> int:
        return len(next(iter(self._conditioning.values())))

    def __getitem__(self, index: int) -> Sample:
        return Sample(self._no_frames, {name: value[index] for name, value in self._conditioning.items()})


class StoredPromptsDataset(Dataset):
    """The conditioning of a stored set: every sample is a video of no frames, `[C, 0, H, W]`.

    Raises:
        ValueError: an entry of the index is broken, a file is missing, or a caption cannot be encoded.
    """

    def __init__(self, store: Store, backbone: "Backbone") -> None:
        self._store, self._texts = store, StoredTexts(store, backbone)
        channels, _, height, width = backbone.latent_shape()
        self._no_frames = torch.empty(channels, 0, height, width)
        self._negative = store.negative()

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: int) -> Sample:
        stored = self._store.read_conditioning(index)
        check_numbers(self._store, index, stored)
        return Sample(self._no_frames, self._texts.of(index, stored))

    def shape(self, index: int) -> tuple[int, ...]:
        return tuple(self._no_frames.shape)

    def null_conditioning(self) -> Mapping[str, Tensor] | None:
        return self._negative


@dataclass(kw_only=True)
class PromptsConfig(DatasetConfig):
    """Prompts without videos. They can be sampled from, not trained on.

    Args:
        path: a text file with one prompt per line, which the backbone encodes when the run starts; or a set of stored
            samples, with or without latents, whose conditioning is used as it is stored, and captions are encoded where
            there is none; null for a few synthetic prompts.
    """

    path: NonEmptyStr | None
    provides: ClassVar[frozenset[str]] = frozenset({"conditioning"})

    def build(self, backbone: "Backbone") -> Dataset:
        if self.path is not None and _is_set(self.path):
            return StoredPromptsDataset(open_store(self.path), backbone)
        if self.path is None:
            cond = synthetic_conditioning(backbone)
        else:
            cond = conditioning.to(backbone.encode(read_prompts(self.path)), "cpu")
        return PromptsDataset(cond, backbone.latent_shape())

    def look_ahead(self) -> None:
        if self.path is not None and _is_set(self.path):
            captions_to_encode(open_store(self.path))
        elif self.path is not None:
            read_prompts(self.path)

    def tiny(self) -> "PromptsConfig":
        return self.replace(path=None)
