"""Every export is read again as its consumers do, and one that is not what was trained does not stay."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from two_expert_runs import finished

from moedistill.components.plugins import load_plugins
from moedistill.errors import UserError
from moedistill.exporters import comfyui_workflow, lora_files
from moedistill.exporters.export import export
from moedistill.exporters.options import ExportOptions, chosen_formats
from moedistill.exporters.reading.calls import trained_calls
from moedistill.exporters.source import Source, open_source

CONSUMERS = ["comfyui", "lightx2v"]
"""Whose rules are read in this process."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = {}

    def run_of(family, semantic):
        if (family, semantic) not in made:
            made[family, semantic] = finished(tmp_path_factory.mktemp(family), family, semantic)
        return made[family, semantic]

    return run_of


def write(run, folder, *names, **options):
    formats = chosen_formats(load_plugins().components, names)
    return export(run, formats, folder, ExportOptions(**{"dtype": torch.float32, **options}))


@pytest.mark.parametrize(
    ("family", "names"),
    [("wan", CONSUMERS), ("wan22", CONSUMERS), ("hunyuan_video", ["comfyui"]), ("ltx", ["comfyui"])],
)
@pytest.mark.parametrize("semantic", ["lora", "full"])
@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}, {"form": "merged"}, {"svd": 2}], ids=str
)
def test_our_files_hold_what_was_trained(run, tmp_path, family, names, semantic, options):
    for made in write(run(family, semantic), tmp_path / "out", *names, **options):
        weights = [file.path for file in made.files if file.form]
        assert [verdict.file for verdict in made.verdicts][: len(weights)] == weights
        assert all(not verdict.faults for verdict in made.verdicts)
        record = json.loads((made.folder / "moedistill.json").read_text(encoding="utf-8"))
        assert record["verified"] == [verdict.line() for verdict in made.verdicts]
        if family != "wan22":  # whose second network is another file, which is not ours
            assert len(made.verdicts) == len(weights) + 1, "the workflow or configuration was not looked at"


@pytest.mark.parametrize(("family", "semantic"), [("wan", "full"), ("cogvideox_2b", "lora"), ("hunyuan_video", "full")])
def test_diffusers_itself_finds_what_was_trained(run, tmp_path, family, semantic):
    """The networks of these miniatures are called, too, and give what training's give."""
    assert list(trained_calls(open_source(run(family, semantic)))) == ["semantic", "detail"]
    [made] = write(run(family, semantic), tmp_path / "out", "diffusers")
    assert [verdict.reader for verdict in made.verdicts] == ["diffusers", "diffusers itself"] * 2
    assert all(not verdict.faults for verdict in made.verdicts)


def test_in_bfloat16_a_pipeline_s_folder_is_what_was_trained(run, tmp_path):
    [made] = write(run("wan", "lora"), tmp_path / "out", "diffusers", form="merged", dtype=torch.bfloat16)
    said = [(verdict.file, verdict.reader) for verdict in made.verdicts]
    both = [
        (place, reader) for place in ("transformer", "transformer_2") for reader in ("diffusers", "diffusers itself")
    ]
    assert said == [*both, ("model_index.json", "diffusers")]
    assert made.verdicts[-1].said == "each of the 3 steps by its own expert"


def test_without_verification_nothing_is_read(run, tmp_path):
    [made] = write(run("wan", "lora"), tmp_path / "out", "comfyui", verify=False)
    assert made.verdicts == []


# -- writers that step in a trap --------------------------------------------------------------------------------------


def spoil(monkeypatch, change):
    """Lets every LoRA file be written otherwise: `change` takes its tensors by name."""
    right = lora_files.write_lora

    def wrong(file, *args, **kwargs):
        error = right(file, *args, **kwargs)
        with safe_open(file, "pt") as opened:
            header = opened.metadata()
        save_file(change(load_file(file)), file, header)
        return error

    monkeypatch.setattr("moedistill.exporters.native_files.write_lora", wrong)
    monkeypatch.setattr("moedistill.exporters.diffusers_format.write_lora", wrong)


def half(tensors):
    return {name: tensor / 2 if "lora_up" in name or "lora_B.w" in name else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", [*CONSUMERS, "diffusers"])
def test_half_strength_does_not_stay(run, tmp_path, monkeypatch, name):
    spoil(monkeypatch, half)
    with pytest.raises(UserError) as error:
        write(run("wan", "lora"), tmp_path / "out", name)
    message = str(error.value)
    assert f"export to {name}: what was written is not what was trained, and was removed" in message
    assert "is off by 0.5 of what training changed" in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


def test_sigmas_and_boundaries_that_are_not_the_recipe_s_do_not_stay(run, tmp_path, monkeypatch):
    with monkeypatch.context() as wrong:
        wrong.setattr(comfyui_workflow, "decimal", lambda sigma: f"{sigma:.2f}")
        with pytest.raises(UserError, match=r"read as ComfyUI does: step 0 goes from σ 1.000000 to 0.980000, not"):
            write(run("wan", "lora"), tmp_path / "out", "comfyui")
    with monkeypatch.context() as wrong:
        source = open_source(run("wan", "lora"))
        wrong.setattr(Source, "boundary", lambda self, after=0: source.steps[-1].sigma_from)
        with pytest.raises(UserError, match=r"step 2 at σ .* is served by transformer, not transformer_2"):
            write(run("wan", "lora"), tmp_path / "out", "diffusers", form="merged")
