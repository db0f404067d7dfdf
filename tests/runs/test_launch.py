"""Several processes: started by the command itself, said in the first line, and what is left where one is lost."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from helpers import distil, equal, evaluate, tiny_recipe
from safetensors.torch import load_file
from started_commands import Command, start_pair

from moedistill.recipe.loading import load_recipe
from moedistill.runs.loop import run
from moedistill.runtime.checkpoint import find_checkpoint, load_tree, verify
from moedistill.stages.share import Share

WARNING = r"[Ww]arn|Traceback|\*\*\*"
TREES = ("experts", "ema", "training")
KILLER = """
import os, signal
from moedistill import hookimpl
from moedistill.runs.loop import _Runner
from moedistill.runtime import writing
from moedistill.runtime.checkpoint import Checkpoints
from moedistill.stages.evaluate import EvaluateStage

RANK, WHEN = os.environ.get("KILL", "- -").split()


def die(when):
    if (RANK, WHEN) == (os.environ.get("RANK"), when):
        os.kill(os.getpid(), signal.SIGKILL)


def before(cls, name, when, counts=lambda *arguments: True):
    usual = getattr(cls, name)

    def method(*arguments, **options):
        if counts(*arguments):
            die(when)
        return usual(*arguments, **options)

    setattr(cls, name, method)


third = lambda runner, number, training: (number, training.step) == (0, 3)
before(_Runner, "_save", "save", third)
before(EvaluateStage, "execute", "evaluate")


@hookimpl
def on_step_end(training, metrics):
    if training.step == 3:
        die("step")
"""


def moedistill(*arguments, **environment):
    """The command, forked warm, and its processes too: its exit code and output."""
    with tempfile.TemporaryDirectory() as folder:
        command = Command(*arguments, log=Path(folder) / "log", **environment)
        return command.exit_code(), command.output


def cold(*arguments, **environment):
    """The same as typed, every process from nothing: its exit code, output, and what it said of errors."""
    done = subprocess.run(
        [Path(sys.executable).parent / "moedistill", *map(str, arguments)],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    stages = [distil(steps=5, ema_decay=0.5), evaluate(samples=3, batch_size=1)]
    stages.append({"name": "samples", "kind": "sample", "prompts": ["7 up", "3 right", "1 left"]})
    settings = {"training.checkpoint_every": 1, "training.keep_checkpoints": 9, "training.timeout": 20}
    full = {"kind": "full", "from": "semantic"}  # LoRA takes seconds to import
    recipe = tiny_recipe(stages, {**settings, "experts.detail": full})
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    (folder / "killer.py").write_text(KILLER)
    return folder


def of_two(place, name):
    where = ["--output", place / name, "-p", place / "killer.py"]
    return ["run", place / "recipe.yaml", "--device", "cpu", "--num-processes", 2, *where]


@pytest.fixture(scope="module")
def whole(place):
    """An uninterrupted run in two processes, and what it printed."""
    code, output = moedistill(*of_two(place, "whole"))
    assert code == 0, output
    return place / "whole", output


def test_the_first_line_says_what_runs(place, whole):
    assert whole[1].splitlines()[0] == "2 processes (DDP over gloo), cpu, float32"
    assert whole[1].count("done: ") == 1
    assert not re.search(WARNING, whole[1])
    code, output = moedistill("run", place / "recipe.yaml", "--device", "cpu", "--output", place / "one")
    assert (code, output.splitlines()[0]) == (0, "1 process, cpu, float32")
    one, other = (load_tree(find_checkpoint(run), "experts") for run in (place / "one", whole[0]))
    assert all((one["semantic"][key] - other["semantic"][key]).abs().max() <= 1e-6 for key in one["semantic"])


def test_what_processes_sample_together_is_what_one_samples(place, whole):
    """From the same weights: evaluation and samples, bit for bit."""
    recipe = load_recipe(place / "recipe.yaml")
    run(recipe, resume_from=find_checkpoint(whole[0]), output=place / "alone", device="cpu")
    folders = [whole[0], place / "alone"]
    one, other = (load_file(folder / "evaluate/latents.safetensors") for folder in folders)
    assert equal(one, other)
    assert one["student"].shape[0] == 3
    assert (folders[0] / "evaluate/metrics.json").read_text() == (folders[1] / "evaluate/metrics.json").read_text()
    told = [json.loads((folder / "samples/samples.json").read_text()) for folder in folders]
    assert {**told[0], "made_from": ""} == {**told[1], "made_from": ""}
    for name in told[0]["files"]:
        assert torch.equal(*(frames(folder / "samples" / name) for folder in folders))
    assert (folders[0] / "samples/samples.png").read_bytes() == (folders[1] / "samples/samples.png").read_bytes()


def frames(file):
    with av.open(file) as video:
        return torch.from_numpy(np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]))


def test_shares_are_whole_and_alike():
    for count, processes in ((1, 1), (3, 2), (4, 2), (2, 4), (7, 3)):
        parts = [Share(process, processes).items(count) for process in range(processes)]
        assert {item for part in parts for item in part} == set(range(count))
        assert len({len(part) for part in parts}) == 1


@pytest.mark.parametrize("kill", ["0 step", "1 save", "1 evaluate"])
def test_a_process_that_is_lost(place, whole, kill):
    name = kill.replace(" ", "_")
    begun = time.monotonic()
    code, *said = (cold if kill == "1 evaluate" else moedistill)(*of_two(place, name), KILL=kill)
    seconds, output = time.monotonic() - begun, "".join(said)
    assert code == 2, output
    assert seconds < 60
    [line] = [line for line in output.splitlines() if "was ended by" in line]
    found = re.fullmatch(
        rf"error: process {kill[0]} of this run \(pid \d+\) was ended by SIGKILL; saved is (\S+); go on with: (.*)",
        line,
    )
    assert found, output
    assert "Traceback" not in output
    checkpoint = Path(found[1])
    verify(checkpoint)
    # While one is lost, the other may have saved the step that both had done.
    steps = {"step": [2], "save": [2, 3], "evaluate": [5]}[kill[2:]]
    assert checkpoint.name in [f"00_semantic_{step:08d}" for step in steps]
    again, *arguments = shlex.split(found[2])
    at = arguments.index("--num-processes")
    assert (again, arguments[at + 1]) == ("moedistill", "2")
    if kill == "0 step":  # as it was printed
        code, output = moedistill(*arguments)
        assert code == 0, output
    else:  # the same without the launcher
        pair = start_pair([*arguments[:at], *arguments[at + 2 :]], place)
        assert [command.exit_code() for command in pair] == [0, 0], pair[0].output
    for tree in TREES:
        assert equal(*(load_tree(find_checkpoint(run), tree) for run in (place / name, whole[0])))


PAGE = (Path(__file__).parents[2] / "docs/distributed.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if not language for line in block.splitlines()]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[0])
def test_the_commands_of_the_page(command, tmp_path, monkeypatch):
    """In a folder of their own. The first as typed, in processes that start from nothing; other launchers are warm."""
    program, *arguments = shlex.split(command)
    monkeypatch.chdir(tmp_path)
    if program == "moedistill":
        code, output, errors = cold(*arguments)
        assert not re.search(WARNING, output + errors)
    else:  # accelerate's own launcher warns of settings that were left out
        started = Command(*arguments, program=program, log=tmp_path / "log", errors=tmp_path / "errors")
        code, output, errors = started.exit_code(), started.output, (tmp_path / "errors").read_text()
    assert code == 0, output + errors
    plain, sharded = re.findall(r"^2 processes .*$", PAGE, re.MULTILINE)
    assert output.splitlines()[0] == (sharded if "fsdp" in command else plain)
    assert "done (a miniature)" in output
    assert len(list(tmp_path.glob("runs/*/*/cost.json"))) == 1


def test_the_page_has_a_command_for_every_launcher():
    assert [command.split()[0] for command in COMMANDS] == [
        "moedistill",
        "accelerate",
        "torchrun",
        "moedistill",
        "accelerate",
    ]


def test_a_process_that_fails_by_itself_has_the_last_word(place):
    """Not those that the launcher ends because of it; while others wait for it in an evaluation."""
    (place / "broken.py").write_text(BROKEN)
    arguments = ["run", place / "recipe.yaml", "--device", "cpu", "--num-processes", 2, "-p", place / "broken.py"]
    code, output = moedistill(*arguments, "--output", place / "broken")
    assert code == 2, output
    assert [line for line in output.splitlines() if line.startswith("error")] == ["error: stage evaluate: it is broken"]
    assert "Traceback" not in output


BROKEN = """
from moedistill.errors import UserError
from moedistill.stages.evaluate import EvaluateStage


def _write(self, *arguments):
    raise UserError("stage evaluate: it is broken")


EvaluateStage._write = _write
"""


def test_a_process_that_is_lost_before_a_branch_has_saved_anything(place, whole):
    arguments = ["run", place / "recipe.yaml", "--device", "cpu", "--num-processes", 2, "-p", place / "killer.py"]
    source = whole[0] / "checkpoints/00_semantic_00000002"
    code, output = moedistill(*arguments, "--resume-from", source, "--output", place / "branch", KILL="1 step")
    assert code == 2
    [line] = [line for line in output.splitlines() if "was ended by SIGKILL" in line]
    assert f"saved is {source}; go on with: moedistill run" in line
    assert f"--resume-from {source}" in line
    assert f"--output {place / 'branch'}" in line


def test_processes_end_with_a_launcher_that_is_killed(place):
    arguments = ["run", place / "recipe.yaml", "--device", "cpu", "--num-processes", 2, "--output", place / "orphans"]
    steps = ["--set", "stages.semantic.steps=100000", "--set", "training.log_every=1"]
    started = Command(*arguments, *steps, log=place / "orphans.log")
    started.wait_for((place / "orphans/metrics.jsonl").is_file)
    holder = json.loads((place / "orphans/.lock").read_text())["pid"]
    started.signal(signal.SIGKILL, workers=False)
    end = time.monotonic() + 100
    while Path(f"/proc/{holder}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(f"/proc/{holder}").exists()
    verify(find_checkpoint(place / "orphans"))


def test_a_launcher_that_starts_fewer_processes_is_an_error(place):
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "moedistill", "run"]
    done = subprocess.run(
        [sys.executable, *launch, str(place / "recipe.yaml"), "--output", str(place / "fewer")],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert "the launcher was asked for several processes and has started one" in done.stderr
    assert not (place / "fewer").exists()


def test_mistakes_are_said_once(place):
    code, output = moedistill(
        "run", place / "recipe.yaml", "--device", "cpu", "--num-processes", 3, "--output", place / "odd"
    )
    assert (code, output.count("cannot be shared evenly among 3 processes")) == (2, 1)
    code, output = moedistill("run", "no_such", "--num-processes", 2)
    assert (code, output.count("there is no file")) == (2, 1)
    code, output = moedistill("run", "no_such", RANK="1")
    assert (code, output.count("there is no file")) == (2, 1)  # a number that is not of a run of several processes
    code, output = moedistill("run", "dcm_digits", "--num-processes", 2, WORLD_SIZE="2")
    assert (code, "leave --num-processes out" in output) == (2, True)


def test_a_signal_ends_all_of_them_and_saves(place):
    arguments = ["run", place / "recipe.yaml", "--device", "cpu", "--num-processes", 2, "--output", place / "stopped"]
    steps = ["--set", "stages.semantic.steps=100000", "--set", "training.log_every=1"]
    started = Command(*arguments, *steps, log=place / "stopped.log")
    started.wait_for((place / "stopped/metrics.jsonl").is_file)
    started.signal(signal.SIGTERM, workers=False)
    assert started.exit_code() == 128 + signal.SIGTERM, started.output
    said = re.findall(r"stopped at step \d+ of semantic; saved is .*; go on with: .*", started.output)
    assert len(said) == 1
    assert "--num-processes 2" in said[0]
    assert "Traceback" not in started.output
    verify(find_checkpoint(place / "stopped"))


def test_where_no_launcher_of_ours_waits_the_other_process_says_it(place):
    arguments = ["run", place / "recipe.yaml", "--device", "cpu", "-p", place / "killer.py", "--output", place / "pair"]
    first, second = start_pair([str(argument) for argument in arguments], place, KILL="0 step")
    assert first.exit_code() == -signal.SIGKILL
    begun = time.monotonic()
    assert second.exit_code() == 3
    assert time.monotonic() - begun < 20
    said = " ".join(second.output.split())
    assert re.search(
        r"error: process 1 ends, as another one is gone or does not answer \(.*\); saved is "
        r"\S+/pair/checkpoints/00_semantic_0000000[23]; go on with: moedistill run \S+/pair/recipe.yaml --resume-from ",
        said,
    ), said
    assert "Traceback" not in said
