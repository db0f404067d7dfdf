"""Writes a few videos of prompts: what the run made, to look at."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Gt, Le
from torch import Tensor

from moedistill.components.fields import NonEmptyStr, NonNegativeInt, WhichWeights
from moedistill.data.prompts import read_prompts
from moedistill.media import contact_sheet, side_by_side, write_mp4
from moedistill.model.backbone import TEACHER
from moedistill.model.generate import OwnPipeline, generate
from moedistill.recipe.keys import StageConfig
from moedistill.recipe.sampling import sampling_sigmas, trained_before, untrained_notes
from moedistill.runtime.checkpoint import write_text
from moedistill.runtime.writing import new_file
from moedistill.stages.base import Stage
from moedistill.stages.share import Share

SHOWN = 8
"""How many videos the pictures show."""

if TYPE_CHECKING:
    from collections.abc import Iterable

    from moedistill.model.backbone import VideoSize
    from moedistill.model.mixture import Mixture
    from moedistill.recipe.keys import Finding, Recipe
    from moedistill.stages.run import Run


@dataclass(kw_only=True)
class SampleStageConfig(StageConfig):
    """Samples prompts with the experts along the recipe's `sample` list; through the model's pipeline, if it has one.

    Args:
        prompts: what to ask for, or a file of prompts.
        num: videos of each prompt.
        seed: of the noise.
        weights: the experts' `trained` weights or their `ema`.
    """

    prompts: list[str] | NonEmptyStr
    num: Annotated[int, Gt(0), Le(100_000)] = 1
    seed: NonNegativeInt = 0
    weights: WhichWeights = "trained"

    def build(self) -> "SampleStage":
        return SampleStage(self)

    def look_ahead(self, recipe: "Recipe") -> None:
        if isinstance(self.prompts, str):
            read_prompts(self.prompts)

    def check(self, recipe: "Recipe") -> "Iterable[Finding]":
        if recipe.sample is None:
            yield "", "there is no sample list to sample with; add sample: {steps: 4}"
        elif recipe.backbone is not None and recipe.backbone.has_pipeline and recipe.sample.eta > 0:
            message = "draws fresh noise between the steps, which the model's own pipeline cannot"
            yield "", f"sample.eta {recipe.sample.eta:g} {message}; make it 0, and give eta to candidates of evaluate"
        if not self.prompts:
            yield "prompts", "is empty; give at least one"
        if self.weights == "ema" and not any(getattr(stage, "ema_decay", None) is not None for stage in recipe.stages):
            yield "weights", "ema: no stage keeps an average; give one ema_decay"


class SampleStage(Stage):
    """See `SampleStageConfig`."""

    def __init__(self, config: SampleStageConfig) -> None:
        self.config = config

    def prompts(self, run: "Run") -> list[str]:
        """What is asked for; of a miniature the first alone."""
        prompts = read_prompts(self.config.prompts) if isinstance(self.config.prompts, str) else self.config.prompts
        return prompts[:1] if run.smoke else prompts

    def look_ahead(self, run: "Run") -> None:
        run.mixture.backbone.encode(self.prompts(run))
        run.mixture.backbone.look_ahead(pipeline=isinstance(run.mixture.backbone, OwnPipeline))

    def execute(self, run: "Run") -> None:
        config, recipe = self.config, run.recipe
        assert recipe.sample is not None
        folder = run.folder(config.name) if run.main else run.output / config.name
        run.accelerator.wait_for_everyone()  # until it is there
        asked = [prompt for prompt in self.prompts(run) for _ in range(config.num)]
        sigmas = sampling_sigmas(recipe)
        for note in untrained_notes(recipe, trained_before(recipe, config.name), sigmas):
            run.say(f"  note: {note}")
        write_samples(
            folder, recipe, run.mixture, asked, sigmas,
            seed=config.seed, weights=config.weights, eta=recipe.sample.eta, made_from=str(run.output),
            share=Share.of(run.accelerator),
        )  # fmt: skip
        run.metrics[config.name] = {"folder": str(folder)}
        run.say(f"  {folder}")


def write_samples(
    folder: Path,
    recipe: "Recipe",
    mixture: "Mixture",
    prompts: Sequence[str],
    sigmas: Tensor,
    *,
    seed: int,
    video: "VideoSize | None" = None,
    weights: WhichWeights = "trained",
    eta: float = 0.0,
    fps: float | None = None,
    made_from: str,
    keep: bool = False,
    share: Share | None = None,
) -> list[Tensor]:
    """Samples each prompt, and writes one mp4 for each, the first few in `samples.png` and `samples.webp`, and
    `samples.json`, which says how they were made. Gives the videos `[C, T, H, W]` in [0, 1] if they are to be kept.

    Every file is whole as soon as it is there; nothing else in the folder is touched.

    Args:
        share: of several processes, what this one does: so many of the videos, and the rest if it is the first.
    """
    backbone, share = mixture.backbone, share or Share()
    fps = fps or backbone.fps
    files = [f"{k:03d}.mp4" for k in range(len(prompts))]
    own, kept = share.items(len(prompts)), dict[int, Tensor]()
    generated = generate(
        mixture, [prompts[k] for k in own], sigmas,
        seed=seed, video=video, weights=weights, eta=eta, places=own,
    )  # fmt: skip
    for k, one in zip(own, generated, strict=True):
        if k % share.processes == share.process:
            with new_file(folder / files[k]) as new:
                write_mp4(new, one, fps=fps)
        if keep or k < SHOWN:
            kept[k] = one
    videos = list(share.together(kept).values())
    if share.process > 0:
        return []
    shown = torch.stack(videos[:SHOWN])
    with new_file(folder / "samples.png") as new:
        contact_sheet(new, {"sample": shown}, [prompt or "(no prompt)" for prompt in prompts[:SHOWN]])
    with new_file(folder / "samples.webp") as new:
        side_by_side(new, {"sample": shown}, fps=fps)
    sidecar: dict[str, Any] = {
        "made_from": made_from,
        "recipe": recipe.name,
        "files": files,
        "prompts": list(prompts),
        "seed": seed,
        "sigmas": sigmas.tolist(),
        "eta": eta,
        "timesteps": mixture.trajectory.timestep(sigmas[:-1]).tolist(),
        "experts": [mixture.router.expert_at(sigma) if mixture.router else TEACHER for sigma in sigmas[:-1]],
        "weights": weights,
        "fps": fps,
        "num_frames": shown.shape[2],
        "height": shown.shape[3],
        "width": shown.shape[4],
        "torch": torch.__version__,
    }
    write_text(folder / "samples.json", json.dumps(sidecar, indent=1))
    return videos if keep else []
