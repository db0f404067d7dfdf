"""Experts are guided once: in every shipped model's pipeline, whatever its caller says about guidance."""

from dataclasses import dataclass, field

import pytest
import torch
from diffusers import ClassifierFreeGuidance, CogVideoXVideoToVideoPipeline, FlowMatchEulerDiscreteScheduler
from helpers import as_if_trained

from moedistill.flow.routers import TimestepRouter
from moedistill.integrations.diffusers.pipeline import attach
from moedistill.model.backbone import BackboneConfig
from moedistill.model.conditioning import concat
from moedistill.model.experts import LoRAConfig
from moedistill.model.guidance import Guidance
from moedistill.model.mixture import Mixture
from moedistill_cogvideox.backbone import CogVideoXConfig
from moedistill_hunyuan_video.backbone import HunyuanVideoConfig
from moedistill_hunyuan_video_15.backbone import HunyuanVideo15Config
from moedistill_ltx.backbone import LTXConfig
from moedistill_wan.backbone import WanConfig

PROMPTS = ["a dog", 'rain on a sign "OPEN"']
SIGMAS = torch.tensor([1.0, 0.9, 0.5, 0.0])
GUIDED = Guidance(mode="classifier_free", scale=5.0)
EMBEDDED = Guidance(mode="embedded", scale=6.0)
OF_TWO = Guidance(mode="classifier_free", scale={"transformer": 4.0, "transformer_2": 3.0})


@dataclass
class Case:
    """A model, what its pipeline is called with in any case, and what its callers may say about guidance."""

    config: BackboneConfig
    scales: list[dict]
    always: dict = field(default_factory=dict)
    repeats: bool = True  # two of the stock pipelines make no more than one video of a prompt


def scales(*others, name="guidance_scale"):
    return [{name: 1.0}, {name: 1.5}, {name: 7.5}, *others]


COGVIDEOX = scales({"guidance_scale": 7.5, "use_dynamic_cfg": True}, {"guidance_scale": 1.0, "use_dynamic_cfg": True})
HUNYUAN = scales(
    *({"true_cfg_scale": scale, "negative_prompt": ["fog", "fog"]} for scale in (1.0, 1.5, 6.0)),
    {"true_cfg_scale": 3.0, "negative_prompt": ["fog", "fog"], "guidance_scale": 1.0},
)
CASES = {
    "wan": Case(WanConfig(pretrained=None, guidance=GUIDED), scales(), {"max_sequence_length": 12}),
    "wan22": Case(
        WanConfig(pretrained=None, guidance=OF_TWO, boundary_ratio=0.875),
        scales({"guidance_scale": 4.0, "guidance_scale_2": 1.0}, {"guidance_scale": 1.0, "guidance_scale_2": 9.0}),
        {"max_sequence_length": 12},
    ),
    "hunyuan_video": Case(HunyuanVideoConfig(pretrained=None, guidance=EMBEDDED), HUNYUAN),
    "hunyuan_video_two_passes": Case(HunyuanVideoConfig(pretrained=None, guidance=GUIDED), HUNYUAN),
    "hunyuan_video_15": Case(
        HunyuanVideo15Config(pretrained=None, guidance=GUIDED),
        [{"guider": ClassifierFreeGuidance(**options)} for options in (
            {"guidance_scale": 1.0}, {"guidance_scale": 7.5}, {"guidance_scale": 7.5, "guidance_rescale": 0.7},
        )],
        repeats=False,
    ),
    **{
        f"cogvideox_{model}": Case(
            CogVideoXConfig(pretrained=None, guidance=GUIDED, model=model), COGVIDEOX, {"max_sequence_length": 12},
            repeats=False,
        )
        for model in ("2b", "5b", "1.5-5b")
    },
    "ltx": Case(
        LTXConfig(pretrained=None, guidance=GUIDED), scales({"guidance_scale": 7.5, "guidance_rescale": 0.7})
    ),
}  # fmt: skip


def build(case):
    """A stock pipeline with text encoders, and two trained experts on its networks."""
    config = case.config.tiny()
    backbone = config.build(seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = config.pipeline_class()(
            **backbone.networks, **config.tiny_text_encoders(), vae=backbone.load_vae(), scheduler=config.scheduler(),
            **config.pipeline_options(),
        )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    bases = config.bases()
    experts = {"high": LoRAConfig(rank=2, base=bases[0]), "low": LoRAConfig(rank=2, base=bases[-1])}
    router = TimestepRouter(list(experts), [0.875], closed="high")
    mixture = Mixture(backbone, experts, router=router, guidance=config.guidance)
    mixture.initialise()
    for seed, expert in enumerate(experts):
        as_if_trained(mixture.experts[expert], seed)
    return pipeline, mixture


def latents_of(pipeline, backbone, noise, prompts, guider=None, **options):
    """Flow latents that a call from `noise` gives."""
    if guider is not None:
        pipeline.guider = guider
    _, _, t, h, w = noise.shape
    config = backbone.config
    size = {
        "num_frames": (t - 1) * config.temporal_compression + 1,
        "height": h * config.spatial_compression,
        "width": w * config.spatial_compression,
    }
    given = backbone.to_pipeline(noise, 1.0)
    found = pipeline(prompts, **size, **options, latents=given, output_type="latent").frames
    return backbone.from_pipeline(found, 0.0, noise.shape)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_no_scale_changes_what_experts_give(name):
    """Of two prompts at once, of two videos of one, in any number of steps: the mixture's own samples."""
    case = CASES[name]
    pipeline, mixture = build(case)
    backbone = mixture.backbone
    noise = torch.randn(2, *backbone.latent_shape(), generator=torch.Generator().manual_seed(0))
    conds = [backbone.encode_with(pipeline, [prompt]) for prompt in PROMPTS]
    wanted = mixture.generate(noise, concat(*conds), SIGMAS, guidance=mixture.guidance)
    teacher = latents_of(pipeline, backbone, noise, PROMPTS, num_inference_steps=3, **case.always)
    with attach(pipeline, mixture, SIGMAS):
        default = latents_of(pipeline, backbone, noise, PROMPTS, **case.always)  # of 50 steps
        assert (default - wanted).abs().max() <= 1e-5
        for said in case.scales:
            options = {"num_inference_steps": 3, **case.always, **said}
            found = latents_of(pipeline, backbone, noise, PROMPTS, **options)
            assert (found - default).abs().max() <= 5e-6, said  # rescaling rounds
        own = mixture.generate(noise, concat(conds[0], conds[0]), SIGMAS, guidance=mixture.guidance)
        if case.repeats:
            options = {**case.always, **case.scales[-1]}
            options |= {"negative_prompt": "fog"} if "negative_prompt" in options else {}
            twice = latents_of(pipeline, backbone, noise, PROMPTS[0], num_videos_per_prompt=2, **options)
            assert (twice - own).abs().max() <= 1e-5
    assert (own[1] - wanted[1]).abs().max() > 1e-4  # the prompt matters,
    assert (teacher - wanted).abs().max() > 1e-3  # and so do the experts


@torch.no_grad()
def test_another_pipeline_around_experts_cannot_guide_them_twice():
    """One that is made of the components of an applied pipeline: nothing tells whose scale it follows."""
    case = CASES["cogvideox_2b"]
    pipeline, mixture = build(case)
    video = [torch.zeros(3, 32, 48)] * 9
    with attach(pipeline, mixture, SIGMAS):
        other = CogVideoXVideoToVideoPipeline(**pipeline.components)
        other.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 3, "strength": 1.0, "height": 32, "width": 48, "output_type": "latent"}
        with pytest.raises(ValueError, match="called for a batch of 2, and the step is of 1: another pipeline"):
            other(video, "a dog", guidance_scale=6.0, **options, **case.always)
        # It has one pass without guidance, and begins where it is told to: by the time of its first step.
        for strength, steps in ((1.0, 3), (0.7, 2)):
            options |= {"strength": strength, "guidance_scale": 1.0}
            calls = []
            handle = mixture.backbone.network.register_forward_pre_hook(
                lambda _module, _args, given, calls=calls: calls.append(given["timestep"].item()), with_kwargs=True
            )
            assert other(video, "a dog", **options, **case.always).frames.isfinite().all()
            handle.remove()
            assert calls == pipeline.scheduler.timesteps.tolist()[-steps:]


@torch.no_grad()
def test_another_scheduler_is_refused():
    """Whose steps an expert would not follow: it would run all of them as the first."""
    pipeline, mixture = build(CASES["wan"])
    noise = torch.randn(1, *mixture.backbone.latent_shape())
    with attach(pipeline, mixture, SIGMAS):
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift=3.0)
        with pytest.raises(ValueError, match=r"has a FlowMatchEulerDiscreteScheduler now, .*apply\(pipeline, source, "):
            latents_of(pipeline, mixture.backbone, noise, "a dog")
