"""The tables of native names, judged by diffusers' own converters of the makers' files."""

from dataclasses import replace

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_hunyuan_video_transformer_to_diffusers,
    convert_ltx_transformer_checkpoint_to_diffusers,
    convert_wan_transformer_to_diffusers,
)

from moedistill_cogvideox.backbone import CogVideoXConfig
from moedistill_hunyuan_video.backbone import HunyuanVideoConfig
from moedistill_ltx.backbone import LTXConfig
from moedistill_wan.backbone import WanConfig

FAMILIES = {
    "wan": (WanConfig, {}, convert_wan_transformer_to_diffusers),
    "wan_from_images": (
        WanConfig,
        {"in_channels": 36, "image_dim": 8, "added_kv_proj_dim": 32},
        convert_wan_transformer_to_diffusers,
    ),
    # The converter knows no other width.
    "hunyuan_video": (
        HunyuanVideoConfig,
        {"num_attention_heads": 24, "attention_head_dim": 128, "rope_axes_dim": (16, 56, 56)},
        convert_hunyuan_video_transformer_to_diffusers,
    ),
    "ltx": (LTXConfig, {}, convert_ltx_transformer_checkpoint_to_diffusers),
}


def network_of(config, changes):
    """Random tensors by the names of a network of that architecture, all columns but the first left out."""
    with torch.device("meta"):
        network = config.network_class()(**{**config.tiny_network(), **changes})
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(len(tensor), *(1 for _ in tensor.shape[1:]), generator=generator)
        for name, tensor in network.state_dict().items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_native_weights_come_back_bit_for_bit_through_the_converter_of_diffusers(family) -> None:
    cls, changes, convert = FAMILIES[family]
    config = cls(pretrained=None)
    here = network_of(config, changes)
    tensors = config.native_names().tensors({name: tensor.shape for name, tensor in here.items()})
    native = {tensor.name: tensor.join([here[part] for part in tensor.parts]) for tensor in tensors}
    assert {name: tuple(tensor.shape) for name, tensor in native.items()} == {t.name: t.shape for t in tensors}

    converted = convert(dict(native))
    assert converted.keys() == here.keys()
    assert all(converted[name].equal(here[name]) for name in here)
    back = {name: part for tensor in tensors for name, part in tensor.split(native[tensor.name]).items()}
    assert all(back[name].equal(here[name]) for name in here)


@pytest.mark.parametrize("cls", [WanConfig, HunyuanVideoConfig, LTXConfig])
def test_every_row_of_a_table_is_of_some_network(cls) -> None:
    """A row that no network has could be misspelt."""
    config = cls(pretrained=None)
    shapes = {}
    for family, changes, _ in FAMILIES.values():
        if family is cls:
            shapes |= {name: tensor.shape for name, tensor in network_of(config, changes).items()}
    names, idle = config.native_names(), set()
    for row in names.table:
        rest = {native: here for native, here in names.table.items() if native != row}
        try:
            replace(names, table=rest).tensors(shapes)
            idle.add(row)
        except ValueError:
            pass
    # Norms without parameters; what networks have that are told the first and the last frame.
    assert idle == ({"blocks.*.norm2", "img_emb.emb_pos"} if cls is WanConfig else set())


def test_cogvideox_has_no_other_names() -> None:
    assert CogVideoXConfig(pretrained=None).native_names() is None
