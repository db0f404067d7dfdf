"""Which samples make which batch: a pure function of (seed, stage, step), bucketed by latent shape."""

import signal
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from moedistill.data.base import Dataset, Sample
from moedistill.errors import UserError
from moedistill.model import conditioning
from moedistill.runtime.randomness import generator


@dataclass
class Batch:
    """One process's share of a micro-batch.

    Attributes:
        latents: `[B, C, T, H, W]`.
        conditioning: tensors by name, batch first.
        positions: where these samples stand in the global batch of the optimiser step; addresses their randomness.
        boundary: whether this is the last micro-batch of its optimiser step.
    """

    latents: Tensor
    conditioning: dict[str, Tensor]
    positions: list[int]
    boundary: bool


class BucketSampler:
    """Global batches of dataset indices; all samples of a batch have one latent shape.

    Each epoch shuffles every bucket, cuts it into batches (the last one is filled up from the bucket's start, so every
    sample is seen) and shuffles the batches. All ranks compute the same.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], *, batch_size: int, seed: int, stage: str) -> None:
        self._batch_size = batch_size
        self._address = (seed, stage, "order")
        buckets: dict[tuple[int, ...], list[int]] = {}
        for index, shape in enumerate(shapes):
            buckets.setdefault(tuple(shape), []).append(index)
        self._buckets = [buckets[shape] for shape in sorted(buckets)]
        self._per_epoch = sum(-(-len(bucket) // batch_size) for bucket in self._buckets)
        self._epoch = -1
        self._batches: list[list[int]] = []

    def batch(self, step: int) -> list[int]:
        """The dataset indices of optimiser step `step`, in order of their position in the global batch."""
        epoch, index = divmod(step, self._per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffle(epoch)
        return self._batches[index]

    def _shuffle(self, epoch: int) -> list[list[int]]:
        rng = generator(*self._address, epoch)
        batches = []
        for bucket in self._buckets:
            order = [bucket[i] for i in rng.permutation(len(bucket))]
            for start in range(0, len(order), self._batch_size):
                batch = order[start : start + self._batch_size]
                while len(batch) < self._batch_size:
                    batch += order[: self._batch_size - len(batch)]
                batches.append(batch)
        return [batches[i] for i in rng.permutation(len(batches))]


def sample_problem(sample: object, shape: Sequence[int] | None = None) -> str:
    """What keeps `sample` from being used, to follow "sample 3"; nothing where it is a sample.

    Args:
        shape: of its latents, as the dataset's `shape` says.
    """
    if not isinstance(sample, Sample):
        return f"is a {type(sample).__name__}, not a Sample of latents and conditioning"
    latents = sample.latents
    if not isinstance(latents, Tensor):
        return f"has latents that are a {type(latents).__name__}; they must be a tensor [C, T, H, W]"
    if latents.ndim != 4:
        return f"has latents {list(latents.shape)}; they must be [C, T, H, W], without a batch dimension"
    if not latents.is_floating_point():
        return f"has latents of {latents.dtype}; they must be floating-point numbers, such as torch.float32"
    if shape is not None and tuple(latents.shape) != tuple(shape):
        return (
            f"has latents {list(latents.shape)}, but the dataset's shape() says {list(shape)}; samples are batched by "
            "it, so let it give each sample's own"
        )
    return conditioning_problem(sample.conditioning)


def conditioning_problem(cond: object) -> str:
    """What keeps a sample's conditioning from being used, to follow "sample 3"; nothing where it is as it must be."""
    if not isinstance(cond, Mapping):
        return f"has conditioning that is a {type(cond).__name__}; it must be a mapping of names to tensors"
    for name, value in cond.items():
        if not isinstance(value, Tensor):
            return f"has {name} that is a {type(value).__name__}; it must be a tensor, without a batch dimension"
    return ""


def collate(samples: list[Sample]) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents `[B, C, T, H, W]` and conditioning, batch first.

    Raises:
        ValueError: the samples' conditioning differs in names or shapes.
    """
    return torch.stack([s.latents for s in samples]), conditioning.stack([s.conditioning for s in samples])


class _Batches:
    """The batch of a list of indices. What is wrong with the data is given back: a worker that raised it would make a
    page of its traceback.
    """

    def __init__(self, dataset: Dataset, shapes: Sequence[tuple[int, ...]]) -> None:
        self._dataset, self._shapes = dataset, shapes

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, dict[str, Tensor]] | ValueError:
        try:
            return collate([self._sample(i) for i in indices])
        except (ValueError, OSError) as error:
            return ValueError(str(error))

    def _sample(self, index: int) -> Sample:
        sample = self._dataset[index]
        if problem := sample_problem(sample, self._shapes[index]):
            raise ValueError(f"{type(self._dataset).__name__}: sample {index} {problem}")
        return sample


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_main_process(_worker: int) -> None:
    """A Ctrl-C or SIGTERM to all processes at once must not end a worker: the main process still wants its step."""

    def first(signum: int, _frame: object) -> None:
        signal.signal(signum, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, first)


def batch_of_step(dataset: Dataset, *, batch_size: int, seed: int, stage: str, step: int) -> list[int]:
    """The dataset indices of an optimiser step's global batch, as `load_batches` gives them."""
    shapes = [dataset.shape(i) for i in range(len(dataset))]
    return BucketSampler(shapes, batch_size=batch_size, seed=seed, stage=stage).batch(step)


def share_of_batch(batch_size: int, accumulation: int, world_size: int) -> int:
    """Samples of a global batch in one micro-batch of one process; ValueError if it cannot be shared out evenly."""
    share, rest = divmod(batch_size, accumulation * world_size)
    if rest:
        raise ValueError(
            f"training.batch_size {batch_size} cannot be shared evenly among {world_size} processes × "
            f"{accumulation} accumulation steps; make it a multiple of {accumulation * world_size}"
        )
    return share


def load_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    accumulation: int,
    seed: int,
    stage: str,
    steps: range,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> Generator[Batch, None, None]:
    """This rank's micro-batches of optimiser steps `steps`.

    The global batch of a step is cut into `accumulation` micro-batches, each of those into `world_size` shares.

    Raises:
        ValueError: the global batch cannot be shared out evenly.
        UserError: later, where samples cannot be read or batched.
    """
    share = share_of_batch(batch_size, accumulation, world_size)
    shapes = [dataset.shape(i) for i in range(len(dataset))]
    sampler = BucketSampler(shapes, batch_size=batch_size, seed=seed, stage=stage)
    schedule = [
        list(range(start := (micro * world_size + rank) * share, start + share)) for micro in range(accumulation)
    ]
    return _load(_Batches(dataset, shapes), sampler, schedule, steps, num_workers)


def _load(
    source: _Batches, sampler: BucketSampler, schedule: list[list[int]], steps: range, num_workers: int
) -> Generator[Batch, None, None]:
    """One batch for each of `steps` and each entry of `schedule`: the positions of a micro-batch's samples."""
    indices = ([sampler.batch(step)[p] for p in positions] for step in steps for positions in schedule)
    loader: DataLoader[Any] = DataLoader(
        source,  # type: ignore[arg-type]
        sampler=indices,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        worker_init_fn=_leave_signals_to_the_main_process,
    )
    shares = ((positions, micro == len(schedule) - 1) for _ in steps for micro, positions in enumerate(schedule))
    for (positions, boundary), batch in zip(shares, loader, strict=True):
        if isinstance(batch, ValueError):
            raise UserError(f"data: {batch}")
        latents, cond = batch
        yield Batch(latents, cond, positions, boundary)
