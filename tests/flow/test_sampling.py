import json
import math
from itertools import pairwise

import pytest
import torch
from helpers import distil, evaluate, tiny_recipe
from safetensors.torch import load_file

from moedistill.errors import RecipeError, UserError
from moedistill.flow.process import add_noise, diffuse
from moedistill.flow.routers import TimestepRouter
from moedistill.flow.sampling import sample
from moedistill.flow.sampling_points import SampleConfig
from moedistill.flow.trajectory import Trajectory
from moedistill.model.sample_in_batches import sample_in_batches
from moedistill.recipe.loading import load_recipe
from moedistill.runs.loop import run
from moedistill.runs.sample import sample_run, sampling_config
from moedistill.runtime.randomness import Draws
from moedistill_digits.data import DigitsDataset


def test_steps_by_hand():
    seen = []
    x = sample(
        lambda x, sigma: x + sigma.view(-1, 1),
        torch.ones(2, 1),
        [1.0, 0.5, 0.0],
        callback=lambda step, sigma, x: seen.append((step, sigma, x[0].item())),
    )
    assert seen == [(0, 0.5, 0.0), (1, 0.0, -0.25)]
    assert x.tolist() == [[-0.25], [-0.25]]


def test_sigmas_are_used_exactly_as_given():
    """Not shifted, not snapped to a grid; float32, one per sample."""
    sigmas, seen = [1.0, 0.9920, 0.9818, 0.9124, 0.0], []

    def velocity(x, sigma):
        assert sigma.dtype == torch.float32
        assert sigma.shape == (3,)
        seen.append(sigma[0].item())
        return torch.zeros_like(x)

    sample(velocity, torch.zeros(3, 4, 2, 2, 2), sigmas)
    assert seen == torch.tensor(sigmas[:-1]).tolist()
    from_tensor = seen.copy()
    seen.clear()
    sample(velocity, torch.zeros(3, 4, 2, 2, 2), torch.tensor(sigmas, dtype=torch.float64))
    assert seen == from_tensor


def test_the_router_names_the_expert_of_every_step():
    trajectory = Trajectory.flow_matching()
    router = TimestepRouter.from_points(trajectory, ["semantic", "detail"], [38])
    calls = []

    def velocity(x, sigma, expert=None):
        calls.append(expert)
        return torch.zeros_like(x)

    x = torch.zeros(1, 2)
    sigmas = [*trajectory.points[[50, 44, 38, 19]].tolist(), 0.0]
    sample(velocity, x, sigmas, router)
    assert calls == ["semantic", "semantic", "detail", "detail"]
    calls.clear()
    sample(velocity, x, sigmas)
    assert calls == [None] * 4
    # Without a router the velocity need not know the keyword at all.
    sample(lambda x, sigma: x, x, sigmas)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_is_that_of_x(dtype):
    x = sample(lambda x, sigma: x.float(), torch.ones(1, 2, dtype=dtype), [1.0, 0.5, 0.0])
    assert x.dtype == dtype


def test_no_gradients_and_x_is_left_alone():
    weight, x = torch.ones(1, requires_grad=True), torch.ones(1, 2)
    assert not sample(lambda x, sigma: weight * x, x, [1.0, 0.0]).requires_grad
    assert torch.equal(x, torch.ones(1, 2))


@pytest.mark.parametrize(
    "sigmas", [[], [1.0], [0.0, 1.0], [1.0, 0.5, 0.5], [1.0, 0.5, 0.5 - 1e-9], [1.2, 0.0], [1.0, float("nan")]]
)
def test_bad_sigmas(sigmas):
    with pytest.raises(ValueError, match=r"descend strictly|outside"):
        sample(lambda x, sigma: x, torch.ones(1, 2), sigmas)


def test_a_velocity_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\[1, 2\] and velocity \[1, 1\]"):
        sample(lambda x, sigma: x[:, :1], torch.ones(1, 2), [1.0, 0.0])


# --- Gaussian data, for which everything is known: x0 ~ N(MU, TAU²)

MU, TAU = 1.5, 0.3


def moments(sigma):
    """Mean and standard deviation of x at sigma."""
    return (1 - sigma) * MU, math.sqrt((1 - sigma) ** 2 * TAU**2 + sigma**2)


def gaussian_velocity(x, sigma, expert=None):
    """E[eps - x0 | x]: both posterior means are linear in x."""
    sigma = sigma[0].item()
    mean, std = moments(sigma)
    return (sigma - (1 - sigma) * TAU**2) / std**2 * (x - mean) - MU


def flow_map(x, sigma, sigma_to):
    (mean, std), (mean_to, std_to) = moments(sigma), moments(sigma_to)
    return mean_to + std_to / std * (x - mean)


@pytest.mark.parametrize("last", [0.0, 0.4])
def test_euler_converges_to_the_exact_flow_map_at_first_order(last):
    x = torch.linspace(-3, 3, 13, dtype=torch.float64).view(1, -1)
    exact = flow_map(x, 1.0, last)
    errors = []
    for num_steps in (50, 100, 200, 400):
        sigmas = torch.linspace(1.0, last, num_steps + 1)
        errors.append((sample(gaussian_velocity, x, sigmas) - exact).abs().max().item())
    ratios = [coarse / fine for coarse, fine in pairwise(errors)]
    assert all(1.8 < ratio < 2.2 for ratio in ratios)
    assert errors[-1] < 0.01


def test_euler_reaches_the_data_distribution():
    """In float32, over the grid that training uses: mean and spread are those of the data."""
    trajectory = Trajectory.flow_matching(1000, shift=3.0, end="zero")
    x = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    result = sample(gaussian_velocity, x, trajectory.points.flip(0))
    torch.testing.assert_close(result, flow_map(x, 1.0, 0.0), rtol=0, atol=1e-2)
    assert result.mean().item() == pytest.approx(MU, abs=0.02)
    assert result.std().item() == pytest.approx(TAU, abs=0.01)


def test_a_router_of_equals_changes_nothing():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    sigmas = torch.linspace(1, 0, 9)
    router = TimestepRouter(["a", "b"], [0.5])
    assert torch.equal(sample(gaussian_velocity, x, sigmas), sample(gaussian_velocity, x, sigmas, router))


# --- noise drawn anew between the steps


def test_fresh_noise_by_hand():
    """From 1 to 0.5, by way of 0.25, where half of the noise is drawn anew; then to 0, where none is."""
    asked = []

    def noise(step):
        asked.append(step)
        return torch.full((1, 1), 10.0)

    x = sample(lambda x, sigma: x, torch.ones(1, 1), [1.0, 0.5, 0.0], eta=0.5, noise=noise)
    assert asked == [0]
    # 1 - 0.75·1 = 0.25 at sigma 0.25; a = 0.5/0.75, so that 2/3·0.25 + sqrt(0.25 - 1/36)·10; and then half of it.
    assert x.item() == pytest.approx(0.5 * (0.25 * 2 / 3 + math.sqrt(0.25 - 1 / 36) * 10))
    sample(lambda x, sigma: x, torch.ones(1, 1), [1.0, 0.7, 0.5, 0.0], eta=0.5, noise=noise)
    assert asked == [0, 0, 1]


def test_without_eta_nothing_changes():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    sigmas = torch.linspace(1, 0, 9)
    by_hand = x
    for sigma, following in pairwise(sigmas):
        by_hand = by_hand + (following - sigma) * gaussian_velocity(by_hand, sigma.expand(4))
    assert torch.equal(sample(gaussian_velocity, x, sigmas), by_hand)
    assert torch.equal(sample(gaussian_velocity, x, sigmas, eta=0.0, noise=lambda step: x * torch.nan), by_hand)


def test_eta_1_is_the_sampling_of_consistency_models():
    """Jump to the data, then noise as in training."""
    x, fresh = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    data = x - 1.0 * gaussian_velocity(x, torch.ones(4))
    sampled = sample(gaussian_velocity, x, [1.0, 0.6], eta=1.0, noise=lambda step: fresh)
    torch.testing.assert_close(sampled, add_noise(data, fresh, 0.6))


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_fresh_noise_keeps_the_law(eta):
    """An exact jump to where a step goes down to, then noise: mean and spread are those of x there, at every sigma."""
    generator = torch.Generator().manual_seed(0)
    sigmas = [1.0, 0.8, 0.5, 0.2]
    below = {above: (1 - eta) * sigma for above, sigma in pairwise(sigmas)}

    def exact(x, sigma):
        above = min(below, key=lambda one: abs(one - sigma[0].item()))
        return (flow_map(x, above, below[above]) - x) / (below[above] - above)

    def check(step, sigma, x):
        mean, std = moments(sigma)
        assert x.mean().item() == pytest.approx(mean, abs=0.005)
        assert x.std().item() == pytest.approx(std, rel=0.005)

    x = torch.randn(400_000, 1, generator=generator)
    sample(exact, x, sigmas, eta=eta, noise=lambda step: torch.randn(x.shape, generator=generator), callback=check)


def test_diffuse():
    x, noise = torch.full((2, 3), 2.0), torch.ones(2, 3)
    assert torch.equal(diffuse(x, noise, 0.4, 0.4), x)
    torch.testing.assert_close(diffuse(x, noise, 0.0, 0.3), add_noise(x, noise, 0.3))
    # Levels by sample; noises add up in variance.
    low, high = torch.tensor([0.2, 0.5]), torch.tensor([0.6, 0.9])
    keep = (1 - high) / (1 - low)
    added = diffuse(torch.zeros(2, 3), noise, low, high)[:, 0]
    torch.testing.assert_close(added**2 + (keep * low) ** 2, high**2)
    # Nothing is lost between levels that are close: 2·0.5·gap/(1 - 0.5), to first order.
    for gap in (1e-4, 1e-5):
        one = diffuse(torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64), 0.5, 0.5 + gap)
        assert one.item() == pytest.approx(math.sqrt(2 * gap), rel=1e-3)
    for levels, message in (((0.5, 0.4), "must be at least"), ((1.0, 1.0), "must be below 1")):
        with pytest.raises(ValueError, match=message):
            diffuse(x, noise, *levels)


def test_eta_that_cannot_be():
    for options, message in (
        ({"eta": 0.5}, "needs fresh noise"),
        ({"eta": 1.5}, "outside"),
        ({"eta": -0.1}, "outside"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(lambda x, sigma: x, torch.ones(1, 2), [1.0, 0.0], **options)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_a_sample_does_not_depend_on_its_batch(eta):
    generator = torch.Generator().manual_seed(0)
    x, fresh = torch.randn(7, 3, generator=generator), torch.randn(3, 7, 3, generator=generator)

    def velocity(x, sigma, cond, expert):
        return gaussian_velocity(x, sigma) * (1 + cond["label"].view(-1, 1)) + (expert == "a")

    def sampled(size):
        return sample_in_batches(
            velocity, x, {"label": torch.arange(7)}, [1.0, 0.7, 0.4, 0.0], TimestepRouter(["a", "b"], [0.5]),
            eta=eta, fresh_noise=lambda step, rows: fresh[step, rows.start : rows.stop], batch_size=size,
        )  # fmt: skip

    assert torch.equal(sampled(7), sampled(3))
    assert torch.equal(sampled(7), sampled(1))


# --- through a run: evaluation, the sample stage, `sample`, and export

RENOISED = {"points": [8, 4], "eta": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose recipe samples with fresh noise, with an evaluation, samples and an export."""
    candidates = [
        {"name": "recipe"},
        {"name": "same", "sample": RENOISED},
        {"name": "plain", "sample": {"points": [8, 4]}},
        {"name": "short", "steps": 2},
        {"name": "some", "sample": {"steps": 2, "eta": 0.5}},
        {"name": "exact", "model": "exact", "steps": 8},
        {"name": "exact, re-noised", "model": "exact", "sample": {"steps": 8, "eta": 1.0}},
    ]
    check = evaluate(candidates=candidates, reference="recipe", samples=6, batch_size=4)
    stages = [
        distil(optimizer={"lr": 0.02}), check, {**check, "name": "singly", "batch_size": 1},
        {"name": "samples", "kind": "sample", "prompts": ["3 right"]}, {"name": "export", "kind": "export"},
    ]  # fmt: skip
    return run(tiny_recipe(stages, {"sample": RENOISED}), output=tmp_path_factory.mktemp("run"), device="cpu").output


def test_candidates_have_steps_of_their_own(folder):
    latents = load_file(folder / "evaluate" / "latents.safetensors")
    assert torch.equal(latents["recipe"], latents["same"])
    assert torch.equal(latents["plain"], latents["short"])
    for one, other in (("plain", "same"), ("plain", "some"), ("some", "same"), ("exact", "exact, re-noised")):
        assert (latents[one] - latents[other]).abs().mean() > 0.01, (one, other)


def test_fresh_noise_of_a_sample_is_its_own(folder):
    """Of samples in batches of 4 and one by one, which a network computes with other last bits."""
    batched, singly = (load_file(folder / name / "latents.safetensors") for name in ("evaluate", "singly"))
    for name in ("recipe", "some", "exact, re-noised"):
        torch.testing.assert_close(batched[name], singly[name], rtol=1e-4, atol=1e-4)
    assert (batched["recipe"][0] - batched["recipe"][1]).abs().mean() > 0.1


def test_the_exact_velocity_by_hand(folder):
    """With noise of its own for each step and sample."""
    latents = load_file(folder / "evaluate" / "latents.safetensors")
    cond = {name: latents[f"conditioning.{name}"] for name in ("digit", "direction")}
    data, shape = DigitsDataset(1), latents["exact"].shape[1:]
    draws = [Draws(0, "evaluate", step, range(6)) for step in range(8)]
    by_hand = sample(
        lambda x, sigma: (x - data.posterior_mean(x, sigma, cond)) / sigma.view(-1, 1, 1, 1, 1),
        draws[0].normal("noise", shape),
        [*Trajectory.flow_matching(8, 5.0).points.flip(0)[:-1].tolist(), 0.0],
        eta=1.0,
        noise=lambda step: draws[step].normal("fresh_noise", shape),
    )
    torch.testing.assert_close(latents["exact, re-noised"], by_hand, rtol=1e-3, atol=1e-3)


def test_the_exact_velocity_ends_at_samples_of_the_data(folder):
    """Of the class asked for."""
    latents = load_file(folder / "evaluate" / "latents.safetensors")
    data = DigitsDataset(1).latents
    for name in ("exact", "exact, re-noised"):
        asked = zip(latents[name], latents["conditioning.digit"], latents["conditioning.direction"], strict=True)
        for one, digit, direction in asked:
            assert (data[digit, direction] - one).square().flatten(1).mean(1).min() < 1e-3


def test_the_recipe_s_eta_travels_along(folder, tmp_path):
    """Into the sample stage, and with a run and its export."""
    assert json.loads((folder / "samples" / "samples.json").read_text())["eta"] == 1.0
    assert json.loads((folder / "export" / "export.json").read_text())["eta"] == 1.0
    asked = {"prompts": ["3 right"], "num": 2}
    usual = sample_run(folder, **asked, output=tmp_path / "usual")
    assert json.loads((usual.output / "samples.json").read_text())["eta"] == 1.0
    exported = sample_run(folder / "export", **asked, output=tmp_path / "export").videos
    assert torch.equal(usual.videos, exported)
    alone = sample_run(folder, prompts=["3 right"], output=tmp_path / "alone").videos
    assert torch.allclose(alone, usual.videos[:1], atol=1e-5)
    plain = sample_run(folder, **asked, eta=0.0, output=tmp_path / "plain").videos
    steps = sample_run(folder, **asked, steps=2, output=tmp_path / "steps").videos
    assert torch.equal(plain, steps)  # steps of one's own have no eta, unless it is given
    assert not torch.allclose(plain, usual.videos, atol=0.05)


def test_which_steps_are_sampled(folder):
    recipe = load_recipe(tiny_recipe([distil()], {"sample": RENOISED}))
    assert sampling_config(recipe) == SampleConfig(**RENOISED)
    assert sampling_config(recipe, eta=0.2) == SampleConfig(points=[8, 4], eta=0.2)
    assert sampling_config(recipe, steps=3) == SampleConfig(steps=3)
    assert sampling_config(recipe, sigmas=[1.0], eta=1.0) == SampleConfig(sigmas=[1.0], eta=1.0)
    with pytest.raises(UserError, match="sample: eta 2 is outside"):
        sample_run(folder, eta=2, output=folder / "unused")


@pytest.mark.parametrize(
    ("candidate", "changes", "key", "message"),
    [
        ({"steps": 2, "sample": {"steps": 2}}, {}, "", "steps 2 and sample: give one of them"),
        ({"sample": {"points": [8, 9]}}, {}, ".sample", "point 9 does not exist"),
        ({"sample": {"steps": 2, "eta": 1.1}}, {}, ".sample.eta", "1"),
        ({"sample": {"eta": 1.0}}, {}, ".sample", "give exactly one of points"),
        ({"model": "exact", "stand_ins": {"detail": "teacher"}}, {}, ".stand_ins", "exact runs everywhere"),
        ({"model": "exact"}, {"data": {"kind": "prompts", "path": None}}, ".model", "'prompts' data do not provide"),
    ],
)
def test_candidates_that_cannot_be(candidate, changes, key, message):
    stage = evaluate(candidates=[{"name": "one", **candidate}], reference="one")
    with pytest.raises(RecipeError) as caught:
        load_recipe(tiny_recipe([stage], changes))
    [problem] = caught.value.problems
    assert problem.path == f"stages.0.candidates.0{key}"
    assert message in problem.message


# --- where no fresh noise can be drawn


def test_pipelines_refuse_fresh_noise(monkeypatch):
    """When a recipe is checked, when a backbone samples, and when experts are put into a pipeline."""
    from moedistill_wan.backbone import WanConfig

    with pytest.raises(RecipeError) as caught:
        load_recipe("baselines/wan_1_3b_lcm", ["sample.eta=1"])
    [problem] = caught.value.problems
    assert (problem.path, "sample.eta 1 draws fresh noise" in problem.message) == ("stages.1", True)

    backbone = WanConfig(pretrained=None).tiny().build()
    with pytest.raises(ValueError, match=r"eta 0.5: a pipeline's steps draw no fresh noise"):
        next(backbone.generate(None, ["rain"], torch.tensor([1.0, 0.0]), seed=0, eta=0.5))

    from moedistill import apply

    recipe = load_recipe("baselines/wan_1_3b_lcm")
    recipe.sample = SampleConfig(steps=2, eta=1.0)
    monkeypatch.setattr("moedistill.integrations.diffusers.apply.read_trained", lambda *_, **__: (recipe, {}, {}))
    with pytest.raises(UserError, match=r"somewhere: eta 1: .* give steps or sigmas, whose eta is 0"):
        apply(object(), "somewhere")
    with pytest.raises(UserError, match=r"was made for a WanPipeline, not a builtins\.object"):
        apply(object(), "somewhere", steps=2)
