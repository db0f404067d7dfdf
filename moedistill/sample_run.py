"""Samples from a finished run, one of its checkpoints, or an export."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moedistill import conditioning
from moedistill.checkpoint import find_checkpoint, load_tree
from moedistill.devices import cpu_threads, find_device, make_folder
from moedistill.errors import UserError, user_errors
from moedistill.media import contact_sheet, side_by_side
from moedistill.mixture import Mixture
from moedistill.plugins import Plugins
from moedistill.randomness import Draws
from moedistill.recipe import Recipe, load_recipe
from moedistill.stages.export import INDEX, read_export
from moedistill.steps import SampleConfig


@dataclass
class SampleResult:
    """Where the samples lie, and the samples: videos `[N, C, T, H, W]` in [0, 1]."""

    output: Path
    videos: Tensor


def load_mixture(source: str | Path, *, device: str = "cpu", plugins: Plugins | None = None) -> tuple[Recipe, Mixture]:
    """The recipe and the trained mixture of a run's folder, a checkpoint, or an export's folder.

    Raises:
        UserError: there is nothing of the kind, or it is not complete.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give a run's, such as runs/dcm_digits/20260101-120000")
    if (folder / INDEX).is_file():
        index, experts = read_export(folder)
        recipe, averages = load_recipe(index["recipe"], plugins=plugins), {}
    else:
        checkpoint = find_checkpoint(folder)
        recipe = load_recipe(load_tree(checkpoint, "state")["recipe"], plugins=plugins)
        experts, averages = load_tree(checkpoint, "experts"), load_tree(checkpoint, "ema")
    mixture = Mixture.build(recipe, find_device(device))
    mixture.load(experts, averages, str(folder))
    return recipe, mixture


def sample_run(
    source: str | Path,
    *,
    prompts: Sequence[str] = ("",),
    num: int = 1,
    seed: int = 0,
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    weights: Literal["trained", "ema"] = "trained",
    output: str | Path | None = None,
    device: str = "cpu",
    plugins: Plugins | None = None,
) -> SampleResult:
    """Samples `num` videos of each prompt, and writes them as `samples.webp`, `samples.png` and `samples.json`.

    Args:
        source: a run's folder, a checkpoint, or an export's folder.
        prompts: as the backbone understands them; an empty one is the null condition.
        seed: of the noise; a prompt's noise depends on its place in the list.
        steps, sigmas: instead of the recipe's own sampling steps, as in its `sample`.
        weights: the experts' `trained` weights or their `ema`.
        output: a folder; `samples` inside `source` if not given.
    """
    if steps is not None and sigmas is not None:
        raise UserError("give --steps or --sigmas, not both")
    recipe, mixture = load_mixture(source, device=device, plugins=plugins)
    if weights == "ema" and not mixture.ema:
        raise UserError(f"{source} holds no averaged weights; sample the trained ones")
    backbone = mixture.student.backbone
    asked = [prompt for prompt in prompts for _ in range(num)]
    with user_errors("--prompt"):
        cond = conditioning.to(backbone.encode(asked), device)
    path = _sigmas(recipe, mixture, steps, sigmas)
    noise = Draws(seed, "sample", 0, range(len(asked)), device).normal("noise", backbone.latent_shape())
    with cpu_threads(recipe.training.num_threads):
        latents = mixture.generate(noise, cond, path, guidance=recipe.backbone.guidance, weights=weights)
    videos = backbone.decode(latents).cpu()

    folder = Path(output) if output is not None else Path(source) / "samples"
    make_folder(folder)
    columns = [prompt or "(no prompt)" for prompt in asked]
    contact_sheet(folder / "samples.png", {"sample": videos}, columns)
    side_by_side(folder / "samples.webp", {"sample": videos})
    sidecar: dict[str, Any] = {
        "source": str(source),
        "prompts": asked,
        "seed": seed,
        "sigmas": path.tolist(),
        "experts": [mixture.router.expert_at(sigma) for sigma in path[:-1]] if mixture.router else None,
        "weights": weights,
        "recipe": recipe.name,
        "torch": torch.__version__,
    }
    (folder / "samples.json").write_text(json.dumps(sidecar, indent=1))
    return SampleResult(folder, videos)


def _sigmas(recipe: Recipe, mixture: Mixture, steps: int | None, sigmas: Sequence[float] | None) -> Tensor:
    name, config = "sample", recipe.sample
    if steps is not None:
        name, config = "--steps", SampleConfig(steps=steps)
    elif sigmas is not None:
        name, config = "--sigmas", SampleConfig(sigmas=list(sigmas))
    if config is None:
        raise UserError("the recipe has no sample list; give --steps or --sigmas")
    with user_errors(name):
        return config.resolve(mixture.trajectory)
