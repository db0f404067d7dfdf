"""What the networks of a small model give, as training has them, for comparing with what files make of them."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moedistill.exporters.reading.fresh import Call
from moedistill.exporters.source import Source
from moedistill.model.layout import Input
from moedistill.model.mixture import Mixture, Weights
from moedistill.runs.build import build_mixture
from moedistill.runs.saved import read_state, read_weights
from moedistill.runtime.checkpoint import find_checkpoint
from moedistill.stages.export import read_export

SMALL = 2**24
"""Parameters of a network that is called: a mixture of larger ones takes memory that an export must not."""
SIGMA = 0.9


def trained_calls(source: Source) -> dict[str, Call]:
    """A call of each expert's network, and what training's gives in float32; none where the networks are not small."""
    shapes = [expert.shapes for expert in source.experts.values()]
    if any(sum(math.prod(shape) for shape in each.values()) > SMALL for each in shapes):
        return {}
    config: Any = source.recipe.backbone.replace(dtype="float32", quantization=None)
    mixture = build_mixture(replace(source.recipe, backbone=config), inference=True)
    trained, averages = _weights(source)
    mixture.load(trained, averages, str(source.place))
    latents = torch.Size((1, *config.latent_shape(config.tiny_video)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(latents)
        cond = {name: _made_up(each, latents) for name, each in config.inputs().items() if each.required}
    return {name: _call(mixture, name, bool(averages), x, cond) for name in source.experts}


def _weights(source: Source) -> tuple[Weights, Weights]:
    """What was trained, and averages where those were asked for."""
    if source.is_export:
        return read_export(source.place)[1], {}
    checkpoint = find_checkpoint(source.place)
    averaged = source.provenance["weights"] == "ema"
    return read_weights(checkpoint, read_state(checkpoint), averaged=averaged)


def _made_up(each: Input, latents: torch.Size) -> Tensor:
    """A conditioning tensor of any content that fits."""
    sizes = list(latents[2:])
    shape = [1, *(sizes.pop(0) if size is None else size for size in each.shape)]
    if each.role == "mask":
        return torch.ones(shape, dtype=torch.bool)
    return torch.zeros(shape, dtype=torch.long) if each.whole else torch.randn(shape)


def _call(mixture: Mixture, name: str, averaged: bool, x: Tensor, cond: dict[str, Tensor]) -> Call:
    seen: list[tuple[dict[str, Any], Any]] = []

    def see(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.append(({**kwargs, "return_dict": False}, output))

    network = mixture.experts[name].shared.network
    handle = network.register_forward_hook(see, with_kwargs=True)
    try:
        with torch.no_grad(), mixture.running(name, "ema" if averaged else "trained"):
            mixture(x, torch.tensor([SIGMA]), cond)
    finally:
        handle.remove()
    arguments, output = seen[0]
    return Call(arguments, output[0] if isinstance(output, tuple) else output.sample)
