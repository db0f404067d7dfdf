"""A router of a class of its own, through a run, its export and samples: as a timestep router of its boundaries."""

import json

import pytest
import router_plugin
import torch
from helpers import distil, evaluate, tiny_recipe
from router_plugin import Shares
from safetensors.torch import load_file

from moedistill.components.plugins import load_plugins
from moedistill.runs.loop import run
from moedistill.runs.sample import load_mixture, sample_run

LR = {"lr": 0.02}
ROUTERS = {
    "own": {"kind": "shares", "points": {"semantic": 2, "detail": 6}},
    "halves": {"kind": "halves", "upper": "semantic", "lower": "detail"},
    "usual": {"kind": "timestep", "experts": ["semantic", "detail"], "boundaries": [{"point": 6}]},
}


@pytest.fixture(scope="module")
def plugins():
    return load_plugins([router_plugin.__file__])


@pytest.fixture(scope="module")
def finished(plugins, tmp_path_factory):
    """A run of each router; "halves" parts at another point."""
    stages = [
        distil(optimizer=LR),
        distil("detail", optimizer=LR),
        evaluate(candidates=[{"name": "student"}, {"name": "teacher", "model": "teacher"}]),
        {"name": "export", "kind": "export"},
    ]
    return {
        name: run(
            tiny_recipe(stages, {"router": router, "sample.points": [8, 6, 3]}),
            output=tmp_path_factory.mktemp(name), device="cpu", plugins=plugins,
        ).output
        for name, router in ROUTERS.items()
    }  # fmt: skip


def test_training_and_evaluation_are_those_of_its_boundaries(finished):
    for file in ("export/semantic.safetensors", "export/detail.safetensors", "evaluate/latents.safetensors"):
        own, usual, halves = (load_file(finished[name] / file) for name in ("own", "usual", "halves"))
        assert all(torch.equal(own[name], usual[name]) for name in usual), file
        assert any(not torch.equal(own[name], halves[name]) for name in own), file


def test_the_export_keeps_its_kind(finished):
    routers = {name: json.loads((finished[name] / "export/export.json").read_text())["router"] for name in ROUTERS}
    _, mixture = load_mixture(finished["usual"])
    points = mixture.trajectory.points.tolist()
    assert routers["own"] == {"kind": "shares", "ends": {"semantic": points[6], "detail": points[0]}, "closed": "low"}
    assert Shares.from_dict(routers["own"]).segments == list(mixture.router.segments)
    assert (routers["halves"]["kind"], routers["halves"]["boundaries"]) == ("timestep", [points[4]])


@pytest.mark.parametrize("source", [".", "checkpoints/01_detail_00000002", "export"])
def test_samples_are_those_of_its_boundaries(finished, source, plugins, tmp_path):
    videos = {
        name: sample_run(folder / source, prompts=["3 right"], output=tmp_path / name, plugins=plugins).videos
        for name, folder in finished.items()
    }
    assert torch.equal(videos["own"], videos["usual"])
    assert not torch.equal(videos["own"], videos["halves"])
    used = json.loads((tmp_path / "own" / "samples.json").read_text())["experts"]
    assert used == ["semantic", "detail", "detail"]
    assert json.loads((tmp_path / "halves" / "samples.json").read_text())["experts"] == [
        "semantic",
        "semantic",
        "detail",
    ]
    recipe, mixture = load_mixture(finished["own"] / source, plugins=plugins)
    assert (recipe.router.kind, type(mixture.router).__name__) == ("shares", "Shares")
