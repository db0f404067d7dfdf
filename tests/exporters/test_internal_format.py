"""Our own format is read by moedistill alone, and whoever tries otherwise is told."""

import copy
import json

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from two_expert_runs import finished

OTHERS = ("diffusion_model.", "transformer.", "lora_unet_", "unet.", "model.", "base_model.")
"""What other tools' keys begin with."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("wan"), "wan", "full")


@pytest.fixture
def semantic(run):
    """diffusers' pipeline around the semantic expert, on which the adapter stands."""
    pipeline = DiffusionPipeline.from_pretrained(run.parent / "model")
    pipeline.transformer.load_state_dict(load_file(run / "export/semantic.safetensors"))
    return pipeline


def test_no_name_is_one_that_other_tools_look_for(run):
    names = load_file(run / "export/detail.safetensors")
    assert not any(name.startswith(OTHERS) for name in names)
    assert any(name.startswith("copies.condition_embedder.") for name in names)


def test_a_pipeline_refuses_it(run, semantic):
    before = copy.deepcopy(semantic.transformer.state_dict())
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        semantic.load_lora_weights(str(run / "export/detail.safetensors"))
    after = semantic.transformer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_network_refuses_it_and_says_what_to_do(run, semantic):
    """Else it would have the adapter without its copies."""
    network = semantic.transformer
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(TypeError) as refused:
        network.load_lora_adapter(str(run / "export/detail.safetensors"), prefix=None)
    assert "use_moedistill_export_for_this_file" in str(refused.value.__cause__)
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_its_header_has_the_scale(run):
    with safe_open(run / "export/detail.safetensors", "pt") as file:
        header = file.metadata()
    assert (header["rank"], header["alpha"]) == ("2", "8.0")
    settings = json.loads(header["lora_adapter_metadata"])
    assert (settings["r"], settings["lora_alpha"]) == (2, 8.0)
