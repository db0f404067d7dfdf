"""Pieces of a set that is being made, each in a file of its own until they are packed.

A piece is called by a hash of all that it is made of. So one that is there need not be made again: not after a kill,
not by another process, not where other pieces have changed.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moedistill.data.writing import copies
from moedistill.errors import UserError
from moedistill.runtime.checkpoint import save_tensors, write_text
from moedistill.runtime.integrity import Damaged, read_json, read_tensors
from moedistill.runtime.writing import disk_errors, new_file

WORK = ".work"
"""The folder in a set's where pieces lie."""
PLAN = "plan.json"


def key_of(*of: Any) -> str:
    """The name of a piece: a hash of what it is made of, as plain data."""
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:32]


class Pieces:
    """The pieces that lie in a folder: mappings of tensors, or why one cannot be made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make_folder(self) -> None:
        """Makes the folder, and forgets why pieces could not be made: that is tried once more."""
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for file in self.folder.glob("*.failed"):
                file.unlink()

    def __contains__(self, key: str) -> bool:
        return self._file(key).is_file()

    def read(self, key: str) -> dict[str, Tensor]:
        """A piece.

        Raises:
            UserError: it is not what was written.
        """
        try:
            return read_tensors(self._file(key))
        except Damaged as error:
            raise UserError(f"{error}; remove it, and give the same command again: it alone is made anew") from error

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps a piece, whole or not at all."""
        with new_file(self._file(key)) as file:
            save_tensors(file, copies(tensors))

    def fail(self, key: str, reason: str) -> None:
        """Notes why a piece cannot be made."""
        write_text(self._reason(key), reason)

    def failure(self, key: str) -> str | None:
        """Why a piece cannot be made; None if nothing is known against it."""
        file = self._reason(key)
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def write_plan(self, plan: Any) -> None:
        """Leaves plain data for the processes that make pieces."""
        write_text(self.folder / PLAN, json.dumps(plan))

    def read_plan(self) -> Any:
        return read_json(self.folder / PLAN)

    def remove(self) -> None:
        """Removes all of them, once they are packed."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _reason(self, key: str) -> Path:
        return self.folder / f"{key}.failed"
