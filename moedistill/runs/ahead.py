"""Whatever a later stage needs, tried before the first one trains."""

import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from moedistill.errors import UserError, user_errors
from moedistill.recipe.keys import StageConfig, TrainingStageConfig
from moedistill.runs.memory import remedies
from moedistill.runs.processes import on_main
from moedistill.runtime.checkpoint import Checkpoints, parse_name
from moedistill.runtime.writing import free_bytes
from moedistill.stages import preview
from moedistill.stages.base import Stage
from moedistill.stages.rehearsal import Part, needed, rehearse, size
from moedistill.stages.run import Run


def look_ahead(run: Run, first: int = 0, step: int = 0, trained: Collection[str] = ()) -> None:
    """Tries what the stages from `step` of number `first` on will need.

    Training stages are set up, and the prompts of their previews encoded, on every process. What other stages may load,
    such as a text encoder, and the disk are looked at by the main process, for all.

    Args:
        trained: experts that are in every checkpoint already.

    Raises:
        UserError: a stage would fail, or can certainly not fit into the memory, or on the disk.
    """
    parts: dict[int, list[Part]] = {}
    for number, config in list(enumerate(run.recipe.stages))[first:]:
        if isinstance(config, TrainingStageConfig):
            with user_errors(f"stage {config.name}"):
                _check_shapes(run, config)
                parts[number] = rehearse(run, config)
                if config.preview is not None:
                    preview.look_ahead(run, config.preview)
        else:
            on_main(run.accelerator, partial(_try, run, config))
    _check_memory(run, parts)
    on_main(run.accelerator, partial(_check_room, run, parts, (first, step), trained))


def _check_shapes(run: Run, config: TrainingStageConfig) -> None:
    """ValueError where the model makes no tokens of the latents that the stage cuts."""
    dataset, backbone = run.dataset, run.mixture.backbone
    for channels, frames, *rest in {dataset.shape(i) for i in range(len(dataset))} if dataset is not None else ():
        cut = torch.empty(1, channels, min(frames, config.latent_frames or frames), *rest, device="meta")
        try:
            latents, _ = backbone.prepare(cut, {})
        except (KeyError, NotImplementedError, RuntimeError, TypeError):  # it wants numbers, or conditioning
            continue
        backbone.token_grid(latents.shape)


def _try(run: Run, config: StageConfig) -> None:
    with user_errors(f"stage {config.name}"):
        stage = config.build()
        assert isinstance(stage, Stage)
        stage.look_ahead(run)


def _check_memory(run: Run, parts: Mapping[int, list[Part]]) -> None:
    """Refuses a stage whose tensors alone are more than there is; of an accelerator that was seen before loading.

    Counted are the mixture's weights, what every trainable has from its first step on, and, with accumulation, all
    gradients, else the largest ones: what stands at one moment. Not counted are activations, buffers of libraries, and
    what others use of the memory, so that much of what is not refused will not fit either.
    """
    if run.accelerator.device.type != "cpu":
        return  # where not all of them lie
    there = memory_of(run.accelerator.device)
    held = 0 if there is None else sum(map(size, _tensors(run)))
    accumulating = run.recipe.training.gradient_accumulation_steps > 1
    averages: dict[str, int] = {}
    for number, stage in parts.items():
        averages |= {part.expert: part.averaged for part in stage if part.expert is not None}
        others = sum(averages.values()) - sum(part.averaged for part in stage)
        most = others + needed(stage, accumulating=accumulating)
        if there is not None and held + most > there:
            config = run.recipe.stages[number]
            largest = max(stage, key=lambda part: part.memory)
            raise UserError(
                f"stage {config.name}: {_readable(most)} of gradients, moments and weights are needed beside the "
                f"model's {_readable(held)}, most of it for {largest.name!r}, and {run.accelerator.device} has "
                f"{_readable(there)}; {remedies(run, config, largest=largest)}"
            )


def _tensors(run: Run) -> list[torch.Tensor]:
    """The mixture's tensors, each once."""
    return list({id(each): each for each in [*run.mixture.parameters(), *run.mixture.buffers()]}.values())


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory that a process could have on a device at most, of a CPU with swap; None where it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    if device.type != "cpu":
        return None
    try:
        fields = (line.split() for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        of_system = {name: 1024 * int(value) for name, value, *_ in fields}
        memory, swap = of_system["MemTotal:"], of_system["SwapTotal:"]
    except (OSError, ValueError, KeyError):  # of no Linux: swap may grow
        return None
    with suppress(OSError, ValueError):  # of the container; "max" is none
        swap = min(swap, int(Path("/sys/fs/cgroup/memory.swap.max").read_text(encoding="utf-8")))
    with suppress(OSError, ValueError):
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return memory + swap


def _check_room(run: Run, parts: Mapping[int, list[Part]], reached: tuple[int, int], trained: Collection[str]) -> None:
    """Refuses where a checkpoint will have no room beside those that are kept, by saving them all in thought.

    What is there gives room back only when `keep_checkpoints` removes it: the run's own ones up to the number and step
    that it has `reached`. Whatever else lies beside them stays.
    """
    settings = run.recipe.training
    free = free_bytes(run.output)
    if free is None:
        return
    saved = {name: _whole_size(run, name) for name in trained}
    averages: dict[str, int] = {}
    kept = _sizes(run, reached)
    room = free + sum(kept)
    for number, stage in parts.items():
        config = run.recipe.stages[number]
        assert isinstance(config, TrainingStageConfig)
        states = 0
        for part in stage:
            if part.expert is not None:  # of which this process may have a part
                saved[part.expert] = _whole_size(run, part.expert)
                share = saved[part.expert] / max(1, part.trained)
                averages[part.expert] = int(share * part.averaged)
                states += int(share * part.moments) + part.brought
            else:
                states += part.state
        one = sum(saved.values()) + sum(averages.values()) + states
        every, done = settings.checkpoint_every or config.steps, reached[1] if number == reached[0] else 0
        saves = math.ceil(config.steps / every) - done // every if done < config.steps else 0
        most = (0, 0)
        for _ in range(min(saves, settings.keep_checkpoints + 1)):  # then each is as the one before
            kept.append(one)
            most = max(most, (sum(kept), len(kept)))
            kept = kept[-settings.keep_checkpoints :]
        if most[0] > room:
            raise UserError(
                f"stage {config.name}: a checkpoint takes {_readable(one)}, and there have to be {most[1]} at a time, "
                f"the newest one being written; {run.output} has room for {_readable(room)}. Choose another --output"
                + (f", or lower training.keep_checkpoints {settings.keep_checkpoints}" if most[1] > 2 else "")
            )


def _whole_size(run: Run, expert: str) -> int:
    """Bytes of what is trained of an expert, on all processes together."""
    return sum(each.numel() * each.element_size() for each in run.mixture.experts[expert].parameters.values())


def _sizes(run: Run, reached: tuple[int, int]) -> list[int]:
    """Bytes of the run's checkpoints up to the number and step that it has `reached`, oldest first."""
    sizes = []
    for path in Checkpoints(run.output / "checkpoints", run.recipe.training.keep_checkpoints).all():
        number, _, step = parse_name(path.name) or (0, "", 0)
        if (number, step) <= reached:
            with suppress(OSError):  # what vanishes gives nothing back
                sizes.append(sum(file.stat().st_size for file in path.iterdir()))
    return sizes


def _readable(count: float) -> str:
    """A number of bytes, for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.4g} {unit}"
