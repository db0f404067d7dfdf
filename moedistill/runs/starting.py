"""What experts start with in place of their parents' weights: an expert of an export, a run or a checkpoint (`init`).

It is compared with the recipe before anything of weight is loaded, and then mapped: a process that keeps a part of a
network reads no more than that.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moedistill.errors import UserError
from moedistill.model.backbone import TEACHER
from moedistill.model.mixture import Mixture
from moedistill.recipe.building import to_plain
from moedistill.recipe.keys import Recipe
from moedistill.recipe.starting import find_start, split_init
from moedistill.runs.saved import read_state, read_weights
from moedistill.runtime.checkpoint import find_checkpoint, verify
from moedistill.runtime.integrity import Damaged
from moedistill.runtime.sharding import Pieces
from moedistill.stages.export import INDEX, read_export, read_index

SAME = ("kind", "rank", "alpha")
"""Keys of an expert that say what its weights mean."""


@dataclass(frozen=True)
class Start:
    """An expert somewhere, to start another with.

    Attributes:
        place: as messages name it.
        recipe: the resolved one that it was trained by.
        expert: its name there.
        read: gives its weights by parameter name, mapped; of files compared with their sums if asked to be verified.
    """

    place: str
    recipe: Mapping[str, Any]
    expert: str
    read: Callable[[bool], Mapping[str, Tensor | Pieces]]

    @property
    def config(self) -> Mapping[str, Any]:
        """Its keys in that recipe."""
        config: Mapping[str, Any] = self.recipe["experts"][self.expert]
        return config


def starts(recipe: Recipe, but: Collection[str] = ()) -> Iterator[tuple[str, Start]]:
    """The experts of a recipe that start with weights, and where those are; not those whose weights are known already.

    Raises:
        UserError: there are no such weights.
    """
    for name in sorted(recipe.started() - set(but)):
        init = recipe.experts[name].init
        assert init is not None
        folder, expert = split_init(init, name)
        try:
            find_start(init)
            found = _in_export(folder, expert) if os.path.lexists(folder / INDEX) else _in_run(folder, expert)
        except (UserError, ValueError) as error:
            raise UserError(f"experts.{name}.init: {error}") from error
        yield name, found


def _in_export(folder: Path, expert: str) -> Start:
    index = read_index(folder)
    there = {name for name, entry in index["experts"].items() if entry["file"] is not None}
    _check_there(expert, there, folder)
    return Start(
        f"{expert!r} of {folder}", index["recipe"], expert,
        lambda verified: read_export(folder, only=expert, verified=verified)[1][expert],
    )  # fmt: skip


def _in_run(folder: Path, expert: str) -> Start:
    checkpoint = find_checkpoint(folder)
    state = read_state(checkpoint)
    _check_there(expert, state.get("trained", ()), checkpoint)

    def read(verified: bool) -> Mapping[str, Tensor | Pieces]:
        if not verified:
            verify(checkpoint, "experts")
        return read_weights(checkpoint, state, verified=True, averaged=False, pieces=True)[0][expert]

    return Start(f"{expert!r} of {checkpoint}", state["recipe"], expert, read)


def _check_there(expert: str, there: Collection[str], place: Path) -> None:
    if expert not in there:
        raise UserError(
            f"{place} has no trained expert {expert!r}, but {', '.join(sorted(there)) or 'none'}; "
            "another name is given after the path: PATH#NAME"
        )


def check_starts(recipe: Recipe, mixture: Mixture, but: Collection[str] = ()) -> list[str]:
    """Compares all that experts start with with the recipe: kind, rank, alpha, names and shapes; and with its sums.

    Args:
        mixture: the recipe's; it needs no weights.
        but: experts whose weights are known already, as of a checkpoint.

    Returns:
        What fits, and is likely not meant.

    Raises:
        UserError: something is missing, damaged or does not fit.
    """
    warnings: list[str] = []
    for name, start in starts(recipe, but):
        own = to_plain(recipe.experts[name])
        what, here = f"experts.{name}.init: {start.place}", f"experts.{name}"
        for key in SAME:
            if own.get(key) != (theirs := start.config.get(key)):
                raise UserError(f"{what} has {key} {theirs}, and {here} {own.get(key)}; set {here}.{key} to {theirs}")
        try:
            fault = mixture.misfit(name, start.read(False))
        except Damaged as error:
            raise UserError(f"{what} cannot be used: {error}; copy it again, or give another") from error
        if fault:
            keys = "; ".join(
                f"{key} there: {start.config[key]}" for key in ("targets", "copies") if key in start.config
            )
            raise UserError(f"{what} does not fit: {fault}" + (f" ({keys})" if keys else ""))
        warnings += _likely_wrong(name, start, recipe)
    return warnings


def _likely_wrong(name: str, start: Start, recipe: Recipe) -> Iterator[str]:
    """An adapter that was trained on other weights than those that it stands on here."""
    if recipe.experts[name].copies_base:
        return
    theirs = start.recipe.get("backbone", {}).get("pretrained")
    own = getattr(recipe.backbone, "pretrained", None)
    if theirs != own:
        yield f"experts.{name}.init: {start.place} was trained on the weights of {theirs}; here it is on those of {own}"
    under, parent = start.config["from"], recipe.experts[name].parent
    if under != TEACHER and (parent == TEACHER or recipe.experts[parent].init is None):
        yield (
            f"experts.{name}.init: {start.place} was trained on {under!r} of the same run; here it is on {parent!r}, "
            "which does not start with that one's weights"
        )


def start_experts(recipe: Recipe, mixture: Mixture, but: Collection[str] = ()) -> None:
    """Gives experts what they start with, as it was checked before.

    Raises:
        UserError: it is missing, or does not fit.
    """
    for name, start in starts(recipe, but):
        try:
            mixture.start(name, start.read(True), start.place)
        except Damaged as error:
            raise UserError(f"experts.{name}.init: {error}; copy it again, or give another") from error
