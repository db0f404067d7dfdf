"""Steps of sampling over the phases that a student is trained on."""

from itertools import pairwise

import pytest

from moedistill.flow.phases import spread


@pytest.mark.parametrize(
    ("edges", "steps", "points"),
    [
        # One phase: even over the trajectory.
        ((0,), 4, [50, 38, 25, 13]),
        ((), 4, [50, 38, 25, 13]),
        # As many as phases: their starts. More: every phase has as many, the longest one more, the noisiest first.
        ((40, 30, 15, 0), 4, [50, 40, 30, 15]),
        ((40, 30, 15, 0), 5, [50, 40, 30, 23, 15]),
        ((40, 30, 15, 0), 6, [50, 40, 30, 23, 15, 8]),
        ((40, 30, 15, 0), 8, [50, 45, 40, 35, 30, 23, 15, 8]),
        ((40, 30, 15, 0), 12, [50, 47, 44, 40, 37, 34, 30, 25, 20, 15, 10, 5]),
        ((30, 0), 3, [50, 30, 15]),
        ((30, 0), 8, [50, 45, 40, 35, 30, 23, 15, 8]),
        # Fewer: some of the starts.
        ((40, 30, 15, 0), 3, [50, 40, 30]),
        ((40, 30, 15, 0), 2, [50, 30]),
        ((40, 30, 15, 0), 1, [50]),
    ],
    ids=str,
)
def test_steps_by_hand(edges, steps, points):
    assert spread(edges, 50, steps) == points


@pytest.mark.parametrize("steps", [*range(1, 13), 50])
def test_no_step_goes_past_an_edge_where_there_are_enough(steps):
    edges = {37, 33, 12, 0}
    points = spread(edges, 50, steps)
    assert (len(points), points[0]) == (steps, 50)
    assert all(above > below > 0 for above, below in pairwise(points))
    assert (edges - {0} <= set(points)) == (steps >= 4)
    assert spread(set(), 50, steps) == [50 - k * 50 // steps for k in range(steps)]


@pytest.mark.parametrize(
    ("edges", "boundaries", "steps", "points"),
    [
        # Two phases above, one below, and the other way round: both experts have a step.
        ((40, 30, 0), (30,), 2, [50, 30]),
        ((30, 15, 0), (30,), 2, [50, 30]),
        ((45, 40, 35, 24, 12, 0), (35,), 2, [50, 35]),
        ((45, 40, 35, 24, 12, 0), (35,), 3, [50, 45, 35]),
        ((45, 40, 35, 24, 12, 0), (35,), 4, [50, 45, 35, 24]),
        ((45, 40, 35, 24, 12, 0), (35,), 6, [50, 45, 40, 35, 24, 12]),
        # An expert of one phase has one step, however few the other's are of its own.
        ((45, 40, 35, 30, 0), (30,), 3, [50, 40, 30]),
        ((40, 35, 20, 10, 0), (35, 20), 3, [50, 35, 20]),
        ((40, 35, 20, 10, 0), (35, 20), 2, [50, 35]),
        ((40, 35, 20, 10, 0), (35, 20), 1, [50]),
    ],
    ids=str,
)
def test_fewer_steps_than_phases_leave_no_expert_out(edges, boundaries, steps, points):
    assert spread(edges, 50, steps, boundaries) == points
