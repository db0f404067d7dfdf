"""Recipes: reading, merging, overriding, and every way to get one wrong."""

import copy
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import jsonschema
import pytest
import torch
import yaml

import moedistill
from moedistill import cli
from moedistill.components.fields import Component, Config, PositiveInt
from moedistill.components.plugins import load_plugins
from moedistill.errors import RecipeError
from moedistill.flow.sampling_points import SampleConfig
from moedistill.flow.trajectory import FlowMatching, Trajectory
from moedistill.losses.base import LossConfig
from moedistill.recipe.json_schema import json_schema
from moedistill.recipe.keys import Recipe
from moedistill.recipe.loading import load_recipe, shipped_recipes

GOOD = """\
name: toy
backbone: {kind: digits, pretrained: null}
trajectory: {kind: flow_matching, num_steps: 50, shift: 17.0}
router: {kind: timestep, experts: [semantic, detail], boundaries: [{point: 38}]}
experts:
  semantic: {kind: full}
  detail: {kind: lora, from: semantic, rank: 4}
data: {kind: digits}
training: {batch_size: 8, gradient_accumulation_steps: 2}
stages:
  - name: semantic
    kind: consistency
    expert: semantic
    steps: 10
    optimizer: {lr: 1e-5, betas: [0, 0.999]}
    losses: [{kind: huber, c: 1e-3}]
  - name: detail
    kind: consistency
    expert: detail
    steps: 10
    losses:
      - {kind: huber}
      - {kind: mse, weight: 2}
sample: {points: [50, 44, 38, 19]}
"""


@pytest.fixture(scope="module")
def plugins():
    plugins = load_plugins()
    plugins.components.begin("test")
    plugins.components.register("loss", "probing", ProbingConfig)
    plugins.components.register("metric", "nested", NestedConfig)
    plugins.components.register("stage", "ruled", RuledConfig)
    return plugins


@dataclass(kw_only=True)
class ProbingConfig(LossConfig):
    """A loss that wants teacher features."""

    needs_probe: ClassVar[bool] = True

    def build(self, layout):
        raise NotImplementedError


@dataclass(kw_only=True)
class RuledConfig(Config):
    """A stage with a rule about its loss."""

    name: str
    loss: Annotated[LossConfig, Component("loss")]

    def __post_init__(self):
        if self.loss.c + 1 < 0:
            raise ValueError("never")


@dataclass(kw_only=True)
class NestedConfig(Config):
    """Components wherever they may stand."""

    one: Annotated[LossConfig, Component("loss")] | None = None
    many: dict[str, list[Annotated[LossConfig, Component("loss")]]] = field(default_factory=dict)
    either: PositiveInt | Annotated[LossConfig, Component("loss")] = 3


def write(folder: Path, text: str | bytes, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def edited(*edits: tuple[str, str]) -> str:
    text = GOOD
    for old, new in edits:
        assert text.count(old) >= 1, old
        text = text.replace(old, new, 1)
    return text


def problems(plugins, source, overrides=()) -> dict[str, str]:
    """Message and hint of every problem, by path."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides, plugins)
    return {problem.path: f"{problem.message} {problem.hint}" for problem in caught.value.problems}


# -- good recipes -----------------------------------------------------------------------------------------------------


def test_values_arrive(tmp_path, plugins):
    recipe = load_recipe(write(tmp_path, GOOD), plugins=plugins)
    assert isinstance(recipe, Recipe)
    first, second = recipe.stages
    assert first.optimizer.lr == 1e-5  # a string to YAML 1.1
    assert first.optimizer.betas == (0.0, 0.999)
    assert first.losses[0].c == 1e-3
    assert [loss.kind for loss in second.losses] == ["huber", "mse"]
    assert isinstance(second.losses[1].weight, float)
    assert recipe.experts["detail"].parent == "semantic"
    assert recipe.backbone.kind == "digits"
    assert recipe.seed == 0


def test_resolved_comes_back_equal(tmp_path, plugins):
    recipe = load_recipe(write(tmp_path, GOOD.replace("trajectory", "# trajectory", 1)), plugins=plugins)
    plain = recipe.resolved()
    assert plain["trajectory"] == {
        "kind": "flow_matching", "num_steps": 50, "shift": 17.0, "num_train_timesteps": 1000, "end": "grid_min",
    }  # fmt: skip
    assert plain["experts"]["detail"]["from"] == "semantic"
    assert next(iter(plain["stages"][0])) == "kind"
    assert load_recipe(plain, plugins=plugins) == recipe
    again = load_recipe(write(tmp_path, recipe.to_yaml(), "again.yaml"), plugins=plugins)
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()
    json.dumps(plain)


def test_text_that_looks_like_a_number_survives(tmp_path, plugins):
    for text in ("1e-5", "12", "on", "null", "", "~", "1_0", "0x1F", "1:30", "2020-01-01", ".inf", "a: b", "# c"):
        recipe = load_recipe({**yaml.safe_load(GOOD), "description": text, "stages": _stages()}, plugins=plugins)
        again = load_recipe(write(tmp_path, recipe.to_yaml()), plugins=plugins)
        assert again.description == text


def _stages():
    return load_plain(GOOD)["stages"]


def load_plain(text: str) -> dict:
    return yaml.safe_load(text.replace("1e-5", "1.0e-5").replace("1e-3", "1.0e-3"))


def test_yaml_1_2_scalars(tmp_path, plugins):
    text = edited(("name: toy", "name: toy\ndescription: on"), ("weight: 2", "weight: +2E0"))
    recipe = load_recipe(write(tmp_path, text), plugins=plugins)
    assert recipe.description == "on"
    assert recipe.stages[1].losses[1].weight == 2.0


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid_and_fit_the_schema(name, plugins):
    recipe = load_recipe(name, plugins=plugins)
    assert load_recipe(f"recipes/{name}.yaml", plugins=plugins) == recipe
    validator = jsonschema.Draft202012Validator(json_schema(plugins))
    validator.validate(recipe.resolved())


def test_there_are_shipped_recipes():
    assert shipped_recipes()


def test_schema_refuses_what_recipes_refuse(plugins):
    schema = json_schema(plugins)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    good = load_recipe(load_plain(GOOD), plugins=plugins).resolved()
    assert validator.is_valid(good)
    assert validator.is_valid({"extends": "other.yaml", "seed": 3})
    for change in (
        lambda r: r.update(nmae="x"),
        lambda r: r.pop("backbone"),
        lambda r: r["stages"][0].update(stpes=3),
        lambda r: r["stages"][0].update(kind="consistancy"),
        lambda r: r["stages"][0]["optimizer"].update(lr="fast"),
        lambda r: r["stages"][0]["losses"][0].update(wieght=3.0),
    ):
        bad = json.loads(json.dumps(good))
        change(bad)
        assert not validator.is_valid(bad)


def test_components_anywhere(plugins):
    from moedistill.recipe.building import Builder
    from moedistill.recipe.yaml_tree import Node, from_data

    def build(raw):
        builder = Builder(plugins.components, from_data(raw, []))
        return builder.build(NestedConfig, raw, ()), set(builder.problems)

    config, found = build({"one": {"kind": "huber"}, "many": {"a": [{"kind": "mse"}]}, "either": {"kind": "mse"}})
    assert not found
    assert (config.one.kind, config.many["a"][0].kind, config.either.kind) == ("huber", "mse", "mse")
    assert build({"one": None, "either": 4})[0].either == 4
    _, found = build({"one": 0, "many": {"a": [{"kind": "hubr"}]}, "either": {"kind": "mse", "wait": 1}})
    assert found == {"one", "many.a.0.kind", "either.wait"}
    assert Node({}).plain() == {}


# -- extends and --set ------------------------------------------------------------------------------------------------


def test_extends(tmp_path, plugins):
    write(tmp_path, GOOD, "base.yaml")
    (tmp_path / "sub").mkdir()
    middle = "extends: ../base.yaml\ntraining: {batch_size: 16}\nexperts: {semantic: {kind: frozen}}\nseed: 1"
    write(
        tmp_path / "sub",
        middle + "\nstages: [{name: d, kind: consistency, expert: detail, steps: 1, losses: [{kind: mse}]}]",
    )
    child = "extends: sub/recipe.yaml\nseed: 2\nexperts: {detail: {rank: 8}}\nsample: null"
    recipe = load_recipe(write(tmp_path, child, "child.yaml"), plugins=plugins)
    assert recipe.seed == 2
    assert recipe.training.batch_size == 16
    assert recipe.training.gradient_accumulation_steps == 2  # merged
    assert recipe.experts["semantic"].kind == "frozen"  # replaced whole
    assert (recipe.experts["detail"].rank, recipe.experts["detail"].parent) == (8, "semantic")
    assert [stage.name for stage in recipe.stages] == ["d"]  # lists are replaced
    assert recipe.sample is None


def test_another_kind_replaces_the_mapping(tmp_path, plugins):
    write(tmp_path, GOOD, "base.yaml")
    child = "extends: base.yaml\ntrajectory: {kind: points, sigmas: [0, 0.5, 0.8, 1]}\n"
    child += "router: {boundaries: [{point: 2}]}\nsample: {points: [3, 2]}"
    recipe = load_recipe(write(tmp_path, child), plugins=plugins)
    assert recipe.trajectory.sigmas == [0, 0.5, 0.8, 1]


EXTENDED = """\
router: {experts: [student], boundaries: []}
experts: {student: {kind: full}, semantic: null, detail: null}
stages: {semantic: null, detail: {expert: student, losses: {mse: null, huber: {c: 0.5}}}}
"""


def extended(tmp_path, plugins, child):
    write(tmp_path, GOOD, "base.yaml")
    return load_recipe(write(tmp_path, "extends: base.yaml\n" + child, "child.yaml"), plugins=plugins)


def test_null_takes_a_component_out(tmp_path, plugins):
    """And a mapping over a list changes the items that it names, by their name or kind."""
    recipe = extended(tmp_path, plugins, EXTENDED)
    assert list(recipe.experts) == ["student"]
    [stage] = recipe.stages
    assert (stage.name, stage.expert, stage.steps) == ("detail", "student", 10)
    assert [(loss.kind, loss.c) for loss in stage.losses] == [("huber", 0.5)]
    # Where null is a value it stays one.
    assert extended(tmp_path, plugins, "training: {checkpoint_every: null}").training.checkpoint_every is None
    # A list over a list replaces it; items go by number, too.
    changed = extended(tmp_path, plugins, "router: {boundaries: {0: {point: 30}}}\nsample: {points: [50, 30]}")
    assert (changed.router.boundaries[0].point, changed.sample.points) == (30, [50, 30])


def test_a_list_in_an_item_s_place_repeats_it(tmp_path, plugins):
    child = "stages: {semantic: [{name: one, steps: 1}, {}, {name: three, losses: {huber: {c: 0.5}}}]}"
    recipe = extended(tmp_path, plugins, child)
    stages = [(stage.name, stage.steps, stage.losses[0].c) for stage in recipe.stages]
    assert stages == [("one", 1, 0.001), ("semantic", 10, 0.001), ("three", 10, 0.5), ("detail", 10, 0.001)]
    # They are separate: an override changes one of them.
    file = write(tmp_path, "extends: base.yaml\n" + child, "child.yaml")
    recipe = load_recipe(file, ["stages.one.optimizer.lr=0.5"], plugins=plugins)
    assert [stage.optimizer.lr for stage in recipe.stages[:3]] == [0.5, 1e-5, 1e-5]


@pytest.mark.parametrize(
    ("child", "path", "message"),
    [
        ("stages: {sematnic: {steps: 3}}", "stages.sematnic", "did you mean 'semantic'"),
        ("stages: {semantic: {losses: {mse: null}}}", "stages.semantic.losses.mse", "no item 'mse'"),
        ("stages: {semantic: {steps: 3}, 0: {steps: 4}}", "stages.0", "named twice"),
        ("experts: {detial: null}", "experts.detial", "null is not a expert"),
        ("training: null", "training", ""),
    ],
)
def test_changes_that_cannot_be(tmp_path, plugins, child, path, message):
    with pytest.raises(RecipeError) as caught:
        extended(tmp_path, plugins, child)
    [found, *_] = [problem for problem in caught.value.problems if problem.path == path]
    assert message in found.message
    assert found.where == f"{tmp_path / 'child.yaml'}:2"


def test_extends_in_a_circle_and_missing(tmp_path, plugins):
    write(tmp_path, "extends: b.yaml\n" + GOOD, "a.yaml")
    write(tmp_path, "extends: a.yaml\n", "b.yaml")
    assert "circle: a.yaml → b.yaml → a.yaml" in problems(plugins, tmp_path / "a.yaml")["extends"]
    path = write(tmp_path, "extends: none.yaml\n" + GOOD)
    assert "No such file" in problems(plugins, path)["extends"]
    assert "path of a recipe" in problems(plugins, write(tmp_path, "extends: [a]\n" + GOOD))["extends"]


def test_line_of_an_inherited_mistake(tmp_path, plugins):
    write(tmp_path, GOOD.replace("rank: 4", "rnk: 4"), "base.yaml")
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, "extends: base.yaml\nseed: 2"), plugins=plugins)
    [problem] = caught.value.problems
    assert problem.where == f"{tmp_path / 'base.yaml'}:7"


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("stages.detail.steps=3", lambda r: r.stages[1].steps == 3),
        ("stages.0.steps=4", lambda r: r.stages[0].steps == 4),
        ("stages.detail.losses.mse.weight=1e-2", lambda r: r.stages[1].losses[1].weight == 0.01),
        ("stages.detail.losses=[{kind: mse}]", lambda r: len(r.stages[1].losses) == 1),
        ("stages.detail.losses.0={kind: mse}", lambda r: r.stages[1].losses[0].kind == "mse"),
        ("training.log_every=7", lambda r: r.training.log_every == 7),  # known, though not in the file
        ("stages.semantic.optimizer.betas.0=0.5", lambda r: r.stages[0].optimizer.betas == (0.5, 0.999)),
        ("stages.detail.optimizer.max_grad_norm=null", lambda r: r.stages[1].optimizer.max_grad_norm is None),
        ("description=a=b", lambda r: r.description == "a=b"),
    ],
)
def test_overrides(tmp_path, plugins, override, read):
    assert read(load_recipe(write(tmp_path, GOOD), [override], plugins))


@pytest.mark.parametrize(
    ("override", "path", "fragments"),
    [
        ("stages.detail.stpes=3", "stages.1.stpes", ["did you mean 'steps'"]),
        ("trainin.log_every=7", "trainin", ["did you mean 'training'"]),
        ("stages.detal.steps=3", "stages.detal", ["no item 'detal'", "did you mean 'detail'"]),
        ("stages.9.steps=3", "stages.9", ["0 to 1"]),
        ("name.first=x", "name.first", ["'toy'", "has no keys"]),
        ("steps", "", ["a.b.c=value"]),
        ("stages.0.steps=", "stages.0.steps", ["no value"]),
        ("stages.0.steps=[", "", ["not valid YAML"]),
        ("stages.0.steps=1e3", "stages.0.steps", ["an integer", "write 1000"]),
        ("seed=.nan", "seed", ["not a finite number"]),
    ],
)
def test_bad_overrides(tmp_path, plugins, override, path, fragments):
    found = problems(plugins, write(tmp_path, GOOD), [override])
    assert list(found) == [path]
    assert all(fragment in found[path] for fragment in fragments), found


def test_an_override_of_an_item_where_there_are_none(tmp_path, plugins):
    found = problems(plugins, write(tmp_path, GOOD), ["stages=[]", "stages.0.steps=3"])
    assert found["stages.0"].strip() == "no item '0'; allowed: none"


def test_an_override_names_itself(tmp_path, plugins):
    with pytest.raises(RecipeError, match=r"--set stages\.detail\.stpes=3: stages\.1\.stpes"):
        load_recipe(write(tmp_path, GOOD), ["stages.detail.stpes=3"], plugins)


# -- bad recipes ------------------------------------------------------------------------------------------------------

PROBE = "the teacher's features"
CASES = {
    "unknown key": ([("rank: 4", "rnk: 4")], "experts.detail.rnk", ["unknown key 'rnk'", "mean 'rank'", "alpha"]),
    "unknown top key": ([("name: toy", "name: toy\nexprts: {}")], "exprts", ["mean 'experts'"]),
    "key in the wrong place": ([("steps: 10", "steps: 10\n    lr: 1e-4")], "stages.0.lr", ["inside 'optimizer'"]),
    "misspelt loss": ([("huber, c", "hubr, c")], "stages.0.losses.0.kind", ["'hubr'", "mean 'huber'", "mse"]),
    "misspelt stage": ([("consistency", "consistancy")], "stages.0.kind", ["mean 'consistency'"]),
    "misspelt backbone": ([("digits", "digts")], "backbone.kind", ["'digts'", "mean 'digits'"]),
    "misspelt choice": (
        [("shift: 17.0", "shift: 17.0, end: zreo")], "trajectory.end", ["'zreo'", "mean 'zero'", "grid_min"],
    ),
    "no kind": ([("{kind: huber, c", "{c")], "stages.0.losses.0.kind", ["missing", "huber"]),
    "a name for a component": ([("[{kind: huber, c: 1e-3}]", "[huber]")], "stages.0.losses.0", ["{kind: huber}"]),
    "text for a number": ([("1e-5", "fast")], "stages.0.optimizer.lr", ["must be a number", "'fast'"]),
    "quoted number": ([("1e-5", "'1e-5'")], "stages.0.optimizer.lr", ["leave the quotes away"]),
    "true for a number": ([("shift: 17.0", "shift: true")], "trajectory.shift", ["must be a number, not true"]),
    "true for an integer": ([("steps: 10", "steps: true")], "stages.0.steps", ["must be an integer, not true"]),
    "NaN": ([("1e-5", ".nan")], "stages.0.optimizer.lr", [".nan is not a finite number"]),
    "infinity": ([("shift: 17.0", "shift: 1e999")], "trajectory.shift", ["1e999 is not a finite number"]),
    "huge integer": ([("rank: 4", "rank: 1" + "0" * 30)], "experts.detail.rank", ["64 bits"]),
    "float for an integer": ([("steps: 10", "steps: 1e3")], "stages.0.steps", ["must be an integer", "write 1000"]),
    "tiny float for an integer": ([("steps: 10", "steps: 1e-5")], "stages.0.steps", ["an integer", "1e-05"]),
    "float for text": ([("name: toy", "name: 1e-5")], "name", ["must be text", "quotes: '1e-05'"]),
    "negative": ([("rank: 4", "rank: -4")], "experts.detail.rank", ["greater than 0", "-4"]),
    "above 1": ([("[0, 0.999]", "[0, 1.5]")], "stages.0.optimizer.betas.1", ["less than 1", "1.5"]),
    "too few": ([("[0, 0.999]", "[0.5]")], "stages.0.optimizer.betas.1", ["list is too short"]),
    "missing key": ([("    steps: 10\n", "")], "stages.0.steps", ["'steps' is missing"]),
    "mapping for a list": ([("[{kind: huber, c: 1e-3}]", "{kind: huber}")], "stages.0.losses", ["a list", "dash"]),
    "no stages": ([(GOOD[GOOD.index("stages:") :], "stages: []")], "stages", ["at least 1"]),
    "duplicate key": ([("steps: 10", "steps: 10\n    steps: 11")], "stages.0.steps", ["duplicate", "in line 14"]),
    "python tag": ([("toy", "!!python/object/apply:os.system [echo]")], "name", ["!!python", "not allowed"]),
    "custom tag": ([("toy", "!env HOME")], "name", ["tag !env is not allowed"]),
    "merge key": ([("rank: 4", "rank: 4, <<: {alpha: 3}")], "experts.detail", ["merge keys"]),
    "alias in itself": ([("name: toy", "name: toy\ndata2: &a [*a]")], "data2.0", ["contains itself"]),
    "expert without segment": (
        [("experts:\n", "experts:\n  third: {kind: full}\n")], "experts.third", ["no segment", "router.experts"],
    ),
    "experts without router": ([("router: {", "# router: {")], "router", ["missing", "semantic, detail"]),
    "unknown routed expert": ([("[semantic, detail]", "[semantic, detial]")], "router.experts.1", ["mean 'detail'"]),
    "unordered boundaries": (
        [("[semantic, detail]", "[semantic, detail, teacher]"), ("[{point: 38}]", "[{point: 9}, {point: 38}]")],
        "router.boundaries", ["[9, 38]", "descend"],
    ),
    "overlapping boundaries": (
        [("[semantic, detail]", "[semantic, detail, teacher]"), ("[{point: 38}]", "[{point: 9}, {point: 9}]")],
        "router.boundaries", ["[9, 9]", "descend"],
    ),
    "boundary outside": ([("point: 38", "point: 51")], "router.boundaries", ["51", "0 to 50"]),
    "boundary in two units": ([("{point: 38}", "{point: 38, sigma: 0.9}")], "router.boundaries.0", ["exactly one"]),
    "too few boundaries": ([("[{point: 38}]", "[]")], "router", ["2 experts need 1 boundaries"]),
    "reserved expert": ([("experts:\n", "experts:\n  teacher: {kind: full}\n")], "experts.teacher", ["reserved"]),
    "unknown parent": ([("from: semantic", "from: sematic")], "experts.detail.from", ["mean 'semantic'"]),
    "parents in a circle": (
        [("semantic: {kind: full}", "semantic: {kind: full, from: detail}")], "experts.semantic.from", ["circle"],
    ),
    "unknown trained expert": ([("expert: detail", "expert: detial")], "stages.1.expert", ["mean 'detail'"]),
    "trained teacher": ([("expert: detail", "expert: teacher")], "stages.1.expert", ["never trained"]),
    "trained frozen expert": (
        [("{kind: lora, from: semantic, rank: 4}", "{kind: frozen}")], "stages.1.expert", ["frozen"],
    ),
    "parent trained later": (
        [("expert: semantic", "expert: x"), ("expert: detail", "expert: semantic"), ("expert: x", "expert: detail")],
        "stages.0.expert", ["starts from 'semantic'", "later", "order"],
    ),
    "same stage name": ([("- name: detail", "- name: semantic")], "stages.1.name", ["'semantic'", "stage 0"]),
    "stage name with a dot": ([("- name: detail", "- name: a.b")], "stages.1.name", ["letters"]),
    "name with a slash": ([("name: toy", "name: ../toy")], "name", ["folder"]),
    "loss without probe": ([("mse, weight: 2", "probing")], "stages.1.losses.1", [PROBE, "probe: {block_stride: 2}"]),
    "no data": ([("data: {kind: digits}", "data: null")], "data", ["missing", "stages.0", "latents"]),
    "accumulation": (
        [("steps: 2}", "steps: 3}")], "training.gradient_accumulation_steps", ["3 does not divide batch_size 8"],
    ),
    "sample outside": ([("[50, 44", "[51, 44")], "sample.points", ["51", "0 to 50"]),
    "sample ascending": ([("[50, 44, 38", "[50, 38, 44")], "sample.points", ["descend"]),
    "sample in two units": ([("sample: {", "sample: {steps: 4, ")], "sample", ["exactly one", "points and steps"]),
    "stage's own check": ([("huber, c", "huber, weight: 0, c")], "stages.0.losses", ["step 0"]),
    "stages as a mapping": ([(GOOD[GOOD.index("stages:") :], "stages: {semantic: {steps: 3}}")], "stages", ["a list"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_recipe(tmp_path, plugins, case, capsys, monkeypatch):
    edits, path, fragments = CASES[case]
    file = write(tmp_path, edited(*edits))
    # Through the command: one screen, no traceback, exit code 2.
    monkeypatch.setattr("moedistill.components.plugins.load_plugins", lambda files=(): plugins)
    with pytest.raises(SystemExit) as stop:
        cli.main(["validate", str(file)])
    output = capsys.readouterr().err
    assert stop.value.code == 2
    assert len(output.splitlines()) <= 24
    assert "Traceback" not in output
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, plugins=plugins)
    [problem] = [problem for problem in caught.value.problems if problem.path == path]
    text = f"{problem.message} {problem.hint}"
    assert all(fragment in text for fragment in fragments), text
    assert problem.where.startswith(str(file))
    words = " ".join(output.split())
    assert all(" ".join(fragment.split()) in words for fragment in [path, *fragments])


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("experts without router", "no data")])
def test_a_mistake_brings_no_others(tmp_path, plugins, case):
    edits, path, _ = CASES[case]
    found = set(problems(plugins, write(tmp_path, edited(*edits)))) - {path}
    # Consequences that are problems of their own.
    expected = {
        "alias in itself": {"data2"},
        "parents in a circle": {"experts.detail.from", "stages.0.expert"},
        "trained frozen expert": set(),
        "reserved expert": set(),
    }
    assert found == expected.get(case, set())


@pytest.mark.parametrize("written", ["nan", "inf", "'1e999'", "1_000", "１"])
def test_no_quotes_are_blamed_where_their_absence_would_not_help(tmp_path, plugins, written):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, edited(("1e-5", written))), plugins=plugins)
    [problem] = caught.value.problems
    assert problem.message.startswith("must be a number, not ")
    assert problem.hint == ""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"# nothing\n", "empty"),
        (b"\x00\x01\x02\xff\xfe" * 30, "not a text file"),
        (b"name: caf\xe9", "not UTF-8"),
        (b"\x89PNG\r\n\x1a\n\x00", "not a text file"),
        (b"just words", "a recipe is a mapping"),
        (b"- 1\n- 2", "a recipe is a mapping"),
        (b"name: [1, 2", "not valid YAML"),
        (b"a: b: c", "not valid YAML"),
        (b"a: 1\n---\nb: 2", "single document"),
        (b"[" * 5000, "nested too deeply"),
        (b"x" * 300_000, "larger than"),
        (b"a: *nothing", "undefined alias"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, plugins, data, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, data), plugins=plugins)
    [problem] = caught.value.problems
    assert message in problem.message


def test_aliases_of_aliases_end(tmp_path, plugins):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 10)]
    assert any(
        "too many values" in message for message in problems(plugins, write(tmp_path, "\n".join(lines))).values()
    )


def test_missing_file_names_the_nearest(plugins, tmp_path):
    name = next(iter(shipped_recipes()))
    assert f"did you mean the shipped recipe {name!r}" in problems(plugins, name + "x")[""]
    assert "no file" in problems(plugins, tmp_path / "none.yaml")[""]
    assert "cannot read" in problems(plugins, tmp_path)[""]
    assert problems(plugins, "a\0b")
    assert problems(plugins, "x" * 5000)


def test_all_problems_at_once(tmp_path, plugins):
    text = edited(
        ("name: toy", "nmae: toy"),
        ("shift: 17.0", "shift: true"),
        ("rank: 4", "rank: 4.5"),
        ("[semantic, detail]", "[semantic, detial]"),
        ("steps: 10", "steps: .inf"),
        ("huber, c", "hubr, c"),
        ("expert: detail", "expert: detial"),
        ("mse, weight: 2", "probing, wieght: 2"),
        ("steps: 2}", "steps: 3}"),
        ("data: {kind: digits}", "data: {kind: digit}"),
        ("sample: {", "seed: 1\nseed: 2\nsample: {"),
    )
    assert set(problems(plugins, write(tmp_path, text))) == {
        "nmae", "name", "trajectory.shift", "experts.detail.rank", "router.experts.1", "experts.detail",
        "stages.0.steps", "stages.0.losses.0.kind", "stages.1.expert", "stages.1.losses.1.wieght",
        "stages.1.losses.1", "training.gradient_accumulation_steps", "data.kind", "seed",
    }  # fmt: skip


def test_rules_between_fields_wait_for_the_fields(tmp_path, plugins):
    text = edited(("points: [50, 44, 38, 19]", "points: .nan"))
    assert set(problems(plugins, write(tmp_path, text))) == {"sample.points"}
    # The loss is a stand-in here: what the rule does with it, AttributeError too, is no problem of the recipe's.
    data = {**load_plain(GOOD), "stages": [{"name": "s", "kind": "ruled", "loss": {"kind": "huber", "c": -1}}]}
    assert "stages.0.loss.c" in problems(plugins, data)
    assert "stages.0" not in problems(plugins, data)


def test_problems_come_in_the_order_of_the_file(tmp_path, plugins):
    text = edited(("name: toy", "nmae: toy"), ("rank: 4", "rank: 0"), ("sample: {", "seed: 1\nseed: 2\nsample: {"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text), ["training.log_every=0"], plugins)
    paths = [problem.path for problem in caught.value.problems]
    assert paths == ["name", "nmae", "experts.detail.rank", "seed", "training.log_every"]


def test_many_problems_fit_one_screen(tmp_path, plugins):
    text = GOOD + "".join(f"key{k}: 1\n" for k in range(100))
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text), plugins=plugins)
    lines = str(caught.value).splitlines()
    assert len(caught.value.problems) == 100
    assert len(lines) <= 24
    shown = sum("unknown key" in line for line in lines)
    assert lines[-1].strip() == f"… and {100 - shown} more"


def test_plain_data_is_checked_too(plugins):
    good = load_plain(GOOD)
    assert load_recipe(good, plugins=plugins).name == "toy"
    found = problems(plugins, {**good, "seed": float("nan"), "name": Path("x"), "description": {1, 2}})
    assert set(found) == {"seed", "name", "description"}
    assert problems(plugins, {})
    circle: dict = {}
    circle.update(a=circle, b=circle)
    assert any("too" in message for message in problems(plugins, circle).values())


def test_a_broken_component_is_a_problem_of_the_recipe(tmp_path):
    plugins = load_plugins()
    plugins.components.begin("bad_plugin")
    plugins.components.register("loss", "gone", "no_such_module:Loss")
    plugins.components.register("loss", "no_config", object)
    text = edited(("kind: huber, c: 1e-3", "kind: gone"), ("mse, weight: 2", "no_config"))
    found = problems(plugins, write(tmp_path, text))
    assert "'bad_plugin' cannot be loaded" in found["stages.0.losses.0.kind"]
    assert "ModuleNotFoundError" in found["stages.0.losses.0.kind"]
    assert "must be a dataclass" in found["stages.1.losses.1.kind"]


# -- fuzz: whatever the file holds, the answer is a recipe or a RecipeError -------------------------------------------


def _survives(plugins, path: Path | dict) -> None:
    text = "1 problem"
    try:
        load_recipe(path, plugins=plugins)
    except RecipeError as error:
        text = str(error)
    assert "problem" in text
    assert len(text.splitlines()) <= 24


def test_random_bytes(tmp_path, plugins):
    draw = random.Random(0)
    for _ in range(100):
        size = draw.choice([1, 3, 10, 100, 1000])
        alphabet = draw.choice([bytes(range(256)), b"{}[]:,-&*!|>'\"%@#? \n\tab1", b'"\\uUx0123456789dDfF\n '])
        _survives(plugins, write(tmp_path, bytes(draw.choice(alphabet) for _ in range(size))))


def test_random_changes_of_the_text(tmp_path, plugins):
    draw = random.Random(1)
    for _ in range(150):
        text = bytearray(GOOD.encode())
        for _ in range(draw.choice([1, 1, 2, 5])):
            at = draw.randrange(len(text))
            change = draw.randrange(3)
            if change == 0:
                del text[at : at + draw.choice([1, 5, 40])]
            elif change == 1:
                text[at:at] = bytes([draw.randrange(256)])
            else:
                text[at:at] = draw.choice([b"null", b": ", b"- ", b"[", b"1e400", b"\\ud800", b"!!", b"\n", b"<<: "])
        _survives(plugins, write(tmp_path, bytes(text)))


STRANGE = [
    None, True, 0, -1, 3, 1e300, -0.5, 2**62, "", "x", "semantic", "teacher", [], {}, [1], [[]], {"kind": "mse"},
    {"kind": None}, {"kind": "lora"}, {"a": {"b": []}}, ["detail"], [{"point": 3}], "\ud800", "\0", "é" * 500,
]  # fmt: skip


def test_random_values_in_random_places(tmp_path, plugins):
    draw = random.Random(2)
    for _ in range(400):
        data = json.loads(json.dumps(load_plain(GOOD)))
        for _ in range(draw.choice([1, 2, 4])):
            _replace_something(draw, data)
        _survives(plugins, data)


def _replace_something(draw: random.Random, data) -> None:
    while True:
        keys = list(data) if isinstance(data, dict) else list(range(len(data)))
        if not keys:
            return
        key = draw.choice(keys)
        if isinstance(data[key], dict | list) and data[key] and draw.random() < 0.7:
            data = data[key]
            continue
        if isinstance(data, dict) and draw.random() < 0.2:
            data[draw.choice(["", "x", "kind", "name", "from"])] = copy.deepcopy(draw.choice(STRANGE))
        else:
            data[key] = copy.deepcopy(draw.choice(STRANGE))
        return


# -- sampling steps ---------------------------------------------------------------------------------------------------


def test_sample_steps():
    trajectory = FlowMatching(num_steps=50, shift=17.0).build()
    points = trajectory.points
    assert (
        SampleConfig(points=[50, 44, 38, 19])
        .resolve(trajectory)
        .equal(torch.cat([points[[50, 44, 38, 19]], torch.zeros(1)]))
    )
    assert SampleConfig(steps=4).resolve(trajectory).equal(torch.cat([points[[50, 38, 25, 13]], torch.zeros(1)]))
    assert len(SampleConfig(steps=50).resolve(trajectory)) == 51
    near = SampleConfig(sigmas=[1.0, 0.9818, 0.9125, 0])
    assert near.resolve(trajectory).equal(torch.cat([points[[50, 38, 19]], torch.zeros(1)]))
    assert near.notes(trajectory)[1] == "sample sigma 0.9818 means point 38 (sigma 0.981763)"
    assert SampleConfig(timesteps=[1000, 981.8]).resolve(trajectory)[1] == points[38]
    assert SampleConfig(points=[50]).resolve(trajectory).dtype == torch.float32
    between = SampleConfig(sigmas=[1.0, 0.5 * (points[38] + points[39]).item()])
    assert between.resolve(trajectory)[1] == torch.tensor(between.sigmas[1])
    assert "as it is" in between.notes(trajectory)[1]


@pytest.mark.parametrize(
    "sample", [{"points": [38, 50]}, {"points": [50, 50]}, {"sigmas": [0]}, {"steps": 51}, {"points": [51]}]
)
def test_sample_steps_refused(sample):
    with pytest.raises(ValueError):
        SampleConfig(**sample).resolve(Trajectory.flow_matching())


def test_public_name():
    assert moedistill.load_recipe is load_recipe


# -- what is left to the backbone, and guidance that oscillates -------------------------------------------------------


def test_a_shift_left_to_a_backbone_without_one_is_refused_with_the_way_out(tmp_path, plugins):
    found = problems(plugins, write(tmp_path, GOOD), ["trajectory.shift=auto"])
    assert list(found) == ["trajectory"]
    assert "shift: auto: the backbone gives no shift of its own; give a number, such as 17.0" in found["trajectory"]


def test_guidance_that_oscillates_needs_two_forwards_and_our_own_sampler():
    found = problems(None, "dcm_digits", ["backbone.guidance={mode: none, oscillate_from: 10}"])
    assert "oscillate_from 10 needs mode: classifier_free" in found["backbone.guidance"]
    guidance = "backbone.guidance={mode: classifier_free, scale: 5.0, oscillate_from: 10}"
    found = problems(None, "dcm_wan_1_3b", [guidance])
    assert "the model's own pipeline guides all its steps alike" in found["backbone.guidance.oscillate_from"]
    assert load_recipe("dcm_digits", [guidance]).backbone.guidance.oscillate_from == 10
