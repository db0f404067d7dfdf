"""Signals outside of training: one line and 128 + signal; what is written is whole, and nothing else is left."""

import os
import signal

import av
import pytest
from helpers import distil, evaluate, tiny_recipe

from moedistill import hookimpl
from moedistill.analysis import study
from moedistill.cli import main
from moedistill.components.plugins import load_plugins
from moedistill.errors import Interrupted
from moedistill.recipe.yaml_tree import dump_yaml
from moedistill.runs import loop, tables
from moedistill.runs.loop import run
from moedistill.runtime import integrity
from moedistill.runtime.checkpoint import find_checkpoint
from moedistill.runtime.signals import SIGNALS, Interruption
from moedistill.stages import evaluate as evaluation
from moedistill.stages import export, sample

AFTER = [
    evaluate(pictures=1),
    {"name": "export", "kind": "export"},
    {"name": "sample", "kind": "sample", "prompts": ["3 right", "7 up"]},
]
RECIPE = tiny_recipe([distil(), *AFTER], {"training.checkpoint_every": 1})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(RECIPE, output=tmp_path_factory.mktemp("finished") / "run", device="cpu").output


@pytest.fixture(autouse=True)
def _handlers_are_restored():
    before = [signal.getsignal(signum) for signum in SIGNALS]
    yield
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


@pytest.fixture
def call(capsys):
    """Runs a command in this process: its exit code, and what it says last."""

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return stop.value.code, (said.err or said.out).splitlines()[-1]

    return call


@pytest.fixture
def kill_in(monkeypatch):
    """Sends a signal after call `number` of a function has done its work; twice, as launchers do."""

    def kill_in(owner, name, signum, number=1):
        function, calls = getattr(owner, name), []

        def killed(*arguments, **options):
            result = function(*arguments, **options)
            calls.append(name)
            if len(calls) == number:
                try:
                    os.kill(os.getpid(), signum)
                finally:
                    os.kill(os.getpid(), signum)
            return result

        monkeypatch.setattr(owner, name, killed)

    return kill_in


@pytest.mark.parametrize("signum", SIGNALS)
def test_while_models_are_loaded(tmp_path, call, kill_in, signum):
    (tmp_path / "recipe.yaml").write_text(dump_yaml(RECIPE))
    kill_in(loop, "build_run", signum)
    command = ["run", f"{tmp_path}/recipe.yaml", "--set", "seed=3", "--output", f"{tmp_path}/run", "--device", "cpu"]
    code, said = call(*command)
    again = f"moedistill {' '.join(command)}"
    assert (code, said) == (128 + signum, f"stopped before training; nothing is lost, start it again with: {again}")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_in_training_a_hangup_saves_too(tmp_path):
    class HangUp:
        @hookimpl
        def on_step_end(self, training, metrics):
            if training.step == 1:  # it is seen after the next one
                os.kill(os.getpid(), signal.SIGHUP)

    plugins = load_plugins()
    plugins.manager.register(HangUp())
    with pytest.raises(Interrupted, match="stopped at step 2 of semantic; saved is ") as stop:
        run({**RECIPE, "training": {**RECIPE["training"], "checkpoint_every": None}}, output=tmp_path / "run",
            device="cpu", plugins=plugins)  # fmt: skip
    assert stop.value.exit_code == 129
    assert find_checkpoint(tmp_path / "run").name == "00_semantic_00000002"


@pytest.mark.parametrize(
    ("stage", "owner", "name", "number", "left"),
    [
        ("evaluate", evaluation, "save_tensors", 2, []),
        ("evaluate", evaluation.EvaluateStage, "_sample", 1, None),
        ("export", export, "save_tensors", 1, []),
        ("sample", sample, "write_mp4", 2, ["000.mp4"]),
        ("sample", sample, "side_by_side", 1, ["000.mp4", "001.mp4", "samples.png"]),
    ],
)
def test_in_a_stage_that_writes(tmp_path, call, kill_in, monkeypatch, finished, stage, owner, name, number, left):
    folder = tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(dump_yaml(RECIPE))
    kill_in(owner, name, signal.SIGTERM, number)
    code, said = call("run", tmp_path / "recipe.yaml", "--device", "cpu", "--output", folder)
    saved = folder / "checkpoints/00_semantic_00000002"
    on = f"moedistill run {folder}/recipe.yaml --resume-from {folder} --device cpu"
    assert (code, said) == (143, f"stopped in stage {stage}; saved is {saved}; go on with: {on}")
    found = sorted(path.name for path in (folder / stage).iterdir()) if (folder / stage).exists() else None
    assert found == ([".stage", *left] if left is not None else None)
    assert {path.name for path in folder.rglob(".*")} <= {".stage"}
    monkeypatch.undo()
    for file in (folder / stage).glob("*.mp4"):  # whole
        with av.open(file) as container:
            assert len(list(container.decode(video=0))) == 8
    code, said = call("run", tmp_path / "recipe.yaml", "--device", "cpu", "--resume-from", folder)
    assert code == 0
    assert sorted(path.name for path in (folder / stage).iterdir()) == sorted(
        path.name for path in (finished / stage).iterdir()
    )


def test_sample(tmp_path, call, kill_in, finished):
    kill_in(sample, "write_mp4", signal.SIGTERM, number=3)
    folder = tmp_path / "samples"
    code, said = call("sample", finished, "--num", 4, "--output", folder)
    assert (code, said) == (143, f"stopped by SIGTERM; 2 of 4 videos are in {folder}")
    assert sorted(path.name for path in folder.iterdir()) == ["000.mp4", "001.mp4"]


def test_report(tmp_path, call, kill_in, finished):
    kill_in(tables, "tabulate", signal.SIGINT)
    table = tmp_path / "table.json"
    assert call("report", finished, "--json", table, "--resamples", 10) == (130, "stopped by SIGINT")
    assert not table.exists()


def test_analyze(tmp_path, call, kill_in):
    (tmp_path / "recipe.yaml").write_text(dump_yaml(RECIPE))
    kill_in(study, "build_run", signal.SIGHUP)
    options = ("--device", "cpu", "--samples", 2, "--output", tmp_path / "analysis")
    assert call("analyze", tmp_path / "recipe.yaml", *options) == (129, "stopped by SIGHUP")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_what_nohup_ignores_stays_ignored(tmp_path, call, kill_in, finished):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        kill_in(sample, "write_mp4", signal.SIGHUP)
        code, _ = call("sample", finished, "--output", tmp_path / "samples")
        assert (code, len(list((tmp_path / "samples").glob("*.mp4")))) == (0, 1)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_no_library_takes_it_for_a_failure_of_its_own():
    """Such as one that tries another way, or goes without, on any Exception."""
    assert not issubclass(Interrupted, Exception)


def test_a_signal_that_a_compiled_reader_swallows_is_no_damage(tmp_path, monkeypatch):
    """safetensors makes an error of its own of what a signal raises within it: the file was called damaged."""

    def swallows(path):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pthread_sigmask(signal.SIG_BLOCK, [])  # a call at which Python handles it
        except BaseException as error:
            raise TypeError("could not determine the shape of object type 'torch.storage.UntypedStorage'") from error

    monkeypatch.setattr(integrity, "load_file", swallows)
    (tmp_path / "x.safetensors").write_bytes(b"x")
    with pytest.raises(Interrupted, match="now"), Interruption(lambda: "now"):
        integrity.read_tensors(tmp_path / "x.safetensors")
    monkeypatch.setattr(integrity, "load_file", lambda path: {}["x"])
    with pytest.raises(integrity.Damaged), Interruption():
        integrity.read_tensors(tmp_path / "x.safetensors")
