"""Backbones with a pipeline of diffusers': the teacher and its experts sample through it.

A plugin subclasses `DiffusersBackboneConfig` (its recipe keys, and which classes it is made of) and `DiffusersBackbone`
(how the network is called, and the pipeline).
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from moedistill.components.fields import WhichWeights
from moedistill.integrations.diffusers.loading import from_pretrained, load_text_encoders, transformers_of
from moedistill.integrations.diffusers.models import DiffusersModels, DiffusersModelsConfig
from moedistill.integrations.diffusers.pipeline import Pass, attach, expert_at, refuse_eta
from moedistill.model import conditioning
from moedistill.model.backbone import VideoSize
from moedistill.model.conditioning import Conditioning
from moedistill.model.generate import OwnPipeline
from moedistill.model.mixture import Mixture
from moedistill.model.prompt import Prompt

if TYPE_CHECKING:
    from moedistill.integrations.diffusers.scheduler import FewStepScheduler


@dataclass(kw_only=True)
class DiffusersBackboneConfig(DiffusersModelsConfig, ABC):
    """Recipe keys of every diffusers model with a pipeline; those of `LatentVideoConfig`."""

    has_pipeline: ClassVar[bool] = True
    backbone_class: ClassVar[type["DiffusersBackbone"]]
    folder: ClassVar[str] = "one in diffusers' layout (with model_index.json)"

    # -- what a plugin says -------------------------------------------------------------------------------------------

    @abstractmethod
    def pipeline_class(self) -> type:
        """Diffusers' class of the pipeline, the one that users load: `apply` takes no other."""

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

    def linear_copies(self, copies: Mapping[str, Tensor], original: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """What does the same as `copies`, parameters that are trained in full, in those of linears alone.

        By default they are given back as they are: an adapter that copies anything else is exported merged.

        Args:
            copies: by name, float32.
            original: gives what one of the network's parameters is without them.
        """
        return dict(copies)

    # -- what follows from it -----------------------------------------------------------------------------------------

    def text_model(self, components: Mapping[str, Any]) -> Any:
        """See `DiffusersModelsConfig.text_model`: the pipeline around them alone."""
        cls: Any = self.pipeline_class()
        parameters = inspect.signature(cls).parameters.values()
        needed = {p.name: None for p in parameters if p.default is p.empty}
        return cls(**{**needed, **self.text_pipeline_options(), **components})


class DiffusersBackbone(DiffusersModels, OwnPipeline):
    """A diffusers transformer, its VAE, its text encoders and its pipeline. By default a flow model.

    Conditioning goes by the argument names of the model's pipeline (`prompt_embeds`, …), so that what is stored can be
    given to a pipeline as it is.
    """

    config: Any

    # -- what a plugin says -------------------------------------------------------------------------------------------

    prediction_type: ClassVar[str] = "flow_prediction"

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

    def scheduler_sigmas(self, scheduler: Any) -> list[float]:
        """Sigmas that the stock scheduler passes through, the last one 0."""
        sigmas: list[float] = scheduler.sigmas.tolist()
        return sigmas

    # -- the contract -------------------------------------------------------------------------------------------------

    def look_ahead(self, *, pipeline: bool) -> None:
        """By making the pipeline, or loading the VAE."""
        if pipeline:
            self.pipeline()
        else:
            self.load_vae()

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
        places: Sequence[int] | None = None,
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
            for k, prompt in zip(range(len(prompts)) if places is None else places, prompts, strict=True):
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

    def _load_text(self, folder: Path, what: str) -> Any:
        """See `DiffusersModels`: a saved pipeline's index says which classes they have, its class makes it of them."""
        cls: Any = self.config.pipeline_class()
        encoders = load_text_encoders(
            folder, self.config.text_components, what, ignored=self.config.ignored_weights,
            variant=self.config.variant, dtype=self.dtype,
        )  # fmt: skip
        pipeline = from_pretrained(
            cls, folder, what, **encoders,
            **(dict.fromkeys([*transformers_of(cls), "vae", "scheduler"]) | self.config.text_pipeline_options()),
            torch_dtype=self.dtype, variant=self.config.variant,
        )  # fmt: skip
        return pipeline.to(self.device)
