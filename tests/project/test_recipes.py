"""Baselines and ablations: equal budgets, equal evaluations, and nothing changed but what a recipe's name says."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from helpers import distil, tiny_recipe

from moedistill import hookimpl
from moedistill.components.plugins import load_plugins
from moedistill.flow.phases import landing_points
from moedistill.recipe.keys import TrainingStageConfig
from moedistill.recipe.loading import load_recipe, shipped_recipes
from moedistill.recipe.miniature import miniature
from moedistill.recipe.sampling import landings
from moedistill.runs.loop import run
from moedistill.stages.evaluate import fingerprint

RECIPES = shipped_recipes()
BASELINES = sorted(name for name in RECIPES if name.startswith("baselines/"))
ABLATIONS = sorted(name for name in RECIPES if name.startswith("ablations/"))
STUDENTS = ("lcm", "pcm", "pcm_edges", "progressive")
PARENTS = {"digits": "evidence_digits", **{m: f"dcm_{m}" for m in ("hunyuan", "wan_1_3b", "cogvideox_5b", "ltx")}}
"""Models, and the recipe of DCM on each."""


@cache
def recipe(name):
    return load_recipe(name, plugins=plugins())


@cache
def plugins():
    return load_plugins()


def training(recipe):
    return [stage for stage in recipe.stages if isinstance(stage, TrainingStageConfig)]


def test_all_are_there():
    students = {f"baselines/{model}_{student}" for model in PARENTS for student in STUDENTS}
    assert set(BASELINES) == students | {
        f"baselines/digits_{n}" for n in ("few_step_teacher", "two_phase", "one_phase")
    }
    assert set(ABLATIONS) == {f"ablations/digits_{name}" for name in CHANGES} | {"ablations/base"}


@pytest.mark.parametrize("name", [*BASELINES, *ABLATIONS])
def test_recipes_are_short_and_say_where_they_come_from(name):
    lines = RECIPES[name].read_text().splitlines()
    assert len(lines) <= (30 if "digits" in name or name == "ablations/base" else 12)
    assert lines[0].startswith("# ")
    assert any("arXiv" in line for line in lines[:2]) or name == "baselines/digits_few_step_teacher"
    assert sum(line.startswith("extends: ") for line in lines) == 1


# -- budgets ----------------------------------------------------------------------------------------------------------


@cache
def forwards_per_step(name, output):
    """Samples that a network evaluates for each sample of a step, by stage: counted in one step of a miniature."""
    small = miniature(recipe(name))
    small = replace(
        small,
        stages=[stage.replace(steps=1) for stage in training(small)],
        training=replace(small.training, monitor=None),
    )
    cost = run(small, output=output / name, device="cpu", plugins=plugins()).cost
    return {stage: spent["forwards"] / spent["steps"] / small.training.batch_size for stage, spent in cost.items()}


@pytest.fixture(scope="module")
def forwards(tmp_path_factory):
    """Of a recipe's whole training, for each sample of a batch."""
    output = tmp_path_factory.mktemp("forwards")

    def total(name, counted=None):
        per_step = forwards_per_step(counted or name, output)
        if counted is not None:  # of a recipe whose one stage costs the same
            [per_step] = per_step.values()
            return sum(stage.steps * per_step for stage in training(recipe(name)))
        return sum(stage.steps * per_step[stage.name] for stage in training(recipe(name)))

    return total


@pytest.mark.parametrize("student", [*STUDENTS, "two_phase", "one_phase"])
def test_students_of_digits_have_dcm_s_forwards(forwards, student):
    assert forwards("evidence_digits") == 300 * 4 + 300 * 6
    assert forwards(f"baselines/digits_{student}") == pytest.approx(forwards("evidence_digits"), rel=0.01)


@pytest.mark.parametrize(("model", "expected"), [("hunyuan", 9500), ("wan_1_3b", 10000)])
def test_students_of_large_models_have_dcm_s_forwards(forwards, model, expected):
    """A guided teacher's forward counts twice, one with embedded guidance once."""
    assert forwards(PARENTS[model]) == expected
    for student in STUDENTS:
        counted = f"baselines/{model}_lcm"
        assert forwards(f"baselines/{model}_{student}", counted) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("model", ["cogvideox_5b", "ltx"])
def test_budgets_of_the_other_guided_models_are_wan_s(model):
    pairs = [(f"baselines/{model}_{student}", f"baselines/wan_1_3b_{student}") for student in STUDENTS]
    for one, other in [(PARENTS[model], PARENTS["wan_1_3b"]), *pairs]:
        assert [stage.steps for stage in training(recipe(one))] == [stage.steps for stage in training(recipe(other))]
        assert recipe(one).backbone.guidance.mode == recipe(other).backbone.guidance.mode == "classifier_free"


def test_ablations_that_cost_something_else(forwards):
    assert forwards("ablations/digits_three_experts") == forwards("evidence_digits")
    costs = {"without_gan_fm": 375 * 4 * 2, "huber_only": 375 * 4 * 2, "gan_data": 300 * 4 + 257 * 7}
    costs["semantic_only"] = 750 * 4
    for name, expected in costs.items():
        assert forwards(f"ablations/digits_{name}") == expected
        assert expected == pytest.approx(forwards("evidence_digits"), rel=0.01)


# -- baselines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", PARENTS)
def test_students_learn_as_the_semantic_expert_does(model):
    """One full expert on the whole trajectory; rate, target and consistency loss are those of DCM's first stage."""
    parent = recipe(PARENTS[model])
    semantic = training(parent)[0]
    for student in STUDENTS:
        one = recipe(f"baselines/{model}_{student}")
        assert {name: expert.kind for name, expert in one.experts.items()} == {"student": "full"}
        assert (one.router.experts, one.router.boundaries) == (["student"], [])
        assert (one.backbone, one.data, one.trajectory) == (parent.backbone, parent.data, parent.trajectory)
        for stage in training(one):
            assert (stage.optimizer, stage.target, stage.ema_decay, stage.expert) == (
                semantic.optimizer, semantic.target, semantic.ema_decay, "student",
            )  # fmt: skip
            assert stage.losses == [loss for loss in semantic.losses if loss.kind == "huber"]
        kept = [stage for stage in one.stages if stage not in training(one)]
        assert [stage.name for stage in kept] == [
            stage.name for stage in parent.stages if stage not in training(parent)
        ]


@pytest.mark.parametrize("model", PARENTS)
def test_phases(model):
    """Of PCM and of one student with DCM's: where its steps start is where its jumps land."""
    parent = recipe(PARENTS[model])
    trajectory = parent.trajectory.build(parent.backbone.native_sigmas())

    def phases(student):
        return [stage.phases for stage in training(recipe(f"baselines/{model}_{student}"))]

    def points(student):
        return recipe(f"baselines/{model}_{student}").sample.points

    assert phases("lcm") == [1]
    assert phases("progressive") == [8, 4, 2, 1]
    [number] = phases("pcm")
    ends = sorted(set(landing_points(range(1, trajectory.num_steps + 1), number).tolist()), reverse=True)
    assert points("pcm") == [trajectory.num_steps, *ends[:-1]]
    assert points("pcm_edges") == parent.sample.points
    [edges] = phases("pcm_edges")
    assert [trajectory.num_steps, *reversed(edges.points)] == parent.sample.points
    assert landings(recipe(f"baselines/{model}_pcm_edges"), trajectory) == landings(parent, trajectory)
    if model == "digits":
        [two] = phases("two_phase")
        assert two.points == [boundary.point for boundary in parent.router.boundaries]
        assert points("two_phase") == points("one_phase") == parent.sample.points
        assert phases("one_phase") == [1, 1]
    for student in ("lcm", "progressive"):
        even = replace(parent.sample, points=None, steps=len(parent.sample.points))
        assert torch.equal(recipe(f"baselines/{model}_{student}").sample.resolve(trajectory), even.resolve(trajectory))


INSIDE = {"dcm_hunyuan_published", "dcm_wan_1_3b_published", "baselines/digits_one_phase", "baselines/digits_two_phase"}
INSIDE |= {f"baselines/{model}_{student}" for model in PARENTS for student in ("lcm", "progressive")}
"""Recipes of methods whose sampling stops inside phases, or goes beyond them, as they are published."""


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_sample_where_they_are_trained_to_land_or_say_why_not(name):
    notes = [note for note in recipe(name).notes() if note.startswith("stage ")]
    assert bool(notes) == (name in INSIDE)
    comment = " ".join(line.strip("# ") for line in RECIPES[name].read_text().splitlines() if line.startswith("#"))
    assert ("inside" in comment and "as `validate` notes" in comment) == (name in INSIDE)


@pytest.mark.parametrize("name", ["dcm_hunyuan", "dcm_wan_1_3b"])
def test_the_published_form_differs_by_phases_and_steps_alone(name):
    own, published = (labelled(recipe(n).resolved()) for n in (name, f"{name}_published"))
    found = {key: value for key, value in changes(own, published) if key not in ("name", "description")}
    phases = {"stages.semantic.phases": 1, "stages.detail.phases": 1}
    assert found == phases | ({"sample.points": [50, 44, 38, 26, 18, 10]} if "wan" in name else {})


def test_stages_of_one_expert_continue_each_other(tmp_path):
    """As the stages of the progressive schedule: each starts where the last one ended, with an optimiser of its own."""
    seen = []

    class Watch:
        @hookimpl
        def on_stage_start(self, training):
            seen.append((training.config.name, "start", weights(training)))

        @hookimpl
        def on_stage_end(self, training):
            seen.append((training.config.name, "end", weights(training)))

    def weights(training):
        return {name: value.detach().clone() for name, value in training.mixture.experts["semantic"].parameters.items()}

    stages = [distil(name=f"phases_{n}", phases=n, optimizer={"lr": 1e-2}) for n in (4, 2, 1)]
    mine = load_plugins()
    mine.manager.register(Watch())
    run(tiny_recipe(stages), output=tmp_path, device="cpu", plugins=mine)
    assert [entry[:2] for entry in seen] == [(f"phases_{n}", when) for n in (4, 2, 1) for when in ("start", "end")]

    def same(one, other):
        return all(torch.equal(one[name], other[name]) for name in one)

    (_, _, start), *_ = seen
    for (_, _, ended), (_, _, begins) in zip(seen[1::2], seen[2::2], strict=False):
        assert same(ended, begins)
    assert not any(same(start, ended) for _, _, ended in seen[1::2])


# -- evaluations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["evidence_digits", *(n for n in [*BASELINES, *ABLATIONS] if "digits" in n)])
def test_evaluations_can_be_compared(name):
    """Equal noise, metrics and reference; at 1, 2, 4 and 8 steps, by these names."""
    one, parent = recipe(name), recipe("evidence_digits")
    [stage], [wanted] = ([stage for stage in r.stages if stage.kind == "evaluate"] for r in (one, parent))
    for key in ("samples", "seed", "reference", "metrics", "batch_size", "weights"):
        assert getattr(stage, key) == getattr(wanted, key), key
    # So all can take its samples from one evaluation.
    assert fingerprint(stage, one, stage.reference) == fingerprint(wanted, parent, wanted.reference)
    assert stage.samples >= 1000
    assert one.data.conditions == ["full"]
    trajectory = one.trajectory.build()
    candidates = {candidate.name: candidate for candidate in stage.candidates}
    assert {"teacher, 50 steps", "1 step", "2 steps", "4 steps", "8 steps"} <= set(candidates)
    for candidate in stage.candidates:
        count = int(next(word for word in candidate.name.split() if word.isdigit()))
        assert len(candidate.path(one)[0]) - 1 == count
        eta = 1.0 if "re-noised" in candidate.name else float((candidate.name.split("eta ")[1:] or [0])[0])
        assert candidate.own_sample().eta == eta
    if one.sample is not None:
        assert candidates["4 steps"].path(one)[0].equal(one.sample.resolve(trajectory))


# -- ablations --------------------------------------------------------------------------------------------------------

GONE = object()
"""What the parent has and the recipe has not."""

LORA = {
    "kind": "lora",
    "from": "teacher",
    "base": None,
    "init": None,
    "rank": 16,
    "alpha": 32.0,
    "targets": "attention",
}
LORA |= {"copies": "time_dependent"}
FULL = {"kind": "full", "from": "teacher", "base": None, "init": None}


def stops(*points):
    """Other points of sampling, and phases of both experts that end there."""
    _, inside_first, _, inside_second = points
    phases = {"semantic": [inside_first], "detail": [inside_second]}
    changed = {f"stages.{name}.phases.points": inner for name, inner in phases.items()}
    return changed | {"sample.points": list(points)}


def boundary(point, *points):
    value = [{"point": point, "sigma": None, "timestep": None, "ratio": None, "snr": None}]
    return {"router.boundaries": value, **stops(*points)}


LONGER = {"stages.semantic.steps": 375, "stages.detail.steps": 375}
"""With fewer forwards in a step, for as many in all."""

CHANGES = {
    "without_tc": {"stages.semantic.losses.temporal_coherence": GONE},
    "without_gan": {"stages.detail.losses.gan": GONE},
    "without_fm": {"stages.detail.losses.feature_matching": GONE},
    "without_gan_fm": {
        **LONGER,
        "stages.detail.losses.gan": GONE,
        "stages.detail.losses.feature_matching": GONE,
        "stages.detail.probe": None,
    },
    "huber_only": {
        **LONGER,
        "stages.semantic.losses.temporal_coherence": GONE,
        "stages.detail.losses.gan": GONE,
        "stages.detail.losses.feature_matching": GONE,
        "stages.detail.probe": None,
    },
    "two_full_experts": {"experts.detail": FULL, "stages.detail.optimizer.lr": 1e-3},
    "semantic_lora": {"experts.semantic": LORA},
    "three_experts": {
        "experts.middle": {**LORA, "from": "semantic"},
        "router.experts": ["semantic", "middle", "detail"],
        "router.boundaries": [
            {"point": point, "sigma": None, "timestep": None, "ratio": None, "snr": None} for point in (35, 20)
        ],
        "stages.semantic.steps": 225,
        "stages.middle": {"expert": "middle", "steps": 225, "lr": 1e-4},
        "stages.detail.steps": 200,
        "stages.semantic.phases.points": [],
        "stages.detail.phases.points": [10],
        "stages.evaluate.candidates.2 steps, semantic + teacher.stand_ins.middle": "teacher",
        "stages.evaluate.candidates.4 steps, semantic + teacher.stand_ins.middle": "teacher",
        "stages.evaluate.candidates.2 steps, semantic alone.stand_ins.middle": "semantic",
        "stages.evaluate.candidates.4 steps, semantic alone.stand_ins.middle": "semantic",
        "sample.points": [50, 35, 20, 10],
    },
    "boundary_15": boundary(15, 50, 33, 15, 8),
    "boundary_20": boundary(20, 50, 35, 20, 10),
    "boundary_25": boundary(25, 50, 38, 25, 13),
    "boundary_35": boundary(35, 50, 43, 35, 18),
    "rank_4": {"experts.detail.rank": 4, "experts.detail.alpha": 8.0},
    "rank_64": {"experts.detail.rank": 64, "experts.detail.alpha": 128.0},
    "without_copies": {"experts.detail.copies": "none"},
    "unclipped_hinge": {"stages.detail.losses.gan.clip": False},
    "fm_hidden": {"stages.detail.losses.feature_matching.space": "hidden"},
    "end_zero": {"trajectory.end": "zero"},
    "detail_from_teacher": {"experts.detail.from": "teacher", "stages.detail.optimizer.lr": 1e-3},
    "one_rate": {"stages.detail.optimizer.lr": 1e-3},
    "semantic_only": {
        "stages.semantic.steps": 750,
        "stages.detail": GONE,
        "stages.evaluate.candidates.8 steps.steps": None,
        "stages.evaluate.candidates.8 steps.sample": {
            **dict.fromkeys(["sigmas", "timesteps", "steps"]),
            "points": [50, 45, 40, 35, 30, 23, 15, 8],
            "eta": 0.0,
        },
    },
    "gan_data": {"stages.detail.steps": 257, "stages.detail.losses.gan.real": "data"},
    "student_target": {
        "stages.semantic.target": "student",
        "stages.semantic.ema_decay": None,
        "stages.detail.target": "student",
        "stages.detail.ema_decay": None,
    },
}
"""By ablation: every key of the resolved recipe that differs from its parent's, and its value."""


def labelled(value):
    """Resolved data with lists of named things, or of one of each kind, as mappings by those labels."""
    if isinstance(value, dict):
        return {key: labelled(item) for key, item in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        labels = [item.get("name") or item.get("kind") for item in value]
        if None not in labels and len(set(labels)) == len(labels):
            return {label: labelled(item) for label, item in zip(labels, value, strict=True)}
    return value


def changes(parent, child, path=""):
    """Dotted keys whose values differ, with the child's."""
    both = isinstance(parent, dict) and isinstance(child, dict)
    if both and parent.get("kind") == child.get("kind"):
        for key in {**parent, **child}:
            at = f"{path}.{key}" if path else key
            if key in parent and key in child:
                yield from changes(parent[key], child[key], at)
            else:
                yield at, child.get(key, GONE)
    elif parent != child:
        yield path, child


@pytest.mark.parametrize("name", CHANGES)
def test_an_ablation_changes_what_its_name_says(name):
    parent, child = (labelled(recipe(n).resolved()) for n in ("ablations/base", f"ablations/digits_{name}"))
    found = {key: value for key, value in changes(parent, child) if key not in ("name", "description")}
    if name == "three_experts":
        middle = found["stages.middle"]
        assert (middle["losses"], middle["target"]) == (child["stages"]["semantic"]["losses"], "ema")
        assert middle["optimizer"] == child["stages"]["detail"]["optimizer"]
        found["stages.middle"] = {key: middle[key] for key in ("expert", "steps")} | {"lr": middle["optimizer"]["lr"]}
    assert found == CHANGES[name]
