"""Samples from a finished run, one of its checkpoints, or an export."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moedistill.components.fields import WhichWeights
from moedistill.components.plugins import Plugins, load_plugins
from moedistill.errors import Interrupted, RecipeError, UserError, WriteError, user_errors
from moedistill.flow.routers import GivenRouterConfig
from moedistill.flow.sampling_points import SampleConfig
from moedistill.model.backbone import VideoSize
from moedistill.model.mixture import Mixture, Weights
from moedistill.recipe.keys import Recipe
from moedistill.recipe.loading import in_todays_words, load_model, load_recipe
from moedistill.recipe.sampling import notes_on, sampling_sigmas, untrained_notes
from moedistill.runs.build import build_mixture
from moedistill.runs.resume import run_of
from moedistill.runs.saved import read_state, read_weights
from moedistill.runtime.checkpoint import find_checkpoint, newest_whole
from moedistill.runtime.devices import cpu_threads, find_device
from moedistill.runtime.integrity import Damaged
from moedistill.runtime.lock import claimed
from moedistill.runtime.writing import refuse_used
from moedistill.stages.export import INDEX, read_export
from moedistill.stages.sample import write_samples


@dataclass
class SampleResult:
    """What was sampled.

    Attributes:
        output: the folder with the files.
        videos: `[N, C, T, H, W]` in [0, 1]; None if they were not to be kept.
        notes: where the steps asked for are not those that the experts were trained for; and which experts are not
            trained, as in a checkpoint of an earlier stage.
    """

    output: Path
    videos: Tensor | None
    notes: list[str] = field(default_factory=list)


def read_trained(
    source: str | Path,
    *,
    weights: WhichWeights = "trained",
    plugins: Plugins | None = None,
    pieces: bool = False,
) -> tuple[Recipe, Weights, Weights]:
    """Recipe, experts' weights and, for ema, their averages, of a run's folder, a checkpoint, or an export's folder.

    Where data or stages cannot be read, as without the plugins of their losses and metrics, the recipe has none. With
    `pieces` what several processes wrote is not put together, as in `load_tree`.

    Raises:
        UserError: there is nothing of the kind, it is not complete, `weights` is ema and there are no averages, or the
            plugin of the backbone, an expert, the trajectory or the router is missing. An export of which nothing but
            the router's plugin is missing keeps its boundaries, if those are a `TimestepRouter`'s.
    """
    recipe, experts, averages = _read_trained(Path(source), plugins, averaged=weights == "ema", pieces=pieces)
    if weights == "ema" and not averages:
        raise UserError(f"{source} holds no averaged weights; sample the trained ones")
    return recipe, experts, averages


def _read_trained(
    folder: Path, plugins: Plugins | None, *, averaged: bool, pieces: bool
) -> tuple[Recipe, Weights, Weights]:
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: there is no such folder; give a run's, such as runs/dcm_digits/20260101-120000")
    if os.path.lexists(folder / INDEX):
        index, experts = read_export(folder)
        return _recipe_of(folder, index["recipe"], plugins, index), experts, {}
    try:
        checkpoint = find_checkpoint(folder)
        state = read_state(checkpoint)
        recipe = _recipe_of(checkpoint, state["recipe"], plugins, {})
        return recipe, *read_weights(checkpoint, state, averaged=averaged, pieces=pieces)
    except Damaged as error:
        damaged = error.path.parent
        whole = newest_whole(damaged.parent, damaged)
        way = f"the newest whole one is {whole}: take that" if whole else "beside it there is no whole checkpoint"
        raise UserError(f"{error}; {way}") from error


def _recipe_of(source: Path, saved: Mapping[str, Any], plugins: Plugins | None, index: Mapping[str, Any]) -> Recipe:
    """A saved recipe, whole if it can be read, or what sampling needs of it; `index` is the export's, if it is one."""
    plugins, saved = plugins or load_plugins(), in_todays_words(saved)
    try:
        return load_recipe(saved, plugins=plugins)
    except RecipeError:  # a plugin is missing, or is of another version
        missing = _missing(saved, plugins)
    router, exported = None, index.get("router") or {}
    if exported.get("kind") == "timestep" and any(registry == "router" for registry, _ in missing):
        router = GivenRouterConfig(data=exported)
        missing = [(registry, kind) for registry, kind in missing if registry != "router"]
    if missing:
        needs = f"{source} needs {_named(missing, index)}, which is not there{_broken(plugins)}"
        raise UserError(f"{needs}; install the package that brings it, or give its file with -p")
    return load_model(saved, plugins, router=router, name=str(source))


def _missing(saved: Mapping[str, Any], plugins: Plugins) -> list[tuple[str, str]]:
    """Registry and kind of the components that sampling needs and that are not there."""
    configs = [(registry, saved.get(registry)) for registry in ("backbone", "trajectory", "router")]
    experts = saved.get("experts")
    configs += [("expert", config) for config in (experts.values() if isinstance(experts, Mapping) else ())]
    kinds = [
        (registry, config["kind"]) for registry, config in configs if isinstance(config, Mapping) and "kind" in config
    ]
    return [(registry, kind) for registry, kind in kinds if kind not in plugins.components.names(registry)]


def _named(missing: Sequence[tuple[str, str]], index: Mapping[str, Any]) -> str:
    """Components and, where an export says it, their plugins: "backbone 'mine' of plugin mine.py"."""
    origins = index.get("provenance", {}).get("plugins", {})
    plugins = [origins.get(f"{registry} {kind}", "") for registry, kind in missing]
    named = [
        f"{registry} {kind!r}" + (f" of plugin {plugin}" if plugin else "")
        for (registry, kind), plugin in zip(missing, plugins, strict=True)
    ]
    return " and ".join(dict.fromkeys(named))


def _broken(plugins: Plugins) -> str:
    return f" (broken plugins: {', '.join(sorted(plugins.broken))})" if plugins.broken else ""


def load_mixture(
    source: str | Path,
    *,
    device: str = "cpu",
    weights: WhichWeights = "trained",
    plugins: Plugins | None = None,
) -> tuple[Recipe, Mixture]:
    """The recipe and the trained mixture of a run's folder, a checkpoint, or an export's folder, for sampling.

    Raises:
        UserError: as `read_trained`.
    """
    recipe, experts, averages = read_trained(source, weights=weights, plugins=plugins)
    return recipe, _loaded(recipe, experts, averages, source, device)


def _loaded(recipe: Recipe, experts: Weights, averages: Weights, source: str | Path, device: str) -> Mixture:
    mixture = build_mixture(recipe, find_device(device), inference=True)
    mixture.load(experts, averages, str(source))
    return mixture


def sample_run(
    source: str | Path,
    *,
    prompts: Sequence[str] = ("",),
    num: int = 1,
    seed: int = 0,
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    eta: float | None = None,
    weights: WhichWeights = "trained",
    video: Mapping[str, int | None] | None = None,
    fps: float | None = None,
    output: str | Path | None = None,
    device: str = "cpu",
    keep: bool = True,
    plugins: Plugins | None = None,
) -> SampleResult:
    """Samples `num` videos of each prompt, and writes them as `moedistill.stages.sample.write_samples` does.

    Args:
        source: a run's folder, a checkpoint, or an export's folder.
        prompts: as the backbone understands them.
        seed: of the noise, which also depends on a video's place in the list.
        steps, sigmas: instead of the recipe's own sampling steps, as in its `sample`; with eta 0.
        eta: instead of that eta.
        weights: the experts' `trained` weights or their `ema`.
        video: height, width and num_frames, those that shall differ from the backbone's own.
        fps: frames per second of the files; the backbone's own, if not given.
        output: a new or an empty folder; if not given, `samples` inside `source`, or inside the run that a checkpoint
            is one of; or `samples-2` and so on where that is there, or is a stage's.
        keep: also give the videos, all of which must then have room in memory.

    Raises:
        UserError: as `read_trained`; or a prompt, a size or the steps don't fit the model, or `output` is not empty.
    """
    if not prompts:
        raise UserError("there is no prompt to sample; give at least one")
    if output is not None:
        refuse_used(Path(output))
    recipe, experts, averages = read_trained(source, weights=weights, plugins=plugins)
    folder = Path(output) if output is not None else _home(Path(source)) / "samples"
    stages = [stage.name for stage in recipe.stages]
    mixture = _loaded(recipe, experts, averages, source, device)
    path, config = sampling_steps(recipe, steps, sigmas), sampling_config(recipe, steps, sigmas, eta)
    notes = untrained_notes(recipe, experts, path)
    notes += notes_on(recipe, config) if steps is not None or sigmas is not None else []
    asked = [prompt for prompt in prompts for _ in range(num)]
    with cpu_threads(recipe.training.num_threads), user_errors("sample"):
        size = _video_size(mixture, {key: value for key, value in (video or {}).items() if value is not None})
        with claimed(folder, numbered=output is None, but=stages) as folder:
            refuse_used(folder)  # once more: it is ours now
            try:
                videos = write_samples(
                    folder, recipe, mixture, asked, path,
                    seed=seed, video=size, weights=weights, eta=config.eta, fps=fps, made_from=str(source), keep=keep,
                )  # fmt: skip
            except (Interrupted, WriteError) as error:
                raise _with_what_is_there(error, folder, len(asked)) from error
    return SampleResult(folder, torch.stack(videos) if keep else None, notes)


def _home(source: Path) -> Path:
    """Where samples of a run, an export or a checkpoint go; what lies in a run's checkpoint is deleted with it."""
    if (source / "checkpoints").is_dir() or os.path.lexists(source / INDEX):
        return source
    return run_of(source) or source


def _with_what_is_there(error: Interrupted | WriteError, folder: Path, asked: int) -> Interrupted | WriteError:
    """The error, which also says how many videos are there."""
    made = len(list(folder.glob("*.mp4")))
    message = f"{error}; {made} of {asked} videos are in {folder}" if made else f"{error}; no video is written yet"
    return Interrupted(error.signum, message) if isinstance(error, Interrupted) else WriteError(message)


def sampling_config(
    recipe: Recipe, steps: int | None = None, sigmas: Sequence[float] | None = None, eta: float | None = None
) -> SampleConfig:
    """How to sample: in so many steps, along the sigmas given, or as the recipe does; each with another eta, if given.

    Raises:
        UserError: there is no list, or both are given.
    """
    if steps is not None and sigmas is not None:
        raise UserError("give --steps or --sigmas, not both")
    if (steps is not None and steps < 1) or (sigmas is not None and not len(sigmas)):
        raise UserError(f"steps {steps}, sigmas {sigmas}: there must be at least one step")
    if steps is not None:
        config = SampleConfig(steps=steps)
    elif sigmas is not None:
        config = SampleConfig(sigmas=list(sigmas))
    elif recipe.sample is not None:
        config = recipe.sample
    else:
        raise UserError("the recipe has no sample list; give --steps or --sigmas")
    return config if eta is None else replace(config, eta=eta)


def sampling_steps(recipe: Recipe, steps: int | None = None, sigmas: Sequence[float] | None = None) -> Tensor:
    """Sigmas `[n + 1]` down to 0: of so many steps, or those given, or the recipe's own list.

    Raises:
        UserError: there is no list, or it does not fit the trajectory, or both are given.
    """
    config = sampling_config(recipe, steps, sigmas)
    with user_errors("--steps" if steps is not None else "--sigmas" if sigmas is not None else "sample"):
        return sampling_sigmas(recipe, config)


def _video_size(mixture: Mixture, changes: Mapping[str, int]) -> VideoSize | None:
    """The backbone's own size with some numbers changed; None where nothing is. ValueError if it has none such."""
    if not changes:
        return None
    backbone = mixture.backbone
    if backbone.video is None:
        raise ValueError("this backbone's videos have one size; leave --height, --width and --frames away")
    size = VideoSize(**{**vars(backbone.video), **changes})
    backbone.latent_shape(size)  # raises
    return size
