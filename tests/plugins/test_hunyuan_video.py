"""HunyuanVideo: the kit, its text, the embedded guidance, its sizes, and the stock pipeline step by step."""

import gzip
import json
import logging
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from saved_pipelines import save_pipeline

from moedistill.flow.routers import TimestepRouter
from moedistill.flow.sampling import sample
from moedistill.flow.trajectory import Trajectory
from moedistill.integrations.diffusers.pipeline import attach
from moedistill.model.backbone import VideoSize
from moedistill.model.experts import LoRAConfig
from moedistill.model.guidance import Guidance
from moedistill.model.mixture import Mixture
from moedistill.testing.running import BackboneContract
from moedistill_hunyuan_video.backbone import HunyuanVideoConfig

REAL_KEYS = Path(__file__).parents[3] / "shared" / "goldens" / "real_keys_hy.json.gz"
EMBEDDED = Guidance(mode="embedded", scale=6.0)
PROMPTS = ["a dog runs along a beach", "rain at night"]


class TestHunyuan(BackboneContract):
    config = HunyuanVideoConfig(pretrained=None, guidance=EMBEDDED)


def tiny(guidance=EMBEDDED, network=None, **changes):
    """The miniature, or the backbone around a network with other arguments."""
    config = HunyuanVideoConfig(pretrained=None, guidance=guidance, **changes).tiny()
    if network is None:
        return config.build(seed=0)
    return config.wrap({"transformer": HunyuanVideoTransformer3DModel(**{**config.tiny_network(), **network})})


def inputs(backbone, batch=2, seed=0):
    """Noise, a sigma for each sample, and prompts of different lengths."""
    noise = torch.randn(batch, *backbone.latent_shape(), generator=torch.Generator().manual_seed(seed))
    return noise, torch.linspace(0.9, 0.4, batch), backbone.encode(PROMPTS[:batch])


class Told:
    """The native times and embedded scales that a network is told, as its embedding receives them."""

    def __init__(self, network):
        self.times, self.scales = [], []
        network.time_text_embed.register_forward_pre_hook(self._keep)

    def _keep(self, _module, args):
        time, _pooled, scale = args
        for value in (time, scale):
            assert value is None or value.dtype == torch.float32
        self.times.append(time.tolist())
        self.scales.append(None if scale is None else scale.tolist())


# --- Text


def test_packed_text_is_unpacked():
    backbone = tiny()
    x, _, cond = inputs(backbone)
    tokens, pooled, mask = cond["prompt_embeds"], cond["pooled_prompt_embeds"], cond["prompt_attention_mask"]
    first = torch.cat([pooled, torch.zeros(2, tokens.shape[2] - pooled.shape[1])], 1)
    packed = {"prompt_embeds": torch.cat([first[:, None], tokens], 1), "prompt_attention_mask": mask}
    latents, unpacked = backbone.prepare(x, packed)
    assert {name: value.tolist() for name, value in unpacked.items()} == {
        name: value.tolist() for name, value in cond.items()
    }
    assert torch.allclose(latents, 0.476986 * x)
    assert set(packed) == {"prompt_embeds", "prompt_attention_mask"}  # not changed in place
    _, again = backbone.prepare(x, cond)
    assert again["prompt_embeds"] is tokens
    assert again["pooled_prompt_embeds"] is pooled
    # Packed text stored for the negative prompt, without a batch dimension.
    backbone.set_null({name: value[1] for name, value in packed.items()})
    null = backbone.null_conditioning(cond)
    for name, value in cond.items():
        assert torch.equal(null[name], value[1:].expand_as(value))


def test_text_that_cannot_be_read_is_refused():
    backbone = tiny()
    x, _, cond = inputs(backbone)
    with pytest.raises(ValueError, match=r"has prompt_attention_mask with 9 places for 10 tokens of prompt_embeds"):
        backbone.prepare(x, {**cond, "prompt_attention_mask": cond["prompt_attention_mask"][:, 1:]})
    empty = cond["prompt_attention_mask"].clone()
    empty[1] = False
    with pytest.raises(
        ValueError, match=r"prompt_attention_mask of sample 1 is all false, and attention to no token is NaN"
    ):
        backbone.prepare(x, {**cond, "prompt_attention_mask": empty})
    with pytest.raises(ValueError, match=r"prompt_attention_mask of the stored negative prompt is all false"):
        backbone.set_null({name: value[1] for name, value in cond.items()} | {"prompt_attention_mask": empty[1]})


@torch.no_grad()
def test_padding_has_no_effect():
    backbone = tiny()
    x, sigma, cond = inputs(backbone)
    mask, text = cond["prompt_attention_mask"], cond["prompt_embeds"]
    assert 0 < mask.sum() < mask.numel()
    v = backbone.velocity(backbone.network, x, sigma, cond)
    other = torch.where(mask[..., None], text, torch.randn(text.shape))
    assert torch.equal(backbone.velocity(backbone.network, x, sigma, {**cond, "prompt_embeds": other}), v)
    longer = {
        **cond,
        "prompt_embeds": torch.cat([text, torch.randn(text.shape)], 1),
        "prompt_attention_mask": torch.cat([mask, torch.zeros_like(mask)], 1),
    }
    assert torch.allclose(backbone.velocity(backbone.network, x, sigma, longer), v, atol=1e-6)
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        changed = backbone.velocity(backbone.network, x, sigma, {**cond, name: cond[name].flip(-1)})
        assert (changed - v).abs().max() > 1e-3


def test_text_encoders_of_a_folder(tmp_path, monkeypatch):
    folder = save_pipeline(tmp_path, "hunyuan_video")
    backbone = HunyuanVideoConfig(pretrained=str(folder), guidance=EMBEDDED).build()
    encoded = backbone.encode([*PROMPTS, ""])
    stock = HunyuanVideoPipeline.from_pretrained(folder)
    with torch.no_grad():
        tokens, pooled, mask = stock.encode_prompt([*PROMPTS, ""])
    assert tokens.shape == (3, 256, 24)
    torch.testing.assert_close(encoded["prompt_embeds"], tokens)
    torch.testing.assert_close(encoded["pooled_prompt_embeds"], pooled)
    assert torch.equal(encoded["prompt_attention_mask"], mask.bool())
    assert mask[2].any()  # of the empty prompt: what dropped text is told
    null = backbone.null_conditioning({name: value[:1] for name, value in encoded.items()})
    logged = []
    with monkeypatch.context() as patch:  # diffusers would say it of each prompt
        patch.setattr(logging.getLogger("diffusers"), "handlers", [handler := logging.Handler()])
        patch.setattr(handler, "handle", logged.append)
        with pytest.warns(UserWarning, match=r"^1 of 2 prompts is cut after 77 .* tokenizer_2 reads; the first: a a"):
            backbone.encode(["a " * 80, "b " * 75])
        assert not logged
    for name, value in null.items():
        assert torch.equal(value, encoded[name][2:])


# --- Guidance


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("guidance", "scale"),
    [(EMBEDDED, 6000.0), (Guidance(mode="classifier_free", scale=3.0), 1000.0), (Guidance(), 1000.0)],
)
def test_the_embedded_scale_reaches_the_network(guidance, scale, dtype):
    """In thousandths and float32, like the time: bfloat16 would make 6016 of 6000, and 984 of 982."""
    backbone = tiny(guidance, dtype=dtype)
    told = Told(backbone.network)
    x, _, cond = inputs(backbone)
    sigma = torch.tensor([0.982, 0.25])
    with torch.no_grad():
        backbone.velocity(backbone.network, x, sigma, cond)
        backbone.velocity(backbone.network, x, sigma, {**cond, "guidance": torch.tensor([6.016, 1.0])})
        cond = {**cond, "guidance": torch.tensor([2.0, 1.0])}
        backbone.unembed(backbone.network, torch.zeros(2, 30, 24), x, sigma, cond)
    assert told.times == [(1000 * sigma).tolist()] * 3
    assert told.scales == [[scale] * 2, [6016.0, 1000.0], [2000.0, 1000.0]]


@torch.no_grad()
def test_the_embedded_scale_changes_the_velocity():
    backbone = tiny()
    x, sigma, cond = inputs(backbone)
    at = {
        scale: backbone.velocity(backbone.network, x, sigma, {**cond, "guidance": torch.full((2,), scale)})
        for scale in (1.0, 6.0)
    }
    assert torch.equal(at[6.0], backbone.velocity(backbone.network, x, sigma, cond))
    assert (at[6.0] - at[1.0]).abs().max() > 1e-4
    both = backbone.velocity(backbone.network, x, sigma, {**cond, "guidance": torch.tensor([1.0, 6.0])})
    torch.testing.assert_close(both, torch.stack([at[1.0][0], at[6.0][1]]))


def test_networks_that_take_no_scale():
    with pytest.raises(ValueError, match=r"guidance.mode embedded: this network has no input for the scale"):
        tiny(network={"guidance_embeds": False})
    backbone = tiny(Guidance(), network={"guidance_embeds": False})
    told = Told(backbone.network)
    x, sigma, cond = inputs(backbone)
    with torch.no_grad():
        assert backbone.velocity(backbone.network, x, sigma, cond).isfinite().all()
    assert told.scales == [None]
    with pytest.raises(ValueError, match=r"image_condition_type 'token_replace' is made for image-to-video"):
        tiny(network={"image_condition_type": "token_replace"})


def mixture_of(backbone):
    """The teacher above point 2 of four, and a fresh low-rank expert below it."""
    trajectory = Trajectory.flow_matching(4, 5.0)
    mixture = Mixture(
        backbone,
        {"low": LoRAConfig(rank=2)},
        trajectory=trajectory,
        router=TimestepRouter.from_points(trajectory, ["teacher", "low"], [2]),
        guidance=backbone.config.guidance,
        autocast_dtype=torch.bfloat16 if backbone.config.dtype == "bfloat16" else None,
    )
    mixture.initialise()
    return mixture


def test_another_scale_for_the_experts():
    mixture = mixture_of(tiny(Guidance(mode="embedded", scale=6.0, student_scale=2.5)))
    told = Told(mixture.backbone.network)
    x, sigma, cond = inputs(mixture.backbone)
    with torch.no_grad():
        mixture(x, sigma, cond)
        with mixture.using("low"):
            mixture(x, sigma, cond)
    assert told.scales == [[6000.0] * 2, [2500.0] * 2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("student_scale", "scale"), [(None, 6000.0), (2.5, 2500.0)])
def test_in_a_pipeline_experts_are_told_what_they_were_trained_with(student_scale, scale, dtype):
    mixture = mixture_of(tiny(Guidance(mode="embedded", scale=6.0, student_scale=student_scale), dtype=dtype))
    backbone = mixture.backbone
    pipeline, seen = backbone.pipeline(), []
    pipeline.set_progress_bar_config(disable=True)
    x, _, cond = inputs(backbone, batch=1)
    backbone.network.time_text_embed.register_forward_pre_hook(lambda _module, args: seen.append(args[2].tolist()))
    with attach(pipeline, mixture, torch.cat([mixture.trajectory.points[1:].flip(0), torch.zeros(1)])):
        pipeline(**cond, guidance_scale=3.0, latents=x, output_type="latent", num_frames=17, height=32, width=48)
    teacher = 3008.0 if dtype == "bfloat16" else 3000.0  # as the stock pipeline rounds it
    assert seen == [[teacher]] * 2 + [[scale]] * 2


@pytest.mark.parametrize("guidance", [EMBEDDED, Guidance(mode="classifier_free", scale=3.0, negative_prompt="fog")])
def test_in_a_pipeline_the_teacher_is_guided_as_the_recipe_says(guidance):
    backbone = tiny(guidance)
    mixture = Mixture(backbone, {}, trajectory=Trajectory.flow_matching(4, 5.0), guidance=guidance)
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.0])
    [video] = backbone.generate(mixture, PROMPTS[:1], sigmas, seed=3)
    noise = torch.randn(1, *backbone.latent_shape(), generator=torch.Generator().manual_seed(3))
    cond = backbone.encode(PROMPTS[:1])
    own = backbone.decode(mixture.generate(noise, cond, sigmas, guidance=guidance))
    torch.testing.assert_close(video, own[0], rtol=0, atol=1e-5)
    with torch.no_grad():  # without any guidance it is another video
        plain = mixture.generate(noise, {**cond, "guidance": torch.ones(1)}, sigmas)
    assert (backbone.decode(plain)[0] - video).abs().max() > 1e-4


# --- Its sizes


def test_the_real_network():
    with torch.device("meta"):
        network = HunyuanVideoTransformer3DModel()
    backbone = HunyuanVideoConfig(pretrained="not/here", guidance=EMBEDDED).wrap({"transformer": network})
    linears = {
        path: network.get_submodule(path)
        for path, _ in network.named_modules()
        if re.fullmatch(backbone.lora_targets["attention"], path)
    }
    assert len(linears) == 208
    assert not [path for path in linears if "add_" in path]
    sizes = [128 * (linear.in_features + linear.out_features) for linear in linears.values()]
    assert sum(sizes) == 163_577_856
    copies = {
        f"{path}.{name}": tuple(parameter.shape)
        for path in backbone.time_dependent
        for name, parameter in network.get_submodule(path).named_parameters()
    }
    assert round(sum(torch.Size(shape).numel() for shape in copies.values()) / 1e6, 1) == 51.3
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e9, 2) == 12.82
    assert len(backbone.blocks) == 40
    assert backbone.hidden_size == 3072
    if REAL_KEYS.is_file():
        keys = json.loads(gzip.decompress(REAL_KEYS.read_bytes()))
        adapted = {key.removesuffix(".lora_A.lora1.weight") for key in keys if key.endswith(".lora_A.lora1.weight")}
        copied = {key.replace("_lora.", ".", 1): tuple(shape) for key, shape in keys.items() if "_lora." in key}
        assert set(linears) == adapted
        assert copies == copied


def test_videos_and_what_is_stored_for_them():
    config = HunyuanVideoConfig(pretrained="not/here")
    assert config.video == VideoSize(num_frames=129, height=720, width=1280)
    layout = config.layout()
    assert (layout.channels, layout.multiple) == (16, (1, 2, 2))
    assert {name: (each.role, each.pattern()) for name, each in layout.conditioning.items()} == {
        "prompt_embeds": ("text", "[any, 4096]"),
        "prompt_attention_mask": ("mask", "[any]"),
        "pooled_prompt_embeds": ("pooled", "[768]"),
    }
    backbone = tiny()
    assert backbone.fps == 24
    assert backbone.latent_shape(config.video) == (16, 33, 90, 160)
    with pytest.raises(ValueError, match="num_frames 128 must be 1 more than a multiple of 4: 125 or 129"):
        backbone.latent_shape(VideoSize(num_frames=128, height=720, width=1280))
    latents = torch.randn(1, *backbone.latent_shape())
    torch.testing.assert_close(backbone.denormalise(backbone.normalise(latents)), latents)


# --- Its own sampler


def test_50_steps_of_the_stock_pipeline():
    """The stock pipeline, put together by hand, and our sampler along its sigmas, from the same noise."""
    backbone = tiny()
    noise, _, cond = inputs(backbone)
    pipeline = HunyuanVideoPipeline(
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=backbone.network,
        vae=backbone.pipeline().vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        **cond, guidance_scale=6.0, latents=noise, num_inference_steps=50, output_type="latent",
        num_frames=17, height=32, width=48,
    ).frames  # fmt: skip
    sigmas = pipeline.scheduler.sigmas
    assert len(sigmas) == 51

    def velocity(x, sigma):
        return backbone.velocity(backbone.network, x, sigma, cond)

    ours = sample(velocity, noise, sigmas)
    assert (ours - noise).abs().max() > 0.1
    assert (ours - latents).abs().max() <= 1e-4
    # What the backbone says of its sampler.
    pairs = backbone.native_trajectory(noise, cond, 50)
    steps = [noise]
    sample(velocity, noise, [sigma for sigma, _ in pairs], callback=lambda step, sigma, x: steps.append(x))
    assert max((x - own).abs().max() for x, (_, own) in zip(steps, pairs, strict=True)) <= 1e-4
    assert all(above > below for (above, _), (below, _) in pairwise(pairs))
