"""Previews: what is made of which noise by whom, when, and that training is the same bits with and without them."""

import json
import sys
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from accelerate.tracking import TensorBoardTracker
from helpers import dcm_recipe, distil, equal, set_up, set_up_trained, tiny_recipe, trees
from PIL import Image
from started_commands import start_pair

from moedistill import hookimpl
from moedistill.components.plugins import load_plugins
from moedistill.data.base import Sample
from moedistill.data.latents import write_latents
from moedistill.errors import RecipeError, UserError, WriteError
from moedistill.model.backbone import TEACHER
from moedistill.recipe.keys import PreviewConfig
from moedistill.recipe.loading import load_recipe
from moedistill.runs.callbacks import trackers
from moedistill.runs.loop import run
from moedistill.runs.sample import sample_run
from moedistill.runtime.checkpoint import load_tree
from moedistill.runtime.randomness import Draws
from moedistill.stages import preview as previews
from moedistill.stages.preview import Preview
from moedistill_digits.backbone import DigitsBackbone

PROMPTS = ["3 right", "7 up", "0 down"]
ASKED = {"every": 2, "prompts": PROMPTS, "weights": "ema", "compare_teacher": True}


def with_previews(recipe, **keys):
    for stage in recipe["stages"]:
        if "expert" in stage:
            stage["preview"] = {**ASKED, **keys}
    return recipe


def made(folder):
    """Everything that previews wrote, by path."""
    files = sorted(path for path in (folder / "previews").rglob("*") if path.is_file())
    return {path.relative_to(folder / "previews").as_posix(): path.read_bytes() for path in files}


def about(folder, stage, name):
    return json.loads((folder / "previews" / stage / name / "preview.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Both stages of DCM, with everything that has a state, with and without previews."""
    folder = tmp_path_factory.mktemp("preview")
    run(dcm_recipe(4), output=folder / "off", device="cpu")
    run(with_previews(dcm_recipe(4)), output=folder / "on", device="cpu")
    return folder


# -- training is untouched --------------------------------------------------------------------------------------------


def test_training_is_the_same_bits_with_and_without(whole):
    names = sorted(path.name for path in (whole / "off" / "checkpoints").iterdir())
    assert len(names) == 8
    for name in names:
        off, on = (trees(whole / which / "checkpoints" / name) for which in ("off", "on"))
        for found in (off, on):
            found["state"].pop("recipe")
        assert equal(off, on), name
    assert (whole / "off" / "metrics.jsonl").read_bytes() == (whole / "on" / "metrics.jsonl").read_bytes()


def test_networks_that_draw_are_left_their_random_numbers(tmp_path, monkeypatch):
    """Dropout draws from torch's own generator."""
    velocity, experts = DigitsBackbone.velocity, []

    def noisy(self, network, x, sigma, cond):
        return velocity(self, network, x, sigma, cond) + 0.1 * torch.randn(x.shape)

    monkeypatch.setattr(DigitsBackbone, "velocity", noisy)
    for name, keys in (("off", None), ("on", {"every": 1, "num": 2})):
        torch.manual_seed(0)
        result = run(tiny_recipe([distil(preview=keys)]), output=tmp_path / name, device="cpu")
        experts.append(load_tree(result.checkpoint, "experts"))
    assert equal(*experts)


@pytest.mark.parametrize("recipe", ["dcm_wan_1_3b", "dcm_wan22_a14b"])
def test_a_miniature_of_wan_learns_the_same(recipe, tmp_path):
    """Guided by a second pass, with weights in bfloat16; of 2.2 there are two networks, one of which waits."""
    found = []
    for name, keys in (("off", {}), ("on", {"preview": {"every": 1, "compare_teacher": True}})):
        settings = [
            f"stages.{stage}.{key}={json.dumps(value)}"
            for stage in ("semantic", "detail")
            for key, value in keys.items()
        ]
        loaded = load_recipe(recipe, settings)
        result = run(loaded, output=tmp_path / name, device="cpu", smoke=True)
        found.append({tree: load_tree(result.checkpoint, tree) for tree in ("experts", "training", "ema")})
    assert equal(*found)
    assert len(list((tmp_path / "on" / "previews").rglob("step_*/*.mp4"))) == 2 * 4


def test_a_resumed_run_makes_the_same(whole, tmp_path):
    """In a folder of its own it has what comes after the checkpoint, the teacher's videos, and a strip of these."""
    expected = made(whole / "on")
    for checkpoint in ("00_semantic_00000003", "01_detail_00000002"):
        folder = tmp_path / checkpoint
        run(with_previews(dcm_recipe(4)), output=folder, resume_from=whole / "on" / "checkpoints" / checkpoint)
        # Not the videos: an encoder with threads of its own may write the same frames in other bytes.
        found = {path: content for path, content in made(folder).items() if path.endswith(("frames.png", ".json"))}
        assert found.items() <= expected.items()
        assert any("step_00000004" in path for path in found)
        assert any("teacher" in path for path in found)


@pytest.mark.parametrize(
    ("keys", "columns"),
    [
        ({}, ["teacher, 8 steps", "teacher, 2 steps", "step 0", "step 2", "step 4"]),
        ({"prompts": ["1 left"], "compare_teacher": False, "every": 1}, ["step 4"]),
    ],
)
def test_a_strip_goes_on_with_what_was_made_before_of_the_same_prompts(whole, tmp_path, monkeypatch, keys, columns):
    """Also of a run that is resumed with other previews, which may differ."""
    recipe = with_previews(dcm_recipe(4))
    recipe["stages"] = recipe["stages"][:1]
    result = run(recipe, output=tmp_path, device="cpu")
    result.checkpoint.rename(tmp_path / "aside")
    drawn = []
    monkeypatch.setattr(previews, "strip", lambda path, shown, rows, title: drawn.append(list(shown)) or path.touch())
    run(with_previews(recipe, **keys), output=tmp_path, resume=True, device="cpu")
    assert drawn == [columns]
    trained = [load_tree(folder, "experts") for folder in (result.checkpoint, tmp_path / "aside")]
    assert equal(*trained)


def test_of_many_previews_a_strip_shows_some(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(previews, "strip", lambda path, shown, rows, title: drawn.append(list(shown)) or path.touch())
    run(tiny_recipe([distil(steps=13, preview={"every": 1, "prompts": ["3 up"]})]), output=tmp_path, device="cpu")
    assert drawn[9] == [f"step {step}" for step in range(10)]
    assert drawn[-1] == [f"step {step}" for step in (0, 1, 2, 4, 5, 7, 8, 10, 11, 13)]


# -- what is made -----------------------------------------------------------------------------------------------------


def test_they_are_made_first_last_and_between(whole):
    names = sorted({path.partition("/")[0] + "/" + path.split("/")[1] for path in made(whole / "on") if "/" in path})
    each = [f"step_{step:08}" for step in (0, 2, 4)] + ["strip.png", "teacher_2_steps", "teacher_8_steps"]
    assert names == [f"{stage}/{name}" for stage in ("detail", "semantic") for name in each]
    assert set(made(whole / "on")) >= {
        f"detail/step_00000002/{name}"
        for name in ("00_3_right.mp4", "01_7_up.mp4", "02_0_down.mp4", "frames.png", "preview.json")
    }


def test_the_last_one_is_what_is_sampled_later(tmp_path, monkeypatch):
    """Bit for bit, of prompts in the same order, with the same seed and weights."""
    written, last = [], {}
    monkeypatch.setattr(previews, "write_mp4", lambda path, video, fps: written.append(video) or path.touch())
    for weights in ("trained", "ema"):
        result = run(with_previews(dcm_recipe(2), weights=weights, every=9, seed=3), output=tmp_path / weights)
        sampled = sample_run(result.output, prompts=PROMPTS, seed=3, weights=weights, output=tmp_path / f"s_{weights}")
        last[weights] = torch.stack(written[-len(PROMPTS) :])
        assert torch.equal(last[weights], sampled.videos)
    assert not torch.equal(last["trained"], last["ema"])


def test_the_teacher_serves_what_is_not_trained_yet(whole):
    """Guided as the recipe says; and what is written says so."""
    assert about(whole / "on", "semantic", "step_00000002")["experts"] == ["semantic", TEACHER]
    assert about(whole / "on", "detail", "step_00000002")["experts"] == ["semantic", "detail"]
    assert about(whole / "on", "detail", "teacher_8_steps")["experts"] == [TEACHER] * 8
    guidance = {"backbone.guidance": {"mode": "classifier_free", "scale": 3.0}}
    training, _ = set_up_trained("semantic", guidance)
    preview = Preview(PreviewConfig(every=1, prompts=["3 up", "7 left"], seed=5), training)
    assert preview.served == ["detail"]
    for number, video in enumerate(preview._videos(preview._look())):
        mixture, cond = training.mixture, training.mixture.backbone.encode([preview.captions[number]])
        x, points = Draws(5, "sample", 0, [number]).normal("noise", (12, 8, 4, 4)), training.trajectory.points
        with torch.no_grad():
            with mixture.using("semantic"):
                x = x + (points[4] - points[8]) * mixture(x, points[[8]], cond)
            with mixture.using(TEACHER):
                v = mixture(x, points[[4]], cond)
                v = v + 2 * (v - mixture(x, points[[4]], mixture.backbone.null_conditioning(cond)))
            expected = mixture.backbone.decode(x - points[4] * v)[0]
        assert torch.allclose(video, expected, atol=1e-5)


def test_without_prompts_they_are_of_the_data(tmp_path):
    """Of samples spread over them, with their captions."""
    training, _ = set_up(tiny_recipe([distil()]))
    preview = Preview(PreviewConfig(every=1, num=4), training)
    assert preview.captions == ["0 right", "2 down", "5 right", "7 down"]
    assert [cond["digit"].item() for cond in preview._conds] == [0, 2, 5, 7]

    cond = {"digit": torch.tensor(3), "direction": torch.tensor(1)}
    samples = [Sample(torch.randn(12, 8, 4, 4), cond) for _ in range(4)]
    write_latents(tmp_path / "set", samples, captions=["a three", "", "three again", "a last one"])
    stored = tiny_recipe([distil()], {"data": {"kind": "latents", "path": str(tmp_path / "set")}})
    training, _ = set_up(stored)
    assert Preview(PreviewConfig(every=1, num=2), training).captions == ["a three", "three again"]


def test_a_file_of_prompts_gives_the_first_so_many(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    assert PreviewConfig(every=1, prompts=str(tmp_path / "prompts.txt"), num=2).asked() == PROMPTS[:2]


def test_a_video_can_be_played_and_the_strip_shows_its_middle_frame(whole):
    folder = whole / "on" / "previews" / "semantic"
    with av.open(folder / "step_00000004" / "01_7_up.mp4") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with Image.open(folder / "step_00000004" / "frames.png") as picture:
        column = np.asarray(picture)
    assert len(frames) == 8
    shown = column[column.shape[0] // 3 :][: column.shape[0] // 3 : 5, ::5]  # frames of 24 pixels are shown as 120
    assert np.abs(shown.astype(int) - frames[4]).mean() < 4  # what the codec leaves out
    with Image.open(folder / "strip.png") as strip:
        pixels = np.asarray(strip)
    last = pixels[56:, -124:-4]
    rows = [last[124 * row :][:120] for row in range(3)]
    assert np.array_equal(np.concatenate(rows), column)


def test_plugins_are_told(tmp_path):
    seen = []

    class Observer:
        @hookimpl
        def on_preview(self, training, path):
            seen.append((training.step, path.name, (path / "preview.json").is_file()))

    plugins = load_plugins()
    plugins.manager.register(Observer())
    run(tiny_recipe([distil(preview={"every": 9, "num": 1})]), output=tmp_path, device="cpu", plugins=plugins)
    assert seen == [(0, "step_00000000", True), (2, "step_00000002", True)]


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_two_processes_make_what_one_does(tmp_path, sharding):
    """Three videos: the second process has one of them, and fills its share up."""
    recipe = with_previews(tiny_recipe([distil()], {"training.sharding": sharding}), weights="trained")
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    run(recipe, output=tmp_path / "one", device="cpu")
    pair = start_pair(
        ["run", str(tmp_path / "recipe.yaml"), "--device", "cpu", "--output", str(tmp_path / "two")], tmp_path
    )
    assert [command.exit_code() for command in pair] == [0, 0], pair[0].output + pair[1].output
    one, two = made(tmp_path / "one"), made(tmp_path / "two")
    assert one.keys() == two.keys()
    for stage in ("teacher_8_steps", "teacher_2_steps", "step_00000000"):  # of the same weights
        pictures = [
            np.asarray(Image.open(tmp_path / name / "previews/semantic" / stage / "frames.png")).astype(int)
            for name in ("one", "two")
        ]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert pair[0].output.count("preview of step") == 2
    assert "preview of step" not in pair[1].output


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_what_fails_in_the_making_is_said_and_training_goes_on(tmp_path, monkeypatch, capsys):
    decode, calls = DigitsBackbone.decode, []

    def failing(self, latents):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")
        return decode(self, latents)

    monkeypatch.setattr(DigitsBackbone, "decode", failing)
    result = run(tiny_recipe([distil(preview={"every": 1, "num": 2})]), output=tmp_path, device="cpu")
    warned = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert warned == ["  warning: no preview at step 0: CUDA out of memory. Tried to allocate 9 GiB.; training goes on"]
    assert result.checkpoint is not None
    assert sorted(path.name for path in (tmp_path / "previews/semantic").iterdir()) == [
        "step_00000001", "step_00000002", "strip.png",
    ]  # fmt: skip


def test_a_full_disk_stops_the_run_as_it_does_elsewhere(tmp_path, monkeypatch):
    """What is saved is named: the checkpoint of the same step comes first."""

    def full(path, *_, **__):
        if "step_00000002" in str(path):
            raise OSError(28, "No space left on device")
        path.touch()

    monkeypatch.setattr(previews, "write_mp4", full)
    with pytest.raises(WriteError) as caught:
        run(tiny_recipe([distil(preview={"every": 9, "num": 1})]), output=tmp_path, device="cpu")
    assert str(caught.value).startswith(f"cannot write {tmp_path}/previews/semantic/step_00000002/00_0_right.mp4: ")
    assert f"saved is {tmp_path}/checkpoints/00_semantic_00000002; go on with: moedistill run " in str(caught.value)


def test_prompts_that_the_model_cannot_take_are_refused_before_training(tmp_path):
    with pytest.raises(UserError, match=r'^stage semantic: prompt "a cat": give a digit '):
        run(tiny_recipe([distil(preview={"every": 9, "prompts": ["a cat"]})]), output=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    with pytest.raises(UserError, match=r"^stage semantic: there is no file .*none.txt"):
        run(tiny_recipe([distil(preview={"every": 9, "prompts": str(tmp_path / "none.txt")})]), output=tmp_path / "run")


@pytest.mark.parametrize(
    ("keys", "sample", "problem"),
    [
        ({}, None, "preview.steps: is missing, and the recipe has no sample list"),
        ({"steps": 99}, {"points": [8, 4]}, "preview.steps: "),
        ({"prompts": []}, {"points": [8, 4]}, "preview.prompts: is empty; give at least one"),
        ({"weights": "ema"}, {"points": [8, 4]}, "preview.weights: ema: no stage keeps an average"),
        ({"every": 0}, {"points": [8, 4]}, "preview.every: "),
    ],
)
def test_what_does_not_fit_the_recipe_is_refused(keys, sample, problem):
    with pytest.raises(RecipeError) as caught:
        load_recipe(tiny_recipe([distil(preview={"every": 2, **keys})], {"sample": sample}))
    assert f"stages.semantic.{problem}" in str(caught.value) or f"stages.0.{problem}" in str(caught.value)


# -- trackers ---------------------------------------------------------------------------------------------------------


def test_tensorboard_gets_the_strip(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = tiny_recipe([distil(preview={"every": 9, "num": 1})], {"training.trackers": ["tensorboard"]})
    run(recipe, output=tmp_path, device="cpu")
    (folder,) = {file.parent for file in tmp_path.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    shown = events.Images("semantic/preview/image/0") if "semantic/preview/image/0" in events.Tags()["images"] else []
    shown = shown or events.Images(events.Tags()["images"][0])
    assert [each.step for each in shown] == [0, 2]
    with Image.open(tmp_path / "previews/semantic/strip.png") as strip:
        assert (shown[-1].width, shown[-1].height) == strip.size


def test_trackers_that_take_files_get_the_videos(whole, monkeypatch):
    """As wandb and trackio do, which are not installed here."""
    library = SimpleNamespace(Video=lambda path: ("video", path), Image=lambda path: ("image", path))
    monkeypatch.setitem(sys.modules, "trackio", library)
    logged = []
    tracker = SimpleNamespace(name="trackio", log=lambda values, step: logged.append((values, step)))
    folder = whole / "on/previews/semantic"
    trackers._show(tracker, "semantic/preview", folder / "step_00000002", 7)
    assert logged == [
        (
            {
                "semantic/preview": ("image", str(folder / "strip.png")),
                **{
                    f"semantic/preview/{name}": ("video", str(folder / "step_00000002" / f"{name}.mp4"))
                    for name in ("00_3_right", "01_7_up", "02_0_down")
                },
            },
            7,
        )
    ]


def test_a_tracker_that_fails_stops_the_run_in_one_line(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(TensorBoardTracker, "log_images", fail)
    recipe = tiny_recipe([distil(preview={"every": 9, "num": 1})], {"training.trackers": ["tensorboard"]})
    with pytest.raises(UserError, match=r"tensorboard cannot be written to: \[Errno 111\] Connection refused; nothing"):
        run(recipe, output=tmp_path, device="cpu")
