"""`apply`: the experts of a run or export in a pipeline that is already there."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from moedistill.components.fields import WhichWeights
from moedistill.components.plugins import Plugins
from moedistill.errors import UserError, user_errors
from moedistill.flow.process import listed, whole
from moedistill.integrations.diffusers.backbone import DiffusersBackboneConfig
from moedistill.integrations.diffusers.loading import transformers_of
from moedistill.integrations.diffusers.pipeline import Applied, RoutedTransformer, attach, refuse_eta
from moedistill.recipe.sampling import notes_on, untrained_notes
from moedistill.runs.build import build_mixture
from moedistill.runs.sample import read_trained, sampling_config, sampling_steps


def apply(
    pipeline: Any,
    source: str | Path,
    *,
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    weights: WhichWeights = "trained",
    plugins: Plugins | None = None,
) -> Applied:
    """Puts the experts of a run or export into a pipeline that is already there, with their few sampling steps.

    Afterwards `pipeline(prompt)` samples with the experts, whatever number of steps or guidance scale it is called
    with. The pipeline's own transformer serves as the base, on its device and in its dtype. Offloading, such as
    `pipeline.enable_model_cpu_offload()`, comes afterwards, and so does `torch.compile`. To save the pipeline, `undo`
    first.

    Args:
        pipeline: of the class that the experts were distilled from, with the same weights, which is not checked.
        source: a run's folder, a checkpoint, or an export's folder.
        steps, sigmas: instead of the recipe's own sampling steps. A warning says which of them no jump was trained for.
        weights: the experts' `trained` weights or their `ema`.

    Returns:
        A handle; its `undo()` gives the pipeline back as it was, its `notes` are what was warned of: such steps, and
        experts that are not trained yet.

    Raises:
        UserError: the source is incomplete, or made for another model; or steps, sigmas or weights that there are not.
            The pipeline is as it was.

    Example:
        pipeline = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", torch_dtype=torch.bfloat16)
        moedistill.apply(pipeline, "runs/dcm_wan_1_3b/20260101-120000")
    """
    if weights not in ("trained", "ema"):
        raise UserError(f"weights {weights!r} are unknown: use trained or ema")
    with user_errors("apply"):
        steps = None if steps is None else whole("steps", steps)
        sigmas = None if sigmas is None else listed("sigmas", sigmas)
    recipe, experts, averages = read_trained(source, weights=weights, plugins=plugins)
    config, chosen = recipe.backbone, sampling_config(recipe, steps, sigmas)
    with user_errors(str(source)):
        refuse_eta(chosen.eta)
    if not isinstance(config, DiffusersBackboneConfig):
        raise UserError(f"{source} was made for backbone {config.kind!r}, which has no diffusers pipeline")
    networks = _networks_of(pipeline, config, source)
    first: Any = next(iter(networks.values()))
    config = config.replace(dtype=str(first.dtype).removeprefix("torch."))
    path = sampling_steps(recipe, steps, sigmas)
    notes = untrained_notes(recipe, experts, path)
    notes += notes_on(recipe, chosen) if steps is not None or sigmas is not None else []
    for note in notes:
        warnings.warn(note, stacklevel=2)
    with ExitStack() as undo:
        for network in networks.values():
            undo.callback(_remember(network))
        backbone = config.wrap(networks)
        for restore in backbone.islands:
            undo.callback(restore)
        mixture = build_mixture(replace(recipe, backbone=config), first.device, backbone, inference=True)
        mixture.load(experts, averages, str(source))
        applied = attach(pipeline, mixture, path, weights=weights)
        applied._undo.callback(undo.pop_all().close)
    applied.notes = notes
    return applied


def _networks_of(pipeline: Any, config: DiffusersBackboneConfig, source: object) -> dict[str, nn.Module]:
    """The networks of a pipeline, by name, that experts made with `config` can run on.

    Raises:
        UserError: it is another pipeline, has other networks, or carries something already.
    """
    cls = config.pipeline_class()
    if not isinstance(pipeline, cls):
        raise UserError(f"{source} was made for a {_named(cls)}, not a {_named(type(pipeline))}")
    components = {name: getattr(pipeline, name) for name in transformers_of(cls)}
    networks = {name: network for name, network in components.items() if network is not None}
    bare = [getattr(network, "_orig_mod", network) for network in networks.values()]  # of one that torch.compile gave
    if any(isinstance(network, RoutedTransformer) for network in bare):
        raise UserError("the pipeline carries experts already; call undo() on the handle that `apply` gave first")
    if set(networks) != set(config.bases()):
        raise UserError(
            f"{source} was made for a model with {' and '.join(config.bases())}; this pipeline has "
            f"{' and '.join(networks) or 'no transformer'}"
        )
    modules = [module for network in networks.values() for module in network.modules()]
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in modules):
        raise UserError(
            "the pipeline's networks are compiled already, and experts change them; load it anew, apply the experts "
            "first, then compile: pipeline.transformer = torch.compile(pipeline.transformer)"
        )
    if any(hasattr(network, "peft_config") for network in networks.values()):
        raise UserError("the pipeline carries a LoRA already; take it out first, with pipeline.unload_lora_weights()")
    if any(hasattr(module, "_hf_hook") for module in modules):
        raise UserError("the pipeline's networks are offloaded already; apply the experts first, then offload")
    return {base: networks[base] for base in config.bases()}


def _named(cls: type) -> str:
    """A class's name, with its module where that is not diffusers'."""
    return cls.__name__ if cls.__module__.startswith("diffusers.") else f"{cls.__module__}.{cls.__name__}"


def _remember(network: nn.Module) -> Callable[[], None]:
    """What makes a network again what it is now, whatever was attached to it in between."""
    modules = dict(network.named_modules())
    trainable = {parameter for parameter in network.parameters() if parameter.requires_grad}

    def restore() -> None:
        for path, module in modules.items():
            parent, _, name = path.rpartition(".")
            if path and getattr(modules[parent], name) is not module:
                setattr(modules[parent], name, module)
        for parameter in network.parameters():
            parameter.requires_grad_(parameter in trainable)
        if hasattr(network, "peft_config"):
            del network.peft_config

    return restore
