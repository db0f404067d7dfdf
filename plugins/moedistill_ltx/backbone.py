"""LTX-Video (diffusers' LTXVideoTransformer3DModel), text to video.

The network takes tokens `[B, T·H·W, C]`, one of each latent, and the pipeline holds latents in that shape too. Its
rotary embedding measures seconds and pixels: it must be told the frame rate and the VAE's compression.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moedistill import (
    ComfyUI,
    Conditioning,
    DiffusersBackbone,
    DiffusersBackboneConfig,
    Input,
    NativeNames,
    VideoSize,
    read_json,
    read_tensors,
    tiny_t5,
)
from moedistill_ltx.native import NAMES

TEXT_LENGTH = 128
"""Tokens that the pipeline pads a prompt to."""


class LTXBackbone(DiffusersBackbone):
    """Conditioning: `prompt_embeds` `[B, 128, 4096]` and `prompt_attention_mask` `[B, 128]`."""

    fps = 25.0
    text_limits: Mapping[str, str | int] = {"tokenizer": "prompt_embeds"}
    lora_targets: Mapping[str, str] = {"attention": r"transformer_blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"}
    # The final modulation is `scale_shift_table`, a parameter of the root, which no module holds: all experts share it.
    time_dependent = ("time_embed", "proj_out")

    def __init__(self, config: "LTXConfig", networks: Any) -> None:
        super().__init__(config, networks)
        network: Any = self.network
        self.blocks = [f"transformer_blocks.{k}" for k in range(network.config.num_layers)]
        self.hidden_size = network.proj_out.in_features

    # -- the network --------------------------------------------------------------------------------------------------

    def predict(self, network: nn.Module, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        t, h, w = x.shape[2:]
        tokens = network(
            hidden_states=_pack(x),
            encoder_hidden_states=cond["prompt_embeds"],
            timestep=timestep,
            encoder_attention_mask=cond["prompt_attention_mask"],
            num_frames=t,
            height=h,
            width=w,
            **self.as_trained(),
            return_dict=False,
        )[0]
        return _unpack(tokens, x.shape)

    def unembed(self, network: Any, hidden: Tensor, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        _, timestep = self.to_native(x, sigma)
        hidden = hidden.to(network.dtype)
        _, embedding = network.time_embed(timestep, batch_size=len(x), hidden_dtype=hidden.dtype)
        shift, scale = (network.scale_shift_table + embedding[:, None]).unsqueeze(2).unbind(1)  # each [B, 1, hidden]
        return _unpack(network.proj_out(network.norm_out(hidden) * (1 + scale) + shift), x.shape)

    # -- the pipeline -------------------------------------------------------------------------------------------------

    def to_pipeline(self, x: Tensor, sigma: float) -> Tensor:
        return _pack(x)

    def from_pipeline(self, latents: Tensor, sigma: float, shape: Sequence[int]) -> Tensor:
        return _unpack(latents, shape)

    def as_trained(self) -> dict[str, Any]:
        """See `DiffusersBackbone.as_trained`: seconds and pixels of a latent."""
        pixels = self.config.spatial_compression
        return {"rope_interpolation_scale": (self.config.temporal_compression / self.fps, pixels, pixels)}

    def pipeline_arguments(self) -> dict[str, Any]:
        return {**super().pipeline_arguments(), "frame_rate": self.fps}

    def decoder_arguments(self) -> dict[str, Any]:
        # From 0.9.1 on the VAE takes the noise level of its latents: none, as the pipeline has it by default.
        return {"temb": torch.zeros(1, device=self.device)} if self.config.vae_config["timestep_conditioning"] else {}

    # -- text and latents ---------------------------------------------------------------------------------------------

    def encode_with(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        length = self.config.inputs()["prompt_embeds"].shape[0]
        embeds, mask, _, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}


@dataclass(kw_only=True)
class LTXConfig(DiffusersBackboneConfig):
    """LTX-Video 2B, 0.9.0 and 0.9.1 (Lightricks/LTX-Video)."""

    video: VideoSize = field(default_factory=lambda: VideoSize(num_frames=161, height=512, width=704))

    backbone_class = LTXBackbone
    download = (
        "in diffusers' layout a transformer (1.9 billion parameters), the T5-XXL text encoder (4.8 billion) and the "
        "VAE (0.4 billion), at 4 bytes per parameter 28 GB. Lightricks/LTX-Video has single-file checkpoints as well, "
        "which --exclude 'ltx*' leaves out"
    )
    temporal_compression = 8
    spatial_compression = 32
    tiny_video = VideoSize(num_frames=17, height=64, width=96)

    def __post_init__(self) -> None:
        if self.guidance.mode == "embedded":
            raise ValueError("guidance.mode embedded: LTX-Video has no input for the scale; use classifier_free")

    def native_names(self) -> NativeNames:
        return NAMES

    def comfyui(self) -> ComfyUI:
        fps = self.fps or LTXBackbone.fps
        return ComfyUI(
            checkpoint="ltx-video-2b-v0.9.safetensors",
            text_encoders=("t5xxl_fp16.safetensors",),
            text_type="ltxv",
            latents="EmptyLTXVLatentVideo",
            fps=fps,
            told=("LTXVConditioning", ("positive", "negative"), fps),
        )

    def network_class(self) -> type:
        from diffusers import LTXVideoTransformer3DModel

        return LTXVideoTransformer3DModel

    def pipeline_class(self) -> type:
        from diffusers import LTXPipeline

        return LTXPipeline

    def tiny_network(self) -> dict[str, Any]:
        return {
            "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16,
            "cross_attention_dim": 32, "num_layers": 2, "caption_channels": 16,
        }  # fmt: skip

    def tiny_vae(self) -> nn.Module:
        from diffusers import AutoencoderKLLTXVideo

        widths, layers = (8, 8, 8, 8), (1, 1, 1, 1, 1)
        vae: Any = AutoencoderKLLTXVideo(
            latent_channels=8, block_out_channels=widths, decoder_block_out_channels=widths, layers_per_block=layers,
            decoder_layers_per_block=layers,
        )  # fmt: skip
        # A new VAE has mean 0 and standard deviation 1, which would hide a wrong scaling.
        vae.latents_mean += torch.linspace(-0.5, 0.5, 8)
        vae.latents_std += torch.linspace(-0.5, 0.5, 8)
        return vae

    def tiny_text_encoders(self) -> dict[str, Any]:
        from transformers import T5Config, T5EncoderModel

        return tiny_t5(T5EncoderModel, T5Config, self.tiny_network()["caption_channels"])

    def real_network(self) -> dict[str, Any]:
        return {
            "in_channels": 128, "out_channels": 128, "patch_size": 1, "patch_size_t": 1, "num_attention_heads": 32,
            "attention_head_dim": 64, "cross_attention_dim": 2048, "num_layers": 28, "caption_channels": 4096,
            "qk_norm": "rms_norm_across_heads", "norm_elementwise_affine": False, "norm_eps": 1e-6,
            "attention_bias": True, "attention_out_bias": True,
        }  # fmt: skip

    def patch_size(self) -> tuple[int, int, int]:
        return 1, 1, 1

    def inputs(self) -> dict[str, Input]:
        width = self.architecture()["caption_channels"]
        return {
            "prompt_embeds": Input("text", (TEXT_LENGTH, width), any_length=True),
            "prompt_attention_mask": Input("mask", (TEXT_LENGTH,), any_length=True, masks="prompt_embeds"),
        }

    def vae_moments(self) -> tuple[Tensor, Tensor]:
        """See `DiffusersBackboneConfig.vae_moments`: weights of the VAE here, which its config says nothing of."""
        names = ("latents_mean", "latents_std")
        if self.pretrained is None:
            vae = self.tiny_vae()
            mean, std = (vae.get_buffer(name) for name in names)
        else:
            mean, std = read_tensors(self.locate() / "vae", names)
        return mean.float(), std.float() / self.vae_numbers("scaling_factor")

    def check_folder(self, folder: Path) -> None:
        file = folder / "model_index.json"
        own = read_json(file).get("_class_name") if file.is_file() else None
        if own == "LTXConditionPipeline":
            raise ValueError(
                f"{self.pretrained} is made for {own}, as LTX-Video is from 0.9.5 on, and counts positions in another "
                "way; this backbone knows 0.9.0 and 0.9.1, those of LTXPipeline, such as Lightricks/LTX-Video"
            )

    def scheduler(self) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024,
            max_image_seq_len=4096, shift_terminal=0.1,
        )  # fmt: skip


def _pack(x: Tensor) -> Tensor:
    """Latents `[B, C, T, H, W]` as tokens `[B, T·H·W, C]`."""
    return x.flatten(2).transpose(1, 2)


def _unpack(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """Tokens as latents `[B, C, T, H, W]`, where `shape` ends in (T, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, tuple(shape[2:]))
