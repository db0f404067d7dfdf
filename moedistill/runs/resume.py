"""Where a run writes, and from which checkpoint it goes on."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moedistill.errors import UserError
from moedistill.recipe.keys import Recipe
from moedistill.recipe.loading import in_todays_words
from moedistill.runs.longer import made_longer
from moedistill.runtime.checkpoint import Checkpoints, find_checkpoint, load_tree
from moedistill.stages.run import RESULT

OPERATIONAL = ("checkpoint_every", "keep_checkpoints", "log_every", "trackers", "num_workers", "num_threads", "monitor")
"""Keys of `training` that may differ when a run is resumed: they do not change what is learned."""


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
    smoke: bool = False,
) -> Plan:
    """Decides where `recipe` is run, the same on every process; looks only, and writes nothing.

    The arguments are those of `run`.

    Raises:
        UserError: there is no such checkpoint, the recipe cannot go on from it, or the folder holds another run.
    """
    checkpoint = _checkpoint(recipe, output, resume, resume_from, smoke)
    if checkpoint is None:
        return Plan(_new_folder(recipe, output, smoke))
    state = load_tree(checkpoint, "state")
    branch = output is not None and not belongs_to(checkpoint, Path(output))
    before, after = changed_keys(recipe, state)
    longer = made_longer(recipe, in_todays_words(state["recipe"]), state, checkpoint)
    before = [key for key in before if key != longer]
    if keys := before if branch else before + after:
        ways = "Resume with the recipe.yaml in its run's folder"
        if not before:
            ways += f"; use --resume-from {checkpoint} with a new --output, where what comes later may differ"
        raise UserError(
            f"the recipe is not the one that {checkpoint} was made with: {', '.join(sorted(keys))} differ. "
            f"{ways}; or start a new run"
        )
    if output is not None:
        folder = Path(output) if not branch else _new_folder(recipe, output, smoke)
    elif checkpoint.parent.name == "checkpoints":
        folder = checkpoint.parent.parent
    else:
        folder = _new_folder(recipe, None, smoke)
    return Plan(folder, checkpoint, state, not belongs_to(checkpoint, folder), (*after, *([longer] if longer else [])))


def belongs_to(checkpoint: Path, folder: Path) -> bool:
    """Whether a checkpoint is one of the run in `folder`."""
    return checkpoint.resolve().parent == (folder / "checkpoints").resolve()


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
    return {path: value for path, value in flat.items() if not f"{path}.".startswith(operational)}


def _checkpoint(
    recipe: Recipe, output: str | Path | None, resume: bool, resume_from: str | Path | None, smoke: bool
) -> Path | None:
    if resume_from is not None:
        return find_checkpoint(Path(resume_from))
    if not resume:
        return None
    if output is not None:
        return find_checkpoint(Path(output))
    runs = _runs(recipe, smoke)
    found = [folder for folder in sorted(runs.glob("*")) if Checkpoints(folder / "checkpoints", keep=1).all()]
    if not found:
        raise UserError(f"--resume: no run of {recipe.name!r} with a checkpoint under {runs}")
    return find_checkpoint(found[-1])


def _new_folder(recipe: Recipe, output: str | Path | None, smoke: bool) -> Path:
    """A folder for a run that is not there yet, the same on every process; UserError where it holds another one."""
    if output is not None:
        folder = Path(output)
    else:
        from accelerate.utils import broadcast_object_list

        stamp = [time.strftime("%Y%m%d-%H%M%S")]
        folder = _runs(recipe, smoke) / broadcast_object_list(stamp)[0]
    if Checkpoints(folder / "checkpoints", keep=1).all() or (folder / RESULT).exists():
        raise UserError(f"{folder} already holds a run; add --resume to go on with it, or choose another --output")
    return folder


def _runs(recipe: Recipe, smoke: bool) -> Path:
    """Where runs of this name lie; miniatures apart, so that --resume never takes one for the other."""
    return Path("runs", f"{recipe.name}-smoke" if smoke else recipe.name)
