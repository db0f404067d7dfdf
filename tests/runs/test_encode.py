"""`data encode`: from a folder of clips to a set, whatever lies in the folder and whatever happens on the way."""

import json
import random
import shutil
import signal
import time

import pytest
import torch
from footage_files import numbered, torture_folder, write_clip
from saved_pipelines import pipeline_recipe, save_pipeline
from started_commands import Command

from moedistill.cli import main
from moedistill.data import make_pieces
from moedistill.data.footage import probe, read_frames
from moedistill.data.latents import open_store
from moedistill.data.pieces import WORK
from moedistill.data.prompts import PromptsConfig
from moedistill.recipe.loading import load_recipe
from moedistill.runtime.lock import locked

SIZE = (32, 48)
STANDING = ("portrait.mp4", "rotated.mp4")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("model"), "wan")


@pytest.fixture
def recipe(model, tmp_path):
    """A recipe's file for a tiny Wan: nine frames of 32×48 at 16 frames per second."""
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(pipeline_recipe("wan", model)))
    return file


@pytest.fixture
def clips(tmp_path):
    """Five clips of nine frames and more, and two that cannot be used."""
    folder = tmp_path / "clips"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(("a", "b", "more/c", "d")):
        clip(folder / f"{name}.mp4", f"clip {name}", first=20 * number, num_frames=12)
    clip(folder / "long.mp4", "a long one", first=100, num_frames=40)
    clip(folder / "short.mp4", "a short one", num_frames=5)
    clip(folder / "mute.mp4", None, first=200)
    return folder


def clip(path, caption, *, first=0, fps=16, num_frames=9, **options):
    """A clip whose frames show their numbers, from `first` on."""
    size = options.setdefault("size", SIZE)
    write_clip(path, fps=fps, num_frames=num_frames, picture=lambda k: numbered(first + k, *size), **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def run(*arguments, code=0):
    with pytest.raises(SystemExit) as end:
        main(list(map(str, arguments)))
    assert end.value.code == code


def encoded(source, dest, recipe, *options, code=0):
    run("data", "encode", source, dest, "--recipe", recipe, *options, code=code)


def skipped(dest):
    lines = (dest / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["source"]: line["reason"] for line in map(json.loads, lines)}


def entries(dest):
    return json.loads((dest / "index.json").read_text(encoding="utf-8"))["samples"]


def content(folder):
    """All of a set, byte for byte."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def made(monkeypatch):
    """What is encoded from here on: windows and captions, in order."""
    made = []
    usual = make_pieces.Pieces.write
    monkeypatch.setattr(make_pieces.Pieces, "write", lambda self, key, of: (made.append(key), usual(self, key, of)))
    return made


# -- what is in a set -------------------------------------------------------------------------------------------------


def test_every_clip_is_in_the_set_or_skipped_with_its_reason(clips, recipe, tmp_path, capsys):
    encoded(clips, tmp_path / "set", recipe)
    assert [(each["source"], each["caption"], each["start"]) for each in entries(tmp_path / "set")] == [
        ("a.mp4", "clip a", 0),
        ("b.mp4", "clip b", 0),
        ("d.mp4", "clip d", 0),
        ("long.mp4", "a long one", 0),
        ("more/c.mp4", "clip more/c", 0),
    ]
    reasons = skipped(tmp_path / "set")
    assert list(reasons) == ["mute.mp4", "short.mp4"]
    assert reasons["mute.mp4"].startswith("has no caption; write one to mute.txt beside it, or give")
    assert reasons["short.mp4"].startswith("has 5 frames at the rate of the set, and 9 are wanted")
    assert not (tmp_path / "set" / WORK).exists()
    said = capsys.readouterr().out
    assert "5 of 7 clips make 5 samples" in said
    run("data", "check", tmp_path / "set", "--recipe", recipe, "--set", f"data.path={tmp_path / 'set'}")


def test_of_a_folder_of_everything_each_clip_is_in_the_set_or_has_its_reason(recipe, tmp_path):
    there = torture_folder(tmp_path / "clips")
    # What is damaged later on is used as far as it is whole: nobody looks at more than what is trained on.
    assert there.pop("damaged.mp4").reason == "damaged"
    encoded(tmp_path / "clips", tmp_path / "set", recipe, "--caption", "a clip without words")
    reasons, found = skipped(tmp_path / "set"), {each["source"]: each for each in entries(tmp_path / "set")}
    del found["damaged.mp4"]
    assert reasons.keys() | found.keys() == there.keys()
    assert not reasons.keys() & found.keys()
    for name, piece in there.items():
        if piece.reason is None and piece.same_as is None and piece.frames >= 9:
            assert found[name]["caption"] == " ".join((piece.caption or "a clip without words").split())
            assert found[name]["shape"] == ([16, 3, 6, 4] if name in STANDING else [16, 3, 4, 6])
            continue
        few = "is one frame" if piece.frames == 1 else f"has {piece.frames} frames"
        expected = piece.reason or (f"is the same file as {piece.same_as}" if piece.same_as else few)
        assert expected in reasons[name], name
    encoded(tmp_path / "clips", tmp_path / "pieces", recipe, "--caption", "x", "--windows", 3)
    starts = [each["start"] for each in entries(tmp_path / "pieces") if each["source"] == "damaged.mp4"]
    assert 0 in starts
    assert len(starts) < 3
    assert "is damaged" in skipped(tmp_path / "pieces")["damaged.mp4"]
    # Without words for all of them, those that have none are left out.
    encoded(tmp_path / "clips", tmp_path / "captioned", recipe)
    assert {each["source"] for each in entries(tmp_path / "captioned")} == {
        name for name in found if there[name].caption
    }
    assert skipped(tmp_path / "captioned")["30.mp4"].startswith("has no caption; write one to 30.txt beside it")
    assert skipped(tmp_path / "captioned")["60.webm"].startswith("has an empty caption; write one to 60.txt beside it")


def test_stored_is_what_the_vae_and_the_text_encoder_give_of_the_frames_shown(clips, recipe, tmp_path):
    encoded(clips, tmp_path / "set", recipe, "--windows", 3, "--stride", 12)
    backbone = load_recipe(str(recipe)).backbone.build()
    store, found = open_store(tmp_path / "set"), entries(tmp_path / "set")
    assert [each["start"] for each in found if each["source"] == "long.mp4"] == [0, 12, 24]
    for number, entry in enumerate(found):
        footage = probe(clips / entry["source"])
        video = read_frames(footage, SIZE, num_frames=9, fps=16, start=entry["start"] / 16)
        latents, cond = store.read(number)
        expected = backbone.encode_videos(video[None].float() / 255)[0]
        assert torch.equal(latents.float(), expected)
        text = backbone.unpack({name: value[None] for name, value in cond.items()})
        for name, value in backbone.encode([entry["caption"]]).items():
            assert torch.equal(text[name], value), name
    negative = backbone.unpack({name: value[None] for name, value in store.negative().items()})
    expected = backbone.encode_negative(backbone.config.guidance.negative_prompt)
    assert all(torch.equal(negative[name], value) for name, value in expected.items())


def test_lengths_and_aspect_ratios_are_buckets(recipe, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    clip(folder / "lying.mp4", "x", num_frames=20)
    clip(folder / "standing.mp4", "x", size=(96, 64), first=30)
    clip(folder / "small.mp4", "x", size=(16, 24), first=60)
    encoded(folder, tmp_path / "set", recipe, "--lengths", "9,17,5", "--crop", "top")
    shapes = {each["source"]: each["shape"] for each in entries(tmp_path / "set")}
    assert shapes == {"lying.mp4": [16, 5, 4, 6], "standing.mp4": [16, 3, 6, 4]}
    assert skipped(tmp_path / "set")["small.mp4"].startswith(
        "is 16×24, and would have to be enlarged 2 times for 32×48"
    )
    encoded(folder, tmp_path / "enlarged", recipe, "--lengths", "9", "--upscale")
    assert len(entries(tmp_path / "enlarged")) == 3


def test_pictures_are_clips_of_one_frame(recipe, tmp_path, capsys):
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for shade in (0, 90):
        Image.new("RGB", (48, 32), (shade, 200, 10)).save(folder / f"{shade}.png")
    encoded(folder, tmp_path / "none", recipe, "--caption", "green", code=2)
    assert skipped(tmp_path / "none")["0.png"].startswith("is one frame at the rate of the set, and 9 are wanted")
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["skipped.jsonl"]
    assert "no clip can be used, of 2" in capsys.readouterr().err
    encoded(folder, tmp_path / "set", recipe, "--caption", "green", "--lengths", "1")
    assert [each["shape"] for each in entries(tmp_path / "set")] == [[16, 1, 4, 6]] * 2


def test_equal_clips_are_taken_once_but_in_a_list_under_another_caption(clips, recipe, tmp_path):
    shutil.copy(clips / "a.mp4", clips / "z copy.mp4")
    (clips / "z copy.txt").write_text("again")
    rows = [("a.mp4", "one"), ("a.mp4", "two"), ("z copy.mp4", "one"), ("gone.mp4", "x")]
    file = clips / "list.jsonl"
    file.write_text("".join(json.dumps({"where": path, "what": text}) + "\n" for path, text in rows))
    encoded(file, tmp_path / "listed", recipe, "--path-column", "where", "--caption-column", "what")
    assert [each["caption"] for each in entries(tmp_path / "listed")] == ["one", "two"]
    assert skipped(tmp_path / "listed") == {
        "z copy.mp4": "is the same file as a.mp4, which is taken",
        "gone.mp4": "is not there (any more), or is a link to what is not",
    }
    file.unlink()
    encoded(clips, tmp_path / "set", recipe)
    assert skipped(tmp_path / "set")["z copy.mp4"] == "is the same file as a.mp4, which is taken"


def test_each_clip_that_is_left_out_has_a_line_of_its_own(clips, recipe, tmp_path, monkeypatch):
    rows = [("a.mp4", "one"), ("gone.mp4", "x"), ("gone.mp4", "y"), ("gone.mp4", "y"), ("long.mp4", "l"), ("b.mp4", "")]
    file = clips / "list.json"
    file.write_text(json.dumps([{"path": path, "caption": text} for path, text in rows]))
    usual = make_pieces.read_frames

    def fails(footage, *arguments, start, **options):
        if footage.path.name == "long.mp4" and start > 0:
            raise make_pieces.FootageError(f"is damaged at {start:.2f} s")
        return usual(footage, *arguments, start=start, **options)

    monkeypatch.setattr(make_pieces, "read_frames", fails)
    encoded(file, tmp_path / "set", recipe, "--windows", 3)
    lines = [json.loads(line) for line in (tmp_path / "set/skipped.jsonl").read_text().splitlines()]
    assert [line["source"] for line in lines] == ["gone.mp4"] * 3 + ["long.mp4", "b.mp4"]
    assert lines[3]["reason"] == "is damaged at 0.56 s (1 of its 3 windows are in the set)"
    assert [each["source"] for each in entries(tmp_path / "set")] == ["a.mp4", "long.mp4"]


def test_a_clip_that_fails_while_it_is_decoded_is_skipped_then(clips, recipe, tmp_path, monkeypatch):
    usual = make_pieces.read_frames

    def fails(footage, *arguments, **options):
        if footage.path.name == "b.mp4":
            raise make_pieces.FootageError("is damaged at 0.25 s")
        return usual(footage, *arguments, **options)

    monkeypatch.setattr(make_pieces, "read_frames", fails)
    encoded(clips, tmp_path / "set", recipe)
    assert skipped(tmp_path / "set")["b.mp4"] == "is damaged at 0.25 s"
    assert list(skipped(tmp_path / "set")) == ["b.mp4", "mute.mp4", "short.mp4"]  # in the order of the clips
    monkeypatch.undo()
    encoded(clips, tmp_path / "set", recipe)
    assert "b.mp4" in {each["source"] for each in entries(tmp_path / "set")}


def test_prompts_make_a_set_of_texts(recipe, tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog\n# not this\nrain at night\n")
    encoded(tmp_path / "prompts.txt", tmp_path / "set", recipe)
    assert [(each["caption"], each["shape"]) for each in entries(tmp_path / "set")] == [
        ("a dog", [16, 0, 4, 6]), ("rain at night", [16, 0, 4, 6]),
    ]  # fmt: skip
    assert skipped(tmp_path / "set") == {}
    backbone = load_recipe(str(recipe)).backbone.build()
    dataset = PromptsConfig(path=str(tmp_path / "set")).build(backbone)
    assert len(dataset) == 2
    for name, value in backbone.encode(["rain at night"]).items():
        assert torch.equal(dataset[1].conditioning[name], value[0])


def test_a_dry_run_says_what_there_would_be_and_writes_nothing(clips, recipe, tmp_path, capsys):
    encoded(clips, tmp_path / "set", recipe, "--windows", 2, "--dry-run")
    said = capsys.readouterr().out
    assert not (tmp_path / "set").exists()
    lines = [line.split() for line in said.splitlines()]
    assert ["9", "frames", "32×48", "6", "0.0", "%"] in lines
    # Of each: 16·3·4·6 latents of 4 bytes, and 512·24 numbers of text.
    assert f"about {6 * (16 * 3 * 4 * 6 + 512 * 24) * 4 / 1e9:.3g} GB" in said
    assert "skipped: 2 clips" in said
    encoded(clips / "short.mp4", tmp_path / "set", recipe, "--dry-run", code=2)
    # Without the model's weights, too.
    video = "backbone.video={num_frames: 9, height: 32, width: 48}"
    encoded(clips, tmp_path / "set", "dcm_wan_1_3b", "--set", video, "--dry-run")
    assert "5 of 7 clips make 5 samples" in capsys.readouterr().out


def test_frames_per_second_are_the_models_or_those_asked_for(recipe, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    clip(folder / "a.mp4", "x", fps=24, num_frames=24)
    encoded(folder, tmp_path / "own", recipe)
    encoded(folder, tmp_path / "8", recipe, "--fps", 8, "--lengths", "5")
    backbone = load_recipe(str(recipe)).backbone.build()
    for name, shown in (("own", [0, 1, 3, 4, 6, 7, 9, 10, 12]), ("8", [0, 3, 6, 9, 12])):
        stored = open_store(tmp_path / name).read(0)[0]
        every = read_frames(probe(folder / "a.mp4"), SIZE, num_frames=24, fps=24)
        assert torch.equal(stored.float(), backbone.encode_videos(every[:, shown][None].float() / 255)[0])


# -- going on ---------------------------------------------------------------------------------------------------------


def test_what_is_there_is_kept_and_only_what_is_new_is_encoded(clips, recipe, tmp_path, made):
    encoded(clips, tmp_path / "set", recipe)
    assert len(made) == len(set(made)) == 5 + 5 + 1  # windows, captions, the negative prompt
    before = content(tmp_path / "set")
    made.clear()
    encoded(clips, tmp_path / "set", recipe)
    assert (made, content(tmp_path / "set")) == ([], before)

    (clips / "b.txt").write_text("another caption")
    (clips / "d.mp4").unlink()
    (clips / "a.mp4").rename(clips / "renamed.mp4")
    (clips / "a.txt").rename(clips / "renamed.txt")
    encoded(clips, tmp_path / "set", recipe)
    assert len(made) == 1  # the caption
    encoded(clips, tmp_path / "anew", recipe)
    assert content(tmp_path / "set") == content(tmp_path / "anew")


def test_what_is_damaged_of_a_set_is_made_again(clips, recipe, tmp_path, made, capsys):
    encoded(clips, tmp_path / "set", recipe)
    before = content(tmp_path / "set")
    [shard] = (tmp_path / "set").glob("samples-*")
    [negative] = (tmp_path / "set").glob("negative-*")
    flipped = bytearray(before[shard.name])
    flipped[-1] ^= 1
    negative.unlink()
    for damage in (flipped, flipped[: len(flipped) // 2]):
        made.clear()
        shard.write_bytes(damage)
        encoded(clips, tmp_path / "set", recipe)
        assert content(tmp_path / "set") == before
        assert len(made) >= 5 + 5  # windows and captions
    data = f"data={{kind: videos, path: {clips}, cache: {tmp_path / 'set'}}}"
    for index, message in (("[1]", "holds a set that was made otherwise"), ("{", "it is no JSON (")):
        (tmp_path / "set/index.json").write_text(index)
        run("run", recipe, "--set", data, "--output", tmp_path / "run", code=2)
        assert message in capsys.readouterr().err


def test_whoever_puts_another_set_in_its_place_is_told_and_other_folders_are_refused_before_clips_are_looked_at(
    clips, recipe, tmp_path, capsys, monkeypatch
):
    encoded(clips, tmp_path / "set", recipe)
    (clips / "a.txt").write_text("another caption")
    capsys.readouterr()
    encoded(clips, tmp_path / "set", recipe)
    assert "takes its place" not in capsys.readouterr().out
    encoded(clips / "a.mp4", tmp_path / "set", recipe)
    assert "holds a set, of which 4 samples are not among these: the new set takes its place" in capsys.readouterr().out
    monkeypatch.setattr("moedistill.runs.encode.plan_set", None)
    encoded(clips, recipe, recipe, code=2)
    assert "is a file; choose another place" in capsys.readouterr().err
    with locked(tmp_path / "set"):
        encoded(clips, tmp_path / "set", recipe, code=2)
    assert "is in use by" in capsys.readouterr().err


def test_killed_at_random_it_goes_on_to_the_same_set(clips, recipe, tmp_path):
    """Ten times, each at a moment of its own; a piece that is there is not made again."""
    encoded(clips, tmp_path / "whole", recipe, "--windows", 4)
    folder, moments, kept = tmp_path / "set", random.Random(0), {}
    for attempt in range(10):
        arguments = ("data", "encode", clips, folder, "--recipe", recipe, "--windows", "4")
        command = Command(*arguments, log=tmp_path / f"log-{attempt}")
        wanted = len(kept) + moments.randrange(3)
        while command.running and len(pieces(folder)) < wanted:
            time.sleep(0.001 * moments.random())
        command.signal(signal.SIGKILL, workers=False)
        command.exit_code()
        there = pieces(folder)
        assert kept.items() <= there.items() or not there  # packed
        kept = there
    encoded(clips, folder, recipe, "--windows", 4)
    assert content(folder) == content(tmp_path / "whole")


def test_whoever_stops_it_is_told_that_the_same_command_goes_on(clips, recipe, tmp_path):
    command = Command("data", "encode", clips, tmp_path / "set", "--recipe", recipe, log=tmp_path / "log")
    while command.running and not pieces(tmp_path / "set"):
        time.sleep(0.001)
    command.signal(signal.SIGINT, workers=False)
    assert command.exit_code() == 130
    assert "what is encoded is kept, and the same command goes on" in (tmp_path / "log").read_text()
    assert pieces(tmp_path / "set")


def pieces(folder):
    """When each was written."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / WORK).glob("[!.]*.safetensors")}


def test_two_processes_make_the_same_set(clips, recipe, tmp_path):
    encoded(clips, tmp_path / "one", recipe)
    log = tmp_path / "log"
    arguments = ("data", "encode", clips, tmp_path / "two", "--recipe", recipe, "--num-processes", 2, "--device", "cpu")
    assert Command(*arguments, log=log).exit_code() == 0, log.read_text()
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_another_model_s_set_and_a_folder_of_other_things_are_left_alone(clips, recipe, tmp_path, capsys):
    encoded(clips, tmp_path / "set", recipe)
    before = content(tmp_path / "set")
    other = save_pipeline(tmp_path / "other", "wan")
    config = json.loads((other / "vae/config.json").read_text())
    (other / "vae/config.json").write_text(json.dumps({**config, "latents_mean": [0.5] * 16}))
    encoded(clips, tmp_path / "set", recipe, "--set", f"backbone.pretrained={other}", code=2)
    assert "holds a set that another VAE has made; choose another folder" in capsys.readouterr().err
    assert content(tmp_path / "set") == before
    encoded(clips, clips, recipe, code=2)
    assert "is not empty, and holds no set (a.mp4, a.txt, b.mp4); choose another place" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere", (), "there is no file or folder"),
        ("clips", ("--lengths", "9,10"), "lengths 10: num_frames 10 must be 1 more than a multiple of 4: 9 or 13"),
        ("clips", ("--lengths", "9;10"), "'9;10' must be whole numbers with commas between them, such as 17,33,81"),
        ("clips", ("--set", "backbone.pretrained=gone/model"), "the weights of gone/model are not on this machine"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(clips, recipe, tmp_path, capsys, monkeypatch, source, options, message):
    monkeypatch.chdir(tmp_path)
    encoded(source, "set", recipe, *options, code=2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_a_model_without_videos_of_a_size_encodes_none(clips, tmp_path, capsys):
    encoded(clips, tmp_path / "set", "dcm_digits", code=2)
    assert "backbone digits encodes no videos" in capsys.readouterr().err


# -- in a recipe ------------------------------------------------------------------------------------------------------


def test_videos_in_a_recipe_are_encoded_once_and_trained_on(clips, recipe, tmp_path, capsys, made):
    data = (
        "--set",
        f"data={{kind: videos, path: {clips}, windows: 2}}",
        "--set",
        "data.text_dropout=0.5",
        "--device",
        "cpu",
    )
    run("run", recipe, *data, "--output", tmp_path / "run")
    [cache] = tmp_path.glob("clips-wan-9x32x48-*")
    assert f"{clips} is encoded to {cache}" in capsys.readouterr().out
    assert len(entries(cache)) == 6
    saved = load_recipe(str(tmp_path / "run/recipe.yaml"))
    assert (saved.data.kind, saved.data.path, saved.data.text_dropout) == ("latents", str(cache), 0.5)
    made.clear()
    run("run", recipe, *data, "--output", tmp_path / "again")
    assert not made
    assert "is encoded" not in capsys.readouterr().out
    run("run", tmp_path / "run/recipe.yaml", "--resume-from", tmp_path / "run")
    # Another clip is seen.
    clip(clips / "new.mp4", "new", first=180)
    run("run", recipe, *data, "--output", tmp_path / "third", "--set", f"data.cache={cache}")
    assert len(made) == 2
    assert len(entries(cache)) == 7


def test_prompts_are_no_videos_to_train_on(recipe, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog")
    run("run", recipe, "--set", f"data={{kind: videos, path: {prompts}}}", "--output", tmp_path / "run", code=2)
    assert "prompts.txt holds prompts; give clips, or read it by data: {kind: prompts}" in capsys.readouterr().err
    assert not list(tmp_path.glob("prompts-*"))


def test_two_processes_of_a_run_find_one_set(clips, recipe, tmp_path):
    log = tmp_path / "log"
    arguments = ["run", recipe, "--set", f"data={{kind: videos, path: {clips}, cache: {tmp_path / 'set'}}}"]
    arguments += [
        "--set",
        "training.batch_size=2",
        "--num-processes",
        2,
        "--device",
        "cpu",
        "--output",
        tmp_path / "run",
    ]
    assert Command(*arguments, log=log).exit_code() == 0, log.read_text()
    assert log.read_text().count("is encoded to") == 1
    assert len(entries(tmp_path / "set")) == 5
    assert (tmp_path / "run/checkpoints").is_dir()
