"""Is a stored set like what its model was trained on? What is said here is likely wrong, so a run may go on with it."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moedistill.errors import counted

FAR, VERY_FAR = 0.2, 0.7
"""How far latents may be from what the VAE gives, in the logarithm of their deviation: beyond FAR they are said to be
scaled already, if that fits much better; beyond VERY_FAR, half or twice, to be wrong in any case.
"""
TOLD = 0.3
"""How far a VAE's own deviation must be from 1, in its logarithm, to tell scaled latents from unscaled ones."""
USUAL_MEAN = 0.6
"""How far from 0, in deviations, the channels' means of a small set may be: videos differ."""
SAME_PIXELS = 1.2
"""By what factor the pixels of a frame may differ among buckets of one size."""


class Spread:
    """Mean and standard deviation of each channel of all latents that were added."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self._sum = torch.zeros(channels, dtype=torch.float64)
        self._squares = torch.zeros(channels, dtype=torch.float64)

    def add(self, latents: Tensor) -> None:
        """Takes latents `[C, T, H, W]` into account, but for those with another number of channels."""
        if len(latents) != len(self._sum):
            return
        flat = latents.double().flatten(1)
        self.count += flat.shape[1]
        self._sum += flat.sum(1)
        self._squares += flat.square().sum(1)

    @property
    def mean(self) -> Tensor:
        """Of each channel, `[C]`."""
        return self._sum / self.count

    @property
    def std(self) -> Tensor:
        """Of each channel, `[C]`."""
        return (self._squares / self.count - self.mean**2).clamp(min=0).sqrt()


def spread_warning(spread: Spread, mean: Tensor, std: Tensor) -> Iterator[str]:
    """Whether latents are far from what a VAE gives, whose channels have `mean` and `std` `[C]`."""
    found = _distance((spread.mean - mean.double()) / std.double(), spread.std / std.double())
    scaled = _distance(spread.mean, spread.std)
    what = f"the latents have mean {found.mean:.3g} and deviation {found.std:.3g} a channel after scaling, not 0 and 1"
    if found.far > FAR and scaled.far < found.far / 2 and can_be_told(mean, std):
        yield f"{what}: they look scaled already; store what the VAE gives"
    elif found.far > VERY_FAR:
        yield f"{what}: they are not what this VAE gives; encode the videos with it, and store that unscaled"


def can_be_told(mean: Tensor, std: Tensor) -> bool:
    """Whether the numbers of latents show if they were scaled: whether a VAE's are far enough from 0 and 1."""
    return _distance(mean.double(), std.double()).far > TOLD


@dataclass
class _Distance:
    """Of channels' means and deviations from 0 and 1: root mean square, median, and both in one number."""

    mean: float
    std: float
    far: float


def _distance(mean: Tensor, std: Tensor) -> _Distance:
    rms, median = mean.square().mean().sqrt().item(), std.median().item()
    return _Distance(rms, median, abs(math.log(max(median, 1e-9))) + max(0.0, rms - USUAL_MEAN))


def padding_warning(name: str, kinds: Mapping[str, int]) -> Iterator[str]:
    """Texts that no mask ends, whose places after the last token hold something, and texts that are none.

    Args:
        name: of the text.
        kinds: how many end in zeros (padded), in something (unpadded), or are nothing but zeros (empty).
    """
    unpadded, empty, all_of_them = kinds.get("unpadded", 0), kinds.get("empty", 0), sum(kinds.values())
    if unpadded > all_of_them / 2:  # a text may fill all places, but most do not
        yield (
            f"{name} of {unpadded} samples, of {all_of_them} that were read, is of full length and does not end in "
            "zeros: after the last token the model expects zeros, not what its encoder makes of padding"
        )
    if empty:
        yield f"{name} of {empty} samples, of {all_of_them} that were read, is all zero: what is no text at all"


def size_warning(
    latents: Iterable[Sequence[int]], video: tuple[int, int, int], frames: Collection[int], compression: tuple[int, int]
) -> Iterator[str]:
    """Videos of other sizes than what is sampled; turned ones, of as many pixels, are right.

    Args:
        latents: shapes (C, T, H, W).
        video: what is sampled: frames, height, width.
        frames: how many latent frames that may be.
        compression: of the VAE, in time and in space.
    """
    other: Counter[str] = Counter()
    for _, t, *size in latents:
        height, width = (n * compression[1] for n in size)
        pixels = height * width / (video[1] * video[2])
        if t not in frames or not 1 / SAME_PIXELS <= pixels <= SAME_PIXELS:
            other[f"{(t - 1) * compression[0] + 1}×{height}×{width}"] += 1
    if other:
        wanted = "×".join(map(str, video))
        yield f"{other.total()} videos have not the size of backbone.video, {wanted}, that is sampled: {counted(other)}"
