"""LoRA files carry an adapter exactly, into diffusers' own loaders and by the rules of others."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, LTXPipeline, WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_changes import TinyChange, linears

from moedistill.exporters.lora_files import DIFFUSERS, NATIVE, linear_changes, not_in_a_lora, own_names, write_lora
from moedistill_hunyuan_video.backbone import HunyuanVideoBackbone, HunyuanVideoConfig
from moedistill_ltx.backbone import LTXBackbone, LTXConfig
from moedistill_wan.backbone import WanBackbone, WanConfig

PIPELINES = {
    "wan": (WanConfig, WanBackbone, WanPipeline),
    "hunyuan_video": (HunyuanVideoConfig, HunyuanVideoBackbone, HunyuanVideoPipeline),
    "ltx": (LTXConfig, LTXBackbone, LTXPipeline),
}


def change_of(family, *, groups=("attention", "feed_forward"), copied=None, ranks=(2, 3)):
    """A network and an expert that changes it as a trained one does; both are the family's miniature."""
    config_class, backbone, _ = PIPELINES[family]
    config = config_class(pretrained=None)
    network = config.network_class()(**config.tiny_network()).eval()
    copied = backbone.time_dependent if copied is None else copied
    targets = [path for group in groups for path in linears(network, backbone.lora_targets.get(group, "nothing"))]
    return config, network, TinyChange(network, targets, copied, ranks=ranks)


@torch.no_grad()
def effective(network):
    """Weights and biases that a network with a loaded LoRA computes with, by the names without it."""
    found = {}
    for path, module in network.named_modules():
        if type(module).__name__ == "Linear" and hasattr(module, "base_layer"):
            (adapter,) = module.active_adapters
            b = module.lora_B[adapter]
            scale = module.scaling[adapter]
            found[f"{path}.weight"] = module.base_layer.weight + scale * b.weight @ module.lora_A[adapter].weight
            if module.base_layer.bias is not None:
                more = 0 if b.bias is None else scale * b.bias
                found[f"{path}.bias"] = module.base_layer.bias + more
    adapted = tuple(path.removesuffix(".weight").removesuffix(".bias") for path in found)
    for name, tensor in network.state_dict().items():
        if not name.startswith(tuple(f"{path}." for path in adapted)):
            found[name] = tensor
    return found


def pipeline_of(family, network, **others):
    cls = PIPELINES[family][2]
    empty = dict.fromkeys(["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    names = {"text_encoder_2", "tokenizer_2"} if cls is not HunyuanVideoPipeline else set()
    empty = {name: value for name, value in empty.items() if name not in names}
    return cls(**empty, transformer=network, scheduler=FlowMatchEulerDiscreteScheduler(), **others)


@pytest.mark.parametrize("copied", [None, []], ids=["with_copies", "pairs_alone"])
def test_a_native_file_of_wan_is_exact_in_the_pipeline_of_diffusers(tmp_path, copied) -> None:
    config, network, expert = change_of("wan", copied=copied)
    tensors = config.native_names().tensors(expert.shapes)
    error = write_lora(tmp_path / "low.safetensors", linear_changes(expert, tensors), NATIVE, dtype=torch.float32)
    assert error == 0
    other = type(network).from_config(network.config)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    pipeline = pipeline_of("wan", other, transformer_2=network, boundary_ratio=0.9)
    pipeline.load_lora_weights(str(tmp_path), weight_name="low.safetensors", load_into_transformer_2=True)
    loaded, merged = effective(network), expert.merged()
    assert loaded.keys() == merged.keys()
    assert max(float((loaded[name] - merged[name]).abs().max()) for name in merged) < 1e-6
    assert all(before[name].equal(tensor) for name, tensor in other.state_dict().items())  # the high one is as it was


@pytest.mark.filterwarnings("error:.*inconsistency")  # of the header and the file
@pytest.mark.parametrize("ranks", [(2, 3), (3,)])
@pytest.mark.parametrize("family", PIPELINES)
def test_a_file_of_its_own_names_is_exact_in_diffusers(tmp_path, family, ranks) -> None:
    """With the top `proj_out` copied and those of blocks adapted: a name that ends another one."""
    _, network, expert = change_of(family, ranks=ranks)
    changes = linear_changes(expert, own_names(expert.shapes))
    write_lora(tmp_path / "lora.safetensors", changes, DIFFUSERS, dtype=torch.float32)
    pipeline_of(family, network).load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    loaded, merged = effective(network), expert.merged()
    assert loaded.keys() == merged.keys()
    assert max(float((loaded[name] - merged[name]).abs().max()) for name in merged) < 1e-6


def test_alphas_are_ranks_and_only_of_what_is_low_rank(tmp_path) -> None:
    config, _, expert = change_of("wan")
    changes = linear_changes(expert, config.native_names().tensors(expert.shapes))
    write_lora(tmp_path / "lora.safetensors", changes, NATIVE, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "lora.safetensors")
    alphas = {name.removesuffix(".alpha"): float(value) for name, value in tensors.items() if name.endswith(".alpha")}
    assert {len(tensors[f"{path}.lora_down.weight"]) for path in alphas} == {2, 3}
    assert all(len(tensors[f"{path}.lora_down.weight"]) == alpha for path, alpha in alphas.items())
    assert len(alphas) == len(expert.pairs)
    assert not [path for path in alphas if not path.startswith("diffusion_model.blocks.")]
    # Every adapted layer has a change of its bias: nought, but for those that were copied.
    biases = {name.removesuffix(".diff_b"): value for name, value in tensors.items() if name.endswith(".diff_b")}
    assert biases.keys() == {
        name.removesuffix(".lora_up.weight") for name in tensors if name.endswith(".lora_up.weight")
    }
    assert all(not biases[path].any() for path in alphas)
    assert all(biases[path].any() for path in biases.keys() - alphas.keys())
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    assert header["transformer.lora_bias"] is True
    assert header["transformer.rank_pattern"] == header["transformer.alpha_pattern"]


def test_a_copied_linear_is_a_pair_of_its_change_and_an_identity() -> None:
    _, _, expert = change_of("wan")
    changes = {change.path: change for change in linear_changes(expert, own_names(expert.shapes))}
    wide, narrow = changes["condition_embedder.time_proj"], changes["proj_out"]
    assert (wide.a.shape, wide.b.shape) == ((32, 32), (192, 32))
    assert wide.a.equal(torch.eye(32))
    assert (narrow.a.shape, narrow.b.shape) == ((32, 32), (64, 32))
    assert narrow.b.equal(expert.copies["proj_out.weight"] - expert.own["proj_out.weight"])


def test_fused_linears_are_one_change_of_the_fused_weight() -> None:
    """Of the native network: q, k and v side by side, each of them with its own rank, or left as it is."""
    config, _, expert = change_of("hunyuan_video")
    del expert.pairs["single_transformer_blocks.0.attn.to_k"]
    tensors = config.native_names().tensors(expert.shapes)
    base, merged = ({**own} for own in (expert.own, expert.merged()))
    found = {}
    for change in linear_changes(expert, tensors):
        found[f"{change.path}.weight"] = change.b @ change.a
        found[f"{change.path}.bias"] = change.bias
    for tensor in tensors:
        native, changed = (tensor.join([own[part] for part in tensor.parts]) for own in (base, merged))
        assert torch.allclose(native + found.pop(tensor.name, 0), changed, atol=1e-6), tensor.name
    assert not found


def test_what_no_lora_carries_is_refused_by_name() -> None:
    _, _, expert = change_of("wan", copied=["proj_out", "blocks.0.norm2", "patch_embedding"])
    unfit = [
        "patch_embedding.weight", "patch_embedding.bias", "blocks.0.norm2.weight", "blocks.0.norm2.bias",
    ]  # fmt: skip
    assert not_in_a_lora(expert) == unfit
    with pytest.raises(ValueError, match=rf"expert 'detail' trains {', '.join(unfit)} in full, which no LoRA carries"):
        list(linear_changes(expert, own_names(expert.shapes)))


def test_paths_that_a_consumer_renames_are_renamed_at_their_beginning() -> None:
    change = SimpleNamespace(path="time_in.mlp.0", a=torch.ones(1, 2), b=torch.ones(3, 1), bias=None, copied=True)
    names = type(NATIVE)("x.", ".down", ".up", ".b", renamed={"in.mlp": "wrong", "time_in.mlp.0": "time_in.in_layer"})
    assert list(names.of(change)) == ["x.time_in.in_layer.down", "x.time_in.in_layer.up"]
