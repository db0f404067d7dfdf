"""The commands that hints print: whole ones, to be copied to a shell."""

import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunCommand:
    """What `moedistill run` is given besides recipe and folder. Its overrides are in the recipe.yaml of the folder.

    Attributes:
        smoke: whether the run is a miniature.
        device: if one was named.
        plugins: files.
    """

    smoke: bool = False
    device: str | None = None
    plugins: tuple[str, ...] = ()

    def begin(self, folder: Path) -> str:
        """The command that begins the run in `folder`, of which nothing is saved, anew."""
        return self._command(folder, "--output", _path(folder))

    def go_on(self, folder: Path, source: Path | None = None, *, branch: bool = False) -> str:
        """The command that goes on with the run in `folder`.

        Args:
            source: the checkpoint to go on from; the newest one, if not given.
            branch: it is another folder's.
        """
        output = ["--output", _path(folder)] if branch else []
        return self._command(folder, "--resume-from", _path(source or folder), *output)

    def _command(self, folder: Path, *where: str) -> str:
        more = ["--smoke"] if self.smoke else []
        more += ["--device", self.device] if self.device is not None else []
        more += [part for file in self.plugins for part in ("-p", _path(Path(file)))]
        return shlex.join(["moedistill", "run", _path(folder / "recipe.yaml"), *where, *more])


def _path(path: Path) -> str:
    """A path that is never taken for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)
