"""Reading files with the diffusers that is installed, in a fresh process in which moedistill cannot be imported."""

import json
import math
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from safetensors.torch import save_file
from torch import Tensor

from moedistill.errors import shorten
from moedistill.exporters.reading import stock
from moedistill.exporters.reading.compare import OF_A_CHANGE, OF_ROUNDING, Comparison, change, changed, some
from moedistill.exporters.source import ExpertSource

OF_OUTPUT = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}
"""By the dtype of a file: how far what the network gives may be from what training's gives, as a share of it."""


@dataclass(frozen=True)
class Stock:
    """What diffusers' own classes need to be told.

    Attributes:
        network: the class of the network.
        config: of the network.
        pipeline: the class of the pipeline that loads LoRAs.
        components: names of the arguments that the pipeline's class cannot do without.
    """

    network: str
    config: dict[str, Any]
    pipeline: str
    components: list[str]


@dataclass(frozen=True)
class Call:
    """A call of a network and what training's network gives, to compare with.

    Attributes:
        arguments: by name.
        output: `[B, C, T, H, W]`, or as many axes as the network gives.
    """

    arguments: dict[str, Any]
    output: Tensor


def read_weights(folder: Path, dtype: torch.dtype, told: Stock, expert: ExpertSource, call: Call | None) -> Comparison:
    """Loads a network's folder with `from_pretrained`, and compares all its weights with the trained ones.

    Args:
        dtype: of its files, in which it is loaded.
        call: also compare what it gives, computed in float32.
    """
    request = {"folder": str(folder), "lora": None}
    with tempfile.TemporaryDirectory() as scratch:
        answer = _answer(Path(scratch), request, told, expert.merged(), dtype, call)
        return _judged(answer, dtype, call, lambda trained, rounded: OF_ROUNDING * rounded + 1e-6 * trained)


def read_changes(
    file: Path, dtype: torch.dtype, told: Stock, expert: ExpertSource, into: str, call: Call | None
) -> Comparison:
    """Loads a LoRA's file with `load_lora_weights`, and compares what it adds with what training added.

    Args:
        dtype: of the file.
        into: which of the pipeline's networks it is loaded into.
        call: also compare what the network gives, computed in float32; it then has the weights that `expert` changes.
    """
    request: dict[str, Any] = {"lora": str(file), "into": into, "base": None}
    trained = ((name, change(expert, name)) for name in sorted(changed(expert)))
    with tempfile.TemporaryDirectory() as scratch:
        if call is not None:
            base = {name: expert.original(name).float().contiguous() for name in expert.shapes}
            request["base"] = str(Path(scratch, "base.safetensors"))
            save_file(base, request["base"])
        answer = _answer(Path(scratch), request, told, trained, dtype, call)
        return _judged(answer, dtype, call, lambda trained, rounded: OF_A_CHANGE[dtype] * trained)


@dataclass
class _Answer:
    """What the process found.

    Attributes:
        distances: by name of a tensor: distance, norm of the trained one, and what rounding that once costs.
        more: tensors that it has and training has not.
        output: of the call.
    """

    faults: list[str]
    warnings: list[str]
    distances: dict[str, tuple[float, float, float]]
    more: list[str]
    output: Tensor | None


def _answer(
    scratch: Path,
    request: dict[str, Any],
    told: Stock,
    trained: Iterator[tuple[str, Tensor]],
    dtype: torch.dtype,
    call: Call | None,
) -> _Answer:
    """Starts the process, gives it the request and the tensors to compare with."""
    request |= {"class": told.network, "config": told.config, "pipeline": told.pipeline, "call": None}
    request |= {"components": told.components, "output": str(scratch / "output.pt")}
    request["dtype"] = str(dtype).removeprefix("torch.")
    if call is not None:
        request["call"] = str(scratch / "call.pt")
        torch.save(call.arguments, request["call"])
    (scratch / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-I", stock.__file__, str(scratch / "request.json")]
    with (scratch / "errors").open("w+b") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert process.stdin is not None
        try:
            for name, tensor in trained:
                content = to_bytes({name: tensor.contiguous()})
                process.stdin.write(struct.pack("<Q", len(content)) + content)
        except BrokenPipeError:
            pass  # it says why, or did not end well
        said, _ = process.communicate()
        if process.returncode:
            errors.seek(0)
            last = (errors.read().decode(errors="replace").strip().splitlines() or [""])[-1]
            return _Answer([f"the process ended with {process.returncode}: {shorten(last, 200)}"], [], {}, [], None)
    found = json.loads(said.splitlines()[-1])
    output = torch.load(request["output"], weights_only=True) if Path(request["output"]).is_file() else None
    return _Answer(**found, output=output)


def _judged(
    answer: _Answer, dtype: torch.dtype, call: Call | None, allowed: Callable[[float, float], float]
) -> Comparison:
    """What is wrong; `allowed` gives the distance allowed of a tensor, of its norm and of what rounding it costs."""
    faults = [*answer.faults, *answer.warnings]
    if answer.more:
        faults.append(f"{len(answer.more)} tensors are changed that training did not change: {some(answer.more)}")
    error, off = 0.0, []
    for name, (distance, trained, rounded) in answer.distances.items():
        share = distance / trained if trained else (math.inf if distance else 0.0)
        error = max(error, share)
        if not distance <= allowed(trained, rounded):
            off.append((share, name))
    if off and not answer.faults:
        worst, name = max(off)
        faults.append(f"{len(off)} tensors are not the trained ones: {name} is off by {worst:.2g} of it")
    if call is not None and not faults:
        assert answer.output is not None
        distance = float((answer.output.float() - call.output).norm() / call.output.norm())
        if not distance <= OF_OUTPUT[dtype]:
            faults.append(f"what the network gives is off by {distance:.2g} of it, more than {OF_OUTPUT[dtype]:.0e}")
    return Comparison(len(answer.distances), error, faults)
