"""The shipped recipes, not as miniatures: against models saved in folders, with stored latents, from end to end."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import equal
from saved_pipelines import PROMPT, save_pipeline

import moedistill
from moedistill.data.base import Sample
from moedistill.data.latents import write_latents
from moedistill.model.backbone import VideoSize
from moedistill.recipe.loading import load_recipe
from moedistill.runs.loop import run
from moedistill.runs.sample import sample_run
from moedistill.runtime.checkpoint import load_tree

RECIPES = {
    "dcm_hunyuan": "hunyuan_video",
    "dcm_wan_1_3b": "wan",
    "dcm_wan22_a14b": "wan22",
    "dcm_cogvideox_2b": "cogvideox_2b",
    "dcm_cogvideox_5b": "cogvideox_5b",
}
VIDEO = {"num_frames": 17, "height": 32, "width": 48}
# What makes a run small; everything else is the recipe's.
SMALL = [
    "backbone.dtype=float32",
    *(f"backbone.video.{key}={value}" for key, value in VIDEO.items()),
    "stages.semantic.steps=2",
    "stages.detail.steps=3",
    "training.batch_size=2",
    "training.checkpoint_every=1",
    "training.keep_checkpoints=9",
    f"stages.samples.prompts=[{PROMPT}]",
]


def save_published(folder, backbone):
    """Three stored samples in the layout of the published preprocessed sets: HunyuanVideo's pooled text packed."""
    for name in ("latent", "prompt_embed", "prompt_attention_mask"):
        (folder / name).mkdir(parents=True)
    cond, entries = backbone.encode([f"sample {k}" for k in range(3)]), []
    for k in range(3):
        latents = torch.randn(backbone.latent_shape(), generator=torch.Generator().manual_seed(k))
        torch.save(latents, folder / f"latent/{k}.pt")
        pooled, tokens = cond["pooled_prompt_embeds"][k], cond["prompt_embeds"][k]
        # The pooled text leads, padded to the width of the tokens.
        first = torch.cat([pooled, torch.zeros(tokens.shape[1] - len(pooled))])
        torch.save(torch.cat([first[None], tokens]), folder / f"prompt_embed/{k}.pt")
        torch.save(cond["prompt_attention_mask"][k], folder / f"prompt_attention_mask/{k}.pt")
        files = dict.fromkeys(("latent_path", "prompt_embed_path", "prompt_attention_mask"), f"{k}.pt")
        entries.append({**files, "caption": f"sample {k}"})
    (folder / "videos2caption.json").write_text(json.dumps(entries))
    return folder / "videos2caption.json"


def save_own(folder, backbone):
    """Three stored samples in our own layout, with the negative prompt's text."""
    cond = backbone.encode([f"sample {k}" for k in range(3)])
    samples = []
    for k in range(3):
        latents = torch.randn(backbone.latent_shape(), generator=torch.Generator().manual_seed(k))
        samples.append(Sample(latents, {name: value[k] for name, value in cond.items()}))
    negative = {name: value[0] for name, value in backbone.encode(["blurred"]).items()}
    write_latents(folder, samples, negative=negative)
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_from_end_to_end(name, tmp_path):
    family = RECIPES[name]
    model = save_pipeline(tmp_path / "model", family)
    settings = [*SMALL, f"backbone.pretrained={model}"]
    low_rank = [key for key, expert in load_recipe(name).experts.items() if expert.kind == "lora"]
    settings += [f"experts.{expert}.rank=4" for expert in low_rank]  # a rank is at most the width
    backbone = load_recipe(name, settings).backbone.build()
    save = save_published if family == "hunyuan_video" else save_own
    recipe = load_recipe(name, [*settings, f"data.path={save(tmp_path / 'data', backbone)}"])

    result = run(recipe, output=tmp_path / "run", device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["stage"] == "detail"][-1] == 3
    assert (tmp_path / "run/samples/000.mp4").is_file()

    # Resumed in the middle of the second stage it ends with the same weights.
    middle = tmp_path / "run/checkpoints/01_detail_00000002"
    again = run(recipe, output=tmp_path / "again", resume_from=middle, device="cpu")
    assert equal(load_tree(result.checkpoint, "experts"), load_tree(again.checkpoint, "experts"))
    assert not equal(load_tree(middle, "experts"), load_tree(again.checkpoint, "experts"))

    # The experts in a freshly loaded stock pipeline give what `sample` gives: from the run, and from its export.
    videos = [
        sample_run(source, prompts=[PROMPT], seed=1, output=tmp_path / f"of_{source.name}").videos[0]
        for source in (tmp_path / "run", tmp_path / "run/export")
    ]
    assert torch.equal(*videos)
    pipeline = DiffusionPipeline.from_pretrained(model, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    with moedistill.apply(pipeline, tmp_path / "run/export"):
        frames = pipeline(PROMPT, **VIDEO, generator=torch.Generator().manual_seed(1), output_type="pt").frames[0]
    assert torch.equal(frames.permute(1, 0, 2, 3).float(), videos[0])
    assert backbone.video == VideoSize(**VIDEO)
