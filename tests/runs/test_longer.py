"""A finished stage is trained longer where that is exact: bit for bit what the longer run gives from its beginning."""

import json
import shlex
import shutil
from types import SimpleNamespace

import pytest
from helpers import dcm_recipe, distil, equal, evaluate, tiny_recipe, trees

from moedistill.cli import main
from moedistill.errors import UserError
from moedistill.losses.optim import OptimizerConfig
from moedistill.recipe.loading import load_recipe
from moedistill.runs.loop import run
from moedistill.runtime.checkpoint import find_checkpoint

EVALUATE = evaluate(candidates=[{"name": "student"}, {"name": "teacher", "model": "teacher"}], weights="ema")


def recipe(steps, **changes):
    """All that has a state, with constant rates; the last stage takes so many steps."""
    made = dcm_recipe(2, **{"training.log_every": 1, **changes})
    for stage in made["stages"]:
        for optimizer in [stage["optimizer"], *(loss["optimizer"] for loss in stage["losses"] if "optimizer" in loss)]:
            optimizer["schedule"] = "constant"
    made["stages"][-1]["steps"] = steps
    made["stages"].append(EVALUATE)
    return made


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """The longer run from its beginning, and the same stopped where a shorter one ends."""
    folder = tmp_path_factory.mktemp("longer")
    whole = run(recipe(5), output=folder / "whole", device="cpu")
    short = run(recipe(2), output=folder / "short", device="cpu")
    return whole, short


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("where", ["the same folder", "another folder"])
def test_it_ends_as_the_longer_run(five, where, tmp_path, capsys):
    whole, short = five
    folder = shutil.copytree(short.output, tmp_path / "run")
    assert not equal(trees(short.checkpoint)["experts"], trees(whole.checkpoint)["experts"])
    if where == "the same folder":
        longer = run(recipe(5), output=folder, resume=True, device="cpu")
        assert longer.output == folder
    else:
        longer = run(recipe(5), output=tmp_path / "other", resume_from=folder, device="cpu")
        assert equal(trees(folder / "checkpoints" / short.checkpoint.name), trees(short.checkpoint))
    assert longer.checkpoint.name == whole.checkpoint.name == "01_detail_00000005"
    assert equal(trees(longer.checkpoint), trees(whole.checkpoint))
    assert longer.metrics == whole.metrics != short.metrics
    assert lines(longer.output) == lines(whole.output)
    assert "other than there: stages.1\n" in capsys.readouterr().out
    assert load_recipe(longer.output / "recipe.yaml").stages[1].steps == 5


def test_a_stage_under_way_too(five, tmp_path):
    whole, short = five
    folder = shutil.copytree(short.output, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / short.checkpoint.name)
    assert equal(trees(run(recipe(5), output=folder, resume=True, device="cpu").checkpoint), trees(whole.checkpoint))


def test_results_of_the_shorter_run_are_not_taken_for_those_of_the_longer(five, tmp_path, monkeypatch):
    """Where the longer run is killed after its last checkpoint, before its evaluation."""
    whole, short = five
    folder = shutil.copytree(short.output, tmp_path / "run")

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("moedistill.stages.evaluate.EvaluateStage.execute", kill)
        with pytest.raises(Killed):
            run(recipe(5), output=folder, resume=True, device="cpu")
    assert run(recipe(5), output=folder, resume=True, device="cpu").metrics == whole.metrics


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda stage: stage["optimizer"].update(schedule="cosine", warmup=0),
            "optimizer.schedule cosine",
        ),
        (
            lambda stage: stage["losses"][0].update(schedule="linear"),
            "losses.0.schedule linear",
        ),
        (
            lambda stage: stage["losses"][1]["optimizer"].update(schedule="linear"),
            "losses.1.optimizer.schedule linear",
        ),
    ],
)
def test_what_depends_on_the_number_of_steps_is_named(change, reason, tmp_path):
    short, long = recipe(2), recipe(5)
    for made in (short, long):
        made["stages"] = [made["stages"][1]]
        made["experts"]["detail"]["from"] = "teacher"
        change(made["stages"][0])
    done = run(short, output=tmp_path / "run", device="cpu")
    with pytest.raises(UserError) as caught:
        run(long, output=tmp_path / "run", resume=True, device="cpu")
    assert str(caught.value) == (
        f"stages.0.steps: stage detail was made for 2 steps, and would not have been the same with 5: {reason} "
        "depends on their number. Start a new run; or give it 2 steps again and train detail on with a further stage "
        f"after it, which goes on with: moedistill run RECIPE --resume-from {done.checkpoint} --output "
        f"{tmp_path}/run-2 --device cpu"
    )


def test_the_way_that_is_named_is_one(tmp_path, capsys):
    stages = [distil(steps=1, optimizer={"lr": 1e-3, "schedule": "linear"})]
    run(tiny_recipe(stages), output=tmp_path / "run", device="cpu")
    source = tmp_path / "recipe.yaml"
    source.write_text(json.dumps(tiny_recipe(stages)))
    with pytest.raises(SystemExit, match="2"):
        main(["run", str(source), "--set", "stages.semantic.steps=3", "--resume-from", str(tmp_path / "run")])
    printed = capsys.readouterr().err.split(", which goes on with: moedistill ")[1]
    source.write_text(json.dumps(tiny_recipe([*stages, {**stages[0], "name": "more", "steps": 2}])))
    with pytest.raises(SystemExit, match="0"):
        main(shlex.split(printed))
    assert find_checkpoint(tmp_path / "run-2").name == "01_more_00000002"


def test_a_later_stage_stands_on_it(five, tmp_path, capsys):
    whole, _ = five
    changed = recipe(5, **{"stages.0.steps": 3})
    with pytest.raises(UserError) as caught:
        run(changed, output=whole.output, resume=True, device="cpu")
    end = whole.output / "checkpoints/00_semantic_00000002"
    assert str(caught.value) == (
        f"stages.0.steps: 3 is more than {whole.checkpoint} was made with: its stage detail began with what semantic "
        "was after 2 steps; from the end of semantic, go on with: moedistill run RECIPE "
        f"--resume-from {end} --output {whole.output}-2 --device cpu"
    )
    source = tmp_path / "recipe.yaml"
    source.write_text(json.dumps(recipe(5)))
    common = ["run", str(source), "--set", "stages.semantic.steps=3", "--device", "cpu"]
    with pytest.raises(SystemExit, match="2"):
        main([*common, "--resume-from", str(whole.output)])
    with pytest.raises(SystemExit, match="0"):
        main(shlex.split(capsys.readouterr().err.split(" with: moedistill ")[1]))
    longer = SimpleNamespace(checkpoint=find_checkpoint(whole.output.with_name("whole-2")))
    alone = run(changed, output=tmp_path / "alone", device="cpu")
    assert equal(trees(longer.checkpoint), trees(alone.checkpoint))
    folder = shutil.copytree(whole.output, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints/00_semantic_00000002")
    with pytest.raises(UserError, match="start a new run, as there is no checkpoint from before it"):
        run(changed, output=folder, resume=True, device="cpu")


def test_other_keys_and_fewer_steps_stay_refused(five):
    whole, short = five
    with pytest.raises(UserError, match=r"made with: stages\.1\.steps differ"):
        run(recipe(4), output=whole.output, resume=True, device="cpu")
    with pytest.raises(UserError, match=r"made with: stages\.1\.optimizer\.lr differ"):
        run(recipe(5, **{"stages.1.optimizer.lr": 0.5}), output=short.output, resume=True, device="cpu")


def test_a_stage_of_a_plugin_must_say_so(five, monkeypatch):
    _, short = five
    monkeypatch.setattr("moedistill.stages.consistency.ConsistencyConfig.steps_may_grow", False)
    with pytest.raises(UserError, match="kind consistency does not say that a step is the same"):
        run(recipe(5), output=short.output, resume=True, device="cpu")


def test_rates_differ_where_a_fall_has_begun():
    falling = OptimizerConfig(schedule="linear", warmup=6)
    assert not falling.differs(10, 20, done=5)  # still warming up
    assert not falling.differs(10, 20, done=6)
    assert falling.differs(10, 20, done=7)
    assert not OptimizerConfig(warmup=30).differs(10, 20, done=10)
