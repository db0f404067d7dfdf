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
