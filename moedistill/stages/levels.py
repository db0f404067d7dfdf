"""How training goes at each noise level: the error of every sample, and the gradient that its prediction gets.

A step's loss and gradient norm are of all its samples together, which start at many noise levels. What is kept here is
of single samples, as they pass: it asks no network anything, and changes no number that training computes with. The
sums stay on the device, so that nobody waits for them before they are written.
"""

from functools import partial

import torch
from torch import Tensor

from moedistill.flow.trajectory import Trajectory


class Levels:
    """Sums by noise level since the last `take`, of this process's samples.

    A sample counts at the trajectory point where it starts, or else at the next one above.
    """

    def __init__(self, trajectory: Trajectory, device: torch.device) -> None:
        self._points = trajectory.points.to(device)
        self._errors = torch.zeros(2, len(self._points), dtype=torch.float64, device=device)
        self._gradients = torch.zeros_like(self._errors)

    def add_errors(self, sigma: Tensor, difference: Tensor) -> None:
        """Of a micro-batch, prediction - target `[B, C, T, H, W]` of samples that start at `sigma` `[B]`."""
        flat = difference.detach().flatten(1)
        squares = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float32).square() / flat.shape[1]
        self._add(self._errors, sigma, squares)

    def watch(self, velocity: Tensor, sigma: Tensor, share: float) -> None:
        """Notes the gradient that the backward pass brings to a velocity `[B, C, T, H, W]`.

        Args:
            share: of a sample in the loss that is differentiated: by it the norm is that of the sample's own loss.
        """
        if velocity.requires_grad:
            velocity.register_hook(partial(self._add_gradients, sigma, share))

    def _add_gradients(self, sigma: Tensor, share: float, gradient: Tensor) -> None:
        norms = torch.linalg.vector_norm(gradient.detach().flatten(1), dim=1, dtype=torch.float32) / share
        self._add(self._gradients, sigma, norms)

    def _add(self, sums: Tensor, sigma: Tensor, values: Tensor) -> None:
        place = torch.searchsorted(self._points, sigma.detach().to(self._points)).clamp_max(len(self._points) - 1)
        values = values.double()
        sums.index_add_(1, place, torch.stack([torch.ones_like(values), values]))

    def take(self) -> dict[str, list[float]]:
        """By trajectory point with a sample: `point`, `samples`, `error`, the root mean square of prediction - target,
        and `gradient`, the mean norm, if one was watched. Empty where there was no sample; then begins anew.
        """
        (samples, squares), (watched, norms) = (sums.to("cpu", copy=True) for sums in (self._errors, self._gradients))
        self._errors.zero_()
        self._gradients.zero_()
        [there] = samples.nonzero(as_tuple=True)
        if not len(there):
            return {}
        found = {
            "point": there.tolist(),
            "samples": samples[there].long().tolist(),
            "error": (squares / samples)[there].sqrt().tolist(),
        }
        if bool((watched[there] > 0).all()):
            found["gradient"] = (norms / watched)[there].tolist()
        return found
