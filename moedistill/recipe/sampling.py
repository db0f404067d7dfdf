"""Where the student of a recipe stops: the points of its own list, or of another, over the phases it is trained on."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING

from moedistill.flow.sampling_points import SampleConfig

if TYPE_CHECKING:
    from torch import Tensor

    from moedistill.flow.trajectory import Trajectory
    from moedistill.recipe.keys import Recipe


def trajectory_of(recipe: "Recipe") -> "Trajectory":
    """The recipe's trajectory."""
    return recipe.trajectory.build(recipe.backbone.native_sigmas())


def boundaries(recipe: "Recipe", trajectory: "Trajectory") -> list[int]:
    """Where one expert follows another, as points that the upper one lands on, ascending."""
    if recipe.router is None:
        return []
    starts = [trajectory.points_in(segment) for segment in recipe.router.build(trajectory).segments]
    return sorted(points[0] - 1 for points in starts if points and points[0] > 1)


def landings(recipe: "Recipe", trajectory: "Trajectory") -> list[int]:
    """Lower edges of all phases, as points, ascending: where the jumps of experts that sample are trained to land.

    Of several stages that train an expert the last one counts; with a router, an expert that it does not name does not.
    """
    trained = {expert: stage for stage in recipe.stages if stage is not None for expert in stage.trained_experts()}
    last = {id(stage): stage for expert, stage in trained.items() if samples(expert, recipe, trajectory)}
    return sorted({point for stage in last.values() for point in stage.landings(recipe)})


def samples(expert: str, recipe: "Recipe", trajectory: "Trajectory") -> bool:
    """Whether the student runs this expert: all do where there is no router."""
    return recipe.router is None or expert in recipe.router.build(trajectory).experts


def sampling_sigmas(recipe: "Recipe", sample: SampleConfig | None = None) -> "Tensor":
    """The sigmas at which the student stops, float32 `[n + 1]` down to 0: of the recipe's own steps, or of others.

    Raises:
        ValueError: they do not fit the trajectory, or the recipe has none and none are given.
    """
    chosen = sample or recipe.sample
    if chosen is None:
        raise ValueError("the recipe has no sample list")
    trajectory = trajectory_of(recipe)
    return chosen.resolve(trajectory, landings(recipe, trajectory), boundaries(recipe, trajectory))


def settle(recipe: "Recipe") -> None:
    """Writes out what stages take over from the rest of a valid recipe, and the points of `sample` if they are meant.

    A number of steps depends on the phases, and phases of sampling on its points: both are then settled at once.
    """
    stages = [stage.settled(recipe) for stage in recipe.stages]
    sample = recipe.sample
    if stages != recipe.stages and sample is not None and sample.steps is not None:
        points = trajectory_of(recipe).points.tolist()
        chosen = [points.index(sigma) for sigma in sampling_sigmas(recipe).tolist()[:-1]]
        recipe.sample = SampleConfig(points=chosen, eta=sample.eta)
    recipe.stages = stages


def notes_on(recipe: "Recipe", sample: SampleConfig) -> list[str]:
    """What the recipe's stages have to say of a student that stops elsewhere: steps that no jump was trained for."""
    asked_for = replace(recipe, sample=sample)
    return [note for stage in recipe.stages for note in stage.notes(asked_for)]


def trained_before(recipe: "Recipe", stage: str) -> set[str]:
    """The experts that stages before the one of this name train, or that start with weights of their own."""
    earlier = takewhile(lambda other: other.name != stage, recipe.stages)
    return recipe.started().union(*(other.trained_experts() for other in earlier))


def untrained_notes(
    recipe: "Recipe", trained: Collection[str], sigmas: "Tensor", stand_ins: Mapping[str, str] | None = None
) -> list[str]:
    """Which of the experts that run when sampling along `sigmas` `[n + 1]` have not been trained yet.

    Args:
        trained: names of those that are trained.
        stand_ins: experts that run in place of others.
    """
    if recipe.router is None:
        return []
    router, experts = recipe.router.build(trajectory_of(recipe)), recipe.experts
    routed = dict.fromkeys(router.expert_at(float(sigma)) for sigma in sigmas[:-1])
    notes = []
    for name in dict.fromkeys((stand_ins or {}).get(expert, expert) for expert in routed):
        if name in experts and experts[name].trainable and name not in trained:
            origin = name
            while origin in experts and origin not in trained:
                origin = experts[origin].parent
            notes.append(f"expert {name!r} is not trained: it is still a copy of {origin!r}")
    return notes
