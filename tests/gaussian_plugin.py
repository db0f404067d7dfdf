"""A backbone and a dataset for which everything is known: Gaussian latents, and a network that computes their velocity.

Data are N(μ, τ²), independent, with μ and τ by channel. So x_σ is N(m, s²), m = (1-σ)·μ, s² = (1-σ)²·τ² + σ²; the exact
velocity is linear in x, and so is the exact flow map: x(σ') = m(σ') + s(σ')/s(σ)·(x - m(σ)).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import one_hot, silu

from moedistill import hookimpl
from moedistill.data.base import Dataset, DatasetConfig, Sample
from moedistill.model.backbone import Backbone, BackboneConfig
from moedistill.runtime.randomness import generator

SHAPE = (4, 2, 2, 2)
MU = torch.tensor([1.0, -0.5, 0.3, -1.5]).view(4, 1, 1, 1)
TAU = torch.tensor([0.4, 0.5, 0.6, 0.7]).view(4, 1, 1, 1)


def column(sigma):
    """`sigma`, a number or `[B]`, shaped to broadcast over `[B, C, T, H, W]`."""
    return torch.as_tensor(sigma).view(-1, 1, 1, 1, 1)


def moments(sigma):
    """Mean and standard deviation of x at `sigma`, by channel."""
    sigma = column(sigma)
    return (1 - sigma) * MU, torch.sqrt((1 - sigma) ** 2 * TAU**2 + sigma**2)


def posterior_mean(x, sigma):
    """E[x0 | x at `sigma`]."""
    mean, std = moments(sigma)
    return MU + (1 - column(sigma)) * TAU**2 / std**2 * (x - mean)


def velocity(x, sigma):
    """The exact velocity E[noise - x0 | x]: (x - E[x0 | x]) / σ, without the 0/0 at σ = 0."""
    (mean, std), sigma = moments(sigma), column(sigma)
    return (sigma - (1 - sigma) * TAU**2) / std**2 * (x - mean) - MU


def flow_map(x, sigma, sigma_to):
    """Where the exact probability-flow ODE takes x from `sigma` to `sigma_to`."""
    (mean, std), (mean_to, std_to) = moments(sigma), moments(sigma_to)
    return mean_to + std_to / std * (x - mean)


class TimeEmbedding(nn.Module):
    """Legendre polynomials of sigma in each of `phases` equal ranges (low, high]: smooth inside, free at the edges."""

    def __init__(self, width, phases):
        super().__init__()
        self.phases = phases
        self.linear = nn.Linear(5 * phases, width)

    def forward(self, sigma):
        phase = (sigma * self.phases).ceil().clamp(1, self.phases) - 1
        t = 2 * (sigma * self.phases - phase) - 1
        cubic, quartic = (5 * t**3 - 3 * t) / 2, (35 * t**4 - 30 * t**2 + 3) / 8
        polynomials = torch.stack([torch.ones_like(t), t, (3 * t**2 - 1) / 2, cubic, quartic], dim=1)
        inside = one_hot(phase.long(), self.phases)[:, :, None]
        return silu(self.linear((inside * polynomials[:, None]).flatten(1)))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, hidden):
        return hidden + silu(self.mix(hidden))


class GaussianNetwork(nn.Module):
    """The exact velocity plus a residual `scale(σ)·(x - m)/s + shift(σ)` by channel, at first the constant `bias`.

    The hidden state is one token, which knows only sigma.
    """

    def __init__(self, width, phases, bias):
        super().__init__()
        self.time_embed = TimeEmbedding(width, phases)
        self.blocks = nn.ModuleList([Block(width)])
        self.proj_out = nn.Linear(width, 2 * len(MU))
        nn.init.zeros_(self.proj_out.weight)
        nn.init.constant_(self.proj_out.bias, bias)

    def unembed(self, hidden, x, sigma):
        scale, shift = self.proj_out(hidden).view(len(x), -1, 1, 1, 1).chunk(2, dim=1)
        mean, std = moments(sigma)
        return velocity(x, sigma) + scale * (x - mean) / std + shift

    def forward(self, x, sigma):
        hidden = self.time_embed(sigma)[:, None]
        for block in self.blocks:
            hidden = block(hidden)
        return self.unembed(hidden, x, sigma)


class GaussianBackbone(Backbone):
    blocks = ("blocks.0",)
    time_dependent = ("time_embed", "proj_out")

    def __init__(self, network, hidden_size):
        self.network, self.hidden_size = network, hidden_size
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
class GaussianBackboneConfig(BackboneConfig):
    width: int = 32
    phases: int = 1
    bias: float = 0.0

    def build(self, seed=0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return GaussianBackbone(GaussianNetwork(self.width, self.phases, self.bias), self.width)


class GaussianDataset(Dataset):
    def __init__(self, size):
        noise = generator("gaussian data").standard_normal((size, *SHAPE), dtype="float32")
        self.latents = MU + TAU * torch.from_numpy(noise)

    def __len__(self):
        return len(self.latents)

    def __getitem__(self, index):
        return Sample(self.latents[index], {"label": torch.tensor(0)})

    def posterior_mean(self, x, sigma, cond):
        """Of the Gaussian itself, not of the samples drawn from it."""
        return posterior_mean(x, sigma)


@dataclass(kw_only=True)
class GaussianDataConfig(DatasetConfig):
    size: int = 4096
    provides: ClassVar[frozenset[str]] = DatasetConfig.provides | {"posterior_mean"}

    def build(self, backbone):
        return GaussianDataset(self.size)


@hookimpl
def register_components(components):
    components.register("backbone", "gaussian", GaussianBackboneConfig, "the exact velocity plus a small network")
    components.register("dataset", "gaussian", GaussianDataConfig, "independent Gaussians")
