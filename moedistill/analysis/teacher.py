"""The teacher's path from noise to data: where it bends, and where its clean estimate is decided.

Everything here follows from the differences of adjacent velocities. Points are numbered as the trajectory's, p_N = 1;
v_i is the velocity at p_i and D_k = v_{k+1} - v_k. The last step goes on to exactly 0, as sampling does. With the clean
estimate x0_i = x_i - p_i·v_i,

    x0_k - x0_{k+1} = p_k·D_k                                    what a step changes in the clean estimate
    x_i + (p_j - p_i)·v_i - x_j = sum_{j<k<i} (p_j - p_k)·D_k    what one jump from p_i to p_j misses

so no two nearly equal samples are subtracted, and of a path only the inner products of the D_k need to be kept.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from moedistill.flow.sampling import sample
from moedistill.model import conditioning
from moedistill.model.conditioning import Conditioning
from moedistill.model.sample_in_batches import followings, sample_in_batches
from moedistill.stages.evaluate import EvaluateConfig, EvaluateStage
from moedistill.stages.run import Run


def draw_inputs(run: Run, samples: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Noise `[S, C, T, H, W]` and conditioning as an evaluation with this seed draws them.

    What to ask for is that of the recipe's evaluation, if there is one; otherwise the data's conditioning.
    """
    found = [stage for stage in run.recipe.stages if isinstance(stage, EvaluateConfig)]
    prompts = found[0].prompts if found else None
    config = EvaluateConfig(
        name="analyze", samples=samples, seed=seed, prompts=prompts, candidates=[], reference="none", metrics=[]
    )
    return EvaluateStage(config).inputs(run)


@dataclass
class TeacherPath:
    """The guided teacher's N-step paths of a set of samples, summed up; all averages are over samples and elements.

    Attributes:
        levels: sigmas `[N + 1]` float64 that the sampler passes: the trajectory's points, but 0 for p_0.
        bends: `[N - 1, N - 1]` float64: entry (k - 1, l - 1) is the mean of D_k·D_l.
        sizes: rms of the sample at p_1 … p_N, `[N]`.
        speeds: rms of the velocity there, `[N]`.
        ends: the samples at sigma 0, `[S, C, T, H, W]` on the CPU.
    """

    levels: Tensor
    bends: Tensor
    sizes: Tensor
    speeds: Tensor
    ends: Tensor

    @property
    def num_steps(self) -> int:
        return len(self.levels) - 1

    @cached_property
    def relative_change(self) -> Tensor:
        """`|x_{i-1} - x_i| / |x_i|` of the step from p_i, i = 1 … N: rms of the change over rms of the sample."""
        return (self.levels[1:] - self.levels[:-1]) * self.speeds / self.sizes

    @cached_property
    def clean_change(self) -> Tensor:
        """Rms of `x0_{i-1} - x0_i`, i = 1 … N; 0 for the last step, i = 1, which has no velocity to compare with."""
        inner = self.levels[1:-1] * self.bends.diagonal().sqrt()
        return torch.cat([inner.new_zeros(1), inner])

    @cached_property
    def curvature(self) -> Tensor:
        """Rms of `(v_i - v_{i-1}) / (p_i - p_{i-1})`, i = 1 … N: |dv/dσ|; 0 for i = 1, as for `clean_change`."""
        inner = self.bends.diagonal().sqrt() / (self.levels[2:] - self.levels[1:-1])
        return torch.cat([inner.new_zeros(1), inner])

    @cached_property
    def decision_rate(self) -> Tensor:
        """How fast the clean estimate changes per e-fold of the noise-to-signal ratio, |dx0/d log(σ/(1-σ))|, i = 1 … N.

        Every scale of the data shows as a hump where the noise is about as large as it is.
        """
        middle = (self.levels[1:] + self.levels[:-1]) / 2
        return middle * (1 - middle) * self.clean_change / (self.levels[1:] - self.levels[:-1])

    @cached_property
    def remaining(self) -> Tensor:
        """Rms of the clean estimate's distance to the sample that it ends as, `|x0_i - x_end|`, i = 1 … N."""
        weights = self.levels[1:-1]
        sums = [weights[:k] @ self.bends[:k, :k] @ weights[:k] for k in range(len(weights) + 1)]
        return torch.stack(sums).clamp(min=0).sqrt()

    @cached_property
    def jump_errors(self) -> Tensor:
        """Rms of what one Euler jump from p_i misses p_j by, `[N + 1, N + 1]`, j < i; infinite elsewhere."""
        errors = torch.full((len(self.levels), len(self.levels)), torch.inf, dtype=torch.float64)
        for i in range(1, len(self.levels)):
            for j in range(i):
                weights = self.levels[j + 1 : i] - self.levels[j]
                inner = weights @ self.bends[j : i - 1, j : i - 1] @ weights
                errors[i, j] = inner.clamp(min=0).sqrt()
        return errors


@torch.no_grad()
def follow_teacher(run: Run, noise: Tensor, cond: Conditioning, batch_size: int) -> TeacherPath:
    """Samples with all N steps of the teacher, `batch_size` samples at once, and sums up its velocities."""
    levels = torch.cat([torch.zeros(1), run.mixture.trajectory.points[1:]])
    num_steps = len(levels) - 1
    bends = torch.zeros(num_steps - 1, num_steps - 1, dtype=torch.float64)
    squares = torch.zeros(2, num_steps, dtype=torch.float64)
    ends = []
    for start in range(0, len(noise), batch_size):
        rows = slice(start, start + batch_size)
        end, samples, velocities = _recorded(run, noise[rows], conditioning.select(cond, rows), levels.flip(0))
        ends.append(end.cpu())
        share = len(noise[rows]) / len(noise)
        squares += share * torch.tensor(
            [[_mean_square(x) for x in reversed(tensors)] for tensors in (samples, velocities)], dtype=torch.float64
        )
        v = torch.stack(velocities[::-1]).flatten(1)
        differences = v[1:] - v[:-1]
        bends += share * (differences.double() @ differences.double().T / v.shape[1]).cpu()
    sizes, speeds = squares.sqrt()
    return TeacherPath(levels.double(), bends, sizes, speeds, torch.cat(ends))


def joined(paths: Sequence[TeacherPath]) -> TeacherPath:
    """The paths of several sets of samples as those of one."""
    shares = [len(path.ends) / sum(len(other.ends) for other in paths) for path in paths]

    def mean(tensors: Iterable[Tensor]) -> Tensor:
        return torch.stack([share * tensor for share, tensor in zip(shares, tensors, strict=True)]).sum(dim=0)

    return TeacherPath(
        levels=paths[0].levels,
        bends=mean(path.bends for path in paths),
        sizes=mean(path.sizes.square() for path in paths).sqrt(),
        speeds=mean(path.speeds.square() for path in paths).sqrt(),
        ends=torch.cat([path.ends for path in paths]),
    )


def _recorded(run: Run, noise: Tensor, cond: Conditioning, levels: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Samples along descending `levels`: the end, and the samples and velocities where its steps started."""
    samples: list[Tensor] = []
    velocities: list[Tensor] = []
    until = pairs_of_steps(run)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        samples.append(x)
        velocities.append(teacher_velocity(run, x, sigma, cond=cond, until=until))
        return velocities[-1]

    return sample(velocity, noise, levels), samples, velocities


def pairs_of_steps(run: Run) -> dict[float, float] | None:
    """Of each point's sigma that of the point two below, where guidance oscillates; else None.

    Over both steps guidance is what it is on average. From one to the next its velocities jump to and fro by what
    guidance adds, which is no decision of the teacher's.
    """
    if run.recipe.backbone.guidance.oscillate_from is None:
        return None
    points = run.mixture.trajectory.points.tolist()
    return {sigma: points[max(0, point - 2)] for point, sigma in enumerate(points)}


def teacher_velocity(
    run: Run, x: Tensor, sigma: Tensor, *, cond: Conditioning, until: Mapping[float, float] | None = None
) -> Tensor:
    """The guided velocity of the teacher's network that serves `sigma`, the same for all samples.

    `until` says where the jump from a sigma ends, if it is not one of the trajectory's steps.
    """
    mixture, level = run.mixture, sigma[0].item()
    with mixture.using(mixture.teacher_at(level)):
        guidance = run.recipe.backbone.guidance
        return mixture.guided(x, sigma, cond, guidance, until=None if until is None else until[level])


def end_error(
    run: Run, path: TeacherPath, noise: Tensor, cond: Conditioning, batch_size: int, points: list[int]
) -> float:
    """Rms distance at sigma 0 between the teacher sampled at `points` only, and with all its steps."""
    sigmas = [*(run.mixture.trajectory.sigma(point) for point in points), 0.0]
    velocity = partial(teacher_velocity, run, until=followings(sigmas))
    ends = sample_in_batches(velocity, noise, cond, sigmas, batch_size=batch_size)
    return (ends.cpu() - path.ends).double().square().mean().sqrt().item()


def _mean_square(x: Tensor) -> float:
    return x.double().square().mean().item()
