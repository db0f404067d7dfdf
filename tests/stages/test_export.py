"""Exports: what comes back is what went out, and the files are what they say they are."""

import json
import shutil

import pytest
import torch
from helpers import digits_inputs, distil, evaluate, tiny_recipe, velocity_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moedistill import __version__, load_recipe
from moedistill.errors import RecipeError, UserError
from moedistill.flow.routers import TimestepRouter
from moedistill.runs.loop import run
from moedistill.runs.sample import load_mixture
from moedistill_digits.backbone import DigitsBackboneConfig

LR = {"lr": 0.02}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with an evaluation and two exports, the second one of averaged weights."""
    stages = [
        distil(optimizer=LR),
        distil("detail", optimizer=LR, ema_decay=0.9),
        evaluate(),
        {"name": "export", "kind": "export"},
        {"name": "average", "kind": "export", "weights": "ema"},
    ]
    return run(tiny_recipe(stages, {"seed": 3}), output=tmp_path_factory.mktemp("run"), device="cpu")


@pytest.fixture
def broken(finished, tmp_path):
    """A copy of the export, for breaking."""
    return shutil.copytree(finished.output / "export", tmp_path / "export")


def index_of(finished, name="export"):
    return json.loads((finished.output / name / "export.json").read_text())


@pytest.mark.parametrize("expert", ["teacher", "semantic", "detail"])
def test_every_expert_comes_back_bit_for_bit(finished, expert):
    (recipe, original), (again, loaded) = (load_mixture(finished.output), load_mixture(finished.output / "export"))
    assert recipe == again
    velocity = velocity_of(loaded, expert, digits_inputs())
    assert torch.equal(velocity, velocity_of(original, expert, digits_inputs()))
    others = {"teacher", "semantic", "detail"} - {expert}
    assert not any(torch.equal(velocity, velocity_of(loaded, other, digits_inputs())) for other in others)
    assert loaded.router == original.router
    assert torch.equal(loaded.trajectory.points, original.trajectory.points)


def test_a_full_expert_s_file_is_a_plain_network(finished):
    file = finished.output / "export" / "semantic.safetensors"
    bare = DigitsBackboneConfig(pretrained=str(file), width=16, num_layers=2, num_heads=2).build()
    _, loaded = load_mixture(finished.output)
    with torch.no_grad():
        velocity = bare.velocity(bare.network, *digits_inputs())
    assert torch.equal(velocity, velocity_of(loaded, "semantic", digits_inputs()))
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "moedistill_expert": "semantic"}
    with safe_open(file.with_name("detail.safetensors"), "pt") as opened:
        assert opened.metadata() == {"format": "pt", "moedistill_expert": "detail", "rank": "2", "alpha": "4.0"}


def test_an_export_with_the_names_of_earlier_times_is_read(finished, broken):
    """Of format 2, where an adapter's file had no prefix."""
    index, file = index_of(finished), broken / "detail.safetensors"
    save_file({name.removeprefix("moedistill."): weight for name, weight in load_file(file).items()}, file)
    for expert in index["experts"].values():
        expert.pop("prefix", None)
    index |= {"format": 1}  # without sums, which are others now
    (broken / "export.json").write_text(json.dumps(index))
    (_, now), (_, earlier) = load_mixture(finished.output / "export"), load_mixture(broken)
    inputs = digits_inputs()
    assert torch.equal(velocity_of(now, "detail", inputs), velocity_of(earlier, "detail", inputs))


def test_a_lora_expert_s_file_and_index_are_enough_to_merge_it(finished):
    folder, entry = finished.output / "export", index_of(finished)["experts"]["detail"]
    base, stored = load_file(folder / "semantic.safetensors"), load_file(folder / entry["file"])
    assert all(name.startswith("moedistill.") for name in stored)
    change = {name.removeprefix("moedistill."): weight for name, weight in stored.items()}
    assert (entry["kind"], entry["from"], entry["rank"], entry["alpha"]) == ("lora", "semantic", 2, 4.0)
    adapted = {name.removesuffix(".lora_A.weight") for name in change if name.endswith(".lora_A.weight")}
    assert adapted == {f"blocks.{i}.attn.{linear}" for i in (0, 1) for linear in ("to_q", "to_k", "to_v", "to_out")}
    for path in adapted:
        a, b = change.pop(f"{path}.lora_A.weight"), change.pop(f"{path}.lora_B.weight")
        base[f"{path}.weight"] += entry["alpha"] / entry["rank"] * b @ a
    assert {name.split(".")[0] for name in change} == {"time_embed", "norm_out", "proj_out"}
    base.update(change)
    _, loaded = load_mixture(finished.output)
    merged = loaded.experts["detail"].merged()
    assert set(merged) == set(base)
    assert all(torch.allclose(merged[name], base[name], atol=1e-6) for name in base)


def test_the_index_says_how_to_sample(finished):
    index, (_, loaded) = index_of(finished), load_mixture(finished.output)
    router, points = TimestepRouter.from_dict(index["router"]), loaded.trajectory.points
    assert router == loaded.router
    assert [router.expert_at(sigma) for sigma in (1.0, points[5], points[4], 0.0)] == ["semantic"] * 2 + ["detail"] * 2
    assert torch.equal(torch.tensor(index["trajectory"]), points)
    assert torch.equal(torch.tensor(index["sigmas"]), torch.tensor([points[8], points[4], 0.0]))


def test_provenance(finished):
    index = index_of(finished)
    assert index["provenance"] == {
        "moedistill": __version__,
        "torch": torch.__version__,
        "seed": 3,
        "weights": "trained",
        "smoke": False,
        "plugins": {"backbone digits": "moedistill_digits"},
        "stages": {
            "semantic": {"kind": "consistency", "experts": ["semantic"], "steps": 2},
            "detail": {"kind": "consistency", "experts": ["detail"], "steps": 2},
        },
        "metrics": {"evaluate": finished.metrics["evaluate"]},
    }
    assert index["recipe"]["seed"] == 3
    assert finished.metrics["export"] == {"folder": str(finished.output / "export")}


def test_averaged_weights(finished):
    assert index_of(finished, "average")["provenance"]["weights"] == "ema"
    _, original = load_mixture(finished.output, weights="ema")
    _, average = load_mixture(finished.output / "average")
    trained = velocity_of(original, "detail", digits_inputs())
    with original.running("detail", "ema"):
        averaged = original(*digits_inputs()).detach()
    assert torch.equal(velocity_of(average, "detail", digits_inputs()), averaged)
    assert not torch.equal(averaged, trained)
    assert torch.equal(velocity_of(original, "detail", digits_inputs()), trained)  # put back


def test_no_average_under_what_was_not_trained_on_it():
    stages = [distil(ema_decay=0.9), distil("detail"), {"name": "export", "kind": "export", "weights": "ema"}]
    with pytest.raises(RecipeError, match="'detail' was trained on 'semantic' as trained, not on its average"):
        load_recipe(tiny_recipe(stages))


def test_an_expert_that_no_stage_trains_has_no_file(tmp_path):
    stages = [distil(optimizer=LR), {"name": "export", "kind": "export"}]
    finished = run(tiny_recipe(stages), output=tmp_path, device="cpu", smoke=True)
    index = index_of(finished)
    assert index["experts"]["detail"]["file"] is None
    assert {path.name for path in (tmp_path / "export").glob("[!.]*")} == {"export.json", "semantic.safetensors"}
    assert index["provenance"]["smoke"] is True
    _, loaded = load_mixture(tmp_path / "export")
    semantic, detail = (velocity_of(loaded, name, digits_inputs()) for name in ("semantic", "detail"))
    assert torch.equal(semantic, detail)  # it starts as its parent


# -- what is refused --------------------------------------------------------------------------------------------------


def edit(folder, **changes):
    """By hand: in format 1 there are no sums."""
    index = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps({**index, "format": 1, **changes}))


def truncate(file):
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "detail.safetensors").unlink(), "detail.safetensors is missing; copy or export"),
        (lambda folder: truncate(folder / "detail.safetensors"), "detail.safetensors is damaged: it is not what was"),
        (lambda folder: edit(folder, format=4), "has format 4; this moedistill reads up to 3: update it"),
        (lambda folder: truncate(folder / "export.json"), "export.json is damaged: it is no JSON"),
        (lambda folder: (folder / "export.json").write_text("[]"), "is not the index of an export, or is damaged"),
        (lambda folder: (folder / "export.json").unlink(), "no checkpoint in"),
        (lambda folder: save_file({"x": torch.zeros(1)}, folder / "detail.safetensors"), "it is not what was written"),
    ],
)
def test_damaged_exports_are_refused(broken, damage, message):
    damage(broken)
    with pytest.raises(UserError, match=message):
        load_mixture(broken)


def test_there_must_be_something_to_export():
    with pytest.raises(UserError, match="nothing to export: no stage trains an expert"):
        run(tiny_recipe([{"name": "export", "kind": "export"}]))
