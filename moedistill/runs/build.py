"""From a recipe to what is run: models loaded and wired together, data opened, and both compared."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moedistill.data.base import Dataset
from moedistill.data.loading import collate
from moedistill.errors import UserError, user_errors
from moedistill.model.backbone import Backbone
from moedistill.model.mixture import Mixture
from moedistill.recipe.keys import Recipe
from moedistill.runtime.devices import find_device
from moedistill.stages.run import Run

if TYPE_CHECKING:
    from accelerate import Accelerator


def build_mixture(
    recipe: Recipe,
    device: torch.device | str = "cpu",
    backbone: Backbone | None = None,
    *,
    inference: bool = False,
) -> Mixture:
    """Loads the backbone, unless it is given, and attaches the experts; each starts as its parent.

    For `inference` copies of the base are kept in its dtype.

    Raises:
        UserError: what is wrong with the recipe but cannot be seen in it.
    """
    with user_errors("trajectory"):
        trajectory = recipe.trajectory.build(recipe.backbone.native_sigmas())
    with user_errors("router"):
        router = recipe.router.build(trajectory) if recipe.router else None
    with user_errors("backbone"):
        teacher_router = recipe.backbone.teacher_router(trajectory)
        if backbone is None:
            backbone = recipe.backbone.build(recipe.seed)
    with user_errors("experts"):
        mixture = Mixture(
            backbone,
            recipe.experts,
            trajectory=trajectory,
            router=router,
            guidance=recipe.backbone.guidance,
            seed=recipe.seed,
            gradient_checkpointing=recipe.training.gradient_checkpointing and not inference,
            teacher_router=teacher_router,
            inference=inference,
            autocast_dtype=None if recipe.backbone.dtype == "float32" else getattr(torch, recipe.backbone.dtype),
        )
    mixture.to(device)
    mixture.initialise()
    return mixture


def _check_layout(recipe: Recipe, mixture: Mixture, dataset: Dataset | None) -> None:
    """ValueError where latents of a shape, or the first sample's text, do not fit the model."""
    backbone = mixture.backbone
    layout = recipe.backbone.layout()
    if dataset is None or layout is None or not len(dataset):
        return
    for shape, index in {dataset.shape(index): index for index in reversed(range(len(dataset)))}.items():
        channels, _, *size = shape  # a stage may take some of the frames only
        if channels != layout.channels:
            raise ValueError(f"sample {index} has latents {list(shape)}; the model's have {layout.channels} channels")
        if any(length % multiple for length, multiple in zip(size, layout.multiple[1:], strict=True)):
            raise ValueError(
                f"sample {index} has latents {list(shape)}: (T, H, W) must be multiples of {layout.multiple}"
            )
    _, text = backbone.prepare(*collate([dataset[0]]))
    for name, wanted in layout.conditioning.items():
        if name not in text:
            if wanted.required:
                raise ValueError(f"sample 0 has no {name}, which the model takes; encode its text and store it")
            continue
        found = text[name].shape[1:]
        if not wanted.fits(found):
            raise ValueError(f"sample 0 has {name} {list(found)}; the model takes {wanted.pattern()}")


def _prepare_null(recipe: Recipe, mixture: Mixture, dataset: Dataset | None) -> None:
    """Takes over the negative prompt's conditioning stored with the data, or has it encoded, where it will be needed.

    Raises:
        ValueError: it is neither stored nor can it be encoded.
    """
    if dataset is None:
        return
    backbone, guidance = mixture.backbone, recipe.backbone.guidance
    stored = dataset.null_conditioning()
    if stored is not None:
        backbone.set_null(stored)
    guided = any(guidance.classifier_free_scale(base) != 1.0 for base in recipe.backbone.bases())
    if recipe.data and (guided or recipe.data.text_dropout) and len(dataset):
        _, cond = backbone.prepare(*collate([dataset[0]]))
        backbone.null_conditioning(cond)


def build_run(
    recipe: Recipe,
    folder: Path,
    accelerator: "Accelerator",
    *,
    smoke: bool = False,
    backbone: Backbone | None = None,
) -> Run:
    """Loads the models, or takes a `backbone` that is there, and opens the data; UserError where they do not fit."""
    mixture = build_mixture(recipe, accelerator.device, backbone)
    with user_errors("data"):
        dataset = recipe.data.build(mixture.backbone) if recipe.data else None
        _check_layout(recipe, mixture, dataset)
    with user_errors("backbone.guidance"):
        _prepare_null(recipe, mixture, dataset)
    return Run(recipe, folder, accelerator, mixture, dataset, smoke=smoke)


def make_accelerator(recipe: Recipe, device: str | None) -> "Accelerator":
    """One process, or this one's part of what a launcher started."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    chosen = find_device(device)
    cpu = chosen.type == "cpu"
    dtype = recipe.backbone.dtype
    if dtype == "float16" and cpu:
        raise UserError("backbone.dtype: float16 does not train on a CPU; use float32, or bfloat16")
    # One process may run several recipes, each with its own precision.
    AcceleratorState._reset_state()
    return Accelerator(
        cpu=cpu,
        mixed_precision={"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[dtype],
        gradient_accumulation_steps=recipe.training.gradient_accumulation_steps,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
