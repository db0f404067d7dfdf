"""Weights in a folder that are not those of the class: one line before anything is trained, never other numbers."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from saved_pipelines import PROMPT, pipeline_recipe, save_pipeline

from moedistill import DiffusersBackboneConfig, cli
from moedistill.errors import UserError
from moedistill.integrations.diffusers.loading import load_text_encoders
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
    "whole numbers": (
        lambda tensors: {**tensors, "proj_out.bias": torch.zeros(64, dtype=torch.int32)},
        r"proj_out\.bias is stored in whole numbers; get the weights again",
    ),
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


def in_shards(folder, component, variant=None, *, in_files=lambda names: names, in_index=lambda names: names):
    """Cuts a component's weights in two, with an index: `in_files` and `in_index` change what is in either, by name."""
    file = folder / component / WEIGHTS[component]
    tensors = load_file(file)
    file.unlink()
    shards = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    stored = in_files(dict(tensors))
    for shard in set(shards.values()):
        part = {name: value for name, value in stored.items() if shards.get(name, shard) == shard}
        save_file(part, file.with_name(shard), metadata={"format": "pt"})
    index = file.with_name(f"{file.name}.index.{f'{variant}.' * (variant is not None)}json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": in_index(shards)}))


USES = {
    "transformer": lambda folder: backbone_of(folder).build().network,
    "vae": lambda folder: backbone_of(folder).build().load_vae(),
}
BIASES = {"transformer": "proj_out.bias", "vae": "decoder.conv_in.bias"}


@pytest.mark.parametrize("component", USES)
def test_shards_are_read_whole(saved, folder, component):
    wanted = USES[component](saved).state_dict()
    in_shards(folder, component)
    found = USES[component](folder).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


def test_shards_of_a_variant(folder):
    in_shards(folder, "transformer", "fp16", in_files=scaled)
    with pytest.raises(ValueError, match="this is a scaled fp8 file"):
        backbone_of(folder, variant="fp16").build()


@pytest.mark.parametrize("component", USES)
def test_shards_must_have_what_their_index_names(folder, component):
    """Of it diffusers says that nothing is missing, and leaves the tensor without numbers."""
    bias = BIASES[component]
    in_shards(folder, component, in_files=without(bias))
    with pytest.raises(ValueError, match=rf"its tensors are not those of \w+: 1 missing \({re.escape(bias)}\)"):
        USES[component](folder)


@pytest.mark.parametrize("component", USES)
def test_shards_must_have_nothing_that_their_index_leaves_out(folder, component):
    in_shards(folder, component, in_files=scaled)
    with pytest.raises(ValueError, match=r"left over \(.*scale_weight.*\); this is a scaled fp8 file"):
        USES[component](folder)


def test_a_config_of_another_depth_is_refused(folder):
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_layers": 1}))
    with pytest.raises(ValueError, match=r"blocks\.1 is more than config\.json says, so the depth is another"):
        backbone_of(folder).build()


@pytest.mark.parametrize("value", [[0.0], {}, "x"])
def test_an_argument_of_another_kind_is_refused(folder, value):
    """It was found in the first forward, as a traceback."""
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eps": value}))
    with pytest.raises(ValueError, match=r"config\.json: eps is .*, where WanTransformer3DModel has 1e-06"):
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


LLAMA = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 9}
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 9}
TEXT = {"text_config": {**LLAMA, "num_hidden_layers": 1}}
CLIP = {**TEXT, "vision_config": {**TEXT["text_config"], "image_size": 4, "patch_size": 2}, "projection_dim": 4}
WHOLE = {
    "Llama": ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": False}, "LlamaModel", "model."),
    "T5": ("T5ForConditionalGeneration", {**T5, "tie_word_embeddings": False}, "T5EncoderModel", ""),
    "UMT5": ("UMT5ForConditionalGeneration", {**T5, "tie_word_embeddings": False}, "UMT5EncoderModel", ""),
    "CLIP": ("CLIPModel", CLIP, "CLIPTextModel", ""),
}


def save_whole(folder, kind):
    """A whole model of transformers, in a folder that names its text encoder; returns it."""
    whole, sizes, encoder, _ = WHOLE[kind]
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, whole)(config)
    model.save_pretrained(folder / "text_encoder")
    (folder / "model_index.json").write_text(json.dumps({"text_encoder": ["transformers", encoder]}))
    return model


def encoder_of(folder):
    return load_text_encoders(folder, ["text_encoder"], "text", ignored={}, variant=None, dtype=torch.float32)


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_model_serves_as_its_text_encoder(tmp_path, kind):
    """What lies behind the text encoder (a head, a decoder, the images' half) is left over, and nothing is lost."""
    whole, prefix = save_whole(tmp_path, kind).state_dict(), WHOLE[kind][3]
    found = encoder_of(tmp_path)["text_encoder"].state_dict()
    assert found
    for name, value in found.items():
        near = next(other for other in (prefix + name, f"text_model.{name}") if other in whole)
        assert torch.equal(value, whole[near])


def test_of_a_whole_model_nothing_that_is_read_may_be_missing(tmp_path):
    save_whole(tmp_path, "Llama")
    change(tmp_path, "text_encoder", without("model.norm."))
    with pytest.raises(ValueError, match=r"1 missing \(norm\.weight\); what .* holds is incomplete"):
        encoder_of(tmp_path)


def test_a_decoder_that_is_the_text_encoder_s_own_is_none_to_leave_over(tmp_path):
    sizes = {"hidden_size": 8, "ffn_dim": 8, "num_attention_heads": 2, "vocab_size": 9, "word_embed_proj_dim": 8}
    config = transformers.OPTConfig(**sizes, num_hidden_layers=2, max_position_embeddings=8, pad_token_id=1)
    transformers.OPTModel(config).save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "model_index.json").write_text(json.dumps({"text_encoder": ["transformers", "OPTModel"]}))
    file = tmp_path / "text_encoder" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match=r"decoder\.layers\.1 is more than config\.json says"):
        encoder_of(tmp_path)


@pytest.mark.parametrize("entry", [5, "transformers", [], ["transformers"], {"a": 1}])
def test_a_broken_index_of_components_makes_no_traceback(folder, entry):
    file = folder / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "text_encoder": entry}))
    with pytest.raises(ValueError, match=r"model_index\.json: text_encoder must be \[library, class\], not"):
        backbone_of(folder).build().encode([PROMPT])


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


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("size", ["50KB", "1GB"])
def test_what_is_read_slice_by_slice_is_what_is_loaded(folder, variant, size):
    """Saved in parts or not, with a variant or without; other files that lie there are nobody's."""
    network = backbone_of(folder).build().network
    for file in (folder / "transformer").glob("*.safetensors*"):
        file.unlink()
    network.save_pretrained(folder / "transformer", variant=variant, max_shard_size=size)
    (folder / "transformer" / "diffusion_pytorch_model-00001-of-00099.safetensors").write_bytes(b"of another")
    config, given = backbone_of(folder).replace(variant=variant), {}
    config.give_weights(lambda base, name, tensor: given.setdefault(name, tensor.clone()))
    assert len(list((folder / "transformer").glob("*.safetensors"))) > (2 if size == "50KB" else 1)
    assert given.keys() == network.state_dict().keys()
    assert all(torch.equal(given[name], tensor) for name, tensor in network.state_dict().items())
