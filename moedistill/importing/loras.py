"""LoRA files as experts: as adapters where the recipe's expert is one, or merged where it is full.

What an adapter cannot hold, such as changes of norms and of modulations, is refused, all of it by name.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from moedistill.exporters.source import Lazy, Pretrained
from moedistill.importing.files import WeightFiles, listed, open_weights, places_by_noise
from moedistill.importing.lora_files import Changes, read_changes
from moedistill.importing.routed import base_of, routed_experts
from moedistill.model.experts import FullConfig, LoRAConfig
from moedistill.model.mixture import Mixture
from moedistill.recipe.keys import Recipe
from moedistill.runtime.randomness import torch_seed


def read_loras(
    source: Path, recipe: Recipe, mixture: Mixture
) -> tuple[dict[str, Mapping[str, Tensor]], list[WeightFiles]]:
    """The weights of the recipe's routed experts, a file for each (`places_by_noise`); see `IMPORTERS`."""
    experts = routed_experts(recipe, mixture)
    found: dict[str, Mapping[str, Tensor]] = {}
    opened = []
    for expert, place in zip(experts, places_by_noise(source, experts), strict=True):
        files, config = open_weights(place), recipe.experts[expert]
        network = mixture.experts[expert].shared.weights
        shapes = {name: tuple(each.shape) for name, each in network.items()}
        changes = read_changes(files, recipe.backbone.native_names(), shapes)
        pretrained = Pretrained(recipe, base_of(recipe, expert))
        if isinstance(config, FullConfig):
            found[expert] = _merged(changes, shapes, pretrained)
        elif isinstance(config, LoRAConfig):
            _check_places(expert, config, mixture, changes, files)
            found[expert] = _adapter(expert, config, mixture, changes, pretrained)
        else:
            raise ValueError(f"experts.{expert} is {config.kind}, and takes no weights; make it lora or full")
        opened.append(files)
    return found, opened


def _merged(changes: Changes, shapes: Mapping[str, object], pretrained: Pretrained) -> Mapping[str, Tensor]:
    return Lazy(list(shapes), lambda name: changes.added_to(name, pretrained.tensor(name)))


def _check_places(expert: str, config: LoRAConfig, mixture: Mixture, changes: Changes, files: WeightFiles) -> None:
    """ValueError where a change has no place in an adapter, or needs a larger rank."""
    own = mixture.experts[expert].parameters
    adapted = {f"{name.removesuffix('.lora_A.weight')}.weight" for name in own if name.endswith(".lora_A.weight")}
    lost = [name for name in changes.pairs if name not in adapted and name not in own]
    lost += [name for name in changes.wholes if name not in own]
    if lost:
        keys = dict.fromkeys(key for name in lost for key in changes.keys[name])
        raise ValueError(
            f"{files.place}: {listed(keys)} has no place in experts.{expert}, which adapts {config.targets} and copies "
            f"{config.copies}; add their linears to its targets or their modules to its copies, or make it kind: full, "
            "into which all is merged"
        )
    highest = max((len(pair.a) for name, pair in changes.pairs.items() if name in adapted), default=0)
    if highest > config.rank:
        raise ValueError(f"{files.place} has rank {highest}, and experts.{expert} {config.rank}; set rank to {highest}")


def _adapter(
    expert: str, config: LoRAConfig, mixture: Mixture, changes: Changes, pretrained: Pretrained
) -> Mapping[str, Tensor]:
    own = mixture.experts[expert].parameters

    def make(name: str) -> Tensor:
        path, mark, _ = name.partition(".lora_")
        if not mark:
            return changes.added_to(name, pretrained.tensor(name))
        pair, shape = changes.pairs.get(f"{path}.weight"), own[name].shape
        if name.endswith(".lora_A.weight"):
            # What the file leaves free is as a new adapter's, which B makes nothing of until it is trained.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(torch_seed(mixture.seed, "expert", expert, path))
                factor = nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))
            if pair is not None:
                factor[: len(pair.a)] = pair.a
            return factor
        factor = torch.zeros(shape)
        if pair is not None:
            factor[:, : len(pair.a)] = pair.b * (config.rank / config.alpha)
        return factor

    return Lazy(list(own), make)
