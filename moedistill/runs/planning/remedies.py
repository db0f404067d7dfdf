"""The cheapest changes to a recipe that make it fit, each tried by planning once more."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from moedistill.components.plugins import Plugins
from moedistill.errors import UserError
from moedistill.model.backbone import TEACHER
from moedistill.recipe.keys import Recipe, TrainingStageConfig
from moedistill.recipe.loading import load_recipe
from moedistill.runs.planning.plan import Plan, Planner, Remedy, fits, numbers_that_go, plan

MISSING = (
    "None of these is enough. What is left waits for context parallel, which cuts the tokens of a sample among GPUs "
    "and is not there yet, or for a smaller video."
)


@dataclass(frozen=True)
class Change:
    """A change that may take less: `settings` of `--set`, the number of GPUs if it changes, and what it costs."""

    settings: tuple[str, ...]
    cost: str
    gpus: int | None = None


def plan_with_remedies(
    recipe: Recipe,
    source: str,
    overrides: Sequence[str],
    plugins: Plugins,
    *,
    gpus: int | None = None,
    gpu_memory: float = 80.0,
) -> Plan:
    """The plan of a recipe, and, where it does not fit, what would make it.

    Args:
        recipe: as loaded from `source` with `overrides`.

    Raises:
        UserError: as of `plan`.
    """
    planner = Planner()
    made = plan(recipe, gpus=gpus, gpu_memory=gpu_memory, planner=planner)
    if made.fits:
        return made
    search = _Search(made, planner, source, tuple(overrides), plugins)
    remedies, missing = search.remedies(recipe)
    return replace(made, remedies=remedies, missing=missing)


class _Search:
    def __init__(self, made: Plan, planner: Planner, source: str, overrides: tuple[str, ...], plugins: Plugins) -> None:
        self.made, self.planner = made, planner
        self.source, self.overrides, self.plugins = source, overrides, plugins

    def remedies(self, recipe: Recipe) -> tuple[list[Remedy], str]:
        """Changes one by one and, where none is enough, one on top of the other; and what is missing."""
        singles = [(change, self._tried([change])) for change in changes(recipe, self.made)]
        helping = [(change, found) for change, found in singles if found and found.peak < 0.99 * self.made.peak]
        found = [each for _, each in helping]
        if any(each.fits for each in found):
            return found, ""
        # On as many GPUs as there are; and on as many as share the batch, where nothing is left to accumulate.
        here = [change for change, _ in helping if change.gpus is None]
        spread = [change for change, _ in helping if change.gpus is not None][-1:]
        rest = [change for change in here if "gradient_accumulation" not in "".join(change.settings)]
        together = [self._together(ways) for ways in (here, [*spread, *rest] if spread else []) if len(ways) > 1]
        found += [each for each in together if each is not None]
        return found, "" if any(each.fits for each in found) else MISSING

    def _together(self, ways: Sequence[Change]) -> Remedy | None:
        """The changes that help, one after the other until it fits, without those that turn out not to be needed."""
        chosen: list[Change] = []
        best: Remedy | None = None
        for change in ways:
            found = self._tried([*chosen, change])
            if found is None or (best is not None and found.peak >= 0.99 * best.peak):
                continue
            chosen, best = [*chosen, change], found
            if found.fits:
                break
        if best is None or not best.fits:
            return best
        for change in chosen[:-1]:
            fewer = [each for each in chosen if each is not change]
            found = self._tried(fewer)
            if found is not None and found.fits:
                chosen, best = fewer, found
        return best

    def _tried(self, chosen: Sequence[Change]) -> Remedy | None:
        """The changes together; None where they cannot be made."""
        settings = [setting for change in chosen for setting in change.settings]
        gpus = next((change.gpus for change in reversed(chosen) if change.gpus is not None), self.made.gpus)
        try:
            recipe = load_recipe(self.source, (*self.overrides, *settings), self.plugins)
            gpus = max(number for number in numbers_that_go(recipe) if number <= gpus)
            peak = max(stage.peak for stage in self.planner.stages(recipe, gpus, about=True))
        except UserError:
            return None
        cost = "; ".join(dict.fromkeys(part for change in chosen for part in change.cost.split("; ")))
        settings = list(dict.fromkeys(settings))
        return Remedy(settings, gpus, cost, peak, fits(peak, self.made.gpu_memory))


def changes(recipe: Recipe, made: Plan) -> Iterator[Change]:
    """What may help, the cheapest first: what costs nothing, then time, then precision, then GPUs, then the result."""
    training, gpus = recipe.training, made.gpus
    failing = {stage.name for stage in made.stages if not fits(stage.peak, made.gpu_memory)}
    stages = [stage for stage in recipe.stages if isinstance(stage, TrainingStageConfig)]
    if training.offload.idle is None:
        yield Change(("training.offload.idle=cpu",), "memory of the host")
    if not training.gradient_checkpointing:
        yield Change(("training.gradient_checkpointing=true",), "about a third more computing")
    share = training.batch_size // training.gradient_accumulation_steps // gpus
    single: tuple[str, ...] = ()
    if share > 1:
        single = (f"training.gradient_accumulation_steps={training.batch_size // gpus}",)
        yield Change(single, "a sample at a time")
    if training.offload.averages is None and any(stage.averages for stage in made.stages):
        yield Change(("training.offload.averages=cpu",), "averages go over the bus at each step")
    lower = [stage.name for stage in stages if getattr(stage.optimizer, "states", "int8") != "int8"]
    if lower:
        yield Change(tuple(f"stages.{name}.optimizer.states=int8" for name in lower), "moments of 8 bits")
    if getattr(recipe.backbone, "quantization", "int8") is None:
        yield Change(("backbone.quantization=int8",), "frozen weights of 8 bits")
    yield from _more_gpus(recipe, made)
    full = [name for name, expert in recipe.experts.items() if expert.copies_base]
    for name in full:
        parent = recipe.experts[name].parent
        start = "" if parent == TEACHER else f", from: {parent}"
        setting = f"experts.{name}={{kind: lora, rank: 128, alpha: 256{start}}}"
        # With nothing less tried: an adapter's activations are to be counted, too, and of one sample that is enough.
        way = f"{name} is an adapter, not all weights"
        yield Change((*single, setting), f"a sample at a time; {way}" if single else way)
    for stage in stages:
        frames = _frames(recipe, stage)
        if stage.name in failing and frames > 1:
            yield Change((f"stages.{stage.name}.latent_frames={frames // 2}",), "trained on half as many frames")
    video = getattr(recipe.backbone, "video", None)
    if video is not None:
        yield from _smaller_videos(recipe, video)


def _more_gpus(recipe: Recipe, made: Plan) -> Iterator[Change]:
    training = recipe.training
    settings = () if training.sharding == "fsdp2" else ("training.sharding=fsdp2",)
    most = training.batch_size // training.gradient_accumulation_steps
    numbers = [number for number in numbers_that_go(recipe) if number > made.gpus or (settings and number > 1)]
    for number in dict.fromkeys([*numbers[:1], *numbers[-1:]]):
        yield Change(settings, f"{number} GPUs, weights cut among them", number)
    if training.gradient_accumulation_steps > 1 and training.batch_size > most:
        number = training.batch_size
        steps = "training.gradient_accumulation_steps=1"
        yield Change((*settings, steps), f"{number} GPUs, weights cut among them", number)


def _frames(recipe: Recipe, stage: TrainingStageConfig) -> int:
    shape = getattr(recipe.backbone, "latent_shape", None)
    frames: int = shape()[1] if shape is not None else 1
    return min(frames, stage.latent_frames or frames)


def _smaller_videos(recipe: Recipe, video: "object") -> Iterator[Change]:
    """Half as many frames; two thirds of the sides; both."""
    frames, height, width = (getattr(video, name) for name in ("num_frames", "height", "width"))
    fewer = (frames - 1) // 8 * 4 + 1
    low, narrow = (max(32, side * 2 // 3 // 32 * 32) for side in (height, width))
    for size in ((fewer, height, width), (frames, low, narrow), (fewer, low, narrow)):
        settings = [f"backbone.video.{n}={v}" for n, v in zip(("num_frames", "height", "width"), size, strict=True)]
        yield Change(tuple(settings), f"videos of {size[0]} frames of {size[1]}×{size[2]}")
