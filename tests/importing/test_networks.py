"""Whole networks, as diffusers saves them or under their makers' names, become full experts that compute the same."""

import json

import pytest
import torch
from importing_helpers import convert, error_of, raw_network, recipe_of, refused
from safetensors.torch import load_file, save_file

from moedistill.recipe.loading import load_recipe
from moedistill.runs.sample import load_mixture
from moedistill_hunyuan_video.native import NAMES as HUNYUAN

FULL = {"high": {"kind": "full"}, "low": {"kind": "full"}}
WAN = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o",
    "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "norm2": "norm3", "proj_out": "head.head",
}  # fmt: skip


def makers_name(name):
    """What Wan's own code calls a tensor."""
    if name == "scale_shift_table":
        return "head.modulation"
    for here, native in WAN.items():
        name = name.replace(here, native)
    return name.replace("scale_shift_table", "modulation")


@pytest.fixture
def networks():
    config = load_recipe(recipe_of("wan", FULL)).backbone
    return {name: raw_network(config, seed) for seed, name in enumerate(FULL)}


def saved(networks, folder, **index):
    """As a pipeline's folder, without its other components."""
    for place, network in zip(("transformer", "transformer_2"), networks.values(), strict=True):
        network.save_pretrained(folder / place, max_shard_size="20KB" if place == "transformer" else "1GB")
    if index:
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **index}))
    return folder


def check(networks, folder):
    _, mixture = load_mixture(folder)
    for expert, network in networks.items():
        assert error_of(mixture, expert, network) <= 1e-5
        assert error_of(mixture, "teacher", network) > 0.01


def test_folders_of_diffusers_in_shards_or_not(networks, tmp_path, capsys):
    recipe = recipe_of("wan", FULL)
    boundary = load_recipe(recipe).trajectory.build(None).points[4:6].mean().item()
    source = saved(networks, tmp_path / "pipeline", boundary_ratio=boundary)
    assert len(list((source / "transformer").glob("*.safetensors"))) > 1
    code, out, err = convert("diffusers", source, tmp_path / "export", recipe, capsys)
    assert (code, err) == (0, "")
    assert "an export with high and low" in out
    check(networks, tmp_path / "export")
    index = json.loads((tmp_path / "export" / "export.json").read_text())
    imported = index["provenance"]["imported"]
    assert imported["kind"] == "diffusers"
    assert set(imported["files"]) == {str(file.relative_to(source)) for file in source.rglob("*.safetensors")}


def test_the_networks_of_wan_22_are_experts_on_its_two_networks(networks, tmp_path, capsys):
    experts = {"high": {"kind": "full", "base": "transformer"}, "low": {"kind": "full", "base": "transformer_2"}}
    recipe = recipe_of("wan", experts)
    recipe["backbone"]["boundary_ratio"] = 0.875
    recipe["router"] |= {"boundaries": [{"ratio": 0.875}], "closed": "high"}
    source = saved(networks, tmp_path / "pipeline", boundary_ratio=0.875)
    assert convert("diffusers", source, tmp_path / "export", recipe, capsys)[0] == 0
    check(networks, tmp_path / "export")


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_files_under_the_makers_names(prefix, networks, tmp_path, capsys):
    (tmp_path / "files").mkdir()
    for name, network in networks.items():
        tensors = {prefix + makers_name(key): each for key, each in network.state_dict().items()}
        assert "blocks.0.cross_attn.norm_k.weight" in {key.removeprefix(prefix) for key in tensors}
        save_file(tensors, tmp_path / "files" / f"wan_{name.upper()}_fp32.safetensors")
    code, _, err = convert("comfyui", tmp_path / "files", tmp_path / "export", recipe_of("wan", FULL), capsys)
    assert (code, err) == (0, "")
    check(networks, tmp_path / "export")


def test_a_file_whose_makers_fuse_linears_for_one_expert(tmp_path, capsys):
    recipe = recipe_of("hunyuan_video", {"only": {"kind": "full"}})
    recipe["router"] = {"kind": "timestep", "experts": ["only"], "boundaries": []}
    network = raw_network(load_recipe(recipe).backbone, 0)
    state = network.state_dict()
    native = HUNYUAN.tensors({name: tuple(each.shape) for name, each in state.items()})
    tensors = {each.name: each.join([state[part] for part in each.parts]).contiguous() for each in native}
    assert tensors["double_blocks.0.img_attn_qkv.weight"].shape == (72, 24)
    save_file(tensors, tmp_path / "only.safetensors")
    assert convert("comfyui", tmp_path / "only.safetensors", tmp_path / "export", recipe, capsys)[0] == 0
    _, mixture = load_mixture(tmp_path / "export")
    assert error_of(mixture, "only", network) <= 1e-5


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_boundary_that_is_not_the_recipe_s(networks, tmp_path, capsys):
    source = saved(networks, tmp_path / "pipeline", boundary_ratio=0.9)
    message = refused("diffusers", source, tmp_path / "export", recipe_of("wan", FULL), capsys)
    assert "parts its networks at boundary_ratio 0.9, which gives point 5 of the trajectory, sigma 0.892857" in message
    assert "boundaries: [{ratio: 0.9}]" in message


def edited(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_folders_that_do_not_fit(networks, tmp_path, capsys):
    source, recipe = saved(networks, tmp_path / "pipeline"), recipe_of("wan", FULL)
    config, weights = (
        source / "transformer_2" / name for name in ("config.json", "diffusion_pytorch_model.safetensors")
    )
    tensors = load_file(weights)

    def message(recipe=recipe):
        return refused("diffusers", source, tmp_path / "export", recipe, capsys)

    edited(config, num_attention_heads=4)  # the same shapes
    assert "config.json has num_attention_heads 4, and the recipe's network 2; it is another model's" in message()
    edited(config, num_attention_heads=2, _class_name="LTXVideoTransformer3DModel")
    assert "is of a LTXVideoTransformer3DModel, and the recipe's network is a WanTransformer3DModel" in message()
    edited(config, _class_name="WanTransformer3DModel")
    save_file(
        {name: each for name, each in tensors.items() if "norm2.weight" not in name} | {"x": torch.ones(1)}, weights
    )
    assert "missing: blocks.{0-1}.norm2.weight; left over: x; get it again" in message()
    weights.unlink()
    (weights.parent / "diffusion_pytorch_model.bin").touch()
    assert "diffusion_pytorch_model.bin is a pickle" in message()
    shard = sorted((source / "transformer").glob("*.safetensors"))[0]
    shard.unlink()
    assert f"{shard} is missing, which diffusion_pytorch_model.safetensors.index.json names" in message()
    one = recipe_of("wan", {"only": {"kind": "full"}})
    one["router"] = {"kind": "timestep", "experts": ["only"], "boundaries": []}
    assert "has a transformer_2 too, and the recipe one expert, 'only'" in message(one)
    lora = recipe_of("wan", {**FULL, "low": {"kind": "lora", "rank": 2, "alpha": 2}})
    assert "experts.low is lora, and the weights are those of whole networks; make it kind: full" in message(lora)


def test_makers_files_that_do_not_fit(networks, tmp_path, capsys):
    recipe, source = recipe_of("wan", FULL), tmp_path / "files"
    source.mkdir()
    for name, network in networks.items():
        save_file(dict(network.state_dict()), source / f"{name}_noise.safetensors")  # diffusers' names
    message = refused("comfyui", source, tmp_path / "export", recipe, capsys)
    assert "missing: " in message
    assert "blocks.{0-1}.self_attn.q.weight" in message
    assert "left over: " in message
    tensors = {makers_name(key): each for key, each in networks["high"].state_dict().items()}
    save_file({name: each.to(torch.float8_e4m3fn) for name, each in tensors.items()}, source / "high_noise.safetensors")
    assert "is stored in other numbers" in refused("comfyui", source, tmp_path / "export", recipe, capsys)
    other = recipe_of("cogvideox", FULL, trajectory={"kind": "native", "num_steps": 8})
    message = refused("comfyui", source, tmp_path / "export", other, capsys)
    assert "what the makers of cogvideox call their tensors is not known here" in message


def test_kinds_and_options_that_do_not_go_together(tmp_path, capsys):
    from moedistill.cli import main

    for arguments, says in (
        (["dcm", "source", "dest"], "dcm is of experts: give the recipe that they fit with --recipe"),
        (["open_sora", "source", "dest", "--set", "seed=1"], "--set changes a recipe; give one with --recipe"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["convert", *arguments])
        assert ended.value.code == 2
        assert says in capsys.readouterr().err
