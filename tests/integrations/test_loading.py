"""Weights in a folder that are not those of the class: one line before anything is trained, never other numbers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from saved_pipelines import PROMPT, pipeline_recipe, save_pipeline

from moedistill import DiffusersBackboneConfig, cli
from moedistill.errors import UserError
from moedistill.integrations.diffusers.misfit import misfit
from moedistill.recipe.loading import load_recipe
from moedistill.runs.build import build_mixture
from moedistill.runs.loop import run

WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("wan"), "wan")


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change(folder, component, how):
    """Rewrites a component's weights: `how` gives new tensors by name."""
    file = folder / component / WEIGHTS[component]
    save_file(how(load_file(file)), file, metadata={"format": "pt"})


def backbone_of(folder, **changes):
    recipe = pipeline_recipe("wan", folder)
    return load_recipe({**recipe, "backbone": {**recipe["backbone"], **changes}}).backbone


def velocity(backbone):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, 3, 4, 6, generator=generator)
    text = torch.randn(1, 512, 24, generator=generator)
    with torch.no_grad():
        return backbone.velocity(backbone.network, x, torch.tensor([0.7]), {"prompt_embeds": text})


def scaled(tensors):
    """As a scaled fp8 file: weights in fp8, each with a number to multiply it by."""
    scales = {name.removesuffix("weight") + "scale_weight": torch.tensor(2.0) for name in tensors if "weight" in name}
    return {**{name: value.to(torch.float8_e4m3fn) for name, value in tensors.items()}, **scales}


def renamed(prefix):
    return lambda tensors: {prefix + name: value for name, value in tensors.items()}


def without(part):
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


def with_lora(tensors):
    wrapped = {name.replace("to_q.", "to_q.base_layer."): value for name, value in tensors.items()}
    return {**wrapped, "blocks.0.attn1.to_q.lora_A.default.weight": torch.zeros(2, 32)}


def native(tensors):
    return {name.replace("blocks", "layers").replace("condition", "text"): value for name, value in tensors.items()}


MISFITS = {
    "scaled fp8": (scaled, r"left over \(.*scale_weight.*\); this is a scaled fp8 file"),
    "a tensor less": (without("blocks.1.ffn.net.2.bias"), r"1 missing \(blocks\.1\.ffn\.net\.2\.bias\); what .* holds"),
    "a block less": (without("blocks.1."), r"27 missing \(.*\); blocks\.1 is missing, so the depth is another"),
    "compiled": (renamed("_orig_mod."), r"all names begin with '_orig_mod\.'; save the weights of the bare network"),
    "a LoRA": (with_lora, r"a LoRA is wrapped around the weights; merge it"),
    "other names": (native, r"the names are not diffusers'; .*WanTransformer3DModel\.from_single_file\(FILE\)\.save_"),
    "another shape": (
        lambda tensors: {**tensors, "proj_out.weight": torch.zeros(3, 3)},
        r"proj_out\.weight expected shape .*\[64, 32\]\), but got .*\[3, 3\]\)\.$",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_network_of_other_tensors_is_refused(folder, kind):
    how, message = MISFITS[kind]
    change(folder, "transformer", how)
    with pytest.raises(ValueError, match=message) as error:
        backbone_of(folder).build()
    said = str(error.value)
    assert said.startswith(f"pretrained {folder}: cannot load its transformer: ")
    assert "\n" not in said
    assert "ignore_mismatched_sizes" not in said
    assert len(said) < 800


def test_a_config_of_another_depth_is_refused(folder):
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_layers": 1}))
    with pytest.raises(ValueError, match=r"blocks\.1 is more than config\.json says, so the depth is another"):
        backbone_of(folder).build()


def test_a_run_says_it_in_one_line_before_it_trains(folder, tmp_path, capsys):
    change(folder, "transformer", scaled)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(pipeline_recipe("wan", folder)))
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", str(file), "--output", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "Traceback" not in said
    assert "this is a scaled fp8 file" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_plain_storage_in_fewer_bits_is_cast(folder, dtype):
    stored = {}

    def rounded(tensors):
        stored.update({name: value.to(dtype) for name, value in tensors.items()})
        return stored

    change(folder, "transformer", rounded)
    network = backbone_of(folder).build().network
    assert all(torch.equal(value, stored[name].float()) for name, value in network.state_dict().items())


def test_what_a_plugin_allows_may_be_left_over(folder, monkeypatch):
    whole = velocity(backbone_of(folder).build())
    change(folder, "transformer", lambda tensors: {**tensors, "scale_to_train": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"1 left over \(scale_to_train\)"):
        backbone_of(folder).build()
    monkeypatch.setattr(DiffusersBackboneConfig, "ignored_weights", {"transformer": [r"^scale_to_train$"]})
    assert torch.equal(velocity(backbone_of(folder).build()), whole)


@pytest.mark.parametrize(("component", "use"), [("vae", "load_vae"), ("text_encoder", "encode")])
@pytest.mark.parametrize("kind", ["a tensor less", "scaled fp8"])
def test_vae_and_text_encoders_too(folder, component, use, kind):
    missing = {"vae": "decoder.conv_in.weight", "text_encoder": "relative_attention_bias"}[component]
    change(folder, component, scaled if kind == "scaled fp8" else without(missing))
    backbone = backbone_of(folder).build()
    with pytest.raises(ValueError, match=r"(its VAE|its text encoders \(text_encoder\)): its tensors are not") as error:
        getattr(backbone, use)(*[[PROMPT]] * (use == "encode"))
    assert (missing if kind == "a tensor less" else "scaled fp8") in str(error.value)


def test_a_quantised_network_is_refused(folder):
    file = folder / "transformer" / "config.json"
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    file.write_text(json.dumps(json.loads(file.read_text()) | quantised))
    with pytest.raises(ValueError, match=r"it is quantised, by bitsandbytes \(.*config\.json\); get the weights in"):
        backbone_of(folder).build()


@pytest.mark.parametrize("name", ["wan.safetensors", "weights/wan.safetensors"])  # the second looks like a Hub id
def test_a_single_file_is_no_model(folder, tmp_path, monkeypatch, name):
    (tmp_path / "weights").mkdir()
    shutil.copyfile(folder / "transformer" / WEIGHTS["transformer"], tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=rf"^pretrained {name}: a single file, where a folder must be; .*from_single_f"
    ):
        backbone_of(name).build()
    with pytest.raises(UserError, match="a single file, where a folder must be"):
        run(pipeline_recipe("wan", name), output=tmp_path / "run", device="cpu")


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b'{"num_layers": "two"}'])
def test_a_broken_config_makes_no_traceback(folder, content):
    (folder / "transformer" / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"(config\.json|cannot load its transformer)"):
        build_mixture(load_recipe(pipeline_recipe("wan", folder)))


def test_causes_by_name(tmp_path):
    def of(*left_over, missing=()):
        return misfit(WanTransformer3DModel, tmp_path, missing, left_over)

    assert "quantised file" in of("blocks.0.attn1.to_q.absmax")
    assert "scaled fp8" in of("scaled_fp8")
    assert "LoRA" in of("blocks.0.attn1.to_q.lora_down.weight")
    assert "incomplete, or of another model" in of("rope.freqs")
