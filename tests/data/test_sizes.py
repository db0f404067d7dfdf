"""At which size and length a clip is trained."""

import re

import pytest

from moedistill.data.sizes import buckets, check_lengths, fit, window_length, window_starts
from moedistill.recipe.loading import load_recipe

LARGE = ("dcm_wan_1_3b", "dcm_hunyuan", "dcm_cogvideox_2b", "dcm_ltx", "dcm_open_sora")


def backbone(recipe, **video):
    return load_recipe(recipe, [f"backbone.video.{key}={value}" for key, value in video.items()]).backbone


@pytest.mark.parametrize("recipe", LARGE)
def test_buckets_have_what_the_model_takes_and_the_recipes_pixels_at_most(recipe):
    config = backbone(recipe)
    own = config.video.height, config.video.width
    sizes = buckets(config)
    assert sizes[0] == own
    assert len(set(sizes)) == len(sizes) >= 9
    assert {(w, h) for h, w in sizes} == set(sizes)  # what stands is as large as what lies
    for h, w in sizes:
        config.latent_shape(type(config.video)(num_frames=config.video.num_frames, height=h, width=w))
        assert own[0] * own[1] / 1.2 <= h * w <= own[0] * own[1]


@pytest.mark.parametrize(
    ("clip", "bucket", "scale", "cropped"),
    [
        ((1080, 1920), (480, 832), 4 / 9, 0.025),  # 1920 · 4/9 = 853.3, of which 832 stay
        ((1920, 1080), (832, 480), 4 / 9, 0.025),
        ((720, 720), (624, 624), 624 / 720, 0.0),
        ((480, 832), (480, 832), 1.0, 0.0),
        ((1440, 1920), (544, 720), 544 / 1440, 1 - 720 / (1920 * 544 / 1440)),
        ((900, 1000), (624, 624), 624 / 900, 0.1),
    ],
)
def test_a_clip_goes_to_the_bucket_of_which_least_is_cut_away(clip, bucket, scale, cropped):
    found = fit(*clip, buckets(backbone("dcm_wan_1_3b")), upscale=False)
    assert (found.height, found.width) == bucket
    assert found.scale == pytest.approx(scale)
    assert found.cropped == pytest.approx(cropped)


def test_portrait_stays_portrait_and_nothing_is_enlarged_unless_allowed():
    sizes = buckets(backbone("dcm_wan_1_3b"))
    with pytest.raises(ValueError, match=re.escape("is 240×426, and would have to be enlarged 1.953 times for 464×")):
        fit(240, 426, [(464, 832), *sizes], upscale=False)
    found = fit(240, 426, sizes, upscale=True)
    assert (found.height, found.width) == (480, 832)
    # Lying it would fit without being enlarged.
    with pytest.raises(ValueError, match="enlarged"):
        fit(850, 840, [(480, 832), (880, 448), (832, 900)][:2], upscale=False)


def test_lengths_are_the_models():
    config = backbone("dcm_wan_1_3b")
    check_lengths(config, [1, 17, 81])
    with pytest.raises(
        ValueError, match=re.escape("lengths 16: num_frames 16 must be 1 more than a multiple of 4: 13")
    ):
        check_lengths(config, [17, 16])


def test_a_clip_has_the_longest_length_that_it_fills():
    assert [window_length(frames, [81, 17, 33]) for frames in (17, 32, 33, 80, 81, 500)] == [17, 17, 33, 33, 81, 81]
    with pytest.raises(ValueError, match=re.escape("has 16 frames at the rate of the set, and 17 are wanted")):
        window_length(16, [81, 17])
    with pytest.raises(ValueError, match="is one frame at"):
        window_length(1, [17])


def test_windows_are_as_many_as_are_filled_and_wanted():
    assert list(window_starts(50, 17, 1, 17)) == [0]
    assert list(window_starts(50, 17, 9, 17)) == [0, 17]
    assert list(window_starts(51, 17, 9, 17)) == [0, 17, 34]
    assert list(window_starts(50, 17, 3, 10)) == [0, 10, 20]
