"""Backbones of latent video models: weights in a folder or on the Hub, a VAE with a compression, text that is encoded.

What lies between the lowest contract and models of diffusers' classes. A model whose parts are its own subclasses
these two.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from moedistill.components.fields import NonEmptyStr, PositiveFloat
from moedistill.model import conditioning
from moedistill.model.backbone import Backbone, BackboneConfig, VideoSize
from moedistill.model.conditioning import Conditioning
from moedistill.model.layout import Input, SampleLayout, mask_fault
from moedistill.model.prompt import Prompt
from moedistill.runtime.randomness import torch_seed

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+\Z")


@dataclass(kw_only=True)
class LatentVideoConfig(BackboneConfig, ABC):
    """Recipe keys of a latent video model.

    Args:
        pretrained: the model's folder, or a Hub id that was downloaded before; null for a random miniature of the same
            architecture.
        revision: branch, tag or commit of the Hub id.
        variant: of the weight files, such as fp16.
        video: what is sampled when nothing else is asked for, and the size of synthetic samples.
        fps: frames per second of the videos that are learned from and made; null for the model's own.
    """

    pretrained: NonEmptyStr | None
    revision: NonEmptyStr | None = None
    variant: NonEmptyStr | None = None
    video: VideoSize
    fps: PositiveFloat | None = None

    download: ClassVar[str]
    """What there is to download, and how big it is, for people."""
    folder: ClassVar[str] = "the model's"
    """What a folder must be, for people."""
    temporal_compression: ClassVar[int] = 4
    spatial_compression: ClassVar[int] = 8
    tiny_video: ClassVar[VideoSize] = VideoSize(num_frames=17, height=32, width=48)

    # -- what a plugin says -------------------------------------------------------------------------------------------

    @abstractmethod
    def channels(self) -> int:
        """Channels of the latents."""

    @abstractmethod
    def patch_size(self) -> tuple[int, int, int]:
        """How many latents (T, H, W) make a token."""

    @abstractmethod
    def inputs(self) -> dict[str, Input]:
        """What a network takes besides latents and time, by name: what a prompt is encoded to, and what is added."""

    @abstractmethod
    def latent_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `[C]` of the VAE's own latents, as published: the network takes 0 and 1.

        Raises:
            ValueError: they come with the weights, which are not on this machine.
        """

    # -- what follows from it -----------------------------------------------------------------------------------------

    def tiny(self) -> "LatentVideoConfig":
        return self.replace(pretrained=None, revision=None, variant=None, video=self.tiny_video)

    def check(self) -> Iterable[tuple[str, str]]:
        try:
            self.latent_shape()
        except ValueError as error:
            yield "video", str(error)

    def latent_shape(self, video: VideoSize | None = None) -> tuple[int, int, int, int]:
        """See `Backbone.latent_shape`: frames are one and a multiple of the temporal compression."""
        video = video or self.video
        channels, patch = self.channels(), self.patch_size()
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
        return SampleLayout(self.channels(), self.patch_size(), self.inputs())

    def unpack(self, cond: Conditioning) -> Conditioning:
        """See `BackboneConfig.unpack`: by default nothing is packed, and padding is zeros."""
        unpacked = dict(cond)
        for name, each in self.inputs().items():
            if each.padded and name in cond:
                missing = (each.shape[0] or 0) - cond[name].shape[1]
                unpacked[name] = pad(cond[name], [0, 0] * (cond[name].ndim - 2) + [0, max(0, missing)])
        return unpacked

    def locate(self) -> Path:
        """The model's folder.

        Raises:
            ValueError: it is not on this machine; says how to get it.
        """
        found = self.find()
        if found is not None:
            return found
        assert self.pretrained is not None
        if Path(self.pretrained).expanduser().is_file():
            raise ValueError(f"pretrained {self.pretrained}: a single file, where a folder must be; {self.from_file()}")
        if not HUB_ID.match(self.pretrained):
            raise ValueError(
                f"pretrained {self.pretrained}: there is no such folder; give {self.folder}, or a Hub id such as "
                "owner/name. To try the recipe without weights: --smoke"
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

    def loadable(self) -> Path:
        """The folder that weights are loaded from: `locate`, or what a plugin makes of one in its makers' own files."""
        return self.locate()

    def from_file(self) -> str:
        """How a folder is made of a single file of weights, for people."""
        return f"give {self.folder}"

    def find(self) -> Path | None:
        """The model's folder, if it is on this machine."""
        assert self.pretrained is not None
        folder = Path(self.pretrained).expanduser()
        if folder.is_dir():
            return folder
        if folder.exists() or not HUB_ID.match(self.pretrained):
            return None
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:  # In the cache, that is: this never asks the network, so it never hangs on it.
            return Path(snapshot_download(self.pretrained, revision=self.revision, local_files_only=True))
        except LocalEntryNotFoundError:
            return None


class LatentVideoBackbone(Backbone):
    """A latent video model: what its conditioning and its latents have in common with others of the kind.

    A subclass sets `fps`, the model's own; the recipe's goes before it. Conditioning goes by the names of the config's
    `inputs`; `guidance` `[B]` may override the embedded guidance scale.
    """

    def __init__(self, config: LatentVideoConfig, networks: Mapping[str, nn.Module]) -> None:
        self.config: Any = config
        self.video = config.video
        self.fps = config.fps or self.fps
        self._networks = dict(networks)
        self.network = next(iter(networks.values()))
        self._null: dict[str, Tensor] | None = None
        self._encoded: dict[Prompt, dict[str, Tensor]] = {}
        """By what the model was told."""
        self._asked: dict[Prompt, Prompt] = {}
        """Of what it was told: what was asked for."""

    # -- what a plugin says -------------------------------------------------------------------------------------------

    @abstractmethod
    def encode_new(self, prompts: Sequence[Prompt]) -> Iterable[dict[str, Tensor]]:
        """Conditioning of each prompt, without a batch dimension, on the CPU, by the real text encoders.

        They are loaded for it, and freed again. Never called of a miniature. What yields them one after the other keeps
        `encode_each` in little memory.
        """

    def told(self, text: str) -> str:
        """What the model is told of a prompt: by default its text. A negative prompt is told as it is
        (`encode_negative`).
        """
        return text

    # -- the contract -------------------------------------------------------------------------------------------------

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return self._networks

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self.placed or next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of frozen weights and of compute."""
        dtype: torch.dtype = getattr(torch, self.config.dtype)
        return dtype

    def unpack(self, cond: Conditioning) -> Conditioning:
        return self.config.unpack(cond)

    def normalise(self, latents: Tensor) -> Tensor:
        """The VAE's own latents `[B, C, T, H, W]` as the network takes them."""
        mean, std = self._moments
        return (latents - mean.to(latents)) / std.to(latents)

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        mean, std = self._moments
        return latents * std.to(latents) + mean.to(latents)

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        mean, std = (moment.float().view(-1, 1, 1, 1) for moment in self.config.latent_moments())
        return mean, std

    def prepare(self, latents: Tensor, cond: Conditioning) -> tuple[Tensor, Conditioning]:
        """See `Backbone.prepare`.

        Raises:
            ValueError: the conditioning is not what the model takes.
        """
        return self.normalise(latents.float()), self._unpacked(cond, latents.shape[1:]) if cond else {}

    def stored(self, latents: Tensor) -> Tensor:
        return self.denormalise(latents.float())

    def set_null(self, cond: Conditioning) -> None:
        self._null = self._unpacked({name: value[None] for name, value in cond.items()}, None)

    def null_conditioning(self, cond: Conditioning) -> dict[str, Tensor]:
        """The negative prompt's in place of each sample's, of what may be dropped; the rest stays.

        Raises:
            ValueError: it can neither be encoded nor was it stored, or its length is not that of `cond`.
        """
        if self._null is None:
            self._null = dict(self.encode_negative(self.config.guidance.negative_prompt))
        kept = {name for name, each in self.config.inputs().items() if not each.droppable}
        null = {}
        for name, value in cond.items():
            if name not in self._null or name in kept:
                null[name] = value
                continue
            if self._null[name].shape[1:] != value.shape[1:]:
                raise ValueError(
                    f"the negative prompt's {name} has shape {list(self._null[name].shape[1:])}, the samples' "
                    f"{list(value.shape[1:])}: encode both with the same text length"
                )
            null[name] = self._null[name].to(value).expand_as(value)
        return null

    def encode_prompts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Conditioning of prompts, on the CPU. A miniature gives each prompt random numbers of its own."""
        told = self._told(prompts)
        self._asked |= dict(zip(told, prompts, strict=True))
        return self._encode(told)

    def encode_each(self, prompts: Iterable[str | Prompt]) -> Iterator[dict[str, Tensor]]:
        """See `Backbone.encode_each`: text that the model pads with zeros comes without them."""
        padded = [name for name, each in self.config.inputs().items() if each.padded]
        for encoded in self._made(self._told(self._checked(list(prompts)))):
            yield {name: _without_padding(value) if name in padded else value for name, value in encoded.items()}

    def encode_negative(self, text: str) -> dict[str, Tensor]:
        """See `Backbone.encode_negative`: told as it is."""
        return self._encode([Prompt(text)])

    def _encode(self, told: Sequence[Prompt]) -> dict[str, Tensor]:
        new = [prompt for prompt in dict.fromkeys(told) if prompt not in self._encoded]
        if new:
            self._encoded |= dict(zip(new, self._made(new), strict=True))
        return conditioning.stack([self._encoded[prompt] for prompt in told])

    def _told(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        return [replace(prompt, text=self.told(prompt.text)) for prompt in prompts]

    def _made(self, told: Sequence[Prompt]) -> Iterable[dict[str, Tensor]]:
        return map(self._synthetic, told) if self.config.pretrained is None else self.encode_new(told)

    def captions(self, cond: Conditioning) -> list[str]:
        """The prompts, where they were encoded here."""
        name = next((name for name, each in self.config.inputs().items() if each.role == "text"), next(iter(cond)))
        return [self._caption(name, text.cpu(), number) for number, text in enumerate(cond[name])]

    def latent_shape(self, video: VideoSize | None = None) -> tuple[int, int, int, int]:
        shape: tuple[int, int, int, int] = self.config.latent_shape(video)
        return shape

    def token_grid(self, shape: Sequence[int]) -> tuple[int, int, int]:
        patch = self.config.patch_size()
        if any(size % step for size, step in zip(shape[2:], patch, strict=True)):
            raise ValueError(f"latents {list(shape)}: (T, H, W) must be multiples of {patch}")
        t, h, w = (size // step for size, step in zip(shape[2:], patch, strict=True))
        return t, h, w

    # -- helpers ------------------------------------------------------------------------------------------------------

    def floats_to(self, cond: Conditioning, dtype: torch.dtype) -> dict[str, Tensor]:
        """Conditioning with its floating tensors in `dtype`; scalars, such as a guidance scale, stay exact."""
        exact = {"guidance", *self.config.layout().of_role("scalar")}
        return {
            name: value.to(dtype) if value.is_floating_point() and name not in exact else value
            for name, value in cond.items()
        }

    def _unpacked(self, cond: Conditioning, latents: Sequence[int] | None) -> dict[str, Tensor]:
        """Stored conditioning of samples with `latents`, or of the negative prompt, by the names of `inputs`.

        Raises:
            ValueError: it is not what the model takes.
        """
        what = "the stored conditioning" if latents is not None else "the stored negative prompt"
        layout, unpacked = self.config.layout(), dict(self.config.unpack(cond))
        for problem in layout.conditioning_problems(unpacked, latents):
            raise ValueError(f"{what} {problem}")
        for name, each in layout.conditioning.items():
            if each.role == "mask" and name in unpacked:
                fault = mask_fault(unpacked[name], may_be_empty=each.may_be_empty)
                if fault is not None:
                    where = f" of sample {fault[0]}" if latents is not None else " of the stored negative prompt"
                    raise ValueError(f"{name}{where} {fault[1]}")
        return unpacked

    def _caption(self, name: str, text: Tensor, number: int) -> str:
        encoded = self._encoded.items()
        known = (str(self._asked.get(told, told)) for told, value in encoded if torch.equal(value[name], text))
        return next(known, f"sample {number}")

    def _synthetic(self, prompt: Prompt) -> dict[str, Tensor]:
        """Random numbers as a prompt's conditioning, always the same for one prompt."""
        generator = torch.Generator().manual_seed(torch_seed(0, "prompt", prompt))
        given = self.config.inputs().items()
        inputs = {name: each for name, each in given if each.required and None not in each.shape}
        encoded: dict[str, Tensor] = {}
        for name, each in inputs.items():
            if each.role == "mask":  # the text is at most as long as there is room, and the rest is padding
                room = each.shape[0]
                length = 1 + int(torch.randint(room, (), generator=generator))
                encoded[name] = torch.arange(room) < length
            else:
                encoded[name] = torch.randn(each.shape, generator=generator).to(self.dtype)
        return encoded


def _without_padding(text: Tensor) -> Tensor:
    """The rows of a text `[L, D]` up to the last that is not all zero, one at least."""
    counting = text.flatten(1).any(1).nonzero()
    return text[: int(counting[-1]) + 1 if len(counting) else 1].clone()
