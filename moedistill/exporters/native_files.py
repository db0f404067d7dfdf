"""Weights under the names of the model's makers: a LoRA file, or a file of whole weights, for each expert."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moedistill.exporters.files import write_one_file
from moedistill.exporters.lora_files import NATIVE, LoraNames, linear_changes, not_in_a_lora, write_lora
from moedistill.exporters.low_rank import cut_to_rank
from moedistill.exporters.options import ExportOptions, Form, WrittenFile, file_stem
from moedistill.exporters.source import ExpertSource, Source
from moedistill.model.native_names import NativeTensor


def form_of(expert: ExpertSource, options: ExportOptions) -> Form:
    """How an expert leaves: as `ExportOptions.form_of`, and merged where no LoRA carries it and none was asked for."""
    if expert.kind == "adapter" and options.form is None and options.svd is None and not_in_a_lora(expert):
        return "merged"
    return options.form_of(expert)


def file_of(source: Source, expert: str) -> str:
    """The file with an expert's weights, or with its change."""
    return f"{file_stem(source, expert)}.safetensors"


def base_of(source: Source, expert: ExpertSource, options: ExportOptions) -> str | None:
    """The file of whole weights that an expert's LoRA stands on; None where that is the pretrained network."""
    if expert.over is None or options.svd is not None:
        return None
    sampled = expert.over in source.experts
    return file_of(source, expert.over) if sampled else f"{source.recipe.name}_{expert.over}.safetensors"


class Loaded(NamedTuple):
    """Which files an expert is loaded from: whole weights, None for the pretrained ones, and a LoRA on them, if any."""

    weights: str | None
    lora: str | None


def loaded(source: Source, options: ExportOptions) -> dict[str, Loaded]:
    """Which files each expert is loaded from, from high noise to low."""
    found = {}
    for name, expert in source.experts.items():
        if expert.kind == "teacher":
            found[name] = Loaded(None, None)
        elif form_of(expert, options) == "merged":
            found[name] = Loaded(file_of(source, name), None)
        else:
            found[name] = Loaded(base_of(source, expert, options), file_of(source, name))
    return found


def write_native(source: Source, folder: Path, options: ExportOptions, names: LoraNames = NATIVE) -> list[WrittenFile]:
    """Writes every expert that sampling uses, but for teachers as they are, and what the LoRA files stand on.

    Raises:
        ValueError: an expert cannot leave in the form that was asked for.
        WriteError: the disk refuses.
    """
    written: list[WrittenFile] = []
    table = source.recipe.backbone.native_names()
    assert table is not None
    for name, expert in source.experts.items():
        if expert.kind == "teacher":
            continue
        tensors, file, form = table.tensors(expert.shapes), file_of(source, name), form_of(expert, options)
        if form == "merged":
            error = _write_whole(folder / file, expert, tensors, options.dtype, {"moedistill_expert": name})
            written.append(WrittenFile(path=file, expert=name, form=form, error=error))
        else:
            base = base_of(source, expert, options)
            if base is not None and expert.over not in source.experts:
                error = _write_whole(folder / base, expert, tensors, options.dtype, {}, under=True)
                written.append(WrittenFile(path=base, expert=expert.over, form="merged", error=error))
            written.append(_write_lora(source, folder / file, expert, tensors, options, names, base))
        expert.release()
    return written


def _write_whole(
    file: Path,
    expert: ExpertSource,
    tensors: Sequence[NativeTensor],
    dtype: torch.dtype,
    metadata: dict[str, str],
    *,
    under: bool = False,
) -> float:
    """The plain network that an expert equals, or that it is a change of; returns what the dtype costs."""
    take = expert.original if under else expert.tensor
    return write_one_file(
        file,
        {tensor.name: tensor.shape for tensor in tensors},
        (tensor.join([take(part) for part in tensor.parts]) for tensor in tensors),
        dtype=dtype,
        metadata=metadata,
    )


def _write_lora(
    source: Source,
    file: Path,
    expert: ExpertSource,
    tensors: Sequence[NativeTensor],
    options: ExportOptions,
    names: LoraNames,
    base: str | None,
) -> WrittenFile:
    config: Any = source.recipe.backbone
    if options.svd is not None and (expert.kind == "full" or expert.over is not None):
        backbone = config.backbone_class
        change = cut_to_rank(expert, options.svd, backbone.lora_targets, backbone.time_dependent)
        changes, cut = linear_changes(change, tensors), change.errors
    else:
        changes, cut = linear_changes(expert, tensors), {}
    says = {
        "moedistill_expert": expert.name,
        "moedistill_over": base or "pretrained",
        "base_model": str(config.pretrained),
    }
    error = write_lora(file, changes, names, dtype=options.dtype, metadata=says)
    return WrittenFile(path=file.name, expert=expert.name, form="lora", error=error, cut=dict(cut))
