"""What a run trained with, measured with and read is not needed to sample what it made; the model itself is."""

import json
import shutil

import everything_plugin
import pytest
import torch
from click.testing import CliRunner
from helpers import distil, evaluate, tiny_recipe
from saved_pipelines import PROMPT, distil_fast, pipeline_recipe, save_pipeline

import moedistill
from moedistill import cli
from moedistill.components.plugins import load_plugins
from moedistill.errors import RecipeError, UserError
from moedistill.flow.sampling_points import SampleConfig
from moedistill.recipe.loading import load_model, load_recipe
from moedistill.recipe.sampling import notes_on, sampling_sigmas
from moedistill.recipe.yaml_tree import dump_yaml
from moedistill.runs.loop import run
from moedistill.runs.sample import load_mixture, sample_run

LR = {"lr": 0.02}
PLUGIN = everything_plugin.__file__
ROUTERS = {
    "usual": {"kind": "timestep", "experts": ["semantic", "detail"], "boundaries": [{"point": 4}]},
    "halves": {"kind": "halves_too", "upper": "semantic", "lower": "detail"},
    "shares": {"kind": "shares_too", "points": {"semantic": 4, "detail": 4}},
}


def command(*args):
    return CliRunner().invoke(cli.cli, [str(arg) for arg in args], catch_exceptions=True)


def recipe_with(router="usual", **changes):
    stages = [
        distil(kind="distil", mood="eager", losses=[{"kind": "absolute"}], optimizer=LR),
        distil("detail", losses=[{"kind": "absolute"}], optimizer=LR),
        evaluate(metrics=[{"kind": "brightness"}]),
        {"name": "export", "kind": "export"},
    ]
    return tiny_recipe(stages, {"router": ROUTERS[router], "data": {"kind": "noise"}, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs of the command with the plugin, by router, and one on the plugin's backbone."""
    folder = tmp_path_factory.mktemp("runs")
    recipes = {name: recipe_with(name) for name in ROUTERS}
    recipes["twin"] = recipe_with(backbone={"kind": "twin"})
    for name, recipe in recipes.items():
        file = folder / f"{name}.yaml"
        file.write_text(dump_yaml(recipe))
        result = command("run", file, "-p", PLUGIN, "--output", folder / name, "--device", "cpu")
        assert result.exit_code == 0, result.output
    return folder


def pictures(folder):
    """All files but the mp4: of widths like these x264 does not make the same one each time."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".mp4"}


@pytest.mark.parametrize("source", [".", "checkpoints/01_detail_00000002", "export"])
def test_sampling_needs_no_plugin_of_losses_metrics_data_and_stages(finished, source, tmp_path):
    asked = ["--prompt", "3 right", "--prompt", "7 up", "--seed", 4]
    for name, options in {"with": ["-p", PLUGIN], "without": []}.items():
        result = command("sample", finished / "usual" / source, *asked, "--output", tmp_path / name, *options)
        assert result.exit_code == 0, result.output
    assert pictures(tmp_path / "with") == pictures(tmp_path / "without")
    assert set(pictures(tmp_path / "with")) == {"samples.png", "samples.webp", "samples.json"}
    videos = [
        sample_run(finished / "usual" / source, prompts=["7 up"], output=tmp_path / again, plugins=plugins).videos
        for again, plugins in (("a", load_plugins([PLUGIN])), ("b", None))
    ]
    assert torch.equal(*videos)


def test_other_steps_are_the_same_without_the_plugins_of_losses_and_stages():
    """Where jumps land is read from what is left of the stages."""
    stages = [distil(phases={"points": [6]}), distil("detail", phases={"points": [1]}), evaluate()]
    saved = load_recipe(tiny_recipe(stages)).resolved()
    whole = load_recipe(saved)
    saved["stages"][0]["losses"] = [{"kind": "absent"}]
    saved["stages"][1]["kind"] = "absent_too"
    left = load_model(saved, load_plugins())
    assert [stage.name for stage in left.stages] == ["semantic", "detail"]
    for sample in (SampleConfig(steps=5), SampleConfig(steps=3), SampleConfig(points=[8, 2])):
        assert sampling_sigmas(left, sample).equal(sampling_sigmas(whole, sample))
        assert notes_on(left, sample) == notes_on(whole, sample) != []
    assert notes_on(left, SampleConfig(steps=4)) == []


def test_the_recipe_is_whole_where_it_can_be_read(finished):
    source = finished / "usual" / "export"
    (whole, mixture), (part, same) = load_mixture(source, plugins=load_plugins([PLUGIN])), load_mixture(source)
    assert [stage.kind for stage in whole.stages] == ["distil", "consistency", "evaluate", "export"]
    assert ([stage.name for stage in part.stages], part.data) == (["semantic", "detail"], None)
    kept = ("name", "seed", "backbone", "trajectory", "router", "experts", "training", "sample")
    assert all(getattr(part, key) == getattr(whole, key) for key in kept)
    assert mixture.router == same.router


def test_a_timestep_router_of_a_missing_plugin_is_the_exported_one(finished, tmp_path):
    """Exactly its boundaries, wherever they lie."""
    videos = {
        name: sample_run(finished / "halves" / "export", output=tmp_path / name, plugins=plugins).videos
        for name, plugins in {"with": load_plugins([PLUGIN]), "without": None}.items()
    }
    assert torch.equal(videos["with"], videos["without"])
    folder = shutil.copytree(finished / "halves" / "export", tmp_path / "export")
    index = json.loads((folder / "export.json").read_text())
    index["format"] = 1  # no sums
    index["router"] |= {"boundaries": [0.7654321], "low": 0.01, "closed": "high"}
    (folder / "export.json").write_text(json.dumps(index))
    _, mixture = load_mixture(folder)
    assert mixture.router.to_dict() == index["router"]
    with pytest.raises(UserError, match="needs router 'halves_too', which is not there"):
        load_mixture(finished / "halves")  # a checkpoint has the recipe alone


def refused(source, **options):
    with pytest.raises(UserError) as error:
        load_mixture(source, **options)
    assert not isinstance(error.value, RecipeError)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_the_model_needs_is_named_in_one_line(finished, tmp_path):
    way_out = "install the package that brings it, or give its file with -p"
    export = finished / "twin" / "export"
    expected = f"{export} needs backbone 'twin' of plugin everything_plugin.py, which is not there; {way_out}"
    assert refused(export) == expected
    result = command("sample", export)
    assert (type(result.exception), str(result.exception)) == (UserError, expected)
    export = finished / "shares" / "export"
    assert "needs router 'shares_too' of plugin router_plugin, which is not there; install" in refused(export)
    checkpoint = finished / "twin" / "checkpoints" / "01_detail_00000002"
    assert refused(finished / "twin") == f"{checkpoint} needs backbone 'twin', which is not there; {way_out}"
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('boom')")
    assert "which is not there (broken plugins: " in refused(export, plugins=load_plugins([broken]))


def test_what_is_wrong_with_the_model_itself_is_told_as_ever(finished, tmp_path):
    folder = shutil.copytree(finished / "usual" / "export", tmp_path / "export")
    index = json.loads((folder / "export.json").read_text())
    index["format"] = 1
    index["recipe"]["backbone"]["wdth"] = 3
    index["recipe"]["experts"]["detail"]["from"] = "nobody"
    (folder / "export.json").write_text(json.dumps(index))
    with pytest.raises(RecipeError) as error:
        load_mixture(folder)
    assert [problem.path for problem in error.value.problems] == ["backbone.wdth", "experts.detail.from"]


def test_an_export_is_applied_without_the_plugin_of_its_loss(tmp_path):
    model = save_pipeline(tmp_path / "model", "wan")
    plugins = load_plugins([PLUGIN])
    stages = [distil_fast("semantic", losses=[{"kind": "absolute"}]), distil_fast("detail")]
    recipe = pipeline_recipe("wan", model, stages=[*stages, {"name": "export", "kind": "export"}])
    done = run(recipe, output=tmp_path / "run", device="cpu", plugins=plugins)
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    made = {}
    for name, options in {"with": {"plugins": plugins}, "without": {}, "teacher": None}.items():
        applied = moedistill.apply(pipeline, done.output / "export", **options) if options is not None else None
        generator = torch.Generator().manual_seed(0)
        size = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 4}
        made[name] = pipeline(PROMPT, generator=generator, output_type="latent", **size).frames
        if applied is not None:
            applied.undo()
    assert torch.equal(made["with"], made["without"])
    assert not torch.equal(made["with"], made["teacher"])
