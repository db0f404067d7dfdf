"""Rules of routers and trajectories that hold for all of them."""

import json
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import SIGMAS

from moedistill.flow.routers import Boundary, TimestepRouter, TimestepRouterConfig, check_router
from moedistill.flow.trajectory import Trajectory

SHIFTS = st.floats(0.2, 30)


@dataclass(frozen=True)
class Routed:
    trajectory: Trajectory
    points: list[int]
    router: TimestepRouter


@st.composite
def trajectories(draw):
    num_steps = draw(st.integers(1, 60))
    return Trajectory.flow_matching(num_steps, draw(SHIFTS), end=draw(st.sampled_from(["grid_min", "zero"])))


@st.composite
def tables(draw):
    """A model's own table of sigmas, and a trajectory over some of them."""
    entries = draw(st.lists(st.integers(1, 9999), min_size=3, max_size=50, unique=True))
    table = torch.tensor([*sorted(entries), 10_000]) / 10_000
    return Trajectory.native(table, draw(st.integers(1, len(table) // 2)))


@st.composite
def routed(draw):
    """A router by points of a trajectory."""
    num_steps = draw(st.integers(4, 60))
    trajectory = Trajectory.flow_matching(num_steps, draw(SHIFTS), end=draw(st.sampled_from(["grid_min", "zero"])))
    inside = st.integers(2, num_steps - 1)  # above point 1 and below the last, so that each segment has its own
    points = sorted(draw(st.lists(inside, max_size=3, unique=True)), reverse=True)
    experts = [f"expert {k}" for k in range(len(points) + 1)]
    closed = draw(st.sampled_from(["low", "high"]))
    return Routed(trajectory, points, TimestepRouter.from_points(trajectory, experts, points, closed=closed))


# -- routers ----------------------------------------------------------------------------------------------------------


@given(routed(), st.lists(SIGMAS, max_size=20))
def test_every_sigma_is_served_exactly_once(case, sigmas):
    router = case.router
    edges = [edge for b in router.boundaries for edge in (b, _next(b, 0.0), _next(b, 1.0))]
    for sigma in [*sigmas, *edges, 0.0, 1.0]:
        owners = [segment.expert for segment in router.segments if sigma in segment]
        beneath = sigma < router.low or (sigma == router.low and router.closed == "low")
        assert len(owners) == (0 if beneath else 1)
        assert router.expert_at(sigma) == (router.experts[-1] if beneath else owners[0])


def _next(sigma, towards):
    return torch.nextafter(torch.tensor(sigma), torch.tensor(towards)).item()


@given(routed(), st.lists(SIGMAS, max_size=20))
def test_a_batch_is_parted_into_all_its_rows(case, sigmas):
    parts = case.router.dispatch(sigmas)
    assert sorted(row for _, rows in parts for row in rows.tolist()) == list(range(len(sigmas)))
    assert all(case.router.expert_at(sigmas[row]) == expert for expert, rows in parts for row in rows.tolist())
    served = [expert for expert, _ in parts]
    assert served == [expert for expert in case.router.experts if expert in served]


@given(routed())
def test_a_router_survives_json(case):
    check_router(case.router, case.trajectory)
    again = TimestepRouter.from_dict(json.loads(json.dumps(case.router.to_dict())))
    assert again == case.router
    assert again.segments == case.router.segments


@given(routed())
def test_a_boundary_is_the_same_in_every_unit(case):
    trajectory, router, sigmas = case.trajectory, case.router, [case.trajectory.sigma(point) for point in case.points]
    low, closed = router.low, router.closed
    assert TimestepRouter.from_ratio(router.experts, sigmas, low, closed) == router
    times = [trajectory.timestep(sigma) for sigma in sigmas]
    by_time = TimestepRouter.from_timesteps(router.experts, times, trajectory.num_train_timesteps, low, closed)
    assert by_time.boundaries == pytest.approx(router.boundaries, rel=1e-6)
    snrs = [((1 - sigma) / sigma) ** 2 for sigma in sigmas]
    assert TimestepRouter.from_snr(router.experts, snrs, low, closed).boundaries == pytest.approx(sigmas, rel=1e-6)
    for unit, values in {"point": case.points, "sigma": sigmas, "ratio": sigmas, "timestep": times}.items():
        boundaries = [Boundary(**{unit: value}) for value in values]
        config = TimestepRouterConfig(experts=list(router.experts), boundaries=boundaries, closed=closed)
        assert config.build(trajectory) == router, unit


# -- trajectories -----------------------------------------------------------------------------------------------------


@given(trajectories() | tables())
def test_points_ascend_and_mean_themselves(trajectory):
    points = trajectory.points.tolist()
    assert points == sorted(set(points))
    assert points[-1] == 1.0
    for i in range(trajectory.num_steps + 1):
        sigma = trajectory.sigma(i)
        assert sigma == points[i]
        assert trajectory.nearest(sigma) == i
        assert trajectory.bracket(sigma) == (i - 1, i)


@given(trajectories() | tables(), st.lists(SIGMAS, min_size=2, max_size=20))
def test_native_times_are_an_inverse_and_keep_order(trajectory, sigmas):
    lowest = 0.0 if trajectory.native_sigmas is None else trajectory.native_sigmas[0].item()
    x = torch.tensor([*sorted(sigma for sigma in sigmas if sigma >= lowest), 1.0])
    times = trajectory.timestep(x)
    assert bool((times[1:] >= times[:-1]).all())
    assert times[-1] == (
        trajectory.num_train_timesteps if trajectory.native_sigmas is None else len(trajectory.native_sigmas) - 1
    )
    # A table's entries may lie close together: then a time is coarse, and so is its sigma by as much.
    torch.testing.assert_close(trajectory.sigma_of_timestep(times), x, rtol=0, atol=1e-5)
    assert [trajectory.timestep(float(one)) for one in x] == times.tolist()


@given(trajectories(), SIGMAS)
def test_shifting_has_an_inverse(trajectory, u):
    assert trajectory.unshift(trajectory.shifted(u)) == pytest.approx(u, abs=1e-4)
    assert trajectory.shifted(0.0) == 0.0
    assert trajectory.shifted(1.0) == pytest.approx(1.0, abs=1e-6)


@given(routed())
def test_segments_cover_the_points(case):
    starts = [point for segment in case.router.segments for point in case.trajectory.points_in(segment)]
    assert sorted(starts) == list(range(1, case.trajectory.num_steps + 1))
    assert len(set(starts)) == len(starts)
