import math
import warnings

import pytest
import torch

from moedistill.losses.base import (
    AdversarialLoss,
    HuberConfig,
    Loss,
    MSEConfig,
    StepTensors,
    pseudo_huber,
    pseudo_huber_of,
)
from moedistill_dcm.losses import (
    FeatureMatchingConfig,
    TemporalCoherenceConfig,
    feature_matching,
    hinge_critic,
    hinge_generator,
    temporal_coherence,
)

SHAPE = (2, 3, 5, 4, 4)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=generator) for _ in range(2)]


def step_tensors(difference, probe=None):
    """The prediction and the target say nothing here: core losses read the difference."""
    return StepTensors(
        torch.zeros_like(difference), torch.zeros_like(difference), difference, torch.ones(2), probe=probe
    )


# --- Pseudo-Huber and MSE


def test_pseudo_huber_by_hand():
    prediction, target = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.0])
    assert pseudo_huber(prediction, target, c=4.0).item() == pytest.approx((5 - 4) / 2)
    assert pseudo_huber(prediction, target).item() == pytest.approx((math.hypot(3, 1e-3) - 1e-3) / 2)


def test_pseudo_huber_keeps_its_digits_at_small_differences():
    """sqrt(d² + c²) - c in float32 would give 0 here."""
    difference = torch.full((4,), 1e-7)
    assert pseudo_huber_of(difference).item() == pytest.approx(1e-14 / 2e-3, rel=1e-5)
    assert pseudo_huber_of(torch.zeros(4)).item() == 0.0


def test_pseudo_huber_gradient():
    difference = torch.tensor([-2.0, 0.0, 1e-3, 5.0], requires_grad=True)
    pseudo_huber_of(difference).backward()
    expected = difference.detach() / torch.sqrt(difference.detach() ** 2 + 1e-6) / 4
    torch.testing.assert_close(difference.grad, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("c", [0.0, -1.0, float("nan")])
def test_c_must_be_positive(c, pair):
    with pytest.raises(ValueError, match="must be positive"):
        pseudo_huber(*pair, c=c)


@pytest.mark.parametrize("loss", [pseudo_huber, temporal_coherence, lambda p, t: feature_matching([p], [t])])
def test_scalars_are_float32_and_shapes_must_fit(loss, pair):
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        value = loss(*(tensor.to(dtype) for tensor in pair))
        assert value.dtype == torch.float32
        assert value.shape == ()
    # The difference of bf16 tensors is not rounded to bf16.
    low = [tensor.bfloat16() for tensor in pair]
    assert torch.equal(loss(*low), loss(*(tensor.float() for tensor in low)))
    with pytest.raises(ValueError, match=r"\[2, 3, 5, 4, 4\].*\[1, 3, 5, 4, 4\]"):
        loss(pair[0], pair[1][:1])


def test_core_losses_read_the_difference(pair):
    difference = pair[0] - pair[1]
    tensors = step_tensors(difference)
    assert torch.equal(HuberConfig(c=0.5).build(None)(tensors), pseudo_huber(*pair, c=0.5))
    assert HuberConfig().build(None)(tensors) != HuberConfig(c=0.5).build(None)(tensors)
    mse = MSEConfig().build(None)(tensors)
    torch.testing.assert_close(mse, torch.nn.functional.mse_loss(*pair), rtol=1e-6, atol=0)
    assert mse.dtype == torch.float32


# --- Weights


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1.0, 1.0, 1.0, 1.0]),
        ({"weight": 0.5}, [0.5, 0.5, 0.5, 0.5]),
        ({"weight": 2.0, "start": 4}, [0.0, 2.0, 2.0, 2.0]),
        ({"start": 4, "warmup": 3}, [0.0, 0.25, 1.0, 1.0]),
        ({"schedule": "linear"}, [1.0, 0.6, 0.3, 0.0]),
        ({"schedule": "linear", "start": 4}, [0.0, 1.0, 0.5, 0.0]),
        ({"schedule": "cosine", "start": 4}, [0.0, 1.0, 0.5, 0.0]),
    ],
)
def test_weight_at(settings, expected):
    config = HuberConfig(**settings)
    assert [config.weight_at(step, 10) for step in (0, 4, 7, 10)] == pytest.approx(expected)


# --- Temporal coherence


def test_temporal_coherence_by_hand():
    frames = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]).view(1, 1, 5, 1, 1)
    zeros = torch.zeros_like(frames)
    assert temporal_coherence(frames, zeros).item() == (7**2 + 14**2) / 2
    assert temporal_coherence(frames, zeros, lag=1).item() == (1 + 4 + 16 + 64) / 4
    # A constant offset between prediction and target is not its affair.
    assert temporal_coherence(frames + 3, frames).item() == 0.0


def test_temporal_coherence_of_too_few_frames_is_zero_and_says_so_once(pair):
    short = (pair[0] - pair[1])[:, :, :3].requires_grad_()
    value = temporal_coherence(short, torch.zeros_like(short))
    assert value.item() == 0.0
    value.backward()
    assert torch.equal(short.grad, torch.zeros_like(short))
    loss = TemporalCoherenceConfig(lag=3).build(None)
    with pytest.warns(UserWarning, match="lag 3 needs more than 3 latent frames, and the videos have 3"):
        assert loss(step_tensors(short)).item() == 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(step_tensors(short))
        assert TemporalCoherenceConfig(lag=2).build(None)(step_tensors(short)).item() > 0


def test_temporal_coherence_refuses_what_is_no_video(pair):
    with pytest.raises(ValueError, match=r"\[B, C, T, H, W\]"):
        temporal_coherence(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="at least 1 frame"):
        temporal_coherence(*pair, lag=0)


# --- Hinge


def test_hinge_by_hand():
    fake = [torch.tensor([0.0, 3.0]), torch.tensor([-1.0])]
    real = [torch.tensor([2.0, 0.0]), torch.tensor([0.5])]
    assert hinge_generator(fake).item() == ((1 + 0) / 2 + 2) / 2
    assert hinge_generator(fake, clip=False).item() == ((1 - 2) / 2 + 2) / 2
    # Heads count alike, however many logits each has.
    assert hinge_critic(fake, real).item() == (((1 + 4) / 2 + (0 + 1) / 2) + (0 + 0.5)) / 2
    assert hinge_generator([f.bfloat16() for f in fake]).dtype == torch.float32


def test_the_critic_learns_to_tell_and_the_student_to_pass():
    fake, real = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    hinge_critic([fake], [real]).backward()
    assert (fake.grad > 0).all()
    assert (real.grad < 0).all()
    fake.grad = None
    hinge_generator([fake]).backward()
    assert (fake.grad < 0).all()


def test_heads_must_pair_up(pair):
    with pytest.raises(ValueError, match="2 and 1 heads"):
        hinge_critic(pair, pair[:1])
    with pytest.raises(ValueError, match="2 and 1 heads"):
        feature_matching(pair, pair[:1])
    with pytest.raises(ValueError, match="0 heads"):
        hinge_generator([])


# --- Feature matching


def test_feature_matching_is_the_mean_over_all_elements():
    fake = [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([3.0])]
    real = [torch.zeros(3), torch.zeros(1)]
    assert feature_matching(fake, real).item() == (3 * 1 + 9) / 4


def test_no_gradient_reaches_the_real_features(pair):
    fake, real = (tensor.clone().requires_grad_() for tensor in pair)
    feature_matching([fake], [real]).backward()
    assert real.grad is None
    torch.testing.assert_close(fake.grad, 2 * (pair[0] - pair[1]) / pair[0].numel())


class Probe:
    grid = (5, 2, 2)

    def __init__(self, pair):
        self.hidden_prediction, self.hidden_target = [pair[0].flatten(2)], [pair[1].flatten(2)]
        self.latent_prediction, self.latent_target = [2 * pair[0]], [2 * pair[1]]

    def detached(self):
        return "detached"


def test_feature_matching_space(pair):
    tensors = step_tensors(pair[0], probe=Probe(pair))
    hidden = FeatureMatchingConfig(space="hidden").build(None)(tensors)
    torch.testing.assert_close(FeatureMatchingConfig().build(None)(tensors), 4 * hidden)
    with pytest.raises(ValueError, match="must have a probe"):
        FeatureMatchingConfig().build(None)(step_tensors(pair[0]))
    assert FeatureMatchingConfig.needs_probe
    assert not TemporalCoherenceConfig.needs_probe
    assert not HuberConfig.needs_probe


# --- Contracts


def test_detached_tensors_carry_no_gradient(pair):
    x = pair[0].requires_grad_()
    tensors = StepTensors(x * 2, x * 3, -x, torch.ones(2), segment=None, probe=Probe(pair))
    detached = tensors.detached()
    for name in ("prediction", "target", "difference"):
        assert not getattr(detached, name).requires_grad
        assert torch.equal(getattr(detached, name), getattr(tensors, name))
    assert detached.probe == "detached"
    assert step_tensors(x).detached().probe is None


def test_an_adversarial_loss_is_a_loss_with_a_critic_objective():
    assert issubclass(AdversarialLoss, Loss)
    assert AdversarialLoss.__abstractmethods__ == {"__call__", "critic_loss"}
    with pytest.raises(TypeError):
        AdversarialLoss()
