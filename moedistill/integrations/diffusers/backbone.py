"""diffusers models as backbones: loading, sampling through their own pipelines, and `apply`.

A plugin for a diffusers model subclasses `DiffusersBackboneConfig` (its recipe keys, and which classes it is made of)
and `DiffusersBackbone` (how the network is called). No forward is copied or patched: the network is the library's
class, and what is restated of it is `unembed` alone.

diffusers itself is imported when a model is built, not before: a recipe is checked without it.
"""

import gc
import inspect
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moedistill.components.fields import NonEmptyStr
from moedistill.integrations.diffusers.loading import (
    cast,
    from_pretrained,
    keep_float32_islands,
    read_json,
    transformers_of,
)
from moedistill.integrations.diffusers.pipeline import attach, expert_at, refuse_eta
from moedistill.model import conditioning
from moedistill.model.backbone import Backbone, BackboneConfig, SampleLayout, VideoSize
from moedistill.model.conditioning import Conditioning
from moedistill.model.ema import WhichWeights
from moedistill.model.generate import OwnPipeline
from moedistill.model.mixture import Mixture
from moedistill.runtime.randomness import torch_seed

if TYPE_CHECKING:
    from moedistill.integrations.diffusers.scheduler import FewStepScheduler

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+\Z")


@dataclass(kw_only=True)
class DiffusersBackboneConfig(BackboneConfig, ABC):
    """Recipe keys of every diffusers model.

    Args:
        pretrained: a folder in diffusers' layout, or a Hub id that was downloaded before; null for a random miniature
            of the same architecture.
        revision: branch, tag or commit of the Hub id.
        variant: of the weight files, such as fp16.
        video: what is sampled when nothing else is asked for, and the size of synthetic samples.
    """

    pretrained: NonEmptyStr | None
    revision: NonEmptyStr | None = None
    variant: NonEmptyStr | None = None
    video: VideoSize

    has_pipeline: ClassVar[bool] = True
    backbone_class: ClassVar[type["DiffusersBackbone"]]
    download: ClassVar[str]
    """What there is to download, and how big it is, for people."""
    text_components: ClassVar[Sequence[str]] = ("text_encoder", "tokenizer")
    """Components of the pipeline that encode prompts."""
    temporal_compression: ClassVar[int] = 4
    spatial_compression: ClassVar[int] = 8
    tiny_video: ClassVar[VideoSize] = VideoSize(num_frames=17, height=32, width=48)
    vae_dtype: ClassVar[torch.dtype | None] = None
    """Of the VAE; None for that of the network."""
    _architecture: ClassVar[Mapping[str, Any] | None] = None
    """Set in the config that a backbone holds: that of its own network."""

    # -- what a plugin says -------------------------------------------------------------------------------------------

    @abstractmethod
    def network_class(self) -> type:
        """Diffusers' class of the network."""

    @abstractmethod
    def pipeline_class(self) -> type:
        """Diffusers' class of the pipeline."""

    @abstractmethod
    def tiny_network(self) -> dict[str, Any]:
        """Arguments of the network's class for the miniature."""

    @abstractmethod
    def tiny_vae(self) -> nn.Module:
        """A miniature of the VAE's class with the same compression."""

    @abstractmethod
    def real_network(self) -> dict[str, Any]:
        """Those arguments of the published network that `text_shapes` and `patch_size` read."""

    @abstractmethod
    def patch_size(self) -> tuple[int, int, int]:
        """How many latents (T, H, W) make a token."""

    @abstractmethod
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what a prompt is encoded to, without the batch dimension, by the pipeline's argument names."""

    def pipeline_options(self) -> dict[str, Any]:
        """Further arguments of the pipeline's class."""
        return {}

    def scheduler(self) -> Any:
        """The stock scheduler of the miniature's pipeline."""
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(shift=5.0)

    def check_folder(self, folder: Path) -> None:
        """ValueError where a model's folder does not agree with the recipe."""

    # -- what follows from it -----------------------------------------------------------------------------------------

    def tiny(self) -> "DiffusersBackboneConfig":
        return self.replace(pretrained=None, revision=None, variant=None, video=self.tiny_video)

    def build(self, seed: int = 0) -> "DiffusersBackbone":
        networks = {
            base: self._random(torch_seed(seed, "backbone", base)) if self.pretrained is None else self._load(base)
            for base in self.bases()
        }
        return self.wrap(networks)

    def wrap(self, networks: Mapping[str, nn.Module]) -> "DiffusersBackbone":
        """The backbone around networks that are already there."""
        config, first = self.replace(), next(iter(networks.values()))
        vars(config)["_architecture"] = first.config
        backbone = self.backbone_class(config, networks)
        backbone.hooks = [hook for network in networks.values() for hook in keep_float32_islands(network)]
        return backbone

    def architecture(self) -> Mapping[str, Any]:
        """Arguments of the network's class: the miniature's, those of the folder, or the published ones."""
        if self._architecture is not None:
            return self._architecture
        if self.pretrained is None:
            return self.tiny_network()
        found = self._find()
        file = found / self.bases()[0] / "config.json" if found else None
        return read_json(file) if file is not None and file.is_file() else self.real_network()

    def check(self) -> Iterable[tuple[str, str]]:
        try:
            self.latent_shape()
        except ValueError as error:
            yield "video", str(error)

    def latent_shape(self, video: VideoSize | None = None) -> tuple[int, int, int, int]:
        """See `Backbone.latent_shape`: frames are one and a multiple of the temporal compression."""
        video = video or self.video
        channels, patch = self.architecture()["out_channels"], self.patch_size()
        frames, rest = divmod(video.num_frames - 1, self.temporal_compression)
        if rest:
            lower = frames * self.temporal_compression + 1
            raise ValueError(
                f"num_frames {video.num_frames} must be 1 more than a multiple of {self.temporal_compression}: "
                f"{lower} or {lower + self.temporal_compression}"
            )
        if (frames + 1) % patch[0]:
            raise ValueError(
                f"num_frames {video.num_frames} makes {frames + 1} latent frames, which must be a multiple of "
                f"{patch[0]}: use {video.num_frames + self.temporal_compression}"
            )
        for name, value, step in (("height", video.height, patch[1]), ("width", video.width, patch[2])):
            if value % (multiple := step * self.spatial_compression):
                lower = value // multiple * multiple
                near = f"{lower} or {lower + multiple}" if lower else f"{multiple}"
                raise ValueError(f"{name} {value} must be a multiple of {multiple}: {near}")
        height, width = video.height // self.spatial_compression, video.width // self.spatial_compression
        return channels, frames + 1, height, width

    def layout(self) -> SampleLayout:
        """See `BackboneConfig.layout`: any length of text fits."""
        shapes: dict[str, tuple[int | None, ...]] = {
            name: (None,) if name.endswith("mask") else (None, shape[1]) if len(shape) == 2 else shape
            for name, shape in self.text_shapes().items()
        }
        return SampleLayout(self.architecture()["out_channels"], self.patch_size(), shapes)

    def locate(self) -> Path:
        """The model's folder.

        Raises:
            ValueError: it is not on this machine; says how to get it.
        """
        found = self._find()
        if found is not None:
            return found
        assert self.pretrained is not None
        if not HUB_ID.match(self.pretrained):
            raise ValueError(
                f"pretrained {self.pretrained}: there is no such folder; give one in diffusers' layout (with "
                "model_index.json), or a Hub id such as owner/name. To try the recipe without weights: --smoke"
            )
        revision = f" --revision {self.revision}" if self.revision else ""
        raise ValueError(
            f"the weights of {self.pretrained} are not on this machine.\n"
            f"  What there is: {self.download}.\n"
            "  moedistill downloads nothing by itself. Get them once, with\n"
            f"    hf download {self.pretrained}{revision}\n"
            "  and run again. If they lie in a folder already, name it:\n"
            "    --set backbone.pretrained=FOLDER\n"
            "  To try the recipe without weights, in miniature: --smoke"
        )

    def _find(self) -> Path | None:
        assert self.pretrained is not None
        folder = Path(self.pretrained).expanduser()
        if folder.is_dir():
            return folder
        if not HUB_ID.match(self.pretrained):
            return None
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:  # In the cache, that is: this never asks the network, so it never hangs on it.
            return Path(snapshot_download(self.pretrained, revision=self.revision, local_files_only=True))
        except LocalEntryNotFoundError:
            return None

    def _random(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network: nn.Module = self.network_class()(**self.tiny_network())
        return cast(network, getattr(torch, self.dtype)).eval()

    def _load(self, base: str) -> nn.Module:
        folder = self.locate()
        wanted, file = self.network_class().__name__, folder / base / "config.json"
        if not file.is_file():
            raise ValueError(f"pretrained {self.pretrained}: there is no {file}; give the folder of the whole model")
        if (found := read_json(file).get("_class_name", wanted)) != wanted:
            raise ValueError(f"pretrained {self.pretrained}: {base} is a {found}, not a {wanted}; it is another model")
        self.check_folder(folder)
        what = f"pretrained {self.pretrained}: cannot load its {base}"
        network: nn.Module = from_pretrained(
            self.network_class(), folder / base, what, torch_dtype=getattr(torch, self.dtype), variant=self.variant
        )
        # They lie wherever they do in the mapped file. A CPU multiplies with other last bits at other addresses, and a
        # fresh expert's own weights must give what these give.
        for parameter in network.parameters():
            parameter.data = parameter.data.clone()
        return network.eval()


class DiffusersBackbone(Backbone, OwnPipeline):
    """A diffusers transformer, its VAE, its text encoders and its pipeline. By default a flow model.

    Conditioning goes by the argument names of the model's pipeline (`prompt_embeds`, …), so that what is stored can be
    given to a pipeline as it is; `guidance` `[B]` may override the embedded guidance scale.
    """

    def __init__(self, config: DiffusersBackboneConfig, networks: Mapping[str, nn.Module]) -> None:
        self.config, self.video = config, config.video
        self._networks = dict(networks)
        self.network = next(iter(networks.values()))
        self.hooks: list[RemovableHandle] = []
        self._null: dict[str, Tensor] | None = None
        self._encoded: dict[str, dict[str, Tensor]] = {}

    # -- what a plugin says -------------------------------------------------------------------------------------------

    @abstractmethod
    def predict(self, network: nn.Module, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """The network's own prediction `[B, C, T, H, W]` of its own sample `x` at native time `[B]` float32.

        Called with `x` and floating conditioning in the network's dtype.
        """

    @abstractmethod
    def encode_with(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """Conditioning of prompts by a pipeline that has text encoders and nothing else."""

    @abstractmethod
    def normalise(self, latents: Tensor) -> Tensor:
        """The VAE's own latents `[B, C, T, H, W]` as the network takes them."""

    @abstractmethod
    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""

    def unpack(self, cond: Conditioning) -> Conditioning:
        """Stored conditioning in the pipeline's terms; by default it is."""
        return cond

    prediction_type: ClassVar[str] = "flow_prediction"

    def to_native(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The network's own sample and native time `[B]` float32."""
        return x, 1000.0 * sigma

    def from_native(self, prediction: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Velocity of the network's prediction of its own sample `x`."""
        return prediction

    def to_pipeline(self, x: Tensor, sigma: float) -> Tensor:
        """Flow sample `[B, C, T, H, W]` as the pipeline holds it."""
        return x

    def from_pipeline(self, latents: Tensor, sigma: float, shape: Sequence[int]) -> Tensor:
        """The inverse of `to_pipeline`, for a flow sample of `shape`."""
        return latents

    def pipeline_arguments(self) -> dict[str, Any]:
        """Arguments of a call that turn the pipeline's own guidance off, or to what the network was told."""
        return {"guidance_scale": 1.0}

    scale_arguments: ClassVar[Sequence[str]] = ("guidance_scale",)
    """What the pipeline calls the scale of its classifier-free guidance: one for each of its networks."""

    def guiding_arguments(self, cond: Conditioning) -> dict[str, Any]:
        """Arguments of a call that guide the teacher as the recipe does; experts are not touched by them."""
        guidance = self.config.guidance
        if guidance.mode != "classifier_free":
            return {}
        bases = self.config.bases()
        scales = {name: guidance.scale_of(base) for name, base in zip(self.scale_arguments, bases, strict=False)}
        if min(scales.values()) < 1:
            raise ValueError(f"a pipeline guides with scales of 1 and more, not {min(scales.values())}")
        # At exactly 1 it would leave the second pass out, for all of its networks.
        scales = {name: max(scale, math.nextafter(1, 2)) for name, scale in scales.items()}
        return {**{f"negative_{name}": value for name, value in self.null_conditioning(cond).items()}, **scales}

    def decoder_arguments(self) -> dict[str, Any]:
        """Further arguments of the VAE's `decode`, for one video."""
        return {}

    def scheduler_sigmas(self, scheduler: Any) -> list[float]:
        """Sigmas that the stock scheduler passes through, the last one 0."""
        sigmas: list[float] = scheduler.sigmas.tolist()
        return sigmas

    # -- the contract -------------------------------------------------------------------------------------------------

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return self._networks

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        x_native, timestep = self.to_native(x, sigma)
        return self.from_native(self._predict(network, x_native, timestep, cond).float(), x_native.float(), sigma)

    def native_prediction(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return self._predict(network, *self.to_native(x, sigma), cond)

    def _predict(self, network: nn.Module, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        dtype: Any = network.dtype
        return self.predict(network, x.to(dtype), timestep, _floats_to(cond, dtype))

    def prepare(self, latents: Tensor, cond: Conditioning) -> tuple[Tensor, Conditioning]:
        return self.normalise(latents.float()), self._unpacked(cond)

    def set_null(self, cond: Conditioning) -> None:
        self._null = self._unpacked({name: value[None] for name, value in cond.items()})

    def _unpacked(self, cond: Conditioning) -> dict[str, Tensor]:
        """Stored conditioning in the pipeline's terms; ValueError where something is missing."""
        wanted = self.config.text_shapes()
        try:
            unpacked = dict(self.unpack(cond))
        except KeyError:
            unpacked = dict(cond)
        missing = [name for name in wanted if name not in unpacked]
        if cond and missing:
            raise ValueError(f"stored text has {', '.join(cond)}, but no {' and no '.join(missing)}; encode it again")
        return unpacked

    def null_conditioning(self, cond: Conditioning) -> dict[str, Tensor]:
        """The negative prompt's text in place of each sample's; what is not text stays.

        Raises:
            ValueError: it can neither be encoded nor was it stored, or its length is not that of `cond`.
        """
        if self._null is None:
            self._null = self.encode([self.config.guidance.negative_prompt])
        null = {}
        for name, value in cond.items():
            if name not in self._null or name.startswith("image_"):
                null[name] = value
                continue
            if self._null[name].shape[1:] != value.shape[1:]:
                raise ValueError(
                    f"the negative prompt's {name} has shape {list(self._null[name].shape[1:])}, the samples' "
                    f"{list(value.shape[1:])}: encode both with the same text length"
                )
            null[name] = self._null[name].to(value).expand_as(value)
        return null

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Conditioning of prompts, on the CPU. The text encoders are loaded for it and freed again.

        The miniature has no text encoders: each prompt gets random numbers of its own.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded]
        if new and self.config.pretrained is None:
            self._encoded |= {prompt: self._synthetic(prompt) for prompt in new}
        elif new:
            self._encode(new)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return conditioning.stack([self._encoded[prompt] for prompt in prompts])

    def captions(self, cond: Conditioning) -> list[str]:
        """The prompts, where they were encoded here."""
        return [self._caption(text.cpu(), number) for number, text in enumerate(cond["prompt_embeds"])]

    def _caption(self, text: Tensor, number: int) -> str:
        known = (prompt for prompt, value in self._encoded.items() if torch.equal(value["prompt_embeds"], text))
        return next(known, f"sample {number}")

    def latent_shape(self, video: VideoSize | None = None) -> tuple[int, int, int, int]:
        return self.config.latent_shape(video)

    def token_grid(self, shape: Sequence[int]) -> tuple[int, int, int]:
        patch = self.config.patch_size()
        if any(size % step for size, step in zip(shape[2:], patch, strict=True)):
            raise ValueError(f"latents {list(shape)}: (T, H, W) must be multiples of {patch}")
        t, h, w = (size // step for size, step in zip(shape[2:], patch, strict=True))
        return t, h, w

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """One by one, by the VAE, which is loaded for it and freed again."""
        vae: Any = self.load_vae().to(self.device)
        dtype = next(vae.parameters()).dtype
        own = [self.denormalise(one[None].float()).to(dtype) for one in latents]
        videos = [vae.decode(one, **self.decoder_arguments(), return_dict=False)[0] for one in own]
        return (torch.cat(videos).float() / 2 + 0.5).clamp(0, 1)

    def generate(
        self,
        mixture: Mixture,
        prompts: Sequence[str],
        sigmas: Tensor,
        *,
        seed: int,
        video: VideoSize | None = None,
        weights: WhichWeights = "trained",
        eta: float = 0.0,
    ) -> Iterator[Tensor]:
        """By the model's own pipeline. Sample k starts from the noise of `torch.Generator().manual_seed(seed + k)`.

        Steps of the untouched teacher, where the router names it, are guided as the recipe says.
        """
        refuse_eta(eta)
        video = video or self.config.video
        self.latent_shape(video)  # raises
        self.encode(prompts)
        teaching = any(expert_at(mixture, sigma) in mixture.teachers for sigma in sigmas[:-1].tolist())
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        with attach(pipeline, mixture, sigmas, weights=weights):
            for k, prompt in enumerate(prompts):
                cond = _floats_to(conditioning.to(self.encode([prompt]), self.device), self._dtype)
                guiding = self.guiding_arguments(cond) if teaching else {}
                frames = pipeline(
                    **cond,
                    height=video.height,
                    width=video.width,
                    num_frames=video.num_frames,
                    num_inference_steps=len(sigmas) - 1,
                    generator=torch.Generator().manual_seed(seed + k),
                    output_type="pt",
                    **{**self.pipeline_arguments(), **guiding},
                ).frames
                yield frames[0].permute(1, 0, 2, 3).float().cpu()

    def few_step_scheduler(self, pipeline: Any, sigmas: Tensor) -> "FewStepScheduler":
        """What holds the steps along `sigmas` `[n + 1]` in a pipeline of this model."""
        from moedistill.integrations.diffusers.scheduler import FewStepScheduler

        _, times = self.to_native(torch.zeros(len(sigmas) - 1, 1, 1, 1, 1), sigmas[:-1])
        return FewStepScheduler(
            sigmas=tuple(sigmas.tolist()),
            timesteps=tuple(times.tolist()),
            num_train_timesteps=pipeline.scheduler.config.num_train_timesteps,
            prediction_type=self.prediction_type,
        )

    @torch.no_grad()
    def native_trajectory(self, noise: Tensor, cond: Conditioning, num_steps: int) -> list[tuple[float, Tensor]] | None:
        """By the stock pipeline with its stock scheduler around the bare network."""
        pipeline, latents = self.pipeline(), [self.to_pipeline(noise, 1.0)]
        pipeline.set_progress_bar_config(disable=True)

        def keep(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            latents.append(tensors["latents"])
            return {}

        config, (_, _, t, h, w) = self.config, noise.shape
        pipeline(
            **_floats_to(cond, self._dtype),
            height=h * config.spatial_compression,
            width=w * config.spatial_compression,
            num_frames=(t - 1) * config.temporal_compression + 1,
            num_inference_steps=num_steps,
            latents=latents[0],
            output_type="latent",
            callback_on_step_end=keep,
            **self.pipeline_arguments(),
        )
        sigmas = self.scheduler_sigmas(pipeline.scheduler)
        steps = zip(sigmas, latents, strict=True)
        return [(sigma, self.from_pipeline(x.float(), sigma, noise.shape)) for sigma, x in steps]

    # -- the other components -----------------------------------------------------------------------------------------

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.config.dtype)
        return dtype

    @cached_property
    def vae_config(self) -> Mapping[str, Any]:
        """The VAE's config: how its latents are scaled."""
        if self.config.pretrained is None:
            config: Mapping[str, Any] = self.config.tiny_vae().config  # type: ignore[assignment]
            return config
        file = self.config.locate() / "vae" / "config.json"
        if not file.is_file():
            raise ValueError(f"{file} is missing: the latents' scaling is read from it; get the whole model's folder")
        # What the file leaves out is the class's default.
        cls = type(self.config.tiny_vae())
        defaults = {name: p.default for name, p in inspect.signature(cls).parameters.items()}
        return {**defaults, **read_json(file)}

    def pipeline(self) -> Any:
        """The model's pipeline around the bare networks, without text encoders; on the network's device."""
        cls: Any = self.config.pipeline_class()
        without = dict.fromkeys(self.config.text_components)
        if self.config.pretrained is None:
            networks = dict.fromkeys(transformers_of(cls)) | self._networks
            pipeline = cls(
                **networks, **without, vae=self.load_vae(), scheduler=self.config.scheduler(),
                **self.config.pipeline_options(),
            )  # fmt: skip
        else:
            what = f"pretrained {self.config.pretrained}: cannot make its pipeline"
            pipeline = from_pretrained(
                cls, self.config.locate(), what, **self._networks, **without, vae=self.load_vae()
            )
        return pipeline.to(self.device)

    def load_vae(self) -> nn.Module:
        """The VAE, frozen, on the CPU; loaded anew at each call.

        Raises:
            ValueError: the model's folder has none.
        """
        dtype = self.config.vae_dtype or self._dtype
        if self.config.pretrained is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                # Not by the class's own `to`, which warns about dtypes even where it changes none.
                vae: Any = nn.Module.to(self.config.tiny_vae(), dtype)
        else:
            folder, variant = self.config.locate() / "vae", self.config.variant
            variant = variant if any(folder.glob(f"*.{variant}.*")) else None
            what = f"pretrained {self.config.pretrained}: cannot load its VAE"
            vae = from_pretrained(type(self.config.tiny_vae()), folder, what, torch_dtype=dtype, variant=variant)
        vae.enable_tiling()
        module: nn.Module = vae.eval().requires_grad_(False)
        return module

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str]) -> None:
        """By a pipeline that has the text encoders alone, on the network's device."""
        cls: Any = self.config.pipeline_class()
        folder = self.config.locate()
        missing = [name for name in self.config.text_components if not (folder / name).is_dir()]
        if missing:
            raise ValueError(
                f"a prompt must be encoded, but {folder} has no {' and no '.join(missing)}; give the whole model's "
                "folder, or data with stored embeddings (for the negative prompt too)"
            )
        pipeline = from_pretrained(
            cls, folder, f"pretrained {self.config.pretrained}: cannot load its text encoders",
            **dict.fromkeys([*transformers_of(cls), "vae", "scheduler"]),
            torch_dtype=self._dtype, variant=self.config.variant,
        )  # fmt: skip
        pipeline.to(self.device)
        for prompt in prompts:
            encoded = self.encode_with(pipeline, [prompt])
            self._encoded[prompt] = {name: value[0].cpu() for name, value in encoded.items()}

    def _synthetic(self, prompt: str) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(torch_seed(0, "prompt", prompt))
        encoded: dict[str, Tensor] = {}
        for name, shape in self.config.text_shapes().items():
            if name.endswith("mask"):  # the text is at most as long as there is room, and the rest is padding
                length = 1 + int(torch.randint(shape[0], (), generator=generator))
                encoded[name] = torch.arange(shape[0]) < length
            else:
                encoded[name] = torch.randn(shape, generator=generator).to(self._dtype)
        return encoded


def _floats_to(cond: Conditioning, dtype: torch.dtype) -> dict[str, Tensor]:
    """Conditioning with its floating tensors in `dtype`; numbers `[B]`, such as a guidance scale, stay exact."""
    return {
        name: value.to(dtype) if value.is_floating_point() and value.ndim > 1 else value for name, value in cond.items()
    }
