"""diffusers models as backbones: loading, sampling through their own pipelines, and `apply`.

A plugin for a diffusers model subclasses `DiffusersBackboneConfig` (its recipe keys, and which classes it is made of)
and `DiffusersBackbone` (how the network is called). No forward is copied or patched: the network is the library's
class, and what is restated of it is `unembed` alone.

diffusers itself is imported when a model is built, not before: a recipe is checked without it.
"""

import gc
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from moedistill.errors import shorten
from moedistill.integrations.diffusers.bars import errors_alone
from moedistill.integrations.diffusers.loading import (
    cast,
    check_kinds,
    from_pretrained,
    keep_float32_islands,
    load_model,
    load_text_encoders,
    read_json,
    transformers_of,
    variant_in,
    with_defaults,
)
from moedistill.integrations.diffusers.pipeline import Pass, attach, expert_at, refuse_eta
from moedistill.integrations.diffusers.values import check_arguments, numbers
from moedistill.model import conditioning
from moedistill.model.backbone import VideoSize
from moedistill.model.conditioning import Conditioning
from moedistill.model.ema import WhichWeights
from moedistill.model.generate import OwnPipeline
from moedistill.model.latent_video import LatentVideoBackbone, LatentVideoConfig
from moedistill.model.mixture import Mixture
from moedistill.model.prompt import Prompt
from moedistill.runtime.randomness import torch_seed

if TYPE_CHECKING:
    from moedistill.integrations.diffusers.scheduler import FewStepScheduler


@dataclass(kw_only=True)
class DiffusersBackboneConfig(LatentVideoConfig, ABC):
    """Recipe keys of every diffusers model; those of `LatentVideoConfig`."""

    has_pipeline: ClassVar[bool] = True
    backbone_class: ClassVar[type["DiffusersBackbone"]]
    folder: ClassVar[str] = "one in diffusers' layout (with model_index.json)"
    text_components: ClassVar[Sequence[str]] = ("text_encoder", "tokenizer")
    """Components of the pipeline that encode prompts."""
    vae_dtype: ClassVar[torch.dtype | None] = None
    """Of the VAE; None for that of the network."""
    ignored_weights: ClassVar[Mapping[str, Sequence[str]]] = {}
    """By the name of a component: regular expressions of the tensors that its files may lack, or have beside its own.
    Anything else that is missing or left over stops the loading.
    """
    optional_arguments: ClassVar[Sequence[str]] = ()
    """Arguments of the network that `inputs` and `patch_size` read, and that may be null in its config."""
    _architecture: ClassVar[Mapping[str, Any] | None] = None
    """Set in the config that a backbone holds: that of its own network."""

    # -- what a plugin says -------------------------------------------------------------------------------------------

    @abstractmethod
    def network_class(self) -> type:
        """Diffusers' class of the network."""

    @abstractmethod
    def pipeline_class(self) -> type:
        """Diffusers' class of the pipeline, the one that users load: `apply` takes no other."""

    @abstractmethod
    def tiny_network(self) -> dict[str, Any]:
        """Arguments of the network's class for the miniature."""

    @abstractmethod
    def tiny_vae(self) -> nn.Module:
        """A miniature of the VAE's class with the same compression."""

    @abstractmethod
    def real_network(self) -> dict[str, Any]:
        """Those arguments of the published network that `inputs` and `patch_size` read."""

    def tiny_text_encoders(self) -> dict[str, Any]:
        """Miniatures of `text_components` by name, for the kit to try `encode_with`; with none it is not tried."""
        return {}

    def pipeline_options(self) -> dict[str, Any]:
        """Further arguments of the pipeline's class."""
        return {}

    def text_pipeline_options(self) -> dict[str, Any]:
        """Components without which the pipeline's class cannot be made around its text encoders alone."""
        return {}

    def scheduler(self) -> Any:
        """The stock scheduler of the miniature's pipeline."""
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(shift=5.0)

    def check_folder(self, folder: Path) -> None:
        """ValueError where a model's folder does not agree with the recipe."""

    # -- what follows from it -----------------------------------------------------------------------------------------

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
        backbone.islands = [undo for network in networks.values() for undo in keep_float32_islands(network)]
        return backbone

    def channels(self) -> int:
        channels: int = self.architecture()["out_channels"]
        return channels

    def architecture(self) -> Mapping[str, Any]:
        """Arguments of the network's class: the miniature's, those of the folder, or the published ones.

        Raises:
            ValueError: the folder's are not of the kind of `tiny_network` and `real_network`.
        """
        if self._architecture is not None:
            return self._architecture
        if self.pretrained is None:
            return self.tiny_network()
        found, published = self.find(), self.real_network()
        file = found / self.bases()[0] / "config.json" if found else None
        if file is None or not file.is_file():
            return published
        own = read_json(file)
        check_arguments(own, {**self.tiny_network(), **published}, self.optional_arguments, file)
        return {**published, **own}

    @cached_property
    def vae_config(self) -> Mapping[str, Any]:
        """The VAE's config: how its latents are scaled."""
        if self.pretrained is None:
            vae: Any = self.tiny_vae()
            return dict(vae.config)
        file = self.locate() / "vae" / "config.json"
        if not file.is_file():
            raise ValueError(f"{file} is missing: the latents' scaling is read from it; get the whole model's folder")
        return with_defaults(type(self.tiny_vae()), file)

    def vae_numbers(self, name: str) -> Tensor:
        """What `vae_config` has under `name`, float32: a number for each channel of the latents `[C]`, or one for all.

        Raises:
            ValueError: they are not that, or not finite.
        """
        return numbers(self.vae_config[name], name, self.channels(), self._vae_file)

    def vae_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `[C]` of the VAE's own latents; by default 0, and what its `scaling_factor`
        makes 1.
        """
        std = (1 / self.vae_numbers("scaling_factor")).expand(self.channels())
        return torch.zeros_like(std), std

    def latent_moments(self) -> tuple[Tensor, Tensor]:
        """See `LatentVideoConfig.latent_moments`: those of `vae_moments`; ValueError where latents cannot have them."""
        mean, std = self.vae_moments()
        for name, moment, least in (("mean", mean, -math.inf), ("standard deviation", std, 0.0)):
            if moment.shape != (self.channels(),) or not (moment.isfinite() & (moment > least)).all():
                raise ValueError(
                    f"{self._vae_file}: the {name} of its latents must be {self.channels()} finite numbers"
                    f"{' above 0' * (least == 0)}, not {shorten(str(moment.tolist()), 60)}; get the model's own VAE"
                )
        return mean, std

    @property
    def _vae_file(self) -> str:
        return "the miniature's VAE" if self.pretrained is None else str(self.locate() / "vae" / "config.json")

    def from_file(self) -> str:
        cls = self.network_class()
        if not hasattr(cls, "from_single_file"):
            return super().from_file()
        return (
            "where it has the original code's names, make the network's folder of it, beside the model's others: "
            f"{cls.__name__}.from_single_file(FILE).save_pretrained('FOLDER/{self.bases()[0]}')"
        )

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
        check_kinds(self.network_class(), read_json(file), file)
        what = f"pretrained {self.pretrained}: cannot load its {base}"
        network: nn.Module = load_model(
            self.network_class(), folder / base, what, ignored=self.ignored_weights.get(base, ()),
            torch_dtype=getattr(torch, self.dtype), variant=self.variant,
        )  # fmt: skip
        # They lie wherever they do in the mapped file. A CPU multiplies with other last bits at other addresses, and a
        # fresh expert's own weights must give what these give.
        for parameter in network.parameters():
            parameter.data = parameter.data.clone()
        return network.eval()


class DiffusersBackbone(LatentVideoBackbone, OwnPipeline):
    """A diffusers transformer, its VAE, its text encoders and its pipeline. By default a flow model.

    Conditioning goes by the argument names of the model's pipeline (`prompt_embeds`, …), so that what is stored can be
    given to a pipeline as it is.
    """

    def __init__(self, config: DiffusersBackboneConfig, networks: Mapping[str, nn.Module]) -> None:
        super().__init__(config, networks)
        self.islands: list[Callable[[], None]] = []

    # -- what a plugin says -------------------------------------------------------------------------------------------

    @abstractmethod
    def predict(self, network: nn.Module, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """The network's own prediction `[B, C, T, H, W]` of its own sample `x` at native time `[B]` float32.

        Called with `x` and floating conditioning in the network's dtype, and under autocast where that is not float32:
        the time stays float32 until the network's own layers meet it.
        """

    @abstractmethod
    def encode_with(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """Conditioning of prompts by a pipeline that has text encoders and nothing else."""

    text_limits: Mapping[str, str | int] = {}
    """By the name of the pipeline's tokenizers: how many tokens of a prompt `encode_with` reads, or the one of the
    config's `inputs` that is as long. Of a longer prompt the rest is cut off, which a warning says.
    """

    def text_for(self, tokenizer: str, text: str) -> str:
        """What of a prompt the pipeline gives to one of its tokenizers: all of it by default."""
        return text

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
    """What the pipeline calls the scale of its classifier-free guidance: one for each of its networks; none where it is
    guided by a component.
    """

    def guiding_arguments(self, pipeline: Any, cond: Conditioning) -> dict[str, Any]:
        """Arguments of a call that guide the teacher as the recipe does; experts are not touched by them.

        A pipeline that is guided by a component, not by an argument, gets that component here.
        """
        guidance = self.config.guidance
        if guidance.mode != "classifier_free":
            return {}
        bases = self.config.bases()
        scales = {name: guidance.scale_of(base) for name, base in zip(self.scale_arguments, bases, strict=False)}
        if any(scale < 1 for scale in scales.values()):
            raise ValueError(f"a pipeline guides with scales of 1 and more, not {min(scales.values())}")
        # At exactly 1 it would leave the second pass out, for all of its networks.
        scales = {name: max(scale, math.nextafter(1, 2)) for name, scale in scales.items()}
        return {**{f"negative_{name}": value for name, value in self.null_conditioning(cond).items()}, **scales}

    pass_names: ClassVar[Mapping[str, Pass]] = {
        "cond": "conditional",
        "uncond": "unconditional",
        "cond_uncond": "both",
        "pred_cond": "conditional",
        "pred_uncond": "unconditional",
    }
    """What the pipeline, by `cache_context`, or its guider calls the passes of a guided call. One that marks them in
    another way has names of its own here; "" is a call without a mark.
    """

    def which_pass(self, pipeline: Any, mark: str) -> Pass:
        """Which pass of a guided call it is that a pipeline runs: experts were distilled with their guidance, once.

        Raises:
            ValueError: it cannot be told.
        """
        if mark not in self.pass_names:
            called = f"calls {mark!r}" if mark else "does not name"
            raise ValueError(
                f"{type(pipeline).__name__} runs its transformer for a pass that it {called}, so an expert could be "
                f"guided a second time; give the pipeline a guider whose passes are known "
                f"({', '.join(name for name in self.pass_names if name) or 'none is'}), or let "
                f"{type(self).__name__}.pass_names say which pass it is"
            )
        return self.pass_names[mark]

    def as_trained(self) -> dict[str, Any]:
        """Arguments of the network that a pipeline's caller chooses, but training has fixed, such as a frame rate."""
        return {}

    def decoder_arguments(self) -> dict[str, Any]:
        """Further arguments of the VAE's `decode`, for one video."""
        return {}

    def scheduler_sigmas(self, scheduler: Any) -> list[float]:
        """Sigmas that the stock scheduler passes through, the last one 0."""
        sigmas: list[float] = scheduler.sigmas.tolist()
        return sigmas

    # -- the contract -------------------------------------------------------------------------------------------------

    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        x_native, timestep = self.to_native(x, sigma)
        return self.from_native(self._predict(network, x_native, timestep, cond).float(), x_native.float(), sigma)

    def native_prediction(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return self._predict(network, *self.to_native(x, sigma), cond)

    def _predict(self, network: nn.Module, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        dtype: Any = network.dtype
        return self.predict(network, x.to(dtype), timestep, self.floats_to(cond, dtype))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """One by one, by the VAE, which is loaded for it and freed again."""
        vae: Any = self.load_vae().to(self.device)
        dtype = next(vae.parameters()).dtype
        own = [self.denormalise(one[None].float()).to(dtype) for one in latents]
        videos = [vae.decode(one, **self.decoder_arguments(), return_dict=False)[0] for one in own]
        return (torch.cat(videos).float() / 2 + 0.5).clamp(0, 1)

    def look_ahead(self, *, pipeline: bool) -> None:
        """By making the pipeline, or loading the VAE."""
        if pipeline:
            self.pipeline()
        else:
            self.load_vae()

    @torch.no_grad()
    def encode_videos(self, videos: Tensor) -> Tensor:
        """One by one, by the VAE, which is loaded for it and freed again: the mode of its posterior."""
        if videos.ndim != 5 or videos.shape[1] != 3:
            raise ValueError(f"videos {list(videos.shape)} must be [B, 3, T, H, W]")
        t, h, w = videos.shape[2:]
        self.config.latent_shape(VideoSize(num_frames=t, height=h, width=w))  # raises
        vae: Any = self.load_vae().to(self.device)
        dtype = next(vae.parameters()).dtype
        own = [(2 * one[None] - 1).to(self.device, dtype) for one in videos]
        return torch.cat([vae.encode(one).latent_dist.mode() for one in own]).float()

    def generate(
        self,
        mixture: Mixture,
        prompts: Sequence[str | Prompt],
        sigmas: Tensor,
        *,
        seed: int,
        video: VideoSize | None = None,
        weights: WhichWeights = "trained",
        eta: float = 0.0,
    ) -> Iterator[Tensor]:
        """By the model's own pipeline, which draws sample k's noise from `torch.Generator().manual_seed(seed + k)`.

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
            pipeline.scheduler.has_warned = True  # whatever sigmas the pipeline gives, nobody has asked for them
            for k, prompt in enumerate(prompts):
                cond = self.floats_to(conditioning.to(self.encode([prompt]), self.device), self.dtype)
                guiding = self.guiding_arguments(pipeline, cond) if teaching else {}
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
    def call_pipeline(
        self, pipeline: Any, noise: Tensor, cond: Conditioning, num_steps: int, *, guided: bool = False
    ) -> Tensor:
        """The latents that a pipeline of this model gets to from `noise` `[B, C, T, H, W]`, as it holds them.

        It is not guided, or as the recipe says.
        """
        config, (_, _, t, h, w) = self.config, noise.shape
        cond = self.floats_to(cond, self.dtype)
        latents: Tensor = pipeline(
            **cond,
            height=h * config.spatial_compression,
            width=w * config.spatial_compression,
            num_frames=(t - 1) * config.temporal_compression + 1,
            num_inference_steps=num_steps,
            latents=self.to_pipeline(noise, 1.0),
            output_type="latent",
            **{**self.pipeline_arguments(), **(self.guiding_arguments(pipeline, cond) if guided else {})},
        ).frames
        return latents

    @torch.no_grad()
    def native_trajectory(
        self, noise: Tensor, cond: Conditioning, num_steps: int, *, guided: bool = False
    ) -> list[tuple[float, Tensor]] | None:
        """By the stock pipeline with its stock scheduler around the bare network, as the scheduler's steps give it."""
        pipeline, latents = self.pipeline(), [self.to_pipeline(noise, 1.0)]
        pipeline.set_progress_bar_config(disable=True)
        step = pipeline.scheduler.step

        @wraps(step)  # pipelines look at its signature
        def kept(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            latents.append(result[0] if isinstance(result, tuple) else result.prev_sample)
            return result

        pipeline.scheduler.step = kept
        self.call_pipeline(pipeline, noise, cond, num_steps, guided=guided)
        sigmas = self.scheduler_sigmas(pipeline.scheduler)
        steps = zip(sigmas, latents, strict=True)
        return [(sigma, self.from_pipeline(x.float(), sigma, noise.shape)) for sigma, x in steps]

    # -- the other components -----------------------------------------------------------------------------------------

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
                cls, self.config.locate(), what, **self._networks, **without, vae=self.load_vae(),
                **self.config.pipeline_options(),
            )  # fmt: skip
        return pipeline.to(self.device)

    def load_vae(self) -> nn.Module:
        """The VAE, frozen, on the CPU; loaded anew at each call.

        Raises:
            ValueError: the model's folder has none.
        """
        dtype = self.config.vae_dtype or self.dtype
        if self.config.pretrained is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                # Not by the class's own `to`, which warns about dtypes even where it changes none.
                vae: Any = nn.Module.to(self.config.tiny_vae(), dtype)
        else:
            folder, what = self.config.locate() / "vae", f"pretrained {self.config.pretrained}: cannot load its VAE"
            cls = type(self.config.tiny_vae())
            if (file := folder / "config.json").is_file():
                with_defaults(cls, file)  # raises
            vae = load_model(
                cls, folder, what, ignored=self.config.ignored_weights.get("vae", ()),
                torch_dtype=dtype, variant=variant_in(folder, self.config.variant),
            )  # fmt: skip
        vae.enable_tiling()
        module: nn.Module = vae.eval().requires_grad_(False)
        return module

    @torch.no_grad()
    def encode_new(self, prompts: Sequence[Prompt]) -> list[dict[str, Tensor]]:
        """Of their texts, by a pipeline that has the text encoders alone, on the network's device.

        A model that takes images encodes them in a method of its own.
        """
        cls: Any = self.config.pipeline_class()
        folder = self.config.locate()
        missing = [name for name in self.config.text_components if not (folder / name).is_dir()]
        if missing:
            raise ValueError(
                f"a prompt must be encoded, but {folder} has no {' and no '.join(missing)}; give the whole model's "
                "folder, or data with stored embeddings (for the negative prompt too)"
            )
        what = f"pretrained {self.config.pretrained}: cannot load its text encoders"
        encoders = load_text_encoders(
            folder, self.config.text_components, what, ignored=self.config.ignored_weights,
            variant=self.config.variant, dtype=self.dtype,
        )  # fmt: skip
        pipeline = from_pretrained(
            cls, folder, what, **encoders,
            **(dict.fromkeys([*transformers_of(cls), "vae", "scheduler"]) | self.config.text_pipeline_options()),
            torch_dtype=self.dtype, variant=self.config.variant,
        )  # fmt: skip
        pipeline.to(self.device)
        self._warn_of_cuts(pipeline, [prompt.text for prompt in prompts])
        encoded = []
        with errors_alone():  # of each prompt that is cut it logs what is left out
            for prompt in prompts:
                made = self.encode_with(pipeline, [prompt.text])
                encoded.append({name: value[0].cpu() for name, value in made.items()})
        del pipeline
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return encoded

    def _warn_of_cuts(self, pipeline: Any, texts: Sequence[str]) -> None:
        for name, length in self.text_limits.items():
            limit = self.config.inputs()[length].shape[0] if isinstance(length, str) else length
            tokenizer = getattr(pipeline, name)
            read = [self.text_for(name, text) for text in texts]
            cut = [text for text in read if len(tokenizer(text, verbose=False).input_ids) > limit]
            if cut:
                warnings.warn(
                    f"{len(cut)} of {len(texts)} prompts {'is' if len(cut) == 1 else 'are'} cut after {limit} tokens, "
                    f"all that the model's {name} reads; the first: {shorten(cut[0], 60)}",
                    stacklevel=2,
                )
