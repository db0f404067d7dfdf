"""Experts that start with weights of an export, a run or a checkpoint: the same numbers, or one line that says why."""

import json
import shutil

import pytest
import torch
from helpers import digits_inputs, distil, equal, evaluate, tiny_recipe, trees, velocity_of
from safetensors.torch import load_file, save_file

from moedistill import load_recipe
from moedistill.cli import main
from moedistill.errors import RecipeError, UserError
from moedistill.runs.build import build_mixture
from moedistill.runs.loop import run
from moedistill.runs.sample import load_mixture

LR = {"lr": 0.02}
EXPORT = {"name": "export", "kind": "export"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of both stages, with its export."""
    stages = [distil(optimizer=LR), distil("detail", optimizer=LR), EXPORT]
    return run(tiny_recipe(stages, {"seed": 3}), output=tmp_path_factory.mktemp("run"), device="cpu").output


def starting(stages, changes=(), **init):
    """The tiny recipe with another seed, so that what is not given is another."""
    inits = {f"experts.{name}.init": str(place) for name, place in init.items()}
    return tiny_recipe(stages, {"seed": 4, **inits, **dict(changes)})


def parameters(mixture, name):
    return {key: value.detach().clone() for key, value in mixture.experts[name].saved.items()}


@pytest.mark.parametrize("place", ["export", ".", "checkpoints/01_detail_00000002"])
def test_an_expert_starts_with_the_weights_of_an_export_a_run_or_a_checkpoint(finished, place):
    recipe = starting([distil()], semantic=finished / place, detail=finished / place)
    mixture, (_, original) = build_mixture(load_recipe(recipe)), load_mixture(finished)
    for name in ("semantic", "detail"):
        assert equal(parameters(mixture, name), parameters(original, name))
        velocities = [velocity_of(each, name, digits_inputs()) for each in (mixture, original)]
        assert torch.equal(*velocities)


def test_one_of_another_name_is_named_after_the_path_and_what_starts_from_it_has_its_weights(finished):
    stages = [distil("first")]
    recipe = starting(stages, {"router.experts": ["first", "second"]})
    recipe["experts"] = {
        "first": {"kind": "full", "init": f"{finished / 'export'}#semantic"},
        "second": {"kind": "lora", "from": "first", "rank": 2, "alpha": 4},
    }
    mixture, (_, original) = build_mixture(load_recipe(recipe)), load_mixture(finished)
    first = velocity_of(mixture, "first", digits_inputs())
    assert torch.equal(first, velocity_of(original, "semantic", digits_inputs()))
    assert torch.equal(first, velocity_of(mixture, "second", digits_inputs()))


def test_training_goes_on_from_them(finished, tmp_path):
    """Its first step is of these weights, and what is not trained keeps them, in checkpoint and export."""
    recipe = starting([distil(steps=1, optimizer={"lr": 1e-9}), EXPORT], semantic=finished, detail=finished)
    went_on = run(recipe, output=tmp_path / "on", device="cpu")
    _, original = load_mixture(finished)
    for place in (went_on.output, went_on.output / "export"):
        again, mixture = load_mixture(place)
        assert again.experts["detail"].init == str(finished)  # the resolved recipe keeps it
        assert equal(parameters(mixture, "detail"), parameters(original, "detail"))
        moved = (
            parameters(mixture, "semantic")[key] - value for key, value in parameters(original, "semantic").items()
        )
        assert 0 < max(each.abs().max() for each in moved) < 1e-7
    fresh = run(starting([distil(steps=1)]), output=tmp_path / "fresh", device="cpu")
    lines = [json.loads((each.output / "metrics.jsonl").read_text().splitlines()[0]) for each in (went_on, fresh)]
    assert lines[0]["loss"] != lines[1]["loss"]


def test_a_run_with_a_checkpoint_no_longer_needs_what_it_started_with(finished, tmp_path):
    source = shutil.copytree(finished / "export", tmp_path / "source")
    stages = [distil(steps=4, optimizer=LR), distil("detail", steps=2, optimizer=LR)]
    recipe = starting(stages, {"training.checkpoint_every": 2, "training.keep_checkpoints": 9}, detail=source)
    whole = run(recipe, output=tmp_path / "whole", device="cpu")
    (tmp_path / "half" / "checkpoints").mkdir(parents=True)
    first = "checkpoints/00_semantic_00000002"
    shutil.copytree(whole.output / first, tmp_path / "half" / first)
    shutil.rmtree(source)
    half = run(recipe, output=tmp_path / "half", resume=True, device="cpu")
    last = whole.checkpoint.relative_to(whole.output)
    assert equal(*(trees(each.output / last)["experts"] for each in (whole, half)))
    other = starting(stages, {"training.checkpoint_every": 2, "training.keep_checkpoints": 9}, detail=finished)
    with pytest.raises(UserError, match=r"experts\.detail\.init differ"):
        run(other, output=tmp_path / "half", resume=True, device="cpu")


def test_a_branch_may_give_weights_to_an_expert_whose_turn_had_not_come(finished, tmp_path):
    stages = [distil(optimizer=LR), distil("detail", steps=1, optimizer={"lr": 1e-9})]
    first = run(tiny_recipe(stages[:1], {"seed": 3}), output=tmp_path / "first", device="cpu")
    branch = starting(stages, {"seed": 3}, detail=finished / "export")
    done = run(branch, output=tmp_path / "branch", resume_from=first.output, device="cpu")
    (_, mixture), (_, original) = load_mixture(done.output), load_mixture(finished)
    differ = [
        (parameters(mixture, "detail")[key] - each).abs().max() for key, each in parameters(original, "detail").items()
    ]
    assert max(differ) < 1e-7


def test_a_miniature_starts_as_its_parents(finished, tmp_path):
    recipe = starting([distil()], semantic=tmp_path / "of the real model's size", detail=finished)
    done = run(recipe, output=tmp_path / "run", device="cpu", smoke=True)
    assert "init: null" in (done.output / "recipe.yaml").read_text()


def test_experts_that_nothing_trains_are_evaluated_and_exported(finished, tmp_path, capsys):
    """No stage trains: the recipe is that of weights from elsewhere."""
    done = run(
        starting([evaluate(), EXPORT], semantic=finished, detail=finished), output=tmp_path / "run", device="cpu"
    )
    assert "is not trained" not in capsys.readouterr().out
    (_, mixture), (_, original) = load_mixture(done.output / "export"), load_mixture(finished)
    for name in ("semantic", "detail"):
        assert equal(parameters(mixture, name), parameters(original, name))


def test_a_plan_reads_none_of_it(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(load_recipe(starting([distil()], semantic="not on this machine")).to_yaml())
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(file)])
    assert ended.value.code == 0, capsys.readouterr().err


# -- what is refused, before anything is loaded or written ------------------------------------------------------------


@pytest.fixture
def broken(finished, tmp_path):
    return shutil.copytree(finished / "export", tmp_path / "export")


def refused(recipe, tmp_path, monkeypatch):
    """The message; no weight was loaded and no folder made."""
    monkeypatch.setattr("moedistill.runs.loop.build_run", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(UserError) as caught:
        run(recipe, output=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"experts.detail.rank": 4}, "has rank 2, and experts.detail 4; set experts.detail.rank to 2"),
        ({"experts.detail.alpha": 2}, "has alpha 4.0, and experts.detail 2.0; set experts.detail.alpha to 4.0"),
        ({"experts.detail.copies": ["proj_out"]}, "(targets there: attention; copies there: time_dependent)"),
        ({"experts.detail.copies": "none"}, "are not known (targets there"),
        ({"backbone.width": 24, "backbone.num_heads": 2}, "is float32 [2, 16], and must be float32 [2, 24]"),
        ({"experts.detail": {"kind": "full"}}, "has kind lora, and experts.detail full"),
    ],
)
def test_an_expert_that_is_not_alike(finished, changes, says, tmp_path, monkeypatch):
    recipe = starting([distil("detail")], {"experts.detail.init": str(finished / "export"), **changes})
    recipe["experts"]["detail"]["init"] = str(finished / "export")
    message = refused(recipe, tmp_path, monkeypatch)
    assert message.startswith(f"experts.detail.init: 'detail' of {finished / 'export'} ")
    assert says in message


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("nowhere", "there is no folder {}/nowhere; give an export, a run or a checkpoint, or leave init out"),
        ("export/detail.safetensors", "detail.safetensors is a file; make an export of it"),
        ("export#other", "export has no trained expert 'other', but detail, semantic; another name is given after"),
        ("checkpoints/00_semantic_00000002", "has no trained expert 'detail', but semantic"),
        ("checkpoints", "no checkpoint in"),
    ],
)
def test_a_place_without_it(finished, place, says, tmp_path, monkeypatch):
    message = refused(starting([distil()], detail=finished / place), tmp_path, monkeypatch)
    assert message.startswith("experts.detail.init: ")
    assert says.format(finished) in message


def test_a_damaged_file_and_one_whose_tensors_are_others(broken, tmp_path, monkeypatch):
    file = broken / "detail.safetensors"
    tensors = load_file(file)
    bias = next(name for name in tensors if name.endswith("proj_out.bias"))
    save_file({**tensors, bias: tensors[bias] + 1}, file)
    recipe = starting([distil()], detail=broken)
    assert "detail.safetensors is damaged: it is not what was written" in refused(recipe, tmp_path, monkeypatch)
    index = json.loads((broken / "export.json").read_text())
    (broken / "export.json").write_text(json.dumps({**index, "format": 1}))  # no sums
    save_file({name: each for name, each in tensors.items() if name != bias}, file)
    assert "does not fit: 'proj_out.bias' is missing" in refused(recipe, tmp_path, monkeypatch)
    save_file({**tensors, bias: tensors[bias].half()}, file)
    message = refused(recipe, tmp_path, monkeypatch)
    assert "'proj_out.bias' is float16" in message


def test_what_holds_nothing_starts_with_nothing(finished):
    with pytest.raises(RecipeError, match=r"experts\.detail\.init: expert 'detail' is frozen: it holds no weights"):
        load_recipe(starting([distil()], {"experts.detail": {"kind": "frozen", "init": str(finished)}}))


def test_an_adapter_on_other_weights_than_its_own_is_warned_of(finished, tmp_path, capsys):
    run(starting([distil(steps=1)], detail=finished / "export"), output=tmp_path / "one", device="cpu")
    assert (
        "was trained on 'semantic' of the same run; here it is on 'semantic', which does not" in capsys.readouterr().out
    )
    both = starting([distil(steps=1)], detail=finished / "export", semantic=finished / "export")
    run(both, output=tmp_path / "both", device="cpu")
    assert "warning" not in capsys.readouterr().out


def test_validate_says_where_nothing_is(finished, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(load_recipe(starting([distil()], detail=tmp_path / "not yet")).to_yaml())
    with pytest.raises(SystemExit):
        main(["validate", str(file)])
    assert f"not to be run as it is: experts.detail.init: there is no folder {tmp_path / 'not yet'}" in (
        capsys.readouterr().out
    )
