"""From clips to samples on every family: a saved model, a shipped recipe that is no miniature, and three commands."""

import json

import pytest
from footage_files import write_clip
from saved_pipelines import FROM_IMAGES, pipeline_recipe, save_pipeline

from moedistill.cli import main
from moedistill.data.latents import open_store
from moedistill.recipe.loading import load_recipe

RECIPES = {
    "dcm_wan_1_3b": ("wan", (32, 48)),
    "dcm_hunyuan": ("hunyuan_video", (32, 48)),
    "dcm_cogvideox_2b": ("cogvideox_2b", (32, 48)),
    "dcm_ltx": ("ltx", (64, 96)),
}


def command(*arguments):
    with pytest.raises(SystemExit) as end:
        main(list(map(str, arguments)))
    assert end.value.code == 0


@pytest.fixture
def clips(tmp_path):
    """Three clips of three seconds with captions, one of them standing."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for number, (name, size) in enumerate({"a": (64, 96), "b": (128, 192), "standing": (192, 128)}.items()):
        write_clip(folder / f"{name}.mp4", size=size, fps=30, num_frames=90, start=0.5 * number)
        (folder / f"{name}.txt").write_text(f"clip {name}")
    return folder


def settings(recipe, model, size):
    """What makes a run of a shipped recipe small."""
    changed = {
        "backbone.pretrained": model, "backbone.dtype": "float32", "backbone.video.num_frames": 17,
        "backbone.video.height": size[0], "backbone.video.width": size[1],
        "stages.semantic.steps": 2, "stages.detail.steps": 2, "training.batch_size": 1, "training.num_workers": 0,
        "stages.samples.prompts": "[a dog runs]",
    }  # fmt: skip
    changed |= {
        f"experts.{name}.rank": 4 for name, expert in load_recipe(recipe).experts.items() if expert.kind == "lora"
    }  # a rank is at most the width
    return [part for key, value in changed.items() for part in ("--set", f"{key}={value}")]


@pytest.mark.parametrize("recipe", RECIPES)
def test_encode_run_and_sample(recipe, clips, tmp_path, capsys):
    family, size = RECIPES[recipe]
    given = settings(recipe, save_pipeline(tmp_path / "model", family), size)
    command("data", "encode", clips, tmp_path / "set", "--recipe", recipe, *given)
    shapes = [open_store(tmp_path / "set").shape(i) for i in range(3)]
    assert {shape[2:] for shape in shapes} == {shapes[0][2:], shapes[0][:1:-1]}
    given += ["--set", f"data.path={tmp_path / 'set'}"]
    capsys.readouterr()
    command("data", "check", tmp_path / "set", "--recipe", recipe, *given)
    said = capsys.readouterr().out
    assert "problem" not in said
    assert "is stored, but no input" not in said
    command("run", recipe, *given, "--output", tmp_path / "run", "--device", "cpu")
    command("sample", tmp_path / "run", "--prompt", "a dog runs", "--output", tmp_path / "videos")
    assert (tmp_path / "videos/000.mp4").stat().st_size > 0


@pytest.mark.parametrize("family", FROM_IMAGES)
def test_a_network_that_makes_videos_from_images_is_trained_on_encoded_clips(family, clips, tmp_path):
    recipe = pipeline_recipe(family, save_pipeline(tmp_path / "model", family))
    recipe["backbone"]["video"] = {"num_frames": 17, "height": 32, "width": 48}
    for path in clips.glob("standing.*"):  # the miniature of CogVideoX 1.5 has positions for what lies alone
        path.unlink()
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    command("data", "encode", clips, tmp_path / "set", "--recipe", file)
    data = ("--set", f"data.path={tmp_path / 'set'}")
    command("data", "check", tmp_path / "set", "--recipe", file, *data)
    command("run", file, *data, "--output", tmp_path / "run", "--device", "cpu")
