"""What a detail step keeps of the teacher's features, counted: each state once in its own dtype, and little beside.

The widths are to each other as in HunyuanVideo: a token of the latents has a twelfth of a state's bytes, a GAN's head a
third of its width. Counted in states, `tokens × hidden × 2` bytes for each tap. It was 5 after the probe, 11 after the
objective, and up to 16 in the critic's part, when features were handed on in float32, and what all heads and all final
layers keep for the backward pass was there at once.
"""

import pytest
import torch
from helpers import digits_backbone, digits_inputs
from torch import nn

from moedistill import Mixture, OptimizerConfig, ProbeLayout, StepTensors
from moedistill.losses.probe import probe
from moedistill.runs.planning.tracker import Tracker
from moedistill_dcm.gan import GANConfig
from moedistill_dcm.losses import FeatureMatchingConfig

TAPS, HIDDEN, HEAD = 6, 768, 256
GRID = (4, 12, 16)
TOKENS = 4 * 12 * 16
SHAPE = (1, 16, 4, 24, 32)
TAP = TOKENS * HIDDEN * 2


class Features(nn.Module):
    """In place of a teacher: blocks without weights, and final layers whose weights are constants, in bfloat16."""

    def __init__(self):
        super().__init__()
        self.register_buffer("into", torch.randn(64, HIDDEN).to(torch.bfloat16) / 8)
        self.register_buffer("out", torch.randn(HIDDEN, 64).to(torch.bfloat16) / 28)

    def states(self, x):
        """States after each block, whose intermediate results are recomputed, as with gradient checkpointing."""
        patches = x.to(torch.bfloat16).unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 2, 3, 5, 1, 4, 6)
        states, found = patches.flatten(4).flatten(1, 3) @ self.into, []
        for _ in range(TAPS):
            states = torch.utils.checkpoint.checkpoint(lambda h: h + h.roll(1, -1).tanh(), states, use_reentrant=False)
            found.append(states)
        return found

    def unembed(self, hidden, x):
        """Norm, modulation, projection, unpatchify."""
        patches = (nn.functional.layer_norm(hidden, (HIDDEN,)) * 1.1 + 0.1) @ self.out
        patches = patches.unflatten(1, GRID).unflatten(-1, (16, 2, 2)).permute(0, 4, 1, 2, 5, 3, 6)
        return patches.flatten(5, 6).flatten(3, 4).float()


@pytest.fixture(scope="module")
def step():
    torch.manual_seed(0)
    return Features(), torch.randn(SHAPE).requires_grad_(), torch.randn(SHAPE), torch.randn(SHAPE)


def test_a_mixture_hands_states_on_as_its_blocks_give_them():
    mixture = Mixture(digits_backbone("bfloat16"), {}, autocast_dtype=torch.bfloat16)
    x, sigma, cond = digits_inputs()
    states = mixture.hidden_states(x, sigma, cond, mixture.backbone.blocks)
    assert {one.dtype for one in states} == {torch.bfloat16}
    assert mixture.unembed(states[-1], x, sigma, cond).dtype == torch.float32


def test_weights_that_are_cast_are_not_kept():
    """Else a full expert in float32 has a copy in bfloat16 until the end of the forward pass."""
    mixture = Mixture(digits_backbone("bfloat16"), {}, autocast_dtype=torch.bfloat16)
    assert torch.is_autocast_cache_enabled()
    with mixture.autocast(torch.device("cpu")):
        assert not torch.is_autocast_cache_enabled()


def probed(step):
    features, prediction, target, noise = step
    end, sigma = torch.tensor([0.1]), torch.tensor([0.6])
    return probe(
        prediction, target, end=end, sigma=sigma, noise=noise, read=features.states, unembed=features.unembed, grid=GRID
    )


def tensors_of(step, found):
    _, prediction, target, _ = step
    return StepTensors(prediction, target, prediction - target, torch.tensor([0.9]), None, found)


def losses():
    layout = ProbeLayout(TAPS, HIDDEN)
    torch.manual_seed(1)
    gan = GANConfig(width=HEAD, groups=32, optimizer=OptimizerConfig(lr=1e-3)).build(layout)
    return gan, FeatureMatchingConfig().build(layout)


def test_states_are_kept_once_and_what_is_made_of_them_one_by_one(step):
    (gan, matching), alive = losses(), Tracker()

    def states(size):
        return size / (TAPS * TAP)

    with alive, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        tensors = tensors_of(step, probed(step))
        after_probe = states(alive.now())
        loss = gan(tensors) + matching(tensors)
        after_objective = states(alive.now())
        [gradient] = torch.autograd.grad(loss, [step[1]])
        del loss
        before, alive.peak = states(alive.now()), 0
        gan.critic_loss(gan.critic, tensors.detached()).backward()
        in_the_critic = states(alive.peak)
    assert gradient.abs().max() > 0
    weights = states(sum(parameter.nbytes for parameter in gan.critic.parameters()))
    print(
        f"{after_probe:.2f} after the probe, {after_objective:.2f} after the objective, {in_the_critic - weights:.2f}"
    )
    assert 2.0 <= after_probe <= 2.6
    assert after_objective <= 3.2
    assert before <= 2.6
    assert in_the_critic - weights <= 4.0  # their gradients, float32, are not features


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_those_of_everything_at_once(step, dtype):
    """Heads and final layers applied without recomputing, both halves in one."""
    gan, matching = losses()
    features, prediction = step[0], step[1]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        tensors = tensors_of(step, probed(step))
        if dtype == torch.float32:  # what the losses do, apart from the features' dtype
            found = tensors.probe
            found.hidden_prediction = [one.float() for one in found.hidden_prediction]
            found.hidden_target = [one.float() for one in found.hidden_target]
            found.unembed = lambda hidden, x: features.unembed(hidden.to(torch.bfloat16), x)
        found = tensors.probe

        def logits(hidden):
            shaped = [one.unflatten(1, GRID).flatten(0, 1).permute(0, 3, 1, 2) for one in hidden]
            return [head(one).float() for head, one in zip(gan.critic.heads, shaped, strict=True)]

        own = gan(tensors) + matching(tensors)
        [own_gradient] = torch.autograd.grad(own, [prediction], retain_graph=True)
        fake, real = ([found.unembed(h, None) for h in side] for side in (found.hidden_prediction, found.hidden_target))
        generator = torch.stack([(1 - one).relu().mean() for one in logits(found.hidden_prediction)]).mean()
        wanted = generator + torch.stack([(f - r.detach()).square() for f, r in zip(fake, real, strict=True)]).mean()
        [gradient] = torch.autograd.grad(wanted, [prediction])
        torch.testing.assert_close(own, wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(own_gradient, gradient, rtol=1e-6, atol=1e-6 * gradient.abs().max().item())

        detached = tensors.detached()
        both = [torch.cat(pair) for pair in zip(detached.probe.hidden_prediction, found.hidden_target, strict=True)]
        halves = [one.chunk(2) for one in logits(both)]
        wanted = torch.stack([(1 + f).relu().mean() + (1 - r).relu().mean() for f, r in halves]).mean()
        own = gan.critic_loss(gan.critic, detached)
        torch.testing.assert_close(own, wanted, rtol=1e-6, atol=1e-6)
        weights = list(gan.critic.parameters())
        found_all, wanted_all = torch.autograd.grad(own, weights), torch.autograd.grad(wanted, weights)
    tolerance = 1e-6 if dtype == torch.float32 else 5e-3  # sums in another order, of bfloat16
    for one, other in zip(found_all, wanted_all, strict=True):
        assert (one - other).abs().max() <= tolerance
