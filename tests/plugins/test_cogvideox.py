"""CogVideoX: the kit, its noise levels and times, and its own pipeline and scheduler, on miniatures of all models."""

import json
import math
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from helpers import as_if_trained, distil, set_up

from moedistill import Input
from moedistill.data.loading import Batch
from moedistill.flow.process import add_noise, jump, to_vp
from moedistill.flow.sampling import sample
from moedistill.flow.trajectory import Trajectory
from moedistill.integrations.diffusers.pipeline import attach
from moedistill.integrations.diffusers.scheduler import FewStepScheduler
from moedistill.model.backbone import TEACHER, VideoSize
from moedistill.model.guidance import Guidance
from moedistill.model.mixture import Mixture
from moedistill.recipe.loading import load_recipe
from moedistill.runs.build import build_mixture
from moedistill.runtime.randomness import torch_seed
from moedistill.testing.running import BackboneContract
from moedistill_cogvideox.backbone import PUBLISHED, CogVideoXBackbone, CogVideoXConfig, sigma_table

MODELS = list(PUBLISHED)
SMALL = VideoSize(num_frames=9, height=64, width=32)
"""Not the size that the miniatures' positions are made for."""


def tiny(model, **changes):
    return CogVideoXConfig(pretrained=None, model=model, **changes).tiny()


def stock_scheduler(model):
    """As published, written out once more."""
    return CogVideoXDDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=True, prediction_type="v_prediction", timestep_spacing="trailing",
        rescale_betas_zero_snr=True, snr_shift_scale={"2b": 3.0, "5b": 1.0, "1.5-5b": 1.0}[model],
    )  # fmt: skip


def noise_for(backbone, batch=1, video=None, seed=0):
    return torch.randn(batch, *backbone.latent_shape(video), generator=torch.Generator().manual_seed(seed))


# -- the kit ----------------------------------------------------------------------------------------------------------


class FromImages(CogVideoXBackbone):
    """Image-to-video, with an image for each prompt."""

    def encode_prompts(self, prompts):
        cond = super().encode_prompts(prompts)
        seeds = [torch_seed("image", prompt) for prompt in prompts]
        images = [torch.randn(self.latent_shape(), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        offsets = torch.tensor([2.0 + seed % 3 for seed in seeds])
        return {**cond, "image_latents": torch.stack(images).to(cond["prompt_embeds"]), "ofs": offsets}


class FromImagesConfig(CogVideoXConfig):
    backbone_class = FromImages

    def tiny_network(self):
        return {**super().tiny_network(), "in_channels": 32, "ofs_embed_dim": 16}


class Test2B(BackboneContract):
    config = CogVideoXConfig(pretrained=None, model="2b")


class Test5B(BackboneContract):
    config = CogVideoXConfig(pretrained=None, model="5b")


class Test15(BackboneContract):
    config = CogVideoXConfig(pretrained=None, model="1.5-5b")


class Test15FromImages(BackboneContract):
    config = FromImagesConfig(pretrained=None, model="1.5-5b")


# -- noise levels and times -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "first", "last_but_one"), [("2b", 0.0481, 0.99975), ("5b", 0.0283, 0.99956), ("1.5-5b", 0.0283, 0.99956)]
)
def test_the_table_is_the_schedulers(model, first, last_but_one):
    table, alpha_bar = tiny(model).native_sigmas(), stock_scheduler(model).alphas_cumprod
    alpha, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    assert table.dtype == torch.float32
    assert (table - s / (alpha + s)).abs().max() < 1e-7
    assert table[-1] == 1
    assert table[[0, 998]].tolist() == pytest.approx([first, last_but_one], abs=5e-5)
    assert tiny(model).scheduler().config == stock_scheduler(model).config


@pytest.mark.parametrize("model", MODELS)
def test_fifty_native_points_are_the_schedulers_steps(model):
    scheduler, trajectory = stock_scheduler(model), Trajectory.native(tiny(model).native_sigmas(), 50)
    scheduler.set_timesteps(50)
    assert trajectory.timestep(trajectory.points[1:]).tolist() == scheduler.timesteps.flip(0).tolist()


def test_times_lie_between_the_entries_of_the_table():
    backbone = tiny("2b").build()
    table, times = backbone.config.native_sigmas(), []
    backbone.network.time_proj.register_forward_pre_hook(lambda _, args: times.append(args[0]))
    sigma = torch.stack([table[0], torch.lerp(table[500], table[501], 0.25), table[998], table[999], torch.tensor(0.0)])
    cond, x = backbone.encode([str(k) for k in range(5)]), noise_for(backbone, 5)
    with torch.no_grad():
        velocity = backbone.velocity(backbone.network, x, sigma, cond)
    assert times[0].dtype == torch.float32
    assert times[0].tolist() == pytest.approx([0, 500.25, 998, 999, 0], abs=1e-3)
    assert velocity.isfinite().all()
    with pytest.raises(ValueError, match=r"sigma 0.01 has no native time: the model's table starts at sigma 0.0480896"):
        backbone.velocity(backbone.network, x, torch.full((5,), 0.01), cond)


def test_a_perfect_network_gives_the_velocity():
    """v = alpha·noise - s·x0 at x_vp = alpha·x0 + s·noise."""
    backbone, [x0, noise] = tiny("5b").build(), torch.randn(2, 16, 5, 4, 6)
    x0, noise = x0[None], noise[None]
    sigma = backbone.config.native_sigmas()[[700]]
    s = sigma.item() / math.hypot(sigma.item(), 1 - sigma.item())
    alpha = math.sqrt(1 - s * s)
    x_native, _ = backbone.to_native(add_noise(x0, noise, sigma), sigma)
    assert torch.allclose(x_native, alpha * x0 + s * noise, atol=1e-5)
    assert torch.allclose(backbone.from_native(alpha * noise - s * x0, x_native, sigma), noise - x0, atol=1e-5)


@pytest.mark.parametrize("model", ["2b", "5b"])
def test_few_step_scheduler_against_ddim_at_its_own_times(model):
    scheduler, table = stock_scheduler(model), tiny(model).native_sigmas()
    scheduler.set_timesteps(50)
    times = scheduler.timesteps.tolist()
    few = FewStepScheduler(
        sigmas=(*table[times].tolist(), 0.0), timesteps=tuple(map(float, times)), prediction_type="v_prediction"
    )
    few.set_timesteps(50)
    generator = torch.Generator().manual_seed(0)
    assert few.init_noise_sigma == scheduler.init_noise_sigma
    for time in times:
        x, v = torch.randn(2, 1, 3, 4, 5, 6, generator=generator)
        wanted = scheduler.step(v, time, x, return_dict=False)[0]
        assert torch.allclose(few.step(v, time, x, return_dict=False)[0], wanted.float(), atol=1e-5)


# -- the network as its pipeline calls it -----------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["5b", "1.5-5b"])
@pytest.mark.parametrize("video", [None, SMALL, VideoSize(num_frames=17, height=32, width=80)])
def test_rotary_positions_are_the_pipelines(model, video):
    backbone = tiny(model).build()
    _, frames, height, width = backbone.latent_shape(video)
    wanted = backbone.pipeline()._prepare_rotary_positional_embeddings(8 * height, 8 * width, frames, "cpu")
    calls = []
    backbone.network.register_forward_pre_hook(lambda _, _args, kwargs: calls.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        x = noise_for(backbone, video=video)
        backbone.velocity(backbone.network, x, torch.tensor([0.5]), backbone.encode(["a"]))
    assert all(torch.equal(a, b) for a, b in zip(calls[0]["image_rotary_emb"], wanted, strict=True))


@pytest.mark.parametrize("model", MODELS)
def test_fifty_steps_of_the_stock_pipeline_are_ours(model):
    backbone = tiny(model).build()
    noise, cond = noise_for(backbone, video=SMALL), backbone.encode(["a dog"])
    native = backbone.native_trajectory(noise, cond, 50)
    sigmas = [sigma for sigma, _ in native]
    assert len(native) == 51
    assert (sigmas[0], sigmas[-1]) == (1.0, 0.0)
    ours = [noise]
    sample(
        lambda x, sigma: backbone.velocity(backbone.network, x, sigma, cond), noise, sigmas,
        callback=lambda _step, _sigma, x: ours.append(x),
    )  # fmt: skip
    for (_, wanted), found in zip(native, ours, strict=True):
        assert (found - wanted).abs().max() < 1e-4
    assert (ours[-1] - noise).abs().max() > 0.5


def test_native_steps_divide_the_table():
    backbone = tiny("2b").build()
    noise, cond = noise_for(backbone), backbone.encode(["a dog"])
    assert [len(backbone.native_trajectory(noise, cond, steps)) - 1 for steps in (1, 4, 7)] == [1, 4, 5]


def test_images_and_their_offset_go_in_as_the_pipeline_gives_them():
    backbone = FromImagesConfig(pretrained=None, model="1.5-5b").tiny().build()
    x, sigma = noise_for(backbone, 2), torch.tensor([0.9, 0.9])
    cond = {name: value for name, value in backbone.encode(["a", "b"]).items() if name != "ofs"}
    network, (x_vp, times) = backbone.network, backbone.to_native(x, sigma)
    with torch.no_grad():
        wanted = network(
            hidden_states=torch.cat([x_vp.transpose(1, 2), cond["image_latents"].transpose(1, 2)], dim=2),
            encoder_hidden_states=cond["prompt_embeds"], timestep=times, ofs=torch.full((1,), 2.0),
            image_rotary_emb=backbone._rotary(backbone.token_grid(x.shape), x.device), return_dict=False,
        )[0].transpose(1, 2)  # fmt: skip
        found, told, other = (
            backbone.native_prediction(network, x, sigma, {**cond, **changes})
            for changes in ({}, {"ofs": torch.tensor([2.0, 2.0])}, {"ofs": torch.tensor([2.0, 3.0])})
        )
    assert torch.allclose(found, wanted, atol=1e-6)
    assert torch.equal(found, told)
    assert torch.equal(found[0], other[0])
    assert (found[1] - other[1]).abs().max() > 1e-4
    assert backbone.native_trajectory(x, cond, 4) is None
    with pytest.raises(ValueError, match="makes videos from images"):
        backbone.pipeline()


def test_unembed_in_bfloat16_takes_features_of_either_dtype():
    backbone = tiny("1.5-5b", dtype="bfloat16").build()
    mixture = Mixture(backbone, {})
    mixture.autocast_dtype = torch.bfloat16
    x, sigma, cond = noise_for(backbone), torch.tensor([0.8]), backbone.encode(["a dog"])
    with torch.no_grad(), mixture.using(TEACHER):
        [hidden] = mixture.hidden_states(x, sigma, cond, backbone.blocks[-1:])
        assert hidden.dtype == torch.bfloat16
        wanted = backbone.native_prediction(backbone.network, x, sigma, cond).float()
        for states in (hidden, hidden.float()):
            assert (mixture.unembed(states, x, sigma, cond) - wanted).abs().max() < 1e-2 * wanted.abs().max()


# -- videos -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "shape", "fps"),
    [("2b", (16, 13, 60, 90), 8.0), ("5b", (16, 13, 60, 90), 8.0), ("1.5-5b", (16, 22, 96, 170), 16.0)],
)
def test_published_sizes(model, shape, fps):
    config = CogVideoXConfig(pretrained=None, model=model)
    backbone = config.build()
    assert (backbone.latent_shape(), backbone.fps) == (shape, fps)
    assert backbone.latent_shape(SMALL) == (16, 4 if model == "1.5-5b" else 3, 8, 4)
    assert config.replace(video=SMALL).build().latent_shape() == backbone.latent_shape(SMALL)
    for frames, near in ((50, "49 or 57"), (85, "81 or 89"), (48, "41 or 49")):
        with pytest.raises(ValueError, match=rf"num_frames {frames} must be 1 more than a multiple of 8: {near}"):
            backbone.latent_shape(VideoSize(num_frames=frames, height=480, width=720))
    with pytest.raises(ValueError, match="height 40 must be a multiple of 16"):
        backbone.latent_shape(VideoSize(num_frames=49, height=40, width=720))


@pytest.mark.parametrize("model", MODELS)
def test_decoding(model):
    backbone = tiny(model).build()
    latents = noise_for(backbone, video=SMALL)
    video = backbone.decode(latents)
    assert video.shape == (1, 3, 9, 64, 32)
    assert torch.equal(backbone.decode(latents), video)
    vae = backbone.load_vae()
    vae.disable_tiling()
    kept = latents[:, :, 1:] if model == "1.5-5b" else latents
    with torch.no_grad():
        pixels = vae.decode(kept / {"2b": 1.15258426, "5b": 0.7, "1.5-5b": 0.7}[model]).sample
    assert torch.allclose(video, (pixels / 2 + 0.5).clamp(0, 1), atol=1e-6)


def test_an_odd_frame_stands_twice_in_1_5():
    cond = {"prompt_embeds": torch.zeros(2, 12, 24), "image_latents": torch.randn(2, 16, 5, 4, 6)}
    latents = torch.randn(2, 16, 5, 4, 6)
    from_images = FromImagesConfig(pretrained=None, model="1.5-5b").tiny().build()
    prepared, with_images = from_images.prepare(latents, cond)
    torch.testing.assert_close(prepared, 0.7 * latents[:, :, [0, 0, 1, 2, 3, 4]])
    assert torch.equal(with_images["image_latents"][:, :, :5], cond["image_latents"])
    assert not with_images["image_latents"][:, :, 5].any()
    assert torch.equal(with_images["prompt_embeds"], cond["prompt_embeds"])
    torch.testing.assert_close(tiny("1.5-5b").build().prepare(prepared, {})[0], 0.7 * prepared)
    torch.testing.assert_close(tiny("5b").build().prepare(latents, {})[0], 0.7 * latents)


# -- experts ----------------------------------------------------------------------------------------------------------


def recipe_for(model, **backbone):
    return {
        "name": "cogvideox",
        "backbone": {"kind": "cogvideox", "pretrained": None, "model": model, "video": vars(SMALL), **backbone},
        "trajectory": {"kind": "native"},
        "router": {"kind": "timestep", "experts": ["semantic", "detail"], "boundaries": [{"point": 38}]},
        "experts": {
            "semantic": {"kind": "full"},
            "detail": {"kind": "lora", "from": "semantic", "rank": 2, "alpha": 4},
        },
        "data": {"kind": "latents", "path": None},
        "training": {"batch_size": 2},
        "stages": [distil(), distil("detail")],
        "sample": {"points": [50, 44, 38, 19]},
    }


def trained_mixture(model, **backbone):
    recipe = load_recipe(recipe_for(model, **backbone))
    mixture = build_mixture(recipe)
    for seed, name in enumerate(("semantic", "detail")):
        as_if_trained(mixture.experts[name], seed)
    return mixture, recipe.sample.resolve(mixture.trajectory)


@pytest.mark.parametrize("model", MODELS)
def test_one_step_of_consistency_on_the_native_trajectory(model):
    training, stage = set_up(recipe_for(model, guidance={"mode": "classifier_free", "scale": 6.0}))
    expert = training.mixture.experts["semantic"]
    before = {name: value.detach().clone() for name, value in expert.parameters.items()}
    samples = [training.dataset[k] for k in range(2)]
    cond = {"prompt_embeds": torch.stack([one.conditioning["prompt_embeds"] for one in samples])}
    batch = training.begin(Batch(torch.stack([one.latents for one in samples]), cond, [0, 1], boundary=True))
    teacher = []
    training.teacher = lambda *inputs, usual=training.teacher: (
        teacher.append((inputs, usual(*inputs))) or teacher[-1][1]
    )
    with training.mixture.using("semantic"):
        stage.step(training, batch)
    [((x, sigma, _), velocity)] = teacher
    assert set(sigma.tolist()) <= set(training.trajectory.points[39:].tolist())
    assert velocity.shape == x.shape == (2, *training.mixture.backbone.latent_shape())
    assert any(not torch.equal(value, before[name]) for name, value in expert.parameters.items())
    assert training.take_metrics()["loss/huber"] > 0


@pytest.mark.parametrize("model", MODELS)
def test_the_pipeline_with_experts_is_our_sampler(model):
    mixture, sigmas = trained_mixture(model)
    backbone, prompts = mixture.backbone, ["a dog", "rain"]
    videos = list(backbone.generate(mixture, prompts, sigmas, seed=3))
    for k, prompt in enumerate(prompts):
        channels, frames, *size = backbone.latent_shape()
        generator = torch.Generator().manual_seed(3 + k)
        noise = torch.randn(1, frames, channels, *size, generator=generator).transpose(1, 2)
        latents = mixture.generate(noise, backbone.encode([prompt]), sigmas)
        assert videos[k].shape == (3, 9, 64, 32)
        assert (videos[k] - backbone.decode(latents)[0]).abs().max() < 1e-5
    assert (videos[0] - videos[1]).abs().max() > 1e-2


def test_a_guided_call_of_a_pipeline_with_experts_is_an_unguided_one():
    mixture, sigmas = trained_mixture("5b")
    backbone = mixture.backbone
    pipeline, cond = backbone.pipeline(), backbone.encode(["a dog"])
    pipeline.set_progress_bar_config(disable=True)
    size = {"num_frames": 9, "height": 64, "width": 32, "output_type": "latent"}
    batches = []
    backbone.network.patch_embed.register_forward_pre_hook(lambda _, args: batches.append(len(args[1])))
    mixture.experts["semantic"].shared.network.patch_embed.register_forward_pre_hook(
        lambda _, args: batches.append(len(args[1]))
    )
    null = {"negative_prompt_embeds": backbone.encode([""])["prompt_embeds"]}
    own = (pipeline.transformer, pipeline.scheduler)

    def call(scale, **more):
        return pipeline(
            **cond, **(null if scale > 1 else {}), **size, **more, guidance_scale=scale,
            generator=torch.Generator().manual_seed(0),
        ).frames  # fmt: skip

    with attach(pipeline, mixture, sigmas):
        unguided, guided, dynamic = call(1.0), call(6.0), call(6.0, use_dynamic_cfg=True)
    assert set(batches) == {1}
    assert len(batches) == 3 * 4
    assert (guided - unguided).abs().max() < 1e-5 * unguided.abs().max()
    assert (dynamic - unguided).abs().max() < 1e-5 * unguided.abs().max()
    assert (pipeline.transformer, pipeline.scheduler) == own
    assert (call(6.0, num_inference_steps=4) - unguided).abs().max() > 1e-2


def test_bfloat16_from_the_pipeline():
    mixture, sigmas = trained_mixture("2b", dtype="bfloat16")
    [video] = mixture.backbone.generate(mixture, ["a dog"], sigmas, seed=0)
    assert video.dtype == torch.float32
    assert video.isfinite().all()
    assert video.std() > 1e-3


def test_each_expert_is_at_its_sigma_in_variance_preserving_steps():
    """The pipeline's sample is `to_vp` of ours after every step."""
    mixture, sigmas = trained_mixture("2b")
    backbone, cond = mixture.backbone, mixture.backbone.encode(["a dog"])
    pipeline, seen = backbone.pipeline(), []
    pipeline.set_progress_bar_config(disable=True)

    def keep(_pipeline, _step, time, tensors):
        seen.append((float(time), tensors["latents"]))
        return {}

    noise = noise_for(backbone)
    with attach(pipeline, mixture, sigmas):
        pipeline(
            **cond, num_frames=9, height=64, width=32, latents=noise.transpose(1, 2), guidance_scale=1.0,
            output_type="latent", callback_on_step_end=keep,
        )  # fmt: skip
    x = noise
    for k, (time, latents) in enumerate(seen):
        name = mixture.router.expert_at(sigmas[k].item())
        assert time == pytest.approx(mixture.trajectory.timestep(sigmas[k].item()), abs=1e-3)
        with torch.no_grad(), mixture.using(name):
            velocity = mixture(x, sigmas[k : k + 1], cond)
        x = jump(x, velocity, sigmas[k : k + 1], sigmas[k + 1 : k + 2])
        assert torch.allclose(latents.transpose(1, 2), to_vp(x, sigmas[k + 1].item()), atol=1e-5)
    assert len(seen) == 4


# -- a model's folder -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A miniature of 5B, its scheduler the stochastic one."""
    where = tmp_path_factory.mktemp("cogvideox")
    pipeline = tiny("5b").build().pipeline()
    pipeline.scheduler = CogVideoXDPMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(where)
    file = where / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "scaling_factor": 0.9}))
    return where


def test_a_folder_is_loaded(folder):
    config = CogVideoXConfig(pretrained=str(folder), model="5b", video=CogVideoXConfig.tiny_video)
    backbone, miniature = config.build(), tiny("5b").build()
    x, cond = noise_for(miniature), miniature.encode(["a dog"])
    with torch.no_grad():
        found, wanted = (b.velocity(b.network, x, torch.tensor([0.7]), cond) for b in (backbone, miniature))
    assert torch.equal(found, wanted)
    torch.testing.assert_close(backbone.prepare(x, {})[0], 0.9 * x)
    layout = config.layout()
    assert (layout.channels, layout.multiple) == (16, (1, 2, 2))
    assert layout.conditioning == {"prompt_embeds": Input("text", (12, 24))}
    native = backbone.native_trajectory(x, cond, 4)  # by deterministic steps nevertheless
    assert torch.allclose(native[0][1], x)
    for (sigma, before), (sigma_next, after) in pairwise(native):
        with torch.no_grad():
            velocity = backbone.velocity(backbone.network, before, torch.tensor([sigma]), cond)
        assert torch.allclose(jump(before, velocity, sigma, sigma_next), after, atol=1e-5)


@pytest.mark.parametrize("model", ["2b", "1.5-5b"])
def test_a_folder_of_another_model_is_refused(folder, model):
    with pytest.raises(ValueError, match=rf"model {model} is not that of .*; set backbone.model to 5b"):
        CogVideoXConfig(pretrained=str(folder), model=model).build()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"snr_shift_scale": 3.0}, "snr_shift_scale 3.0, but model 5b was published with 1.0"),
        ({"rescale_betas_zero_snr": False}, "rescale_betas_zero_snr False, but model 5b was published with True"),
        ({"prediction_type": None}, "prediction_type epsilon, but model 5b was published with v_prediction"),
    ],
)
def test_a_folder_with_other_noise_levels_is_refused(folder, tmp_path, changes, message):
    for part in ("transformer", "scheduler"):
        (tmp_path / part).mkdir()
        for file in (folder / part).iterdir():
            (tmp_path / part / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "scheduler" / "scheduler_config.json"
    settings = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))
    config = CogVideoXConfig(pretrained=str(tmp_path), model="5b")
    with pytest.raises(ValueError, match=message):
        config.build()
    file.unlink()
    assert config.build().hidden_size == 32  # the transformer alone


def test_what_is_published_is_known_without_a_folder():
    layout = CogVideoXConfig(pretrained="nobody/cogvideox", model="1.5-5b").layout()
    assert (layout.channels, layout.multiple) == (16, (1, 2, 2))
    assert layout.conditioning == {"prompt_embeds": Input("text", (226, 4096))}
    assert CogVideoXConfig(pretrained="nobody/cogvideox", model="1.5-5b").patch_size() == (2, 2, 2)
    with pytest.raises(ValueError, match="hf download nobody/cogvideox"):
        CogVideoXConfig(pretrained="nobody/cogvideox").build()
    with pytest.raises(ValueError, match="CogVideoX has no input for the scale; use classifier_free"):
        CogVideoXConfig(pretrained=None, guidance=Guidance(mode="embedded", scale=6.0))
    assert not torch.equal(sigma_table(1.0), sigma_table(3.0))


def test_a_recipe_is_checked_without_diffusers():
    code = (
        "import sys\n"
        "from moedistill_cogvideox.backbone import CogVideoXConfig\n"
        "config = CogVideoXConfig(pretrained=None, model='1.5-5b')\n"
        "assert len(config.native_sigmas()) == 1000 and config.layout().channels == 16 and config.video.width == 1360\n"
        "found = {name.split('.')[0] for name in sys.modules} & {'diffusers', 'transformers', 'peft'}\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
