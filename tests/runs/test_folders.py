"""One run per folder, and nothing that is there already is touched."""

import json
import shutil
import time
from itertools import count
from pathlib import Path

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
from moedistill.runtime.lock import claimed, locked

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
    said = f"error: {tmp_path / 'run'} is in use by process "
    assert [command.output.count(said) for command in pair] == [1, 0]  # for both, once
    assert not any("Traceback" in command.output for command in pair)
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


def test_folders_of_other_projects_are_refused(tmp_path):
    """Whatever they share with those of runs: only what a run itself writes is a run that did not get far."""
    recipe = tiny_recipe(STAGES)
    run(recipe, output=tmp_path / "ours", device="cpu")
    written = (tmp_path / "ours/recipe.yaml").read_text()
    foreign = {
        "weights": {"checkpoints/model.bin": "mine", "recipe.yaml": "# mine\nbackbone: mine\n"},
        "weights beside a recipe of ours": {"checkpoints/model.bin": "mine", "recipe.yaml": written},
        "a recipe of one's own": {"checkpoints/.tmp-00_a_00000001/x": "", "recipe.yaml": f"# mine\n{written}"},
        "metrics": {"metrics.jsonl": '{"stage": "semantic", "step": 1}\n'},
        "a recipe": {"recipe.yaml": written},
    }
    for name, files in foreign.items():
        folder = tmp_path / name
        for file, text in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
        before = contents(folder)
        assert f"{folder} is not empty (" in refusal(run, recipe, output=folder, device="cpu"), name
        assert contents(folder) == before


def test_a_run_killed_while_it_made_its_folder_starts_afresh_there(tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/.tmp-recipe.yaml").write_text("name: ti")
    assert run(tiny_recipe(STAGES), output=tmp_path / "run", device="cpu").checkpoint


def test_a_run_goes_on_from_what_was_written_whole(done, capsys):
    """It was killed before the newest checkpoint had its name; the evaluation after it is not done again."""
    newest = find_checkpoint(done)
    newest.rename(newest.with_name(f".tmp-{newest.name}"))
    run(done / "recipe.yaml", resume_from=done, device="cpu")
    said = capsys.readouterr().out
    assert f"resuming from {newest}: stage semantic, step 2" in said
    assert "stage evaluate: done before" in said


@pytest.mark.parametrize("key", ["output", "resume_from"])
def test_the_only_checkpoint_may_be_one_that_was_written_whole(done, key, capsys):
    """`--resume` found none, and without it the folder held a run: each sent to the other."""
    newest = find_checkpoint(done)
    for other in (done / "checkpoints").iterdir():
        if other != newest:
            shutil.rmtree(other)
    newest.rename(newest.with_name(f".tmp-{newest.name}"))
    run(done / "recipe.yaml", device="cpu", **{key: done, "resume": key == "output"})
    assert f"resuming from {newest}" in capsys.readouterr().out


TOO_LONG = "x" * 300


def test_a_name_that_cannot_be_is_one_line(finished, tmp_path, capsys):
    why = "File name too long"
    for function, source in ((run, tiny_recipe(STAGES)), (sample_run, finished.output), (analyze, tiny_recipe(STAGES))):
        assert why in refusal(function, source, output=tmp_path / TOO_LONG, device="cpu")
        assert why in refusal(function, source, output=tmp_path / TOO_LONG / "in it", device="cpu")
    with pytest.raises(UserError, match=why), claimed(tmp_path / TOO_LONG):
        pass
    for arguments in (
        ["cp", "dcm_digits"],
        ["report", finished.output, "--json"],
    ):
        with pytest.raises(SystemExit, match="2"):
            main([str(argument) for argument in (*arguments, tmp_path / TOO_LONG)])
        said = capsys.readouterr().err
        assert why in said
        assert said.count("\n") == 1


def test_a_folder_into_which_one_may_not_look_is_one_line(finished, tmp_path, monkeypatch):
    stat = Path.stat

    def forbidden(path, **options):
        if path.parent == tmp_path / "private":
            raise PermissionError(13, "Permission denied")
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", forbidden)
    for function, source in ((run, tiny_recipe(STAGES)), (sample_run, finished.output), (analyze, tiny_recipe(STAGES))):
        message = refusal(function, source, output=tmp_path / "private/in it", device="cpu")
        assert message.endswith("private/in it: Permission denied; choose another --output")


def test_samples_of_a_checkpoint_outlive_it(done):
    """Without an output they go to the run's folder, not into what retention deletes."""
    early = done / "checkpoints/00_semantic_00000001"
    assert sample_run(early).output == done / "samples"
    outside = shutil.copytree(early, done.parent / "00_semantic_00000001")
    assert sample_run(outside).output == outside / "samples"


def test_samples_do_not_take_a_stage_s_name(tmp_path):
    """The stage of that name may yet come, and writes there."""
    stages = [*STAGES, {"name": "samples", "kind": "sample", "prompts": ["3 right"], "seed": 7}]
    folder = run(tiny_recipe(stages, LATER), output=tmp_path / "run", device="cpu").output
    shutil.rmtree(folder / "samples")
    assert sample_run(folder / "checkpoints/00_semantic_00000001").output == folder / "samples-2"


@pytest.mark.parametrize("stage", ["sample", "export", "evaluate"])
def test_a_stage_sets_aside_what_it_did_not_make(done, stage, capsys):
    shutil.rmtree(done / stage)
    (done / stage).mkdir()
    for name in ("000.mp4", "export.json", "metrics.json"):
        (done / stage / name).write_text("mine")
    before = contents(done / stage)
    (done / "result.json").unlink()
    run(done / "recipe.yaml", resume_from=done, device="cpu")
    assert contents(done / f"{stage}-2") == before
    said = f"  {done / stage} was there, and is not of this stage: it is {stage}-2 now\n"
    assert capsys.readouterr().out.count(said) == 1
    assert b"mine" not in contents(done / stage).values()
    (done / "result.json").unlink()
    run(done / "recipe.yaml", resume_from=done, device="cpu")  # its own now
    assert not (done / f"{stage}-3").exists()


def test_a_stage_does_not_move_what_another_process_writes(done):
    shutil.rmtree(done / "sample")
    (done / "sample").mkdir()
    (done / "sample/000.mp4").write_text("theirs")
    (done / "result.json").unlink()
    with locked(done / "sample"):
        assert f"{done / 'sample'} is in use by" in refusal(run, done / "recipe.yaml", resume_from=done, device="cpu")
    assert (done / "sample/000.mp4").read_text() == "theirs"


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
        ".stage", "000.mp4", "001.mp4", "notes.txt", "samples.json", "samples.png", "samples.webp",
    ]  # fmt: skip
    assert (done / "sample/000.mp4").stat().st_size > 100
    assert (done / "sample/notes.txt").read_text() == "mine"
