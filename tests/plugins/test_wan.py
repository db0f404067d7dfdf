"""Wan 2.1 and 2.2: the kit, float32 islands, the stock pipeline's trajectory, a teacher of two networks, counts."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from helpers import as_if_trained
from saved_pipelines import PROMPT, distil_fast, pipeline_recipe, save_pipeline

from moedistill import Input
from moedistill.errors import RecipeError
from moedistill.flow.sampling import sample
from moedistill.model.conditioning import concat
from moedistill.model.experts import LoRAConfig
from moedistill.model.guidance import Guidance
from moedistill.model.mixture import Mixture
from moedistill.recipe.loading import load_recipe
from moedistill.runs.build import build_mixture
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
    means, stds = (torch.tensor(backbone.vae_config[name]) for name in ("latents_mean", "latents_std"))
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
