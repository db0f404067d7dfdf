"""The consistency loss on fixed draws: how far the student's jumps still are from their targets, on what never changes.

The loss of a training step mixes noise levels and draws other samples and noise at every step. Here samples, noise and
levels stay, so that a change is the student's. No loss function shapes the number, so runs with different losses can be
compared.

Held out are the draws, not the samples: these are spread evenly over the dataset, and trained on as well. So it tells
how far training has come, and nothing of other data. The noise is drawn for this alone, and nothing here touches what
training draws: a run learns the same bits with and without it.
"""

from collections.abc import Iterator
from statistics import fmean

import torch
from torch import Tensor

from moedistill import conditioning
from moedistill.context import Run
from moedistill.data.loading import collate
from moedistill.randomness import Draws, torch_seed
from moedistill.recipe import HeldOutConfig
from moedistill.stages.consistency import ConsistencyStage

ADDRESS = "training.heldout"
"""Of the draws; no stage can have a name with a dot."""


class HeldOut:
    """Measures a consistency stage under way on fixed samples, noise and starting points.

    Attributes:
        points: the starting points, spread evenly over the expert's segment.
    """

    def __init__(self, config: HeldOutConfig, run: Run, stage: ConsistencyStage) -> None:
        assert run.dataset is not None
        self.config, self._run, self._stage = config, run, stage
        starts = run.trajectory.points_in(run.segment)
        levels = min(config.levels, len(starts))
        self.points = [starts[(2 * level + 1) * len(starts) // (2 * levels)] for level in range(levels)]
        # All of one shape, that of the last one, so that they fit into batches; in order, samples may go by class.
        count = len(run.dataset)
        shape = run.dataset.shape(count - 1)
        alike = [index for index in range(count) if run.dataset.shape(index) == shape]
        samples = min(config.samples, len(alike))
        chosen = [alike[number * len(alike) // samples] for number in range(samples)]
        # One by one: where batches are of one sample, each may have a text of another length.
        prepared = [run.prepare(*collate([run.dataset[index]])) for index in chosen]
        self._latents = torch.cat([latents for latents, _ in prepared])
        self._cond = [{name: value[0] for name, value in cond.items()} for _, cond in prepared]
        draws = Draws(run.recipe.seed, ADDRESS, 0, chosen, run.device)
        self._noise = draws.normal("noise", self._latents.shape[1:])

    def due(self) -> bool:
        """Whether to measure now: before the first step, every `every` steps, and after the last."""
        return self._run.step % self.config.every == 0 or self._run.step == self._run.steps

    def measure(self) -> dict[str, float]:
        """Root mean square of prediction - target at each level, and the levels' mean as `heldout`.

        `heldout_velocity` is the same divided by the length of the jump: an error of velocity, which does not fall
        merely because a jump is short. Processes share the work, and all get the result.
        """
        run, device = self._run, self._run.device
        sums = torch.zeros(2, len(self.points), dtype=torch.float64, device=device)
        cuda = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(cuda):
            torch.manual_seed(torch_seed(run.recipe.seed, ADDRESS, "networks"))  # for what a network draws itself
            for sample, level, weight in self._shares():
                cond = conditioning.stack([self._cond[index] for index in sample.tolist()])
                start = torch.tensor(self.points)[level]
                jumps = self._stage.jumps(run, self._latents[sample], cond, start, self._noise[sample])
                square = jumps.difference.double().square().flatten(1).mean(1) * weight.to(device)
                length = (jumps.sigma - jumps.end).double()
                sums.index_add_(1, level.to(device), torch.stack([square, square / length.square()]))
        means = run.accelerator.reduce(sums, reduction="sum") / len(self._latents)
        names = [f"sigma_{run.trajectory.sigma(point):.4f}" for point in self.points]
        metrics: dict[str, float] = {}
        for kind, values in zip(("heldout", "heldout_velocity"), means.sqrt().tolist(), strict=True):
            metrics[kind] = fmean(values)
            metrics |= {f"{kind}/{name}": value for name, value in zip(names, values, strict=True)}
        return metrics

    def _shares(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This process's samples and levels, int64 `[b]`, as many as of a micro-batch, and whether they count, 1 or 0.

        All processes get equally many, because they may have to run their networks together; the last are filled up.
        """
        training, world = self._run.recipe.training, self._run.accelerator.num_processes
        pairs = torch.cartesian_prod(torch.arange(len(self._latents)), torch.arange(len(self.points)))
        share = -(-len(pairs) // world)
        places = torch.arange(share) + share * self._run.accelerator.process_index
        counts = places < len(pairs)
        sample, level = pairs[places.clamp_max(len(pairs) - 1)].unbind(1)
        size = training.batch_size // (training.gradient_accumulation_steps * world)
        yield from zip(sample.split(size), level.split(size), counts.double().split(size), strict=True)
