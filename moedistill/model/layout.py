"""What stored samples must look like to fit a model: known from its config, without loading it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from moedistill.model.conditioning import Conditioning

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
        padded: whether a smaller first size is made up with zeros, as the model's own pipeline does it.
        masks: of a mask: the name of the text whose tokens it counts, and whose length it must have.
        droppable: whether the null condition takes it from the negative prompt; else it stays as it is.
        required: whether a sample must have it.
        frame_axis: where its latent frames are, without the batch dimension; None where it has none.
        whole: whether its numbers are whole ones, such as a class, or tokens of a text that the network embeds itself.
        may_be_empty: of a mask: whether no token at all may count, which makes the attention of some models NaN.
    """

    role: Role
    shape: tuple[int | None, ...]
    any_length: bool = False
    padded: bool = False
    masks: str | None = None
    droppable: bool = True
    required: bool = True
    frame_axis: int | None = None
    whole: bool = False
    may_be_empty: bool = False

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of `shape`, without its batch dimension, is what the model takes."""
        if self.padded and shape and self.shape[0] is not None:
            shape = (max(shape[0], self.shape[0]), *shape[1:])
        wanted = self._wanted()
        return len(shape) == len(wanted) and all(w in (None, s) for w, s in zip(wanted, shape, strict=True))

    def pattern(self) -> str:
        """The shape for people: `[any, 4096]`."""
        first, *rest = ("any" if size is None else str(size) for size in self._wanted()) if self.shape else ("",)
        return f"[{', '.join([f'up to {first}' if self.padded else first, *rest])}]"

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

    def latent_problems(self, latents: Sequence[int]) -> Iterator[str]:
        """What keeps latents of this shape (C, T, H, W) from being used, to follow "sample 3"; nothing if they fit.

        The number of latent frames is not looked at: stages cut it.
        """
        channels, _, *size = latents
        if channels != self.channels:
            yield f"has latents {list(latents)}; the model's have {self.channels} channels"
        if any(length % multiple for length, multiple in zip(size, self.multiple[1:], strict=True)):
            yield f"has latents {list(latents)}: (T, H, W) must be multiples of {self.multiple}"

    def conditioning_problems(self, cond: "Conditioning", latents: Sequence[int] | None = None) -> Iterator[str]:
        """What keeps unpacked conditioning from being used, told by shapes and dtypes alone; to follow "sample 3".

        Args:
            cond: batch first; may be on the meta device.
            latents: shape of the sample's latents; None for a negative prompt, which has what is droppable alone.
        """
        for name, each in self.conditioning.items():
            if name not in cond:
                if each.required and (latents is not None or each.droppable):
                    yield f"has no {name}, which the model takes; encode it and store it"
                continue
            if latents is None and not each.droppable:
                continue
            shape, text = tuple(cond[name].shape[1:]), cond.get(each.masks or "")
            if not each.fits(shape):
                yield f"has {name} {list(shape)}; the model takes {each.pattern()}"
            elif each.role not in ("mask", "scalar") and not each.whole and not cond[name].is_floating_point():
                yield f"has {name} of {cond[name].dtype}; the model takes floating-point numbers"
            elif each.whole and cond[name].is_floating_point():
                yield f"has {name} of {cond[name].dtype}; the model takes whole numbers"
            elif each.role == "video" and latents is not None and not _same_grid(shape, latents):
                yield f"has {name} {list(shape)} for latents {list(latents)}; (T, H, W) must be the same"
            elif text is not None and text.ndim > 1 and shape[0] != text.shape[1]:
                tokens = f"{text.shape[1]} tokens of {each.masks}"
                yield f"has {name} with {shape[0]} places for {tokens}; encode both at once"


def _same_grid(video: Sequence[int], latents: Sequence[int]) -> bool:
    """Whether (T, H, W) are the same; a sample of text alone has no frames, and may be for any number."""
    return tuple(video[2:]) == tuple(latents[2:]) and latents[1] in (0, video[1])


def mask_fault(mask: "Tensor", *, may_be_empty: bool = False) -> tuple[int, str] | None:
    """The first row of masks `[B, L]` that is none, and why; None if all are: ones for a text, then zeros."""
    kept = mask.bool()
    faults = {
        "has other numbers than 0 and 1": ~((mask == 0) | (mask == 1)).all(1),
        "has ones after zeros: the text must come first, and padding last": (kept[:, 1:] & ~kept[:, :-1]).any(1),
    }
    if not may_be_empty:
        faults[
            'is all false, and attention to no token is NaN; for no text store what the prompt "" is encoded to, whose '
            "mask is not empty"
        ] = ~kept.any(1)
    found = [(int(rows.nonzero()[0]), reason) for reason, rows in faults.items() if rows.any()]
    return min(found, key=lambda fault: fault[0], default=None)
