"""Saves in which a key has its earlier name are read with the name of today; a recipe that says it is refused."""

import re
import shutil

import pytest
import torch
from helpers import distil, equal, evaluate, tiny_recipe

from moedistill.errors import RecipeError
from moedistill.recipe.loading import load_recipe
from moedistill.runs.loop import run
from moedistill.runs.sample import sample_run
from moedistill.runs.tables import read_records, tabulate
from moedistill.stages.export import read_export

MONITOR = {"training.monitor": {"every": 2, "samples": 4}}
CANDIDATES = [{"name": "teacher", "model": "teacher"}, {"name": "student"}]
EVALUATION = evaluate(candidates=CANDIDATES, reference="teacher")
RECIPE = tiny_recipe([distil(), EVALUATION, {"name": "export", "kind": "export"}], MONITOR)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run."""
    return run(RECIPE, output=tmp_path_factory.mktemp("now") / "run", device="cpu").output


@pytest.fixture
def earlier(folder, tmp_path):
    """The same run, as it was saved before."""
    copy = shutil.copytree(folder, tmp_path / "run")
    written = [copy / "recipe.yaml", copy / "export" / "export.json", *copy.glob("checkpoints/*/state.json")]
    for file in written:
        said = file.read_text()
        assert said.count("monitor") == 1, file
        file.write_text(re.sub('"format": [0-9]', '"format": 1', said.replace("monitor", "heldout")))
    for sums in copy.glob("checkpoints/*/sums.json"):
        sums.unlink()
    assert len(written) == 3
    return copy


def test_a_recipe_must_use_the_name_of_today():
    recipe = tiny_recipe([distil()], {"training.heldout": MONITOR["training.monitor"]})
    with pytest.raises(RecipeError, match=r"training\.heldout: the key 'heldout' is called 'monitor' now"):
        load_recipe(recipe)


def test_sample_and_report(folder, earlier, tmp_path):
    for part in (".", "export"):
        now, then = (
            sample_run(run / part, prompts=["3 right"], output=tmp_path / "sampled" / str(number) / part).videos
            for number, run in enumerate((folder, earlier))
        )
        assert torch.equal(now, then)
    now, then = (tabulate(read_records([run]), resamples=10) for run in (folder, earlier))
    assert now.lines == then.lines


def test_resume(folder, earlier, tmp_path):
    """From a folder of its own, and in its own, where the training is done."""
    branch = run(RECIPE, output=tmp_path / "branch", resume_from=earlier, device="cpu").output
    again = run(RECIPE, output=earlier, resume=True, device="cpu").output
    assert again == earlier
    exports = [read_export(run / "export")[1] for run in (folder, branch, again)]
    assert equal(exports[0], exports[1])
    assert equal(exports[0], exports[2])
