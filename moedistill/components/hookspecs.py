"""The hooks of a plugin: one registers components, five observe a run. None changes an algorithm from afar."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from moedistill.components.registry import Components

hookspec = pluggy.HookspecMarker("moedistill")


@hookspec
def register_components(components: "Components") -> None:
    """Registers the plugin's components.

    Example:
        `components.register("loss", "my_loss", "my_package.losses:MyLossConfig", "what it does, in one line")`
    """


@hookspec
def on_stage_start(training: Any) -> None:
    """A stage is about to start; its expert is initialised and its optimisers exist."""


@hookspec
def on_step_end(training: Any, metrics: dict[str, float]) -> None:
    """A logged optimiser step is done; `metrics`: its numbers by name.

    Logged are every `training.log_every`-th, the last, and those in which the monitor measured. It does so before the
    first step too: `training.step` is 0 then, and `metrics` hold nothing else.
    """


@hookspec
def on_checkpoint(training: Any, path: Path) -> None:
    """A checkpoint lies complete at `path`."""


@hookspec
def on_preview(training: Any, path: Path) -> None:
    """Videos of the stage's `preview` lie complete in the folder `path`; beside it is `strip.png`."""


@hookspec
def on_stage_end(training: Any) -> None:
    """A stage is done."""
