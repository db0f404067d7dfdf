"""Which share of the data's variance is undecided at a noise level, by spatial frequency: what an expert has to decide.

Samples x0 are noised anew, and an estimate of them is formed: of variance V the share

    E|x0 - E[x0 | x_σ]|² / V,    x_σ = (1 - σ)·x0 + σ·noise

is not settled by x_σ. It is taken band by band of the orthonormal 2-D Fourier transform of every latent frame, whose
powers add up to the whole (Parseval). With the teacher's own estimate for the posterior mean, its error counts too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moedistill.analysis.teacher import pairs_of_steps, teacher_velocity
from moedistill.data.loading import collate
from moedistill.flow.process import add_noise, jump
from moedistill.model import conditioning
from moedistill.model.conditioning import Conditioning
from moedistill.runtime.randomness import Draws
from moedistill.stages.run import Run

MOST_BANDS = 4
MOST_LEVELS = 16

Estimate = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""Of the clean sample: x `[B, C, T, H, W]`, sigma `[B]` and conditioning to `[B, C, T, H, W]`."""


@dataclass
class Undecided:
    """Shares of variance that are undecided, by band and level.

    Attributes:
        points: of the trajectory, ascending.
        bands: by their wavelengths in latent cells, the finest first: "2–4"; the last holds all that is longer.
        power: which share of all variance is each band's.
        teacher: `[bands][points]`, of the teacher's samples by its own, guided estimates.
        exact: the same of the dataset's samples by its posterior mean; None where it offers none.
    """

    points: list[int]
    bands: list[str]
    power: list[float]
    teacher: list[list[float]]
    exact: list[list[float]] | None = None


def band_masks(height: int, width: int) -> dict[str, Tensor]:
    """Octaves of spatial frequency, `[H, W]` bool over a 2-D transform, which has each place in one of them.

    A place belongs where the larger of its two frequencies does; bands are named as `Undecided.bands`.
    """
    rows, columns = torch.fft.fftfreq(height).abs(), torch.fft.fftfreq(width).abs()
    finest = torch.maximum(rows[:, None], columns[None, :])
    masks: dict[str, Tensor] = {}
    rest, wavelength = torch.ones_like(finest, dtype=torch.bool), 2
    while len(masks) < MOST_BANDS - 1 and 2 * wavelength <= max(height, width):
        masks[f"{wavelength}–{2 * wavelength}"] = rest & (finest > 1 / (2 * wavelength))
        rest, wavelength = rest & (finest <= 1 / (2 * wavelength)), 2 * wavelength
    return {**masks, f"{wavelength} and longer" if masks else "all": rest}


def band_powers(latents: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Mean square of latents `[B, C, T, H, W]`, of which each band has its part: float64 `[bands]` on the CPU."""
    height, width = latents.shape[-2:]
    power = torch.zeros(height, width, dtype=torch.float64)
    for video in latents:  # one by one: in complex128 a batch of large ones would not fit
        power += torch.fft.fft2(video.double().cpu(), norm="ortho").abs().square().flatten(0, 1).mean(0) / len(latents)
    return torch.stack([power[mask].sum() for mask in masks]) / power.numel()


def undecided_shares(
    x0: Tensor, noise: Tensor, cond: Conditioning, estimate: Estimate, sigmas: Sequence[float], batch_size: int
) -> tuple[Tensor, Tensor]:
    """What is undecided of `x0` `[S, C, T, H, W]`, float64 `[bands, levels]`, and each band's share of the variance.

    A band in which samples do not differ has nothing to decide.
    """
    masks = list(band_masks(*x0.shape[-2:]).values())
    spread = x0 - x0.mean(0)
    variance = band_powers(spread, masks) * (len(x0) / (len(x0) - 1))
    missed = torch.zeros(len(masks), len(sigmas), dtype=torch.float64)
    for level, sigma in enumerate(sigmas):
        for start in range(0, len(x0), batch_size):
            rows = slice(start, start + batch_size)
            clean, at = x0[rows], torch.full((len(x0[rows]),), sigma, device=x0.device)
            guess = estimate(add_noise(clean, noise[rows], at), at, conditioning.select(cond, rows))
            missed[:, level] += len(clean) / len(x0) * band_powers(clean - guess, masks)
    differs = variance > 1e-10 * band_powers(x0, masks).sum()  # more than by rounding
    shares = torch.where(differs[:, None], missed / variance[:, None], 0.0)
    return shares, variance / variance.sum()


@torch.no_grad()
def measure_undecided(
    run: Run, ends: Tensor, cond: Conditioning, batch_size: int, boundaries: Sequence[int]
) -> Undecided:
    """Of the teacher's samples `ends` `[S, C, T, H, W]`, and exactly where the dataset offers its posterior mean.

    Args:
        run: of the teacher alone.
        cond: of the samples.
        boundaries: points that are among the levels, besides points that are spread evenly.
    """
    trajectory, device = run.mixture.trajectory, run.accelerator.device
    top = trajectory.num_steps
    spread = {max(1, round(k * top / MOST_LEVELS)) for k in range(1, MOST_LEVELS + 1)}
    points = sorted(spread | set(boundaries) - {0})
    sigmas = [trajectory.sigma(point) for point in points]
    draws = Draws(run.recipe.seed, "undecided", 0, range(len(ends)), device)
    noise = draws.normal("noise", ends.shape[1:])

    until = pairs_of_steps(run)

    def by_teacher(x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return jump(x, teacher_velocity(run, x, sigma, cond=cond, until=until), sigma, 0.0)

    shares, power = undecided_shares(ends.to(device), noise, cond, by_teacher, sigmas, batch_size)
    found = Undecided(points, list(band_masks(*ends.shape[-2:])), power.tolist(), shares.tolist())
    dataset = run.dataset
    if dataset is not None and run.recipe.data is not None and "posterior_mean" in run.recipe.data.provides:
        chosen = [number * len(dataset) // len(ends) for number in range(len(ends))]
        prepared = [run.mixture.backbone.prepare(*collate([dataset[index]])) for index in chosen]
        latents = torch.cat([one for one, _ in prepared]).to(device)
        asked = conditioning.to(conditioning.stack([{k: v[0] for k, v in one.items()} for _, one in prepared]), device)
        shares, _ = undecided_shares(latents, noise, asked, dataset.posterior_mean, sigmas, batch_size)
        found.exact = shares.tolist()
    return found
