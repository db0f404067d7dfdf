"""Readers find in hand-made files what was put there, and in each known trap what goes wrong."""

import json
import re

import pytest
import torch
from exported_by_hand import (
    RANK,
    Trained,
    all_pairs,
    diffusers_lora,
    full,
    native_weights,
    wan_lora,
    wan_names,
    write,
)

from moedistill.exporters.reading import comfyui, lightx2v
from moedistill.exporters.reading import diffusers as by_rules
from moedistill.exporters.reading.compare import compare_changes, compare_values, part_of_change, whole_change
from moedistill.exporters.reading.files import TensorFile


@pytest.fixture(scope="module")
def wan():
    return Trained("wan")


def by_comfyui(path, trained, dtype=torch.float32):
    native = trained.native()
    return compare_changes(comfyui.read_changes(TensorFile(path), native), native, whole_change(trained), dtype)


def by_lightx2v(path, trained, dtype=torch.float32):
    native = trained.native()
    return compare_changes(lightx2v.read_changes(TensorFile(path), native), native, whole_change(trained), dtype)


def by_diffusers(path, trained, dtype=torch.float32):
    return compare_changes(by_rules.read_changes(TensorFile(path)), by_rules.Own(), whole_change(trained), dtype)


def weights_by_comfyui(path, trained):
    native = trained.native()
    reading = comfyui.read_values(TensorFile(path), native)
    return compare_values(reading, native, trained.shapes, trained.tensor)


CONSUMERS = pytest.mark.parametrize(
    ("read", "make"), [(by_comfyui, wan_lora), (by_lightx2v, wan_lora), (by_diffusers, diffusers_lora)]
)


# -- right files ------------------------------------------------------------------------------------------------------


@CONSUMERS
def test_a_right_file_of_changes_is_exact(read, make, wan, tmp_path):
    found = read(write(tmp_path / "wan.safetensors", *make(wan)), wan)
    assert found.faults == []
    # Of each copied linear weight and bias; of each adapted one the weight, and a bias that stays as it is.
    assert found.compared == 2 * len(wan.pairs) + len(wan.copies)
    assert found.error <= 1e-6


@CONSUMERS
def test_in_bfloat16_it_is_off_by_rounding(read, make, wan, tmp_path):
    file = write(tmp_path / "wan.safetensors", *make(wan), torch.bfloat16)
    assert TensorFile(file).coarsest == torch.bfloat16
    found = read(file, wan, torch.bfloat16)
    assert found.faults == []
    assert 1e-4 < found.error < 5e-3
    assert "are not the trained ones" in read(file, wan, torch.float32).faults[0]


@pytest.mark.parametrize("family", ["wan", "wan_i2v", "wan_flf2v", "hunyuan_video", "ltx"])
def test_each_parameter_of_diffusers_network_has_one_native_name(family):
    trained = Trained(family)
    made = [name for own in trained.native().names for name in trained.native().parts(own, torch.zeros(84))]
    assert sorted(made) == sorted(trained.shapes)


@pytest.mark.parametrize("family", ["wan", "ltx"])
def test_native_weights_are_recognised_and_exact(family, tmp_path):
    trained = full(family)
    native = trained.native()
    file = write(tmp_path / "weights.safetensors", native_weights(trained))
    for found in [comfyui.read_values(TensorFile(file), native)] + (
        [lightx2v.read_values([TensorFile(file)], native)] if family == "wan" else []
    ):
        compared = compare_values(found, native, trained.shapes, trained.tensor)
        assert (compared.faults, compared.error, compared.compared) == ([], 0.0, len(trained.shapes))


def test_weights_may_be_off_by_rounding_and_no_more(tmp_path):
    trained = full("wan")
    weights = native_weights(trained)
    file = write(tmp_path / "weights.safetensors", weights, dtype=torch.bfloat16)
    assert weights_by_comfyui(file, trained).faults == []
    name = "blocks.0.self_attn.q.weight"
    weights[name] = weights[name] * (1 + 2**-9)  # much less than bfloat16 can hold
    file = write(tmp_path / "other.safetensors", weights, dtype=torch.bfloat16)
    (fault,) = weights_by_comfyui(file, trained).faults
    assert "1 tensors are not the trained ones: blocks.0.attn1.to_q.weight" in fault


def test_other_ways_in_which_comfyui_takes_changes(wan, tmp_path):
    tensors, header = wan_lora(wan)
    names = wan_names(wan)
    for path in [name.removesuffix(".weight") for name in wan.copies if name.endswith(".weight")]:
        own = f"diffusion_model.{names[path]}"
        del tensors[f"{own}.lora_down.weight"], tensors[f"{own}.lora_up.weight"]
        tensors[f"{own}.diff"] = wan.copies[f"{path}.weight"] - wan.weights[f"{path}.weight"]
    for read in (by_comfyui, by_lightx2v):
        assert read(write(tmp_path / "diff.safetensors", tensors, header), wan).faults == []
    underscored = {}
    for name, tensor in tensors.items():
        path, ending = re.fullmatch(r"diffusion_model\.(.*?)(\.(?:lora_.*|alpha|diff.*))", name).groups()
        underscored[f"lora_unet_{path.replace('.', '_')}{ending}"] = tensor
    assert by_comfyui(write(tmp_path / "underscored.safetensors", underscored), wan).faults == []


def test_a_part_of_a_change_is_told_from_something_else(tmp_path):
    """Of a full expert's change a file carries what is nearest to it of some rank."""
    trained = full("wan")
    trained.pretrained = trained.original
    wanted = part_of_change(trained)
    assert all(name.rpartition(".")[0] in {*trained.pairs, *wan_paths(trained)} for name in wanted.names)
    tensors = {}
    for name in wanted.names:
        path, change = name.rpartition(".")[0], wanted.change(name)
        if change.ndim == 1:
            tensors[f"transformer.{path}.lora_B.bias"] = change
            continue
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        tensors |= {f"transformer.{path}.lora_A.weight": v[:2], f"transformer.{path}.lora_B.weight": u[:, :2] * s[:2]}
    for path in trained.pairs:
        tensors[f"transformer.{path}.lora_B.bias"] = torch.zeros(trained.shapes[f"{path}.bias"])

    def read(**changed):
        file = write(tmp_path / "cut.safetensors", {**tensors, **changed})
        return compare_changes(by_rules.read_changes(TensorFile(file)), by_rules.Own(), wanted, torch.float32)

    found = read()
    assert found.faults == []
    assert found.error < 1e-5
    name = "transformer.proj_out.lora_B.weight"
    (fault,) = read(**{name: tensors[name] / 2}).faults
    assert "proj_out.weight is off by 1 of what training changed" in fault
    (fault,) = read(**{name: torch.randn(tensors[name].shape)}).faults
    assert "proj_out.weight is off by" in fault


def wan_paths(trained):
    return {name.rpartition(".")[0] for name in trained.copies}


def test_layers_that_lightx2v_loses_when_it_applies_changes_dynamically(wan, tmp_path):
    lost = lightx2v.lost_dynamically(TensorFile(write(tmp_path / "wan.safetensors", *wan_lora(wan))))
    assert {name.split(".")[1] for name in lost} == {"time_embedding", "time_projection", "head"}


# -- traps ------------------------------------------------------------------------------------------------------------


@CONSUMERS
def test_trap_missing_alpha(read, make, wan, tmp_path):
    """Trained with rank 3 and alpha 6: without the alpha all three load it at half strength, without a word."""
    tensors, header = make(wan)
    tensors = {
        name: tensor / 2 if re.search(r"lora_(up|B)\.weight", name) else tensor
        for name, tensor in tensors.items()
        if not name.endswith(".alpha")
    }
    (fault,) = read(write(tmp_path / "wan.safetensors", tensors, header), wan).faults
    assert "is off by 0.5 of what training changed" in fault


@pytest.mark.parametrize(
    ("read", "make", "prefix"),
    [
        (by_comfyui, wan_lora, "transformer."),
        (by_lightx2v, wan_lora, "transformer."),
        (by_diffusers, diffusers_lora, "diffusion_model."),
    ],
)
def test_trap_wrong_prefix(read, make, prefix, wan, tmp_path):
    tensors, header = make(wan)
    tensors = {prefix + name.partition(".")[2]: tensor for name, tensor in tensors.items()}
    faults = " ".join(read(write(tmp_path / "wan.safetensors", tensors, header), wan).faults)
    assert f"{len(tensors)} tensors are not used" in faults
    assert f"{len(wan.pairs) + len(wan.copies)} trained changes are missing" in faults


def test_trap_diffusers_names_for_comfyui(wan, tmp_path):
    tensors, header = diffusers_lora(wan)
    tensors = {name.replace("transformer.", "diffusion_model.", 1): tensor for name, tensor in tensors.items()}
    found = by_comfyui(write(tmp_path / "lora.safetensors", tensors, header), wan)
    assert found.compared == 0
    assert f"{len(tensors)} tensors are not used" in found.faults[0]
    weights = write(tmp_path / "weights.safetensors", dict(wan.merged()))
    reading = comfyui.read_values(TensorFile(weights), wan.native())
    assert "it is not recognised, without head.modulation" in reading.faults


def test_trap_swapped_norms(tmp_path):
    trained = full("wan")
    native = trained.native()
    weights = {name.replace(".norm3.", ".norm2."): each for name, each in native_weights(trained).items()}
    file = TensorFile(write(tmp_path / "weights.safetensors", weights))
    faults = compare_values(comfyui.read_values(file, native), native, trained.shapes, trained.tensor).faults
    assert "4 tensors are not used: blocks.0.norm2.bias" in faults[0]
    assert "4 weights are missing: blocks.0.norm2.bias" in faults[1]  # by diffusers' names


def test_trap_mixed_ranks_without_metadata(wan, tmp_path):
    tensors, _ = diffusers_lora(wan)
    (fault,) = by_diffusers(write(tmp_path / "wan.safetensors", tensors), wan).faults
    assert "and the header has no lora_adapter_metadata: releases up to 0.36" in fault


def test_a_header_that_says_another_rank_or_scale(wan, tmp_path):
    tensors, header = diffusers_lora(wan)
    said = json.loads(header["lora_adapter_metadata"])
    for key, expected in (("alpha_pattern", "is off by"), ("rank_pattern", f"the header says rank {RANK} of ")):
        wrong = {"lora_adapter_metadata": json.dumps({**said, f"transformer.{key}": {}})}
        faults = by_diffusers(write(tmp_path / "wan.safetensors", tensors, wrong), wan).faults
        assert any(expected in fault for fault in faults)


def test_trap_partial_biases(wan, tmp_path):
    tensors, header = diffusers_lora(wan)
    tensors = {name: each for name, each in tensors.items() if not (name.endswith("bias") and "attn" in name)}
    (fault,) = by_diffusers(write(tmp_path / "wan.safetensors", tensors, header), wan).faults
    assert f"{len(wan.pairs)} pairs have no lora_B.bias" in fault


# -- HunyuanVideo's fused linears -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hunyuan():
    return Trained("hunyuan_video", adapted="attn.to_", copied=("time_text_embed.timestep", "time_text_embed.text"))


def hunyuan_lora(trained, fuse):
    """In ComfyUI's names: of the linears that are fused there, `fuse` makes one pair of several."""
    native = trained.native()
    groups = {own: list(native.parts(own, torch.zeros(84, 1))) for own in native.names}
    pairs, biases = all_pairs(trained)
    tensors = {}
    for own, names in groups.items():
        paths = [name.removesuffix(".weight") for name in names]
        if not own.endswith(".weight") or not set(paths) & set(pairs):
            continue
        path = f"diffusion_model.{own.removesuffix('.weight')}"
        rows = [trained.shapes[name][0] for name in names]
        found = [pairs.get(each) for each in paths]
        a, b = found[0] if len(found) == 1 else fuse(found, rows)
        bias = torch.cat([biases.get(each, torch.zeros(count)) for each, count in zip(paths, rows, strict=True)])
        tensors |= {f"{path}.lora_down.weight": a, f"{path}.lora_up.weight": b, f"{path}.diff_b": bias}
    return tensors


def block_diagonal(found, rows):
    """The right way: each linear's own rows see its own pair."""
    there = [pair for pair in found if pair is not None]
    blocks, column = [], 0
    for pair, count in zip(found, rows, strict=True):
        block = torch.zeros(count, sum(len(each.a) for each in there))
        if pair is not None:
            block[:, column : column + len(pair.a)] = pair.b
            column += len(pair.a)
        blocks.append(block)
    return torch.cat([pair.a for pair in there]), torch.cat(blocks)


def concatenated(found, rows):
    """The trap: the matrices of all linears one after the other, as if they had one `a` among them."""
    b = [torch.zeros(count, RANK) if pair is None else pair.b for pair, count in zip(found, rows, strict=True)]
    return found[0].a, torch.cat(b)


def test_fused_linears_block_by_block_are_exact(hunyuan, tmp_path):
    file = write(tmp_path / "hunyuan.safetensors", hunyuan_lora(hunyuan, block_diagonal))
    found = by_comfyui(file, hunyuan)
    assert found.faults == []
    assert found.error <= 1e-6


def test_trap_q_k_v_concatenated(hunyuan, tmp_path):
    found = by_comfyui(write(tmp_path / "hunyuan.safetensors", hunyuan_lora(hunyuan, concatenated)), hunyuan)
    (fault,) = found.faults
    # In a double block q of the picture's tokens is right by chance, and k and v are not; so in single blocks.
    assert re.match(r"\d+ tensors are not the trained ones: .*attn.to_[kv].weight is off by 1", fault)


def test_trap_time_in_mlp_names(hunyuan, tmp_path):
    """The makers' names, which ComfyUI takes of weights, not of changes."""
    tensors = {
        name.replace("in_layer", "mlp.0").replace("out_layer", "mlp.2") if "time_in" in name else name: tensor
        for name, tensor in hunyuan_lora(hunyuan, block_diagonal).items()
    }
    found = by_comfyui(write(tmp_path / "hunyuan.safetensors", tensors), hunyuan)
    assert "6 tensors are not used: diffusion_model.time_in.mlp.0.diff_b" in found.faults[0]
    assert "4 trained changes are missing: time_text_embed.timestep_embedder.linear_1.bias" in found.faults[1]


def test_comfyui_takes_the_makers_names_of_hunyuanvideo_s_weights(tmp_path):
    trained = full("hunyuan_video")
    native, weights = trained.native(), dict(trained.merged())
    one = torch.zeros(84, 1)
    tensors = {}
    for own in native.names:
        parts = torch.cat([weights[name] for name in native.parts(own, one)])
        if own.startswith("final_layer.adaLN"):  # shift and scale the other way round
            parts = torch.cat(parts.chunk(2)[::-1])
        tensors[own] = parts
    for names in (lambda name: name, native.makers_name):
        file = TensorFile(write(tmp_path / "w.safetensors", {names(own): each for own, each in tensors.items()}))
        found = compare_values(comfyui.read_values(file, native), native, trained.shapes, trained.tensor)
        assert (found.faults, found.error) == ([], 0.0)


# -- who serves which step --------------------------------------------------------------------------------------------

SIGMAS = [1.0, 0.992, 0.975410, 0.9048]
"""Wan's boundary is the point 35 of 50, σ 0.975410, which its lower expert serves."""
WANTED = ["transformer", "transformer", "transformer_2", "transformer_2"]


def test_trap_boundary_at_the_point_itself():
    (fault,) = by_rules.serving_faults(0.975410, SIGMAS, WANTED)
    assert fault == "step 2 at σ 0.975410 is served by transformer, not transformer_2"
    assert by_rules.serving_faults(0.976523, SIGMAS, WANTED) == []
    wanted = [*WANTED[:2], "transformer", "transformer_2"]  # closed high, it would be right, if nothing were rounded
    (fault,) = by_rules.serving_faults(0.975410, SIGMAS, wanted)
    assert "lies at the boundary itself" in fault
