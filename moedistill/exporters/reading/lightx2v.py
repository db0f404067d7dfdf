"""How LightX2V reads files of Wan's weights and of changes to them; the rules are those of commit f8aee98b.

A LoRA is added to the weights when they are loaded. With `lora_dynamic_apply` it is not, and layers outside of the
blocks are lost: see `lost_dynamically`.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from moedistill.exporters.reading.comfyui import product
from moedistill.exporters.reading.compare import Make, Reading
from moedistill.exporters.reading.files import TensorFile
from moedistill.exporters.reading.native import Wan

PAIRS = (
    (".lora_up.weight", ".lora_down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_B", ".lora_A"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
)
"""How the names of the two matrices of a change may end."""
DIFFERENCES = {".diff": ".weight", ".diff_b": ".bias", ".diff_m": ".modulation"}
"""By the ending of a tensor that is added as it is: that of the parameter."""
PREFIXES = ("diffusion_model.", "model.", "unet.")
"""What names of changes may begin with."""


def read_changes(file: TensorFile, network: Wan) -> Reading:
    """What it adds to a network's parameters of a LoRA's file."""
    reading, used = Reading(), set[str]()
    for name in file.names:
        for up, down in PAIRS:
            path = name.removesuffix(up)
            if path != name and f"{path}{down}" in file:
                parameter = _parameter(path, ".weight")
                if parameter in network.names:
                    reading.added[parameter] = partial(product, file, name, f"{path}{down}", f"{path}.alpha")
                    used |= {name, f"{path}{down}", f"{path}.alpha"}
                break
    for name in file.names:
        path, dot, ending = name.rpartition(".")
        if (last := DIFFERENCES.get(dot + ending)) and (parameter := _parameter(path, last)) in network.names:
            reading.added[parameter] = partial(_sum, reading.added.get(parameter), file, name)
            used.add(name)
    reading.left_over = [name for name in file.names if name not in used]
    return reading


def _parameter(path: str, last: str) -> str:
    prefix = next((prefix for prefix in PREFIXES if path.startswith(prefix)), "")
    return path.removeprefix(prefix) + last


def _sum(first: Make | None, file: TensorFile, name: str) -> Tensor:
    added = file.tensor(name).float()
    return added if first is None else first() + added


def lost_dynamically(file: TensorFile) -> list[str]:
    """The tensors of a LoRA's file that have no effect with `lora_dynamic_apply`: those outside of the blocks.

    The prefix is cut off when the file is read, and the layers outside of the blocks look for it.
    """
    return [name for name in file.names if not name.removeprefix("diffusion_model.").startswith("blocks.")]


def read_values(files: Sequence[TensorFile], network: Wan) -> Reading:
    """What it loads into a network of the files of whole weights in a folder."""
    reading = Reading()
    for file in files:
        for name in file.names:
            if name in network.names:
                reading.values[name] = partial(file.tensor, name)
            else:
                reading.left_over.append(name)
    return reading
