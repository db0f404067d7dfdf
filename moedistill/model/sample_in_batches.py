"""Few-step sampling of many samples, each with its conditioning: so many at once."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from moedistill.flow.routers import Router
from moedistill.flow.sampling import sample
from moedistill.model import conditioning
from moedistill.model.conditioning import Conditioning

FreshNoise = Callable[[int, range], Tensor]
"""Standard normal noise for a step (from 0) and samples (places in the whole): `[len(samples), C, T, H, W]`."""


def followings(sigmas: Sequence[float] | Tensor) -> dict[float, float]:
    """Where the step from each of `sigmas` ends, in float32 as `sample` hands them on."""
    values = torch.as_tensor(sigmas, dtype=torch.float32).tolist()
    return dict(pairwise(values))


def sample_in_batches(
    velocity: Callable[..., Tensor],
    noise: Tensor,
    cond: Conditioning,
    sigmas: Sequence[float] | Tensor,
    router: Router | None = None,
    *,
    eta: float = 0.0,
    fresh_noise: FreshNoise | None = None,
    batch_size: int = 64,
) -> Tensor:
    """`sample` from `noise` `[N, C, T, H, W]`, so many samples at once; `velocity` also gets their `cond`.

    Args:
        fresh_noise: addressed by sample, so that no sample depends on the batch that it is in.
    """
    parts = []
    for start in range(0, len(noise), batch_size):
        rows = range(start, min(start + batch_size, len(noise)))
        cond_of_rows = conditioning.select(cond, slice(rows.start, rows.stop))

        def velocity_of_rows(x: Tensor, sigma: Tensor, cond: Conditioning = cond_of_rows, **routed: str) -> Tensor:
            return velocity(x, sigma, cond=cond, **routed)

        def noise_of_rows(step: int, rows: range = rows) -> Tensor:
            assert fresh_noise is not None
            return fresh_noise(step, rows)

        parts.append(
            sample(
                velocity_of_rows, noise[rows.start : rows.stop], sigmas, router,
                eta=eta, noise=noise_of_rows if fresh_noise else None,
            )
        )  # fmt: skip
    return torch.cat(parts)
