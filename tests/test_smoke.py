"""Every shipped recipe is valid and runs as a miniature, through all of its stages."""

import json

import pytest

from moedistill.recipe import load_recipe, shipped_recipes
from moedistill.smoke import miniature
from moedistill.stages.base import TrainingStageConfig
from moedistill.train import run

RECIPES = sorted(shipped_recipes())


def test_recipes_are_found():
    assert {"dcm_digits", "digits_teacher"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_runs_in_miniature(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name.rpartition("/")[2]
    assert recipe.description, "it is what `moedistill list` shows"
    result = run(recipe, smoke=True, output=tmp_path, device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    training = [stage for stage in miniature(recipe).stages if isinstance(stage, TrainingStageConfig)]
    assert [(line["stage"], line["step"]) for line in lines] == [
        (stage.name, step) for stage in training for step in range(1, stage.steps + 1)
    ]
    others = {stage.name for stage in recipe.stages} - {stage.name for stage in training}
    assert set(result.metrics) == others
    assert all((tmp_path / name).is_dir() for name in others)
    assert result.smoke


@pytest.mark.parametrize("name", RECIPES)
def test_a_miniature_leaves_nothing_out(name):
    recipe = load_recipe(name)
    small = miniature(recipe)
    assert [(stage.name, stage.kind) for stage in small.stages] == [(stage.name, stage.kind) for stage in recipe.stages]
    assert small.experts == recipe.experts
    assert small.router == recipe.router
    assert small.training.batch_size <= recipe.training.batch_size
    for stage, tiny in zip(recipe.stages, small.stages, strict=True):
        if isinstance(stage, TrainingStageConfig):
            assert (tiny.losses, tiny.optimizer, tiny.probe) == (stage.losses, stage.optimizer, stage.probe)
            assert tiny.steps <= 3
