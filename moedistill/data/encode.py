"""From clips to a set of latents: encoded piece by piece (see `pieces`), and packed at the end.

A piece is what one model makes of one thing: the VAE of a window, an image encoder of a window's frames, the text
encoders of a caption (see `make_pieces`). What comes out is a function of clips, captions and models: how many
processes have made it, and how often they were killed, leaves no trace.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from moedistill.data.latents import open_store
from moedistill.data.make_pieces import make_pieces
from moedistill.data.pieces import WORK, Pieces, key_of
from moedistill.data.progress import Say
from moedistill.data.sources import Source
from moedistill.data.storable import LATENTS
from moedistill.data.videos import VideosConfig
from moedistill.data.windows import SetPlan, Skipped, Window
from moedistill.data.writing import INDEX, OWN_NAME, Item, is_as_named, write_set
from moedistill.errors import UserError
from moedistill.model.backbone import VideoSize
from moedistill.model.latent_video import LatentVideoBackbone
from moedistill.runtime.checkpoint import write_text
from moedistill.runtime.integrity import Damaged, read_json
from moedistill.runtime.writing import disk_errors

SKIPPED = "skipped.jsonl"
VERSION = 1
"""Of how clips become tensors: what is of another is made again."""
ENCODERS = {"latents": "vae", "images": "images", "text": "text", "negative": "text"}
"""By the part of a sample that a piece is: what makes it, by its name in `Backbone.revisions`."""


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

    @property
    def clip(self) -> tuple[str, str]:
        """What its windows have in common: in a list, a file may stand under several captions."""
        return self.source, self.entry["caption"]


class Encoding:
    """A set on its way.

    Args:
        plan: what it is to have.
        data: the clips, or prompts, and how they become samples.
        backbone: what encodes; its networks are not called, and may be without weights.
        folder: the set's.
        made_for: what else the index shall say that the set was made for.

    Raises:
        ValueError: the model's files are not on this machine.
        UserError: the folder holds something else.
    """

    def __init__(
        self,
        plan: SetPlan,
        data: VideosConfig,
        backbone: LatentVideoBackbone,
        folder: Path,
        made_for: Mapping[str, Any],
    ) -> None:
        self.plan, self.folder, self._backbone, self._pieces = plan, folder, backbone, Pieces(folder / WORK)
        self._revisions = backbone.revisions()
        self._old = _OldSet(folder, self._revisions)
        of = _of_what(plan.sources, _how(data, backbone))
        self._made_for = {**made_for, "fps": backbone.fps, "revisions": self._revisions, "of": of}
        self._of: dict[str, dict[str, Any]] = {part: {} for part in ENCODERS}
        """By part and key: of what a piece is made."""
        self._wanted = [*map(self._prompt, plan.prompts), *map(self._sample, plan.windows)]
        self._negative = self._piece("negative", backbone.config.guidance.negative_prompt)

    def run(self, say: Say, share_out: Callable[[], None] | None = None) -> Encoded:
        """Makes the pieces that are not there, and packs all of them.

        Args:
            say: is told now and then how far it is.
            share_out: has `make_pieces` called in other processes instead; it comes back when all of them are done.

        Raises:
            UserError: no clip can be used; `skipped.jsonl` says why.
        """
        todo = {part: [key for key in of if not self._has(key)] for part, of in self._of.items()}
        wanted, left = sum(map(len, self._of.values())), sum(map(len, todo.values()))
        if self._wanted and left:
            self._pieces.make_folder()
            self._pieces.write_plan({part: [(key, self._of[part][key]) for key in keys] for part, keys in todo.items()})
            if share_out is None:
                make_pieces(self._backbone, self.folder, say)
            else:
                share_out()
        return self._pack(made=left, kept=wanted - left)

    def replaced(self) -> int:
        """How many samples of the set that is there are of other windows, or prompts, than those of this one."""
        wanted = {_main(each.pieces) for each in self._wanted}
        return sum(_main(pieces) not in wanted for pieces in self._old.samples)

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
        whole, broken = list[_Wanted](), dict[tuple[str, str], list[str]]()
        for wanted in self._wanted:
            why = next((failed[key] for key in wanted.pieces.values() if key in failed), None)
            if why is None:
                whole.append(wanted)
            else:
                broken.setdefault(wanted.clip, []).append(why)
        there = Counter(wanted.clip for wanted in whole)
        skipped = [*self.plan.skipped, *(_skipped(clip, why, there[clip]) for clip, why in broken.items())]
        places = {source.name: place for place, source in enumerate(self.plan.sources)}
        skipped.sort(key=lambda each: places.get(each.source, 0))
        lines = [json.dumps(asdict(each), ensure_ascii=False) for each in skipped]
        write_text(self.folder / SKIPPED, "".join(f"{line}\n" for line in lines))
        if not whole:
            raise UserError(
                f"{self.plan.what}: no clip can be used, of {len(self.plan.sources)}; {self.folder / SKIPPED} says why"
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
    made_for = _read_index(folder)["made_for"]
    return bool(made_for.get("of") == _of_what(data.sources([folder]), _how(data, backbone)))


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


def _main(pieces: Mapping[str, str]) -> str:
    """The key of what a sample is of, whatever its caption says of it: its latents, if it has them."""
    return pieces.get("latents") or pieces["text"]


def _skipped(clip: tuple[str, str], reasons: Sequence[str], there: int) -> Skipped:
    """One line for a clip, of which windows cannot be decoded, and `there` are in the set."""
    part = f" ({there} of its {there + len(reasons)} windows are in the set)" if there else ""
    return Skipped(clip[0], reasons[0] + part)


def _plain(of: Any) -> Any:
    return asdict(of) if isinstance(of, Window) else of


def _content(of: Any) -> Any:
    """What a piece depends on: not on a clip's name and place."""
    named = ("source", "path", "caption")
    return {k: v for k, v in asdict(of).items() if k not in named} if isinstance(of, Window) else of


def sample_bytes(backbone: LatentVideoBackbone, num_frames: int, height: int, width: int) -> int:
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
        UserError: the folder holds a set that was made otherwise, or by another model.
    """

    def __init__(self, folder: Path, revisions: Mapping[str, str]) -> None:
        self._where: dict[str, tuple[int | None, list[str] | None]] = {}
        """By key: the number of a sample, and which of its tensors; None for the negative prompt."""
        self.samples: list[dict[str, str]] = []
        """Of each: its pieces by part."""
        if not (folder / INDEX).exists():
            return
        index = _read_index(folder)
        self._store = open_store(folder)
        made_for = index["made_for"]
        if made_for["revisions"].get("vae") != revisions.get("vae"):
            raise UserError(
                f"{folder} holds a set that another VAE has made; choose another folder, or remove that set"
            )
        damaged = {name for name in _files(index) if not is_as_named(folder / name)}  # what was in them is made again
        for number, entry in enumerate(index["samples"]):
            self.samples.append(entry["pieces"])
            if entry["file"] not in damaged:
                for part, key in entry["pieces"].items():
                    self._where.setdefault(key, (number, made_for["parts"][part]))
        if index["negative"] not in damaged:
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


def _read_index(folder: Path) -> dict[str, Any]:
    """The index of a set that was encoded; UserError where the folder's is of another."""
    try:
        index = read_json(folder / INDEX)
    except Damaged as error:
        raise UserError(f"{error}; remove it, and the set is made again") from error
    made_for = index.get("made_for") if isinstance(index, dict) else None
    if not isinstance(made_for, dict) or "parts" not in made_for:
        raise UserError(f"{folder} holds a set that was made otherwise; choose another folder")
    return cast("dict[str, Any]", index)


def _files(index: Mapping[str, Any]) -> set[str]:
    return {index["negative"], *(entry["file"] for entry in index["samples"])}


def refuse_others(folder: Path) -> None:
    """UserError where a folder without a set holds what is none of a set's files."""
    if not folder.exists() or (folder / INDEX).exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another place for the set")
    with disk_errors(folder):
        names = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    others = [name for name in names if name != SKIPPED and not OWN_NAME.fullmatch(name)]
    if others:
        raise UserError(f"{folder} is not empty, and holds no set ({', '.join(others[:3])}); choose another place")
