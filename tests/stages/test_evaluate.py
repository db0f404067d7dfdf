"""The evaluate stage: the same noise for all, honest candidates, files that open, numbers that are the metrics'."""

import json
from types import SimpleNamespace

import av
import pytest
import torch
from helpers import as_if_trained, digits_backbone, digits_inputs, distil, evaluate, set_up, tiny_recipe
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from moedistill.analysis.teacher import teacher_velocity
from moedistill.components.plugins import load_plugins
from moedistill.errors import RecipeError, UserError
from moedistill.flow.sampling import sample
from moedistill.metrics.base import MetricInputs
from moedistill.model import conditioning
from moedistill.model.ema import EMA
from moedistill.recipe.loading import load_recipe
from moedistill.runs.build import build_mixture
from moedistill.runs.loop import run
from moedistill.runtime.randomness import Draws
from moedistill.stages.evaluate import EvaluateConfig, fingerprint, show_table
from moedistill.stages.run import Run

BRING = {"fvd", "vbench"}
"""Metrics that need files or programs of the user's."""
METRICS = [entry.name for entry in load_plugins().components.entries("metric") if entry.name not in BRING]
STUDENT, TEACHER = {"name": "student"}, {"name": "teacher", "model": "teacher"}


class Trained:
    """A mixture whose experts are moved as if trained, with an average for each, and its evaluation."""

    def __init__(self, folder, changes=()):
        self.folder, self.changes, self.runs = folder, changes, 0
        self.recipe = load_recipe(tiny_recipe([distil()], changes))
        self.dataset = self.recipe.data.build(None)
        self.mixture = build_mixture(self.recipe)
        for seed, name in enumerate(["semantic", "detail"]):
            expert = self.mixture.experts[name]
            self.mixture.ema[name] = EMA(expert.parameters, decay=0.9)
            as_if_trained(expert, seed)

    def evaluate(self, main=True, **stage):
        """Table, latents and folder of one evaluation."""
        self.runs += 1
        [_, config] = load_recipe(tiny_recipe([distil(ema_decay=0.9), evaluate(**stage)], self.changes)).stages
        place = SimpleNamespace(
            is_main_process=main, device=torch.device("cpu"), process_index=1 - main, num_processes=1
        )
        run = Run(self.recipe, self.folder / str(self.runs), place, self.mixture, self.dataset)
        config.build().execute(run)
        folder = run.output / "evaluate"
        latents = load_file(folder / "latents.safetensors") if folder.exists() else None
        return SimpleNamespace(table=run.metrics.get("evaluate"), latents=latents, folder=folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return Trained(tmp_path_factory.mktemp("evaluate"))


def conditioning_of(latents):
    return {name: latents[f"conditioning.{name}"] for name in ("digit", "direction")}


def bare_samples(latents, points, velocity, trajectory):
    """Samples with `velocity(x, sigma, cond)` from the stage's noise and conditioning, at trajectory points."""
    noise = Draws(0, "evaluate", 0, range(4)).normal("noise", (12, 8, 4, 4))
    cond = conditioning_of(latents)
    sigmas = [*(trajectory.sigma(point) for point in points), 0.0]
    return sample(lambda x, sigma: velocity(x, sigma, cond), noise, sigmas)


# -- what is sampled --------------------------------------------------------------------------------------------------


TWO = ["3 right", "7 up"]
"""Prompts that several samples share, so that there are pairs."""


def test_the_same_seed_gives_the_same_table(trained):
    metrics = [{"kind": kind} for kind in METRICS]
    first, second, other = (
        trained.evaluate(candidates=[STUDENT, TEACHER], metrics=metrics, seed=seed, prompts=TWO) for seed in (0, 0, 1)
    )
    assert first.table == second.table
    assert all(torch.equal(first.latents[name], second.latents[name]) for name in first.latents)
    assert first.table["teacher"]["frechet"] != other.table["teacher"]["frechet"]


def test_samples_do_not_depend_on_their_number_or_the_batch_size(trained):
    few, many = trained.evaluate(prompts=["3 up"]), trained.evaluate(prompts=["3 up"], samples=7, batch_size=3)
    assert torch.allclose(few.latents["student"], many.latents["student"][:4], atol=1e-5)


def test_conditioning_is_spread_over_the_data(trained):
    digits, directions = conditioning_of(trained.evaluate(samples=40).latents).values()
    assert digits.bincount().tolist() == [4] * 10
    assert directions.bincount().tolist() == [10] * 4
    assert digits.tolist() != sorted(digits.tolist())


def test_prompts_are_asked_for_in_turn(trained):
    cond = conditioning_of(trained.evaluate(prompts=["3 right", "7 up", ""]).latents)
    assert (cond["digit"].tolist(), cond["direction"].tolist()) == ([3, 7, 10, 3], [0, 3, 4, 0])


# -- candidates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "points"), [(8, range(8, 0, -1)), (3, [8, 6, 3]), (None, [8, 4])])
def test_the_teacher_is_the_bare_backbone(trained, steps, points):
    latents = trained.evaluate(candidates=[{**TEACHER, "steps": steps}], reference="teacher").latents
    backbone = digits_backbone()

    def velocity(x, sigma, cond):
        return backbone.velocity(backbone.network, x, sigma, cond)

    assert torch.equal(latents["teacher"], bare_samples(latents, points, velocity, trained.mixture.trajectory))


def test_the_teacher_is_guided_and_the_student_is_not(tmp_path):
    guided = Trained(tmp_path, {"backbone.guidance": {"mode": "classifier_free", "scale": 3.0}})
    candidates = [STUDENT, TEACHER, {"name": "mixed", "stand_ins": {"detail": "teacher"}}]
    latents = guided.evaluate(candidates=candidates).latents
    backbone, trajectory = digits_backbone(), guided.mixture.trajectory

    def teacher(x, sigma, cond):
        v = backbone.velocity(backbone.network, x, sigma, cond)
        null = backbone.velocity(backbone.network, x, sigma, backbone.null_conditioning(cond))
        return null + 3 * (v - null)

    assert torch.allclose(latents["teacher"], bare_samples(latents, [8, 4], teacher, trajectory), atol=1e-5)
    semantic, detail = merged(guided.mixture, "semantic"), merged(guided.mixture, "detail")
    for name, low in (("student", detail), ("mixed", teacher)):

        def velocity(x, sigma, cond, low=low):
            return (semantic if sigma[0] > trajectory.sigma(4) else low)(x, sigma, cond)

        assert torch.allclose(latents[name], bare_samples(latents, [8, 4], velocity, trajectory), atol=1e-5)


def test_the_teacher_leaves_out_the_steps_that_its_guidance_does(tmp_path):
    """Sampled in all of the trajectory's 8 steps, and from the middle on; trained on, and exactly, it is the same."""
    oscillating = {"mode": "classifier_free", "scale": 3.0, "oscillate_from": 2}
    guided = Trained(tmp_path, {"backbone.guidance": oscillating})
    latents = guided.evaluate(candidates=[{**TEACHER, "steps": 8}], reference="teacher").latents
    backbone, trajectory = digits_backbone(), guided.mixture.trajectory

    def teacher(x, sigma, cond):
        v = backbone.velocity(backbone.network, x, sigma, cond)
        null = backbone.velocity(backbone.network, x, sigma, backbone.null_conditioning(cond))
        step = 8 - trajectory.points.tolist().index(sigma[0].item())
        return v if step in (3, 5, 7) else null + 3 * (v - null)

    wanted = bare_samples(latents, range(8, 0, -1), teacher, trajectory)
    assert torch.allclose(latents["teacher"], wanted, atol=1e-5)


def merged(mixture, expert):
    """The velocity of an expert by a plain network with its merged weights."""
    backbone = digits_backbone()
    backbone.network.load_state_dict(mixture.experts[expert].merged())
    return lambda x, sigma, cond: backbone.velocity(backbone.network, x, sigma, cond)


def test_the_student_is_routed_and_stand_ins_replace_experts(trained):
    swapped = {"semantic": "detail", "detail": "semantic"}
    candidates = [STUDENT, {"name": "swapped", "stand_ins": swapped}, {"name": "3 steps", "steps": 3}]
    latents, trajectory = trained.evaluate(candidates=candidates).latents, trained.mixture.trajectory
    semantic, detail = merged(trained.mixture, "semantic"), merged(trained.mixture, "detail")
    for name, points, high, low in (
        ("student", [8, 4], semantic, detail),
        ("swapped", [8, 4], detail, semantic),
        ("3 steps", [8, 6, 4], semantic, detail),
    ):

        def velocity(x, sigma, cond, high=high, low=low):
            return (high if sigma[0] > trajectory.sigma(4) else low)(x, sigma, cond)

        assert torch.allclose(latents[name], bare_samples(latents, points, velocity, trajectory), atol=1e-5), name


def test_candidates_that_step_where_nothing_is_trained_say_so(tmp_path, capsys):
    candidates = [
        {"name": "own"},
        {"name": "more", "steps": 4},
        {"name": "re-noised", "sample": {"steps": 4, "eta": 1.0}},
        {"name": "one", "steps": 1},
        {"name": "swapped", "steps": 4, "stand_ins": {"detail": "semantic"}},
        {"name": "teacher", "model": "teacher", "steps": 1},
    ]
    stages = [distil(), distil("detail"), evaluate(candidates=candidates, reference="own")]
    run(tiny_recipe(stages), output=tmp_path, device="cpu")
    said = [line.strip() for line in capsys.readouterr().out.splitlines() if "note:" in line or "sampling 4" in line]
    assert [line.split(" at ")[0].split(", where")[0] for line in said] == [
        "sampling 4 × own",
        "sampling 4 × more",
        "note: stage semantic: sampling stops",
        "note: stage detail: sampling stops",
        "sampling 4 × re-noised",
        "sampling 4 × one",
        "note: stage semantic: sampling goes beyond the end of a phase",
        "sampling 4 × swapped",
        "sampling 4 × teacher",
    ]


def test_averaged_weights_are_used_and_put_back(trained):
    """The averages are those of experts before they were moved: semantic's is the teacher."""
    before = {name: weight.clone() for name, weight in trained.mixture.state_dict().items()}
    above = {"name": "student", "stand_ins": {"detail": "teacher"}}
    result = trained.evaluate(candidates=[above, TEACHER], weights="ema")
    assert torch.equal(result.latents["student"], result.latents["teacher"])
    below = {"name": "student", "stand_ins": {"semantic": "teacher"}}
    averaged = trained.evaluate(candidates=[below, TEACHER], weights="ema").latents["student"]
    # detail's average stands on the semantic that it was trained on, not on semantic's average.
    assert not torch.equal(averaged, result.latents["teacher"])
    assert not torch.equal(averaged, trained.evaluate(candidates=[below, TEACHER]).latents["student"])
    after = trained.mixture.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_an_expert_that_is_not_trained_yet_is_its_parent(tmp_path):
    """`detail` starts as `semantic`, also while only that one is trained."""
    candidates = [STUDENT, {"name": "semantic", "stand_ins": {"detail": "semantic"}}]
    result = run(
        tiny_recipe([distil(optimizer={"lr": 0.02}), evaluate(candidates=candidates)]), output=tmp_path, device="cpu"
    )
    assert result.metrics["evaluate"]["semantic"]["paired_distance"] == 0


# -- numbers and files ------------------------------------------------------------------------------------------------


def test_the_table_holds_what_the_metrics_say(trained):
    candidates = [STUDENT, TEACHER]
    metrics = [{"kind": kind} for kind in METRICS]
    result = trained.evaluate(candidates=candidates, reference="teacher", metrics=metrics, samples=6, prompts=TWO)
    decode, components = trained.mixture.backbone.decode, load_plugins().components
    for name in ("student", "teacher"):
        one, other = result.latents[name], result.latents["teacher"]
        inputs = MetricInputs(decode(one), one, decode(other), other, conditioning_of(result.latents))
        for kind in METRICS:
            measured = components.get("metric", kind)().build()(inputs)
            assert result.table[name][kind] == measured, kind
    assert result.table["teacher"]["paired_distance"] == 0 < result.table["student"]["paired_distance"]
    stored = json.loads((result.folder / "metrics.json").read_text())
    assert stored == {"samples": 6, "candidates": result.table}


def test_printed_tables_fit_80_columns(capsys):
    """With all metrics and models of shipped recipes, and long numbers; no word is cut or left out."""
    for name in ("dcm_digits", "evidence_digits", "ablations/digits_three_experts", "baselines/digits_lcm"):
        [stage] = [stage for stage in load_recipe(name).stages if isinstance(stage, EvaluateConfig)]
        kinds = [metric.kind for metric in stage.metrics]
        table = {one.name: {kind: -0.00012345 * k for k, kind in enumerate(kinds, 1)} for one in stage.candidates}
        show_table(f"{stage.name}: {stage.samples} samples", table)
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 80
        for values in table.values():
            for value in values.values():
                assert out.count(f"{value:.4g}") >= len(table)
        assert set(" ".join(table).split()) <= set(out.split())
        assert all(f" {kind.replace('_', ' ')} " in out for kind in kinds)


def test_a_small_table_has_a_line_for_each_model(capsys):
    show_table("evaluate: 4 samples", {"teacher": {"frechet": 1.5}, "student": {"frechet": 2.5}})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if "│" in line] == [
        ["│", "teacher", "│", "1.5", "│"],
        ["│", "student", "│", "2.5", "│"],
    ]


def test_who_is_not_trained_yet_is_named(tmp_path, capsys):
    """Between the stages, after both, and where another expert runs in its place."""
    candidates = [STUDENT, {"name": "semantic", "stand_ins": {"detail": "semantic"}}, TEACHER]
    stages = [
        distil(), evaluate(name="between", candidates=candidates),
        distil("detail"), evaluate(name="after", candidates=candidates),
    ]  # fmt: skip
    run(tiny_recipe(stages), output=tmp_path, device="cpu")
    out = capsys.readouterr().out
    note = "    note: expert 'detail' is not trained: it is still a copy of 'semantic'\n"
    assert f"  sampling 4 × student\n{note}  sampling 4 × semantic\n  sampling 4 × teacher\n" in out
    assert out.count("not trained") == 1


def test_pictures_open(trained):
    """A frame is 24 pixels wide, shown at 72 in the sheet (4 of 8 frames) and 96 in the animation."""
    result = trained.evaluate(candidates=[STUDENT, TEACHER], pictures=2)
    assert {path.name for path in result.folder.glob("[!.]*")} == {
        "metrics.json", "rows.safetensors", "latents.safetensors", "contact_sheet.png", "side_by_side.webp", "videos",
    }  # fmt: skip
    with Image.open(result.folder / "contact_sheet.png") as sheet:
        sheet.load()
        assert (sheet.format, sheet.width > 2 * 4 * 72, sheet.height > 2 * 72) == ("PNG", True, True)
    with Image.open(result.folder / "side_by_side.webp") as animation:
        assert (animation.format, animation.n_frames) == ("WEBP", 8)
        assert animation.width > 2 * 96
    about = json.loads((result.folder / "videos/videos.json").read_text())
    assert about["files"] == {
        "student": ["00_0_student.mp4", "01_0_student.mp4"], "teacher": ["00_1_teacher.mp4", "01_1_teacher.mp4"],
    }  # fmt: skip
    assert len(about["captions"]) == 2
    for file in [file for files in about["files"].values() for file in files]:
        with av.open(result.folder / "videos" / file) as container:
            assert (container.streams.video[0].width, len(list(container.decode(video=0)))) == (24, 8)


def test_only_the_main_process_works(trained):
    result = trained.evaluate(main=False)
    assert result.table is None
    assert not result.folder.exists()


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"candidates": [STUDENT, STUDENT]}, "candidates", "names must differ, not student, student"),
        ({"reference": "teacher"}, "reference", "'teacher' is no candidate; there are student"),
        ({"metrics": [], "save_latents": False}, "metrics", "the stage would do nothing"),
        ({"candidates": [{**STUDENT, "steps": 9}]}, "candidates.0.steps", "9 is more than the trajectory's 8"),
        ({"candidates": [{**STUDENT, "stand_ins": {"detial": "teacher"}}]}, "candidates.0.stand_ins", "'detial'"),
        (
            {"candidates": [{**STUDENT, "model": "teacher", "stand_ins": {"detail": "semantic"}}]},
            "candidates.0.stand_ins",
            "has no effect",
        ),
        ({"weights": "ema"}, "weights", "no stage keeps an average"),
        ({"prompts": []}, "prompts", "at least 1"),
    ],
)
def test_stages_that_cannot_work_are_refused(changes, key, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(tiny_recipe([evaluate(**changes)]))
    [problem] = caught.value.problems
    assert problem.path == f"stages.0.{key}"
    assert message in problem.message


def test_a_student_needs_a_router_and_steps():
    with pytest.raises(RecipeError) as caught:
        load_recipe(tiny_recipe([evaluate()], {"router": None, "experts": {}, "sample": None}))
    assert [problem.path for problem in caught.value.problems] == [
        "stages.0.candidates.0.steps", "stages.0.candidates.0.model",
    ]  # fmt: skip


def test_the_miniature_is_smaller():
    [stage] = load_recipe(tiny_recipe([evaluate(samples=512, pictures=6)])).stages
    assert (stage.tiny().samples, stage.tiny().pictures) == (8, 2)
    assert (stage.replace(samples=5, pictures=0).tiny().samples, stage.replace(pictures=0).tiny().pictures) == (5, 0)


# -- the reference's samples from another evaluation ------------------------------------------------------------------


def test_stored_samples_take_the_place_of_the_references_own(trained, monkeypatch):
    asked = {"candidates": [TEACHER, STUDENT], "reference": "teacher", "metrics": [{"kind": "paired_distance"}]}
    first = trained.evaluate(**asked)
    file = str(first.folder / "latents.safetensors")
    sampled = []
    generate = trained.mixture.generate
    monkeypatch.setattr(trained.mixture, "generate", lambda *a, **k: sampled.append(1) or generate(*a, **k))
    again = trained.evaluate(**asked, reference_samples=file)
    assert len(sampled) == 1  # the student's
    assert again.table == first.table

    for changes, words in (
        ({"seed": 1}, "made with seed 0 and 4 samples, not seed 1 and 4"),
        ({"samples": 3}, "made with seed 0 and 4 samples, not seed 0 and 3"),
        ({"reference": "student"}, None),
        ({"prompts": ["3 right"]}, "made for other conditioning"),
        ({"reference_samples": "nowhere.safetensors"}, "cannot be read"),
        ({"candidates": [{**TEACHER, "steps": 3}, STUDENT]}, "its 'teacher' was made with other settings"),
        ({"candidates": [{**TEACHER, "model": "student"}, STUDENT]}, "its 'teacher' was made with other settings"),
    ):
        stage = {**asked, "reference_samples": file, **changes}
        if words is None:
            trained.evaluate(**stage)
            continue
        with pytest.raises(ValueError, match=words):
            trained.evaluate(**stage)


GUIDED = {"mode": "classifier_free", "scale": 2.0}
MADE_OTHERWISE = [
    ({"backbone.guidance": GUIDED}, "teacher exact student"),
    ({"backbone.num_heads": 1}, "teacher exact student"),
    ({"trajectory.shift": 2.0}, "teacher exact student"),
    ({"sample.eta": 0.5}, "teacher exact student"),
    ({"data.styles_per_digit": 2}, "exact student"),
    ({"experts.detail.rank": 4}, "student"),
    ({"stages.0.steps": 3}, "student"),
    ({"seed": 1}, "student"),
    ({"name": "other"}, ""),
    ({"stages.1.batch_size": 1}, ""),
]
"""Changes of a recipe, and the candidates whose samples they change."""


@pytest.mark.parametrize(("changes", "others"), MADE_OTHERWISE)
def test_samples_are_known_by_what_made_them(changes, others):
    candidates = [STUDENT, TEACHER, {"name": "exact", "model": "exact"}]

    def made(changes):
        recipe = load_recipe(tiny_recipe([distil(), evaluate(candidates=candidates)], changes))
        return {one["name"]: fingerprint(recipe.stages[1], recipe, one["name"]) for one in candidates}

    usual, changed = made({}), made(changes)
    assert {name for name in usual if usual[name] != changed[name]} == set(others.split())
    assert len(set(usual.values())) == 3


def test_samples_of_a_student_are_known_by_stand_ins_and_weights():
    def made(**changes):
        recipe = load_recipe(tiny_recipe([distil(ema_decay=0.9), evaluate(**changes)]))
        return fingerprint(recipe.stages[1], recipe, "student")

    assert len({made(), made(weights="ema"), made(candidates=[{**STUDENT, "stand_ins": {"detail": "teacher"}}])}) == 3
    assert made(candidates=[{**STUDENT, "sample": {"points": [8, 4]}}]) == made()  # the recipe's own


def test_stored_samples_of_another_teacher_stop_before_training(tmp_path):
    stage = evaluate(candidates=[TEACHER], reference="teacher")
    run(tiny_recipe([stage]), output=tmp_path / "one", device="cpu")
    stage["reference_samples"] = str(tmp_path / "one" / "evaluate" / "latents.safetensors")
    run(tiny_recipe([stage]), output=tmp_path / "two", device="cpu")
    with pytest.raises(UserError, match="its 'teacher' was made with other settings"):
        run(tiny_recipe([distil(), stage], {"backbone.guidance": GUIDED}), output=tmp_path / "three", device="cpu")
    assert not (tmp_path / "three").exists()


def test_only_the_wanted_samples_are_read(trained, monkeypatch):
    asked = {"candidates": [TEACHER, STUDENT], "reference": "teacher"}
    file = str(trained.evaluate(**asked).folder / "latents.safetensors")
    read = []

    class Spy:
        def __init__(self, *arguments):
            self.file = safe_open(*arguments)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr("moedistill.stages.evaluate.safe_open", Spy)
    trained.evaluate(**asked, reference_samples=file)
    assert sorted(read) == ["conditioning.digit", "conditioning.direction", "teacher"]


def test_stored_samples_are_looked_for_before_training(tmp_path):
    stage = evaluate(reference_samples=str(tmp_path / "latents.safetensors"))
    with pytest.raises(UserError, match=r"stage evaluate: reference_samples .*cannot be read"):
        run(tiny_recipe([distil(), stage]), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_stored_samples_have_to_hold_the_reference(trained):
    file = str(trained.evaluate(candidates=[TEACHER], reference="teacher").folder / "latents.safetensors")
    with pytest.raises(ValueError, match="it has no 'student'; there are teacher"):
        trained.evaluate(candidates=[STUDENT], reference="student", reference_samples=file)


# -- the exact velocity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("oscillating", [False, True])
def test_the_exact_velocity_is_guided_as_the_teacher(tmp_path, oscillating):
    guided = Trained(tmp_path, {"backbone.guidance": {**GUIDED, "oscillate_from": 0 if oscillating else None}})
    exact = {"name": "exact", "model": "exact"}
    latents = guided.evaluate(candidates=[exact], reference="exact").latents
    cond = conditioning_of(latents)
    null = {"digit": torch.full((4,), 10), "direction": torch.full((4,), 4)}

    def velocity(x, sigma):
        v, v_null = (
            (x - guided.dataset.posterior_mean(x, sigma, c)) / sigma.view(-1, 1, 1, 1, 1) for c in (cond, null)
        )
        # Two jumps over four of the trajectory's steps, of which two are guided.
        return v_null + (1.5 if oscillating else 2.0) * (v - v_null)

    noise = Draws(0, "evaluate", 0, range(4)).normal("noise", latents["exact"].shape[1:])
    sigmas = guided.recipe.sample.resolve(guided.mixture.trajectory).tolist()
    torch.testing.assert_close(latents["exact"], sample(velocity, noise, sigmas), rtol=1e-3, atol=1e-3)


def test_training_and_analysis_see_the_same_teacher_whose_guidance_oscillates():
    oscillating = {"mode": "classifier_free", "scale": 3.0, "oscillate_from": 2}
    training, _ = set_up(tiny_recipe([distil()], {"backbone.guidance": oscillating}))
    x, _, cond = digits_inputs(batch=8)
    sigma = training.trajectory.points[torch.arange(8, 0, -1)]  # where steps 0 to 7 begin
    found = training.teacher(x, sigma, cond)
    rows = [conditioning.select(cond, slice(k, k + 1)) for k in range(8)]
    analysed = [teacher_velocity(training.run, x[k : k + 1], sigma[k : k + 1], cond=row) for k, row in enumerate(rows)]
    torch.testing.assert_close(torch.cat(analysed).detach(), found, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        plain = training.mixture(x, sigma, cond)
    unguided = [(found[k] - plain[k]).abs().max() < 1e-5 for k in range(8)]
    assert unguided == [False, False, False, True, False, True, False, True]
