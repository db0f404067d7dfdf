"""Few-step sampling with any velocity function, routed or not."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from numbers import Real

import torch
from torch import Tensor

from moedistill.flow.process import as_sigma, diffuse, jump, listed
from moedistill.flow.routers import Router


@torch.no_grad()
def sample(
    velocity: Callable[..., Tensor],
    x: Tensor,
    sigmas: Sequence[float] | Tensor,
    router: Router | None = None,
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
    if not isinstance(x, Tensor):
        raise ValueError(f"x must be a tensor, batch first, not {type(x).__name__}")
    if router is not None and not isinstance(router, Router):
        raise ValueError(f"router must be a Router, such as TimestepRouter, not {type(router).__name__}")
    values = [as_sigma(sigma) for sigma in listed("sigmas", sigmas)]
    if len(values) < 2 or any(not above > below for above, below in pairwise(values)):
        raise ValueError(f"sigmas {values} must be two or more and descend strictly (in float32)")
    if isinstance(eta, bool) or not isinstance(eta, Real) or not 0.0 <= eta <= 1.0:
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
