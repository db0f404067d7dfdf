"""A backbone under examination."""

import math
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from moedistill.model import conditioning
from moedistill.model.backbone import Backbone, BackboneConfig, VideoSize
from moedistill.model.conditioning import Conditioning
from moedistill.model.experts import ExpertConfig, FullConfig, LoRAConfig
from moedistill.model.latent_video import LatentVideoConfig
from moedistill.model.mixture import Mixture
from moedistill.runtime.randomness import Draws, generator

BATCH = 3


SIGMAS = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98, 1.0)


class Unchecked(Exception):
    """There is nothing that the check could look at; says why."""


class Subject:
    """A backbone under examination, and inputs for it.

    Args:
        config: of the backbone. It is computed in float32, whatever its dtype.
        real: look at `config` itself, as it is; else at `config.tiny()`, with every weight moved a little.
        device: where to compute.

    Attributes:
        experts: those that `mixture` attaches: `low_rank` and `full` on the teacher, `child`, low-rank, on `full`. On
            real weights the first alone: a full copy needs much room and no knowledge of the model.
    """

    def __init__(self, config: BackboneConfig, *, real: bool = False, device: torch.device | str = "cpu") -> None:
        self.config = (config if real else config.tiny()).replace(dtype="float32")
        self.real = real
        self.experts = ("low_rank",) if real else ("low_rank", "full", "child")
        self.device = torch.device(device)

    def backbone(self, dtype: Literal["float32", "bfloat16"] = "float32") -> Backbone:
        """A fresh one with the same weights as every other of its dtype."""
        backbone = self.config.replace(dtype=dtype).build(seed=0)
        if not self.real:
            for name, network in backbone.networks.items():
                for path, parameter in network.named_parameters():
                    move(parameter, 0.05, "perturbation", name, path)
        return backbone

    def mixture(self, *, checkpointing: bool = False) -> Mixture:
        """A fresh mixture with `experts`, each equal to its parent."""
        backbone = self.backbone()
        groups = list(backbone.lora_targets)
        assert groups, "lora_targets names no group of linears; experts of kind lora need one, usually `attention`"
        base = next(iter(backbone.networks)) if len(backbone.networks) > 1 else None
        configs: dict[str, ExpertConfig] = {
            "low_rank": LoRAConfig(rank=2, alpha=4.0, targets=groups, base=base),
            "full": FullConfig(base=base),
            "child": LoRAConfig(rank=2, alpha=4.0, targets=groups, parent="full"),
        }
        configs = {name: configs[name] for name in self.experts}
        mixture = Mixture(backbone, configs, gradient_checkpointing=checkpointing).to(self.device)
        mixture.initialise()
        return mixture

    @cached_property
    def teacher(self) -> Mixture:
        """A mixture without experts, for checks that change nothing."""
        return Mixture(self.backbone(), {}).to(self.device)

    @cached_property
    def video(self) -> VideoSize | None:
        """The size of the videos that are looked at, where there is one: of a real model something small."""
        if not self.real:
            return self.teacher.backbone.video
        return self.config.tiny_video if isinstance(self.config, LatentVideoConfig) else None

    @cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """The (C, T, H, W) of the inputs; of a real model something small that fits, where that can be known."""
        layout = self.config.layout()
        if not self.real or self.video is not None or layout is None:
            return self.teacher.backbone.latent_shape(self.video)
        t, h, w = (count * step for count, step in zip((2, 3, 4), layout.multiple, strict=True))
        return min(self.teacher.backbone.latent_shape(), (layout.channels, t, h, w), key=math.prod)

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor, Conditioning]:
        """Noisy latents `[B, C, T, H, W]`, a sigma `[B]` for each, and conditioning of different prompts."""
        try:
            cond = self.teacher.backbone.encode(prompts_for(self.teacher.backbone))
        except Exception as error:
            raise Unchecked("encode gives no conditioning to try it with") from error
        noise = Draws(0, "check", 0, range(BATCH), self.device).normal("x", self.shape)
        return noise, torch.linspace(0.9, 0.4, BATCH, device=self.device), conditioning.to(cond, self.device)

    @cached_property
    def sigmas(self) -> list[float]:
        """Noise levels from the smallest that the model knows up to 1."""
        table = self.config.native_sigmas()
        smallest = 0.0 if table is None else table[0].item()
        return sorted({max(sigma, smallest) for sigma in SIGMAS})

    def column(self, sigma: float) -> Tensor:
        """One value for the whole batch, `[B]`."""
        return torch.full((BATCH,), sigma, device=self.device)


def prompts_for(backbone: Backbone) -> list[str]:
    """A batch of prompts that differ, as far as the backbone has more than one."""
    examples = list(backbone.example_prompts)
    return [examples[k % len(examples)] for k in range(BATCH)]


@torch.no_grad()
def move(tensor: Tensor, scale: float, *address: object) -> None:
    """Adds normal noise of that standard deviation; which depends on the address alone."""
    noise = generator(*address).standard_normal(tuple(tensor.shape), dtype="float32")
    tensor += (scale * torch.from_numpy(noise)).to(tensor)
