"""The published networks, of which the plugins know all arguments where there is no folder on this machine."""

import json
from functools import cache

import pytest
from accelerate import init_empty_weights

from moedistill.components.plugins import load_plugins
from moedistill.model.latent_video import LatentVideoConfig
from moedistill.recipe.loading import load_recipe, shipped_recipes
from moedistill_cogvideox.backbone import CogVideoXConfig
from moedistill_hunyuan_video.backbone import HunyuanVideoConfig
from moedistill_hunyuan_video_15.backbone import HunyuanVideo15Config
from moedistill_ltx.backbone import LTXConfig
from moedistill_open_sora.backbone import OpenSoraConfig
from moedistill_wan.backbone import WanConfig

PARAMETERS = {
    "hunyuanvideo-community/HunyuanVideo": 12_821_012_544,
    "hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v": 8_326_608_160,
    "hunyuanvideo-community/HunyuanVideo-1.5-720p_t2v": 8_326_608_160,
    "THUDM/CogVideoX-2b": 1_693_783_872,
    "THUDM/CogVideoX-5b": 5_570_283_072,
    "THUDM/CogVideoX1.5-5B": 5_570_676_352,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 1_418_996_800,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": 14_288_491_584,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": 14_288_491_584,
    "Lightricks/LTX-Video": 1_923_385_472,
    "hpcai-tech/Open-Sora-v2": 11_891_387_456,
}
"""By Hub id, of one network. A default of diffusers' that changes shows here."""

SIBLINGS = [
    HunyuanVideo15Config(pretrained="hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v"),
    HunyuanVideo15Config(pretrained="hunyuanvideo-community/HunyuanVideo-1.5-720p_t2v"),
    CogVideoXConfig(pretrained="THUDM/CogVideoX1.5-5B", model="1.5-5b"),
    WanConfig(pretrained="Wan-AI/Wan2.1-T2V-14B-Diffusers"),
]
"""Of which there is no recipe."""

RECIPES = sorted(name for name in shipped_recipes() if "digits" not in name and not name.startswith("ablations/"))

LAYOUTS = {
    HunyuanVideoConfig: (16, (1, 2, 2), {"prompt_embeds": 4096, "pooled_prompt_embeds": 768}),
    HunyuanVideo15Config: (32, (1, 1, 1), {"prompt_embeds": 3584, "prompt_embeds_2": 1472}),
    CogVideoXConfig: (16, (1, 2, 2), {"prompt_embeds": 4096}),
    WanConfig: (16, (1, 2, 2), {"prompt_embeds": 4096}),
    LTXConfig: (128, (1, 1, 1), {"prompt_embeds": 4096}),
    OpenSoraConfig: (16, (1, 2, 2), {"prompt_embeds": 4096, "pooled_prompt_embeds": 768}),
}
"""Channels, what (T, H, W) is a multiple of, and the widths of text."""


@pytest.fixture(autouse=True)
def nothing_downloaded(monkeypatch):
    find = LatentVideoConfig.find
    monkeypatch.setattr(LatentVideoConfig, "find", lambda self: None if self.pretrained in PARAMETERS else find(self))


@cache
def plugins():
    return load_plugins()


def backbone_of(recipe):
    return load_recipe(recipe, plugins=plugins()).backbone if isinstance(recipe, str) else recipe


def parameters_of(config):
    return _parameters(config.network_class(), tuple(config.architecture().items()))


@cache
def _parameters(cls, arguments):
    with init_empty_weights():
        network = cls(**dict(arguments))
    return sum(parameter.numel() for parameter in network.parameters())


def label(recipe):
    return recipe if isinstance(recipe, str) else recipe.pretrained


@pytest.mark.parametrize("recipe", [*RECIPES, *SIBLINGS], ids=label)
def test_the_whole_network_is_known_without_its_folder(recipe):
    config = backbone_of(recipe)
    assert parameters_of(config) == PARAMETERS[config.pretrained]
    layout = config.layout()
    texts = {name: each.shape[-1] for name, each in layout.conditioning.items() if each.role in ("text", "pooled")}
    assert (layout.channels, layout.multiple, texts) == LAYOUTS[type(config)]


def test_every_network_of_the_table_is_built():
    assert {backbone_of(recipe).pretrained for recipe in [*RECIPES, *SIBLINGS]} == set(PARAMETERS)


@pytest.mark.parametrize(
    ("config", "name", "same"),
    [
        (WanConfig, "someone/wan2.1-t2v-1.3b", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        (WanConfig, "models/not/here/Wan2.1-T2V-1.3B-Diffusers/", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        (WanConfig, "not/here", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
        (CogVideoXConfig, "zai-org/CogVideoX1.5-5b", "THUDM/CogVideoX1.5-5B"),
        (CogVideoXConfig, "not/here", "THUDM/CogVideoX-2b"),
        (
            HunyuanVideo15Config,
            "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v",
            "hunyuanvideo-community/HunyuanVideo-1.5-720p_t2v",
        ),
        (HunyuanVideo15Config, "not/here", "hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v"),
        (HunyuanVideoConfig, "not/here", "hunyuanvideo-community/HunyuanVideo"),
        (LTXConfig, "not/here", "Lightricks/LTX-Video"),
        (OpenSoraConfig, "not/here", "hpcai-tech/Open-Sora-v2"),
    ],
)
def test_models_are_known_by_the_last_part_of_their_name(config, name, same):
    assert config(pretrained=name).architecture() == config(pretrained=same).architecture()


def test_cogvideox_of_an_unknown_name_is_what_model_says():
    for model, name in (("5b", "THUDM/CogVideoX-5b"), ("1.5-5b", "THUDM/CogVideoX1.5-5B")):
        own = CogVideoXConfig(pretrained="not/here", model=model).architecture()
        assert own == CogVideoXConfig(pretrained=name).architecture()


def test_what_no_count_shows_is_as_published_too():
    sizes = {p: HunyuanVideo15Config(pretrained=f"x/HunyuanVideo-1.5-{p}_t2v").architecture() for p in ("480p", "720p")}
    assert {p: own["target_size"] for p, own in sizes.items()} == {"480p": 640, "720p": 960}
    assert {own["task_type"] for own in sizes.values()} == {"t2v"}
    names = ("sample_height", "sample_width", "sample_frames", "patch_size_t", "use_rotary_positional_embeddings")
    cogvideox = {
        name: tuple(CogVideoXConfig(pretrained=f"x/{name}").architecture()[key] for key in names)
        for name in ("CogVideoX-2b", "CogVideoX-5b", "CogVideoX1.5-5B")
    }
    assert cogvideox == {
        "CogVideoX-2b": (60, 90, 49, None, False),
        "CogVideoX-5b": (60, 90, 49, None, True),
        "CogVideoX1.5-5B": (300, 300, 81, 2, True),
    }


def test_a_folder_goes_before_the_published_network(tmp_path):
    folder = tmp_path / "Wan2.1-T2V-1.3B-Diffusers"
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps({"num_layers": 2, "ffn_dim": 64}))
    published = WanConfig(pretrained="Wan-AI/Wan2.1-T2V-1.3B-Diffusers").architecture()
    own = WanConfig(pretrained=str(folder)).architecture()
    assert own == published | {"num_layers": 2, "ffn_dim": 64}
    assert (published["num_layers"], published["num_attention_heads"]) == (30, 12)
