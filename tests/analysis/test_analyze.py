"""The investigation: measured on mixtures whose answers are known, and run on every kind of backbone in miniature."""

import json
import weakref
from dataclasses import asdict
from itertools import pairwise

import mixture_plugin as mixture
import pytest
import router_plugin
import torch
from click.testing import CliRunner
from helpers import distil

import moedistill
from moedistill import cli
from moedistill.analysis.layers import compare_experts, kind_of
from moedistill.analysis.study import _Work
from moedistill.analysis.suggest import (
    even_points,
    find_decisions,
    landings,
    refine_points,
    suggest_boundaries,
    suggest_needs,
    suggest_points,
)
from moedistill.analysis.teacher import draw_inputs, end_error, follow_teacher, joined
from moedistill.analysis.training import (
    _batches,
    _measure,
    _noisy_batches,
    measure_students,
    set_up,
    train,
    with_students,
)
from moedistill.analysis.undecided import band_masks, band_powers, measure_undecided, undecided_shares
from moedistill.components.plugins import load_plugins
from moedistill.errors import UserError
from moedistill.losses.base import StepTensors
from moedistill.model import conditioning
from moedistill.recipe.loading import load_recipe
from moedistill.recipe.yaml_tree import dump_yaml

POINTS = 2
"""How far, in trajectory points, a suggested boundary may lie from the known one."""


@pytest.fixture(scope="module")
def plugins():
    plugins = load_plugins([mixture.__file__])
    assert not plugins.broken
    return plugins


def mixture_recipe(pairs=(6.0,), tau=0.3, shift=5.0, **changes):
    return {
        "name": "mixture",
        "backbone": {"kind": "mixture", "pairs": list(pairs), "tau": tau},
        "trajectory": {"kind": "flow_matching", "num_steps": 50, "shift": shift},
        "router": {"kind": "timestep", "experts": ["semantic", "detail"], "boundaries": [{"point": 25}]},
        "experts": {"semantic": {"kind": "full"}, "detail": {"kind": "lora", "from": "semantic", "rank": 2}},
        "data": {"kind": "mixture"},
        "training": {"batch_size": 16},
        "stages": [distil(), distil("detail")],
        "sample": {"points": [50, 37, 25, 12]},
        **changes,
    }


def job_of(recipe, plugins, tmp_path, change=lambda recipe: recipe):
    recipe = load_recipe(recipe, plugins=plugins)
    return _Work(recipe, tmp_path, smoke=False, device="cpu").run(change(recipe))


def followed(recipe, plugins, tmp_path, samples=128):
    run = job_of(recipe, plugins, tmp_path)
    noise, cond = draw_inputs(run, samples, seed=0)
    return run, follow_teacher(run, noise, cond, batch_size=48), noise, cond


# -- the teacher's path -----------------------------------------------------------------------------------------------


def test_the_path_is_the_teachers_own(plugins, tmp_path):
    run, path, noise, cond = followed(mixture_recipe(), plugins, tmp_path, samples=32)
    sigmas = path.levels.flip(0).float()
    everywhere = {"semantic": "teacher", "detail": "teacher"}
    ends = run.mixture.generate(noise, cond, sigmas, stand_ins=everywhere, batch_size=48)
    assert torch.equal(path.ends, ends)

    # Everything again, from the samples and velocities themselves.
    points, network = path.levels.tolist(), run.mixture.backbone.network
    x, samples, velocities = noise, {}, {}
    for i in range(50, 0, -1):
        samples[i] = x
        with torch.no_grad():
            velocities[i] = network(x, torch.full((len(x),), points[i]))
        x = x + (points[i - 1] - points[i]) * velocities[i]
    samples[0] = x
    clean = {i: samples[i] - points[i] * velocities[i] for i in velocities}

    def rms(tensor):
        return tensor.double().square().mean().sqrt().item()

    for i in (2, 10, 27, 50):
        step = points[i] - points[i - 1]
        assert path.relative_change[i - 1] == pytest.approx(
            rms(samples[i - 1] - samples[i]) / rms(samples[i]), rel=1e-4
        )
        assert path.clean_change[i - 1] == pytest.approx(rms(clean[i - 1] - clean[i]), rel=1e-3)
        assert path.curvature[i - 1] == pytest.approx(rms(velocities[i] - velocities[i - 1]) / step, rel=1e-3)
        assert path.remaining[i - 1] == pytest.approx(rms(clean[i] - samples[0]), rel=1e-3)
        for j in (0, 1, i - 2):
            jumped = samples[i] + (points[j] - points[i]) * velocities[i]
            assert path.jump_errors[i, j] == pytest.approx(rms(jumped - samples[j]), rel=1e-3, abs=1e-6)
    assert path.jump_errors[30, 29] == 0
    assert path.jump_errors[30, 30] == path.jump_errors[30, 31] == torch.inf
    middle = (points[30] + points[29]) / 2
    expected = middle * (1 - middle) * path.clean_change[29] / (points[30] - points[29])
    assert path.decision_rate[29] == pytest.approx(expected.item())


def test_a_straight_path_has_no_error(plugins, tmp_path):
    # One component of no width: every path goes straight to it.
    run, path, noise, cond = followed(mixture_recipe(pairs=(), tau=0.0), plugins, tmp_path, samples=8)
    assert path.curvature.max() < 1e-3
    assert path.jump_errors[torch.ones_like(path.jump_errors).tril(-1).bool()].max() < 1e-5
    assert path.relative_change.min() > 1e-3
    for points in ([50], [50, 25], [50, 3]):
        assert end_error(run, path, noise, cond, 8, points) < 1e-4
    assert 1 < suggest_boundaries(path, 2, [])[0] < 49


# -- suggestions where the answer is known ----------------------------------------------------------------------------


# -- what is undecided where -------------------------------------------------------------------------------------------


def test_bands_are_octaves_and_hold_all():
    masks = band_masks(24, 40)
    assert list(masks) == ["2–4", "4–8", "8–16", "16 and longer"]
    assert torch.stack(list(masks.values())).sum(0).eq(1).all()
    assert list(band_masks(4, 4)) == ["2–4", "4 and longer"]
    assert list(band_masks(1, 2)) == ["all"]
    x = torch.randn(2, 3, 5, 24, 40)
    assert band_powers(x, list(masks.values())).sum().item() == pytest.approx(x.square().mean().item(), rel=1e-6)
    # Waves along both axes and both, each in one band.
    for period, along, band in ((3, 0, "2–4"), (4, 1, "4–8"), (6, 0, "4–8"), (10, 1, "8–16"), (24, 0, "16 and longer")):
        size = (24, 40)[along]
        wave = torch.cos(2 * torch.pi * torch.arange(size) / period)
        wave = (wave[:, None] if along == 0 else wave[None, :]).expand(24, 40)
        if size % period == 0:
            powers = dict(zip(masks, band_powers(wave[None, None, None], list(masks.values())).tolist(), strict=True))
            assert powers[band] == pytest.approx(0.5, rel=1e-5)
            assert sum(powers.values()) == pytest.approx(0.5, rel=1e-5)


def test_what_is_undecided_of_known_bands():
    """Independent coarse and fine Gaussians: Wiener's posterior mean leaves σ²/((1 - σ)²·P + σ²) of each."""
    masks = list(band_masks(16, 16).values())
    deviations = [0.2, 0.7, 1.5, 3.0][: len(masks)]

    def shaped(x, factors):
        gain = sum(factor * mask for factor, mask in zip(factors, masks, strict=True))
        return torch.fft.ifft2(torch.fft.fft2(x, norm="ortho") * gain, norm="ortho").real

    def wiener(x, sigma, cond):
        s = sigma[0].item()
        return shaped(x, [(1 - s) * d**2 / ((1 - s) ** 2 * d**2 + s**2) for d in deviations])

    generator = torch.Generator().manual_seed(0)
    drawn, noise = (torch.randn(200, 2, 3, 16, 16, generator=generator) for _ in range(2))
    x0, sigmas = shaped(drawn, deviations), [0.9, 0.6, 0.3]
    shares, power = undecided_shares(x0, noise, {}, wiener, sigmas, batch_size=64)
    expected = [[s**2 / ((1 - s) ** 2 * d**2 + s**2) for s in sigmas] for d in deviations]
    torch.testing.assert_close(shares, torch.tensor(expected, dtype=torch.float64), rtol=0.03, atol=0)
    assert power.sum().item() == pytest.approx(1)
    weights = torch.tensor([d**2 * mask.sum() for d, mask in zip(deviations, masks, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(power, weights / weights.sum(), rtol=0.03, atol=0)
    # What never differs has nothing undecided.
    for alike in (torch.ones(1, 1, 1, 8, 8), torch.randn(1, 1, 1, 8, 8)):
        same, nothing = alike.expand(6, -1, -1, -1, -1), torch.zeros(6, 1, 1, 8, 8)
        still, _ = undecided_shares(same, nothing, {}, lambda x, *_: x, [0.5], 2)
        assert still.eq(0).all()


def test_the_teacher_is_undecided_as_its_data_are(plugins, tmp_path):
    """One Gaussian, whose velocity is exact; and digits, whose posterior mean is known."""
    run = job_of(mixture_recipe(pairs=(), tau=0.8), plugins, tmp_path)
    _, cond = draw_inputs(run, 512, seed=0)
    data = 0.8 * torch.randn(512, *mixture.SHAPE, generator=torch.Generator().manual_seed(0))
    found = measure_undecided(run, data, cond, 48, [10, 40])
    assert {10, 40} < set(found.points)
    assert (found.bands, found.power, found.exact) == (["all"], [1.0], None)
    at = [run.mixture.trajectory.sigma(point) for point in found.points]
    wanted = [s**2 / ((1 - s) ** 2 * 0.8**2 + s**2) for s in at]
    assert found.teacher[0] == pytest.approx(wanted, rel=0.02)
    run = _Work(load_recipe("dcm_digits"), tmp_path, smoke=False, device="cpu").run(load_recipe("digits_teacher"))
    _, cond = draw_inputs(run, 24, seed=0)
    found = measure_undecided(run, run.dataset.latents.flatten(0, 2)[::200], cond, 24, [])
    for shares in found.exact:
        assert all(above >= below - 0.05 for below, above in pairwise(shares)), shares
        assert shares[0] < 1e-3 < 0.5 < shares[-1], shares


@pytest.mark.parametrize(
    ("mean", "tau", "shift"),
    [(1.5, 0.1, 5.0), (3.0, 0.3, 5.0), (12.0, 0.5, 5.0), (3.0, 0.3, 1.0), (20.0, 1.0, 1.0), (12.0, 0.5, 17.0)],
)
def test_the_boundary_is_where_components_part(mean, tau, shift, plugins, tmp_path):
    run, path, *_ = followed(mixture_recipe([mean], tau, shift), plugins, tmp_path)
    [boundary] = suggest_boundaries(path, 2, [])
    known = mixture.critical_sigma(mean, tau)
    nearest = (run.mixture.trajectory.points - known).abs().argmin().item()
    assert abs(boundary - nearest) <= POINTS
    assert find_decisions(path)[0].share > 0.8


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_three_experts_part_at_both_scales(shift, plugins, tmp_path):
    run, path, *_ = followed(mixture_recipe([20.0, 2.0], 0.1, shift), plugins, tmp_path)
    known = [mixture.critical_sigma(mean, 0.1) for mean in (20.0, 2.0)]
    nearest = [(run.mixture.trajectory.points - sigma).abs().argmin().item() for sigma in known]
    first, second = suggest_boundaries(path, 3, [])
    assert abs(first - nearest[0]) <= POINTS
    assert abs(second - nearest[1]) <= 2 * POINTS  # blurred by paths that decided late, and by detail


def test_boundaries_keep_what_is_fixed_and_leave_room(plugins, tmp_path):
    _, path, *_ = followed(mixture_recipe(), plugins, tmp_path)
    [free] = suggest_boundaries(path, 2, [])
    assert suggest_boundaries(path, 2, [9]) == [9]
    assert suggest_boundaries(path, 3, [9]) == [free, 9]
    for number in (2, 5, 20, 25, 50):
        edges = [50, *suggest_boundaries(path, number, []), 0]
        gaps = [above - below for above, below in pairwise(edges)]
        assert len(gaps) == number
        assert min(gaps) >= (2 if number <= 25 else 1)


@pytest.mark.parametrize(("mean", "tau", "shift"), [(3.0, 0.3, 5.0), (6.0, 1.0, 5.0), (12.0, 0.5, 17.0)])
def test_suggested_points_beat_even_ones(mean, tau, shift, plugins, tmp_path):
    run, path, noise, cond = followed(mixture_recipe([mean], tau, shift), plugins, tmp_path)
    for number in (2, 4, 8):
        points = suggest_points(path.jump_errors, number, [])
        assert points[0] == 50
        assert len(points) == number
        assert points == sorted(points, reverse=True)
        error, even = (end_error(run, path, noise, cond, 128, chosen) for chosen in (points, even_points(50, number)))
        assert error < 0.85 * even


def test_points_are_the_best_of_all():
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand(8, 8, dtype=torch.float64, generator=generator).masked_fill(
        torch.ones(8, 8).triu().bool(), torch.inf
    )

    def best(stops=()):
        lists = [[7, i, j] for i in range(6, 0, -1) for j in range(i - 1, 0, -1)]
        kept = [points for points in lists if set(stops) <= set(points)]
        return min(
            kept, key=lambda points: sum(errors[a, b] ** 2 for a, b in zip(points, [*points[1:], 0], strict=True))
        )

    assert suggest_points(errors, 3, []) == best()
    for stop in range(1, 7):
        assert suggest_points(errors, 3, [stop]) == best([stop])
    assert suggest_points(errors, 1, [4]) == [7]  # too few steps to stop anywhere


def test_refined_points_are_a_local_best():
    target = [50, 33, 20, 5]

    def measure(points):
        assert len(set(points)) == 4
        assert points == sorted(points, reverse=True)
        return sum((a - b) ** 2 for a, b in zip(points, target, strict=True))

    assert refine_points([50, 37, 25, 12], [], 50, measure) == (target, 0)
    best, error = refine_points([50, 37, 25, 12], [25], 50, measure)
    assert (best, error) == ([50, 33, 25, 5], 25)
    assert refine_points([50, 37, 25, 12], [30], 50, measure) == (target, 0)


def test_points_are_refined_until_nothing_moves():
    # From afar: more moves of one point than there are strides; and no list is measured twice.
    lists = []

    def measure(points):
        lists.append(tuple(points))
        return sum((a - b) ** 2 for a, b in zip(points, [50, 49, 48, 47], strict=True))

    assert refine_points([50, 3, 2, 1], [], 50, measure) == ([50, 49, 48, 47], 0)
    assert len(lists) == len(set(lists))


def test_halves_joined_are_the_whole(plugins, tmp_path):
    run, path, noise, cond = followed(mixture_recipe(), plugins, tmp_path, samples=12)
    rows = [slice(0, 4), slice(4, 12)]
    parts = [follow_teacher(run, noise[part], conditioning.select(cond, part), batch_size=48) for part in rows]
    whole = joined(parts)
    assert torch.equal(whole.ends, path.ends)
    for name in ("levels", "bends", "sizes", "speeds"):
        torch.testing.assert_close(getattr(whole, name), getattr(path, name), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(parts[0].sizes, parts[1].sizes, rtol=1e-3)


# -- one student, two experts -----------------------------------------------------------------------------------------


def test_losses_are_the_stages_own(plugins, tmp_path, monkeypatch):
    recipe = mixture_recipe()
    recipe["stages"][0]["losses"] = [{"kind": "huber", "c": 0.01, "start": 9}, {"kind": "temporal_coherence", "lag": 1}]
    run = job_of(recipe, plugins, tmp_path, lambda recipe: with_students(recipe, 5))
    curves = measure_students(run, samples=16, most_points=50, num_ranges=4, steps=0)
    assert curves.points == list(range(1, 51))
    assert curves.ranges == [(1, 12), (13, 25), (26, 37), (38, 50)]

    # The stage's own step, made to start at these points.
    [config] = run.recipe.stages
    assert [(loss.kind, loss.start) for loss in config.losses] == [("huber", 0), ("temporal_coherence", 0)]
    training, stage = set_up(run, config)
    batch = training.begin(next(_batches(run, "analyze", 1, 16)))
    for point in (2, 30, 50):
        draw = training.draw
        monkeypatch.setattr(draw, "integers", lambda *_, point=point: torch.full((16,), point))
        seen = {}
        monkeypatch.setattr(training, "update", lambda name, loss, seen=seen: seen.update(loss=loss))
        with training.mixture.using(config.expert):
            stage.step(training, batch)
        assert curves.loss[point - 1] == seen["loss"].item() > 0
        seen["loss"].backward()
        gradient = torch.cat([p.grad.flatten() for p in training.trained["student"].parameters.values()]).norm().item()
        assert curves.gradient[point - 1] == pytest.approx(gradient, rel=1e-5)
        training.trained["student"].optimizer.zero_grad()

        noise = training.draw.normal("noise", batch.latents.shape[1:])
        with training.mixture.using(config.expert), torch.no_grad():
            made = stage.jumps(training, batch.latents, batch.conditioning, torch.full((16,), point), noise)
        length = run.mixture.trajectory.sigma(point) - run.mixture.trajectory.sigma(0)
        assert curves.jump[point - 1] == pytest.approx(length, rel=1e-5)
        unit = StepTensors(made.prediction, made.target, made.difference / curves.jump[point - 1], made.sigma)
        assert curves.loss_per_jump[point - 1] == pytest.approx(training.objective(unit).item(), rel=1e-4)
    # The student is the teacher, and its shortest jump is the teacher's own step.
    assert curves.loss[0] < 1e-9


def test_cosines_of_gradients(plugins, tmp_path):
    run = job_of(mixture_recipe(), plugins, tmp_path, lambda recipe: with_students(recipe, 3))
    train(run, run.recipe.stages[0])
    curves = measure_students(run, samples=16, most_points=12, num_ranges=3, steps=3)
    assert (curves.points[0], curves.points[-1], len(curves.points)) == (1, 50, 12)
    for matrix in (curves.cosine, curves.cosine_per_jump):
        matrix = torch.tensor(matrix, dtype=torch.float64)
        assert matrix.shape == (3, 3)
        assert torch.equal(matrix, matrix.T)
        assert torch.allclose(matrix.diagonal(), torch.ones(3, dtype=torch.float64), atol=1e-9)
        assert matrix.abs().max() <= 1 + 1e-9
        assert matrix.min() < 0.999
    again = measure_students(run, samples=16, most_points=12, num_ranges=3, steps=3)
    assert asdict(again) == asdict(curves)


def test_cosines_across_boundaries(plugins, tmp_path):
    run = job_of(mixture_recipe(), plugins, tmp_path, lambda recipe: with_students(recipe, 3))
    train(run, run.recipe.stages[0])
    curves = measure_students(run, 16, 50, 5, steps=3, boundaries=[27])
    assert curves.ranges == [(1, 10), (11, 20), (21, 27), (28, 40), (41, 50)]
    halves = measure_students(run, 16, 50, 2, steps=3, boundaries=[27])
    assert halves.ranges == [(1, 27), (28, 50)]
    for found, matrix in ((curves.across, halves.cosine), (curves.across_per_jump, halves.cosine_per_jump)):
        assert found == [pytest.approx(matrix[0][1], rel=1e-5)]
        assert abs(found[0]) < 0.999
    three = measure_students(run, 16, 50, 1, steps=3, boundaries=[40, 27])
    assert three.ranges == [(1, 27), (28, 40), (41, 50)]
    assert three.across == [pytest.approx(three.cosine[1][2]), pytest.approx(three.cosine[0][1])]


def test_a_measurement_keeps_the_average(plugins, tmp_path):
    recipe = mixture_recipe()
    recipe["stages"][0] |= {"target": "ema", "ema_decay": 0.9}
    run = job_of(recipe, plugins, tmp_path, lambda recipe: with_students(recipe, 3))
    [config] = run.recipe.stages
    train(run, config)

    def average():
        return {name: value.clone() for name, value in run.mixture.ema[config.expert].average.items()}

    trained, weights = average(), run.mixture.experts[config.expert].parameters
    assert any(not torch.equal(trained[name], weights[name]) for name in trained)
    curves = measure_students(run, 16, 4, 1, steps=3)
    assert all(torch.equal(value, trained[name]) for name, value in average().items())
    run.mixture.ema.clear()
    without = measure_students(run, 16, 4, 1, steps=3)
    assert without.loss[-1] != pytest.approx(curves.loss[-1], rel=1e-4)


def test_losses_and_gradients_are_means_over_batches(plugins, tmp_path):
    run = job_of(mixture_recipe(), plugins, tmp_path, lambda recipe: with_students(recipe, 3))
    one, two = (measure_students(run, samples, most_points=3, num_ranges=1, steps=0) for samples in (16, 32))
    [config] = run.recipe.stages
    training, stage = set_up(run, config)
    *_, (batch, noise) = _noisy_batches(run, training, 32)
    with training.mixture.using(config.expert):
        second, _ = _measure(training, stage, [(batch, noise)], 50)
    assert two.loss[-1] == pytest.approx((one.loss[-1] + second.losses[0]) / 2, rel=1e-5)
    assert second.losses[0] != pytest.approx(one.loss[-1], rel=1e-4)
    assert two.gradient[-1] <= (one.gradient[-1] + second.norms[0]) / 2


def test_differences_of_layers(plugins, tmp_path):
    run = job_of(mixture_recipe(), plugins, tmp_path, lambda recipe: with_students(recipe, 2, point=20))
    mixture = run.mixture
    assert landings(run.mixture.trajectory, run.mixture.router) == [20]
    weights = {name: weight.clone() for name, weight in mixture.experts["teacher"].shared.weights.items()}
    with torch.no_grad():
        upper, lower = (dict(mixture.experts[name].parameters) for name in ("upper", "lower"))
        upper["blocks.0.mix.weight"] *= 1.5
        lower["blocks.0.mix.weight"] *= 0.5
        lower["time_embed.weight"] *= 1.25
        upper["proj_out.weight"] += 1.0
    layers = compare_experts(mixture, "upper", "lower", 2)
    kinds = {kind.name: kind for kind in layers.kinds}
    assert set(kinds) == {"blocks.*.mix", "time_embed", "proj_out"}

    def norm(*names):
        return sum(weights[name].double().square().sum() for name in names).sqrt().item()

    mix = norm("blocks.0.mix.weight") / norm("blocks.0.mix.weight", "blocks.0.mix.bias")
    time = norm("time_embed.weight") / norm("time_embed.weight", "time_embed.bias")
    assert kinds["blocks.*.mix"].difference == pytest.approx(mix, rel=1e-5)
    assert kinds["blocks.*.mix"].change_upper == pytest.approx(0.5 * mix, rel=1e-5)
    assert kinds["blocks.*.mix"].cosine == pytest.approx(-1)
    assert kinds["time_embed"].difference == pytest.approx(0.25 * time, rel=1e-5)
    assert kinds["time_embed"].cosine is None  # only one has moved
    assert kinds["proj_out"].difference is None  # the teacher's are 0
    assert kinds["blocks.*.mix"].disagreement == pytest.approx(1)
    assert kinds["proj_out"].disagreement == pytest.approx(1)
    assert (kinds["blocks.*.mix"].groups, kinds["blocks.*.mix"].time_dependent) == (["attention"], None)
    assert (kinds["time_embed"].groups, kinds["time_embed"].time_dependent) == ([], "time_embed")
    assert layers.groups == {"attention": pytest.approx(1)}
    outputs = weights["proj_out.weight"].numel()
    apart = norm("blocks.0.mix.weight") ** 2 + (0.25 * norm("time_embed.weight")) ** 2 + outputs
    upper_moved = (0.5 * norm("blocks.0.mix.weight")) ** 2 + outputs
    lower_moved = (0.5 * norm("blocks.0.mix.weight")) ** 2 + (0.25 * norm("time_embed.weight")) ** 2
    assert layers.whole == pytest.approx(apart**0.5 / (upper_moved**0.5 + lower_moved**0.5), rel=1e-5)

    # What both change alike does not count, however small the weights that it is a change of.
    with torch.no_grad():
        lower["proj_out.weight"].copy_(upper["proj_out.weight"])
        upper["time_embed.weight"].copy_(lower["time_embed.weight"])
        upper["time_embed.bias"] += 0.1
    layers = compare_experts(mixture, "upper", "lower", 2)
    assert [kind.name for kind in layers.kinds] == ["blocks.*.mix", "time_embed", "proj_out"]
    assert layers.kinds[-1].disagreement == 0
    assert layers.modules["proj_out"] == 0 < layers.whole < layers.modules["time_embed"]
    assert (suggest_needs(layers).targets, suggest_needs(layers).copies) == (["attention"], ["time_embed"])

    layers.groups, layers.modules, layers.whole = {"a": 0.1, "b": 0.4}, {"x": 0.2, "y": 0.5}, 0.3
    assert (suggest_needs(layers).targets, suggest_needs(layers).copies) == (["b"], ["y"])
    layers.whole = 0.6
    assert (suggest_needs(layers).targets, suggest_needs(layers).copies) == (["b"], "none")
    layers.whole = 0.05
    assert (suggest_needs(layers).targets, suggest_needs(layers).copies) == (["a", "b"], "time_dependent")


def test_one_student_is_freed_before_two_are_made(plugins, tmp_path, quick, monkeypatch):
    students, make = [], _Work.run

    def run(work, recipe):
        if recipe.router is not None:
            assert all(mixture() is None for mixture in students)
        made = make(work, recipe)
        students.append(weakref.ref(made.mixture))
        return made

    monkeypatch.setattr(_Work, "run", run)
    moedistill.analyze(mixture_recipe(), samples=4, steps=1, output=tmp_path, plugins=plugins, device="cpu")
    assert len(students) == 3


def test_kinds_of_layers():
    assert kind_of("blocks.12.attn.to_out.0.weight") == "blocks.*.attn.to_out.*"
    assert kind_of("time_embed.linear_1.bias") == "time_embed.linear_1"
    assert kind_of("scale_shift_table") == "scale_shift_table"


# -- the whole command ------------------------------------------------------------------------------------------------


def run_analyze(*args):
    return CliRunner().invoke(cli.cli, ["analyze", *map(str, args), "--device", "cpu"], catch_exceptions=False)


def write_yaml(path, recipe):
    path.write_text(dump_yaml(recipe))
    return path


def test_the_command_on_a_mixture(plugins, tmp_path):
    file = write_yaml(tmp_path / "mine.yaml", mixture_recipe())
    output = tmp_path / "made" / "here"
    result = run_analyze(file, "-p", mixture.__file__, "--samples", 16, "--steps", 2, "--ranges", 2, "--output", output)
    assert result.exit_code == 0, result.output
    names = {
        "analysis.json",
        "suggestion.yaml",
        "teacher.png",
        "undecided.png",
        "student.png",
        "conflicts.png",
        "layers.png",
        "sampling.png",
    }
    assert {path.name for path in output.iterdir()} == names
    assert all(str(output / name) in result.output for name in names)

    numbers = json.loads((output / "analysis.json").read_text())
    assert [curves["steps"] for curves in numbers["student"]] == [0, 2]
    assert len(numbers["teacher"]["sigma"]) == 50
    assert numbers["samples"] == 16
    assert numbers["undecided"]["points"] == sorted(numbers["undecided"]["points"])
    assert {25, *numbers["boundaries"]} <= set(numbers["undecided"]["points"])
    assert "boundary 25: undecided of wavelengths in latent cells, by the teacher's estimates: all " in result.output
    suggested = load_recipe(output / "suggestion.yaml", plugins=plugins)
    text = (output / "suggestion.yaml").read_text()
    assert "extends: '../../mine.yaml'" in text
    assert "16 samples, seed 0" in text
    given = load_recipe(file, plugins=plugins)
    assert [boundary.point for boundary in suggested.router.boundaries] == numbers["boundaries"] != [25]
    assert suggested.sample.points == numbers["sampling"]["suggested"]["points"]
    assert numbers["boundaries"][0] in suggested.sample.points
    assert suggested.experts["detail"].targets == ["attention"]
    assert (suggested.backbone, suggested.data, suggested.stages) == (given.backbone, given.data, given.stages)
    assert numbers["sampling"]["own"]["points"] == given.sample.points
    assert numbers["sampling"]["suggested"]["end_error"] < numbers["sampling"]["even"]["end_error"]
    curves = numbers["student"][1]
    assert curves["boundaries"] == numbers["boundaries"]
    assert f"have a cosine of {curves['across'][0]:.2f}" in text
    assert f"above and below, cosine {curves['across'][0]:.2f}" in result.output

    # What was written may have been changed by hand since.
    (output / "suggestion.yaml").write_text("mine")
    again = CliRunner().invoke(cli.cli, ["analyze", str(file), "-p", mixture.__file__, "--output", str(output)])
    assert isinstance(again.exception, UserError)
    assert "already holds an analysis" in str(again.exception)
    assert (output / "suggestion.yaml").read_text() == "mine"
    assert json.loads((output / "analysis.json").read_text()) == numbers


@pytest.mark.usefixtures("quick")
def test_points_are_judged_by_other_samples(plugins, tmp_path, monkeypatch):
    seen = {"chosen": [], "judged": []}

    def error(run, path, noise, cond, batch_size, points):
        seen["chosen" if choosing else "judged"].append(noise.flatten()[0].item())
        return end_error(run, path, noise, cond, batch_size, points)

    def refine(*args):
        nonlocal choosing
        found = refine_points(*args)
        choosing = False
        return found

    choosing = True
    monkeypatch.setattr("moedistill.analysis.study.end_error", error)
    monkeypatch.setattr("moedistill.analysis.study.refine_points", refine)
    result = moedistill.analyze(mixture_recipe(), samples=9, steps=0, output=tmp_path, plugins=plugins, device="cpu")
    assert len(set(seen["chosen"])) == len(set(seen["judged"])) == 1
    assert set(seen["chosen"]) != set(seen["judged"])
    assert len(seen["judged"]) == len(result.sampling) == 3


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("overrides", [[], ["training.batch_size=8"]], ids=["extended", "written out"])
def test_the_share_of_new_noise_stays(overrides, plugins, tmp_path):
    file = write_yaml(tmp_path / "mine.yaml", mixture_recipe(sample={"points": [50, 20], "eta": 0.5}))
    output = tmp_path / "out"
    moedistill.analyze(file, overrides=overrides, samples=1, steps=0, output=output, plugins=plugins, device="cpu")
    assert ("extends" in (output / "suggestion.yaml").read_text()) == (not overrides)
    assert load_recipe(output / "suggestion.yaml", plugins=plugins).sample.eta == 0.5


@pytest.fixture
def quick(monkeypatch):
    """A student measured at a few points, and no plots."""
    monkeypatch.setattr("moedistill.analysis.study.MOST_POINTS", 4)
    monkeypatch.setattr("moedistill.analysis.report.draw", lambda analysis: [])


@pytest.mark.usefixtures("quick")
def test_another_number_of_experts_and_steps(plugins, tmp_path):
    changes = {"overrides": ["training.batch_size=8"], "plugins": plugins, "samples": 8, "device": "cpu"}
    file = write_yaml(tmp_path / "mine.yaml", mixture_recipe())
    result = moedistill.analyze(file, steps=0, experts=3, student_steps=6, seed=5, output=tmp_path / "out", **changes)
    suggested = load_recipe(tmp_path / "out" / "suggestion.yaml", plugins=plugins)
    assert [boundary.point for boundary in suggested.router.boundaries] == result.boundaries
    assert suggested.router.experts == list(suggested.experts) == [stage.expert for stage in suggested.stages]
    assert [expert.kind for expert in suggested.experts.values()] == ["full", "lora", "lora"]
    assert len(suggested.sample.points) == 6
    assert set(result.boundaries) < set(suggested.sample.points)
    assert (suggested.seed, suggested.training.batch_size) == (5, 8)
    assert result.layers is None
    assert result.needs is None
    assert len(result.student) == 1
    assert "own" not in result.sampling
    assert len(result.student[0].points) == 4


@pytest.mark.usefixtures("quick")
def test_a_recipe_with_one_expert(plugins, tmp_path):
    recipe = mixture_recipe(stages=[distil("one")], experts={"one": {"kind": "full"}}, sample=None)
    recipe["router"] = {"kind": "timestep", "experts": ["one"]}
    result = moedistill.analyze(recipe, samples=8, steps=0, output=tmp_path, plugins=plugins, device="cpu")
    suggested = load_recipe(tmp_path / "suggestion.yaml", plugins=plugins)
    assert suggested.router.experts == ["semantic", "detail"]
    assert [boundary.point for boundary in suggested.router.boundaries] == result.boundaries
    assert len(suggested.sample.points) == 4


def test_seed_and_samples_change_the_paths(plugins, tmp_path):
    def remaining(samples=4, seed=0, batch_size=4):
        run = job_of(mixture_recipe(), plugins, tmp_path)
        return follow_teacher(run, *draw_inputs(run, samples, seed), batch_size).remaining.tolist()

    usual = remaining()
    assert usual == pytest.approx(remaining(batch_size=3), rel=1e-5)
    assert usual != remaining(seed=1)
    assert usual != remaining(samples=5)


def test_mistakes(plugins, tmp_path, monkeypatch):
    def error(recipe, **options):
        with pytest.raises(UserError) as caught:
            moedistill.analyze(recipe, output=tmp_path / "none", plugins=plugins, device="cpu", **options)
        return str(caught.value)

    assert "51" in error(mixture_recipe(), experts=51)
    assert "51" in error(mixture_recipe(), student_steps=51)
    stages = [{"name": "samples", "kind": "sample", "prompts": ["x"]}]
    assert "needs data" in error(mixture_recipe(data=None, stages=stages))
    assert "no_such" in error("no_such_recipe")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert "moedistill[plots]" in error(mixture_recipe())
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["dcm_digits", "dcm_wan22_a14b"])
def test_miniatures(name, tmp_path, monkeypatch):
    monkeypatch.setattr("moedistill.analysis.study.TINY", {"samples": 4, "steps": 1, "points": 5})
    result = run_analyze(name, "--smoke", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    suggested, given = load_recipe(tmp_path / "suggestion.yaml"), load_recipe(name)
    assert "random miniature" in (tmp_path / "suggestion.yaml").read_text()
    assert suggested.backbone == given.backbone
    numbers = json.loads((tmp_path / "analysis.json").read_text())
    if name == "dcm_wan22_a14b":  # the teacher's own boundary stays, and the ranges of its networks share no weight
        assert suggested.router == given.router
        assert numbers["boundaries"] == [18]
        assert None in numbers["student"][0]["cosine"][0]
    kinds = {kind["name"] for kind in numbers["layers"]["kinds"]}
    assert any("attn" in kind for kind in kinds)
    assert numbers["smoke"]
    assert len(numbers["student"]) == 2


# -- routers of other kinds -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_routers():
    return load_plugins([mixture.__file__, router_plugin.__file__])


def shares_recipe(**points):
    return mixture_recipe(router={"kind": "shares", "points": points}, sample={"points": [50, 40, 30, 12]})


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("overrides", [[], ["training.batch_size=8"]], ids=["extended", "written out"])
def test_a_router_of_another_kind_stays(overrides, with_routers, tmp_path):
    file, output = write_yaml(tmp_path / "mine.yaml", shares_recipe(semantic=20, detail=30)), tmp_path / "out"
    result = moedistill.analyze(
        file, overrides=overrides, samples=8, steps=1, output=output, plugins=with_routers, device="cpu"
    )
    suggested, text = (
        load_recipe(output / "suggestion.yaml", plugins=with_routers),
        (output / "suggestion.yaml").read_text(),
    )
    assert ("extends" in text) == (not overrides)
    assert suggested.router == load_recipe(file, plugins=with_routers).router
    assert "# The recipe's router is of kind shares, which places its own boundaries: it stays" in text
    # The sampling steps stop where its experts part, not where they would by the teacher's path.
    assert result.boundaries != [30]
    assert 30 in suggested.sample.points
    assert result.layers is not None
    instead = f"{{kind: timestep, experts: [semantic, detail], boundaries: [{{point: {result.boundaries[0]}}}]}}"
    assert f"router: {instead}" in text
    moved = load_recipe(output / "suggestion.yaml", [f"router={instead}"], plugins=with_routers)
    assert [boundary.point for boundary in moved.router.boundaries] == result.boundaries


@pytest.mark.usefixtures("quick")
def test_a_router_of_another_kind_that_is_as_suggested(with_routers, tmp_path):
    options = {"samples": 8, "steps": 0, "plugins": with_routers, "device": "cpu"}
    [point] = moedistill.analyze(mixture_recipe(), output=tmp_path / "first", **options).boundaries
    recipe = shares_recipe(semantic=50 - point, detail=point)
    moedistill.analyze(recipe, output=tmp_path / "second", **options)
    text = (tmp_path / "second" / "suggestion.yaml").read_text()
    assert "# That is the recipe's own boundary." in text
    assert "of kind shares" not in text


@pytest.mark.usefixtures("quick")
def test_for_another_number_of_experts_a_timestep_router_takes_the_place(with_routers, tmp_path):
    recipe = shares_recipe(semantic=20, detail=30)
    result = moedistill.analyze(
        recipe, samples=8, steps=0, experts=3, output=tmp_path, plugins=with_routers, device="cpu"
    )
    suggested = load_recipe(tmp_path / "suggestion.yaml", plugins=with_routers)
    assert suggested.router.kind == "timestep"
    assert [boundary.point for boundary in suggested.router.boundaries] == result.boundaries
    assert [expert.kind for expert in suggested.experts.values()] == ["full", "lora", "lora"]
    text = (tmp_path / "suggestion.yaml").read_text()
    assert "# The recipe's is of kind shares, which places its own; this one takes its place." in text
