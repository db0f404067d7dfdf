"""How ComfyUI loads and samples a model family, as the family's plugin knows it."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ComfyUI:
    """What a workflow needs to know of a family. Files are named as ComfyUI's makers publish them, or the model's own.

    Args:
        networks: file of each pretrained network, by its name here; none where it is in `checkpoint`.
        checkpoint: a file with the network and the VAE in it; None where each has a file.
        text_encoders: files of the text encoders, one or two.
        text_type: what ComfyUI's loaders of text encoders call the family.
        vae: file of the VAE; None where it is in `checkpoint`.
        latents: the node that makes an empty video; None for a model that makes videos of more than text.
        fps: frames per second.
        told: a node through which the text goes, its conditioning inputs, and the number that it adds.
        renamed: beginnings of native paths that ComfyUI knows by another name alone, in a LoRA: files of whole weights
            it renames itself.
    """

    networks: Mapping[str, str] = field(default_factory=dict)
    checkpoint: str | None = None
    text_encoders: tuple[str, ...]
    text_type: str
    vae: str | None = None
    latents: str | None
    fps: float
    told: tuple[str, tuple[str, ...], float] | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
