"""Wan 2.1 and 2.2 (diffusers' WanTransformer3DModel): a flow model with classifier-free guidance.

Wan 2.2 A14B is two networks, of which `transformer` serves the high noise and `transformer_2` the low.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moedistill import (
    ComfyUI,
    Conditioning,
    DiffusersBackbone,
    DiffusersBackboneConfig,
    Fraction,
    Input,
    NativeNames,
    TimestepRouter,
    Trajectory,
    VideoSize,
    read_json,
    tiny_t5,
)
from moedistill_wan.native import NAMES

TEXT_LENGTH = 512
"""Tokens that the pipeline pads a prompt to, with zeros after the text encoder: the network takes no mask."""

IMAGE_TOKENS = 257
"""Of an image, as CLIP ViT-H/14 encodes it for Wan 2.1."""

IMAGE_INPUTS = ("image_latents", "image_embeds")

SMALL: Mapping[str, int] = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
LARGE: Mapping[str, int] = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
"""Of 14 billion parameters; both networks of Wan 2.2 A14B have it."""
SIZES = {"wan2.1-t2v-1.3b": SMALL, "wan2.1-t2v-14b": LARGE, "wan2.2-t2v-a14b": LARGE}
"""What differs between the published networks, by `model_name`."""


class WanBackbone(DiffusersBackbone):
    """Conditioning: `prompt_embeds` `[B, 512, 4096]`; shorter text that is stored is padded with zeros.

    For image-to-video, which can be trained but not sampled by the text-to-video pipeline, also `image_latents`
    `[B, 20, T, H, W]`, mask and image latents as WanImageToVideoPipeline makes them, and, in Wan 2.1, `image_embeds`
    `[B, 257, 1280]`; from the first and the last frame `[B, 514, 1280]`.
    """

    fps = 16.0
    text_limits: Mapping[str, str | int] = {"tokenizer": "prompt_embeds"}
    lora_targets: Mapping[str, str] = {
        "attention": r"blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
        "feed_forward": r"blocks\.\d+\.ffn\.net\.(0\.proj|2)",
    }
    # The final modulation is `scale_shift_table`, a parameter of the root, which no module holds: all experts share it,
    # as in the published training.
    time_dependent = ("condition_embedder", "norm_out", "proj_out")
    scale_arguments = ("guidance_scale", "guidance_scale_2")

    def __init__(self, config: "WanConfig", networks: Any) -> None:
        super().__init__(config, networks)
        network: Any = self.network
        self.blocks = [f"blocks.{number}" for number in range(len(network.blocks))]
        self.hidden_size = network.config.num_attention_heads * network.config.attention_head_dim
        self.from_images = network.config.in_channels != network.config.out_channels
        if network.config.image_dim is not None and config.pretrained is not None:
            self.image_frames = (0, -1) if self._last_is_given else (0,)
        self._from_images = [name for name in IMAGE_INPUTS if name in config.inputs()]

    def predict(self, network: nn.Module, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        for name in self._from_images:
            if name not in cond:
                raise ValueError(f"this network makes videos from images; store {name} with the samples")
        if self.from_images:
            x = torch.cat([x, cond["image_latents"]], 1)
        prediction: Tensor = network(
            hidden_states=x,
            timestep=timestep,
            encoder_hidden_states=cond["prompt_embeds"],
            encoder_hidden_states_image=self._images(cond),
            return_dict=False,
        )[0]
        return prediction

    def _images(self, cond: Conditioning) -> Tensor | None:
        """Image tokens as the network takes them: those of two images one after the other, in the batch."""
        images = cond.get("image_embeds")
        network: Any = self.network
        if images is None or network.config.pos_embed_seq_len is None:
            return images
        return images.unflatten(1, (2, -1)).flatten(0, 1)

    @property
    def _last_is_given(self) -> bool:
        """Whether the network makes videos from their first and last frame, whose tokens it tells apart by place."""
        return self.config.architecture().get("pos_embed_seq_len") is not None

    def given_frames(self, videos: Tensor) -> dict[str, Tensor]:
        """See `Backbone.given_frames`: `image_latents` are a mask, for each frame of a latent frame one channel, and
        latents of the given frames in a grey video, normalised.
        """
        if not self.from_images:
            return {}
        given = [0, -1] if self._last_is_given else [0]
        shown = torch.full_like(videos, 0.5)
        shown[:, :, given] = videos[:, :, given]
        latents = self.normalise(self.encode_videos(shown))
        mask = latents.new_zeros(len(latents), self.config.temporal_compression, *latents.shape[2:])
        mask[:, :, 0] = 1
        if self._last_is_given:
            mask[:, -1, -1] = 1
        return {"image_latents": torch.cat([mask, latents], 1)}

    def encode_images_with(self, encoders: Any, images: list[Any]) -> dict[str, Tensor]:
        """See `DiffusersModels.encode_images_with`: CLIP's last states but one, of two images one after the other."""
        pixels = encoders.image_processor(images=images, return_tensors="pt").to(self.device)
        states = encoders.image_encoder(**pixels, output_hidden_states=True).hidden_states[-2]
        return {"image_embeds": states.flatten(0, 1)}

    def unembed(self, network: nn.Module, hidden: Tensor, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        wan: Any = network
        text = cond["prompt_embeds"].to(wan.dtype)
        embedding = wan.condition_embedder(1000.0 * sigma, text, None)[0]
        shift, scale = (wan.scale_shift_table + embedding[:, None]).chunk(2, dim=1)
        hidden = (wan.norm_out(hidden.float()) * (1 + scale) + shift).to(text.dtype)
        grid, patch = self.token_grid(x.shape), self.config.patch_size()
        patches = wan.proj_out(hidden).unflatten(1, grid).unflatten(-1, (*patch, -1))
        # [B, T', H', W', p_t, p_h, p_w, C] → [B, C, T', p_t, H', p_h, W', p_w]
        latents: Tensor = patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return latents

    def encode_with(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        length = self.config.inputs()["prompt_embeds"].shape[0]
        embeds, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=length, device=self.device
        )
        return {"prompt_embeds": embeds}

    def pipeline(self) -> Any:
        """See `DiffusersBackbone.pipeline`; with plain Euler steps where the model has a multistep scheduler."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        if self.from_images:
            raise ValueError("this network makes videos from images, which cannot be sampled here")
        pipeline = super().pipeline()
        own = pipeline.scheduler.config
        if not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
            pipeline.scheduler = FlowMatchEulerDiscreteScheduler(own.num_train_timesteps, shift=own.flow_shift)
        return pipeline

    def native_trajectory(
        self, noise: Tensor, cond: Conditioning, num_steps: int, *, guided: bool = False
    ) -> list[tuple[float, Tensor]] | None:
        return None if self.from_images else super().native_trajectory(noise, cond, num_steps, guided=guided)


@dataclass(kw_only=True)
class WanConfig(DiffusersBackboneConfig):
    """Wan 2.1 T2V 1.3B and 14B, and Wan 2.2 A14B.

    Args:
        boundary_ratio: of a model of two networks, such as Wan 2.2 A14B: from this sigma up `transformer` serves, below
            it `transformer_2`. It must be the model's own (0.875 for text-to-video). null for one network.
    """

    video: VideoSize = field(default_factory=lambda: VideoSize(num_frames=81, height=480, width=832))
    boundary_ratio: Fraction | None = None

    backbone_class = WanBackbone
    download = (
        "a transformer (Wan 2.1: 1.4 or 14.3 billion parameters; Wan 2.2 A14B: two of 14.3 billion), the UMT5-XXL text "
        "encoder (5.7 billion) and the VAE; at 2 bytes per parameter 14, 40 and 69 GB"
    )
    vae_dtype = torch.float32
    in_lightx2v = True
    optional_arguments = ("image_dim", "pos_embed_seq_len")
    tiny_text: ClassVar[tuple[int, int]] = (12, 24)

    def __post_init__(self) -> None:
        if self.guidance.mode == "embedded":
            raise ValueError("guidance.mode embedded: Wan has no input for the scale; use classifier_free")

    def bases(self) -> tuple[str, ...]:
        return ("transformer",) if self.boundary_ratio is None else ("transformer", "transformer_2")

    def teacher_router(self, trajectory: Trajectory) -> TimestepRouter | None:
        if self.boundary_ratio is None:
            return None
        return TimestepRouter.from_ratio(self.bases(), [self.boundary_ratio], closed="high")

    def native_names(self) -> NativeNames:
        return NAMES

    def comfyui(self) -> ComfyUI:
        size = "1.3B" if self.model_name().endswith("1.3b") else "14B"
        if self.boundary_ratio is None:
            networks = {"transformer": f"wan2.1_t2v_{size}_fp16.safetensors"}
        else:
            noises = zip(self.bases(), ("high", "low"), strict=True)
            networks = {base: f"wan2.2_t2v_{noise}_noise_14B_fp16.safetensors" for base, noise in noises}
        from_images = any(name in self.inputs() for name in IMAGE_INPUTS)
        return ComfyUI(
            networks=networks,
            text_encoders=("umt5_xxl_fp16.safetensors",),
            text_type="wan",
            vae="wan_2.1_vae.safetensors",
            latents=None if from_images else "EmptyHunyuanLatentVideo",
            fps=self.fps or WanBackbone.fps,
        )

    def network_class(self) -> type:
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel

    def pipeline_class(self) -> type:
        from diffusers import WanPipeline

        return WanPipeline

    def pipeline_options(self) -> dict[str, Any]:
        return {"boundary_ratio": self.boundary_ratio}

    def tiny_network(self) -> dict[str, Any]:
        return {
            "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "ffn_dim": 64, "freq_dim": 32,
            "text_dim": self.tiny_text[1], "in_channels": 16, "out_channels": 16, "patch_size": (1, 2, 2),
        }  # fmt: skip

    def tiny_vae(self) -> nn.Module:
        from diffusers import AutoencoderKLWan

        cls: Any = AutoencoderKLWan
        vae: nn.Module = cls(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        return vae

    def tiny_text_encoders(self) -> dict[str, Any]:
        from transformers import UMT5Config, UMT5EncoderModel

        return tiny_t5(UMT5EncoderModel, UMT5Config, self.tiny_text[1])

    def real_network(self) -> dict[str, Any]:
        return {
            **SIZES.get(self.model_name(), LARGE), "attention_head_dim": 128, "freq_dim": 256, "text_dim": 4096,
            "in_channels": 16, "out_channels": 16, "patch_size": (1, 2, 2),
        }  # fmt: skip

    def patch_size(self) -> tuple[int, int, int]:
        t, h, w = self.architecture()["patch_size"]
        return t, h, w

    def image_classes(self) -> Mapping[str, Any]:
        from transformers import CLIPImageProcessor, CLIPVisionModel

        with_images = self.architecture().get("image_dim") is not None
        return {"image_encoder": CLIPVisionModel, "image_processor": CLIPImageProcessor} if with_images else {}

    def inputs(self) -> dict[str, Input]:
        network = self.architecture()
        length = self.tiny_text[0] if self.pretrained is None else TEXT_LENGTH
        inputs = {"prompt_embeds": Input("text", (length, network["text_dim"]), padded=True)}
        if added := network.get("in_channels", network["out_channels"]) - network["out_channels"]:
            shape = (added, None, None, None)
            inputs["image_latents"] = Input("video", shape, droppable=False, frame_axis=1)
        if width := network.get("image_dim"):
            tokens = network.get("pos_embed_seq_len") or IMAGE_TOKENS
            inputs["image_embeds"] = Input("image", (tokens, width), droppable=False)
        return inputs

    def vae_moments(self) -> tuple[Tensor, Tensor]:
        return self.vae_numbers("latents_mean"), self.vae_numbers("latents_std")

    def check_folder(self, folder: Path) -> None:
        file = folder / "model_index.json"
        if not file.is_file():
            return  # the transformer alone
        index = read_json(file)
        if index.get("expand_timesteps"):
            raise ValueError(f"{self.pretrained} has another VAE and a time for each token (Wan 2.2 5B): not supported")
        own = index.get("boundary_ratio")
        if own != self.boundary_ratio:
            wanted = "null: it is one network" if own is None else str(own)
            raise ValueError(
                f"boundary_ratio {self.boundary_ratio} is not that of {self.pretrained}; "
                f"set backbone.boundary_ratio to {wanted}"
            )
