"""Does a set of stored samples fit a recipe? Looked at before any model is loaded."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from moedistill.data.check import (
    Contents,
    Misfit,
    Report,
    check_batches,
    layout_problems,
    read_set,
    too_short,
)
from moedistill.data.latents import LatentsConfig, find_index
from moedistill.data.plausible import can_be_told, padding_warning, size_warning, spread_warning
from moedistill.data.prompts import PromptsConfig
from moedistill.data.videos import VideosConfig
from moedistill.errors import SCREEN_LINES, UserError, counted, shorten
from moedistill.model.backbone import BackboneConfig
from moedistill.model.latent_video import LatentVideoConfig
from moedistill.model.layout import SampleLayout
from moedistill.recipe.keys import Recipe

FEW = 8
"""Of how many samples a run reads the numbers before it starts."""


def check_before(recipe: Recipe, processes: int = 1) -> Report | None:
    """What a run of so many processes looks at before it loads anything: `check_set` of its stored set, if it has one.

    Raises:
        UserError: the set cannot be used; names samples and files.
    """
    if not isinstance(recipe.data, LatentsConfig) or recipe.data.path is None:
        return None
    report = check_set(recipe.data.path, recipe, numbers=FEW, processes=processes)
    if not report.fits:
        head = f"data.path: {report.title} cannot be trained on (`moedistill data check` shows more)"
        raise UserError("\n".join([head, *report.problem_lines(SCREEN_LINES - 2)]))
    return report


def check_set(
    path: str | Path, recipe: Recipe | None = None, *, numbers: int | None = None, processes: int = 1
) -> Report:
    """Looks at the set at `path`, and compares what is there with what `recipe` needs.

    Every sample's shapes are looked at; `numbers` says of how many samples all is read, None of all.
    """
    report = Report(str(path))
    layout = _layout(recipe, report) if recipe is not None else None
    contents = read_set(path, report, layout, numbers)
    if contents is None:
        return report
    if recipe is None:
        check_batches(contents, report, batched=False)
        return report
    _compare(path, contents, recipe, layout, report)
    training = recipe.training
    check_batches(
        contents, report, batched=training.batch_size > training.gradient_accumulation_steps * processes,
        unpack=recipe.backbone.unpack, layout=layout, needs_negative=bool(_negative_for(recipe)),
    )  # fmt: skip
    return report


def _negative_for(recipe: Recipe) -> list[str]:
    """What needs a negative prompt."""
    guidance, data = recipe.backbone.guidance, recipe.data
    guided = any(guidance.classifier_free_scale(base) != 1.0 for base in recipe.backbone.bases())
    dropout = data is not None and data.text_dropout > 0
    return ["classifier-free guidance"] * guided + ["text_dropout"] * dropout


def _layout(recipe: Recipe, report: Report) -> SampleLayout | None:
    try:
        return recipe.backbone.layout()
    except ValueError as error:
        report.problems.append(Misfit("what the backbone needs cannot be told", [f"backbone: {error}"]))
        return None


def _compare(path: str | Path, contents: Contents, recipe: Recipe, layout: SampleLayout | None, report: Report) -> None:
    backbone = recipe.backbone
    if contents.store.text_only and isinstance(recipe.data, LatentsConfig):
        report.problems.append(Misfit("the set is of texts alone, which can be sampled from with kind: prompts", []))
    if layout is not None:
        report.problems += layout_problems(contents, layout, backbone.kind, backbone.unpack, _crops(recipe))
    report.problems += _too_short(contents, recipe)
    if missing := list(recipe.missing(data=False)):  # it would stop the run
        report.problems.append(Misfit("what stages will read is missing, or does not fit", missing))
    report.notes += _notes(path, contents, recipe, layout)
    report.warnings += _warnings(contents, backbone, report)


def _warnings(contents: Contents, backbone: BackboneConfig, report: Report) -> Iterator[str]:
    """What is likely wrong."""
    for name, kinds in contents.texts.items():
        yield from padding_warning(name, kinds)
    try:
        moments = backbone.latent_moments()
    except ValueError as error:
        report.notes.append(f"the latents' numbers are not compared with the VAE's: {str(error).splitlines()[0]}")
        moments = None
    if moments is not None and contents.spread is not None and contents.spread.count:
        yield from spread_warning(contents.spread, *moments)
        if not can_be_told(*moments):
            report.notes.append(
                "this VAE gives about mean 0 and deviation 1: whether the latents were scaled already cannot be told"
            )
    if isinstance(backbone, LatentVideoConfig) and not contents.store.text_only:
        video, compression = backbone.video, (backbone.temporal_compression, backbone.spatial_compression)
        frames = {backbone.latent_shape()[1], (video.num_frames - 1) // compression[0] + 1}  # padded or not
        shapes = [sample.latents for sample in contents.seen]
        yield from size_warning(shapes, (video.num_frames, video.height, video.width), frames, compression)


def _crops(recipe: Recipe) -> list[int | None]:
    """The `latent_frames` of the stages that train on latents; None where one takes all frames."""
    crops = {getattr(stage, "latent_frames", None) for stage in recipe.stages if "latents" in stage.needs}
    return sorted(crops or {None}, key=lambda crop: crop or 0)


def _too_short(contents: Contents, recipe: Recipe) -> Iterator[Misfit]:
    """Losses over a `lag` of latent frames need more frames than that."""
    if contents.store.text_only:  # which is said by itself
        return
    for stage in recipe.stages:
        crop = getattr(stage, "latent_frames", None)
        for loss in getattr(stage, "losses", ()):
            lag = getattr(loss, "lag", 0)
            short = too_short(contents, lag, crop)
            if short:
                yield Misfit(
                    f"{len(short)} samples are too short for {loss.kind} of stage {stage.name}, which needs more than "
                    f"{lag} latent frames; lower its lag, or use longer videos"
                    + (f" and more than latent_frames {crop}" if crop is not None and crop <= lag else ""),
                    short,
                )


def _notes(path: str | Path, contents: Contents, recipe: Recipe, layout: SampleLayout | None) -> Iterator[str]:
    data, batch = recipe.data, recipe.training.batch_size
    configured = getattr(data, "path", None)
    if isinstance(data, VideosConfig):
        pass  # of a run's own set it matters to nobody where it lies
    elif not isinstance(data, LatentsConfig | PromptsConfig):
        yield f"the recipe's data are not of kind latents or prompts but {data.kind if data else 'missing'}"
    elif configured is None or not _same(configured, contents.store.index):
        yield f"the recipe's data.path is {configured or 'null'}, not {path}"
    counts = Counter(str(list(sample.latents)) for sample in contents.seen)
    small = {shape: count for shape, count in counts.items() if count < batch}
    if small:
        yield f"fewer samples of a shape than training.batch_size {batch}, so they are repeated: {counted(small)}"
    if contents.negative is None and (why := " and ".join(_negative_for(recipe))):
        yield f"{why}, but no stored negative prompt: it will be encoded with the model's text encoder"
    stored = dict.fromkeys(name for sample in contents.seen for name in sample.conditioning)
    if layout is not None and stored:
        unread = [name for name in stored if name not in layout.conditioning]
        if unread:
            kind = recipe.backbone.kind
            yield f"stored, but no input of {kind}: {', '.join(shorten(name, 60) for name in unread)}"


def _same(configured: str, index: Path) -> bool:
    """Whether the recipe means the same set."""
    try:
        return find_index(configured).resolve() == index.resolve()
    except (ValueError, OSError):
        return False
