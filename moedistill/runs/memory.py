"""Out of memory: recognised, and what to change in the recipe at hand."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from moedistill.errors import UserError, shorten
from moedistill.recipe.keys import Recipe, StageConfig, TrainingStageConfig

if TYPE_CHECKING:
    from moedistill.stages.rehearsal import Part
    from moedistill.stages.run import Run

SIGNS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "ALLOC_FAILED",
    "Storage size calculation overflowed",
    "invalid buffer size",
)
"""Torch's words for it, where it raises a RuntimeError."""

_LOST_WORKER = re.compile(r"DataLoader worker \(pid.*\) is killed by signal: (Killed|Bus error)")
"""Killed by the system, which has no memory left; a bus error is of shared memory. Other ends have other reasons."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (any(sign in text for sign in SIGNS) or bool(_LOST_WORKER.search(text)))


def _is_of_shared_memory(error: BaseException | None) -> bool:
    lost = _LOST_WORKER.search(str(error))
    return lost is not None and lost[1] == "Bus error"


@contextmanager
def memory_errors(where: Callable[[], str], advice: Callable[[BaseException], str]) -> Iterator[None]:
    """Says in one line that memory ran out in the block, where, and what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = shorten((str(error).strip().splitlines() or ["no reason given"])[0], 240)
        raise UserError(f"{where()}: out of memory ({reason}); {advice(error)}") from error


def loading_remedies(recipe: Recipe) -> str:
    """What makes loading take less."""
    return _listed([*_smaller_weights(recipe, recipe.experts), "use a device with more"])


def ways_to_fewer_weights(recipe: Recipe, config: StageConfig) -> str:
    """What makes the weights of a stage, and what belongs to them, take less."""
    found = list(_smaller_weights(recipe, config.trained_experts()))
    if recipe.training.sharding == "none":
        found.append("training.sharding: fsdp2 with several processes")
    if getattr(config, "ema_decay", None) is not None and recipe.training.offload.averages is None:
        found.append("training.offload.averages: cpu")
    return _listed([*found, "use a device with more"])


def remedies(
    run: "Run", config: StageConfig, error: BaseException | None = None, *, largest: "Part | None" = None
) -> str:
    """What makes a stage take less; where its weights and what belongs to them are too much, of the `largest` part."""
    recipe, found = run.recipe, list[str]()
    if _is_of_shared_memory(error):
        fewer = f"training.num_workers below {recipe.training.num_workers}"
        return _listed([fewer, "allow more shared memory (/dev/shm)"])
    if largest is not None and largest.expert is None:
        found.append(f"a smaller critic of {largest.name!r}")
    elif isinstance(config, TrainingStageConfig):
        if largest is None:
            found += _smaller_steps(run, config)
            if recipe.training.num_workers:
                found.append(f"training.num_workers below {recipe.training.num_workers}")
        found += _smaller_weights(recipe, config.trained_experts())
        if config.ema_decay is not None:
            found.append(f"stages.{config.name}.ema_decay: null")
        if largest is not None and getattr(getattr(config, "optimizer", None), "states", "") == "float32":
            found.append(f"stages.{config.name}.optimizer.states: int8")
    else:
        if getattr(config, "batch_size", 1) > 1:
            found.append(f"stages.{config.name}.batch_size below {config.batch_size}")  # type: ignore[attr-defined]
        if run.mixture.backbone.video is not None:
            found.append("a smaller backbone.video")
    return _listed([*found, "use a device with more"])


def _smaller_steps(run: "Run", config: TrainingStageConfig) -> Iterator[str]:
    """What lowers the activations of a step."""
    training, backbone = run.recipe.training, run.mixture.backbone
    world, parts = run.accelerator.num_processes, training.gradient_accumulation_steps
    if training.batch_size > parts * world:
        more = next(n for n in range(parts + 1, training.batch_size + 1) if training.batch_size % (n * world) == 0)
        if all(getattr(loss, "critic_updates", 1) == 1 for loss in config.losses):
            yield f"training.gradient_accumulation_steps: {more}"
        yield f"training.batch_size below {training.batch_size}"
    if not training.gradient_checkpointing and backbone.can_checkpoint:
        yield "training.gradient_checkpointing: true"
    frames = config.latent_frames or backbone.latent_shape()[1]
    if frames > 1:
        yield f"stages.{config.name}.latent_frames below {frames}"


def _smaller_weights(recipe: Recipe, experts: Iterable[str]) -> Iterator[str]:
    full = [name for name in experts if recipe.experts[name].copies_base]
    yield from (f"experts.{name}.kind: lora in place of {recipe.experts[name].kind}" for name in full)
    if recipe.backbone.dtype == "float32":
        yield "backbone.dtype: bfloat16"
    if getattr(recipe.backbone, "quantization", "") is None and not any(e.copies_base for e in recipe.experts.values()):
        yield "backbone.quantization: int8"


def _listed(ways: list[str]) -> str:
    *first, last = ways
    return f"try {', '.join(first)}, or {last}" if first else last
