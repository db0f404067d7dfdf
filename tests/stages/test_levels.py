"""levels.jsonl: errors and gradients of single samples by noise level, which change nothing of what is learned."""

import json

import pytest
import torch
from helpers import dcm_recipe, digits_batch, distil, set_up_trained, tiny_recipe

from moedistill.flow.trajectory import Trajectory
from moedistill.losses.base import pseudo_huber_of
from moedistill.runs.loop import run
from moedistill.stages.levels import Levels


def lines(folder):
    return [json.loads(line) for line in (folder / "levels.jsonl").read_text().splitlines()]


def test_errors_and_gradients_are_those_of_each_sample():
    """Of two micro-batches, by the mean square of a jump's d, which has the term (end - sigma)·v."""
    training, stage = set_up_trained("semantic", {"training.gradient_accumulation_steps": 2}, losses=[{"kind": "mse"}])
    expected, jumps = [], stage.jumps

    def noted(*given):
        made = jumps(*given)
        size = made.difference[0].numel()
        for difference, sigma, end in zip(made.difference.detach(), made.sigma, made.end, strict=True):
            norm = 2 * (sigma - end) * difference.norm() / size
            expected.append((sigma, difference.square().mean().item(), norm.item()))
        return made

    stage.jumps = noted
    for seed in range(2):
        with training.micro_batch():
            stage.step(training, digits_batch(training, seed=seed))
    found = training.levels.take()
    assert sum(found["samples"]) == len(expected) == 8
    for point, samples, error, gradient in zip(*found.values(), strict=True):
        there = [rest for sigma, *rest in expected if sigma == training.trajectory.points[point]]
        squares, norms = zip(*there, strict=True)
        assert len(squares) == samples
        assert error == pytest.approx((sum(squares) / samples) ** 0.5, rel=1e-5)
        assert gradient == pytest.approx(sum(norms) / samples, rel=1e-4)
    assert training.levels.take() == {}


def test_a_gradient_is_that_of_the_samples_own_loss():
    levels = Levels(Trajectory([0.1, 0.4, 0.7, 1.0]), torch.device("cpu"))
    velocity = torch.randn(3, 2, 1, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    sigma = torch.tensor([0.4, 0.4, 0.9])
    levels.add_errors(sigma, velocity)
    seen = 2 * velocity
    levels.watch(seen, sigma, 1 / 6)  # as of two micro-batches of three
    (pseudo_huber_of(seen) / 2).backward()
    found = levels.take()
    alone = []
    for one in velocity.detach():
        own = (2 * one).requires_grad_()
        pseudo_huber_of(own).backward()
        alone.append(own.grad.norm().item())
    assert found["point"] == [1, 3]  # 0.9 counts at the next point above
    assert found["samples"] == [2, 1]
    assert found["gradient"] == pytest.approx([(alone[0] + alone[1]) / 2, alone[2]], rel=1e-5)
    assert found["error"][1] == pytest.approx(velocity[2].square().mean().sqrt().item(), rel=1e-5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    recipe = dcm_recipe(4, **{"training.log_every": 3, "training.checkpoint_every": 2})
    return run(recipe, output=tmp_path_factory.mktemp("levels") / "run", device="cpu").output


def test_a_run_writes_every_sample_once_within_the_experts_segment(whole):
    for stage, points in (("semantic", range(5, 9)), ("detail", range(1, 5))):
        own = [line for line in lines(whole) if line["stage"] == stage]
        assert [line["step"] for line in own] == [2, 3, 4]  # at a checkpoint, too
        assert sum(sum(line["samples"]) for line in own) == 4 * 4
        assert {point for line in own for point in line["point"]} <= set(points)
        for name in ("error", "gradient"):  # a jump of the teacher's own step may miss nothing yet
            values = [value for line in own for value in line[name]]
            assert min(values) >= 0 < max(values)


def test_they_go_on_where_a_run_does(whole, tmp_path):
    recipe = dcm_recipe(4, **{"training.log_every": 3, "training.checkpoint_every": 2})
    run(recipe, output=tmp_path, resume_from=whole / "checkpoints" / "01_detail_00000002", device="cpu")
    assert lines(tmp_path) == lines(whole)


def test_training_learns_the_same_bits_without_them(tmp_path, monkeypatch):
    recipe = tiny_recipe([distil(), distil("detail")])
    run(recipe, output=tmp_path / "with", device="cpu")
    monkeypatch.setattr(Levels, "add_errors", lambda *_: None)
    monkeypatch.setattr(Levels, "watch", lambda *_: None)
    run(recipe, output=tmp_path / "without", device="cpu")
    assert not (tmp_path / "without/levels.jsonl").exists()
    for name in ("metrics.jsonl", "checkpoints/01_detail_00000002/experts.safetensors"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes(), name
