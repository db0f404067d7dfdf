"""Clips with captions as training data, which are encoded to a set of latents on first use."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Len

from moedistill.components.fields import NonEmptyStr, PositiveInt
from moedistill.data.base import Dataset, DatasetConfig
from moedistill.data.latents import LatentsConfig, SyntheticDataset
from moedistill.data.sources import Source, find_sources, is_prompts

if TYPE_CHECKING:
    from moedistill.model.backbone import Backbone


@dataclass(kw_only=True)
class VideosConfig(DatasetConfig):
    """Clips and their captions. They are encoded before the model is loaded, once: a later run finds the set.

    Args:
        path: a folder of clips and pictures with captions in `.txt` files beside them; a list of them (`.jsonl`, `.csv`
            or `.json`); null for a few synthetic samples.
        cache: the set's folder; null for one beside `path`, named by the model, its size and its revision.
        lengths: how many frames samples may have; a clip has the most that it fills. Null for those of the model's
            `video`.
        windows: samples of one clip, at most.
        stride: frames from the beginning of one window to that of the next; null for windows that touch.
        crop: which part stays of a clip that has not the aspect ratio of its samples.
        upscale: whether clips that are too small are enlarged; else they are left out.
        caption: of clips that have none; null leaves those out.
        path_column: of a list; null for the usual names.
        caption_column: likewise.
    """

    path: NonEmptyStr | None
    cache: NonEmptyStr | None = None
    lengths: Annotated[list[PositiveInt], Len(1)] | None = None
    windows: PositiveInt = 1
    stride: PositiveInt | None = None
    crop: Literal["center", "top", "bottom", "left", "right"] = "center"
    upscale: bool = False
    caption: NonEmptyStr | None = None
    path_column: NonEmptyStr | None = None
    caption_column: NonEmptyStr | None = None

    def build(self, backbone: "Backbone") -> Dataset:
        if self.path is None:
            return SyntheticDataset(backbone)
        raise ValueError(f"{self.path} is to be encoded first; `moedistill run` does that, or `moedistill data encode`")

    def look_ahead(self) -> None:
        if self.path is None:
            return
        if is_prompts(self.path):
            raise ValueError(f"{self.path} holds prompts; give clips, or read it by data: {{kind: prompts}}")
        self.sources()

    def tiny(self) -> "VideosConfig":
        return self.replace(path=None)

    def sources(self, without: Collection[Path] = ()) -> list[Source]:
        """The clips that are meant; see `find_sources`."""
        assert self.path is not None
        return find_sources(
            self.path, path_column=self.path_column, caption_column=self.caption_column, without=without
        )

    def encoded(self, folder: Path) -> LatentsConfig:
        """The set in `folder`, in which the clips are encoded, as a recipe names it."""
        config = LatentsConfig(path=str(folder), text_dropout=self.text_dropout)
        object.__setattr__(config, "kind", "latents")
        return config
