"""The command line: what it prints, what it passes on, and how it exits."""

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import click
import pytest
import yaml

from moedistill import __version__, cli
from moedistill.errors import Interrupted, UserError
from moedistill.recipe.loading import load_recipe, shipped_recipes
from moedistill.runs.commands import RunCommand

SHIPPED = "digits_teacher"


@pytest.fixture
def call(capsys):
    """Runs a command in this process: its exit code, output and error output."""

    def call(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return call


@pytest.fixture
def fake_train(monkeypatch):
    """A `moedistill.runs.loop` whose `run` records what it gets, and does what it is told to."""
    calls: list[tuple[tuple, dict]] = []
    module = types.ModuleType("moedistill.runs.loop")

    def run(*args, **kwargs):
        calls.append((args, kwargs))
        if module.error is not None:
            raise module.error

    module.run, module.calls, module.error = run, calls, None
    monkeypatch.setitem(sys.modules, "moedistill.runs.loop", module)
    return module


@pytest.mark.parametrize("command", sorted(cli.cli.commands))
def test_every_help_text_has_an_example(call, command):
    code, out, _ = call(command, "-h")
    assert code == 0
    assert "Example:" in out
    assert f"moedistill {command} " in out or f"moedistill {command}\n" in out
    for option in cli.cli.commands[command].params:
        if isinstance(option, click.Option):
            assert option.help, f"{command} {option.name} has no help"


def test_help_and_version(call):
    assert call("--help")[0] == 0
    assert "moedistill run" in call("-h")[1]
    assert __version__ in call("--version")[1]


@pytest.mark.parametrize(
    "args",
    [
        [], ["runn"], ["run"], ["run", SHIPPED, "--nope"], ["run", SHIPPED, "--seed", "x"], ["run", "no_such_recipe"],
        ["run", SHIPPED, "--resume", "--resume-from", "x"], ["list", "losss"], ["validate", SHIPPED, "--set", "x"],
        ["run", SHIPPED, "-p", "no_such_file.py"], ["sample", "no_such_run"], ["run", SHIPPED, "--seed", "-1"],
        ["sample", ".", "--steps", "2", "--sigmas", "1"], ["sample", ".", "--sigmas", "1;2"], ["cp", "none", "x"],
        ["sample", ".", "--num", "0"],
    ],
)  # fmt: skip
def test_mistakes_exit_with_2(call, args):
    code, out, err = call(*args)
    assert code == 2
    assert "Traceback" not in out + err
    assert 0 < len((out + err).splitlines()) <= 27  # the list of commands is the longest


def test_run_passes_everything_on(call, fake_train, tmp_path):
    assert call("run", SHIPPED)[0] == 0
    [((recipe,), options)] = fake_train.calls
    assert recipe.name == SHIPPED
    assert options.pop("plugins").broken == {}
    assert options.pop("command") == RunCommand(recipe=SHIPPED)
    assert options == {"output": None, "resume": False, "resume_from": None, "smoke": False, "device": None}
    assert call(
        "run", SHIPPED, "--smoke", "--resume", "--output", tmp_path, "--device", "cpu", "--seed", 7,
        "--set", "training.log_every=3", "--set", "description=two words",
    )[0] == 0  # fmt: skip
    (recipe,), options = fake_train.calls[1]
    assert (recipe.seed, recipe.training.log_every, recipe.description) == (7, 3, "two words")
    assert (options["smoke"], options["resume"], options["device"]) == (True, True, "cpu")
    assert options["output"] == str(tmp_path)
    settings = ("training.log_every=3", "description=two words", "seed=7")
    assert options["command"] == RunCommand(True, "cpu", (), SHIPPED, settings)
    assert call("run", SHIPPED, "--resume-from", "there")[0] == 0
    assert fake_train.calls[2][1]["resume_from"] == "there"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("no such checkpoint"), 2, "error: no such checkpoint"),
        (Interrupted(signal.SIGINT, "saved in x"), 130, "saved in x"),
        (Interrupted(signal.SIGTERM), 143, "stopped by SIGTERM"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(call, fake_train, error, code, text):
    fake_train.error = error
    got, _, err = call("run", SHIPPED)
    assert got == code
    assert text in err


def test_a_bug_keeps_its_traceback(fake_train):
    fake_train.error = ZeroDivisionError("bug")
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", SHIPPED])


def test_sample_passes_everything_on(call, monkeypatch, tmp_path):
    module = types.ModuleType("moedistill.runs.sample")
    calls: list[tuple[tuple, dict]] = []
    result = types.SimpleNamespace(output="there", notes=[])
    module.sample_run = lambda *args, **kwargs: calls.append((args, kwargs)) or result
    monkeypatch.setitem(sys.modules, "moedistill.runs.sample", module)
    args = ("sample", tmp_path, "--prompt", "3 right", "--prompt", "7 up", "--num", 2, "--seed", 5, "--ema")
    (tmp_path / "more.txt").write_text("1 left\n")
    args += ("--prompts", tmp_path / "more.txt", "--height", 48, "--frames", 9, "--fps", 12)
    code, out, _ = call(*args, "--sigmas", "1,0.9, 0.4", "--eta", 0.5, "--output", tmp_path / "out")
    assert (code, out) == (0, "there\n")
    [((run,), options)] = calls
    assert run == tmp_path
    del options["plugins"]
    assert options == {
        "prompts": ["3 right", "7 up", "1 left"], "num": 2, "seed": 5, "steps": None, "sigmas": [1.0, 0.9, 0.4],
        "eta": 0.5, "output": tmp_path / "out", "weights": "ema", "device": "cpu", "fps": 12.0, "keep": False,
        "video": {"height": 48, "width": None, "num_frames": 9},
    }  # fmt: skip
    assert call("sample", tmp_path)[0] == 0
    assert (calls[1][1]["prompts"], calls[1][1]["weights"]) == (("",), "trained")
    code, _, err = call("sample", tmp_path, "--prompts", tmp_path / "nothing.txt")
    assert (code, len(calls)) == (2, 2)
    assert "--prompts: there is no file" in err


def test_validate_says_how_values_were_understood(call, tmp_path):
    code, out, _ = call("validate", SHIPPED, "--set", "sample.sigmas=[1, 0.7692]")
    assert code == 0
    assert out.startswith(f"{SHIPPED}: valid")
    assert "means point 20" in out


def test_list(call):
    code, out, _ = call("list", "loss")
    assert code == 0
    rows = [line.split() for line in out.splitlines()[1:]]
    assert ["huber", "moedistill"] in [row[:2] for row in rows]
    assert "trajectory:" in call("list")[1]
    assert all(name in call("list", "recipe")[1] for name in shipped_recipes())


def test_show_prints_a_recipe(call, tmp_path):
    code, out, _ = call("show", SHIPPED)
    assert code == 0
    path = tmp_path / "shown.yaml"
    path.write_text(out)
    assert load_recipe(path) == load_recipe(SHIPPED)


def test_schema_is_json(call):
    code, out, _ = call("schema")
    assert code == 0
    assert json.loads(out)["$schema"].startswith("https://json-schema.org")


def test_cp_keeps_the_text(call, tmp_path):
    target = tmp_path / "new" / "mine.yaml"
    assert call("cp", SHIPPED, target)[0] == 0
    assert target.read_text() == shipped_recipes()[SHIPPED].read_text()
    target.write_text("mine")
    code, _, err = call("cp", SHIPPED, target)
    assert code == 2
    assert "--force" in err
    assert target.read_text() == "mine"
    assert call("cp", SHIPPED, target, "--force")[0] == 0
    assert call("cp", SHIPPED, tmp_path)[0] == 0
    assert (tmp_path / f"{SHIPPED}.yaml").exists()
    assert call("cp", SHIPPED, target / "below_a_file")[0] == 2


def test_cp_makes_a_folder(call, tmp_path):
    """Where DEST ends in a slash; another name is a file's."""
    code, out, _ = call("cp", SHIPPED, f"{tmp_path}/new/dir/")
    assert code == 0
    assert [path.name for path in (tmp_path / "new" / "dir").iterdir()] == [f"{SHIPPED}.yaml"]
    assert out.strip().endswith(f" → {tmp_path}/new/dir/{SHIPPED}.yaml")
    assert call("cp", SHIPPED, f"{tmp_path}/file")[0] == 0
    code, _, err = call("cp", SHIPPED, f"{tmp_path}/file/")
    assert (code, (tmp_path / "file").is_file()) == (2, True)
    assert err == f"error: cannot write {tmp_path}/file/{SHIPPED}.yaml: File exists\n"


def test_cp_writes_out_what_is_extended(call, tmp_path):
    child = tmp_path / "child.yaml"
    base = shipped_recipes()[SHIPPED]
    child.write_text(f"extends: {os.path.relpath(base, tmp_path)}\nseed: 5\n")
    elsewhere = tmp_path / "elsewhere" / "copy.yaml"
    assert call("cp", child, elsewhere)[0] == 0
    assert "extends" not in yaml.safe_load(elsewhere.read_text())
    assert load_recipe(elsewhere) == load_recipe(child)
    child.write_text("extends: none.yaml\n")
    assert call("cp", child, tmp_path / "other.yaml")[0] == 2


def test_the_installed_command(tmp_path):
    command = Path(sys.executable).with_name("moedistill")
    done = subprocess.run([command, "validate", "nothing"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
