"""A latent video model without a pipeline of diffusers', and what follows from how its inputs declare themselves."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from helpers import digits_backbone, distil, tiny_recipe
from torch import nn

from moedistill import (
    BackboneContract,
    Guidance,
    Input,
    LatentVideoBackbone,
    LatentVideoConfig,
    Mixture,
    Prompt,
    VideoSize,
    generate,
    hookimpl,
    load_plugins,
    run,
)
from moedistill.data.base import Sample
from moedistill.data.latents import write_latents
from moedistill.data.loading import Batch
from moedistill.recipe.loading import load_recipe
from moedistill.runs.build import build_mixture, make_accelerator
from moedistill.stages.run import Run
from moedistill.stages.training import Training

CHANNELS, WIDTH = 3, 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens):
        """Of text and image tokens in one sequence, the text first."""
        mixed = tokens + self.to_out(torch.tanh(self.to_q(tokens)))
        return mixed + mixed.mean(1, keepdim=True)


class Network(nn.Module):
    """One token per latent, behind those of the text; the image's latents are added to the sample's."""

    def __init__(self):
        super().__init__()
        self.time_embed, self.text_in = nn.Linear(1, WIDTH), nn.Linear(4, WIDTH)
        self.patch_in, self.proj_out = nn.Linear(2 * CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.recompute = None

    def forward(self, x, sigma, cond):
        image = cond.get("first_frames", torch.zeros_like(x))
        tokens = self.patch_in(torch.cat([x, image], 1).flatten(2).transpose(1, 2)) + self.time(sigma)
        text = self.text_in(cond["words"] * cond["which"][..., None]) + cond["pace"].view(-1, 1, 1)
        tokens = torch.cat([text, tokens], 1)
        for block in self.blocks:
            tokens = block(tokens) if self.recompute is None else self.recompute(block, tokens)
        return self.last(tokens[:, text.shape[1] :], sigma, x)

    def time(self, sigma):
        return self.time_embed(sigma.view(-1, 1, 1))

    def last(self, tokens, sigma, x):
        return self.proj_out(torch.tanh(tokens) + self.time(sigma)).transpose(1, 2).view_as(x)


class ToyBackbone(LatentVideoBackbone):
    fps = 4.0
    lora_targets: ClassVar[dict[str, str]] = {"attention": r"blocks\.\d+\.(to_q|to_out)"}
    time_dependent = ("time_embed", "proj_out")
    can_checkpoint = True

    def __init__(self, config, networks):
        super().__init__(config, networks)
        self.blocks, self.hidden_size = ("blocks.0", "blocks.1"), WIDTH

    def enable_checkpointing(self, network, recompute):
        network.recompute = recompute

    def velocity(self, network, x, sigma, cond):
        floats = self.floats_to(cond, x.dtype)
        return network(x, sigma.to(x.dtype), {**floats, "which": cond["which"].to(x.dtype)}).to(x.dtype)

    def hidden(self, output, tokens):
        return output[:, -tokens:]

    def unembed(self, network, hidden, x, sigma, cond):
        return network.last(hidden, sigma, x)

    def encode_new(self, prompts):
        raise AssertionError("a miniature has no text encoder")

    def decode(self, latents):
        return self.denormalise(latents).sigmoid()

    def encode_videos(self, videos):
        return torch.logit(videos, eps=1e-6)


@dataclass(kw_only=True)
class ToyConfig(LatentVideoConfig):
    pretrained: str | None = None
    video: VideoSize = field(default_factory=lambda: VideoSize(num_frames=5, height=2, width=3))

    download = "nothing"
    temporal_compression = 1
    spatial_compression = 1
    tiny_video = VideoSize(num_frames=5, height=2, width=3)

    def channels(self):
        return CHANNELS

    def patch_size(self):
        return 1, 1, 1

    def inputs(self):
        return {
            "words": Input("text", (6, 4), any_length=True),
            "which": Input("mask", (6,), any_length=True),
            "pace": Input("scalar", ()),
            "first_frames": Input("video", (CHANNELS, None, None, None), droppable=False, required=False, frame_axis=1),
        }

    def latent_moments(self):
        return torch.zeros(CHANNELS), torch.full([CHANNELS], 2.0)

    def build(self, seed=0):
        if self.pretrained is not None:
            self.locate()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return ToyBackbone(self, {"transformer": Network().to(getattr(torch, self.dtype))})


class Plugin:
    @hookimpl
    def register_components(self, components):
        components.register("backbone", "toy", ToyConfig, "a latent video model")


@pytest.fixture(scope="module")
def plugins():
    found = load_plugins()
    found.manager.register(Plugin())
    Plugin().register_components(found.components)
    return found


def recipe(**stage):
    return tiny_recipe(
        [distil(**stage)],
        {"backbone": {"kind": "toy"}, "data": {"kind": "latents", "path": None}, "training.monitor": None},
    )


class TestToy(BackboneContract):
    config = ToyConfig()


def test_a_network_checkpoints_as_its_backbone_says():
    backbone = ToyConfig().build()
    Mixture(backbone, {}, gradient_checkpointing=True)
    assert backbone.network.recompute is not None


def test_it_is_trained_sampled_and_exported(plugins, tmp_path):
    changed = {
        **recipe(latent_frames=3),
        "stages": [*recipe(latent_frames=3)["stages"], {"name": "out", "kind": "export"}],
    }
    done = run(changed, output=tmp_path / "run", device="cpu", plugins=plugins)
    assert (done.output / "out" / "semantic.safetensors").is_file()
    mixture = build_mixture(load_recipe(recipe(), plugins=plugins))
    [video] = generate(mixture, [Prompt("rain")], torch.tensor([1.0, 0.5, 0.0]), seed=0)
    assert video.shape == (3, 5, 2, 3)
    again = list(generate(mixture, ["sun", "rain"], torch.tensor([1.0, 0.5, 0.0]), seed=0))
    assert not torch.equal(again[1], video)  # another place in the list, other noise


def test_what_is_shaped_like_latents_is_cut_with_them(plugins, tmp_path):
    loaded = load_recipe(recipe(latent_frames=2), plugins=plugins)
    mixture = build_mixture(loaded)
    training = Training(Run(loaded, tmp_path, make_accelerator(loaded, "cpu"), mixture, None), loaded.stages[0])
    latents = torch.randn(2, *mixture.backbone.latent_shape())
    cond = {**mixture.backbone.encode(["a", "b"]), "first_frames": torch.randn(2, CHANNELS, 5, 2, 3)}
    batch = training.begin(Batch(latents, dict(cond), [0, 1], boundary=True))
    assert torch.equal(batch.latents, latents[:, :, :2] / 2)
    assert torch.equal(batch.conditioning["first_frames"], cond["first_frames"][:, :, :2])
    for name in ("words", "which", "pace"):
        assert torch.equal(batch.conditioning[name], cond[name])


def test_the_null_condition_drops_what_may_be_dropped():
    backbone = ToyConfig(guidance=Guidance(mode="classifier_free", scale=2.0, negative_prompt="fog")).build()
    cond = {**backbone.encode(["a", "b"]), "first_frames": torch.randn(2, CHANNELS, 5, 2, 3)}
    null, fog = backbone.null_conditioning(cond), backbone.encode(["fog"])
    assert torch.equal(null["first_frames"], cond["first_frames"])
    for name in ("words", "which", "pace"):
        assert torch.equal(null[name], fog[name].expand_as(null[name]))


def test_scalars_stay_exact():
    backbone = ToyConfig(dtype="bfloat16").build()
    cond = {**backbone.encode(["a"]), "guidance": torch.tensor([6.123])}
    cond["pace"] = torch.tensor([1.001])
    floats = backbone.floats_to(cond, torch.bfloat16)
    assert (floats["pace"].item(), floats["guidance"].item()) == (cond["pace"].item(), cond["guidance"].item())
    assert (floats["words"].dtype, floats["which"].dtype) == (torch.bfloat16, torch.bool)


def test_a_mask_has_text_first_and_texts_of_any_length_fit():
    layout = ToyConfig().layout()
    assert layout.required() == ["words", "which", "pace"]
    assert layout.of_role("mask") == ["which"]
    words = layout.conditioning["words"]
    assert (words.fits((9, 4)), words.fits((9, 5)), words.fits((4,))) == (True, False, False)
    assert words.pattern() == "[any, 4]"
    assert layout.conditioning["first_frames"].pattern() == f"[{CHANNELS}, any, any, any]"
    mask = ToyConfig().build().encode(["a", "b", "c"])["which"]
    assert mask.dtype == torch.bool
    assert mask.any(1).all()
    assert (mask.int().diff(dim=1) <= 0).all()


def test_an_image_needs_a_model_that_takes_one():
    prompt = Prompt("a dog", image=Path("dog.png"))
    with pytest.raises(ValueError, match=r'prompt "a dog \(dog.png\)": this model takes text alone'):
        ToyConfig().build().encode([prompt])
    with pytest.raises(ValueError, match="this model takes text alone"):
        digits_backbone().encode([Prompt("3 up", image=Path("x.png"))])

    class FromImages(ToyBackbone):
        takes_images = True

    backbone = FromImages(ToyConfig(), ToyConfig().build().networks)
    plain, other = backbone.encode(["a dog"])["words"], backbone.encode([prompt])["words"]
    assert not torch.equal(plain, other)
    assert backbone.captions(backbone.encode([prompt])) == ["a dog (dog.png)"]


def test_blocks_with_other_tokens_must_say_which_are_the_images():
    class Silent(ToyBackbone):
        hidden = LatentVideoBackbone.hidden

    backbone = Silent(ToyConfig(), ToyConfig().build().networks)
    mixture = Mixture(backbone, {})
    x, cond = torch.randn(1, CHANNELS, 5, 2, 3), backbone.encode(["a"])
    with pytest.raises(ValueError, match="a block gives 36 tokens, of which 30 are the image's: Silent must say which"):
        mixture.hidden_states(x, torch.tensor([0.5]), cond, ["blocks.1"])


def test_videos_of_digits_come_back_from_their_latents():
    backbone = digits_backbone()
    latents = torch.randn(2, *backbone.latent_shape())
    again = backbone.encode_videos(backbone.decode(latents).clamp(0, 1))
    assert again.shape == latents.shape
    videos = backbone.decode(0.05 * latents)
    torch.testing.assert_close(backbone.decode(backbone.encode_videos(videos)), videos, rtol=0, atol=0.05)


def test_missing_weights_say_what_there_is():
    with pytest.raises(ValueError, match=r"hf download nobody/toy\n") as caught:
        ToyConfig(pretrained="nobody/toy").build()
    assert "What there is: nothing." in str(caught.value)
    with pytest.raises(ValueError, match="there is no such folder; give the model's, or a Hub id"):
        ToyConfig(pretrained="/nowhere/at/all").build()


def test_a_set_that_lacks_a_required_input_is_told(plugins, tmp_path):
    samples = [Sample(torch.randn(CHANNELS, 5, 2, 3), {"words": torch.randn(6, 4), "which": torch.ones(6)})]
    write_latents(tmp_path / "set", samples * 4)
    changed = {**recipe(), "data": {"kind": "latents", "path": str(tmp_path / "set")}}
    with pytest.raises(Exception, match="pace"):
        run(changed, output=tmp_path / "run", device="cpu", plugins=plugins)
