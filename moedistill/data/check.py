"""Looks through a set of stored samples, before any model is loaded: what is in it, and what does not fit a layout."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moedistill.data.latents import LATENTS, SampleError, Store, open_store
from moedistill.errors import SCREEN_LINES, shorten
from moedistill.model.layout import SampleLayout

EXAMPLES = 10
"""How many examples are shown of a kind of problem, if there is room on the screen."""
COUNTED = 5
"""How many different shapes are listed by name."""

Shape = tuple[int, ...]


@dataclass
class Misfit:
    """One kind of thing that is wrong, and where: files, or the recipe's keys."""

    message: str
    places: list[str]


@dataclass
class Report:
    """What was found in a set.

    Attributes:
        facts: what is in the set, as (name, value).
        problems: what keeps a run from using it.
        notes: what one may want to know.
    """

    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    problems: list[Misfit] = field(default_factory=list)
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
class Contents:
    """A set as it was read.

    Attributes:
        seen: of the samples that could be read.
        negative: of the stored negative prompt; None if there is none.
    """

    store: Store
    seen: "list[Seen]"
    negative: "Seen | None"


@dataclass
class Seen:
    """What is kept of a sample that could be read."""

    file: str
    latents: Shape
    conditioning: dict[str, Shape]


def read_set(path: str | Path, report: Report, layout: SampleLayout | None = None) -> Contents | None:
    """Reads every file of the set at `path`; None where there is no set. `layout` says what is a mask."""
    try:
        store = open_store(path)
    except ValueError as error:
        report.problems.append(Misfit(str(error), []))
        return None
    report.title = f"{path}: {len(store)} samples, {store.layout} layout"
    masks = set(store.masks if layout is None else layout.of_role("mask"))
    may_be_empty = {name for name, each in layout.conditioning.items() if each.may_be_empty} if layout else set()
    return Contents(store, _read_all(store, report, masks, may_be_empty), _read_negative(store, report))


# -- what is there ----------------------------------------------------------------------------------------------------


def _read_all(store: Store, report: Report, masks: Collection[str], may_be_empty: Collection[str]) -> list[Seen]:
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
            if name in masks or value.dtype == torch.bool:  # no tensor of these is anything else
                length = int(value.count_nonzero())
                lengths.setdefault(name, []).append(length)
                if length == 0 and name not in may_be_empty:
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
    report.problems += [Misfit(f"{len(places)} {message}", places) for places, message in kinds if places]
    if to_encode:
        report.notes.append(
            f"{to_encode} of {len(store)} samples have a caption only: it will be encoded with the model's text encoder"
        )
    return seen


def _facts(
    seen: Sequence[Seen], dtypes: Mapping[str, Counter[str]], lengths: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, str]]:
    yield "latents", counted(Counter(str(list(sample.latents)) for sample in seen))
    yield "latent frames", counted(Counter(sample.latents[1] for sample in seen))
    for name in dict.fromkeys(name for sample in seen for name in sample.conditioning):
        yield name, counted(Counter(str(list(s.conditioning[name])) for s in seen if name in s.conditioning))
    for name, numbers in lengths.items():
        yield "text length", f"{min(numbers)} to {max(numbers)} by {name}, mean {sum(numbers) / len(numbers):.0f}"
    yield "dtypes", ", ".join(f"{name} {' and '.join(sorted(kinds))}" for name, kinds in dtypes.items()) or "none"


def counted(counts: Mapping[Any, int]) -> str:
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
        report.problems.append(Misfit(message, [f"{error.file}: {error.reason}"]))
        return None
    report.facts.append(("negative prompt", "not stored" if stored is None else "stored"))
    if stored is None:
        return None
    file = str(store.negative_file())
    broken = [f"{file}: {name}" for name, value in stored.items() if not _is_finite(value)]
    if broken:
        report.problems.append(Misfit("the negative prompt's conditioning is NaN or infinite: make it again", broken))
    return Seen(file, (), {name: tuple(value.shape) for name, value in stored.items()})


def check_batches(contents: Contents, report: Report, *, batched: bool) -> None:
    """Samples of one latent shape are batched, so all their conditioning must be equal in shape, as the negative's.

    Args:
        batched: whether more than one sample is trained on at once; else unequal samples are but a note.
    """
    seen, negative = contents.seen, contents.negative
    if negative is not None:
        unequal = [
            f"{sample.file}: {name} {list(shape)}, not {list(negative.conditioning[name])}"
            for sample in seen
            for name, shape in sample.conditioning.items()
            if name in negative.conditioning and negative.conditioning[name] != shape
        ]
        if unequal:
            message = f"{len(unequal)} times the stored negative prompt has another shape: encode both alike"
            report.problems.append(Misfit(message, unequal))
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
    if batched:
        report.problems.append(Misfit(f"{len(different)} {message}", different))
    else:
        report.notes.append(f"{len(different)} {message}, or train with one sample at a time; {different[0]}")


def _shapes(conditioning: Mapping[str, Shape]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in conditioning.items())


# -- what a model needs ------------------------------------------------------------------------------------------------


def layout_problems(
    contents: Contents, layout: SampleLayout, kind: str, crops: Sequence[int | None] = (None,)
) -> Iterator[Misfit]:
    """What does not fit the layout of a backbone `kind`, where stages take the first `crops` latent frames, or all."""
    store, seen, negative = contents.store, contents.seen, contents.negative
    channels = [f"{s.file}: {s.latents[0]}" for s in seen if s.latents[0] != layout.channels]
    if channels:
        yield Misfit(f"{len(channels)} samples have not the {layout.channels} channels of {kind}", channels)
    odd = []
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
        yield Misfit(f"{len(odd)} latents do not fit {kind}: {rule}", odd)
    texts = [*(sample for sample in seen if sample.conditioning), *([negative] if negative else [])]
    unfit = [
        f"{text.file}: {name} {list(have)}, not {wanted.pattern()}"
        for text in texts
        for name, wanted in layout.conditioning.items()
        if (have := text.conditioning.get(name)) is not None and not wanted.fits(have)
    ]
    if unfit:
        yield Misfit(f"{len(unfit)} conditioning tensors have not the shape that {kind} takes", unfit)
    if store.layout != "published":  # there a model may find several tensors packed in one
        lacking = [
            f"{text.file}: {name}" for text in texts for name in layout.required() if name not in text.conditioning
        ]
        if lacking:
            yield Misfit(f"{len(lacking)} conditioning tensors that {kind} takes are not stored", lacking)


def too_short(contents: Contents, lag: int, crop: int | None) -> list[str]:
    """Samples of which, after `crop`, no more than `lag` latent frames are there: file and number."""
    return [f"{s.file}: {f}" for s in contents.seen if (f := min(s.latents[1], crop or s.latents[1])) <= lag]
