"""Where the student of a recipe stops: the points of its own list, or of another, over the phases it is trained on."""

from dataclasses import replace
from typing import TYPE_CHECKING

from moedistill.flow.sampling_points import SampleConfig

if TYPE_CHECKING:
    from torch import Tensor

    from moedistill.flow.trajectory import Trajectory
    from moedistill.recipe.keys import Recipe


def trajectory_of(recipe: "Recipe") -> "Trajectory":
    """The recipe's trajectory."""
    return recipe.trajectory.build(recipe.backbone.native_sigmas())


def landings(recipe: "Recipe", trajectory: "Trajectory") -> list[int]:
    """Lower edges of all phases, as points, ascending: where trained jumps land, and where one expert follows another.

    Of several stages that train an expert the last one counts.
    """
    found: set[int] = set()
    if recipe.router is not None:
        starts = [trajectory.points_in(segment) for segment in recipe.router.build(trajectory).segments]
        found |= {points[0] - 1 for points in starts if points}
    last = {expert: stage for stage in recipe.stages for expert in stage.trained_experts()}
    for stage in last.values():
        found |= set(stage.landings(recipe))
    return sorted(found)


def sampling_sigmas(recipe: "Recipe", sample: SampleConfig | None = None) -> "Tensor":
    """The sigmas at which the student stops, float32 `[n + 1]` down to 0: of the recipe's own steps, or of others.

    Raises:
        ValueError: they do not fit the trajectory, or the recipe has none and none are given.
    """
    chosen = sample or recipe.sample
    if chosen is None:
        raise ValueError("the recipe has no sample list")
    trajectory = trajectory_of(recipe)
    return chosen.resolve(trajectory, landings(recipe, trajectory))


def notes_on(recipe: "Recipe", sample: SampleConfig) -> list[str]:
    """What the recipe's stages have to say of a student that stops elsewhere: steps that no jump was trained for."""
    asked_for = replace(recipe, sample=sample)
    return [note for stage in recipe.stages for note in stage.notes(asked_for)]
