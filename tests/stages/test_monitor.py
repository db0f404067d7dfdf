"""The held-out consistency loss: what it measures, when, and that training is the same bits with and without it."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import as_if_trained, dcm_recipe, distil, equal, set_up, set_up_trained, tiny_recipe, velocity_of
from started_commands import start_pair

from moedistill import hookimpl
from moedistill.components.plugins import load_plugins
from moedistill.model.backbone import TEACHER
from moedistill.recipe.keys import MonitorConfig
from moedistill.recipe.loading import load_recipe
from moedistill.runs.loop import run as run_recipe
from moedistill.runtime.checkpoint import find_checkpoint, load_tree
from moedistill.runtime.randomness import Draws

TREES = ("experts", "ema", "training")


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def measured(line):
    return {name: value for name, value in line.items() if name.startswith("monitor")}


def watching(expert="semantic", changes=(), config=None, **stage):
    """The monitor of a stage whose experts, and average, are as if trained."""
    keys = dataclasses.asdict(config or MonitorConfig())
    training, built = set_up_trained(expert, {**dict(changes), "training.monitor": keys}, **stage)
    return training, built.monitor(training)


def measure(training, monitor):
    with training.mixture.using(training.expert):
        return monitor.measure()


# -- what it measures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expert", ["semantic", "detail"])
@pytest.mark.parametrize("target", ["student", "ema"])
def test_it_is_the_distance_of_the_jump_to_its_target(expert, target):
    """By the formulas of a step, one sample and level at a time."""
    training, monitor = watching(expert, ema_decay=0.5, target=target, config=MonitorConfig(samples=3, levels=2))
    found = measure(training, monitor)
    mixture, points = training.mixture, training.trajectory.points
    assert monitor.points == {"semantic": [6, 8], "detail": [2, 4]}[expert]
    low = 4 if expert == "semantic" else 0
    means = []
    for point in monitor.points:
        squares = []
        for index in (0, len(training.dataset) // 3, 2 * len(training.dataset) // 3):
            sample = training.dataset[index]
            x0, cond = sample.latents[None], {name: value[None] for name, value in sample.conditioning.items()}
            noise = Draws(0, "training.heldout", 0, [index]).normal("noise", x0.shape[1:])
            sigma, previous, end = points[[point]], points[[point - 1]], points[[low]]

            def at(name, x, sigma, cond=cond):
                return velocity_of(mixture, name, (x, sigma, cond))

            x = (1 - sigma) * x0 + sigma * noise
            x_previous = x + (previous - sigma) * at(TEACHER, x, sigma)
            prediction = x + (end - sigma) * at(expert, x, sigma)
            if target == "ema":
                with training.trained["student"].average.swapped():
                    v = at(expert, x_previous, previous)
            else:
                v = at(expert, x_previous, previous)
            squares.append((prediction - x_previous - (end - previous) * v).square().mean().item())
        means.append(math.sqrt(sum(squares) / 3))
        name = f"sigma_{training.trajectory.sigma(point):.4f}"
        length = training.trajectory.sigma(point) - training.trajectory.sigma(low)
        assert found[f"monitor/{name}"] == pytest.approx(means[-1], rel=1e-3)
        assert found[f"monitor_velocity/{name}"] == pytest.approx(means[-1] / length, rel=1e-3)
    assert means[0] > 1e-3
    assert found["monitor"] == pytest.approx(sum(means) / 2, rel=1e-3)
    assert len(found) == 6


@pytest.mark.parametrize(
    ("levels", "points"), [(1, [7]), (2, [6, 8]), (3, [5, 7, 8]), (4, [5, 6, 7, 8]), (9, [5, 6, 7, 8])]
)
def test_levels_are_spread_over_the_segment(levels, points):
    assert watching(config=MonitorConfig(levels=levels))[1].points == points


def test_batches_do_not_matter():
    config = MonitorConfig(samples=5, levels=3)
    values = [measure(*watching(changes={"training.batch_size": size}, config=config)) for size in (1, 4, 64)]
    for other in values[1:]:
        assert other == pytest.approx(values[0], rel=1e-4)


def test_small_datasets_give_what_they_have():
    training, monitor = watching(config=MonitorConfig(samples=10_000))
    assert len(monitor._latents) == len(training.dataset)


def test_samples_are_of_many_classes():
    """Digits are in the order of digit and direction."""
    for samples, wanted in ((4, [0, 2, 5, 7]), (10, list(range(10)))):
        _, monitor = watching(config=MonitorConfig(samples=samples))
        assert [cond["digit"].item() for cond in monitor._cond] == wanted


def test_samples_have_the_last_ones_shape_and_are_cut_as_in_training():
    training, built = set_up(tiny_recipe([distil(latent_frames=2)], {"training.monitor": {"samples": 2}}))
    shapes = [(12, 8, 4, 4), (12, 4, 4, 4), (12, 8, 4, 4), (12, 4, 4, 4), (12, 8, 4, 4)]

    class Dataset:
        def __len__(self):
            return len(shapes)

        def shape(self, index):
            return shapes[index]

        def __getitem__(self, index):
            # Texts of any length: training takes them, where its batches are of one sample.
            text = {"text": torch.zeros(index)}
            return SimpleNamespace(latents=torch.full(shapes[index], float(index)), conditioning=text)

    training.dataset = Dataset()
    monitor = built.monitor(training)
    assert monitor._latents.shape == (2, 12, 2, 4, 4)
    assert monitor._latents[:, 0, 0, 0, 0].tolist() == [0.0, 2.0]
    assert [len(cond["text"]) for cond in monitor._cond] == [0, 2]


def test_weights_of_no_use_are_seen():
    """It is small where the student is the teacher, and grows with the error."""
    stages = [distil("semantic")]
    training, built = set_up(tiny_recipe(stages, {"training.monitor": {}}))
    good = measure(training, monitor := built.monitor(training))
    as_if_trained(training.mixture.experts["semantic"], 0)
    assert measure(training, monitor)["monitor"] > 3 * good["monitor"]


# -- when, and what it leaves alone -----------------------------------------------------------------------------------


def test_it_is_measured_first_last_and_between(tmp_path):
    stages = [{"name": "fit", "kind": "finetune", "expert": "semantic", "steps": 2, "losses": [{"kind": "mse"}]}]
    stages += [distil("semantic", steps=5), distil("detail", steps=5)]
    recipe = tiny_recipe(stages, {"training.monitor": {"every": 2, "samples": 1}, "training.log_every": 3})
    run_recipe(recipe, output=tmp_path, device="cpu")
    found = [(line["stage"], line["step"], "monitor" in line, "loss" in line) for line in lines(tmp_path)]
    assert found == [
        ("fit", 2, False, True),
        *[
            (name, step, step != 3, step != 0)
            for name in ("semantic", "detail")
            for step in (0, 2, 3, 4, 5)
        ],
    ]  # fmt: skip


def test_no_one_measures_where_it_is_off(tmp_path):
    run_recipe(tiny_recipe([distil()], {"training.monitor": None}), output=tmp_path, device="cpu")
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert not any(measured(line) for line in lines(tmp_path))


def test_it_costs_three_percent_of_a_shipped_recipe_at_most():
    """By samples that networks evaluate: a step's student counts three times, for its backward pass."""
    config = MonitorConfig()
    for name in ("dcm_digits", "dcm_hunyuan", "dcm_hunyuan_1gpu", "dcm_wan_1_3b", "dcm_ltx", "dcm_cogvideox_2b_1gpu"):
        recipe = load_recipe(name)
        assert recipe.training.monitor == config
        teacher = 1 + (recipe.backbone.guidance.mode == "classifier_free")
        step = recipe.training.batch_size * (3 + teacher + 1)
        once = config.samples * config.levels * (1 + teacher + 1)
        steps = min(stage.steps for stage in recipe.stages if stage.kind == "consistency")
        measurements = 1 + steps // config.every + (steps % config.every > 0)
        assert measurements * once < 0.03 * steps * step, name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Both stages of DCM, with everything that has a state, with and without the monitor."""
    folder = tmp_path_factory.mktemp("monitor")
    for name, monitor in (("off", None), ("on", {"every": 2, "samples": 3, "levels": 3})):
        run_recipe(dcm_recipe(4, **{"training.monitor": monitor}), output=folder / name, device="cpu")
    return folder


def test_training_is_the_same_bits_with_and_without(whole):
    names = sorted(path.name for path in (whole / "off" / "checkpoints").iterdir())
    assert len(names) == 8
    for name in names:
        for tree in TREES:
            off, on = (load_tree(whole / which / "checkpoints" / name, tree) for which in ("off", "on"))
            assert equal(off, on), (name, tree)
    without = [
        {k: v for k, v in line.items() if not k.startswith("monitor")} for line in lines(whole / "on") if line["step"]
    ]
    assert without == lines(whole / "off")


def test_networks_that_draw_are_left_their_random_numbers(tmp_path):
    """Dropout draws from torch's own generator."""
    from moedistill_digits.backbone import DigitsBackbone

    velocity, state = DigitsBackbone.velocity, {}

    def noisy(self, network, x, sigma, cond):
        return velocity(self, network, x, sigma, cond) + 0.1 * torch.randn(x.shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DigitsBackbone, "velocity", noisy)
        for name, monitor in (("off", None), ("on", {"every": 1, "samples": 2})):
            torch.manual_seed(0)
            result = run_recipe(
                tiny_recipe([distil()], {"training.monitor": monitor}), output=tmp_path / name, device="cpu"
            )
            state[name] = load_tree(result.checkpoint, "experts")
    assert equal(state["off"], state["on"])


def test_a_resumed_run_measures_the_same(whole, tmp_path):
    recipe = dcm_recipe(4, **{"training.monitor": {"every": 2, "samples": 3, "levels": 3}})
    for checkpoint in ("00_semantic_00000003", "00_semantic_00000004", "01_detail_00000002"):
        folder = tmp_path / checkpoint
        source = whole / "on" / "checkpoints" / checkpoint
        run_recipe(recipe, output=folder, resume_from=source, device="cpu")
        assert lines(folder) == lines(whole / "on")


def test_a_resumed_run_may_measure_otherwise(whole, tmp_path):
    recipe = dcm_recipe(4, **{"training.monitor": {"every": 1, "samples": 1, "levels": 1}})
    source = whole / "on" / "checkpoints" / "01_detail_00000002"
    result = run_recipe(recipe, output=tmp_path, resume_from=source, device="cpu")
    assert equal(load_tree(result.checkpoint, "experts"), load_tree(find_checkpoint(whole / "on"), "experts"))


def test_its_forwards_are_not_the_methods_cost(whole):
    cost = [json.loads((whole / which / "cost.json").read_text()) for which in ("off", "on")]
    for stage in ("semantic", "detail"):
        assert cost[0][stage]["forwards"] == cost[1][stage]["forwards"] > 0


def test_two_processes_measure_what_one_does(whole, tmp_path):
    """9 pairs of sample and level: the second process fills its share up."""
    recipe = dcm_recipe(4, **{"training.monitor": {"every": 2, "samples": 3, "levels": 3}})
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    pair = start_pair(
        ["run", str(tmp_path / "recipe.yaml"), "--device", "cpu", "--output", str(tmp_path / "two")], tmp_path
    )
    assert [command.exit_code() for command in pair] == [0, 0], pair[0].output + pair[1].output
    expected, got = lines(whole / "on"), lines(tmp_path / "two")
    assert [(line["stage"], line["step"]) for line in got] == [(line["stage"], line["step"]) for line in expected]
    for one, two in zip(expected, got, strict=True):
        assert measured(two) == pytest.approx(measured(one), rel=1e-3, abs=1e-6)


def test_plugins_are_told(tmp_path):
    seen = []

    class Observer:
        @hookimpl
        def on_step_end(self, training, metrics):
            seen.append((training.step, sorted(metrics)))

    plugins = load_plugins()
    plugins.manager.register(Observer())
    recipe = tiny_recipe([distil()], {"training.monitor": {"every": 10, "levels": 1}})
    run_recipe(recipe, output=tmp_path, device="cpu", plugins=plugins)
    names = ["monitor", "monitor/sigma_0.9722", "monitor_velocity", "monitor_velocity/sigma_0.9722"]
    others = ["grad_norm/student", *names, "loss", "loss/huber"]
    assert seen == [(0, names), (1, [n for n in others if n not in names]), (2, sorted(others))]
