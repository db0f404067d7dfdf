"""Few-step sampling with any velocity function, routed or not."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from moedistill import conditioning
from moedistill.conditioning import Conditioning
from moedistill.flow import as_sigma, diffuse, jump
from moedistill.routers import TimestepRouter

FreshNoise = Callable[[int, range], Tensor]
"""Standard normal noise for a step (from 0) and samples (places in the whole): `[len(samples), C, T, H, W]`."""


@torch.no_grad()
def sample(
    velocity: Callable[..., Tensor],
    x: Tensor,
    sigmas: Sequence[float] | Tensor,
    router: TimestepRouter | None = None,
    *,
    eta: float = 0.0,
    noise: Callable[[int], Tensor] | None = None,
    callback: Callable[[int, float, Tensor], None] | None = None,
) -> Tensor:
    """Euler steps along `sigmas`, without gradients: x at the last sigma, in the dtype of `x`.

    The sigmas are used exactly as given (in float32): nothing is shifted, snapped to a grid, or appended.

    With `eta` above 0 a step from one sigma to the next goes on down to `(1 - eta)·next`, and comes back up to `next`
    with fresh noise. 1 is the multistep sampling of consistency models (Song et al., arXiv 2303.01469; LCM, 2310.04378)
    and between is the strategic stochastic sampling of TCD (arXiv 2402.19159, its gamma). A step to 0 adds nothing.

    Args:
        velocity: `velocity(x, sigma)` with sigma `[B]` float32 gives the velocity, shaped as `x`. With a router it is
            called as `velocity(x, sigma, expert=name)`, where name is the expert at that sigma.
        x: the sample at the first sigma, batch first, usually noise `[B, C, T, H, W]` at sigma 1.
        sigmas: `[n + 1]` strictly descending, for n steps; the last is usually 0.
        router: which expert serves which sigma.
        eta: in [0, 1].
        noise: `noise(step)` gives the fresh noise of a step, shaped as `x`; needed with `eta` above 0.
        callback: called after every step as `callback(step, sigma, x)`: steps count from 0, `x` is now at `sigma`.

    Raises:
        ValueError: fewer than two sigmas, or not strictly descending within [0, 1]; `eta` outside [0, 1], or no noise.
    """
    values = [as_sigma(sigma) for sigma in sigmas]
    if len(values) < 2 or any(not above > below for above, below in pairwise(values)):
        raise ValueError(f"sigmas {[float(s) for s in sigmas]} must be two or more and descend strictly (in float32)")
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta {eta} is outside [0, 1]: 0 draws no fresh noise, 1 draws all of it anew")
    if eta > 0 and noise is None:
        raise ValueError(f"eta {eta} needs fresh noise: give `noise`, or eta 0")
    for step, (sigma, sigma_next) in enumerate(pairwise(values)):
        routed = {} if router is None else {"expert": router.expert_at(sigma)}
        per_sample = torch.full(x.shape[:1], sigma, dtype=torch.float32, device=x.device)
        down_to = (1.0 - eta) * sigma_next
        x = jump(x, velocity(x, per_sample, **routed), sigma, down_to)
        if noise is not None and down_to < sigma_next:
            x = diffuse(x, noise(step), down_to, sigma_next)
        if callback is not None:
            callback(step, sigma_next, x)
    return x


def sample_in_batches(
    velocity: Callable[..., Tensor],
    noise: Tensor,
    cond: Conditioning,
    sigmas: Sequence[float] | Tensor,
    router: TimestepRouter | None = None,
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
