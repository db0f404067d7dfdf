"""Consistency distillation: where jumps land, what a step compares, and what a run of all stages leaves alone."""

import math

import pytest
import torch
from helpers import (
    as_if_trained,
    digits_backbone,
    digits_batch,
    digits_inputs,
    distil,
    evaluate,
    set_up,
    set_up_trained,
    tiny_recipe,
    velocity_of,
)

from moedistill import hookimpl
from moedistill.components.plugins import load_plugins
from moedistill.errors import RecipeError, UserError
from moedistill.flow.chords import power_at, sampled_power
from moedistill.flow.phases import landing_points
from moedistill.flow.sampling_points import SampleConfig
from moedistill.model.backbone import TEACHER
from moedistill.recipe.loading import load_recipe
from moedistill.recipe.sampling import landings, notes_on, sampling_sigmas, trajectory_of
from moedistill.runs.build import build_mixture
from moedistill.runs.loop import run as run_recipe
from moedistill.runtime.checkpoint import load_tree
from moedistill.stages.consistency import ConsistencyConfig

# --- Where jumps land


@pytest.mark.parametrize("starts", [range(1, 2), range(1, 13), range(5, 12), range(39, 51)])
def test_landings_of_equal_phases_by_brute_force(starts):
    below, n = starts[0] - 1, len(starts)
    for phases in range(1, n + 1):
        edges = {below + math.floor(k * n / phases) for k in range(phases + 1)}
        landings = landing_points(starts, phases)
        assert landings.dtype == torch.int64
        for start, landing in zip(starts, landings.tolist(), strict=True):
            steps_down = next(step for step in range(1, n + 1) if start - step in edges)
            assert landing == start - steps_down
        assert len(set(landings.tolist())) == phases


def test_landings_by_hand():
    assert landing_points(range(39, 51), 1).tolist() == [38] * 12
    assert landing_points(range(1, 5), 4).tolist() == [0, 1, 2, 3]
    assert landing_points(range(1, 11), 4).tolist() == [0, 0, 2, 2, 2, 5, 5, 7, 7, 7]
    # An edge itself belongs to the phase below it.
    assert landing_points(range(21, 27), [23, 25]).tolist() == [20, 20, 20, 23, 23, 25]
    assert landing_points(range(21, 27), [25, 23, 23]).tolist() == [20, 20, 20, 23, 23, 25]
    assert landing_points(range(21, 24), []).tolist() == [20, 20, 20]


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        (7, "phases: 7 for a segment of 6 points; at most 6"),
        ([20], "phases.points: 20 is not inside the segment, whose inner points are 21 to 25"),
        ([23, 26], "phases.points: 26 is not inside"),
    ],
)
def test_phases_that_do_not_fit_are_refused(phases, message):
    with pytest.raises(ValueError, match=message):
        landing_points(range(21, 27), phases)


SAMPLING = {"stages.0.phases": "sampling", "stages.1.phases": "sampling", "sample.points": [8, 6, 4, 1]}


def test_phases_of_sampling_are_its_stops():
    """Every step of sampling is a jump that is trained, and the recipe says which."""
    recipe = load_recipe(tiny_recipe([distil(), distil("detail")], SAMPLING))
    assert [stage["phases"] for stage in recipe.resolved()["stages"]] == [{"points": [6]}, {"points": [1]}]
    assert load_recipe(recipe.resolved()).resolved() == recipe.resolved()
    jumps = {}
    for number in range(2):
        training, stage = set_up(recipe.resolved(), number)
        jumps |= dict(zip(stage._starts, stage._landings.tolist(), strict=True))
    assert [(start, jumps[start]) for start in (8, 6, 4, 1)] == [(8, 6), (6, 4), (4, 1), (1, 0)]
    by_sigma = {**SAMPLING, "sample": {"sigmas": [training.trajectory.sigma(point) for point in (8, 6, 4, 1)]}}
    del by_sigma["sample.points"]
    again = load_recipe(tiny_recipe([distil(), distil("detail")], by_sigma))
    assert [stage.phases for stage in again.stages] == [stage.phases for stage in recipe.stages]


def test_steps_are_spread_over_the_phases():
    """A number of steps takes the edges that there are; phases of sampling are then its points."""
    phases = {"stages.0.phases": 2, "stages.1.phases": {"points": [1]}}
    stages = [distil(), distil("detail")]

    def points(changes, sample=None):
        recipe = load_recipe(tiny_recipe(stages, changes))
        trajectory = trajectory_of(recipe)
        assert landings(recipe, trajectory) == landings(load_recipe(recipe.resolved()), trajectory)
        return [trajectory.points.tolist().index(s) for s in sampling_sigmas(recipe, sample).tolist()[:-1]]

    assert points(phases, SampleConfig(steps=4)) == [8, 6, 4, 1]
    assert points(phases, SampleConfig(steps=5)) == [8, 6, 4, 3, 1]
    assert points(phases, SampleConfig(points=[7, 3])) == [7, 3]
    # The boundary is an edge without any phases, or any training.
    assert points({}, SampleConfig(steps=3)) == [8, 6, 4]
    assert points({"stages": [distil("detail")]}, SampleConfig(steps=3)) == [8, 6, 4]
    alone = {"experts": {"semantic": {"kind": "full"}}, "router.experts": ["semantic"], "router.boundaries": []}
    single = {**alone, "stages": [distil()]}
    assert points(single, SampleConfig(steps=3)) == [8, 6, 3]
    # Of several stages that train an expert, the last one.
    assert points({**phases, "stages": [distil(name="a", phases=4), *stages]}, SampleConfig(steps=2)) == [8, 4]
    # An expert that the router does not name never samples.
    helper = {"experts.coarse": {"kind": "full"}, "stages": [distil("coarse", phases=4), *stages]}
    assert points(helper, SampleConfig(steps=3)) == [8, 6, 4]


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("other", ["sampling", 1, 3])
def test_a_number_of_steps_is_settled_with_the_phases_of_sampling(steps, other):
    """The resolved recipe names its points, at which the phases end: what is trained is what is sampled."""
    changes = {"stages.0.phases": "sampling", "stages.1.phases": other, "sample": {"steps": steps, "eta": 0.0}}
    recipe = load_recipe(tiny_recipe([distil(), distil("detail")], changes))
    assert len(recipe.sample.points) == steps
    again = load_recipe(recipe.resolved())
    assert again.resolved() == recipe.resolved()
    assert sampling_sigmas(again).equal(sampling_sigmas(recipe))
    assert recipe.stages[0].phases.points == sorted(point for point in recipe.sample.points if 4 < point < 8)
    assert steps < 2 or not any(note.startswith("stage semantic") for note in recipe.notes())
    if other == "sampling" and steps == 5:
        assert (recipe.sample.points, recipe.stages[1].phases.points) == ([8, 7, 6, 4, 2], [2])


def test_what_is_wrong_elsewhere_hides_no_finding_of_phases_of_sampling():
    changes = {"stages.1.losses": [{"kind": "hubert"}]}
    with pytest.raises(RecipeError) as refused:
        load_recipe(tiny_recipe([distil(phases="sampling", target="ema"), distil("detail")], changes))
    assert "target: ema needs ema_decay" in str(refused.value)
    assert "hubert" in str(refused.value)


def test_a_stop_at_the_last_point_needs_no_jump():
    """With closed: high, p_0 is in the segment; from there sampling goes on to 0, as it does from below."""
    recipe = load_recipe(tiny_recipe([distil(), distil("detail")], {"router.closed": "high"}))
    end = recipe.trajectory.build().sigma(0)
    [note] = notes_on(recipe, SampleConfig(sigmas=[1.0, end]))
    assert f"from sigma 1 to {end:.4g}" in note


def test_phases_of_sampling_need_its_points():
    with pytest.raises(RecipeError, match=r"stages\.0\.phases: sampling needs the recipe's sample"):
        load_recipe(tiny_recipe([distil(phases="sampling")], {"sample": None}))
    with pytest.raises(RecipeError, match=r"stages\.0\.phases: sampling: sample's sigma 0\.955 is no point of the"):
        load_recipe(tiny_recipe([distil(phases="sampling")], {"sample": {"sigmas": [1.0, 0.955, 0.8]}}))
    with pytest.raises(ValueError, match="phases: sampling becomes points when a recipe is read"):
        ConsistencyConfig(name="a", expert="semantic", steps=1, losses=[], phases="sampling").build().setup(
            set_up(tiny_recipe([distil()]))[0]
        )


def test_a_recipe_that_samples_inside_a_phase_says_so():
    stages = [distil(), distil("detail")]
    notes = load_recipe(tiny_recipe(stages, {"sample.points": [8, 6, 4]})).notes()
    trajectory = load_recipe(tiny_recipe(stages)).trajectory.build()
    end, stop = trajectory.sigma(4), trajectory.sigma(6)
    [note] = notes
    assert note.startswith(f"stage semantic: sampling stops at sigma {stop:.4g} inside a phase")
    share = sampled_power([1.0, stop, end], lambda sigma: end)[-1] / power_at(end)
    assert f"with {share:.3g} times their variance" in note
    assert share > 1.001
    assert "sample.eta" in note
    # The pipelines of large models draw no fresh noise.
    assert not any("sample.eta" in note for note in load_recipe("dcm_hunyuan_published").notes())
    [note] = load_recipe(tiny_recipe(stages, {"sample.points": [8, 2]})).notes()
    assert note == (
        "stage semantic: sampling goes beyond the end of a phase, where no jump is trained to go: "
        f"from sigma 1 to {trajectory.sigma(2):.4g} (ends at {end:.4g})"
    )
    for settled in ({"sample.points": [8, 4]}, {"sample.points": [8, 6, 4], "sample.eta": 1.0}, SAMPLING):
        assert load_recipe(tiny_recipe(stages, settled)).notes() == []
    # Of several stages that train an expert, the last one says what it can.
    finer = [distil(name="coarse"), distil(phases={"points": [6]}), distil("detail")]
    assert load_recipe(tiny_recipe(finer, {"sample.points": [8, 6, 4]})).notes() == []


@pytest.mark.parametrize(("phases", "where"), [(5, ""), ({"points": [8]}, r"\.points")])
def test_phases_that_do_not_fit_the_segment_are_refused_in_a_run(tmp_path, phases, where):
    with pytest.raises(UserError, match=rf"stages\.0\.phases: phases{where}: "):
        run_recipe(tiny_recipe([distil(phases=phases)]), output=tmp_path / "run")


# --- What a step compares


class Spy:
    """Records what goes into each network and comes out, and what the losses see. Nothing is updated."""

    def __init__(self, training):
        self.velocity, self.teacher, self.target, self.objective = [], [], [], []
        for name, calls in vars(self).items():
            setattr(training, name, self._watched(getattr(training, name), calls))
        training.update = lambda name, loss: None

    @staticmethod
    def _watched(method, calls):
        def watched(*args, **kwargs):
            calls.append((*args, method(*args, **kwargs)))
            return calls[-1][-1]

        return watched

    @property
    def tensors(self):
        return self.objective[0][0]


def one_step(expert="semantic", changes=(), batch=8, **stage):
    """One step of a stage whose experts are as if trained: its run, what was seen, and where it started."""
    training, built = set_up_trained(expert, changes, **stage)
    spy, inputs = Spy(training), digits_batch(training, batch)
    with training.mixture.using(expert):
        built.step(training, inputs)
    [(x, sigma, cond, _)] = spy.velocity
    return training, spy, inputs, torch.searchsorted(training.trajectory.points, sigma), sigma, x, cond


def column(values):
    """`[B]` values to broadcast over latents, in double precision."""
    return values.double().view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize(
    ("expert", "phases", "edges"),
    [
        ("semantic", 1, [4]),
        ("semantic", 2, [4, 6]),
        ("semantic", {"points": [5, 7]}, [4, 5, 7]),
        ("detail", 1, [0]),
        ("detail", 4, [0, 1, 2, 3]),
    ],
)
def test_a_step_compares_what_the_formulas_say(expert, phases, edges, scale):
    guidance = {"mode": "classifier_free", "scale": scale}
    training, spy, batch, i, sigma, x, cond = one_step(expert, {"backbone.guidance": guidance}, phases=phases)
    mixture, points, tensors = training.mixture, training.trajectory.points, spy.tensors
    assert torch.equal(points[i], sigma)
    assert set(i.tolist()) <= set(range(5, 9) if expert == "semantic" else range(1, 5))
    landing = points[torch.tensor([max(edge for edge in edges if edge < start) for start in i.tolist()])]
    noise = (x - (1 - column(sigma)) * batch.latents) / column(sigma)
    assert abs(noise.mean().item()) < 0.03
    assert abs(noise.std().item() - 1) < 0.03

    def velocity(name, x, sigma, cond=cond):
        return velocity_of(mixture, name, (x, sigma, cond)).double()

    v_cond, v_null = velocity(TEACHER, x, sigma), velocity(TEACHER, x, sigma, mixture.backbone.null_conditioning(cond))
    v_teacher = v_cond + (scale - 1) * (v_cond - v_null)
    x_previous = x + column(points[i - 1] - sigma) * v_teacher
    v_target = velocity(expert, x_previous.float(), points[i - 1])
    prediction = x + column(landing - sigma) * velocity(expert, x, sigma)
    target = x_previous + column(landing - points[i - 1]) * v_target

    torch.testing.assert_close(tensors.prediction.double(), prediction, rtol=0, atol=3e-6)
    torch.testing.assert_close(tensors.target.double(), target, rtol=0, atol=3e-6)
    torch.testing.assert_close(tensors.difference.double(), prediction - target, rtol=0, atol=3e-6)
    assert (prediction - target).abs().max() > 1e-2
    assert (scale == 1) == torch.equal(v_teacher, v_cond)
    assert torch.equal(tensors.sigma, sigma)
    assert tensors.segment == training.segment
    assert {t.dtype for t in (tensors.prediction, tensors.target, tensors.difference, sigma)} == {torch.float32}


def test_the_difference_is_formed_from_the_velocities():
    """That of prediction and target themselves has lost what rounding took from them."""
    training, spy, _, i, sigma, _, _ = one_step()
    points, tensors = training.trajectory.points, spy.tensors
    v_student, v_teacher, v_target = (
        calls[0][-1].detach().double() for calls in (spy.velocity, spy.teacher, spy.target)
    )
    previous, land = points[i - 1], points[4]
    exact = column(land - sigma) * v_student - column(previous - sigma) * v_teacher - column(land - previous) * v_target
    error = (tensors.difference - exact).abs().mean()
    assert error < 1e-8
    assert (tensors.prediction - tensors.target - exact).abs().mean() > 5 * error


@pytest.mark.parametrize("expert", ["semantic", "detail"])
def test_the_gradient_is_that_of_the_students_jump(expert):
    training, spy, _, _, sigma, x, cond = one_step(expert)
    wanted = list(training.mixture.experts[expert].parameters.values())
    weights = torch.randn(x.shape)
    with training.mixture.using(expert):
        jump = column(training.segment.low - sigma).float() * training.mixture(x, sigma, cond)
    expected = torch.autograd.grad((jump * weights).sum(), wanted)
    for tensor in (spy.tensors.prediction, spy.tensors.difference):
        found = torch.autograd.grad((tensor * weights).sum(), wanted, retain_graph=True)
        for ours, plain in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert not spy.tensors.target.requires_grad


def test_starting_points_are_drawn_evenly_from_the_segment():
    _, _, _, i, *_ = one_step(batch=400)
    counts = torch.bincount(i, minlength=9).tolist()
    assert sum(counts[5:]) == 400
    assert all(70 < count < 130 for count in counts[5:])


@pytest.mark.parametrize(
    ("phases", "boundary", "wanted"),
    [(1, 7, False), (4, 4, False), (1, 4, True)],
    ids=["one point", "n phases", "else"],
)
def test_a_jump_of_zero_length_needs_no_target_forward(phases, boundary, wanted):
    training, spy, _, i, sigma, x, _ = one_step(changes={"router.boundaries": [{"point": boundary}]}, phases=phases)
    assert len(spy.target) == wanted
    if not wanted:
        one_euler_step = x + column(training.trajectory.points[i - 1] - sigma) * spy.teacher[0][-1]
        torch.testing.assert_close(spy.tensors.target.double(), one_euler_step, rtol=0, atol=1e-6)


@pytest.mark.parametrize("target", ["ema", "student"])
def test_the_target_is_the_averages_or_the_students(target):
    training, spy, batch, *_ = one_step(target=target, ema_decay=0.5)
    weights = {
        "student": dict(training.mixture.experts["semantic"].parameters),
        "ema": training.trained["student"].average.average,
    }
    plain = digits_backbone().network
    [(x, sigma, _, v_target)] = spy.target
    with torch.no_grad():
        velocities = {
            name: torch.func.functional_call(plain, values, (x, sigma), batch.conditioning)
            for name, values in weights.items()
        }
    other = velocities.pop("student" if target == "ema" else "ema")
    assert torch.equal(v_target, velocities[target])
    assert (v_target - other).abs().max() > 1e-3


def test_the_average_is_lent_for_the_target_only():
    training, stage = set_up(tiny_recipe([distil(target="ema", ema_decay=0.5)]))
    parameters = training.mixture.experts["semantic"].parameters
    as_if_trained(training.mixture.experts["semantic"], 0)
    places = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    ema = training.trained["student"].average
    average = {name: value.clone() for name, value in ema.average.items()}
    with training.mixture.using("semantic"):
        stage.step(training, digits_batch(training))
    assert {name: parameter.data_ptr() for name, parameter in parameters.items()} == places
    for name, parameter in parameters.items():
        # The step is of the live weights, at a rate of 1e-3, and the average follows it.
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=2e-3)
        torch.testing.assert_close(ema.average[name], (average[name] + parameter) / 2)
        assert name.endswith("to_k.bias") or not torch.equal(parameter, before[name])


def test_an_ema_target_needs_an_average():
    with pytest.raises(RecipeError, match="target: ema needs ema_decay"):
        load_recipe(tiny_recipe([distil(target="ema")]))


# --- A run of every training stage

LOSSES = {
    "fit": [{"kind": "mse"}],
    "semantic": [{"kind": "huber", "c": 0.03}, {"kind": "temporal_coherence"}],
    "detail": [
        {"kind": "huber", "c": 0.03},
        {"kind": "gan", "weight": 0.5, "width": 8, "groups": 2, "optimizer": {"lr": 1e-3}},
        {"kind": "feature_matching"},
    ],
}


class Watch:
    """Looks at all experts as stages begin and end."""

    def __init__(self):
        self.velocities, self.weights, self.metrics, self.trainable = {}, {}, {}, {}

    def _look(self, training, when):
        key = (training.config.name, when)
        self.velocities[key] = {
            name: velocity_of(training.mixture, name, digits_inputs()) for name in training.mixture.experts
        }
        # The teacher's weights, and what each expert has trained.
        experts = training.mixture.experts.items()
        parameters = {name: expert.parameters if name != TEACHER else expert.shared.weights for name, expert in experts}
        self.weights[key] = {
            name: {key: value.detach().clone() for key, value in tensors.items()}
            for name, tensors in parameters.items()
        }

    @hookimpl
    def on_stage_start(self, training):
        self._look(training, "start")
        own = {id(parameter) for parameter in training.mixture.experts[training.expert].parameters.values()}
        takes_gradients = {id(parameter) for parameter in training.mixture.parameters() if parameter.requires_grad}
        self.trainable[training.config.name] = takes_gradients == own

    @hookimpl
    def on_stage_end(self, training):
        self._look(training, "end")

    @hookimpl
    def on_step_end(self, training, metrics):
        self.metrics.setdefault(training.config.name, []).append(metrics)


def watched_run(recipe, folder, **options):
    plugins, watch = load_plugins(), Watch()
    plugins.manager.register(watch)
    return run_recipe(recipe, output=folder, plugins=plugins, **options), watch


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """20 steps each of finetune, semantic and detail; its recipe, result, and what was seen."""
    fit = {"name": "fit", "kind": "finetune", "expert": "semantic", "steps": 20, "optimizer": {"lr": 1e-3}}
    stages = [
        {**fit, "losses": LOSSES["fit"]},
        distil("semantic", steps=20, losses=LOSSES["semantic"]),
        distil("detail", steps=20, losses=LOSSES["detail"], probe={"block_stride": 1}),
    ]
    recipe = tiny_recipe(
        stages, {"backbone.guidance": {"mode": "classifier_free", "scale": 2.0}, "training.keep_checkpoints": 3}
    )
    result, watch = watched_run(recipe, tmp_path_factory.mktemp("whole") / "run")
    return recipe, result, watch


@pytest.mark.parametrize(("stage", "trained"), [("fit", "semantic"), ("semantic", "semantic"), ("detail", "detail")])
def test_a_stage_trains_its_expert_and_nothing_else(whole, stage, trained):
    *_, watch = whole
    assert len(watch.metrics[stage]) == 20
    assert watch.trainable[stage]
    before, after = (watch.weights[stage, when] for when in ("start", "end"))
    untouched = watch.weights["fit", "start"][TEACHER]
    assert all(torch.equal(after[TEACHER][name], weight) for name, weight in untouched.items())
    assert torch.equal(watch.velocities[stage, "end"][TEACHER], watch.velocities["fit", "start"][TEACHER])
    for expert in ("semantic", "detail"):
        unmoved = {name for name, weight in before[expert].items() if torch.equal(after[expert][name], weight)}
        if expert == trained:
            assert all(name.endswith("to_k.bias") for name in unmoved)
            assert not torch.equal(watch.velocities[stage, "start"][expert], watch.velocities[stage, "end"][expert])
        else:
            assert unmoved == set(before[expert])


def test_losses_and_gradients_of_a_stage_are_all_reported(whole):
    *_, watch = whole
    for stage, losses in LOSSES.items():
        names = {"loss", "grad_norm/student", *(f"loss/{loss['kind']}" for loss in losses)}
        if stage == "detail":
            names |= {"loss/gan_critic", "grad_norm/gan"}
        for metrics in watch.metrics[stage]:
            assert names <= set(metrics)
            assert all(math.isfinite(metrics[name]) and metrics[name] > 0 for name in names)
            total = sum(loss.get("weight", 1.0) * metrics[f"loss/{loss['kind']}"] for loss in losses)
            assert metrics["loss"] == pytest.approx(total, rel=1e-5)


def assert_starts_as_trained_parent(watch, trained):
    start = watch.velocities["detail", "start"]
    assert torch.equal(start["detail"], start["semantic"])
    assert torch.equal(start["semantic"], trained)
    assert (start["semantic"] - start[TEACHER]).abs().max() > 1e-3


def test_the_detail_expert_starts_as_the_trained_semantic_expert(whole):
    *_, watch = whole
    assert_starts_as_trained_parent(watch, watch.velocities["semantic", "end"]["semantic"])


def test_also_when_resumed_between_the_two(whole, tmp_path):
    recipe, result, watch = whole
    [between] = result.checkpoint.parent.glob("01_semantic_*")
    again, seen = watched_run(recipe, tmp_path / "run", resume_from=between)
    assert set(seen.velocities) == {("detail", "start"), ("detail", "end")}
    assert_starts_as_trained_parent(seen, watch.velocities["semantic", "end"]["semantic"])
    for name, weight in load_tree(result.checkpoint, "experts")["detail"].items():
        assert torch.equal(load_tree(again.checkpoint, "experts")["detail"][name], weight), name


def test_an_expert_equals_its_parent_until_it_is_trained(tmp_path):
    """Also in an evaluation between the two, and in what is loaded from a checkpoint made there."""
    candidates = [
        {"name": "student"},
        {"name": "parent", "stand_ins": {"detail": "semantic"}},
        {"name": "a", "model": "teacher"},
    ]
    stages = [distil("semantic", steps=20), evaluate(candidates=candidates, reference="parent"), distil("detail")]
    recipe = tiny_recipe(stages, {"training.keep_checkpoints": 2})
    result, watch = watched_run(recipe, tmp_path / "run")
    assert result.metrics["evaluate"]["student"]["paired_distance"] == 0
    assert result.metrics["evaluate"]["a"]["paired_distance"] > 0
    [between] = result.checkpoint.parent.glob("00_semantic_*")
    mixture = build_mixture(load_recipe(recipe))
    mixture.load(load_tree(between, "experts"), {}, "the checkpoint")
    trained = watch.velocities["semantic", "end"]["semantic"]
    assert torch.equal(velocity_of(mixture, "semantic", digits_inputs()), trained)
    assert torch.equal(velocity_of(mixture, "detail", digits_inputs()), trained)


def test_checkpointed_training_ends_in_the_same_weights(tmp_path):
    """The teacher runs between the student's forward and its backward, and its features are part of the graph."""
    stages = [distil(expert, losses=LOSSES["detail"], probe={"block_stride": 1}) for expert in ("semantic", "detail")]
    plain, checkpointed = (
        run_recipe(tiny_recipe(stages, {"training.gradient_checkpointing": on}), output=tmp_path / str(on))
        for on in (False, True)
    )
    experts, others = (load_tree(result.checkpoint, "experts") for result in (plain, checkpointed))
    assert set(experts) == {"semantic", "detail"}
    for name, weights in experts.items():
        for key, weight in weights.items():
            assert torch.equal(others[name][key], weight), (name, key)


def test_an_expert_trained_before_goes_on_from_there(whole):
    *_, watch = whole
    first, second = watch.weights["fit", "end"]["semantic"], watch.weights["semantic", "start"]["semantic"]
    assert all(torch.equal(second[name], weight) for name, weight in first.items())
