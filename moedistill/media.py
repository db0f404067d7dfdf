"""Pictures and videos of samples: contact sheets (PNG) and animations (WebP), with labels."""

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_BACKGROUND = 24
_TEXT = (235, 235, 235)


def _font(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own, which has the letters of English; for others matplotlib's, if it is installed."""
    found = None if text.isascii() else find_spec("matplotlib")
    if found is None or found.origin is None:
        return ImageFont.load_default(size)
    return ImageFont.truetype(Path(found.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf", size)


def _label(text: str, size: int) -> Image.Image:
    font = _font(text, size)
    box = font.getbbox(text)
    image = Image.new("RGB", (int(box[2]) + 8, int(size * 1.5)), (_BACKGROUND,) * 3)
    ImageDraw.Draw(image).text((4, size * 0.15), text, fill=_TEXT, font=font)
    return image


def _frames(videos: Tensor, height: int | None = None) -> np.ndarray:
    """uint8 `[N, T, H', W', 3]` of videos `[N, C, T, H, W]` in [0, 1], about `height` pixels high.

    Small videos are enlarged by a whole number, large ones averaged down.
    """
    if height is not None and videos.shape[3] > height:
        size = (height, max(1, round(videos.shape[4] * height / videos.shape[3])))
        flat = videos.transpose(1, 2).flatten(0, 1)
        shrunk = torch.nn.functional.interpolate(flat, size=size, mode="area")
        videos = shrunk.unflatten(0, (videos.shape[0], videos.shape[2])).transpose(1, 2)
    pixels = (videos.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
    pixels = pixels.expand(*pixels.shape[:4], 3)
    scale = 1 if height is None else max(1, height // pixels.shape[2])
    return pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3).numpy()


def contact_sheet(
    path: Path, rows: Mapping[str, Tensor], columns: list[str], *, size: int = 72, width: int = 1100
) -> None:
    """A PNG with one row per model and sample column: four frames of each video, side by side.

    Args:
        rows: videos `[N, C, T, H, W]` in [0, 1] by the model's name; equal N, samples in the order of `columns`.
        columns: a caption for each sample.
        size: the height of a frame in pixels; for smaller videos the multiple of theirs that comes nearest below.
        width: of the picture in pixels: columns that do not fit go below, with the rows once more.
    """
    stride = max(2, -(-next(iter(rows.values())).shape[2] // 4))
    strips = {name: _frames(videos[:, :, ::stride], size) for name, videos in rows.items()}
    _, frames, height, frame_width, _ = next(iter(strips.values())).shape
    labels = {name: _label(name, 16) for name in strips}
    left = max(image.width for image in labels.values()) + 8
    gap, top = 10, 28
    column_width, row_height = frames * (frame_width + 2) + gap, height + gap
    across = min(len(columns), max(1, (width - left) // column_width))
    block_height, blocks = top + len(strips) * row_height, -(-len(columns) // across)
    sheet = Image.new("RGB", (left + across * column_width, blocks * block_height), (_BACKGROUND,) * 3)
    for column, caption in enumerate(columns):
        block, place = divmod(column, across)
        x, y = left + place * column_width, block * block_height
        sheet.paste(_label(caption, 16), (x, y + 2))
        for row, (name, pixels) in enumerate(strips.items()):
            below = y + top + row * row_height
            sheet.paste(labels[name], (2, below + (height - labels[name].height) // 2))
            for frame in range(frames):
                sheet.paste(Image.fromarray(pixels[column, frame]), (x + frame * (frame_width + 2), below))
    sheet.save(path)


def side_by_side(path: Path, rows: Mapping[str, Tensor], *, fps: float = 8.0) -> None:
    """An animated WebP: a labelled row of videos for each model, all samples side by side.

    Args:
        rows: videos `[N, C, T, H, W]` in [0, 1] by the model's name, equal shapes; shown 96 to 240 pixels high.
    """
    pixels = {name: _frames(videos, min(max(videos.shape[3], 96), 240)) for name, videos in rows.items()}
    count, frames, height, width, _ = next(iter(pixels.values())).shape
    labels = {name: _label(name, 16) for name in pixels}
    left = max(image.width for image in labels.values()) + 8
    pages = []
    for frame in range(frames):
        page = Image.new("RGB", (left + count * (width + 6), len(pixels) * (height + 6)), (_BACKGROUND,) * 3)
        for row, (name, videos) in enumerate(pixels.items()):
            y = row * (height + 6)
            page.paste(labels[name], (2, y + (height - labels[name].height) // 2))
            for column in range(count):
                page.paste(Image.fromarray(videos[column, frame]), (left + column * (width + 6), y))
        pages.append(page)
    duration = round(1000 / fps)
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=duration, loop=0, quality=70, method=4)


def middle_frames(path: Path, videos: Tensor, *, size: int = 128) -> None:
    """A PNG of the middle frame of each of `videos` `[N, C, T, H, W]` in [0, 1], one below the other.

    Args:
        size: the height of a frame in pixels, as in `contact_sheet`.
    """
    middle = videos.shape[2] // 2
    pixels = _frames(videos[:, :, middle : middle + 1], size)[:, 0]
    Image.fromarray(np.concatenate(list(pixels))).save(path)


def read_frames(path: Path, count: int) -> list[Image.Image]:
    """The frames of a PNG that `middle_frames` wrote of `count` videos."""
    with Image.open(path) as whole:
        height = whole.height // count
        return [whole.crop((0, k * height, whole.width, (k + 1) * height)) for k in range(count)]


def strip(path: Path, columns: Mapping[str, Sequence[Image.Image]], rows: Sequence[str], *, title: str) -> None:
    """A PNG of frames: a labelled column for each moment, a row for each of the captions `rows`, all of one size."""
    gap, top = 4, 56
    frame = next(iter(columns.values()))[0]
    heading = _label(title, 16)
    labels = {label: _label(label, 14) for label in columns}
    longest = max(1, frame.height // 20)
    captions = [textwrap.wrap(row, 24, max_lines=longest, placeholder=" …") or ["(no prompt)"] for row in rows]
    left = max(_label(line, 14).width for lines in captions for line in lines) + gap
    width = max(frame.width, *(label.width for label in labels.values())) + gap
    size = max(left + len(columns) * width, heading.width), top + len(rows) * (frame.height + gap)
    sheet = Image.new("RGB", size, (_BACKGROUND,) * 3)
    sheet.paste(heading, (0, 2))
    for row, lines in enumerate(captions):
        for number, line in enumerate(lines):
            sheet.paste(_label(line, 14), (0, top + row * (frame.height + gap) + 20 * number))
    for column, (label, frames) in enumerate(columns.items()):
        sheet.paste(labels[label], (left + column * width, top - 24))
        for row, one in enumerate(frames):
            sheet.paste(one, (left + column * width, top + row * (frame.height + gap)))
    sheet.save(path)


def words_of(caption: str) -> str:
    """The first words of a caption, for the end of a file's name, after `_`; nothing where it has none."""
    words = re.sub(r"[^a-z0-9]+", "_", caption.lower()).strip("_")[:40].rstrip("_")
    return f"_{words}" if words else ""


def write_mp4(path: Path, video: Tensor, *, fps: float) -> None:
    """An H.264 video that every player takes, with the colours of BT.709, which it names: players guess by the size.

    Args:
        video: `[C, T, H, W]` in [0, 1]; sides are made even by repeating the last row or column.
    """
    from fractions import Fraction

    import av
    from av.video.reformatter import ColorRange, Colorspace, Interpolation

    pixels = _frames(video[None])[0]
    pixels = np.pad(pixels, ((0, 0), (0, pixels.shape[1] % 2), (0, pixels.shape[2] % 2), (0, 0)), mode="edge")
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "18"}
        context = stream.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries = context.color_trc = 1
        # swscale's faster ways depend on what lies beside a frame in memory.
        exact = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
        for frame in pixels:
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            yuv = rgb.reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, interpolation=exact
            )
            container.mux(stream.encode(yuv))
        container.mux(stream.encode())


def smaller_mp4(path: Path, *, height: int) -> bytes:
    """An mp4 of the same frames that takes less: at most `height` pixels high, and coarser.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    import av
    from av.video.stream import VideoStream

    made = io.BytesIO()
    with av.open(path) as source, av.open(made, "w", format="mp4") as container:
        read = source.streams.video[0]
        scale, rate = min(1.0, height / read.height), read.average_rate
        if not rate:
            raise ValueError(f"{path} does not say how fast it goes")
        stream = container.add_stream("libx264", rate=rate)
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = (max(2, round(side * scale / 2) * 2) for side in (read.height, read.width))
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "30"}
        for name in ("colorspace", "color_range", "color_primaries", "color_trc"):
            setattr(stream.codec_context, name, getattr(read.codec_context, name))
        for number, frame in enumerate(source.decode(read)):
            resized = frame.reformat(width=stream.width, height=stream.height, format="yuv420p")
            resized.pts, resized.time_base = number, 1 / rate
            container.mux(stream.encode(resized))
        container.mux(stream.encode())
    return made.getvalue()
