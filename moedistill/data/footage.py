"""Footage as it is shown: frames of a video or a picture at given times, upright, with square pixels, in RGB.

A frame is addressed by time and never by number: at `t` is shown the last frame whose time stamp is not later. So a
clip of any frame rate, constant or not, is read at any other without a guess. What is damaged, cut short, or in colours
that cannot be brought to RGB exactly is refused with the reason (`FootageError`), never shown as best it goes.
"""

import struct
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, pairwise
from math import ceil, floor
from pathlib import Path
from statistics import median
from typing import Literal, cast, get_args

import av
import numpy as np
import torch
from av.container import InputContainer
from av.filter import Graph
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

Crop = Literal["center", "top", "bottom", "left", "right"]
"""Which part is kept where the aspect ratios differ; of a clip that is cut in the other direction, the middle."""

_PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What Pillow reads; all else is for libav."""
_ANIMATED = ("PNG", "WEBP", "GIF")
"""Pictures that may be clips. A JPEG's second picture is for depth, a TIFF's second page is another page."""
_NO_DURATION = 0.1
"""How long a page of an animation is shown that says 0, in seconds; so do browsers."""
_PICTURE_STEP = 0.01
"""What animations' durations are rounded to, in seconds: GIF's are, the others' more finely."""
_CONTAINERS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,mxf,gxf,nut,ivf,yuv4mpegpipe,dv,rm,h264,hevc,obu,m4v,vc1"
    ",mp3,wav,flac,aac"
)
"""libav's names of what may be opened: files that hold a recording (sounds, to say that there is no video), but no
playlists, which name other files, and no text, of which libav makes pictures of letters.
"""

_HDR = {16: "PQ", 18: "HLG"}  # transfer characteristics, matrices and primaries by their numbers in ITU-T H.273
_BT2020 = 9
_BT2020_MATRICES = (9, 10)
_MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
}
_UNSPECIFIED_MATRICES = (2, 3)
_TO_SDR = (
    "zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=hable,"
    "zscale=t=bt709:m=bt709:r=limited,format=yuv420p"
)
_TO_BT709 = "zscale=p=bt709:t=bt709:m=bt709:r=limited,format=yuv420p"
_EXACT = 0x4 | 0x2000 | 0x40000 | 0x80000
"""swscale's BICUBIC (for the chroma of 4:2:0 and 4:2:2), FULL_CHR_H_INT, ACCURATE_RND and BITEXACT; PyAV names them
from 18 on. Without the latter three colours are wrong by up to 3.5 of 255, and not the same on all processors.
"""

_LEAD = 5.0
"""How many seconds earlier a file is sought where the first frame after a seek comes too late."""

_TURNS = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
"""What brings a frame upright, by the display matrix's (a, b, c, d): x' = ax + cy, y' = bx + dy, y downwards."""
_NO_TURN = (1, 0, 0, 1)
_SWAPPING = tuple(turn for (a, *_), turn in _TURNS.items() if not a)
"""Those that make height of width."""


class FootageError(ValueError):
    """Why a file is no footage that can be used; one line to follow its name."""


@dataclass(frozen=True)
class _Video:
    """How the frames of a video stream are read.

    Attributes:
        stream: its place among the file's video streams.
        first: the first frame's time stamp, in seconds.
        stamped: whether frames have time stamps of their own; else they are counted.
        height, width: of a frame as it is stored.
        turn: what brings it upright.
        matrix: of YUV, as swscale names it.
        full_range: whether black is 0, and not 16.
        interlaced: whether frames are of two fields.
    """

    stream: int
    first: Fraction
    stamped: bool
    height: int
    width: int
    turn: Image.Transpose | None
    matrix: Colorspace
    full_range: bool
    interlaced: bool


@dataclass(frozen=True)
class Footage:
    """A clip as it is shown.

    Attributes:
        times: when each frame is shown, in seconds from the first; ascending.
        end: when the last one stops being shown. A picture's is 0: it has one frame at any frame rate.
        height, width: in pixels, turned by the clip's rotation, and square.
        tick: by how much times may be wrong because the container rounds them; 0 where they are exact.
        video: how frames are read; None for pictures.
    """

    path: Path
    times: tuple[float, ...]
    end: float
    height: int
    width: int
    tick: float = 0.0
    video: _Video | None = None

    def frames(self, fps: float, start: float = 0.0) -> int:
        """How many frames at `start`, `start` + 1/fps, … it fills."""
        tolerance = self._tolerance(fps)
        before_end = ceil((self.end - start - tolerance) * fps)
        until_last = floor((self.times[-1] - start + tolerance) * fps) + 1  # what has no duration is shown once
        return max(0, before_end, until_last)

    def shown(self, num_frames: int, fps: float, start: float = 0.0) -> list[int]:
        """The places in `times` of the frames that are shown at `start` + k/fps."""
        late = start + self._tolerance(fps)
        return [bisect_right(self.times, late + k / fps) - 1 for k in range(num_frames)]

    def _tolerance(self, fps: float) -> float:
        # A microsecond for sums of floats.
        return min(max(self.tick, 1e-6), 0.25 / fps)


def probe(path: Path) -> Footage:
    """What a file shows and when, from its packets and its first frame.

    Raises:
        FootageError: it is no video or picture, is empty, damaged or cut short as far as that can be seen without
            decoding it all, or has colours that are not BT.601's or BT.709's (HDR, BT.2020).
    """
    with _reading():
        if not path.exists():
            raise FileNotFoundError
        if not path.is_file():
            raise FootageError("is a folder or a device, and no file")
        if path.stat().st_size == 0:
            raise FootageError("is empty: it has 0 bytes")
        _check_boxes(path)
        return _probe_picture(path) or _probe_video(path)


def read_frames(
    footage: Footage,
    size: tuple[int, int],
    *,
    num_frames: int,
    fps: float,
    start: float = 0.0,
    crop: Crop = "center",
) -> Tensor:
    """Frames of a clip as uint8 `[3, num_frames, height, width]`, RGB in 0 to 255.

    Frame k is the one that is shown at `start` + k/fps: the last whose time is not later, by more than what the
    container's rounding explains (one tick of its time base, at most a quarter of 1/fps).

    The largest part that has the aspect ratio of `size` is kept (`kept_box`) and scaled in one operation, by Pillow's
    bicubic filter, which is widened where it makes things smaller, so that nothing aliases. Interlaced frames are
    deinterlaced (bwdif, one frame for each). What is transparent is shown over black.

    YUV becomes RGB by the matrix and the range that the stream names. Where it names none: limited range; BT.709 if the
    longer side has 1280 pixels or the shorter one 720, else BT.601. Primaries are taken for sRGB's, as players do, and
    ICC profiles are not applied; BT.2020's primaries and the transfer curves of HDR are refused by `probe`.

    Args:
        size: height and width.
        fps: of the frames that are wanted, not the clip's.
        start: of the first one, in seconds from the clip's first frame.

    Raises:
        FootageError: a frame is damaged or does not come out.
        ValueError: the clip does not fill so many frames.
    """
    there = footage.frames(fps, start)
    if start < 0 or not 1 <= num_frames <= there:
        raise ValueError(f"{footage.path}: {num_frames} frames at {fps:g} fps from {start:g} s: it has {there}")
    wanted = footage.shown(num_frames, fps, start)
    box = kept_box(footage.height, footage.width, size, crop)
    video = torch.empty(3, num_frames, *size, dtype=torch.uint8)
    images = _picture_images if footage.video is None else _video_images
    with _reading():
        for place, image in images(footage, wanted):
            pixels = torch.from_numpy(np.array(_resized(image, footage, size, box))).permute(2, 0, 1)
            for k in range(bisect_left(wanted, place), bisect_right(wanted, place)):
                video[:, k] = pixels
    return video


def kept_box(height: int, width: int, size: tuple[int, int], crop: Crop) -> tuple[float, float, float, float]:
    """The largest part of a frame that has the aspect ratio of `size` (height, width): left, top, width and height."""
    if crop not in get_args(Crop):
        raise ValueError(f"crop: {crop!r} is none of {', '.join(get_args(Crop))}")
    scale = min(height / size[0], width / size[1])
    kept_height, kept_width = min(height, size[0] * scale), min(width, size[1] * scale)
    left = {"left": 0.0, "right": 1.0}.get(crop, 0.5) * (width - kept_width)
    top = {"top": 0.0, "bottom": 1.0}.get(crop, 0.5) * (height - kept_height)
    return left, top, kept_width, kept_height


def _resized(
    image: Image.Image, footage: Footage, size: tuple[int, int], box: tuple[float, float, float, float]
) -> Image.Image:
    """Of an upright frame whose pixels need not be square; `box` in square ones."""
    x, y = image.width / footage.width, image.height / footage.height
    left, top, width, height = box
    edges = (left * x, top * y, min((left + width) * x, image.width), min((top + height) * y, image.height))
    return image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=edges)


@contextmanager
def _reading() -> Iterator[None]:
    """Turns the system's errors into one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise FootageError("is not there (any more), or is a link to what is not") from error
    except PermissionError as error:
        raise FootageError("may not be read: its permissions forbid it") from error
    except OSError as error:
        raise FootageError(f"cannot be read: {error.strerror or error}") from error


def _over_black(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    black = Image.new("RGB", image.size)
    black.paste(image, mask=image.getchannel("A"))
    return black


def _tick(step: float, usual: float) -> float:
    """By how much stamps in steps of `step` may be wrong, if frames usually come every `usual` seconds."""
    return step if usual >= 3 * step else 0.0  # where it is about one step for each frame, stamps count frames


# -- pictures ---------------------------------------------------------------------------------------------------------


def _probe_picture(path: Path) -> Footage | None:
    """None where it is no picture."""
    try:
        with _opened_picture(path) as image:
            count = _num_frames(image)
            if count == 1:
                width, height = _upright(image).size
                return Footage(path, (0.0,), 0.0, height, width)
            stamps = [0.0]
            for k in range(count):
                image.seek(k)
                image.load()  # a WebP tells the duration only then
                stamps.append(stamps[-1] + (image.info.get("duration", 0) / 1000 or _NO_DURATION))
            times = tuple(round(stamp, 6) for stamp in stamps)
            usual = median(later - time for time, later in pairwise(times))
            return Footage(path, times[:-1], times[-1], image.height, image.width, _tick(_PICTURE_STEP, usual))
    except UnidentifiedImageError:
        return None


def _picture_images(footage: Footage, wanted: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
    """The frames at these places in the clip's times (ascending), upright and opaque."""
    with _opened_picture(footage.path) as image:
        for place in sorted(set(wanted)):
            if place:
                image.seek(place)
            yield place, _over_black(_upright(image))


@contextmanager
def _opened_picture(path: Path) -> Iterator[Image.Image]:
    """Turns into one line what Pillow stumbles over in a damaged file, which may be an error of any kind."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_PICTURES) as image:
                yield image
    except (UnidentifiedImageError, FootageError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # the system's
            raise
        raise FootageError(f"is a damaged picture: {error}") from error


def _num_frames(image: Image.Image) -> int:
    return int(getattr(image, "n_frames", 1)) if image.format in _ANIMATED else 1


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its camera has noted."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # grey of 16 bits, which Pillow would cut off above 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    return image


# -- videos: what is there --------------------------------------------------------------------------------------------


def _check_boxes(path: Path) -> None:
    """Of an MP4: a copy that was broken off, of which libav would read what is there and say nothing.

    Raises:
        FootageError: a box ends beyond the file, or there is no index.
    """
    size, place, kinds = path.stat().st_size, 0, set()
    with path.open("rb") as file:
        while len(header := file.read(16)) >= 8:
            length, kind = struct.unpack(">I4s", header[:8])
            if place == 0 and kind != b"ftyp":
                return
            if length == 1 and len(header) == 16:
                length = struct.unpack(">Q", header[8:])[0]
            kinds.add(kind)
            if kind in (b"moov", b"moof", b"mdat") and place + length > size:
                raise FootageError(f"is cut short: it has {size} of at least {place + length} bytes")
            if length < 8:  # 0: up to the end
                break
            place += length
            file.seek(place)
    if b"moov" in kinds or not kinds:
        return
    if b"meta" in kinds:
        raise FootageError("is a picture in HEIF or AVIF, which are not read: save it as PNG or JPEG")
    raise FootageError("has no index (moov): the recording or the copy was not finished")


@contextmanager
def _opened(path: Path) -> Iterator[InputContainer]:
    # The prefix keeps libav from taking a name with a colon for a protocol.
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    try:
        container = av.open(f"file:{path}", container_options=options, metadata_errors="replace")
    except (FileNotFoundError, PermissionError):
        raise
    except av.FFmpegError as error:
        raise FootageError("is no video or picture, or its beginning is damaged") from error
    with container:
        yield container


def _probe_video(path: Path) -> Footage:
    with _opened(path) as container:
        stream = _video_stream(container)
        packets = _look_through(container, stream)
        _check_announced(container, stream, packets)
        video = _how_to_read(stream, packets.first)
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        rate = stream.guessed_rate or stream.average_rate or Fraction(25)
        step = float(stream.time_base or 0)
        # AVI's packets have stamps that are guesses, VP8's may hold a frame that is never shown, and one field may be
        # a packet by itself.
        guesses = container.format.name == "avi" or stream.codec_context.name == "vp8" or video.interlaced
    stamps = packets.stamps
    if guesses or not packets.stamped:
        stamps, stamped = _decode_stamps(path, video, 1 / rate)
        video = replace(video, stamped=stamped)
    elif packets.first.pts is not None:
        # A recording that begins in the middle of a group of frames is shown from its first whole one.
        stamps = {stamp: duration for stamp, duration in stamps.items() if stamp >= _stamp(packets.first)}
    if not stamps:
        raise FootageError("has a video of which no frame can be decoded")
    video = replace(video, first=min(stamps))
    times = tuple(float(stamp - video.first) for stamp in sorted(stamps))
    usual = median(later - time for time, later in pairwise(times)) if len(times) > 1 else float(1 / rate)
    end = times[-1] + (float(stamps[max(stamps)]) or usual)
    height, width = video.height, max(1, round(video.width * aspect))
    if video.turn in _SWAPPING:
        height, width = width, height
    return Footage(path, times, end, height, width, _tick(step, usual), video)


def _video_stream(container: InputContainer) -> VideoStream:
    if not container.streams.video:
        raise FootageError("has no video" + (", only sound" if container.streams.audio else ""))
    videos = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not videos:
        raise FootageError("has no video, only sound and a cover picture")
    if videos[0].codec_context is None:
        raise FootageError("is of a codec that libav has no decoder for: convert it, for example to H.264")
    return videos[0]


@dataclass
class _Packets:
    """What a file's packets say.

    Attributes:
        first: the first frame that comes out.
        stamps: of the video's packets, with durations, in seconds.
        stamped: whether all of them have one.
        end: of all streams, in seconds.
    """

    first: VideoFrame
    stamps: dict[Fraction, Fraction]
    stamped: bool
    end: Fraction


def _look_through(container: InputContainer, stream: VideoStream) -> _Packets:
    first: VideoFrame | None = None
    stamps, stamped, end = dict[Fraction, Fraction](), True, Fraction(0)
    for packet in _packets(container):
        ours = packet.stream_index == stream.index
        if ours and first is None:
            first = next(iter(_frames_of(packet)), None)
        if not packet.size:
            continue
        duration = _seconds(packet.duration, packet)
        if packet.pts is not None:
            end = max(end, _stamp(packet) + duration)
        if ours:
            if packet.pts is None:
                stamped = False
            elif not packet.is_discard:  # those are cut off by an edit list
                stamps[_stamp(packet)] = duration
    if first is None:
        raise FootageError("has a video of which no frame can be decoded")
    return _Packets(first, stamps, stamped, end)


def _check_announced(container: InputContainer, stream: VideoStream, packets: _Packets) -> None:
    """That a file is as long as its header announces, where that is more than a guess; libav is content with less."""
    kind = container.format.name
    if kind == "avi":
        announced = _seconds(stream.frames, stream)
    elif ("mov" in kind or "matroska" in kind) and container.duration is not None:
        announced = Fraction(container.duration, av.time_base)
    else:
        return
    # The last frame's duration may be missing; it is hardly longer than any other.
    gaps = (later - stamp for stamp, later in pairwise(sorted(packets.stamps)))
    if announced > packets.end + max(Fraction(1, 10), 2 * max(gaps, default=Fraction(0))):
        raise FootageError(f"is cut short: it has {float(packets.end):.2f} s of {float(announced):.2f} s")


def _how_to_read(stream: VideoStream, frame: VideoFrame) -> _Video:
    """What the stream and its first frame say, without the time stamps."""
    context = stream.codec_context
    if curve := _HDR.get(context.color_trc):
        raise FootageError(f"is HDR ({curve}): bring it to BT.709 first, for example by ffmpeg -vf {_TO_SDR}")
    if context.color_primaries == _BT2020 or frame.colorspace in _BT2020_MATRICES:
        raise FootageError(f"has the colours of BT.2020: bring it to BT.709 first, by ffmpeg -vf {_TO_BT709}")
    large = max(frame.height, frame.width) >= 1280 or min(frame.height, frame.width) >= 720
    matrix = Colorspace.ITU709 if large else Colorspace.ITU601
    if frame.colorspace not in _UNSPECIFIED_MATRICES and not frame.format.is_rgb:
        if frame.colorspace not in _MATRICES:
            raise FootageError(
                f"has colours by matrix {frame.colorspace} of H.273, which is not known here: bring it to BT.709 first"
            )
        matrix = _MATRICES[frame.colorspace]
    return _Video(
        stream=stream.container.streams.video.index(stream),
        first=Fraction(0),
        stamped=True,
        height=frame.height,
        width=frame.width,
        turn=_turn(frame),
        matrix=matrix,
        full_range=frame.color_range == ColorRange.JPEG,
        interlaced=frame.interlaced_frame,
    )


def _turn(frame: VideoFrame) -> Image.Transpose | None:
    """What brings a frame upright, by its display matrix."""
    data = cast("bytes | None", frame.side_data.get("DISPLAYMATRIX"))
    if data is None:
        return None
    a, b, _, c, d = struct.unpack("=9i", data)[:5]
    scale = max(map(abs, (a, b, c, d)))
    turn = tuple(round(each / scale) for each in (a, b, c, d)) if scale else _NO_TURN
    if turn != _NO_TURN and turn not in _TURNS:
        raise FootageError("is turned by an angle that is no quarter: turn it first")
    return _TURNS.get(turn)


def _decode_stamps(path: Path, video: _Video, usual: Fraction) -> tuple[dict[Fraction, Fraction], bool]:
    """Stamps and durations of all frames, and whether they are the frames' own; else they go by the frames' order."""
    with _opened(path) as container:
        frames = [
            (None if frame.pts is None else _stamp(frame), _seconds(frame.duration, frame))
            for frame in _frames(container, video)
        ]
    stamps = [stamp for stamp, _ in frames if stamp is not None]
    if len(set(stamps)) < len(frames):  # of a raw stream, which has none
        return {number * usual: usual for number in range(len(frames))}, False
    # AVI stamps frames in the order in which they are stored; they come out in the one in which they are shown.
    return dict(zip(sorted(stamps), (duration for _, duration in frames), strict=True)), stamps == sorted(stamps)


# -- videos: frames ---------------------------------------------------------------------------------------------------


def _packets(container: InputContainer, *streams: VideoStream) -> "Iterator[Packet[Stream]]":
    """In the order of the file; of each stream an empty one comes last, which makes its decoder give all frames."""
    where = ""
    try:
        for packet in container.demux(*streams):
            where = _at(packet)
            if packet.is_corrupt:
                raise FootageError(f"is damaged or cut short{where}")
            yield packet
    except av.FFmpegError as error:
        raise FootageError(f"is damaged{where}: {error.strerror}") from error


def _frames_of(packet: "Packet[Stream]") -> list[VideoFrame]:
    """The frames that come out as a packet goes in."""
    try:
        frames = cast("list[VideoFrame]", packet.decode())
    except av.FFmpegError as error:
        raise FootageError(f"is damaged{_at(packet)}: {error.strerror}") from error
    for frame in frames:
        if frame.is_corrupt:
            raise FootageError(f"is damaged{_at(frame)}: a frame is incomplete")
    return frames


def _at(of: "Packet[Stream] | VideoFrame") -> str:
    return "" if of.pts is None else f" at {float(_stamp(of)):.2f} s"


def _seconds(ticks: int | None, of: "Packet[Stream] | VideoFrame | VideoStream") -> Fraction:
    return Fraction(ticks or 0) * (of.time_base or 0)


def _stamp(of: "Packet[Stream] | VideoFrame") -> Fraction:
    return _seconds(of.pts, of)


def _frames(container: InputContainer, video: _Video) -> Iterator[VideoFrame]:
    """From where the file is, in the order in which they are shown."""
    stream = container.streams.video[video.stream]
    stream.thread_type = "FRAME"  # threads for slices lose the mark of damaged frames, at least H.264's
    for packet in _packets(container, stream):
        for frame in _frames_of(packet):
            if (frame.height, frame.width) != (video.height, video.width):
                raise FootageError(
                    f"changes its size from {video.height}×{video.width} to {frame.height}×{frame.width}: cut it there"
                )
            if frame.interlaced_frame and not video.interlaced:
                raise FootageError("is interlaced in part: deinterlace it first, for example by ffmpeg -vf bwdif")
            yield frame


def _video_images(footage: Footage, wanted: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
    """The frames at these places in the clip's times (ascending), upright and opaque; some may come twice, the same."""
    video = footage.video
    assert video is not None
    before = max(wanted[0] - video.interlaced, 0)  # bwdif looks at the frame before, too
    attempts = (0.0, _LEAD, None) if before and video.stamped else (None,)
    for lead in attempts:
        try:
            yield from _read(footage, video, wanted, before, lead)
            return
        except FootageError:
            # Some containers seek to a place after the one that was asked for, or between frames that need each other.
            if lead is None:
                raise


def _read(
    footage: Footage, video: _Video, wanted: Sequence[int], before: int, lead: float | None
) -> Iterator[tuple[int, Image.Image]]:
    """Decodes from the key frame `lead` seconds before `before`, or from the beginning, and misses no frame."""
    places, last, reformatter = set(wanted), wanted[-1], VideoReformatter()
    with _opened(footage.path) as container:
        place = 0
        if lead is not None:
            _seek(container, video, footage.times[before] - lead)
            place = before
        frames = _frames(container, video)
        for number, frame in enumerate(_deinterlaced(frames) if video.interlaced else frames):
            time = float(_stamp(frame) - video.first) if video.stamped else footage.times[number]
            if time < footage.times[place]:
                continue
            if time > footage.times[place]:
                break
            if place in places:
                yield place, _image(frame, video, reformatter)
            if place == last:
                return
            place += 1
    raise FootageError(f"is damaged: no frame comes out at {footage.times[place]:.2f} s")


def _seek(container: InputContainer, video: _Video, time: float) -> None:
    stream = container.streams.video[video.stream]
    try:
        container.seek(round((video.first + Fraction(time)) / Fraction(stream.time_base or 1)), stream=stream)
    except av.FFmpegError as error:
        raise FootageError(f"cannot be read from {time:.2f} s: {error.strerror}") from error


def _deinterlaced(frames: Iterator[VideoFrame]) -> Iterator[VideoFrame]:
    """As many frames at the same times; those that are not interlaced as they are."""
    frame = next(frames, None)
    if frame is None:
        return
    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    graph.link_nodes(
        source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")
    ).configure()
    for each in chain((frame,), frames, (None,)):
        graph.push(each)
        while True:
            try:
                yield graph.vpull()
            except (av.BlockingIOError, av.EOFError):
                break


def _image(frame: VideoFrame, video: _Video, reformatter: VideoReformatter) -> Image.Image:
    transparent = any(component.is_alpha for component in frame.format.components)
    rgb = reformatter.reformat(
        frame,
        format="rgba" if transparent else "rgb24",
        src_colorspace=video.matrix,
        dst_colorspace=video.matrix,
        src_color_range=ColorRange.JPEG if video.full_range else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        interpolation=_EXACT,
    )
    image = _over_black(Image.fromarray(rgb.to_ndarray()))
    return image if video.turn is None else image.transpose(video.turn)
