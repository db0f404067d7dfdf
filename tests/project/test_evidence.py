"""The study of benchmarks/ in miniature: what it runs, how it tunes, and that it goes on where it was."""

import json
import math
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import charts
import evidence
import halves
import pytest
from PIL import Image

from moedistill.recipe.loading import load_recipe, shipped_recipes
from moedistill.recipe.miniature import miniature
from moedistill.runs import tables as report
from moedistill.runs.loop import run
from moedistill.runtime.checkpoint import Checkpoints


@pytest.fixture
def in_process(monkeypatch):
    """Jobs run here, as miniatures; gives the folders of those that ran."""
    ran = []

    def load(job):
        settings = [setting for setting in job.settings if "reference_samples" not in setting]
        small = miniature(load_recipe(job.recipe, settings))
        stages = [stage.replace(pictures=0) if stage.kind == "evaluate" else stage for stage in small.stages]
        return replace(small, stages=stages)  # 18 rows of videos take longer than the rest

    def execute(job):
        ran.append(job.folder)
        if "tuning" not in job.folder.parts:  # a test says itself how well those do
            run(job.load(), output=job.folder, resume_from=job.begun, device="cpu")

    monkeypatch.setattr(evidence.Job, "execute", execute)
    monkeypatch.setattr(evidence.Job, "load", load)
    return ran


LCM = evidence.Method("LCM", "baselines/digits_lcm")
RENOISED = evidence.Method("LCM, re-noised", "baselines/digits_lcm", ", re-noised")
RATES = [1e-5, 2e-5, 4e-5]
BEST = {evidence.DCM: 2e-5, evidence.METHODS[3]: 4e-5, LCM: 2e-5, RENOISED: 4e-5}


def test_the_study_makes_its_tables_and_goes_on(tmp_path, in_process, monkeypatch):
    monkeypatch.setattr(evidence, "RESAMPLES", 3)
    monkeypatch.setattr(evidence, "METHODS", list(BEST))
    ablations = [evidence.Method(name, f"ablations/digits_{name}") for name in ("rank_4", "without_tc")]
    monkeypatch.setattr(evidence, "ablations", lambda: ablations)
    monkeypatch.setattr(evidence.Evidence, "score", lambda self, method, rate: abs(rate - BEST[method]))
    drawn, plot_steps = [], evidence.plot_steps
    monkeypatch.setattr(evidence, "plot_steps", lambda *args: drawn.append(args) or plot_steps(*args))
    study = evidence.Evidence(tmp_path)
    evidence.run_baselines(study, [0, 1], RATES, 0)
    # Two teachers' evaluations; three rates and two seeds of each recipe, and both at their other rate.
    assert len(in_process) == 2 + 2 * (3 + 2 + 2)
    table = json.loads((tmp_path / "evidence.json").read_text())
    lcm = [f"digits_lcm (stages.0.optimizer.lr={rate})" for rate in (2e-5, 4e-5)]
    rates = [f"stages.0.optimizer.lr={a}, stages.1.optimizer.lr={b}" for a, b in ((2e-5, 2e-6), (4e-5, 4e-6))]
    dcm = [f"evidence_digits ({rate})" for rate in rates]
    assert {line["method"] for line in table["lines"]} == {"digits_few_step_teacher", *dcm, *lcm}
    assert table["against"] == dcm[0]
    assert {run["seed"] for run in table["runs"]} == {0, 1}
    recipe = load_recipe(tmp_path / "final/digits_lcm/4.0e-05/seed1/recipe.yaml")
    assert (recipe.seed, recipe.stages[0].optimizer.lr) == (1, 4e-5)
    assert json.loads((tmp_path / "rates.json").read_text())["LCM, re-noised"] == 4e-5
    assert (tmp_path / "evidence.png").stat().st_size > 0
    # Every line is of the runs at its own rate; sampling that DCM lacks is compared with its own steps.
    [(results, _)] = drawn
    assert results(RENOISED, "4 steps").method == lcm[1]
    assert results(RENOISED, "4 steps").candidate == "4 steps, re-noised"
    assert results(LCM, "4 steps").method == lcm[0]
    base, mine = (results(method, "4 steps").values["frechet"] for method in (evidence.DCM, RENOISED))
    assert results(RENOISED, "4 steps").differences["frechet"].mean == pytest.approx(mine.mean - base.mean)
    assert set(evidence.TEACHERS) < set(results.methods)
    # The files hold what the runs said.
    whole = study.finals(evidence.DCM, 2e-5, [0])[0]
    said = whole.metrics["4 steps"]["frechet"]
    [first] = [run for run in table["runs"] if run["folder"] == str(whole.folder.relative_to(tmp_path))]
    costs = " | ".join(f"{first[what]:.0f}" for what in ("steps", "forwards", "seconds"))
    shown = (tmp_path / "evidence.md").read_text()
    assert f"| final/evidence_digits/2.0e-05/seed0 | {costs} | {said:.0f} |\n" in shown
    assert "| LCM, re-noised | 0 | 0 | **0** |\n" in shown
    assert "| DCM, semantic alone |  | " in shown

    done = len(in_process)
    evidence.run_ablations(study, [0])
    rank_4, without_tc = (tmp_path / f"final/digits_{name}/2.0e-05/seed0" for name in ("rank_4", "without_tc"))
    assert in_process[done:] == [rank_4, without_tc]
    # What changes nothing in the first stage has it from DCM's run; every run has its whole cost.
    times = [json.loads((folder / "cost.json").read_text()) for folder in (whole.folder, rank_4, without_tc)]
    assert times[0]["semantic"] == times[1]["semantic"] != times[2]["semantic"]
    assert len({sum(cost["forwards"] for cost in one.values()) for one in times}) == 1
    [job] = study.finals(ablations[0], 2e-5, [0])
    assert job.branching(whole).forwards == job.forwards - times[0]["semantic"]["forwards"]
    # A stand-in that DCM's run has trained is shown once.
    shown = (tmp_path / "ablations.md").read_text()
    assert "| DCM, semantic alone |" in shown
    assert "| without_tc, semantic alone |" in shown
    assert "| rank_4, semantic alone |" not in shown
    # Killed while one run was under way, and called again: that one is done, and what is new.
    killed = tmp_path / "final/evidence_digits/2.0e-05/seed1"
    for name in ("result.json", "cost.json"):
        (killed / name).unlink()
    for checkpoint in (killed / "checkpoints").iterdir():
        checkpoint.rename(tmp_path / checkpoint.name)
    evidence.run_ablations(study, [0, 1])
    assert in_process[done + 2] == killed
    assert len(in_process) == done + 2 + 1 + 2


def test_halves_put_together_are_the_whole(tmp_path, in_process, monkeypatch):
    monkeypatch.setattr(halves, "tabulate", partial(report.tabulate, resamples=3))
    study = evidence.Evidence(tmp_path)
    teacher, _ = study.teachers()
    [dcm], [single] = (study.finals(method, 1e-3, [0]) for method in (evidence.DCM, evidence.PCM_EDGES))
    for job in (teacher, dcm, single):
        job.execute()
    kept = {}
    record = halves.cross(dcm, single, teacher.folder / "evaluate/latents.safetensors", kept)
    # Two beginnings of teachers alone, each ended by both; to be taken from there for other seeds.
    assert len(kept) == 2 + 2 * 2
    few = halves.FEW
    assert halves.once(kept, [halves.Model(None, "teacher", few)], None) is kept[few,]
    distance = {pair: float(rows["paired_distance"].mean()) for pair, rows in record.rows.items()}
    assert len(distance) == 4 * 5
    for pair, job, candidate in [
        ("semantic expert + detail expert", dcm, "4 steps"),
        ("semantic expert + teacher, few steps", dcm, "4 steps, semantic + teacher"),
        ("semantic expert + semantic expert", dcm, "4 steps, semantic alone"),
        ("PCM, DCM's edges + PCM, DCM's edges", single, "4 steps"),
        ("teacher, few steps + teacher, few steps", teacher, "4 steps, DCM's points"),
        ("teacher, all steps + teacher, all steps", teacher, "teacher, 50 steps"),
    ]:
        assert distance[pair] == pytest.approx(job.metrics[candidate]["paired_distance"], rel=1e-5, abs=1e-6), pair
    monkeypatch.setattr(halves, "SEEDS", (0,))
    monkeypatch.setattr(sys, "argv", ["halves.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"rates\.json is missing"):
        halves.main()
    titles = (evidence.DCM.title, evidence.PCM_EDGES.title)
    (tmp_path / "rates.json").write_text(json.dumps(dict.fromkeys(titles, 1e-3)))
    halves.main()
    assert len(json.loads((tmp_path / "halves.json").read_text())["lines"]) == 4 * 5
    shown = (tmp_path / "halves.md").read_text()
    _, values, to_end, to_begin = shown.split("\n\nDistance")[1].split(":\n\n")
    base = distance["semantic expert + detail expert"]
    assert f"| semantic expert | {distance['semantic expert + teacher, all steps']:.3g} [" in values
    assert f"| semantic expert | {distance['semantic expert + teacher, all steps'] - base:.3g} [" in to_end
    assert f"| {distance['teacher, few steps + detail expert'] - base:.3g} [" in to_begin


def line(method, candidate, frechet, difference=None):
    values = {"frechet": report.Estimate(frechet, frechet - 1, frechet + 1, [frechet])}
    differences = {} if difference is None else {"frechet": report.Estimate(difference, -9, 9, [difference])}
    return report.Line(method, candidate, 3000, values, differences)


def test_tables_show_what_they_say(tmp_path):
    lines = [line("evidence_digits", "2 steps", 7.0), line("evidence_digits", "4 steps", 5.0)]
    lines += [line("digits_lcm", "4 steps", 8.0, 3.0), line("digits_lcm", "4 steps, re-noised", 6.0, 1.0)]
    jobs = {method: evidence.Job(method.recipe, tmp_path / method.recipe, (), 0) for method in (evidence.DCM, LCM)}
    jobs[RENOISED] = jobs[LCM]
    runs = [{"folder": str(job.folder), "method": job.recipe.rpartition("/")[2]} for job in jobs.values()]
    results = evidence.Results(report.Table(lines, runs), jobs)
    assert results.by_steps("frechet").splitlines()[2:] == [
        "| DCM |  | 7 [6, 8] |  | 5 [4, 6] |  |  |  |",
        "| LCM |  |  |  | 8 [7, 9] |  |  |  |",
        "| LCM, re-noised |  |  |  | 6 [5, 7] |  |  |  |",
    ]
    assert results.by_steps("frechet", differences=True).splitlines()[2:] == [
        "| LCM |  |  |  | 3 [-9, 9] |  |  |  |",
        "| LCM, re-noised |  |  |  | 1 [-9, 9] |  |  |  |",
    ]
    assert results.by_metric("4 steps").splitlines()[2:] == ["| DCM | 5 |", "| LCM | 8 |", "| LCM, re-noised | 6 |"]


def test_a_run_goes_on_where_it_was_or_begins_where_it_branches(tmp_path, monkeypatch):
    commands = []

    class Child:
        returncode = 0

        def __init__(self, command, **kwargs):
            commands.append(command)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(evidence.subprocess, "Popen", Child)
    monkeypatch.setattr(evidence, "CHILDREN", [])
    job = evidence.Job("evidence_digits", tmp_path / "run", ("seed=3",), 0)
    job.execute()
    replace(job, begun=tmp_path / "other").execute()
    Checkpoints(tmp_path / "run/checkpoints", keep=1).save("00_semantic_00000100", {"state": {}})
    replace(job, begun=tmp_path / "other").execute()
    assert all("--set=seed=3" in command for command in commands)
    extra = [[part for part in command if part.startswith("--resume")] for command in commands]
    assert extra == [[], [f"--resume-from={tmp_path / 'other'}"], ["--resume"]]


def test_rates_are_tuned_by_the_methods_own_sampling(tmp_path, monkeypatch):
    done = SimpleNamespace(metrics={"4 steps": {"frechet": 5.0}, "4 steps, re-noised": {"frechet": 3.0}})
    monkeypatch.setattr(evidence.Evidence, "tuning", lambda self, method, rate: done)
    study = evidence.Evidence(tmp_path)
    assert (study.score(LCM, 1e-5), study.score(RENOISED, 1e-5)) == (5.0, 3.0)


@pytest.mark.parametrize(("best", "grid"), [(1e-5, 3), (1e-6, 4), (1e-4, 4), (1e-9, 5)])
def test_a_grid_grows_until_its_best_rate_lies_inside(tmp_path, monkeypatch, best, grid):
    asked = set()
    monkeypatch.setattr(evidence.Evidence, "execute", lambda self, jobs: asked.update(job.folder for job in jobs))
    monkeypatch.setattr(evidence.Evidence, "score", lambda self, method, rate: abs(rate - best))
    monkeypatch.setattr(evidence, "FACTOR", 10.0)
    tuned, grids = evidence.Evidence(tmp_path).tune([evidence.DCM], [1e-6, 1e-5, 1e-4], 2)
    assert tuned[evidence.DCM] == pytest.approx(max(best, 1e-8))  # two extensions, and no more
    assert len(asked) == len(grids[evidence.DCM.recipe]) == grid


def test_methods_of_one_recipe_have_one_grid(tmp_path, monkeypatch):
    """A rate that is tried for one is tried for all, so that none is passed over that the table shows."""
    scores = {LCM: {1e-5: 3, 1e-4: 2, 1e-3: 1, 1e-2: 5}, RENOISED: {1e-5: 3, 1e-4: 2, 1e-3: 4, 1e-2: 1, 1e-1: 2}}
    monkeypatch.setattr(evidence.Evidence, "execute", lambda self, jobs: None)
    monkeypatch.setattr(evidence.Evidence, "score", lambda self, method, rate: scores[method].get(rate, 9))
    monkeypatch.setattr(evidence, "FACTOR", 10.0)
    study = evidence.Evidence(tmp_path)
    best, grids = study.tune([LCM, RENOISED], [1e-5, 1e-4, 1e-3], 3)
    assert best == {LCM: 1e-3, RENOISED: 1e-2}
    assert grids == {LCM.recipe: [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]}
    assert study.tuning_table(best, grids).splitlines()[2:] == [
        "| LCM | 3 | 2 | **1** | 5 | 9 |",
        "| LCM, re-noised | 3 | 2 | 4 | **1** | 2 |",
    ]


def test_a_run_that_fails_ends_the_study_with_its_own_message(tmp_path, monkeypatch):
    study = evidence.Evidence(tmp_path)

    def fail(job):
        raise SystemExit("see log.txt")

    monkeypatch.setattr(evidence.Job, "execute", fail)
    with pytest.raises(SystemExit, match=r"see log\.txt"):
        study.execute(study.finals(evidence.DCM, 1e-5, [0, 1, 2]))


def test_a_folder_of_another_recipe_is_not_taken_for_done(tmp_path, in_process):
    study = evidence.Evidence(tmp_path)
    job = study.teachers()[0]
    job.execute()
    assert job.metrics is not None
    other = replace(job, settings=(*job.settings, "stages.evaluate.seed=5"))
    with pytest.raises(SystemExit, match="of another recipe or other settings"):
        _ = other.metrics


def test_everything_that_is_compared_is_shipped_and_spends_the_same(tmp_path):
    study = evidence.Evidence(tmp_path)
    compared = [*evidence.METHODS, *evidence.TEACHERS]
    assert {method.recipe for method in compared} <= set(shipped_recipes())
    for method in compared:
        [stage] = [stage for stage in load_recipe(method.recipe).stages if stage.kind == "evaluate"]
        assert method.candidate("4 steps") in {candidate.name for candidate in stage.candidates}
    assert {method.recipe for method in evidence.ablations()} <= set(shipped_recipes())
    spent = [study.tuning(method, 1e-5).forwards for method in evidence.METHODS]
    assert max(spent) / min(spent) < 1.01
    assert study.teachers()[0].forwards == 0


def test_the_quick_form_is_smaller_in_every_way(tmp_path):
    whole, quick = evidence.Evidence(tmp_path), evidence.Evidence(tmp_path, **evidence.QUICK)
    [job], [small] = (study.finals(evidence.DCM, 1e-5, [0]) for study in (whole, quick))
    assert small.forwards == job.forwards / 5
    assert "stages.evaluate.samples=400" in small.settings
    assert load_recipe(small.recipe, [s for s in small.settings if "reference" not in s]).stages[0].steps == 60


def test_the_rates_of_stages_keep_their_ratio(tmp_path):
    recipe = tmp_path / "mine.yaml"
    rates = "semantic: {optimizer: {lr: 0.5}}, detail: {optimizer: {lr: 0.25}}"
    recipe.write_text(f"extends: {shipped_recipes()['evidence_digits']}\nname: mine\nstages: {{{rates}}}\n")
    [job] = evidence.Evidence(tmp_path).finals(evidence.Method("mine", str(recipe)), 1e-4, [0])
    assert {"stages.semantic.optimizer.lr=1.00e-04", "stages.detail.optimizer.lr=5.00e-05"} < set(job.settings)


def estimate(mean, reach=1.0):
    return report.Estimate(mean, mean - reach, mean + reach, [mean])


def test_names_beside_curves_keep_apart_and_in_order():
    places = charts._apart([100, 101, 102, 300], 50, 1000)
    assert places == sorted(places)
    gaps = [math.log(above / below) / math.log(1000 / 50) for below, above in pairwise(places)]
    assert min(gaps) > 0.05
    assert charts._apart([60, 900], 50, 1000) == pytest.approx([60, 900])


def test_charts_are_drawn(tmp_path):
    lines = {"mine": {1: estimate(90.0), 4: estimate(20.0)}, "far": {2: estimate(1e6)}, "other": {2: estimate(30.0)}}
    charts.curves(tmp_path / "curves.png", lines, {"real": 15.0}, "distance")
    groups = {"one": {"a": estimate(3.0), "b": estimate(-900.0, 5.0)}, "two": {"b": estimate(0.0)}}
    charts.forest(tmp_path / "forest.png", groups)
    for name in ("curves", "forest"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 100


def test_real_videos_score_well_among_themselves():
    scores = evidence.real_videos(80)
    assert scores["paired_distance"] == scores["flips"] == 0
    assert scores["diversity"] == 1
    assert scores["digit_accuracy"] > 0.9
    assert scores["coverage"] > 0.2
