"""Contact sheets and animations: the right frames at the right places, in files that open."""

import av
import numpy as np
import pytest
import torch
from PIL import Image

from moedistill.data.footage import probe, read_frames
from moedistill.media import _label, contact_sheet, side_by_side, smaller_mp4, words_of, write_mp4


def videos(count=2, channels=1, frames=8, size=24, first=0.21):
    """Grey videos that get brighter with each frame and each sample."""
    step = torch.arange(frames).view(1, 1, -1, 1, 1) / 20 + torch.arange(count).view(-1, 1, 1, 1, 1) / 5
    return (first + step).expand(count, channels, frames, size, size).clone()


def pixels(image):
    return np.asarray(image.convert("RGB")).astype(int)


def runs_of_grey(row):
    """Grey levels along a line of pixels with the lengths of their runs, without the background's."""
    levels, found = row[:, 0], []
    edges = np.flatnonzero(np.diff(levels)) + 1
    for part in np.split(levels, edges):
        if part[0] != 24:
            found.append((int(part[0]), len(part)))
    return found


def grey(video, frame):
    return round(float(video[0, frame, 0, 0]) * 255)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_shows_every_second_frame_of_each_sample(tmp_path, channels):
    rows = {"dark": videos(channels=channels), "light": videos(channels=channels, first=0.43)}
    contact_sheet(tmp_path / "sheet.png", rows, ["3 right", "7 up"])
    with Image.open(tmp_path / "sheet.png") as image:
        picture = pixels(image)
    bands = [picture[28 + row * 82 + 5] for row in range(2)]  # a line near the top of each row of frames
    for (name, video), band in zip(rows.items(), bands, strict=True):
        expected = [(grey(sample, frame), 72) for sample in video for frame in (0, 2, 4, 6)]
        assert runs_of_grey(band)[-8:] == expected, name


def test_columns_that_do_not_fit_go_below(tmp_path):
    rows, captions = {"dark": videos(count=3), "light": videos(count=3, first=0.43)}, ["a", "b", "c"]
    contact_sheet(tmp_path / "wide.png", rows, captions)
    contact_sheet(tmp_path / "narrow.png", rows, captions, width=800)
    with Image.open(tmp_path / "wide.png") as image:
        wide = pixels(image)
    with Image.open(tmp_path / "narrow.png") as image:
        narrow = pixels(image)
    block, column = 28 + 2 * 82, 4 * 74 + 10
    left = wide.shape[1] - 3 * column
    assert narrow.shape[:2] == (2 * block, left + 2 * column)
    assert (narrow[:block] == wide[:, : left + 2 * column]).all()
    assert (narrow[block:, left : left + column] == wide[:, left + 2 * column :]).all()
    assert (narrow[block + 28 :, :left] == wide[28:, :left]).all()
    assert (narrow[block:, left + column :] == 24).all()


def test_colours_are_kept(tmp_path):
    video = torch.zeros(1, 3, 2, 8, 8)
    video[:, 0], video[:, 2] = 1.0, 0.5
    contact_sheet(tmp_path / "sheet.png", {"m": video}, ["c"], size=8)
    with Image.open(tmp_path / "sheet.png") as image:
        assert (pixels(image) == [255, 0, 128]).all(-1).sum() == 64


def test_large_videos_are_averaged_down(tmp_path):
    checkers = (torch.arange(96)[:, None] + torch.arange(192)[None]) % 2 * 1.0
    contact_sheet(tmp_path / "sheet.png", {"m": checkers.expand(1, 1, 81, 96, 192)}, ["c"], size=24)
    with Image.open(tmp_path / "sheet.png") as image:
        grey = (abs(pixels(image).astype(int) - 128) <= 1).all(-1)
    # Four frames of 24×48 pixels, each the mean of black and white; a pixel of the labels may have that grey too.
    assert 0 <= grey.sum() - 4 * 24 * 48 < 20


@pytest.mark.parametrize(("size", "scale"), [(72, 3), (71, 2), (24, 1)])
def test_frames_are_enlarged_by_whole_numbers(tmp_path, size, scale):
    contact_sheet(tmp_path / "sheet.png", {"m": videos(count=1)}, ["c"], size=size)
    with Image.open(tmp_path / "sheet.png") as image:
        assert [length for _, length in runs_of_grey(pixels(image)[28])[-4:]] == [24 * scale] * 4


def test_values_outside_the_range_are_cut(tmp_path):
    video = torch.tensor([-1.0, 2.0]).view(2, 1, 1, 1, 1).expand(2, 1, 1, 4, 4)
    contact_sheet(tmp_path / "sheet.png", {"m": video}, ["a", "b"], size=4)
    with Image.open(tmp_path / "sheet.png") as image:
        assert runs_of_grey(pixels(image)[28])[-2:] == [(0, 4), (255, 4)]


def test_an_animation_has_all_frames_of_all_models(tmp_path):
    rows = {"teacher": videos(), "student": videos(first=0.43)}
    side_by_side(tmp_path / "both.webp", rows, fps=5.0)
    with Image.open(tmp_path / "both.webp") as image:
        assert (image.format, image.n_frames, image.info.get("loop")) == ("WEBP", 8, 0)
        for frame in range(8):
            image.seek(frame)
            picture = pixels(image)
            assert image.info["duration"] == 200
            for row, video in enumerate(rows.values()):
                line = picture[row * 102 + 48]
                centres = [line.shape[0] - (2 - sample) * 102 + 48 for sample in range(2)]
                shown = [line[x][0] for x in centres]
                assert shown == pytest.approx([grey(sample, frame) for sample in video], abs=4)


@pytest.mark.parametrize(("height", "width"), [(24, 32), (23, 31)])
def test_an_mp4_holds_the_video(tmp_path, height, width):
    """Sides are made even; colours are right within what the format loses."""
    video = torch.zeros(3, 5, height, width)
    video[0, :, :, : width // 2] = 0.8  # red on the left
    video[2, 3:] = 0.6  # blue from the fourth frame on
    write_mp4(tmp_path / "video.mp4", video, fps=12.5)
    with av.open(tmp_path / "video.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.codec.name, stream.pix_fmt, float(stream.average_rate)) == ("h264", "yuv420p", 12.5)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.stack(frames).shape == (5, 24, 32, 3)
    found = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)[:, :, :height, :width] / 255
    inside = [*range(2, width // 2 - 2), *range(width // 2 + 2, width - 2)]
    assert (found - video)[..., inside].abs().max() < 0.06


def test_one_channel_is_grey(tmp_path):
    write_mp4(tmp_path / "video.mp4", torch.full((1, 2, 16, 16), 0.5), fps=8)
    with av.open(tmp_path / "video.mp4") as container:
        frame = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert abs(frame.astype(int) - 128).max() <= 3


@pytest.mark.parametrize("size", [(64, 96), (720, 1280)], ids=["small", "large"])
def test_the_colours_of_a_video_are_named_and_are_those_that_were_given(tmp_path, size):
    """Players take small videos for BT.601's and large ones for BT.709's, unless they are told."""
    colour = torch.tensor([0.9, 0.2, 0.0])
    write_mp4(tmp_path / "video.mp4", colour.view(3, 1, 1, 1).expand(3, 3, *size), fps=8)
    with av.open(tmp_path / "video.mp4") as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (1, 1)  # BT.709, limited
    shown = read_frames(probe(tmp_path / "video.mp4"), size, num_frames=3, fps=8).float()
    assert (shown - 255 * colour.view(3, 1, 1, 1)).abs().max() <= 2


def test_letters_that_english_has_not_are_drawn():
    """Pillow's own font draws a box for each of them."""
    drawn = {pixels(_label(text, 16)).tobytes() for text in "äéшλ"}
    assert len(drawn) == 4


@pytest.mark.parametrize("size", [(480, 832), (64, 48), (30, 14)])
def test_a_smaller_mp4_has_the_same_frames(tmp_path, size):
    """As many, as fast, of the same shape and colours; never enlarged."""
    video = torch.rand(3, 9, 3, 4, generator=torch.Generator().manual_seed(0))
    video = torch.nn.functional.interpolate(video, size=size, mode="bilinear")
    write_mp4(tmp_path / "whole.mp4", video, fps=12)
    (tmp_path / "small.mp4").write_bytes(smaller_mp4(tmp_path / "whole.mp4", height=240))
    assert (tmp_path / "small.mp4").stat().st_size < (tmp_path / "whole.mp4").stat().st_size
    about = probe(tmp_path / "small.mp4")
    assert (about.height, about.width) == ((240, 416) if size[0] > 240 else size)
    with av.open(tmp_path / "small.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate) == (9, 12)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    for frame, given in zip(frames, video.permute(1, 2, 3, 0), strict=True):
        assert np.abs(frame.mean((0, 1)) - 255 * given.mean((0, 1)).numpy()).max() < 6


def test_words_of_a_caption_name_a_file():
    assert words_of("A cat, walking!  On grass") == "_a_cat_walking_on_grass"
    assert words_of("../../x/</script>") == "_x_script"
    assert words_of("…") == ""
    assert len(words_of("word " * 50)) <= 41
