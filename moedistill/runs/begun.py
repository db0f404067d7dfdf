"""Folders of runs that were stopped before their first checkpoint: known by what a run leaves, by nothing less."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moedistill.errors import Problem
from moedistill.recipe.yaml_tree import dump_yaml, read_file
from moedistill.runtime.checkpoint import SUMS, TREES, is_own_name
from moedistill.runtime.integrity import Damaged, read_json
from moedistill.stages.run import COST, MINIATURE, RESULT


def left_recipe(folder: Path) -> dict[str, Any] | None:
    """The resolved recipe that a run has left; None where the folder is not one of a run's.

    A run makes `checkpoints`, and a recipe.yaml that reads as it is written; people's have comments, or gaps.
    """
    file, problems = folder / "recipe.yaml", list[Problem]()
    if not holds_only_checkpoints(folder / "checkpoints"):
        return None
    recipe: Any = read_file(file, problems).plain()
    if problems or not {"name", "backbone", "experts", "stages"} <= recipe.keys():
        return None
    written = file.read_text(encoding="utf-8").removeprefix(MINIATURE)
    return recipe if dump_yaml(recipe) == written else None


def holds_only_checkpoints(folder: Path) -> bool:
    """Whether it is a folder in which nothing lies but what runs put there; another program may use such names too."""
    try:
        return all(is_own_name(name) and _is_begun(folder / name) for name in os.listdir(folder))
    except OSError:
        return False


def _is_begun(folder: Path) -> bool:
    """Whether nothing in a folder is foreign to a checkpoint."""
    files = {f"{tree}.{suffix}" for tree in TREES for suffix in ("json", "safetensors")}
    return set(os.listdir(folder)) <= {SUMS, *files}


def is_miniature(folder: Path) -> bool:
    """Whether the run in a folder was one, by its recipe.yaml."""
    return (folder / "recipe.yaml").read_text(encoding="utf-8").startswith(MINIATURE)


def finished_file(folder: Path, left: Mapping[str, Any], same: bool, cost: Mapping[str, Any]) -> str | None:
    """The file by which a run in a folder without checkpoints got further than its beginning; None where it did not.

    Args:
        left: its recipe.
        same: whether the recipe that is to be run there is the same: then reports of its beginning are taken over.
        cost: that of the checkpoint from which it began.
    """
    try:
        reported, spent = (read_json(folder / name) if (folder / name).exists() else {} for name in (RESULT, COST))
        if spent and spent != cost:
            return COST  # its checkpoints were moved away
        stages = {stage["name"]: stage["steps"] for stage in left["stages"] if "expert" in stage and "steps" in stage}
        over = all(spent.get(name, {}).get("steps", 0) >= steps for name, steps in stages.items())
        over = over and all(stage["name"] in reported for stage in left["stages"] if stage["name"] not in stages)
    except (Damaged, AttributeError, KeyError, TypeError):  # what cannot be read is not written over
        return RESULT
    return RESULT if reported and (over or not same) else None
