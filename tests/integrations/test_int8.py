"""A frozen base in 8 bits: which linears, how near to the float weights, gradients through it, runs from end to end."""

import dataclasses
import json
import sys
from functools import cache

import diffusers
import pytest
import torch
from helpers import as_if_trained, equal, trees, velocity_of
from saved_pipelines import PROMPT, distil_fast, pipeline_recipe, save_pipeline
from started_commands import start_pair
from torch import nn

import moedistill
from moedistill.errors import UserError
from moedistill.integrations.diffusers import int8
from moedistill.integrations.diffusers.loading import islands
from moedistill.model.mixture import Mixture
from moedistill.recipe.loading import load_recipe
from moedistill.runs.build import build_mixture
from moedistill.runs.loop import run
from moedistill.runs.sample import load_mixture, sample_run
from moedistill.runtime.quantized import held, is_quantized, plain, quantized_in
from moedistill.stages.rehearsal import size
from moedistill_hunyuan_video.backbone import HunyuanVideoConfig
from moedistill_wan.backbone import WanConfig

pytest.importorskip("torchao")

FAMILIES = ("hunyuan_video", "wan")
LORA = {"kind": "lora", "rank": 2, "alpha": 4}
ADAPTERS = {"semantic": LORA, "detail": {**LORA, "from": "semantic"}}


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    return request.param, save_pipeline(tmp_path_factory.mktemp(request.param), request.param)


def recipe_of(family, folder, **changes):
    """Two adapters on one base, in 8 bits."""
    recipe = pipeline_recipe(family, folder, experts=ADAPTERS)
    recipe["backbone"] = {**recipe["backbone"], "quantization": "int8", **changes}
    return recipe


def mixture_of(family, folder, **changes):
    return build_mixture(load_recipe(recipe_of(family, folder, **changes)))


@cache
def inputs(mixture):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *mixture.backbone.latent_shape(), generator=generator)
    cond = mixture.backbone.encode([PROMPT])
    return x, torch.tensor([0.7]), cond


def dequantised(mixture):
    """The same network with its 8-bit weights as floating point."""
    for module in mixture.networks.modules():
        if isinstance(module, int8.Int8Linear):
            module.__class__ = nn.Linear
            module.weight = nn.Parameter(plain(module.weight), requires_grad=False)
    assert not quantized_in(mixture)
    return mixture


# -- which, and how near ----------------------------------------------------------------------------------------------

INSIDE = {
    "wan": r"blocks.0.attn1.to_q.weight blocks.1.ffn.net.2.weight",
    "hunyuan_video": (
        r"transformer_blocks.0.attn.add_k_proj.weight single_transformer_blocks.1.proj_out.weight "
        r"single_transformer_blocks.0.norm.linear.weight"
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_linears_of_the_blocks_and_nothing_else(family):
    config = {"wan": WanConfig, "hunyuan_video": HunyuanVideoConfig}[family](pretrained=None, quantization="int8")
    network = config.tiny().build().network
    names = set(quantized_in(network))
    assert set(INSIDE[family].split()) <= names
    lists = ("blocks.", "transformer_blocks.", "single_transformer_blocks.")
    linears = {f"{path}.weight" for path, module in network.named_modules() if isinstance(module, nn.Linear)}
    assert names == {name for name in linears if name.startswith(lists)}
    outside = {name.split(".")[0] for name in linears - names}
    assert outside >= {"proj_out", "condition_embedder" if family == "wan" else "context_embedder"}


def test_what_is_to_be_float32_or_copied_is_left_out():
    network = nn.Module()
    network.blocks = nn.ModuleList([nn.ModuleDict({name: nn.Linear(2, 2) for name in ("q", "proj_out", "norm2")})])
    network.proj_out, network.embed = nn.Linear(2, 2), nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))
    paths = int8.linears_of_blocks(network, ("proj_out",), ("norm2",))
    assert paths == ["blocks.0.q", "blocks.0.proj_out"]
    assert int8.linears_of_blocks(network, ("blocks.0.proj_out",), ()) == ["blocks.0.q", "blocks.0.norm2"]


PUBLISHED = {
    "HunyuanVideoTransformer3DModel": (25.6, 13.2),
    "WanTransformer3DModel": (28.6, 14.5),
    "CogVideoXTransformer3DModel": (3.39, 1.71),
    "LTXVideoTransformer3DModel": (3.85, 1.97),
}
"""GB of networks of the default size (HunyuanVideo, Wan 14B, CogVideoX-2b, LTX-Video): in bfloat16, and in 8 bits."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_published_sizes_take(name):
    """Counted without memory; what is kept in float32 is counted as bfloat16 in both."""
    with torch.device("meta"):
        network = getattr(diffusers, name)()
    paths = int8.linears_of_blocks(network, (), islands(network))
    whole = 2 * sum(parameter.numel() for parameter in network.parameters())
    weights = [network.get_submodule(path).weight for path in paths]
    small = whole - sum(weight.numel() - 5 * len(weight) for weight in weights)
    assert (whole / 1e9, small / 1e9) == pytest.approx(PUBLISHED[name], rel=5e-3)


@pytest.mark.parametrize(("dtype", "most"), [("float32", 2e-3), ("bfloat16", 1e-2)])
def test_a_saved_model_is_quantised_as_it_is_read(saved, dtype, most):
    """The relative error of the velocity; in bfloat16 that of the dtype is most of it."""
    family, folder = saved
    full, small = mixture_of(family, folder, dtype=dtype, quantization=None), mixture_of(family, folder, dtype=dtype)
    expected = velocity_of(full, "teacher", inputs(full))
    found = velocity_of(small, "teacher", inputs(full))
    error = float((found - expected).norm() / expected.norm())
    print(f"{family}, {dtype}: relative error of the velocity {error:.1e}")
    assert 0 < error < most
    assert small.backbone.network.dtype == getattr(torch, dtype)
    # Weights in 1 byte, with 5 bytes for each row (scale and zero point); everything else as it was.
    own = dict(full.backbone.network.named_parameters())
    for name, weight in small.backbone.network.named_parameters():
        base = name if name in own else name.replace(".base_layer", "")
        assert size(weight) == (weight.numel() + 5 * len(weight) if is_quantized(weight) else size(own[base]))
        if is_quantized(weight):
            assert [each.dtype for each in held(weight)][:2] == [torch.int8, torch.float32]
            torch.testing.assert_close(plain(weight).float(), own[base].float(), rtol=0, atol=0.01)
        else:
            assert torch.equal(weight, own[base])


def test_a_miniature_is_quantised_as_a_saved_model(saved, tmp_path):
    """The same whole numbers, whether the network is made or read."""
    family, _ = saved
    config = {"wan": WanConfig, "hunyuan_video": HunyuanVideoConfig}[family](pretrained=None).tiny()
    config.build().network.save_pretrained(tmp_path / "transformer")
    made = config.replace(quantization="int8").build().network
    read = config.replace(quantization="int8", pretrained=str(tmp_path)).build().network
    for (name, one), (other_name, other) in zip(made.named_parameters(), read.named_parameters(), strict=True):
        assert name == other_name
        assert all(map(torch.equal, held(one), held(other)))


# -- gradients --------------------------------------------------------------------------------------------------------


def gradients(mixture, expert):
    """Of the input, and of what the expert trains."""
    mixture.train_only(expert)
    x, sigma, cond = inputs(mixture)
    x = x.clone().requires_grad_()
    with mixture.using(expert):
        mixture(x, sigma, cond).square().mean().backward()
    return {"x": x.grad, **{name: each.grad for name, each in mixture.experts[expert].parameters.items()}}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_dequantised_network(family, checkpointing):
    settings = {"training": {"batch_size": 1, "gradient_checkpointing": checkpointing}}
    mixtures = []
    for _ in range(2):
        mixture = build_mixture(load_recipe({**recipe_of(family, None), "backbone": tiny(family), **settings}))
        for seed, name in enumerate(ADAPTERS):
            as_if_trained(mixture.experts[name], seed)
        mixtures.append(mixture)
    found, expected = gradients(mixtures[0], "detail"), gradients(dequantised(mixtures[1]), "detail")
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def tiny(family):
    recipe = recipe_of(family, None)["backbone"]
    return {**recipe, "pretrained": None, "video": {"num_frames": 5, "height": 32, "width": 32}}


def test_no_floating_copy_of_a_weight_waits_for_the_backward_pass():
    layer = nn.Sequential(nn.Linear(64, 32))
    int8.quantize(layer, ["0"])
    int8.freeze(layer, ["0"])
    kept = []

    def keep(tensor):
        kept.append(tensor.shape)
        return tensor

    x = torch.randn(4, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    assert kept == []


def test_autocast_reaches_the_8_bit_linears():
    layer = nn.Sequential(nn.Linear(64, 32)).bfloat16()
    int8.quantize(layer, ["0"])
    int8.freeze(layer, ["0"])
    x = torch.randn(4, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    expected = plain(layer[0].weight).float().sum(0).expand(4, 64)
    torch.testing.assert_close(x.grad, expected, rtol=0.02, atol=0.02)


# -- runs -------------------------------------------------------------------------------------------------------------

DCM = [
    {"kind": "huber"},
    {"kind": "gan", "weight": 0.1, "width": 8, "groups": 2, "optimizer": {"lr": 1e-3, "states": "int8"}},
    {"kind": "feature_matching", "weight": 0.1},
]


def dcm(family, folder, **training):
    """Both of DCM's stages with all their losses, averages, and 8-bit moments."""
    shared = {"steps": 2, "ema_decay": 0.9, "optimizer": {"lr": 0.01, "states": "int8"}}
    detail = distil_fast("detail", **shared, probe={"block_stride": 1})
    stages = [
        {**distil_fast("semantic", **shared), "losses": [{"kind": "huber"}, {"kind": "temporal_coherence", "lag": 1}]},
        {**detail, "losses": DCM},
        {"name": "export", "kind": "export"},
    ]
    kept = {"batch_size": 1, "checkpoint_every": 1, "keep_checkpoints": 9, "monitor": None, **training}
    return {**recipe_of(family, folder), "stages": stages, "training": kept}


@pytest.fixture(scope="module")
def done(saved, tmp_path_factory):
    family, folder = saved
    output = tmp_path_factory.mktemp("run") / "run"
    return run(dcm(family, folder, gradient_checkpointing=family == "wan"), output=output, device="cpu")


def test_both_stages_train_and_go_on_bit_for_bit(done, tmp_path):
    for stage in ("00_semantic", "01_detail"):
        first, second = (trees(done.output / "checkpoints" / f"{stage}_0000000{step}") for step in (1, 2))
        expert = stage.split("_")[1]
        assert not equal(first["experts"][expert], second["experts"][expert])
        for name, weight in second["experts"][expert].items():
            assert weight.dtype == torch.float32, name
            assert weight.isfinite().all(), name
    half_way = done.output / "checkpoints" / "01_detail_00000001"
    recipe = load_recipe(done.output / "recipe.yaml")
    again = run(recipe, output=tmp_path / "again", resume_from=half_way, device="cpu")
    assert equal(trees(again.checkpoint), trees(done.checkpoint))


def test_the_run_and_its_export_are_sampled_alike(done, tmp_path):
    sources = (done.output, done.output / "export")
    videos = [
        sample_run(source, prompts=[PROMPT], seed=1, output=tmp_path / source.name).videos[0] for source in sources
    ]
    assert torch.equal(*videos)
    assert videos[0].std() > 0


def test_merged_is_the_dequantised_base_and_the_adapters(done):
    mixture = load_mixture(done.output)[1]
    base, detail = mixture.experts["teacher"].shared.weights, mixture.experts["detail"]
    merged = detail.merged()
    adapted = {name.rsplit(".lora_A", 1)[0] for name in detail.parameters if ".lora_A" in name}
    assert any(is_quantized(base[f"{path}.weight"]) for path in adapted)
    for path in adapted:
        expected = plain(base[f"{path}.weight"])
        for name in ("semantic", "detail"):
            own = mixture.experts[name].parameters
            expected = expected + 2 * own[f"{path}.lora_B.weight"] @ own[f"{path}.lora_A.weight"]  # alpha / rank
        torch.testing.assert_close(merged[f"{path}.weight"], expected, rtol=0, atol=1e-6)
    # A plain network with these weights computes what the expert does.
    network = type(mixture.backbone.network).from_config(mixture.backbone.config.architecture())
    network.load_state_dict(merged)
    plain_one = Mixture(mixture.backbone.config.replace(quantization=None).wrap({"transformer": network.eval()}), {})
    expected = velocity_of(plain_one, "teacher", inputs(plain_one))
    torch.testing.assert_close(velocity_of(mixture, "detail", inputs(plain_one)), expected, rtol=0, atol=1e-5)


def test_experts_go_into_a_pipeline_with_its_own_weights(done, saved):
    """The base of a pipeline is what it was loaded as, and stays that."""
    from diffusers import DiffusionPipeline

    _, folder = saved
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_frames": 9, "height": 32, "width": 48, "output_type": "latent"}
    with moedistill.apply(pipeline, done.output):
        frames = pipeline(PROMPT, generator=torch.Generator().manual_seed(1), **call).frames
    assert frames.isfinite().all()
    assert not quantized_in(pipeline.transformer)


def test_two_processes_train_what_one_does(tmp_path):
    """DDP is told to leave 8-bit weights alone: it could not send them."""
    recipe = dcm("wan", None)
    recipe["backbone"], recipe["training"]["batch_size"] = tiny("wan"), 2
    recipe["stages"] = recipe["stages"][:1]
    recipe["data"] = {"kind": "latents", "path": None}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    arguments = ["run", tmp_path / "recipe.yaml", "--device", "cpu", "--output", tmp_path / "two"]
    pair = start_pair(arguments, tmp_path)
    one = run(recipe, output=tmp_path / "one", device="cpu")
    assert [command.exit_code() for command in pair] == [0, 0], pair[0].output + pair[1].output
    assert "torchao" not in pair[0].output + pair[1].output
    two, one = (
        torch.cat([value.flatten() for value in trees(path)["experts"]["semantic"].values()])
        for path in (tmp_path / "two" / "checkpoints" / one.checkpoint.name, one.checkpoint)
    )
    assert (two - one).norm() <= 1e-4 * one.norm()


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_copy_of_8_bit_weights_is_refused():
    recipe = recipe_of("wan", None)
    full = {**recipe, "experts": {**ADAPTERS, "semantic": {"kind": "full"}}}
    with pytest.raises(UserError, match=r"experts\.semantic\.kind: copies the teacher's weights"):
        load_recipe(full)
    backbone = WanConfig(pretrained=None, quantization="int8").tiny().build()
    config = load_recipe({**full, "backbone": {**recipe["backbone"], "quantization": None}}).experts["semantic"]
    with pytest.raises(ValueError, match="expert semantic: copies the teacher's weights"):
        Mixture(backbone, {"semantic": config})
    adapter = load_recipe(recipe).experts["semantic"]
    with pytest.raises(ValueError, match=r"expert semantic: 'blocks\.0' is kept in 8 bits, and copies are trained"):
        Mixture(backbone, {"semantic": dataclasses.replace(adapter, copies=["blocks.0"])})


def test_without_torchao_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r"quantization: int8 needs torchao: pip install 'moedistill\[int8\]'"):
        WanConfig(pretrained=None, quantization="int8").tiny().build()
    WanConfig(pretrained=None).tiny().build()


def test_a_library_that_quantises_other_linears_is_refused(saved, monkeypatch):
    """diffusers before it knew full names left all of them as they were, in silence."""
    family, folder = saved
    monkeypatch.setattr(int8, "loading_config", lambda paths, usual=int8.loading_config: usual([*paths][1:]))
    monkeypatch.setattr("moedistill.integrations.diffusers.models.loading_config", int8.loading_config)
    with pytest.raises(UserError, match="1 linears are not as they should be, the first"):
        mixture_of(family, folder)


def test_what_copies_the_teacher_to_look_into_it_is_refused_at_once(tmp_path):
    with pytest.raises(UserError, match=r"add --set backbone\.quantization=null"):
        moedistill.analyze(recipe_of("wan", tmp_path), output=tmp_path / "analysis", device="cpu")
    assert not (tmp_path / "analysis").exists()
