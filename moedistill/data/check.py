"""Looks through a set of stored samples, before any model is loaded: what is in it, and what does not fit a recipe."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moedistill.data.latents import LATENTS, SampleError, Store, find_index, open_store
from moedistill.data.prompts import read_prompts
from moedistill.errors import SCREEN_LINES, shorten

if TYPE_CHECKING:
    from moedistill.backbone import SampleLayout
    from moedistill.recipe import Recipe

EXAMPLES = 10
"""How many examples are shown of a kind of problem, if there is room on the screen."""
COUNTED = 5
"""How many different shapes are listed by name."""

Shape = tuple[int, ...]


@dataclass
class Problem:
    """One kind of thing that is wrong, and where: files, or the recipe's keys."""

    message: str
    places: list[str]


@dataclass
class Report:
    """What `check_latents` found.

    Attributes:
        facts: what is in the set, as (name, value).
        problems: what keeps a run from using it.
        notes: what one may want to know.
    """

    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def lines(self) -> list[str]:
        """The report as text for one screen."""
        width = max((len(name) for name, _ in self.facts), default=0)
        lines = [self.title, *(f"  {name:{width}}  {value}" for name, value in self.facts)]
        lines += [f"note: {note}" for note in self.notes]
        # Each kind has a line for itself and one for what is left out; the prompt wants one too.
        room = SCREEN_LINES - 1 - len(lines) - 2 * len(self.problems)
        shown = min(EXAMPLES, max(1, room // max(1, len(self.problems))))
        for problem in self.problems:
            lines.append(f"problem: {problem.message}")
            lines += [f"    {shorten(place, 160)}" for place in problem.places[:shown]]
            if len(problem.places) > shown:
                lines.append(f"    … and {len(problem.places) - shown} more")
        return lines


@dataclass
class Seen:
    """What is kept of a sample that could be read."""

    file: str
    latents: Shape
    conditioning: dict[str, Shape]


def check_latents(path: str | Path, recipe: "Recipe | None" = None) -> Report:
    """Reads every file of the set at `path`, and compares what is there with what `recipe` needs."""
    report = Report(str(path))
    try:
        store = open_store(path)
    except ValueError as error:
        report.problems.append(Problem(str(error), []))
        return report
    report.title = f"{path}: {len(store)} samples, {store.layout} layout"
    seen = _read_all(store, report)
    negative = _read_negative(store, report)
    if recipe is not None:
        _compare(path, store, seen, negative, recipe, report)
    _check_batches(seen, negative, recipe, report)
    return report


# -- what is there ----------------------------------------------------------------------------------------------------


def _read_all(store: Store, report: Report) -> list[Seen]:
    """Reads all samples: the facts, and what is missing, broken or not a number."""
    missing: list[str] = []
    broken: list[str] = []
    not_finite: list[str] = []
    masked: list[str] = []
    seen: list[Seen] = []
    captions = to_encode = 0
    dtypes: dict[str, Counter[str]] = {}
    lengths: dict[str, list[int]] = {}
    for i in range(len(store)):
        try:
            caption, files = store.caption(i), store.files(i)
            captions += caption is not None
            absent = [str(file) for file in files if not file.is_file()]
            missing += absent
            if absent:
                continue
            latents, cond = store.read(i)
        except SampleError as error:
            broken.append(f"{error.file}: sample {i} {error.reason}")
            continue
        if not cond and caption is None:
            broken.append(f"{files[0]}: has neither stored text embeddings nor a caption")
        to_encode += not cond and caption is not None
        for name, value in {LATENTS: latents, **cond}.items():
            dtypes.setdefault(name, Counter())[str(value.dtype).removeprefix("torch.")] += 1
            if not _is_finite(value):
                not_finite.append(f"{files[0]}: {name}")
            if name.endswith("mask"):
                length = int(value.count_nonzero())
                lengths.setdefault(name, []).append(length)
                if length == 0:
                    masked.append(f"{files[0]}: {name}")
        seen.append(Seen(str(files[0]), tuple(latents.shape), {name: tuple(v.shape) for name, v in cond.items()}))
    report.facts += _facts(seen, dtypes, lengths)
    report.facts.append(("captions", f"{captions}; {to_encode} samples have nothing else"))
    counts = {"not finite": not_finite, "missing": missing, "broken": broken}
    report.facts.append(("files", ", ".join(f"{len(places) or 'none'} {what}" for what, places in counts.items())))
    kinds = [
        (missing, "files are missing: get or make them again, or take their samples out of the index"),
        (broken, "samples cannot be read: get or make them again, or take them out of the index"),
        (not_finite, "numbers are NaN or infinite: make these samples again, or take them out of the index"),
        (masked, "text is masked out altogether, which makes the attention of some models NaN: encode it again"),
    ]
    report.problems += [Problem(f"{len(places)} {message}", places) for places, message in kinds if places]
    if to_encode:
        report.notes.append(
            f"{to_encode} of {len(store)} samples have a caption only: it will be encoded with the model's text encoder"
        )
    return seen


def _facts(
    seen: Sequence[Seen], dtypes: Mapping[str, Counter[str]], lengths: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, str]]:
    yield "latents", _counted(Counter(str(list(sample.latents)) for sample in seen))
    yield "latent frames", _counted(Counter(sample.latents[1] for sample in seen))
    for name in dict.fromkeys(name for sample in seen for name in sample.conditioning):
        yield name, _counted(Counter(str(list(s.conditioning[name])) for s in seen if name in s.conditioning))
    for name, counted in lengths.items():
        yield "text length", f"{min(counted)} to {max(counted)} by {name}, mean {sum(counted) / len(counted):.0f}"
    yield "dtypes", ", ".join(f"{name} {' and '.join(sorted(kinds))}" for name, kinds in dtypes.items()) or "none"


def _counted(counts: Mapping[Any, int]) -> str:
    """Values with how often each is there, the most frequent first."""
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    shown = [f"{value} × {count}" for value, count in ranked[:COUNTED]]
    return ", ".join(shown + [f"and {len(ranked) - COUNTED} more"] * (len(ranked) > COUNTED)) or "none"


def _is_finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(value.isfinite().all())


def _read_negative(store: Store, report: Report) -> Seen | None:
    """The stored negative prompt's shapes."""
    try:
        stored = store.negative()
    except SampleError as error:
        report.facts.append(("negative prompt", "cannot be read"))
        message = "the negative prompt's conditioning cannot be read: make it again, or set negative to null"
        report.problems.append(Problem(message, [f"{error.file}: {error.reason}"]))
        return None
    report.facts.append(("negative prompt", "not stored" if stored is None else "stored"))
    if stored is None:
        return None
    file = str(store.negative_file())
    broken = [f"{file}: {name}" for name, value in stored.items() if not _is_finite(value)]
    if broken:
        report.problems.append(Problem("the negative prompt's conditioning is NaN or infinite: make it again", broken))
    return Seen(file, (), {name: tuple(value.shape) for name, value in stored.items()})


def _check_batches(seen: Sequence[Seen], negative: Seen | None, recipe: "Recipe | None", report: Report) -> None:
    """Samples of one latent shape are batched, so all their conditioning must be equal in shape, as the negative's."""
    if negative is not None:
        unequal = [
            f"{sample.file}: {name} {list(shape)}, not {list(negative.conditioning[name])}"
            for sample in seen
            for name, shape in sample.conditioning.items()
            if name in negative.conditioning and negative.conditioning[name] != shape
        ]
        if unequal:
            message = f"{len(unequal)} times the stored negative prompt has another shape: encode both alike"
            report.problems.append(Problem(message, unequal))
    first: dict[Shape, Seen] = {}
    different = []
    for sample in (sample for sample in seen if sample.conditioning):
        other = first.setdefault(sample.latents, sample)
        if sample.conditioning != other.conditioning:
            mine, theirs = (_shapes(s.conditioning) for s in (sample, other))
            different.append(f"{sample.file}: {mine}; {Path(other.file).name}: {theirs}")
    if not different:
        return
    message = "samples have the latent shape, but not the conditioning of others: pad all texts to the same length"
    training = recipe.training if recipe is not None else None
    if training is not None and training.batch_size > training.gradient_accumulation_steps:
        report.problems.append(Problem(f"{len(different)} {message}", different))
    else:
        report.notes.append(f"{len(different)} {message}, or train with one sample at a time; {different[0]}")


def _shapes(conditioning: Mapping[str, Shape]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in conditioning.items())


# -- what the recipe needs --------------------------------------------------------------------------------------------


def _compare(
    path: str | Path, store: Store, seen: Sequence[Seen], negative: Seen | None, recipe: "Recipe", report: Report
) -> None:
    try:
        layout = recipe.backbone.layout()
    except ValueError as error:
        layout = None
        report.problems.append(Problem("what the backbone needs cannot be told", [f"backbone: {error}"]))
    if layout is not None:
        report.problems += _layout_problems(store, seen, negative, recipe, layout)
    report.problems += _too_short(seen, recipe)
    report.problems += _prompt_files(recipe)
    report.notes += _recipe_notes(path, store, seen, negative, recipe, layout)


def _layout_problems(
    store: Store, seen: Sequence[Seen], negative: Seen | None, recipe: "Recipe", layout: "SampleLayout"
) -> Iterator[Problem]:
    kind = recipe.backbone.kind
    channels = [f"{s.file}: {s.latents[0]}" for s in seen if s.latents[0] != layout.channels]
    if channels:
        yield Problem(f"{len(channels)} samples have not the {layout.channels} channels of {kind}", channels)
    odd = []
    crops = _latent_frames(recipe)
    for sample in seen:
        frames, *size = sample.latents[1:]
        grids = [(min(frames, crop or frames), *size) for crop in crops]
        odd += [
            f"{sample.file}: {list(grid)}"
            for grid in dict.fromkeys(grids)
            if any(have % step for have, step in zip(grid, layout.multiple, strict=True))
        ]
    if odd:
        rule = f"(T, H, W), after latent_frames, must be multiples of {layout.multiple}"
        yield Problem(f"{len(odd)} latents do not fit {kind}: {rule}", odd)
    texts = [*(sample for sample in seen if sample.conditioning), *([negative] if negative else [])]
    unfit = [
        f"{text.file}: {name} {list(have)}, not {layout.pattern(name)}"
        for text in texts
        for name in layout.conditioning
        if (have := text.conditioning.get(name)) is not None and not layout.fits(name, have)
    ]
    if unfit:
        yield Problem(f"{len(unfit)} conditioning tensors have not the shape that {kind} takes", unfit)
    if store.layout != "published":  # there a model may find several tensors packed in one
        lacking = [
            f"{text.file}: {name}" for text in texts for name in layout.conditioning if name not in text.conditioning
        ]
        if lacking:
            yield Problem(f"{len(lacking)} conditioning tensors that {kind} takes are not stored", lacking)


def _latent_frames(recipe: "Recipe") -> list[int | None]:
    """Of the stages that train on latents; None where one takes all frames."""
    crops = {getattr(stage, "latent_frames", None) for stage in recipe.stages if "latents" in stage.needs}
    return sorted(crops or {None}, key=lambda crop: crop or 0)


def _too_short(seen: Sequence[Seen], recipe: "Recipe") -> Iterator[Problem]:
    """Losses over a `lag` of latent frames need more frames than that."""
    for stage in recipe.stages:
        crop = getattr(stage, "latent_frames", None)
        for loss in getattr(stage, "losses", ()):
            lag = getattr(loss, "lag", 0)
            short = [f"{s.file}: {f}" for s in seen if (f := min(s.latents[1], crop or s.latents[1])) <= lag]
            if short:
                yield Problem(
                    f"{len(short)} samples are too short for {loss.kind} of stage {stage.name}, which needs more than "
                    f"{lag} latent frames; lower its lag, or use longer videos"
                    + (f" and more than latent_frames {crop}" if crop is not None and crop <= lag else ""),
                    short,
                )


def _prompt_files(recipe: "Recipe") -> Iterator[Problem]:
    """A stage may ask for prompts in a file, and would stop a long run if it is not there."""
    for stage in recipe.stages:
        prompts = getattr(stage, "prompts", None)
        if isinstance(prompts, str):
            try:
                read_prompts(prompts)
            except ValueError as error:
                yield Problem(f"stage {stage.name} cannot read its prompts", [str(error)])


def _recipe_notes(
    path: str | Path, store: Store, seen: Sequence[Seen], negative: Seen | None, recipe: "Recipe",
    layout: "SampleLayout | None",
) -> Iterator[str]:  # fmt: skip
    data, guidance, batch = recipe.data, recipe.backbone.guidance, recipe.training.batch_size
    configured = getattr(data, "path", None)
    if data is None or data.kind != "latents":
        yield f"the recipe's data are not of kind latents but {data.kind if data else 'missing'}"
    elif configured is None or not _same(configured, store.index):
        yield f"the recipe's data.path is {configured or 'null'}, not {path}"
    counts = Counter(str(list(sample.latents)) for sample in seen)
    small = {shape: count for shape, count in counts.items() if count < batch}
    if small:
        yield f"fewer samples of a shape than training.batch_size {batch}, so they are repeated: {_counted(small)}"
    guided = any(guidance.classifier_free_scale(base) != 1.0 for base in recipe.backbone.bases())
    dropout = data.text_dropout if data is not None else 0.0
    if negative is None and (guided or dropout):
        why = " and ".join(["classifier-free guidance"] * guided + ["text_dropout"] * bool(dropout))
        yield f"{why}, but no stored negative prompt: it will be encoded with the model's text encoder"
    stored = dict.fromkeys(name for sample in seen for name in sample.conditioning)
    if layout is not None and stored:
        unread = [name for name in stored if name not in layout.conditioning]
        packed = [name for name in layout.conditioning if name not in stored]
        if unread:
            yield f"stored, but no input of {recipe.backbone.kind}: {', '.join(unread)}"
        if packed and store.layout == "published":
            yield f"not stored by itself, so {recipe.backbone.kind} must find it in the rest: {', '.join(packed)}"


def _same(configured: str, index: Path) -> bool:
    """Whether the recipe means the same set."""
    try:
        return find_index(configured).resolve() == index.resolve()
    except (ValueError, OSError):
        return False
