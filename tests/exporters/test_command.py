"""`moedistill export`, as it is typed."""

import json

import pytest
from helpers import distil, tiny_recipe
from safetensors.torch import load_file
from two_expert_runs import finished

from moedistill import cli
from moedistill.runs.loop import run as run_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("wan"), "wan", "full")


@pytest.fixture
def call(capsys):
    def do(*args):
        with pytest.raises(SystemExit) as ended:
            cli.main(["export", *map(str, args)])
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return do


def test_without_options_an_adapter_is_a_lora_and_a_full_expert_is_merged(run, call, tmp_path):
    code, out, _ = call(run, "--output", tmp_path / "out")
    assert code == 0
    assert out.splitlines()[0] == str(tmp_path / "out")
    assert "  few_wan_low_noise.safetensors: lora detail, its dtype costs " in out
    assert "  high_noise/diffusion_pytorch_model.safetensors: merged semantic, its dtype costs " in out
    assert {str(tensor.dtype) for tensor in load_file(tmp_path / "out/few_wan_low_noise.safetensors").values()} == {
        "torch.bfloat16"
    }


def test_options_reach_the_files(run, call, tmp_path):
    assert call(run, "--merge", "--dtype", "float16", "--copy", "--no-verify", "--output", tmp_path / "out")[0] == 0
    record = json.loads((tmp_path / "out/moedistill.json").read_text())
    assert record["dtype"] == "float16"
    assert not (tmp_path / "out/vae").is_symlink()
    assert call(run, "--svd", "2", "--no-verify", "--output", tmp_path / "cut")[0] == 0
    assert (tmp_path / "cut/few_wan_high_noise.safetensors").is_file()


def test_it_goes_to_the_run_s_own_folder_where_none_is_given(run, call):
    assert call(run, "--no-verify")[0] == 0
    assert (run / "export/diffusers/README.md").is_file()
    code, _, err = call(run)  # again: what is there stays
    assert (code, len(err.splitlines())) == (2, 1)
    assert "export/diffusers" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "diffuser"], "did you mean 'diffusers'?"),
        (["--lora"], "expert 'semantic' has all weights of its own, which no LoRA carries; leave --lora out"),
        (["--svd", "4", "--merge"], "--svd is of LoRA files: leave --merge out"),
        (["--ema"], "holds no averaged weights"),
    ],
)
def test_what_cannot_be_is_said_in_a_line_and_nothing_is_written(run, call, tmp_path, options, message):
    code, _, err = call(run, *options, "--output", tmp_path / "out")
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_pipeline_is_refused(call, tmp_path):
    output = run_recipe(tiny_recipe([distil()]), output=tmp_path / "run", device="cpu").output
    code, _, err = call(output)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "cannot be exported to diffusers: diffusers has no pipeline for backbone 'digits'" in err
