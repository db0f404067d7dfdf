"""What ComfyUI loads: weights under native names, LoRA files, and a workflow of its own nodes with the exact list."""

import json
import re

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_hunyuan_video_transformer_to_diffusers,
    convert_ltx_transformer_checkpoint_to_diffusers,
    convert_wan_transformer_to_diffusers,
)
from safetensors import safe_open
from safetensors.torch import load_file

from moedistill.exporters.comfyui import ComfyUIConfig
from moedistill.exporters.options import ExportOptions
from moedistill.exporters.source import open_source
from moedistill.model.guidance import Guidance

NODES = {
    "UNETLoader": ([], ["unet_name", "weight_dtype"], ["MODEL"]),
    "LoraLoaderModelOnly": (["model: MODEL"], ["lora_name", "strength_model"], ["MODEL"]),
    "CheckpointLoaderSimple": ([], ["ckpt_name"], ["MODEL", "CLIP", "VAE"]),
    "CLIPLoader": ([], ["clip_name", "type", "device"], ["CLIP"]),
    "DualCLIPLoader": ([], ["clip_name1", "clip_name2", "type", "device"], ["CLIP"]),
    "CLIPTextEncode": (["clip: CLIP"], ["text"], ["CONDITIONING"]),
    "FluxGuidance": (["conditioning: CONDITIONING"], ["guidance"], ["CONDITIONING"]),
    "LTXVConditioning": (
        ["positive: CONDITIONING", "negative: CONDITIONING"], ["frame_rate"], ["CONDITIONING", "CONDITIONING"],
    ),
    "VAELoader": ([], ["vae_name"], ["VAE"]),
    "EmptyHunyuanLatentVideo": ([], ["width", "height", "length", "batch_size"], ["LATENT"]),
    "EmptyLTXVLatentVideo": ([], ["width", "height", "length", "batch_size"], ["LATENT"]),
    "KSamplerSelect": ([], ["sampler_name"], ["SAMPLER"]),
    "ManualSigmas": ([], ["sigmas"], ["SIGMAS"]),
    "SplitSigmas": (["sigmas: SIGMAS"], ["step"], ["SIGMAS", "SIGMAS"]),
    "SamplerCustom": (
        [
            "model: MODEL", "positive: CONDITIONING", "negative: CONDITIONING", "sampler: SAMPLER", "sigmas: SIGMAS",
            "latent_image: LATENT",
        ],
        # After a seed the interface has a widget that no node declares.
        ["add_noise", "noise_seed", "control_after_generate", "cfg"],
        ["LATENT", "LATENT"],
    ),
    "VAEDecode": (["samples: LATENT", "vae: VAE"], [], ["IMAGE"]),
    "CreateVideo": (["images: IMAGE"], ["fps"], ["VIDEO"]),
    "SaveVideo": (["video: VIDEO"], ["filename_prefix", "format", "codec"], []),
}  # fmt: skip
"""Of ComfyUI 0.7.0 (nodes.py and comfy_extras): linked inputs in order, the other inputs in order, outputs."""

TEXT_TYPES = {
    "CLIPLoader": {"wan", "ltxv"},
    "DualCLIPLoader": {"hunyuan_video"},
}
"""Of what these take in that version."""


def exported(run, folder, guidance=None, **options):
    source = open_source(run)
    if guidance is not None:
        source.recipe.backbone.guidance = Guidance(**guidance)
    folder.mkdir()
    assert ComfyUIConfig().applies(source) is None
    files = ComfyUIConfig().write(source, folder, ExportOptions(**{"dtype": torch.float32, **options}))
    assert sorted(path.name for path in folder.iterdir()) == sorted(file.path for file in files)
    return source, files


def native_of(source, expert, whole):
    """The network that an expert equals, or that it is a change of, as its makers have it."""
    take = expert.tensor if whole else expert.original
    tensors = source.recipe.backbone.native_names().tensors(expert.shapes)
    return {tensor.name: tensor.join([take(part) for part in tensor.parts]).float() for tensor in tensors}


def with_lora(native, lora, renamed=()):
    """By ComfyUI's rules: `.alpha` over the rank is the scale, 1 without; `.diff_b` is added to the bias."""
    found, used = {**native}, set()
    for name in native:
        path = name.removesuffix(".weight")
        key = "diffusion_model." + next((new + path[len(old) :] for old, new in renamed if path.startswith(old)), path)
        if path != name and f"{key}.lora_up.weight" in lora:
            up, down = lora[f"{key}.lora_up.weight"], lora[f"{key}.lora_down.weight"]
            scale = float(lora[f"{key}.alpha"]) / len(down) if f"{key}.alpha" in lora else 1.0
            found[name] = native[name] + scale * up @ down
            used |= {f"{key}.lora_up.weight", f"{key}.lora_down.weight", f"{key}.alpha"}
        if path != name and f"{key}.diff_b" in lora:
            found[f"{path}.bias"] = native[f"{path}.bias"] + lora[f"{key}.diff_b"]
            used.add(f"{key}.diff_b")
    assert set(lora) <= used
    return found


RENAMED = [
    ("time_in.mlp.0", "time_in.in_layer"), ("time_in.mlp.2", "time_in.out_layer"),
    ("guidance_in.mlp.0", "guidance_in.in_layer"), ("guidance_in.mlp.2", "guidance_in.out_layer"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "renamed"), [("wan", []), ("wan22", []), ("hunyuan_video", RENAMED), ("ltx", [])])
def test_two_adapters_are_two_lora_files_that_make_the_experts_of_the_base(tmp_path, runs, family, renamed):
    source, files = exported(runs(family), tmp_path / "out")
    name = f"few_{family}"
    assert [(file.path, file.expert, file.form) for file in files] == [
        (f"{name}_high_noise.safetensors", "semantic", "lora"),
        (f"{name}_low_noise.safetensors", "detail", "lora"),
        ("workflow.json", None, None),
    ]
    for file in files[:2]:
        expert, lora = source.experts[file.expert], load_file(tmp_path / "out" / file.path)
        made, wanted = with_lora(native_of(source, expert, False), lora, renamed), native_of(source, expert, True)
        assert max(float((made[key] - wanted[key]).abs().max()) for key in wanted) < 1e-6
        assert any(float((made[key] - native_of(source, expert, False)[key]).abs().max()) > 1e-4 for key in wanted)


@pytest.mark.parametrize(
    ("family", "convert"),
    [
        ("wan", convert_wan_transformer_to_diffusers),
        ("hunyuan_video", convert_hunyuan_video_transformer_to_diffusers),
        ("ltx", convert_ltx_transformer_checkpoint_to_diffusers),
    ],
)
def test_a_full_expert_is_whole_and_the_adapter_is_a_change_of_it(tmp_path, runs, family, convert, monkeypatch):
    source, files = exported(runs(family, "full"), tmp_path / "out")
    high, low = (tmp_path / "out" / file.path for file in files[:2])
    assert [file.form for file in files[:2]] == ["merged", "lora"]
    semantic, detail = source.experts.values()
    whole = load_file(high)
    if family != "hunyuan_video":  # whose converter knows the published width alone
        back = convert(dict(whole))
        assert back.keys() == semantic.shapes.keys()
        assert all(back[name].equal(semantic.tensor(name).float()) for name in back)
    renamed = RENAMED if family == "hunyuan_video" else []
    made, wanted = with_lora(whole, load_file(low), renamed), native_of(source, detail, True)
    assert made.keys() == wanted.keys()
    assert max(float((made[key] - wanted[key]).abs().max()) for key in wanted) < 1e-6
    with safe_open(low, "pt") as file:
        assert file.metadata()["moedistill_over"] == high.name


def test_merged_files_are_bf16_and_say_what_it_costs(tmp_path, runs):
    source, files = exported(runs("wan"), tmp_path / "out", form="merged", dtype=torch.bfloat16)
    assert [file.form for file in files[:2]] == ["merged", "merged"]
    for file in files[:2]:
        stored = load_file(tmp_path / "out" / file.path)
        wanted = native_of(source, source.experts[file.expert], True)
        assert all(stored[name].equal(wanted[name].bfloat16()) for name in wanted)
        lost = sum((stored[name].float() - wanted[name]).square().sum() for name in wanted)
        size = sum(tensor.square().sum() for tensor in wanted.values())
        assert file.error == pytest.approx(float((lost / size) ** 0.5), rel=1e-3)
        assert 1e-4 < file.error < 4e-3


def test_a_full_expert_that_is_cut_to_a_rank_is_a_lora_on_the_pretrained_network(tmp_path, runs):
    source, files = exported(runs("wan", "full"), tmp_path / "out", svd=32)
    assert [file.form for file in files[:2]] == ["lora", "lora"]
    semantic, lora = source.experts["semantic"], load_file(tmp_path / "out" / files[0].path)
    assert not [name for name in lora if name.endswith(".alpha") and not name.startswith("diffusion_model.blocks.")]
    made, wanted = with_lora(native_of(source, semantic, False), lora), native_of(source, semantic, True)
    # A rank of 32 is all that these linears have; what is of none is left out, and said.
    apart = {name for name in wanted if float((made[name] - wanted[name]).abs().max()) > 1e-5}
    assert {name.split(".")[-2] if name.endswith(("weight", "bias")) else name for name in apart} == {
        "patch_embedding", "norm_q", "norm_k", "norm3", "head.modulation", "blocks.0.modulation", "blocks.1.modulation",
    }  # fmt: skip
    assert files[0].cut["other"] == 1
    assert max(files[0].cut["attention"], files[0].cut["feed_forward"]) < 1e-5


def test_an_adapter_that_no_lora_carries_leaves_merged_and_is_refused_as_lora(tmp_path, runs):
    recipe = {"experts": {
        "semantic": {"kind": "lora", "rank": 2, "copies": "none"},
        "detail": {"kind": "lora", "from": "semantic", "rank": 2, "copies": ["blocks.0.norm2"]},
    }}  # fmt: skip
    run = runs("wan", **recipe)
    _, files = exported(run, tmp_path / "out")
    assert [file.form for file in files[:2]] == ["lora", "merged"]
    with pytest.raises(ValueError, match=r"'detail' trains blocks\.0\.norm2\.weight, .* which no LoRA carries"):
        exported(run, tmp_path / "lora", form="lora")


def test_a_full_expert_that_samples_nothing_is_written_as_the_base_of_a_lora(tmp_path, runs):
    router = {"kind": "timestep", "experts": ["teacher", "detail"], "boundaries": [{"point": 8}]}
    source, files = exported(runs("wan", "full", router=router), tmp_path / "out")
    assert [file.path for file in files] == [
        "few_wan_semantic.safetensors", "few_wan_low_noise.safetensors", "workflow.json",
    ]  # fmt: skip
    made = with_lora(load_file(tmp_path / "out" / files[0].path), load_file(tmp_path / "out" / files[1].path))
    wanted = native_of(source, source.experts["detail"], True)
    assert max(float((made[key] - wanted[key]).abs().max()) for key in wanted) < 1e-6
    loaders = [node["widgets_values"][0] for node in nodes_of(tmp_path / "out", "UNETLoader")]
    assert loaders == ["wan2.1_t2v_14B_fp16.safetensors", "few_wan_semantic.safetensors"]


# -- the workflow -----------------------------------------------------------------------------------------------------


def nodes_of(folder, kind):
    content = json.loads((folder / "workflow.json").read_text(encoding="utf-8"))
    return [node for node in content["nodes"] if node["type"] == kind]


def check_graph(content):
    """Every node is as ComfyUI declares it, and every link joins what both of its nodes name."""
    nodes = {node["id"]: node for node in content["nodes"] if node["type"] != "MarkdownNote"}
    links = {link[0]: link for link in content["links"]}
    for node in nodes.values():
        inputs, widgets, outputs = NODES[node["type"]]
        assert [f"{each['name']}: {each['type']}" for each in node["inputs"]] == inputs
        assert len(node["widgets_values"]) == len(widgets), node["type"]
        assert [each["type"] for each in node["outputs"]] == outputs
        for slot, each in enumerate(node["inputs"]):
            _, start, from_slot, end, to_slot, kind = links[each["link"]]
            assert (end, to_slot, kind) == (node["id"], slot, each["type"])
            given = nodes[start]["outputs"][from_slot]
            assert given["type"] == kind
            assert each["link"] in given["links"]
    assert sum(len(node["inputs"]) for node in nodes.values()) == len(links)
    return nodes, links


@pytest.mark.parametrize(
    ("family", "semantic"),
    [("wan", "lora"), ("wan", "full"), ("wan22", "lora"), ("hunyuan_video", "lora"), ("ltx", "lora"), ("ltx", "full")],
)
def test_the_workflow_is_of_comfyuis_nodes_and_samples_the_recipes_list(tmp_path, runs, family, semantic):
    folder = tmp_path / "out"
    source, _ = exported(runs(family, semantic), folder)
    nodes, links = check_graph(json.loads((folder / "workflow.json").read_text(encoding="utf-8")))

    (manual,) = nodes_of(folder, "ManualSigmas")
    read = [float(number) for number in re.findall(r"[-+]?(?:\d*\.*\d+)", manual["widgets_values"][0])]  # as it does
    assert torch.tensor(read).equal(torch.tensor(source.sigmas))
    (split,) = nodes_of(folder, "SplitSigmas")
    assert split["widgets_values"] == [2]
    high, low = nodes_of(folder, "SamplerCustom")
    assert (high["title"], low["title"]) == ("semantic", "detail")
    assert [node["widgets_values"] for node in (high, low)] == [[True, 0, "fixed", 1.0], [False, 0, "fixed", 1.0]]
    comes_from = {
        (node["title"], each["name"]): links[each["link"]][1:3] for node in (high, low) for each in node["inputs"]
    }
    assert comes_from["semantic", "sigmas"] == [split["id"], 0]
    assert comes_from["detail", "sigmas"] == [split["id"], 1]
    assert comes_from["detail", "latent_image"] == [high["id"], 0]
    assert comes_from["semantic", "latent_image"][0] != high["id"]
    assert [node["widgets_values"] for node in nodes_of(folder, "KSamplerSelect")] == [["euler"]]

    loras = [node["widgets_values"] for node in nodes_of(folder, "LoraLoaderModelOnly")]
    files = [f"few_{family}_high_noise.safetensors", f"few_{family}_low_noise.safetensors"]
    assert loras == [[file, 1.0] for file in (files if semantic == "lora" else files[1:])]
    networks = {links[each["link"]][1] for node in (high, low) for each in node["inputs"] if each["name"] == "model"}
    assert len(networks) == 2
    video = source.recipe.backbone.video
    (latents,) = [node for node in nodes.values() if node["type"].startswith("Empty")]
    assert latents["widgets_values"] == [video.width, video.height, video.num_frames, 1]
    for kind, known in TEXT_TYPES.items():
        assert {node["widgets_values"][-2] for node in nodes_of(folder, kind)} <= known


def test_guidance_that_the_network_is_told_is_in_the_workflow(tmp_path, runs):
    guidance = {"mode": "embedded", "scale": 6.0, "student_scale": 3.0}
    exported(runs("hunyuan_video"), tmp_path / "out", guidance)
    (told,) = nodes_of(tmp_path / "out", "FluxGuidance")
    assert told["widgets_values"] == [3.0]


def test_a_teacher_in_the_steps_is_the_base_with_its_guidance(tmp_path, runs):
    router = {"kind": "timestep", "experts": ["teacher", "detail"], "boundaries": [{"point": 8}]}
    guidance = {"mode": "classifier_free", "scale": 5.0, "negative_prompt": "blurred"}
    _, files = exported(runs("wan", router=router), tmp_path / "out", guidance)
    assert [file.path for file in files] == ["few_wan_low_noise.safetensors", "workflow.json"]
    high, low = nodes_of(tmp_path / "out", "SamplerCustom")
    assert (high["widgets_values"][-1], low["widgets_values"][-1]) == (5.0, 1.0)
    assert [node["widgets_values"] for node in nodes_of(tmp_path / "out", "CLIPTextEncode")][1] == ["blurred"]


def test_what_is_no_workflow_is_said_with_its_reason(tmp_path, runs):
    changes = {"sample": {"points": [20, 14, 8], "eta": 0.5}}
    source, files = exported(runs("ltx", **changes), tmp_path / "out")
    assert [file.path for file in files][2:] == []
    text = ComfyUIConfig().usage(source, files, ExportOptions())
    assert "There is no workflow beside the files: sampling draws fresh noise between the steps (eta 0.5)" in text


def test_the_card_and_the_workflow_say_what_belongs_where(tmp_path, runs):
    source, files = exported(runs("wan", "full"), tmp_path / "out")
    places = [
        "- `models/diffusion_models`: `few_wan_high_noise.safetensors`",
        "- `models/loras`: `few_wan_low_noise.safetensors`, at strength 1",
        "- `few_wan_low_noise.safetensors` is a change of `few_wan_high_noise.safetensors`, and of no other weights",
    ]
    opened = "`workflow.json` is opened by dropping it on ComfyUI's window, 0.7.0 or newer."
    assert ComfyUIConfig().usage(source, files, ExportOptions()).splitlines() == [*places, "", opened]
    (note,) = nodes_of(tmp_path / "out", "MarkdownNote")
    assert note["widgets_values"][0].splitlines() == [
        "ComfyUI 0.7.0 or newer",
        "",
        *places,
        "- steps 0–2 high (semantic), 2–3 low (detail)",
        "- cfg 1 for semantic and detail: their guidance is what they were distilled with",
    ]


def test_cogvideox_is_refused_with_the_reason(runs):
    reason = ComfyUIConfig().applies(open_source(runs("cogvideox_2b")))
    assert reason == "how ComfyUI loads and samples backbone 'cogvideox' is not known here"
