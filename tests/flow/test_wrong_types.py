"""What is taken into other projects defends itself: wrong types, ranges and NaN are a ValueError that says which."""

import numpy as np
import pytest
import torch

from moedistill import (
    Boundary,
    SampleConfig,
    Segment,
    TimestepRouter,
    Trajectory,
    add_noise,
    edge_energy,
    frechet_distance,
    in_balls,
    jump,
    sample,
    to_vp,
    unrest,
)
from moedistill.flow.chords import sampled_power

NAN = float("nan")
NAMES = ["semantic", "detail"]
GRID = Trajectory.flow_matching(8, 5.0)
ROUTER = TimestepRouter(NAMES, [0.875])
SEGMENT = Segment("semantic", 0.5, 1.0)
X = torch.zeros(2, 3)
VIDEO = torch.zeros(2, 3, 4, 5, 6)
ROWS = torch.arange(12.0).view(6, 2)


def sampled(x=X, sigmas=(1.0, 0.0), router=None, **options):
    return sample(lambda x, sigma, **_: x, x, sigmas, router, **options)


def resolved(**values):
    return SampleConfig(**values).resolve(GRID)


MISTAKES = {
    # the router
    "expert_at('a')": (lambda: ROUTER.expert_at("0.9"), r"sigma '0\.9' \(str\) must be a number"),
    "expert_at(None)": (lambda: ROUTER.expert_at(None), r"sigma None \(NoneType\) must be a number"),
    "expert_at(True)": (lambda: ROUTER.expert_at(True), r"sigma True \(bool\) must be a number"),
    "expert_at([..])": (lambda: ROUTER.expert_at([0.9, 0.1]), r"sigma of shape \[2\] must be one number"),
    "expert_at(tensor)": (lambda: ROUTER.expert_at(torch.tensor([0.9, 0.1])), r"sigma of shape \[2\] must be one"),
    "expert_at(1000)": (lambda: ROUTER.expert_at(1000), r"sigma 1000\.0 is outside \[0, 1\]: sigma 0 is data"),
    "expert_at(nan)": (lambda: ROUTER.expert_at(NAN), "sigma nan is outside"),
    "experts_at(0.5)": (lambda: ROUTER.experts_at(0.5), r"sigmas must be a list, not 0\.5"),
    "dispatch(2-d)": (lambda: ROUTER.dispatch(torch.zeros(2, 2)), r"sigmas of shape \[2, 2\] must be \[B\]"),
    "dispatch('..')": (lambda: ROUTER.dispatch("0.5"), "sigmas must be a list, not '0.5'"),
    "from_points(0.875)": (
        lambda: TimestepRouter.from_points(GRID, NAMES, [0.875]),
        r"point 0\.875 must be a whole number, from 0 to 8; a noise level is given as a sigma",
    ),
    "from_points(bare)": (lambda: TimestepRouter.from_points(GRID, NAMES, 4), "points must be a list, not 4"),
    "from_points(swapped)": (lambda: TimestepRouter.from_points(NAMES, GRID, [4]), "trajectory must be a Trajectory, "),
    "boundaries=0.9": (lambda: TimestepRouter(NAMES, 0.9), r"boundaries must be a list, not 0\.9"),
    "boundaries=['0.9']": (lambda: TimestepRouter(NAMES, ["0.9"]), r"boundary '0\.9' \(str\) must be a number"),
    "boundaries=[None]": (lambda: TimestepRouter(NAMES, [None]), r"boundary None \(NoneType\) must be a number"),
    "experts=3": (lambda: TimestepRouter(3, [0.9]), "experts must be a list, not 3"),
    "experts=[1, 2]": (lambda: TimestepRouter([1, 2], [0.9]), "must be at least one non-empty name"),
    "low=None": (lambda: TimestepRouter(NAMES, [0.9], None), "low None .* must be a number"),
    "from_timesteps('..')": (lambda: TimestepRouter.from_timesteps(NAMES, ["900"]), r"timestep '900' \(str\) must be"),
    "from_timesteps(0)": (
        lambda: TimestepRouter.from_timesteps(NAMES, [900], 0),
        "num_train_timesteps 0 must be a whole number of at least 1",
    ),
    "from_ratio(bare)": (lambda: TimestepRouter.from_ratio(NAMES, 0.875), "boundaries must be a list"),
    "from_snr('..')": (lambda: TimestepRouter.from_snr(NAMES, ["1"]), r"snr '1' \(str\) must be a number"),
    "from_snr(nan)": (lambda: TimestepRouter.from_snr(NAMES, [NAN]), "snr nan must be 0 or above"),
    "from_dict(None)": (lambda: TimestepRouter.from_dict(None), "not a timestep router: None"),
    "Boundary(point=0.5)": (lambda: Boundary(point=0.5).resolve(GRID), r"point 0\.5 must be a whole number"),
    "Boundary(timestep='..')": (lambda: Boundary(timestep="900").resolve(GRID), "timestep '900'"),
    # segment and trajectory
    "Segment(low='..')": (lambda: Segment("a", "0", 1.0), "sigma '0'"),
    "Segment(1)": (lambda: Segment(1, 0.0, 1.0), "segment of 1: an expert's name must be a string"),
    "'..' in segment": (lambda: "0.5" in SEGMENT, r"sigma '0\.5'"),
    "Trajectory('..')": (lambda: Trajectory("abc"), "points must be a list, not 'abc'"),
    "Trajectory(['..'])": (lambda: Trajectory(["a", "b"]), r"points \['a', 'b'\] \(list\) must be a number"),
    "Trajectory(0 times)": (lambda: Trajectory(torch.tensor([0.0, 1.0]), 0), "num_train_timesteps 0 must be a whole"),
    "Trajectory(shift)": (lambda: Trajectory(torch.tensor([0.0, 1.0]), shift=-1.0), r"shift -1\.0 must be a positive"),
    "flow_matching(4.5)": (lambda: Trajectory.flow_matching(4.5), r"num_steps 4\.5 must be a whole number"),
    "flow_matching('..')": (lambda: Trajectory.flow_matching(4, "5"), "shift '5' must be a positive number"),
    "native(2.5)": (lambda: Trajectory.native(torch.linspace(0.1, 1, 10), 2.5), r"num_steps 2\.5 must be a whole"),
    "sigma('1')": (lambda: GRID.sigma("1"), "point '1' must be a whole number"),
    "nearest(None)": (lambda: GRID.nearest(None), "sigma None"),
    "timestep('..')": (lambda: GRID.timestep("0.5"), r"sigma '0\.5'"),
    "timestep(nan)": (lambda: GRID.timestep(NAN), r"sigma nan is outside \[0, 1\]"),
    "sigma_of_timestep('..')": (lambda: GRID.sigma_of_timestep("900"), "timestep '900'"),
    "shifted(2)": (lambda: GRID.shifted(2.0), r"u 2 is outside \[0, 1\]"),
    "shifted(nan)": (lambda: GRID.shifted(NAN), "u nan is outside"),
    "unshift(-1)": (lambda: GRID.unshift(-1.0), "sigma -1 is outside"),
    # sampling
    "sample(x=[..])": (lambda: sampled(x=[0.0]), "x must be a tensor, batch first, not list"),
    "sample(sigmas=1.0)": (lambda: sampled(sigmas=1.0), r"sigmas must be a list, not 1\.0"),
    "sample(sigmas=['..'])": (lambda: sampled(sigmas=["1", "0"]), "sigma '1'"),
    "sample(sigmas=nan)": (lambda: sampled(sigmas=[1.0, NAN]), "sigma nan is outside"),
    "sample(ascending)": (lambda: sampled(sigmas=[0.0, 1.0]), "must be two or more and descend strictly"),
    "sample(router={..})": (lambda: sampled(router={"a": 1}), "router must be a Router, such as TimestepRouter"),
    "sample(eta='..')": (lambda: sampled(eta="1"), "eta 1 is outside"),
    "points=[4.5]": (lambda: resolved(points=[4.5]), r"point 4\.5 must be a whole number"),
    "points=4": (lambda: resolved(points=4), "points must be a list, not 4"),
    "sigmas=['..']": (lambda: resolved(sigmas=["a"]), "sigma 'a'"),
    "sigmas=[]": (lambda: resolved(sigmas=[]), "there must be at least one step"),
    "sigmas=[nan]": (lambda: resolved(sigmas=[1.0, NAN]), "sigma nan is outside"),
    "timesteps=['..']": (lambda: resolved(timesteps=["a"]), "timestep 'a'"),
    "steps=2.5": (lambda: resolved(steps=2.5), r"steps 2\.5 must be a whole number of at least 1"),
    "sampled_power": (lambda: sampled_power([1.0, 0.0], lambda _: 0.0, power=-1.0), r"power -1\.0 must be 0 or more"),
    # the process
    "add_noise(2.0)": (lambda: add_noise(X, X, 2.0), r"sigma 2\.0 is outside \[0, 1\]"),
    "add_noise('..')": (lambda: add_noise(X, X, "1"), r"sigma '1' \(str\) must be a number"),
    "add_noise([..])": (lambda: add_noise([0.0], X, 0.5), "x0 must be a tensor, not list"),
    "jump(nan)": (lambda: jump(X, X, NAN, 0.0), "sigma_from nan is outside"),
    "to_vp(-1)": (lambda: to_vp(X, -1), "sigma -1 is outside"),
    # metrics
    "frechet(nan)": (lambda: frechet_distance(ROWS, torch.full((3, 2), NAN)), "features_b: row 0 is not finite"),
    "frechet(widths)": (lambda: frechet_distance(ROWS, ROWS[:, :1]), r"features_a \[N, 2\] and features_b \[N, 1\]"),
    "frechet(1-d)": (lambda: frechet_distance(ROWS[0], ROWS), r"features_a \[2\] must be a tensor \[N, D\]"),
    "frechet(list)": (lambda: frechet_distance([[1.0]], ROWS), r"features_a list must be a tensor"),
    "in_balls(nan)": (lambda: in_balls(ROWS * NAN, ROWS), "samples: row 0 is not finite; look at that sample"),
    "in_balls(widths)": (lambda: in_balls(ROWS[:, :1], ROWS), r"samples \[N, 1\] and real \[N, 2\] differ"),
    "edge_energy(4-d)": (lambda: edge_energy(VIDEO[0]), r"videos \[3, 4, 5, 6\] must be a tensor \[N, C, T, H, W\]"),
    "unrest(4-d)": (lambda: unrest(VIDEO[0]), r"videos \[3, 4, 5, 6\] must be a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        call()


def test_numbers_of_other_kinds_are_numbers():
    """Tensors, whole numbers and numpy's, as loops of one's own have them."""
    for value in (1, np.float32(1.0), torch.tensor(1.0), torch.tensor([1.0]), np.int64(1)):
        assert ROUTER.expert_at(value) == "semantic"
    assert ROUTER.experts_at(np.array([1.0, 0.1])) == NAMES
    assert TimestepRouter(tuple(NAMES), np.array([0.875])).boundaries == (0.875,)
    assert TimestepRouter.from_points(GRID, NAMES, torch.tensor([4])).boundaries == (GRID.sigma(4),)
    assert GRID.sigma(np.int64(4)) == GRID.sigma(4)
    assert Trajectory([0.0, 0.5, 1.0]).num_steps == 2
    assert torch.equal(sampled(sigmas=np.array([1.0, 0.0])), sampled())
