"""Routers of plugins: what `validate` takes, and what it refuses before anything is trained."""

import pytest
import router_plugin
from click.testing import CliRunner
from helpers import distil, evaluate, tiny_recipe

from moedistill import cli
from moedistill.components.plugins import load_plugins
from moedistill.errors import RecipeError
from moedistill.recipe.loading import load_recipe
from moedistill.recipe.yaml_tree import dump_yaml


@pytest.fixture(scope="module")
def plugins():
    return load_plugins([router_plugin.__file__])


def recipe_with(**router):
    return tiny_recipe([distil(), distil("detail"), evaluate()], {"router": router})


def problem_of(recipe, plugins):
    with pytest.raises(RecipeError) as refused:
        load_recipe(recipe, plugins=plugins)
    [problem] = refused.value.problems
    return problem


def test_what_a_plugin_may_give(plugins, tmp_path):
    for router in ({"kind": "halves", "upper": "semantic", "lower": "detail"},
                   {"kind": "shares", "points": {"semantic": 2, "detail": 6}}):  # fmt: skip
        file = tmp_path / "recipe.yaml"
        file.write_text(dump_yaml(recipe_with(**router)))
        result = CliRunner().invoke(cli.cli, ["validate", str(file), "-p", router_plugin.__file__])
        assert result.exit_code == 0, result.output
        assert f"{file}: valid" in result.output
        assert ("2 shares" in result.output) == (router["kind"] == "shares")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("none", "gives a NoneType, which is no Router"),
        ("function", "gives a function, which is no Router"),
        ("empty", "gives segments []: there must be one Segment for each expert, and at least one"),
        ("tuples", "there must be one Segment for each expert"),
        ("overlap", "segments that overlap: 'semantic' ends at sigma 0.5, and 'detail' begins at 0.6; each must begin"),
        ("gap", "segments that leave a gap: 'semantic' ends at sigma 0.9, and 'detail' begins at 0.6; each must begin"),
        ("upside down", "begins at sigma 0.6 with 'detail'; the first segment must begin at 1"),
        ("closed", "closed: low for 'semantic' and closed: high for 'detail'; all must be closed alike"),
        ("low", "ends at sigma 0.7, without the trajectory point 1 (sigma 0.416667)"),
        ("twice", "experts ['semantic', 'semantic'] must differ"),
        ("pointless", "gives 'detail' sigma 0.998 to 0.999, with no point of the trajectory in it"),
        ("coin", "which lies in the segment of 'semantic'; expert_at must give the one expert that its segments name"),
        ("soft", "at sigma 1, which lies in the segment of 'semantic'; expert_at must give the one expert"),
        ("unwritten", "(TypeError: Object of type Segment is not JSON serializable): to_dict must give plain data"),
        ("forgetful", "which from_dict reads as other segments"),
        ("disguised", "(ValueError: not a timestep router:"),
        ("renamed", "names experts ['detail', 'semantic'], but its segments are those of ['semantic', 'detail']"),
    ],
)
def test_what_is_no_router_is_refused_by_validate(how, message, plugins):
    problem = problem_of(recipe_with(kind="useless", how=how), plugins)
    assert problem.path == "router"
    assert problem.message.startswith("router 'useless' ")
    assert message in problem.message
    assert "\n" not in problem.message
    assert problem.hint == (
        "a router chooses boundaries: let build give a TimestepRouter, or a Router with hard segments"
    )


def test_a_random_choice_of_boundaries_is_refused(plugins):
    problem = problem_of(recipe_with(kind="drawn"), plugins)
    assert "router 'drawn' gives other segments each time" in problem.message
    assert "training, sampling and export each build it" in problem.message


def test_the_other_keys_are_checked_with_it(plugins):
    """Names that an own router routes to, though its keys say nothing of experts."""
    problem = problem_of(recipe_with(kind="shares", points={"semantic": 2, "deteil": 2, "detail": 4}), plugins)
    assert (problem.path, "unknown expert 'deteil'; did you mean 'detail'" in problem.message) == ("router", True)
    recipe = tiny_recipe([distil()], {"router": {"kind": "shares", "points": {"semantic": 8}}})
    assert "expert 'detail' has no segment" in problem_of(recipe, plugins).message
    recipe = recipe_with(kind="shares", points={"semantic": 2, "detail": 6})
    recipe["stages"][0]["phases"] = 3
    assert problem_of(recipe, plugins).message == "phases: 3 for a segment of 2 points; at most 2 are possible"


def test_a_segment_across_the_teachers_boundary_is_told_without_keys_that_are_not_there(plugins):
    lora = {"kind": "lora", "rank": 2, "targets": "attention"}
    recipe = {
        "name": "two",
        "backbone": {"kind": "wan", "pretrained": None, "boundary_ratio": 0.875},
        "trajectory": {"kind": "flow_matching", "num_steps": 8, "shift": 5.0},
        "router": {"kind": "shares", "points": {"a": 5, "b": 3}},
        "experts": {"a": {**lora, "base": "transformer"}, "b": {**lora, "base": "transformer_2"}},
        "data": {"kind": "latents", "path": None},
        "stages": [distil("a"), distil("b")],
    }
    recipe["backbone"]["guidance"] = {"mode": "classifier_free", "scale": {"transformer": 4.0, "transformer_2": 3.0}}
    problem = problem_of(recipe, plugins)
    assert problem.path == "router"
    assert "the segment of 'a', points 4 to 8, lies across the teacher's boundary at sigma 0.875" in problem.message
    assert "closed: high" in problem.hint
