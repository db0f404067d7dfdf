"""Open-Sora 2.0: the kit, the published code's numbers, the published files, text, shift, guidance, and its recipe."""

import gzip
import json
import math
import multiprocessing
import re
import shutil
import weakref
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, FluxTransformer2DModel
from helpers import equal
from safetensors.torch import load_file, save_file
from saved_pipelines import clip_tokenizer, t5_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from moedistill import BackboneContract, Guidance, Mixture, Record, cli
from moedistill.data.base import Sample
from moedistill.data.latents import write_latents
from moedistill.errors import RecipeError, UserError
from moedistill.integrations.diffusers import converting
from moedistill.integrations.diffusers.converting import PublishedWeights, check_pieces
from moedistill.model.backbone import VideoSize
from moedistill.recipe.loading import load_recipe
from moedistill.runs.loop import run
from moedistill.runs.sample import sample_run
from moedistill.runtime import weight_files
from moedistill.runtime.checkpoint import load_tree
from moedistill.testing.checks import CHECKS
from moedistill.testing.subject import Subject
from moedistill_open_sora import published
from moedistill_open_sora.backbone import RECORD, OpenSoraBackbone, OpenSoraConfig

RECORDS = Path(__file__).parents[1] / "records/open_sora"
PROMPT = "a dog runs"


class TestOpenSora(BackboneContract):
    config = OpenSoraConfig(pretrained=None)


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> Record:
    """What the published code gave, and the config of a backbone made of the weights that it had."""
    return OpenSoraConfig(pretrained=None).record(tmp_path_factory.mktemp("record"))


@pytest.fixture(scope="module")
def recorded(record):
    return record.config.build()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder as published, in miniature: all four parts under their published names, the text encoders whole."""
    folder = tmp_path_factory.mktemp("hub") / "Open-Sora-v2"
    folder.mkdir()
    save_file(network_tensors(), folder / published.NETWORK)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLHunyuanVideo(latent_channels=16, block_out_channels=(32,) * 4, layers_per_block=1)
        t5_sizes = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        t5 = T5EncoderModel(T5Config(**t5_sizes, vocab_size=400, feed_forward_proj="gated-gelu"))
        clip_sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
        ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
        clip = CLIPTextModel(CLIPTextConfig(**clip_sizes, vocab_size=400, **ids))
    save_file(vae.state_dict(), folder / published.VAE)
    for place, model, tokenizer in ((published.T5, t5, t5_tokenizer()), (published.CLIP, clip, clip_tokenizer())):
        model.save_pretrained(folder / place)
        tokenizer.save_pretrained(folder / place)
    return folder


def network_tensors():
    found = load_file(RECORD).items()
    return {name.removeprefix("network."): tensor for name, tensor in found if name.startswith("network.")}


@pytest.fixture(scope="module")
def converted(files, tmp_path_factory):
    """What `moedistill convert` makes of it."""
    dest = tmp_path_factory.mktemp("models") / "open_sora"
    OpenSoraConfig.convert(files, dest)
    return dest


def shape(backbone):
    return (1, *backbone.latent_shape())


# -- the published code's numbers -------------------------------------------------------------------------------------


def test_velocities_with_and_without_given_frames_are_those_of_the_published_code(record, recorded):
    for cond, wanted in zip(record.conditionings, record.velocities, strict=True):
        with torch.no_grad():
            v = recorded.velocity(recorded.network, record.x, record.sigma, cond)
        assert (v - wanted).abs().max() <= 5e-6
    assert (record.velocities[0][0] - record.velocities[1][0]).abs().max() <= 5e-6  # sample 0 has no frames
    assert (record.velocities[0][1:] - record.velocities[1][1:]).abs().max() > 0.1


def test_states_after_every_block_are_those_of_the_published_code(record, recorded):
    assert recorded.blocks == [
        *(f"transformer_blocks.{k}" for k in range(2)),
        *(f"single_transformer_blocks.{k}" for k in range(2)),
    ]
    with torch.no_grad():
        found = Mixture(recorded, {}).hidden_states(record.x, record.sigma, record.conditionings[0], recorded.blocks)
    assert all((a - b).abs().max() <= 5e-6 for a, b in zip(found, record.hidden, strict=True))


def test_schedule_and_sampling_are_those_of_the_published_code(record, recorded):
    wanted = load_file(RECORDS / "sampling.safetensors")
    video = VideoSize(num_frames=9, height=32, width=64)
    shift = record.config.replace(video=video).time_shift()
    assert shift == pytest.approx(wanted["alpha"].item(), rel=1e-7)
    pairs = recorded.native_trajectory(wanted["trajectory"][0], record.conditionings[1], 6)
    assert [sigma for sigma, _ in pairs] == wanted["schedule"].tolist()
    assert all((x - y).abs().max() <= 1e-5 for (_, x), y in zip(pairs, wanted["trajectory"], strict=True))


@pytest.mark.parametrize(
    ("size", "shift"), [((129, 192, 336), 5.7326), ((129, 576, 1024), 11.8721), ((129, 256, 256), 5.7446)]
)
def test_the_shift_follows_from_the_size(size, shift):
    video = VideoSize(**dict(zip(("num_frames", "height", "width"), size, strict=True)))
    assert OpenSoraConfig(pretrained=None, video=video).time_shift() == pytest.approx(shift, abs=1e-4)


# -- the published files ----------------------------------------------------------------------------------------------


def published_keys():
    """Names and shapes of the published network, on the meta device."""
    with gzip.open(RECORDS / "keys.json.gz") as file:
        return {name: torch.empty(shape, device="meta") for name, shape in json.load(file).items()}


def fused(tensors):
    """The same network with the names of its fused variant."""
    tensors, whole = dict(tensors), {}
    for name in list(tensors):
        if found := re.fullmatch(r"(double_blocks\.\d+\.(?:img|txt)_attn)\.q_proj\.(weight|bias)", name):
            parts = [tensors.pop(f"{found[1]}.{part}_proj.{found[2]}") for part in "qkv"]
            whole[f"{found[1]}.qkv.{found[2]}"] = torch.cat(parts)
        elif found := re.fullmatch(r"(single_blocks\.\d+)\.q_proj\.(weight|bias)", name):
            parts = [tensors.pop(f"{found[1]}.{part}.{found[2]}") for part in ("q_proj", "k_proj", "v_mlp")]
            whole[f"{found[1]}.linear1.{found[2]}"] = torch.cat(parts)
    return {**tensors, **whole}


@pytest.mark.parametrize("variant", [dict, fused])
def test_every_published_tensor_finds_its_place_and_no_place_stays_empty(variant):
    tensors = variant(published_keys())
    with torch.device("meta"):
        network = FluxTransformer2DModel(**OpenSoraConfig(pretrained=None).real_network())
    made = check_pieces(published.network_pieces(tensors.keys(), 128), tensors, network, "keys")
    assert {name: tensor.shape for name, tensor in made.items()} == {
        name: tensor.shape for name, tensor in network.state_dict().items()
    }
    assert sum(parameter.numel() for parameter in network.parameters()) == 11_891_387_456


def test_the_architecture_is_read_from_the_shapes(files, tmp_path):
    big = tmp_path / "Open-Sora-v2"
    big.mkdir()
    # Shapes of the published file, without its numbers: sparse, as the file system leaves it.
    header, offset = {}, 0
    for name, tensor in published_keys().items():
        end = offset + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with (big / published.NETWORK).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    config = OpenSoraConfig(pretrained=str(big))
    assert config.architecture() == OpenSoraConfig(pretrained=None).real_network()
    assert config.latent_moments()[1].unique().tolist() == [pytest.approx(1 / 0.476986)]
    assert OpenSoraConfig(pretrained=str(files)).inputs()["prompt_embeds"].shape == (512, 24)
    assert not (files / "diffusers").exists()


def test_fused_names_make_the_same_network(tmp_path, converted):
    source = tmp_path / "source"
    source.mkdir()
    save_file(fused(network_tensors()), source / published.NETWORK)
    OpenSoraConfig.convert(source, tmp_path / "model")
    name = "transformer/diffusion_pytorch_model.safetensors"
    first, second = load_file(tmp_path / "model" / name), load_file(converted / name)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert not (tmp_path / "model/vae").exists()


def test_a_network_in_parts_is_the_same(monkeypatch, files, converted, tmp_path):
    monkeypatch.setattr(weight_files, "SHARD", 60_000)
    OpenSoraConfig.convert(files, tmp_path / "model")
    parts = sorted((tmp_path / "model/transformer").glob("*.safetensors"))
    assert len(parts) > 5
    assert max(part.stat().st_size for part in parts) < 80_000
    networks = [OpenSoraConfig(pretrained=str(folder)).build().network for folder in (tmp_path / "model", converted)]
    assert equal(*({"network": network.state_dict()} for network in networks))


def test_no_more_than_a_part_and_a_piece_is_held(monkeypatch, tmp_path):
    """Counted: bytes of tensors that are alive when each is read, and when each is about to be written."""
    monkeypatch.setattr(weight_files, "SHARD", 60_000)
    file = tmp_path / published.NETWORK
    save_file(network_tensors(), file)
    alive, most = {}, []

    def counted(tensor):
        alive[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, alive.pop, id(tensor), None)
        most.append(sum(alive.values()))
        return tensor

    read, clone = PublishedWeights.__getitem__, torch.Tensor.clone
    monkeypatch.setattr(PublishedWeights, "__getitem__", lambda self, name: counted(read(self, name)))
    monkeypatch.setattr(torch.Tensor, "clone", lambda self, **options: counted(clone(self, **options)))
    weights = PublishedWeights(file)
    pieces = published.network_pieces(weights.names, 16)
    config = published.network_config(weights)
    converting.convert_network(weights, pieces, FluxTransformer2DModel, config, tmp_path / "transformer")
    whole = sum(tensor.nbytes for tensor in network_tensors().values())
    largest = max(tensor.nbytes for tensor in network_tensors().values())
    assert 50_000 < max(most) < 60_000 + 2 * largest < whole / 4


def test_the_vae_is_taken_name_for_name(files, converted):
    made = load_file(converted / "vae/diffusion_pytorch_model.safetensors")
    own = load_file(files / published.VAE)
    assert made.keys() == own.keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in made.items())
    backbone = OpenSoraConfig(pretrained=str(converted)).build()
    assert backbone.load_vae().config.block_out_channels == [32] * 4
    assert backbone.load_vae().config.scaling_factor == 0.476986


def test_text_encoders_in_pickled_files_of_whole_models_are_taken(files, tmp_path):
    """As google/t5-v1_1-xxl and openai/clip-vit-large-patch14 come: with a decoder, with an image encoder."""
    source = tmp_path / "source"
    shutil.copytree(files, source)
    own = {}
    for place, beside in ((published.T5, ["lm_head.weight", "decoder.x"]), (published.CLIP, ["vision_model.x"])):
        file = source / place / "model.safetensors"
        own[place] = load_file(file)
        extra = {name: torch.zeros(2) for name in [*beside, "logit_scale"]}
        torch.save(own[place] | extra, source / place / "pytorch_model.bin")
        file.unlink()
    OpenSoraConfig.convert(source, tmp_path / "model")
    for place, name in ((published.T5, "text_encoder"), (published.CLIP, "text_encoder_2")):
        made = load_file(tmp_path / "model" / name / "model.safetensors")
        assert made.keys() == own[place].keys()
        assert all(torch.equal(tensor, own[place][key]) for key, tensor in made.items())
    told = json.loads((tmp_path / "model/tokenizer/tokenizer_config.json").read_text())
    assert "use_safetensors" not in told


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda own: own | {"guidance_in.in_layer.weight": torch.zeros(2)}, "guidance_in.in_layer.weight is left over"),
        (lambda own: without(own, "txt_in.bias"), "txt_in.bias is missing"),
        (lambda own: without(own, "cond_in.weight"), "has no cond_in.weight"),
        (lambda own: own | {"img_in.weight": torch.zeros(3)}, "has img_in.weight [3]"),
        (
            lambda own: own | {"txt_in.bias": torch.zeros(32).to(torch.float8_e4m3fn)},
            "in other numbers (txt_in.bias F8",
        ),
        (lambda own: own | {"txt_in.bias": torch.zeros(3)}, "context_embedder.bias has another shape"),
        (lambda own: own | {"single_blocks.1.v_mlp.weight": torch.zeros(3, 32)}, "has another shape"),
        (lambda own: {name.replace("blocks.1", "blocks.3"): t for name, t in own.items()}, "blocks.3"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(change, said, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    save_file(change(network_tensors()), source / published.NETWORK)
    with pytest.raises(ValueError, match=re.escape(said)):
        OpenSoraConfig.convert(source, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


def test_a_cut_file_is_one_line(files, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(files, source)
    content = (source / published.NETWORK).read_bytes()
    (source / published.NETWORK).write_bytes(content[: len(content) // 2])
    with pytest.raises(SystemExit) as exit_:
        cli.main(["convert", "open_sora", str(source), str(tmp_path / "model")])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert f"cannot read {source / published.NETWORK}" in " ".join(error.split())
    assert "Traceback" not in error


def test_the_command_converts_and_refuses(files, tmp_path, capsys):
    def convert(*arguments):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["convert", *map(str, arguments)])
        output = capsys.readouterr()
        return exit_.value.code, " ".join((output.out + output.err).split())

    model = tmp_path / "model"
    code, said = convert("open_sora", files, model)
    assert (code, said.startswith(f"{model}: give it as backbone.pretrained")) == (0, True)
    assert sorted(path.name for path in model.iterdir()) == sorted(
        ["made_of.json", "transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]
    )
    assert convert("open_sora", files, model)[0] == 2  # it is there
    for source, reason in (
        (tmp_path, "has no Open_Sora_v2.safetensors; give the folder as it is published"),
        (tmp_path / "none", "is no folder; give the folder as it is published"),
        (files / published.NETWORK, "is no folder; give the folder as it is published"),
    ):
        code, said = convert("open_sora", source, tmp_path / "other")
        assert (code, reason in said) == (2, True), said
    code, said = convert("wan", files, tmp_path / "other")
    assert (code, "nothing is to be converted, this model is given as backbone.pretrained" in said) == (2, True)
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/.keep").touch()
    code, said = convert("open_sora", files, tmp_path / "hidden")
    assert (code, "is there already; choose another DEST" in said) == (2, True)
    code, said = convert("open_soar", files, tmp_path / "other")
    assert (code, "open_sora" in said) == (2, True)


def test_a_published_folder_is_converted_at_its_first_use_and_says_so(files, tmp_path, capfd):
    folder = shutil.copytree(files, tmp_path / "Open-Sora-v2")
    config = OpenSoraConfig(pretrained=str(folder))
    config.build()
    assert "converting it (once)" in capfd.readouterr().err
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []
    again = config.build()
    assert "converting" not in capfd.readouterr().err
    assert again.config.loadable() == folder / "diffusers"
    # Other weights under the same name are converted anew.
    tensors = network_tensors()
    tensors["final_layer.linear.bias"] += 1
    save_file(tensors, folder / published.NETWORK)
    changed = config.build()
    assert "converting it (its files have changed)" in capfd.readouterr().err
    assert torch.equal(changed.network.proj_out.bias, again.network.proj_out.bias + 1)


def test_what_comes_later_is_converted_too(files, tmp_path, capfd):
    folder = tmp_path / "Open-Sora-v2"
    folder.mkdir()
    shutil.copy(files / published.NETWORK, folder)
    config = OpenSoraConfig(pretrained=str(folder))
    config.build()
    assert "has none: hunyuan_vae.safetensors, google/t5-v1_1-xxl, openai/clip" in capfd.readouterr().err
    with pytest.raises(ValueError, match="has no text_encoder"):
        config.build().encode([PROMPT])
    shutil.copytree(files, folder, dirs_exist_ok=True)
    assert config.build().encode([PROMPT])["prompt_embeds"].shape == (1, 512, 24)
    assert config.build().load_vae().config.latent_channels == 16


def test_processes_that_convert_at_once_leave_one_whole_folder(files, tmp_path):
    folder = shutil.copytree(files, tmp_path / "Open-Sora-v2")
    fork = multiprocessing.get_context("fork")
    config = OpenSoraConfig(pretrained=str(folder))
    processes = [fork.Process(target=config.loadable) for _ in range(3)]
    processes += [fork.Process(target=OpenSoraConfig.convert, args=(files, tmp_path / "model")) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert sorted(process.exitcode for process in processes) == [0, 0, 0, 0, 1]  # two for one place: one is refused
    for made in (folder / "diffusers", tmp_path / "model"):
        assert OpenSoraConfig(pretrained=str(made)).build().encode([PROMPT])
        assert not [path for path in made.parent.iterdir() if path.name.startswith(".")]


def test_where_the_published_folder_cannot_be_written_the_way_out_is_named(files, tmp_path, monkeypatch):
    folder = shutil.copytree(files, tmp_path / "Open-Sora-v2")

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(converting, "write_shards", full)
    with pytest.raises(UserError, match=r"moedistill convert open_sora \S+ FOLDER, and set backbone\.pretrained"):
        load_recipe("dcm_open_sora", [f"backbone.pretrained={folder}"]).backbone.build()
    assert not (folder / "diffusers").exists()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


# -- wrong backbones, each in its row ---------------------------------------------------------------------------------


class Zeros(OpenSoraBackbone):
    def predict(self, network, x, timestep, cond):
        cond = {**cond, "pooled_prompt_embeds": torch.zeros_like(cond["pooled_prompt_embeds"])}
        return super().predict(network, x, timestep, cond)


class Turned(OpenSoraBackbone):
    def places(self, x):
        return super().places(x)[:, [0, 2, 1]]


class Inverted(OpenSoraBackbone):
    def predict(self, network, x, timestep, cond):
        if "image_latents" in cond:
            image = cond["image_latents"].clone()
            image[:, :1] = 1 - image[:, :1]
            cond = {**cond, "image_latents": image}
        return super().predict(network, x, timestep, cond)


class Silent(OpenSoraBackbone):
    def told(self, text):
        return text


def wrong(backbone_class=OpenSoraBackbone, **members):
    """A config of a backbone that is wrong, or that is itself wrong in `members`."""
    cls = dataclass(kw_only=True)(type("Wrong", (OpenSoraConfig,), {"backbone_class": backbone_class, **members}))
    return cls(pretrained=None)


AGAINST_OTHERS = ("native_steps", "time_shift", "guided_steps", "recorded")
"""Checks that compare with numbers from elsewhere."""


def failing(config):
    """Which of them fail."""
    found, subject = set(), Subject(config)
    for check in (check for check in CHECKS if check.name in AGAINST_OTHERS):
        try:
            check.function(subject)
        except AssertionError:
            found.add(check.name)
    return found


@pytest.mark.parametrize("cls", [Silent, Zeros, Turned, Inverted])
def test_a_backbone_that_calls_the_network_wrongly_fails_against_the_record(cls):
    assert failing(wrong(cls)) == {"recorded"}


def test_a_wrong_shift_fails_in_its_row():
    shift = OpenSoraConfig.time_shift
    assert failing(wrong(time_shift=lambda self: shift(self) / math.sqrt(5))) == {"time_shift"}


def test_guidance_that_does_not_oscillate_fails_against_the_models_own(monkeypatch):
    monkeypatch.setattr(Guidance, "guides", lambda self, step: torch.ones_like(step, dtype=torch.bool))
    assert failing(wrong()) == {"guided_steps"}


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("_neighbours", lambda head: lambda rows: (rows,)),
        ("_halves_swapped", lambda rows: (rows,)),
        ("_sum", lambda own, given: own),
    ],
)
def test_a_wrong_conversion_fails_against_the_record(name, instead, monkeypatch):
    monkeypatch.setattr(published, name, instead)
    assert failing(wrong()) == {"recorded"}


# -- text and time ----------------------------------------------------------------------------------------------------


def test_a_prompt_is_told_as_a_sentence_with_frame_rate_and_motion():
    told = OpenSoraConfig(pretrained=None).build().told
    assert told("raining, sea") == "raining, sea. 24 FPS. 4 motion score."
    assert told(" It rains. ") == "It rains. 24 FPS. 4 motion score."
    assert told("a ball, 16 FPS.") == "a ball, 16 FPS. 4 motion score."
    other = OpenSoraConfig(pretrained=None, fps=16, motion_score=None).build()
    assert other.told("rain") == "rain. 16 FPS."


def test_text_encoders_read_what_is_told_with_padding_and_no_mask(converted):
    backbone = OpenSoraConfig(pretrained=str(converted)).build()
    cond = backbone.encode([PROMPT])
    told = "a dog runs. 24 FPS. 4 motion score."
    t5, clip = T5EncoderModel.from_pretrained(converted / "text_encoder"), None
    words = t5_tokenizer()(told, padding="max_length", max_length=512, return_tensors="pt").input_ids
    clip = CLIPTextModel.from_pretrained(converted / "text_encoder_2")
    more = clip_tokenizer()(told, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = {
            "prompt_embeds": t5(words, attention_mask=torch.ones_like(words)).last_hidden_state,
            "pooled_prompt_embeds": clip(more).pooler_output,
        }
    assert cond.keys() == wanted.keys()
    assert all((cond[name] - wanted[name]).abs().max() < 1e-5 for name in wanted)
    # The negative prompt is told as it is.
    null = backbone.null_conditioning(cond)
    empty = t5_tokenizer()("", padding="max_length", max_length=512, return_tensors="pt").input_ids
    with torch.no_grad():
        assert (null["prompt_embeds"] - t5(empty).last_hidden_state).abs().max() < 1e-5
    assert backbone.captions(cond) == [PROMPT]


def test_the_network_has_the_exact_time_in_bfloat16(record):
    backbone = record.config.replace(dtype="bfloat16").build()
    seen = []
    backbone.network.time_text_embed.time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    sigma = torch.tensor([0.9871, 0.6302, 0.1003])
    with torch.no_grad():
        backbone.velocity(backbone.network, record.x, sigma, record.conditionings[1])
    assert torch.equal(seen[0], 1000.0 * sigma)


def test_a_mask_of_other_numbers_is_refused():
    backbone = OpenSoraConfig(pretrained=None).build()
    latents, cond = torch.zeros(shape(backbone)), backbone.encode([PROMPT])
    image = torch.zeros(1, 17, *latents.shape[2:])
    backbone.prepare(latents, {**cond, "image_latents": image})
    with pytest.raises(ValueError, match=r"other numbers than 0 and 1 in its first channel"):
        backbone.prepare(latents, {**cond, "image_latents": image + 0.5})
    with pytest.raises(ValueError, match=r"image_latents has latents where its first channel, the mask, says"):
        backbone.prepare(latents, {**cond, "image_latents": image + torch.arange(17).view(17, 1, 1, 1).clamp(max=1)})
    with pytest.raises(ValueError, match=r"image_latents \[16, .* the model takes \[17, any, any, any\]"):
        backbone.prepare(latents, {**cond, "image_latents": image[:, 1:]})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"in_channels": 64}, "in_channels is 64, of Open-Sora 132"),
        ({"out_channels": None}, "out_channels is None, of Open-Sora 64"),
        ({"guidance_embeds": True}, "guidance_embeds is true"),
    ],
)
def test_another_model_of_the_same_class_is_refused(converted, tmp_path, change, said):
    """FLUX is one."""
    folder = shutil.copytree(converted, tmp_path / "model")
    file = folder / "transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"{said}.*it is another model"):
        OpenSoraConfig(pretrained=str(folder)).build()


def test_missing_weights_say_what_there_is_to_get():
    with pytest.raises(ValueError, match=r"hpcai-tech/Open-Sora-v2 are not on this machine(.|\n)*hf download"):
        load_recipe("dcm_open_sora").backbone.build()


# -- the recipe -------------------------------------------------------------------------------------------------------


def test_the_recipe_is_resolved_to_the_shift_of_its_size():
    assert load_recipe("dcm_open_sora").resolved()["trajectory"]["shift"] == pytest.approx(5.7326, abs=1e-4)
    bigger = ["backbone.video.height=576", "backbone.video.width=1024"]
    assert load_recipe("dcm_open_sora", bigger).trajectory.shift == pytest.approx(11.8721, abs=1e-4)
    assert load_recipe("dcm_open_sora", ["trajectory.shift=3.0"]).trajectory.shift == 3.0


def test_a_wrong_size_is_said_once():
    for shift in ("auto", "3.0"):
        with pytest.raises(RecipeError) as error:
            load_recipe("dcm_open_sora", ["backbone.video.num_frames=128", f"trajectory.shift={shift}"])
        assert [problem.path for problem in error.value.problems] == ["backbone.video"]
    with pytest.raises(RecipeError, match=r"133 are more than the model makes;\s+give 129 or less"):
        load_recipe("dcm_open_sora", ["backbone.video.num_frames=133"])
    notes = load_recipe("dcm_open_sora", ["backbone.guidance.oscillate_from=90"]).notes()
    assert any("oscillate_from 90 never comes: the trajectory has 50 steps" in note for note in notes)


def save_samples(folder, backbone):
    cond = backbone.encode([f"sample {k}" for k in range(3)])
    latents = [torch.randn(backbone.latent_shape(), generator=torch.Generator().manual_seed(k)) for k in range(3)]
    samples = [Sample(latents[k], {name: value[k] for name, value in cond.items()}) for k in range(3)]
    write_latents(folder, samples)
    return folder


def test_the_recipe_from_end_to_end_on_published_files(files, tmp_path, capfd):
    model = shutil.copytree(files, tmp_path / "Open-Sora-v2")
    small = [
        f"backbone.pretrained={model}",
        "backbone.dtype=float32",
        "backbone.video={num_frames: 17, height: 32, width: 48}",
        "experts.detail.rank=4",
        "stages.semantic.steps=2",
        "stages.detail.steps=3",
        "stages.detail.probe.block_stride=2",
        "training.batch_size=2",
        "training.checkpoint_every=1",
        "training.keep_checkpoints=9",
        f"stages.samples.prompts=[{PROMPT}]",
    ]
    data = save_samples(tmp_path / "data", load_recipe("dcm_open_sora", small).backbone.build())
    recipe = load_recipe("dcm_open_sora", [*small, f"data.path={data}"])
    result = run(recipe, output=tmp_path / "run", device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["stage"] == "detail"][-1] == 3
    assert (tmp_path / "run/samples/000.mp4").is_file()
    assert capfd.readouterr().err.count("converting it (once)") == 1

    middle = tmp_path / "run/checkpoints/01_detail_00000002"
    again = run(recipe, output=tmp_path / "again", resume_from=middle, device="cpu")
    assert equal(load_tree(result.checkpoint, "experts"), load_tree(again.checkpoint, "experts"))
    assert not equal(load_tree(middle, "experts"), load_tree(again.checkpoint, "experts"))

    sample = partial(sample_run, prompts=[PROMPT], seed=1)
    videos = [
        sample(source, output=tmp_path / f"of_{source.name}").videos[0]
        for source in (tmp_path / "run", tmp_path / "run/export")
    ]
    assert torch.equal(*videos)
    assert videos[0].shape == (3, 17, 32, 48)
