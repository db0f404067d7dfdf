"""Footage: the right frame at each time, upright and not stretched, in the right colours; what is broken is refused."""

import io
import os
import pickle
import struct
import weakref
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from footage_files import (
    circle,
    constant,
    cut,
    damage,
    numbered,
    shown_number,
    shown_numbers,
    torture_folder,
    write_clip,
    write_sound,
)
from PIL import Image

from moedistill.data import footage as module
from moedistill.data.footage import Footage, FootageError, kept_box, probe, read_frames

SIZE = (64, 96)
B_FRAMES = {"qp": "10", "preset": "veryfast", "bf": "3", "g": "24"}


def read(path, *, fps=16.0, size=SIZE, **options):
    footage = probe(path)
    return read_frames(footage, size, num_frames=footage.frames(fps), fps=fps, **options)


def numbers(path, **options):
    return shown_numbers(read(path, **options))


def shown_at(times, fps, count, tick=1e-6):
    """By the definition: of each time the last frame that is not later, but for what the container rounds."""
    return [max(k for k, time in enumerate(times) if time <= j / fps + tick) for j in range(count)]


# -- times ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [8, 16, 24, 25, 30])
@pytest.mark.parametrize(
    ("name", "rate", "codec"),
    [
        ("a.mp4", Fraction(24), "libx264"),
        ("a.mp4", Fraction(30000, 1001), "libx264"),
        ("a.mp4", Fraction(60), "libx264"),
        ("a.avi", Fraction(25), "libx264"),
        ("a.avi", Fraction(25), "mpeg4"),
        ("a.ts", Fraction(50), "libx264"),
        ("a.mpg", Fraction(25), "mpeg2video"),
        ("a.h264", Fraction(25), "libx264"),
    ],
)
def test_a_frame_is_shown_from_its_time_on(tmp_path, name, rate, codec, fps):
    """Any rate from any other; frames are stored in another order than shown, raw streams and AVI have no stamps."""
    options = B_FRAMES if codec == "libx264" else {"bf": "2", "qscale": "2"}
    path = write_clip(tmp_path / name, fps=rate, num_frames=40, codec=codec, options=options)
    footage = probe(path)
    times = [float(k / rate) for k in range(40)]
    assert footage.times == pytest.approx(times, abs=0.0011)
    assert footage.end == pytest.approx(40 / rate, abs=0.0011)
    count = -(-40 * fps // rate)
    assert footage.frames(fps) == count
    assert shown_numbers(read_frames(footage, SIZE, num_frames=count, fps=fps)) == shown_at(times, fps, count, 4e-5)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("start", [0.0, 1.5])
def test_frames_that_come_irregularly_are_shown_when_they_are_due(tmp_path, name, start):
    times = [0.0, 0.1, 0.13, 0.5, 0.9]
    path = write_clip(tmp_path / name, times=times, fps=10, start=start)
    footage = probe(path)
    assert footage.times == pytest.approx(times, abs=0.001)
    assert footage.end == pytest.approx(1.0, abs=0.4 if name == "a.mkv" else 0.001)  # Matroska keeps no last duration
    assert shown_numbers(read_frames(footage, SIZE, num_frames=19, fps=20)) == shown_at(times, 20, 19)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize(("rate", "count"), [(16, 81), (24, 121), (Fraction(30000, 1001), 33), (25, 1)])
def test_a_clip_at_its_own_rate_has_as_many_frames_as_were_written(tmp_path, name, rate, count):
    footage = probe(write_clip(tmp_path / name, fps=rate, num_frames=count))
    assert footage.frames(float(rate)) == count
    assert footage.shown(count, float(rate)) == list(range(count))
    for k in range(count):
        assert footage.frames(float(rate), start=k / float(rate)) == count - k


def test_rounded_times_do_not_show_the_frame_before(tmp_path):
    """Matroska's milliseconds: of 30 fps the second frame is at 0.033 s, the third at 0.067 s, which is after 2/30."""
    footage = probe(write_clip(tmp_path / "a.mkv", fps=30, num_frames=30))
    assert footage.times[2] > 2 / 30
    assert footage.shown(15, 15) == list(range(0, 30, 2))
    assert Footage(Path(), (0.0, 0.1), 0.2, 1, 1, tick=0.1).shown(2, 10) == [0, 1]
    assert Footage(Path(), (0.0, 0.1), 0.2, 1, 1, tick=0.1).shown(2, 20) == [0, 0]  # no more than a quarter of 1/20


def test_frames_begin_where_an_edit_list_says(tmp_path):
    path = write_clip(tmp_path / "a.mp4", start=-0.25, container={"avoid_negative_ts": "disabled"})
    assert probe(path).end == pytest.approx(0.75)
    assert numbers(path, fps=24) == list(range(6, 24))


def test_frames_end_where_an_edit_list_says(tmp_path):
    """What follows is there, for other frames' sake: 41 packets of 48, 17 of them beyond the end."""
    path = write_clip(tmp_path / "a.mp4", num_frames=48, options=B_FRAMES | {"g": "48"})
    content = bytearray(path.read_bytes())
    place = content.index(b"elst") + 12
    assert int.from_bytes(content[place : place + 4], "big") == 2000
    content[place : place + 4] = (1000).to_bytes(4, "big")
    path.write_bytes(content)
    assert probe(path).end == pytest.approx(1.0)
    assert numbers(path, fps=24) == list(range(24))


def test_frames_of_vp8_that_are_never_shown_are_not_waited_for(tmp_path):
    path = write_clip(tmp_path / "a.webm", num_frames=12, codec="libvpx", options={"b": "1M"})
    with av.open(path) as source, av.open(tmp_path / "hidden.webm", "w") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            content = bytearray(bytes(packet))
            if number == 5:
                content[0] &= ~0x10  # show_frame, in the first byte of a frame
            changed = av.Packet(bytes(content))
            changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
            changed.is_keyframe, changed.stream = packet.is_keyframe, stream
            output.mux(changed)
    assert len(probe(tmp_path / "hidden.webm").times) == 11
    assert numbers(tmp_path / "hidden.webm", fps=24) == [0, 1, 2, 3, 4, 4, *range(6, 12)]


def test_frames_that_avi_leaves_out_stay(tmp_path):
    times = [0, 1 / 24, 2 / 24, 6 / 24, 7 / 24]
    with av.open(tmp_path / "a.avi", "w") as output:
        stream = output.add_stream("mjpeg", rate=24)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuvj420p"
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24").reformat(format="yuvj420p")
            frame.pts = round(time * 24)
            output.mux(stream.encode(frame))
    assert numbers(tmp_path / "a.avi", fps=24) == [0, 1, 2, 2, 2, 2, 3, 4]


def test_a_recording_that_begins_between_two_key_frames_is_shown_from_the_second_on(tmp_path):
    path = write_clip(tmp_path / "a.ts", num_frames=60, options=B_FRAMES | {"g": "12"})
    content = path.read_bytes()
    (tmp_path / "later.ts").write_bytes(content[len(content) // 188 // 2 * 188 :])
    whole, part = read(path, fps=24), read(tmp_path / "later.ts", fps=24)
    first = shown_number(part[:, 0])
    assert 12 < first < 48
    assert torch.equal(part, whole[:, first:])


def test_what_is_known_of_a_clip_can_be_sent_to_another_process(tmp_path):
    footage = probe(write_clip(tmp_path / "a.mp4", rotation=90))
    assert pickle.loads(pickle.dumps(footage)) == footage


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi", "a.webm"])
def test_any_window_is_a_part_of_the_whole(tmp_path, name):
    """After a seek, to wherever the container seeks, the same bits come out as from the beginning."""
    codec, options = ("libvpx-vp9", {"cpu-used": "8"}) if name == "a.webm" else ("libx264", B_FRAMES)
    footage = probe(write_clip(tmp_path / name, num_frames=200, codec=codec, options=options))
    whole = read_frames(footage, SIZE, num_frames=200, fps=24)
    assert shown_numbers(whole) == list(range(200))
    for first in (1, 23, 24, 25, 101, 160, 195):
        window = read_frames(footage, SIZE, num_frames=5, fps=24, start=first / 24)
        assert torch.equal(window, whole[:, first : first + 5]), first
    assert torch.equal(read_frames(footage, SIZE, num_frames=200, fps=24), whole)


@pytest.mark.parametrize("name", ["a.mp4", "a.ts"])
def test_what_lies_far_before_a_window_is_not_decoded(tmp_path, name):
    """In a transport stream, where a seek leads to a place after the one that was asked for, not much of it."""
    container = {"movflags": "+faststart"} if name == "a.mp4" else {}
    path = write_clip(tmp_path / name, num_frames=200, options={"g": "24"}, container=container)
    footage = probe(path)
    damage(path, at=0.45 if name == "a.mp4" else 0.25, count=400)  # behind the index
    assert shown_numbers(read_frames(footage, SIZE, num_frames=3, fps=24, start=195 / 24)) == [195, 196, 197]
    with pytest.raises(FootageError, match="is damaged"):
        read_frames(footage, SIZE, num_frames=200, fps=24)


def test_frames_beyond_the_end_are_refused(tmp_path):
    footage = probe(write_clip(tmp_path / "a.mp4"))
    with pytest.raises(ValueError, match=r"a\.mp4: 17 frames at 16 fps from 0 s: it has 16"):
        read_frames(footage, SIZE, num_frames=17, fps=16)
    with pytest.raises(ValueError, match="it has 0"):
        read_frames(footage, SIZE, num_frames=1, fps=16, start=1.0)
    assert footage.frames(16, start=3.0) == 0


def test_one_frame_of_the_clip_is_held_at_a_time(tmp_path, monkeypatch):
    alive, most = [], 0
    original = module._image

    def watched(*args):
        nonlocal most
        image = original(*args)
        alive.append(weakref.ref(image))
        most = max(most, sum(each() is not None for each in alive))
        return image

    monkeypatch.setattr(module, "_image", watched)
    read(write_clip(tmp_path / "a.mp4", num_frames=48), fps=24)
    assert len(alive) == 48
    assert most <= 2  # the new one, and the one before, which the loop has not let go of


# -- upright, with square pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_frames_are_upright(tmp_path, rotation, mirrored):
    path = write_clip(tmp_path / "a.mp4", rotation=rotation, mirrored=mirrored, num_frames=20)
    footage = probe(path)
    size = SIZE if rotation % 180 == 0 else SIZE[::-1]
    assert (footage.height, footage.width) == size
    assert numbers(path, size=size, fps=24) == list(range(20))


@pytest.mark.parametrize(
    ("aspect", "rotation", "shown"),
    [(Fraction(4, 3), 0, (60, 120)), (Fraction(2, 3), 0, (60, 60)), (Fraction(4, 3), 90, (120, 60))],
)
def test_a_circle_stays_one(tmp_path, aspect, rotation, shown):
    """Whatever a pixel's shape is, and whatever is cut off."""
    height, width = (60, 90) if rotation == 0 else (90, 60)
    drawn = circle(height, width, float(aspect) if rotation == 0 else 1 / float(aspect))
    path = write_clip(
        tmp_path / "a.mp4", size=(60, 90), aspect=aspect, rotation=rotation, picture=lambda _: drawn, num_frames=1
    )
    footage = probe(path)
    assert (footage.height, footage.width) == shown
    for size in ((60, 120), (120, 120), (90, 60)):
        white = read_frames(footage, size, num_frames=1, fps=1)[:, 0].float().mean(0) > 127
        rows, columns = white.any(1).sum().item(), white.any(0).sum().item()
        diameter = 0.7 * min(shown) * max(size[0] / shown[0], size[1] / shown[1])
        assert [rows, columns] == pytest.approx([min(diameter, size[0]), min(diameter, size[1])], abs=2.5)


@pytest.mark.parametrize(
    ("shown", "size", "crop", "box"),
    [
        ((480, 848), (480, 848), "center", (0, 0, 848, 480)),
        ((1080, 1920), (480, 832), "center", (24, 0, 1872, 1080)),
        ((1080, 1920), (480, 832), "left", (0, 0, 1872, 1080)),
        ((1080, 1920), (480, 832), "right", (48, 0, 1872, 1080)),
        ((1920, 1080), (100, 100), "top", (0, 0, 1080, 1080)),
        ((1920, 1080), (100, 100), "bottom", (0, 840, 1080, 1080)),
        ((1920, 1080), (100, 100), "left", (0, 420, 1080, 1080)),
        ((10, 10), (40, 80), "center", (0, 2.5, 10, 5)),
    ],
)
def test_the_largest_part_of_the_right_shape_is_kept(shown, size, crop, box):
    assert kept_box(*shown, size, crop) == pytest.approx(box)


def test_a_crop_that_is_none_is_refused():
    with pytest.raises(ValueError, match="crop: 'middle' is none of center, top, bottom, left, right"):
        kept_box(1, 1, (1, 1), "middle")


@pytest.mark.parametrize(("crop", "first", "last"), [("left", 0, 127), ("center", 64, 191), ("right", 128, 255)])
def test_what_is_kept_is_where_it_was(tmp_path, crop, first, last):
    """A ramp of 256 columns, of which 128 are kept."""
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (128, 256, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "ramp.png")
    frame = read(tmp_path / "ramp.png", size=(128, 128), crop=crop)[:, 0]
    assert frame[:, :, 0].unique().tolist() == [first]
    assert frame[:, :, -1].unique().tolist() == [last]


def test_a_ramp_stays_a_ramp_and_a_fine_pattern_becomes_its_mean(tmp_path):
    """At factors that are no whole numbers, too: nothing aliases and nothing moves."""
    ramp = np.broadcast_to(np.arange(0, 240, dtype=np.uint8)[None, :, None], (90, 240, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "ramp.png")
    row = read(tmp_path / "ramp.png", size=(66, 176))[0, 0, 30].float()
    expected = (torch.arange(176) + 0.5) * 240 / 176 - 0.5
    assert (row - expected)[4:-4].abs().max() <= 1
    board = ((np.arange(90)[:, None] + np.arange(240)) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "board.png")
    fine = read(tmp_path / "board.png", size=(30, 80))[:, 0, 3:-3, 3:-3].float()
    assert (fine - 127.5).abs().max() <= 6


# -- fields -----------------------------------------------------------------------------------------------------------


def woven(number, top_first=True):
    """A bar that moves 4 pixels from field to field, to the right."""
    picture = np.zeros((*SIZE, 3), np.uint8)
    for field, parity in enumerate((0, 1) if top_first else (1, 0)):
        left = 8 + 4 * (2 * number + field)
        picture[parity::2, left : left + 12] = 255
    return picture


def edges(frame):
    """Where the bar begins in each line of `[3, H, W]`."""
    return (frame.float().mean(0) > 127).int().argmax(1)


@pytest.mark.parametrize("top_first", [True, False])
@pytest.mark.parametrize("name", ["a.mp4", "a.ts"])
def test_fields_are_taken_apart(tmp_path, name, top_first):
    """A frame shows its earlier field, in all lines."""
    picture = partial(woven, top_first=top_first)
    path = write_clip(tmp_path / name, fps=25, num_frames=9, picture=picture, fields="tff" if top_first else "bff")
    plain = write_clip(tmp_path / f"plain-{name}", fps=25, num_frames=9, picture=picture)
    video, combed = read(path, fps=25), read(plain, fps=25)
    assert video.shape[1] == 9
    for k in range(9):
        assert edges(combed[:, k])[top_first::2].tolist() == [8 + 8 * k + 4] * 32
        assert (edges(video[:, k]) - (8 + 8 * k)).abs().max() <= 1, k
    footage = probe(path)
    assert footage.times == pytest.approx([k / 25 for k in range(9)], abs=1e-4)
    for first in range(1, 9):
        window = read_frames(footage, SIZE, num_frames=1, fps=25, start=first / 25)
        assert torch.equal(window, video[:, first : first + 1]), first


def test_what_is_made_of_fields_does_not_depend_on_the_window(tmp_path):
    """Noise, in which each pixel follows from the frames before and after it."""
    noise = np.random.default_rng(0).integers(0, 256, (12, *SIZE, 3), np.uint8)
    path = write_clip(
        tmp_path / "a.mp4", num_frames=12, fps=25, picture=noise.__getitem__, fields="tff", options={"g": "4"}
    )
    video, footage = read(path, fps=25), probe(path)
    for first in range(12):
        window = read_frames(footage, SIZE, num_frames=1, fps=25, start=first / 25)
        assert torch.equal(window, video[:, first : first + 1]), first


def test_a_clip_that_becomes_interlaced_is_refused(tmp_path):
    one = write_clip(tmp_path / "one.h264", num_frames=12)
    two = write_clip(tmp_path / "two.h264", num_frames=12, fields="tff")
    (tmp_path / "both.h264").write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(FootageError, match="interlaced in part"):
        probe(tmp_path / "both.h264")


def test_a_clip_that_changes_its_size_is_refused(tmp_path):
    one = write_clip(tmp_path / "one.h264", num_frames=12)
    two = write_clip(tmp_path / "two.h264", num_frames=12, size=(32, 48))
    (tmp_path / "both.h264").write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(FootageError, match="changes its size from 64×96 to 32×48"):
        probe(tmp_path / "both.h264")


# -- colours ----------------------------------------------------------------------------------------------------------

KR_KB = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087)}
COLOURS = [(1, 1, 1), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0.5, 0.5), (0.9, 0.6, 0.3), (0.2, 0.5, 0.7)]


def stored(rgb, matrix, full_range, bits):
    """YUV of a colour in [0, 1], by ITU-T H.273, and the colour that the rounded numbers mean, in 0 to 255."""
    kr, kb = KR_KB[matrix]
    red, green, blue = rgb
    y = kr * red + (1 - kr - kb) * green + kb * blue
    cb, cr = (blue - y) / (2 * (1 - kb)), (red - y) / (2 * (1 - kr))
    top, step, half = 2**bits - 1, 2 ** (bits - 8), 2 ** (bits - 1)
    if full_range:
        yuv = [min(round(value), top) for value in (top * y, top * cb + half, top * cr + half)]
        y, cb, cr = yuv[0] / top, (yuv[1] - half) / top, (yuv[2] - half) / top
    else:
        yuv = [round(value) for value in (step * (16 + 219 * y), step * 224 * cb + half, step * 224 * cr + half)]
        y, cb, cr = (yuv[0] / step - 16) / 219, (yuv[1] - half) / step / 224, (yuv[2] - half) / step / 224
    red, blue = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
    green = (y - kr * red - kb * blue) / (1 - kr - kb)
    return yuv, [255 * min(max(value, 0), 1) for value in (red, green, blue)]


def colour_errors(path, matrix, full_range, pix_fmt="yuv420p", size=(16, 32), codec="ffv1", tagged=True):
    """How far the colours of a clip, one a frame, are from what was meant, in 255."""
    bits = av.VideoFormat(pix_fmt, 16, 16).components[0].bits
    pairs = [stored(rgb, matrix, full_range, bits) for rgb in COLOURS]
    tags = {"colorspace": matrix, "color_range": 2 if full_range else 1} if tagged else {}

    def prepare(_, number):
        return constant(pix_fmt, size, pairs[number][0])

    write_clip(path, size=size, num_frames=len(COLOURS), codec=codec, pix_fmt=pix_fmt, colours=tags, prepare=prepare)
    video = read(path, fps=24, size=size).double()
    assert (video - video[:, :, :1, :1]).abs().max() <= 1  # nothing is dithered
    return (video[:, :, 0, 0].T - torch.tensor([rgb for _, rgb in pairs])).abs().max().item()


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix", [1, 5, 6, 7])
@pytest.mark.parametrize(
    "pix_fmt", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv444p10le", "yuv420p12le"]
)
def test_colours_are_those_that_the_stream_names(tmp_path, pix_fmt, matrix, full_range):
    assert colour_errors(tmp_path / "a.mkv", matrix, full_range, pix_fmt) <= 1.5


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix", [1, 6])
def test_colours_of_h264_are_right(tmp_path, matrix, full_range):
    assert colour_errors(tmp_path / "a.mp4", matrix, full_range, codec="libx264") <= 1.5


@pytest.mark.parametrize(
    ("size", "matrix"),
    [((16, 1278), 6), ((16, 1280), 1), ((1280, 16), 1), ((718, 720), 6), ((720, 720), 1), ((480, 848), 6)],
)
def test_colours_that_are_not_named_go_by_the_size(tmp_path, size, matrix):
    assert colour_errors(tmp_path / "a.avi", matrix, False, size=size, codec="rawvideo", tagged=False) <= 1.5


def test_motion_jpeg_has_full_range(tmp_path):
    grey = np.full((16, 32, 3), 10, np.uint8)
    path = write_clip(
        tmp_path / "a.avi", size=(16, 32), codec="mjpeg", pix_fmt="yuvj420p", picture=lambda _: grey, num_frames=2
    )
    assert (read(path, size=(16, 32)).float() - 10).abs().mean() <= 2


@pytest.mark.parametrize(("pix_fmt", "stored_as"), [("gray", 100), ("gray10le", 400)])
def test_grey_has_full_range(tmp_path, pix_fmt, stored_as):
    path = write_clip(
        tmp_path / "a.mkv",
        num_frames=2,
        codec="ffv1",
        pix_fmt=pix_fmt,
        prepare=lambda *_: constant(pix_fmt, SIZE, [stored_as]),
    )
    assert read(path).unique().tolist() == [100]


def test_rgb_stays_as_it_is(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)
    path = write_clip(
        tmp_path / "a.mkv", size=(16, 32), codec="ffv1", pix_fmt="bgr0", picture=lambda _: colours, num_frames=2
    )
    assert (read(path, size=(16, 32))[:, 0].permute(1, 2, 0).numpy() == colours).all()


@pytest.mark.parametrize(("curve", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused_with_the_way_out(tmp_path, curve, name):
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": curve}
    path = write_clip(tmp_path / "a.mp4", pix_fmt="yuv420p10le", colours=tags, num_frames=2)
    with pytest.raises(FootageError, match=rf"is HDR \({name}\): .*zscale=t=linear.*tonemap=hable.*m=bt709"):
        probe(path)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"colorspace": 9, "color_primaries": 9, "color_trc": 14}, "BT.2020: .*zscale=p=bt709"),
        ({"colorspace": 9}, "BT.2020"),
        ({"color_primaries": 9}, "BT.2020"),
        ({"colorspace": 8}, "matrix 8 of H.273"),
    ],
)
def test_colours_that_cannot_be_brought_to_rgb_are_refused(tmp_path, tags, reason):
    with pytest.raises(FootageError, match=reason):
        probe(write_clip(tmp_path / "a.mp4", colours=tags, num_frames=2))


def test_transparent_video_is_over_black(tmp_path):
    def prepare(frame, _):
        pixels = np.full((16, 32, 4), 200, np.uint8)
        pixels[..., 3] = np.arange(32) * 8
        return av.VideoFrame.from_ndarray(pixels, format="rgba")

    path = write_clip(tmp_path / "a.mov", size=(16, 32), codec="png", pix_fmt="rgba", prepare=prepare, num_frames=2)
    row = read(path, size=(16, 32))[0, 0, 5].double()
    assert (row - 200 * torch.arange(32) * 8 / 255).abs().max() <= 1


# -- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.tiff"])
def test_a_picture_is_a_clip_of_one_frame(tmp_path, name):
    Image.fromarray(numbered(37)).save(tmp_path / name)
    footage = probe(tmp_path / name)
    assert (footage.times, footage.height, footage.width) == ((0.0,), *SIZE)
    assert [footage.frames(fps) for fps in (0.1, 8, 24, 1000)] == [1, 1, 1, 1]
    assert footage.frames(24, start=0.5) == 0
    assert numbers(tmp_path / name) == [37]


@pytest.mark.parametrize(("name", "options"), [("a.gif", {}), ("a.webp", {"lossless": True}), ("a.png", {})])
def test_an_animation_is_a_clip(tmp_path, name, options):
    pages = [Image.fromarray(numbered(k)) for k in range(4)]
    pages[0].save(
        tmp_path / name, save_all=True, append_images=pages[1:], duration=[100, 300, 50, 150], loop=0, **options
    )
    footage = probe(tmp_path / name)
    assert footage.times == pytest.approx((0, 0.1, 0.4, 0.45))
    assert footage.end == pytest.approx(0.6)
    assert numbers(tmp_path / name, fps=20) == [0, 0, 1, 1, 1, 1, 1, 1, 2, 3, 3, 3]


def test_another_page_is_no_other_frame(tmp_path):
    pages = [Image.fromarray(numbered(k)) for k in range(2)]
    pages[0].save(tmp_path / "a.tiff", save_all=True, append_images=pages[1:])
    assert probe(tmp_path / "a.tiff").frames(24) == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_upright(tmp_path, orientation):
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # the way back of the camera's note: turn by 90° clockwise
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    image = Image.fromarray(numbered(37))
    exif = Image.Exif()
    exif[0x0112] = orientation
    (image if turn is None else image.transpose(turn)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    footage = probe(tmp_path / "a.jpg")
    assert (footage.height, footage.width) == SIZE
    assert numbers(tmp_path / "a.jpg") == [37]


def test_transparent_pictures_are_over_black(tmp_path):
    Image.new("RGBA", (8, 8), (200, 100, 50, 128)).save(tmp_path / "a.png")
    Image.new("LA", (8, 8), (200, 0)).save(tmp_path / "b.png")
    assert read(tmp_path / "a.png", size=(8, 8))[:, 0, 3, 3].tolist() == [100, 50, 25]
    assert read(tmp_path / "b.png", size=(8, 8)).max() == 0


def test_grey_of_16_bits_is_not_cut_off(tmp_path):
    Image.fromarray(np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png", size=(2, 2))[1, 0].tolist() == [[0, 100], [200, 255]]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp"])
def test_a_picture_that_is_cut_short_is_refused(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    pages = [Image.fromarray(noise), Image.fromarray(noise[::-1])]
    content = io.BytesIO()
    several = {"save_all": True, "append_images": pages[1:]} if name in ("a.gif", "a.webp") else {}
    pages[0].save(content, format={"jpg": "JPEG"}.get(name[2:], name[2:].upper()), **several)
    (tmp_path / name).write_bytes(content.getvalue()[: len(content.getvalue()) * 7 // 10])
    with pytest.raises(FootageError, match=r"damaged|no video or picture"):
        probe(tmp_path / name)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_all_kinds_is_sorted_out(tmp_path, capfd):
    """Each file gives as many frames as it should, or its own reason; libav says nothing by itself."""
    pieces = torture_folder(tmp_path / "footage")
    capfd.readouterr()
    for name, piece in pieces.items():
        path = tmp_path / "footage" / name
        if piece.reason is None:
            footage = probe(path)
            assert footage.frames(16) == piece.frames, name
            video = read_frames(footage, (footage.height, footage.width), num_frames=piece.frames, fps=16)
            assert shown_number(video[:, 0]) == (1 if name == "picture.png" else 0), name
            if piece.same_as:
                assert path.read_bytes() == (tmp_path / "footage" / piece.same_as).read_bytes()
        else:
            with pytest.raises(FootageError, match=piece.reason) as caught:
                read(path)
            assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    files = {str(file.relative_to(tmp_path / "footage")) for file in (tmp_path / "footage").rglob("*.*")}
    captions = {str(Path(name).with_suffix(".txt")) for name, piece in pieces.items() if piece.caption is not None}
    assert files == set(pieces) | captions


@pytest.mark.parametrize("options", [{"movflags": "+faststart"}, {"movflags": "frag_keyframe+empty_moov"}, {}])
def test_an_mp4_that_is_cut_short_is_refused_wherever_it_ends(tmp_path, options):
    path = write_clip(tmp_path / "a.mp4", num_frames=48, container=options)
    assert len(probe(path).times) == 48
    for share in np.linspace(0.03, 0.97, 25):  # none of them between two fragments
        with pytest.raises(FootageError, match=r"cut short|no index|no frame can be decoded|beginning is damaged"):
            read(cut(path, tmp_path / "cut.mp4", share=share))


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mjpeg")])
def test_other_files_that_are_cut_short_are_refused(tmp_path, name, codec):
    """From the second frame on; before it there may be nothing that is known."""
    pix_fmt, options = ("yuvj420p", {}) if codec == "mjpeg" else ("yuv420p", {"g": "12"})
    path = write_clip(tmp_path / name, num_frames=96, codec=codec, pix_fmt=pix_fmt, options=options)
    assert len(probe(path).times) == 96
    for share in np.linspace(0.3, 0.8, 15):
        with pytest.raises(FootageError, match="cut short"):
            probe(cut(path, tmp_path / f"cut-{name}", share=share))


def test_an_avi_that_ends_in_its_last_frame_is_refused(tmp_path):
    """The decoder would make up what is missing of it."""
    noise = np.random.default_rng(0).integers(0, 256, (24, *SIZE, 3), np.uint8)
    path = write_clip(tmp_path / "a.avi", num_frames=24, codec="mjpeg", pix_fmt="yuvj420p", picture=noise.__getitem__)
    content = path.read_bytes()
    last = content.index(b"idx1")
    with pytest.raises(FootageError, match=r"damaged or cut short at 0\.96 s"):
        probe(cut(path, tmp_path / "cut.avi", size=last - 1000))


def test_a_last_frame_may_be_shown_as_long_as_any_other(tmp_path):
    """Matroska does not tell how long, but in the length of the whole."""
    path = write_clip(tmp_path / "a.mkv", times=[0.0, 1.0, 2.0], fps=10)
    content, lengths = path.read_bytes(), {}
    place = content.index(b"\x44\x89\x88") + 3
    for seconds in (3.0, 6.0):
        lengths[seconds] = tmp_path / f"{seconds}.mkv"
        announced = struct.pack(">d", 1000 * seconds)
        lengths[seconds].write_bytes(content[:place] + announced + content[place + 8 :])
    assert len(probe(lengths[3.0]).times) == 3
    with pytest.raises(FootageError, match=r"cut short: it has 2\.10 s of 6\.00 s"):
        probe(lengths[6.0])


def test_an_avi_that_ends_between_two_frames_is_refused(tmp_path):
    path = write_clip(tmp_path / "a.avi", num_frames=24, codec="mjpeg", pix_fmt="yuvj420p")
    content = path.read_bytes()
    place = content.index(b"movi")
    for _ in range(11):
        place = content.index(b"00dc", place + 4)
    with pytest.raises(FootageError, match=r"cut short: it has 0\.42 s of 1\.00 s"):
        probe(cut(path, tmp_path / "cut.avi", size=place))


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mkv", "libx264"), ("a.mp4", "libx264"), ("a.mp4", "libx265"), ("a.mp4", "mpeg4"), ("a.mkv", "mpeg2video")],
)
def test_a_damaged_frame_is_not_shown(tmp_path, name, codec):
    """What the decoder puts in its place would look like a frame."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 96, 3), np.uint8)
    container = {"movflags": "+faststart"} if name == "a.mp4" else {}
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {"qp": "20", "preset": "ultrafast"}
    path = write_clip(
        tmp_path / name,
        num_frames=48,
        fps=25,
        codec=codec,
        options=options,
        container=container,
        picture=noise.__getitem__,
    )
    assert read(path).shape[1] == 31
    with pytest.raises(FootageError, match="is damaged"):
        read(damage(path, at=0.5, count=20_000))


def test_a_damaged_slice_is_not_shown(tmp_path):
    """Other slices are whole; decoded in threads of their own, one that is not would not be told of."""
    noise = np.random.default_rng(0).integers(0, 256, (48, *SIZE, 3), np.uint8)
    options = {"qp": "30", "preset": "veryfast", "slices": "4"}
    path = write_clip(tmp_path / "a.mkv", num_frames=48, options=options, picture=noise.__getitem__)
    with pytest.raises(FootageError, match="a frame is incomplete"):
        read(damage(path, at=0.5, count=1))


def test_a_transport_stream_with_a_gap_is_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (48, *SIZE, 3), np.uint8)
    path = write_clip(tmp_path / "a.ts", num_frames=48, picture=noise.__getitem__)
    content, packets = path.read_bytes(), path.stat().st_size // 188
    path.write_bytes(content[: packets // 2 * 188] + content[(packets // 2 + 3) * 188 :])
    with pytest.raises(FootageError, match="is damaged"):
        read(path)


def test_a_frame_that_was_promised_and_does_not_come_is_missed(tmp_path):
    footage = probe(write_clip(tmp_path / "a.mp4"))
    for extra in (0.5 + 1 / 48, 1.0):
        promised = replace(footage, times=tuple(sorted((*footage.times, extra))), end=1.1)
        with pytest.raises(FootageError, match=rf"no frame comes out at {extra:.2f} s"):
            read_frames(promised, SIZE, num_frames=26, fps=24)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.ts", "a.gif", "a.tiff", "a.webp"])
def test_damage_of_any_kind_ends_in_one_line(tmp_path, name, recwarn):
    """Cut, changed and left out at random: frames come out, or a reason, and never another error."""
    if name in ("a.gif", "a.tiff", "a.webp"):
        Image.fromarray(numbered(1)).save(tmp_path / name, save_all=True, append_images=[Image.fromarray(numbered(2))])
    else:
        write_clip(tmp_path / name)
    original, random = (tmp_path / name).read_bytes(), np.random.default_rng(0)
    reasons = []
    for attempt in range(30):
        content = bytearray(original)
        first, last = sorted(random.integers(0, len(content), 2))
        if attempt % 3 == 0:
            del content[max(first, 1) :]
        elif attempt % 3 == 1:
            del content[first : min(last, first + 1000)]
        else:
            content[first] ^= 0xFF
            content[last] ^= 0xFF
        (tmp_path / name).write_bytes(content)
        try:
            read(tmp_path / name)
        except FootageError as error:
            reasons.append(str(error))
    assert len(reasons) >= 5
    assert not any("\n" in reason for reason in reasons)
    assert not recwarn.list


def test_sound_alone_is_refused(tmp_path):
    with pytest.raises(FootageError, match="has no video, only sound"):
        probe(write_sound(tmp_path / "a.m4a"))


def test_a_cover_is_no_video(tmp_path):
    with av.open(tmp_path / "a.mp4", "w") as output:
        sound, cover = output.add_stream("aac", rate=16000), output.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = *SIZE, "yuvj420p"
        cover.disposition = Disposition.attached_pic.value
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        picture = av.VideoFrame.from_ndarray(numbered(1), format="rgb24").reformat(format="yuvj420p")
        for stream, each in ((cover, picture), (sound, frame)):
            output.mux(stream.encode(each))
            output.mux(stream.encode())
    with pytest.raises(FootageError, match="only sound and a cover picture"):
        probe(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "text, of which libav would make a picture of letters\n" * 50),
        ("a.mp4", "text under another name\n" * 50),
        ("a.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\nother.ts\n#EXT-X-ENDLIST\n"),
        ("a.mp4", "ffconcat version 1.0\nfile other.mp4\n"),
    ],
)
def test_what_is_no_video_is_refused(tmp_path, name, content):
    """Playlists, too: they would lead to files that nobody has named."""
    write_clip(tmp_path / "other.ts")
    write_clip(tmp_path / "other.mp4")
    (tmp_path / name).write_text(content)
    with pytest.raises(FootageError, match="is no video or picture"):
        probe(tmp_path / name)


def test_a_heif_picture_is_refused_as_such(tmp_path):
    """Its tiles would be taken for videos."""
    boxes = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0\0\0\x0cmeta\0\0\0\0"
    (tmp_path / "a.heic").write_bytes(boxes)
    with pytest.raises(FootageError, match="HEIF or AVIF"):
        probe(tmp_path / "a.heic")


@pytest.mark.parametrize("name", ["a:b.mp4", "http:a.mp4", "%03d.mp4", "it's 数 #?&=.mp4", "no ending", "a.txt"])
def test_names_do_not_matter(tmp_path, name, monkeypatch):
    write_clip(tmp_path / "a.mp4", num_frames=12).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert numbers(Path(name), fps=24) == list(range(12))


def test_titles_need_not_be_text(tmp_path):
    path = write_clip(tmp_path / "a.mp4", num_frames=12)
    path.write_bytes(path.read_bytes().replace(b"VideoHandler", b"\xff\xfedeoHandler"))
    assert numbers(path, fps=24) == list(range(12))


def test_names_need_not_be_text(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.mp4"))
    write_clip(tmp_path / "a.mp4", num_frames=12).rename(path)
    assert numbers(path, fps=24) == list(range(12))


def test_what_is_not_there_or_no_file_is_refused(tmp_path):
    path = write_clip(tmp_path / "a.mp4")
    (tmp_path / "link.mp4").symlink_to("nowhere.mp4")
    footage = probe(path)
    picture = tmp_path / "a.png"
    Image.fromarray(numbered(1)).save(picture)
    still = probe(picture)
    path.unlink()
    picture.unlink()
    for gone in (path, tmp_path / "link.mp4"):
        with pytest.raises(FootageError, match="is not there"):
            probe(gone)
    for each in (footage, still):
        with pytest.raises(FootageError, match="is not there"):
            read_frames(each, SIZE, num_frames=1, fps=16)
    for other in (tmp_path, Path("/dev/null")):
        with pytest.raises(FootageError, match="a folder or a device"):
            probe(other)
    (tmp_path / "b.mp4").touch()
    with pytest.raises(FootageError, match="is empty: it has 0 bytes"):
        probe(tmp_path / "b.mp4")


@pytest.mark.parametrize(
    ("error", "reason"),
    [(PermissionError(13, "Permission denied"), "may not be read"), (OSError(5, "Input/output error"), "Input/output")],
)
def test_what_cannot_be_read_is_refused(tmp_path, monkeypatch, error, reason):
    path = write_clip(tmp_path / "a.mp4")

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(Path, "open", fails)
    with pytest.raises(FootageError, match=reason):
        probe(path)


def test_a_few_bytes_are_no_unfinished_recording(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"abc")
    with pytest.raises(FootageError, match="is no video or picture"):
        probe(tmp_path / "broken.mp4")
