"""A dataset of a plugin whose samples do not fit: one line, exit code 2, before anything is trained."""

import clips_plugin
import pytest
from helpers import distil

from moedistill import cli
from moedistill.components.plugins import load_plugins
from moedistill.errors import UserError
from moedistill.recipe.yaml_tree import dump_yaml
from moedistill.runs.loop import run

TAKES = "[up to 12, 24]"


@pytest.fixture(scope="module")
def plugins():
    return load_plugins([clips_plugin.__file__])


def recipe_with(how, **training):
    return {
        "name": "clips",
        "backbone": {"kind": "wan", "pretrained": None},
        "trajectory": {"kind": "flow_matching", "num_steps": 8, "shift": 5.0},
        "router": {"kind": "timestep", "experts": ["semantic"]},
        "experts": {"semantic": {"kind": "lora", "rank": 2, "targets": "attention"}},
        "data": {"kind": "clips", "how": how},
        "training": {"batch_size": 4, "monitor": None, **training},
        "stages": [distil(steps=1)],
    }


def refused(how, plugins, tmp_path, **training):
    with pytest.raises(UserError) as error:
        run(recipe_with(how, **training), output=tmp_path / "run", device="cpu", smoke=True, plugins=plugins)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("how", ["fine", "half"])
def test_samples_that_fit(how, plugins, tmp_path):
    assert (
        run(recipe_with(how), output=tmp_path, device="cpu", smoke=True, plugins=plugins).cost["semantic"]["steps"] == 1
    )


MESSAGES = {
    "no sample": "sample 0 is a tuple, not a Sample of latents and conditioning",
    "nothing": "sample 0 is a NoneType, not a Sample of latents and conditioning",
    "numpy": "sample 0 has latents that are a ndarray; they must be a tensor [C, T, H, W]",
    "missing latents": "sample 0 has latents that are a NoneType; they must be a tensor [C, T, H, W]",
    "frame": "sample 0 has latents [16, 4, 6]; they must be [C, T, H, W], without a batch dimension",
    "batched": "sample 0 has latents [1, 16, 5, 4, 6]; they must be [C, T, H, W], without a batch dimension",
    "integers": "sample 0 has latents of torch.int64; they must be floating-point numbers, such as torch.float32",
    "channels": "sample 0 has latents [8, 5, 4, 6]; the model's have 16 channels",
    "odd": "sample 0 has latents [16, 5, 4, 5]: (T, H, W) must be multiples of (1, 2, 2)",
    "no text": "sample 0 has no prompt_embeds, which the model takes; encode it and store it",
    "other text": "sample 0 has no prompt_embeds, which the model takes; encode it and store it",
    "strings": "sample 0 has prompt_embeds that is a str; it must be a tensor, without a batch dimension",
    "no mapping": "sample 0 has conditioning that is a list; it must be a mapping of names to tensors",
    "no conditioning": "sample 0 has conditioning that is a NoneType; it must be a mapping of names to tensors",
    "narrow": f"sample 0 has prompt_embeds [12, 8]; the model takes {TAKES}",
    "other shape": "sample 0 has latents [16, 5, 4, 6], but the dataset's shape() says [16, 5, 4, 8]; samples are "
    "batched by it, so let it give each sample's own",
    "short shape": "sample 0 has shape() (16, 5, 4); it must be the latents' four sizes (C, T, H, W)",
    "no shape": "sample 0 has shape() None; it must be the latents' four sizes (C, T, H, W)",
    "empty": "it has no samples; give it some, or leave data out",
    "null text": "the negative prompt has prompt_embeds that is a str; it must be a tensor, without a batch dimension",
    "null batched": "the negative prompt has prompt_embeds [1, 12, 24], and sample 0 [12, 24]; both must be without a "
    "batch dimension",
    "batched text": "the negative prompt has prompt_embeds [12, 24], and sample 0 [1, 12, 24]; both must be without a "
    "batch dimension",
}


@pytest.mark.parametrize("how", MESSAGES)
def test_the_first_sample_stops_a_run_before_it_trains(how, plugins, tmp_path):
    assert refused(how, plugins, tmp_path) == f"data: dataset 'clips': {MESSAGES[how]}"
    assert not (tmp_path / "run").exists()


def test_every_way_is_tried():
    assert {*MESSAGES, *clips_plugin.LATER, "fine", "half"} == set(clips_plugin.SAMPLES)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("later frame", "sample 2 has latents [16, 4, 6]; they must be [C, T, H, W], without a batch dimension"),
        ("later shape", "sample 2 has latents [16, 3, 4, 6], but the dataset's shape() says [16, 5, 4, 6]"),
        ("later text", "sample 2 has prompt_embeds that is a NoneType; it must be a tensor"),
    ],
)
def test_later_samples_stop_it_where_they_are_read(how, message, workers, plugins, tmp_path):
    assert f"data: Clips: {message}" in refused(how, plugins, tmp_path, num_workers=workers)


def test_the_command_ends_with_code_2_and_no_traceback(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_yaml(recipe_with("batched")))
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", str(file), "-p", clips_plugin.__file__, "--smoke", "--output", str(tmp_path / "run")])
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert "Traceback" not in said.err + said.out
    assert "dataset 'clips': sample 0 has latents [1, 16, 5, 4, 6]; they must be [C, T, H, W]" in said.err


def test_what_a_model_makes_nothing_of_is_said_in_one_line(plugins, tmp_path, monkeypatch):
    from moedistill_wan.backbone import WanBackbone

    def prepare(self, latents, cond):
        return latents, {"prompt_embeds": cond["prompt_embeds"].reshape(7, 7)}

    monkeypatch.setattr(WanBackbone, "prepare", prepare)
    message = refused("fine", plugins, tmp_path)
    assert (
        "dataset 'clips': sample 0 has prompt_embeds torch.float32 [12, 24], of which the model makes nothing"
        in message
    )
    assert message.endswith(f"it takes prompt_embeds {TAKES}")
