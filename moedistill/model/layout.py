"""What stored samples must look like to fit a model: known from its config, without loading it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["text", "mask", "pooled", "image", "video", "scalar"]
"""What a conditioning tensor is:

text: one vector for each token. mask: which tokens count, text first and padding last. pooled: one vector for the whole
text. image: one vector for each token of a picture. video: shaped like latents, such as those of given frames, and cut
and padded with them. scalar: one number for each sample, which stays in its own precision.
"""


@dataclass(frozen=True)
class Input:
    """A conditioning tensor, as a model takes it.

    Args:
        role: what it is.
        shape: without the batch dimension; of the model's own pipeline where other lengths fit too.
        any_length: whether it may have another first size than `shape` has.
        droppable: whether the null condition takes it from the negative prompt; else it stays as it is.
        required: whether a sample must have it.
        frame_axis: where its latent frames are, without the batch dimension; None where it has none.
        may_be_empty: of a mask: whether no token at all may count, which makes the attention of some models NaN.
    """

    role: Role
    shape: tuple[int | None, ...]
    any_length: bool = False
    droppable: bool = True
    required: bool = True
    frame_axis: int | None = None
    may_be_empty: bool = False

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of `shape`, without its batch dimension, is what the model takes."""
        wanted = self._wanted()
        return len(shape) == len(wanted) and all(w in (None, s) for w, s in zip(wanted, shape, strict=True))

    def pattern(self) -> str:
        """The shape for people: `[any, 4096]`."""
        return f"[{', '.join('any' if size is None else str(size) for size in self._wanted())}]"

    def _wanted(self) -> tuple[int | None, ...]:
        return (None, *self.shape[1:]) if self.any_length else self.shape


@dataclass(frozen=True)
class SampleLayout:
    """What a stored sample must look like to fit a model.

    Attributes:
        channels: of the latents.
        multiple: what the latents' (T, H, W) must be multiples of.
        conditioning: what the model takes besides, by name.
    """

    channels: int
    multiple: tuple[int, int, int]
    conditioning: Mapping[str, Input]

    def required(self) -> list[str]:
        """Names of the conditioning tensors that a sample must have."""
        return [name for name, each in self.conditioning.items() if each.required]

    def of_role(self, role: Role) -> list[str]:
        """Names of the conditioning tensors that are so."""
        return [name for name, each in self.conditioning.items() if each.role == role]
