"""Hidden states of a network's blocks, by forward hooks; and the Probe: teacher features of re-noised samples."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn


@contextmanager
def capture(network: nn.Module, blocks: Sequence[str]) -> Iterator[list[object]]:
    """Collects the outputs of `blocks` (dotted paths), in the order in which they run, while the context is open.

    The hooks only store. A block that is recomputed for activation checkpointing is not stored twice.
    """
    outputs: list[object] = []

    def store(_module: nn.Module, _args: object, output: object) -> None:
        recomputing = torch._C._current_graph_task_id() != -1
        if not recomputing:
            outputs.append(output)

    modules = [network.get_submodule(path) for path in blocks]
    handles = [module.register_forward_hook(store) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Probe:
    """Teacher features of the re-noised prediction (fake) and target (real), computed once and shared by all losses.

    Attributes:
        hidden_fake, hidden_real: tapped states, one `[B, T'·H'·W', hidden_size]` per tap; only the fake ones carry
            gradients.
        hidden_data: the same of the data, where a loss asks for them; else empty.
        fake, real: the re-noised samples that the states are of, `[B, C, T, H, W]`.
        grid: the (T', H', W') of the tokens.
        unembed: latents `[B, C, T, H, W]` of a tapped state and the sample that it is of.
    """

    hidden_fake: list[Tensor]
    hidden_real: list[Tensor]
    fake: Tensor
    real: Tensor
    grid: tuple[int, int, int]
    unembed: Callable[[Tensor, Tensor], Tensor]
    hidden_data: list[Tensor] = field(default_factory=list)
    _latents: dict[str, list[Tensor]] = field(default_factory=dict, repr=False)

    @property
    def latent_fake(self) -> list[Tensor]:
        """The fake states through the teacher's final norm, projection and unpatchify, `[B, C, T, H, W]` per tap."""
        if "fake" not in self._latents:
            self._latents["fake"] = [self.unembed(hidden, self.fake) for hidden in self.hidden_fake]
        return self._latents["fake"]

    @property
    def latent_real(self) -> list[Tensor]:
        """The same of the real states, without gradients."""
        if "real" not in self._latents:
            with torch.no_grad():
                self._latents["real"] = [self.unembed(hidden, self.real) for hidden in self.hidden_real]
        return self._latents["real"]

    def detached(self) -> "Probe":
        """The same features without gradients, for a critic's objective."""
        hidden_fake = [hidden.detach() for hidden in self.hidden_fake]
        return replace(self, hidden_fake=hidden_fake, fake=self.fake.detach(), _latents={})
