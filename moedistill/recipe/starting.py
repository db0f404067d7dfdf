"""Where an expert's `init` points: a folder, and the name of an expert in it."""

import os
from pathlib import Path


def split_init(init: str, expert: str) -> tuple[Path, str]:
    """The folder that an `init` names, and the expert in it: after `#`, or the one that is called `expert` here too."""
    folder, mark, named = init.rpartition("#")
    if not mark or os.path.lexists(init):  # a folder's name may have one
        return Path(init), expert
    return Path(folder), named


def find_start(init: str) -> None:
    """ValueError where what an `init` names is no folder; what is in it is looked at by those that read it."""
    folder, _ = split_init(init, "")
    if folder.is_file():
        raise ValueError(
            f"{folder} is a file; make an export of it, moedistill convert KIND {folder} FOLDER --recipe RECIPE, and "
            "give that folder"
        )
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give an export, a run or a checkpoint, or leave init out")
