"""A stage that trains two experts under names of their own, one of which no segment owns: distribution matching.

Data are Gaussian, so it is known where both end: the student's law is the data's, and the fake score is the velocity of
the student's law. The student starts as the teacher, whose one jump from noise gives the mean, without any spread.
"""

from dataclasses import asdict

import gaussian_plugin as gaussian
import matching_plugin
import pytest
import torch
from helpers import digits_batch, distil, equal, set_up, tiny_recipe, trees

from moedistill.components.plugins import load_plugins
from moedistill.errors import RecipeError, UserError
from moedistill.losses.optim import OptimizerConfig
from moedistill.recipe.loading import load_recipe
from moedistill.runs.loop import run
from moedistill.runs.resume import changed_keys
from moedistill.runs.sample import load_mixture
from moedistill.runtime.checkpoint import load_tree
from moedistill.stages.consistency import ConsistencyConfig, ConsistencyStage

STEPS, UPDATES = 300, 2
ADAPTER = {"kind": "lora", "rank": 8, "alpha": 8}


@pytest.fixture(scope="module")
def plugins():
    return load_plugins([gaussian.__file__, matching_plugin.__file__])


def recipe(**stage):
    optimizer = {"weight_decay": 0.0, "schedule": "cosine"}
    return {
        "name": "matching",
        "backbone": {"kind": "gaussian"},
        "trajectory": {"kind": "flow_matching", "num_steps": 10, "shift": 1.0},
        "router": {"kind": "timestep", "experts": ["student"]},
        "experts": {"student": ADAPTER, "score": ADAPTER},
        "data": {"kind": "gaussian"},
        "training": {"batch_size": 256, "log_every": 100, "checkpoint_every": STEPS // 2},
        "stages": [
            {
                "name": "matching",
                "kind": "matching",
                "expert": "student",
                "fake_score": "score",
                "steps": STEPS,
                "optimizer": {**optimizer, "lr": 2e-3},
                "fake_score_optimizer": {**optimizer, "lr": 4e-3, "betas": [0.0, 0.99]},
                "fake_score_updates": UPDATES,
                "ema_decay": 0.9,
                **stage,
            }
        ],
    }


@pytest.fixture(scope="module")
def trained(plugins, tmp_path_factory):
    return run(recipe(), output=tmp_path_factory.mktemp("matching") / "whole", device="cpu", plugins=plugins)


@torch.no_grad()
def landings(mixture, expert, count=20_000):
    """One jump from noise by an expert."""
    x = torch.randn(count, *gaussian.SHAPE, generator=torch.Generator().manual_seed(0))
    with mixture.using(expert):
        return x + (mixture.trajectory.sigma(0) - 1) * mixture(x, torch.ones(count), {})


def by_channel(y):
    return y.mean((0, 2, 3, 4)), y.std((0, 2, 3, 4))


def test_the_students_law_is_the_datas(plugins, trained):
    _, mixture = load_mixture(trained.output, plugins=plugins)
    mean, std = (value.flatten() for value in gaussian.moments(mixture.trajectory.sigma(0)))
    found_mean, found_std = by_channel(landings(mixture, "student"))
    assert ((found_mean - mean).abs() / std).max() < 0.02
    assert (found_std / std - 1).abs().max() < 0.02
    _, spread = by_channel(landings(mixture, "teacher"))
    assert (spread / std).max() < 0.05  # before


def test_sampling_needs_no_stage_that_uses_an_expert_without_a_segment(plugins, trained):
    """The recipe without its stages has nobody who uses the fake score, and yet it is read."""
    (whole, mixture), (part, same) = (
        load_mixture(trained.output, plugins=known) for known in (plugins, load_plugins([gaussian.__file__]))
    )
    assert (len(whole.stages), part.stages) == (1, [])
    assert part.experts == whole.experts
    assert torch.equal(landings(mixture, "student", 4), landings(same, "student", 4))


def test_the_fake_score_is_the_velocity_of_the_students_law(plugins, trained):
    """y ~ N(m, d²) at s; so x_t = a·y + β·n is N(a·m, a²·d² + β²), whose flow is linear in x."""
    _, mixture = load_mixture(trained.output, plugins=plugins)
    s = mixture.trajectory.sigma(0)
    y = landings(mixture, "student")
    m, d = (value.view(1, -1, 1, 1, 1) for value in by_channel(y))
    for t in (0.2, 0.5, 0.8):
        a, da = (1 - t) / (1 - s), -1 / (1 - s)
        beta2, variance = t**2 - a**2 * s**2, a**2 * d**2 + t**2 - a**2 * s**2
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        x = a * y + beta2**0.5 * noise
        exact = da * m + (a * da * d**2 + t - a * da * s**2) / variance * (x - a * m)
        with torch.no_grad(), mixture.using("score"):
            found = mixture(x, torch.full((len(x),), t), {})
        with torch.no_grad():
            teacher = mixture(x, torch.full((len(x),), t), {})
        assert (found - exact).norm() < 0.015 * exact.norm()
        assert not torch.equal(found, teacher)


def test_each_has_its_own_optimiser_at_its_own_ratio(trained):
    state = trees(trained.checkpoint)["training"]["trained"]
    assert list(state) == ["student", "fake_score"]
    for name, wanted in (("student", STEPS), ("fake_score", STEPS * UPDATES)):
        assert {int(each["step"]) for each in state[name]["optimizer"]["state"].values()} == {wanted}
        assert state[name]["scheduler"]["last_epoch"] == wanted
    assert set(trees(trained.checkpoint)["experts"]) == {"student", "score"}
    assert set(trees(trained.checkpoint)["ema"]) == {"student"}


def test_it_goes_on_exactly_from_its_middle(plugins, trained, tmp_path):
    middle = trained.output / "checkpoints" / f"00_matching_{STEPS // 2:08d}"
    again = run(recipe(), output=tmp_path / "again", resume_from=middle, device="cpu", plugins=plugins)
    assert equal(trees(again.checkpoint), trees(trained.checkpoint))


def test_an_expert_without_a_segment_needs_a_stage(plugins):
    assert load_recipe(recipe(), plugins=plugins).experts.keys() == {"student", "score"}
    idle = {**recipe(), "experts": {"student": ADAPTER, "score": ADAPTER, "idle": ADAPTER}}
    with pytest.raises(RecipeError, match="expert 'idle' has no segment") as caught:
        load_recipe(idle, plugins=plugins)
    assert [problem.path for problem in caught.value.problems] == ["experts.idle"]
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(fake_score="scroe"), plugins=plugins)
    assert {problem.path for problem in caught.value.problems} == {"stages.0.fake_score", "experts.score"}


@pytest.fixture
def of_both(monkeypatch):
    """Consistency stages say that they train the detail expert as well."""
    monkeypatch.setattr(ConsistencyConfig, "trained_experts", lambda self: [self.expert, "detail"])


def test_an_update_reaches_what_it_names_and_nothing_else(of_both):
    """Even where the loss went through what else is trained."""
    recipe = tiny_recipe([distil()], {"experts.detail.from": "teacher", "training.monitor": None})
    training, _ = set_up(recipe)
    training.trains("other", "detail", OptimizerConfig(lr=1e-3))
    training.trains("critic", torch.nn.Linear(1, 1), OptimizerConfig(lr=1e-3))
    assert all(p.requires_grad for each in training.trained.values() for p in each.parameters.values())
    batch = digits_batch(training)
    sigma = torch.full((len(batch.latents),), 0.5)
    before = {
        name: {k: p.detach().clone() for k, p in each.parameters.items()} for name, each in training.trained.items()
    }
    x = training.velocity(batch.latents, sigma, batch.conditioning)
    x = training.velocity(x, sigma, batch.conditioning, of="other")
    loss = training.trained["critic"].module(x.reshape(-1, 1)).square().mean()
    training.update("other", loss)
    moved = {
        name: any(not torch.equal(parameter, before[name][key]) for key, parameter in each.parameters.items())
        for name, each in training.trained.items()
    }
    assert moved == {"student": False, "other": True, "critic": False}
    for name in ("student", "critic"):
        assert all(parameter.grad is None for parameter in training.trained[name].parameters.values())
    assert set(training.take_metrics()) == {"grad_norm/other"}
    training.release()
    assert not any(parameter.requires_grad for parameter in training.mixture.parameters())


def test_what_is_trained_must_be_listed(tmp_path, monkeypatch):
    """Or it would be in no checkpoint, and start anew with the next stage."""
    training, _ = set_up(tiny_recipe([distil()], {"experts.detail.from": "teacher"}))
    with pytest.raises(
        ValueError, match=r"'detail' is to be trained; ConsistencyConfig.trained_experts\(\) must list it"
    ):
        training.trains("other", "detail", OptimizerConfig())
    assert set(training.trained) == {"student"}
    monkeypatch.setattr(ConsistencyStage, "setup", lambda self, training: None)
    with pytest.raises(UserError, match="stage semantic: setup makes no 'semantic' trainable"):
        run(tiny_recipe([distil()]), output=tmp_path / "a", device="cpu")
    monkeypatch.setattr(ConsistencyConfig, "trained_experts", lambda self: [])
    with pytest.raises(UserError, match="stage semantic: setup makes nothing trainable"):
        run(tiny_recipe([distil()]), output=tmp_path / "b", device="cpu")


def test_a_module_is_trained_where_it_takes_gradients():
    """A critic on features that stay as they are."""
    training, _ = set_up(tiny_recipe([distil()]))
    critic = torch.nn.Sequential(torch.nn.Linear(3, 2).requires_grad_(False), torch.nn.Linear(2, 1))
    training.trains("critic", critic, OptimizerConfig(lr=0.1))
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    training.update("critic", training.trained["critic"].module(torch.ones(2, 3)).sum())
    moved = {name for name, value in critic.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"1.weight", "1.bias"}
    assert set(training.state()["critics"]["critic"]) == set(before)
    with pytest.raises(ValueError, match="'fixed': no parameter of Linear takes a gradient"):
        training.trains("fixed", torch.nn.Linear(1, 1).requires_grad_(False), OptimizerConfig())


def test_a_gradient_scale_is_taken_out_of_each_alone():
    """What another has accumulated keeps the scale until that one's own update."""
    training, _ = set_up(tiny_recipe([distil()], {"training.gradient_accumulation_steps": 2}))
    accelerator = training.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    try:
        for name in "ab":
            training.trains(name, torch.nn.Linear(2, 1, bias=False), OptimizerConfig(lr=1e-3, max_grad_norm=None))
        for _ in range(2):
            with training.micro_batch():
                for name in "ab":
                    weight = training.trained[name].bare.weight
                    training.update(name, (weight * torch.tensor([3.0, 4.0])).sum())
        norms = training.take_metrics()
    finally:
        accelerator.state._mixed_precision = "no"
    assert norms == pytest.approx({"grad_norm/a": 5.0, "grad_norm/b": 5.0})


def test_a_miniature_takes_three_steps_of_any_stage(plugins):
    [stage] = load_recipe(recipe(), plugins=plugins).stages
    assert (stage.steps, stage.tiny().steps, stage.tiny().tiny().steps) == (STEPS, 3, 3)


def test_phases_of_an_expert_without_a_segment_are_checked():
    """It is trained on the whole trajectory."""
    stages, changes = [distil("free", phases=9)], {"experts.free": {"kind": "full"}}
    with pytest.raises(RecipeError, match="9 for a segment of 8 points; at most 8 are possible"):
        load_recipe(tiny_recipe(stages, changes))
    load_recipe(tiny_recipe([distil("free", phases=8)], changes))


def test_what_a_stage_runs_by_name_is_settled_with_it(monkeypatch, tmp_path):
    """From its middle a run cannot go on with another one."""
    monkeypatch.setattr(ConsistencyConfig, "used_experts", lambda self: [self.expert, "helper"])
    helper = {"experts.helper": {"kind": "lora", "from": "teacher", "rank": 2}, "training.checkpoint_every": 1}
    begun = run(tiny_recipe([distil()], helper), output=tmp_path, device="cpu").checkpoint
    other = tiny_recipe([distil()], {**helper, "experts.helper.rank": 4, "experts.detail.rank": 4})
    before, after = changed_keys(load_recipe(other), load_tree(begun, "state"))
    assert (before, after) == (["experts.helper.rank"], ["experts.detail.rank"])


def test_the_second_experts_rate_is_its_own(of_both):
    training, _ = set_up(tiny_recipe([distil(steps=4)], {"experts.detail.from": "teacher", "training.monitor": None}))
    config = OptimizerConfig(**{**asdict(OptimizerConfig()), "lr": 0.5, "schedule": "linear"})
    training.trains("other", "detail", config, updates=2)
    assert training.learning_rate == 1e-3
    [group] = training.trained["other"].optimizer.param_groups
    assert group["lr"] == 0.5
    for wanted in (0.25, 0.0):
        training.trained["other"].optimizer.step()
        training.trained["other"].scheduler.step()
        assert group["lr"] == pytest.approx(wanted)
