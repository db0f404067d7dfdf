"""The digits backbone: the lean video diffusion transformer behind moedistill's backbone contract."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, cast

import torch
from annotated_types import Gt, Le
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from moedistill import Backbone, BackboneConfig, Input, PositiveInt, Prompt, SampleLayout, VideoSize
from moedistill_digits.codec import CODEC_FILE, Codec
from moedistill_digits.data import CANVAS, DIGITS, DIRECTIONS, FRAMES, NULL_DIGIT, NULL_DIRECTION
from moedistill_digits.network import DigitsTransformer

TEACHER_FILE = Path(__file__).with_name("teacher.safetensors")


def load_weights(network: nn.Module, pretrained: str) -> None:
    """Loads `pretrained` ("builtin", or the path of a .safetensors file) into `network`.

    Raises:
        ValueError: the file is missing, is no safetensors file, or its names and shapes are not the network's.
    """
    path = TEACHER_FILE if pretrained == "builtin" else Path(pretrained)
    if not path.is_file():
        way_out = (
            "train the teacher first (recipes/digits_teacher.yaml)"
            if pretrained == "builtin"
            else 'give the path of a .safetensors file, or "builtin" for the shipped teacher'
        )
        raise ValueError(f"pretrained {pretrained}: there is no file {path}; {way_out}, or null for random weights")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"pretrained {pretrained}: {path} is not a safetensors file ({error})") from error
    problems = _misfits({name: tensor.shape for name, tensor in network.state_dict().items()}, weights)
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems[:5])
        more = f"\n  … and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"pretrained {pretrained}: the weights in {path} do not fit the network:\n{listed}{more}\n"
            "set width, num_layers and num_heads to those the weights were trained with, or give other weights"
        )
    network.load_state_dict(weights)


def _misfits(shapes: Mapping[str, torch.Size], weights: Mapping[str, Tensor]) -> list[str]:
    """One line for each way in which `weights` differ from a network with tensors of `shapes`."""
    missing = [f"missing: {name} {list(shape)}" for name, shape in shapes.items() if name not in weights]
    unknown = [f"unknown: {name} {list(tensor.shape)}" for name, tensor in weights.items() if name not in shapes]
    unequal = [
        f"{name}: the file has {list(weights[name].shape)}, the network {list(shape)}"
        for name, shape in shapes.items()
        if name in weights and weights[name].shape != shape
    ]
    return missing + unknown + unequal


class DigitsBackbone(Backbone):
    """A `DigitsTransformer` and the fixed codec. Latents are `[B, 12, 8, 4, 4]`, videos `[B, 1, 8, 24, 24]`.

    Conditioning: `digit` `[B]` int64, 0..9 or 10 for null, and `direction` `[B]` int64, 0..3 (right, left, down, up) or
    4 for null.
    """

    lora_targets: Mapping[str, str] = {"attention": r"blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out)"}
    time_dependent: Sequence[str] = ("time_embed", "norm_out", "proj_out")
    # It tells the overview what to look for, by an embedding of which every expert makes the time's part itself.
    time_shared: Sequence[str] = ("overview.condition",)
    example_prompts: Sequence[str] = ("3 right", "7 up", "0 down")

    def __init__(self, network: DigitsTransformer) -> None:
        self.network = network
        self.codec = Codec.load()
        self.blocks = [f"blocks.{index}" for index in range(len(network.blocks))]
        self.hidden_size = network.patch_embed.out_features

    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        self.token_grid(x.shape)
        velocity: Tensor = network(x, sigma, cond["digit"], cond["direction"])
        return velocity.to(x.dtype)

    def null_conditioning(self, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            "digit": torch.full_like(cond["digit"], NULL_DIGIT),
            "direction": torch.full_like(cond["direction"], NULL_DIRECTION),
        }

    def encode_prompts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Conditioning of prompts such as "3 right"; the empty prompt is the null condition.

        Raises:
            ValueError: a prompt is anything else.
        """
        pairs = [_parse_prompt(prompt.text) for prompt in prompts]
        digits, directions = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
        return {"digit": digits, "direction": directions}

    def prepare(self, latents: Tensor, cond: Mapping[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """See `Backbone.prepare`.

        Raises:
            ValueError: a digit or a direction is none.
        """
        for name, null in (("digit", NULL_DIGIT), ("direction", NULL_DIRECTION)):
            if name in cond and not ((cond[name] >= 0) & (cond[name] <= null)).all():
                raise ValueError(f"{name} {cond[name].tolist()} must be from 0 to {null}, which stands for none")
        return latents, cond

    def stored(self, latents: Tensor) -> Tensor:
        return latents

    def captions(self, cond: Mapping[str, Tensor]) -> list[str]:
        """The prompts that `encode` would take."""
        pairs = zip(cond["digit"].tolist(), cond["direction"].tolist(), strict=True)
        return ["" if digit == NULL_DIGIT else f"{digit} {DIRECTIONS[direction]}" for digit, direction in pairs]

    def latent_shape(self, video: VideoSize | None = None) -> tuple[int, int, int, int]:
        if video is not None and video != VideoSize(num_frames=FRAMES, height=CANVAS, width=CANVAS):
            raise ValueError(f"digits have {FRAMES} frames of {CANVAS}×{CANVAS} pixels, and no other size")
        return Codec.latent_shape

    def decode(self, latents: Tensor) -> Tensor:
        return self.codec.decode(latents)

    def token_grid(self, shape: Sequence[int]) -> tuple[int, int, int]:
        if tuple(shape[1:]) != Codec.latent_shape:
            raise ValueError(f"latents {list(shape)}: the digits network takes {['B', *Codec.latent_shape]} only")
        return DigitsTransformer.grid

    def unembed(
        self, network: nn.Module, hidden: Tensor, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor]
    ) -> Tensor:
        transformer = cast(DigitsTransformer, network)
        temb = transformer.embed(sigma, cond["digit"], cond["direction"])
        return transformer.unembed(hidden, temb, x, sigma).to(x.dtype)

    def encode_videos(self, videos: Tensor) -> Tensor:
        """See `Backbone.encode_videos`: of coloured videos the mean of the colours."""
        frames, height, width = videos.shape[2:]
        self.latent_shape(VideoSize(num_frames=frames, height=height, width=width))  # raises
        return self.codec.encode(videos.mean(1, keepdim=True))

    def revisions(self) -> dict[str, str]:
        """See `Backbone.revisions`: the codec's file; text is parsed, in one way."""
        return {"vae": hashlib.sha256(CODEC_FILE.read_bytes()).hexdigest()[:32], "text": "1"}

    @torch.no_grad()
    def native_trajectory(
        self, noise: Tensor, cond: Mapping[str, Tensor], num_steps: int, *, guided: bool = False
    ) -> list[tuple[float, Tensor]] | None:
        """Euler steps of the bare network, whose output is dx/dsigma, on the grid of the recipes, shift 2.5."""
        if guided:
            return None  # there is no sampler that guides it but ours
        uniform = torch.linspace(1.0, 0.0, num_steps + 1)
        sigmas = (2.5 * uniform / (1.0 + 1.5 * uniform)).tolist()
        samples = [noise]
        for sigma, following in pairwise(sigmas):
            slope = self.network(samples[-1], noise.new_full((len(noise),), sigma), cond["digit"], cond["direction"])
            samples.append(samples[-1] + (following - sigma) * slope)
        return list(zip(sigmas, samples, strict=True))


def _parse_prompt(prompt: str) -> tuple[int, int]:
    """Digit and direction of a prompt, both null for the empty one."""
    words = prompt.lower().split()
    if not words:
        return NULL_DIGIT, NULL_DIRECTION
    digits = [str(digit) for digit in range(DIGITS)]
    if len(words) != 2 or words[0] not in digits or words[1] not in DIRECTIONS:
        raise ValueError(
            f'prompt "{prompt}": give a digit (0 to {DIGITS - 1}) and a direction ({", ".join(DIRECTIONS)}), '
            'such as "3 right", or an empty prompt for neither'
        )
    return digits.index(words[0]), DIRECTIONS.index(words[1])


@dataclass(kw_only=True)
class DigitsBackboneConfig(BackboneConfig):
    """The tiny video diffusion transformer of the digits task.

    Args:
        pretrained: `builtin` for the shipped teacher, the path of a .safetensors file, or null for random weights.
        width, num_layers, num_heads: size of the network; the shipped teacher has 64, 4 and 4.
    """

    pretrained: str | None = "builtin"
    width: Annotated[int, Gt(0), Le(16_384)] = 64
    num_layers: Annotated[int, Gt(0), Le(1000)] = 4
    num_heads: PositiveInt = 4

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.guidance.mode == "embedded":
            raise ValueError(
                "guidance.mode embedded: the digits network has no input for the scale; use none or classifier_free"
            )

    def layout(self) -> SampleLayout:
        number = Input("scalar", (), whole=True)
        return SampleLayout(Codec.latent_shape[0], Codec.latent_shape[1:], {"digit": number, "direction": number})

    def build(self, seed: int = 0) -> DigitsBackbone:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = DigitsTransformer(self.width, self.num_layers, self.num_heads)
        if self.pretrained is not None:
            load_weights(network, self.pretrained)
        return DigitsBackbone(network.to(getattr(torch, self.dtype)))

    def tiny(self) -> "DigitsBackboneConfig":
        return DigitsBackboneConfig(
            pretrained=None, width=16, num_layers=2, num_heads=2, dtype=self.dtype, guidance=self.guidance
        )
