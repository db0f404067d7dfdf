"""The "VAE" of the digits task: a fixed linear codec of 6×6 patches, made by principal component analysis.

The matrix ships with the plugin (`codec.safetensors`), because the signs of principal components depend on the linear
algebra library that finds them. `python -m moedistill_digits.build_assets` makes it.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor

PATCH = 6
CHANNELS = 12
CODEC_FILE = Path(__file__).with_name("codec.safetensors")


def patches(videos: Tensor) -> Tensor:
    """Patches `[N, T, H/6, W/6, 36]` of videos `[N, 1, T, H, W]`."""
    n, _, t, h, w = videos.shape
    grid = videos.reshape(n, t, h // PATCH, PATCH, w // PATCH, PATCH)
    return grid.transpose(3, 4).flatten(4)


def unpatches(patches: Tensor) -> Tensor:
    """Videos `[N, 1, T, H, W]` of patches `[N, T, H/6, W/6, 36]`: the inverse of `patches`."""
    n, t, h, w, _ = patches.shape
    grid = patches.unflatten(-1, (PATCH, PATCH)).transpose(3, 4)
    return grid.reshape(n, 1, t, h * PATCH, w * PATCH)


@dataclass(frozen=True, eq=False)
class Codec:
    """Linear codec: latent = scale · components · (patch - mean).

    Attributes:
        components: `[12, 36]`, orthonormal rows.
        mean: `[36]`, the mean patch.
        scale: `[]`, one number for all channels: latents have unit variance on average over channels.
    """

    components: Tensor
    mean: Tensor
    scale: Tensor

    latent_shape: ClassVar[tuple[int, int, int, int]] = (CHANNELS, 8, 4, 4)

    @staticmethod
    @cache
    def load() -> "Codec":
        """The shipped codec."""
        return Codec(**load_file(CODEC_FILE))

    @staticmethod
    def fit(samples: Tensor) -> "Codec":
        """Principal components of patches `[N, 36]`; of each component's two signs, the one with a positive sum."""
        samples = samples.double()
        mean = samples.mean(0)
        centred = samples - mean
        eigenvalues, eigenvectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        components = eigenvectors.flip(1)[:, :CHANNELS].T
        components = components * torch.where(components.sum(1, keepdim=True) < 0, -1.0, 1.0)
        scale = eigenvalues.flip(0)[:CHANNELS].mean().rsqrt()
        return Codec(components.float().contiguous(), mean.float(), scale.float())

    def encode(self, videos: Tensor) -> Tensor:
        """Latents `[N, 12, T, H/6, W/6]` of videos `[N, 1, T, H, W]` with pixels in [0, 1]."""
        components, mean, scale = (t.to(videos) for t in (self.components, self.mean, self.scale))
        latents = (patches(videos) - mean) @ (components.T * scale)
        return latents.movedim(-1, 1).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Videos `[N, 1, T, H, W]`, float32 in [0, 1], of latents `[N, 12, T, H/6, W/6]`."""
        latents = latents.float()
        components, mean, scale = (t.to(latents) for t in (self.components, self.mean, self.scale))
        return unpatches(latents.movedim(1, -1) @ (components / scale) + mean).clamp(0.0, 1.0)
