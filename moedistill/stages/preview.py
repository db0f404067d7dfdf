"""Videos of the same prompts from the same noise while a stage trains: what the mixture makes now, to look at.

A preview shows what sampling would give if training ended here. An expert that has not had its turn is a copy of
another; the teacher, guided as the recipe says, serves its noise levels meanwhile, and what is written says so.

Nothing here touches what training computes with: noise is drawn for this alone, and weights, averages and random states
are afterwards where and what they were. A run learns the same bits with and without previews.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moedistill.data.loading import collate
from moedistill.errors import shorten
from moedistill.flow.sampling_points import SampleConfig
from moedistill.media import middle_frames, read_frames, strip, words_of, write_mp4
from moedistill.model import conditioning
from moedistill.model.backbone import TEACHER
from moedistill.recipe.keys import PreviewConfig
from moedistill.recipe.sampling import sampling_sigmas, trained_before
from moedistill.runtime.checkpoint import write_text
from moedistill.runtime.integrity import Damaged, read_json
from moedistill.runtime.randomness import Draws, torch_seed
from moedistill.runtime.writing import disk_errors, make_folder, new_file
from moedistill.stages.run import PREVIEWS, Run
from moedistill.stages.share import Share
from moedistill.stages.training import Training

STRIP = "strip.png"
"""In the stage's folder: the middle frames of all that it has made so far, side by side."""

FRAMES, ABOUT = "frames.png", "preview.json"
"""In a preview's folder: the middle frames, and how the videos were made."""

SHOWN = 10
"""Steps in a strip at most: of more, so many spread over them."""


@dataclass(frozen=True)
class _Look:
    """One way to make the videos: a folder, and a column of the strip.

    Attributes:
        sigmas: where it stops, `[n + 1]` down to 0.
        stand_ins: experts that run in place of others.
    """

    folder: str
    label: str
    sigmas: Tensor
    stand_ins: Mapping[str, str]
    eta: float = 0.0


def look_ahead(run: Run, config: PreviewConfig) -> None:
    """Tries what previews will need of the loaded model; on every process, as each will encode the prompts.

    Raises:
        ValueError: it would fail.
    """
    if (prompts := config.asked()) is not None:
        run.mixture.backbone.encode(prompts)
    run.mixture.backbone.look_ahead(pipeline=False)


class Preview:
    """Previews of a stage under way, by our own sampler; see the module. They lie in `RUN/previews/STAGE`.

    Attributes:
        captions: of the videos.
        served: experts whose noise levels the teacher serves, as they are not trained yet.
    """

    def __init__(self, config: PreviewConfig, training: Training) -> None:
        recipe, router, stage = training.recipe, training.mixture.router, training.config
        self.config, self._training = config, training
        self._folder = training.run.output / PREVIEWS / stage.name
        self._sample = config.sample(recipe)
        assert self._sample is not None, "refused by check"
        self._sigmas = sampling_sigmas(recipe, self._sample)
        self._routed = list(dict.fromkeys(segment.expert for segment in router.segments)) if router is not None else []
        trained = trained_before(recipe, stage.name) | set(stage.trained_experts())
        experts = {name: recipe.experts[name] for name in self._routed if name in recipe.experts}
        self.served = [name for name, expert in experts.items() if expert.trainable and name not in trained]
        self.captions, self._conds = self._asked()

    def _asked(self) -> tuple[list[str], list[dict[str, Tensor]]]:
        """What each video shall show, in words and as conditioning, a batch of one, which waits on the host."""
        backbone, dataset = self._training.mixture.backbone, self._training.dataset
        if (prompts := self.config.asked()) is not None:
            batch = conditioning.to(backbone.encode(prompts), "cpu")
            return prompts, [conditioning.select(batch, slice(k, k + 1)) for k in range(len(prompts))]
        assert dataset is not None
        count = min(self.config.num, len(dataset))
        chosen = [number * len(dataset) // count for number in range(count)]
        # The videos themselves are not wanted, and may be of many shapes; so may the texts.
        conds = [dict(backbone.prepare(*collate([dataset[index]]))[1]) for index in chosen]
        captions = [
            dataset.caption(index) or backbone.captions(cond)[0] for index, cond in zip(chosen, conds, strict=True)
        ]
        return captions, [conditioning.to(cond, "cpu") for cond in conds]

    def due(self) -> bool:
        """Whether to make one now: before the first step, every `every` steps, and after the last."""
        return self._training.step % self.config.every == 0 or self._training.step == self._training.steps

    def make(self) -> Path | None:
        """Makes the videos as the mixture is now, and writes them; all processes come here, and share the work.

        What goes wrong in the making, such as a VAE for which there is no memory, is said in a line, and training goes
        on; but not with networks that are cut among processes, which would wait for each other.

        Returns:
            The folder of what was written, on the main process; None where nothing was.

        Raises:
            WriteError: the disk is full, or refuses otherwise.
        """
        training, start = self._training, time.monotonic()
        looks = [self._look()]
        if self.config.compare_teacher and self._first():
            looks = [*self._looks_of_teacher(), *looks]
        for look in looks:
            made = self._videos(look)
            if not training.run.main:
                continue
            if isinstance(made, str):
                training.run.say(f"  warning: no preview at step {training.step}: {made}; training goes on")
                return None
            self._write(look, made)
        if not training.run.main:
            return None
        self._write_strip()
        took = time.monotonic() - start
        training.run.say(f"  preview of step {training.step}, in {took:.3g} s: {self._folder / STRIP}")
        return self._folder / looks[-1].folder

    def _look(self) -> _Look:
        assert self._sample is not None
        step, stand_ins = self._training.step, dict.fromkeys(self.served, TEACHER)
        return _Look(f"step_{step:08}", f"step {step}", self._sigmas, stand_ins, self._sample.eta)

    def _looks_of_teacher(self) -> list[_Look]:
        """The teacher alone, in all of its trajectory's steps and in those of the sampling."""
        trajectory = self._training.trajectory
        many = SampleConfig(steps=trajectory.num_steps).resolve(trajectory)
        alone = dict.fromkeys(self._routed, TEACHER)
        return [
            _Look(f"teacher_{number}_steps", f"teacher, {number} steps", path, alone)
            for number, path in {len(path) - 1: path for path in (many, self._sigmas)}.items()
        ]

    def _first(self) -> bool:
        """Whether the teacher's videos are yet to be made; the main process looks, for all."""
        there = all(self._is_ours(self._folder / look.folder) for look in self._looks_of_teacher())
        missing = torch.tensor(int(self._training.run.main and not there), device=self._training.device)
        return bool(self._training.accelerator.reduce(missing, reduction="sum"))

    # -- making -------------------------------------------------------------------------------------------------------

    def _videos(self, look: _Look) -> list[Tensor] | str:
        """The videos `[C, T, H, W]` in [0, 1], on the main process, or why there are none."""
        training, mixture = self._training, self._training.mixture
        cuda = [training.device] if training.device.type == "cuda" else []
        share, made = Share.of(training.accelerator), dict[int, Tensor | str]()
        with torch.no_grad(), torch.random.fork_rng(cuda), mixture.visiting():
            torch.manual_seed(torch_seed(training.recipe.seed, "preview", "networks"))  # for what a network draws
            for number in share.items(len(self.captions)):
                try:
                    made[number] = self._video(number, look)
                except Exception as error:  # whatever a VAE may raise: hours of training are worth more
                    if mixture.sharded:
                        raise
                    made[number] = shorten((str(error).strip().splitlines() or [type(error).__name__])[0], 240)
        if cuda:
            torch.cuda.empty_cache()  # a step needs blocks of other sizes than a VAE
        together = share.together(made).values()
        failed = [each for each in together if isinstance(each, str)]
        return failed[0] if failed else [each for each in together if isinstance(each, Tensor)]

    def _video(self, number: int, look: _Look) -> Tensor:
        mixture, seed, device = self._training.mixture, self.config.seed, self._training.device
        shape, cond = mixture.backbone.latent_shape(), conditioning.to(self._conds[number], device)

        # The addresses of `moedistill.model.generate`: with equal weights the video is the one that is sampled later.
        def fresh_noise(step: int, _rows: range) -> Tensor:
            return Draws(seed, "sample", step, [number], device).normal("fresh_noise", shape)

        latents = mixture.generate(
            Draws(seed, "sample", 0, [number], device).normal("noise", shape), cond, look.sigmas,
            stand_ins=look.stand_ins, guidance=mixture.guidance, weights=self.config.weights,
            eta=look.eta, fresh_noise=fresh_noise,
        )  # fmt: skip
        return mixture.backbone.decode(latents)[0].cpu()

    # -- writing ------------------------------------------------------------------------------------------------------

    def _about(self) -> dict[str, object]:
        """What all videos of the stage have in common: others do not belong into one strip."""
        return {"prompts": self.captions, "seed": self.config.seed}

    def _is_ours(self, folder: Path) -> bool:
        """Whether a preview lies there, complete, of the same prompts and noise."""
        try:
            about = read_json(folder / ABOUT)
        except (Damaged, OSError):
            return False
        return isinstance(about, dict) and self._about().items() <= about.items()

    def _write(self, look: _Look, videos: Sequence[Tensor]) -> None:
        """One preview's folder; `ABOUT` comes last, and makes it complete."""
        folder, backbone = self._folder / look.folder, self._training.mixture.backbone
        self._training.run.folder(PREVIEWS)
        make_folder(folder)
        with disk_errors(folder):
            for left in folder.iterdir():  # of other prompts, or of a run that was killed
                left.unlink()
        files = [f"{number:02}{words_of(caption)}.mp4" for number, caption in enumerate(self.captions)]
        for file, video in zip(files, videos, strict=True):
            with new_file(folder / file) as new:
                write_mp4(new, video, fps=backbone.fps)
        with new_file(folder / FRAMES) as new:
            middle_frames(new, torch.stack(list(videos)))
        router = self._training.mixture.router
        routed = [router.expert_at(sigma) if router is not None else TEACHER for sigma in look.sigmas[:-1].tolist()]
        about = {
            **self._about(),
            "label": look.label,
            "files": files,
            "sigmas": look.sigmas.tolist(),
            "eta": look.eta,
            "experts": [look.stand_ins.get(expert, expert) for expert in routed],
            "weights": self.config.weights,
        }
        write_text(folder / ABOUT, json.dumps(about, indent=1, ensure_ascii=False))

    def _write_strip(self) -> None:
        """All that belongs together, the teacher's first; also what was made before the run was resumed."""
        teachers = (
            [self._folder / look.folder for look in self._looks_of_teacher()] if self.config.compare_teacher else []
        )
        steps = [path for path in sorted(self._folder.glob("step_*")) if self._is_ours(path)]
        steps = [path for path in steps if int(path.name.removeprefix("step_")) <= self._training.step]
        if len(steps) > SHOWN:  # the first and the last among them
            steps = [steps[k * (len(steps) - 1) // (SHOWN - 1)] for k in range(SHOWN)]
        columns = {
            read_json(path / ABOUT)["label"]: read_frames(path / FRAMES, len(self.captions))
            for path in [*filter(self._is_ours, teachers), *steps]
        }
        title = f"{self._training.config.name}: {len(self._sigmas) - 1} steps of sampling"
        if self.served:
            title += f"; {' and '.join(self.served)} not trained yet, the teacher stands in"
        with new_file(self._folder / STRIP) as new:
            strip(new, columns, self.captions, title=title)
