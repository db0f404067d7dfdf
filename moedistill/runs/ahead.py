"""Whatever a later stage needs, tried before the first one trains."""

import os
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from moedistill.errors import UserError, user_errors
from moedistill.recipe.keys import TrainingStageConfig
from moedistill.runs.memory import remedies
from moedistill.stages.base import Stage
from moedistill.stages.rehearsal import Part, rehearse, size
from moedistill.stages.run import Run


def look_ahead(run: Run, first: int = 0, trained: Collection[str] = ()) -> None:
    """Tries what the stages from number `first` on will need; experts in `trained` are in every checkpoint already.

    Raises:
        UserError: one of them would fail, or can certainly not fit into the memory, or on the disk.
    """
    parts: dict[int, list[Part]] = {}
    for number, config in list(enumerate(run.recipe.stages))[first:]:
        with user_errors(f"stage {config.name}"):
            if isinstance(config, TrainingStageConfig):
                parts[number] = rehearse(run, config)
            else:
                stage = config.build()
                assert isinstance(stage, Stage)
                stage.look_ahead(run)
    _check_memory(run, parts)
    _check_room(run, parts, trained)


def _check_memory(run: Run, parts: Mapping[int, list[Part]]) -> None:
    """Refuses what can certainly not fit: activations are not counted, nor what others use of the memory."""
    if str(run.accelerator.distributed_type.value) in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        return  # what is cut among processes when a stage begins
    there = _memory(run.accelerator.device)
    held = 0 if there is None else sum(map(size, _tensors(run)))
    averages: dict[str, int] = {}
    for number, stage in parts.items():
        averages |= {part.expert: part.averaged for part in stage if part.expert is not None}
        standing = sum(averages.values()) - sum(part.averaged for part in stage)
        needed = standing + sum(part.memory for part in stage)
        if there is not None and held + needed > there:
            config = run.recipe.stages[number]
            largest = max(stage, key=lambda part: part.memory)
            raise UserError(
                f"stage {config.name}: {_readable(needed)} of gradients, moments and weights are needed beside the "
                f"model's {_readable(held)}, most of it for {largest.name!r}, and {run.accelerator.device} has "
                f"{_readable(there)}; {remedies(run, config, largest=largest)}"
            )


def _tensors(run: Run) -> list[torch.Tensor]:
    """The mixture's tensors, each once."""
    return list({id(each): each for each in [*run.mixture.parameters(), *run.mixture.buffers()]}.values())


def _memory(device: torch.device) -> int | None:
    """Bytes of memory that a process could have on a device at most; None where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    if device.type != "cpu":
        return None
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError, ValueError):  # of the container
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)


def _check_room(run: Run, parts: Mapping[int, list[Part]], trained: Collection[str]) -> None:
    """Refuses where the checkpoints of a stage, as many as are kept and the one being written, have no room."""
    settings = run.recipe.training
    saved = {name: sum(map(size, run.mixture.experts[name].parameters.values())) for name in trained}
    averages: dict[str, int] = {}
    folder = run.output / "checkpoints"
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    room = shutil.disk_usage(next(place for place in [run.output, *run.output.absolute().parents] if place.exists()))
    for number, stage in parts.items():
        config = run.recipe.stages[number]
        assert isinstance(config, TrainingStageConfig)
        for part in stage:
            if part.expert is not None:
                saved[part.expert], averages[part.expert] = part.trained, part.averaged
        one = sum(saved.values()) + sum(averages.values()) + sum(part.state for part in stage)
        kept = min(settings.keep_checkpoints, -(-config.steps // (settings.checkpoint_every or config.steps)) - 1)
        if (kept + 1) * one > room.free + there:
            raise UserError(
                f"stage {config.name}: a checkpoint takes {_readable(one)}, and there have to be {kept + 1} at a time, "
                f"the newest one being written; {run.output} has room for {_readable(room.free + there)}. Choose "
                "another --output"
                + (f", or lower training.keep_checkpoints {settings.keep_checkpoints}" if kept > 1 else "")
            )


def _readable(count: float) -> str:
    """A number of bytes, for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.4g} {unit}"
