"""LTX-Video: the kit, its stock pipeline step by step, scaling, folders, and the recipe from training to a pipeline."""

import json
import math
import re

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from saved_pipelines import _t5, t5_tokenizer
from transformers import T5Config, T5EncoderModel

from moedistill.flow.process import jump
from moedistill.flow.sampling import sample
from moedistill.integrations.diffusers.apply import apply
from moedistill.model.backbone import VideoSize
from moedistill.model.mixture import Mixture
from moedistill.recipe.loading import load_recipe
from moedistill.runs.loop import run
from moedistill.runs.sample import sample_run
from moedistill.testing.running import BackboneContract
from moedistill_ltx.backbone import LTXConfig

PROMPT = "a dog runs along a beach"


class TestLTX(BackboneContract):
    config = LTXConfig(pretrained=None)


class ConditionedVAE(LTXConfig):
    """LTX-Video 0.9.1, whose VAE takes the noise level of its latents; with a scaling factor, which it could have."""

    def tiny_vae(self):
        config = dict(super().tiny_vae().config)
        vae = type(super().tiny_vae())(**{**config, "timestep_conditioning": True, "scaling_factor": 0.5})
        vae.latents_mean += 0.1
        return vae


def tiny(config=LTXConfig, **changes):
    return config(pretrained=None, **changes).tiny().build(seed=0)


def stock_pipeline(backbone):
    """As a user of diffusers makes it; nothing but weights are the backbone's. It has a text encoder too."""
    pipeline = LTXPipeline(
        transformer=backbone.network,
        vae=backbone.pipeline().vae,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024,
            max_image_seq_len=4096, shift_terminal=0.1,
        ),
        text_encoder=T5EncoderModel(T5Config(**{**_t5(), "d_model": 16})).eval(),
        tokenizer=t5_tokenizer(),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sizes(video):
    return {"num_frames": video.num_frames, "height": video.height, "width": video.width}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder in diffusers' layout, and the pipeline that was saved."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = stock_pipeline(tiny())
    place = tmp_path_factory.mktemp("ltx")
    pipeline.save_pretrained(place)
    return place, pipeline


# -- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "video", [VideoSize(num_frames=17, height=64, width=96), VideoSize(num_frames=9, height=96, width=32)]
)
def test_fifty_steps_are_those_of_the_stock_pipeline(video):
    """At the pipeline's own frame rate, by its own schedule, from the same noise."""
    backbone = tiny()
    noise = torch.randn(2, *backbone.latent_shape(video), generator=torch.Generator().manual_seed(1))
    cond = backbone.encode([PROMPT, "rain at night"])
    pipeline = stock_pipeline(backbone)
    packed = pipeline._pack_latents(noise)
    wanted = pipeline(
        **cond, **sizes(video), latents=packed, num_inference_steps=50, guidance_scale=1.0, output_type="latent"
    ).frames  # fmt: skip
    sigmas = pipeline.scheduler.sigmas
    assert len(sigmas) == 51
    assert sigmas[-2].item() == pytest.approx(0.1)
    found = sample(lambda x, sigma: backbone.velocity(backbone.network, x, sigma, cond), noise, sigmas)
    wanted = pipeline._unpack_latents(wanted, *noise.shape[2:])
    assert (wanted - noise).abs().max() > 0.1
    assert (found - wanted).abs().max() <= 1e-4


def test_positions_are_in_seconds_and_pixels():
    """The frame rate and the compression reach the network: it is not the one without them."""
    backbone = tiny()
    x = torch.randn(1, *backbone.latent_shape(), generator=torch.Generator().manual_seed(1))
    cond, sigma = backbone.encode([PROMPT]), torch.tensor([0.5])
    own = backbone.velocity(backbone.network, x, sigma, cond)
    seen = []
    handle = backbone.network.rope.register_forward_pre_hook(lambda _, args: seen.append(args))
    backbone.velocity(backbone.network, x, sigma, cond)
    handle.remove()
    assert seen[0][1:5] == (3, 2, 3, (8 / 25, 32, 32))
    backbone.fps = 50.0
    other = backbone.velocity(backbone.network, x, sigma, cond)
    assert (other - own).abs().max() > 1e-4
    # The pipeline is told of it too.
    (high, start), (low, end), *_ = backbone.native_trajectory(x, cond, 2)
    v = backbone.velocity(backbone.network, start, torch.tensor([high]), cond)
    assert torch.allclose(jump(start, v, high, low), end, atol=1e-6)


def test_padding_is_not_read():
    backbone = tiny()
    x = torch.randn(1, *backbone.latent_shape(), generator=torch.Generator().manual_seed(1))
    cond, sigma = backbone.encode([PROMPT]), torch.tensor([0.5])
    mask = cond["prompt_attention_mask"]
    assert 0 < mask.sum() < mask.numel()
    v = backbone.velocity(backbone.network, x, sigma, cond)
    padding = {**cond, "prompt_embeds": torch.where(mask[..., None], cond["prompt_embeds"], 9.0)}
    text = {**cond, "prompt_embeds": torch.where(mask[..., None], 9.0, cond["prompt_embeds"])}
    assert torch.equal(backbone.velocity(backbone.network, x, sigma, padding), v)
    assert not torch.equal(backbone.velocity(backbone.network, x, sigma, text), v)


def test_modulation_is_shared_by_low_rank_experts_and_trained_by_full_ones():
    recipe = load_recipe("dcm_ltx")
    mixture = Mixture(tiny(), recipe.experts)
    assert "scale_shift_table" in mixture.experts["semantic"].parameters
    assert not any(name.startswith("scale_shift_table") for name in mixture.experts["detail"].parameters)


# -- latents ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LTXConfig, ConditionedVAE])
def test_latents_are_scaled_and_decoded_as_by_the_pipeline(config):
    backbone = tiny(config)
    pipeline, shape = stock_pipeline(backbone), backbone.latent_shape()
    moments = pipeline.vae.latents_mean, pipeline.vae.latents_std, pipeline.vae.config.scaling_factor
    own = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    latents, _ = backbone.prepare(own, {})
    assert torch.allclose(latents, pipeline._normalize_latents(own, *moments), atol=1e-6)
    assert torch.allclose(backbone.denormalise(latents), own, atol=1e-6)
    assert (latents - own).abs().max() > 0.05
    # The same noise twice: what the pipeline ends with, and what it makes of that.
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(2))
    cond = backbone.encode([PROMPT])
    options = {"latents": pipeline._pack_latents(noise), "num_inference_steps": 2, "guidance_scale": 1.0}
    calls = [pipeline(**cond, **sizes(backbone.video), **options, output_type=form).frames for form in ("latent", "pt")]
    wanted = calls[1].permute(0, 2, 1, 3, 4)
    found = backbone.decode(pipeline._unpack_latents(calls[0], *shape[1:]))
    assert found.shape == wanted.shape == (1, 3, 17, 64, 96)
    assert (found - wanted).abs().max() < 1e-5
    assert found.std() > 1e-3


# -- a model's folder -------------------------------------------------------------------------------------------------


def test_a_folder_gives_weights_text_and_scaling(folder):
    place, pipeline = folder
    config = LTXConfig(pretrained=str(place), video=LTXConfig.tiny_video)
    backbone = config.build()
    assert (backbone.latent_shape(), config.inputs()["prompt_embeds"].pattern()) == ((8, 3, 2, 3), "[any, 16]")
    weights = pipeline.transformer.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in backbone.network.state_dict().items())
    cond = backbone.encode([PROMPT, "rain"])
    embeds, mask, _, _ = pipeline.encode_prompt([PROMPT, "rain"], do_classifier_free_guidance=False)
    assert embeds.shape == (2, 128, 16)
    assert (cond["prompt_embeds"] - embeds).abs().max() <= 1e-5
    assert torch.equal(cond["prompt_attention_mask"], mask)
    assert torch.equal(backbone._moments[0].flatten(), pipeline.vae.latents_mean)


def test_later_models_count_positions_otherwise(folder, tmp_path):
    place, _ = folder
    for part in place.iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "LTXConditionPipeline"}))
    with pytest.raises(ValueError, match=r"LTXConditionPipeline, as LTX-Video is from 0\.9\.5 on.*knows 0\.9\.0"):
        LTXConfig(pretrained=str(tmp_path)).build()


def test_the_published_network_has_the_defaults_of_its_class():
    with torch.device("meta"):
        network = LTXVideoTransformer3DModel()
    real = LTXConfig(pretrained="Lightricks/LTX-Video").real_network()
    assert real == {name: network.config[name] for name in real}
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(1.923e9, rel=1e-3)  # as the recipe says
    backbone = LTXConfig(pretrained=None).backbone_class(LTXConfig(pretrained=None), {"transformer": network})
    assert (len(backbone.blocks), backbone.hidden_size) == (28, 2048)
    targets = [path for path, _ in network.named_modules() if re.fullmatch(backbone.lora_targets["attention"], path)]
    assert len(targets) == 28 * 8


# -- the recipe -------------------------------------------------------------------------------------------------------


def test_the_recipe_s_shift_is_the_scheduler_s_at_its_size():
    recipe = load_recipe("dcm_ltx")
    scheduler = recipe.backbone.scheduler().config
    with torch.device("meta"):
        network = LTXVideoTransformer3DModel(num_layers=1)
    _, t, h, w = recipe.backbone.backbone_class(recipe.backbone, {"transformer": network}).latent_shape()
    assert t * h * w == 4576
    slope = (scheduler.max_shift - scheduler.base_shift) / (scheduler.max_image_seq_len - scheduler.base_image_seq_len)
    mu = scheduler.base_shift + slope * (t * h * w - scheduler.base_image_seq_len)
    assert recipe.trajectory.shift == pytest.approx(math.exp(mu), abs=0.05)


def test_from_training_to_a_pipeline(folder, tmp_path):
    """The recipe itself on a folder of weights; a pipeline with its experts gives the frames that `sample` gives."""
    place, _ = folder
    changes = [
        f"backbone.pretrained={place}", "backbone.dtype=float32", "data.path=null", "training.batch_size=2",
        "backbone.video={num_frames: 17, height: 64, width: 96}", "stages.semantic.steps=2", "stages.detail.steps=2",
        "stages.semantic.optimizer.lr=0.01", "stages.detail.optimizer.lr=0.01", "stages.samples.prompts=[rain]",
        "experts.detail.rank=8",
    ]  # fmt: skip
    result = run(load_recipe("dcm_ltx", changes), output=tmp_path / "run", device="cpu")
    wanted = sample_run(result.output, output=tmp_path / "samples", prompts=[PROMPT], seed=5).videos[0]
    pipeline = LTXPipeline.from_pretrained(place)
    pipeline.set_progress_bar_config(disable=True)
    options = {**sizes(LTXConfig.tiny_video), "output_type": "pt"}

    def frames(**changes):
        noise = torch.Generator().manual_seed(5)
        return pipeline(PROMPT, **{**options, **changes}, generator=noise).frames[0].permute(1, 0, 2, 3)

    before = frames(num_inference_steps=4)
    with apply(pipeline, result.output / "export"):
        assert (frames() - wanted).abs().max() <= 1e-5  # guided by default: both halves in one batch
        assert (frames(guidance_scale=1.0, num_inference_steps=7) - wanted).abs().max() <= 1e-5
        assert (frames(frame_rate=50) - wanted).abs().max() <= 1e-5  # the one that was trained with stays
    assert (before - wanted).abs().max() > 1e-3
    assert torch.equal(frames(num_inference_steps=4), before)
