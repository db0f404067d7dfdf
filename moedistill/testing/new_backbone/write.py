"""Writes the plugin that a new backbone starts from: a complete one, around a toy network.

The templates are the files of a plugin for a backbone `my_model`, with `.txt` after their names so that nothing takes
them for code of this package.
"""

import importlib.util
import keyword
import re
from collections.abc import Collection
from pathlib import Path

from moedistill.errors import UserError

TEMPLATES = Path(__file__).with_name("templates")


def write_plugin(name: str, dest: Path, taken: Collection[str] = ()) -> list[Path]:
    """Writes the plugin for a backbone `name` to the folder `dest`; returns its files.

    Raises:
        UserError: the name cannot be used or is in `taken`, or the folder is not new.
    """
    _check_name(name, taken)
    files = {}
    for template in sorted(TEMPLATES.rglob("*.txt")):
        place = template.relative_to(TEMPLATES).as_posix().removesuffix(".txt")
        text = template.read_text(encoding="utf-8").replace("my_model", name).replace("MyModel", _class_name(name))
        files[dest / place.replace("package/", f"moedistill_{name}/")] = text
    assert files, f"no templates in {TEMPLATES}"
    try:
        if dest.exists() and any(dest.iterdir()):
            raise UserError(f"{dest} is not empty; choose a new folder")
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {dest}: {error.strerror}; choose a new folder") from error
    return list(files)


def _check_name(name: str, taken: Collection[str]) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,40}", name) or keyword.iskeyword(name):
        raise UserError(
            f"{name!r} cannot name a backbone: it becomes part of a package's name, so use lower-case letters, "
            "digits and '_', beginning with a letter, such as my_model"
        )
    if name in taken:
        raise UserError(f"there is a backbone {name!r} already (see `moedistill list backbone`); choose another name")
    if importlib.util.find_spec(f"moedistill_{name}") is not None:
        raise UserError(f"there is a package moedistill_{name} already; choose another name")


def _class_name(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))
