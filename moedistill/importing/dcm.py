"""The released layout of DCM (arXiv 2506.03123): both experts of one network in one file.

A linear that the detail expert adapts is `X.base_layer`, with `X.lora_A.lora1` and `X.lora_B.lora1` beside it; a module
that it has a copy of is `Y`, and the copy `Y_lora`. Without all these the rest is the semantic expert.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from moedistill.exporters.source import Lazy
from moedistill.importing.files import WeightFiles, check_names, open_weights
from moedistill.model.backbone import TEACHER
from moedistill.model.experts import FullConfig, LoRAConfig
from moedistill.model.mixture import Mixture
from moedistill.recipe.keys import Recipe

SCALE = 2.0
"""alpha / rank of the released training, which the file does not say."""


def read_dcm(
    source: Path, recipe: Recipe, mixture: Mixture
) -> tuple[dict[str, Mapping[str, Tensor]], list[WeightFiles]]:
    """The weights of the recipe's two experts, and the files that they are in; see `IMPORTERS`."""
    semantic, detail = _two_experts(recipe)
    files = open_weights(source)
    names = {**_semantic_names(mixture, semantic, detail), **_detail_names(mixture, recipe, detail)}
    shapes = {theirs: tuple(mixture.experts[expert].parameters[own].shape) for (expert, own), theirs in names.items()}
    check_names(shapes, files.shapes, files.place)

    def weights(expert: str) -> Mapping[str, Tensor]:
        own = {name: theirs for (of, name), theirs in names.items() if of == expert}
        return Lazy(list(own), lambda name: files[own[name]])

    return {name: weights(name) for name in (semantic, detail)}, [files]


def _two_experts(recipe: Recipe) -> tuple[str, str]:
    """The full expert and the adapter on it.

    Raises:
        ValueError: the recipe does not have these two, or another scale.
    """
    full = [name for name, each in recipe.experts.items() if isinstance(each, FullConfig) and each.parent == TEACHER]
    pairs = [
        (name, other)
        for name in full
        for other, each in recipe.experts.items()
        if isinstance(each, LoRAConfig) and each.parent == name
    ]
    if len(pairs) != 1 or len(recipe.experts) != 2:
        raise ValueError(
            "a file in DCM's layout has two experts: the recipe must have a full one, and a lora one from it, such as "
            "that of dcm_wan_1_3b_published"
        )
    [(semantic, detail)] = pairs
    adapter = recipe.experts[detail]
    assert isinstance(adapter, LoRAConfig)
    if adapter.alpha != SCALE * adapter.rank:
        raise ValueError(
            f"experts.{detail}: alpha {adapter.alpha:g} with rank {adapter.rank} scales the adapter by "
            f"{adapter.alpha / adapter.rank:g}, and the released training by {SCALE:g}, which its file does not say; "
            f"set alpha to {SCALE * adapter.rank:g}"
        )
    return semantic, detail


def _semantic_names(mixture: Mixture, semantic: str, detail: str) -> dict[tuple[str, str], str]:
    """By expert and parameter: its name in the file."""
    adapted = {
        name.removesuffix(".lora_A.weight")
        for name in mixture.experts[detail].parameters
        if name.endswith(".lora_A.weight")
    }
    names = {}
    for name in mixture.experts[semantic].parameters:
        module, _, last = name.rpartition(".")
        names[semantic, name] = f"{module}.base_layer.{last}" if module in adapted else name
    return names


def _detail_names(mixture: Mixture, recipe: Recipe, detail: str) -> dict[tuple[str, str], str]:
    config = recipe.experts[detail]
    assert isinstance(config, LoRAConfig)
    listed = [] if config.copies == "none" else config.copies
    copied = mixture.backbone.time_dependent if listed == "time_dependent" else listed
    names = {}
    for name in mixture.experts[detail].parameters:
        path = next((path for path in copied if name.startswith(f"{path}.")), None)
        if path is not None:
            names[detail, name] = f"{path}_lora{name.removeprefix(path)}"
        else:
            names[detail, name] = name.replace(".lora_A.", ".lora_A.lora1.").replace(".lora_B.", ".lora_B.lora1.")
    return names
