"""Mixtures of Gaussians, for which the velocity and the noise levels where components part are known.

Data are N(m_k, τ²) with equal weights, the means `pairs` of ±M along axes of their own: one pair ±M has two components,
two pairs four. x_σ has the variance s² = (1-σ)²·τ² + σ² about (1-σ)·m_k; E[x0 | x] is a softmax over the components.

The middle between the components of a pair turns unstable at (1-σ)²·M² = s². With z = x/(1-σ) and λ = σ/(1-σ) the ODE
is dz/dλ = (z - E[x0 | z])/λ, and along the pair's axis E[x0 | z] = μ + (τ²/Λ²)·(z - μ), μ = M·tanh(M·z/Λ²),
Λ² = τ² + λ². At z = 0 its slope is 1 + (λ²/Λ²)·(M²/Λ² - 1), above 1 as soon as Λ < M: λ² = M² - τ².
"""

import math
from dataclasses import dataclass, field

import torch
from gaussian_plugin import Block
from torch import nn
from torch.nn.functional import silu

from moedistill import hookimpl
from moedistill.data.base import Dataset, DatasetConfig, Sample
from moedistill.model.backbone import Backbone, BackboneConfig
from moedistill.runtime.randomness import generator

SHAPE = (4, 2, 2, 2)
SIZE = math.prod(SHAPE)


def critical_sigma(mean, tau):
    """Where the components at ±mean part."""
    ratio = math.sqrt(mean**2 - tau**2)
    return ratio / (1 + ratio)


def centres(pairs):
    """The components' means `[2^len(pairs), SIZE]`; one at 0 without pairs."""
    means = torch.zeros(1, SIZE)
    for axis, mean in enumerate(pairs):
        step = torch.zeros(SIZE)
        step[axis] = mean
        means = torch.cat([means - step, means + step])
    return means


class MixtureNetwork(nn.Module):
    """The exact velocity, and a residual of x and σ that is 0 at first."""

    def __init__(self, pairs, tau, width=8):
        super().__init__()
        self.register_buffer("means", centres(pairs))
        self.tau = tau
        self.time_embed = nn.Linear(2, width)
        self.blocks = nn.ModuleList([Block(width)])
        self.proj_out = nn.Linear(width, 2)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def exact(self, x, sigma):
        x, sigma = x.flatten(1), sigma[:, None]
        signal = 1 - sigma
        variance = signal**2 * self.tau**2 + sigma**2
        weights = (signal * x @ self.means.T - signal**2 * self.means.square().sum(1) / 2) / variance
        mean = weights.softmax(dim=1) @ self.means
        # (x - E[x0 | x]) / σ, without the 0/0 at σ = 0.
        return ((sigma - signal * self.tau**2) * x - sigma * mean) / variance

    def unembed(self, hidden, x, sigma):
        scale, shift = self.proj_out(hidden).view(len(x), 2, 1, 1, 1, 1).unbind(1)
        return self.exact(x, sigma).view_as(x) + scale * x + shift

    def forward(self, x, sigma):
        hidden = silu(self.time_embed(torch.stack([sigma, sigma**2], dim=1)))[:, None]
        for block in self.blocks:
            hidden = block(hidden)
        return self.unembed(hidden, x, sigma)


class MixtureBackbone(Backbone):
    blocks = ("blocks.0",)
    time_dependent = ("time_embed", "proj_out")

    def __init__(self, network):
        self.network, self.hidden_size = network, 8
        self.lora_targets = {"attention": r"blocks\.\d+\.mix"}

    def velocity(self, network, x, sigma, cond):
        return network(x, sigma)

    def null_conditioning(self, cond):
        return cond

    def encode_prompts(self, prompts):
        return {"label": torch.zeros(len(prompts), dtype=torch.int64)}

    def latent_shape(self, video=None):
        return SHAPE

    def decode(self, latents):
        return latents[:, :1].sigmoid()

    def token_grid(self, shape):
        return (1, 1, 1)

    def unembed(self, network, hidden, x, sigma, cond):
        return network.unembed(hidden, x, sigma)


@dataclass(kw_only=True)
class MixtureBackboneConfig(BackboneConfig):
    pairs: list[float] = field(default_factory=lambda: [6.0])
    tau: float = 0.3

    def build(self, seed=0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return MixtureBackbone(MixtureNetwork(self.pairs, self.tau))


class MixtureDataset(Dataset):
    def __init__(self, network, size):
        rng = generator("mixture data")
        means = network.means[torch.from_numpy(rng.integers(len(network.means), size=size))]
        noise = torch.from_numpy(rng.standard_normal((size, SIZE), dtype="float32"))
        self.latents = (means + network.tau * noise).view(size, *SHAPE)

    def __len__(self):
        return len(self.latents)

    def __getitem__(self, index):
        return Sample(self.latents[index], {"label": torch.tensor(0)})


@dataclass(kw_only=True)
class MixtureDataConfig(DatasetConfig):
    size: int = 256

    def build(self, backbone):
        return MixtureDataset(backbone.network, self.size)


@hookimpl
def register_components(components):
    components.register("backbone", "mixture", MixtureBackboneConfig, "the exact velocity of a mixture of Gaussians")
    components.register("dataset", "mixture", MixtureDataConfig, "a mixture of Gaussians")
