"""Backbones made of models of diffusers and transformers: the network, its VAE, its text encoders. Without a pipeline.

A plugin for a model that has no pipeline of diffusers' subclasses these two, and is sampled by our own sampler; with
one it subclasses `DiffusersBackboneConfig` and `DiffusersBackbone`, which are these and the pipeline. No forward is
copied or patched: the network is the library's class, and what is restated of it is `unembed` alone.

diffusers itself is imported when a model is built, not before: a recipe is checked without it.
"""

import gc
import hashlib
import json
import math
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from moedistill.errors import shorten
from moedistill.integrations.diffusers.bars import errors_alone
from moedistill.integrations.diffusers.converting import (
    CONVERTED,
    converted_once,
    is_made_of,
    note_what_it_is_made_of,
)
from moedistill.integrations.diffusers.drawing import draw, parameters_on_meta
from moedistill.integrations.diffusers.int8 import (
    check_torchao,
    freeze,
    linears_of_blocks,
    loading_config,
    quantize,
)
from moedistill.integrations.diffusers.loading import (
    cast,
    check_kinds,
    defaults,
    islands,
    keep_float32_islands,
    load_model,
    load_processor,
    load_text_model,
    read_json,
    stored_tensors,
    variant_in,
    with_defaults,
)
from moedistill.integrations.diffusers.values import check_arguments, numbers
from moedistill.model import conditioning
from moedistill.model.backbone import VideoSize
from moedistill.model.conditioning import Conditioning
from moedistill.model.latent_video import LatentVideoBackbone, LatentVideoConfig
from moedistill.model.prompt import Prompt
from moedistill.runtime.fingerprint import fingerprint
from moedistill.runtime.quantized import is_quantized
from moedistill.runtime.randomness import torch_seed
from moedistill.runtime.reading import reason
from moedistill.runtime.weight_files import whole_folder


@dataclass(kw_only=True)
class DiffusersModelsConfig(LatentVideoConfig, ABC):
    """Recipe keys of every model that is made of diffusers' classes; those of `LatentVideoConfig`.

    Args:
        quantization: int8 keeps the frozen linears of the network's blocks in 8 bits; null keeps all in `dtype`.
    """

    quantization: Literal["int8"] | None = None

    backbone_class: ClassVar[type["DiffusersModels"]]
    text_components: ClassVar[Sequence[str]] = ("text_encoder", "tokenizer")
    """What encodes prompts, by the names of its folders."""
    vae_dtype: ClassVar[torch.dtype | None] = None
    """Of the VAE; None for that of the network."""
    whole_pixels: ClassVar[int] = 480 * 848
    """Pixels of a frame up to which the VAE encodes it whole, as the stock pipelines do; a larger one it encodes in
    tiles, which takes less memory, and gives other numbers near their seams. (It decodes in tiles whatever the size.)
    """
    ignored_weights: ClassVar[Mapping[str, Sequence[str]]] = {}
    """By the name of a component: regular expressions of the tensors that its files may lack, or have beside its own.
    Anything else that is missing or left over stops the loading.
    """
    optional_arguments: ClassVar[Sequence[str]] = ()
    """Arguments of the network that `inputs` and `patch_size` read, and that may be null in its config."""
    published_file: ClassVar[str] = ""
    """The file of weights, by which a folder of the makers' own files is known; "" if it is published as it is loaded.
    """
    _architecture: ClassVar[Mapping[str, Any] | None] = None
    """Set in the config that a backbone holds: that of its own network."""

    # -- what a plugin says -------------------------------------------------------------------------------------------

    @abstractmethod
    def network_class(self) -> type:
        """Diffusers' class of the network."""

    @abstractmethod
    def tiny_network(self) -> dict[str, Any]:
        """Arguments of the network's class for the miniature."""

    @abstractmethod
    def tiny_vae(self) -> nn.Module:
        """A miniature of the VAE's class with the same compression."""

    @abstractmethod
    def real_network(self) -> dict[str, Any]:
        """The whole arguments of the published network that `pretrained` names (see `model_name`), or of the family's
        main one; those that the class has by default may be left out if `inputs` and `patch_size` don't read them.
        """

    def tiny_text_encoders(self) -> dict[str, Any]:
        """Miniatures of `text_components` by name, for the kit to try `encode_with`; with none it is not tried."""
        return {}

    @classmethod
    def text_classes(cls) -> Mapping[str, Any]:
        """Classes of transformers for `text_components`, where no file says them (a pipeline's model_index.json)."""
        return {}

    def image_classes(self) -> Mapping[str, Any]:
        """Classes of transformers of what encodes images, by the names of its folders; none where nothing does."""
        return {}

    def check_folder(self, folder: Path) -> None:
        """ValueError where a model's folder does not agree with the recipe."""

    @classmethod
    def as_published(cls, folder: Path) -> bool:
        """Whether a folder has the model in its makers' own files, of which `make_folder` makes what can be loaded."""
        return bool(cls.published_file) and (folder / cls.published_file).is_file()

    @classmethod
    def make_folder(cls, source: Path, folder: Path) -> None:
        """Writes the model's parts to `folder`, which is empty, each to a folder of its own, of its makers' `source`.

        Raises:
            ValueError: they are not those that the makers publish.
        """
        raise NotImplementedError(f"{cls.__name__} has a published_file, and no make_folder that reads it")

    # -- what follows from it -----------------------------------------------------------------------------------------

    def quantized(self) -> bool:
        return self.quantization is not None

    def build(self, seed: int = 0) -> "DiffusersModels":
        if self.quantized():
            check_torchao()
        networks = {
            base: self._random(torch_seed(seed, "backbone", base)) if self.pretrained is None else self._load(base)
            for base in self.bases()
        }
        return self.wrap(networks)

    def skeleton(self) -> "DiffusersModels":
        return self.wrap({base: self._bare_network() for base in self.bases()})

    def _bare_network(self) -> nn.Module:
        """One of the networks with its parameters on the meta device."""
        cls: Any = self.network_class()
        with parameters_on_meta():
            network = cls.from_config(dict(self.architecture()))
        return cast(network, getattr(torch, self.dtype)).eval()

    def wrap(self, networks: Mapping[str, nn.Module]) -> "DiffusersModels":
        """The backbone around networks that are already there."""
        config, first = self.replace(), next(iter(networks.values()))
        vars(config)["_architecture"] = first.config
        backbone = self.backbone_class(config, networks)
        backbone.islands = [undo for network in networks.values() for undo in keep_float32_islands(network)]
        return backbone

    @classmethod
    def convert(cls, source: Path, dest: Path) -> None:
        if not cls.published_file:
            return super().convert(source, dest)
        if not cls.as_published(source):
            what = f"has no {cls.published_file}" if source.is_dir() else "is no folder"
            raise ValueError(f"{source} {what}; give the folder as it is published, with {cls.published_file}")
        with whole_folder(dest) as folder:
            cls.make_folder(source, folder)
            note_what_it_is_made_of(folder, source)

    def _converted(self, folder: Path) -> bool:
        """Whether a folder was made here of the makers' own files, which knows no variants."""
        return folder.name == CONVERTED and self.as_published(folder.parent)

    def find(self) -> Path | None:
        """See `LatentVideoConfig.find`; of a folder in the makers' own files what was made of it, if it was."""
        found = super().find()
        if found is not None and self.as_published(found) and is_made_of(found / CONVERTED, found):
            return found / CONVERTED
        return found

    def loadable(self) -> Path:
        """See `LatentVideoConfig.loadable`: what `convert` makes of a folder in the makers' own files, once."""
        folder = self.locate()
        return converted_once(folder, self.kind, self.convert) if self.as_published(folder) else folder

    def model_name(self) -> str:
        """The last part of `pretrained`, in small letters and without `-diffusers`; "" for a miniature."""
        return PurePath(self.pretrained or "").name.lower().replace("-diffusers", "")

    def channels(self) -> int:
        channels: int = self.architecture()["out_channels"]
        return channels

    def architecture(self) -> Mapping[str, Any]:
        """Arguments of the network's class, of which it can be built: the miniature's, those of the folder, or the
        published ones where there is none on this machine.

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
        folder = self.locate()
        file = folder / "vae" / "config.json"
        if self.as_published(folder):
            return defaults(type(self.tiny_vae()))
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

    def text_model(self, components: Mapping[str, Any]) -> Any:
        """What `encode_with` is given: `text_components`, as attributes by these names."""
        return SimpleNamespace(**components)

    def _random(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network: nn.Module = self.network_class()(**self.tiny_network())
        network = cast(network, getattr(torch, self.dtype)).eval()
        if self.quantized():
            paths = self._quantized_linears(network)
            quantize(network, paths)
            freeze(network, paths)
        return network

    def _quantized_linears(self, network: nn.Module) -> list[str]:
        """Dotted paths of the linears that are kept in 8 bits: none in what experts copy, or is to be float32."""
        return linears_of_blocks(network, getattr(self.backbone_class, "time_dependent", ()), islands(network))

    def give_weights(self, take: Callable[[str, str, Tensor], object], seed: int = 0) -> None:
        for base in self.bases():
            if self.pretrained is None:
                cls: Any = self.network_class()
                make = partial(cls, **self.tiny_network())
                draw(make, partial(take, base), torch_seed(seed, "backbone", base))
                continue
            folder, what = self._folder(base)
            variant = None if self._converted(self.loadable()) else self.variant
            ignored = self.ignored_weights.get(base, ())
            for name, tensor in stored_tensors(self._bare_network(), folder, what, ignored=ignored, variant=variant):
                take(base, name, tensor)

    def _load(self, base: str) -> nn.Module:
        folder, what = self._folder(base)
        paths = self._quantized_linears(self._bare_network()) if self.quantized() else []
        network: nn.Module = load_model(
            self.network_class(), folder, what, ignored=self.ignored_weights.get(base, ()),
            torch_dtype=getattr(torch, self.dtype),
            variant=None if self._converted(self.loadable()) else self.variant,
            **({"quantization_config": loading_config(paths)} if paths else {}),
        )  # fmt: skip
        freeze(network, paths)
        # They lie wherever they do in the mapped file. A CPU multiplies with other last bits at other addresses, and a
        # fresh expert's own weights must give what these give.
        for parameter in network.parameters():
            if not is_quantized(parameter):  # what is made in loading lies in memory of its own
                parameter.data = parameter.data.clone()
        return network.eval()

    def _folder(self, base: str) -> tuple[Path, str]:
        """Where a network's files are, checked by their config, and what messages about them begin with."""
        folder = self.loadable()
        wanted, file = self.network_class().__name__, folder / base / "config.json"
        if not file.is_file():
            raise ValueError(f"pretrained {self.pretrained}: there is no {file}; give the folder of the whole model")
        if (found := read_json(file).get("_class_name", wanted)) != wanted:
            raise ValueError(f"pretrained {self.pretrained}: {base} is a {found}, not a {wanted}; it is another model")
        self.check_folder(folder)
        check_kinds(self.network_class(), read_json(file), file)
        return folder / base, f"pretrained {self.pretrained}: cannot load its {base}"


class DiffusersModels(LatentVideoBackbone):
    """A transformer of diffusers, its VAE and its text encoders. By default a flow model."""

    def __init__(self, config: DiffusersModelsConfig, networks: Mapping[str, nn.Module]) -> None:
        super().__init__(config, networks)
        self.islands: list[Callable[[], None]] = []
        self._vae: Any = None
        """While videos are encoded; see `encoding_videos`."""
        self._image_encoder: Any = None

    # -- what a plugin says -------------------------------------------------------------------------------------------

    @abstractmethod
    def predict(self, network: nn.Module, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """The network's own prediction `[B, C, T, H, W]` of its own sample `x` at native time `[B]` float32.

        Called with `x` and floating conditioning in the network's dtype, and under autocast where that is not float32:
        the time stays float32 until the network's own layers meet it.
        """

    @abstractmethod
    def encode_with(self, encoders: Any, prompts: list[str]) -> dict[str, Tensor]:
        """Conditioning of prompts by what `text_model` makes."""

    def encode_images_with(self, encoders: Any, images: list[Image.Image]) -> dict[str, Tensor]:
        """Conditioning of one video, without a batch dimension, by its `image_frames`; `encoders` has what
        `image_classes` names, as attributes.
        """
        raise NotImplementedError(f"{type(self).__name__} has image_frames, and no encode_images_with that reads them")

    text_limits: Mapping[str, str | int] = {}
    """By the name of a tokenizer: how many tokens of a prompt `encode_with` reads, or the one of the config's `inputs`
    that is as long. Of a longer prompt the rest is cut off, which a warning says.
    """

    def text_for(self, tokenizer: str, text: str) -> str:
        """What of a prompt is given to one of the tokenizers: all of it by default."""
        return text

    def to_native(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The network's own sample and native time `[B]` float32."""
        return x, 1000.0 * sigma

    def from_native(self, prediction: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Velocity of the network's prediction of its own sample `x`."""
        return prediction

    def decoder_arguments(self) -> dict[str, Any]:
        """Further arguments of the VAE's `decode`, for one video."""
        return {}

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
        with self.encoding_videos():
            self._vae.enable_tiling()
            dtype = next(self._vae.parameters()).dtype
            own = [self.denormalise(one[None].float()).to(dtype) for one in latents]
            videos = [self._vae.decode(one, **self.decoder_arguments(), return_dict=False)[0] for one in own]
        return (torch.cat(videos).float() / 2 + 0.5).clamp(0, 1)

    def look_ahead(self, *, pipeline: bool) -> None:
        """By loading the VAE."""
        self.load_vae()

    @contextmanager
    def encoding_videos(self) -> Iterator[None]:
        """See `Backbone.encoding_videos`: the VAE, on the network's device."""
        if self._vae is not None:
            yield
            return
        self._vae = self.load_vae().to(self.device)
        try:
            yield
        finally:
            self._vae = None
            _empty_cache()

    @torch.no_grad()
    def encode_videos(self, videos: Tensor) -> Tensor:
        """One by one, by the VAE: the mode of its posterior. See `whole_pixels` for what is encoded in tiles."""
        if videos.ndim != 5 or videos.shape[1] != 3:
            raise ValueError(f"videos {list(videos.shape)} must be [B, 3, T, H, W]")
        t, h, w = videos.shape[2:]
        self.config.latent_shape(VideoSize(num_frames=t, height=h, width=w))  # raises
        with self.encoding_videos():
            if h * w > self.config.whole_pixels:
                self._vae.enable_tiling()
            else:
                self._vae.disable_tiling()
            dtype = next(self._vae.parameters()).dtype
            own = [(2 * one[None].float() - 1).to(self.device, dtype) for one in videos]
            return torch.cat([self._vae.encode(one).latent_dist.mode() for one in own]).float()

    @contextmanager
    def encoding_images(self) -> Iterator[None]:
        """See `Backbone.encoding_images`: in float32, as the stock pipelines have it, on the network's device."""
        if self._image_encoder is not None or not self.image_frames:
            yield
            return
        what = f"pretrained {self.config.pretrained}: cannot load its image encoder"
        self._image_encoder = SimpleNamespace(
            **self._load(self.config.image_classes(), self.config.loadable(), what, torch.float32)
        )
        try:
            yield
        finally:
            self._image_encoder = None
            gc.collect()
            _empty_cache()

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> dict[str, Tensor]:
        """See `Backbone.encode_images`: one by one, as pictures of 8 bits; what is given is in the network's dtype."""
        count = len(self.image_frames)
        if images.ndim != 5 or images.shape[1:3] != (3, count):
            raise ValueError(f"images {list(images.shape)} must be [B, 3, {count}, H, W]")
        if not count:
            return {}
        with self.encoding_images():
            made = [self.encode_images_with(self._image_encoder, _pictures(frames)) for frames in images]
        return {name: value.to(self.dtype) for name, value in conditioning.stack(made).items()}

    def revisions(self) -> dict[str, str]:
        """See `Backbone.revisions`: of the files in the parts' folders (see `fingerprint`), and, of a folder of the
        Hub's cache, its commit; of a miniature, of their configs. The dtype counts, and what `encode_videos` and `told`
        do besides.
        """
        config, inputs = self.config, self.config.inputs()
        vae_dtype = config.vae_dtype or self.dtype
        texts = [f"{name} {each.pattern()}" for name, each in inputs.items() if each.role not in ("image", "video")]
        parts = {
            "vae": (("vae",), [str(vae_dtype), config.whole_pixels]),
            "text": (config.text_components, [str(self.dtype), self.told(""), *texts]),
            "images": (tuple(config.image_classes()) if self.image_frames else (), [str(self.dtype)]),
            "network": (config.bases(), [str(self.dtype), config.quantization]),
        }
        if config.pretrained is None:
            miniatures = {"vae": dict(config.vae_config), "text": {}, "network": config.tiny_network()}
            return {part: _sum(miniatures[part], parts[part][1]) for part in miniatures}
        folder, found = config.loadable(), {}
        commit = re.search(r"/snapshots/([0-9a-f]{40})", folder.as_posix())
        for part, (names, settings) in parts.items():
            if names and all((folder / name).is_dir() for name in names):
                try:
                    files = fingerprint(*(folder / name for name in names))
                except OSError as error:
                    raise ValueError(f"cannot read {error.filename}: {reason(error)}") from error
                found[part] = _sum(files, commit and commit[1], settings)
        return found

    @torch.no_grad()
    def encode_new(self, prompts: Sequence[Prompt]) -> Iterator[dict[str, Tensor]]:
        """Of their texts, by the text encoders alone, on the network's device.

        A model that takes images encodes them in a method of its own.
        """
        folder = self.config.loadable()
        missing = [name for name in self.config.text_components if not (folder / name).is_dir()]
        if missing:
            raise ValueError(
                f"a prompt must be encoded, but {folder} has no {' and no '.join(missing)}; give the whole model's "
                "folder, or data with stored embeddings (for the negative prompt too)"
            )
        encoders = self._load_text(folder, f"pretrained {self.config.pretrained}: cannot load its text encoders")
        self._warn_of_cuts(encoders, [prompt.text for prompt in prompts])
        try:
            for prompt in prompts:
                with errors_alone():  # of each prompt that is cut it logs what is left out
                    made = self.encode_with(encoders, [prompt.text])
                yield {name: value[0].cpu() for name, value in made.items()}
        finally:
            del encoders
            gc.collect()
            _empty_cache()

    def _load_text(self, folder: Path, what: str) -> Any:
        """What `text_model` makes of the saved components, on the network's device."""
        return self.config.text_model(self._load(self.config.text_classes(), folder, what, self.dtype))

    def _load(self, classes: Mapping[str, Any], folder: Path, what: str, dtype: torch.dtype) -> dict[str, Any]:
        """Saved components of transformers, on the network's device."""
        config, loaded = self.config, {}
        for name, cls in classes.items():
            where, saying = folder / name, f"{what} ({name})"
            if issubclass(cls, nn.Module):
                ignored = config.ignored_weights.get(name, ())
                model = load_text_model(cls, where, saying, ignored=ignored, variant=config.variant, dtype=dtype)
                loaded[name] = model.to(self.device)
            else:
                loaded[name] = load_processor(cls, where, saying)
        return loaded

    # -- the other components -----------------------------------------------------------------------------------------

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
            folder, what = self.config.loadable() / "vae", f"pretrained {self.config.pretrained}: cannot load its VAE"
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

    def _warn_of_cuts(self, encoders: Any, prompts: Sequence[str]) -> None:
        for name, length in self.text_limits.items():
            limit = self.config.inputs()[length].shape[0] if isinstance(length, str) else length
            tokenizer = getattr(encoders, name)
            read = [self.text_for(name, prompt) for prompt in prompts]
            cut = [text for text in read if len(tokenizer(text, verbose=False).input_ids) > limit]
            if cut:
                warnings.warn(
                    f"{len(cut)} of {len(read)} prompts {'is' if len(cut) == 1 else 'are'} cut after {limit} tokens, "
                    f"all that the model's {name} reads; the first: {shorten(cut[0], 60)}",
                    stacklevel=2,
                )


def _pictures(frames: Tensor) -> list[Image.Image]:
    """Frames `[3, N, H, W]` in [0, 1] as pictures of 8 bits."""
    pixels = (frames.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
    return [Image.fromarray(frame) for frame in pixels]


def _sum(*what: Any) -> str:
    """A fingerprint of plain data."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
