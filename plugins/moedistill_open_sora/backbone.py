"""Open-Sora 2.0 (arXiv 2503.09642), text to video: a flow model whose guidance leaves out steps.

Its network is diffusers' FluxTransformer2DModel, its VAE diffusers' AutoencoderKLHunyuanVideo, its text encoders are T5
and CLIP; see `published`. It has no pipeline of diffusers': it is sampled by moedistill's own sampler.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import click
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moedistill import (
    Conditioning,
    DiffusersModels,
    DiffusersModelsConfig,
    Guidance,
    Input,
    NonNegativeInt,
    PublishedWeights,
    Record,
    VideoSize,
    WeightPiece,
    convert_network,
    convert_text_model,
    read_json,
    tiny_t5,
    tiny_tokenizer,
)
from moedistill_open_sora import published

CHANNELS = 16
"""Of the latents; a token has those of 2×2, and as many of the frames that are given, with their mask."""
TEXT_LENGTH = 512
"""Tokens that T5 reads of a prompt, padding included: nothing masks it."""
POOLED_LENGTH = 77
"""Tokens of a prompt that CLIP reads, for the pooled text."""
MOST_FRAMES = 129
RECORD = Path(__file__).with_name("record.safetensors")


class OpenSoraBackbone(DiffusersModels):
    """Conditioning: `prompt_embeds` `[B, 512, 4096]` and `pooled_prompt_embeds` `[B, 768]`; to begin or end with given
    frames `image_latents` `[B, 17, T, H, W]`: a mask, 1 where a latent frame is given, and their latents as the network
    takes them, 0 elsewhere. Without them no frame is given.

    The teacher is guided by its text alone; with given frames the published sampling has a scale for them too, 3, for
    which a third forward is needed. Here it is 1.
    """

    fps = 24.0
    text_limits: Mapping[str, str | int] = {"tokenizer": "prompt_embeds", "tokenizer_2": POOLED_LENGTH}
    lora_targets: Mapping[str, str] = {
        "attention": r"(single_)?transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",
        "feed_forward": (
            r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)"
            r"|single_transformer_blocks\.\d+\.(proj_mlp|proj_out)"
        ),
    }
    time_dependent = ("time_text_embed", "norm_out", "proj_out")

    def __init__(self, config: "OpenSoraConfig", networks: Any) -> None:
        super().__init__(config, networks)
        network: Any = self.network
        self.blocks = [
            f"{kind}.{number}"
            for kind in ("transformer_blocks", "single_transformer_blocks")
            for number in range(len(getattr(network, kind)))
        ]
        self.hidden_size = network.config.num_attention_heads * network.config.attention_head_dim

    # -- the network --------------------------------------------------------------------------------------------------

    def predict(self, network: nn.Module, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        text, given = cond["prompt_embeds"], cond.get("image_latents")
        if given is None:
            given = x.new_zeros(len(x), CHANNELS + 1, *x.shape[2:])
        tokens: Tensor = network(
            hidden_states=torch.cat([_pack(x), _pack(given)], -1),
            encoder_hidden_states=text,
            pooled_projections=_with_time(cond, timestep),
            timestep=timestep / 1000.0,
            img_ids=self.places(x),
            txt_ids=x.new_zeros(text.shape[1], 3, dtype=torch.float32),
            return_dict=False,
        )[0]
        return self._unpack(tokens, x)

    def places(self, x: Tensor) -> Tensor:
        """Where each token is, (t, h, w), float32 `[N, 3]`."""
        axes = [torch.arange(size, dtype=torch.float32, device=x.device) for size in self.token_grid(x.shape)]
        return torch.cartesian_prod(*axes)

    def hidden(self, output: Any, tokens: int) -> Tensor:
        """See `Backbone.hidden`: blocks give the text, and the image."""
        return super().hidden(output[1], tokens)

    def unembed(self, network: nn.Module, hidden: Tensor, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        flux: Any = network
        hidden = hidden.to(flux.dtype)
        time = 1000.0 * sigma
        embedding = flux.time_text_embed(time.to(hidden.dtype), _with_time(cond, time))
        return self._unpack(flux.proj_out(flux.norm_out(hidden, embedding)), x)

    def _unpack(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Tokens `[B, T·H/2·W/2, C·2·2]` as latents, shaped as `x`."""
        patches = tokens.unflatten(1, self.token_grid(x.shape)).unflatten(-1, (-1, 2, 2))
        return patches.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)

    # -- text ---------------------------------------------------------------------------------------------------------

    def told(self, text: str) -> str:
        """A sentence, the frame rate and how much is to move, as in the published sampling."""
        text = text.strip()
        sentence = text if text.endswith(".") else f"{text}."
        if not re.search(r"\d+ FPS\.$", sentence):
            sentence = f"{sentence} {self.fps:g} FPS."
        score = self.config.motion_score
        return sentence if score is None else f"{sentence} {score} motion score."

    def encode_with(self, encoders: Any, prompts: list[str]) -> dict[str, Tensor]:
        length = self.config.inputs()["prompt_embeds"].shape[0]
        words = _tokens(encoders.tokenizer, prompts, length).to(encoders.text_encoder.device)
        more = _tokens(encoders.tokenizer_2, prompts, POOLED_LENGTH).to(encoders.text_encoder_2.device)
        return {
            "prompt_embeds": encoders.text_encoder(words).last_hidden_state,
            "pooled_prompt_embeds": encoders.text_encoder_2(more).pooler_output,
        }

    # -- latents ------------------------------------------------------------------------------------------------------

    def prepare(self, latents: Tensor, cond: Conditioning) -> tuple[Tensor, Conditioning]:
        latents, cond = super().prepare(latents, cond)
        if "image_latents" in cond:
            mask, given = cond["image_latents"].split([1, CHANNELS], 1)
            if not ((mask == 0) | (mask == 1)).all():
                raise ValueError("image_latents has other numbers than 0 and 1 in its first channel, which is the mask")
            if ((mask == 0) & (given != 0)).any():
                raise ValueError(
                    "image_latents has latents where its first channel, the mask, says that none are given"
                )
        return latents, cond

    @torch.no_grad()
    def native_trajectory(
        self, noise: Tensor, cond: Conditioning, num_steps: int, *, guided: bool = False
    ) -> list[tuple[float, Tensor]]:
        """The published sampling: its schedule for the size of `noise`, its guidance, its steps."""
        frames, height, width = noise.shape[2:]
        alpha = (1 + (height // 2 * (width // 2) - 256) * 2 / (4096 - 256)) * math.sqrt(frames)
        even = torch.linspace(1, 0, num_steps + 1)
        times = (alpha * even / (1 + (alpha - 1) * even)).tolist()
        x, passed = noise, [(1.0, noise)]
        guidance, null = self.config.guidance, self.null_conditioning(cond) if guided else cond
        scale = guidance.scale_of("transformer")
        for step, (time, following) in enumerate(pairwise(times)):
            native = torch.full((len(x),), 1000.0 * time, device=x.device)
            prediction = self._predict(self.network, x, native, cond).float()
            start = guidance.oscillate_from
            if guided and (start is None or step < start or step % 2 == 0):
                without = self._predict(self.network, x, native, null).float()
                prediction = without + scale * (prediction - without)
            x = x + (following - time) * prediction
            passed.append((following, x))
        return passed


@dataclass(kw_only=True)
class OpenSoraConfig(DiffusersModelsConfig):
    """Open-Sora 2.0, 11B.

    Args:
        motion_score: how much is to move, which each prompt is told; null to tell nothing of it.
    """

    video: VideoSize = field(default_factory=lambda: VideoSize(num_frames=129, height=192, width=336))
    guidance: Guidance = field(default_factory=lambda: Guidance(mode="classifier_free", scale=7.5, oscillate_from=10))
    motion_score: NonNegativeInt | None = 4

    backbone_class = OpenSoraBackbone
    download = (
        f"hpcai-tech/Open-Sora-v2: {published.NETWORK} (11.9 billion parameters), {published.VAE} (0.2 billion), and "
        f"the text encoders {published.T5} (4.8 billion without its decoder) and {published.CLIP} (0.1 billion); what "
        "lies beside them is not needed. The folder is taken as it is, and converted at its first use, which takes as "
        "much room again"
    )
    published_file = published.NETWORK
    folder = f"the published one (with {published.NETWORK}), or what `moedistill convert open_sora` makes of it"
    text_components = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    tiny_text: ClassVar[tuple[int, int, int]] = (10, 24, 16)
    """Length, width, and width of the pooled text."""

    def __post_init__(self) -> None:
        if self.guidance.mode == "embedded":
            raise ValueError("guidance.mode embedded: Open-Sora has no input for the scale; use classifier_free")

    def check(self) -> Iterable[tuple[str, str]]:
        yield from super().check()
        if self.video.num_frames > MOST_FRAMES:
            yield (
                "video.num_frames",
                f"{self.video.num_frames} are more than the model makes; give {MOST_FRAMES} or less",
            )

    def from_file(self) -> str:
        return "give the folder that it lies in, with the other files that are published beside it"

    def network_class(self) -> type:
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel

    def tiny_network(self) -> dict[str, Any]:
        _, text_width, pooled_width = self.tiny_text
        return {
            "patch_size": 1, "in_channels": 4 * (2 * CHANNELS + 1), "out_channels": 4 * CHANNELS, "num_layers": 1,
            "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
            "joint_attention_dim": text_width, "pooled_projection_dim": pooled_width, "axes_dims_rope": (4, 6, 6),
        }  # fmt: skip

    def tiny_vae(self) -> nn.Module:
        from diffusers import AutoencoderKLHunyuanVideo

        vae: Any = AutoencoderKLHunyuanVideo(
            latent_channels=CHANNELS, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
        )
        module: nn.Module = vae
        return module

    def tiny_text_encoders(self) -> dict[str, Any]:
        from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

        _, text_width, pooled_width = self.tiny_text
        tokenizer, numbers = tiny_tokenizer(begin=1, length=POOLED_LENGTH)
        sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        clip = CLIPTextConfig(hidden_size=pooled_width, **sizes, **numbers)  # type: ignore[arg-type]
        return {
            **tiny_t5(T5EncoderModel, T5Config, text_width),
            "text_encoder_2": CLIPTextModel(clip).eval(),
            "tokenizer_2": tokenizer,
        }

    @classmethod
    def text_classes(cls) -> Mapping[str, Any]:
        from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

        classes = (T5EncoderModel, AutoTokenizer, CLIPTextModel, AutoTokenizer)
        return dict(zip(cls.text_components, classes, strict=True))

    def real_network(self) -> dict[str, Any]:
        return {
            "patch_size": 1, "in_channels": 4 * (2 * CHANNELS + 1), "out_channels": 4 * CHANNELS, "num_layers": 19,
            "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
            "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": False,
            "axes_dims_rope": (16, 56, 56),
        }  # fmt: skip

    def wrap(self, networks: Mapping[str, nn.Module]) -> DiffusersModels:
        """See `DiffusersModelsConfig.wrap`; with the exact time."""
        from moedistill_open_sora.network import take_exact_time

        for network in networks.values():
            take_exact_time(network)
        return super().wrap(networks)

    def channels(self) -> int:
        return CHANNELS

    def patch_size(self) -> tuple[int, int, int]:
        return 1, 2, 2

    def inputs(self) -> dict[str, Input]:
        architecture = self.architecture()
        length = self.tiny_text[0] if self.pretrained is None else TEXT_LENGTH
        return {
            "prompt_embeds": Input("text", (length, architecture["joint_attention_dim"])),
            "pooled_prompt_embeds": Input("pooled", (architecture["pooled_projection_dim"],)),
            "image_latents": Input(
                "video", (CHANNELS + 1, None, None, None), droppable=False, required=False, frame_axis=1
            ),
        }

    def time_shift(self) -> float:
        """See `BackboneConfig.time_shift`: by tokens of a latent frame and by latent frames (`get_schedule`)."""
        _, frames, height, width = self.latent_shape()
        tokens = (height // 2) * (width // 2)
        return (1.0 + 2.0 * (tokens - 256) / 3840) * frames**0.5

    def check_folder(self, folder: Path) -> None:
        """Another model of the same class, such as FLUX, is refused."""
        file = folder / "transformer" / "config.json"
        own, wanted = read_json(file), self.real_network()
        for name in ("in_channels", "out_channels", "patch_size"):
            if own.get(name) != wanted[name]:
                raise ValueError(f"{file}: {name} is {own.get(name)}, of Open-Sora {wanted[name]}; it is another model")
        if own.get("guidance_embeds"):
            raise ValueError(f"{file}: guidance_embeds is true, of Open-Sora false; it is another model")

    # -- the published files ------------------------------------------------------------------------------------------

    @classmethod
    def make_folder(cls, source: Path, folder: Path) -> None:
        """See `DiffusersModelsConfig.make_folder`. A VAE or text encoders that are not there are left out, and said."""
        from diffusers import AutoencoderKLHunyuanVideo, FluxTransformer2DModel

        weights = PublishedWeights(source / published.NETWORK)
        config = published.network_config(weights)
        pieces = published.network_pieces(weights.names, config["attention_head_dim"])
        convert_network(weights, pieces, FluxTransformer2DModel, config, folder / "transformer")
        if (source / published.VAE).is_file():
            weights = PublishedWeights(source / published.VAE)
            pieces = (WeightPiece.renamed(name, name) for name in sorted(weights.names))
            convert_network(weights, pieces, AutoencoderKLHunyuanVideo, published.vae_config(weights), folder / "vae")
        classes = cls.text_classes()
        for place, number in ((published.T5, ""), (published.CLIP, "_2")):
            model, tokenizer = f"text_encoder{number}", f"tokenizer{number}"
            if (source / place).is_dir():
                convert_text_model(
                    classes[model], classes[tokenizer], source / place, folder / model, folder / tokenizer
                )
        parts = (published.VAE, published.T5, published.CLIP)
        if missing := [str(part) for part in parts if not (source / part).exists()]:
            click.echo(f"left out, as {source} has none: {', '.join(missing)}", err=True)

    def architecture(self) -> Mapping[str, Any]:
        """See `DiffusersModelsConfig.architecture`; of a published file by the shapes of its tensors."""
        found = self.find() if self.pretrained is not None and self._architecture is None else None
        if found is None or not self.as_published(found):
            return super().architecture()
        return published.network_config(PublishedWeights(found / published.NETWORK))

    def record(self, folder: Path) -> Record:
        """See `BackboneConfig.record`: of a miniature of the published network, in a file of this package."""
        tensors = PublishedWeights(RECORD)
        source, model = folder / "published", folder / "model"
        source.mkdir()
        own = {name.removeprefix("network."): tensors[name] for name in tensors.names if name.startswith("network.")}
        save_file(own, source / published.NETWORK)
        self.convert(source, model)
        text = {name: tensors[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
        return Record(
            config=self.replace(
                pretrained=str(model), revision=None, variant=None, dtype="float32", fps=None, motion_score=4
            ),
            x=tensors["latents"],
            sigma=tensors["sigma"],
            conditionings=[{**text, "image_latents": tensors["image_latents"]}, text],
            velocities=[tensors["velocity"], tensors["velocity_text_to_video"]],
            hidden=[tensors[f"hidden.{k}"] for k in range(4)],
            told={
                "a dog runs": "a dog runs. 24 FPS. 4 motion score.",
                " It rains. ": "It rains. 24 FPS. 4 motion score.",
                "A ball, 24 FPS.": "A ball, 24 FPS. 4 motion score.",
            },
        )


def _pack(x: Tensor) -> Tensor:
    """Latents `[B, C, T, H, W]` as tokens `[B, T·H/2·W/2, C·2·2]`."""
    patches = x.unflatten(4, (-1, 2)).unflatten(3, (-1, 2))  # [B, C, T, H/2, 2, W/2, 2]
    return patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4, 6).flatten(1, 3)


def _with_time(cond: Conditioning, timestep: Tensor) -> Tensor:
    """The pooled text, and behind it the time, exact: `[B, P + 1]` float32. See `network.ExactTime`."""
    return torch.cat([cond["pooled_prompt_embeds"].float(), timestep[:, None]], 1)


def _tokens(tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    """Padded to `length`, and cut."""
    tokens: Tensor = tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return tokens
