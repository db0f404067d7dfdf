import pytest
import torch

from moedistill.flow.trajectory import FlowMatching, Native, Points, Segment, Trajectory

# A variance-preserving table like CogVideoX's: starts above 0, ends in exactly 1 (zero terminal SNR).
TABLE = torch.cat([torch.linspace(0.05, 0.9995, 99), torch.ones(1)])


def test_flow_matching_defaults_are_dcms():
    trajectory = Trajectory.flow_matching()
    assert trajectory.num_steps == 50
    assert trajectory.points.dtype == torch.float32
    assert trajectory.points.shape == (51,)
    assert trajectory.sigma(0) == pytest.approx(0.0167323, abs=1e-7)
    assert trajectory.sigma(1) == pytest.approx(0.257576, abs=1e-6)
    assert trajectory.sigma(38) == 0.9817629456520081
    assert trajectory.sigma(50) == 1.0
    assert (trajectory.points.diff() > 0).all()


def test_end_zero_changes_the_first_point_only():
    default, zero = Trajectory.flow_matching(), Trajectory.flow_matching(end="zero")
    assert zero.sigma(0) == 0.0
    assert torch.equal(default.points[1:], zero.points[1:])


@pytest.mark.parametrize("default_dtype", [torch.float64])
def test_points_do_not_depend_on_torchs_default_dtype(default_dtype):
    expected = Trajectory.flow_matching().points
    torch.set_default_dtype(default_dtype)
    try:
        assert torch.equal(Trajectory.flow_matching().points, expected)
        assert Trajectory.from_sigmas([0.1, 0.5, 1.0]).points.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_it_is_frozen_and_keeps_its_own_copy():
    points = torch.tensor([0.0, 0.5, 1.0])
    trajectory = Trajectory.from_sigmas(points)
    points[1] = 0.7
    assert trajectory.sigma(1) == 0.5
    with pytest.raises(AttributeError):
        trajectory.points = points


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([1.0], "at least two"),
        ([[0.0, 1.0]], "at least two"),
        ([0.0, 0.5, 0.5, 1.0], "entry 1 is 0.5 and entry 2 is 0.5"),
        ([1.0, 0.5, 0.0], "must ascend strictly"),
        ([0.0, float("nan"), 1.0], "must ascend strictly"),
        ([-0.1, 0.5, 1.0], "start at 0 or above"),
        ([0.0, 0.5, 0.9], "end at exactly 1"),
        ([0.5, 0.5 + 1e-9, 1.0], "must ascend strictly"),
    ],
)
def test_bad_points(points, message):
    with pytest.raises(ValueError, match=message):
        Trajectory.from_sigmas(points)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps 0 must be a whole number of at least 1"),
        ({"shift": 0.0}, "shift 0.0 must be a positive number"),
        ({"shift": float("nan")}, "shift nan must be a positive number"),
        ({"num_steps": 1000}, "below num_train_timesteps"),
        ({"end": "zeor"}, "use grid_min or zero"),
    ],
)
def test_bad_grids(arguments, message):
    with pytest.raises(ValueError, match=message):
        Trajectory.flow_matching(**arguments)


def test_a_step_per_training_time_needs_end_zero():
    assert Trajectory.flow_matching(1000, end="zero").num_steps == 1000


# --- Units


@pytest.mark.parametrize(
    ("sigma", "point"), [(0.9818, 38), (0.982, 38), (0.9124, 19), (0.992, 44), (1.0, 50), (0.81, 10)]
)
def test_nearest_understands_rounded_values(sigma, point):
    assert Trajectory.flow_matching().nearest(sigma) == point


def test_nearest_finds_every_point_itself():
    trajectory = Trajectory.flow_matching()
    assert [trajectory.nearest(sigma) for sigma in trajectory.points.tolist()] == list(range(51))


def test_nearest_reaches_a_quarter_of_the_gap():
    trajectory = Trajectory.from_sigmas([0.25, 0.5, 1.0])
    assert trajectory.nearest(0.625) == 1
    assert trajectory.nearest(0.875) == 2
    for sigma in (0.63, 0.87):
        with pytest.raises(ValueError, match=r"between point 1 \(sigma 0.5\) and point 2 \(sigma 1\)"):
            trajectory.nearest(sigma)
    # 0 is no point: below the first point the gap reaches down to it.
    assert trajectory.nearest(0.19) == 0
    with pytest.raises(ValueError, match="sigma 0, which is no point"):
        trajectory.nearest(0.0)
    assert Trajectory.from_sigmas([0.0, 1.0]).nearest(0.0) == 0


def test_points_that_do_not_exist():
    for point in (-1, 51):
        with pytest.raises(ValueError, match="points 0 to 50"):
            Trajectory.flow_matching().sigma(point)


def test_flow_timesteps():
    trajectory = Trajectory.flow_matching()
    sigma = torch.tensor([0.0, 0.5, 1.0])
    assert trajectory.timestep(sigma).tolist() == [0.0, 500.0, 1000.0]
    assert trajectory.timestep(sigma).dtype == torch.float32
    assert trajectory.timestep(0.5) == 500.0
    assert trajectory.sigma_of_timestep(982.0) == torch.tensor(0.982).item()
    assert Trajectory.flow_matching(num_train_timesteps=500).timestep(0.5) == 250.0
    assert trajectory.timestep(trajectory.points.double()).dtype == torch.float32
    for call in (lambda: trajectory.timestep(1.5), lambda: trajectory.sigma_of_timestep(1001.0)):
        with pytest.raises(ValueError, match="outside"):
            call()


def test_native_timesteps_interpolate_the_table():
    trajectory = Trajectory.native(TABLE, 50)
    assert trajectory.num_train_timesteps == 100
    times = trajectory.timestep(TABLE)
    assert torch.equal(times, torch.arange(100.0))
    middle = (TABLE[10] + TABLE[11]).item() / 2
    assert trajectory.timestep(middle) == pytest.approx(10.5, abs=1e-4)
    assert trajectory.sigma_of_timestep(10.5) == pytest.approx(middle, abs=1e-7)
    t = torch.linspace(0, 99, 1000)
    torch.testing.assert_close(trajectory.timestep(trajectory.sigma_of_timestep(t)), t, rtol=0, atol=1e-3)
    assert trajectory.timestep(1.0) == 99.0
    assert trajectory.sigma_of_timestep(99.0) == 1.0
    # Exactly 0 has a time, what lies between it and the table has none.
    assert trajectory.timestep(0.0) == 0.0
    for sigma in (0.04, torch.tensor([0.5, 0.04])):
        with pytest.raises(ValueError, match=r"sigma 0.04 has no native time: the model's table starts at sigma 0.05"):
            trajectory.timestep(sigma)
    with pytest.raises(ValueError, match=r"outside \[0, 99\]"):
        trajectory.sigma_of_timestep(99.5)


def test_native_points_are_entries_of_the_table():
    trajectory = Trajectory.native(TABLE, 7)
    assert trajectory.points.tolist() == [TABLE[0].item()] + [TABLE[i * 100 // 7 - 1].item() for i in range(1, 8)]
    assert trajectory.shift is None
    with pytest.raises(ValueError, match="use 1 to 50"):
        Trajectory.native(TABLE, 51)
    with pytest.raises(ValueError, match="end at exactly 1"):
        Trajectory.native(TABLE[:-1], 10)


def test_a_grid_below_the_models_table_is_refused():
    with pytest.raises(ValueError, match="no native time"):
        Trajectory.flow_matching(native_sigmas=TABLE)
    assert Trajectory.flow_matching(end="zero", native_sigmas=TABLE).timestep(1.0) == 99.0


def test_shift_and_unshift():
    trajectory = Trajectory.flow_matching()
    assert trajectory.shifted(0.76) == pytest.approx(trajectory.sigma(38), abs=6e-8)
    assert torch.equal(trajectory.shifted(torch.arange(1, 51) / 50), trajectory.points[1:])
    u = torch.linspace(0, 1, 101)
    torch.testing.assert_close(trajectory.unshift(trajectory.shifted(u)), u, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="no shift"):
        Trajectory.from_sigmas([0.0, 1.0]).unshift(0.5)


# --- Segments


def test_points_in_segments():
    trajectory = Trajectory.flow_matching()
    low, middle, top = (trajectory.sigma(point) for point in (0, 38, 50))
    assert trajectory.points_in(Segment("semantic", middle, top)) == range(39, 51)
    assert trajectory.points_in(Segment("detail", low, middle)) == range(1, 39)
    assert trajectory.points_in(Segment("semantic", middle, top, "high")) == range(38, 51)
    assert trajectory.points_in(Segment("detail", low, middle, "high")) == range(1, 38)
    # No step starts at the first point, even where it lies inside.
    assert trajectory.points_in(Segment("all", 0.0, 1.0)) == range(1, 51)
    assert len(trajectory.points_in(Segment("none", 0.991, 0.9915))) == 0


# --- Configs


def test_configs_build_what_they_say():
    flow = FlowMatching(num_steps=10, shift=5.0, num_train_timesteps=500, end="zero").build()
    assert torch.equal(flow.points, Trajectory.flow_matching(10, 5.0, 500, "zero").points)
    assert (flow.shift, flow.num_train_timesteps) == (5.0, 500)
    assert torch.equal(FlowMatching().build().points, Trajectory.flow_matching().points)
    assert torch.equal(Native(num_steps=7).build(TABLE).points, Trajectory.native(TABLE, 7).points)
    points = Points(sigmas=[0.1, 0.6, 1.0]).build(TABLE)
    assert points.points.tolist() == torch.tensor([0.1, 0.6, 1.0]).tolist()
    assert points.timestep(1.0) == 99.0
    with pytest.raises(ValueError, match="no sigma table"):
        Native().build()


def test_which_step_passes_a_sigma():
    """Step 0 begins at 1; a sigma between two points belongs to the step that begins above it."""
    trajectory = Trajectory.flow_matching(num_steps=4, shift=1.0)
    sigma = torch.tensor([1.0, 0.9, 0.75, 0.74, 0.5, 0.25, 0.1, 0.001, 0.0])
    assert trajectory.steps_at(sigma).tolist() == [0, 0, 1, 1, 2, 3, 3, 3, 3]


def test_a_shift_that_is_left_to_the_backbone():
    left = FlowMatching(shift="auto")
    assert left.settled(lambda: 3.0) == FlowMatching(shift=3.0)
    assert FlowMatching(shift=5.0).settled(lambda: 1 / 0) == FlowMatching(shift=5.0)
    with pytest.raises(ValueError, match="auto: the backbone gives no shift of its own; give a number"):
        left.settled(lambda: None)
    with pytest.raises(ValueError, match="auto becomes a number when a recipe is read"):
        left.build()
