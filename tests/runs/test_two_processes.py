"""Two processes: the same global batch, so the same run as with one."""

import json
from pathlib import Path

import pytest
import torch
from helpers import dcm_recipe, distil, tiny_recipe
from started_commands import Command, start_pair

from moedistill.components.plugins import load_plugins
from moedistill.runs.loop import run
from moedistill.runtime.checkpoint import find_checkpoint, load_tree

STEPS = 20
STOPPED_AT = 14

WITNESS = f"""
import json, os, signal
from pathlib import Path
from torch.distributed import distributed_c10d
from moedistill import hookimpl
from moedistill.recipe.keys import Recipe
from moedistill.runs import loop, resume
from moedistill.stages.sample import SampleStage

def note(training, **what):
    with open(Path(__file__).with_name(f"rank-{{os.environ['RANK']}}.jsonl"), "a") as file:
        file.write(json.dumps(what) + "\\n")

def watch(place, name):
    usual = getattr(place, name)

    def watched(*arguments, **options):
        note(None, called=name)
        return usual(*arguments, **options)

    setattr(place, name, watched)

watch(resume, "verify")
watch(loop, "check_before")
watch(Recipe, "missing")
watch(SampleStage, "look_ahead")

@hookimpl
def on_stage_start(training):
    accelerator = training.accelerator
    note(training, stage=training.config.name, step=training.step, world=accelerator.num_processes, pid=os.getpid(),
         type=str(accelerator.distributed_type), rank=accelerator.process_index,
         timeout=distributed_c10d._get_default_group()._get_backend(accelerator.device).options._timeout.days)

@hookimpl
def on_step_end(training, metrics):
    note(training, batch=training.draw._samples)
    if os.environ["RANK"] == "1" and training.config.name == "detail" and training.step == {STOPPED_AT - 1}:
        os.kill(os.getpid(), signal.SIGTERM)

@hookimpl
def on_checkpoint(training, path):
    note(training, saved=path.name)
"""


def notes(folder, rank):
    return [json.loads(line) for line in (folder / f"rank-{rank}.jsonl").read_text().splitlines()]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    """A run in one process; and one that torchrun starts as two, whose second is told to stop, and that is resumed."""
    folder = tmp_path_factory.mktemp("processes")
    recipe = dcm_recipe(STEPS, **{"training.batch_size": 8, "training.checkpoint_every": 10})
    recipe["stages"].append({"name": "samples", "kind": "sample", "prompts": ["7 up"]})
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    (folder / "witness.py").write_text(WITNESS)
    arguments = ["run", folder / "recipe.yaml", "--device", "cpu", "--output", folder / "two"]
    arguments = [str(argument) for argument in [*arguments, "-p", folder / "witness.py"]]

    torchrun = ["--standalone", "--nproc_per_node", "2", "-m", "moedistill"]
    launched = Command(*torchrun, *arguments, program="torchrun", log=folder / "log")
    one = run(recipe, output=folder / "one", device="cpu")
    launched.exit_code()
    output = launched.output
    assert find_checkpoint(folder / "two").name == f"01_detail_{STOPPED_AT:08d}", output
    assert f"stopped at step {STOPPED_AT} of detail; saved is" in output
    first = [notes(folder, rank) for rank in range(2)]

    pair = start_pair([*arguments, "--resume"], folder)
    assert [command.exit_code() for command in pair] == [0, 0], pair[0].output + pair[1].output
    return one, folder, first


def test_there_are_two(one_and_two):
    _, folder, first = one_and_two
    for launch in (first, [notes(folder, rank)[len(first[rank]) :] for rank in range(2)]):
        started = [[note for note in launch[rank] if "world" in note] for rank in range(2)]
        for rank in range(2):
            assert {(note["rank"], note["world"], note["type"]) for note in started[rank]} == {
                (rank, 2, "DistributedType.MULTI_CPU")
            }
        assert started[0][0]["pid"] != started[1][0]["pid"]
        assert {note["timeout"] for rank in range(2) for note in started[rank]} == {7}  # days
    # The last micro-batch of a step: half of its samples each.
    assert [next(note["batch"] for note in first[rank] if "batch" in note) for rank in range(2)] == [[4, 5], [6, 7]]


def test_one_process_looks_at_files_for_both(one_and_two):
    """What is hashed, checked or loaded to be tried has 100 GB, or 11, on each process otherwise."""
    _, folder, first = one_and_two
    begun = ["missing", "check_before", "look_ahead"]
    resumed = ["missing", "check_before", "verify", "look_ahead"]
    for rank in range(2):
        both = [first[rank], notes(folder, rank)[len(first[rank]) :]]
        calls = [[note["called"] for note in each if "called" in note] for each in both]
        assert calls == ([begun, resumed] if rank == 0 else [[], []])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages.2.prompts": ["seven"]}, 'stage samples: prompt "seven"'),
        ({"seed": 1}, "two already holds a run"),
    ],
)
def test_what_one_process_finds_stops_both(one_and_two, tmp_path, changes, message):
    _, folder, _ = one_and_two
    stages = [distil(steps=2), distil("detail", steps=2), {"name": "samples", "kind": "sample", "prompts": ["7 up"]}]
    (tmp_path / "recipe.yaml").write_text(json.dumps(tiny_recipe(stages, changes)))
    output = folder / "two" if "seed" in changes else tmp_path / "run"
    pair = start_pair(["run", tmp_path / "recipe.yaml", "--device", "cpu", "--output", output], tmp_path)
    assert [command.exit_code() for command in pair] == [2, 2], pair[0].output + pair[1].output
    assert [message in command.output for command in pair] == [True, False]  # it is said once
    assert not any("Traceback" in command.output for command in pair)
    assert not (tmp_path / "run").exists()


def test_two_processes_give_the_traces_of_one(one_and_two):
    one, folder, _ = one_and_two
    expected, got = lines(one.output), lines(folder / "two")
    steps = [(stage, step) for stage in ("semantic", "detail") for step in range(1, STEPS + 1)]
    assert [(line["stage"], line["step"]) for line in got] == steps
    for a, b in zip(expected, got, strict=True):
        assert a.pop("stage") == b.pop("stage")
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    # The traces say something: they move, and the critic takes part.
    assert max(line["loss"] for line in got[STEPS:]) > 1.2 * min(line["loss"] for line in got[STEPS:])
    assert all("loss/gan_critic" in line for line in got[STEPS:])


def test_two_processes_give_the_weights_of_one(one_and_two):
    one, folder, _ = one_and_two
    for tree in ("experts", "ema"):
        expected, got = (load_tree(find_checkpoint(path), tree) for path in (one.output, folder / "two"))
        for expert in ("semantic", "detail"):
            for name, weight in expected[expert].items():
                torch.testing.assert_close(got[expert][name], weight, rtol=1e-3, atol=1e-4)


def test_one_process_writes(one_and_two):
    _, folder, _ = one_and_two
    saved = [[note["saved"] for note in notes(folder, rank) if "saved" in note] for rank in range(2)]
    names = ["00_semantic_00000010", "00_semantic_00000020", "01_detail_00000010", f"01_detail_{STOPPED_AT:08d}"]
    assert saved == [[*names, "01_detail_00000020"], []]
    assert sorted(path.name for path in (folder / "two/checkpoints").iterdir()) == saved[0]


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(dcm_recipe(1, **{"training.batch_size": 6})))
    pair = start_pair(["run", tmp_path / "recipe.yaml", "--device", "cpu", "--output", tmp_path / "run"], tmp_path)
    assert [command.exit_code() for command in pair] == [2, 2]
    said = [command.output.count("batch_size 6 cannot be shared evenly among 2 processes × 2") for command in pair]
    assert said == [1, 0]
    assert not any("Traceback" in command.output for command in pair)


def test_two_processes_train_two_experts_as_one_does(tmp_path):
    """Each has a wrapper of its own, whose processes exchange its gradients alone."""
    tests = Path(__file__).parents[1]
    lora = {"kind": "lora", "rank": 8, "alpha": 8}
    stage = {"name": "matching", "kind": "matching", "expert": "student", "fake_score": "score", "steps": 6}
    rates = {"optimizer": {"lr": 1e-2}, "fake_score_optimizer": {"lr": 1e-2}, "fake_score_updates": 2}
    recipe = {
        "name": "matching",
        "backbone": {"kind": "gaussian"},
        "trajectory": {"kind": "flow_matching", "num_steps": 10, "shift": 1.0},
        "router": {"kind": "timestep", "experts": ["student"]},
        "experts": {"student": lora, "score": lora},
        "data": {"kind": "gaussian"},
        "training": {"batch_size": 16},
        "stages": [{**stage, **rates}],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    files = [tests / "gaussian_plugin.py", tests / "matching_plugin.py"]
    one = run(recipe, output=tmp_path / "one", device="cpu", plugins=load_plugins(files)).output
    options = [option for file in files for option in ("-p", file)]
    arguments = ["run", tmp_path / "recipe.yaml", "--device", "cpu", "--output", tmp_path / "two", *options]
    pair = start_pair(arguments, tmp_path)
    assert [command.exit_code() for command in pair] == [0, 0], pair[0].output + pair[1].output
    expected, found = (load_tree(find_checkpoint(folder), "experts") for folder in (one, tmp_path / "two"))
    for name in ("student", "score"):
        for key, weight in expected[name].items():
            torch.testing.assert_close(found[name][key], weight, rtol=0, atol=1e-5)
