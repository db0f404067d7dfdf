"""Experiment trackers, by the names that accelerate knows."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from PIL import Image

from moedistill.components.plugins import hookimpl
from moedistill.errors import UserError, WriteError, shorten
from moedistill.stages.preview import STRIP
from moedistill.stages.run import METRICS

if TYPE_CHECKING:
    from accelerate import Accelerator

    from moedistill.stages.training import Training


class Trackers:
    """Sends every logged step's metrics, and previews, to `names` (tensorboard, wandb, …), as `stage/name`.

    Steps count on through the stages. What a tracker raises is its service's, its library's or its disk's: any of it
    is said in one line.

    Raises:
        UserError: a tracker is unknown, not installed, or cannot be started.
    """

    def __init__(self, accelerator: "Accelerator", names: list[str], folder: str, project: str) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        available = [str(name) for name in get_available_trackers()]
        for name in names:
            if name not in available:
                known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
                raise UserError(
                    f"training.trackers: {name!r} is not installed or not known; installed here: "
                    f"{', '.join(sorted(available)) or 'none'}; known: {known}"
                )
        self._accelerator, self._names = accelerator, names
        accelerator.log_with = list(names)
        accelerator.project_configuration.set_directories(folder)
        self._offset = 0
        if names:
            try:
                accelerator.init_trackers(project)
            except Exception as error:
                raise UserError(f"training.trackers: {', '.join(names)} cannot be started: {_why(error)}") from error

    @hookimpl
    def on_stage_start(self, training: "Training") -> None:
        names = [stage.name for stage in training.recipe.stages]
        earlier = training.recipe.stages[: names.index(training.config.name)]
        self._offset = sum(getattr(stage, "steps", 0) for stage in earlier)

    @hookimpl
    def on_step_end(self, training: "Training", metrics: dict[str, float]) -> None:
        if self._names:
            values = {f"{training.config.name}/{name}": value for name, value in metrics.items()}
            try:
                self._accelerator.log(values, step=self._offset + training.step)
            except Exception as error:
                message = f"training.trackers: {', '.join(self._names)} cannot be written to: {_why(error)}"
                raise WriteError(message) from error

    @hookimpl
    def on_preview(self, training: "Training", path: Path) -> None:
        stage, step = training.config.name, self._offset + training.step
        for tracker in self._accelerator.trackers if self._names else ():
            try:
                _show(tracker, f"{stage}/preview", path, step)
            except Exception as error:
                message = f"training.trackers: {tracker.name} cannot be written to: {_why(error)}"
                raise WriteError(message) from error

    def stop(self) -> None:
        """Closes the trackers; also after an error, which this never takes the place of."""
        for tracker in self._accelerator.trackers if self._names else ():
            try:
                tracker.finish()
            except Exception as error:
                message = f"training.trackers: {tracker.name} cannot be closed: {_why(error)}"
                click.echo(f"warning: {message}; what it was to get is in {METRICS}")


def _show(tracker: Any, name: str, preview: Path, step: int) -> None:
    """Gives a tracker what it can show of a preview: the strip, and the videos if its library takes files of them."""
    if tracker.name in ("wandb", "trackio"):
        library = import_module(tracker.name)
        videos = {f"{name}/{file.stem}": library.Video(str(file)) for file in sorted(preview.glob("*.mp4"))}
        tracker.log({name: library.Image(str(preview.parent / STRIP)), **videos}, step=step)
    elif hasattr(tracker, "log_images"):
        with Image.open(preview.parent / STRIP) as picture:
            pixels = np.asarray(picture)[None]
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: pixels}, step=step, **layout)


def _why(error: Exception) -> str:
    return shorten((str(error).strip().splitlines() or [type(error).__name__])[0], 160)
