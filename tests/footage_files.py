"""Clips whose frames show their own number, in all the forms in which footage comes, and a folder with all of them."""

import os
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

BITS = (2, 4)
"""The number's bits are blocks of black and white in rows and columns, the highest at the upper left."""
LOSSLESS = {"libx264": {"qp": "0", "preset": "ultrafast"}, "libx265": {"x265-params": "lossless=1:log-level=none"}}


def numbered(number: int, height: int = 64, width: int = 96) -> np.ndarray:
    """A picture uint8 `[height, width, 3]` that shows `number`, of 0 to 255, upright."""
    bits = np.array([number >> 7 - i & 1 for i in range(8)], np.uint8).reshape(BITS) * 255
    rows, columns = np.arange(height) * BITS[0] // height, np.arange(width) * BITS[1] // width
    return np.repeat(bits[rows][:, columns, None], 3, axis=2)


def shown_number(frame) -> int:
    """What a frame `[3, H, W]` of uint8 shows, read at the centres of its blocks; the other way to `numbered`."""
    picture = np.asarray(frame)
    height, width = picture.shape[1:]
    number = 0
    for row in range(BITS[0]):
        for column in range(BITS[1]):
            y, x = (2 * row + 1) * height // (2 * BITS[0]), (2 * column + 1) * width // (2 * BITS[1])
            level = picture[:, y, x].mean()
            assert level < 80 or level > 175, f"neither black nor white: {level}"
            number = 2 * number + int(level > 127)
    return number


def shown_numbers(video) -> list[int]:
    """Of each frame of `[3, T, H, W]`."""
    return [shown_number(video[:, k]) for k in range(video.shape[1])]


def circle(height: int, width: int, aspect: float = 1.0) -> np.ndarray:
    """A white circle on black uint8 `[height, width, 3]`, in pixels that are shown `aspect` times as wide as high."""
    picture = Image.new("RGB", (width, height))
    radius = 0.35 * min(height, width * aspect)
    x, y = width / 2, height / 2
    ImageDraw.Draw(picture).ellipse((x - radius / aspect, y - radius, x + radius / aspect, y + radius), "white")
    return np.asarray(picture)


def write_clip(
    path: Path,
    *,
    size: tuple[int, int] = (64, 96),
    fps: Fraction | float = 24,
    num_frames: int = 24,
    times: Sequence[float] | None = None,
    picture: Callable[[int], np.ndarray] | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rotation: int = 0,
    mirrored: bool = False,
    aspect: Fraction | int = 1,
    colours: dict[str, int] | None = None,
    fields: str | None = None,
    start: float = 0.0,
    audio: bool = False,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    prepare: Callable[[av.VideoFrame, int], av.VideoFrame] | None = None,
) -> Path:
    """Writes a clip, without loss where the codec can.

    Args:
        size: height and width as they are stored, before `rotation`.
        times: of each frame in seconds, in place of `fps` and `num_frames`; the last is shown for 1/fps.
        picture: of each number, uint8 `[H, W, 3]` as it is shown; `numbered` if there is none.
        rotation: quarter turns clockwise, in degrees, that bring what is stored upright.
        mirrored: whether what is stored must then be mirrored, left to right, too.
        aspect: how many times as wide as high a pixel is shown.
        colours: colorspace, color_range, color_trc, color_primaries; as libav numbers them.
        fields: which of a frame's two fields comes first, "tff" for the upper or "bff", with libx264; None for none.
        start: the first frame's time stamp.
        prepare: makes of a frame in RGB, and its number, the frame that is encoded, in `pix_fmt`.
    """
    rate = Fraction(fps).limit_denominator(1001)
    if times is None:
        times, base = [float(k / rate) for k in range(num_frames)], 1 / rate
    else:
        base = Fraction(1, 90000)
    turned = rotation % 180 != 0
    shown = (size[1], size[0]) if turned else size
    with av.open(path, "w", options=container or {}) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt
        stream.time_base = stream.codec_context.time_base = base
        stream.options = {**LOSSLESS.get(codec, {}), "g": "12", **(options or {})}
        if fields is not None:
            stream.options |= {"x264-params": f"{fields}=1"}
            prepare = _as_fields(fields, pix_fmt)
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        for name, value in (colours or {}).items():
            setattr(stream.codec_context, name, value)
        sound = output.add_stream("aac", rate=16000) if audio else None
        for number, time in enumerate(times):
            pixels = numbered(number, *shown) if picture is None else picture(number)
            pixels = np.rot90(pixels[:, ::-1] if mirrored else pixels, rotation // 90)
            pixels = np.ascontiguousarray(pixels)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format=pix_fmt) if prepare is None else prepare(frame, number)
            frame.pts, frame.time_base = round((time + start) / base), base
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
        if sound is not None:
            _write_sound(output, sound, times[-1] + start)
    if rotation or mirrored:
        _set_matrix(path, rotation, mirrored)
    return path


def _set_matrix(path, rotation, mirrored):
    """Writes an MP4's display matrix, which is 36 bytes in the header of its first track, the video."""
    cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[rotation // 90]
    flip = -1 if mirrored else 1
    a, b, c, d = (flip * cos, sin, -flip * sin, cos)
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 44
    rows = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    content[place : place + 36] = struct.pack(">9i", *rows)
    path.write_bytes(content)


def _as_fields(order, pix_fmt):
    """Marks frames, as the encoder wants it."""

    def prepare(frame, _):
        frame = frame.reformat(format=pix_fmt)
        graph = av.filter.Graph()
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25)
        )
        graph.link_nodes(source, graph.add("setfield", order), graph.add("buffersink")).configure()
        graph.push(frame)
        return graph.vpull()

    return prepare


def _write_sound(output, stream, seconds):
    for block in range(round(seconds * 16000) // 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, block * 1024, Fraction(1, 16000)
        output.mux(stream.encode(frame))
    output.mux(stream.encode())


def constant(pix_fmt: str, size: tuple[int, int], yuv: Sequence[int]) -> av.VideoFrame:
    """A frame of one colour, given as the numbers that are stored."""
    frame = av.VideoFrame(size[1], size[0], pix_fmt)
    depth = frame.format.components[0].bits
    for plane, value in zip(frame.planes, yuv, strict=True):
        count = plane.buffer_size // (1 if depth == 8 else 2)
        plane.update(np.full(count, value, np.uint8 if depth == 8 else np.dtype("<u2")).tobytes())
    return frame


def cut(path: Path, to: Path, *, share: float = 1.0, size: int | None = None) -> Path:
    """The beginning of a file: a share of it, or so many bytes."""
    content = path.read_bytes()
    to.write_bytes(content[: int(len(content) * share) if size is None else size])
    return to


def damage(path: Path, *, at: float, count: int = 40) -> Path:
    """Inverts bytes of a file from a share of its length on."""
    content = bytearray(path.read_bytes())
    place = int(len(content) * at)
    content[place : place + count] = bytes(255 - byte for byte in content[place : place + count])
    path.write_bytes(content)
    return path


@dataclass
class Piece:
    """A file of the torture folder.

    Attributes:
        reason: a part of why it is refused; None for what can be used.
        frames: how many it fills at 16 fps; 0 for what is refused.
        caption: in the text file beside it; None where there is no such file.
        same_as: the file that it shows once more.
    """

    reason: str | None = None
    frames: int = 0
    caption: str | None = None
    same_as: str | None = None


LONG_CAPTION = "a very long caption, " * 1000


def torture_folder(path: Path) -> dict[str, Piece]:
    """Writes a folder with all kinds of files that a folder of videos may have; gives what each is, by its name."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "deeper").mkdir()
    fast = {"movflags": "+faststart"}

    write_clip(path / "24.mp4", num_frames=48, audio=True)
    write_clip(path / "30.mp4", fps=30, num_frames=60)
    write_clip(path / "60.webm", fps=60, num_frames=120, codec="libvpx-vp9", options={"lossless": "1", "cpu-used": "8"})
    write_clip(path / "29.97.mkv", fps=Fraction(30000, 1001), num_frames=60)
    write_clip(path / "variable.mp4", times=[0, 0.1, 0.15, 0.6, 1.0, 1.02, 1.5, 1.9])
    write_clip(path / "portrait.mp4", size=(96, 64), num_frames=48)
    write_clip(path / "rotated.mp4", rotation=90, num_frames=48)
    write_clip(path / "10 bit.mkv", num_frames=48, pix_fmt="yuv420p10le")
    write_clip(path / "odd size.mkv", size=(63, 95), num_frames=48, codec="ffv1")
    write_clip(path / "interlaced.mp4", fps=25, num_frames=50, fields="tff")
    write_clip(path / "Übung – 日本 (1).mp4", num_frames=48)
    write_clip(path / "one frame.mp4", num_frames=1)
    write_clip(path / "short.mp4", num_frames=4)
    Image.fromarray(numbered(1)).save(path / "picture.png")
    os.symlink("24.mp4", path / "link.mp4")
    shutil.copy(path / "24.mp4", path / "deeper" / "copy.mp4")

    cut(write_clip(path / "cut.mp4", num_frames=48, container=fast), path / "cut.mp4", share=0.9)
    cut(write_clip(path / "unfinished.mp4", num_frames=48), path / "unfinished.mp4", size=36)
    cut(write_clip(path / "cut.mkv", num_frames=240, options={"g": "24"}), path / "cut.mkv", share=0.5)
    damage(write_clip(path / "damaged.mp4", num_frames=48, container=fast), at=0.6)
    hdr = {"colorspace": 9, "color_trc": 16, "color_primaries": 9}
    write_clip(path / "hdr.mp4", num_frames=24, pix_fmt="yuv420p10le", colours=hdr)
    write_sound(path / "sound.m4a")
    (path / "empty.mp4").touch()
    (path / "text.mp4").write_text("this is no video\n" * 50)

    captions = {"24": "a number, counting up", "60": "", "29.97": LONG_CAPTION, "Übung – 日本 (1)": "zählt – 数"}
    for name, caption in captions.items():
        (path / f"{name}.txt").write_text(caption, encoding="utf-8")
    return {
        "24.mp4": Piece(frames=32, caption=captions["24"]),
        "30.mp4": Piece(frames=32),
        "60.webm": Piece(frames=32, caption=""),
        "29.97.mkv": Piece(frames=33, caption=LONG_CAPTION),
        "variable.mp4": Piece(frames=32),
        "portrait.mp4": Piece(frames=32),
        "rotated.mp4": Piece(frames=32),
        "10 bit.mkv": Piece(frames=32),
        "odd size.mkv": Piece(frames=32),
        "interlaced.mp4": Piece(frames=32),
        "Übung – 日本 (1).mp4": Piece(frames=32, caption="zählt – 数"),
        "one frame.mp4": Piece(frames=1),
        "short.mp4": Piece(frames=3),
        "picture.png": Piece(frames=1),
        "link.mp4": Piece(frames=32, same_as="24.mp4"),
        "deeper/copy.mp4": Piece(frames=32, same_as="24.mp4"),
        "cut.mp4": Piece(reason="cut short"),
        "unfinished.mp4": Piece(reason="no index"),
        "cut.mkv": Piece(reason="cut short"),
        "damaged.mp4": Piece(reason="damaged"),
        "hdr.mp4": Piece(reason="HDR"),
        "sound.m4a": Piece(reason="only sound"),
        "empty.mp4": Piece(reason="empty"),
        "text.mp4": Piece(reason="no video or picture"),
    }


def write_sound(path: Path) -> Path:
    """A file with a second of silence, and no video."""
    with av.open(path, "w") as output:
        _write_sound(output, output.add_stream("aac", rate=16000), 1.0)
    return path
