"""HunyuanVideo 1.5: the kit, the scale of latents, experts in a pipeline with a guider, its texts, and its folders."""

import json
import re

import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from helpers import as_if_trained

from moedistill.flow.routers import TimestepRouter
from moedistill.flow.trajectory import Trajectory
from moedistill.integrations.diffusers.apply import apply
from moedistill.integrations.diffusers.pipeline import attach
from moedistill.model.experts import LoRAConfig
from moedistill.model.guidance import Guidance
from moedistill.model.mixture import Mixture
from moedistill.runs.loop import run
from moedistill.testing.running import BackboneContract
from moedistill_hunyuan_video_15.backbone import HunyuanVideo15Config

PROMPTS = ['a dog runs past a sign "BEACH"', "rain at night", ""]
GUIDED = Guidance(mode="classifier_free", scale=6.0)
TEXT = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")


class TestHunyuanVideo15(BackboneContract):
    config = HunyuanVideo15Config(pretrained=None, guidance=GUIDED)


class OtherPasses(ClassifierFreeGuidance):
    """A guider that calls its passes by names of its own."""

    _input_predictions = ["pred_text", "pred_plain"]  # noqa: RUF012


@pytest.fixture
def backbone():
    return HunyuanVideo15Config(pretrained=None, guidance=GUIDED).tiny().build(seed=0)


def stock_pipeline(backbone, guider=ClassifierFreeGuidance, scale=6.0, **text):
    """As a user of diffusers makes it; nothing but weights are the backbone's."""
    nothing = dict.fromkeys(backbone.config.text_components)
    pipeline = HunyuanVideo15Pipeline(
        transformer=backbone.network, vae=backbone.load_vae(), scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=guider(guidance_scale=scale), **{**nothing, **text},
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def arguments(backbone, **changes):
    """Of a call: a prompt, the negative one, the size of a video, and the same noise each time."""
    cond = backbone.encode(PROMPTS[:1])
    negative = {f"negative_{name}": value for name, value in backbone.null_conditioning(cond).items()}
    noise = torch.Generator().manual_seed(0)
    return {**cond, **negative, **vars(backbone.video), "num_inference_steps": 3, "generator": noise, **changes}


# -- latents ----------------------------------------------------------------------------------------------------------


def test_latents_are_scaled_as_by_the_pipeline(backbone):
    pipeline = backbone.pipeline()

    def sample(output_type):
        return pipeline(**arguments(backbone), output_type=output_type).frames

    decode, given = pipeline.vae.decode, []
    pipeline.vae.decode = lambda latents, **options: given.append(latents) or decode(latents, **options)
    frames = sample("pt").transpose(1, 2)
    latents = backbone.from_pipeline(sample("latent"), 0.0, (1, *backbone.latent_shape()))
    assert (backbone.prepare(given[0], {})[0] - latents).abs().max() < 1e-4
    assert (given[0] - latents).abs().max() > 1e-2
    assert (backbone.decode(latents) - frames).abs().max() < 1e-4


# -- experts in a pipeline --------------------------------------------------------------------------------------------


@pytest.fixture
def mixture(backbone):
    """The teacher above point 2 of four, and a trained low-rank expert below it."""
    trajectory = Trajectory.flow_matching(4, 5.0)
    router = TimestepRouter.from_points(trajectory, ["high", "low"], [2])
    experts = {"high": LoRAConfig(rank=2), "low": LoRAConfig(rank=2)}
    mixture = Mixture(backbone, experts, trajectory=trajectory, router=router, guidance=GUIDED)
    mixture.initialise()
    for seed, expert in enumerate(experts):
        as_if_trained(mixture.experts[expert], seed)
    return mixture


def sigmas_of(mixture):
    return torch.cat([mixture.trajectory.points[1:].flip(0), torch.zeros(1)])


def test_experts_are_guided_once(backbone, mixture):
    """They were distilled with their guidance: a guider's scale is not theirs. The teacher's it is."""
    found, teacher = {}, {}
    for scale in (1.0, 6.0):
        pipeline = stock_pipeline(backbone, scale=scale)
        teacher[scale] = pipeline(**arguments(backbone), output_type="latent").frames
        with attach(pipeline, mixture, sigmas_of(mixture)):
            found[scale] = pipeline(**arguments(backbone), output_type="latent").frames
        assert torch.equal(pipeline(**arguments(backbone), output_type="latent").frames, teacher[scale])
    assert torch.equal(found[1.0], found[6.0])
    assert (teacher[1.0] - teacher[6.0]).abs().max() > 1e-3
    assert (found[1.0] - teacher[1.0]).abs().max() > 1e-3
    # They are the mixture's own samples.
    noise = torch.randn(1, *backbone.latent_shape(), generator=torch.Generator().manual_seed(0))
    own = mixture.generate(noise, backbone.encode(PROMPTS[:1]), sigmas_of(mixture))
    assert (found[1.0] - own).abs().max() < 1e-5


def test_an_export_goes_into_a_stock_pipeline(backbone, tmp_path):
    recipe = {
        "name": "tiny",
        "backbone": {"kind": "hunyuan_video_15", "pretrained": None},
        "trajectory": {"kind": "flow_matching", "num_steps": 4, "shift": 5.0},
        "router": {"kind": "timestep", "experts": ["only"], "boundaries": []},
        "experts": {"only": {"kind": "lora", "rank": 2, "targets": "attention", "copies": "time_dependent"}},
        "data": {"kind": "latents", "path": None},
        "training": {"batch_size": 2},
        "stages": [
            {"name": "only", "kind": "consistency", "expert": "only", "steps": 1, "losses": [{"kind": "huber"}]},
            {"name": "export", "kind": "export"},
        ],
        "sample": {"points": [4, 2]},
    }
    result = run(recipe, output=tmp_path, smoke=True, device="cpu")
    pipeline, options = stock_pipeline(backbone), arguments(backbone)
    steps = []
    pipeline.transformer.time_embed.register_forward_pre_hook(lambda _, args: steps.append(args[0].item()))
    with apply(pipeline, result.output / "export"):
        pipeline(**options, output_type="latent")
    assert steps == [1000.0, pytest.approx(1000 * 2.5 / 3)]


def test_unknown_passes_are_refused(backbone, mixture):
    pipeline = stock_pipeline(backbone, OtherPasses)
    message = "HunyuanVideo15Pipeline runs its transformer for a pass that it calls 'pred_text'.*pass_names say"
    with attach(pipeline, mixture, sigmas_of(mixture)), pytest.raises(ValueError, match=message):
        pipeline(**arguments(backbone), output_type="latent")


# -- a model's folder -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder in diffusers' layout, and the pipeline that was saved."""
    config = HunyuanVideo15Config(pretrained=None).tiny()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = stock_pipeline(config.build(seed=0), **config.tiny_text_encoders())
    place = tmp_path_factory.mktemp("hunyuan_video_15")
    pipeline.save_pretrained(place)
    return place, pipeline


@torch.no_grad()
def test_a_folder_gives_weights_and_text(folder):
    place, pipeline = folder
    config = HunyuanVideo15Config(pretrained=str(place), video=HunyuanVideo15Config.tiny_video, guidance=GUIDED)
    backbone = config.build()
    weights = pipeline.transformer.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in backbone.network.state_dict().items())
    cond = backbone.encode(PROMPTS)
    for name, wanted in zip(TEXT, pipeline.encode_prompt(PROMPTS, batch_size=3), strict=True):
        assert (cond[name].float() - wanted).abs().max() <= 1e-5
    assert cond["prompt_embeds_mask"].any(1).all()
    assert cond["prompt_embeds_mask_2"].any(1).tolist() == [True, False, False]  # what is in quotes, if anything
    null = backbone.null_conditioning({name: value[:1] for name, value in cond.items()})
    assert all(torch.equal(null[name], cond[name][2:]) for name in cond)
    # Its own guider gives way to the recipe's guidance, of prompts that have quotes and of such that have none.
    noise = torch.randn(2, *backbone.latent_shape(), generator=torch.Generator().manual_seed(1))
    cond = {name: value[:2] for name, value in cond.items()}
    wanted = pipeline(PROMPTS[:2], **vars(backbone.video), latents=noise, num_inference_steps=1, output_type="latent")
    _, last = backbone.native_trajectory(noise, cond, 1, guided=True)[-1]
    assert (last - wanted.frames).abs().max() <= 1e-4
    _, plain = backbone.native_trajectory(noise, cond, 1)[-1]
    assert (plain - wanted.frames).abs().max() > 1e-3


def test_quoted_text_that_is_cut_is_said_too(folder):
    backbone = HunyuanVideo15Config(pretrained=str(folder[0]), guidance=GUIDED).build()
    long = "a " * 300
    with pytest.warns(UserWarning, match="cut after") as warned:
        backbone.encode([f'a sign "{long}"', long, 'a sign "OPEN"'])
    [said] = [str(one.message) for one in warned if "cut after" in str(one.message)]
    assert said.startswith(
        "1 of 3 prompts is cut after 256 tokens, all that the model's tokenizer_2 reads; the first: Text \"a a"
    )


def test_a_model_for_images_is_refused(folder, tmp_path):
    place, _ = folder
    for part in place.iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "HunyuanVideo15ImageToVideoPipeline"}))
    with pytest.raises(ValueError, match=r"made for HunyuanVideo15ImageToVideoPipeline; this backbone knows text-to-v"):
        HunyuanVideo15Config(pretrained=str(tmp_path)).build()


def test_the_published_network_has_the_defaults_of_its_class():
    with torch.device("meta"):
        network = HunyuanVideo15Transformer3DModel(task_type="t2v")
    config = HunyuanVideo15Config(pretrained="not/here")
    assert config.real_network() == {name: network.config[name] for name in config.real_network()}
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(8.327e9, rel=1e-3)
    backbone = config.wrap({"transformer": network})
    assert (len(backbone.blocks), backbone.hidden_size) == (54, 2048)
    assert backbone.latent_shape() == (32, 31, 30, 53)
    targets = [path for path, _ in network.named_modules() if re.fullmatch(backbone.lora_targets["attention"], path)]
    assert len(targets) == 56 * 4


def test_the_scale_is_no_input():
    with pytest.raises(ValueError, match=r"guidance.mode embedded: HunyuanVideo 1\.5 has no input for the scale"):
        HunyuanVideo15Config(pretrained=None, guidance=Guidance(mode="embedded", scale=6.0))
