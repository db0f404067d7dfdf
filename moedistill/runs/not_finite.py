"""Numbers that are not finite: are the data at fault, and what to do."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moedistill.data.base import Dataset
from moedistill.data.loading import collate
from moedistill.stages.training import NotFinite, Training

MOST_NAMED = 3
"""Samples that a message names."""


def newest(checkpoint: Path | None) -> str:
    """Which checkpoint there is."""
    return f"the newest checkpoint is {checkpoint}" if checkpoint is not None else "no checkpoint is there yet"


def explain(
    training: Training,
    error: NotFinite,
    samples: Sequence[int],
    checkpoint: Path | None,
    where: str,
    lower: Callable[[str], str],
) -> str:
    """What is wrong, and how to go on.

    Args:
        samples: those that the numbers are of, as indices of the dataset.
        checkpoint: the newest one.
        where: what is saved, and the command that goes on.
        lower: the command that begins anew elsewhere with a changed key, as `--set` takes it.
    """
    said = str(error)
    assert training.dataset is not None
    faults = list(_faults(training, training.dataset, samples))
    if faults:
        more = f" and {len(faults) - MOST_NAMED} more" if len(faults) > MOST_NAMED else ""
        return f"{said}. The data are at fault: {'; '.join(faults[:MOST_NAMED])}{more}. Make them again; {where}"
    if broken := _broken_weights(training):
        return f"{said}. The model's own weights are at fault: {broken} is not finite; get them again; {where}"
    if error.step == 0:
        cause = f"the model's weights, or backbone.dtype {training.recipe.backbone.dtype},"
        return f"{said}, before any training, though the samples are finite: {cause} must be at fault"
    key, rate = f"stages.{training.config.name}.optimizer.lr", training.config.optimizer.lr
    return (
        f"{said}. The samples of that step are finite, so it comes again if the run goes on as it is; "
        f"{newest(checkpoint)}. Lower {key} {rate:g} and begin anew with: {lower(f'{key}={rate / 10:g}')}"
    )


def _broken_weights(training: Training) -> str:
    """One of the pretrained weights that is not finite; nothing where all are."""
    for network in training.mixture.backbone.networks.values():
        for name, weight in network.named_parameters():
            if not weight.isfinite().all():
                return name
    return ""


def _faults(training: Training, dataset: Dataset, samples: Sequence[int]) -> Iterator[str]:
    for index in dict.fromkeys(samples):
        sample = dataset[index]
        place = dataset.place(index)
        named = f"sample {index} ({place})" if place else f"sample {index}"
        if broken := _broken({"latents": sample.latents, **sample.conditioning}):
            yield f"{named} has {broken} with numbers that are not finite"
            continue
        latents, cond = training.prepare(*collate([sample]))
        if broken := _broken({"latents": latents, **cond}, training.mixture.autocast_dtype):
            yield f"{named} has {broken} with numbers too large for {training.recipe.backbone.dtype}"


def _broken(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    floats = {name: value for name, value in tensors.items() if value.is_floating_point()}
    return " and ".join(name for name, value in floats.items() if not value.to(dtype or value.dtype).isfinite().all())
