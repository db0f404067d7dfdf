"""Whole networks as full experts: folders as diffusers saves them, files under the makers' names, as ComfyUI has."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moedistill.errors import shorten
from moedistill.exporters.source import Lazy
from moedistill.importing.files import WeightFiles, check_names, open_weights, places_by_noise
from moedistill.importing.routed import routed_experts
from moedistill.integrations.diffusers.loading import read_json
from moedistill.integrations.diffusers.models import DiffusersModelsConfig
from moedistill.model.experts import FullConfig
from moedistill.model.mixture import Mixture
from moedistill.recipe.keys import Recipe

NETWORKS = ("transformer", "transformer_2")
"""Folders of a pipeline's networks, from high noise to low."""

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""What may stand before every name of a file that ComfyUI loads."""


def read_diffusers(
    source: Path, recipe: Recipe, mixture: Mixture
) -> tuple[dict[str, Mapping[str, Tensor]], list[WeightFiles]]:
    """The weights of the recipe's routed experts: of `transformer`, and `transformer_2` for the one of low noise, in a
    pipeline's folder; see `IMPORTERS`.
    """
    experts = _full_experts(recipe, mixture)
    if len(experts) > len(NETWORKS):
        raise ValueError(f"a pipeline has {' and '.join(NETWORKS)}, and the recipe's router {len(experts)} experts")
    places = [source / name for name in NETWORKS[: len(experts)]]
    if missing := [place for place in places if not place.is_dir()]:
        raise ValueError(f"there is no folder {missing[0]}; the recipe has experts {', '.join(experts)}")
    if len(experts) < len(NETWORKS) and (source / NETWORKS[len(experts)]).is_dir():
        raise ValueError(f"{source} has a {NETWORKS[len(experts)]} too, and the recipe one expert, {experts[0]!r}")
    _check_boundary(source, mixture, experts)
    found: dict[str, Mapping[str, Tensor]] = {}
    opened = []
    for expert, place in zip(experts, places, strict=True):
        _check_config(place / "config.json", recipe)
        files = open_weights(place)
        own = mixture.experts[expert].parameters
        buffers = {name for name, _ in mixture.experts[expert].shared.network.named_buffers()}
        theirs = {name: shape for name, shape in files.shapes.items() if name not in buffers}
        check_names({name: each.shape for name, each in own.items()}, theirs, files.place)
        found[expert] = files
        opened.append(files)
    return found, opened


def _check_config(file: Path, recipe: Recipe) -> None:
    """ValueError where a network's config is not that of the recipe's, as far as both say something."""
    backbone = recipe.backbone
    if not isinstance(backbone, DiffusersModelsConfig):
        raise ValueError(f"the recipe's backbone, {backbone.kind}, is none of diffusers' networks")
    theirs, own = read_json(file), json.loads(json.dumps(dict(backbone.architecture())))
    cls = backbone.network_class()
    if (name := theirs.get("_class_name", cls.__name__)) != cls.__name__:
        raise ValueError(f"{file} is of a {shorten(str(name), 60)}, and the recipe's network is a {cls.__name__}")
    for key in sorted(theirs.keys() & own.keys()):
        if not key.startswith("_") and theirs[key] != own[key]:
            raise ValueError(
                f"{file} has {key} {shorten(repr(theirs[key]), 60)}, and the recipe's network {own[key]!r}; it is "
                "another model's"
            )


def _check_boundary(source: Path, mixture: Mixture, experts: Sequence[str]) -> None:
    """ValueError where the pipeline parts its networks at another noise level than the recipe's router."""
    file = source / "model_index.json"
    ratio = read_json(file).get("boundary_ratio") if file.is_file() else None
    if ratio is None or len(experts) < 2 or mixture.router is None:
        return
    for point, sigma in enumerate(mixture.trajectory.points.tolist()):
        serving = mixture.router.expert_at(sigma)
        if serving != experts[sigma < ratio]:
            raise ValueError(
                f"{file} parts its networks at boundary_ratio {ratio}, which gives point {point} of the trajectory, "
                f"sigma {sigma:.6f}, to the other one than the recipe's router, which gives it to {serving!r}; put the "
                f"boundary there: boundaries: [{{ratio: {ratio}}}]"
            )


def read_comfyui(
    source: Path, recipe: Recipe, mixture: Mixture
) -> tuple[dict[str, Mapping[str, Tensor]], list[WeightFiles]]:
    """The weights of the recipe's routed experts under their makers' names: a file for each (`places_by_noise`); see
    `IMPORTERS`.
    """
    names = recipe.backbone.native_names()
    if names is None:
        raise ValueError(f"what the makers of {recipe.backbone.kind} call their tensors is not known here")
    experts = _full_experts(recipe, mixture)
    found: dict[str, Mapping[str, Tensor]] = {}
    opened = []
    for expert, place in zip(experts, places_by_noise(source, experts), strict=True):
        files = open_weights(place)
        prefix = next((each for each in PREFIXES if all(name.startswith(each) for name in files)), "")
        shapes = {name: tuple(each.shape) for name, each in mixture.experts[expert].parameters.items()}
        tensors = names.tensors(shapes)
        wanted = {prefix + tensor.name: tensor.shape for tensor in tensors}
        check_names(wanted, files.shapes, files.place)
        tensor_of = {part: tensor for tensor in tensors for part in tensor.parts}

        def make(name: str, files: WeightFiles = files, prefix: str = prefix, tensor_of: Any = tensor_of) -> Tensor:
            tensor = tensor_of[name]
            part: Tensor = tensor.split(files[prefix + tensor.name])[name]
            return part

        found[expert] = Lazy(list(shapes), make)
        opened.append(files)
    return found, opened


def _full_experts(recipe: Recipe, mixture: Mixture) -> list[str]:
    """The routed experts, which must all be full."""
    experts = routed_experts(recipe, mixture)
    for name in experts:
        if not isinstance(recipe.experts[name], FullConfig):
            raise ValueError(
                f"experts.{name} is {recipe.experts[name].kind}, and the weights are those of whole networks; make it "
                "kind: full"
            )
    return experts
