"""The contract that makes one model family usable: velocity, conditioning, module names, latents.

Everything a backbone gives and takes is in flow coordinates (see `moedistill.flow`): latents `[B, C, T, H, W]`, sigma
`[B]` float32 in [0, 1], velocity = noise - x0. Native times, argument order, masks and layouts stay inside it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from moedistill.fields import Config, PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moedistill.conditioning import Conditioning


@dataclass(kw_only=True)
class Guidance:
    """How the teacher is guided.

    Args:
        mode: `none`; `classifier_free`: v = v_c + (scale - 1)·(v_c - v_u), both in one batched forward; `embedded`: the
            network takes the scale as an input.
        scale: the guidance scale; 1 means no guidance.
    """

    mode: Literal["none", "classifier_free", "embedded"] = "none"
    scale: PositiveFloat = 1.0

    def __post_init__(self) -> None:
        if self.mode == "none" and self.scale != 1.0:
            raise ValueError(f"scale {self.scale} needs a mode: classifier_free or embedded")


@dataclass(kw_only=True)
class BackboneConfig(Config, ABC):
    """Recipe keys common to all backbones. `dtype` is the dtype of frozen weights and of compute."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    guidance: Guidance = field(default_factory=Guidance)

    @abstractmethod
    def build(self, seed: int = 0) -> "Backbone":
        """Builds the backbone and loads its weights; random weights, where there are none to load, come from `seed`."""

    def tiny(self) -> "BackboneConfig":
        """The same architecture as a random miniature, for smoke runs on a CPU."""
        return self

    def native_sigmas(self) -> "Tensor | None":
        """The model's own sigma table, ascending float32, entry k for native time k; None if it has none."""
        return None


class Backbone(ABC):
    """One model family, ready to use. It holds the pretrained network and knows nothing of experts.

    Attributes:
        network: the pretrained network.
        blocks: dotted paths of the blocks whose outputs can be tapped, in order.
        hidden_size: width of a block's output.
        lora_targets: named groups of linears, each a regular expression matched against full dotted paths.
        time_dependent: exact dotted paths of the modules that depend on time (embedding, final modulation, projection).
    """

    network: "nn.Module"
    blocks: Sequence[str]
    hidden_size: int
    lora_targets: Mapping[str, str]
    time_dependent: Sequence[str]

    @abstractmethod
    def velocity(self, network: "nn.Module", x: "Tensor", sigma: "Tensor", cond: "Conditioning") -> "Tensor":
        """Velocity `[B, C, T, H, W]` of `network` (the pretrained one or a copy of it) at `sigma` `[B]`."""

    @abstractmethod
    def null_conditioning(self, cond: "Conditioning") -> "Conditioning":
        """The unconditional counterpart of `cond`: same names, shapes and dtypes."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> "Conditioning":
        """Conditioning for a list of prompts; ValueError says what a prompt may be."""

    def captions(self, cond: "Conditioning") -> list[str]:
        """A few words on each sample of `cond`, for pictures; by default its scalars by name."""
        scalars = {name: value.tolist() for name, value in cond.items() if value.ndim == 1}
        rows = zip(*scalars.values(), strict=True)
        return [" ".join(f"{name} {value}" for name, value in zip(scalars, row, strict=True)) for row in rows]

    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int, int]:
        """The (C, T, H, W) that is sampled when nothing else is asked for."""

    @abstractmethod
    def decode(self, latents: "Tensor") -> "Tensor":
        """Pixels in [0, 1], float32 `[B, C, T, H, W]` with C = 1 or 3, of latents `[B, C, T, H, W]`."""

    @abstractmethod
    def token_grid(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """The (T', H', W') of the tokens of latents of `shape` `[B, C, T, H, W]`."""

    @abstractmethod
    def unembed(
        self, network: "nn.Module", hidden: "Tensor", x: "Tensor", sigma: "Tensor", cond: "Conditioning"
    ) -> "Tensor":
        """Latents `[B, C, T, H, W]` of tapped states `[B, T'·H'·W', hidden_size]`: final norm, projection, unpatchify.

        For the last block's output it equals the network's native prediction.
        """

    def hidden(self, output: object) -> "Tensor":
        """The image tokens `[B, T'·H'·W', hidden_size]` in a block's output."""
        return output[0] if isinstance(output, tuple) else output  # type: ignore[return-value]
