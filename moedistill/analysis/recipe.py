"""The suggestion as a recipe: valid, short where it can extend the given one, with the evidence beside each key."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moedistill.analysis.suggest import ExpertNeeds, landings, movable
from moedistill.flow.routers import Router, RouterConfig
from moedistill.flow.trajectory import Trajectory
from moedistill.model.backbone import TEACHER
from moedistill.recipe.keys import Recipe
from moedistill.recipe.loading import load_recipe, shipped_recipes
from moedistill.recipe.yaml_tree import dump_yaml
from moedistill.runtime.writing import new_file

if TYPE_CHECKING:
    from moedistill.analysis.results import Analysis
    from moedistill.components.plugins import Plugins


def write_recipe(
    path: Path,
    analysis: "Analysis",
    recipe: Recipe,
    source: object,
    overrides: Sequence[str],
    trajectory: Trajectory,
    plugins: "Plugins",
) -> None:
    """Writes the suggestion to `path` and reads it back, so that it is known to be valid.

    It extends the recipe that was given as a file. One given by its shipped name, as data or with changes is written
    out, and so is one with another number of experts, or with sampling steps in other units than points.

    Raises:
        RecipeError: the suggested values do not fit the recipe's other keys.
    """
    plain = recipe.resolved()
    plain["stages"] = [_at_stops(stage) for stage in plain["stages"]]
    router = recipe.router.build(trajectory) if recipe.router else None
    same_number = router is not None and len(router.experts) == len(analysis.boundaries) + 1
    by_points = not plain["sample"] or plain["sample"]["points"] is not None
    short = _is_file(source) and not overrides and same_number and by_points
    changes = _changes(analysis, recipe, plain, trajectory, router, same_number)
    comments = _comments(analysis)
    if short:
        moved = {stage["name"]: {"phases": SAMPLING} for stage in plain["stages"] if stage.get("phases") == SAMPLING}
        changes |= {"stages": moved} if moved else {}
        comments["stages"] = ["Jumps land where sampling stops."]
        extends = os.path.relpath(Path(str(source)), path.parent)
        body = {"extends": extends, "name": f"{recipe.name[:90]}_suggested", **changes}
    else:
        body = {**plain, "name": f"{recipe.name[:90]}_suggested"}
        for key, value in changes.items():
            body[key] = _merged(body[key], value) if same_number and key != "sample" else value
    head = [
        f"Suggested by `moedistill analyze` for {recipe.name}: {analysis.samples} samples, seed {analysis.seed}.",
        "A hypothesis to test by training, not a result: on digits the suggested boundary lost to the recipe's own, by",
        "a Fréchet distance of 166 against 129 at 4 steps (one seed; docs/results/2026-11-22.md).",
    ]
    if analysis.smoke:
        head.append("Measured on a random miniature: the form is right, the values mean nothing.")
    if "router" not in changes:
        assert router is not None
        assert recipe.router is not None
        head += [*comments["router"], *_why_it_stays(analysis, recipe.router, router, trajectory)]
    elif recipe.router is not None and not movable(recipe.router):
        kind = recipe.router.kind
        comments["router"].append(f"The recipe's is of kind {kind}, which places its own; this one takes its place.")
    lines = [f"# {line}\n" for line in head]
    for key, value in body.items():
        if key in changes:
            lines += [f"# {line}\n" for line in comments[key]]
        lines.append(dump_yaml({key: value}))
    with new_file(path) as new:
        new.write_text("".join(lines), encoding="utf-8")
    load_recipe(path, plugins=plugins)


SAMPLING = "sampling"
"""Phases that end where sampling stops."""


def _at_stops(stage: dict[str, Any]) -> dict[str, Any]:
    """The stage with phases at the suggestion's own points, if it has them at points."""
    return {**stage, "phases": SAMPLING} if isinstance(stage.get("phases"), dict) else stage


def _why_it_stays(analysis: "Analysis", config: RouterConfig, router: Router, trajectory: Trajectory) -> list[str]:
    """The comment on a router that the suggestion leaves as it is."""
    if landings(trajectory, router) == analysis.boundaries:
        return ["That is the recipe's own boundary."]
    boundaries = ", ".join(f"{{point: {point}}}" for point in analysis.boundaries)
    instead = f"{{kind: timestep, experts: [{', '.join(router.experts)}], boundaries: [{boundaries}]}}"
    return [
        f"The recipe's router is of kind {config.kind}, which places its own boundaries: it stays, and the sampling",
        f"steps are chosen for it. To part the experts at the suggested ones: router: {instead}",
    ]


def _is_file(source: object) -> bool:
    return isinstance(source, str | Path) and str(source) not in shipped_recipes() and Path(source).is_file()


def _changes(
    analysis: "Analysis",
    recipe: Recipe,
    plain: Mapping[str, Any],
    trajectory: Trajectory,
    router: Router | None,
    same_number: bool,
) -> dict[str, Any]:
    """The keys that the suggestion has something to say on.

    A router that is as suggested stays as it is, and so does one of another kind, which cannot be told where to part.
    """
    changes: dict[str, Any] = {}
    if not same_number:
        changes |= _other_number(analysis, plain, router.experts if router else ())
    elif recipe.router is not None and router is not None:
        if movable(recipe.router) and landings(trajectory, router) != analysis.boundaries:
            changes["router"] = {"boundaries": _boundaries(analysis, router.segments[0].closed)}
        adapters = [name for name, expert in plain["experts"].items() if expert["kind"] == "lora"]
        if analysis.needs is not None and adapters:
            changes["experts"] = {name: _needs(analysis.needs) for name in adapters}
    kept = {"eta": plain["sample"]["eta"]} if plain["sample"] and plain["sample"]["eta"] else {}
    changes["sample"] = {"points": analysis.sampling["suggested"].points, **kept}
    return changes


def _boundaries(analysis: "Analysis", closed: str) -> list[dict[str, int]]:
    # With closed: high the boundary itself is the upper expert's, which lands one point below.
    return [{"point": point + (closed == "high")} for point in analysis.boundaries]


def _needs(needs: ExpertNeeds) -> dict[str, Any]:
    return {"targets": needs.targets, "copies": needs.copies}


def _other_number(analysis: "Analysis", plain: Mapping[str, Any], routed: Sequence[str]) -> dict[str, Any]:
    """Router, experts and stages for another number of experts, made like the first and last that are `routed` now."""
    count = len(analysis.boundaries) + 1
    names = ["semantic", "detail"] if count == 2 else [f"expert_{number}" for number in range(1, count + 1)]
    own = [plain["experts"].get(name) for name in routed]
    own = [expert for expert in own if expert is not None]
    first = own[0] if own else {"kind": "full"}
    rest = own[-1] if len(own) > 1 else {"kind": "lora", "rank": 16, "alpha": 32}
    if rest["kind"] == "lora" and analysis.needs is not None:
        rest = {**rest, **_needs(analysis.needs)}
    others = {**rest, "from": names[0]} if rest["kind"] == "lora" else rest
    distilling = [stage for stage in plain["stages"] if stage["kind"] == "consistency"]
    default = {"kind": "consistency", "steps": 300, "losses": [{"kind": "huber"}]}
    stages = [
        {**(distilling[min(k, 1, len(distilling) - 1)] if distilling else default), "name": name, "expert": name}
        for k, name in enumerate(names)
    ]
    averaged = any(stage.get("ema_decay") is not None for stage in stages)
    kept = [_fitting(stage, averaged) for stage in plain["stages"] if "expert" not in stage]
    return {
        "router": {"kind": "timestep", "experts": names, "boundaries": _boundaries(analysis, "low")},
        "experts": {names[0]: {**first, "from": TEACHER}, **dict.fromkeys(names[1:], others)},
        "stages": stages + [stage for stage in kept if stage["name"] not in names],
    }


def _fitting(stage: dict[str, Any], averaged: bool) -> dict[str, Any]:
    """A stage that trains nothing, without what asks for averages or experts that are no more."""
    fitting = dict(stage)
    if "weights" in stage and not averaged:
        fitting["weights"] = "trained"
    if "candidates" in stage:
        fitting["candidates"] = [candidate for candidate in stage["candidates"] if not candidate["stand_ins"]]
    return fitting


def _merged(base: Any, changes: Any) -> Any:
    """`changes` over `base`, mappings key by key."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    return {**base, **{key: _merged(base.get(key), value) for key, value in changes.items()}}


def _comments(analysis: "Analysis") -> dict[str, list[str]]:
    """The evidence for each key, in a line or two."""
    sampling = analysis.sampling
    errors = ", ".join(f"{name} {points.end_error:.3g}" for name, points in sampling.items())
    comments = {
        "sample": [
            f"The teacher's own error with so many steps, against all of its steps: {errors}.",
            "Measured on other samples than the points were chosen with." if analysis.samples > 1 else "One sample.",
        ]
    }
    where = ", ".join(
        f"point {p} (sigma {s:.4f})" for p, s in zip(analysis.boundaries, analysis.boundary_sigmas, strict=True)
    )
    left = ", ".join(f"{analysis.remaining_share(point):.0%}" for point in analysis.boundaries)
    comments["router"] = [
        f"Boundaries: {where}. The clean estimate is {left} of its whole way from the sample that it ends as.",
        "By the teacher's path alone: its networks' own, or half-way through what it decides. Where a student",
        "does best may lie elsewhere: train with another boundary too before you trust this one.",
    ]
    if analysis.student:
        curves = analysis.student[-1]
        cosines = ", ".join(
            f"{_number(plain)} ({_number(per_jump)} per jump)"
            for plain, per_jump in zip(curves.across, curves.across_per_jump, strict=True)
        )
        comments["router"].append(
            f"One student's gradients above and below, after {curves.steps} steps, have a cosine of {cosines}."
        )
    comments["stages"] = ["As in the given recipe, one for each expert."]
    comments["experts"] = ["As in the given recipe."]
    layers = analysis.layers
    if layers is not None:
        parts = {**layers.groups, **layers.modules}
        listed = ", ".join(f"{name} {_number(disagreement)}" for name, disagreement in parts.items())
        comments["experts"] = [
            f"Where two experts, {layers.steps} steps each, disagree on what to change (0: the same, 1: the opposite):",
            f"the whole network {_number(layers.whole)}; {listed}.",
        ]
    return comments


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}"
