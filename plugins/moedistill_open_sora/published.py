"""The files that Open-Sora 2.0 is published in, and what becomes of them: networks of diffusers and transformers.

Its network (MMDiT) is diffusers' Flux class under other names:

- two linears read the latents and the frames that are given, and are added; there one reads both;
- its rotary embedding turns the halves of a head against each other, there it turns neighbours: rows of the queries and
  keys, and scales of their norms, change places;
- in single blocks one linear makes the values and the MLP's input; in files with fused names queries and keys too, and
  in double blocks all three;
- the final modulation gives shift and scale in the other order.

Its VAE is diffusers' HunyuanVideo VAE, name for name.
"""

import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moedistill import PublishedWeights, WeightPiece

NETWORK = "Open_Sora_v2.safetensors"
VAE = "hunyuan_vae.safetensors"
T5 = Path("google/t5-v1_1-xxl")
CLIP = Path("openai/clip-vit-large-patch14")

SAME = {
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
}
SAME_IN_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.v_proj": "attn.to_v",
    "txt_attn.v_proj": "attn.add_v_proj",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
SAME_IN_SINGLE = {"modulation.lin": "norm.linear", "linear2": "proj_out"}
TURNED_IN_DOUBLE = {
    "img_attn.q_proj": "attn.to_q",
    "img_attn.k_proj": "attn.to_k",
    "txt_attn.q_proj": "attn.add_q_proj",
    "txt_attn.k_proj": "attn.add_k_proj",
}
TURNED_IN_SINGLE = {"q_proj": "attn.to_q", "k_proj": "attn.to_k"}
NORMS_IN_DOUBLE = {
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
}
NORMS_IN_SINGLE = {"norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight"}
KINDS = ("weight", "bias")
WIDTH, DEPTH = 3072, (19, 38)
"""Of the published network: double and single blocks."""


def network_config(weights: PublishedWeights) -> dict[str, Any]:
    """Arguments of diffusers' class for the network in a published file, by the shapes of its tensors.

    Raises:
        ValueError: they are not those of such a network, or blocks of the published one are missing.
    """
    width, own = weights.shape("img_in.weight", 2)
    [head] = weights.shape("double_blocks.0.img_attn.norm.query_norm.scale", 1)
    depth = tuple(_count(weights.names, kind) for kind in ("double_blocks", "single_blocks"))
    if width == WIDTH and depth != DEPTH:
        raise ValueError(
            f"{weights.file} has {depth[0]} double and {depth[1]} single blocks, not {DEPTH[0]} and {DEPTH[1]}"
        )
    space = 7 * head // 32 * 2  # 16, 56 and 56 of 128, of which the file says nothing
    return {
        "patch_size": 1,
        "in_channels": own + weights.shape("cond_in.weight", 2)[1],
        "out_channels": weights.shape("final_layer.linear.weight", 2)[0],
        "num_layers": depth[0],
        "num_single_layers": depth[1],
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": weights.shape("txt_in.weight", 2)[1],
        "pooled_projection_dim": weights.shape("vector_in.in_layer.weight", 2)[1],
        "guidance_embeds": False,
        "axes_dims_rope": (head - 2 * space, space, space),
    }


def vae_config(weights: PublishedWeights) -> dict[str, Any]:
    """Arguments of diffusers' class for the VAE in a published file, by the shapes of its tensors."""
    blocks = range(_count(weights.names, "encoder.down_blocks"))
    return {
        "latent_channels": weights.shape("post_quant_conv.weight", 5)[0],
        "block_out_channels": [
            weights.shape(f"encoder.down_blocks.{k}.resnets.0.conv1.conv.weight", 5)[0] for k in blocks
        ],
        "layers_per_block": _count(weights.names, "encoder.down_blocks.0.resnets"),
    }


def _count(names: Collection[str], of: str) -> int:
    return len({found[1] for name in names if (found := re.match(rf"{re.escape(of)}\.(\d+)\.", name))})


def network_pieces(names: Collection[str], head: int) -> Iterator[WeightPiece]:
    """How the network is made of tensors of these names, whose heads are `head` wide."""
    for source, target in SAME.items():
        yield from _renamed(source, target)
    yield WeightPiece(
        ("img_in.weight", "cond_in.weight"), ("x_embedder.weight",), lambda own, given: (torch.cat([own, given], 1),)
    )
    yield WeightPiece(("img_in.bias", "cond_in.bias"), ("x_embedder.bias",), lambda own, given: (_sum(own, given),))
    for kind in KINDS:
        yield WeightPiece((f"final_layer.adaLN_modulation.1.{kind}",), (f"norm_out.linear.{kind}",), _halves_swapped)
    for k in range(_count(names, "double_blocks")):
        fused = f"double_blocks.{k}.img_attn.qkv.weight" in names
        yield from _double_block(f"double_blocks.{k}.", f"transformer_blocks.{k}.", head, fused)
    for k in range(_count(names, "single_blocks")):
        fused = f"single_blocks.{k}.linear1.weight" in names
        yield from _single_block(f"single_blocks.{k}.", f"single_transformer_blocks.{k}.", head, fused)


def _double_block(there: str, here: str, head: int, fused: bool) -> Iterator[WeightPiece]:
    for source, target in SAME_IN_DOUBLE.items():
        if not (fused and source.endswith("v_proj")):
            yield from _renamed(there + source, here + target)
    for source, target in NORMS_IN_DOUBLE.items():
        yield WeightPiece((there + source,), (here + target,), _neighbours(head))
    if not fused:
        for source, target in TURNED_IN_DOUBLE.items():
            yield from _turned(there + source, here + target, head)
        return
    for stream, targets in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
        for kind in KINDS:
            made = [f"{here}attn.{target}.{kind}" for target in targets]
            yield WeightPiece((f"{there}{stream}_attn.qkv.{kind}",), made, _cut_apart(head, parts=3))


def _single_block(there: str, here: str, head: int, fused: bool) -> Iterator[WeightPiece]:
    for source, target in SAME_IN_SINGLE.items():
        yield from _renamed(there + source, here + target)
    for source, target in NORMS_IN_SINGLE.items():
        yield WeightPiece((there + source,), (here + target,), _neighbours(head))
    targets = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    for kind in KINDS:
        made = [f"{here}{target}.{kind}" for target in targets]
        if fused:
            yield WeightPiece((f"{there}linear1.{kind}",), made, _cut_apart(head, parts=7))
        else:
            yield WeightPiece((f"{there}v_mlp.{kind}",), made[2:], lambda stacked: stacked.split(_fifths(stacked)))
    if not fused:
        for source, target in TURNED_IN_SINGLE.items():
            yield from _turned(there + source, here + target, head)


def _renamed(source: str, target: str) -> Iterator[WeightPiece]:
    for kind in KINDS:
        yield WeightPiece.renamed(f"{source}.{kind}", f"{target}.{kind}")


def _turned(source: str, target: str, head: int) -> Iterator[WeightPiece]:
    for kind in KINDS:
        yield WeightPiece((f"{source}.{kind}",), (f"{target}.{kind}",), _neighbours(head))


def _neighbours(head: int) -> Callable[[Tensor], tuple[Tensor]]:
    """Rows `[heads·head, …]` whose halves of each head turned against each other, so that neighbours do."""
    return lambda rows: (rows.unflatten(0, (-1, 2, head // 2)).transpose(1, 2).flatten(0, 2),)


def _cut_apart(head: int, parts: int) -> Callable[[Tensor], list[Tensor]]:
    """Stacked queries, keys, values and, where there are more parts, an MLP's input of the rest of the rows."""

    def cut(stacked: Tensor) -> list[Tensor]:
        width = len(stacked) // parts
        q, k, v, *rest = stacked.split([width, width, width, *([len(stacked) - 3 * width] if parts > 3 else [])])
        return [*_neighbours(head)(q), *_neighbours(head)(k), v, *rest]

    return cut


def _fifths(stacked: Tensor) -> list[int]:
    """Rows of the values, and of the MLP's input, which is four times as wide."""
    return [len(stacked) // 5, len(stacked) - len(stacked) // 5]


def _halves_swapped(rows: Tensor) -> tuple[Tensor]:
    shift, scale = rows.chunk(2)
    return (torch.cat([scale, shift]),)


def _sum(first: Tensor, second: Tensor) -> Tensor:
    return (first.float() + second.float()).to(first.dtype)
