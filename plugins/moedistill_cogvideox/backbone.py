"""CogVideoX (diffusers' CogVideoXTransformer3DModel): a variance-preserving model with v-prediction.

Its noise levels are a table of 1000 entries, its native times their numbers; between two entries the time is
interpolated. Inside the network and its pipeline latents are `[B, T, C, H, W]`.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from moedistill import (
    Conditioning,
    DiffusersBackbone,
    DiffusersBackboneConfig,
    Input,
    SampleLayout,
    Trajectory,
    VideoSize,
    from_vp,
    read_json,
    sigma_from_vp,
    tiny_t5,
    to_vp,
    velocity_from_vp,
)

SCHEDULE: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
}
"""Settings of the noise schedule that all published models share, by diffusers' names."""
TEXT_LENGTH = 226
"""Tokens that the pipeline pads a prompt to."""
OFFSET = 2.0
"""What the pipeline gives as `ofs`."""


@dataclass(frozen=True)
class Published:
    """What differs between the published models, as far as it can be known without a folder."""

    snr_shift_scale: float
    num_heads: int
    num_layers: int
    rotary: bool
    patch_size_t: int | None
    sample_size: tuple[int, int]
    """Of the network's config, in latents; of 1.5 the largest that its positions are counted for."""
    fps: float
    num_frames: int
    height: int
    width: int


PUBLISHED = {
    "2b": Published(3.0, 30, 30, False, None, (60, 90), 8.0, 49, 480, 720),
    "5b": Published(1.0, 48, 42, True, None, (60, 90), 8.0, 49, 480, 720),
    "1.5-5b": Published(1.0, 48, 42, True, 2, (300, 300), 16.0, 81, 768, 1360),
}
NAMES = {"cogvideox-2b": "2b", "cogvideox-5b": "5b", "cogvideox1.5-5b": "1.5-5b"}
"""Which of them a model is, by `model_name`."""


@cache
def sigma_table(snr_shift_scale: float) -> Tensor:
    """Sigma `[1000]`, float32, of each native time; the last is exactly 1.

    Betas whose roots are evenly spaced; the signal-to-noise ratio divided by `snr_shift_scale`; then sqrt(alpha_bar)
    stretched so that its last value is 0 (arXiv 2305.08891, algorithm 1). In float64, as diffusers' scheduler has it.
    """
    first, last = SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5
    betas = torch.linspace(first, last, SCHEDULE["num_train_timesteps"], dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)
    alpha = (alpha_bar / (snr_shift_scale + (1 - snr_shift_scale) * alpha_bar)).sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return sigma_from_vp(alpha, (1 - alpha**2).sqrt()).float()


@lru_cache(maxsize=8)
def rotary_embedding(
    head_dim: int, grid: tuple[int, int, int], base: tuple[int, int], resized: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[T'·H'·W', head_dim]` of a token grid (T', H', W'), as CogVideoXPipeline makes them.

    Args:
        base: the (H', W') that the model was trained at.
        resized: whether the grid is stretched over `base` (1.0), or counted from 0 (1.5).
    """
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    region = get_resize_crop_region_for_grid(grid[1:], base[1], base[0]) if resized else None
    cosines, sines = get_3d_rotary_pos_embed(
        head_dim,
        crops_coords=region,
        grid_size=grid[1:],
        temporal_size=grid[0],
        grid_type="linspace" if resized else "slice",
        max_size=None if resized else base,
        device=device,
    )
    return cosines, sines


class CogVideoXBackbone(DiffusersBackbone):
    """Conditioning: `prompt_embeds` `[B, 226, 4096]`; for image-to-video, which can be trained but not sampled by the
    text-to-video pipeline, also `image_latents` `[B, 16, T, H, W]` and, in 1.5, `ofs` `[B]` (2 where it is not given).

    In 1.5 two latent frames make a token, and a video has an odd number of them. As in its training and its pipeline,
    the first stands there twice; `decode` drops it.
    """

    prediction_type = "v_prediction"
    text_limits: Mapping[str, str | int] = {"tokenizer": "prompt_embeds"}
    lora_targets: Mapping[str, str] = {
        "attention": r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)",
        "feed_forward": r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)",
    }
    # Not `ofs_embedding`: it is told the same constant at every time. Its output is added to that of `time_embedding`,
    # whose copy can make up for it.
    time_dependent = ("time_embedding", "norm_out", "proj_out")

    def __init__(self, config: "CogVideoXConfig", networks: Any) -> None:
        self.fps = PUBLISHED[config.model].fps
        super().__init__(config, networks)
        network: Any = self.network
        self.blocks = [f"transformer_blocks.{number}" for number in range(len(network.transformer_blocks))]
        self.hidden_size = network.config.num_attention_heads * network.config.attention_head_dim
        self.from_images = network.config.in_channels != network.config.out_channels
        self._times = Trajectory.native(config.native_sigmas())

    def to_native(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """See `DiffusersBackbone.to_native`; ValueError for a sigma that the model has no time for."""
        return to_vp(x, sigma), self._times.timestep(sigma.float())

    def from_native(self, prediction: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        return velocity_from_vp(x, prediction, sigma)

    def to_pipeline(self, x: Tensor, sigma: float) -> Tensor:
        return to_vp(x, sigma).transpose(1, 2)

    def from_pipeline(self, latents: Tensor, sigma: float, shape: Any) -> Tensor:
        return from_vp(latents.transpose(1, 2), sigma)

    def predict(self, network: nn.Module, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        grid = self.token_grid(x.shape)
        if self.from_images:
            if "image_latents" not in cond:
                raise ValueError("this network makes videos from images; store image_latents with the samples")
            x = torch.cat([x, cond["image_latents"]], 1)
        prediction: Tensor = network(
            hidden_states=x.transpose(1, 2),
            encoder_hidden_states=cond["prompt_embeds"],
            timestep=timestep,
            ofs=self._ofs(cond),
            image_rotary_emb=self._rotary(grid, x.device),
            return_dict=False,
        )[0]
        return prediction.transpose(1, 2)

    def unembed(self, network: nn.Module, hidden: Tensor, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        cogvideox: Any = network
        dtype = cogvideox.dtype
        embedding = cogvideox.time_embedding(cogvideox.time_proj(self._times.timestep(sigma.float())).to(dtype))
        if cogvideox.ofs_embedding is not None:
            embedding = embedding + cogvideox.ofs_embedding(cogvideox.ofs_proj(self._ofs(cond)).to(dtype))
        hidden = cogvideox.norm_out(cogvideox.norm_final(hidden.to(dtype)), temb=embedding)
        grid, patch = self.token_grid(x.shape), self.config.patch_size()
        patches = cogvideox.proj_out(hidden).unflatten(1, grid).unflatten(-1, (-1, *patch))
        # [B, T', H', W', C, p_t, p_h, p_w] → [B, C, T', p_t, H', p_h, W', p_w]
        latents: Tensor = patches.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return latents

    def _ofs(self, cond: Conditioning) -> Tensor | None:
        network: Any = self.network
        if network.ofs_embedding is None:
            return None
        text = cond["prompt_embeds"]
        return cond.get("ofs", text.new_full(text.shape[:1], OFFSET))

    def _rotary(self, grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor] | None:
        config: Any = self.network.config
        if not config.use_rotary_positional_embeddings:
            return None
        base = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
        return rotary_embedding(config.attention_head_dim, grid, base, config.patch_size_t is None, device)

    def encode_with(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        length = self.config.inputs()["prompt_embeds"].shape[0]
        embeds, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=length, device=self.device
        )
        return {"prompt_embeds": embeds}

    def prepare(self, latents: Tensor, cond: Conditioning) -> tuple[Tensor, Conditioning]:
        latents, cond = super().prepare(latents, cond)
        videos = self.config.layout().of_role("video")
        left_over = latents.shape[2] % self.config.patch_size()[0]
        padded = torch.cat([latents[:, :, :left_over], latents], 2)
        # Those of images stand at the beginning, as the model's own pipeline has them: what is added are zeros.
        return padded, {
            name: pad(value, [0, 0, 0, 0, 0, left_over]) if name in videos else value for name, value in cond.items()
        }

    def given_frames(self, videos: Tensor) -> dict[str, Tensor]:
        """See `Backbone.given_frames`: `image_latents` are the first frame's, scaled, and zeros after it."""
        if not self.from_images:
            return {}
        scale = self.config.vae_numbers("scaling_factor")
        first = self.encode_videos(videos[:, :, :1])
        first = first / scale.to(first) if self.config.vae_config["invert_scale_latents"] else first * scale.to(first)
        frames = (videos.shape[2] - 1) // self.config.temporal_compression
        return {"image_latents": pad(first, [0, 0, 0, 0, 0, frames])}

    def stored(self, latents: Tensor) -> Tensor:
        return super().stored(self._without_padding(latents))

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(self._without_padding(latents))

    def _without_padding(self, latents: Tensor) -> Tensor:
        return latents[:, :, self.config.patch_size()[0] - 1 :]

    def pipeline(self) -> Any:
        """See `DiffusersBackbone.pipeline`; its scheduler is the deterministic one, whichever the folder names."""
        from diffusers import CogVideoXDDIMScheduler

        if self.from_images:
            raise ValueError(
                "this model makes videos from images, which cannot be sampled here; use a text-to-video one"
            )
        pipeline = super().pipeline()
        pipeline.scheduler = CogVideoXDDIMScheduler.from_config(pipeline.scheduler.config)
        return pipeline

    def scheduler_sigmas(self, scheduler: Any) -> list[float]:
        """See `DiffusersBackbone.scheduler_sigmas`: the last step goes to alpha 1."""
        alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps.cpu()]
        return [*sigma_from_vp(alpha_bar.sqrt(), (1 - alpha_bar).sqrt()).tolist(), 0.0]

    def native_trajectory(
        self, noise: Tensor, cond: Conditioning, num_steps: int, *, guided: bool = False
    ) -> list[tuple[float, Tensor]] | None:
        """See `Backbone.native_trajectory`, in at most `num_steps` steps, a divisor of 1000.

        Of other numbers the scheduler's steps don't end where the next ones start.
        """
        if self.from_images:
            return None
        steps = max(n for n in range(1, num_steps + 1) if 1000 % n == 0)
        return super().native_trajectory(noise, cond, steps, guided=guided)


@dataclass(kw_only=True)
class CogVideoXConfig(DiffusersBackboneConfig):
    """CogVideoX 2B, 5B, and 1.5.

    Args:
        model: which one: `2b`, `5b` or `1.5-5b`. Noise levels, positions and tokens depend on it.
        video: null for the size that the model was published with.
    """

    model: Literal["2b", "5b", "1.5-5b"] = "2b"
    video: VideoSize | None = None  # type: ignore[assignment]

    backbone_class = CogVideoXBackbone
    download = (
        "a transformer (2B: 1.7 billion parameters, 5B and 1.5: 5.6), the T5-XXL text encoder (4.8) and the VAE (0.2); "
        "at 2 bytes per parameter 13 or 21 GB"
    )
    tiny_text: ClassVar[tuple[int, int]] = (12, 24)
    optional_arguments = ("patch_size_t", "ofs_embed_dim")

    def __post_init__(self) -> None:
        if self.guidance.mode == "embedded":
            raise ValueError("guidance.mode embedded: CogVideoX has no input for the scale; use classifier_free")
        if self.video is None:
            own = self._published
            self.video = VideoSize(num_frames=own.num_frames, height=own.height, width=own.width)

    @property
    def _published(self) -> Published:
        return PUBLISHED[self.model]

    def native_sigmas(self) -> Tensor:
        return sigma_table(self._published.snr_shift_scale)

    def linear_copies(self, copies: Mapping[str, Tensor], original: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """See `DiffusersBackboneConfig.linear_copies`: the final norm's own scale and shift go into the linear that
        modulates it.

        `(g'·n + b')·(1 + scale) + shift` is `(g·n + b)·(1 + scale') + shift'` with `r = g'/g`, `q = b' - r·b`,
        `scale' = r·scale + r - 1` and `shift' = shift + q·scale + q`, and the linear gives shift and scale.
        """
        norm, linear = "norm_out.norm", "norm_out.linear"
        new = {name: copies[name] for name in copies if not name.startswith(norm)}
        if len(new) == len(copies):
            return new
        gain, bias = (original(f"{norm}.{name}").double() for name in ("weight", "bias"))
        r = copies[f"{norm}.weight"].double() / gain
        q = copies[f"{norm}.bias"].double() - r * bias
        if not bool((gain.abs() > 1e-4).all()):  # what is scaled to nothing cannot be scaled back
            return dict(copies)
        for name, one in (("weight", 0.0), ("bias", 1.0)):
            whole = copies.get(f"{linear}.{name}", original(f"{linear}.{name}"))
            shift, scale = whole.double().chunk(2)
            ratio, added = (value.view(-1, *[1] * (scale.ndim - 1)) for value in (r, q))
            folded = [shift + added * scale + added * one, ratio * scale + (ratio - 1) * one]
            new[f"{linear}.{name}"] = torch.cat(folded).float()
        return new

    def network_class(self) -> type:
        from diffusers import CogVideoXTransformer3DModel

        return CogVideoXTransformer3DModel

    def pipeline_class(self) -> type:
        from diffusers import CogVideoXPipeline

        return CogVideoXPipeline

    def scheduler(self) -> Any:
        from diffusers import CogVideoXDDIMScheduler

        return CogVideoXDDIMScheduler(
            **SCHEDULE, snr_shift_scale=self._published.snr_shift_scale,
            clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing",
        )  # fmt: skip

    def tiny_network(self) -> dict[str, Any]:
        length, width = self.tiny_text
        # Positions of 1.5 are counted, and only up to the sample size: it keeps the published one.
        sample = (4, 6) if self._published.patch_size_t is None else self._published.sample_size
        return {
            "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "time_embed_dim": 16,
            "text_embed_dim": width, "max_text_seq_length": length, "in_channels": 16, "out_channels": 16,
            "sample_height": sample[0], "sample_width": sample[1], "sample_frames": 17, "patch_size": 2,
            "patch_size_t": self._published.patch_size_t, "patch_bias": self._published.patch_size_t is None,
            "use_rotary_positional_embeddings": self._published.rotary,
        }  # fmt: skip

    def tiny_vae(self) -> nn.Module:
        from diffusers import AutoencoderKLCogVideoX

        scaling_factor = 0.7 if self._published.rotary else 1.15258426
        cls: Any = AutoencoderKLCogVideoX
        vae: nn.Module = cls(
            block_out_channels=(8, 8, 8, 8), norm_num_groups=2, layers_per_block=1, scaling_factor=scaling_factor
        )
        return vae

    def tiny_text_encoders(self) -> dict[str, Any]:
        from transformers import T5Config, T5EncoderModel

        return tiny_t5(T5EncoderModel, T5Config, self.tiny_text[1])

    def real_network(self) -> dict[str, Any]:
        """See `DiffusersModelsConfig.real_network`: of an unknown name that of `model`."""
        own = PUBLISHED[NAMES.get(self.model_name(), self.model)]
        height, width = own.sample_size
        return {
            "num_attention_heads": own.num_heads, "attention_head_dim": 64, "num_layers": own.num_layers,
            "time_embed_dim": 512, "text_embed_dim": 4096, "max_text_seq_length": TEXT_LENGTH, "in_channels": 16,
            "out_channels": 16, "sample_height": height, "sample_width": width, "sample_frames": own.num_frames,
            "patch_size": 2, "patch_size_t": own.patch_size_t, "patch_bias": own.patch_size_t is None,
            "temporal_compression_ratio": 4, "spatial_interpolation_scale": 1.875, "temporal_interpolation_scale": 1.0,
            "use_rotary_positional_embeddings": own.rotary, "use_learned_positional_embeddings": False,
        }  # fmt: skip

    def patch_size(self) -> tuple[int, int, int]:
        architecture = self.architecture()
        return architecture.get("patch_size_t") or 1, architecture["patch_size"], architecture["patch_size"]

    def layout(self) -> SampleLayout:
        """See `BackboneConfig.layout`: any number of frames fits, because `prepare` pads it, but text of one length."""
        usual = super().layout()
        return SampleLayout(usual.channels, (1, *usual.multiple[1:]), self.inputs())

    def latent_shape(self, video: VideoSize | None = None) -> tuple[int, int, int, int]:
        """See `Backbone.latent_shape`: frames are one and a multiple of 8; in 1.5 with one latent frame of padding."""
        video = video or self.video
        assert video is not None  # set when the config was made
        lower = (video.num_frames - 1) // 8 * 8 + 1
        if lower != video.num_frames:  # the VAE decodes latent frames in pairs, and makes more of an even number
            raise ValueError(
                f"num_frames {video.num_frames} must be 1 more than a multiple of 8: {lower} or {lower + 8}"
            )
        padding = self.temporal_compression * (self.patch_size()[0] - 1)
        return super().latent_shape(VideoSize(**{**vars(video), "num_frames": video.num_frames + padding}))

    def inputs(self) -> dict[str, Input]:
        architecture = self.architecture()
        inputs = {"prompt_embeds": Input("text", (architecture["max_text_seq_length"], architecture["text_embed_dim"]))}
        if added := architecture.get("in_channels", architecture["out_channels"]) - architecture["out_channels"]:
            shape = (added, None, None, None)
            inputs["image_latents"] = Input("video", shape, droppable=False, frame_axis=1)
        if architecture.get("ofs_embed_dim"):
            inputs["ofs"] = Input("scalar", (), droppable=False, required=False)
        return inputs

    def check_folder(self, folder: Path) -> None:
        network = read_json(folder / "transformer" / "config.json")
        rotary, patch_size_t = bool(network.get("use_rotary_positional_embeddings")), network.get("patch_size_t")
        fitting = [name for name, own in PUBLISHED.items() if (own.rotary, own.patch_size_t) == (rotary, patch_size_t)]
        if self.model not in fitting:
            raise ValueError(
                f"model {self.model} is not that of {self.pretrained}, whose transformer has "
                f"use_rotary_positional_embeddings {rotary} and patch_size_t {patch_size_t}; "
                + (f"set backbone.model to {fitting[0]}" if fitting else "no published model has both")
            )
        file = folder / "scheduler" / "scheduler_config.json"
        if not file.is_file():
            return  # the transformer alone
        parameters = inspect.signature(type(self.scheduler())).parameters
        found = {name: parameter.default for name, parameter in parameters.items()} | read_json(file)
        for name, own in {**SCHEDULE, "snr_shift_scale": self._published.snr_shift_scale}.items():
            if found[name] != own:
                raise ValueError(
                    f"{file} has {name} {found[name]}, but model {self.model} was published with {own}, and its noise "
                    "levels follow from that; set backbone.model to the model that this is, or mend the file"
                )
