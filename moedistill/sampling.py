"""Few-step sampling with any velocity function, routed or not."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from moedistill.flow import as_sigma, jump
from moedistill.routers import TimestepRouter


@torch.no_grad()
def sample(
    velocity: Callable[..., Tensor],
    x: Tensor,
    sigmas: Sequence[float] | Tensor,
    router: TimestepRouter | None = None,
    *,
    callback: Callable[[int, float, Tensor], None] | None = None,
) -> Tensor:
    """Euler steps along `sigmas`, without gradients: x at the last sigma, in the dtype of `x`.

    The sigmas are used exactly as given (in float32): nothing is shifted, snapped to a grid, or appended.

    Args:
        velocity: `velocity(x, sigma)` with sigma `[B]` float32 gives the velocity, shaped as `x`. With a router it is
            called as `velocity(x, sigma, expert=name)`, where name is the expert at that sigma.
        x: the sample at the first sigma, batch first, usually noise `[B, C, T, H, W]` at sigma 1.
        sigmas: `[n + 1]` strictly descending, for n steps; the last is usually 0.
        router: which expert serves which sigma.
        callback: called after every step as `callback(step, sigma, x)`: steps count from 0, `x` is now at `sigma`.

    Raises:
        ValueError: fewer than two sigmas, or not strictly descending within [0, 1].
    """
    values = [as_sigma(sigma) for sigma in sigmas]
    if len(values) < 2 or any(not above > below for above, below in pairwise(values)):
        raise ValueError(f"sigmas {[float(s) for s in sigmas]} must be two or more and descend strictly (in float32)")
    for step, (sigma, sigma_next) in enumerate(pairwise(values)):
        routed = {} if router is None else {"expert": router.expert_at(sigma)}
        per_sample = torch.full(x.shape[:1], sigma, dtype=torch.float32, device=x.device)
        x = jump(x, velocity(x, per_sample, **routed), sigma, sigma_next)
        if callback is not None:
            callback(step, sigma_next, x)
    return x
