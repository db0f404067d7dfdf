"""Run by `fresh` in a process of its own: reads exported files with diffusers as it is installed, and nothing else.

It is a program and not a module of moedistill, which cannot be imported here. Through standard input come requests, in
JSON, what to load; after each, one by one, the tensors to compare with. What was found goes to standard output, a line
for each request.
"""

import json
import logging
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from importlib.abc import MetaPathFinder
from typing import Any

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import load_file
from torch import Tensor

Make = Callable[[], Tensor]


class Absent(MetaPathFinder):
    """Whoever loads our files does not have moedistill: neither has this process."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """See `MetaPathFinder`."""
        if fullname.split(".")[0].startswith("moedistill"):
            raise ModuleNotFoundError(f"{fullname} is not to be imported here")


class Warnings(logging.Handler):
    """What diffusers warns of while it loads."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []
        for name in ("diffusers.loaders", "diffusers.utils.peft_utils"):
            logging.getLogger(name).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def received() -> Iterator[bytes]:
    """What is sent next, each with its length before it, until one of no length."""
    while head := sys.stdin.buffer.read(8):
        (length,) = struct.unpack("<Q", head)
        if not length:
            return
        yield sys.stdin.buffer.read(length)


def read_weights(request: dict[str, Any]) -> tuple[Any, dict[str, Make], list[str]]:
    """A network from a folder; its tensors, and what did not fit."""
    import diffusers

    dtype = getattr(torch, request["dtype"])
    network, found = getattr(diffusers, request["class"]).from_pretrained(
        request["folder"], torch_dtype=dtype, local_files_only=True, output_loading_info=True
    )
    faults = [
        f"{len(names)} weights are {kind}: {', '.join(sorted(names)[:4])}"
        for kind, names in (("missing", found["missing_keys"]), ("left over", found["unexpected_keys"]))
        if names
    ]
    return network, {name: partial(_same, tensor) for name, tensor in network.state_dict().items()}, faults


def _same(tensor: Tensor) -> Tensor:
    return tensor


def read_changes(request: dict[str, Any]) -> tuple[Any, dict[str, Make], list[str]]:
    """A network with a LoRA's file on it: what that adds to its parameters, and what was left without a value.

    Without weights to stand on, the network has none: what is added does not depend on them.
    """
    import diffusers

    with nullcontext() if request["base"] else torch.device("meta"):
        network = getattr(diffusers, request["class"]).from_config(request["config"]).eval()
    if request["base"]:
        network.load_state_dict(load_file(request["base"]))
    else:
        network.to_empty(device="cpu")  # takes no memory while nobody writes there
    components = {**dict.fromkeys(request["components"]), "transformer": network, request["into"]: network}
    pipeline: Any = getattr(diffusers, request["pipeline"])(**components)
    options = {"load_into_transformer_2": True} if request["into"] == "transformer_2" else {}
    pipeline.load_lora_weights(request["lora"], **options)
    added: dict[str, Make] = {}
    faults = []
    for path, module in network.named_modules():
        if hasattr(module, "lora_A"):
            (adapter,) = module.lora_A
            parameters = [*module.lora_A[adapter].parameters(), *module.lora_B[adapter].parameters()]
            if any(parameter.is_meta for parameter in parameters):
                faults.append(f"{path} is left without a value")
                continue
            added[f"{path}.weight"] = partial(module.get_delta_weight, adapter)  # as large as the layer: when asked for
            if module.lora_B[adapter].bias is not None:
                added[f"{path}.bias"] = partial(torch.mul, module.lora_B[adapter].bias, module.scaling[adapter])
    return network, added, faults


def compare(found: dict[str, Make], sent: Iterator[bytes], dtype: torch.dtype, changes: bool) -> dict[str, Any]:
    """Distances from the tensors sent, by name: [distance, their norm, what it costs to round them to `dtype`]."""
    distances = {}
    for name, trained in (item for content in sent for item in from_bytes(content).items()):
        tensor = found.pop(name)() if name in found else None
        if tensor is None or tensor.shape != trained.shape:
            distances[name] = [float("inf"), 1.0, 0.0]
            continue
        trained = trained.float()
        rounded = (trained.to(dtype).float() - trained).norm()
        numbers = ((tensor.detach().float() - trained).norm(), trained.norm(), rounded)
        distances[name] = [float(number) for number in numbers]
    more = [name for name, make in found.items() if not changes or make().detach().any()]
    return {"distances": distances, "more": more}


def predict(network: Any, call: str, output: str) -> None:
    """Calls the network with the arguments in a file, in float32; writes what it gives to another."""
    arguments = torch.load(call, weights_only=True)
    with torch.no_grad():
        found = network.float()(**arguments)
    torch.save(found[0], output)


def answer(request: dict[str, Any], sent: Iterator[bytes]) -> dict[str, Any]:
    """What was found for a request, and what is sent after it."""
    network, found, faults = (read_changes if request["lora"] else read_weights)(request)
    compared = compare(found, sent, getattr(torch, request["dtype"]), bool(request["lora"]))
    if request["call"] and not faults:
        predict(network, request["call"], request["output"])
    return {"faults": faults, **compared}


def main() -> None:
    sys.meta_path.insert(0, Absent())
    warnings = Warnings()
    while content := next(sent := received(), None):
        try:
            found = answer(json.loads(content), sent)
        except Exception as error:  # whatever it raises is what a user would see
            found = {"faults": [f"{type(error).__name__}: {str(error).splitlines()[0]}"]}
        for _ in sent:
            pass
        sys.stdout.write(json.dumps({**found, "warnings": warnings.said}) + "\n")
        sys.stdout.flush()
        warnings.said.clear()


if __name__ == "__main__":
    main()
