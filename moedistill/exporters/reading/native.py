"""Networks as the makers' own code names their parameters, which is how ComfyUI and LightX2V know them.

The names are those of the consumers' classes (ComfyUI 0.3.64: `comfy.ldm.wan.model.WanModel`,
`comfy.ldm.hunyuan_video.model.HunyuanVideo`, `comfy.ldm.lightricks.model.LTXVModel`). What they are in diffusers'
names is diffusers' own knowledge: the converters with which it loads single files. The tables with which files are
written have no part in it, or a mistake in them would be read back as it was written.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from moedistill.exporters.reading.compare import Shapes


class Native(ABC):
    """A network of the makers'.

    Args:
        shapes: of the same network's tensors by diffusers' names.
    """

    converter: str
    """Of diffusers, in `single_file_utils`."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self.names = list(self._all_names())

    @abstractmethod
    def _all_names(self) -> Iterator[str]:
        """The class's own parameters."""

    def parts(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """A parameter, or a change of it, as diffusers has it, by name: of a fused one several tensors."""
        from diffusers.loaders import single_file_utils

        convert: Any = getattr(single_file_utils, self.converter)
        found: dict[str, Tensor] = convert({name: tensor})
        return found

    def _depth(self, blocks: str) -> range:
        numbers = [int(found[1]) for name in self._shapes if (found := re.match(rf"{blocks}\.(\d+)\.", name))]
        return range(max(numbers, default=-1) + 1)


def _linears(paths: Iterable[str]) -> Iterator[str]:
    for path in paths:
        yield from (f"{path}.weight", f"{path}.bias")


class Wan(Native):
    """Wan 2.1, and each of the two networks of Wan 2.2 A14B."""

    converter = "convert_wan_transformer_to_diffusers"

    def _all_names(self) -> Iterator[str]:
        yield from _linears(["patch_embedding", "text_embedding.0", "text_embedding.2"])
        yield from _linears(["time_embedding.0", "time_embedding.2", "time_projection.1", "head.head"])
        yield "head.modulation"
        images = any(name.startswith("condition_embedder.image_embedder.") for name in self._shapes)
        if images:
            yield from _linears(f"img_emb.proj.{number}" for number in (0, 1, 3, 4))
        if "condition_embedder.image_embedder.pos_embed" in self._shapes:
            yield "img_emb.emb_pos"
        for number in self._depth("blocks"):
            block = f"blocks.{number}"
            yield f"{block}.modulation"
            for attention in ("self_attn", "cross_attn"):
                yield from _linears(f"{block}.{attention}.{linear}" for linear in "qkvo")
                yield from (f"{block}.{attention}.norm_{of}.weight" for of in "qk")
            if images:
                yield from _linears(f"{block}.cross_attn.{linear}_img" for linear in "kv")
                yield f"{block}.cross_attn.norm_k_img.weight"
            yield from _linears([f"{block}.norm3", f"{block}.ffn.0", f"{block}.ffn.2"])

    def parts(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        if name == "img_emb.emb_pos":  # which the converter does not know
            return {"condition_embedder.image_embedder.pos_embed": tensor}
        return super().parts(name, tensor)


class LTX(Native):
    """LTX-Video 0.9."""

    converter = "convert_ltx_transformer_checkpoint_to_diffusers"

    def _all_names(self) -> Iterator[str]:
        yield from _linears(["patchify_proj", "proj_out", "adaln_single.linear"])
        yield from _linears(f"adaln_single.emb.timestep_embedder.linear_{number}" for number in (1, 2))
        yield from _linears(f"caption_projection.linear_{number}" for number in (1, 2))
        yield "scale_shift_table"
        for number in self._depth("transformer_blocks"):
            block = f"transformer_blocks.{number}"
            yield f"{block}.scale_shift_table"
            for attention in ("attn1", "attn2"):
                yield from _linears(f"{block}.{attention}.{linear}" for linear in ("to_q", "to_k", "to_v", "to_out.0"))
                yield from (f"{block}.{attention}.{of}_norm.weight" for of in "qk")
            yield from _linears([f"{block}.ff.net.0.proj", f"{block}.ff.net.2"])


class HunyuanVideo(Native):
    """HunyuanVideo by ComfyUI's names, which are not all the makers'."""

    converter = "convert_hunyuan_video_transformer_to_diffusers"

    def _all_names(self) -> Iterator[str]:
        yield from _linears(["img_in.proj", "txt_in.input_embedder", "final_layer.linear"])
        yield from _linears(["final_layer.adaLN_modulation.1"])
        embedders = ["time_in", "vector_in", "txt_in.t_embedder", "txt_in.c_embedder"]
        if any("guidance_embedder" in name for name in self._shapes):
            embedders.append("guidance_in")
        yield from _linears(f"{embedder}.{layer}" for embedder in embedders for layer in ("in_layer", "out_layer"))
        for number in self._depth(r"context_embedder\.token_refiner\.refiner_blocks"):
            block = f"txt_in.individual_token_refiner.blocks.{number}"
            layers = ("norm1", "norm2", "self_attn.qkv", "self_attn.proj", "mlp.0", "mlp.2", "adaLN_modulation.1")
            yield from _linears(f"{block}.{layer}" for layer in layers)
        for number in self._depth("transformer_blocks"):
            for stream in (f"double_blocks.{number}.img", f"double_blocks.{number}.txt"):
                yield from _linears(f"{stream}_{layer}" for layer in ("mod.lin", "attn.qkv", "attn.proj"))
                yield from _linears([f"{stream}_mlp.0", f"{stream}_mlp.2"])
                yield from (f"{stream}_attn.norm.{of}_norm.scale" for of in ("query", "key"))
        for number in self._depth("single_transformer_blocks"):
            block = f"single_blocks.{number}"
            yield from _linears(f"{block}.{layer}" for layer in ("linear1", "linear2", "modulation.lin"))
            yield from (f"{block}.norm.{of}_norm.scale" for of in ("query", "key"))

    def parts(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        if found := re.fullmatch(r"single_blocks\.(\d+)\.linear1\.(weight|bias)", name):
            return self._split(f"single_transformer_blocks.{found[1]}", found[2], tensor)
        return super().parts(self.makers_name(name), tensor)

    @staticmethod
    def makers_name(name: str, *, in_blocks: bool = False) -> str:
        """What the makers call a parameter; `in_blocks`: only as far as linears in blocks have other names."""
        for pattern, makers in _IN_BLOCKS if in_blocks else (*_IN_BLOCKS, *_ELSEWHERE):
            name = re.sub(pattern, makers, name)
        return name

    @staticmethod
    def _split(block: str, last: str, tensor: Tensor) -> dict[str, Tensor]:
        """The linear before attention and feed-forward, which the converter splits for one width of network alone."""
        paths = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        width = tensor.shape[0] // 7  # three of attention, and four times as wide a feed-forward
        parts = tensor.split([width] * 3 + [tensor.shape[0] - 3 * width])
        return {f"{block}.{path}.{last}": part for path, part in zip(paths, parts, strict=True)}


_IN_BLOCKS = (
    (r"_attn\.(qkv|proj)\.", r"_attn_\1."),
    (r"(_mod|\.modulation)\.lin\.", r"\1.linear."),
    (r"([._]mlp)\.0\.", r"\1.fc1."),
    (r"([._]mlp)\.2\.", r"\1.fc2."),
)
_ELSEWHERE = (
    (r"_attn\.norm\.query_norm\.scale$", "_attn_q_norm.weight"),
    (r"_attn\.norm\.key_norm\.scale$", "_attn_k_norm.weight"),
    (r"\.norm\.query_norm\.scale$", ".q_norm.weight"),
    (r"\.norm\.key_norm\.scale$", ".k_norm.weight"),
    (r"c_embedder\.in_layer\.", "c_embedder.linear_1."),
    (r"c_embedder\.out_layer\.", "c_embedder.linear_2."),
    (r"(t_embedder|time_in|guidance_in)\.in_layer\.", r"\1.mlp.0."),
    (r"(t_embedder|time_in|guidance_in)\.out_layer\.", r"\1.mlp.2."),
)
"""By patterns of ComfyUI's names of HunyuanVideo's parameters the makers' own."""

BY_CLASS: Mapping[str, type[Native]] = {
    "WanTransformer3DModel": Wan,
    "HunyuanVideoTransformer3DModel": HunyuanVideo,
    "LTXVideoTransformer3DModel": LTX,
}
"""By the name of diffusers' class of the same network."""
