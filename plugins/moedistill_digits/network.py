"""A lean video diffusion transformer: 64 tokens of width 64, conditioned by adaptive layer norms (Peebles, Xie 2023).

It predicts the velocity of latents `[B, 12, 8, 4, 4]` at sigma, for a digit and a direction. Around the transformer F
stands the preconditioning of Karras et al. (2022), in flow coordinates. Latents of unit variance give x the variance
a² = (1-σ)² + σ², of which the best linear guess of v = ε - x0 is (2σ-1)/a²·x, and what that leaves has variance 1/a²:

    v(x, σ) = (2σ-1)/a² · x + 1/a · F(x/a, σ)

So F sees and predicts unit variance at every noise level, and need not carry the noise itself through its width.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moedistill_digits.codec import Codec
from moedistill_digits.data import DIGITS, DIRECTIONS

TIME_PATCH = 2


def patchify(x: Tensor) -> Tensor:
    """Tokens `[B, T/2·H·W, 2·C]` of latents `[B, C, T, H, W]`: one per place and pair of frames."""
    tokens = x.unflatten(2, (-1, TIME_PATCH)).permute(0, 2, 4, 5, 1, 3)
    return tokens.flatten(4).flatten(1, 3)


def unpatchify(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Latents `[B, C, T, H, W]` of tokens `[B, T/2·H·W, 2·C]` on a grid (T/2, H, W): the inverse of `patchify`."""
    x = tokens.unflatten(1, grid).unflatten(4, (-1, TIME_PATCH))
    return x.permute(0, 4, 1, 5, 2, 3).flatten(2, 3)


def preconditioning(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The factors (2σ-1)/a² and 1/a above, `[B, 1, 1, 1, 1]` float32, of sigma `[B]`."""
    sigma = sigma.float().view(-1, 1, 1, 1, 1)
    inverse_variance = 1.0 / ((1.0 - sigma).square() + sigma.square())
    return (2.0 * sigma - 1.0) * inverse_variance, inverse_variance.sqrt()


def modulate(hidden: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights of its own, then scale and shift `[B, 1, width]`."""
    return torch.addcmul(shift, F.layer_norm(hidden, hidden.shape[-1:]), 1.0 + scale)


class TimeEmbedding(nn.Module):
    """Sinusoids of the time, in float32 whatever the weights' dtype, and a two-layer perceptron."""

    def __init__(self, width: int, num_frequencies: int = 32) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.linear_1 = nn.Linear(2 * num_frequencies, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, timestep: Tensor) -> Tensor:
        """Embedding `[B, width]` of times `[B]` in [0, 1000]."""
        exponents = torch.arange(self.num_frequencies, device=timestep.device, dtype=torch.float32)
        angles = timestep.float()[:, None] * torch.exp(-math.log(10_000.0) / self.num_frequencies * exponents)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


class ConditionEmbedding(nn.Module):
    """Sum of the embeddings of digit and direction; the last entry of each table is the null condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.digit = nn.Embedding(DIGITS + 1, width)
        self.direction = nn.Embedding(len(DIRECTIONS) + 1, width)

    def forward(self, digit: Tensor, direction: Tensor) -> Tensor:
        """Embedding `[B, width]` of digits `[B]` and directions `[B]`."""
        return self.digit(digit) + self.direction(direction)


class Attention(nn.Module):
    """Self-attention over all tokens."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        q, k, v = (
            linear(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and perceptron, each scaled, shifted and gated by the time and condition embedding."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.attn = Attention(width, num_heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width), nn.GELU(approximate="tanh"), nn.Linear(mlp_ratio * width, width)
        )

    def forward(self, hidden: Tensor, temb: Tensor) -> Tensor:
        """New states `[B, tokens, width]` of `hidden`, given the embedding `temb` `[B, width]`."""
        modulation = self.modulation(F.silu(temb))[:, None].chunk(6, dim=-1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        hidden = torch.addcmul(hidden, gate_attn, self.attn(modulate(hidden, shift_attn, scale_attn)))
        return torch.addcmul(hidden, gate_mlp, self.mlp(modulate(hidden, shift_mlp, scale_mlp)))


class Overview(nn.Module):
    """A perceptron that reads the whole latent at once, and steers every block through the embedding it is added to.

    At high noise the layout hides in sums over all tokens, each weighted by its place. Attention over 64 noisy tokens
    learns those slowly; for a linear layer over the latent they are the natural thing.
    """

    def __init__(self, size: int, width: int, hidden_width: int) -> None:
        super().__init__()
        self.read = nn.Linear(size, hidden_width)
        self.condition = nn.Linear(width, hidden_width)
        self.combine = nn.Linear(hidden_width, hidden_width)
        self.steer = nn.Linear(hidden_width, width)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """What to add to the embedding `temb` `[B, width]`, of a latent `x` of unit variance `[B, 12, 8, 4, 4]`."""
        hidden = F.silu(self.read(x.flatten(1)) + self.condition(temb))
        return self.steer(F.silu(self.combine(hidden)))


class NormOut(nn.Module):
    """The final layer norm, scaled and shifted by the time and condition embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, hidden: Tensor, temb: Tensor) -> Tensor:
        shift, scale = self.linear(F.silu(temb))[:, None].chunk(2, dim=-1)
        return modulate(hidden, shift, scale)


class DigitsTransformer(nn.Module):
    """The denoising network.

    Args:
        width: of the tokens.
        num_layers: number of blocks.
        num_heads: attention heads; must divide `width`.
        mlp_ratio: width of the perceptrons' hidden layer over `width`.
        overview_ratio: the same of the perceptron that reads the whole latent.
    """

    grid = (Codec.latent_shape[1] // TIME_PATCH, *Codec.latent_shape[2:])
    """Tokens in time, height and width."""

    def __init__(
        self, width: int = 64, num_layers: int = 4, num_heads: int = 4, mlp_ratio: int = 4, overview_ratio: int = 3
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {num_heads}")
        channels = Codec.latent_shape[0] * TIME_PATCH
        self.time_embed = TimeEmbedding(width)
        self.condition_embed = ConditionEmbedding(width)
        self.patch_embed = nn.Linear(channels, width)
        self.overview = Overview(math.prod(Codec.latent_shape), width, overview_ratio * width)
        self.positions = nn.Parameter(torch.empty(math.prod(self.grid), width))
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio) for _ in range(num_layers))
        self.norm_out = NormOut(width)
        self.proj_out = nn.Linear(width, channels)
        self._checkpoint: Callable[..., Any] | None = None
        self._initialise()

    def _initialise(self) -> None:
        """Xavier for the linears; gates and output near zero, so that training starts from nearly the identity.

        Positions and conditions start as large as the tokens: from small ones training takes twice as long.
        """
        nn.init.normal_(self.positions)
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)
            elif isinstance(module, nn.Linear):
                near_zero = name.endswith("modulation") or name in ("norm_out.linear", "proj_out")
                # Not exactly zero: a network without training should depend on all its inputs and weights.
                nn.init.normal_(module.weight, std=0.02) if near_zero else nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None) -> None:
        """Recomputes the blocks' activations in the backward pass.

        Args:
            gradient_checkpointing_func: called as `func(module, *args)` for each block; by default torch's
                non-reentrant checkpoint.
        """
        self._checkpoint = gradient_checkpointing_func or (
            lambda module, *args: checkpoint(module.__call__, *args, use_reentrant=False)
        )

    def embed(self, sigma: Tensor, digit: Tensor, direction: Tensor) -> Tensor:
        """The embedding `[B, width]` of sigma `[B]` and the condition."""
        return self.time_embed(1000.0 * sigma.float()) + self.condition_embed(digit, direction)

    def unembed(self, hidden: Tensor, temb: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Velocity `[B, 12, 8, 4, 4]` of states `[B, 64, width]`: norm, projection, unpatchify, preconditioning."""
        skip, scale = preconditioning(sigma)
        prediction = unpatchify(self.proj_out(self.norm_out(hidden, temb)), self.grid)
        return skip * x + scale * prediction

    def forward(self, x: Tensor, sigma: Tensor, digit: Tensor, direction: Tensor) -> Tensor:
        """Velocity `[B, 12, 8, 4, 4]` at x of that shape, sigma `[B]` in [0, 1], digit and direction `[B]`."""
        temb = self.embed(sigma, digit, direction)
        _, scale = preconditioning(sigma)
        scaled = (scale * x).to(temb.dtype)
        steer = temb + self.overview(scaled, temb)
        hidden = self.patch_embed(patchify(scaled)) + self.positions
        for block in self.blocks:
            if self._checkpoint is not None and torch.is_grad_enabled():
                hidden = self._checkpoint(block, hidden, steer)
            else:
                hidden = block(hidden, steer)
        return self.unembed(hidden, temb, x, sigma)
