"""The kit on models' folders: every shipped backbone passes on a sound one, and each row looks at something."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from moedistill import cli
from moedistill.testing.checks import CHECKS
from moedistill.testing.running import run_checks
from moedistill.testing.subject import Subject
from moedistill_cogvideox.backbone import CogVideoXConfig
from moedistill_hunyuan_video.backbone import HunyuanVideoConfig
from moedistill_hunyuan_video_15.backbone import HunyuanVideo15Config
from moedistill_ltx.backbone import LTXConfig
from moedistill_wan.backbone import WanBackbone, WanConfig

BACKBONES = {
    "wan": (WanConfig, {}),
    "wan22": (WanConfig, {"boundary_ratio": 0.875}),
    "hunyuan_video": (HunyuanVideoConfig, {}),
    "cogvideox_2b": (CogVideoXConfig, {"model": "2b"}),
    "cogvideox_5b": (CogVideoXConfig, {"model": "5b"}),
    "cogvideox_1.5": (CogVideoXConfig, {"model": "1.5-5b"}),
    "ltx": (LTXConfig, {}),
    "hunyuan_video_15": (HunyuanVideo15Config, {}),
}
OF_THE_FOLDER = ("encode", "decode", "text_encoders", "encode_videos", "guided_once")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder of a whole miniature with random weights, as diffusers saves it, made once."""
    made = {}

    def find(name):
        if name not in made:
            cls, settings = BACKBONES[name]
            config = cls(pretrained=None, **settings).tiny()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                backbone = config.build(seed=0)
                pipeline = config.pipeline_class()(
                    **backbone.networks, **config.tiny_text_encoders(), vae=backbone.load_vae(),
                    scheduler=config.scheduler(), **config.pipeline_options(),
                )  # fmt: skip
            made[name] = tmp_path_factory.mktemp(name)
            pipeline.save_pretrained(made[name])
        return made[name]

    return find


@pytest.mark.parametrize("name", BACKBONES)
def test_a_shipped_backbone_passes_on_a_sound_folder(name, place, monkeypatch):
    """All but the one row that random weights cannot pass. The slowest backbone: what of it depends on a folder."""
    if name == "hunyuan_video_15":
        monkeypatch.setattr("moedistill.testing.running.CHECKS", [c for c in CHECKS if c.name in OF_THE_FOLDER])
    cls, settings = BACKBONES[name]
    subject = Subject(cls(pretrained=str(place(name)), **settings), real=True)
    rows = {row.check.name: row for row in run_checks(subject)}
    assert {row.check.name for row in rows.values() if row.passed is None} == set()
    assert {row.check.name for row in rows.values() if row.passed is False} <= {"noise_recognised"}
    size = cls.tiny_video  # something small is looked at, whatever the recipe's size is
    assert f"3, {size.num_frames}, {size.height}, {size.width}], " in rows["decode"].figure
    assert f"[3, {size.num_frames}, {size.height}, {size.width}] → " in rows["encode_videos"].figure
    assert subject.config.video != size


def decode_short(self, latents):
    return WanBackbone.decode(self, latents)[:, :, 1:]


def encode_unpadded(self, pipeline, prompts):
    return {name: value[:, :7, :5] for name, value in WanBackbone.encode_with(self, pipeline, prompts).items()}


def guided_by_half(self, pipeline, cond):
    found = WanBackbone.guiding_arguments(self, pipeline, cond)
    return {**found, "guidance_scale": found["guidance_scale"] / 2 + 0.5}


@pytest.mark.parametrize(
    ("check", "message", "members"),
    [
        (
            "decode",
            r"decodes to \(T, H, W\) = \[16, 32, 48\], but the video has \[17, 32, 48\]",
            {"decode": decode_short},
        ),
        ("text_encoders", r"prompt_embeds is \[7, 5\], not", {"encode_with": encode_unpadded}),
        ("guided_steps", "the guided jump from sigma 1 to .* differs by", {"guiding_arguments": guided_by_half}),
        ("guided_once", "latents at scale", {"pass_names": dict.fromkeys(("cond", "uncond"), "conditional")}),
    ],
)
def test_a_wrong_backbone_fails_on_a_sound_folder(check, message, members, place):
    class Config(WanConfig):
        backbone_class = type("Changed", (WanBackbone,), members)

    [function] = [each.function for each in CHECKS if each.name == check]
    if check == "text_encoders":  # its network would take no such text
        members["velocity"] = lambda self, network, x, sigma, cond: x
    with pytest.raises(AssertionError, match=message):
        function(Subject(Config(pretrained=str(place("wan"))), real=True))


def test_the_command_passes_on_a_model_that_knows_noise(place, tmp_path, capsys):
    """Trained for a second to tell its noise, which is the one thing that random weights do not know."""
    folder = place("wan")
    for part in folder.iterdir():
        (tmp_path / part.name).symlink_to(part)
    network = WanTransformer3DModel.from_pretrained(folder / "transformer")
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    text = torch.zeros(4, 4, 24)
    for _ in range(60):
        x = torch.randn(4, 16, 1, 4, 4, generator=generator)
        v = network(x, torch.full((4,), 1000.0), text, return_dict=False)[0]
        (v - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    (tmp_path / "transformer").unlink()
    network.save_pretrained(tmp_path / "transformer")
    with pytest.raises(SystemExit) as stop:
        cli.main(["check-backbone", "wan", "--pretrained", str(tmp_path)])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert f"{len([check for check in CHECKS if not check.declared])} ✔, 0 ✘, 0 not checked" in said
