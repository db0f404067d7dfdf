"""Contact sheets and animations: the right frames at the right places, in files that open."""

import numpy as np
import pytest
import torch
from PIL import Image

from moedistill.media import contact_sheet, side_by_side


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
