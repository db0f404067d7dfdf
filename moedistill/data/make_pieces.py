"""Makes the pieces of a set: windows through the VAE, frames through an image encoder, captions through text encoders.

One model after the other, so that one alone is in memory; each video on its own, as what rounding depends on is the
batch.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moedistill.data.footage import Footage, FootageError, probe, read_frames
from moedistill.data.pieces import WORK, Pieces
from moedistill.data.progress import Progress, Say
from moedistill.data.storable import LATENTS, bad_numbers
from moedistill.data.windows import Window
from moedistill.model.latent_video import LatentVideoBackbone

AHEAD = 2
"""Windows that are decoded while others are encoded."""

Task = tuple[str, Any]
"""A piece to make: its key, and of what, as plain data."""


def make_pieces(backbone: LatentVideoBackbone, folder: Path, say: Say, process: int = 0, processes: int = 1) -> None:
    """Makes a process's share of the pieces that `Encoding.run` has planned for the set in `folder`.

    One model after the other, so that one alone is in memory. What cannot be decoded is noted.

    Raises:
        ValueError: a model is not there, or does not take a caption.
    """
    pieces = Pieces(folder / WORK)
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
            pieces.write(key, tensors)
        except FootageError as error:
            pieces.fail(key, str(error))
        progress.step()


def _latents(backbone: LatentVideoBackbone) -> Callable[[Tensor], Mapping[str, Tensor]]:
    def make(video: Tensor) -> Mapping[str, Tensor]:
        given = {name: value[0] for name, value in backbone.given_frames(video).items()}
        return {LATENTS: _narrowed(backbone.encode_videos(video)[0]), **given}

    return make


def _images(backbone: LatentVideoBackbone) -> Callable[[Tensor], Mapping[str, Tensor]]:
    return lambda frames: {name: value[0] for name, value in backbone.encode_images(frames).items()}


def _narrowed(value: Tensor) -> Tensor:
    """The same numbers in the shortest type that holds all of them: those of a VAE in bfloat16 come as float32."""
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
