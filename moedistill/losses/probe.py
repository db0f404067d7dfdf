"""The probe: teacher features of re-noised samples."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass
class Probe:
    """Teacher features of the re-noised prediction and target, computed once and shared by all losses.

    Attributes:
        hidden_prediction, hidden_target: tapped states, one `[B, T'·H'·W', hidden_size]` per tap; only the
            prediction's carry gradients.
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
        """Of the prediction: its states through the teacher's final layers, `[B, C, T, H, W]` per tap."""
        if "prediction" not in self._latents:
            self._latents["prediction"] = [self.unembed(hidden, self.prediction) for hidden in self.hidden_prediction]
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
