"""Reading files with the diffusers that is installed, in a fresh process in which moedistill cannot be imported."""

import json
import math
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from safetensors.torch import save_file
from torch import Tensor

from moedistill.errors import shorten
from moedistill.exporters.reading import stock
from moedistill.exporters.reading.compare import OF_A_CHANGE, OF_ROUNDING, Comparison, Wanted, some

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


@dataclass
class _Answer:
    """What the process found.

    Attributes:
        distances: by name of a tensor: distance, norm of the trained one, and what rounding that once costs.
        more: tensors that it has and training has not.
        output: of the call.
    """

    faults: list[str]
    warnings: list[str] = field(default_factory=list)
    distances: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    more: list[str] = field(default_factory=list)
    output: Tensor | None = None


class Fresh:
    """The process, from entering to leaving it as a context: it starts once, for any number of files.

    Args:
        told: what the files are loaded with.
    """

    def __init__(self, told: Stock) -> None:
        self._told = told

    def __enter__(self) -> "Fresh":
        self._stack = ExitStack()
        self._scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._errors = self._stack.enter_context((self._scratch / "errors").open("w+b"))
        self._process = subprocess.Popen(
            [sys.executable, "-I", stock.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        self._stack.callback(self._end)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _end(self) -> None:
        with suppress(BrokenPipeError):
            self._process.communicate()

    def read_weights(
        self, folder: Path, dtype: torch.dtype, trained: Iterator[tuple[str, Tensor]], call: Call | None
    ) -> Comparison:
        """Loads a network's folder with `from_pretrained`, and compares all its weights with the trained ones.

        Args:
            dtype: of its files, in which it is loaded.
            trained: all tensors, by name.
            call: also compare what it gives, computed in float32.
        """
        answer = self._answer({"folder": str(folder), "lora": None}, trained, dtype, call)
        return _judged(answer, dtype, call, lambda trained, rounded: OF_ROUNDING * rounded + 1e-6 * trained)

    def read_changes(self, file: Path, dtype: torch.dtype, wanted: Wanted, into: str, call: Call | None) -> Comparison:
        """Loads a LoRA's file with `load_lora_weights`, and compares what it adds with what training added.

        Args:
            dtype: of the file.
            into: which of the pipeline's networks it is loaded into.
            call: also compare what the network gives, computed in float32; it then stands on `wanted.original`.
        """
        request: dict[str, Any] = {"lora": str(file), "into": into, "base": None}
        trained = ((name, wanted.change(name)) for name in sorted(wanted.names))
        if call is not None:
            base = {name: wanted.original(name).float().contiguous() for name in wanted.shapes}
            request["base"] = str(self._scratch / "base.safetensors")
            save_file(base, request["base"])
        answer = self._answer(request, trained, dtype, call)
        return _judged(answer, dtype, call, lambda trained, rounded: OF_A_CHANGE[dtype] * trained)

    def _answer(
        self, request: dict[str, Any], trained: Iterator[tuple[str, Tensor]], dtype: torch.dtype, call: Call | None
    ) -> _Answer:
        """Gives the process a request and the tensors to compare with."""
        told, output = self._told, self._scratch / "output.pt"
        request |= {"class": told.network, "config": told.config, "pipeline": told.pipeline, "call": None}
        request |= {"components": told.components, "output": str(output), "dtype": str(dtype).removeprefix("torch.")}
        if call is not None:
            request["call"] = str(self._scratch / "call.pt")
            torch.save(call.arguments, request["call"])
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._send(json.dumps(request).encode())
            for name, tensor in trained:
                self._send(to_bytes({name: tensor.contiguous()}))
            self._send(b"")
            self._process.stdin.flush()
            said = self._process.stdout.readline()
        except BrokenPipeError:
            said = b""
        if not said:
            self._errors.seek(0)
            last = (self._errors.read().decode(errors="replace").strip().splitlines() or [""])[-1]
            return _Answer([f"the process that read it ended: {shorten(last, 200)}"])
        answer = _Answer(**json.loads(said))
        if output.is_file():
            answer.output = torch.load(output, weights_only=True)
            output.unlink()
        return answer

    def _send(self, content: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(struct.pack("<Q", len(content)) + content)


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
