"""A full disk: one line that says what, how big and where; nothing is lost, and the run goes on from there."""

import errno
import shutil
from types import SimpleNamespace

import pytest
from helpers import distil, equal, evaluate, tiny_recipe, trees
from small_files import files_of, limit

from moedistill import hookimpl
from moedistill.cli import main
from moedistill.components.plugins import load_plugins
from moedistill.errors import WriteError
from moedistill.runs.loop import run
from moedistill.runs.sample import sample_run
from moedistill.runtime.checkpoint import bytes_of
from moedistill.stages.evaluate import EvaluateStage
from moedistill.stages.export import ExportStage
from moedistill.stages.sample import SampleStage

AFTER = {
    "evaluate": evaluate(pictures=2),
    "export": {"name": "export", "kind": "export"},
    "sample": {"name": "sample", "kind": "sample", "prompts": ["3 right"]},
}
RECIPE = tiny_recipe([distil(), *AFTER.values()], {"training.checkpoint_every": 1})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run as it should end."""
    return run(RECIPE, output=tmp_path_factory.mktemp("whole") / "run", device="cpu")


class Then:
    """Does something after the first checkpoint."""

    def __init__(self, do):
        self.do = do

    @hookimpl
    def on_checkpoint(self, training, path):
        if training.step == 1:
            self.do(path)


def go_on(folder):
    return f"moedistill run {folder}/recipe.yaml --resume-from {folder} --device cpu"


def fails(folder, do):
    """What the run says that has come to its first checkpoint when `do` happens."""
    plugins = load_plugins()
    plugins.manager.register(Then(do))
    with pytest.raises(WriteError) as error:
        run(RECIPE, output=folder, device="cpu", plugins=plugins)
    assert not list(folder.rglob(".*"))  # nothing half-written, no lock
    return str(error.value)


def assert_goes_on(folder, whole):
    resumed = run(RECIPE, output=folder, resume=True, device="cpu")
    assert resumed.metrics["evaluate"] == whole.metrics["evaluate"]
    ended, expected = trees(resumed.checkpoint), trees(whole.checkpoint)
    assert all(equal(ended[tree], expected[tree]) for tree in expected)
    files = {path.relative_to(folder) for path in folder.rglob("*")}
    assert files == {path.relative_to(whole.output) for path in whole.output.rglob("*")}


def test_no_room_for_a_checkpoint_is_seen_before_it_is_written(tmp_path, monkeypatch, whole):
    folder, disk = tmp_path / "run", SimpleNamespace(free=20_000, total=10**12)
    message = fails(folder, lambda _: monkeypatch.setattr(shutil, "disk_usage", lambda _: disk))
    saved = folder / "checkpoints/00_semantic_00000001"
    size, what = bytes_of(trees(saved)) / 2**20, folder / "checkpoints/00_semantic_00000002"
    refusal = f"cannot write {what}: it needs {size:.3g} MiB, and 19.5 KiB are free; make room there"
    assert message == f"{refusal}; saved is {saved}; go on with: {go_on(folder)}"
    monkeypatch.undo()
    assert_goes_on(folder, whole)


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path, whole, capsys):
    folder = tmp_path / "run"
    with files_of():
        message = fails(folder, lambda _: limit(20_000))
    assert message.startswith(f"cannot write {folder}/checkpoints/00_semantic_00000002/experts.safetensors: ")
    assert "; saved is " in message
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["00_semantic_00000001"]
    assert_goes_on(folder, whole)


def test_leftovers_that_cannot_be_removed(tmp_path, monkeypatch):
    (tmp_path / "checkpoints" / ".tmp-00_semantic_00000001").mkdir(parents=True)

    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("shutil.rmtree", denied)
    with pytest.raises(WriteError) as caught:
        run(tiny_recipe([distil()]), output=tmp_path, device="cpu")
    way_out = "allow writing there, or choose another place"
    assert str(caught.value) == f"cannot write {tmp_path}: Permission denied; {way_out}"


def test_metrics_that_cannot_be_written(tmp_path):
    def fill(checkpoint):
        file = checkpoint.parents[1] / "metrics.jsonl"
        file.unlink()
        file.symlink_to("/dev/full")

    message = fails(tmp_path / "run", fill)
    assert message.startswith(f"cannot write {tmp_path}/run/metrics.jsonl: No space left on device (")
    assert message.endswith(f"00000001; go on with: {go_on(tmp_path / 'run')}")


@pytest.mark.parametrize("stage", AFTER)
def test_what_stages_write_is_whole_or_not_there(tmp_path, whole, stage, monkeypatch, capsys):
    """`capsys`: what is printed must not go to a file, which may not grow either."""
    folder = tmp_path / "run"
    kind = {"evaluate": EvaluateStage, "export": ExportStage, "sample": SampleStage}[stage]
    execute = kind.execute

    def narrow(self, run):
        with files_of(700):
            execute(self, run)

    monkeypatch.setattr(kind, "execute", narrow)
    with pytest.raises(WriteError) as error:
        run(RECIPE, output=folder, device="cpu")
    assert str(error.value).startswith(f"cannot write {folder}/{stage}/")
    saved = folder / "checkpoints/00_semantic_00000002"
    assert str(error.value).endswith(f"of `ulimit -f`; saved is {saved}; go on with: {go_on(folder)}")
    assert [path.name for path in (folder / stage).iterdir()] == [".stage"]
    monkeypatch.undo()
    assert_goes_on(folder, whole)


def test_samples_that_do_not_fit(whole, tmp_path, capsys):
    with pytest.raises(WriteError, match=r"samples/000.mp4: File too large.*; no video is written yet$"), files_of(700):
        sample_run(whole.output, output=tmp_path / "samples")
    assert not (tmp_path / "samples").exists()


def test_a_table_that_does_not_fit(whole, tmp_path, capsys):
    (tmp_path / "table.json").symlink_to("/dev/full")
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(whole.output), "--json", str(tmp_path / "table.json"), "--resamples", "10"])
    said = capsys.readouterr().err
    assert said.startswith(f"error: cannot write {tmp_path}/table.json: No space left on device (")
    assert said.count("\n") == 1


def test_output_that_does_not_fit(monkeypatch, capsys):
    """Wherever it comes from: a plugin's own file, or a full disk behind `> log.txt`."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "plugin.txt")

    monkeypatch.setattr("moedistill.runs.loop.run", full)
    with pytest.raises(SystemExit, match="2"):
        main(["run", "dcm_digits"])
    said = "[Errno 28] No space left on device: 'plugin.txt'; make room there, or choose another place"
    assert capsys.readouterr().err == f"error: cannot write: {said}\n"
