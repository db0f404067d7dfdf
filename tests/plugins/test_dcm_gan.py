"""DCM's adversarial loss: who gets gradients, any grid, the clip, and that critic and student learn from it."""

import pytest
import torch
from helpers import as_if_trained, digits_batch, distil, set_up, tiny_recipe
from torch import nn
from torch.nn.functional import relu

from moedistill.errors import RecipeError
from moedistill.losses.base import ProbeLayout, StepTensors
from moedistill.losses.probe import Probe
from moedistill.recipe.loading import load_recipe
from moedistill_dcm.gan import GANConfig


def make_gan(taps=2, hidden_size=6, **settings):
    return GANConfig(**{"width": 8, "groups": 2, **settings}).build(ProbeLayout(taps, hidden_size))


def probe_of(fake, real, grid):
    """What a loss sees of features `[B, tokens, hidden_size]`, one of each per tap."""
    x = torch.zeros(())
    return StepTensors(x, x, x, x, probe=Probe(list(fake), list(real), x, x, grid, unembed=None))


def random_features(grid, taps=2, batch=3, hidden_size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    t, h, w = grid
    return [torch.randn(batch, t * h * w, hidden_size, generator=generator) for _ in range(taps)]


GRID = (2, 3, 4)


# --- Who gets gradients


@pytest.mark.parametrize("clip", [True, False])
def test_the_students_term_reaches_the_student_and_never_the_critic(clip):
    gan = make_gan(clip=clip)
    fake = [states.requires_grad_() for states in random_features(GRID)]
    real = [states.requires_grad_() for states in random_features(GRID, seed=1)]
    gan(probe_of(fake, real, GRID)).backward()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in gan.critic.parameters())
    assert all(states.grad.abs().sum() > 0 for states in fake)
    assert all(states.grad is None for states in real)


def test_the_critics_loss_reaches_every_weight_of_the_critic():
    gan = make_gan()
    gan.critic_loss(gan.critic, probe_of(random_features(GRID), random_features(GRID, seed=1), GRID)).backward()
    # What moves all logits of a head alike may be pulled both ways by as much, while all margins are open.
    reached = {name: parameter.grad.abs().max() > 0 for name, parameter in gan.critic.named_parameters()}
    assert {name for name, there in reached.items() if not there} <= {"heads.0.conv_out.bias", "heads.1.conv_out.bias"}


# --- Formulas


def logits_by_hand(head, states, grid):
    """The head applied place by place: 1×1 convolutions are linears, group norms run over one frame."""
    t, h, w = grid
    frames = states.reshape(len(states) * t, h * w, -1)

    def normed(x, norm):
        grouped = x.unflatten(2, (norm.num_groups, -1))
        centred = grouped - grouped.mean((1, 3), keepdim=True)
        scaled = centred / (centred.square().mean((1, 3), keepdim=True) + 1e-5).sqrt()
        return scaled.flatten(2) * norm.weight + norm.bias

    def linear(x, conv):
        return x @ conv.weight.flatten(1).T + conv.bias

    def leaky(x):
        return torch.where(x > 0, x, 0.01 * x)

    hidden = leaky(normed(linear(frames, head.conv1), head.norm1))
    hidden = leaky(normed(linear(hidden, head.conv2), head.norm2)) + hidden
    return linear(hidden, head.conv_out).reshape(len(states) * t, 1, h, w)


@pytest.mark.parametrize("grid", [(2, 3, 4), (1, 1, 5), (5, 2, 1), (3, 8, 6)])
def test_the_heads_work_at_any_grid_and_frame_by_frame(grid):
    gan = make_gan()
    with torch.no_grad():
        for parameter in gan.critic.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    fake, real = random_features(grid), random_features(grid, seed=1)
    logits = gan.critic(fake, grid)
    for head, states, ours in zip(gan.critic.heads, fake, logits, strict=True):
        torch.testing.assert_close(ours, logits_by_hand(head, states, grid), rtol=1e-4, atol=1e-5)
    tensors = probe_of(fake, real, grid)
    expected = sum(relu(1 - head).mean() for head in logits) / 2
    torch.testing.assert_close(gan(tensors), expected)
    real_logits = gan.critic(real, grid)
    expected = sum(relu(1 + f).mean() + relu(1 - r).mean() for f, r in zip(logits, real_logits, strict=True)) / 2
    torch.testing.assert_close(gan.critic_loss(gan.critic, tensors), expected)


@pytest.mark.parametrize(("clip", "stops"), [(True, True), (False, False)])
def test_a_sample_that_convinces_is_pushed_further_only_without_the_clip(clip, stops):
    gan = make_gan(clip=clip)
    for head in gan.critic.heads:
        nn.init.constant_(head.conv_out.bias, 50.0)
    fake = [states.requires_grad_() for states in random_features(GRID)]
    value = gan(probe_of(fake, fake, GRID))
    value.backward()
    assert (value.item() == 0.0) == stops
    assert all((states.grad.abs().sum() == 0).item() == stops for states in fake)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="width 10 is not a multiple of groups 4"):
        GANConfig(width=10, groups=4)
    with pytest.raises(ValueError, match=r"zip\(\)"):
        make_gan(taps=2).critic(random_features(GRID, taps=3), GRID)
    gan = {"kind": "gan", "critic_updates": 2}
    recipe = tiny_recipe([distil(losses=[gan], probe={"block_stride": 1})], {"training.gradient_accumulation_steps": 2})
    with pytest.raises(RecipeError, match=r"critic_updates.*: 2 needs training.gradient_accumulation_steps 1, not 2"):
        load_recipe(recipe)


# --- Learning


def test_the_critic_learns_to_tell_and_then_moves_the_student_towards_real():
    """Real and fake are noise around two directions in feature space; the student owns where the fake ones lie."""
    torch.manual_seed(0)
    gan, grid, noise = make_gan(taps=1, hidden_size=6), (2, 2, 2), torch.Generator().manual_seed(0)
    real_mean = torch.tensor([1.0, -1.0, 1.0, 0.0, 0.0, 0.0])
    fake_mean = nn.Parameter(-real_mean)

    def batch(mean, size=16):
        return [mean + torch.randn(size, 8, 6, generator=noise)]

    optimizer = torch.optim.Adam(gan.critic.parameters(), lr=5e-3, betas=(0.0, 0.999))

    def train_critic():
        optimizer.zero_grad()
        gan.critic_loss(gan.critic, probe_of(batch(fake_mean.detach()), batch(real_mean), grid)).backward()
        optimizer.step()

    def accuracy():
        with torch.no_grad():
            fake, real = (gan.critic(batch(mean, 200), grid)[0] for mean in (fake_mean, real_mean))
        return ((fake < 0).float().mean() + (real > 0).float().mean()).item() / 2

    assert accuracy() < 0.7
    for _ in range(200):
        train_critic()
    assert accuracy() > 0.9

    mixture = torch.optim.Adam([fake_mean], lr=2e-2)
    distance = (fake_mean - real_mean).norm().item()
    for _ in range(100):
        mixture.zero_grad()
        gan(probe_of(batch(fake_mean), batch(real_mean), grid)).backward()
        mixture.step()
        train_critic()
    assert (fake_mean - real_mean).norm().item() < 0.5 * distance
    assert accuracy() < 0.85


# --- In a stage


def detail_run(dtype="float32", steps=4, **gan):
    losses = [{"kind": "huber"}, {"kind": "gan", "width": 8, "groups": 2, **gan}]
    stages = [distil("semantic"), distil("detail", losses=losses, probe={"block_stride": 1}, steps=steps)]
    training, stage = set_up(tiny_recipe(stages, {"backbone.dtype": dtype}), 1)
    for name in ("semantic", "detail"):
        as_if_trained(training.mixture.experts[name], 0)
    return training, stage


def copies(tensors):
    return {name: tensor.detach().clone() for name, tensor in dict(tensors).items()}


def changed(tensors, before):
    return {name for name, tensor in dict(tensors).items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_update_moves_its_own_weights_only(dtype):
    training, stage = detail_run(dtype)
    critic, mixture = training.terms[1].loss.critic, training.mixture
    update, seen = training.update, []

    def watched(name, loss):
        before = copies(mixture.named_parameters()), copies(critic.named_parameters())
        update(name, loss)
        seen.append(name)
        moved = changed(mixture.named_parameters(), before[0]), changed(critic.named_parameters(), before[1])
        assert bool(moved[0]) == (name == "student")
        # Fake and real push the last bias against each other, until one of them has come over the margin.
        still = {key for key in before[1] if key not in moved[1] and not key.endswith("conv_out.bias")}
        assert not still if name == "gan" else not moved[1]
        assert all(parameter.grad is None for module in (mixture, critic) for parameter in module.parameters())

    training.update = watched
    with mixture.using("detail"):
        stage.step(training, digits_batch(training))
    assert seen == ["student", "gan"]
    assert {parameter.dtype for parameter in critic.parameters()} == {torch.float32}
    metrics = training.take_metrics()
    assert all(metrics[name] > 0 for name in ("loss/gan", "loss/gan_critic", "grad_norm/gan", "grad_norm/student"))


def test_the_critic_learns_from_the_features_that_the_student_saw():
    """Computed once: two forwards of the teacher for the probe, whatever the number of critic updates."""
    training, stage = detail_run(critic_updates=3)
    forwards, features = [], []
    hidden_states, critic_loss = training.mixture.hidden_states, training.terms[1].loss.critic_loss
    training.mixture.hidden_states = lambda *args: forwards.append(hidden_states(*args)) or forwards[-1]
    training.terms[1].loss.critic_loss = lambda critic, tensors: (
        features.append(tensors.probe) or critic_loss(critic, tensors)
    )
    with training.mixture.using("detail"):
        stage.step(training, digits_batch(training))
    fake, real = forwards
    assert len(features) == 3
    for probe in features:
        assert all(
            torch.equal(ours, states) and not ours.requires_grad
            for ours, states in zip(probe.hidden_prediction, fake, strict=True)
        )
        assert all(ours is states for ours, states in zip(probe.hidden_target, real, strict=True))


def test_a_critic_of_data_sees_the_data_noised_to_the_same_level():
    """Three forwards for the probe; what the critic takes for real does not depend on the student or its target."""
    seen = {}
    for real in ("target", "data"):
        training, stage = detail_run(real=real)
        inputs, hidden_states, critic = [], training.mixture.hidden_states, training.terms[1].loss.critic_loss

        def note_inputs(x, sigma, *rest, inputs=inputs, hidden_states=hidden_states):
            inputs.append((x, sigma))
            return hidden_states(x, sigma, *rest)

        def note_tensors(module, tensors, real=real, critic=critic):
            seen[real] = tensors
            return critic(module, tensors)

        training.mixture.hidden_states = note_inputs
        training.terms[1].loss.critic_loss = note_tensors
        batch = digits_batch(training)
        with training.mixture.using("detail"):
            stage.step(training, batch)
        assert len(inputs) == (3 if real == "data" else 2)
        assert all(torch.equal(sigma, inputs[0][1]) for _, sigma in inputs)
    assert seen["target"].probe.hidden_data == []
    probe = seen["data"].probe
    x, sigma = inputs[2]
    # x = (1 - σ)·x0 and noise, of which there is at most σ: far from the re-noised prediction.
    per_sample = sigma.view(-1, 1, 1, 1, 1)
    noise = (x - (1 - per_sample) * batch.latents) / per_sample
    assert 0.7 < float(noise.std()) < 1.05
    assert abs(float((noise * batch.latents).mean())) < 0.05
    gan = training.terms[1].loss
    with torch.no_grad():
        logits = [gan.critic(hidden, probe.grid) for hidden in (probe.hidden_prediction, probe.hidden_data)]
        expected = torch.stack(
            [(1 + fake).relu().mean() + (1 - real).relu().mean() for fake, real in zip(*logits, strict=True)]
        ).mean()
        assert float(gan.critic_loss(gan.critic, seen["data"])) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("updates", "start"), [(1, 0), (3, 0), (2, 1)])
def test_critic_updates_are_counted_also_in_its_schedule(updates, start):
    optimizer = {"lr": 1e-3, "schedule": "linear"}
    training, stage = detail_run(critic_updates=updates, start=start, steps=3, optimizer=optimizer)
    rates, scheduler = [], training.trained["gan"].scheduler
    with training.mixture.using("detail"):
        for _ in range(3):
            stage.step(training, digits_batch(training))
            rates.append(scheduler.get_last_lr()[0])
            training.step += 1
    done = [max(0, step - start) * updates for step in (1, 2, 3)]
    assert rates == pytest.approx([1e-3 * (1 - steps / (updates * (3 - start))) for steps in done])
    counts = {int(state["step"]) for state in training.trained["gan"].optimizer.state.values()}
    assert counts == {done[-1]}
    assert {int(state["step"]) for state in training.trained["student"].optimizer.state.values()} == {3}
