"""What data are made of is what the stock pipelines make of the same pictures and words."""

import gc
import json
import shutil
import weakref
from types import SimpleNamespace

import diffusers
import pytest
import torch
from PIL import Image
from saved_pipelines import FAMILIES, FROM_IMAGES, PROMPT, pipeline_recipe, save_pipeline

from moedistill import load_recipe
from moedistill.runtime.fingerprint import BLOCK, BLOCKS, fingerprint

EXACT = {"atol": 1e-6, "rtol": 1e-6}
LTX_SIZE = {"num_frames": 9, "height": 64, "width": 96}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(family):
        if family not in made:
            made[family] = save_pipeline(tmp_path_factory.mktemp(family) / "pipeline", family)
        return made[family]

    return folder


def config_of(family, folder, **changes):
    video = {"video": LTX_SIZE} if family == "ltx" else {}
    given = {**pipeline_recipe(family, folder)["backbone"], **video, **changes}
    return load_recipe({**pipeline_recipe(family, folder), "backbone": given}).backbone


def skeleton(family, folder, **changes):
    """The backbone as what makes data has it: without the weights of a network."""
    backbone = config_of(family, folder, **changes).skeleton()
    backbone.placed = torch.device("cpu")
    return backbone


def pictures(backbone, count=1, seed=0):
    """Videos of random pixels of 8 bits: `[count, 3, T, H, W]` in [0, 1], and the same as pictures."""
    size = backbone.video
    shape = (count, size.num_frames, size.height, size.width, 3)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    frames = [[Image.fromarray(frame) for frame in video.numpy()] for video in pixels]
    return pixels.permute(0, 4, 1, 2, 3).float() / 255, frames


@pytest.fixture
def no_noise(monkeypatch):
    """Some pipelines draw from the VAE's posterior; without noise what they draw is its mode."""

    def zeros(shape, *, generator=None, device=None, dtype=None):
        return torch.zeros(shape, dtype=dtype)

    monkeypatch.setattr("diffusers.models.autoencoders.vae.randn_tensor", zeros)
    monkeypatch.setattr("diffusers.pipelines.ltx.pipeline_ltx_condition.randn_tensor", zeros)


# -- videos -----------------------------------------------------------------------------------------------------------


def stock_latents(family, folder, frames, size):
    """As a stock pipeline that takes videos gives them to the network, before noise: `[B, C, T, H, W]`."""
    bare = dict.fromkeys(("tokenizer", "text_encoder", "transformer", "scheduler"))
    if family == "hunyuan_video":  # none of its pipelines takes videos
        vae = diffusers.AutoencoderKLHunyuanVideo.from_pretrained(folder / "vae")
        video = diffusers.video_processor.VideoProcessor(8).preprocess_video(frames)
        return vae.encode(video).latent_dist.mode() * vae.config.scaling_factor
    if family == "ltx":
        vae = diffusers.AutoencoderKLLTXVideo.from_pretrained(folder / "vae")
        pipeline = diffusers.LTXConditionPipeline(**bare, vae=vae)
        video = pipeline.video_processor.preprocess_video(frames)
        t, h, w = size.num_frames, size.height, size.width
        packed = pipeline.prepare_latents([video], [1.0], [0], 1, 8, h, w, t, device="cpu", dtype=torch.float32)[0]
        return pipeline._unpack_latents(packed, (t - 1) // 8 + 1, h // 32, w // 32)
    wan = family.startswith("wan")
    vae = (diffusers.AutoencoderKLWan if wan else diffusers.AutoencoderKLCogVideoX).from_pretrained(folder / "vae")
    cls = diffusers.WanVideoToVideoPipeline if wan else diffusers.CogVideoXVideoToVideoPipeline
    pipeline = cls(**bare, vae=vae)
    pipeline.scheduler = SimpleNamespace(init_noise_sigma=1.0, add_noise=lambda latents, noise, time: latents)
    video = pipeline.video_processor.preprocess_video(frames)
    latents = pipeline.prepare_latents(video, len(video), 16, size.height, size.width, torch.float32, "cpu")
    return latents if wan else latents.transpose(1, 2)


@pytest.mark.parametrize("family", [*FAMILIES, "ltx"])
@torch.no_grad()
def test_latents_are_those_of_the_stock_pipelines(family, folders, no_noise):
    backbone = skeleton(family, folders(family))
    videos, frames = pictures(backbone)
    stored = backbone.encode_videos(videos)
    assert stored.shape == (1, *backbone.latent_shape())
    prepared, _ = backbone.prepare(stored, {})
    torch.testing.assert_close(prepared, stock_latents(family, folders(family), frames, backbone.video), **EXACT)


@pytest.mark.parametrize("family", ["wan", "hunyuan_video", "cogvideox_5b", "ltx"])
@torch.no_grad()
def test_what_is_lost_in_latents_is_lost_by_the_vae_alone(family, folders):
    backbone = skeleton(family, folders(family))
    videos, _ = pictures(backbone)
    found = backbone.decode(backbone.prepare(backbone.encode_videos(videos), {})[0])
    vae = backbone.load_vae()
    again = vae.decode(vae.encode(2 * videos - 1).latent_dist.mode(), **backbone.decoder_arguments()).sample
    torch.testing.assert_close(found, (again / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


def test_latents_do_not_depend_on_the_other_videos(folders):
    backbone = skeleton("wan", folders("wan"))
    videos, _ = pictures(backbone, 3)
    together = backbone.encode_videos(videos)
    assert all(
        torch.equal(backbone.encode_videos(one[None])[0], latents)
        for one, latents in zip(videos, together, strict=True)
    )
    assert not torch.equal(together[0], together[1])


def test_the_vae_is_loaded_once_for_a_block_and_freed_at_its_end(folders, monkeypatch):
    backbone, loaded = skeleton("wan", folders("wan")), []
    load = backbone.load_vae

    def loading():
        vae = load()
        loaded.append(weakref.ref(vae))
        return vae

    monkeypatch.setattr(backbone, "load_vae", loading)
    videos, _ = pictures(backbone)
    with backbone.encoding_videos():
        latents = backbone.encode_videos(videos)
        assert torch.equal(backbone.encode_videos(videos), latents)
        backbone.given_frames(videos)
        backbone.decode(latents)
        assert len(loaded) == 1
        assert loaded[0]() is not None
    gc.collect()
    assert loaded[0]() is None
    with pytest.raises(RuntimeError, match="stop"), backbone.encoding_videos():
        raise RuntimeError("stop")
    assert torch.equal(backbone.encode_videos(videos), latents)
    assert len(loaded) == 3


def test_only_large_frames_are_encoded_in_tiles(folders, monkeypatch):
    backbone, tiled = skeleton("wan", folders("wan")), []
    cls = type(backbone.load_vae())
    encode = cls.encode
    monkeypatch.setattr(cls, "encode", lambda vae, x: tiled.append(vae.use_tiling) or encode(vae, x))
    videos, _ = pictures(backbone)
    for pixels in (32 * 48, 32 * 48 - 1):
        monkeypatch.setattr(type(backbone.config), "whole_pixels", pixels)
        backbone.encode_videos(videos)
    assert tiled == [False, True]


# -- images -----------------------------------------------------------------------------------------------------------


class Seen(Exception):
    """What a network was called with."""


def stock_inputs(folder, frames, size):
    """What a stock image-to-video pipeline, called with pictures, gives to its network."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)

    def show(module, args, kwargs):
        raise Seen(kwargs)

    pipeline.transformer.register_forward_pre_hook(show, with_kwargs=True)
    last = {"last_image": frames[-1]} if "flf" in str(folder) else {}
    with pytest.raises(Seen) as seen:
        pipeline(
            image=frames[0], **last, prompt=PROMPT, num_frames=size.num_frames, height=size.height, width=size.width,
            num_inference_steps=2, guidance_scale=1.0, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    return seen.value.args[0]


@pytest.mark.parametrize("family", FROM_IMAGES)
@torch.no_grad()
def test_what_is_made_of_images_is_what_the_stock_pipeline_gives_the_network(family, folders, no_noise):
    backbone = skeleton(family, folders(family))
    videos, frames = pictures(backbone, 2)
    cond = {**backbone.given_frames(videos), **backbone.encode_images(videos[:, :, list(backbone.image_frames)])}
    text = backbone.encode([PROMPT, PROMPT])
    _, prepared = backbone.prepare(backbone.encode_videos(videos), {**text, **cond})
    for number, one in enumerate(frames):
        given = stock_inputs(folders(family), one, backbone.video)
        states = given["hidden_states"] if family.startswith("wan") else given["hidden_states"].transpose(1, 2)
        torch.testing.assert_close(prepared["image_latents"][number], states[0, 16:], **EXACT)
        torch.testing.assert_close(prepared["prompt_embeds"][number], given["encoder_hidden_states"][0], **EXACT)
        if backbone.image_frames:
            found = given["encoder_hidden_states_image"].flatten(0, 1)
            torch.testing.assert_close(prepared["image_embeds"][number], found, **EXACT)
    assert ("image_embeds" in cond) == (family in ("wan_i2v", "wan_flf2v"))
    assert backbone.image_frames == {"wan_i2v": (0,), "wan_flf2v": (0, -1)}.get(family, ())
    assert not list(backbone.config.layout().conditioning_problems(prepared, prepared["image_latents"].shape[1:]))


def test_a_model_of_text_alone_is_given_no_frames(folders):
    backbone = skeleton("wan", folders("wan"))
    videos, _ = pictures(backbone)
    assert backbone.given_frames(videos) == {}
    assert backbone.encode_images(videos[:, :, []]) == {}
    with pytest.raises(ValueError, match=r"images \[1, 3, 9, 32, 48\] must be \[B, 3, 0, H, W\]"):
        backbone.encode_images(videos)


def test_an_image_encoder_that_is_not_there_is_named(folders, tmp_path):
    shutil.copytree(folders("wan_i2v"), tmp_path / "flf", ignore=shutil.ignore_patterns("image_encoder"))
    backbone = skeleton("wan_i2v", tmp_path / "flf")
    with pytest.raises(ValueError, match=r"cannot load its image encoder \(image_encoder\): "):
        backbone.encode_images(torch.zeros(1, 3, 1, 32, 48))
    assert "images" not in backbone.revisions()


# -- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "ltx", "wan_i2v"])
def test_each_prompt_is_encoded_as_all_are(family, folders, monkeypatch):
    backbone, freed = skeleton(family, folders(family)), []
    prompts = ["a dog", "rain at night", "a dog", ""]
    wanted = backbone.encode(prompts)
    load, backbone._encoded = backbone._load_text, {}
    monkeypatch.setattr(backbone, "_load_text", lambda *args: freed.append(weakref.ref(made := load(*args))) or made)
    found = list(backbone.encode_each(iter(prompts)))
    assert len(freed) == 1
    assert freed[0]() is None
    assert backbone._encoded == {}
    for number, one in enumerate(found):
        unpacked = backbone.unpack({name: value[None] for name, value in one.items()})
        assert list(unpacked) == list(wanted)
        assert all(torch.equal(value[0], wanted[name][number]) for name, value in unpacked.items())
    if family.startswith("wan"):
        assert len(found[0]["prompt_embeds"]) == len("adog") + 1


def test_the_text_encoders_are_freed_where_nobody_asks_on(folders, monkeypatch):
    backbone, kept = skeleton("wan", folders("wan")), []
    load = backbone._load_text
    monkeypatch.setattr(backbone, "_load_text", lambda *args: kept.append(weakref.ref(made := load(*args))) or made)
    each = backbone.encode_each(["a dog", "rain"])
    next(each)
    assert kept[0]() is not None
    each.close()
    gc.collect()
    assert kept[0]() is None


# -- revisions --------------------------------------------------------------------------------------------------------


def test_a_revision_tells_what_changed(folders, tmp_path):
    folder = shutil.copytree(folders("wan_i2v"), tmp_path / "model")

    def revisions(**changes):
        return skeleton("wan_i2v", folder, **changes).revisions()

    def changed(after, before):
        return {part for part in before if after[part] != before[part]}

    first = revisions()
    assert set(first) == {"vae", "text", "images", "network"}
    assert revisions() == first
    assert skeleton("wan_i2v", folders("wan_i2v")).revisions() == first
    assert changed(revisions(dtype="bfloat16"), first) == {"text", "images", "network"}  # Wan's VAE computes in float32
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "latents_mean": [0.5] * 16}))
    second = revisions()
    assert changed(second, first) == {"vae"}
    weights = bytearray((folder / "text_encoder" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "text_encoder" / "model.safetensors").write_bytes(weights)
    third = revisions()
    assert changed(third, second) == {"text"}
    (folder / "vae" / "diffusion_pytorch_model.safetensors").touch()
    (folder / "vae" / ".cached").write_text("a note")
    (folder / "model_index.json.old").write_text("a note")
    assert revisions() == third
    shutil.rmtree(folder / "text_encoder")
    assert set(revisions()) == {"vae", "images", "network"}


def test_the_hubs_commit_counts(folders, tmp_path):
    def revisions(commit):
        folder = tmp_path / "models--a--b" / "snapshots" / commit
        if not folder.exists():
            shutil.copytree(folders("wan"), folder)
        return skeleton("wan", folder).revisions()

    assert revisions("0" * 40) == revisions("0" * 40) != revisions("1" * 40)


def test_revisions_of_miniatures_are_those_of_their_configs():
    def revisions(**changes):
        return config_of("wan", "any", pretrained=None, **changes).skeleton().revisions()

    assert set(revisions()) == {"vae", "text", "network"}
    assert revisions() == revisions()
    assert revisions(dtype="bfloat16")["text"] != revisions()["text"]


def test_a_large_file_is_told_by_its_header_and_by_blocks(tmp_path):
    size, header = 3 * BLOCKS * BLOCK, 2 * BLOCK
    folder = tmp_path / "vae"
    folder.mkdir()
    content = bytearray(size)
    content[:8] = header.to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(content)

    def changed_at(place):
        other = bytearray(content)
        other[place] = 1
        (folder / "model.safetensors").write_bytes(other)
        return fingerprint(folder)

    first = fingerprint(folder)
    stride = (size - BLOCK) / (BLOCKS - 1)
    assert all(changed_at(int(stride * number) + BLOCK // 2) != first for number in range(BLOCKS))
    assert changed_at(int(stride * 10) + 2 * BLOCK) == first
    assert changed_at(header) != first
    (folder / "model.safetensors").write_bytes(content[:-1])
    assert fingerprint(folder) != first
    (folder / "model.safetensors").write_bytes(content)
    assert fingerprint(folder) == first
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert fingerprint(folder) != first
