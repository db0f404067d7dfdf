"""What LightX2V loads, and its configuration: the recipe's list on its own grid, and each expert for its steps."""

import json

import torch
from safetensors.torch import load_file

from moedistill.exporters.lightx2v import LightX2VConfig
from moedistill.exporters.options import ExportOptions
from moedistill.exporters.source import open_source
from moedistill.model.guidance import Guidance


def exported(source, folder, **options):
    folder.mkdir()
    assert LightX2VConfig().applies(source) is None
    files = LightX2VConfig().write(source, folder, ExportOptions(**{"dtype": torch.float32, **options}))
    assert sorted(path.name for path in folder.iterdir()) == sorted(file.path for file in files)
    written = folder / "lightx2v.json"
    return json.loads(written.read_text(encoding="utf-8")) if written.is_file() else None


def sigmas_of(config):
    """As LightX2V makes them: 1000 even points from 1 down, shifted, the 1000 - n-th for each n of the list."""
    even = torch.linspace(1, 0, 1001)[:-1]
    shifted = config["sample_shift"] * even / (1 + (config["sample_shift"] - 1) * even)
    return shifted[[1000 - count for count in config["denoising_step_list"]]]


def apply(weights, lora):
    """As LightX2V merges a file: prefixes are cut off, alpha over rank or 1, and differences of biases."""
    lora = {key.removeprefix("diffusion_model."): tensor for key, tensor in lora.items()}
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    for key, up in lora.items():
        if key.endswith(".lora_up.weight"):
            path = key.removesuffix(".lora_up.weight")
            down, alpha = lora[f"{path}.lora_down.weight"], lora.get(f"{path}.alpha")
            weights[f"{path}.weight"] += (1.0 if alpha is None else float(alpha) / len(down)) * up @ down
        if key.endswith(".diff_b"):
            weights[f"{key.removesuffix('.diff_b')}.bias"] += up
    return weights


def native_of(source, take):
    (first, *_) = source.experts.values()
    tensors = source.recipe.backbone.native_names().tensors(first.shapes)
    return {tensor.name: tensor.join([take(part) for part in tensor.parts]).float() for tensor in tensors}


def test_the_list_and_the_switch_are_the_recipes(tmp_path, runs):
    source = open_source(runs("wan"))
    config = exported(source, tmp_path / "out")
    assert config["denoising_step_list"] == [1000, 700, 400]
    assert (config["sample_shift"], config["infer_steps"], config["boundary_step_index"]) == (17.0, 3, 2)
    assert torch.allclose(sigmas_of(config), torch.tensor(source.sigmas[:-1]), rtol=0, atol=1e-6)
    assert (config["enable_cfg"], config["lora_dynamic_apply"]) == (False, False)
    video = source.recipe.backbone.video
    size = (config["target_video_length"], config["target_height"], config["target_width"])
    assert size == (video.num_frames, video.height, video.width)


def test_lora_files_make_the_experts_of_the_base(tmp_path, runs):
    source = open_source(runs("wan22"))
    config = exported(source, tmp_path / "out")
    assert config["lora_configs"] == [
        {"name": "high_noise_model", "path": "few_wan22_high_noise.safetensors", "strength": 1.0},
        {"name": "low_noise_model", "path": "few_wan22_low_noise.safetensors", "strength": 1.0},
    ]
    assert not [key for key in config if key.endswith("_ckpt")]  # the model's folder has both networks
    for expert, lora in zip(source.experts.values(), config["lora_configs"], strict=True):
        made = apply(native_of(source, expert.original), load_file(tmp_path / "out" / lora["path"]))
        wanted = native_of(source, expert.tensor)
        assert made.keys() == wanted.keys()
        assert max(float((made[name] - wanted[name]).abs().max()) for name in wanted) < 1e-6


def test_an_adapter_stands_on_the_file_of_the_full_expert(tmp_path, runs):
    source = open_source(runs("wan", "full"))
    config = exported(source, tmp_path / "out")
    high = "few_wan_high_noise.safetensors"
    assert (config["high_noise_original_ckpt"], config["low_noise_original_ckpt"]) == (high, high)
    (lora,) = config["lora_configs"]
    assert lora == {"name": "low_noise_model", "path": "few_wan_low_noise.safetensors", "strength": 1.0}
    made = apply(load_file(tmp_path / "out" / high), load_file(tmp_path / "out" / lora["path"]))
    wanted = native_of(source, source.experts["detail"].tensor)
    assert max(float((made[name] - wanted[name]).abs().max()) for name in wanted) < 1e-6


def test_adapters_of_one_network_name_it_for_both(tmp_path, runs):
    config = exported(open_source(runs("wan")), tmp_path / "out")
    assert (config["high_noise_original_ckpt"], config["low_noise_original_ckpt"]) == ("model", "model")
    assert [lora["name"] for lora in config["lora_configs"]] == ["high_noise_model", "low_noise_model"]


def test_merged_experts_are_checkpoints(tmp_path, runs):
    config = exported(open_source(runs("wan22")), tmp_path / "out", form="merged")
    assert config["high_noise_original_ckpt"] == "few_wan22_high_noise.safetensors"
    assert config["low_noise_original_ckpt"] == "few_wan22_low_noise.safetensors"
    assert "lora_configs" not in config


def test_one_expert_is_the_single_network(tmp_path, runs):
    changes = {"experts": {"semantic": {"kind": "full"}}, "router": None, "stages": [
        {"name": "semantic", "kind": "consistency", "expert": "semantic", "steps": 1, "losses": [{"kind": "huber"}]},
        {"name": "export", "kind": "export"},
    ]}  # fmt: skip
    changes["router"] = {"kind": "timestep", "experts": ["semantic"], "boundaries": []}
    source = open_source(runs("wan", **changes))
    config = exported(source, tmp_path / "out")
    assert (config["dit_original_ckpt"], config["sample_guide_scale"]) == ("few_wan_semantic.safetensors", 1.0)
    assert "boundary_step_index" not in config
    assert "--model_cls wan2.1_distill" in LightX2VConfig().usage(source, [], ExportOptions())


def test_what_it_cannot_sample_has_no_configuration_and_says_why(tmp_path, runs):
    uneven = open_source(runs("wan", trajectory={"kind": "flow_matching", "num_steps": 20, "shift": 17.0},
                              sample={"sigmas": [1.0, 0.95, 0.9]}))  # fmt: skip
    assert exported(uneven, tmp_path / "uneven") is None
    text = LightX2VConfig().usage(uneven, [], ExportOptions())
    assert "its steps lie on a grid of 1000 that is shifted by 17, and the recipe's sigmas do not" in text

    router = {"kind": "timestep", "experts": ["teacher", "detail"], "boundaries": [{"point": 8}]}
    guided = open_source(runs("wan", router=router))
    guided.recipe.backbone.guidance = Guidance(mode="classifier_free", scale=5.0)
    assert exported(guided, tmp_path / "guided") is None
    assert "teacher is guided in its steps" in LightX2VConfig().usage(guided, [], ExportOptions())


def test_what_it_does_not_run_is_refused_with_the_reason(runs):
    for family, kind in [("hunyuan_video", "hunyuan_video"), ("ltx", "ltx"), ("cogvideox_2b", "cogvideox")]:
        reason = LightX2VConfig().applies(open_source(runs(family)))
        assert reason == f"how LightX2V runs backbone {kind!r} is not known here"
    three = {
        "experts": {
            "semantic": {"kind": "lora", "rank": 2},
            "middle": {"kind": "lora", "rank": 2},
            "detail": {"kind": "lora", "rank": 2},
        },
        "router": {
            "kind": "timestep",
            "experts": ["semantic", "middle", "detail"],
            "boundaries": [{"point": 14}, {"point": 8}],
        },
    }
    reason = LightX2VConfig().applies(open_source(runs("wan", **three)))
    assert reason == "LightX2V takes two networks, and sampling uses semantic, middle, detail"
