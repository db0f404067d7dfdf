"""The study of benchmarks/evidence.py in miniature: what it runs, how it tunes, and that it goes on where it was."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moedistill.recipe import load_recipe, shipped_recipes
from moedistill.smoke import miniature
from moedistill.train import comparable, run

FILE = Path(__file__).parent.parent / "benchmarks" / "evidence.py"
spec = importlib.util.spec_from_file_location("evidence", FILE)
evidence = importlib.util.module_from_spec(spec)
sys.modules["evidence"] = evidence
spec.loader.exec_module(evidence)


@pytest.fixture
def in_process(monkeypatch):
    """Jobs run here, as miniatures; gives the folders of those that ran."""
    ran = []

    def recipe(job):
        return load_recipe(job.recipe, [setting for setting in job.settings if "reference_samples" not in setting])

    def execute(job):
        ran.append(job.folder)
        run(recipe(job), output=job.folder, smoke=True, device="cpu")

    monkeypatch.setattr(evidence.Job, "execute", execute)
    monkeypatch.setattr(evidence.Job, "_wanted", lambda job: comparable(miniature(recipe(job)).resolved()))
    return ran


def test_the_study_makes_its_tables_and_goes_on(tmp_path, in_process, monkeypatch):
    monkeypatch.setattr(evidence, "RESAMPLES", 3)
    monkeypatch.setattr(evidence, "BASELINES", ["baselines/digits_two_phase"])
    monkeypatch.setattr(evidence, "ablations", lambda: ["ablations/digits_rank_4"])
    monkeypatch.setattr(evidence.Evidence, "score", lambda self, recipe, rate: abs(rate - 2e-5))
    study = evidence.Evidence(tmp_path, 1.0, 1)
    evidence.run_baselines(study, [0, 1], [1e-5, 2e-5, 4e-5], 0, [])
    # Two teachers' evaluations; three rates and two seeds of each method.
    assert len(in_process) == 2 + 2 * (3 + 2)
    table = json.loads((tmp_path / "evidence.json").read_text())
    assert {line["method"] for line in table["lines"]} == {
        "digits_few_step_teacher", "evidence_digits", "digits_two_phase",
    }  # fmt: skip
    assert {run["seed"] for run in table["runs"]} == {0, 1}
    assert all(line["differences"] for line in table["lines"] if line["method"] == "digits_two_phase")
    recipe = load_recipe(tmp_path / "final" / "digits_two_phase" / "seed1" / "recipe.yaml")
    assert (recipe.seed, recipe.stages[0].optimizer.lr) == (1, 2e-5)
    for name in ("evidence.md", "evidence.png", "compute.png", "rates.json"):
        assert (tmp_path / name).stat().st_size > 0

    evidence.run_ablations(study, [0])
    assert in_process[-1] == tmp_path / "final" / "digits_rank_4" / "seed0"
    assert len(in_process) == 13
    # Killed while one run was under way, and called again: that one is done, and nothing else.
    (tmp_path / "final" / "evidence_digits" / "seed1" / "result.json").unlink()
    for checkpoint in (tmp_path / "final" / "evidence_digits" / "seed1" / "checkpoints").iterdir():
        checkpoint.rename(tmp_path / checkpoint.name)
    evidence.run_baselines(study, [0, 1], [1e-5, 2e-5, 4e-5], 0, [])
    assert in_process[13:] == [tmp_path / "final" / "evidence_digits" / "seed1"]


@pytest.mark.parametrize(("best", "grid"), [(1e-5, 3), (1e-6, 4), (1e-4, 4), (1e-9, 5)])
def test_a_grid_grows_until_its_best_rate_lies_inside(tmp_path, monkeypatch, best, grid):
    asked = set()
    monkeypatch.setattr(evidence.Evidence, "execute", lambda self, jobs: asked.update(job.folder for job in jobs))
    monkeypatch.setattr(evidence.Evidence, "score", lambda self, recipe, rate: abs(rate - best))
    monkeypatch.setattr(evidence, "FACTOR", 10.0)
    tuned = evidence.Evidence(tmp_path, 1.0, 1).tune([evidence.DCM], [1e-6, 1e-5, 1e-4], 2)
    assert tuned[evidence.DCM] == pytest.approx(max(best, 1e-8))  # two extensions, and no more
    assert len(asked) == grid


def test_a_run_that_fails_ends_the_study_with_its_own_message(tmp_path, monkeypatch):
    study = evidence.Evidence(tmp_path, 1.0, 1)

    def fail(job):
        raise SystemExit("see log.txt")

    monkeypatch.setattr(evidence.Job, "execute", fail)
    with pytest.raises(SystemExit, match=r"see log\.txt"):
        study.execute(study.finals(evidence.DCM, 1e-5, [0, 1, 2]))


def test_a_folder_of_another_recipe_is_not_taken_for_done(tmp_path, in_process):
    study = evidence.Evidence(tmp_path, 1.0, 1)
    [job] = study.finals(evidence.TEACHER, 1e-5, [0])
    job.execute()
    assert job.metrics is not None
    other = replace(job, settings=(*job.settings, "stages.evaluate.seed=5"))
    with pytest.raises(SystemExit, match="of another recipe or other settings"):
        _ = other.metrics


def test_everything_that_is_compared_is_shipped_and_spends_the_same(tmp_path):
    study = evidence.Evidence(tmp_path, 1.0, 1)
    assert set(evidence.BASELINES) | {evidence.DCM, evidence.TEACHER} <= set(shipped_recipes())
    assert len(evidence.ablations()) > 15
    spent = [study.tuning(recipe, 1e-5).forwards for recipe in (evidence.DCM, *evidence.BASELINES)]
    assert max(spent) / min(spent) < 1.01
    assert study.teachers()[0].forwards == 0
