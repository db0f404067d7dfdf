"""Prompts: one a line in a text file, or the captions of a preprocessed set."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from moedistill.components.fields import NonEmptyStr
from moedistill.data.base import Dataset, DatasetConfig, Sample
from moedistill.data.latents import open_store, synthetic_conditioning
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
    if path.is_dir() or path.suffix == ".json":
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


@dataclass(kw_only=True)
class PromptsConfig(DatasetConfig):
    """Prompts without videos, encoded by the backbone when the run starts. They can be sampled from, not trained on.

    Args:
        path: a text file with one prompt per line, or a `videos2caption.json`; null for a few synthetic prompts.
    """

    path: NonEmptyStr | None
    provides: ClassVar[frozenset[str]] = frozenset({"conditioning"})

    def build(self, backbone: "Backbone") -> PromptsDataset:
        if self.path is None:
            cond = synthetic_conditioning(backbone)
        else:
            cond = conditioning.to(backbone.encode(read_prompts(self.path)), "cpu")
        return PromptsDataset(cond, backbone.latent_shape())

    def look_ahead(self) -> None:
        if self.path is not None:
            read_prompts(self.path)

    def tiny(self) -> "PromptsConfig":
        return self.replace(path=None)
