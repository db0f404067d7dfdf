"""The consistency loss on fixed draws: how far the student's jumps still are from their targets, on what never changes.

The loss of a training step mixes noise levels and draws other samples and noise at every step. Here samples, noise and
levels stay, so that a change is the student's. No loss function shapes the number, so runs with different losses can be
compared.

Nothing is held out: the samples are spread evenly over the dataset, and trained on as well. So it tells how far
training has come, and nothing of other data. The noise is drawn for this alone, and nothing here touches what training
draws: a run learns the same bits with and without it.
"""

from collections.abc import Callable, Iterator
from statistics import fmean

import torch
from torch import Tensor

from moedistill.data.loading import collate
from moedistill.model import conditioning
from moedistill.model.conditioning import Conditioning
from moedistill.recipe.keys import MonitorConfig
from moedistill.runtime.randomness import Draws, torch_seed
from moedistill.stages.training import Training

ADDRESS = "training.heldout"
"""Of the draws, by the name that this had first: another one would change the numbers. No stage's name has a dot."""

Miss = Callable[[Tensor, Conditioning, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of data `[B, C, T, H, W]`, conditioning, starting points `[B]` and noise: prediction - target of jumps from there,
shaped as the data, and the lengths of the jumps `[B]`.
"""


class Monitor:
    """Measures a stage under way on fixed samples, noise and starting points.

    Args:
        miss: what the stage's student makes of them.

    Attributes:
        points: the starting points, spread evenly over the expert's segment.
        samples: the samples, as indices of the dataset.
    """

    def __init__(self, config: MonitorConfig, training: Training, miss: Miss) -> None:
        assert training.dataset is not None
        self.config, self._training, self._miss = config, training, miss
        starts = training.trajectory.points_in(training.segment)
        levels = min(config.levels, len(starts))
        self.points = [starts[(2 * level + 1) * len(starts) // (2 * levels)] for level in range(levels)]
        # All of one shape, that of the last one, so that they fit into batches; in order, samples may go by class.
        count = len(training.dataset)
        shape = training.dataset.shape(count - 1)
        alike = [index for index in range(count) if training.dataset.shape(index) == shape]
        samples = min(config.samples, len(alike))
        self.samples = chosen = [alike[number * len(alike) // samples] for number in range(samples)]
        # One by one: where batches are of one sample, each may have a text of another length.
        prepared = [training.prepare(*collate([training.dataset[index]])) for index in chosen]
        self._latents = torch.cat([latents for latents, _ in prepared])
        self._cond = [{name: value[0] for name, value in cond.items()} for _, cond in prepared]
        draws = Draws(training.recipe.seed, ADDRESS, 0, chosen, training.device)
        self._noise = draws.normal("noise", self._latents.shape[1:])

    def due(self) -> bool:
        """Whether to measure now: before the first step, every `every` steps, and after the last."""
        return self._training.step % self.config.every == 0 or self._training.step == self._training.steps

    def measure(self) -> dict[str, float]:
        """Root mean square of prediction - target at each level, and the levels' mean as `monitor`.

        `monitor_velocity` is the same divided by the length of the jump: an error of velocity, which does not fall
        merely because a jump is short. Processes share the work, and all get the result.
        """
        training, device = self._training, self._training.device
        sums = torch.zeros(2, len(self.points), dtype=torch.float64, device=device)
        cuda = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(cuda):
            torch.manual_seed(torch_seed(training.recipe.seed, ADDRESS, "networks"))  # for what a network draws itself
            for sample, level, weight in self._shares():
                cond = conditioning.stack([self._cond[index] for index in sample.tolist()])
                start = torch.tensor(self.points)[level]
                difference, length = self._miss(self._latents[sample], cond, start, self._noise[sample])
                square = difference.double().square().flatten(1).mean(1) * weight.to(device)
                length = length.double()
                sums.index_add_(1, level.to(device), torch.stack([square, square / length.square()]))
        means = training.accelerator.reduce(sums, reduction="sum") / len(self._latents)
        names = [f"sigma_{training.trajectory.sigma(point):.4f}" for point in self.points]
        metrics: dict[str, float] = {}
        for kind, values in zip(("monitor", "monitor_velocity"), means.sqrt().tolist(), strict=True):
            metrics[kind] = fmean(values)
            metrics |= {f"{kind}/{name}": value for name, value in zip(names, values, strict=True)}
        return metrics

    def _shares(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This process's samples and levels, int64 `[b]`, as many as of a micro-batch, and whether they count, 1 or 0.

        All processes get equally many, because they may have to run their networks together; the last are filled up.
        """
        settings, world = self._training.recipe.training, self._training.accelerator.num_processes
        pairs = torch.cartesian_prod(torch.arange(len(self._latents)), torch.arange(len(self.points)))
        share = -(-len(pairs) // world)
        places = torch.arange(share) + share * self._training.accelerator.process_index
        counts = places < len(pairs)
        sample, level = pairs[places.clamp_max(len(pairs) - 1)].unbind(1)
        size = settings.batch_size // (settings.gradient_accumulation_steps * world)
        yield from zip(sample.split(size), level.split(size), counts.double().split(size), strict=True)
