"""Metrics of the digits task. "Real videos" are those of the `reference` split, which no network has been trained on.

`features` is public for whoever needs more than the number: `frechet_distance(features(videos), real_features())`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moedistill import Coverage, Density, Metric, MetricConfig, MetricInputs, edge_energy, frechet_distance, unrest
from moedistill_digits.classifier import APPEARANCE, DigitsClassifier
from moedistill_digits.data import CANVAS, DIRECTIONS, FRAMES, NULL_DIGIT, NULL_DIRECTION, STARTS, load_styles, render

FEATURE_SCALE = 10.0
"""Features are multiplied by this, so that distances (which are squared) come out between 1 and some hundreds."""
APPEARANCE_PART, MOTION_PART = slice(APPEARANCE), slice(APPEARANCE, None)
"""Where the features are of what is in the frames, and of how it moves."""
_BATCH = 256


@cache
def real_videos() -> Tensor:
    """Every style of the `reference` split on two of the 12 paths, each path as often as the others.

    Returns:
        Videos `[1392, 1, 8, 24, 24]`.
    """
    styles, _ = load_styles("reference")
    paths = [(direction, start) for direction in range(len(DIRECTIONS)) for start in range(STARTS)]
    turns = len(paths) // 2
    return torch.cat([render(styles[turn % turns :: turns], *path) for turn, path in enumerate(paths)])


@torch.no_grad()
def features(videos: Tensor) -> Tensor:
    """The classifier's penultimate features, float64 `[N, 64]`, of videos `[N, 1, 8, 24, 24]` in [0, 1].

    The first 48 see the appearance, the last 16 the motion.
    """
    if tuple(videos.shape[1:]) != (1, FRAMES, CANVAS, CANVAS):
        raise ValueError(f"videos {list(videos.shape)}: the digits metrics take [N, 1, {FRAMES}, {CANVAS}, {CANVAS}]")
    classifier = DigitsClassifier.load()
    batches = [classifier.features(batch.float().cpu()) for batch in videos.split(_BATCH)]
    return FEATURE_SCALE * torch.cat(batches).double()


def _features_of(inputs: MetricInputs) -> Tensor:
    """`features` of the samples, once for all metrics."""
    if "digits.features" not in inputs.shared:
        inputs.shared["digits.features"] = features(inputs.videos)
    return inputs.shared["digits.features"]


@cache
def real_features() -> Tensor:
    """Features of the real videos, float64 `[1392, 64]`."""
    return features(real_videos())


class Frechet(Metric):
    """Fréchet distance between features of the samples, which are the rows, and of real videos; lower is better.

    Args:
        part: which of the 64 features count.
    """

    def __init__(self, part: slice) -> None:
        self.part = part

    def rows(self, inputs: MetricInputs) -> Tensor:
        return _features_of(inputs)[:, self.part]

    def value(self, rows: Tensor) -> float:
        return frechet_distance(rows, real_features()[:, self.part])


class Accuracy(Metric):
    """Share of the videos in which the classifier sees what was asked for; those that asked for nothing do not count.

    Rows are 1 where it does, 0 where it does not, and NaN where nothing was asked for.

    Args:
        name: of the conditioning, and of the classifier's head: `digit` or `direction`.
        part: which of the 64 features that head reads.
        null: what stands for nothing.
    """

    share: ClassVar[bool] = True

    def __init__(self, name: Literal["digit", "direction"], part: slice, null: int) -> None:
        self.name, self.part, self.null = name, part, null

    def look_ahead(self, conditioning: Mapping[str, Tensor]) -> None:
        if not (conditioning[self.name] != self.null).any():
            raise ValueError("no sample asked for anything: accuracy needs conditioning other than the null condition")

    @torch.no_grad()
    def rows(self, inputs: MetricInputs) -> Tensor:
        self.look_ahead(inputs.conditioning)
        read = (_features_of(inputs)[:, self.part] / FEATURE_SCALE).float()
        logits = getattr(DigitsClassifier.load(), self.name)(read)
        asked = inputs.conditioning[self.name].to(logits.device)
        return torch.where(asked != self.null, (logits.argmax(1) == asked).double(), torch.nan)[:, None]

    def value(self, rows: Tensor) -> float:
        return float(rows.nanmean())


def speckle(videos: Tensor) -> Tensor:
    """Mean absolute difference between each pixel and the median of the 3 × 3 pixels around it: float64 `[N]`.

    Strokes and smooth areas are close to their median, single pixels that stick out are not. Beyond the border the
    frame's edge is repeated.
    """
    frames = videos.double().flatten(1, 2)
    padded = F.pad(frames, (1, 1, 1, 1), mode="replicate")
    # Columns of three first: the median of nine is that of the highest low, the middle middle and the lowest high.
    low, middle, high = _sorted(padded[..., :-2, :], padded[..., 1:-1, :], padded[..., 2:, :])
    (_, _, low), (_, middle, _), (high, _, _) = (
        _sorted(part[..., :-2], part[..., 1:-1], part[..., 2:]) for part in (low, middle, high)
    )
    _, median, _ = _sorted(low, middle, high)
    return (frames - median).abs().flatten(1).mean(1)


def _sorted(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three tensors of equal shape, sorted element by element."""
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    return torch.minimum(low, c), torch.maximum(low, torch.minimum(high, c)), torch.maximum(high, c)


def brightness(videos: Tensor) -> Tensor:
    """Mean grey value: float64 `[N]`."""
    return videos.double().flatten(1).mean(1)


class Relative(Metric):
    """A measure of each sample over the mean of a measure of real videos.

    Args:
        measure: of videos `[N, 1, 8, 24, 24]`, one number each.
        unit: the measure of real videos that counts as 1; the same one if not given.
    """

    def __init__(self, measure: Callable[[Tensor], Tensor], unit: Callable[[Tensor], Tensor] | None = None) -> None:
        self.measure, self.unit = measure, unit or measure

    def rows(self, inputs: MetricInputs) -> Tensor:
        return (self.measure(inputs.videos) / _of_real_videos(self.unit))[:, None]


@cache
def _of_real_videos(measure: Callable[[Tensor], Tensor]) -> float:
    return float(measure(real_videos()).mean())


@dataclass(kw_only=True)
class FrechetConfig(MetricConfig):
    """Fréchet distance to real, held-out digit videos."""

    def build(self) -> Metric:
        return Frechet(slice(None))


@dataclass(kw_only=True)
class FrechetAppearanceConfig(MetricConfig):
    """Fréchet distance of the features that see what is in the frames, wherever it is."""

    def build(self) -> Metric:
        return Frechet(APPEARANCE_PART)


@dataclass(kw_only=True)
class FrechetMotionConfig(MetricConfig):
    """Fréchet distance of the features that see where something is, and when."""

    def build(self) -> Metric:
        return Frechet(MOTION_PART)


@dataclass(kw_only=True)
class DigitAccuracyConfig(MetricConfig):
    """Share of videos that show the digit asked for."""

    def build(self) -> Metric:
        return Accuracy("digit", APPEARANCE_PART, NULL_DIGIT)


@dataclass(kw_only=True)
class DirectionAccuracyConfig(MetricConfig):
    """Share of videos that move in the direction asked for."""

    def build(self) -> Metric:
        return Accuracy("direction", MOTION_PART, NULL_DIRECTION)


@dataclass(kw_only=True)
class SharpnessConfig(MetricConfig):
    """Edge energy, relative to real videos: below 1 is blurred, above 1 is speckled or too contrasty."""

    def build(self) -> Metric:
        return Relative(edge_energy)


@dataclass(kw_only=True)
class CoverageConfig(MetricConfig):
    """Share of the real, held-out videos with a sample near by, by the classifier's features."""

    def build(self) -> Metric:
        return Coverage(_features_of, real_features)


@dataclass(kw_only=True)
class DensityConfig(MetricConfig):
    """How densely the samples lie around real, held-out videos, by the classifier's features; 1 as those among them."""

    def build(self) -> Metric:
        return Density(_features_of, real_features)


@dataclass(kw_only=True)
class FlickerConfig(MetricConfig):
    """Unrest from frame to frame, relative to the brightness of real videos, whose own unrest is 0; lower is better."""

    def build(self) -> Metric:
        return Relative(unrest, unit=brightness)


@dataclass(kw_only=True)
class SpeckleConfig(MetricConfig):
    """Isolated pixels, relative to real videos, whose thin strokes count 1; above 1 is speckled, below 1 is blurred."""

    def build(self) -> Metric:
        return Relative(speckle)
