"""Looks through a set of stored samples, before any model is loaded: what is in it, and what does not fit a layout."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moedistill.data.latents import LATENTS, SampleError, Store, absent, bad_numbers, open_store
from moedistill.data.plausible import Spread
from moedistill.errors import SCREEN_LINES, counted, shorten
from moedistill.model.layout import SampleLayout

EXAMPLES = 10
"""How many examples are shown of a kind of problem, if there is room on the screen."""
NAMES = 8
"""How many conditioning tensors are listed by name."""
OF_TEXT = ("text", "mask", "pooled")
"""Roles of what a prompt is encoded to."""

Shape = tuple[int, ...]
Unpack = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


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
        warnings: what a run would use, though it is likely wrong.
        notes: what one may want to know.
    """

    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    problems: list[Misfit] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
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
        lines += [f"warning: {warning}" for warning in self.warnings]
        return lines + self.problem_lines(SCREEN_LINES - 1 - len(lines))

    def problem_lines(self, room: int) -> list[str]:
        """The problems as text, if need be with fewer examples, so that they fit into `room` lines."""
        lines: list[str] = []
        # Each kind has a line for itself and one for what is left out; the prompt wants one too.
        room -= 2 * len(self.problems)
        shown = min(EXAMPLES, max(1, room // max(1, len(self.problems))))
        for problem in self.problems:
            lines.append(f"problem: {problem.message}")
            lines += [f"    {shorten(place, 160)}" for place in problem.places[:shown]]
            if len(problem.places) > shown:
                lines.append(f"    … and {len(problem.places) - shown} more")
        return lines


@dataclass
class Seen:
    """What is known of a sample without its numbers: of its latents and of its conditioning, as stored, the shapes."""

    index: int
    file: str
    latents: Shape
    conditioning: dict[str, Shape]


@dataclass
class Contents:
    """A set as it was read.

    Attributes:
        seen: of the samples that could be read.
        negative: of the stored negative prompt; None if there is none.
        spread: of the latents' numbers, as far as they were read; None if none were.
        unpadded: samples whose text of full length does not end in zeros, by name of the text.
        padded: how many do, by name of the text.
    """

    store: Store
    seen: list[Seen]
    negative: Seen | None
    spread: Spread | None = None
    unpadded: dict[str, list[str]] = field(default_factory=dict)
    padded: Counter[str] = field(default_factory=Counter)


def read_set(
    path: str | Path, report: Report, layout: SampleLayout | None = None, numbers: int | None = None
) -> Contents | None:
    """Looks at every sample of the set at `path`; None where there is no set.

    Args:
        layout: says what is a mask, and what is padded.
        numbers: of how many samples the numbers are read, evenly spread over the set; None for all.
    """
    try:
        store = open_store(path)
    except ValueError as error:
        report.problems.append(Misfit(str(error), []))
        return None
    report.title = f"{path}: {len(store)} samples, {store.layout} layout"
    contents = Contents(store, [], None)
    found = _Found()
    _read_headers(contents, report, found, layout)
    _read_numbers(contents, found, layout, numbers)
    counts = {"not finite": found.not_finite, "missing": found.missing, "broken": found.broken}
    report.facts.append(("files", ", ".join(f"{len(places) or 'none'} {what}" for what, places in counts.items())))
    report.problems += found.problems()
    contents.negative = _read_negative(store, report)
    return contents


# -- what is there ----------------------------------------------------------------------------------------------------


@dataclass
class _Found:
    """Where something is wrong, by kind."""

    missing: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)
    zero: list[str] = field(default_factory=list)
    masked: list[str] = field(default_factory=list)

    def problems(self) -> list[Misfit]:
        again = "make these samples again, or take them out of the index"
        kinds = [
            (self.missing, "files are missing: get or make them again, or take their samples out of the index"),
            (self.broken, "samples cannot be read: get or make them again, or take them out of the index"),
            (self.not_finite, f"numbers are NaN or infinite: {again}"),
            (self.zero, f"latents are all zero, which is no video: {again}"),
            (
                self.masked,
                "text is masked out altogether, which makes the attention of some models NaN: encode it again",
            ),
        ]
        return [Misfit(f"{len(places)} {message}", places) for places, message in kinds if places]


def _read_headers(contents: Contents, report: Report, found: _Found, layout: SampleLayout | None) -> None:
    """Shapes and dtypes of all samples, and their masks, which are small: the facts, and what is missing or broken."""
    store, dtypes = contents.store, dict[str, Counter[str]]()
    masks = _Masks(store, layout)
    captions = to_encode = 0
    for i in range(len(store)):
        try:
            caption, files = store.caption(i), store.files(i)
            captions += caption is not None
            gone = [str(file) for file in files if absent(file)]
            found.missing += gone
            if gone:
                continue
            latents, cond = store.header(i)
            found.masked += masks.read(i, str(files[0]), cond)
        except SampleError as error:
            found.broken.append(f"{error.file}: sample {i} {error.reason}")
            continue
        if not cond and caption is None:
            found.broken.append(f"{files[0]}: has neither stored text embeddings nor a caption")
        to_encode += not cond and caption is not None
        for name, value in {LATENTS: latents, **cond}.items():
            dtypes.setdefault(name, Counter())[str(value.dtype).removeprefix("torch.")] += 1
        shapes = {name: tuple(value.shape) for name, value in cond.items()}
        contents.seen.append(Seen(i, str(files[0]), tuple(latents.shape), shapes))
    report.facts += _facts(contents.seen, dtypes, masks.lengths)
    report.facts.append(("captions", f"{captions}; {to_encode} samples have nothing else"))
    if to_encode:
        report.notes.append(
            f"{to_encode} of {len(store)} samples have a caption only: it will be encoded with the model's text encoder"
        )


class _Masks:
    """The lengths of all texts, told by masks."""

    def __init__(self, store: Store, layout: SampleLayout | None) -> None:
        self.lengths: dict[str, list[int]] = {}
        self._store = store
        self._names = set(store.masks if layout is None else layout.of_role("mask"))
        given = layout.conditioning.items() if layout is not None else ()
        self._may_be_empty = {name for name, each in given if each.may_be_empty}

    def read(self, i: int, file: str, cond: Mapping[str, Tensor]) -> list[str]:
        """Reads a sample's masks; gives those that are empty and may not be, for people."""
        empty = []
        for name, header in cond.items():
            if name in self._names or header.dtype == torch.bool:  # no tensor of these is anything else
                length = int(self._store.read_conditioning(i, name).count_nonzero())
                self.lengths.setdefault(name, []).append(length)
                if length == 0 and name not in self._may_be_empty:
                    empty.append(f"{file}: {name}")
        return empty


def _read_numbers(contents: Contents, found: _Found, layout: SampleLayout | None, numbers: int | None) -> None:
    """Reads samples: what is no number, all zero, or not padded as it should be, and how the latents are spread."""
    seen, padded = contents.seen, {}
    if layout is not None:
        padded = {name: each.shape[0] for name, each in layout.conditioning.items() if each.padded}
    chosen = range(len(seen)) if numbers is None else sorted({len(seen) * k // numbers for k in range(numbers)})
    for sample in [seen[k] for k in chosen if k < len(seen)]:
        try:
            latents, cond = contents.store.read(sample.index)
        except SampleError as error:
            found.broken.append(f"{error.file}: sample {sample.index} {error.reason}")
            continue
        bad = dict(bad_numbers({LATENTS: latents, **cond}))
        for name, reason in bad.items():
            (found.zero if "zero" in reason else found.not_finite).append(f"{sample.file}: {name}")
        if not bad:
            contents.spread = contents.spread or Spread(layout.channels if layout is not None else len(latents))
            contents.spread.add(latents)
        for name, length in padded.items():
            if name in cond and len(cond[name]) == length:
                if cond[name][-1].any():
                    contents.unpadded.setdefault(name, []).append(sample.file)
                else:
                    contents.padded[name] += 1


def _facts(
    seen: Sequence[Seen], dtypes: Mapping[str, Counter[str]], lengths: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, str]]:
    yield "latents", counted(Counter(str(list(sample.latents)) for sample in seen))
    yield "latent frames", counted(Counter(sample.latents[1] for sample in seen))
    names = list(dict.fromkeys(name for sample in seen for name in sample.conditioning))
    for name in names[:NAMES]:
        yield (
            shorten(name, 30),
            counted(Counter(str(list(s.conditioning[name])) for s in seen if name in s.conditioning)),
        )
    if len(names) > NAMES:
        yield "other tensors", f"{len(names) - NAMES} more names"
    for name, numbers in lengths.items():
        yield "text length", f"{min(numbers)} to {max(numbers)} by {name}, mean {sum(numbers) / len(numbers):.0f}"
    kinds = {shorten(name, 30): " and ".join(sorted(kinds)) for name, kinds in dtypes.items()}
    yield "dtypes", ", ".join(f"{name} {kind}" for name, kind in list(kinds.items())[: NAMES + 1]) or "none"


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
    broken = [f"{file}: {name}" for name, reason in bad_numbers(stored) if "zero" not in reason]
    if broken:
        report.problems.append(Misfit("the negative prompt's conditioning is NaN or infinite: make it again", broken))
    return Seen(-1, file, (), {name: tuple(value.shape) for name, value in stored.items()})


def check_batches(contents: Contents, report: Report, *, batched: bool, unpack: Unpack = dict) -> None:
    """Samples of one latent shape are batched, so all their conditioning must be equal in shape, as the negative's.

    Args:
        batched: whether more than one sample is trained on at once; else unequal samples are but a note.
        unpack: what the model makes of stored conditioning, of which the negative's shapes must be equal.
    """
    seen, negative = contents.seen, contents.negative
    if negative is not None:
        stored = _unpacked(unpack, negative.conditioning)
        unequal = [
            f"{sample.file}: {name} {list(shape)}, not {list(stored[name])}"
            for sample in seen
            for name, shape in _unpacked(unpack, sample.conditioning).items()
            if name in stored and stored[name] != shape
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
    return ", ".join(f"{shorten(name, 60)} {list(shape)}" for name, shape in conditioning.items())


# -- what a model needs ------------------------------------------------------------------------------------------------


def _unpacked(unpack: Unpack, stored: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes of what a model makes of stored conditioning; of what is stored, where it makes nothing of it."""
    tensors = {name: torch.empty(1, *shape, device="meta") for name, shape in stored.items()}
    try:
        return {name: tuple(value.shape[1:]) for name, value in unpack(tensors).items()}
    except (KeyError, IndexError, ValueError, RuntimeError, TypeError):  # tensors of shapes that it does not expect
        return dict(stored)


def layout_problems(
    contents: Contents,
    layout: SampleLayout,
    kind: str,
    unpack: Unpack = dict,
    crops: Sequence[int | None] = (None,),
) -> Iterator[Misfit]:
    """What does not fit the layout of a backbone `kind`, which makes of stored conditioning what `unpack` does, where
    stages take the first `crops` latent frames, or all.
    """
    step, unfit, odd = layout.multiple[0], [], []
    # Of a caption alone, which is encoded as the model takes it.
    of_text = {name: each.shape for name, each in layout.conditioning.items() if each.role in OF_TEXT}
    encoded = {name: tuple(size or 0 for size in shape) for name, shape in of_text.items()}
    for sample in contents.seen:
        shapes = _unpacked(unpack, sample.conditioning) if sample.conditioning else encoded
        problems = [*layout.latent_problems(sample.latents), *layout.conditioning_problems(shapes, sample.latents)]
        unfit += [f"{sample.file}: sample {sample.index} {problem}" for problem in problems]
        frames, *size = sample.latents[1:]
        grids = [[min(frames, crop or frames), *size] for crop in crops]
        odd += [f"{sample.file}: {grid}" for grid in {grid[0]: grid for grid in grids}.values() if grid[0] % step]
    if (negative := contents.negative) is not None:
        problems = [*layout.conditioning_problems(_unpacked(unpack, negative.conditioning))]
        unfit += [f"{negative.file}: the negative prompt {problem}" for problem in problems]
    if unfit:
        yield Misfit(f"{len(unfit)} times a sample is not as {kind} takes it", unfit)
    if odd:
        rule = f"(T, H, W), after latent_frames, must be multiples of {layout.multiple}"
        yield Misfit(f"{len(odd)} latents do not fit {kind}: {rule}", odd)


def too_short(contents: Contents, lag: int, crop: int | None) -> list[str]:
    """Samples of which, after `crop`, no more than `lag` latent frames are there: file and number."""
    return [f"{s.file}: {f}" for s in contents.seen if (f := min(s.latents[1], crop or s.latents[1])) <= lag]
