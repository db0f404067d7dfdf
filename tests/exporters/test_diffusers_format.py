"""Files for diffusers, opened by diffusers: what the card's code samples is what `moedistill sample` does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from two_expert_runs import FAMILIES, finished

from moedistill.components.plugins import load_plugins
from moedistill.errors import UserError
from moedistill.exporters.export import export
from moedistill.exporters.options import ExportOptions, chosen_formats
from moedistill.exporters.source import open_source
from moedistill.runs.sample import sample_run
from moedistill.runtime import weight_files
from moedistill.runtime.integrity import sum_of

PROMPT = "a red fox runs through deep snow"
EXACT = 1e-5
"""Of frames in [0, 1], float32."""
IN_BFLOAT16 = 0.02
"""Root mean square of what frames change by, where weights are stored, and all is computed, in bfloat16."""


def write(run, folder, **options):
    formats = chosen_formats(load_plugins().components, ["diffusers"])
    [made] = export(run, formats, folder, ExportOptions(**{"dtype": torch.float32, "verify": False, **options}))
    return made


def code_of(folder):
    """The card's code, which is to give tensors, and no file."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    changes = {
        "    num_inference_steps": '    output_type="pt", num_inference_steps',
        'export_to_video(video, "video.mp4", ': 'torch.save(video, "video.pt"), dict(',
    }
    for line, changed in changes.items():
        assert line in code
        code = code.replace(line, changed)
    return code


def frames_of_code(folder):
    """What the card's code samples `[T, C, H, W]`, in a folder, in this process."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        exec(compile(code_of(folder), "README.md", "exec"), {})
        return torch.load("video.pt").float()
    finally:
        os.chdir(here)


@pytest.fixture(scope="module", params=[f"{family}-{semantic}" for family in FAMILIES for semantic in ("lora", "full")])
def trained(request, tmp_path_factory):
    """A run, and what it samples `[T, C, H, W]`."""
    folder = tmp_path_factory.mktemp("trained")
    run = finished(folder, *request.param.split("-"))
    [video] = sample_run(run, prompts=[PROMPT], seed=0, output=folder / "samples").videos
    return request.param, run, video.transpose(0, 1)


@pytest.mark.parametrize("form", [None, "merged"])
def test_the_cards_code_samples_what_the_run_does(trained, tmp_path, form):
    name, run, video = trained
    made = write(run, tmp_path / "files", form=form)
    assert (frames_of_code(made.folder) - video).abs().max() < EXACT, name
    forms = {file.expert: file.form for file in made.files if file.form}
    semantic = "lora" if name.endswith("lora") and form is None else "merged"
    assert forms == {"semantic": semantic, "detail": form or "lora"}


def test_every_expert_is_another_network(trained):
    """Else the test above would say nothing."""
    name, run, _ = trained
    semantic, detail = open_source(run).experts.values()
    for expert in (semantic, detail):
        changed = [key for key, tensor in expert.merged() if not torch.equal(tensor, expert.pretrained(key))]
        assert len(changed) > 4, (name, expert.name)
    assert any(not torch.equal(a, b) for (_, a), (_, b) in zip(semantic.merged(), detail.merged(), strict=True))


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A full semantic expert and an adapter on it, on Wan 2.1, which is one network."""
    return finished(tmp_path_factory.mktemp("wan"), "wan", "full")


def in_a_process_without_us(code, folder):
    blocked = "import sys\nfor name in ('moedistill', 'moedistill_wan'): sys.modules[name] = None\n"
    found = subprocess.run([sys.executable, "-c", blocked + code], cwd=folder, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


def test_a_pipelines_folder_opens_where_moedistill_is_not(wan, tmp_path):
    made = write(wan, tmp_path / "files", form="merged")
    said = in_a_process_without_us(
        "import torch\nfrom diffusers import DiffusionPipeline\npipe = DiffusionPipeline.from_pretrained('.')\n"
        "print(type(pipe).__name__, pipe.config.boundary_ratio, type(pipe.text_encoder).__name__)\n"
        + code_of(made.folder),
        made.folder,
    )
    boundary = open_source(wan).boundary()
    assert said.splitlines()[0] == f"WanPipeline {boundary} UMT5EncoderModel"
    [video] = sample_run(wan, prompts=[PROMPT], seed=0, output=tmp_path / "samples").videos
    assert (torch.load(made.folder / "video.pt") - video.transpose(0, 1)).abs().max() < EXACT


def test_a_boundary_lies_between_the_points_that_it_parts(wan, tmp_path):
    index = json.loads((write(wan, tmp_path / "files", form="merged").folder / "model_index.json").read_text())
    points = open_source(wan).trajectory.points.tolist()
    assert points[8] < index["boundary_ratio"] < points[9]
    assert index["transformer_2"] == ["diffusers", "WanTransformer3DModel"]


def test_serving_engines_read_the_steps_in_the_index(wan, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    index = json.loads((write(wan, tmp_path / "files", form="merged").folder / "model_index.json").read_text())
    assert (index["dmd2_num_inference_steps"], index["dmd2_guidance_scale"]) == (3, 1.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=index["dmd2_scheduler_shift"])
    scheduler.set_timesteps(timesteps=index["dmd2_denoising_timesteps"])
    assert torch.allclose(scheduler.sigmas, torch.tensor(open_source(wan).sigmas), atol=1e-7)


def test_bfloat16_costs_what_the_card_says(wan, tmp_path):
    exact, rounded = (
        write(wan, tmp_path / str(dtype), form="merged", dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    for one, other in zip(exact.files, rounded.files, strict=True):
        assert one.path == other.path
        if one.form:
            a, b = (load_file(made.folder / one.path) for made in (exact, rounded))
            assert b["proj_out.weight"].dtype == torch.bfloat16
            assert b["scale_shift_table"].dtype == torch.float32  # as the network's class keeps it
            lost = sum((a[name] - b[name].float()).square().sum() for name in a)
            assert one.error == 0
            size = sum(tensor.square().sum() for tensor in a.values())
            assert other.error == pytest.approx((lost / size).sqrt().item(), rel=1e-3)
            assert 5e-4 < other.error < 4e-3
    [video] = sample_run(wan, prompts=[PROMPT], seed=0, output=tmp_path / "samples").videos
    change = frames_of_code(rounded.folder) - video.transpose(0, 1)
    assert 1e-6 < change.square().mean().sqrt() < IN_BFLOAT16


def test_large_networks_are_stored_in_parts(wan, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "SHARD", 40_000)
    made = write(wan, tmp_path / "files", form="merged")
    parts = sorted((made.folder / "transformer").glob("*.safetensors"))
    assert len(parts) > 3
    [video] = sample_run(wan, prompts=[PROMPT], seed=0, output=tmp_path / "samples").videos
    assert (frames_of_code(made.folder) - video.transpose(0, 1)).abs().max() < EXACT


def test_components_are_linked_or_copied(wan, tmp_path):
    linked = write(wan, tmp_path / "linked", form="merged").folder
    assert (linked / "vae").is_symlink()
    formats = chosen_formats(load_plugins().components, ["diffusers"], copy=True)
    [copied] = export(wan, formats, tmp_path / "copied", ExportOptions(form="merged", verify=False))
    assert not (copied.folder / "vae").is_symlink()
    assert list(load_file(copied.folder / "vae/diffusion_pytorch_model.safetensors"))


def test_the_transformer_alone_is_enough_for_files_of_weights(wan, tmp_path):
    """The base model's other components are neither read nor needed."""
    recipe = json.loads((wan / "export/export.json").read_text())["recipe"]
    for name in ("vae", "text_encoder", "tokenizer"):
        (Path(recipe["backbone"]["pretrained"]) / name).rename(tmp_path / name)
    try:
        assert [file.form for file in write(wan, tmp_path / "parts").files if file.form] == ["merged", "lora"]
        made = write(wan, tmp_path / "whole", form="merged")
        index = json.loads((made.folder / "model_index.json").read_text())
        assert index["vae"] == index["text_encoder"] == [None, None]
        assert "text_encoder=None" in (made.folder / "README.md").read_text()
    finally:
        for name in ("vae", "text_encoder", "tokenizer"):
            (tmp_path / name).rename(Path(recipe["backbone"]["pretrained"]) / name)


def test_the_file_of_an_adapter_says_what_it_stands_on(wan, tmp_path):
    made = write(wan, tmp_path / "files")
    with safe_open(made.folder / "few_wan_low_noise.safetensors", "pt") as file:
        header = file.metadata()
    assert (header["moedistill_expert"], header["moedistill_over"]) == ("detail", "semantic")
    assert json.loads(header["lora_adapter_metadata"])["transformer.lora_bias"] is True


def test_a_full_expert_is_cut_to_a_rank_and_says_what_that_costs(wan, tmp_path):
    source = open_source(wan)
    made = {rank: write(wan, tmp_path / str(rank), svd=rank) for rank in (1, 4, 64)}
    errors = {rank: dict(each.files[0].cut) for rank, each in made.items()}
    assert errors[1]["attention"] > errors[4]["attention"] > errors[64]["attention"]
    assert errors[64]["attention"] < 1e-5  # all of it
    assert errors[1]["time-dependent"] == 0  # exact, whichever rank
    semantic = load_file(made[4].folder / "few_wan_high_noise.safetensors")
    left = whole = 0.0
    for path in [name.removesuffix(".weight") for name in source.experts["semantic"].shapes if ".attn" in name]:
        if f"transformer.{path}.lora_A.weight" not in semantic:
            continue
        b, a = (semantic[f"transformer.{path}.lora_{side}.weight"] for side in "BA")
        expert = source.experts["semantic"]
        change = expert.tensor(f"{path}.weight") - expert.pretrained(f"{path}.weight")
        best = torch.linalg.svdvals(change)[4:].square().sum().item()
        assert (change - b @ a).square().sum().item() == pytest.approx(best, rel=1e-2)
        left, whole = left + best, whole + change.square().sum().item()
    assert errors[4]["attention"] == pytest.approx((left / whole) ** 0.5, rel=0.2)
    assert "of the change is left out by its rank" in (made[4].folder / "README.md").read_text()


def test_what_cannot_be_is_refused_in_one_line(wan, tmp_path):
    with pytest.raises(
        UserError, match=r"expert 'semantic' has all weights of its own, which no LoRA carries; .*--svd"
    ):
        write(wan, tmp_path / "files", form="lora")
    assert not (tmp_path / "files").exists()
    (tmp_path / "used").mkdir()
    (tmp_path / "used/mine.txt").write_text("mine")
    with pytest.raises(UserError, match="used"):
        write(wan, tmp_path / "used")
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["mine.txt"]


def test_the_card_says_what_the_files_are(wan, tmp_path):
    made = write(wan, tmp_path / "files", dtype=torch.bfloat16)
    card = (made.folder / "README.md").read_text()
    points = open_source(wan).trajectory.points.tolist()
    middle = (points[8] + points[9]) / 2
    raw = middle / (17 - 16 * middle)
    for part in (
        "steps 0–2 high (semantic), steps 2–3 low (detail), of 3.",
        f"sigma {middle:.6f}, time {1000 * middle:.3f}, step 2, raw time {1000 * raw:.3f} of 1000",
        "library_name: diffusers",
        "| expert detail | low-rank, an adapter on semantic |",
        "| stored in | bfloat16, which costs ",
    ):
        assert part in card
    record = json.loads((made.folder / "moedistill.json").read_text())
    assert record["boundaries"] == [middle]
    for path, entry in record["files"].items():
        assert sum_of(made.folder / path) == entry["sha256"]


def check_against_sample(run, tmp_path, **options):
    made = write(run, tmp_path / "files", **options)
    [video] = sample_run(run, prompts=[PROMPT], seed=0, output=tmp_path / "samples").videos
    assert (frames_of_code(made.folder) - video.transpose(0, 1)).abs().max() < EXACT
    return made


THREE = {
    "router": {"kind": "timestep", "experts": ["high", "middle", "low"], "boundaries": [{"point": 14}, {"point": 8}]},
    "experts": {
        "high": {"kind": "full"},
        "middle": {"kind": "lora", "rank": 2, "alpha": 4},
        "low": {"kind": "lora", "from": "high", "rank": 2, "alpha": 4, "copies": "none"},
    },
}


@pytest.mark.parametrize("form", [None, "merged"])
def test_more_experts_than_a_pipeline_has_places_for_take_turns(tmp_path, form):
    run = finished(tmp_path, "wan", **THREE)
    made = check_against_sample(run, tmp_path, form=form)
    places = {"high": "high/diffusion_pytorch_model.safetensors"}
    for name in ("middle", "low"):
        places[name] = f"few_wan_{name}.safetensors" if form is None else places["high"].replace("high", name)
    assert {file.expert: file.path for file in made.files if file.form} == places


def test_one_expert_is_a_pipeline_of_any_family(tmp_path):
    only = {"router": {"kind": "timestep", "experts": ["student"]}, "experts": {"student": {"kind": "full"}}}
    made = check_against_sample(finished(tmp_path, "hunyuan_video", **only), tmp_path)
    assert made.files[0].path == "transformer/config.json"
    index = json.loads((made.folder / "model_index.json").read_text())
    assert not [name for name in index if name.startswith(("boundary", "dmd2"))]


TEACHER_BELOW = {
    "router": {
        "kind": "timestep",
        "experts": ["semantic", "teacher"],
        "boundaries": [{"ratio": 0.875}],
        "closed": "high",
    },
    "experts": {"semantic": {"kind": "lora", "base": "transformer", "rank": 2, "alpha": 4}},
}
"""An expert above the boundary, and the untouched teacher below it."""


def test_a_teacher_that_serves_steps_is_the_base_model_s_own_network(tmp_path):
    run = finished(tmp_path, "wan22", **TEACHER_BELOW)
    made = check_against_sample(run, tmp_path)
    assert [file.expert for file in made.files] == ["semantic"]
    whole = write(run, tmp_path / "whole", form="merged").folder
    base = load_file(tmp_path / "model/transformer_2/diffusion_pytorch_model.safetensors")
    copied = load_file(whole / "transformer_2/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(copied[name], base[name]) for name in base)


def test_a_model_that_makes_videos_from_images_is_given_one(tmp_path):
    """moedistill samples none of them: what is compared are two ways to the same networks."""
    run = finished(tmp_path, "wan22_i2v")
    frames = []
    for form in ("lora", "merged"):
        made = write(run, tmp_path / form, form=form)
        Image.new("RGB", (48, 32), "teal").save(made.folder / "first_frame.png")
        frames.append(frames_of_code(made.folder))
    assert "WanImageToVideoPipeline" in (made.folder / "README.md").read_text()
    assert (frames[0] - frames[1]).abs().max() < EXACT
    assert frames[0].std() > 0.01


def test_a_guided_teacher_is_refused(tmp_path):
    run = finished(tmp_path, "wan22", **TEACHER_BELOW, guidance={"mode": "classifier_free", "scale": 3.0})
    with pytest.raises(UserError, match=r"teacher\.transformer_2 serves some of the steps with guidance"):
        write(run, tmp_path / "files")
