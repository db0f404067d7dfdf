"""Videos within a page: as they are if there is room, else smaller, else the first ones."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moedistill.media import smaller_mp4
from moedistill.runs.page.found import VideoSet

SMALLER = 240
"""Pixels of height that a video has at most where there is no room for all as they are."""


@dataclass
class Embedded:
    """What went into the page.

    Attributes:
        uris: data by key.
        keys: of files.
        timing: of each key frames, and frames per second.
        left_out: how many files there was no room for.
        smaller: whether they were made smaller.
    """

    uris: dict[str, str] = field(default_factory=dict)
    keys: dict[Path, str] = field(default_factory=dict)
    timing: dict[str, tuple[int, float]] = field(default_factory=dict)
    left_out: int = 0
    smaller: bool = False


def embed(sets: Sequence[VideoSet], room: int) -> Embedded:
    """The videos of `sets` in at most `room` bytes of text: first the first row of every set, then the second.

    What is not there, or no video, counts as left out.
    """
    from av.error import FFmpegError

    rows = max((len(one.captions) for one in sets), default=0)
    files = dict.fromkeys(
        files[row] for row in range(rows) for one in sets for files in one.columns.values() if row < len(files)
    )
    there = [file for file in files if file.is_file()]
    made = Embedded(left_out=len(files) - len(there))
    made.smaller = sum(_as_text(file.stat().st_size) for file in there) > room
    for number, file in enumerate(there):
        try:
            timing = _timing(file)
            content = smaller_mp4(file, height=SMALLER) if made.smaller else file.read_bytes()
        except (OSError, ValueError, IndexError, FFmpegError):
            made.left_out += 1
            continue
        room -= _as_text(len(content))
        if room < 0:
            made.left_out += len(there) - number
            break
        key = f"v{len(made.uris)}"
        made.uris[key] = "data:video/mp4;base64," + base64.b64encode(content).decode("ascii")
        made.keys[file], made.timing[key] = key, timing
    return made


def _as_text(size: int) -> int:
    """Bytes that so many bytes take in the page."""
    return -(-size // 3) * 4 + 40


def _timing(file: Path) -> tuple[int, float]:
    import av

    with av.open(file) as container:
        stream = container.streams.video[0]
        if not stream.average_rate:
            raise ValueError(f"{file} does not say how fast it goes")
        frames = stream.frames or sum(1 for _ in container.decode(stream))
        return frames, float(stream.average_rate)
