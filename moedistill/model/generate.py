"""Videos of prompts by a mixture: through the model's own pipeline, where it has one, else by our sampler."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from moedistill.components.fields import WhichWeights
from moedistill.model import conditioning
from moedistill.model.backbone import VideoSize
from moedistill.model.mixture import Mixture
from moedistill.model.prompt import Prompt
from moedistill.runtime.randomness import Draws


class OwnPipeline(ABC):
    """What a backbone is besides, whose model has a pipeline of its own. Its config says so by `has_pipeline`."""

    @abstractmethod
    def generate(
        self,
        mixture: Mixture,
        prompts: Sequence[str | Prompt],
        sigmas: Tensor,
        *,
        seed: int,
        video: VideoSize | None = None,
        weights: WhichWeights = "trained",
        eta: float = 0.0,
        places: Sequence[int] | None = None,
    ) -> Iterator[Tensor]:
        """See the function `generate`: the same, by the model's own pipeline."""


def generate(
    mixture: Mixture,
    prompts: Sequence[str | Prompt],
    sigmas: Tensor,
    *,
    seed: int,
    video: VideoSize | None = None,
    weights: WhichWeights = "trained",
    eta: float = 0.0,
    places: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Videos of prompts by the experts along `sigmas`, one by one: `[C, T, H, W]` in [0, 1], float32, on the CPU.

    A video is determined by its prompt, its place in the list, and the seed; so is the fresh noise that `eta` asks for.

    Args:
        sigmas: `[n + 1]`, descending to 0.
        video: its size; the backbone's own, if not given.
        weights: the experts' `trained` weights or their `ema`.
        places: of the prompts in a longer list, of which these are some; 0, 1, … if not given.

    Raises:
        ValueError: a prompt or the size does not fit the model, or its pipeline has no `eta`.
    """
    backbone = mixture.backbone
    if isinstance(backbone, OwnPipeline):
        options: Any = {"video": video, "weights": weights, "eta": eta}
        if places is not None and list(places) != list(range(len(prompts))):
            options["places"] = places
        yield from backbone.generate(mixture, prompts, sigmas, seed=seed, **options)
        return
    device = mixture.device
    shape, cond = backbone.latent_shape(video), conditioning.to(backbone.encode(prompts), device)
    for number, k in enumerate(range(len(prompts)) if places is None else places):
        noise = Draws(seed, "sample", 0, [k], device).normal("noise", shape)
        one = conditioning.select(cond, slice(number, number + 1))

        def fresh_noise(step: int, _rows: range, k: int = k) -> Tensor:
            return Draws(seed, "sample", step, [k], device).normal("fresh_noise", shape)

        latents = mixture.generate(
            noise, one, sigmas, guidance=mixture.guidance, weights=weights, eta=eta, fresh_noise=fresh_noise
        )
        yield backbone.decode(latents)[0].cpu()
