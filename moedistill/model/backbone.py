"""The contract that makes one model family usable: velocity, conditioning, module names, latents.

Everything a backbone gives and takes is in flow coordinates (see `moedistill.flow`): latents `[B, C, T, H, W]`, sigma
`[B]` float32 in [0, 1], velocity = noise - x0. Native times, argument order, masks and layouts stay inside it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from moedistill.components.fields import Config, GridSize
from moedistill.model.comfyui import ComfyUI
from moedistill.model.guidance import Guidance
from moedistill.model.layout import SampleLayout
from moedistill.model.native_names import NativeNames
from moedistill.model.prompt import Prompt, as_prompts

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from moedistill.flow.routers import TimestepRouter
    from moedistill.flow.trajectory import Trajectory
    from moedistill.model.conditioning import Conditioning


TEACHER = "teacher"
"""The reserved name of the pretrained weights with nothing active."""

QUANTIZED = (
    "copies the teacher's weights to train them, and those are kept in 8 bits; make it lora, or leave "
    "backbone.quantization out"
)
"""What is wrong with an expert, where pretrained weights are quantised."""


def teacher_name(base: str, bases: Sequence[str]) -> str:
    """The name of one of the teacher's networks as an expert: `teacher` for the first, `teacher.base` for others."""
    return TEACHER if base == bases[0] else f"{TEACHER}.{base}"


@dataclass(kw_only=True)
class VideoSize:
    """Size of a video in pixels.

    Args:
        num_frames, height, width: as the model's pipeline takes them.
    """

    num_frames: GridSize
    height: GridSize
    width: GridSize


@dataclass(frozen=True)
class Record:
    """What a model's own code gave, for a backbone to give again.

    Args:
        config: of a backbone with the weights that were used.
        x, sigma: `[B, C, T, H, W]` as the network takes it, and `[B]`.
        conditionings: one for each of `velocities`, by the names that the backbone knows.
        velocities: `[B, C, T, H, W]` for each conditioning.
        hidden: image tokens after each of the backbone's blocks, with the first conditioning.
        told: what the model is told, by what is asked for.
    """

    config: "BackboneConfig"
    x: "Tensor"
    sigma: "Tensor"
    conditionings: "Sequence[Conditioning]"
    velocities: "Sequence[Tensor]"
    hidden: "Sequence[Tensor]" = ()
    told: Mapping[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class BackboneConfig(Config, ABC):
    """Recipe keys common to all backbones.

    Args:
        dtype: of frozen weights and of compute.
        guidance: how the teacher is guided.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    guidance: Guidance = field(default_factory=Guidance)
    has_pipeline: ClassVar[bool] = False
    """Whether videos come from a pipeline of the model's own (`OwnPipeline`); it draws no fresh noise between steps."""
    in_lightx2v: ClassVar[bool] = False
    """Whether LightX2V runs the model, under its native names."""

    @abstractmethod
    def build(self, seed: int = 0) -> "Backbone":
        """Builds the backbone and loads its weights; random weights, where there are none to load, come from `seed`."""

    def skeleton(self) -> "Backbone":
        """The backbone without weights: its parameters are on torch's meta device and take no memory; buffers are real.

        By default a backbone that is built, and then emptied; a model that is large overrides it.
        """
        from torch import nn

        backbone = self.build()
        for network in backbone.networks.values():
            for module in network.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    setattr(module, name, nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad))
        return backbone

    def give_weights(self, take: "Callable[[str, str, Tensor], object]", seed: int = 0) -> None:
        """Hands over what a `skeleton` lacks, one by one: a network's name, a tensor's in its `state_dict`, the tensor.

        They are those of `build`, and by default of a backbone that is built; a model that is large overrides it.
        """
        for base, network in self.build(seed).networks.items():
            for name, tensor in network.state_dict().items():
                take(base, name, tensor)

    @classmethod
    def convert(cls, source: "Path", dest: "Path") -> None:
        """Writes to the new folder `dest` what `pretrained` takes, of the model's files as its makers publish them.

        Raises:
            ValueError: they are not those; or the model is published as it is taken, and there is nothing to convert.
            UserError: `dest` is in use, or cannot be written.
        """
        what = "as it is" if source.exists() else "as it is; and there is no such file or folder here"
        raise ValueError(f"{source}: nothing is to be converted, this model is given as backbone.pretrained {what}")

    def record(self, folder: "Path") -> "Record | None":
        """What the model's own code gave with weights of which the config in it is made, in `folder`; for the kit."""
        return None

    def tiny(self) -> "BackboneConfig":
        """The same architecture as a random miniature, for runs on a CPU."""
        return self

    def check(self) -> Iterable[tuple[str, str]]:
        """What in the keys does not go together and can be seen without weights: the key, and the message."""
        return ()

    def quantized(self) -> bool:
        """Whether the pretrained weights are kept in fewer bits than `dtype` has: no copy of them can be trained."""
        return False

    def native_sigmas(self) -> "Tensor | None":
        """The model's own sigma table, ascending float32, entry k for native time k; None if it has none."""
        return None

    def native_names(self) -> NativeNames | None:
        """What the model's makers call its tensors; None where files under their names are not known."""
        return None

    def comfyui(self) -> ComfyUI | None:
        """How ComfyUI, as it comes, loads and samples the model, under its native names; None where it cannot."""
        return None

    def time_shift(self) -> float | None:
        """The shift of the model's own time grid for videos of the size that the config says; None if it has none."""
        return None

    def bases(self) -> Sequence[str]:
        """Names of the pretrained networks, those of `Backbone.networks`; more than one where the teacher is routed."""
        return ("transformer",)

    def teacher_router(self, trajectory: "Trajectory") -> "TimestepRouter | None":
        """Which of several pretrained networks serves which sigma; None where there is one."""
        return None

    def layout(self) -> SampleLayout | None:
        """What stored samples must look like; None where that is not known."""
        return None

    def unpack(self, cond: "Conditioning") -> "Conditioning":
        """Stored conditioning, batch first, by the names of the layout: what is packed cut apart, padding filled up.

        It looks at shapes alone, so that a set can be checked without its numbers: tensors may be on the meta device.
        """
        return cond

    def latent_moments(self) -> "tuple[Tensor, Tensor] | None":
        """Mean and standard deviation `[C]` of the latents that are stored; None where they are not known.

        Raises:
            ValueError: they come with the weights, which are not on this machine.
        """
        return None


class Backbone(ABC):
    """One model family, ready to use. It holds the pretrained network and knows nothing of experts.

    Attributes:
        network: the pretrained network; of several, the first.
        fps: frames per second of its videos.
        video: their size, where it can be chosen.
        blocks: dotted paths of the blocks whose outputs can be tapped, in order.
        hidden_size: width of a block's output.
        lora_targets: named groups of linears, each a regular expression matched against full dotted paths.
        time_dependent: exact dotted paths of the modules that depend on time (embedding, final modulation, projection).
        time_shared: dotted paths of modules that read the time too, which experts share on purpose.
        example_prompts: texts that `encode` takes, different ones.
        takes_images: whether a prompt may have an image.
        image_frames: places in a video of the frames that `encode_images` takes: 0 for the first, -1 for the last; none
            where the model has no image encoder.
        placed: where its networks compute, if they may wait elsewhere.
    """

    network: "nn.Module"
    fps: float = 8.0
    video: VideoSize | None = None
    blocks: Sequence[str]
    hidden_size: int
    lora_targets: Mapping[str, str]
    time_dependent: Sequence[str]
    time_shared: Sequence[str] = ()
    takes_images: bool = False
    image_frames: Sequence[int] = ()
    placed: "torch.device | None" = None
    example_prompts: Sequence[str] = ("a dog runs along a beach", "rain at night", "a ball bounces")

    @property
    def networks(self) -> "Mapping[str, nn.Module]":
        """The pretrained networks by name: one, or several of equal architecture where the teacher is routed."""
        return {"transformer": self.network}

    @abstractmethod
    def velocity(self, network: "nn.Module", x: "Tensor", sigma: "Tensor", cond: "Conditioning") -> "Tensor":
        """Velocity `[B, C, T, H, W]` of `network` (the pretrained one or a copy of it) at `sigma` `[B]`."""

    @abstractmethod
    def null_conditioning(self, cond: "Conditioning") -> "Conditioning":
        """The unconditional counterpart of `cond`: same names, shapes and dtypes."""

    def encode_negative(self, text: str) -> "Conditioning":
        """Conditioning of a negative prompt, batch first, as `null_conditioning` has it and data may store it."""
        return self.encode([text])

    def encode(self, prompts: "Sequence[str | Prompt]") -> "Conditioning":
        """Conditioning for a list of prompts, or of their texts.

        Raises:
            ValueError: a prompt has an image, and the model takes none; or what `encode_prompts` says of a text.
        """
        return self.encode_prompts(self._checked(prompts))

    def _checked(self, prompts: "Sequence[str | Prompt]") -> list[Prompt]:
        """The same as prompts that the model takes, or ValueError."""
        asked = as_prompts(prompts)
        for prompt in asked:
            if prompt.image is not None and not self.takes_images:
                raise ValueError(f'prompt "{prompt}": this model takes text alone; leave the image away')
        return asked

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[Prompt]) -> "Conditioning":
        """Conditioning for a list of prompts; ValueError says what a prompt may be."""

    def captions(self, cond: "Conditioning") -> list[str]:
        """A few words on each sample of `cond`, for pictures; by default its number."""
        return [f"sample {number}" for number in range(len(next(iter(cond.values()))))]

    def unpack(self, cond: "Conditioning") -> "Conditioning":
        """See `BackboneConfig.unpack`: samples are batched as it gives them."""
        return cond

    def prepare(self, latents: "Tensor", cond: "Conditioning") -> "tuple[Tensor, Conditioning]":
        """A batch of stored samples as the network takes them: latents scaled, packed text unpacked."""
        return latents, cond

    def stored(self, latents: "Tensor") -> "Tensor":
        """The inverse of `prepare`: latents `[B, C, T, H, W]` that the network makes, as data store them.

        Raises:
            ValueError: the model has a `prepare` of its own, and nothing that undoes it.
        """
        if type(self).prepare is not Backbone.prepare:
            raise ValueError(
                f"{type(self).__name__} has no method `stored` that undoes its `prepare`, so nothing can be stored"
            )
        return latents

    @property
    def takes_null(self) -> bool:
        """Whether data store the negative prompt's conditioning, for `set_null`."""
        return type(self).set_null is not Backbone.set_null

    def set_null(self, cond: "Conditioning") -> None:
        """Takes over the negative prompt's conditioning, stored with the data, without a batch dimension."""
        raise ValueError(f"{type(self).__name__} makes its own null conditioning; it takes none from the data")

    @abstractmethod
    def latent_shape(self, video: VideoSize | None = None) -> tuple[int, int, int, int]:
        """The (C, T, H, W) of a video, or of what is sampled when nothing else is asked for.

        Raises:
            ValueError: the model has no video of that size.
        """

    @abstractmethod
    def decode(self, latents: "Tensor") -> "Tensor":
        """Pixels in [0, 1], float32 `[B, C, T, H, W]` with C = 1 or 3, of latents `[B, C, T, H, W]`."""

    def look_ahead(self, *, pipeline: bool) -> None:  # noqa: B027  many need nothing
        """Tries what `decode` needs and, if asked, the model's own pipeline; called before anything is trained.

        Raises:
            ValueError: a part of the model is missing or broken.
        """

    # -- making data --------------------------------------------------------------------------------------------------
    # All of it works on a `skeleton` that is `placed`, so that one part of a model at a time is in memory.

    def encoding_videos(self) -> AbstractContextManager[None]:
        """Within it what encodes videos, and decodes them, is loaded once, and freed at its end."""
        return nullcontext()

    def encode_videos(self, videos: "Tensor") -> "Tensor":
        """Latents `[B, C, T, H, W]` of videos `[B, 3, T', H', W']` in [0, 1], as data store them: before `prepare`.

        A video's do not depend on the others in the batch.

        Raises:
            ValueError: the model has nothing that encodes them, or the size does not fit.
        """
        raise ValueError(
            f"{type(self).__name__} has nothing that encodes videos; store latents that were made elsewhere"
        )

    def given_frames(self, videos: "Tensor") -> "Conditioning":
        """Conditioning that is made of frames of the videos `[B, 3, T', H', W']` in [0, 1], by what encodes videos.

        Batch first, by the names of the layout, as data store it; nothing where a sample needs none. For a network that
        makes videos from images: latents of the given frames, and which ones are given.
        """
        return {}

    def encoding_images(self) -> AbstractContextManager[None]:
        """Within it what encodes images is loaded once, and freed at its end."""
        return nullcontext()

    def encode_images(self, images: "Tensor") -> "Conditioning":
        """Conditioning by an image encoder, of each video's `image_frames` `[B, 3, N, H', W']` in [0, 1].

        Batch first, by the names of the layout, as data store it; nothing where the model has no image encoder.
        """
        return {}

    def encode_each(self, prompts: "Iterable[str | Prompt]") -> "Iterator[Conditioning]":
        """What `encode` gives of each prompt, as data store it: without a batch dimension, on the CPU, one by one.

        What encodes prompts is loaded once, and freed at the end; nothing is kept. Text may be shorter than `encode`
        has it, where `unpack` fills it up to the same, bit for bit.

        Raises:
            ValueError: as `encode`.
        """
        for prompt in prompts:
            yield {name: value[0].cpu() for name, value in self.encode([prompt]).items()}

    def revisions(self) -> dict[str, str]:
        """A fingerprint of each part of those that the model has: `vae`, `images` and `text`, which encode, and
        `network`, which samples.

        What a part has made stays right as long as its fingerprint is the same. By default nothing is known.

        Raises:
            ValueError: the model's files are not on this machine.
        """
        return {}

    @abstractmethod
    def token_grid(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """The (T', H', W') of the tokens of latents of `shape` `[B, C, T, H, W]`."""

    @abstractmethod
    def unembed(
        self, network: "nn.Module", hidden: "Tensor", x: "Tensor", sigma: "Tensor", cond: "Conditioning"
    ) -> "Tensor":
        """Latents `[B, C, T, H, W]` of tapped states `[B, T'·H'·W', hidden_size]`: final norm, projection, unpatchify.

        For the last block's output it equals the network's native prediction.
        """

    def native_prediction(self, network: "nn.Module", x: "Tensor", sigma: "Tensor", cond: "Conditioning") -> "Tensor":
        """What the network itself predicts, `[B, C, T, H, W]`: by default the velocity."""
        return self.velocity(network, x, sigma, cond)

    def native_trajectory(
        self, noise: "Tensor", cond: "Conditioning", num_steps: int, *, guided: bool = False
    ) -> "list[tuple[float, Tensor]] | None":
        """Sigmas and samples, in flow coordinates, that the model's own sampler passes through from `noise`.

        Unguided, or `guided` by two forwards as the recipe says. It checks the backbone, so it should use little of it.
        None if there is no such sampler.
        """
        return None

    def hidden(self, output: object, tokens: int) -> "Tensor":
        """The image tokens `[B, tokens, hidden_size]`, tokens = T'·H'·W', in a block's output.

        By default the output, or the first of several, is those and nothing else.

        Raises:
            ValueError: it has other tokens too: say which are the image's, by a method of your own.
        """
        found: Tensor = output[0] if isinstance(output, tuple) else output  # type: ignore[assignment]
        if found.shape[1] != tokens:
            raise ValueError(
                f"a block gives {found.shape[1]} tokens, of which {tokens} are the image's: {type(self).__name__} must "
                "say which, in `hidden`"
            )
        return found

    # -- recomputing activations --------------------------------------------------------------------------------------

    @property
    def can_checkpoint(self) -> bool:
        """Whether the network can recompute activations in the backward pass."""
        return hasattr(self.network, "enable_gradient_checkpointing")

    def enable_checkpointing(self, network: "nn.Module", recompute: "Callable[..., Any]") -> None:
        """Lets the blocks of `network` run as `recompute(block, *args)`, which runs them again in the backward pass.

        Raises:
            ValueError: the network cannot do that.
        """
        if not self.can_checkpoint:
            raise ValueError(f"{type(network).__name__} cannot recompute activations; set it to false")
        network.enable_gradient_checkpointing(gradient_checkpointing_func=recompute)  # type: ignore[operator]
