"""Ctrl-C, SIGTERM, SIGKILL at any time: the run goes on from there and ends as the uninterrupted one, bit for bit."""

import contextlib
import json
import random
import signal
import time
from types import SimpleNamespace

import pytest
from helpers import dcm_recipe, equal, evaluate, trees
from started_commands import Command

from moedistill.runs.loop import run
from moedistill.runtime.checkpoint import Checkpoints, find_checkpoint

STEPS = 4

SLOW_SAVES = """
import time
from moedistill.runtime import checkpoint

save_tree = checkpoint.save_tree

def slowly(*arguments):
    time.sleep(0.02)
    save_tree(*arguments)

checkpoint.save_tree = slowly
"""

SLEEPS_IN_STEP_2 = """
import time
from moedistill import hookimpl

@hookimpl
def on_step_end(training, metrics):
    if training.step == 2:
        (training.run.output / "asleep").touch()
        time.sleep(100)
"""

SLEEPS_IN_FIRST_EVALUATION = """
import time
from moedistill.stages.evaluate import EvaluateStage

execute = EvaluateStage.execute

def sleepy(self, job):
    if not (job.output / "asleep").exists():
        (job.output / "asleep").touch()
        time.sleep(100)
    execute(self, job)

EvaluateStage.execute = sleepy
"""


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The uninterrupted run, in this process, and its recipe."""
    folder = tmp_path_factory.mktemp("reference")
    recipe = dcm_recipe(STEPS, **{"training.keep_checkpoints": 2})
    recipe["stages"].append(evaluate())
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return SimpleNamespace(recipe=folder / "recipe.yaml", run=run(recipe, output=folder / "run", device="cpu"))


@pytest.fixture
def start(reference, tmp_path):
    """Starts the command on the same recipe; its folder is `tmp_path / "run"`."""

    def start(*arguments, plugin=SLOW_SAVES, folder=tmp_path / "run"):
        file = tmp_path / "plugin.py"
        file.write_text(plugin)
        folder.parent.mkdir(exist_ok=True)
        common = ("run", reference.recipe, "--device", "cpu", "-p", file)
        where = () if "--resume-from" in arguments else ("--output", folder)
        return Command(*common, *where, *arguments, log=folder.with_suffix(".log"))

    return start


def lines(folder):
    file = folder / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def go_on(folder):
    plugin = folder.parent / "plugin.py"
    return f"go on with: moedistill run {folder}/recipe.yaml --resume-from {folder} --device cpu -p {plugin}"


def leftovers(folder):
    return list(folder.glob("checkpoints/.tmp-*"))


def assert_same_end(folder, reference):
    ended, expected = find_checkpoint(folder), reference.checkpoint
    assert ended.name == expected.name
    ended, expected = trees(ended), trees(expected)
    for tree in expected:
        assert equal(ended[tree], expected[tree]), tree
    for file in ("metrics.jsonl", "evaluate/metrics.json", "evaluate/latents.safetensors"):
        assert (folder / file).read_bytes() == (reference.output / file).read_bytes(), file
    assert not leftovers(folder)


@pytest.mark.parametrize(
    ("signum", "code", "after", "workers"), [(signal.SIGINT, 130, 2, 0), (signal.SIGTERM, 143, STEPS + 1, 2)]
)
def test_a_signal_saves_and_says_where(reference, start, tmp_path, signum, code, after, workers):
    folder = tmp_path / "run"
    command = start("--set", f"training.num_workers={workers}")
    command.wait_for(lambda: len(lines(folder)) >= after)
    command.signal(signum)
    time.sleep(0.02)
    command.signal(signum, workers=False)  # launchers pass on what the terminal has sent already: still the same one
    assert command.exit_code() == code
    last = json.loads(lines(folder)[-1])
    saved = find_checkpoint(folder)
    assert saved.name.endswith(f"{last['stage']}_{last['step']:08d}")
    said = command.output.splitlines()[-1]
    where = f"saved is {saved}; {go_on(folder)}"
    assert said == f"stopped at step {last['step']} of {last['stage']}; {where}"
    assert "Traceback" not in command.output

    assert start("--resume-from", folder).exit_code() == 0
    assert_same_end(folder, reference.run)


def test_a_second_signal_interrupts_at_once(reference, start, tmp_path):
    folder = tmp_path / "run"
    command = start(plugin=SLEEPS_IN_STEP_2)
    command.wait_for((folder / "asleep").exists)
    command.signal(signal.SIGTERM)
    time.sleep(1.2)
    assert command.running
    command.signal(signal.SIGINT)
    assert command.exit_code() == 130
    saved = folder / "checkpoints/00_semantic_00000001"
    assert find_checkpoint(folder) == saved
    assert command.output.splitlines()[-1] == f"stopped in stage semantic; saved is {saved}; {go_on(folder)}"


def test_a_signal_in_an_evaluation(reference, start, tmp_path):
    folder = tmp_path / "run"
    command = start(plugin=SLEEPS_IN_FIRST_EVALUATION)
    command.wait_for((folder / "asleep").exists)
    command.signal(signal.SIGTERM)
    assert command.exit_code(seconds=90) == 143
    saved = find_checkpoint(folder)
    assert command.output.splitlines()[-1] == f"stopped in stage evaluate; saved is {saved}; {go_on(folder)}"
    before = len(command.output)
    assert start("--resume", plugin=SLEEPS_IN_FIRST_EVALUATION).exit_code() == 0
    assert "stage evaluate" in command.output[before:]
    assert "(consistency" not in command.output[before:]
    assert_same_end(folder, reference.run)


# -- SIGKILL ----------------------------------------------------------------------------------------------------------


def run_with_kills(start, folder, moments, limit):
    """Runs to the end, but kills at `limit` random moments before; for each says whether it hit amid a save."""
    amid_saves = []
    while True:
        # One that was whole, but killed before it had its name, is one to go on from.
        Checkpoints(folder / "checkpoints", keep=1).give_names()
        on = bool(Checkpoints(folder / "checkpoints", keep=1).all())
        command = start(*(["--resume"] if on else []), folder=folder)
        if len(amid_saves) == limit:
            assert command.exit_code() == 0, command.output
            return amid_saves
        more, seen = moments.randrange(3), command.output.count("steps/s")
        try:
            command.wait_for(lambda: command.output.count("steps/s") >= seen + more)  # noqa: B023
        except AssertionError:  # it was near its end
            assert command.exit_code() == 0, command.output
            return amid_saves
        time.sleep(moments.uniform(0, 0.3))
        with contextlib.suppress(ProcessLookupError):  # it ended first
            command.signal(signal.SIGKILL, workers=False)
        if command.exit_code() == 0:
            return amid_saves
        assert command.exit_code() == -signal.SIGKILL
        amid_saves.append(bool(leftovers(folder)))


def test_three_kills(reference, start, tmp_path):
    seed = time.time_ns()
    kills, moments = 0, random.Random(seed)
    for number in range(5):
        folder = tmp_path / str(number) / "run"
        kills += len(run_with_kills(start, folder, moments, limit=3 - kills))
        assert_same_end(folder, reference.run)
        if kills == 3:
            return
    pytest.fail(f"{kills} kills only; random.Random({seed})")
