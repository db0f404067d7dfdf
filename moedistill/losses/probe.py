"""The probe: teacher features of re-noised samples."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moedistill.flow.process import add_noise, renoise


@dataclass
class Probe:
    """Teacher features of the re-noised prediction and target, computed once and shared by all losses.

    Attributes:
        hidden_prediction, hidden_target: tapped states in the blocks' dtype, one `[B, T'·H'·W', hidden_size]` per tap;
            only the prediction's carry gradients.
        hidden_data: the same of the data, where a loss asks for them; else empty.
        prediction, target: the re-noised samples that the states are of, `[B, C, T, H, W]`.
        grid: the (T', H', W') of the tokens.
        unembed: latents `[B, C, T, H, W]` of a tapped state and the sample that it is of.
    """

    hidden_prediction: list[Tensor]
    hidden_target: list[Tensor]
    prediction: Tensor
    target: Tensor
    grid: tuple[int, int, int]
    unembed: Callable[[Tensor, Tensor], Tensor]
    hidden_data: list[Tensor] = field(default_factory=list)
    _latents: dict[str, list[Tensor]] = field(default_factory=dict, repr=False)

    @property
    def latent_prediction(self) -> list[Tensor]:
        """Of the prediction: its states through the teacher's final layers, `[B, C, T, H, W]` per tap.

        What these layers keep for the backward pass is computed there once more: of all taps at once it would be
        several times the states.
        """
        if "prediction" not in self._latents:
            self._latents["prediction"] = [
                checkpoint(self.unembed, hidden, self.prediction, use_reentrant=False, preserve_rng_state=False)
                for hidden in self.hidden_prediction
            ]
        return self._latents["prediction"]

    @property
    def latent_target(self) -> list[Tensor]:
        """The same of the target's states, without gradients."""
        if "target" not in self._latents:
            with torch.no_grad():
                self._latents["target"] = [self.unembed(hidden, self.target) for hidden in self.hidden_target]
        return self._latents["target"]

    def detached(self) -> "Probe":
        """The same features without gradients, for a critic's objective."""
        hidden_prediction = [hidden.detach() for hidden in self.hidden_prediction]
        return replace(self, hidden_prediction=hidden_prediction, prediction=self.prediction.detach(), _latents={})


def probe(
    prediction: Tensor,
    target: Tensor,
    *,
    end: Tensor,
    sigma: Tensor,
    noise: Tensor,
    read: Callable[[Tensor], list[Tensor]],
    unembed: Callable[[Tensor, Tensor], Tensor],
    grid: tuple[int, int, int],
    data: Tensor | None = None,
    data_noise: Tensor | None = None,
) -> Probe:
    """Teacher features of a prediction and its target, both re-noised in the same way (DCM, arXiv 2506.03123, 3.3):

        y_sigma = [(1 - sigma)·y + (sigma - end)·noise] / (1 - end),   y = prediction, target

    Data are noised to `end` first, by the process itself, and from there as the others.

    Args:
        prediction, target, noise: `[B, C, T, H, W]`; the first two lie at `end`.
        end, sigma: `[B]`, rising.
        read: hidden states of a sample at `sigma`, one `[B, T'·H'·W', hidden_size]` per tap.
        unembed: see `Probe`.
        data, data_noise: for losses that ask for features of the data.
    """
    y_prediction, y_target = (renoise(y, noise, end, sigma) for y in (prediction, target))
    hidden_prediction = read(y_prediction)
    with torch.no_grad():
        hidden_target, hidden_data = read(y_target), []
        if data is not None:
            assert data_noise is not None
            hidden_data = read(renoise(add_noise(data, data_noise, end), noise, end, sigma))
    return Probe(hidden_prediction, hidden_target, y_prediction, y_target, grid, unembed, hidden_data)
