"""Looks through a set of stored samples, before any model is loaded: what is in it, and what does not fit a layout."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moedistill.data.latents import SampleError, Store, absent, open_store
from moedistill.data.plausible import Spread
from moedistill.data.storable import LATENTS, bad_numbers
from moedistill.errors import SCREEN_LINES, counted, shorten
from moedistill.model import conditioning
from moedistill.model.layout import SampleLayout, mask_fault

EXAMPLES = 10
"""How many examples are shown of a kind of problem, if there is room on the screen."""
NAMES = 8
"""How many conditioning tensors are listed by name."""
NAMED = 4
"""How many samples are listed by number, of those that one thing is wrong with."""
OF_TEXT = ("text", "mask", "pooled")
"""Roles of what a prompt is encoded to."""
DTYPE_OF = {"mask": torch.bool}
"""By role, where it is not the default's."""

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
    """What is known of a sample without its numbers.

    Attributes:
        file: where its latents lie.
        place: the same, and which sample it is, where many lie in one file.
        latents: their shape (C, T, H, W).
        conditioning: as stored, on the meta device, without a batch dimension.
    """

    index: int
    file: str
    place: str
    latents: Shape
    conditioning: dict[str, Tensor]


@dataclass
class Contents:
    """A set as it was read.

    Attributes:
        seen: of the samples that could be read.
        negative: of the stored negative prompt; None if there is none.
        spread: of the latents' numbers, as far as they were read; None if none were.
        texts: of each text that ought to be padded with zeros, how many that were read end in zeros, do not, or are
            nothing else.
    """

    store: Store
    seen: list[Seen]
    negative: Seen | None
    spread: Spread | None = None
    texts: dict[str, Counter[str]] = field(default_factory=dict)


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
    contents.negative, negative = _read_negative(contents, report, found, layout)
    counts = {"not finite": len(found.not_finite), "missing": len(found.missing), "broken": found.num_broken}
    report.facts.append(("files", ", ".join(f"{count or 'none'} {what}" for what, count in counts.items())))
    report.problems += found.problems()
    report.facts.append(("negative prompt", negative))
    return contents


# -- what is there ----------------------------------------------------------------------------------------------------


@dataclass
class _Found:
    """Where something is wrong, by kind.

    Attributes:
        missing: numbers of samples by their file.
        broken: numbers of samples by their file and what is wrong with it.
    """

    missing: dict[str, list[int]] = field(default_factory=dict)
    broken: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)
    zero: list[str] = field(default_factory=list)
    masked: list[str] = field(default_factory=list)
    odd_masks: list[str] = field(default_factory=list)

    def add_broken(self, error: SampleError, i: int) -> None:
        self.broken.setdefault((str(error.file), error.reason), []).append(i)

    @property
    def num_broken(self) -> int:
        return sum(map(len, self.broken.values()))

    def problems(self) -> list[Misfit]:
        again = "make these samples again, or take them out of the index"
        missing = [f"{file} ({_named(at)})" if len(at) > 1 else file for file, at in self.missing.items()]
        broken = [
            f"{file}: sample {first} {reason}" + (f" (as {_named(others)})" if others else "")
            for (file, reason), (first, *others) in self.broken.items()
        ]
        kinds = [
            (missing, "files are missing: get or make them again, or take their samples out of the index"),
            (self.not_finite, f"numbers are NaN or infinite: {again}"),
            (self.zero, f"latents are all zero, which is no video: {again}"),
            (
                self.masked,
                "text is masked out altogether, which makes the attention of some models NaN: encode it again",
            ),
            (self.odd_masks, "masks are not ones for a text, and zeros for the padding after it: encode it again"),
        ]
        found = [Misfit(f"{len(places)} {message}", places) for places, message in kinds]
        cannot = "samples cannot be read: get or make them again, or take them out of the index"
        found.insert(1, Misfit(f"{self.num_broken} {cannot}", broken))
        return [misfit for misfit in found if misfit.places]


def _named(samples: Sequence[int]) -> str:
    """Numbers of samples, ascending, in few words."""
    first, last = samples[0], samples[-1]
    if len(samples) > NAMED and last - first == len(samples) - 1:
        return f"samples {first} to {last}"
    more = f" and {len(samples) - NAMED} more" if len(samples) > NAMED else ""
    return f"sample{'s' * (len(samples) > 1)} {', '.join(map(str, samples[:NAMED]))}{more}"


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
            for file in gone:
                found.missing.setdefault(file, []).append(i)
            if gone:
                continue
            latents, cond = store.header(i)
            masks.look(store.place(i), cond, found)
        except SampleError as error:
            found.add_broken(error, i)
            continue
        if not cond and caption is None:
            found.broken.setdefault((str(files[0]), "has neither stored text embeddings nor a caption"), []).append(i)
        to_encode += not cond and caption is not None
        for name, value in (cond if store.text_only else {LATENTS: latents, **cond}).items():
            dtypes.setdefault(name, Counter())[str(value.dtype).removeprefix("torch.")] += 1
        contents.seen.append(
            Seen(i, str(files[0]), store.place(i), tuple(latents.shape), conditioning.to(cond, "meta"))
        )
    if store.text_only:
        report.facts.append(("latents", "none: texts alone"))
    else:
        report.facts.append((LATENTS, counted(Counter(str(list(sample.latents)) for sample in contents.seen))))
        report.facts.append(("latent frames", counted(Counter(sample.latents[1] for sample in contents.seen))))
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
        self._layout = layout
        self._names = set(store.masks if layout is None else layout.of_role("mask"))

    def look(self, file: str, cond: Mapping[str, Tensor], found: _Found) -> None:
        """Reads the masks among these tensors, which are small, and notes what is wrong with them."""
        for name, mask in cond.items():
            guessed = self._layout is None and mask.dtype == torch.bool  # no tensor of these is anything else
            if mask.ndim != 1 or not (name in self._names or guessed):
                continue
            self.lengths.setdefault(name, []).append(int(mask.count_nonzero()))
            empty = self._layout is not None and self._layout.conditioning[name].may_be_empty
            if fault := mask_fault(mask[None], may_be_empty=empty):
                if mask.any():
                    found.odd_masks.append(f"{file}: {name} {fault[1]}")
                else:
                    found.masked.append(f"{file}: {name}")


def _read_numbers(contents: Contents, found: _Found, layout: SampleLayout | None, numbers: int | None) -> None:
    """Reads samples: what is no number, all zero, or not padded as it should be, and how the latents are spread."""
    seen = contents.seen
    chosen = range(len(seen)) if numbers is None else sorted({len(seen) * k // numbers for k in range(numbers)})
    for sample in [seen[k] for k in chosen if k < len(seen)]:
        try:
            latents, cond = contents.store.read(sample.index)
        except SampleError as error:
            found.add_broken(error, sample.index)
            continue
        bad = dict(bad_numbers({LATENTS: latents, **cond}))
        for name, reason in bad.items():
            (found.zero if "zero" in reason else found.not_finite).append(f"{sample.place}: {name}")
        if not bad:
            contents.spread = contents.spread or Spread(layout.channels if layout is not None else len(latents))
            contents.spread.add(latents)
        _look_at_padding(contents, cond, layout)


def _look_at_padding(contents: Contents, cond: Mapping[str, Tensor], layout: SampleLayout | None) -> None:
    for name, each in layout.conditioning.items() if layout is not None else ():
        if each.padded and name in cond and cond[name].ndim == len(each.shape):
            text = cond[name]
            kind = "empty" if not text.any() else "padded"
            if kind == "padded" and len(text) == each.shape[0] and text[-1].any():
                kind = "unpadded"
            contents.texts.setdefault(name, Counter())[kind] += 1


def _facts(
    seen: Sequence[Seen], dtypes: Mapping[str, Counter[str]], lengths: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, str]]:
    names = list(dict.fromkeys(name for sample in seen for name in sample.conditioning))
    for name in names[:NAMES]:
        shapes = Counter(str(list(sample.conditioning[name].shape)) for sample in seen if name in sample.conditioning)
        yield shorten(name, 30), counted(shapes)
    if len(names) > NAMES:
        yield "other tensors", f"{len(names) - NAMES} more names"
    for name, numbers in lengths.items():
        yield "text length", f"{min(numbers)} to {max(numbers)} by {name}, mean {sum(numbers) / len(numbers):.0f}"
    kinds = {shorten(name, 30): " and ".join(sorted(kinds)) for name, kinds in dtypes.items()}
    yield "dtypes", ", ".join(f"{name} {kind}" for name, kind in list(kinds.items())[: NAMES + 1]) or "none"


def _read_negative(
    contents: Contents, report: Report, found: _Found, layout: SampleLayout | None
) -> tuple[Seen | None, str]:
    """The stored negative prompt, and what there is to say of it."""
    store = contents.store
    try:
        stored = store.negative()
    except SampleError as error:
        message = "the negative prompt's conditioning cannot be read: make it again, or set negative to null"
        report.problems.append(Misfit(message, [f"{error.file}: {error.reason}"]))
        return None, "cannot be read"
    if stored is None:
        return None, "not stored"
    file = str(store.negative_file())
    broken = [f"{file}: {name}" for name, reason in bad_numbers(stored) if "zero" not in reason]
    if broken:
        report.problems.append(Misfit("the negative prompt's conditioning is NaN or infinite: make it again", broken))
    _Masks(store, layout).look(file, stored, found)
    _look_at_padding(contents, stored, layout)
    return Seen(-1, file, file, (), conditioning.to(stored, "meta")), "stored"


def check_batches(
    contents: Contents,
    report: Report,
    *,
    batched: bool,
    unpack: Unpack = dict,
    layout: SampleLayout | None = None,
    needs_negative: bool = False,
) -> None:
    """Samples of one latent shape are batched, so all their conditioning must be equal in shape, as the negative's.

    Args:
        batched: whether more than one sample is trained on at once; else unequal samples are but a note.
        unpack: what the model makes of stored conditioning.
        layout: what it makes of a caption; None where that is not known.
        needs_negative: whether a negative prompt is encoded where none is stored.
    """
    encoded = _shapes(encoded_text(layout)) if layout is not None else {}
    shapes = {s.index: _shapes(_unpacked(unpack, s.conditioning)) if s.conditioning else encoded for s in contents.seen}
    negative = encoded if needs_negative else {}
    if contents.negative is not None:
        negative = _shapes(_unpacked(unpack, contents.negative.conditioning))
    kept = {name for name, each in layout.conditioning.items() if not each.droppable} if layout is not None else set()
    unequal = [
        f"{sample.place}: {name} {list(shape)}, not {list(negative[name])}"
        for sample in contents.seen
        for name, shape in shapes[sample.index].items()
        if name in negative and negative[name] != shape and name not in kept
    ]
    if unequal:
        which = "stored" if contents.negative is not None else "encoded"
        message = f"{len(unequal)} times the {which} negative prompt has another shape: encode both alike"
        report.problems.append(Misfit(message, unequal))
    first: dict[Shape, Seen] = {}
    different = []
    for sample in (sample for sample in contents.seen if shapes[sample.index]):
        other = first.setdefault(sample.latents, sample)
        mine, theirs = shapes[sample.index], shapes[other.index]
        if mine != theirs:
            different.append(f"{sample.place}: {_listed(mine)}; {Path(other.place).name}: {_listed(theirs)}")
    if not different:
        return
    names = {frozenset(shapes[sample.index]) for sample in contents.seen if shapes[sample.index]}
    way = "pad all texts to the same length" if len(names) == 1 else "give all samples the same tensors, zeros for none"
    message = f"samples have the latent shape, but not the conditioning of others: {way}"
    if batched:
        report.problems.append(Misfit(f"{len(different)} {message}", different))
    else:
        report.notes.append(f"{len(different)} {message}, or train with one sample at a time; {different[0]}")


def _listed(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(f"{shorten(name, 60)} {list(shape)}" for name, shape in shapes.items())


def _shapes(batch: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(value.shape[1:]) for name, value in batch.items()}


# -- what a model needs ------------------------------------------------------------------------------------------------


def _unpacked(unpack: Unpack, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What a model makes of stored conditioning, batch first; what is stored, where it makes nothing of it."""
    batch = {name: value[None] for name, value in stored.items()}
    try:
        return unpack(batch)
    except (KeyError, IndexError, ValueError, RuntimeError, TypeError):  # tensors of shapes that it does not expect
        return batch


def encoded_text(layout: SampleLayout) -> dict[str, Tensor]:
    """What a prompt is encoded to, batch first, on the meta device."""
    of_text = {name: each for name, each in layout.conditioning.items() if each.role in OF_TEXT and each.required}
    return {
        name: torch.empty(1, *(size or 0 for size in each.shape), dtype=DTYPE_OF.get(each.role), device="meta")
        for name, each in of_text.items()
    }


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
    encoded = encoded_text(layout)
    for sample in contents.seen:
        cond = _unpacked(unpack, sample.conditioning) if sample.conditioning else encoded
        problems = [*layout.latent_problems(sample.latents), *layout.conditioning_problems(cond, sample.latents)]
        unfit += [f"{sample.file}: sample {sample.index} {problem}" for problem in problems]
        frames, *size = sample.latents[1:]
        grids = [[min(frames, crop or frames), *size] for crop in crops]
        odd += [f"{sample.place}: {grid}" for grid in {grid[0]: grid for grid in grids}.values() if grid[0] % step]
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
    return [f"{s.place}: {f}" for s in contents.seen if (f := min(s.latents[1], crop or s.latents[1])) <= lag]
