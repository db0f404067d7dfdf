"""The scheduler of few steps, as its users know schedulers of diffusers': which step it is, and what it takes."""

import inspect
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideoPipeline,
    LTXPipeline,
    WanPipeline,
)
from saved_pipelines import make_pipeline

import moedistill
from moedistill.flow.routers import TimestepRouter
from moedistill.integrations.diffusers.pipeline import attach
from moedistill.integrations.diffusers.scheduler import UNASKED, FewStepScheduler
from moedistill.model.experts import LoRAConfig
from moedistill.model.mixture import Mixture
from moedistill_cogvideox.backbone import sigma_table
from moedistill_wan.backbone import WanConfig

SIGMAS = (1.0, 2.5 / 3, 0.5, 0.0)
TIMES = (1000.0, 2500 / 3, 500.0)


@pytest.fixture
def scheduler():
    made = FewStepScheduler(sigmas=SIGMAS, timesteps=TIMES)
    made.set_timesteps(3)
    return made


# -- one step after the other -----------------------------------------------------------------------------------------


def test_steps_are_those_of_a_flow_scheduler_with_the_same_sigmas(scheduler):
    stock = FlowMatchEulerDiscreteScheduler()
    stock.set_timesteps(sigmas=list(SIGMAS[:-1]))
    assert torch.equal(stock.sigmas, scheduler.sigmas)
    generator = torch.Generator().manual_seed(0)
    for each in (stock, scheduler):
        assert (each.step_index, each.begin_index, each.order, len(scheduler.timesteps)) == (None, None, 1, 3)
    for k, (time, wanted) in enumerate(zip(scheduler.timesteps, stock.timesteps, strict=True)):
        x, v = torch.randn(2, 1, 3, 4, 5, 6, generator=generator)
        found = scheduler.step(v, time, x).prev_sample
        assert torch.allclose(found, stock.step(v, wanted, x).prev_sample, atol=1e-6)
        assert scheduler.step_index == stock.step_index == k + 1


@pytest.mark.parametrize(
    ("done", "time", "message"),
    [
        (
            1,
            1000.0,
            r"timestep 1000 is asked for, but the next step is 2 of 3, at 833\.333; take scheduler.timesteps in",
        ),
        (1, 500.0, r"timestep 500 is asked for, but the next step is 2 of 3, at 833\.333"),
        (0, 0, r"no step is at timestep 0: they are at \[1000, 833\.333, 500\]"),
        (0, float("nan"), "no step is at timestep nan"),
        (0, None, "timestep None must be one number, one of scheduler.timesteps"),
        (0, torch.tensor([1000.0, 500.0]), "must be one number"),
        (3, 500.0, "timestep 500 is asked for, but all 3 steps are done; set_timesteps begins anew"),
    ],
)
def test_a_time_that_is_not_the_next_step_s_is_refused(scheduler, done, time, message):
    x = torch.zeros(1, 2)
    for own in scheduler.timesteps[:done]:
        scheduler.step(x, own, x)
    with pytest.raises(ValueError, match=message):
        scheduler.step(x, time, x)
    assert scheduler.step_index == (done or None)


@pytest.mark.parametrize(
    "rounded",
    [
        lambda time: time,
        float,
        lambda time: time.bfloat16(),
        lambda time: time.half().expand(2),
        lambda time: time.bfloat16().float(),
        lambda time: time.long(),
        lambda time: round(time.item()),
    ],
)
def test_times_may_be_rounded_as_pipelines_round_them(scheduler, rounded):
    for k, time in enumerate(scheduler.timesteps):
        assert scheduler.index_for_timestep(rounded(time)) == k
        scheduler.step(torch.zeros(2, 3), rounded(time), torch.zeros(2, 3))


def test_where_two_times_are_rounded_to_one_an_exact_one_is_itself():
    close = FewStepScheduler(sigmas=(1.0, 0.999, 0.0), timesteps=(1000.0, 999.0))
    assert torch.tensor(999.0).bfloat16() == 1000
    assert [close.index_for_timestep(time) for time in close.timesteps] == [0, 1]
    x = torch.zeros(1, 2)
    close.step(x, 1000.0, x)
    with pytest.raises(ValueError, match="timestep 1000 is asked for, but the next step is 2 of 2, at 999"):
        close.step(x, 1000.0, x)


def test_begin_in_the_middle(scheduler):
    """As video-to-video pipelines do: by the first time, or by `set_begin_index`."""
    x, v = torch.ones(1, 2), torch.full((1, 2), 3.0)
    assert torch.allclose(scheduler.step(v, 500.0, x).prev_sample, x - 0.5 * v)
    scheduler.set_timesteps(3)
    scheduler.set_begin_index(2)
    assert (scheduler.begin_index, scheduler.step_index) == (2, None)
    with pytest.raises(ValueError, match="timestep 1000 is asked for, but the next step is 3 of 3, at 500"):
        scheduler.step(v, 1000.0, x)
    scheduler.step(v, 500.0, x)
    with pytest.raises(ValueError, match="begin_index 3 is no step: there are 0 to 2"):
        scheduler.set_begin_index(3)
    for index in (-1, 0.5, True, "1"):
        with pytest.raises(ValueError, match=f"begin_index {index!r} must be a whole number of at least 0"):
            scheduler.set_begin_index(index)
    scheduler.set_begin_index(np.int64(1))
    assert (scheduler.begin_index, type(scheduler.begin_index)) == (1, int)


def test_noise_is_added_as_by_the_models_own_schedulers(scheduler):
    x, noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    stock = FlowMatchEulerDiscreteScheduler()
    stock.set_timesteps(sigmas=list(SIGMAS[:-1]))
    for times in ([833.3333, 500.0], [500.0]):
        wanted = stock.scale_noise(x, stock.timesteps[[1, 2] if len(times) > 1 else [2]], noise)
        assert torch.allclose(scheduler.scale_noise(x, torch.tensor(times), noise), wanted, atol=1e-6)
        assert torch.allclose(scheduler.add_noise(x, noise, torch.tensor(times)), wanted, atol=1e-6)
    ddim = CogVideoXDDIMScheduler(rescale_betas_zero_snr=True, snr_shift_scale=3.0, timestep_spacing="trailing")
    table = sigma_table(3.0)
    few = FewStepScheduler(
        sigmas=(*table[[999, 400]].tolist(), 0.0), timesteps=(999.0, 400.0), prediction_type="v_prediction"
    )
    times = torch.tensor([400, 999])
    assert torch.allclose(few.add_noise(x, noise, times), ddim.add_noise(x, noise, times), atol=1e-5)
    with pytest.raises(ValueError, match=r"no step is at timestep 700: they are at \[999, 400\]"):
        few.add_noise(x, noise, torch.tensor([700]))


# -- what may be asked for --------------------------------------------------------------------------------------------


def own_steps(scheduler, **asked):
    scheduler.set_timesteps(**asked)
    assert torch.equal(scheduler.timesteps, torch.tensor(TIMES))
    assert scheduler.num_inference_steps == 3


def test_what_pipelines_ask_for_of_their_own_accord_is_heard_in_silence(scheduler):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own_steps(scheduler, num_inference_steps=UNASKED)  # Wan, CogVideoX
        for steps in (3, UNASKED):
            own_steps(scheduler, sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])  # HunyuanVideo, 1.5
            own_steps(scheduler, sigmas=np.linspace(1.0, 1 / steps, steps), mu=1.2, timesteps=None)  # LTX-Video
        own_steps(scheduler, sigmas=[1.0, 0.8333, 0.5])  # their own
        own_steps(scheduler, sigmas=torch.tensor(SIGMAS))
        own_steps(scheduler, timesteps=[1000, 833, 500])
    for cls in (CogVideoXPipeline, HunyuanVideo15Pipeline, HunyuanVideoPipeline, LTXPipeline, WanPipeline):
        assert inspect.signature(cls.__call__).parameters["num_inference_steps"].default == UNASKED


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"num_inference_steps": 8},
            r"8 steps are asked for, but .* own 3 steps, sigmas \[1, 0\.833333, 0\.5\]; .*steps=8",
        ),
        ({"sigmas": np.linspace(1.0, 0.0, 9)[:-1]}, "8 steps are asked for"),
        ({"sigmas": np.array([1.0, 0.9, 0.3])}, r"sigmas \[1, 0\.9, 0\.3\] are given, but .*sigmas=\[…\]"),
    ],
)
def test_what_is_not_followed_is_said_once(scheduler, asked, message):
    with pytest.warns(UserWarning, match=message):
        own_steps(scheduler, **asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own_steps(scheduler, **asked)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"sigmas": [1.0, 0.9, 0.3]},
            r"sigmas \[1, 0\.9, 0\.3\] are not those of the experts, \[1, 0\.833333, 0\.5\]; le",
        ),
        (
            {"sigmas": [1.0, 0.5]},
            "not those of the experts.*leave them out, or choose other steps with moedistill.apply",
        ),
        ({"sigmas": [0.5, 0.8333, 1.0]}, "not those"),
        ({"sigmas": [1.0, float("nan"), 0.5]}, "not those"),
        ({"sigmas": np.array([0.5, 1.0])}, "not those"),
        ({"sigmas": np.array([0.9, 0.5, 0.1])}, "not those"),
        ({"sigmas": np.array([5, 3, -1])}, "not those"),
        ({"sigmas": np.array([1.0, 0.5, 0.0])}, "not those"),
        ({"sigmas": np.array([float("nan")])}, "not those"),
        ({"sigmas": np.array([])}, "not those"),
        ({"sigmas": 0.5}, r"sigmas must be a list, not 0\.5 \(float\)"),
        ({"sigmas": "10"}, r"sigmas must be a list, not '10' \(str\)"),
        ({"sigmas": ["1", "0"]}, r"sigmas \['1', '0'\] must be a list of numbers"),
        ({"num_inference_steps": 0}, "num_inference_steps 0 must be a whole number of at least 1"),
        ({"num_inference_steps": -3}, "num_inference_steps -3 must be"),
        ({"num_inference_steps": float("nan")}, "num_inference_steps nan must be"),
        ({"num_inference_steps": True}, "num_inference_steps True must be"),
        ({"timesteps": [1000, 833]}, r"timesteps \[1000, 833\] are not those of the experts, \[1000, 833\.333, 500\]"),
        ({"timesteps": ["a"]}, r"timesteps \['a'\] must be a list of numbers"),
    ],
)
def test_other_steps_are_refused(scheduler, asked, message):
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**asked)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sigmas": (1.0, 0.5)},
            r"sigmas \[1, 0\.5\] must be two or more, descend strictly from at most 1, and end at 0",
        ),
        ({"sigmas": (0.5, 1.0, 0.0)}, "descend strictly"),
        ({"sigmas": (1.0, float("nan"), 0.0)}, "descend strictly"),
        ({"sigmas": (1.5, 0.5, 0.0)}, "from at most 1"),
        ({"sigmas": "10"}, r"sigmas must be a list, not '10' \(str\)"),
        ({"timesteps": (1000.0, 500.0)}, "4 sigmas need 3 timesteps, not 2"),
        ({"timesteps": (1000.0, 500.0, 500.0)}, "must be finite and differ: a step is known by its time"),
        ({"timesteps": (1000.0, float("inf"), 500.0)}, "must be finite and differ"),
        ({"num_train_timesteps": 0}, "num_train_timesteps 0 must be a whole number of at least 1"),
        ({"num_train_timesteps": True}, "num_train_timesteps True must be a whole number of at least 1"),
        ({"prediction_type": "epsilon"}, "prediction_type 'epsilon' is unknown"),
    ],
)
def test_steps_that_are_none(changes, message):
    with pytest.raises(ValueError, match=message):
        FewStepScheduler(**{"sigmas": SIGMAS, "timesteps": TIMES, **changes})


# -- configs and folders ----------------------------------------------------------------------------------------------


def test_its_config_makes_it_again_and_another_scheduler_s_does_not(scheduler, tmp_path):
    scheduler.save_pretrained(tmp_path)
    for again in (FewStepScheduler.from_config(scheduler.config), FewStepScheduler.from_pretrained(tmp_path)):
        assert torch.equal(again.sigmas, scheduler.sigmas)
        assert torch.equal(again.timesteps, scheduler.timesteps)
    stock = FlowMatchEulerDiscreteScheduler()
    stock.save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match=r"the config of FlowMatchEulerDiscreteScheduler names no sigmas and"):
        FewStepScheduler.from_config(stock.config)
    with pytest.raises(
        ValueError, match=r"the config of FlowMatchEulerDiscreteScheduler names no sigmas and timesteps"
    ):
        FewStepScheduler.from_pretrained(tmp_path / "stock")


LOAD = """
import sys, diffusers
load = lambda: diffusers.DiffusionPipeline.from_pretrained(sys.argv[1], text_encoder=None, tokenizer=None)
try:
    load()
except ValueError as error:
    print(error)
from moedistill import FewStepScheduler
pipeline = load()
print(type(pipeline.scheduler).__name__, pipeline.scheduler.timesteps.tolist())
"""


def test_a_pipeline_saved_with_it_loads_in_a_fresh_process(scheduler, tmp_path):
    """Where its class was imported, which is what diffusers asks for."""
    module = FewStepScheduler.__module__
    assert moedistill.FewStepScheduler is FewStepScheduler
    pipeline = make_pipeline("wan")
    pipeline.register_modules(scheduler=scheduler, text_encoder=None, tokenizer=None)
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == [module, "FewStepScheduler"]
    done = subprocess.run([sys.executable, "-c", LOAD, tmp_path], capture_output=True, text=True, check=False)
    asked, loaded = done.stdout.strip().rsplit("\n", 1)
    assert f"import {module} before calling `from_pretrained`" in asked, done.stderr
    assert loaded == f"FewStepScheduler {scheduler.timesteps.tolist()}", done.stderr


def test_a_pipeline_with_experts_is_not_saved_without_them(tmp_path):
    backbone = WanConfig(pretrained=None).tiny().build(seed=0)
    mixture = Mixture(backbone, {"only": LoRAConfig(rank=2)}, router=TimestepRouter(["only"]))
    pipeline = backbone.pipeline()
    with attach(pipeline, mixture, torch.tensor([1.0, 0.0])):
        with pytest.raises(
            ValueError, match=r"carries experts, and would be saved without its transformer; undo\(\) on"
        ):
            pipeline.save_pretrained(tmp_path / "model")
        assert not (tmp_path / "model").exists()
    pipeline.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "transformer").is_dir()
