"""The plain formulas against numbers recorded from the published DCM training (see tests/records/README.md)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moedistill.flow.process import add_noise, jump, renoise
from moedistill.flow.routers import TimestepRouter
from moedistill.flow.sampling import sample
from moedistill.flow.trajectory import Trajectory
from moedistill.losses.base import HuberConfig, StepTensors, pseudo_huber
from moedistill_dcm.losses import (
    FeatureMatchingConfig,
    TemporalCoherenceConfig,
    feature_matching,
    hinge_critic,
    hinge_generator,
    temporal_coherence,
)

DATA = Path(__file__).parents[1] / "records"


class Golden:
    """The arrays of one file under one prefix, as tensors."""

    def __init__(self, file: str, prefix: str = "") -> None:
        self._arrays, self._prefix = np.load(DATA / f"{file}.npz"), prefix

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self._arrays[f"{self._prefix}{key}"]))

    def __contains__(self, key: str) -> bool:
        return f"{self._prefix}{key}" in self._arrays

    def heads(self, key: str) -> list[torch.Tensor]:
        found = []
        while f"{key}_{len(found)}" in self:
            found.append(self[f"{key}_{len(found)}"])
        assert found
        return found


def names(file: str, start: str = "") -> list[str]:
    found = sorted({key.rsplit("/", 1)[0] for key in np.load(DATA / f"{file}.npz") if "/" in key})
    found = [name for name in found if name.startswith(start)]
    assert found
    return found


def assert_golden(actual: torch.Tensor, golden: torch.Tensor, size: torch.Tensor | None = None) -> None:
    """2e-7, times the size of the largest element (of `size`, or the golden itself) where that is above 1."""
    assert actual.shape == golden.shape
    largest = (golden if size is None else size).abs().max().item()
    torch.testing.assert_close(actual.double(), golden.double(), rtol=0, atol=2e-7 * max(1.0, largest))


def test_the_data_are_there_and_small():
    files = {path.stem: path.stat().st_size for path in DATA.glob("*.npz")}
    assert {"solver", "plain_semantic_loss", "semantic", "detail", "inference"} <= set(files)
    assert sum(files.values()) < 1_000_000


# --- Trajectory and jumps


@pytest.mark.parametrize("num_steps", [50, 100])
@pytest.mark.parametrize("shift", [1, 7, 17])
def test_points(shift, num_steps):
    golden = Golden("solver", f"s{shift}_n{num_steps}/")
    points = Trajectory.flow_matching(num_steps, shift).points
    # Bit for bit: boundaries compare exactly, and the record's grid is that of the models' schedulers.
    assert torch.equal(points[1:], golden["sigmas"])
    assert torch.equal(points[:-1].double(), golden["sigmas_prev"])
    assert points[-1] == 1


@pytest.mark.parametrize("prefix", [name for name in names("solver") if "/off" in name])
def test_euler_steps_and_phase_targets(prefix):
    grid, offset = prefix.split("/off")
    shift, num_steps = (int(part[1:]) for part in grid.split("_"))
    points = Trajectory.flow_matching(num_steps, shift).points
    golden = Golden("solver", f"{prefix}/")
    x, v, index = golden["x"], golden["v"], golden["index"]
    start, previous = points[index + 1], points[index]
    assert_golden(jump(x, v, start, previous), golden["euler_step"])
    for num_phases in (1, 2, 4):
        if f"phase_m{num_phases}_end" not in golden:
            continue
        edges = torch.tensor([k * num_steps // num_phases + int(offset) for k in range(num_phases)])
        end = torch.stack([edges[edges <= i].max() for i in index])
        assert torch.equal(end, golden[f"phase_m{num_phases}_end"])
        assert_golden(jump(x, v, start, points[end]), golden[f"phase_m{num_phases}_target0"])
        assert_golden(jump(x, v, previous, points[end]), golden[f"phase_m{num_phases}_target1"])


# --- Losses on plain tensors


@pytest.mark.parametrize("name", names("plain_semantic_loss"))
def test_plain_semantic_loss(name):
    golden = Golden("plain_semantic_loss", f"{name}/")
    prediction = golden["model_pred"].requires_grad_()
    loss = pseudo_huber(prediction, golden["target"]) + temporal_coherence(prediction, golden["target"])
    loss.backward()
    assert loss.dtype == torch.float32
    assert_golden(loss.detach(), golden["loss_total"])
    assert_golden(prediction.grad, golden["grad_model_pred"])


@pytest.mark.parametrize("name", names("detail", "plain_gan"))
def test_plain_gan(name):
    golden = Golden("detail", f"{name}/")
    fake, real = golden.heads("logits_fake"), golden.heads("logits_real")
    hinge, matching = hinge_generator(fake), feature_matching(golden["feat_latent_fake"], golden["feat_latent_real"])
    assert_golden(hinge, golden["hinge_g"])
    assert_golden(matching, golden["fm_mse"])
    assert_golden(5 * hinge + matching, golden["gan_g_loss_return"])
    assert_golden(hinge_critic(fake, real), golden["gan_d_loss_return"])


# --- Training steps, from recorded velocities


class Step:
    """The consistency step of DCM.md, in our terms, from the velocities and draws of one recorded step."""

    def __init__(self, golden: Golden, end: int, num_steps: int = 50) -> None:
        points = Trajectory.flow_matching(num_steps).points
        self.sigma, self.previous, self.end = points[golden["index"] + 1], points[golden["index"]], points[end]
        self.v_student = golden["v_student"].clone().requires_grad_()
        self.v_target, self.v_teacher = golden["v_target"], golden["v_teacher_cond"]
        if not golden["cfg_w"].isnan():
            self.v_teacher = self.v_teacher + golden["cfg_w"].float() * (self.v_teacher - golden["v_teacher_uncond"])
        self.x = add_noise(golden["model_input"], golden["noise"], self.sigma)
        self.x_prev = jump(self.x, self.v_teacher, self.sigma, self.previous)
        self.prediction = jump(self.x, self.v_student, self.sigma, self.end)
        self.target = jump(self.x_prev, self.v_target, self.previous, self.end)

        def times(sigmas: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return sigmas.view(-1, 1, 1, 1, 1) * v

        # prediction - target, formed from the velocities: no two nearly equal tensors are subtracted.
        self.difference = (
            times(self.end - self.sigma, self.v_student)
            - times(self.previous - self.sigma, self.v_teacher)
            - times(self.end - self.previous, self.v_target)
        )

    def tensors(self) -> StepTensors:
        return StepTensors(self.prediction, self.target, self.difference, self.sigma)


def assert_same_step(step: Step, golden: Golden) -> None:
    assert_golden(step.sigma, golden["sigma"])
    assert_golden(step.previous, golden["sigma_prev"])
    assert torch.equal(Trajectory.flow_matching().timestep(step.sigma), golden["timestep"])
    assert torch.equal(Trajectory.flow_matching().timestep(step.previous), golden["timestep_prev"])
    assert_golden(step.x, golden["x_t"])
    assert_golden(step.x_prev, golden["x_prev"])
    assert_golden(step.prediction.detach(), golden["model_pred"])
    assert_golden(step.target, golden["target"])
    assert_golden(step.difference.detach(), golden["model_pred"] - golden["target"], size=golden["model_pred"])


def assert_gradient(actual: torch.Tensor, golden: torch.Tensor) -> None:
    relative = ((actual.double() - golden.double()).norm() / golden.double().norm()).item()
    assert relative < 3e-4


@pytest.mark.parametrize("name", names("semantic"))
def test_semantic_step(name):
    golden = Golden("semantic", f"{name}/")
    num_steps = 100 if name == "b1_n100" else 50
    step = Step(golden, end=38, num_steps=num_steps)
    assert_golden(step.end, golden["sigma_boundary"])
    assert_same_step(step, golden)
    huber = HuberConfig(c=1e-3).build(None)(step.tensors())
    temporal = TemporalCoherenceConfig(lag=3).build(None)
    if golden["model_input"].shape[2] <= 3:
        with pytest.warns(UserWarning, match="lag 3 needs more than 3 latent frames, and the videos have 3"):
            coherence = temporal(step.tensors())
    else:
        coherence = temporal(step.tensors())
    (huber + coherence).backward()
    assert_golden(huber.detach(), golden["loss_huber"])
    assert_golden(coherence.detach(), golden["loss_tc"])
    assert_golden((huber + coherence).detach(), golden["loss_total"])
    assert_gradient(step.v_student.grad, golden["grad_v_student"])


def test_the_difference_from_velocities_is_the_better_one():
    """Both against float64: subtracting prediction and target in float32 loses about three digits."""
    golden = Golden("semantic", "b2_above/")
    step = Step(golden, end=38)
    exact = golden["model_pred"] - golden["target"]
    ours = (step.difference.detach() - exact).abs().max()
    naive = (golden["model_pred"].float() - golden["target"].float() - exact).abs().max()
    assert ours < naive / 5


@pytest.mark.parametrize("name", names("detail", "b"))
def test_detail_step(name):
    golden = Golden("detail", f"{name}/")
    step = Step(golden, end=0)
    assert_same_step(step, golden)
    points = Trajectory.flow_matching().points
    sigma_adv = points[golden["adv_index"]]
    fake = renoise(step.prediction, golden["adv_noise"], points[0], sigma_adv)
    real = renoise(step.target, golden["adv_noise"], points[0], sigma_adv)
    assert_golden(fake.detach(), golden["fake_adv"])
    assert_golden(real, golden["real_adv"])

    huber = pseudo_huber(step.prediction, step.target)
    assert_golden(huber.detach(), golden["loss_huber"])
    huber = HuberConfig().build(None)(step.tensors())
    assert_golden(huber.detach(), golden["loss_huber"])

    fake_features = golden["feat_latent_fake"].requires_grad_()
    matching = feature_matching(fake_features, golden["feat_latent_real"])
    hinge = hinge_generator(golden.heads("logits_fake"))
    total = huber + 0.5 * hinge + 0.1 * matching
    assert_golden(matching.detach(), golden["fm_mse"])
    assert_golden(hinge, golden["loss_g_hinge_mean"])
    assert_golden((5 * hinge + matching).detach(), golden["gan_g_loss_return"])
    assert_golden(total.detach(), golden["loss_g_total"])
    assert_golden(hinge_critic(golden.heads("logits_fake"), golden.heads("logits_real")), golden["loss_d"])

    # What reaches the student through the probe is recorded; the rest of the way is ours.
    gradient = torch.autograd.grad([huber, fake], step.v_student, [torch.ones(()), golden["grad_fake_adv"]])[0]
    assert_gradient(gradient, golden["grad_v_student"])
    if "grad_feat_latent_fake" in golden:
        (0.1 * matching).backward()
        assert_gradient(fake_features.grad, golden["grad_feat_latent_fake"])


def test_feature_matching_config_reads_the_space_it_names():
    golden = Golden("detail", "b1_mid_nocfg/")

    class Probe:
        latent_prediction, latent_target = golden["feat_latent_fake"], golden["feat_latent_real"]
        hidden_prediction, hidden_target = [torch.ones(1, 2, 3)], [torch.zeros(1, 2, 3)]

    tensors = Step(golden, end=0).tensors()
    tensors.probe = Probe()
    assert_golden(FeatureMatchingConfig(space="latent").build(None)(tensors), golden["fm_mse"])
    assert FeatureMatchingConfig(space="hidden").build(None)(tensors) == 1


# --- Sampling


def sampler_tags() -> list[str]:
    return [name for name in names("inference") if name != "toy"]


def toy_velocity(model_times: dict[float, float], dtype: torch.dtype = torch.float32):
    """v = A·x + B·(t / 1000) + C, where the model sees the recorded time t."""
    toy = Golden("inference", "toy/")

    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        t = model_times[sigma[0].item()]
        v = toy["A"] * x.to(dtype).float() + toy["B"] * (t / 1000) + toy["C"]
        if dtype == torch.bfloat16:
            # The record forms sigma·v in bf16 and divides by sigma again.
            v = (sigma[0] * v.bfloat16().float()).bfloat16().float() / sigma[0]
        return v

    return velocity


def recorded_times(golden: Golden) -> dict[float, float]:
    return dict(zip(golden["sigmas_"].tolist(), golden["model_timesteps"].flatten().tolist(), strict=False))


@pytest.mark.parametrize("tag", [tag for tag in sampler_tags() if not tag.endswith("bf16")])
def test_sampler_states(tag):
    golden = Golden("inference", f"{tag}/")
    states = [Golden("inference")["x_init"]]
    x = sample(
        toy_velocity(recorded_times(golden)),
        states[0],
        golden["sigmas_"],
        callback=lambda step, sigma, x: states.append(x),
    )
    assert torch.equal(x, states[-1])
    for state, recorded in zip(states, golden["states"], strict=True):
        assert_golden(state, recorded)


@pytest.mark.parametrize("tag", [tag for tag in sampler_tags() if tag.endswith("bf16")])
def test_sampler_states_in_bf16(tag):
    """States are bf16 from the first step on; the very first is float32, so that step is taken by itself."""
    golden = Golden("inference", f"{tag}/")
    sigmas, recorded = golden["sigmas_"], golden["states"]
    velocity = toy_velocity(recorded_times(golden), torch.bfloat16)
    states = [sample(velocity, Golden("inference")["x_init"], sigmas[:2]).bfloat16()]
    sample(velocity, states[0], sigmas[1:], callback=lambda step, sigma, x: states.append(x))
    for state, expected in zip(states, recorded[1:], strict=True):
        assert state.dtype == torch.bfloat16
        assert_golden(state, expected)


@pytest.mark.parametrize("tag", [tag for tag in sampler_tags() if tag.endswith("bf16")])
def test_recorded_bf16_velocities_reach_the_recorded_states_within_rounding(tag):
    """Without imitating the record's extra rounding of sigma·v: within two bf16 units of the largest value."""
    golden = Golden("inference", f"{tag}/")
    sigmas, velocities = golden["sigmas_"], golden["velocities"]
    for step, (start, end) in enumerate(zip(golden["states"][:-1], golden["states"][1:], strict=True)):
        x = jump(start, velocities[step], sigmas[step], sigmas[step + 1]).bfloat16().float()
        assert (x - end).abs().max() <= 2 * 2**-8 * end.abs().max()


def test_the_recorded_lists_route_at_the_points_they_mean():
    trajectory = Trajectory.flow_matching()
    hunyuan, wan = (Golden("inference", f"{tag}/")["sigmas_"][:-1].tolist() for tag in ("hy4_fp32", "wan6_fp32"))
    assert [trajectory.nearest(sigma) for sigma in hunyuan] == [50, 44, 38, 19]
    assert [trajectory.nearest(sigma) for sigma in wan] == [50, 44, 38, 26, 18, 10]
    router = TimestepRouter.from_points(trajectory, ["semantic", "detail"], [38])
    meant = trajectory.points[[trajectory.nearest(sigma) for sigma in hunyuan]]
    assert router.experts_at(meant) == ["semantic", "semantic", "detail", "detail"]
