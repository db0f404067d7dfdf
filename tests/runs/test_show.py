"""`moedistill data show`: what is in a set at a glance, and a few of its samples to look at."""

import av
import numpy as np
import pytest
import torch
from helpers import digits_backbone
from PIL import Image
from stored_sets import NAMES, write_published

from moedistill import cli
from moedistill.components.plugins import load_plugins
from moedistill.data.show import Overview, distributions, spread_over
from moedistill.data.writing import Item, write_set
from moedistill.errors import UserError
from moedistill.recipe.building import to_plain
from moedistill.runs.show import show_set
from moedistill_digits.backbone import DigitsBackboneConfig
from moedistill_digits.data import DigitsConfig
from moedistill_wan.backbone import WanConfig

DIGITS = {"kind": "digits", "pretrained": None, "width": 16, "num_layers": 2, "num_heads": 2}
BUCKETS = [(16, 5, 4, 6), (16, 3, 6, 4)]


def digits_set(folder, **options):
    source = DigitsConfig(styles_per_digit=1).build(None)
    items = [
        Item({"caption": f"a digit, number {i}"}, lambda i=i: {"latents": source[i].latents, **source[i].conditioning})
        for i in range(12)
    ]
    write_set(folder, items, **options)
    return folder


def wan_set(folder, count=5, **options):
    """Of two sizes, for the miniature of Wan."""
    generator = torch.Generator().manual_seed(0)
    items = [
        Item(
            {"caption": "rain " * (1 + i)},
            lambda i=i: {
                "latents": torch.randn(BUCKETS[i % 2], generator=generator),
                "prompt_embeds": torch.ones(12, 24),
            },
        )
        for i in range(count)
    ]
    write_set(folder, items, **options)
    return folder


def wan():
    """The keys of Wan's miniature."""
    return {"kind": "wan", **to_plain(WanConfig(pretrained=None).tiny())}


def show(path, **options):
    return show_set(path, load_plugins(), device="cpu", **options)


def frames_of(file):
    with av.open(file) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


# -- distributions ----------------------------------------------------------------------------------------------------


def test_lengths_sizes_and_captions_are_counted():
    shapes = {i: (16, (3, 5)[i % 4 == 0], 4, 6) for i in range(8)}
    found = Overview(shapes, {i: "word " * i for i in range(1, 6)})
    assert list(distributions(found, (4, 8))) == [
        "frames",
        f"   9  {'█' * 30} 6",
        f"  17  {'█' * 10} 2",
        "height × width",
        f"  32×48  {'█' * 30} 8",
        "words of a caption: 1 to 5, half of them 2 to 4, median 3; 3 samples have no caption",
    ]
    assert list(distributions(found))[:1] == ["latent frames"]
    many = Overview({i: (16, 1 + i // 2, 4, 6) for i in range(20)})
    lines = list(distributions(many))
    assert lines[5] == f"  6 others  {'█' * 30} 12"
    assert lines[-1] == "captions: none"


@pytest.mark.parametrize(
    ("sizes", "num", "chosen"),
    [
        ("aaaaaaaaaa", 3, [1, 5, 8]),
        ("aaaaaaabbb", 4, [1, 5, 7, 9]),
        ("aaaaaaaaab", 4, [1, 4, 7, 9]),  # what one size does not have, the other gives
        ("abcabcabca", 1, [6]),  # of more sizes than samples the most frequent
        ("ab", 8, [0, 1]),
        ("ab", 0, []),
        ("", 8, []),
    ],
)
def test_samples_are_spread_over_sizes_and_over_each_size(sizes, num, chosen):
    shapes = {i: ("abc".index(size), 1, 1, 1) for i, size in enumerate(sizes)}
    assert spread_over(shapes, num) == chosen


# -- what is decoded --------------------------------------------------------------------------------------------------


def test_samples_are_decoded_by_the_model_that_the_set_was_made_for(tmp_path):
    path = digits_set(tmp_path / "set", made_for={"backbone": DIGITS})
    shown = show(path, num=3)
    assert shown.output == path / "show"
    assert shown.lines[-1] == str(shown.output)
    assert sorted(file.name for file in shown.output.iterdir()) == [
        "000002.mp4", "000006.mp4", "000010.mp4", "show.png",
    ]  # fmt: skip
    source = DigitsConfig(styles_per_digit=1).build(None)
    expected = digits_backbone().decode(source[6].latents[None])[0]  # [1, T, H, W]
    seen = frames_of(shown.output / "000006.mp4")[..., 0] / 255
    assert seen.shape == expected.shape[1:]
    assert np.abs(seen - expected[0].numpy()).mean() < 0.02
    assert show(path, num=1).output == path / "show-2"


def test_sizes_of_all_kinds_share_a_sheet(tmp_path):
    path = wan_set(tmp_path / "set", made_for={"backbone": wan()})
    shown = show(path, num=4)
    assert shown.lines[:8] == [
        f"{path}: 5 samples, moedistill layout",
        "frames",
        f"   9  {'█' * 20} 2",
        f"  17  {'█' * 30} 3",
        "height × width",
        f"  32×48  {'█' * 30} 3",
        f"  48×32  {'█' * 20} 2",
        "words of a caption: 1 to 5, half of them 2 to 4, median 3",
    ]
    assert shown.lines[8] == "  sample 0: rain"
    shapes = {file.name: frames_of(file).shape for file in shown.output.glob("*.mp4")}
    assert shapes == {
        "000000.mp4": (17, 32, 48, 3), "000001.mp4": (9, 48, 32, 3),
        "000003.mp4": (9, 48, 32, 3), "000004.mp4": (17, 32, 48, 3),
    }  # fmt: skip
    assert Image.open(shown.output / "show.png").width > 4 * 48


def test_no_network_is_loaded(tmp_path, monkeypatch):
    path = wan_set(tmp_path / "set")
    config = WanConfig(pretrained=None).tiny()
    monkeypatch.setattr(WanConfig, "build", lambda *_: pytest.fail("the network was built"))
    assert show(path, backbone=config, output=tmp_path / "out").output == tmp_path / "out"


# -- what is not ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_decoded_is_said_and_the_rest_shown(tmp_path):
    path = wan_set(tmp_path / "set")
    shown = show(path)
    assert shown.lines[1] == "latent frames"
    assert shown.lines[-1] == (
        "nothing is decoded: the set does not say what it was made for; give --recipe to see its samples"
    )
    away = WanConfig(pretrained="someone/some-weights")
    shown = show(path, backbone=away)
    assert "nothing is decoded: the weights of someone/some-weights are not on this machine." in shown.lines[-1]
    shown = show(path, backbone=DigitsBackboneConfig(pretrained=None))
    assert shown.lines[-1].startswith("nothing is decoded: sample 0 has latents [16, 5, 4, 6]; the model's have 12 ch")
    for wrong in ({"kind": "no_such"}, 3, {"kind": "wan", "no_such": 1}):
        wan_set(path, made_for={"backbone": wrong})
        said = show(path).lines[-1]
        assert said.startswith("nothing is decoded: the backbone that the set was made for cannot be read: ")
        assert said.endswith("; give --recipe")
    assert not (path / "show").exists()


def test_texts_alone_and_broken_samples(tmp_path):
    text = {"prompt_embeds": torch.ones(6, 8)}
    write_set(tmp_path / "a", [Item({"shape": [16, 0, 4, 6], "caption": f"text {i}"}, lambda: text) for i in range(3)])
    assert show(tmp_path / "a", backbone=WanConfig(pretrained=None).tiny()).lines == [
        f"{tmp_path}/a: 3 samples, moedistill layout",
        "words of a caption: 2 to 2, half of them 2 to 2, median 2",
        "  sample 0: text 0", "  sample 1: text 1", "  sample 2: text 2",
    ]  # fmt: skip
    write_published(tmp_path / "b")
    (tmp_path / "b" / "latent" / NAMES[1]).write_bytes(b"")
    lines = show(tmp_path / "b").lines
    assert f"1 samples cannot be read; `moedistill data check {tmp_path}/b` names them" in lines
    with pytest.raises(UserError, match=r"data: there is no file or folder .*nowhere"):
        show(tmp_path / "nowhere")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x.mp4").touch()
    with pytest.raises(UserError, match="is not empty"):
        show(tmp_path / "a", output=tmp_path / "used")


def test_the_command(tmp_path, capsys):
    path = digits_set(tmp_path / "set")
    for args, code, said in (
        ([path, "--recipe", "dcm_digits", "--num", "2", "--device", "cpu"], 0, f"{path}/show\n"),
        ([path], 0, "give --recipe to see its samples\n"),
        ([path, "--set", "seed=1"], 2, "give one with --recipe"),
        ([tmp_path / "nowhere"], 2, "there is no file or folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["data", "show", *map(str, args)])
        out, err = capsys.readouterr()
        assert stop.value.code == code
        assert said in (err if code else out)
        assert "Traceback" not in err
    assert len(list((path / "show").glob("*.mp4"))) == 2
