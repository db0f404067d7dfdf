"""The commands that hints print: whole ones, to be copied to a shell."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from moedistill.runtime.writing import numbered


@dataclass(frozen=True)
class RunCommand:
    """What `moedistill run` is given besides folders. A run's own recipe.yaml has its overrides in it.

    Attributes:
        smoke: whether the run is a miniature.
        device: if one was named.
        plugins: files.
        recipe: a file or a name, as given; None where it was no text.
        settings: what `--set` was given.
        processes: how many, if a number was named.
    """

    smoke: bool = False
    device: str | None = None
    plugins: tuple[str, ...] = ()
    recipe: str | None = None
    settings: tuple[str, ...] = ()
    processes: int | None = None

    def as_given(
        self,
        *,
        output: str | Path | None = None,
        resume: bool = False,
        resume_from: str | Path | None = None,
    ) -> str:
        """The command with the recipe that was given, and its settings."""
        return shlex.join(["moedistill", *self.arguments(output=output, resume=resume, resume_from=resume_from)])

    def arguments(
        self,
        *,
        output: str | Path | None = None,
        resume: bool = False,
        resume_from: str | Path | None = None,
    ) -> list[str]:
        """The same as arguments of `moedistill`."""
        where = ["--resume"] if resume else []
        where += [] if resume_from is None else ["--resume-from", _path(resume_from)]
        where += [] if output is None else ["--output", _path(output)]
        settings = [part for setting in self.settings for part in ("--set", setting)]
        return self._arguments(self.recipe or "RECIPE", *settings, *where)

    def begin(self, folder: Path) -> str:
        """The command that begins the run in `folder`, of which nothing is saved, anew."""
        return self._command(folder / "recipe.yaml", "--output", _path(folder))

    def change(self, folder: Path, setting: str, source: Path | None = None) -> str:
        """The command that begins the run in `folder` once more in another, from `source` if given, with a setting."""
        on = ["--resume-from", _path(source)] if source is not None else []
        return self._command(folder / "recipe.yaml", "--set", setting, *on, "--output", _path(another(folder)))

    def go_on(self, folder: Path, source: Path | None = None, *, branch: bool = False) -> str:
        """The command that goes on with the run in `folder`.

        Args:
            source: the checkpoint to go on from; the newest one, if not given.
            branch: it is another folder's.
        """
        output = ["--output", _path(folder)] if branch else []
        return self._command(folder / "recipe.yaml", "--resume-from", _path(source or folder), *output)

    def _command(self, recipe: str | Path, *where: str) -> str:
        return shlex.join(["moedistill", *self._arguments(recipe, *where)])

    def _arguments(self, recipe: str | Path, *where: str) -> list[str]:
        more = ["--smoke"] if self.smoke else []
        more += ["--device", self.device] if self.device is not None else []
        more += ["--num-processes", str(self.processes)] if self.processes is not None else []
        more += [part for file in self.plugins for part in ("-p", _path(file))]
        return ["run", _path(recipe), *where, *more]


def another(folder: Path) -> Path:
    """A name for a folder that is not there yet: `folder-2`, `folder-3` …"""
    return next(path for path in numbered(folder) if path != folder and not os.path.lexists(path))


def _path(path: str | Path) -> str:
    """A path that is never taken for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)
