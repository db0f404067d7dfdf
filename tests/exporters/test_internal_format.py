"""Our own format is read by moedistill alone, and whoever tries otherwise is told."""

import copy

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
    assert all(name.startswith("moedistill.") for name in names)


def test_a_pipeline_refuses_it(run, semantic):
    before = copy.deepcopy(semantic.transformer.state_dict())
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        semantic.load_lora_weights(str(run / "export/detail.safetensors"))
    after = semantic.transformer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("given", ["file", "folder"])
def test_a_network_refuses_it(run, semantic, given):
    """Without the prefix it would have the adapter at a quarter of its strength, and copies for its own layers."""
    network, file = semantic.transformer, run / "export/detail.safetensors"
    before = copy.deepcopy(network.state_dict())
    where = {"file": (file, None), "folder": (file.parent, file.name)}[given]
    with pytest.raises(ValueError, match=r"moedistill\.blocks.* not found in the base model"):
        network.load_lora_adapter(str(where[0]), weight_name=where[1], prefix=None)
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_its_header_has_the_scale(run):
    with safe_open(run / "export/detail.safetensors", "pt") as file:
        header = file.metadata()
    assert (header["rank"], header["alpha"]) == ("2", "8.0")
