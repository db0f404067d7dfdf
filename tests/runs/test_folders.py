"""One run per folder, and nothing that is there already is touched."""

import json
import shutil
import time
from itertools import count

import pytest
from helpers import distil, evaluate, tiny_recipe
from started_commands import start_pair

from moedistill import hookimpl
from moedistill.analysis.study import analyze
from moedistill.cli import main
from moedistill.components.plugins import load_plugins
from moedistill.errors import UserError
from moedistill.runs.loop import run
from moedistill.runs.sample import sample_run
from moedistill.runtime.checkpoint import find_checkpoint
from moedistill.runtime.lock import locked

STAGES = [distil()]
LATER = {"training.checkpoint_every": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with a checkpoint of its first step, samples, an export and an evaluation."""
    stages = [
        *STAGES,
        {"name": "sample", "kind": "sample", "prompts": ["3 right", "7 up"]},
        {"name": "export", "kind": "export"},
        evaluate(),
    ]
    return run(tiny_recipe(stages, LATER), output=tmp_path_factory.mktemp("finished") / "run", device="cpu")


@pytest.fixture
def done(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished.output, tmp_path / "done")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(function, *arguments, **options):
    with pytest.raises(UserError) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- one run ----------------------------------------------------------------------------------------------------------


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101-000000")
    first, second = (run(tiny_recipe([distil(steps=steps)]), device="cpu").output for steps in (1, 2))
    assert [str(first), str(second)] == ["runs/tiny/20260101-000000", "runs/tiny/20260101-000000-2"]
    assert [find_checkpoint(folder).name[-1] for folder in (first, second)] == ["1", "2"]


def test_what_writes_in_a_folder_in_use_is_refused_and_what_reads_is_not(done, tmp_path):
    before = contents(done)
    with locked(done):
        for options in ({"output": done, "resume": True}, {"resume_from": done}):
            message = refusal(run, done / "recipe.yaml", device="cpu", **options)
            assert message.startswith(f"{done} is in use by process ")
        for arguments in (["sample", done, "--output", tmp_path / "samples"], ["report", done]):
            with pytest.raises(SystemExit, match="0"):
                main([str(argument) for argument in arguments])
        assert sample_run(done / "export").output == done / "export/samples"
        shutil.rmtree(done / "export/samples")
        assert {path: content for path, content in contents(done).items() if path.name != ".lock"} == before
    assert run(done / "recipe.yaml", resume_from=done, device="cpu").metrics
    assert not list(done.rglob(".lock"))


def test_a_run_looks_again_once_the_folder_is_its_own(tmp_path, monkeypatch):
    """Another run began and ended there between the look and the lock."""
    from moedistill.runs import loop

    claimed = loop.claimed

    def late(folder, **options):
        monkeypatch.setattr(loop, "claimed", claimed)
        run(tiny_recipe(STAGES), output=folder, device="cpu")
        return claimed(folder, **options)

    monkeypatch.setattr(loop, "claimed", late)
    assert "already holds a run" in refusal(run, tiny_recipe([distil(steps=1)]), output=tmp_path / "run", device="cpu")
    assert find_checkpoint(tmp_path / "run").name == "00_semantic_00000002"


def test_all_processes_of_a_run_hear_that_its_folder_is_in_use(tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(tiny_recipe(STAGES)))
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"):
        pair = start_pair(["run", tmp_path / "recipe.yaml", "--device", "cpu", "--output", tmp_path / "run"], tmp_path)
        assert [command.exit_code(60) for command in pair] == [2, 2]
    for command in pair:
        assert f"error: {tmp_path / 'run'} is in use by process " in command.output
        assert "Traceback" not in command.output
    assert list((tmp_path / "run").iterdir()) == []


# -- what is there ----------------------------------------------------------------------------------------------------


def test_a_folder_with_other_things_is_refused(tmp_path, finished):
    folder = tmp_path / "mine"
    folder.mkdir()
    # A recipe of the user's, with comments, would be overwritten by the run's own.
    for name, text in (("recipe.yaml", "# mine\n"), ("000.mp4", "mine"), ("samples.json", '{"files": ["000.mp4"]}')):
        (folder / name).write_text(text)
    before = contents(folder)
    empty = f"{folder} is not empty (000.mp4, recipe.yaml, samples.json); choose another --output"
    recipe = tiny_recipe(STAGES)
    assert empty in refusal(run, recipe, output=folder, device="cpu")
    assert empty in refusal(run, recipe, output=folder, resume_from=finished.output, device="cpu")
    assert empty in refusal(sample_run, finished.output, output=folder)
    assert empty in refusal(analyze, recipe, output=folder, device="cpu")
    assert contents(folder) == before


def test_samples_are_never_written_over_others(finished, tmp_path):
    first = sample_run(finished.output, prompts=["3 right"], num=2, output=tmp_path / "a")
    before = contents(first.output)
    assert "a is not empty" in refusal(sample_run, finished.output, prompts=["7 up"], output=tmp_path / "a")
    assert contents(first.output) == before
    # Two at once: the second sees the folder of the first before it has written there.
    (tmp_path / "b").mkdir()
    with locked(tmp_path / "b"):
        assert "b is in use by process" in refusal(sample_run, finished.output, output=tmp_path / "b")


def test_without_an_output_samples_get_numbers(done):
    folders = [sample_run(done).output.name for _ in range(3)]
    assert folders == ["samples", "samples-2", "samples-3"]


def test_a_run_without_checkpoints_says_so(tmp_path):
    """Such as one that trains nothing: --resume cannot go on with it, and must not be the advice."""
    stages = [{"name": "sample", "kind": "sample", "prompts": ["3 right"]}]
    changes = {"router": None, "experts": {}, "data": None}
    done = run(tiny_recipe(stages, changes), output=tmp_path / "run", device="cpu").output
    message = refusal(run, tiny_recipe(stages, changes), output=done, device="cpu")
    assert message == f"{done} already holds a run's results (result.json); choose another --output"


class Fails:
    """Stops a run before its first step."""

    numbers = count()

    @hookimpl
    def on_stage_start(self, training):
        if not next(self.numbers):
            raise UserError("not yet")


def test_a_run_that_failed_before_its_first_checkpoint_starts_afresh_there(tmp_path):
    plugins = load_plugins()
    plugins.manager.register(Fails())
    with pytest.raises(UserError, match="not yet"):
        run(tiny_recipe(STAGES), output=tmp_path / "run", device="cpu", plugins=plugins)
    assert (tmp_path / "run/recipe.yaml").exists()
    corrected = tiny_recipe([distil(steps=1)])
    result = run(corrected, output=tmp_path / "run", device="cpu", plugins=plugins)
    assert result.checkpoint.name == "00_semantic_00000001"


def test_a_resumed_run_rewrites_its_own_samples_and_nothing_else(done):
    (done / "sample/notes.txt").write_text("mine")
    (done / "sample/000.mp4").write_bytes(b"damaged")
    result = run(done / "recipe.yaml", resume_from=done / "checkpoints/00_semantic_00000001", device="cpu")
    assert result.output == done
    assert sorted(path.name for path in (done / "sample").iterdir()) == [
        "000.mp4", "001.mp4", "notes.txt", "samples.json", "samples.png", "samples.webp",
    ]  # fmt: skip
    assert (done / "sample/000.mp4").stat().st_size > 100
    assert (done / "sample/notes.txt").read_text() == "mine"
