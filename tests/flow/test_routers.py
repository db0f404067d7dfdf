import doctest
import json

import pytest
import torch
from router_plugin import Shares

from moedistill.flow.routers import Boundary, Router, TimestepRouter, TimestepRouterConfig, check_router
from moedistill.flow.trajectory import Segment, Trajectory

EXPERTS = ["semantic", "detail"]


@pytest.fixture
def trajectory():
    return Trajectory.flow_matching()


def after(sigma):
    """The next float32."""
    return torch.nextafter(torch.tensor(sigma), torch.tensor(2.0)).item()


# --- Segments


def test_segments_are_half_open():
    low = Segment("a", 0.25, 0.75)
    assert low.closed == "low"
    assert [sigma in low for sigma in (0.25, after(0.25), 0.75, after(0.75))] == [False, True, True, False]
    high = Segment("a", 0.25, 0.75, closed="high")
    assert [sigma in high for sigma in (0.25, after(0.25), 0.75)] == [True, True, False]
    assert 1.0 in Segment("a", 0.25, 1.0, closed="high")


def test_segments_compare_in_float32():
    segment = Segment("a", 0.1, 0.9818)
    assert torch.tensor(0.9818).item() in segment
    assert 0.9818 in segment
    assert torch.tensor(0.1) not in segment


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.6, 0.5), (-0.1, 0.5), (0.5, 1.1), (0.5, 0.5 + 1e-9)])
def test_bad_segments(low, high):
    with pytest.raises(ValueError, match=r"empty|outside"):
        Segment("a", low, high)
    with pytest.raises(ValueError, match="closed"):
        Segment("a", 0.1, 0.2, "both")


# --- Routing


def test_a_boundary_belongs_below_or_above():
    low = TimestepRouter(EXPERTS, [0.5])
    assert [low.expert_at(sigma) for sigma in (1.0, after(0.5), 0.5, 0.0)] == ["semantic"] * 2 + ["detail"] * 2
    high = TimestepRouter(EXPERTS, [0.5], closed="high")
    assert [high.expert_at(sigma) for sigma in (1.0, 0.5, 0.4999, 0.0)] == ["semantic"] * 2 + ["detail"] * 2


def test_boundaries_compare_in_float32():
    """0.9818 in float64 lies below its own float32 value; both must route alike."""
    router = TimestepRouter(EXPERTS, [0.9818])
    assert router.expert_at(0.9818) == router.expert_at(torch.tensor(0.9818)) == "detail"


def test_any_number_of_experts():
    assert TimestepRouter(["one"], []).experts_at([0.0, 0.3, 1.0]) == ["one"] * 3
    five = TimestepRouter(list("abcde"), [0.8, 0.6, 0.4, 0.2])
    assert "".join(five.experts_at(torch.tensor([1.0, 0.8, 0.7, 0.5, 0.3, 0.2, 0.1]))) == "abbcdee"


def test_below_low_the_last_expert_goes_on():
    router = TimestepRouter(EXPERTS, [0.5], low=0.1)
    assert router.expert_at(0.05) == router.expert_at(0.0) == "detail"
    assert router.segment("detail") == Segment("detail", 0.1, 0.5)
    assert 0.05 not in router.segment("detail")


def test_routing_is_per_sample():
    router = TimestepRouter(EXPERTS, [0.98])
    assert router.experts_at(torch.tensor([0.99, 0.9])) == ["semantic", "detail"]
    assert router.experts_at(torch.tensor([0.9, 0.99])) == ["detail", "semantic"]


@pytest.mark.parametrize("closed", ["low", "high"])
def test_segments_and_routing_agree_on_every_point(closed, trajectory):
    router = TimestepRouter.from_points(trajectory, list("abcd"), [44, 38, 19], closed=closed)
    for sigma in trajectory.points[1:].tolist():
        owners = [segment.expert for segment in router.segments if sigma in segment]
        assert owners == [router.expert_at(sigma)]
    ranges = [trajectory.points_in(segment) for segment in reversed(router.segments)]
    assert [i for r in ranges for i in r] == list(range(1, 51))


@pytest.mark.parametrize("sigma", [-1e-3, 1.001, float("nan")])
def test_sigma_outside(sigma):
    router = TimestepRouter(EXPERTS, [0.5])
    with pytest.raises(ValueError, match="outside"):
        router.expert_at(sigma)
    with pytest.raises(ValueError, match="outside"):
        router.experts_at(torch.tensor([0.5, sigma]))


def test_experts_at_wants_one_sigma_per_sample():
    with pytest.raises(ValueError, match=r"\[2, 1\]"):
        TimestepRouter(EXPERTS, [0.5]).experts_at(torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("experts", "boundaries", "message"),
    [
        ([], [], "at least one"),
        (["a", ""], [0.5], "non-empty"),
        (["a", "a"], [0.5], "must differ"),
        ("ab", [0.5], "experts must be a list, not 'ab'"),
        (["a", "b"], [], "2 experts need 1 boundaries, not 0"),
        (["a"], [0.5], "1 experts need 0 boundaries, not 1"),
        (["a", "b", "c"], [0.2, 0.5], "descend strictly"),
        (["a", "b", "c"], [0.5, 0.5], "descend strictly"),
        (["a", "b"], [1.0], "descend strictly"),
        (["a", "b"], [0.01], "descend strictly"),
        (["a", "b"], [float("nan")], "outside"),
        (["a", "b"], [1.5], "outside"),
    ],
)
def test_bad_routers(experts, boundaries, message):
    with pytest.raises(ValueError, match=message):
        TimestepRouter(experts, boundaries, low=0.02)


def test_unknown_names():
    with pytest.raises(ValueError, match="no expert 'sem': the router knows semantic, detail"):
        TimestepRouter(EXPERTS, [0.5]).segment("sem")
    with pytest.raises(ValueError, match="closed"):
        TimestepRouter(EXPERTS, [0.5], closed="below")


# --- Units


def test_from_points(trajectory):
    router = TimestepRouter.from_points(trajectory, EXPERTS, [38])
    assert router.segment("semantic") == Segment("semantic", trajectory.sigma(38), 1.0)
    assert router.segment("detail") == Segment("detail", trajectory.sigma(0), trajectory.sigma(38))
    assert router.expert_at(trajectory.sigma(38)) == "detail"
    assert router.expert_at(trajectory.sigma(39)) == "semantic"
    with pytest.raises(ValueError, match="points 0 to 50"):
        TimestepRouter.from_points(trajectory, EXPERTS, [51])


def test_units_agree():
    by_sigma = TimestepRouter(EXPERTS, [0.875], closed="high")
    assert TimestepRouter.from_timesteps(EXPERTS, [875], closed="high") == by_sigma
    assert TimestepRouter.from_timesteps(EXPERTS, [437.5], 500, closed="high") == by_sigma
    assert TimestepRouter.from_ratio(EXPERTS, [0.875], closed="high") == by_sigma
    snr = ((1 - 0.875) / 0.875) ** 2
    assert TimestepRouter.from_snr(EXPERTS, [snr], closed="high").boundaries[0] == pytest.approx(0.875)
    assert TimestepRouter.from_snr(EXPERTS, [1.0], low=0.1).segment("detail") == Segment("detail", 0.1, 0.5)
    with pytest.raises(ValueError, match="snr"):
        TimestepRouter.from_snr(EXPERTS, [-1.0])


def test_wan22_sends_the_boundary_time_above():
    router = TimestepRouter.from_ratio(["high", "low"], [0.875], closed="high")
    assert router.experts_at(torch.tensor([876.0, 875.0, 874.0]) / 1000) == ["high", "high", "low"]


def test_a_round_trip_through_json():
    router = TimestepRouter(list("abc"), [0.9818, 0.5], low=0.0167, closed="high", notes=["as said"])
    data = json.loads(json.dumps(router.to_dict()))
    assert TimestepRouter.from_dict(data) == router
    for bad in ({**data, "kind": "soft"}, {**data, "extra": 1}, {"kind": "timestep"}):
        with pytest.raises(ValueError, match="not a timestep router"):
            TimestepRouter.from_dict(bad)


# --- Config


def build(trajectory, *boundaries, experts=EXPERTS, closed="low"):
    return TimestepRouterConfig(experts=experts, boundaries=list(boundaries), closed=closed).build(trajectory)


@pytest.mark.parametrize(
    ("boundary", "note"),
    [
        (Boundary(point=38), None),
        (Boundary(sigma=0.9818), "boundary sigma 0.9818 means point 38 (sigma 0.981763)"),
        (Boundary(timestep=982), "boundary timestep 982 means point 38 (sigma 0.981763)"),
        (Boundary(ratio=0.9818), "boundary ratio 0.9818 means point 38 (sigma 0.981763)"),
        (Boundary(snr=0.000345), "boundary snr 0.000345 means point 38 (sigma 0.981763)"),
        # The middle of a gap means neither neighbour.
        (Boundary(timestep=982.7), "boundary timestep 982.7 lies between points 38 and 39: taken as point 38"),
    ],
)
def test_every_unit_resolves_to_the_point_it_means(boundary, note, trajectory):
    router = build(trajectory, boundary)
    assert router == TimestepRouter.from_points(trajectory, EXPERTS, [38])
    assert len(router.notes) == (note is not None)
    assert note is None or router.notes[0].startswith(note)


@pytest.mark.parametrize("closed", ["low", "high"])
def test_a_value_between_points_routes_every_point_as_itself(closed, trajectory):
    for k in range(2, 49):
        middle = (trajectory.sigma(k) + trajectory.sigma(k + 1)) / 2
        resolved = build(trajectory, Boundary(sigma=middle), closed=closed)
        assert resolved.boundaries[0] == trajectory.sigma(k if closed == "low" else k + 1)
        by_value = TimestepRouter(EXPERTS, [middle], trajectory.sigma(0), closed)
        assert resolved.experts_at(trajectory.points) == by_value.experts_at(trajectory.points)


def test_timesteps_of_a_native_table_go_through_the_table():
    table = torch.cat([torch.linspace(0.05, 0.9, 99), torch.ones(1)])
    trajectory = Trajectory.native(table, 50)
    assert build(trajectory, Boundary(timestep=59)).boundaries == (table[59].item(),)


@pytest.mark.parametrize("units", [{}, {"point": 3, "sigma": 0.5}, {"ratio": 0.5, "snr": 1.0, "timestep": 10}])
def test_a_boundary_has_exactly_one_unit(units):
    with pytest.raises(ValueError, match="exactly one of point, sigma, timestep, ratio, snr"):
        Boundary(**units)


def test_point_zero_is_a_unit_like_any_other(trajectory):
    assert Boundary(point=0).resolve(trajectory) == (0, None)
    with pytest.raises(ValueError, match="descend strictly"):
        build(trajectory, Boundary(point=0))


@pytest.mark.parametrize(
    ("boundaries", "closed", "message"),
    [
        ([Boundary(point=19), Boundary(point=38)], "low", r"points \[19, 38\]: they must descend"),
        ([Boundary(sigma=0.9818), Boundary(sigma=0.98177)], "low", r"points \[38, 38\]: they must descend"),
        ([Boundary(point=50), Boundary(point=38)], "low", "they must descend"),
        ([Boundary(point=38), Boundary(point=51)], "low", "points 0 to 50"),
        ([Boundary(point=38), Boundary(sigma=0.001)], "low", "below the trajectory's first point"),
        ([Boundary(point=38), Boundary(point=1)], "high", "expert 'c' has no trajectory point"),
    ],
)
def test_bad_boundaries(boundaries, closed, message, trajectory):
    with pytest.raises(ValueError, match=message):
        build(trajectory, *boundaries, experts=list("abc"), closed=closed)


def test_experts_are_checked_before_a_trajectory_is_there():
    with pytest.raises(ValueError, match="2 experts need 1 boundaries, not 0"):
        TimestepRouterConfig(experts=EXPERTS)
    with pytest.raises(ValueError, match="must differ"):
        TimestepRouterConfig(experts=["a", "a"], boundaries=[Boundary(point=3)])
    assert TimestepRouterConfig(experts=["only"]).build(Trajectory.flow_matching()).segments[0].high == 1.0


# --- Routers of one's own


def own(**ends):
    return Shares(ends or {"semantic": 0.75, "middle": 0.5, "detail": 0.125})


@pytest.mark.parametrize("closed", ["low", "high"])
def test_segments_are_all_that_a_router_needs(closed, trajectory):
    """Everything that follows from the segments is what a timestep router with the same boundaries gives."""
    ours = Shares({"semantic": 0.75, "middle": 0.5, "detail": 0.0125}, closed)
    same = TimestepRouter(["semantic", "middle", "detail"], [0.75, 0.5], 0.0125, closed)
    check_router(ours, trajectory)
    check_router(same, trajectory)
    assert tuple(ours.segments) == same.segments
    assert ours.experts == same.experts
    assert ours.segment("middle") == same.segment("middle")
    sigmas = [*torch.linspace(0, 1, 200).tolist(), 0.75, after(0.75), 0.5, after(0.5), 0.0125, 0.001]
    assert ours.experts_at(sigmas) == same.experts_at(sigmas)
    assert set(ours.experts_at(sigmas)) == set(ours.experts)
    with pytest.raises(ValueError, match="no expert 'sem': the router knows semantic, middle, detail"):
        ours.segment("sem")
    with pytest.raises(ValueError, match="outside"):
        ours.expert_at(1.5)


def test_the_last_segment_holds_the_first_point(trajectory):
    lowest = trajectory.sigma(1)
    check_router(TimestepRouter(EXPERTS, [0.9], lowest, "high"), trajectory)
    for closed, low in (("low", lowest), ("high", after(lowest))):
        with pytest.raises(ValueError, match="the last segment must reach down to point 0"):
            check_router(TimestepRouter(EXPERTS, [0.9], low, closed), trajectory)


def test_a_router_must_say_what_it_is():
    class Half(Router):
        @property
        def segments(self):
            return [Segment("a", 0.0, 1.0)]

    with pytest.raises(TypeError, match="from_dict"):
        Half()


def test_a_timestep_router_still_needs_its_experts():
    with pytest.raises(TypeError, match="experts"):
        TimestepRouter()
    assert TimestepRouter(EXPERTS, [0.5]).experts == ("semantic", "detail")
    assert TimestepRouter(EXPERTS, [0.5]).notes == []
    assert hash(TimestepRouter(EXPERTS, [0.5])) == hash(TimestepRouter(EXPERTS, [0.5]))


@pytest.mark.parametrize(
    "router", [own(), TimestepRouter(EXPERTS, [0.5]), TimestepRouter(["one"])], ids=["own", "two", "one"]
)
def test_dispatch_is_a_loop_over_samples(router):
    generator = torch.Generator().manual_seed(0)
    sigmas, x = torch.rand(17, generator=generator), torch.randn(17, 4, 2, 3, 3, generator=generator)
    networks = {name: (lambda x, s, k=k: (k + 1) * x + s.view(-1, 1, 1, 1, 1)) for k, name in enumerate(router.experts)}
    one_by_one = torch.cat(
        [networks[router.expert_at(sigma)](x[[row]], sigmas[[row]]) for row, sigma in enumerate(sigmas)]
    )
    together, seen = torch.full_like(x, torch.nan), []
    for expert, rows in router.dispatch(sigmas):
        assert rows.dtype == torch.int64
        assert rows.tolist() == sorted(rows.tolist())
        seen.append(expert)
        together[rows] = networks[expert](x[rows], sigmas[rows])
    assert torch.equal(together, one_by_one)
    assert seen == list(router.experts)


def test_dispatch_leaves_out_who_has_nothing_to_do():
    router = own()
    assert [(name, rows.tolist()) for name, rows in router.dispatch([0.2, 0.9, 0.01])] == [
        ("semantic", [1]),
        ("detail", [0, 2]),
    ]
    assert router.dispatch(torch.zeros(0)) == []
    with pytest.raises(ValueError, match=r"\[2, 1\]"):
        router.dispatch(torch.zeros(2, 1))
    with pytest.raises(ValueError, match="outside"):
        router.dispatch(torch.tensor([0.5, float("nan")]))


def test_the_example_of_dispatch_runs():
    [example] = doctest.DocTestFinder().find(Router.dispatch, "dispatch")
    assert len(example.examples) == 8
    assert doctest.DocTestRunner().run(example).failed == 0
