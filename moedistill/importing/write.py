"""Weights that were distilled elsewhere, checked, written as an export of ours."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moedistill.errors import suggest, user_errors
from moedistill.exporters.files import write_one_file
from moedistill.importing.dcm import read_dcm
from moedistill.importing.files import WeightFiles
from moedistill.importing.loras import read_loras
from moedistill.importing.networks import read_comfyui, read_diffusers
from moedistill.model.experts import Expert
from moedistill.model.mixture import Mixture
from moedistill.recipe.keys import Recipe
from moedistill.runs.planning.fake_step import empty_mixture
from moedistill.runtime.integrity import sum_of
from moedistill.runtime.reading import reason
from moedistill.runtime.weight_files import whole_folder
from moedistill.stages.export import INDEX, ExpertFile, make_index, where_from

Read = tuple[dict[str, Mapping[str, Tensor]], list[WeightFiles]]

IMPORTERS: Mapping[str, Callable[[Path, Recipe, Mixture], Read]] = {
    "dcm": read_dcm,
    "loras": read_loras,
    "diffusers": read_diffusers,
    "comfyui": read_comfyui,
}
"""By kind: what gives, of a source, a recipe and its mixture without weights, tensors by expert and parameter, made
when they are asked for, and the files that they are in. Names and shapes are checked before a number is read; what does
not fit is a ValueError.
"""


def import_weights(kind: str, source: Path, dest: Path, recipe: Recipe) -> list[str]:
    """Writes the new folder `dest`, an export of the recipe with the weights in `source`.

    Nothing of `source` is ever run: a pickle is refused.

    Returns:
        The experts whose weights it has.

    Raises:
        UserError: `kind` is unknown, or the files do not fit the recipe; `dest` is then not there.
    """
    with user_errors("convert"):
        if kind not in IMPORTERS:
            raise ValueError(f"there is no kind {kind!r} of weights for a recipe; {suggest(kind, IMPORTERS)}")
        # What they start with in a run is now in the export itself.
        own = {name: expert.replace(init=None) for name, expert in recipe.experts.items()}
        recipe = replace(recipe, experts=own)
        mixture = empty_mixture(recipe, recipe.backbone.skeleton())
        try:
            experts, files = IMPORTERS[kind](source, recipe, mixture)
        except OSError as error:
            raise ValueError(f"cannot read {error.filename or source}: {reason(error)}") from error
        with whole_folder(dest) as folder:
            entries: dict[str, Any] = {}
            for name, config in recipe.resolved()["experts"].items():
                entries[name] = {"file": None, **config}
                if name in experts:
                    file = ExpertFile(name, config, adapter=not recipe.experts[name].copies_base)
                    _write_expert(folder / file.name, file, mixture.experts[name], experts[name])
                    entries[name] |= file.entry(sum_of(folder / file.name))
            home = source if source.is_dir() else source.parent
            sums = {file.relative_to(home).as_posix(): sum_of(file) for each in files for file in each.files}
            provenance = where_from(recipe) | {"imported": {"kind": kind, "files": sums}}
            text = make_index(recipe, mixture, entries, provenance)
            (folder / INDEX).write_text(text, encoding="utf-8")
    return list(experts)


def _write_expert(path: Path, file: ExpertFile, expert: Expert, weights: Mapping[str, Tensor]) -> None:
    """Writes an expert's file, float32.

    Raises:
        ValueError: a tensor is not finite.
    """
    shapes = {file.key(name): tuple(each.shape) for name, each in expert.parameters.items()}

    def made(name: str) -> Tensor:
        tensor = weights[name].float()
        if not tensor.isfinite().all():
            raise ValueError(f"expert {expert.name!r}: {name} is not finite in the source; get it again")
        return tensor

    tensors = map(made, expert.parameters)
    write_one_file(path, shapes, tensors, dtype=torch.float32, metadata=file.header)
