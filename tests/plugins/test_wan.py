"""Wan 2.1 and 2.2: the kit, float32 islands, the stock pipeline's trajectory, a teacher of two networks, counts."""

import warnings

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from helpers import as_if_trained
from saved_pipelines import PROMPT, distil_fast, pipeline_recipe, save_pipeline

from moedistill import Input
from moedistill.data.base import Sample
from moedistill.data.latents import write_latents
from moedistill.errors import RecipeError, UserError
from moedistill.flow.sampling import sample
from moedistill.model.conditioning import concat
from moedistill.model.experts import LoRAConfig
from moedistill.model.guidance import Guidance
from moedistill.model.mixture import Mixture
from moedistill.recipe.loading import load_recipe
from moedistill.runs.build import build_mixture
from moedistill.runs.check import check_set
from moedistill.runs.loop import run
from moedistill.stages.consistency import ConsistencyStage
from moedistill.testing.running import BackboneContract
from moedistill_wan.backbone import WanConfig

GUIDED = Guidance(mode="classifier_free", scale=5.0)
TWO_SCALES = Guidance(mode="classifier_free", scale={"transformer": 4.0, "transformer_2": 3.0})


class ImageToVideoConfig(WanConfig):
    """16 channels of latents and 20 of mask and image, as in Wan's image-to-video models."""

    def tiny_network(self):
        return {**super().tiny_network(), "in_channels": 36}

    def inputs(self):
        image = Input("video", (20, 5, 4, 6), droppable=False, frame_axis=1)
        return {**super().inputs(), "image_latents": image}


class TestWan(BackboneContract):
    config = WanConfig(pretrained=None, guidance=GUIDED)


class TestWan22(BackboneContract):
    config = WanConfig(pretrained=None, guidance=TWO_SCALES, boundary_ratio=0.875)


class TestImageToVideo(BackboneContract):
    config = ImageToVideoConfig(pretrained=None, guidance=GUIDED)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save_pipeline(tmp_path_factory.mktemp(family), family) for family in ("wan", "wan22")}


@pytest.fixture
def recipe(folders):
    """A recipe on two networks, with changes by dotted path."""

    def build(family="wan22", **changes):
        built = pipeline_recipe(family, folders[family])
        for path, value in changes.items():
            *steps, last = path.split("__")
            node = built
            for step in steps:
                node = node[step]
            node[last] = value
        return built

    return build


def inputs(backbone, batch=1):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *backbone.latent_shape(), generator=generator)
    return x, torch.linspace(0.9, 0.4, batch), backbone.encode([PROMPT, "a cat"][:batch])


# -- the model --------------------------------------------------------------------------------------------------------


def test_guidance_leaves_the_image_alone():
    backbone = TestImageToVideo.config.tiny().build()
    x, sigma, cond = inputs(backbone, 2)
    null = backbone.null_conditioning(cond)
    assert torch.equal(null["image_latents"], cond["image_latents"])
    assert torch.equal(null["prompt_embeds"], backbone.encode(["", ""])["prompt_embeds"])
    assert not torch.equal(null["prompt_embeds"], cond["prompt_embeds"])
    other = backbone.velocity(backbone.network, x, sigma, {**cond, "image_latents": -cond["image_latents"]})
    assert not torch.allclose(other, backbone.velocity(backbone.network, x, sigma, cond), atol=1e-3)


def test_images_must_be_there_and_cannot_be_sampled_from():
    backbone = TestImageToVideo.config.tiny().build()
    x, sigma, cond = inputs(backbone)
    with pytest.raises(ValueError, match="store image_latents with the samples"):
        backbone.velocity(backbone.network, x, sigma, {"prompt_embeds": cond["prompt_embeds"]})
    with pytest.raises(ValueError, match="makes videos from images, which cannot be sampled here"):
        backbone.pipeline()


def test_embedded_guidance_is_an_error():
    with pytest.raises(ValueError, match="Wan has no input for the scale; use classifier_free"):
        WanConfig(pretrained=None, guidance=Guidance(mode="embedded", scale=6.0))


@pytest.mark.parametrize("family", ["wan", "wan22"])
def test_fifty_steps_are_those_of_the_stock_pipeline(family, recipe):
    """From a saved folder, which comes with a multistep scheduler: plain Euler steps take its place."""
    loaded = load_recipe(recipe(family))
    mixture = build_mixture(loaded)
    mixture, backbone = mixture, mixture.backbone
    noise, _, cond = inputs(backbone)
    assert isinstance(backbone.pipeline().scheduler, FlowMatchEulerDiscreteScheduler)
    stock = backbone.native_trajectory(noise, cond, 50)
    sigmas = [sigma for sigma, _ in stock]
    assert len(sigmas) == 51
    assert backbone.pipeline().scheduler.config.shift == 3.0  # the folder's flow_shift

    def velocity(x, sigma):
        with mixture.using(mixture.teacher_at(sigma[0].item())):
            return mixture(x, sigma, cond)

    ours = sample(velocity, noise, sigmas)
    assert (ours - stock[-1][1]).abs().max() <= 1e-4 * ours.abs().max()
    assert (ours - noise).abs().max() > 0.1


def test_latents_are_scaled_as_the_vae_says(folders):
    backbone = WanConfig(pretrained=str(folders["wan"])).build()
    latents = torch.randn(2, *backbone.latent_shape(backbone.config.tiny_video))
    scaled, cond = backbone.prepare(latents, {"prompt_embeds": torch.zeros(2, 1, 24)})
    means, stds = (torch.tensor(backbone.config.vae_config[name]) for name in ("latents_mean", "latents_std"))
    assert len(means) == 16
    assert torch.allclose(scaled[:, 3], (latents[:, 3] - means[3]) / stds[3], atol=1e-6)
    assert torch.allclose(backbone.denormalise(scaled), latents, atol=1e-5)
    assert list(cond) == ["prompt_embeds"]


# -- float32 islands --------------------------------------------------------------------------------------------------


def test_loaded_weights_keep_their_float32_islands(folders):
    islands = set(WanTransformer3DModel._keep_in_fp32_modules)
    for pretrained in (str(folders["wan"]), None):
        network = WanConfig(pretrained=pretrained, dtype="bfloat16").build().network
        for name, parameter in network.named_parameters():
            wanted = torch.float32 if islands & set(name.split(".")) else torch.bfloat16
            assert parameter.dtype == wanted, name


@pytest.mark.parametrize("expert", ["teacher", "semantic", "detail"])
@pytest.mark.parametrize("inference", [False, True])
def test_time_is_embedded_in_float32(recipe, expert, inference):
    """Under autocast, in the base, in a full expert and in a copy."""
    mixture = build_mixture(load_recipe(recipe("wan", backbone__dtype="bfloat16")), inference=inference)
    network, dtypes, linears = mixture.experts[expert].shared.network, [], []
    for path, module in network.named_modules():
        if path.rpartition(".")[2] == "time_embedder":
            module.register_forward_hook(lambda _module, _args, output: dtypes.append(output.dtype))
        if path.endswith("text_embedder"):
            module.register_forward_hook(lambda _module, _args, output: linears.append(output.dtype))
    with mixture.using(expert), torch.no_grad():
        mixture(*inputs(mixture.backbone))
    assert dtypes == [torch.float32]
    assert linears == [torch.bfloat16]


# -- two networks -----------------------------------------------------------------------------------------------------


def test_the_teacher_of_a_stage_is_the_network_of_its_segment(recipe, tmp_path, monkeypatch):
    seen, stage_of = [], {}
    guided, setup = Mixture.guided, ConsistencyStage.setup

    def spy(self, x, sigma, cond, guidance):
        seen.append((stage_of["now"], self.active, sigma.item() >= 0.875))
        return guided(self, x, sigma, cond, guidance)

    def note(self, run_, *args):
        stage_of["now"] = run_.config.name
        return setup(self, run_, *args)

    monkeypatch.setattr(Mixture, "guided", spy)
    monkeypatch.setattr(ConsistencyStage, "setup", note)
    stages = [distil_fast("semantic", steps=6), distil_fast("detail", steps=6)]
    run(recipe(stages=stages, training__monitor=None), output=tmp_path, device="cpu")
    assert set(seen) == {("semantic", "teacher", True), ("detail", "teacher.transformer_2", False)}
    assert len(seen) == 12


def test_each_network_is_guided_by_its_own_scale(recipe):
    mixture = build_mixture(load_recipe(recipe()))
    x, sigma, cond = inputs(mixture.backbone)
    both = concat(cond, mixture.backbone.null_conditioning(cond))
    for teacher, scale in (("teacher", 4.0), ("teacher.transformer_2", 3.0)):
        with mixture.using(teacher), torch.no_grad():
            guided = mixture.guided(x, sigma, cond, TWO_SCALES)
            v_cond, v_null = mixture(torch.cat([x, x]), sigma.repeat(2), both).chunk(2)
        assert torch.allclose(guided, v_null + scale * (v_cond - v_null), atol=1e-5)
    assert mixture.teacher_at(0.875) == "teacher"  # as diffusers has it
    assert mixture.teacher_at(0.8749) == "teacher.transformer_2"


def test_adapters_are_separate(recipe):
    mixture = build_mixture(load_recipe(recipe()))
    networks = mixture.backbone.networks
    for expert, base in (("semantic", "transformer"), ("detail", "transformer_2")):
        assert mixture.experts[expert].shared.network is networks[base]
    point = inputs(mixture.backbone)

    def velocities():
        found = {}
        for expert in mixture.experts:
            with mixture.using(expert), torch.no_grad():
                found[expert] = mixture(*point)
        return found

    before = velocities()
    assert torch.equal(before["semantic"], before["teacher"])
    assert torch.equal(before["detail"], before["teacher.transformer_2"])
    assert not torch.allclose(before["semantic"], before["detail"], atol=1e-3)
    as_if_trained(mixture.experts["semantic"], 0)
    after = velocities()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["semantic"]


LORA = {"kind": "lora", "rank": 2, "alpha": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router__boundaries": [{"point": 4}]}, "points 4 to 8, lies across the teacher's boundary"),
        ({"router__boundaries": [{"point": 5}], "router__closed": "low"}, "points 1 to 5, lies across the teacher's"),
        ({"experts__semantic": LORA}, "semantic.base: is missing: the teacher has transformer and transformer_2"),
        ({"experts__semantic": {**LORA, "base": "transformer_3"}}, "unknown network 'transformer_3'; did you mean"),
        (
            {"experts__detail": {**LORA, "from": "semantic", "base": "transformer_2"}},
            "'transformer_2' is not the network of 'semantic', which 'detail' starts from",
        ),
        (
            {"backbone__guidance": {"mode": "classifier_free", "scale": {"transformer": 4.0}}},
            "names transformer; the teacher has transformer, transformer_2",
        ),
        (
            {"backbone__guidance": {"mode": "classifier_free", "scale": {"high": 4.0, "low": 3.0}}},
            "names high, low; the teacher has transformer, transformer_2",
        ),
    ],
)
def test_recipes_that_do_not_fit_two_networks(recipe, changes, message):
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe(**changes))
    assert message in " ".join(str(error.value).split())


def test_whom_no_segment_owns_has_no_teacher_of_its_own(recipe):
    """Each network serves some of the levels at which it would be trained."""
    made = recipe(experts__free={**LORA, "base": "transformer"})
    made["stages"][0]["expert"] = "free"
    with pytest.raises(RecipeError, match="'free' has no segment, so transformer and transformer_2 would both"):
        load_recipe(made)


def test_one_scale_serves_both(recipe):
    load_recipe(recipe(backbone__guidance={"mode": "classifier_free", "scale": 4.0}))


# -- counts -----------------------------------------------------------------------------------------------------------


def test_adapters_of_the_published_model():
    """Wan 2.1 1.3B: 240 linears, 94.4 million weights at rank 128, and copies of 25.7 million."""
    with torch.device("meta"):
        network = WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, num_layers=30, ffn_dim=8960, freq_dim=256, text_dim=4096
        )  # fmt: skip
        backbone = WanConfig(pretrained="unused/unused").wrap({"transformer": network})
        mixture = Mixture(backbone, {"detail": LoRAConfig(rank=128)})
    sizes = {name: parameter.numel() for name, parameter in mixture.experts["detail"].parameters.items()}
    lora = {name: size for name, size in sizes.items() if ".lora_" in name}
    assert len(lora) == 2 * 240
    assert sum(lora.values()) == 94_371_840
    copies = sum(sizes.values()) - sum(lora.values())
    assert copies == pytest.approx(25.7e6, rel=2e-3)
    own = sum(weight.numel() for weight in mixture.experts["teacher"].shared.weights.values())
    assert sum(sizes.values()) / own == pytest.approx(0.085, abs=5e-4)
    assert len(backbone.blocks) == 30
    assert backbone.hidden_size == 1536


# -- text and images as the network takes them ------------------------------------------------------------------------


@torch.no_grad()
def test_shorter_text_is_padded_as_the_pipeline_does_it(folders):
    """20 tokens without padding gave a velocity that was 5 % off: the network has no mask."""
    backbone = WanConfig(pretrained=str(folders["wan"])).build()
    x, sigma, cond = inputs(backbone)
    tokens = int(cond["prompt_embeds"][0].any(1).sum())
    assert 0 < tokens < 100
    short = {"prompt_embeds": cond["prompt_embeds"][:, :tokens]}
    _, prepared = backbone.prepare(x, short)
    assert torch.equal(prepared["prompt_embeds"], cond["prompt_embeds"])
    assert not torch.allclose(
        backbone.velocity(backbone.network, x, sigma, short), backbone.velocity(backbone.network, x, sigma, cond)
    )
    with pytest.raises(ValueError, match=r"has prompt_embeds \[513, 24\]; the model takes \[up to 512, 24\]"):
        backbone.prepare(x, {"prompt_embeds": torch.zeros(1, 513, 24)})
    backbone.set_null({"prompt_embeds": short["prompt_embeds"][0]})
    assert torch.equal(backbone.null_conditioning(cond)["prompt_embeds"], cond["prompt_embeds"])


class FromClipConfig(WanConfig):
    """Wan 2.1 image-to-video: image latents, and an image's tokens; with `frames` those of two images."""

    frames = None

    def tiny_network(self):
        images = {"in_channels": 36, "image_dim": 8, "added_kv_proj_dim": 32, "pos_embed_seq_len": self.frames}
        return {**super().tiny_network(), **images}


class FirstAndLastConfig(FromClipConfig):
    frames = 514


@pytest.mark.parametrize("config", [FromClipConfig, FirstAndLastConfig])
@torch.no_grad()
def test_what_image_to_video_needs_follows_from_the_architecture(config):
    """Without `image_embeds` a velocity came out that was 36 % off."""
    backbone = config(pretrained=None).tiny().build()
    tokens = 514 if config.frames else 257
    layout = backbone.config.layout()
    assert layout.required() == ["prompt_embeds", "image_latents", "image_embeds"]
    x = torch.randn(2, *backbone.latent_shape(), generator=torch.Generator().manual_seed(0))
    images = {"image_latents": torch.randn(2, 20, *x.shape[2:]), "image_embeds": torch.randn(2, tokens, 8)}
    cond = {"prompt_embeds": backbone.encode([PROMPT, "a cat"])["prompt_embeds"], **images}
    sigma = torch.tensor([0.9, 0.4])
    v = backbone.velocity(backbone.network, x, sigma, cond)
    one = backbone.velocity(backbone.network, x[1:], sigma[1:], {name: value[1:] for name, value in cond.items()})
    torch.testing.assert_close(v[1:], one, atol=1e-5, rtol=1e-5)
    seen = images["image_embeds"].view(4, 257, 8) if config.frames else images["image_embeds"]
    stock = backbone.network(
        hidden_states=torch.cat([x, images["image_latents"]], 1), timestep=1000 * sigma,
        encoder_hidden_states=cond["prompt_embeds"], encoder_hidden_states_image=seen,
    ).sample  # fmt: skip
    assert torch.equal(v, stock)
    for name in images:
        lacking = {key: value for key, value in cond.items() if key != name}
        with pytest.raises(ValueError, match=rf"has no {name}, which the model takes"):
            backbone.prepare(x, lacking)
        with pytest.raises(ValueError, match=f"makes videos from images; store {name} with the samples"):
            backbone.velocity(backbone.network, x, sigma, lacking)
    other = {**cond, "image_latents": images["image_latents"][:, :, 1:]}
    with pytest.raises(ValueError, match=r"has image_latents \[20, 4, 4, 6\] for latents \[16, 5, 4, 6\]"):
        backbone.prepare(x, other)
    with pytest.raises(ValueError, match=rf"has image_embeds \[5, 8\]; the model takes \[{tokens}, 8\]"):
        backbone.prepare(x, {**cond, "image_embeds": torch.zeros(2, 5, 8)})


def test_a_right_set_for_image_to_video_is_checked_and_has_no_note(tmp_path, monkeypatch):
    images = {"in_channels": 36, "image_dim": 8, "added_kv_proj_dim": 32}
    original = WanConfig.tiny_network
    monkeypatch.setattr(WanConfig, "tiny_network", lambda self: original(self) | images)
    shape = WanConfig(pretrained=None).tiny().latent_shape()

    def sample_with(**images):
        generator = torch.Generator().manual_seed(0)
        return Sample(torch.randn(shape, generator=generator), {"prompt_embeds": torch.zeros(12, 24), **images})

    right = {"image_latents": torch.ones(20, *shape[1:]), "image_embeds": torch.ones(257, 8)}
    negative = {"prompt_embeds": torch.zeros(12, 24)}
    write_latents(tmp_path / "right", [sample_with(**right)] * 2, negative=negative)
    write_latents(tmp_path / "wrong", [sample_with(**right), sample_with(image_latents=right["image_latents"])])

    def stored(name):
        recipe = pipeline_recipe("wan", "x")
        recipe["backbone"] |= {"pretrained": None, "video": {"num_frames": 17, "height": 32, "width": 48}}
        return {**recipe, "data": {"kind": "latents", "path": str(tmp_path / name)}, "stages": recipe["stages"][:1]}

    report = check_set(tmp_path / "right", load_recipe(stored("right")))
    assert (report.problems, report.notes) == ([], [])
    run(stored("right"), output=tmp_path / "run", device="cpu")
    with pytest.raises(UserError, match=r"sample 1 has no image_embeds, which the model takes"):
        run(stored("wrong"), output=tmp_path / "run2", device="cpu")


def test_prompts_that_are_cut_are_said_in_one_line(folders):
    backbone = WanConfig(pretrained=str(folders["wan"])).build()
    with pytest.warns(UserWarning, match="prompts are cut") as warned:
        backbone.encode(["a dog", "b " * 511, "a " * 600, "c " * 512])
    [said] = [str(one.message) for one in warned]
    assert said.startswith(
        "2 of 4 prompts are cut after 512 tokens, all that the model's tokenizer reads; the first: a a a"
    )
    assert "\n" not in said
    assert len(said) < 200
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone.encode(["e " * 511])


def test_each_encoding_leaves_the_device_before_the_next_is_made(folders, monkeypatch):
    """Thousands of prompts would fill it."""
    backbone, done = WanConfig(pretrained=str(folders["wan"])).build(), []
    encode, cpu = backbone.encode_with, torch.Tensor.cpu
    monkeypatch.setattr(backbone, "encode_with", lambda *args: done.append("encode") or encode(*args))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda value: done.append("cpu") or cpu(value))
    backbone.encode(["a dog", "rain"])
    assert done == ["encode", "cpu", "encode", "cpu"]
