"""From a recipe to what is run: models loaded and wired together, data opened, and both compared."""

import operator
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from moedistill.data.base import Dataset, Sample
from moedistill.data.loading import collate, conditioning_problem, sample_problem
from moedistill.errors import UserError, shorten, user_errors
from moedistill.flow.routers import Router
from moedistill.flow.trajectory import Trajectory
from moedistill.model.backbone import Backbone, BackboneConfig, SampleLayout
from moedistill.model.experts import LoRAConfig
from moedistill.model.mixture import Mixture
from moedistill.recipe.keys import Recipe
from moedistill.runs.asked_sharding import asked_sharding, hidden_from_accelerate
from moedistill.runs.starting import start_experts
from moedistill.runtime.devices import find_device
from moedistill.runtime.shards import can_write_shards
from moedistill.stages.run import Run

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh


def build_mixture(
    recipe: Recipe,
    device: torch.device | str = "cpu",
    backbone: Backbone | None = None,
    *,
    inference: bool = False,
    mesh: "DeviceMesh | None" = None,
    known: Collection[str] = (),
) -> Mixture:
    """Loads the backbone, unless it is given, and attaches the experts; each starts as its parent, or with its `init`.

    For `inference` copies of the base are kept in its dtype, and no `init` is read: all weights come from where they
    were saved. With a `mesh` networks are cut among its processes, none of which ever holds the whole.

    Args:
        known: experts whose weights come from a checkpoint: their `init` is not read.

    Raises:
        UserError: what is wrong with the recipe but cannot be seen in it.
    """
    flow = flow_of(recipe)  # before anything of weight is loaded
    with user_errors("backbone"):
        if backbone is None:
            backbone = recipe.backbone.skeleton() if mesh is not None else recipe.backbone.build(recipe.seed)
        if mesh is not None:
            _fill_buffers(recipe, backbone)
    mixture = attach_experts(recipe, backbone, flow, inference=inference, without_memory=mesh is not None)
    mixture.averages_on_host = recipe.training.offload.averages is not None and not inference
    # Sampling in one process takes every expert in turn: nothing is idle there.
    if mesh is None:
        mixture.place(device, idle_on_host=recipe.training.offload.idle is not None and not inference)
    else:
        mixture.shard(mesh, torch.device(device))
        with user_errors("backbone"):
            mixture.fill(recipe.backbone, recipe.seed)
    if not inference:
        start_experts(recipe, mixture, known)
    mixture.initialise()
    return mixture


@dataclass(frozen=True)
class Flow:
    """What of a recipe says which noise levels there are, and who serves them."""

    trajectory: Trajectory
    router: Router | None
    teacher_router: Router | None


def flow_of(recipe: Recipe) -> Flow:
    """A recipe's trajectory and routers.

    Raises:
        UserError: what is wrong with them but cannot be seen in the recipe.
    """
    with user_errors("trajectory"):
        trajectory = recipe.trajectory.build(recipe.backbone.native_sigmas())
    with user_errors("router"):
        router = recipe.router.build(trajectory) if recipe.router else None
    with user_errors("backbone"):
        return Flow(trajectory, router, recipe.backbone.teacher_router(trajectory))


def attach_experts(
    recipe: Recipe, backbone: Backbone, flow: Flow, *, inference: bool = False, without_memory: bool = False
) -> Mixture:
    """The recipe's mixture around a backbone; what experts add holds any numbers, or lies on torch's meta device.

    Raises:
        UserError: an expert does not fit the backbone.
    """
    with user_errors("experts"), torch.device("meta") if without_memory else nullcontext():
        _check_ranks(recipe, backbone)
        return Mixture(
            backbone,
            recipe.experts,
            trajectory=flow.trajectory,
            router=flow.router,
            guidance=recipe.backbone.guidance,
            seed=recipe.seed,
            gradient_checkpointing=recipe.training.gradient_checkpointing and not inference,
            teacher_router=flow.teacher_router,
            inference=inference,
            autocast_dtype=None if recipe.backbone.dtype == "float32" else getattr(torch, recipe.backbone.dtype),
        )


def _fill_buffers(recipe: Recipe, backbone: Backbone) -> None:
    """Gives the buffers of a skeleton that are saved with the weights their values, before anything is attached."""
    saved = {
        base: {name: tensor for name, tensor in network.state_dict().items() if not tensor.is_meta}
        for base, network in backbone.networks.items()
    }

    def take(base: str, name: str, value: torch.Tensor) -> None:
        if name in saved[base]:
            saved[base][name].copy_(value)

    if any(saved.values()):
        recipe.backbone.give_weights(take, recipe.seed)


def _check_ranks(recipe: Recipe, backbone: Backbone) -> None:
    """ValueError where an adapter has a rank above the width of every linear that it is for."""
    if getattr(recipe.backbone, "pretrained", "") is None:
        return  # random weights, of a miniature as a rule: the rank is that of the real model
    linears = {path: each for path, each in backbone.network.named_modules() if isinstance(each, nn.Linear)}
    for name, expert in recipe.experts.items():
        if not isinstance(expert, LoRAConfig):
            continue
        groups = [expert.targets] if isinstance(expert.targets, str) else expert.targets
        pattern = "|".join(backbone.lora_targets[group] for group in groups if group in backbone.lora_targets)
        adapted = [each for path, each in linears.items() if re.fullmatch(pattern, path)]
        widest = max((min(each.in_features, each.out_features) for each in adapted), default=expert.rank)
        if expert.rank > widest:
            raise ValueError(
                f"expert {name}: rank {expert.rank} is above the width of the linears, {widest}: more than that adds "
                f"nothing; give {widest} or less, or kind: full"
            )


def _check_samples(recipe: Recipe, mixture: Mixture, dataset: Dataset | None) -> None:
    """ValueError where the dataset gives what is no sample, or what does not fit the model.

    Looked at are the first sample, and the latents' shapes of all.
    """
    if dataset is None or recipe.data is None:
        return
    with _value_errors(f"dataset {recipe.data.kind!r}"):
        if not len(dataset):
            raise ValueError("it has no samples; give it some, or leave data out")
        _check_first(dataset)
        layout = recipe.backbone.layout()
        if layout is not None:
            for shape, index in {_shape(dataset, i): i for i in reversed(range(len(dataset)))}.items():
                for problem in layout.latent_problems(shape):
                    raise ValueError(f"sample {index} {problem}")
            _check_conditioning(recipe.backbone, layout, mixture.backbone, dataset[0])


def _check_first(dataset: Dataset) -> None:
    """The first sample is one, of the shape that the dataset says; the stored negative prompt goes with it."""
    sample = dataset[0]
    # First without the shape, which a dataset may take from the sample.
    if problem := sample_problem(sample) or sample_problem(sample, _shape(dataset, 0)):
        raise ValueError(f"sample 0 {problem}")
    null = dataset.null_conditioning()
    if null is None:
        return
    if problem := conditioning_problem(null):
        raise ValueError(f"the negative prompt {problem}")
    for name in null.keys() & sample.conditioning.keys():
        if null[name].ndim != sample.conditioning[name].ndim:
            shapes = f"{list(null[name].shape)}, and sample 0 {list(sample.conditioning[name].shape)}"
            raise ValueError(f"the negative prompt has {name} {shapes}; both must be without a batch dimension")


def _shape(dataset: Dataset, index: int) -> tuple[int, ...]:
    given = dataset.shape(index)
    try:
        shape = tuple(map(operator.index, given))
    except TypeError:
        shape = ()
    if len(shape) != 4:
        raise ValueError(f"sample {index} has shape() {given}; it must be the latents' four sizes (C, T, H, W)")
    return shape


def _check_conditioning(config: BackboneConfig, layout: SampleLayout, backbone: Backbone, sample: Sample) -> None:
    latents, cond = collate([sample])
    try:
        problem = next(layout.conditioning_problems(config.unpack(cond), latents.shape[1:]), None)
        if problem is None:
            backbone.prepare(latents, cond)
    except ValueError as error:
        raise ValueError(f"sample 0: {error}") from error
    except (IndexError, KeyError, RuntimeError, TypeError) as error:  # of shapes or dtypes that it does not expect
        given = ", ".join(f"{name} {value.dtype} {list(value.shape[1:])}" for name, value in cond.items())
        wanted = ", ".join(f"{name} {each.pattern()}" for name, each in layout.conditioning.items())
        reason = shorten(str(error), 120)
        raise ValueError(
            f"sample 0 has {given or 'no conditioning'}, of which the model makes nothing ({reason}); it takes {wanted}"
        ) from error
    if problem is not None:
        raise ValueError(f"sample 0 {problem}")


@contextmanager
def _value_errors(what: str) -> Iterator[None]:
    """Says of a ValueError in the block what it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


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
    known: Collection[str] = (),
) -> Run:
    """Loads the models, or takes a `backbone` that is there, and opens the data; UserError where they do not fit.

    See `build_mixture` for `known`.
    """
    mesh = mesh_of(accelerator) if is_sharded(recipe, accelerator) and backbone is None else None
    mixture = build_mixture(recipe, accelerator.device, backbone, mesh=mesh, known=known)
    with user_errors("data"):
        dataset = recipe.data.build(mixture.backbone) if recipe.data else None
        _check_samples(recipe, mixture, dataset)
    with user_errors("backbone.guidance"):
        _prepare_null(recipe, mixture, dataset)
    return Run(recipe, folder, accelerator, mixture, dataset, smoke=smoke)


def is_sharded(recipe: Recipe, accelerator: "Accelerator") -> bool:
    """Whether networks are cut among a run's processes: as it asks for, unless one was started without a launcher."""
    together = accelerator.num_processes > 1 or torch.distributed.is_initialized()
    return recipe.training.sharding == "fsdp2" and together


def mesh_of(accelerator: "Accelerator") -> "DeviceMesh":
    """The processes among which networks are cut."""
    from torch.distributed.device_mesh import init_device_mesh

    if not can_write_shards():
        raise UserError(
            f"training.sharding: fsdp2 needs a torch whose checkpoints are in safetensors, process by process, and "
            f"{torch.__version__} has none; update torch"
        )
    processes, replicas = accelerator.num_processes, asked_sharding(os.environ).replicas
    if replicas == 1:
        return init_device_mesh(accelerator.device.type, (processes,))
    names = ("replicate", "shard")
    return init_device_mesh(accelerator.device.type, (replicas, processes // replicas), mesh_dim_names=names)


def make_accelerator(recipe: Recipe, device: str | None) -> "Accelerator":
    """One process, or this one's part of what a launcher started."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs

    chosen = find_device(device)
    cpu = chosen.type == "cpu"
    dtype = recipe.backbone.dtype
    if dtype == "float16" and cpu:
        raise UserError("backbone.dtype: float16 does not train on a CPU; use float32, or bfloat16")
    # One process may run several recipes, each with its own precision.
    AcceleratorState._reset_state()
    with hidden_from_accelerate():
        return Accelerator(
            cpu=cpu,
            mixed_precision={"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[dtype],
            gradient_accumulation_steps=recipe.training.gradient_accumulation_steps,
            kwargs_handlers=[
                AutocastKwargs(cache_enabled=False),
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.training.timeout)),
            ],
        )
