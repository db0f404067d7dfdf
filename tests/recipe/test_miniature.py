"""Shipped recipes run as miniatures, through all of their stages: so many of them that everything they name is used.

Every recipe is valid (see test_recipe.py) and keeps all of its parts as a miniature.
"""

import json

import pytest

from moedistill.components.plugins import load_plugins
from moedistill.recipe.keys import TrainingStageConfig
from moedistill.recipe.loading import load_recipe, shipped_recipes
from moedistill.recipe.miniature import miniature
from moedistill.runs.loop import run

RECIPES = sorted(shipped_recipes())
RUN = [
    "dcm_digits",
    "digits_teacher",
    "dcm_cogvideox_2b_1gpu",
    "dcm_cogvideox_5b",
    "dcm_hunyuan",
    "dcm_hunyuan_1gpu",
    "dcm_ltx",
    "dcm_open_sora",
    "dcm_open_sora_1gpu",
    "dcm_wan22_a14b",
    "dcm_wan_1_3b",
    "baselines/cogvideox_5b_progressive",
    "baselines/digits_few_step_teacher",
    "baselines/digits_lcm",
    "baselines/hunyuan_pcm_edges",
    "baselines/ltx_pcm",
    "baselines/wan_1_3b_progressive",
    "ablations/digits_end_zero",
    "ablations/digits_fm_hidden",
    "ablations/digits_gan_data",
    "ablations/digits_semantic_lora",
    "ablations/digits_three_experts",
    "ablations/digits_two_full_experts",
    "ablations/digits_unclipped_hinge",
    "ablations/digits_without_copies",
]
"""Each uses something that no other does."""

FREE = {"name", "description", "prompts", "path", "pretrained", "negative_prompt", "reference", "expert", "from"}
"""Keys whose values are words of the recipe's own."""


def test_recipes_are_found():
    assert {"dcm_digits", "digits_teacher", "baselines/digits_lcm", "ablations/digits_without_tc"} <= set(RECIPES)
    assert set(RUN) <= set(RECIPES)


def uses(value, path=""):
    """Every option of resolved data with its value, of numbers only whether they are 0, 1 or another."""
    if isinstance(value, dict):
        path = f"{path}[{value['kind']}]" if "kind" in value else path
        for key, item in value.items():
            if key not in FREE:
                yield from uses(item, f"{path}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from uses(item, path)
    else:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        yield f"{path} = {'number' if number and value not in (0, 1) else value}"


def uses_of(recipe):
    """What a recipe uses: options of its components, and which experts together on which backbone."""
    plain = recipe.resolved()
    experts = plain.pop("experts").values()
    plain["router"] = plain["router"] and {**plain["router"], "experts": len(experts)}
    together = "+".join(sorted(expert["kind"] for expert in experts)) or "no expert"
    return {*uses({**plain, "experts": list(experts)}), f"{recipe.backbone.kind} with {together}"}


def test_what_recipes_use_is_run_and_nothing_is_run_in_vain():
    plugins = load_plugins()
    used = {name: uses_of(load_recipe(name, plugins=plugins)) for name in RECIPES}
    everything = set().union(*used.values())
    assert everything - set().union(*(used[name] for name in RUN)) == set(), "add a recipe that uses it to RUN"
    for name in RUN:
        others = set().union(*(used[other] for other in RUN if other != name))
        assert used[name] - others, f"{name} uses nothing that the others do not"


@pytest.mark.parametrize("name", RUN)
def test_a_shipped_recipe_runs_in_miniature(name, tmp_path):
    recipe = load_recipe(name)
    result = run(recipe, smoke=True, output=tmp_path, device="cpu")
    training = [stage for stage in miniature(recipe).stages if isinstance(stage, TrainingStageConfig)]
    if training:
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [(line["stage"], line["step"]) for line in lines if line["step"]] == [
            (stage.name, step) for stage in training for step in range(1, stage.steps + 1)
        ]
    others = {stage.name for stage in recipe.stages} - {stage.name for stage in training}
    assert set(result.metrics) == others
    assert all((tmp_path / name).is_dir() for name in others)
    assert result.smoke


@pytest.mark.parametrize("name", RECIPES)
def test_a_miniature_leaves_nothing_out(name):
    recipe = load_recipe(name)
    assert recipe.name == name.rpartition("/")[2]
    assert recipe.description, "it is what `moedistill list` shows"
    small = miniature(recipe)
    assert [(stage.name, stage.kind) for stage in small.stages] == [(stage.name, stage.kind) for stage in recipe.stages]
    assert small.experts == recipe.experts
    assert small.router == recipe.router
    assert small.training.batch_size <= recipe.training.batch_size
    for stage, tiny in zip(recipe.stages, small.stages, strict=True):
        if isinstance(stage, TrainingStageConfig):
            assert (tiny.losses, tiny.optimizer, tiny.probe) == (stage.losses, stage.optimizer, stage.probe)
            assert tiny.steps <= 3
