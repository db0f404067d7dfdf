"""Which size and length a clip is trained at: buckets under the recipe's budget of pixels, and windows of long clips.

Nothing is stretched: a clip is cropped to its bucket's aspect ratio and made smaller. What is portrait stays portrait.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moedistill.data.plausible import SAME_PIXELS
from moedistill.model.backbone import VideoSize
from moedistill.model.latent_video import LatentVideoConfig

RATIOS = (1.0, 4 / 3, 3 / 2, 16 / 9, 2.0, 21 / 9)
"""Aspect ratios for which there are buckets, lying and standing, besides the recipe's own."""
ALIKE = 0.08
"""Aspect ratios nearer to each other than this, in their logarithm, are one bucket: of many each would have few clips.
"""


@dataclass(frozen=True)
class Fit:
    """How a clip lies in a bucket.

    Args:
        height, width: of the bucket.
        scale: what the clip's sides are multiplied by; above 1 it is enlarged.
        cropped: share of its pixels that is cut away.
    """

    height: int
    width: int
    scale: float
    cropped: float


def buckets(config: LatentVideoConfig) -> list[tuple[int, int]]:
    """The sizes (height, width) of a set for a model, the recipe's own first.

    All have at most the pixels of `config.video` and nearly as many, and sides that the model takes.
    """
    video, patch = config.video, config.patch_size()
    steps = (patch[1] * config.spatial_compression, patch[2] * config.spatial_compression)
    found = [(video.height, video.width)]
    own = video.width / video.height
    for ratio in (1 / own, *(each for lying in RATIOS for each in (lying, 1 / lying))):
        size = _nearest(ratio, video.height * video.width, steps)
        alike = any(abs(math.log(size[1] / size[0] * h / w)) < ALIKE for h, w in found)
        if not alike and size[0] * size[1] * SAME_PIXELS >= video.height * video.width:
            found.append(size)
    return found


def _nearest(ratio: float, budget: int, steps: tuple[int, int]) -> tuple[int, int]:
    """The size of at most `budget` pixels whose width is nearest to `ratio` times its height, then the largest."""
    if ratio < 1 and steps[0] == steps[1]:
        width, height = _nearest(1 / ratio, budget, steps)  # what stands is as large as what lies
        return height, width
    lower = int(math.sqrt(budget / ratio)) // steps[0] * steps[0]
    sizes = [(steps[0], steps[1])]
    for height in (lower, lower + steps[0]):
        if height > 0 and (most := budget // height // steps[1] * steps[1]) > 0:
            width = min(most, max(steps[1], round(height * ratio / steps[1]) * steps[1]))
            sizes.append((height, width))
    return min(sizes, key=lambda size: (abs(math.log(size[1] / size[0] / ratio)), -size[0] * size[1]))


def fit(height: int, width: int, sizes: Sequence[tuple[int, int]], *, upscale: bool) -> Fit:
    """The bucket of which least is cropped away, of those that a clip of this size need not be enlarged for.

    Raises:
        ValueError: there is none, and `upscale` does not allow to enlarge it.
    """
    turned = [(h, w) for h, w in sizes if (height - width) * (h - w) >= 0]
    fits = [_fit(height, width, h, w) for h, w in turned or sizes]
    usable = [each for each in fits if upscale or each.scale <= 1]
    if not usable:
        least = min(fits, key=lambda each: each.scale)
        raise ValueError(
            f"is {height}×{width}, and would have to be enlarged {least.scale:.4g} times for {least.height}×"
            f"{least.width}; `upscale` allows it, a smaller backbone.video makes it needless"
        )
    return min(usable, key=lambda each: (each.cropped, -each.height * each.width))


def _fit(height: int, width: int, to_height: int, to_width: int) -> Fit:
    scale = max(to_height / height, to_width / width)
    return Fit(to_height, to_width, scale, 1 - to_height * to_width / (height * width * scale**2))


def check_lengths(config: LatentVideoConfig, lengths: Sequence[int]) -> None:
    """ValueError where the model has no videos of so many frames."""
    for length in lengths:
        try:
            config.latent_shape(VideoSize(num_frames=length, height=config.video.height, width=config.video.width))
        except ValueError as error:
            raise ValueError(f"lengths {length}: {error}") from error


def window_length(frames: int, lengths: Sequence[int]) -> int:
    """The longest of `lengths` that a clip of so many frames fills.

    Raises:
        ValueError: it fills none.
    """
    filled = [length for length in lengths if length <= frames]
    if not filled:
        one = f"has {frames} frames" if frames != 1 else "is one frame"
        raise ValueError(
            f"{one} at the rate of the set, and {min(lengths)} are wanted; `lengths` may have smaller numbers"
        )
    return max(filled)


def window_starts(frames: int, length: int, windows: int, stride: int) -> Iterator[int]:
    """The first frames of at most so many windows of a clip, `stride` frames apart, each of them filled."""
    for number in range(windows):
        if number * stride + length > frames:
            return
        yield number * stride
