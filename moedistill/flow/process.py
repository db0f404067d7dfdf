"""Flow coordinates: the one noise process that the core speaks.

Convention. For data x0, noise eps ~ N(0, 1) and sigma in [0, 1]:

    x_sigma = (1 - sigma)·x0 + sigma·eps        sigma = 0 is data, sigma = 1 is noise
    v       = eps - x0 = dx/dsigma              what a network predicts: the velocity
    x(sigma') = x(sigma) + (sigma' - sigma)·v   an Euler jump along the probability-flow ODE

Variance-preserving models, x_vp = alpha·x0 + s·eps with alpha² + s² = 1, are translated at their plugin's edge:

    sigma = s / (alpha + s),   x = x_vp / (alpha + s),   x0 = alpha·x_vp - s·v_vp,   eps = s·x_vp + alpha·v_vp

Every function takes sigma as a number or as one value per sample `[B]`, and broadcasts it over tensors whose first
dimension is the batch, usually `[B, C, T, H, W]`. The arithmetic is float32 whatever the dtype of the tensors (float64
only for a float64 `x`); the result has the dtype of the first tensor. Shapes that don't fit are a ValueError.
"""

from collections.abc import Iterable, Mapping
from ctypes import c_float
from numbers import Integral
from typing import Any

import torch
from torch import Tensor


def add_noise(x0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """The sample at `sigma`, `(1 - sigma)·x0 + sigma·noise`, shaped as `x0` and `noise`."""
    dtype = _check_tensors(x0=x0, noise=noise)
    sigma = _broadcast("sigma", sigma, x0, dtype)
    return ((1 - sigma) * x0.to(dtype) + sigma * noise.to(dtype)).to(x0.dtype)


def displacement(velocity: Tensor, sigma_from: float | Tensor, sigma_to: float | Tensor) -> Tensor:
    """What one Euler jump adds, `(sigma_to - sigma_from)·velocity`, shaped as `velocity`."""
    dtype = _check_tensors(velocity=velocity)
    sigma_from = _broadcast("sigma_from", sigma_from, velocity, dtype)
    sigma_to = _broadcast("sigma_to", sigma_to, velocity, dtype)
    return ((sigma_to - sigma_from) * velocity.to(dtype)).to(velocity.dtype)


def velocity_of(x: Tensor, x0: Tensor, sigma: float | Tensor) -> Tensor:
    """The velocity with which `x` at `sigma` > 0 goes straight to `x0`, `(x - x0) / sigma`, shaped as `x`.

    With the posterior mean E[x0 | x] for `x0` it is that of the probability-flow ODE.
    """
    dtype = _check_tensors(x=x, x0=x0)
    return ((x.to(dtype) - x0.to(dtype)) / _broadcast("sigma", sigma, x, dtype)).to(x.dtype)


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): `c + (scale - 1)·(c - u)`; 1 is none.

    Of velocities or, at one x and sigma, of anything that is linear in them, such as clean estimates.
    """
    return conditional + (scale - 1.0) * (conditional - unconditional)


def shift(u: Tensor, s: float | Tensor) -> Tensor:
    """A time in [0, 1] moved towards noise, `s·u / (1 + (s - 1)·u)` (Esser et al., arXiv 2403.03206, eq. 23)."""
    return s * u / (1 + (s - 1) * u)


def unshift(sigma: float | Tensor, s: Tensor) -> Tensor:
    """The inverse of `shift`: `sigma / (s - (s - 1)·sigma)`."""
    return sigma / (s - (s - 1) * sigma)


def jump(x: Tensor, velocity: Tensor, sigma_from: float | Tensor, sigma_to: float | Tensor) -> Tensor:
    """One Euler jump from `sigma_from` to `sigma_to`: `x + (sigma_to - sigma_from)·velocity`, shaped as `x`."""
    dtype = _check_tensors(x=x, velocity=velocity)
    sigma_from = _broadcast("sigma_from", sigma_from, x, dtype)
    sigma_to = _broadcast("sigma_to", sigma_to, x, dtype)
    return (x.to(dtype) + (sigma_to - sigma_from) * velocity.to(dtype)).to(x.dtype)


def renoise(x: Tensor, noise: Tensor, sigma_from: float | Tensor, sigma_to: float | Tensor) -> Tensor:
    """DCM's linear re-noising, up from `sigma_from` to `sigma_to` (arXiv 2506.03123), shaped as `x`:

        [(1 - sigma_to)·x + (sigma_to - sigma_from)·noise] / (1 - sigma_from)

    The mean is right for every `sigma_from`; the law of the result is that of x at `sigma_to` only from
    `sigma_from` = 0. From above 0 its noise is too small, because noise already in `x` and fresh noise add up in
    variance, not linearly. DCM starts from the smallest sigma of its grid, 0.0167, where this hardly matters.

    Raises:
        ValueError: a shape doesn't fit, `sigma_to` is below `sigma_from`, or `sigma_from` is 1 or more.
    """
    dtype = _check_tensors(x=x, noise=noise)
    sigma_from = _broadcast("sigma_from", sigma_from, x, dtype)
    sigma_to = _broadcast("sigma_to", sigma_to, x, dtype)
    _check_upward(sigma_from, sigma_to)
    # The two coefficients are formed first, so that re-noising to where one is changes nothing at all.
    keep, add = (1 - sigma_to) / (1 - sigma_from), (sigma_to - sigma_from) / (1 - sigma_from)
    return (keep * x.to(dtype) + add * noise.to(dtype)).to(x.dtype)


def diffuse(x: Tensor, noise: Tensor, sigma_from: float | Tensor, sigma_to: float | Tensor) -> Tensor:
    """Fresh noise on top, up from `sigma_from` to `sigma_to`, so that the law of the result is right; shaped as `x`:

        a·x + sqrt(sigma_to² - a²·sigma_from²)·noise,   a = (1 - sigma_to) / (1 - sigma_from)

    If x is a sample at `sigma_from`, the result is one at `sigma_to`: noises add up in variance.

    Raises:
        ValueError: a shape doesn't fit, `sigma_to` is below `sigma_from`, or `sigma_from` is 1 or more.
    """
    dtype = _check_tensors(x=x, noise=noise)
    sigma_from = _broadcast("sigma_from", sigma_from, x, dtype)
    sigma_to = _broadcast("sigma_to", sigma_to, x, dtype)
    _check_upward(sigma_from, sigma_to)
    keep = (1 - sigma_to) / (1 - sigma_from)
    # sigma_to - a·sigma_from, written so that nothing is lost where both are close.
    add = torch.sqrt((sigma_to - sigma_from) / (1 - sigma_from) * (sigma_to + keep * sigma_from))
    return (keep * x.to(dtype) + add * noise.to(dtype)).to(x.dtype)


def sigma_from_vp(alpha: Tensor, s: Tensor) -> Tensor:
    """Sigma of a variance-preserving process at signal scale `alpha` and noise scale `s`: `s / (alpha + s)`."""
    return s / (alpha + s)


def to_vp(x: Tensor, sigma: float | Tensor) -> Tensor:
    """The variance-preserving sample `x_vp = (alpha + s)·x` of the flow sample `x` at `sigma`, shaped as `x`."""
    dtype = _check_tensors(x=x)
    return (x.to(dtype) / _norm(_broadcast("sigma", sigma, x, dtype))).to(x.dtype)


def from_vp(x_vp: Tensor, sigma: float | Tensor) -> Tensor:
    """The flow sample `x = x_vp / (alpha + s)` at `sigma = s / (alpha + s)`, shaped as `x_vp`. Inverse of `to_vp`."""
    dtype = _check_tensors(x_vp=x_vp)
    return (x_vp.to(dtype) * _norm(_broadcast("sigma", sigma, x_vp, dtype))).to(x_vp.dtype)


def velocity_from_vp(x_vp: Tensor, v_vp: Tensor, sigma: float | Tensor) -> Tensor:
    """Velocity `eps - x0 = (s - alpha)·x_vp + (s + alpha)·v_vp` of a v-prediction `v_vp` at `x_vp`, shaped as `x_vp`.

    Finite at both ends, unlike a division by alpha or s.
    """
    dtype = _check_tensors(x_vp=x_vp, v_vp=v_vp)
    sigma = _broadcast("sigma", sigma, x_vp, dtype)
    return (((2 * sigma - 1) * x_vp.to(dtype) + v_vp.to(dtype)) / _norm(sigma)).to(x_vp.dtype)


def as_sigma(value: float | Tensor) -> float:
    """`value` rounded to float32, the precision in which sigmas are compared.

    Raises:
        ValueError: it is no number, or not in [0, 1].
    """
    if type(value) is float and 0.0 <= value <= 1.0:  # as below, without the microseconds of a tensor
        return c_float(value).value
    sigma = operand("sigma", value)
    if sigma.numel() != 1:
        raise ValueError(f"sigma of shape {_shape(sigma)} must be one number")
    number: float = sigma.item()
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"sigma {float(value)} is outside [0, 1]: sigma 0 is data, 1 is noise")
    return number


def operand(name: str, value: object) -> Tensor:
    """A number, or a tensor or nested list of numbers, as float32; ValueError for anything else."""
    if not isinstance(value, (bool, str)):
        try:
            return torch.as_tensor(value, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            pass
    raise ValueError(f"{name} {value!r} ({type(value).__name__}) must be a number, or a tensor of numbers")


def listed(name: str, values: object) -> list[Any]:
    """What a list, tuple or tensor holds; ValueError for a single value or a string."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise ValueError(f"{name} must be a list, not {values!r} ({type(values).__name__})")
    return values.tolist() if isinstance(values, Tensor) else list(values)


def whole(name: str, value: object, least: int = 1) -> int:
    """A whole number from `least` up; ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} {value!r} must be a whole number of at least {least}")
    return int(value)


def _norm(sigma: Tensor) -> Tensor:
    """`1 / (alpha + s)`: from alpha = (1 - sigma)/norm, s = sigma/norm and alpha² + s² = 1."""
    return torch.sqrt((1 - sigma) ** 2 + sigma**2)


def _check_tensors(**tensors: Tensor) -> torch.dtype:
    """The dtype to compute in, float32 or that of a float64 first tensor; ValueError unless all shapes are the same."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, not {type(tensor).__name__}")
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != first.shape:
            raise ValueError(
                f"{first_name} {_shape(first)} and {name} {_shape(tensor)} differ in shape: they must be the same"
            )
    if not first.is_floating_point():
        raise ValueError(f"{first_name} is {first.dtype}: it must be floating point")
    return torch.promote_types(first.dtype, torch.float32)


def _check_upward(sigma_from: Tensor, sigma_to: Tensor) -> None:
    """ValueError unless noise can be added; written so that NaN fails too."""
    if not bool((sigma_from < 1).all()):
        raise ValueError(f"cannot re-noise from sigma {sigma_from.max().item():g}: sigma_from must be below 1")
    if not bool((sigma_to >= sigma_from).all()):
        raise ValueError(
            f"cannot re-noise from sigma {sigma_from.flatten().tolist()} down to {sigma_to.flatten().tolist()}: "
            "sigma_to must be at least sigma_from (use jump to go down)"
        )


def _broadcast(name: str, sigma: float | Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A number or `[B]` values, in `dtype` and on the device of `x`, shaped to broadcast over `x`."""
    if not isinstance(sigma, Tensor):  # of a tensor on a GPU a look at the values would wait for it
        given = operand(name, sigma)
        if not bool(((given >= 0.0) & (given <= 1.0)).all()):
            raise ValueError(f"{name} {sigma} is outside [0, 1]: sigma 0 is data, 1 is noise")
    sigma = torch.as_tensor(sigma, dtype=dtype, device=x.device)
    if sigma.ndim == 0:
        return sigma
    if sigma.shape != x.shape[:1]:
        raise ValueError(
            f"{name} {_shape(sigma)} does not fit a tensor {_shape(x)}: "
            f"give one number, or one value per sample, {[*x.shape[:1]]}"
        )
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
