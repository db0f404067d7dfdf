"""HunyuanVideo 1.5 text-to-video (diffusers' HunyuanVideo15Transformer3DModel): a flow model that a guider guides.

The network is made for images too: beside the latents it takes those of an image with a mask, and tokens of the image.
Without an image all of them are zero, as its pipeline has them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moedistill import (
    Conditioning,
    DiffusersBackbone,
    DiffusersBackboneConfig,
    Input,
    VideoSize,
    read_json,
    tiny_t5,
    tiny_tokenizer,
)

TEXT_LENGTH = 1000
"""Tokens that the pipeline pads a prompt to, its template not counted."""

GLYPH_LENGTH = 256
"""Bytes that it pads quoted text to, which shall be read in the video; without any, all of them are padding."""

IMAGE_TOKENS = 729

TARGET_SIZES = {"hunyuanvideo-1.5-480p_t2v": 640, "hunyuanvideo-1.5-720p_t2v": 960}
"""What differs between the published networks, by `model_name`."""


class HunyuanVideo15Backbone(DiffusersBackbone):
    """Conditioning: `prompt_embeds` `[B, 1000, 3584]` and `prompt_embeds_mask` `[B, 1000]`, and of what a prompt has in
    quotes `prompt_embeds_2` `[B, 256, 1472]` and `prompt_embeds_mask_2` `[B, 256]`.
    """

    fps = 24.0
    text_limits: Mapping[str, str | int] = {"tokenizer": "prompt_embeds", "tokenizer_2": "prompt_embeds_2"}
    # With quotes, so that the second encoder has something to read.
    example_prompts = ('a dog runs past a sign "BEACH"', 'rain at night, and a neon "OPEN"', 'a ball says "hello"')
    lora_targets: Mapping[str, str] = {
        "attention": (
            r"(transformer_blocks|context_embedder\.token_refiner\.refiner_blocks)\.\d+\.attn\."
            r"(to_q|to_k|to_v|to_out\.0)"
        ),
        "feed_forward": r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)",
    }
    time_dependent = ("time_embed", "norm_out", "proj_out")
    time_shared = ("context_embedder",)  # our choice: as with HunyuanVideo

    def __init__(self, config: "HunyuanVideo15Config", networks: Any) -> None:
        super().__init__(config, networks)
        network: Any = self.network
        if network.config.task_type != "t2v" or network.config.use_meanflow:
            raise ValueError(
                f"a HunyuanVideo 1.5 network with task_type {network.config.task_type!r} and use_meanflow "
                f"{network.config.use_meanflow} is made for images, or distilled already: it takes what is not given "
                "here; use a text-to-video one, such as hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v"
            )
        self.blocks = [f"transformer_blocks.{number}" for number in range(len(network.transformer_blocks))]
        self.hidden_size = network.proj_out.in_features

    # -- the network --------------------------------------------------------------------------------------------------

    def predict(self, network: Any, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        batch, _, *size = x.shape
        image_and_mask = x.new_zeros(batch, x.shape[1] + 1, *size)
        prediction: Tensor = network(
            hidden_states=torch.cat([x, image_and_mask], 1),
            timestep=timestep,
            encoder_hidden_states=cond["prompt_embeds"],
            encoder_attention_mask=cond["prompt_embeds_mask"],
            encoder_hidden_states_2=cond["prompt_embeds_2"],
            encoder_attention_mask_2=cond["prompt_embeds_mask_2"],
            image_embeds=x.new_zeros(batch, IMAGE_TOKENS, network.config.image_embed_dim),
            return_dict=False,
        )[0]
        return prediction

    def unembed(self, network: Any, hidden: Tensor, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        _, timestep = self.to_native(x, sigma)
        patches = network.proj_out(network.norm_out(hidden.to(network.dtype), network.time_embed(timestep)))
        patches = patches.unflatten(1, self.token_grid(x.shape)).unflatten(-1, (-1, *self.config.patch_size()))
        # [B, T', H', W', C, p_t, p_h, p_w] → [B, C, T', p_t, H', p_h, W', p_w]
        latents: Tensor = patches.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return latents

    # -- the pipeline -------------------------------------------------------------------------------------------------

    def pipeline(self) -> Any:
        """See `DiffusersBackbone.pipeline`; with its guider switched off."""
        pipeline = super().pipeline()
        pipeline.guider = _guider(1.0)
        return pipeline

    def pipeline_arguments(self) -> dict[str, Any]:
        return {}  # `pipeline` has switched its guidance off

    def guiding_arguments(self, pipeline: Any, cond: Conditioning) -> dict[str, Any]:
        pipeline.guider = _guider(self.config.guidance.classifier_free_scale("transformer"))
        return {f"negative_{name}": value for name, value in self.null_conditioning(cond).items()}

    # -- text and latents ---------------------------------------------------------------------------------------------

    def text_for(self, tokenizer: str, text: str) -> str:
        """See `DiffusersBackbone.text_for`: the second one reads what stands in quotes."""
        from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import extract_glyph_texts

        found: Any = extract_glyph_texts(text) or "" if tokenizer == "tokenizer_2" else text
        return str(found)

    def encode_with(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        embeds, mask, embeds_2, mask_2 = pipeline.encode_prompt(prompts, device=self.device, batch_size=len(prompts))
        return {
            "prompt_embeds": embeds,
            "prompt_embeds_mask": mask.bool(),
            "prompt_embeds_2": embeds_2,
            "prompt_embeds_mask_2": mask_2.bool(),
        }


@dataclass(kw_only=True)
class HunyuanVideo15Config(DiffusersBackboneConfig):
    """HunyuanVideo 1.5 text-to-video, 480p and 720p."""

    video: VideoSize = field(default_factory=lambda: VideoSize(num_frames=121, height=480, width=848))

    backbone_class = HunyuanVideo15Backbone
    download = (
        "hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v: a transformer (8.3 billion parameters), the Qwen2.5-VL "
        "(7.1 billion) and ByT5 (0.2 billion) text encoders and the VAE (1.3 billion); at 2 bytes per parameter 34 GB"
    )
    text_components = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    spatial_compression = 16
    whole_pixels = 256 * 256  # its VAE takes all frames at once
    tiny_video = VideoSize(num_frames=9, height=32, width=48)
    tiny_text: ClassVar[tuple[tuple[int, int], tuple[int, int]]] = ((10, 24), (6, 16))
    """Lengths and widths of the two encoders' texts."""

    def __post_init__(self) -> None:
        if self.guidance.mode == "embedded":
            raise ValueError("guidance.mode embedded: HunyuanVideo 1.5 has no input for the scale; use classifier_free")

    def network_class(self) -> type:
        from diffusers import HunyuanVideo15Transformer3DModel

        return HunyuanVideo15Transformer3DModel

    def pipeline_class(self) -> type:
        from diffusers import HunyuanVideo15Pipeline

        return HunyuanVideo15Pipeline

    def pipeline_options(self) -> dict[str, Any]:
        return {"guider": _guider(1.0)}

    def text_pipeline_options(self) -> dict[str, Any]:
        # The pipeline's constructor asks a VAE for its channels and a guider for its passes.
        return {"vae": self.tiny_vae(), "guider": _guider(1.0)}

    def tiny_network(self) -> dict[str, Any]:
        (_, width), (_, width_2) = self.tiny_text
        return {
            "in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
            "num_refiner_layers": 1, "mlp_ratio": 2.0, "patch_size": 1, "patch_size_t": 1, "text_embed_dim": width,
            "text_embed_2_dim": width_2, "image_embed_dim": 8, "rope_axes_dim": (4, 4, 4), "task_type": "t2v",
        }  # fmt: skip

    def tiny_vae(self) -> nn.Module:
        from diffusers import AutoencoderKLHunyuanVideo15

        vae: Any = AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
        )
        module: nn.Module = vae
        return module

    def tiny_text_encoders(self) -> dict[str, Any]:
        from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, T5Config, T5EncoderModel

        (_, width), (_, width_2) = self.tiny_text
        tokenizer, ids = tiny_tokenizer(length=4096, words=["<system>", "<end>"])
        # The pipeline cuts the template off, by its length in the published tokenizer: 108 tokens.
        tokenizer.chat_template = "{{ '<system> ' * 108 }}{{ messages[1]['content'] }} <end>"
        sizes: dict[str, Any] = {
            "hidden_size": width, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
            "intermediate_size": 32, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2]},
        }  # fmt: skip
        qwen = Qwen2_5_VLTextConfig(**sizes, **ids)  # type: ignore[arg-type]
        byt5 = tiny_t5(T5EncoderModel, T5Config, width_2)
        return {
            "text_encoder": Qwen2_5_VLTextModel(qwen).eval(),
            "tokenizer": tokenizer,
            "text_encoder_2": byt5["text_encoder"],
            "tokenizer_2": byt5["tokenizer"],
        }

    def real_network(self) -> dict[str, Any]:
        return {
            "in_channels": 65, "out_channels": 32, "num_attention_heads": 16, "attention_head_dim": 128,
            "num_layers": 54, "num_refiner_layers": 2, "mlp_ratio": 4.0, "patch_size": 1, "patch_size_t": 1,
            "qk_norm": "rms_norm", "text_embed_dim": 3584, "text_embed_2_dim": 1472, "image_embed_dim": 1152,
            "rope_theta": 256.0, "rope_axes_dim": (16, 56, 56), "use_meanflow": False, "task_type": "t2v",
            "target_size": TARGET_SIZES.get(self.model_name(), 640),
        }  # fmt: skip

    def patch_size(self) -> tuple[int, int, int]:
        architecture = self.architecture()
        side = architecture["patch_size"]
        return architecture["patch_size_t"], side, side

    def inputs(self) -> dict[str, Input]:
        architecture = self.architecture()
        miniature = self.pretrained is None
        length, length_2 = (n for n, _ in self.tiny_text) if miniature else (TEXT_LENGTH, GLYPH_LENGTH)
        return {
            "prompt_embeds": Input("text", (length, architecture["text_embed_dim"]), any_length=True),
            "prompt_embeds_mask": Input("mask", (length,), any_length=True, masks="prompt_embeds"),
            "prompt_embeds_2": Input("text", (length_2, architecture["text_embed_2_dim"]), any_length=True),
            "prompt_embeds_mask_2": Input(
                "mask", (length_2,), any_length=True, masks="prompt_embeds_2", may_be_empty=True
            ),
        }

    def check_folder(self, folder: Path) -> None:
        file = folder / "model_index.json"
        own = read_json(file).get("_class_name") if file.is_file() else None
        if own not in (None, "HunyuanVideo15Pipeline"):
            raise ValueError(
                f"{self.pretrained} is made for {own}; this backbone knows text-to-video models, those of "
                "HunyuanVideo15Pipeline, such as hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v"
            )


def _guider(scale: float) -> Any:
    """What guides the pipeline at `scale`; at 1 it has one pass."""
    from diffusers import ClassifierFreeGuidance

    return ClassifierFreeGuidance(guidance_scale=scale)
