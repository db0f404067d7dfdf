"""The commands that messages print work as they are printed."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from helpers import dcm_recipe, distil, equal, tiny_recipe, trees

from moedistill.cli import main
from moedistill.errors import UserError
from moedistill.recipe.loading import load_recipe, shipped_recipes
from moedistill.recipe.miniature import miniature
from moedistill.runs.commands import RunCommand
from moedistill.runs.loop import run

STOPS = """
import os, signal
from moedistill import hookimpl

def stop(where):
    if os.environ.get("STOP") == where:
        os.environ["STOP"] = ""
        os.kill(os.getpid(), signal.SIGTERM)

@hookimpl
def on_stage_start(training):
    stop(training.config.name)

@hookimpl
def on_step_end(training, metrics):
    stop(f"{training.config.name} {training.step}")
"""
"""A plugin that stops the run once, where the environment says."""


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """A working folder with a recipe and a plugin, in folders whose names a shell would split."""
    monkeypatch.chdir(tmp_path)
    Path("my files").mkdir()
    Path("my files/stops.py").write_text(STOPS)
    made = dcm_recipe(2, **{"training.checkpoint_every": None})
    Path("my files/recipe.yaml").write_text(json.dumps(made))
    return tmp_path


def command(*arguments, code=0):
    with pytest.raises(SystemExit) as end:
        main(list(map(str, arguments)))
    assert end.value.code == code


def printed(capsys, after):
    """The command that the last line on stderr ends with."""
    said = capsys.readouterr().err.splitlines()[-1]
    assert f" {after} with: moedistill run " in said
    return shlex.split(said.split(f"{after} with: ")[1])[1:]


START = ("run", "my files/recipe.yaml", "--device", "cpu", "-p", "my files/stops.py", "--set", "seed=5")


@pytest.mark.parametrize("smoke", [(), ("--smoke",)])
def test_a_stopped_run_says_how_to_go_on(inputs, capsys, monkeypatch, smoke):
    monkeypatch.setenv("STOP", "detail 1")
    command(*START, *smoke, "--output", "a run", code=143)
    on = printed(capsys, "go on")
    options = [*smoke, "--device", "cpu", "-p", "my files/stops.py"]
    assert on == ["run", "a run/recipe.yaml", "--resume-from", "a run", *options]
    command(*on)
    assert f"done{' (a miniature)' if smoke else ''}: a run" in capsys.readouterr().out
    command(*START, *smoke, "--output", "whole")
    (ended,) = Path("a run/checkpoints").glob("01_detail_*[!1]")
    assert equal(trees(ended), trees(Path("whole/checkpoints") / ended.name))
    assert load_recipe(Path("a run/recipe.yaml")).seed == 5


def test_a_miniature_stays_one_without_its_option(inputs, capsys, monkeypatch):
    monkeypatch.setenv("STOP", "detail 1")
    command(*START, "--smoke", "--output", "run", code=143)
    on = printed(capsys, "go on")
    on.remove("--smoke")
    command(*on)
    assert "done (a miniature): run" in capsys.readouterr().out


def test_a_run_of_which_nothing_is_saved_begins_anew(inputs, capsys, monkeypatch):
    monkeypatch.setenv("STOP", "semantic")
    command(*START, "--output", "-a run", code=143)
    anew = printed(capsys, "begin it anew")
    options = ["--device", "cpu", "-p", "my files/stops.py"]
    assert anew == ["run", "./-a run/recipe.yaml", "--output", "./-a run", *options]
    command("run", "./-a run/recipe.yaml", "--resume-from", "./-a run", *options, code=2)
    assert printed(capsys, "begin it anew") == anew
    command(*anew)
    assert len(list(Path("-a run/checkpoints").iterdir())) == 2


LOOK = {"name": "look", "kind": "sample", "prompts": ["3 right"]}
"""A stage that trains nothing."""


def test_a_run_that_has_evaluated_before_it_trained_begins_anew(inputs, capsys, monkeypatch):
    """What it has reported is taken over; and a folder in which all is done is not begun again."""
    made = json.loads(Path("my files/recipe.yaml").read_text())
    Path("my files/recipe.yaml").write_text(json.dumps({**made, "stages": [LOOK, *made["stages"]]}))
    monkeypatch.setenv("STOP", "semantic")
    command(*START, "--output", "run", code=143)
    anew = printed(capsys, "begin it anew")
    videos = [file.stat().st_mtime_ns for file in Path("run/look").glob("*.mp4")]
    command(*START[:-1], "seed=6", "--output", "run", code=2)  # another recipe's reports are not taken over
    assert "run already holds a run's results (result.json); choose another" in capsys.readouterr().err
    command("run", "run/recipe.yaml", "--resume-from", "run", *anew[4:], code=2)
    assert printed(capsys, "begin it anew") == anew
    command(*anew)
    assert "stage look: done before" in capsys.readouterr().out
    assert videos == [file.stat().st_mtime_ns for file in Path("run/look").glob("*.mp4")]
    assert json.loads(Path("run/result.json").read_text()).keys() == {"look"}
    shutil.rmtree("run/checkpoints")
    Path("run/checkpoints").mkdir()
    command(*anew, code=2)
    assert "run already holds a run's results (cost.json); choose another" in capsys.readouterr().err


def test_a_miniature_of_which_nothing_is_saved_begins_anew_as_one(inputs, capsys, monkeypatch):
    monkeypatch.setenv("STOP", "semantic")
    command(*START, "--smoke", "--output", "run", code=143)
    capsys.readouterr()
    command("run", "run/recipe.yaml", "--resume-from", "run", code=2)
    anew = printed(capsys, "begin it anew")
    assert anew == ["run", "run/recipe.yaml", "--output", "run", "--smoke"]
    command(*anew)


def test_a_branch_that_has_evaluated_before_it_trained_goes_on(inputs, capsys, monkeypatch):
    made = json.loads(Path("my files/recipe.yaml").read_text())
    command(*START, "--output", "first")
    first, second = made["stages"]
    Path("my files/recipe.yaml").write_text(json.dumps({**made, "stages": [first, LOOK, second]}))
    monkeypatch.setenv("STOP", "detail")
    begun = Path("first/checkpoints/00_semantic_00000002")
    command(*START, "--resume-from", begun, "--output", "other", code=143)
    on = printed(capsys, "go on")
    assert on[:6] == ["run", "other/recipe.yaml", "--resume-from", str(begun), "--output", "other"]
    command(*on)
    assert "stage look: done before" in capsys.readouterr().out
    assert [path.name for path in Path("other/checkpoints").iterdir()] == ["02_detail_00000002"]
    whole, other = (Path(name, "metrics.jsonl").read_text().splitlines() for name in ("first", "other"))
    assert [line for line in other if '"semantic"' in line] == [line for line in whole if '"semantic"' in line] != []


def test_what_may_differ_later_begins_elsewhere(inputs, capsys):
    command(*START, "--output", "run")
    begun, changed = "run/checkpoints/00_semantic_00000002", ("--set", "stages.detail.optimizer.lr=0.002")
    capsys.readouterr()
    command(*START, *changed, "--resume-from", begun, code=2)
    said = capsys.readouterr().err
    command(*shlex.split(said.split("begin there with: moedistill ")[1].split("; or,")[0]))
    assert [path.name for path in Path("run-2/checkpoints").iterdir()] == ["01_detail_00000002"]


def test_a_whole_checkpoint_beside_a_damaged_one_outside_of_a_run(inputs, capsys):
    command(*START, "--output", "run", "--set", "training.checkpoint_every=1")
    shutil.move("run/checkpoints", "kept")
    Path("kept/01_detail_00000002/ema.json").write_text("cut")
    capsys.readouterr()
    command(*START, "--resume-from", "kept/01_detail_00000002", code=2)
    on = printed(capsys, "go on")
    assert on[on.index("--resume-from") + 1] == "kept/01_detail_00000001"
    command(*on)


def test_a_branch_of_which_nothing_is_saved_goes_on_from_the_other_run(inputs, capsys, monkeypatch):
    command(*START, "--output", "first")
    begun = Path("first/checkpoints/00_semantic_00000002")
    monkeypatch.setenv("STOP", "detail")
    changes = ("--set", "stages.detail.optimizer.lr=0.002")
    command(*START, *changes, "--resume-from", begun, "--output", "other", code=143)
    on = printed(capsys, "go on")
    assert on[:6] == ["run", "other/recipe.yaml", "--resume-from", str(begun), "--output", "other"]
    command(*on)
    assert [path.name for path in Path("other/checkpoints").iterdir()] == ["01_detail_00000002"]


def test_going_back_names_the_checkpoint_and_not_the_newest(inputs, capsys, monkeypatch):
    """Stopped before it has saved anything of its own, the run must not go on from what it turned away from."""
    command(*START, "--output", "run")
    begun = Path("run/checkpoints/00_semantic_00000002")
    monkeypatch.setenv("STOP", "detail")
    command(*START, "--resume-from", begun, code=143)
    assert printed(capsys, "go on")[:4] == ["run", "run/recipe.yaml", "--resume-from", str(begun)]


def test_refusals_end_with_a_command_that_works(inputs, capsys):
    command(*START, "--smoke", "--output", "run")
    capsys.readouterr()
    command(*START, "--smoke", "--output", "run", code=2)
    command(*printed(capsys, "go on"))
    for smoke in (("--smoke",), ()):
        command(*START, *smoke, "--set", "seed=6", "--resume-from", "run", code=2)
        own = printed(capsys, "go on")
        assert "--smoke" in own
        command(*own)


# -- links ------------------------------------------------------------------------------------------------------------


def test_a_link_to_a_checkpoint_goes_on_in_its_run(tmp_path):
    made = tiny_recipe([distil(), distil("detail")])
    done = run(made, output=tmp_path / "run", device="cpu")
    newest = tmp_path / "newest"
    newest.symlink_to(done.checkpoint, target_is_directory=True)
    for output in (None, tmp_path / "run"):
        assert run(made, output=output, resume_from=newest, device="cpu").output == tmp_path / "run"


def test_a_checkpoint_moved_elsewhere_and_linked_is_still_the_run_s(tmp_path):
    made = tiny_recipe([distil(), distil("detail")])
    done = run(made, output=tmp_path / "run", device="cpu")
    shutil.move(done.checkpoint, tmp_path / "elsewhere")
    done.checkpoint.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    again = run(made, output=tmp_path / "run", resume_from=done.checkpoint, device="cpu")
    assert (again.output, again.checkpoint) == (tmp_path / "run", done.checkpoint)


def test_another_run_s_folder_is_not_to_be_resumed(tmp_path):
    made = tiny_recipe([distil()])
    one, two = (run(made, output=tmp_path / name, device="cpu") for name in ("one", "two"))
    with pytest.raises(UserError) as caught:
        run(made, output=two.output, resume_from=one.checkpoint, device="cpu")
    assert str(caught.value) == (
        f"{two.output} already holds a run; {one.checkpoint} is not one of its: choose another --output"
    )


# -- what the commands rest on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_miniature_of_a_miniature_is_the_same(name, tmp_path):
    """So that `--smoke` may be said again of the recipe that a miniature left."""
    small = miniature(load_recipe(name))
    (tmp_path / "recipe.yaml").write_text(small.to_yaml())
    assert miniature(load_recipe(tmp_path / "recipe.yaml")).resolved() == small.resolved()


def test_quoting():
    made = RunCommand(smoke=True, device="cuda:1", plugins=("-p.py", "it's.py")).go_on(Path("a b"))
    assert made == (
        "moedistill run 'a b/recipe.yaml' --resume-from 'a b' --smoke --device cuda:1 -p ./-p.py -p 'it'\"'\"'s.py'"
    )
