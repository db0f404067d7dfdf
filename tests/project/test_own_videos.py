"""The tutorial about one's own videos: its commands alone lead from clips to a four-step video."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from footage_files import write_clip
from saved_pipelines import save_pipeline

from moedistill.cli import main
from moedistill.recipe.loading import load_recipe

PAGE = (Path(__file__).parents[2] / "docs/tutorials/own_videos.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [line for language, code in BLOCKS if language == "" for line in code.splitlines()]
# What makes the model and the run small; everything else is the page's.
SMALL = {"num_frames": 17, "height": 32, "width": 48}


def shrink(file, model):
    """The copied recipe with a miniature of the model, and few steps."""
    recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    recipe["backbone"] |= {"pretrained": str(model), "video": SMALL, "dtype": "float32"}
    for expert in recipe["experts"].values():
        expert["rank"] = 4
    for stage in recipe["stages"][:2]:
        stage["steps"] = 2
    recipe["stages"][2]["prompts"] = ["a dog runs"]
    recipe["training"] |= {"batch_size": 2, "gradient_accumulation_steps": 1}
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")


def test_the_commands_of_the_page_lead_from_clips_to_a_video(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = save_pipeline("Wan2.1-T2V-1.3B-Diffusers", "wan").resolve()
    captions = dict(re.findall(r'\{"path": "(.*?)", "caption": "(.*?)"\}', PAGE))
    assert len(captions) == 2
    for number, (name, caption) in enumerate(captions.items()):
        path = Path("my_clips", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_clip(path, fps=24, num_frames=36, start=0.1 * number)
        path.with_suffix(".txt").write_text(caption)
    ran = 0
    for command in COMMANDS:
        words = shlex.split(command)
        if words[:2] == ["hf", "download"]:
            continue  # nothing is downloaded here
        assert words[0] == "moedistill", command
        with pytest.raises(SystemExit) as end:
            main([*words[1:], *(["--device", "cpu"] if words[1] == "run" else [])])
        assert end.value.code == 0, f"{command}\n{capsys.readouterr().err}"
        if words[1] == "cp":
            shrink(Path("my_wan.yaml"), model)
        ran += 1
    assert ran == 9
    index = json.loads(Path("my_set/index.json").read_text())
    assert {each["source"]: each["caption"] for each in index["samples"]} == captions
    assert Path("my_set/show/show.png").is_file()
    assert len(list(Path("videos").glob("*.mp4"))) == 2
    saved = load_recipe("runs/mine/recipe.yaml")
    assert saved.sample.points == [50, 42, 35, 17]
    # Both ways train the same samples: `kind: videos` is the command.
    one = load_recipe("runs/in_one/recipe.yaml").data
    assert one.kind == "latents"
    [cache] = Path().glob("my_clips-wan-*")
    assert [path.name for path in sorted(cache.glob("samples-*"))] == [
        path.name for path in sorted(Path("my_set").glob("samples-*"))
    ]
