"""Metrics of the digits task. "Real videos" are those of the `reference` split, which no network has been trained on.

`features` and `frechet_distance` are public for whoever needs more than the number, such as bootstrap intervals:
`frechet_distance(features(videos)[resampled], real_features())`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moedistill.metrics import Metric, MetricConfig, MetricInputs
from moedistill_digits.classifier import DigitsClassifier
from moedistill_digits.data import CANVAS, DIRECTIONS, FRAMES, NULL_DIGIT, NULL_DIRECTION, STARTS, load_styles, render

FEATURE_SCALE = 10.0
"""Features are multiplied by this, so that distances (which are squared) come out between 1 and some hundreds."""
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
    """The classifier's penultimate features, float64 `[N, 64]`, of videos `[N, 1, 8, 24, 24]` in [0, 1]."""
    if tuple(videos.shape[1:]) != (1, FRAMES, CANVAS, CANVAS):
        raise ValueError(f"videos {list(videos.shape)}: the digits metrics take [N, 1, {FRAMES}, {CANVAS}, {CANVAS}]")
    classifier = DigitsClassifier.load()
    batches = [classifier.features(batch.float().cpu()) for batch in videos.split(_BATCH)]
    return FEATURE_SCALE * torch.cat(batches).double()


@cache
def real_features() -> Tensor:
    """Features of the real videos, float64 `[1392, 64]`."""
    return features(real_videos())


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of features `[N, D]` (Dowson and Landau, 1982).

        |m_a - m_b|² + tr(C_a + C_b - 2·(C_a^½ C_b C_a^½)^½)

    Both roots are taken of symmetric matrices by their eigenvalues, in float64.

    Raises:
        ValueError: fewer than two samples on a side.
    """
    for side in (features_a, features_b):
        if len(side) < 2:
            raise ValueError(f"the Fréchet distance needs at least 2 samples on each side, not {len(side)}")
    mean_a, covariance_a = _moments(features_a.double())
    mean_b, covariance_b = _moments(features_b.double())
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance_a)
    root_a = (eigenvectors * eigenvalues.clamp_min(0.0).sqrt()) @ eigenvectors.T
    cross = torch.linalg.eigvalsh(root_a @ covariance_b @ root_a).clamp_min(0.0).sqrt().sum()
    squared_distance = (mean_a - mean_b).square().sum()
    distance = squared_distance + covariance_a.trace() + covariance_b.trace() - 2.0 * cross
    return max(0.0, float(distance))  # rounding can bring equal sets to -1e-5


def _moments(samples: Tensor) -> tuple[Tensor, Tensor]:
    mean = samples.mean(0)
    centred = samples - mean
    return mean, centred.T @ centred / (len(samples) - 1)


def frechet(inputs: MetricInputs) -> float:
    """Fréchet distance between the features of the samples and of real videos; lower is better."""
    return frechet_distance(features(inputs.videos), real_features())


def digit_accuracy(inputs: MetricInputs) -> float:
    """Share of the videos in which the classifier sees the digit asked for; those that asked for none do not count."""
    return _accuracy(_logits(inputs.videos)[0], inputs.conditioning["digit"], NULL_DIGIT)


def direction_accuracy(inputs: MetricInputs) -> float:
    """Share of the videos in which the classifier sees the direction asked for; those without one do not count."""
    return _accuracy(_logits(inputs.videos)[1], inputs.conditioning["direction"], NULL_DIRECTION)


@torch.no_grad()
def _logits(videos: Tensor) -> tuple[Tensor, Tensor]:
    classifier = DigitsClassifier.load()
    digits, directions = zip(*(classifier(batch.float().cpu()) for batch in videos.split(_BATCH)), strict=True)
    return torch.cat(digits), torch.cat(directions)


def _accuracy(logits: Tensor, asked: Tensor, null: int) -> float:
    asked = asked.to(logits.device)
    counted = asked != null
    if not counted.any():
        raise ValueError("no sample asked for anything: accuracy needs conditioning other than the null condition")
    return float((logits.argmax(1) == asked)[counted].double().mean())


def edge_energy(videos: Tensor) -> float:
    """Mean square of the differences between neighbouring pixels, along both axes."""
    videos = videos.double()
    return float(videos.diff(dim=-1).square().mean() + videos.diff(dim=-2).square().mean())


def sharpness(inputs: MetricInputs) -> float:
    """Edge energy of the samples over that of real videos: below 1 is blurred, above 1 is speckled or too contrasty."""
    return edge_energy(inputs.videos) / edge_energy(real_videos())


def unrest(videos: Tensor) -> float:
    """Mean distance (Wasserstein-1) between the grey values of consecutive frames.

    It compares how often each grey value occurs, not where. A digit that only moves keeps its grey values, so motion
    counts nothing, and a digit that fades, changes shape or gains speckle counts.
    """
    grey_values = videos.double().flatten(3).sort(dim=-1).values
    return float(grey_values.diff(dim=2).abs().mean())


def flicker(inputs: MetricInputs) -> float:
    """Unrest of the samples over the mean brightness of real videos (whose own unrest is 0); lower is better."""
    return unrest(inputs.videos) / float(real_videos().double().mean())


class FunctionMetric(Metric):
    """A metric that is one function of its inputs."""

    def __init__(self, function: Callable[[MetricInputs], float]) -> None:
        self.function = function

    def __call__(self, inputs: MetricInputs) -> float:
        return self.function(inputs)


@dataclass(kw_only=True)
class FrechetConfig(MetricConfig):
    """Fréchet distance to real, held-out digit videos."""

    def build(self) -> Metric:
        return FunctionMetric(frechet)


@dataclass(kw_only=True)
class DigitAccuracyConfig(MetricConfig):
    """Share of videos that show the digit asked for."""

    def build(self) -> Metric:
        return FunctionMetric(digit_accuracy)


@dataclass(kw_only=True)
class DirectionAccuracyConfig(MetricConfig):
    """Share of videos that move in the direction asked for."""

    def build(self) -> Metric:
        return FunctionMetric(direction_accuracy)


@dataclass(kw_only=True)
class SharpnessConfig(MetricConfig):
    """Edge energy, relative to real videos."""

    def build(self) -> Metric:
        return FunctionMetric(sharpness)


@dataclass(kw_only=True)
class FlickerConfig(MetricConfig):
    """Unrest from frame to frame, relative to the brightness of real videos."""

    def build(self) -> Metric:
        return FunctionMetric(flicker)
