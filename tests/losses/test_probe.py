"""Taps of a network's blocks, and the probe: what the teacher makes of the re-noised prediction and target."""

import pytest
import torch
from helpers import digits_batch, digits_inputs, digits_mixture, distil, set_up, tiny_recipe, velocity_of
from torch.utils.checkpoint import set_checkpoint_early_stop

from moedistill.model.backbone import TEACHER
from moedistill.model.capture import capture
from moedistill.model.experts import FullConfig, LoRAConfig

EXPERTS = {"full": FullConfig(), "lora": LoRAConfig(rank=2, alpha=4.0)}
BLOCKS = ("blocks.0", "blocks.1")
PROBING = {"losses": [{"kind": "feature_matching"}], "probe": {"block_stride": 1}}


@pytest.fixture(scope="module")
def mixture():
    return digits_mixture(**EXPERTS)


# --- Taps


def num_hooks(network):
    return sum(len(module._forward_hooks) for module in network.modules())


@pytest.mark.parametrize("paths", [["blocks.0"], ["blocks.1"], ["blocks.0", "blocks.1"], ["blocks.1", "blocks.0"]])
def test_taps_come_once_each_in_the_order_in_which_blocks_run(mixture, paths):
    network, (x, sigma, cond) = mixture.backbone.network, digits_inputs()
    alone = {}
    for path in paths:
        with capture(network, [path]) as outputs:
            mixture(x, sigma, cond)
        [alone[path]] = outputs
    with capture(network, paths) as outputs:
        assert num_hooks(network) == len(paths)
        mixture(x, sigma, cond)
    assert num_hooks(network) == 0
    assert len(outputs) == len(paths)
    for path, output in zip(sorted(paths), outputs, strict=True):
        assert output.shape == (2, 64, 16)
        assert torch.equal(output, alone[path])


def test_hooks_are_gone_after_an_exception(mixture):
    network = mixture.backbone.network
    with pytest.raises(RuntimeError), capture(network, BLOCKS):
        raise RuntimeError
    with pytest.raises(AttributeError, match="3"), capture(network, [*BLOCKS, "blocks.3"]):
        pass
    assert num_hooks(network) == 0


def test_taps_carry_gradients(mixture):
    mixture.train_only("lora")
    x, sigma, cond = digits_inputs()
    x.requires_grad_()
    with mixture.using("lora"):
        states = mixture.hidden_states(x, sigma, cond, BLOCKS)
    for state in states:
        for wanted in (x, mixture.experts["lora"].parameters["blocks.0.attn.to_q.lora_B.weight"]):
            [gradient] = torch.autograd.grad(state.square().mean(), wanted, retain_graph=True)
            assert gradient.abs().max() > 0


def test_recomputed_blocks_are_not_tapped_twice():
    mixture = digits_mixture(gradient_checkpointing=True, **EXPERTS)
    mixture.train_only("lora")
    x, sigma, cond = digits_inputs()
    calls = []
    network = mixture.backbone.network
    network.get_submodule("blocks.0").register_forward_hook(lambda *_: calls.append(1))
    # By default the recomputation stops inside of a block, as soon as it can.
    with mixture.using("lora"), capture(network, BLOCKS) as outputs, set_checkpoint_early_stop(False):
        mixture(x, sigma, cond).square().mean().backward()
        assert len(calls) == 2
        assert len(outputs) == 2
        mixture(x, sigma, cond)
        assert len(outputs) == 4


@pytest.mark.parametrize("expert", [TEACHER, *EXPERTS])
def test_unembedding_the_last_block_gives_the_velocity(mixture, expert):
    inputs = digits_inputs()
    with mixture.using(expert), torch.no_grad():
        first, last = mixture.hidden_states(*inputs, BLOCKS)
        assert torch.equal(mixture.unembed(last, *inputs), velocity_of(mixture, expert, inputs))
        assert not torch.equal(mixture.unembed(first, *inputs), velocity_of(mixture, expert, inputs))


# --- The probe


def probing(dtype="float32", **changes):
    """A run of a semantic stage with a probe; it starts at points 5 to 8 and lands on 4."""
    recipe = tiny_recipe([distil(**{**PROBING, **changes})], {"backbone.dtype": dtype})
    return set_up(recipe)[0]


@pytest.fixture(scope="module")
def training():
    return probing()


def landings(training, points):
    """Sigmas of points."""
    return training.trajectory.points[torch.tensor(points)]


def probed(training, batch=4):
    """A prediction, a target and their conditioning, in a step of `run`."""
    step = digits_batch(training, batch)
    return step.latents, digits_inputs(batch, seed=1)[0], step.conditioning


def test_the_probe_reads_the_teacher_and_lets_gradients_through_the_fake_half_only(training):
    prediction, target, cond = probed(training)
    prediction.requires_grad_()
    target.requires_grad_()
    with training.mixture.using("semantic"):
        probe = training.probe(prediction, target, landings(training, [4, 4, 4, 4]), cond, 1)
        latents = probe.latent_prediction, probe.latent_target
        assert training.mixture.active == "semantic"
    assert probe.grid == (4, 4, 4)
    for tensors in (probe.hidden_prediction, probe.latent_prediction):
        assert len(tensors) == 2
        for tensor in tensors:
            assert torch.autograd.grad(tensor.sum(), prediction, retain_graph=True)[0].abs().max() > 0
    assert not any(tensor.requires_grad for tensor in [*probe.hidden_target, *probe.latent_target])
    assert probe.latent_prediction is latents[0]
    assert probe.latent_target is latents[1]

    detached = probe.detached()
    for name in ("hidden_prediction", "hidden_target", "latent_prediction", "latent_target"):
        for plain, tensor in zip(getattr(detached, name), getattr(probe, name), strict=True):
            assert not plain.requires_grad
            assert torch.equal(plain, tensor)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latent_features_of_the_last_block_are_the_teachers_velocity(dtype):
    training = probing(dtype)
    prediction, target, cond = probed(training)
    ends = landings(training, [4, 5, 6, 7])
    probe = training.probe(prediction, target, ends, cond, 1)
    sigma = sigma_of(probe, prediction, target, ends)
    for x, latents in ((probe.prediction, probe.latent_prediction), (probe.target, probe.latent_target)):
        assert {latent.dtype for latent in latents} == {torch.float32}
        velocity = velocity_of(training.mixture, TEACHER, (x, sigma, cond))
        # In bfloat16 a hidden state that was float32 for a moment is the same one.
        torch.testing.assert_close(latents[-1], velocity, rtol=0, atol=1e-6 if dtype == "float32" else 1e-2)
        assert (latents[0] - velocity).abs().max() > 1e-3


def sigma_of(probe, prediction, target, ends):
    """The noise level `[B]` of a probe: by it the difference of the two has shrunk, as both got the same noise."""
    ratio = ((probe.prediction - probe.target) / (prediction - target)).flatten(1).median(1).values
    return 1 - ratio * (1 - ends)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_every_strideth_block_is_tapped_from_the_first(training, stride):
    x, _, cond = probed(training)
    probe = training.probe(x, x, landings(training, [4] * 4), cond, stride)
    assert len(probe.hidden_prediction) == [2, 1, 1][stride - 1]
    assert torch.equal(
        probe.hidden_prediction[0], training.probe(x, x, landings(training, [4] * 4), cond, 1).hidden_prediction[0]
    )


@pytest.mark.parametrize("land", [4, 5, 7])
def test_the_probe_renoises_both_alike_to_a_point_between_landing_and_top(training, monkeypatch, land):
    monkeypatch.setattr(training.mixture, "hidden_states", lambda *_: [])
    prediction, target, cond = probed(training, 400)
    ends = landings(training, [land] * 400)
    probe = training.probe(prediction, target, ends, cond, 1)
    points = training.trajectory.points
    sigma = sigma_of(probe, prediction, target, ends)
    j = (sigma[:, None] - points).abs().argmin(1)
    torch.testing.assert_close(sigma, points[j], rtol=0, atol=1e-5)
    counts = torch.bincount(j, minlength=9).tolist()
    allowed = range(land, 8)
    assert sum(counts[k] for k in allowed) == 400
    assert all(0.6 < counts[k] * len(allowed) / 400 < 1.4 for k in allowed)

    keep = ((1 - points[j]) / (1 - ends)).view(-1, 1, 1, 1, 1)
    noise = [(y_a - keep * y)[j > land] for y_a, y in ((probe.prediction, prediction), (probe.target, target))]
    torch.testing.assert_close(*noise, rtol=0, atol=1e-5)
    if land < 7:
        noise = noise[0] / ((points[j] - ends) / (1 - ends))[j > land].view(-1, 1, 1, 1, 1)
        assert abs(noise.mean().item()) < 0.02
        assert abs(noise.std().item() - 1) < 0.02
        assert not torch.equal(noise[0], noise[1])
    torch.testing.assert_close(probe.prediction[j == land], prediction[j == land])


def test_the_probe_is_computed_only_when_a_loss_that_counts_wants_it():
    losses = [{"kind": "huber"}, {"kind": "feature_matching", "start": 1}]
    training = probing(losses=losses)
    assert not training.probe_wanted
    training.step = 1
    assert training.probe_wanted
