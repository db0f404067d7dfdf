"""From clips to a set of latents: encoded piece by piece (see `pieces`), and packed at the end.

A piece is what one model makes of one thing: the VAE of a window, an image encoder of a window's frames, the text
encoders of a caption; one model after the other, so that one alone is in memory. What comes out is a function of clips,
captions and models: how many processes have made it, and how often they were killed, leaves no trace. For that each
video is encoded on its own, as what rounding depends on is the batch.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moedistill.data.footage import Footage, FootageError, probe, read_frames
from moedistill.data.latents import open_store
from moedistill.data.pieces import Pieces, key_of
from moedistill.data.progress import Progress, Say
from moedistill.data.prompts import read_prompts
from moedistill.data.sources import Source
from moedistill.data.storable import LATENTS, bad_numbers
from moedistill.data.videos import VideosConfig
from moedistill.data.windows import SetPlan, Skipped, Window, plan_windows
from moedistill.data.writing import INDEX, OWN_NAME, Item, write_set
from moedistill.errors import UserError
from moedistill.model.backbone import VideoSize
from moedistill.model.latent_video import LatentVideoBackbone
from moedistill.runtime.checkpoint import write_text
from moedistill.runtime.reading import LARGEST_INDEX, read_text
from moedistill.runtime.writing import disk_errors

SKIPPED = "skipped.jsonl"
VERSION = 1
"""Of how clips become tensors: what is of another is made again."""
AHEAD = 2
"""Windows that are decoded while others are encoded."""

ENCODERS = {"latents": "vae", "images": "images", "text": "text", "negative": "text"}
"""By the part of a sample that a piece is: what makes it, by its name in `Backbone.revisions`."""

Task = tuple[str, Any]
"""A piece to make: its key, and of what."""


@dataclass(frozen=True)
class Encoded:
    """What an encoding left in its folder.

    Attributes:
        samples: how many the set has.
        made, kept: pieces that were made now, and those that were there.
        skipped: clips that were left out.
    """

    samples: int
    made: int
    kept: int
    skipped: list[Skipped]


@dataclass(frozen=True)
class _Wanted:
    """A sample to be: what the index says of it, whose it is, and its pieces by part."""

    entry: dict[str, Any]
    source: str
    pieces: dict[str, str]


class Encoding:
    """A set on its way.

    Args:
        data: the clips, or prompts (a `.txt` file), and how they become samples.
        backbone: what encodes; its networks are not called, and may be without weights.
        folder: the set's.
        made_for: what else the index shall say that the set was made for.
        say: is told now and then how far it is.

    Attributes:
        plan: which windows of which clips become samples; of prompts it is empty.

    Raises:
        ValueError: there are no clips, or the model has no videos of these lengths.
        UserError: the folder holds something else.
    """

    def __init__(
        self, data: VideosConfig, backbone: LatentVideoBackbone, folder: Path, made_for: Mapping[str, Any], say: Say
    ) -> None:
        self.folder, self._backbone, self._pieces, self._say = folder, backbone, Pieces(folder), say
        self._revisions = backbone.revisions()
        self._old = _OldSet(folder, self._revisions)
        self._places: dict[str, int] = {}
        """Of the clips in their list."""
        self._made_for = {**made_for, "fps": backbone.fps, "revisions": self._revisions}
        self._of: dict[str, dict[str, Any]] = {part: {} for part in ENCODERS}
        """By part and key: of what a piece is made."""
        assert data.path is not None
        self.plan = SetPlan(data.path)
        if is_prompts(data.path):
            self._wanted = [self._prompt(text) for text in read_prompts(data.path)]
        else:
            sources = data.sources([folder])
            self._places = {source.name: place for place, source in enumerate(sources)}
            self._made_for["of"] = _of_what(sources, _how(data, backbone))
            self.plan = plan_windows(data, backbone.config, backbone.fps, sources, say)
            self._wanted = [self._sample(window) for window in self.plan.windows]
        self._negative = self._piece("negative", backbone.config.guidance.negative_prompt)

    def table(self) -> list[str]:
        """What the set will have, and what is left out, for people."""
        if not self.plan.windows and self._wanted:
            return [f"{self.plan.what}: {len(self._wanted)} prompts"]
        sizes = {(each.num_frames, each.height, each.width) for each in self.plan.windows}
        return self.plan.table({size: _sample_bytes(self._backbone, *size) for size in sizes})

    def check(self) -> None:
        """UserError where no clip can be used."""
        if not self._wanted:
            raise UserError(f"{self.plan.what}: no clip can be used, of {len(self._places)}")

    def run(self, share_out: Callable[[], None] | None = None) -> Encoded:
        """Makes the pieces that are not there, and packs all of them.

        Args:
            share_out: has `make_pieces` called in other processes instead; it comes back when all of them are done.

        Raises:
            UserError: no clip can be used; `skipped.jsonl` says why.
        """
        self._pieces.make_folder()
        todo = {part: [key for key in of if not self._has(key)] for part, of in self._of.items()}
        wanted, left = sum(map(len, self._of.values())), sum(map(len, todo.values()))
        if self._wanted and left:
            self._pieces.write_plan({part: [(key, self._of[part][key]) for key in keys] for part, keys in todo.items()})
            if share_out is None:
                make_pieces(self._backbone, self.folder, self._say)
            else:
                share_out()
        return self._pack(made=left, kept=wanted - left)

    # -- what is wanted -----------------------------------------------------------------------------------------------

    def _piece(self, part: str, of: Any) -> str:
        """The key of a piece, which is wanted from here on."""
        key = key_of(VERSION, part, _content(of), self._revisions.get(ENCODERS[part], ""))
        self._of[part][key] = _plain(of)
        return key

    def _sample(self, window: Window) -> _Wanted:
        pieces = {"latents": self._piece("latents", window), "text": self._piece("text", window.caption)}
        if self._backbone.image_frames:
            pieces["images"] = self._piece("images", window)
        entry = {name: value for name, value in asdict(window).items() if name != "path"}
        return _Wanted(entry, window.source, pieces)

    def _prompt(self, text: str) -> _Wanted:
        channels, _, height, width = self._backbone.latent_shape()
        entry = {"caption": text, "shape": [channels, 0, height, width]}
        return _Wanted(entry, text, {"text": self._piece("text", text)})

    def _has(self, key: str) -> bool:
        return key in self._old or key in self._pieces

    # -- the set ------------------------------------------------------------------------------------------------------

    def _pack(self, made: int, kept: int) -> Encoded:
        """Writes the set of all samples whose pieces are there; then the pieces are not needed any more."""
        failed = {key: why for of in self._of.values() for key in of if (why := self._pieces.failure(key)) is not None}
        skipped, whole = list(self.plan.skipped), []
        for wanted in self._wanted:
            why = next((failed[key] for key in wanted.pieces.values() if key in failed), None)
            if why is None:
                whole.append(wanted)
            else:
                skipped.append(Skipped(wanted.source, why))
        skipped.sort(key=lambda each: self._places.get(each.source, 0))
        lines = [json.dumps(asdict(each), ensure_ascii=False) for each in dict.fromkeys(skipped)]
        write_text(self.folder / SKIPPED, "".join(f"{line}\n" for line in lines))
        if not whole:
            raise UserError(
                f"{self.plan.what}: no clip can be used, of {len(self._places)}; {self.folder / SKIPPED} says why"
            )
        items = [Item({**wanted.entry, "pieces": wanted.pieces}, partial(self._load, wanted)) for wanted in whole]
        names = {part: sorted(self._read(key)) for part, key in whole[0].pieces.items()}
        made_for = {**self._made_for, "parts": names, "negative": self._negative}
        write_set(self.folder, items, negative=self._read(self._negative), made_for=made_for)
        self._pieces.remove()
        return Encoded(len(whole), made - len(failed), kept, skipped)

    def _load(self, wanted: _Wanted) -> dict[str, Tensor]:
        return {name: value for key in wanted.pieces.values() for name, value in self._read(key).items()}

    def _read(self, key: str) -> dict[str, Tensor]:
        return self._pieces.read(key) if key in self._pieces else self._old.read(key)


def is_prompts(path: str | Path) -> bool:
    """Whether this is a file of prompts, not of clips."""
    path = Path(path).expanduser()
    return path.suffix.lower() == ".txt" and path.is_file()


def default_folder(data: VideosConfig, backbone: LatentVideoBackbone) -> Path:
    """Where a set lies if nobody says it: beside the clips, named by the model, its size, and a hash of what encodes
    and how.
    """
    assert data.path is not None
    path, video = Path(data.path).expanduser(), backbone.config.video
    size = f"{video.num_frames}x{video.height}x{video.width}"
    name = path.name if path.is_dir() else path.stem
    return path.parent / f"{name}-{backbone.config.kind}-{size}-{_how(data, backbone)[:8]}"


def is_current(data: VideosConfig, backbone: LatentVideoBackbone, folder: Path) -> bool:
    """Whether `folder` holds the set of these clips, captions, options and models, as far as can be told without
    reading the clips: by their names and sizes.
    """
    if not (folder / INDEX).is_file():
        return False
    index = json.loads(read_text(folder / INDEX, LARGEST_INDEX))
    return bool(index.get("made_for", {}).get("of") == _of_what(data.sources([folder]), _how(data, backbone)))


def _how(data: VideosConfig, backbone: LatentVideoBackbone) -> str:
    """A hash of what encodes, and of how clips become samples."""
    where = ("path", "cache", "text_dropout")
    options = {name: value for name, value in asdict(data).items() if name not in where}
    lengths, negative = data.lengths or [backbone.config.video.num_frames], backbone.config.guidance.negative_prompt
    size = backbone.config.video.height, backbone.config.video.width
    return key_of(VERSION, options, lengths, size, backbone.fps, negative, backbone.revisions())


def _of_what(sources: Sequence[Source], how: str) -> str:
    sizes = [source.path.stat().st_size if source.path.is_file() else 0 for source in sources]
    return key_of(how, [(source.name, source.caption, size) for source, size in zip(sources, sizes, strict=True)])


def _plain(of: Any) -> Any:
    return asdict(of) if isinstance(of, Window) else of


def _content(of: Any) -> Any:
    """What a piece depends on: not on a clip's name and place."""
    named = ("source", "path", "caption")
    return {k: v for k, v in asdict(of).items() if k not in named} if isinstance(of, Window) else of


def _sample_bytes(backbone: LatentVideoBackbone, num_frames: int, height: int, width: int) -> int:
    """About what a sample takes on the disk; text may be shorter."""
    channels, *grid = backbone.latent_shape(VideoSize(num_frames=num_frames, height=height, width=width))
    total = channels * prod(grid) * (getattr(backbone.config, "vae_dtype", None) or backbone.dtype).itemsize
    for each in backbone.config.inputs().values():
        shape = (each.shape[0] or 1, *grid) if each.role == "video" else each.shape
        total += prod(n or 1 for n in shape) * backbone.dtype.itemsize
    return total


class _OldSet:
    """The pieces of a set that is there already.

    Raises:
        UserError: the folder holds something else, or a set of another model.
    """

    def __init__(self, folder: Path, revisions: Mapping[str, str]) -> None:
        self._where: dict[str, tuple[int | None, list[str] | None]] = {}
        """By key: the number of a sample, and which of its tensors; None for the negative prompt."""
        if not (folder / INDEX).exists():
            _refuse_others(folder)
            return
        self._store = open_store(folder)
        index = json.loads(read_text(folder / INDEX, LARGEST_INDEX))
        made_for = index.get("made_for") if isinstance(index, dict) else None
        if not isinstance(made_for, dict) or "parts" not in made_for:
            raise UserError(f"{folder} holds a set that was made otherwise; choose another folder")
        if made_for["revisions"].get("vae") != revisions.get("vae"):
            raise UserError(
                f"{folder} holds a set that another VAE has made; choose another folder, or remove that set"
            )
        for number, entry in enumerate(index["samples"]):
            for part, key in entry["pieces"].items():
                self._where.setdefault(key, (number, made_for["parts"][part]))
        self._where[made_for["negative"]] = (None, None)

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def read(self, key: str) -> dict[str, Tensor]:
        number, names = self._where[key]
        if number is None or names is None:
            return dict(self._store.negative() or {})
        latents, cond = self._store.read(number)
        tensors = {LATENTS: latents, **cond}
        return {name: tensors[name] for name in names}


def _refuse_others(folder: Path) -> None:
    """UserError where a folder without a set holds what is none of a set's files."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another place for the set")
    with disk_errors(folder):
        names = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    others = [name for name in names if name != SKIPPED and not OWN_NAME.fullmatch(name)]
    if others:
        raise UserError(f"{folder} is not empty, and holds no set ({', '.join(others[:3])}); choose another place")


# -- pieces -----------------------------------------------------------------------------------------------------------


def make_pieces(backbone: LatentVideoBackbone, folder: Path, say: Say, process: int = 0, processes: int = 1) -> None:
    """Makes a process's share of the pieces that `Encoding.run` has planned for the set in `folder`.

    One model after the other, so that one alone is in memory. What cannot be decoded is noted.

    Raises:
        ValueError: a model is not there, or does not take a caption.
    """
    pieces = Pieces(folder)
    todo: dict[str, list[Task]] = {part: tasks[process::processes] for part, tasks in pieces.read_plan().items()}
    progress = Progress("pieces are encoded", sum(map(len, todo.values())), say)
    if todo["latents"]:
        with backbone.encoding_videos():
            _of_windows(todo["latents"], range(0), _latents(backbone), pieces, progress)
    if todo["images"]:
        with backbone.encoding_images():
            _of_windows(todo["images"], backbone.image_frames, _images(backbone), pieces, progress)
    texts = [text for _, text in todo["text"]]
    for (key, _), cond in zip(todo["text"], backbone.encode_each(texts) if texts else (), strict=True):
        pieces.write(key, cond)
        progress.step()
    for key, text in todo["negative"]:
        pieces.write(key, {name: value[0] for name, value in backbone.encode_negative(text).items()})


def _of_windows(
    tasks: Sequence[Task],
    places: Sequence[int],
    make: Callable[[Tensor], Mapping[str, Tensor]],
    pieces: Pieces,
    progress: Progress,
) -> None:
    """Makes pieces of windows, or of the frames at `places` of them, and notes which clips cannot be decoded."""
    reader = _Reader(places)
    for (key, _), pixels in _ahead(reader.read, tasks):
        try:
            tensors = make(pixels.result())
            for name, fault in bad_numbers(tensors):
                raise FootageError(f"became {name} that are {fault}")
            pieces.write(key, {name: _narrowed(value) for name, value in tensors.items()})
        except FootageError as error:
            pieces.fail(key, str(error))
        progress.step()


def _latents(backbone: LatentVideoBackbone) -> Callable[[Tensor], Mapping[str, Tensor]]:
    def make(video: Tensor) -> Mapping[str, Tensor]:
        made = {LATENTS: backbone.encode_videos(video), **backbone.given_frames(video)}
        return {name: value[0] for name, value in made.items()}

    return make


def _images(backbone: LatentVideoBackbone) -> Callable[[Tensor], Mapping[str, Tensor]]:
    return lambda frames: {name: value[0] for name, value in backbone.encode_images(frames).items()}


def _narrowed(value: Tensor) -> Tensor:
    """The same numbers in the shortest type that holds all of them: those of a VAE in bfloat16 come as float32."""
    if value.dtype != torch.float32:
        return value
    shorter = (value.to(dtype) for dtype in (torch.bfloat16, torch.float16))
    return next((one for one in shorter if torch.equal(one.float(), value)), value)


class _Reader:
    """Reads windows, one after the other, of which several may be of one clip.

    Args:
        places: of the frames that are wanted of each window; all of them if there are none.
    """

    def __init__(self, places: Sequence[int]) -> None:
        self._places = places
        self._last: tuple[str, Footage] | None = None

    def read(self, task: Task) -> Tensor:
        """Pixels `[1, 3, T, H, W]` in [0, 1]; FootageError where the clip cannot be decoded."""
        window = Window(**task[1])
        if self._last is None or self._last[0] != window.path:
            self._last = window.path, probe(Path(window.path))
        frames = [place % window.num_frames for place in self._places]
        parts = [(window.start + frame, 1) for frame in frames] or [(window.start, window.num_frames)]
        pixels = [
            read_frames(
                self._last[1], (window.height, window.width), num_frames=count, fps=window.fps,
                start=first / window.fps, crop=window.crop,
            )
            for first, count in parts
        ]  # fmt: skip
        return torch.cat(pixels, 1)[None].float() / 255


def _ahead(make: Callable[[Task], Tensor], tasks: Iterable[Task]) -> Iterator[tuple[Task, "Future[Tensor]"]]:
    """Tasks in order, each with what is made of it in a thread, `AHEAD` of them before they are asked for."""
    with ThreadPoolExecutor(1) as pool:
        coming: deque[tuple[Task, Future[Tensor]]] = deque()
        for task in tasks:
            coming.append((task, pool.submit(make, task)))
            if len(coming) > AHEAD:
                yield coming.popleft()
        yield from coming
