"""Numbers about videos and features that metrics share."""

import torch
from torch import Tensor


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of features `[N, D]` (Dowson and Landau, 1982).

        |m_a - m_b|² + tr(C_a + C_b - 2·(C_a^½ C_b C_a^½)^½)

    Both roots are taken of symmetric matrices by their eigenvalues, in float64.

    Raises:
        ValueError: fewer than two samples on a side, rows of other shapes, or values that are not finite.
    """
    _check_features(features_a=features_a, features_b=features_b)
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


def _check_features(**sides: Tensor) -> None:
    """ValueError unless all are `[N, D]` of one D, and finite: with NaN a comparison is false, a maximum 0."""
    for name, side in sides.items():
        if not isinstance(side, Tensor) or side.ndim != 2:
            shape = list(side.shape) if isinstance(side, Tensor) else type(side).__name__
            raise ValueError(f"{name} {shape} must be a tensor [N, D], one row of features per sample")
        if not bool(side.isfinite().all()):
            row = int((~side.isfinite().all(1)).nonzero()[0])
            raise ValueError(f"{name}: row {row} is not finite; look at that sample")
    widths = {name: side.shape[1] for name, side in sides.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"rows of {' and '.join(f'{name} [N, {width}]' for name, width in widths.items())} differ")


def _check_videos(videos: Tensor) -> None:
    if not isinstance(videos, Tensor) or videos.ndim != 5:
        shape = list(videos.shape) if isinstance(videos, Tensor) else type(videos).__name__
        raise ValueError(f"videos {shape} must be a tensor [N, C, T, H, W]")


def _moments(samples: Tensor) -> tuple[Tensor, Tensor]:
    mean = samples.mean(0)
    centred = samples - mean
    return mean, centred.T @ centred / (len(samples) - 1)


def in_balls(samples: Tensor, real: Tensor, neighbours: int | Tensor = 5) -> Tensor:
    """Which samples `[N, D]` lie in the balls around real ones `[M, D]`, up to their k-th neighbours: bool `[N, M]`.

    Density is the mean number of balls per sample over k, coverage the share of balls with a sample in them (Naeem et
    al., arXiv 2002.09797).

    Args:
        neighbours: k, or the `radii` that are known already.

    Raises:
        ValueError: not more real samples than neighbours, rows of other shapes, or values that are not finite.
    """
    _check_features(samples=samples, real=real)
    reach = neighbours if isinstance(neighbours, Tensor) else radii(real, neighbours)
    return torch.cdist(samples.double(), real.double()) < reach


def radii(real: Tensor, neighbours: int = 5) -> Tensor:
    """Distances of real samples `[M, D]` to their k-th neighbours: float64 `[M]`; ValueError as of `in_balls`."""
    _check_features(real=real)
    if not 1 <= neighbours < len(real):
        raise ValueError(f"neighbours {neighbours}: there must be more than that of real samples, not {len(real)}")
    real = real.double()
    return torch.cdist(real, real).kthvalue(neighbours + 1, dim=1).values  # the nearest is each itself


# These two go video by video: in float64 a batch of large ones would not fit.


def edge_energy(videos: Tensor) -> Tensor:
    """Mean square of the differences between neighbouring pixels, along both axes: float64 `[N]`.

    Raises:
        ValueError: not `[N, C, T, H, W]`.
    """
    _check_videos(videos)

    def energy(video: Tensor) -> Tensor:
        return video.diff(dim=-1).square().mean() + video.diff(dim=-2).square().mean()

    return torch.stack([energy(video.double()) for video in videos])


def unrest(videos: Tensor) -> Tensor:
    """Mean distance (Wasserstein-1) between the grey values of consecutive frames: float64 `[N]`.

    It compares how often each grey value occurs, not where. What only moves keeps its grey values, so motion counts
    nothing, and what fades, changes shape or gains speckle counts.

    Raises:
        ValueError: not `[N, C, T, H, W]`.
    """
    _check_videos(videos)

    def distance(video: Tensor) -> Tensor:
        grey_values = video.flatten(2).sort(dim=-1).values
        return grey_values.diff(dim=1).abs().mean()

    return torch.stack([distance(video.double()) for video in videos])
