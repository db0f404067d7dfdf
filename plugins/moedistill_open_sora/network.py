"""The exact time in a network of diffusers' Flux class."""

from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings
from torch import Tensor, nn


class ExactTime(CombinedTimestepTextProjEmbeddings):
    """Takes the time from behind the pooled text: the network hands that on as it is.

    The time that it is given it rounds to the dtype of its states, and of bfloat16's 8 bits 987 becomes 988.
    """

    def forward(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        """Of pooled text and `1000·sigma` `[B, P + 1]` float32; of `timestep` the dtype alone is looked at."""
        embedding: Tensor = super().forward(pooled[:, -1], pooled[:, :-1].to(timestep.dtype))
        return embedding


def take_exact_time(network: nn.Module) -> None:
    """Lets a Flux network take its time so."""
    assert isinstance(network.time_text_embed, CombinedTimestepTextProjEmbeddings), "guidance is embedded"
    network.time_text_embed.__class__ = ExactTime
