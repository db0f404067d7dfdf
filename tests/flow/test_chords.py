"""A perfect student on Gaussian data, sampled by the real sampler: its variance is the formula's at every step."""

import gaussian_plugin as gaussian
import pytest
import torch

from moedistill import Trajectory, load_recipe, sample
from moedistill.flow.chords import power_at, sampled_power

TRAJECTORY = Trajectory.flow_matching(num_steps=50, shift=2.5, end="zero")
STOPS = (50, 40, 30, 15)
TAU2 = gaussian.TAU.flatten() ** 2
SAMPLES = 20_000


def sigma_at(*points):
    return [TRAJECTORY.sigma(point) for point in points]


def landing_at(*edges):
    """The landing of a jump from a sigma, for phases whose lower edges are these points."""
    ends = sigma_at(*edges)
    return lambda sigma: max(end for end in ends if end < sigma)


def sampled(landing, eta=0.0):
    """Variance by channel at each sigma `[n, C]`, of samples of the student that jumps to `landing` without error."""
    generator = torch.Generator().manual_seed(0)

    def draw(step=0):
        drawn = torch.randn(SAMPLES, *gaussian.SHAPE, generator=generator, dtype=torch.float64)
        return drawn / drawn.std((0, 2, 3, 4), correction=0, keepdim=True)

    def velocity(x, sigma):
        start = sigma[0].item()
        end = landing(start)
        return (gaussian.flow_map(x, start, end) - x) / (end - start)

    kept = []
    sigmas = [*sigma_at(*STOPS), 0.0]
    sample(velocity, draw(), sigmas, eta=eta, noise=draw, callback=lambda step, sigma, x: kept.append(x))
    return torch.stack([x.var((0, 2, 3, 4), correction=0) for x in kept])


def predicted(landing, eta=0.0):
    sigmas = [*sigma_at(*STOPS), 0.0]
    return torch.tensor([sampled_power(sigmas, landing, power=power.item(), eta=eta)[1:] for power in TAU2]).T.double()


@pytest.mark.parametrize("edges", [(30, 0), (0,), (40, 30, 15, 0), (39, 30, 14, 0)], ids=str)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_the_formula_is_the_samplers(edges, eta):
    landing = landing_at(*edges)
    # Without fresh noise every step is linear, and equal to rounding; with it, to the spread of a sample variance.
    tolerance = {"rtol": 1e-4 if eta == 0 else 0.02, "atol": 0}
    torch.testing.assert_close(sampled(landing, eta), predicted(landing, eta), **tolerance)


def test_with_stops_as_edges_the_variance_is_the_datas():
    landing = landing_at(40, 30, 15, 0)
    right = torch.tensor([[power_at(sigma, power.item()) for power in TAU2] for sigma in [*sigma_at(40, 30, 15), 0.0]])
    torch.testing.assert_close(predicted(landing), right.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(sampled(landing), right.double(), rtol=1e-4, atol=0)
    # Edges off by one point already leave the path; fresh noise brings back most of it.
    off = predicted(landing_at(39, 30, 14, 0))[-1] / TAU2 - 1
    assert (off.abs() > 1e-3).all()


def test_stops_inside_a_phase_have_too_much_and_fresh_noise_brings_it_back():
    """All noise drawn anew, each step starts from where a jump was trained to end: the data again."""
    chord, fresh = (predicted(landing_at(30, 0), eta)[-1] / TAU2 for eta in (0.0, 1.0))
    assert (chord > 1.2).all()
    assert (abs(fresh - 1) < abs(chord - 1) / 2).all()
    alone = predicted(landing_at(0), 1.0)[-1] / TAU2
    torch.testing.assert_close(alone, torch.ones_like(alone), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("name", "to_zero", "as_trained"),
    [
        ("dcm_hunyuan_published", 1.15, 1.11),
        ("dcm_ltx", 1.27, 1.25),
        ("dcm_wan_1_3b_published", 1.34, 1.30),
        ("dcm_digits", 1.55, 1.54),
    ],
)
def test_the_detail_steps_of_the_shipped_lists(name, to_zero, as_trained):
    """What docs/methods/dcm.md says of data of variance 1: of jumps to 0, and to p_0, as they are trained."""
    recipe = load_recipe(name)
    trajectory = recipe.trajectory.build()
    detail = recipe.router.build(trajectory).segment("detail")
    steps = [sigma for sigma in recipe.sample.resolve(trajectory).tolist() if sigma <= detail.high]
    for end, power in ((0.0, to_zero), (detail.low, as_trained)):
        assert sampled_power(steps, lambda sigma, end=end: end)[-1] == pytest.approx(power, abs=0.005)
