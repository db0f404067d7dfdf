"""How ComfyUI reads files of a model's weights and of changes to them; the rules are those of version 0.3.64.

Its `load_lora` asks, for each name that a parameter may have in a file, what the file has under that name; its
`load_diffusion_model` recognises a network by the names in a file, loads what fits, and warns of the rest.
"""

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from moedistill.exporters.reading.compare import Reading
from moedistill.exporters.reading.files import TensorFile
from moedistill.exporters.reading.native import LTX, HunyuanVideo, Native, Wan

PAIRS = (
    ("{}.lora_up.weight", "{}.lora_down.weight"),
    ("{}_lora.up.weight", "{}_lora.down.weight"),
    ("{}.lora_B.weight", "{}.lora_A.weight"),
    ("{}.lora.up.weight", "{}.lora.down.weight"),
    ("{}.lora_B", "{}.lora_A"),
    ("{}.lora_linear_layer.up.weight", "{}.lora_linear_layer.down.weight"),
    ("{}.lora_B.default.weight", "{}.lora_A.default.weight"),
)
"""How the two matrices of a change may be called, in the order in which it looks for them."""
RECOGNISED_BY: dict[type[Native], str] = {
    Wan: "head.modulation",
    HunyuanVideo: "txt_in.individual_token_refiner.blocks.0.norm1.weight",
    LTX: "adaln_single.emb.timestep_embedder.linear_1.bias",
}
"""The name by which it tells what network a file is of."""
PREFIXES = ("model.diffusion_model.", "model.model.", "net.")
"""What names in a file of weights may begin with, if more than five do."""


def read_changes(file: TensorFile, network: Native) -> Reading:
    """What it adds to a network's parameters of a LoRA's file."""
    reading, used = Reading(), set[str]()
    for name, parameter in _places(network):
        _read_one(file, name, parameter, network, reading, used)
    reading.left_over = [name for name in file.names if name not in used]
    return reading


def _places(network: Native) -> Iterator[tuple[str, str]]:
    """Names that a change may have, and the parameters that they mean; of several names for one the last counts."""
    for parameter in network.names:
        path = parameter.removesuffix(".weight")
        if path != parameter:
            yield f"lora_unet_{path.replace('.', '_')}", parameter
        yield f"diffusion_model.{path}", parameter
    if isinstance(network, HunyuanVideo):
        for parameter in network.names:
            if parameter.endswith(".weight"):
                path = network.makers_name(parameter, in_blocks=True).removesuffix(".weight")
                yield f"transformer.{path}", parameter
                yield f"diffusion_model.{path}", parameter


def _read_one(file: TensorFile, name: str, parameter: str, network: Native, reading: Reading, used: set[str]) -> None:
    """What the file has under one name: of a pair, `.diff` and `.set_weight` the last is what counts."""
    alpha = f"{name}.alpha"
    if alpha in file:
        used.add(alpha)
    for up, down in ((up.format(name), down.format(name)) for up, down in PAIRS):
        if up in file:
            if down not in file:
                reading.faults.append(f"{up} has no {down}, without which nothing is loaded")
            reading.added[parameter] = partial(product, file, up, down, alpha)
            used.update((up, down))
            break
    if (difference := f"{name}.diff") in file:
        reading.added[parameter] = partial(_float, file, difference)
        used.add(difference)
    if (difference := f"{name}.diff_b") in file:
        bias = f"{parameter.removesuffix('.weight')}.bias"
        if bias not in network.names:
            reading.faults.append(f"{difference} changes {bias}, which the network has not")
        else:
            reading.added[bias] = partial(_float, file, difference)
        used.add(difference)
    if (value := f"{name}.set_weight") in file:
        reading.added.pop(parameter, None)
        reading.values[parameter] = partial(file.tensor, value)
        used.add(value)


def product(file: TensorFile, up: str, down: str, alpha: str) -> Tensor:
    """What a pair of matrices adds to a weight: without an alpha its rank is taken for it."""
    a, b = _float(file, down), _float(file, up)
    scale = file.tensor(alpha).item() / a.shape[0] if alpha in file else 1.0
    return scale * (b.flatten(1) @ a.flatten(1))


def _float(file: TensorFile, name: str) -> Tensor:
    return file.tensor(name).float()


def read_values(file: TensorFile, network: Native) -> Reading:
    """What it loads into a network of a file of whole weights, which must be one file."""
    known = {name: name for name in network.names}
    if isinstance(network, HunyuanVideo):
        known |= {network.makers_name(name): name for name in network.names}
    prefix = next((each for each in PREFIXES if sum(name.startswith(each) for name in file.names) > 5), "")
    stored = {name.removeprefix(prefix): name for name in file.names}
    reading = Reading()
    if (told_by := RECOGNISED_BY[type(network)]) not in stored:
        reading.faults.append(f"it is not recognised, without {told_by}")
    for name, place in stored.items():
        if name in known:
            reading.values[known[name]] = partial(file.tensor, place)
        else:
            reading.left_over.append(place)
    return reading
