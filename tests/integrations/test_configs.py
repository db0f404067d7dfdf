"""Config files of a model that hold anything: one line that names the file and the key, never other numbers."""

import json

import pytest
import torch
from safetensors.torch import save_file
from saved_pipelines import pipeline_recipe, save_pipeline

from moedistill.data.base import Sample
from moedistill.data.latents import write_latents
from moedistill.errors import UserError
from moedistill.recipe.loading import load_recipe
from moedistill.runs.check import check_set
from moedistill.runs.loop import run
from moedistill_cogvideox.backbone import CogVideoXConfig
from moedistill_hunyuan_video.backbone import HunyuanVideoConfig
from moedistill_ltx.backbone import LTXConfig
from moedistill_wan.backbone import WanConfig

MANY = [1.0] * 16


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def test_moments_are_those_of_the_file(tmp_path):
    mean, std = [k / 8 for k in range(16)], [1 + k / 8 for k in range(16)]
    write(tmp_path / "vae" / "config.json", {"latents_mean": mean, "latents_std": std})
    found = WanConfig(pretrained=str(tmp_path)).latent_moments()
    assert [moment.tolist() for moment in found] == [mean, std]
    write(tmp_path / "vae" / "config.json", {"scaling_factor": 0.5})
    found = CogVideoXConfig(pretrained=str(tmp_path)).latent_moments()
    assert [moment.tolist() for moment in found] == [[0.0] * 16, [2.0] * 16]


@pytest.mark.parametrize(
    ("config", "found", "message"),
    [
        (WanConfig, {"latents_mean": None}, "latents_mean must be a number, or 16 of them, .*, not None; get the mo"),
        (WanConfig, {"latents_mean": 3.0}, "the mean of its latents must be 16 finite numbers, not 3.0"),
        (WanConfig, {"latents_mean": [*MANY[:15], "y"]}, "latents_mean must be a number, or 16 of them"),
        (WanConfig, {"latents_mean": [MANY]}, "latents_mean must be a number, or 16 of them"),
        (WanConfig, {"latents_std": "x"}, "latents_std must be a number, or 16 of them, .*, not 'x'"),
        (WanConfig, {"latents_std": [1.0]}, "latents_std must be a number, or 16 of them"),
        (WanConfig, {"latents_std": MANY * 3}, "latents_std must be a number, or 16 of them"),
        (WanConfig, {"latents_std": [*MANY[:15], float("nan")]}, "latents_std must be a number, or 16 of them"),
        (WanConfig, {"latents_std": [*MANY[:15], 0.0]}, "the standard deviation of its latents must be .* above 0"),
        (WanConfig, {"_class_name": "AutoencoderKL"}, "is of class AutoencoderKL, not AutoencoderKLWan"),
        (CogVideoXConfig, {"scaling_factor": None}, "scaling_factor must be a number, or 16 of them"),
        (CogVideoXConfig, {"scaling_factor": "0.7"}, "scaling_factor must be a number, or 16 of them"),
        (CogVideoXConfig, {"scaling_factor": True}, "scaling_factor must be a number, or 16 of them"),
        (CogVideoXConfig, {"scaling_factor": 0}, r"the standard deviation of .* above 0, not \[inf, "),
        (HunyuanVideoConfig, {"scaling_factor": -0.5}, r"the standard deviation of .* above 0, not \[-2\.0, "),
    ],
)
def test_moments_that_no_latents_have(tmp_path, config, found, message):
    write(tmp_path / "vae" / "config.json", found)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/vae/config\.json:? .*?{message}"):
        config(pretrained=str(tmp_path)).latent_moments()


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (
            torch.zeros(128),
            torch.zeros(128),
            "the standard deviation of .* must be 128 finite numbers above 0",
        ),
        (torch.zeros(8), torch.ones(8), "the mean of its latents must be 128 finite numbers"),
        (torch.full([128], torch.nan), torch.ones(128), "the mean of its latents must be 128 finite numbers"),
    ],
)
def test_moments_that_are_weights_too(tmp_path, mean, std, message):
    write(tmp_path / "vae" / "config.json", {"scaling_factor": 1.0})
    save_file({"latents_mean": mean, "latents_std": std}, tmp_path / "vae" / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        LTXConfig(pretrained=str(tmp_path)).latent_moments()


@pytest.mark.parametrize(
    ("config", "found", "message"),
    [
        (WanConfig, {"patch_size": 2}, "patch_size must be a list of 3 whole numbers above 0, not 2; get the model's"),
        (WanConfig, {"patch_size": [1, 2]}, "patch_size must be a list of 3 whole numbers"),
        (WanConfig, {"patch_size": [1, 2, 0]}, "patch_size must be a list of 3 whole numbers"),
        (WanConfig, {"in_channels": "y"}, "in_channels must be a whole number above 0, not 'y'"),
        (WanConfig, {"out_channels": None}, "out_channels must be a whole number above 0, not None"),
        (WanConfig, {"out_channels": 16.5}, "out_channels must be a whole number"),
        (WanConfig, {"text_dim": [4096]}, "text_dim must be a whole number"),
        (WanConfig, {"image_dim": "wide"}, "image_dim must be a whole number above 0, not 'wide'"),
        (WanConfig, {"pos_embed_seq_len": -1}, "pos_embed_seq_len must be a whole number"),
        (HunyuanVideoConfig, {"patch_size": [2, 2]}, "patch_size must be a whole number"),
        (HunyuanVideoConfig, {"guidance_embeds": "no"}, "guidance_embeds must be true or false"),
        (HunyuanVideoConfig, {"patch_size_t": None}, "patch_size_t must be a whole number"),
        (CogVideoXConfig, {"max_text_seq_length": True}, "max_text_seq_length must be a whole number"),
        (CogVideoXConfig, {"patch_size_t": "2"}, "patch_size_t must be a whole number"),
        (LTXConfig, {"caption_channels": None}, "caption_channels must be a whole number"),
    ],
)
def test_arguments_of_another_kind(tmp_path, config, found, message):
    write(tmp_path / "transformer" / "config.json", found)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/transformer/config\.json: {message}"):
        config(pretrained=str(tmp_path)).layout()


def test_arguments_that_may_be_null(tmp_path):
    write(tmp_path / "transformer" / "config.json", {"image_dim": None, "pos_embed_seq_len": None})
    assert list(WanConfig(pretrained=str(tmp_path)).inputs()) == ["prompt_embeds"]
    write(tmp_path / "transformer" / "config.json", {"patch_size_t": None, "ofs_embed_dim": None})
    assert CogVideoXConfig(pretrained=str(tmp_path), model="1.5-5b").patch_size() == (1, 2, 2)


def test_commands_say_it_in_one_line(tmp_path):
    folder = save_pipeline(tmp_path / "model", "wan")
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(16, 3, 4, 6, generator=generator)
    write_latents(tmp_path / "set", [Sample(latents, {"prompt_embeds": torch.randn(12, 24, generator=generator)})])
    recipe = pipeline_recipe("wan", folder)
    vae, network = folder / "vae" / "config.json", folder / "transformer" / "config.json"
    write(vae, {**json.loads(vae.read_text()), "latents_std": [1.0]})
    notes = check_set(tmp_path / "set", load_recipe(recipe)).notes
    assert [note for note in notes if f"not compared with the VAE's: {vae}: latents_std must be" in note]
    with pytest.raises(UserError, match=rf"{vae}: latents_std must be a number, or 16 of them"):
        run(recipe, output=tmp_path / "run", device="cpu")
    write(vae, {**json.loads(vae.read_text()), "_class_name": "Other"})
    with pytest.raises(UserError, match="is of class Other, not AutoencoderKLWan"):
        run(recipe, output=tmp_path / "run2", device="cpu")
    write(network, {**json.loads(network.read_text()), "patch_size": 2})
    with pytest.raises(UserError, match=r"patch_size must be a list of 3 whole"):
        load_recipe(recipe)
