"""Resuming: what comes out is, bit for bit, what the uninterrupted run gives."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import dcm_recipe, digits_inputs, distil, equal, evaluate, tiny_recipe, trees, velocity_of
from safetensors.torch import load_file

from moedistill import hookimpl
from moedistill.components.plugins import load_plugins
from moedistill.errors import Interrupted, UserError
from moedistill.recipe.loading import load_recipe
from moedistill.runs.loop import run
from moedistill.runs.resume import changed_keys
from moedistill.runtime.checkpoint import find_checkpoint, load_tree

STEPS = 5
CANDIDATES = [{"name": "student"}, {"name": "teacher", "model": "teacher"}]


def recipe(**changes):
    made = dcm_recipe(STEPS, **changes)
    made["stages"] += [evaluate(candidates=CANDIDATES, weights="ema"), {"name": "export", "kind": "export"}]
    return made


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Watch:
    """Compares the experts when a stage starts."""

    def __init__(self):
        self.started = []

    @hookimpl
    def on_stage_start(self, training):
        semantic, detail, teacher = (
            velocity_of(training.mixture, name, digits_inputs()) for name in ("semantic", "detail", "teacher")
        )
        saved = dict(training.mixture.experts["semantic"].parameters)
        saved = {name: value.detach().clone() for name, value in saved.items()}
        self.started.append((training.config.name, training.step, semantic, detail, teacher, saved))


@pytest.fixture(scope="module")
def watch():
    """Sees the uninterrupted run."""
    return Watch()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, watch):
    """The uninterrupted run; all its checkpoints are there."""
    plugins = load_plugins()
    plugins.manager.register(watch)
    return run(recipe(), output=tmp_path_factory.mktemp("resume") / "whole", device="cpu", plugins=plugins)


def stopped(whole, folder, name):
    """A copy of the run's folder as it was just after checkpoint `name`, but for a later line of metrics, cut off."""
    shutil.copytree(whole.output, folder, ignore=shutil.ignore_patterns("evaluate", "export", "result.json"))
    for path in (folder / "checkpoints").iterdir():
        if path.name > name:
            shutil.rmtree(path)
    stage, step = name[3:].split("_")
    text = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    after = [(line["stage"], line["step"]) for line in map(json.loads, text)].index((stage, int(step))) + 1
    cut_off = text[after][:-9] if text[after:] else ""
    (folder / "metrics.jsonl").write_text("".join(text[:after]) + cut_off)
    return folder


def test_the_runs_state_moves(whole):
    """The tests below compare things that training changes."""
    first, last = (trees(whole.output / "checkpoints" / f"01_detail_{step:08d}") for step in (1, STEPS))
    assert [path.name for path in sorted((whole.output / "checkpoints").iterdir())] == [
        f"{number:02d}_{stage}_{step:08d}"
        for number, stage in enumerate(("semantic", "detail"))
        for step in range(1, STEPS + 1)
    ]
    assert set(last["experts"]) == set(last["ema"]) == {"semantic", "detail"}
    assert set(last["training"]["trained"]) == {"student", "gan"}
    assert equal(first["experts"]["semantic"], last["experts"]["semantic"])
    for tree, path in [
        ("experts", ["detail"]),
        ("ema", ["detail"]),
        ("training", ["critics", "gan"]),
        ("training", ["trained", "gan", "optimizer"]),
        ("training", ["trained", "gan", "scheduler"]),
        ("training", ["trained", "student", "optimizer"]),
        ("training", ["trained", "student", "scheduler"]),
    ]:
        a, b = first[tree], last[tree]
        for key in path:
            a, b = a[key], b[key]
        assert not equal(a, b), (tree, path)
    assert not equal(last["experts"]["detail"], last["ema"]["detail"])


@pytest.mark.parametrize(
    "name",
    [
        "00_semantic_00000002",  # amid the warm-up of the learning rate's fall
        "00_semantic_00000005",  # between stages
        "01_detail_00000001",  # the critic has taken one step, a loss is still warming up
        "01_detail_00000003",
        "01_detail_00000005",  # before the evaluation
    ],
)
def test_a_resumed_run_ends_as_the_uninterrupted_one(whole, tmp_path, name):
    folder = stopped(whole, tmp_path / "run", name)
    resumed = run(recipe(), output=folder, resume=True, device="cpu")
    assert sorted(path.name for path in resumed.checkpoint.parent.iterdir()) == sorted(
        path.name for path in whole.checkpoint.parent.iterdir()
    )
    for path in whole.checkpoint.parent.iterdir():
        assert equal(trees(folder / "checkpoints" / path.name), trees(path)), path.name
    assert lines(folder) == lines(whole.output)
    assert [(line["stage"], line["step"]) for line in lines(folder)] == [
        (stage, step) for stage in ("semantic", "detail") for step in range(1, STEPS + 1)
    ]
    assert resumed.metrics["evaluate"] == whole.metrics["evaluate"]
    for file in ("evaluate/latents.safetensors", "export/detail.safetensors"):
        assert equal(load_file(folder / file), load_file(whole.output / file))


def test_resuming_in_another_folder_leaves_the_first_alone(whole, tmp_path):
    source = stopped(whole, tmp_path / "a", "01_detail_00000004")
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    resumed = run(recipe(), output=tmp_path / "b", resume_from=source / "checkpoints/01_detail_00000002", device="cpu")
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*")} == before
    assert resumed.output == tmp_path / "b"
    assert equal(trees(resumed.checkpoint), trees(whole.checkpoint))
    assert lines(tmp_path / "b") == lines(whole.output)


def assert_detail_starts_as_trained_semantic(watch, whole):
    name, step, semantic, detail, teacher, saved = watch.started[-1]
    assert (name, step) == ("detail", 0)
    assert torch.equal(detail, semantic)
    assert (semantic - teacher).abs().max() > 1e-4
    assert equal(saved, load_tree(whole.output / "checkpoints/00_semantic_00000005", "experts")["semantic"])


def test_detail_starts_as_the_trained_semantic_expert(whole, watch):
    assert [started[0] for started in watch.started] == ["semantic", "detail"]
    assert_detail_starts_as_trained_semantic(watch, whole)


def test_detail_starts_as_the_trained_semantic_expert_after_resuming(whole, tmp_path):
    plugins, watch = load_plugins(), Watch()
    plugins.manager.register(watch)
    stopped(whole, tmp_path / "run", "00_semantic_00000005")
    run(recipe(), output=tmp_path / "run", resume=True, device="cpu", plugins=plugins)
    assert len(watch.started) == 1
    assert_detail_starts_as_trained_semantic(watch, whole)


def test_a_complete_run_resumed_does_nothing(whole, tmp_path):
    folder = shutil.copytree(whole.output, tmp_path / "run")
    kept = [path for path in folder.rglob("*") if path.is_file() and path.name != "recipe.yaml"]
    before = [path.stat().st_mtime_ns for path in kept]
    plugins, watch = load_plugins(), Watch()
    plugins.manager.register(watch)
    again = run(recipe(), output=folder, resume=True, device="cpu", plugins=plugins)
    assert watch.started == []
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert again.metrics == whole.metrics
    assert again.checkpoint.name == whole.checkpoint.name


def test_results_of_other_weights_are_not_taken_over(whole, tmp_path):
    folder = shutil.copytree(whole.output, tmp_path / "run")
    (folder / "result.json").write_text(json.dumps({"evaluate": {}, "export": {}}))
    earlier = folder / "checkpoints/01_detail_00000004"
    assert run(recipe(), resume_from=earlier, device="cpu").metrics["evaluate"] == whole.metrics["evaluate"]


def test_a_stopped_evaluation_is_done_again(tmp_path, monkeypatch):
    stages = [evaluate(name="before"), distil(steps=1), evaluate(name="after"), evaluate(name="last")]
    done = []

    def execute(stage, run):
        if stage.config.name == "last" and len(done) == 2:
            done.append("stopped")
            raise Interrupted(15)
        done.append(stage.config.name)
        run.metrics[stage.config.name] = {"number": len(done)}

    monkeypatch.setattr("moedistill.stages.evaluate.EvaluateStage.execute", execute)
    with pytest.raises(Interrupted):
        run(tiny_recipe(stages), output=tmp_path, device="cpu")
    result = run(tiny_recipe(stages), output=tmp_path, resume=True, device="cpu")
    assert done == ["before", "after", "stopped", "last"]
    assert result.metrics == {"before": {"number": 1}, "after": {"number": 2}, "last": {"number": 4}}
    assert json.loads((tmp_path / "result.json").read_text()) == result.metrics


def test_a_second_stage_goes_on_with_its_expert(tmp_path):
    stages = [distil(name="a", steps=2), distil(name="b", steps=1, optimizer={"lr": 1e-12})]
    result = run(tiny_recipe(stages, {"training.checkpoint_every": 1}), output=tmp_path, device="cpu")
    a, b = (load_tree(result.checkpoint.parent / name, "experts") for name in ("00_a_00000002", "01_b_00000001"))
    assert all((a["semantic"][name] - weight).abs().max() < 1e-9 for name, weight in b["semantic"].items())


# -- branches ---------------------------------------------------------------------------------------------------------

OTHER = {
    "name": "other",
    "experts.detail.rank": 4,
    "experts.detail.from": "teacher",
    "stages.1.name": "fine",
    "stages.1.losses": [{"kind": "huber", "c": 0.1}],
    "stages.1.probe": None,
    "stages.1.steps": 3,
    "sample.points": [4, 2, 1],
}


def test_a_branch_ends_as_a_run_of_its_own(whole, tmp_path, capsys):
    """Other later stages and experts, from the end of the first stage of another run, whose later lines are dropped."""
    begun = whole.output / "checkpoints" / f"00_semantic_{STEPS:08d}"
    branch = run(recipe(**OTHER), output=tmp_path / "branch", resume_from=begun, device="cpu")
    alone = run(recipe(**OTHER), output=tmp_path / "alone", device="cpu")
    assert (branch.checkpoint.name, alone.checkpoint.name) == ("01_fine_00000003",) * 2
    assert equal(trees(branch.checkpoint), trees(alone.checkpoint))
    assert branch.metrics["evaluate"] == alone.metrics["evaluate"]
    spent = [{stage: (c["steps"], c["forwards"]) for stage, c in one.cost.items()} for one in (branch, alone)]
    assert spent[0] == spent[1]
    assert lines(branch.output) == lines(alone.output)
    assert "other than there: experts.detail, name, sample.points, stages.1\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"stages.0.steps": 9}, "stages.0.steps"),
        ({"experts.semantic.kind": "lora", "experts.semantic.rank": 2}, "experts.semantic.kind"),
        ({"router.boundaries": [{"point": 3}], **OTHER}, "router.boundaries"),
        ({"seed": 1}, "seed"),
    ],
)
def test_a_branch_keeps_what_its_beginning_was_trained_with(whole, tmp_path, changes, named):
    begun = whole.output / "checkpoints" / f"00_semantic_{STEPS:08d}"
    with pytest.raises(UserError, match=named) as caught:
        run(recipe(**changes), output=tmp_path / "branch", resume_from=begun, device="cpu")
    assert "new --output" not in str(caught.value)
    assert "losses" not in str(caught.value)  # what may differ is not named
    assert not (tmp_path / "branch").exists()


def test_a_branch_needs_a_folder_of_its_own(whole):
    begun = whole.output / "checkpoints" / f"00_semantic_{STEPS:08d}"
    with pytest.raises(UserError, match=rf"begin there with: .* --resume-from {begun} --output {whole.output}-2"):
        run(recipe(**OTHER), resume_from=begun, device="cpu")


def test_a_branch_without_training_keeps_the_lines_so_far(whole, tmp_path):
    begun = whole.output / "checkpoints" / f"00_semantic_{STEPS:08d}"
    only = dcm_recipe(STEPS)
    only["stages"] = [only["stages"][0], evaluate(candidates=CANDIDATES, weights="ema")]
    branch = run(only, output=tmp_path / "branch", resume_from=begun, device="cpu")
    alone = run(only, output=tmp_path / "alone", device="cpu")
    assert lines(branch.output) == lines(alone.output)
    assert branch.metrics == alone.metrics


def test_what_was_used_before_the_checkpoint_is_settled(tmp_path):
    """Experts that others start from; where a stage has evaluated, sampling and every expert."""
    grown = {
        "router.experts": ["semantic", "middle", "detail"],
        "router.boundaries": [{"point": 5}, {"point": 3}],
        "experts.semantic": {"kind": "lora", "from": "middle", "rank": 2},
        "experts.middle": {"kind": "lora", "from": "teacher", "rank": 2},
    }
    stages = [distil(steps=1), distil("detail", steps=1)]
    begun = run(tiny_recipe(stages, grown), output=tmp_path / "a", device="cpu").checkpoint.parent
    other = {**grown, "experts.middle": {"kind": "lora", "from": "teacher", "rank": 4}, "sample.points": [8, 2]}
    before, after = changed_keys(
        load_recipe(tiny_recipe(stages, other)), load_tree(begun / "00_semantic_00000001", "state")
    )
    assert (before, after) == (["experts.middle.rank"], ["sample.points.1"])

    stages.insert(1, evaluate(name="early", candidates=CANDIDATES))
    begun = run(tiny_recipe(stages), output=tmp_path / "b", device="cpu").checkpoint
    other = tiny_recipe(stages, {"sample.points": [8, 2], "experts.detail.rank": 4, "name": "other"})
    before, after = changed_keys(load_recipe(other), load_tree(begun, "state"))
    assert (sorted(before), after) == (["experts.detail.rank", "sample.points.1"], ["name"])


def test_the_expert_under_way_is_settled(whole, tmp_path):
    """Amid the second stage its expert can no longer be another."""
    with pytest.raises(UserError, match=r"experts\.detail\.rank"):
        run(
            recipe(**{"experts.detail.rank": 4}), output=tmp_path / "branch", device="cpu",
            resume_from=whole.output / "checkpoints" / "01_detail_00000002",
        )  # fmt: skip


# -- what must not be resumed -----------------------------------------------------------------------------------------


def test_a_changed_recipe_is_refused_with_its_changed_keys(whole):
    changes = {
        "stages.1.optimizer.lr": 2e-3,
        "seed": 1,
        "training.batch_size": 8,
        "experts.detail.copies": ["norm_out"],
    }
    with pytest.raises(UserError) as caught:
        run(recipe(**changes), resume_from=whole.output, device="cpu")
    named = str(caught.value).split("made with: ")[1].split(" differ")[0]
    keys = ["experts.detail.copies", "experts.detail.copies.0", "seed", "stages.1.optimizer.lr", "training.batch_size"]
    assert named == ", ".join(keys)


def test_operational_keys_may_differ(whole):
    keys = {"checkpoint_every": None, "keep_checkpoints": 50, "log_every": 7, "trackers": ["tensorboard"]}
    changes = {f"training.{key}": value for key, value in keys.items()}
    resumed = run(recipe(**changes), resume_from=whole.output, device="cpu")
    assert resumed.metrics == whole.metrics


@pytest.mark.parametrize("resume", ["resume", "resume_from"])
def test_a_missing_path_is_never_a_fresh_start(tmp_path, resume):
    where = {"output": tmp_path / "no", "resume": True} if resume == "resume" else {"resume_from": tmp_path / "no"}
    with pytest.raises(UserError, match="no such folder"):
        run(recipe(), device="cpu", **where)
    assert not (tmp_path / "no").exists()


def test_a_folder_with_a_run_is_refused(whole, tmp_path):
    with pytest.raises(UserError, match="already holds a run; choose another --output, or go on with: moedistill"):
        run(recipe(), output=whole.output, device="cpu")
    shutil.copytree(whole.output, tmp_path / "run")
    with pytest.raises(UserError, match="already holds a run"):  # another one than what is resumed
        run(recipe(), output=tmp_path / "run", resume_from=whole.output, device="cpu")


def test_a_run_killed_before_its_first_checkpoint_starts_afresh(tmp_path):
    stages = [distil(steps=1)]
    (tmp_path / "recipe.yaml").write_text(load_recipe(tiny_recipe(stages)).to_yaml())
    (tmp_path / "checkpoints/.tmp-00_semantic_00000001").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text('{"stage": "semantic", "step": 1, "loss": 9.0}\n{"stage": "sem')
    with pytest.raises(UserError, match="no checkpoint in"):
        run(tiny_recipe(stages), output=tmp_path, resume=True, device="cpu")
    run(tiny_recipe(stages), output=tmp_path, device="cpu")
    assert [line["step"] for line in lines(tmp_path)] == [1]
    assert lines(tmp_path)[0]["loss"] < 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00_semantic_00000001"]


def test_resume_without_a_folder_takes_the_newest_run_with_a_checkpoint(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no run of 'tiny' with a checkpoint under runs/tiny"):
        run(recipe(), resume=True, device="cpu")
    for stamp in ("20260101-000001", "20260101-000003", "20260101-000002"):
        shutil.copytree(whole.output, Path("runs/tiny", stamp))
    Path("runs/tiny/20260101-000004/checkpoints").mkdir(parents=True)
    resumed = run(recipe(), resume=True, device="cpu")
    assert resumed.output == Path("runs/tiny/20260101-000003")
    assert find_checkpoint(resumed.output) == resumed.checkpoint
