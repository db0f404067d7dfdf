"""Videos of real handwritten digits (scikit-learn's `load_digits`) that move across a small canvas and bounce.

A video is given by a style (one handwritten digit), a direction and a start position. All positions lie on a 3-pixel
lattice and the digit moves one lattice step per frame, so the videos are aligned to the codec's 6-pixel patches.

The 1,797 styles fall into three disjoint splits, fixed by their index in `load_digits`: `train` (40 of each digit, what
the generative model sees), `classifier` and `reference` (real videos for the Fréchet distance).
"""

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from annotated_types import Ge, Le, MinLen
from torch import Tensor

from moedistill import Backbone, Dataset, DatasetConfig, Sample
from moedistill_digits.codec import Codec

Split = Literal["train", "classifier", "reference"]

Condition = Literal["full", "digit", "direction", "none"]
"""What a sample's conditioning tells of its video; the rest is null."""

DIGITS = 10
DIRECTIONS = ("right", "left", "down", "up")
NULL_DIGIT = 10
NULL_DIRECTION = 4

FRAMES = 8
CANVAS = 24
DIGIT_SIZE = 12
STEP = 3
TRAIN_STYLES_PER_DIGIT = 40
LAST = (CANVAS - DIGIT_SIZE) // STEP
"""Highest lattice position: positions run from 0 to `LAST` on both axes, in units of `STEP` pixels."""

_MOVING_START = {"right": 0, "left": LAST, "down": 0, "up": LAST}
_OTHER_STARTS = (0, LAST // 2, LAST)
STARTS = len(_OTHER_STARTS)
"""Start positions per direction."""


def _resampling(size_in: int, size_out: int) -> Tensor:
    """Matrix `[size_out, size_in]` that resamples a line by Catmull-Rom splines (edges repeated)."""
    matrix = torch.zeros(size_out, size_in, dtype=torch.float64)
    for row in range(size_out):
        centre = (row + 0.5) * size_in / size_out - 0.5
        left = int(centre // 1)
        f = centre - left
        weights = (
            ((2.0 - f) * f - 1.0) * f / 2.0,
            ((3.0 * f - 5.0) * f * f + 2.0) / 2.0,
            ((4.0 - 3.0 * f) * f + 1.0) * f / 2.0,
            (f - 1.0) * f * f / 2.0,
        )
        for offset, weight in enumerate(weights):
            matrix[row, min(max(left - 1 + offset, 0), size_in - 1)] += weight
    return matrix


def _load_digits() -> tuple[Tensor, Tensor]:
    """Images `[1797, 8, 8]` float64 in [0, 1] and labels `[1797]` int64, as `load_digits` gives them.

    Read from scikit-learn's file, without importing it: that takes a second.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            'the digits data need scikit-learn, which is not installed; run: pip install "moedistill[digits]"'
        )
    file = Path(spec.submodule_search_locations[0]) / "datasets/data/digits.csv.gz"
    table = torch.from_numpy(np.loadtxt(file, delimiter=","))
    return table[:, :-1].reshape(-1, 8, 8) / 16.0, table[:, -1].long()


def split_indices(labels: Tensor, split: Split) -> Tensor:
    """Indices `[K]` into `load_digits` of the styles of a split, grouped by digit.

    `train` takes 40 members of each digit, evenly spaced in file order (which is ordered by writer), and the two other
    splits take turns in what is left.
    """
    chosen = []
    for digit in range(DIGITS):
        members = torch.nonzero(labels == digit).flatten()
        train = torch.arange(TRAIN_STYLES_PER_DIGIT) * len(members) // TRAIN_STYLES_PER_DIGIT
        rest = torch.ones(len(members), dtype=torch.bool)
        rest[train] = False
        held_out = members[rest]
        chosen.append({"train": members[train], "classifier": held_out[0::2], "reference": held_out[1::2]}[split])
    return torch.cat(chosen)


@cache
def load_styles(split: Split) -> tuple[Tensor, Tensor]:
    """The styles of a split: images `[K, 12, 12]` float32 in [0, 1] and digits `[K]` int64, grouped by digit.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    images, labels = _load_digits()
    index = split_indices(labels, split)
    matrix = _resampling(images.shape[-1], DIGIT_SIZE)
    return (matrix @ images[index] @ matrix.T).clamp(0.0, 1.0).float(), labels[index]


def positions(direction: int, start: int) -> list[tuple[int, int]]:
    """Top-left corner (row, column) in pixels in each of the 8 frames, for a direction and one of its 3 starts."""
    name = DIRECTIONS[direction]
    moving, other = _MOVING_START[name], _OTHER_STARTS[start]
    step = 1 if name in ("right", "down") else -1
    path = []
    for _ in range(FRAMES):
        row, column = (other, moving) if name in ("right", "left") else (moving, other)
        path.append((row * STEP, column * STEP))
        if not 0 <= moving + step <= LAST:
            step = -step
        moving += step
    return path


def render(styles: Tensor, direction: int, start: int) -> Tensor:
    """Videos `[K, 1, 8, 24, 24]` of styles `[K, 12, 12]` that all take the same path."""
    videos = styles.new_zeros(len(styles), 1, FRAMES, CANVAS, CANVAS)
    for frame, (row, column) in enumerate(positions(direction, start)):
        videos[:, 0, frame, row : row + DIGIT_SIZE, column : column + DIGIT_SIZE] = styles
    return videos


class DigitsDataset(Dataset):
    """All videos of the training styles as latents: every style in every direction from every start.

    Samples are ordered by condition, digit, direction, style, start. Latents are encoded once, on first use, and kept
    in memory (29 MB for all 4,800).
    """

    def __init__(
        self, styles_per_digit: int = TRAIN_STYLES_PER_DIGIT, conditions: Sequence[Condition] = ("full",)
    ) -> None:
        if not 1 <= styles_per_digit <= TRAIN_STYLES_PER_DIGIT:
            raise ValueError(f"styles_per_digit {styles_per_digit} is not in 1..{TRAIN_STYLES_PER_DIGIT}")
        self.styles_per_digit = styles_per_digit
        self.conditions = tuple(conditions)
        self.class_size = styles_per_digit * STARTS

    def __len__(self) -> int:
        return len(self.conditions) * DIGITS * len(DIRECTIONS) * self.class_size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is not in 0..{len(self) - 1}")
        group, member = divmod(index, self.class_size)
        rest, direction = divmod(group, len(DIRECTIONS))
        which, digit = divmod(rest, DIGITS)
        condition = self.conditions[which]
        conditioning = {
            "digit": torch.tensor(digit if condition in ("full", "digit") else NULL_DIGIT),
            "direction": torch.tensor(direction if condition in ("full", "direction") else NULL_DIRECTION),
        }
        return Sample(self.latents[digit, direction, member], conditioning)

    def shape(self, index: int) -> tuple[int, ...]:
        return Codec.latent_shape

    @cached_property
    def latents(self) -> Tensor:
        """All latents, float32 `[10 digits, 4 directions, styles_per_digit·3, 12, 8, 4, 4]`."""
        codec = Codec.load()
        styles, _ = load_styles("train")
        styles = styles.view(DIGITS, TRAIN_STYLES_PER_DIGIT, DIGIT_SIZE, DIGIT_SIZE)[:, : self.styles_per_digit]
        shape = (DIGITS, len(DIRECTIONS), self.styles_per_digit, STARTS, *Codec.latent_shape)
        latents = torch.empty(shape)
        for direction in range(len(DIRECTIONS)):
            for start in range(STARTS):
                videos = render(styles.flatten(0, 1), direction, start)
                latents[:, direction, :, start] = codec.encode(videos).unflatten(0, styles.shape[:2])
        return latents.flatten(2, 3)

    @cached_property
    def _half_square_norms(self) -> Tensor:
        """|x0|²/2 of every sample, `[10, 4, styles_per_digit·3]`."""
        return self.latents.flatten(3).square().sum(-1) / 2.0

    def posterior_mean(self, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """E[x0 | x_sigma = x, cond] for the uniform distribution over the samples that fit `cond`, exactly.

        With x = (1-σ)·x0 + σ·ε the weight of sample i is softmax_i(-|x - (1-σ)·x0_i|² / 2σ²). The part of the exponent
        that no sample differs in is left out: what stays is ((1-σ)·x·x0_i - (1-σ)²·|x0_i|²/2) / σ². In float32 it is
        good to about 0.03 at σ = 0.2 and 0.5 at 0.05, where the exponents of neighbours typically differ by thousands.

        Args:
            x: `[B, 12, 8, 4, 4]` float32.
            sigma: `[B]` in [0, 1]. At 0 it gives the sample nearest to x, at 1 the mean of the class.
            cond: `digit` and `direction` `[B]`; where one is null (10 and 4), all its values fit.
        """
        means = torch.empty_like(x, dtype=torch.float32)
        classes = torch.stack([cond["digit"], cond["direction"]], dim=1).cpu()
        for digit, direction in torch.unique(classes, dim=0).tolist():
            rows = torch.nonzero((classes == classes.new_tensor([digit, direction])).all(1)).flatten().to(x.device)
            digits = slice(None) if digit == NULL_DIGIT else slice(digit, digit + 1)
            directions = slice(None) if direction == NULL_DIRECTION else slice(direction, direction + 1)
            x0 = self.latents[digits, directions].flatten(3).flatten(0, 2).to(x.device)
            half_square_norms = self._half_square_norms[digits, directions].flatten().to(x.device)
            # Below 1e-4 the nearest sample has all the weight anyway, and the square stays far from float32's end.
            s = sigma[rows].float().clamp_min(1e-4)[:, None]
            products = x[rows].float().flatten(1) @ x0.T
            logits = (1.0 - s) / s.square() * (products - (1.0 - s) * half_square_norms)
            means[rows] = (logits.softmax(-1) @ x0).unflatten(1, x.shape[1:])
        return means


@dataclass(kw_only=True)
class DigitsConfig(DatasetConfig):
    """Videos of moving handwritten digits.

    Args:
        styles_per_digit: how many of the 40 handwritten training styles of each digit are used.
        conditions: what the network is told of a video: `full`, its digit and direction; only its `digit`; only its
            `direction`; or `none` of both. Every video is there once with each of these.
    """

    styles_per_digit: Annotated[int, Ge(1), Le(TRAIN_STYLES_PER_DIGIT)] = TRAIN_STYLES_PER_DIGIT
    conditions: Annotated[list[Condition], MinLen(1)] = field(default_factory=lambda: ["full"])
    provides: ClassVar[frozenset[str]] = DatasetConfig.provides | {"posterior_mean"}

    def __post_init__(self) -> None:
        if len(set(self.conditions)) != len(self.conditions):
            raise ValueError(f"conditions {', '.join(self.conditions)}: name each once")

    def build(self, backbone: Backbone) -> DigitsDataset:
        return DigitsDataset(self.styles_per_digit, self.conditions)

    def tiny(self) -> "DigitsConfig":
        return dataclasses.replace(self, styles_per_digit=min(2, self.styles_per_digit))
