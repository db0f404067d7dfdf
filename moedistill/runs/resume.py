"""Where a run writes, and from which checkpoint it goes on."""

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moedistill.errors import UserError
from moedistill.recipe.keys import Recipe
from moedistill.recipe.loading import in_todays_words
from moedistill.runs.begun import finished_file, holds_only_checkpoints, is_miniature, left_recipe
from moedistill.runs.commands import RunCommand, another
from moedistill.runs.longer import made_longer
from moedistill.runs.saved import read_state
from moedistill.runtime.checkpoint import Checkpoints, NoCheckpoint, find_checkpoint, newest_whole, verify
from moedistill.runtime.integrity import Damaged
from moedistill.runtime.writing import is_there, refuse_used

OPERATIONAL = (
    "checkpoint_every", "keep_checkpoints", "log_every", "trackers", "num_workers", "num_threads", "monitor", "timeout",
    "sharding", "offload",
)  # fmt: skip
"""Keys of `training` that may differ when a run is resumed: they do not change what is learned. Neither does a stage's
`preview`.
"""

_PREVIEW = re.compile(r"stages\.\d+\.preview(\.|$)")


@dataclass(frozen=True)
class Plan:
    """Where a run writes, and from which checkpoint it goes on.

    Attributes:
        folder: the run's.
        checkpoint: where it goes on; None where it begins.
        state: what that checkpoint says of the run that made it: recipe, stage and step, what was reported.
        branch: whether the checkpoint is another folder's: what comes later in the recipe may then differ.
        changed: keys that do differ, as dotted paths.
    """

    folder: Path
    checkpoint: Path | None = None
    state: Mapping[str, Any] = field(default_factory=dict)
    branch: bool = False
    changed: tuple[str, ...] = ()


def plan(
    recipe: Recipe,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    resume_from: str | Path | None = None,
    command: RunCommand | None = None,
    seen: Plan | None = None,
) -> Plan:
    """Decides where `recipe` is run; looks only, and writes nothing.

    The arguments are those of `run`; `command` is for what messages say. The checkpoint of a plan that was `seen`
    before is not compared with its sums once more.

    Raises:
        UserError: there is no such checkpoint, it is damaged, the recipe cannot go on from it, or the folder holds
            another run.
    """
    command = command or RunCommand()
    with ways_out(command):
        checkpoint = _checkpoint(recipe, output, resume, resume_from, command)
        if checkpoint is None:
            return Plan(_new_folder(recipe, output, command))
        if seen is None or seen.checkpoint != checkpoint:
            verify(checkpoint)  # all of it, before anything is built
        state = read_state(checkpoint, verified=True)
    home = run_of(checkpoint)
    branch = output is not None and not belongs_to(checkpoint, Path(output))
    before, after = changed_keys(recipe, state)
    elsewhere = Path(output) if output is not None and branch else another(home or checkpoint)
    longer = made_longer(recipe, in_todays_words(state["recipe"]), state, checkpoint, command, elsewhere)
    before = [key for key in before if key != longer]
    if keys := before if branch else before + after:
        ways = "Start a new run"
        if not before:
            other = command.as_given(resume_from=checkpoint, output=elsewhere)
            ways += f"; or, as what comes later may differ in another folder, begin there with: {other}"
        if home is not None and (home / "recipe.yaml").is_file():
            theirs = replace(command, smoke=state.get("smoke", command.smoke))
            ways += f"; or, with its own recipe, go on with: {theirs.go_on(home, checkpoint)}"
        raise UserError(
            f"the recipe is not the one that {checkpoint} was made with: {', '.join(sorted(keys))} differ. {ways}"
        )
    if output is not None:
        folder = Path(output) if not branch else _new_folder(recipe, output, command, checkpoint, state["cost"])
    else:
        folder = home if home is not None else _new_folder(recipe, None, command)
    changed = (*after, *([longer] if longer else []))
    return Plan(folder, checkpoint, state, not belongs_to(checkpoint, folder), changed)


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint is one of, if it lies in one; links are followed if need be."""
    places = (place.parent for place in (checkpoint, checkpoint.resolve()))
    return next((place.parent for place in places if place.name == "checkpoints"), None)


def belongs_to(checkpoint: Path, folder: Path) -> bool:
    """Whether a checkpoint is one of the run in `folder`, itself or by a link."""
    own = (folder / "checkpoints").resolve()
    return own in (checkpoint.parent.resolve(), checkpoint.resolve().parent)


@contextmanager
def ways_out(command: RunCommand) -> Iterator[None]:
    """Adds to an error about a checkpoint how to go on: the newest one of its run that is whole, and the command."""
    try:
        yield
    except Damaged as error:
        checkpoint = error.path.parent
        home, whole = run_of(checkpoint), newest_whole(checkpoint.parent, checkpoint)
        if whole is None:
            way = "beside it there is no whole checkpoint to go on from"
        elif home is None or not (home / "recipe.yaml").is_file():
            way = f"the newest whole one is {whole}; go on with: {command.as_given(resume_from=whole)}"
        else:
            way = f"the newest whole one is {whole}; go on with: {command.go_on(home, whole)}"
        raise UserError(f"{error}; {way}") from error


def changed_keys(recipe: Recipe, state: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Keys in which `recipe` differs from the one that a checkpoint with this `state` was made with, as dotted paths.

    The second list are those on which nothing before the checkpoint depends: later stages and names; also sampling and
    experts that no stage has trained or run so far, unless a stage has evaluated, sampled or exported in between. A
    recipe that differs in these alone can go on from there in a folder of its own, and gives what it would have given
    from its beginning.
    """
    made, number = in_todays_words(state["recipe"]), state["stage"]
    used = any("expert" not in stage for stage in made["stages"][:number])
    # Checkpoints without the list are of stages that train the expert that they name.
    settled = set(state.get("trained", [s["expert"] for s in made["stages"][: number + 1] if "expert" in s]))
    settled |= set(state.get("used", ()))
    while parents := {made["experts"][name]["from"] for name in settled & made["experts"].keys()} - settled:
        settled |= parents
    saved, now = comparable(made), comparable(recipe.resolved())

    def later(key: str) -> bool:
        top, _, rest = key.partition(".")
        name = rest.partition(".")[0]
        if top == "stages":
            return int(name) > number
        if top == "sample" or (top == "experts" and name not in settled):
            return not used
        return top in ("name", "description")

    changed = [key for key in {**saved, **now} if saved.get(key) != now.get(key)]
    return [key for key in changed if not later(key)], [key for key in changed if later(key)]


def comparable(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved recipe as dotted keys, without what may differ."""
    flat: dict[str, Any] = {}

    def walk(tree: Any, path: str) -> None:
        if isinstance(tree, Mapping) and tree:
            for key, value in tree.items():
                walk(value, f"{path}.{key}" if path else str(key))
        elif isinstance(tree, (list, tuple)) and tree:
            for index, value in enumerate(tree):
                walk(value, f"{path}.{index}")
        else:
            flat[path] = tree

    walk(resolved, "")
    operational = tuple(f"training.{key}." for key in OPERATIONAL)
    return {
        path: value
        for path, value in flat.items()
        if not f"{path}.".startswith(operational) and not _PREVIEW.match(path)
    }


def _checkpoint(
    recipe: Recipe,
    output: str | Path | None,
    resume: bool,
    resume_from: str | Path | None,
    command: RunCommand,
) -> Path | None:
    asked = resume_from if resume_from is not None else output if resume else None
    if asked is not None:
        try:
            return find_checkpoint(Path(asked))
        except NoCheckpoint as error:
            folder = Path(asked)
            left = left_recipe(folder)
            if left is None:
                raise
            if held := finished_file(folder, left, True, {}):
                raise UserError(f"{error}; {folder} holds a run's results ({held})") from error
            anew = replace(command, smoke=command.smoke or is_miniature(folder)).begin(folder)
            raise UserError(f"{error}; the run was stopped before its first one: begin it anew with: {anew}") from error
    if not resume:
        return None
    runs = _runs(recipe, command.smoke)
    found = [folder for folder in sorted(runs.glob("*")) if Checkpoints(folder / "checkpoints", keep=1).there()]
    if not found:
        raise UserError(f"--resume: no run of {recipe.name!r} with a checkpoint under {runs}")
    return find_checkpoint(found[-1])


def _new_folder(
    recipe: Recipe,
    output: str | Path | None,
    command: RunCommand,
    checkpoint: Path | None = None,
    cost: Mapping[str, Any] | None = None,
) -> Path:
    """A folder for a run that is not there yet, or was stopped before its first checkpoint.

    Args:
        checkpoint: of another folder, where the run begins.
        cost: what that says of its run's cost.

    Raises:
        UserError: it holds another run, or what is no run's.
    """
    if output is None:
        return _runs(recipe, command.smoke) / time.strftime("%Y%m%d-%H%M%S")
    folder = Path(output)
    if not is_there(folder):
        return folder
    if Checkpoints(folder / "checkpoints", keep=1).there():
        ways = "choose another --output"
        if checkpoint is not None:
            ways = f"{checkpoint} is not one of its: {ways}"
        elif (folder / "recipe.yaml").is_file():
            ways += f", or go on with: {command.go_on(folder)}"
        raise UserError(f"{folder} already holds a run; {ways}")
    left = left_recipe(folder)
    if left is None:
        # A run makes `checkpoints` first; it may have been killed then.
        begun = not os.path.lexists(folder / "recipe.yaml") and holds_only_checkpoints(folder / "checkpoints")
        refuse_used(folder, ("checkpoints",) if begun else ())
    else:
        same = comparable(in_todays_words(left)) == comparable(recipe.resolved())
        if held := finished_file(folder, left, same, cost or {}):
            raise UserError(f"{folder} already holds a run's results ({held}); choose another --output")
    return folder


def _runs(recipe: Recipe, smoke: bool) -> Path:
    """Where runs of this name lie; miniatures apart, so that --resume never takes one for the other."""
    return Path("runs", f"{recipe.name}-smoke" if smoke else recipe.name)
