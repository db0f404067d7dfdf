"""Batches and draws: pure functions of their address, however the work is shared out."""

from collections import Counter
from itertools import chain

import pytest
import torch

from moedistill.data.base import Dataset, Sample
from moedistill.data.loading import BucketSampler, load_batches
from moedistill.model import conditioning
from moedistill.runtime.randomness import Draws, generator, torch_seed

BIG, MIDDLE, SMALL = (2, 4, 3, 3), (2, 4, 2, 2), (2, 1, 1, 1)
SHAPES = [BIG, SMALL, MIDDLE, BIG, SMALL, MIDDLE, BIG, MIDDLE, BIG, MIDDLE, SMALL, BIG, MIDDLE, MIDDLE, MIDDLE, MIDDLE]
"""5 big samples, 8 middle ones, 3 small ones."""


class Numbered(Dataset):
    """Sample i is filled with i."""

    def __init__(self, shapes=SHAPES):
        self.shapes = shapes

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, index):
        return Sample(torch.full(self.shapes[index], float(index)), {"index": torch.tensor(index)})

    def shape(self, index):
        return self.shapes[index]


def sampler(**changes):
    return BucketSampler(SHAPES, **{"batch_size": 4, "seed": 0, "stage": "s", **changes})


def batches(**changes):
    options = {"batch_size": 8, "accumulation": 1, "seed": 0, "stage": "s", "steps": range(3), **changes}
    return list(load_batches(Numbered([MIDDLE] * 20), **options))


# -- BucketSampler ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_covers_every_sample_in_batches_of_one_shape(epoch):
    sampled = sampler()
    per_epoch = [sampled.batch(5 * epoch + k) for k in range(5)]  # 5 in 2 batches of 4, 8 in 2, 3 in 1
    assert all(len(batch) == 4 and len({SHAPES[i] for i in batch}) == 1 for batch in per_epoch)
    counts = Counter(chain(*per_epoch))
    assert set(counts) == set(range(16))
    repeated = Counter(SHAPES[i] for i, count in counts.items() for _ in range(count - 1))
    assert repeated == {BIG: 3, SMALL: 1}  # the fill: 5 → 8 and 3 → 4


def test_a_bucket_smaller_than_half_a_batch_is_repeated():
    assert Counter(BucketSampler([BIG, BIG], batch_size=5, seed=0, stage="s").batch(7)).most_common()[0][1] == 3


def test_a_batch_is_a_function_of_seed_stage_and_step_alone():
    one = sampler()
    walked = [one.batch(step) for step in range(15)]
    assert [sampler().batch(step) for step in reversed(range(15))] == walked[::-1]
    for other in (sampler(seed=1), sampler(stage="t")):
        assert [other.batch(step) for step in range(15)] != walked
    epochs = [walked[start : start + 5] for start in (0, 5, 10)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert len({tuple(SHAPES[batch[0]] for batch in epoch) for epoch in epochs}) > 1  # buckets are shuffled too


# -- load_batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 2)])
def test_ranks_and_micro_batches_partition_the_global_batch(ranks, accumulation):
    shares = [batches(rank=rank, world_size=ranks, accumulation=accumulation) for rank in range(ranks)]
    for step, batch in enumerate(batches()):
        micro = [share[step * accumulation + k] for k in range(accumulation) for share in shares]
        assert [p for m in micro for p in m.positions] == batch.positions == list(range(8))
        assert torch.equal(torch.cat([m.latents for m in micro]), batch.latents)
        assert torch.equal(torch.cat([m.conditioning["index"] for m in micro]), batch.conditioning["index"])
        boundaries = [m.boundary for m in micro[::ranks]]
        assert boundaries == [False] * (accumulation - 1) + [True]


def test_a_batch_holds_the_sampler_s_samples():
    sampled = BucketSampler([MIDDLE] * 20, batch_size=8, seed=0, stage="s")
    for step, batch in enumerate(batches()):
        assert batch.conditioning["index"].tolist() == sampled.batch(step)
        assert batch.latents.shape == (8, *MIDDLE)
        assert batch.latents[:, 0, 0, 0, 0].tolist() == sampled.batch(step)


@pytest.mark.parametrize("changes", [{"steps": range(1, 3)}, {"num_workers": 2}], ids=["resumed", "workers"])
def test_batches_do_not_depend_on_the_start_or_on_workers(changes):
    expected = batches()[-2:]
    for got, want in zip(batches(**changes)[-2:], expected, strict=True):
        assert torch.equal(got.latents, want.latents)
        assert (got.positions, got.boundary) == (want.positions, want.boundary)


@pytest.mark.parametrize(("ranks", "accumulation", "multiple"), [(3, 1, 3), (1, 5, 5), (2, 8, 16)])
def test_a_batch_that_cannot_be_shared_evenly_is_refused_at_once(ranks, accumulation, multiple):
    with pytest.raises(
        ValueError, match=rf"batch_size 8 .*{ranks} processes × {accumulation} .*multiple of {multiple}"
    ):
        load_batches(
            Numbered(), batch_size=8, accumulation=accumulation, world_size=ranks, seed=0, stage="s", steps=range(1)
        )


def test_a_plain_dataset_has_one_shape_and_no_posterior_mean():
    class Plain(Numbered):
        shape = Dataset.shape

    assert Plain([MIDDLE] * 3).shape(2) == MIDDLE
    with pytest.raises(ValueError, match="Plain offers no posterior mean; use target: sample"):
        Plain().posterior_mean(torch.zeros(1), torch.zeros(1), {})


# -- draws ------------------------------------------------------------------------------------------------------------


def draw_all(draws):
    return [draws.normal("noise", (2, 3)), draws.uniform("u"), draws.integers("i", 3, 9)]


@pytest.mark.parametrize("shares", [[[0, 1, 2], [3, 4, 5]], [[5, 0], [4, 2], [1], [3]]])
def test_draws_do_not_depend_on_how_the_batch_is_shared_out(shares):
    whole = draw_all(Draws(0, "s", 7, range(6)))
    for samples in shares:
        for part, full in zip(draw_all(Draws(0, "s", 7, samples)), whole, strict=True):
            assert torch.equal(part, full[samples])


@pytest.mark.parametrize("address", [(1, "s", 7, [0]), (0, "t", 7, [0]), (0, "s", 8, [0]), (0, "s", 7, [1])])
def test_another_address_draws_other_numbers(address):
    here, there = Draws(0, "s", 7, [0]), Draws(*address)
    assert not torch.equal(here.normal("noise", (4,)), there.normal("noise", (4,)))
    assert here.uniform("u") != there.uniform("u")
    assert here.uniform("u") != here.uniform("v")
    assert torch.equal(here.uniform("u"), Draws(0, "s", 7, [0]).uniform("u"))  # nothing was consumed
    assert torch_seed(*address[:3]) == torch_seed(*address[:3]) != torch_seed(*address[:3], "x")


def test_draws_have_the_right_law():
    draws = Draws(0, "s", 0, range(4000))
    normal, uniform = draws.normal("noise", (16,)), draws.uniform("u")
    assert normal.dtype == torch.float32
    assert abs(normal.mean()) < 0.02
    assert abs(normal.std() - 1) < 0.01
    assert abs(uniform.mean() - 0.5) < 0.02
    assert 0 <= uniform.min() <= uniform.max() < 1
    assert draws.integers("i", 3, 6).bincount().tolist()[3:] == pytest.approx([1333] * 3, abs=120)
    low = torch.arange(4000)
    assert torch.equal(draws.integers("i", low, low + 1), low)  # limits of its own for each sample


def test_the_generator_is_the_same_everywhere():
    assert generator(0, "stage", 3, 1, "noise").random() == 0.9567145906369579


# -- conditioning -----------------------------------------------------------------------------------------------------


def test_conditioning_is_a_mapping_of_batched_tensors():
    text, digit = torch.arange(12.0).view(3, 2, 2), torch.arange(3)
    cond = conditioning.stack([{"text": text[i], "digit": digit[i]} for i in range(3)])
    assert torch.equal(cond["text"], text)
    null = {name: torch.full_like(value, -1) for name, value in cond.items()}
    mixed = conditioning.where(torch.tensor([True, False, True]), cond, null)
    assert mixed["digit"].tolist() == [0, -1, 2]
    assert torch.equal(mixed["text"], torch.stack([text[0], -torch.ones(2, 2), text[2]]))
    assert conditioning.concat(cond, null)["digit"].tolist() == [0, 1, 2, -1, -1, -1]
    assert conditioning.select(cond, slice(1, 3))["digit"].tolist() == [1, 2]
    assert conditioning.to(cond, "meta")["text"].device.type == "meta"
