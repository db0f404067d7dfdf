"""What of which clips becomes samples: known, with all that is left out and why, before a model is loaded."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from moedistill.data.footage import Crop, Footage, FootageError, probe
from moedistill.data.progress import Progress, Say, silent
from moedistill.data.prompts import read_prompts
from moedistill.data.sizes import buckets, check_lengths, fit, window_length, window_starts
from moedistill.data.sources import Source, is_prompts
from moedistill.data.videos import VideosConfig
from moedistill.errors import UserError, shorten
from moedistill.model.latent_video import LatentVideoConfig
from moedistill.runtime.integrity import Damaged, sum_of

LOOKERS = 4
"""Threads that read files before a plan is made."""


@dataclass(frozen=True)
class Window:
    """A piece of a clip that becomes a sample.

    Args:
        source: the clip's name, for people.
        path: its file.
        sha256: of the file.
        start: its first frame, counted at `fps` from the clip's beginning.
        num_frames, height, width, fps: of the sample.
        crop: which part of the clip stays.
    """

    source: str
    path: str
    sha256: str
    caption: str
    start: int
    num_frames: int
    height: int
    width: int
    fps: float
    crop: Crop


@dataclass(frozen=True)
class Skipped:
    """A clip that is left out."""

    source: str
    reason: str


@dataclass
class SetPlan:
    """What a set will have.

    Attributes:
        what: the clips' place, or that of prompts, for people.
        sources: all clips, in order.
        prompts: of a set of texts alone.
        windows: what of the clips becomes samples.
        skipped: clips that are left out.
        cropped: of each bucket (frames, height, width): which share of its windows' pixels is cut away.
    """

    what: str
    sources: Sequence[Source] = ()
    prompts: Sequence[str] = ()
    windows: list[Window] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    cropped: dict[tuple[int, int, int], list[float]] = field(default_factory=dict)

    def check(self) -> None:
        """UserError where no clip can be used."""
        if not self.windows and not self.prompts:
            raise UserError(f"{self.what}: no clip can be used, of {len(self.sources)}")

    def table(self, sample_bytes: Callable[[int, int, int], int]) -> list[str]:
        """The plan for people.

        Args:
            sample_bytes: of a sample of so many frames, of this height and width.
        """
        if self.prompts:
            return [f"{self.what}: {_many(self.prompts, 'prompt')}"]
        clips = len({window.source for window in self.windows})
        lines = [f"{self.what}: {clips} of {clips + len(self.skipped)} clips make {_many(self.windows, 'sample')}"]
        counts = Counter((window.num_frames, window.height, window.width) for window in self.windows)
        rows = [("length", "size", "samples", "cropped away")]
        for bucket, count in sorted(counts.items()):
            frames, height, width = bucket
            cropped = 100 * sum(self.cropped[bucket]) / count
            rows.append((_many(range(frames), "frame"), f"{height}×{width}", str(count), f"{cropped:.1f} %"))
        if counts:
            widths = [max(len(row[k]) for row in rows) for k in range(4)]
            lines += ["  ".join(["", *(f"{row[k]:>{widths[k]}}" for k in range(4))]) for row in rows]
            seconds = sum(window.num_frames / window.fps for window in self.windows)
            size = sum(sample_bytes(*bucket) * count for bucket, count in counts.items())
            rate = f"{self.windows[0].fps:g} frames per second"
            lines.append(f"  {_duration(seconds)} of video at {rate}, about {size / 1e9:.3g} GB on disk")
        return lines + list(skipped_lines(self.skipped))


def skipped_lines(skipped: Sequence[Skipped], kinds: int = 8) -> Iterator[str]:
    """How many clips are left out, and why: clips with like reasons in one line."""
    if not skipped:
        return
    yield f"  skipped: {_many(skipped, 'clip')}"
    alike: dict[str, list[Skipped]] = {}
    for each in skipped:
        alike.setdefault(re.sub(r"\d+(\.\d+)?", "N", each.reason), []).append(each)
    ranked = sorted(alike.values(), key=len, reverse=True)
    for group in ranked[:kinds]:
        others = f"{len(group)}, such as " if len(group) > 1 else ""
        yield f"    {others}{shorten(group[0].source, 40)}: {shorten(group[0].reason, 160)}"
    if len(ranked) > kinds:
        yield f"    and {sum(map(len, ranked[kinds:]))} more"


def plan_set(
    data: VideosConfig, config: LatentVideoConfig, fps: float, *, without: Collection[Path] = (), say: Say = silent
) -> SetPlan:
    """Which windows of which clips become samples of a model's set; or that prompts do, of a `.txt` file.

    Of clips of equal content the first one counts; in a list, one with another caption is another sample.

    Args:
        fps: of the set.
        without: folders in that of the clips that are none of them.
        say: is told now and then how far it is.

    Raises:
        ValueError: there are no clips, or the model has no videos of `data.lengths`.
    """
    assert data.path is not None
    if is_prompts(data.path):
        return SetPlan(data.path, prompts=read_prompts(data.path))
    lengths = data.lengths or [config.video.num_frames]
    check_lengths(config, lengths)
    sources = data.sources(without)
    plan, first = SetPlan(data.path, sources), dict[tuple[str, str | None], Source]()
    progress = Progress("clips are looked at", len(sources), say)
    pool = ThreadPoolExecutor(LOOKERS)
    try:
        for source, seen in zip(sources, pool.map(lambda source: _look(source, data), sources), strict=True):
            progress.step()
            if isinstance(seen, str):
                plan.skipped.append(Skipped(source.name, seen))
                continue
            same = first.setdefault((seen.sha256, seen.caption if source.listed else None), source)
            if same is not source:
                plan.skipped.append(Skipped(source.name, f"is the same file as {same.name}, which is taken"))
                continue
            try:
                _add(plan, source, seen, data, lengths, fps, buckets(config))
            except ValueError as error:
                plan.skipped.append(Skipped(source.name, str(error)))
    finally:
        pool.shutdown(cancel_futures=True)  # where it is interrupted, nobody waits for the other clips
    return plan


@dataclass(frozen=True)
class _Seen:
    """What is known of a clip by looking at its file."""

    caption: str
    sha256: str
    footage: Footage


def _look(source: Source, data: VideosConfig) -> _Seen | str:
    """A clip; or why it cannot be used."""
    caption = source.caption or data.caption
    if source.fault:
        return source.fault
    try:
        footage = probe(source.path)
        if not caption:
            what = "has no caption" if source.caption is None else "has an empty caption"
            where = "in its list" if source.listed else f"to {source.path.stem}.txt beside it"
            return f"{what}; write one {where}, or give one for all by `caption`"
        return _Seen(caption, sum_of(source.path), footage)
    except (FootageError, Damaged) as error:
        return error.why if isinstance(error, Damaged) else str(error)


def _add(
    plan: SetPlan, source: Source, seen: _Seen, data: VideosConfig, lengths: Sequence[int], fps: float,
    sizes: Sequence[tuple[int, int]],
) -> None:  # fmt: skip
    """Adds a clip's windows; ValueError where it has none."""
    frames = seen.footage.frames(fps)
    length = window_length(frames, lengths)
    fitted = fit(seen.footage.height, seen.footage.width, sizes, upscale=data.upscale)
    bucket = (length, fitted.height, fitted.width)
    for start in window_starts(frames, length, data.windows, data.stride or length):
        plan.windows.append(
            Window(source.name, str(source.path), seen.sha256, seen.caption, start, *bucket, fps, data.crop)
        )
        plan.cropped.setdefault(bucket, []).append(fitted.cropped)


def _duration(seconds: float) -> str:
    size, unit = next((each for each in ((3600, "hours"), (60, "minutes")) if seconds >= each[0]), (1, "seconds"))
    return f"{seconds / size:.3g} {unit}"


def _many(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'s' if len(things) != 1 else ''}"
