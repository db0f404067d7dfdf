"""The contract of a dataset: samples by index, each a latent video with its conditioning."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moedistill.components.fields import Config, Fraction

if TYPE_CHECKING:
    from torch import Tensor

    from moedistill.model.backbone import Backbone


@dataclass
class Sample:
    """One item: latents `[C, T, H, W]` and conditioning tensors without a batch dimension.

    Of data without videos the latents have no frames, `[C, 0, H, W]`.
    """

    latents: "Tensor"
    conditioning: "Mapping[str, Tensor]"


class Dataset(ABC):
    """Samples by index. What an index gives never depends on anything else: no hidden randomness."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    def shape(self, index: int) -> tuple[int, ...]:
        """Latent shape of a sample, known without loading it; samples of equal shape are batched together."""
        return tuple(self[0].latents.shape)

    def place(self, index: int) -> str:
        """Where a sample is stored, for messages: a file's name; empty where it has none."""
        return ""

    def caption(self, index: int) -> str:
        """What a sample shows, for people; empty where it is not known."""
        return ""

    def null_conditioning(self) -> "Mapping[str, Tensor] | None":
        """The negative prompt's conditioning, stored with the data, without a batch dimension; None if it is not."""
        return None

    def posterior_mean(self, x: "Tensor", sigma: "Tensor", cond: "Mapping[str, Tensor]") -> "Tensor":
        """E[x0 | x_sigma = x, cond] `[B, C, T, H, W]`, where the data are such that it can be had in closed form."""
        raise ValueError(f"{type(self).__name__} offers no posterior mean; use target: sample")


@dataclass(kw_only=True)
class DatasetConfig(Config, ABC):
    """Recipe keys common to all datasets. `provides`: what samples have, of latents and conditioning; and
    `posterior_mean`, where the dataset offers it.

    Args:
        text_dropout: probability that a training sample's text is replaced by the negative prompt's.
    """

    text_dropout: Fraction = 0.0
    provides: ClassVar[frozenset[str]] = frozenset({"latents", "conditioning"})

    @abstractmethod
    def build(self, backbone: "Backbone") -> Dataset:
        """Opens the dataset; `backbone` encodes prompts, and says what synthetic samples must look like."""

    def look_ahead(self) -> None:
        """ValueError where what the dataset reads is not there; called before anything of weight is loaded."""

    def tiny(self) -> "DatasetConfig":
        """A small stand-in of the same layout, for miniatures of a run."""
        return self
