import math
from itertools import pairwise

import pytest
import torch

from moedistill.routers import TimestepRouter
from moedistill.sampling import sample
from moedistill.trajectory import Trajectory


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
