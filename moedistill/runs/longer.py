"""Training a stage for more steps than it was made with, where that gives what the longer run would have given."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moedistill.errors import UserError
from moedistill.recipe.keys import Recipe, TrainingStageConfig
from moedistill.runs.commands import RunCommand


def made_longer(
    recipe: Recipe,
    made: Mapping[str, Any],
    state: Mapping[str, Any],
    checkpoint: Path,
    command: RunCommand,
    elsewhere: Path,
) -> str | None:
    """The key by which `recipe` trains the checkpoint's stage longer than the recipe `made`; None where it does not.

    Messages say how to go on with `command` in the folder `elsewhere`.

    Raises:
        UserError: a stage's steps are raised, but what was trained is not what the longer run would have trained.
    """
    number = state["stage"]
    for k, (before, config) in enumerate(zip(made["stages"][: number + 1], recipe.stages, strict=False)):
        steps = before.get("steps")
        if not isinstance(config, TrainingStageConfig) or before["name"] != config.name or not isinstance(steps, int):
            continue  # another recipe, as others will say
        if config.steps <= steps:
            continue
        if k < number:
            end = checkpoint.with_name(f"{k:02d}_{config.name}_{steps:08d}")
            on = command.as_given(resume_from=end, output=elsewhere)
            kept = f"from the end of {config.name}, go on with: {on}" if end.is_dir() else ""
            raise UserError(
                f"stages.{k}.steps: {config.steps} is more than {checkpoint} was made with: its stage "
                f"{state['stage_name']} began with what {config.name} was after {steps} steps; "
                f"{kept or 'start a new run, as there is no checkpoint from before it'}"
            )
        if reasons := list(config.not_the_same(steps, state["step"])):
            keys = (f"stages.{k}.steps", f"stages.{config.name}.steps")
            kept_settings = tuple(each for each in command.settings if each.partition("=")[0] not in keys)
            on = replace(command, settings=kept_settings).as_given(resume_from=checkpoint, output=elsewhere)
            raise UserError(
                f"stages.{k}.steps: stage {config.name} was made for {steps} steps, and would not have been the same "
                f"with {config.steps}: {', '.join(reasons)}. Start a new run; or give it {steps} steps again and train "
                f"{config.expert} on with a further stage after it, which goes on with: {on}"
            )
        return f"stages.{k}.steps"
    return None
