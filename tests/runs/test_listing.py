"""The list of runs: every one, whatever became of it, in lines that fit a terminal."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from helpers import distil, evaluate, tiny_recipe

from moedistill import cli, hookimpl
from moedistill.components.plugins import load_plugins
from moedistill.errors import Interrupted, UserError
from moedistill.recipe.loading import load_recipe
from moedistill.runs.listing import list_runs, list_states, packed
from moedistill.runs.loop import run
from moedistill.runtime import checkpoint
from moedistill.runtime.lock import locked

STEPS = 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of one recipe: finished, miniature, without an evaluation."""
    folder = tmp_path_factory.mktemp("listing")
    stages = [distil(steps=STEPS), distil("detail", steps=STEPS), evaluate()]
    kept = {"training.checkpoint_every": 2, "training.keep_checkpoints": 9}
    run(tiny_recipe(stages, kept), output=folder / "finished")
    run(tiny_recipe([distil(steps=1)], {"name": "unseen"}), output=folder / "unseen")
    run(tiny_recipe(stages), output=folder / "miniature", smoke=True)
    return folder


def cut(runs, folder, stage, step, *, checkpoints=()):
    """The finished run as it was after this step of this stage."""
    shutil.copytree(runs / "finished", folder, ignore=shutil.ignore_patterns("evaluate", "result.json", "checkpoints"))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    [end] = [k for k, line in enumerate(map(json.loads, lines)) if (line["stage"], line["step"]) == (stage, step)]
    (folder / "metrics.jsonl").write_text("".join(lines[: end + 1]) + '{"stage": "det')
    for name in checkpoints:
        there = runs / "finished" / "checkpoints" / name
        if there.is_dir():
            shutil.copytree(there, folder / "checkpoints" / name)
        else:
            (folder / "checkpoints" / name).mkdir(parents=True)
    return folder


def listed(*folders):
    """State by folder's name."""
    return {parts[-1].rpartition("/")[2]: parts[3] for parts in list_runs(folders)}


def test_every_run_is_there(runs):
    cells = {parts[-1].rpartition("/")[2]: parts for parts in list_runs([runs])}
    assert {name: (parts[0], parts[1], parts[3]) for name, parts in cells.items()} == {
        "finished": ("tiny", "seed 0", "finished"),
        "miniature": ("tiny (miniature)", "seed 0", "finished"),
        "unseen": ("unseen", "seed 0", "finished, without an evaluation"),
    }
    assert cells["finished"][2].startswith("6 steps, ")
    assert cells["unseen"][2].startswith("1 steps, ")
    assert list_runs([runs, runs / "finished"]) == list_runs([runs])


@pytest.mark.parametrize(
    ("stage", "step", "checkpoints", "state"),
    [
        ("semantic", 1, (), "unfinished: semantic at step 1 of 3"),
        ("semantic", 1, ("00_semantic_00000002", ".tmp-00_semantic_00000003"), "unfinished: semantic at step 2 of 3"),
        ("semantic", 1, ("00_semantic_00000003", "01_detail_00000001"), "unfinished: detail at step 0 of 3"),  # empty
        ("semantic", 3, (), "unfinished: detail at step 0 of 3"),
        ("detail", 2, ("00_semantic_00000003", "my_backup_7"), "unfinished: detail at step 2 of 3"),
        ("detail", 3, (), "unfinished: before the end of evaluate"),
    ],
)
def test_an_unfinished_run_says_how_far_it_came(runs, tmp_path, stage, step, checkpoints, state):
    cut(runs, tmp_path / "run", stage, step, checkpoints=checkpoints)
    assert listed(tmp_path) == {"run": state}


def test_only_whole_checkpoints_count(runs, tmp_path):
    names = ["00_semantic_00000002", "00_semantic_00000003", "01_detail_00000002", "01_detail_00000003"]
    checkpoints = cut(runs, tmp_path / "run", "semantic", 1, checkpoints=names) / "checkpoints"
    (checkpoints / names[3] / "experts.safetensors").write_bytes(b"cut")
    shutil.move(checkpoints / names[2], tmp_path / "moved")
    (checkpoints / names[2]).symlink_to(tmp_path / "moved")
    (checkpoints / "01_detail_00000001").write_text("a file")
    assert listed(tmp_path) == {"run": "unfinished: detail at step 0 of 3"}


def test_a_run_that_has_only_begun(runs, tmp_path):
    """Its recipe has every key; somebody's own recipe.yaml is no run."""
    (tmp_path / "begun").mkdir()
    shutil.copy(runs / "finished" / "recipe.yaml", tmp_path / "begun")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "recipe.yaml").write_text(json.dumps(tiny_recipe([distil()])))
    assert listed(tmp_path) == {"begun": "unfinished: semantic at step 0 of 3"}
    for folder, words in ((tmp_path / "own", "there is no run in it"), (tmp_path / "none", "there is no such folder")):
        with pytest.raises(UserError, match=words):
            list_runs([folder])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("result.json", '{"evaluate": {', "result.json is damaged (Expecting"),
        ("cost.json", "[]", "cost.json is damaged (it is no mapping)"),
        ("cost.json", '{"semantic": {"steps": 3}}', "cost.json is damaged (a stage lacks its numbers)"),
        ("recipe.yaml", "name: [", "recipe.yaml: "),
        ("recipe.yaml", "name: x\nbackbone: {kind: gone}\n", "recipe.yaml: unknown backbone 'gone'; allowed: "),
    ],
)
def test_what_is_damaged_is_listed_too(runs, tmp_path, name, content, words):
    shutil.copytree(runs / "finished", tmp_path / "a")
    shutil.copytree(runs / "finished", tmp_path / "b")
    (tmp_path / "a" / name).write_text(content)
    whole, damaged = list_runs([tmp_path])
    assert whole[-1] == str(tmp_path / "b")
    assert damaged[0] == "?"
    assert damaged[1].startswith("cannot be read: ")
    assert words in damaged[1]
    assert damaged[2] == str(tmp_path / "a")


def test_the_miniature_says_so_itself(runs):
    text = (runs / "miniature" / "recipe.yaml").read_text()
    assert text.startswith("# A miniature (--smoke)")
    assert load_recipe(runs / "miniature" / "recipe.yaml").name == "tiny"
    assert not (runs / "finished" / "recipe.yaml").read_text().startswith("#")


def test_lines_fit_a_terminal():
    name = "tiny (experts.detail.rank=2, stages.detail.optimizer.lr=1e-05, training.batch_size=64, trajectory.shift=5)"
    folder = "runs/" + "x" * 90
    lines = packed([name, "seed 0", "600 steps, 4321 forwards, 12345 seconds", "finished", folder], 80)
    assert lines == [
        "tiny (experts.detail.rank=2, stages.detail.optimizer.lr=1e-05,",
        "  training.batch_size=64, trajectory.shift=5)  seed 0",
        "  600 steps, 4321 forwards, 12345 seconds  finished",
        f"  {folder}",
    ]
    assert packed(["a", "seed 0", "b" * 100], None) == [f"a  seed 0  {'b' * 100}"]


def test_the_command(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(runs)])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("tiny") for line in lines) == 2
    assert all(len(line) <= 80 or str(runs) in line for line in lines)


# -- how runs stand ---------------------------------------------------------------------------------------------------


def states(*folders):
    """What is said of each run but when it wrote last, by the folder's name."""
    found = {}
    for parts in list_states(folders):
        place = next(k for k, part in enumerate(parts) if Path(part).is_dir())
        assert time.strptime(parts[place - 1], "%Y-%m-%d %H:%M")
        found[Path(parts[place]).name] = [*parts[: place - 1], *parts[place + 1 :]]
    return found


def test_finished_runs_and_miniatures(runs):
    found = states(runs)
    assert {name: parts[:2] for name, parts in found.items()} == {
        "finished": ["finished", "tiny"],
        "unseen": ["finished", "unseen"],
        "miniature": ["finished", "tiny (miniature)"],
    }
    last = [json.loads(line) for line in (runs / "finished" / "metrics.jsonl").read_text().splitlines()][-1]
    assert found["finished"][2:] == [f"loss {last['loss']:.3g}"]


def test_the_last_written_comes_first(runs, tmp_path):
    for age, name in enumerate(("c", "a", "b")):
        shutil.copytree(runs / "unseen", tmp_path / name)
        for path in (tmp_path / name).iterdir():
            os.utime(path, (1e9 - age * 3600, 1e9 - age * 3600))
    found = list_states([tmp_path])
    assert [Path(parts[-1]).name for parts in found] == ["c", "a", "b"]
    assert found[0][-2] == time.strftime("%Y-%m-%d %H:%M", time.localtime(1e9))


def test_a_stopped_run_says_how_to_go_on(runs, tmp_path):
    """A signal, as it is sent to a process."""

    class Stop:
        @hookimpl
        def on_step_end(self, training, metrics):
            if training.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    plugins = load_plugins()
    plugins.manager.register(Stop())
    with pytest.raises(Interrupted):
        run(tiny_recipe([distil(steps=5)]), output=tmp_path / "run", plugins=plugins, device="cpu")
    on = f"go on with: moedistill run {tmp_path}/run/recipe.yaml --resume-from {tmp_path}/run"
    found = states(tmp_path)["run"]
    assert (found[:3], found[4:]) == (["stopped", "tiny", "semantic at step 3 of 5"], [on])
    run(tmp_path / "run" / "recipe.yaml", resume_from=tmp_path / "run", device="cpu")
    assert states(tmp_path)["run"][:2] == ["finished", "tiny"]


def test_a_run_that_failed_says_why(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(UserError):
        run(tiny_recipe([distil(steps=STEPS)]), output=tmp_path / "run", device="cpu", smoke=True)
    found = states(tmp_path)["run"]
    assert found[:3] == ["failed", "tiny (miniature)", "after its last step"]
    assert found[-2].startswith(f"cannot write {tmp_path}/run/checkpoints/00_semantic_00000003")
    assert "; nothing is saved" not in found[-2]
    begin = f"begin anew with: moedistill run {tmp_path}/run/recipe.yaml --output {tmp_path}/run --smoke"
    assert found[-1] == begin


def test_an_error_of_the_code_is_named_too(tmp_path):
    class Break:
        @hookimpl
        def on_step_end(self, training, metrics):
            raise ZeroDivisionError("mine")

    plugins = load_plugins()
    plugins.manager.register(Break())
    with pytest.raises(ZeroDivisionError):
        run(tiny_recipe([distil(steps=STEPS)]), output=tmp_path / "run", plugins=plugins, device="cpu")
    assert "ZeroDivisionError: mine" in states(tmp_path)["run"]


def test_a_run_that_was_killed_and_one_that_is_running(runs, tmp_path):
    """What is running is known by the lock of its folder, not by its files."""
    folder = cut(runs, tmp_path / "run", "semantic", 1, checkpoints=["00_semantic_00000002"])
    assert states(tmp_path)["run"][:3] == ["killed", "tiny", "semantic at step 2 of 3"]
    with locked(folder):
        assert states(tmp_path)["run"][:3] == ["running", "tiny", "semantic at step 2 of 3"]
        assert not any("go on with" in part for part in states(tmp_path)["run"])
    (folder / ".lock").write_text('{"pid": 1, "host": "gone"}')  # as `kill -9` leaves it
    assert states(tmp_path)["run"][0] == "killed"


def test_what_cannot_be_read_has_a_line_too(runs, tmp_path):
    shutil.copytree(runs / "finished", tmp_path / "a")
    (tmp_path / "a" / "recipe.yaml").write_text("name: [")
    [parts] = list_states([tmp_path])
    assert parts[0] == "?"
    assert parts[1].startswith("cannot be read: recipe.yaml: ")


def test_the_command_that_says_how_runs_stand(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs.parent)
    shutil.copytree(runs / "unseen", runs.parent / "runs" / "unseen" / "1", dirs_exist_ok=True)
    for arguments, count in ((["runs"], 1), (["runs", str(runs)], 3)):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert end.value.code == 0
        assert len(capsys.readouterr().out.splitlines()) == count
    monkeypatch.chdir(runs)
    with pytest.raises(SystemExit) as end:
        cli.main(["runs"])
    assert end.value.code == 2
    assert "runs: there is no such folder; give runs' folders" in capsys.readouterr().err
