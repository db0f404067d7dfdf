"""The installed diffusers reads hand-made files, in a process of its own; it steps in the traps that are known."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from exported_by_hand import Trained, diffusers_lora, full, wan_lora, write

from moedistill.exporters.reading import diffusers as by_rules
from moedistill.exporters.reading import stock
from moedistill.exporters.reading.compare import compare_values, whole_change
from moedistill.exporters.reading.files import TensorFile
from moedistill.exporters.reading.fresh import Call, Fresh, Stock


@pytest.fixture(scope="module")
def wan():
    return Trained("wan")


def told(trained):
    network = trained.network
    without = ["tokenizer", "text_encoder", "vae", "scheduler"]
    return Stock(type(network).__name__, dict(network.config), "WanPipeline", without)


@pytest.fixture(scope="module")
def process(wan):
    with Fresh(told(wan)) as process:
        yield process


def call_of(trained):
    """A call of the network, and what the trained one gives."""
    generator = torch.Generator().manual_seed(1)
    arguments = {
        "hidden_states": torch.randn(1, 16, 2, 4, 4, generator=generator),
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": torch.randn(1, 5, 24, generator=generator),
        "return_dict": False,
    }
    before = {name: tensor.clone() for name, tensor in trained.network.state_dict().items()}
    trained.network.load_state_dict(dict(trained.merged()))
    with torch.no_grad():
        output = trained.network(**arguments)[0]
    trained.network.load_state_dict(before)
    return Call(arguments, output)


@pytest.mark.parametrize(("make", "into"), [(diffusers_lora, "transformer"), (wan_lora, "transformer_2")])
def test_a_right_file_of_changes_is_exact(make, into, process, wan, tmp_path):
    file = write(tmp_path / "wan.safetensors", *make(wan))
    found = process.read_changes(file, torch.float32, whole_change(wan), into, call_of(wan))
    assert found.faults == []
    assert found.compared == len(wan.pairs) + len(wan.copies)
    assert found.error <= 1e-5


def test_another_output_is_told(process, wan, tmp_path):
    file, call = write(tmp_path / "wan.safetensors", *diffusers_lora(wan)), call_of(wan)
    wrong = Call(call.arguments, call.output * 1.001)
    (fault,) = process.read_changes(file, torch.float32, whole_change(wan), "transformer", wrong).faults
    assert fault == "what the network gives is off by 0.001 of it, more than 1e-05"


def test_a_folder_of_weights(process, tmp_path):
    trained = full("wan")
    trained.network.load_state_dict(dict(trained.merged()))
    trained.network.to(torch.bfloat16).save_pretrained(tmp_path / "transformer")
    (file,) = (tmp_path / "transformer").glob("*.safetensors")
    reading = by_rules.read_values([TensorFile(file)])
    assert compare_values(reading, by_rules.Own(), trained.shapes, trained.tensor).faults == []
    found = process.read_weights(tmp_path / "transformer", torch.bfloat16, trained.merged(), None)
    assert (found.faults, found.compared) == ([], len(trained.shapes))
    other = full("wan")
    other.copies["proj_out.bias"] = other.copies["proj_out.bias"] * 1.01
    (fault,) = process.read_weights(tmp_path / "transformer", torch.bfloat16, other.merged(), None).faults
    assert "1 tensors are not the trained ones: proj_out.bias is off by 0.0" in fault


def read_here(file, trained):
    """What the process finds, without a process: what is added, and faults."""
    needed = told(trained)
    request = {"class": needed.network, "config": needed.config, "pipeline": needed.pipeline, "base": None}
    request |= {"components": needed.components, "lora": str(file), "into": "transformer"}
    _, added, faults = stock.read_changes(request)
    return added, faults


def test_trap_alpha_on_time_layers(process, wan, tmp_path):
    tensors, header = wan_lora(wan)
    tensors["diffusion_model.time_projection.1.alpha"] = torch.tensor(32.0)
    file = write(tmp_path / "wan.safetensors", tensors, header)
    (fault,) = process.read_changes(file, torch.float32, whole_change(wan), "transformer", None).faults
    assert fault.startswith("ValueError: `state_dict` should be empty at this point")


def test_trap_partial_biases(wan, tmp_path):
    tensors, header = wan_lora(wan)
    partial = {name: each for name, each in tensors.items() if not (".diff_b" in name and ".blocks." in name)}
    added, faults = read_here(write(tmp_path / "wan.safetensors", partial, header), wan)
    assert faults == [f"{path} is left without a value" for path in wan.pairs]
    without = {name: each for name, each in tensors.items() if ".diff_b" not in name}
    header = {key: value.replace('lora_bias": true', 'lora_bias": false') for key, value in header.items()}
    added, faults = read_here(write(tmp_path / "wan.safetensors", without, header), wan)
    assert faults == []
    assert len(added) == len(wan.pairs) + len(wan.copies) // 2


def test_trap_differences_that_are_dropped_in_silence(wan, tmp_path):
    tensors, header = wan_lora(wan)
    path = "diffusion_model.time_projection.1"
    for name in ("lora_up.weight", "lora_down.weight"):
        del tensors[f"{path}.{name}"]
    tensors[f"{path}.diff"] = torch.ones(192, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # peft's, which diffusers shows nobody
        added, faults = read_here(write(tmp_path / "wan.safetensors", tensors, header), wan)
    assert faults == []
    assert set(wan.copies) - set(added) == {f"condition_embedder.time_proj.{last}" for last in ("weight", "bias")}


def test_a_process_that_ends_is_told(wan, tmp_path):
    file = write(tmp_path / "wan.safetensors", *diffusers_lora(wan))
    with Fresh(told(wan)) as process:
        process._process.kill()
        process._process.wait()
        (fault,) = process.read_changes(file, torch.float32, whole_change(wan), "transformer", None).faults
    assert fault.startswith("the process that read it ended")


def test_moedistill_cannot_be_imported_there():
    """Installed beside diffusers it may be: whoever has it not must see the same."""
    program = (
        Path(stock.__file__).read_text(encoding="utf-8").replace("warnings = Warnings()", "import moedistill.errors")
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError: moedistill is not to be imported here" in done.stderr
