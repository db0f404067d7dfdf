"""What stops inside a phase do to the variance of samples, exactly, for a student that has learned its jumps perfectly.

A student that jumps to the end of its phase gives the chord to that end. The deviation of x on its way,
sqrt((1 - σ)²·P + σ²), is convex in σ, so a chord lies above it: who stops on it has too much variance, and finer detail
than the data at the end.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

from moedistill.flow.process import as_sigma


def power_at(sigma: float, power: float = 1.0) -> float:
    """The variance of x at `sigma`, for independent data of mean 0 and variance `power`: (1 - σ)²·P + σ²."""
    return (1.0 - sigma) ** 2 * power + sigma**2


def sampled_power(
    sigmas: Sequence[float],
    landing: Callable[[float], float],
    *,
    power: float = 1.0,
    eta: float = 0.0,
) -> list[float]:
    """The variance of samples of Gaussian data at each of `sigmas`, if the student's jumps are perfect.

    From x at σ with deviation d the chord to the landing e leads to d·s(e)/s(σ), where s² = (1 - σ)²·P + σ² is right;
    a step to σ' goes on along it, and `eta` as in `sample`.

    Args:
        sigmas: `[n + 1]`, descending; the first is where the variance is still right.
        landing: where the jump from a sigma lands, below it.
        power: P, the data's variance.
        eta: in [0, 1], the share of noise that is drawn anew after each step.

    Raises:
        ValueError: sigmas that do not descend within [0, 1], a negative power, or an eta outside of [0, 1].
    """
    if not power >= 0.0 or not 0.0 <= eta <= 1.0:
        raise ValueError(f"power {power} must be 0 or more, and eta {eta} in [0, 1]")
    levels = [as_sigma(sigma) for sigma in sigmas]
    variances = [power_at(levels[0], power)]
    for sigma, sigma_next in pairwise(levels):
        end, down_to = as_sigma(landing(sigma)), (1.0 - eta) * sigma_next
        stretch = (power_at(end, power) / power_at(sigma, power)) ** 0.5
        deviation = variances[-1] ** 0.5 * (1.0 + (sigma - down_to) / (sigma - end) * (stretch - 1.0))
        kept = (1.0 - sigma_next) / (1.0 - down_to)
        variances.append((kept * deviation) ** 2 + sigma_next**2 - (kept * down_to) ** 2)
    return variances
