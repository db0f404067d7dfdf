"""HunyuanVideo text-to-video (diffusers' HunyuanVideoTransformer3DModel): a flow model that is told its guidance."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

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
    tiny_tokenizer,
)
from moedistill_hunyuan_video.native import IN_COMFYUI, NAMES

TEXT_LENGTH = 256

POOLED_LENGTH = 77
"""Tokens of a prompt that CLIP reads, for the pooled text."""


class HunyuanVideoBackbone(DiffusersBackbone):
    """Conditioning: `prompt_embeds` `[B, 256, 4096]`, `prompt_attention_mask` `[B, 256]` (text first, padding last),
    `pooled_prompt_embeds` `[B, 768]`; `guidance` `[B]` overrides the embedded scale.

    The network is told `guidance.scale` with `guidance.mode: embedded`, and 1 otherwise, as the pipeline tells it where
    it is guided by two forwards.
    """

    fps = 24.0
    text_limits: Mapping[str, str | int] = {"tokenizer": "prompt_embeds", "tokenizer_2": POOLED_LENGTH}
    scale_arguments = ("true_cfg_scale",)
    lora_targets: Mapping[str, str] = {
        "attention": (
            r"((single_)?transformer_blocks|context_embedder\.token_refiner\.refiner_blocks)\.\d+\.attn\."
            r"(to_q|to_k|to_v|to_out\.0)"
        ),
        "feed_forward": (
            r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)"
            r"|single_transformer_blocks\.\d+\.(proj_mlp|proj_out)"
        ),
    }
    time_dependent = ("time_text_embed", "norm_out", "proj_out")
    time_shared = ("context_embedder",)  # as in the published training

    def __init__(self, config: "HunyuanVideoConfig", networks: Any) -> None:
        super().__init__(config, networks)
        network: Any = self.network
        if network.config.image_condition_type is not None:
            raise ValueError(
                f"a HunyuanVideo network with image_condition_type {network.config.image_condition_type!r} is made for "
                "image-to-video; use a text-to-video one, such as hunyuanvideo-community/HunyuanVideo"
            )
        if config.guidance.mode == "embedded" and not network.config.guidance_embeds:
            raise ValueError(
                "guidance.mode embedded: this network has no input for the scale (guidance_embeds is false in its "
                "config); use classifier_free"
            )
        self.blocks = [
            f"single_transformer_blocks.{number}" for number in range(len(network.single_transformer_blocks))
        ]
        self.hidden_size = network.config.num_attention_heads * network.config.attention_head_dim

    @property
    def _scale(self) -> float:
        """What the network is told, unless `guidance` says otherwise."""
        return self.config.guidance.embedded_scale("transformer")

    def _guidance(self, network: Any, timestep: Tensor, cond: Conditioning) -> Tensor | None:
        """The embedded scale `[B]` as the network takes it, float32 like the time; None for one that takes none."""
        if not network.config.guidance_embeds:
            return None
        if "guidance" in cond:
            return 1000.0 * cond["guidance"].float()
        return torch.full_like(timestep, 1000.0 * self._scale)

    def predict(self, network: nn.Module, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        prediction: Tensor = network(
            hidden_states=x,
            timestep=timestep,
            encoder_hidden_states=cond["prompt_embeds"],
            encoder_attention_mask=cond["prompt_attention_mask"],
            pooled_projections=cond["pooled_prompt_embeds"],
            guidance=self._guidance(network, timestep, cond),
            return_dict=False,
        )[0]
        return prediction

    def unembed(self, network: nn.Module, hidden: Tensor, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        hunyuan: Any = network
        timestep, pooled = 1000.0 * sigma, cond["pooled_prompt_embeds"].to(hunyuan.dtype)
        embedding = hunyuan.time_text_embed(timestep, pooled, self._guidance(network, timestep, cond))[0]
        patches = hunyuan.proj_out(hunyuan.norm_out(hidden.to(hunyuan.dtype), embedding))
        patches = patches.unflatten(1, self.token_grid(x.shape)).unflatten(-1, (-1, *self.config.patch_size()))
        # [B, T', H', W', C, p_t, p_h, p_w] → [B, C, T', p_t, H', p_h, W', p_w]
        latents: Tensor = patches.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return latents

    def encode_with(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        embeds, pooled, mask = pipeline.encode_prompt(prompts, max_sequence_length=TEXT_LENGTH, device=self.device)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask.bool(), "pooled_prompt_embeds": pooled}

    def pipeline_arguments(self) -> dict[str, Any]:
        return {"guidance_scale": self._scale}


@dataclass(kw_only=True)
class HunyuanVideoConfig(DiffusersBackboneConfig):
    """HunyuanVideo text-to-video, 13B."""

    video: VideoSize = field(default_factory=lambda: VideoSize(num_frames=129, height=720, width=1280))

    backbone_class = HunyuanVideoBackbone
    download = (
        "hunyuanvideo-community/HunyuanVideo: a transformer (12.8 billion parameters), the LLaMA (8 billion) and CLIP "
        "(0.1 billion) text encoders and the VAE (0.2 billion); at 2 bytes per parameter 43 GB"
    )
    text_components = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    tiny_text: ClassVar[tuple[int, int, int]] = (10, 24, 16)
    """Length, width, and width of the pooled text."""

    def native_names(self) -> NativeNames:
        return NAMES

    def comfyui(self) -> ComfyUI:
        scale = self.guidance.student_scale or self.guidance.embedded_scale("transformer")
        return ComfyUI(
            networks={"transformer": "hunyuan_video_t2v_720p_bf16.safetensors"},
            text_encoders=("clip_l.safetensors", "llava_llama3_fp16.safetensors"),
            text_type="hunyuan_video",
            vae="hunyuan_video_vae_bf16.safetensors",
            latents="EmptyHunyuanLatentVideo",
            fps=self.fps or HunyuanVideoBackbone.fps,
            told=("FluxGuidance", ("conditioning",), scale),
            renamed=IN_COMFYUI,
        )

    def network_class(self) -> type:
        from diffusers import HunyuanVideoTransformer3DModel

        return HunyuanVideoTransformer3DModel

    def pipeline_class(self) -> type:
        from diffusers import HunyuanVideoPipeline

        return HunyuanVideoPipeline

    def tiny_network(self) -> dict[str, Any]:
        _, text_width, pooled_width = self.tiny_text
        return {
            "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "num_single_layers": 2,
            "num_refiner_layers": 1, "mlp_ratio": 2.0, "in_channels": 16, "out_channels": 16, "patch_size": 2,
            "patch_size_t": 1, "guidance_embeds": True, "text_embed_dim": text_width,
            "pooled_projection_dim": pooled_width, "rope_axes_dim": (4, 4, 4),
        }  # fmt: skip

    def tiny_vae(self) -> nn.Module:
        from diffusers import AutoencoderKLHunyuanVideo

        vae: Any = AutoencoderKLHunyuanVideo(
            latent_channels=16, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
        )
        module: nn.Module = vae
        return module

    def tiny_text_encoders(self) -> dict[str, Any]:
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
        from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

        _, text_width, pooled_width = self.tiny_text
        template: Any = DEFAULT_PROMPT_TEMPLATE
        words = template["template"].split()
        # The pipeline cuts the template off, by its length in the published tokenizer.
        before = template["crop_start"] - len(template["template"].split("{}")[0].split())
        llama_tokenizer, llama = tiny_tokenizer(begin=before, end=False, words=words)
        clip_tokenizer, clip = tiny_tokenizer(begin=1, length=77)
        sizes = {"num_attention_heads": 2, "intermediate_size": 32}
        return {
            "text_encoder": LlamaModel(
                LlamaConfig(hidden_size=text_width, num_hidden_layers=3, **sizes, **llama)  # type: ignore[arg-type]
            ).eval(),
            "tokenizer": llama_tokenizer,
            "text_encoder_2": CLIPTextModel(
                CLIPTextConfig(hidden_size=pooled_width, num_hidden_layers=1, **sizes, **clip)  # type: ignore[arg-type]
            ).eval(),
            "tokenizer_2": clip_tokenizer,
        }

    def real_network(self) -> dict[str, Any]:
        return {
            "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 20, "num_single_layers": 40,
            "num_refiner_layers": 2, "mlp_ratio": 4.0, "in_channels": 16, "out_channels": 16, "patch_size": 2,
            "patch_size_t": 1, "qk_norm": "rms_norm", "guidance_embeds": True, "text_embed_dim": 4096,
            "pooled_projection_dim": 768, "rope_theta": 256.0, "rope_axes_dim": (16, 56, 56),
        }  # fmt: skip

    def patch_size(self) -> tuple[int, int, int]:
        architecture = self.architecture()
        side = architecture["patch_size"]
        return architecture["patch_size_t"], side, side

    def inputs(self) -> dict[str, Input]:
        architecture = self.architecture()
        length = self.tiny_text[0] if self.pretrained is None else TEXT_LENGTH
        return {
            "prompt_embeds": Input("text", (length, architecture["text_embed_dim"]), any_length=True),
            "prompt_attention_mask": Input("mask", (length,), any_length=True, masks="prompt_embeds"),
            "pooled_prompt_embeds": Input("pooled", (architecture["pooled_projection_dim"],)),
        }

    def unpack(self, cond: Conditioning) -> Conditioning:
        """See `BackboneConfig.unpack`. Published sets pack the pooled text into the first row of `prompt_embeds`, which
        the mask does not cover.
        """
        text, mask = cond.get("prompt_embeds"), cond.get("prompt_attention_mask")
        if "pooled_prompt_embeds" in cond or text is None or mask is None or text.shape[1] != mask.shape[1] + 1:
            return cond
        width = self.architecture()["pooled_projection_dim"]
        return {**cond, "prompt_embeds": text[:, 1:], "pooled_prompt_embeds": text[:, 0, :width]}
