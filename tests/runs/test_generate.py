"""Sets of what the teacher makes: the same bit for bit whoever makes them, each sample once, fit to be trained on."""

import json
import re
import signal

import pytest
import torch
from helpers import distil, tiny_recipe
from saved_pipelines import pipeline_recipe, save_pipeline
from started_commands import Command

from moedistill import cli, generate
from moedistill.data.latents import open_store
from moedistill.data.pieces import WORK
from moedistill.errors import UserError
from moedistill.model.mixture import Mixture
from moedistill.recipe.loading import load_recipe
from moedistill.runs.build import build_mixture
from moedistill.runs.check import check_set
from moedistill.runs.generate import Generation
from moedistill.runs.loop import run
from moedistill_digits.backbone import DigitsBackbone

PROMPTS = ["3 right", "", "0 down"]
KILLER = """
import os, signal, time
from moedistill.data.pieces import Pieces

usual, count = Pieces.write, [0]


def writing(pieces, key, tensors):
    usual(pieces, key, tensors)
    count[0] += "latents" in tensors
    if count[0] == 2 and "latents" in tensors and os.environ.get("LOCAL_RANK", "0") == os.environ.get("KILL"):
        time.sleep(float(os.environ.get("SLEEP", "0")))
        os.kill(os.getpid(), signal.SIGKILL)


Pieces.write = writing
"""


def digits_recipe(**changes):
    recipe = tiny_recipe([distil("semantic")])
    return {
        **recipe,
        "backbone": {**recipe["backbone"], "guidance": {"mode": "classifier_free", "scale": 2.0}},
        **changes,
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(json.dumps(digits_recipe()))
    (tmp_path / "prompts.txt").write_text("3 right\n7 up\n0 down\n")
    (tmp_path / "killer.py").write_text(KILLER)
    return tmp_path


@pytest.fixture
def sampled(monkeypatch):
    """How often the teacher has sampled."""
    calls, usual = [], Mixture.generate
    monkeypatch.setattr(Mixture, "generate", lambda *args, **options: calls.append(1) or usual(*args, **options))
    return calls


def made(dest, *, prompts=PROMPTS, recipe=None, **options):
    generation = Generation(load_recipe(recipe or digits_recipe()), prompts, dest, **options)
    assert generation.run("cpu", 1, []) == 0
    return dest


def content(dest):
    return {str(path.relative_to(dest)): path.read_bytes() for path in sorted(dest.rglob("*")) if path.is_file()}


def pieces(folder):
    return list((folder / "set" / WORK).glob("[0-9a-f]*.safetensors"))


def start(*more, **environment):
    arguments = ["data", "generate", "prompts.txt", "set", "--recipe", "recipe.yaml", "--num", "2", "--device", "cpu"]
    return Command(*arguments, *more, log="log", **environment)


def command(*more, **environment):
    one = start(*more, **environment)
    return one.exit_code(), one.output


# -- what is made -----------------------------------------------------------------------------------------------------


def test_samples_are_the_guided_teachers_own(tmp_path):
    dest = made(tmp_path / "set", num=2, seed=5, steps=4)
    store, recipe = open_store(dest), load_recipe(digits_recipe())
    mixture = build_mixture(recipe)
    mixture.router = None
    points = recipe.trajectory.build().points
    assert len(points) == 9
    asked = [prompt for prompt in PROMPTS for _ in range(2)]
    sigmas = torch.stack([points[8], points[6], points[4], points[2], torch.tensor(0.0)])
    wanted = list(generate(mixture, asked, sigmas, seed=5))
    assert [store.caption(number) for number in range(6)] == asked
    for number, video in enumerate(wanted):
        latents, cond = store.read(number)
        assert torch.equal(mixture.backbone.decode(latents[None])[0], video)
        assert mixture.backbone.captions({name: value[None] for name, value in cond.items()}) == [asked[number]]
    assert not torch.equal(store.read(0)[0], store.read(1)[0])
    mixture.guidance.scale = 1.0
    assert not torch.equal(next(generate(mixture, asked[:1], sigmas, seed=5)), wanted[0])


def test_all_steps_of_the_trajectory_are_taken_where_none_are_given(tmp_path):
    dest = made(tmp_path / "set")
    index = json.loads((dest / "index.json").read_text())
    points = load_recipe(digits_recipe()).trajectory.build().points.tolist()
    assert index["made_for"]["sigmas"] == [*reversed(points[1:]), 0.0]
    assert index["made_for"]["backbone"]["kind"] == "digits"


@pytest.mark.parametrize("family", ["wan", "wan22", "hunyuan_video", "cogvideox_5b", "cogvideox_1.5-5b", "ltx"])
def test_sets_of_large_models_have_no_warning_and_are_trained_on(family, tmp_path):
    model = save_pipeline(tmp_path / "model", family)
    recipe = pipeline_recipe("cogvideox_1.5_i2v" if "1.5" in family else family, model)
    if family == "ltx":
        recipe["backbone"]["video"] = {"num_frames": 9, "height": 64, "width": 96}
    # What random weights of variance-preserving models make in few steps is far from what the VAE gives.
    steps = 8 if "1.5" in family else 2
    recipe["data"]["path"] = str(made(tmp_path / "set", prompts=["a dog", "rain at night"], recipe=recipe, steps=steps))
    report = check_set(tmp_path / "set", load_recipe(recipe))
    assert (report.problems, report.warnings) == ([], [])
    notes = ["this VAE gives about mean 0 and deviation 1: whether the latents were scaled already cannot be told"]
    assert report.notes == (notes if family == "ltx" else [])
    store, backbone = open_store(tmp_path / "set"), load_recipe(recipe).backbone.build()
    wanted = backbone.unpack(backbone.encode(["a dog"]))
    found = backbone.unpack({name: value[None] for name, value in store.read(0)[1].items()})
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    negative = backbone.unpack({name: value[None] for name, value in store.negative().items()})
    assert all(torch.equal(negative[name], value) for name, value in backbone.encode_negative("").items())
    frames = {"ltx": 2}.get(family, 3)
    assert store.shape(0)[1] == frames  # as the VAE gives them: of CogVideoX 1.5 the network takes one more
    result = run({**recipe, "stages": recipe["stages"][:1]}, output=tmp_path / "run", device="cpu")
    assert result.checkpoint is not None


# -- whoever makes it -------------------------------------------------------------------------------------------------


def test_killed_and_started_again_it_is_the_same_and_nothing_is_made_twice(folder, sampled):
    assert command()[0] == 0
    wanted = content(folder / "set")
    (folder / "set").rename(folder / "first")
    code, _ = command("-p", "killer.py", KILL="0")
    assert code == -signal.SIGKILL
    assert not (folder / "set" / "index.json").exists()
    assert len(pieces(folder)) == 2
    made(folder / "set", prompts=["3 right", "7 up", "0 down"], num=2, recipe=folder / "recipe.yaml")
    assert len(sampled) == 4
    assert content(folder / "set") == wanted
    made(folder / "set", prompts=["3 right", "7 up", "0 down"], num=2, recipe=folder / "recipe.yaml")
    assert len(sampled) == 4
    assert content(folder / "set") == wanted


@pytest.mark.parametrize("more", [(), ("--num-processes", "2")])
def test_a_signal_leaves_one_line_and_what_is_made(folder, more):
    under_way = start("-p", "killer.py", *more, KILL="0", SLEEP="60")
    under_way.wait_for(lambda: len(pieces(folder)) > 1)
    under_way.signal(signal.SIGTERM)
    assert under_way.exit_code() == 128 + signal.SIGTERM
    assert 2 <= len(pieces(folder)) < 6
    lines = [line for line in under_way.output.splitlines() if "stopped" in line]
    assert len(lines) == 1
    assert re.fullmatch(r"stopped; [2-5] of 6 samples are made, and the same command goes on from there", lines[0])
    assert command(*more)[0] == 0


def test_two_processes_make_the_same_even_where_one_is_killed(folder):
    assert command()[0] == 0
    wanted = content(folder / "set")
    (folder / "set").rename(folder / "first")
    code, said = command("-p", "killer.py", "--num-processes", "2", KILL="1")
    assert code == 2, said
    assert re.search(
        r"process 1 of this run \(pid \d+\) was ended by SIGKILL; what is made is kept, and the same", said
    )
    assert not (folder / "set" / "index.json").exists()
    code, said = command("--num-processes", "2")
    assert code == 0, said
    assert said.splitlines()[-1] == "set"
    assert content(folder / "set") == wanted


def test_a_longer_list_of_prompts_makes_what_is_new(tmp_path, sampled):
    made(tmp_path / "set", prompts=PROMPTS[:2])
    made(tmp_path / "set", prompts=PROMPTS)
    assert len(sampled) == 3
    assert content(tmp_path / "set") == content(made(tmp_path / "other"))


OTHER_GRID = {"kind": "flow_matching", "num_steps": 8, "shift": 2.5}


@pytest.mark.parametrize("change", [{"seed": 1}, {"steps": 3}, {"recipe": digits_recipe(trajectory=OTHER_GRID)}])
def test_what_changes_samples_makes_them_anew(change, tmp_path, sampled):
    made(tmp_path / "set", prompts=PROMPTS[:1])
    first = open_store(tmp_path / "set").read(0)[0]
    made(tmp_path / "set", prompts=PROMPTS[:1], **change)
    assert len(sampled) == 2
    assert not torch.equal(open_store(tmp_path / "set").read(0)[0], first)


def test_a_damaged_piece_is_named(tmp_path):
    generation = Generation(load_recipe(digits_recipe()), PROMPTS, tmp_path / "set")
    generation.sample("cpu")
    [piece, *_] = (tmp_path / "set" / WORK).glob("*.safetensors")
    piece.write_bytes(b"no tensors")
    with pytest.raises(UserError, match=rf"{piece.name} is damaged: .*; remove it, and give the same command again"):
        generation.pack()


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_model_that_needs_an_image_is_refused(tmp_path):
    recipe = load_recipe(pipeline_recipe("wan_i2v", save_pipeline(tmp_path / "model", "wan_i2v")))
    with pytest.raises(UserError, match=r"makes videos from images \(image_latents, image_embeds\), and prompts have"):
        Generation(recipe, ["a dog"], tmp_path / "set")


def test_a_set_of_another_kind_is_left_alone(tmp_path):
    (tmp_path / "index.json").write_text(json.dumps({"format": "moedistill-latents", "samples": [{"file": "x"}]}))
    with pytest.raises(UserError, match="holds a set that was not generated; choose another folder"):
        Generation(load_recipe(digits_recipe()), PROMPTS, tmp_path)


def test_a_prompt_that_is_none_is_one_line_and_leaves_no_folder(folder, capsys):
    (folder / "prompts.txt").write_text("3 right\na dog\n")
    with pytest.raises(SystemExit) as end:
        cli.main(["data", "generate", "prompts.txt", "set", "--recipe", "recipe.yaml"])
    assert end.value.code == 2
    assert re.search(r'^error: generate: prompt "a dog": give a digit', capsys.readouterr().err, re.MULTILINE)


def test_a_backbone_without_a_way_back_is_refused_before_it_samples(tmp_path, monkeypatch, sampled):
    monkeypatch.delattr(DigitsBackbone, "stored")
    with pytest.raises(UserError, match="DigitsBackbone has no method `stored` that undoes its `prepare`"):
        made(tmp_path / "set")
    assert not sampled


def test_a_sample_that_is_not_finite_stops_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Mixture, "generate", lambda mixture, noise, *args, **options: noise * torch.nan)
    with pytest.raises(UserError, match=r'generate: the teacher\'s sample of "3 right" is not finite'):
        made(tmp_path / "set")
