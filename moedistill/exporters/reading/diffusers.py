"""How diffusers reads LoRA files in its own names, and which transformer of a Wan pipeline serves which step.

That its installed release reads a file is tried in a fresh process (`fresh`); here are the rules, so that what other
releases make of the file is known too.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from moedistill.exporters.reading.compare import Reading, some
from moedistill.exporters.reading.files import TensorFile

PREFIX = "transformer."
METADATA = "lora_adapter_metadata"
"""The header's key under which a file says ranks and scales."""


class Own:
    """Diffusers' network: its names are its names."""

    def parts(self, name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        """See `Layout`."""
        return {name: tensor}


def read_changes(file: TensorFile) -> Reading:
    """What it adds to a network's parameters of a LoRA's file in its own names."""
    reading = Reading()
    names = [name.removeprefix(PREFIX) for name in file.names if name.startswith(PREFIX)]
    if not names:
        reading.faults.append(f"nothing is loaded: no name begins with {PREFIX}")
    if alien := [name for name in file.names if "lora" not in name]:
        reading.faults.append(f"it is refused, for {len(alien)} names without lora: {some(alien)}")
    pairs = [name.removesuffix(".lora_B.weight") for name in names if name.endswith(".lora_B.weight")]
    scales = _Scales(file, pairs)
    reading.faults += scales.faults
    used = set[str]()
    biased = [path for path in pairs if f"{PREFIX}{path}.lora_B.bias" in file]
    if biased and len(biased) < len(pairs):
        without = sorted(set(pairs) - set(biased))
        reading.faults.append(
            f"{len(without)} pairs have no lora_B.bias, and others have: theirs is left without a value, and the first "
            f"forward fails: {some(without)}"
        )
    for path in pairs:
        if f"{PREFIX}{path}.lora_A.weight" not in file:
            continue
        reading.added[f"{path}.weight"] = partial(_product, file, path, scales.of(path))
        used |= {f"{PREFIX}{path}.lora_{side}.weight" for side in "AB"}
    for path in biased:
        reading.added[f"{path}.bias"] = partial(_bias, file, path, scales.of(path))
        used.add(f"{PREFIX}{path}.lora_B.bias")
    reading.left_over = [name for name in file.names if name not in used]
    return reading


def read_values(files: Sequence[TensorFile]) -> Reading:
    """What it loads into a network of a folder's files of weights."""
    return Reading(values={name: partial(file.tensor, name) for file in files for name in file.names})


class _Scales:
    """By what the product of a pair is multiplied: alpha over rank, as the header says, and else 1."""

    def __init__(self, file: TensorFile, paths: Sequence[str]) -> None:
        self.faults: list[str] = []
        self._ranks = {path: file.shapes[f"{PREFIX}{path}.lora_B.weight"][1] for path in paths}
        self._said: dict[str, Any] | None = None
        if METADATA in file.header:
            said = json.loads(file.header[METADATA])
            self._said = {name.removeprefix(PREFIX): value for name, value in said.items() if name.startswith(PREFIX)}
            for path, rank in self._ranks.items():
                if (told := self._value("rank_pattern", "r", path)) != rank:
                    self.faults.append(f"the header says rank {told} of {path}, whose matrices have {rank}")
        elif len(set(self._ranks.values())) > 1:
            self.faults.append(
                f"pairs have ranks {', '.join(map(str, sorted(set(self._ranks.values()))))}, and the header has no "
                f"{METADATA}: releases up to 0.36 give some of them another scale"
            )

    def of(self, path: str) -> float:
        if self._said is None:
            return 1.0
        return float(self._value("alpha_pattern", "lora_alpha", path)) / self._ranks[path]

    def _value(self, patterns: str, default: str, path: str) -> Any:
        """What the header says of a layer: the first pattern that its path ends in, or the value of all others."""
        assert self._said is not None
        for pattern, value in (self._said.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
        return self._said.get(default)


def _product(file: TensorFile, path: str, scale: float) -> Tensor:
    a, b = (file.tensor(f"{PREFIX}{path}.lora_{side}.weight").float() for side in "AB")
    return scale * (b @ a)


def _bias(file: TensorFile, path: str, scale: float) -> Tensor:
    return scale * file.tensor(f"{PREFIX}{path}.lora_B.bias").float()


def serving(boundary_ratio: float | None, sigmas: Sequence[float], num_train_timesteps: int = 1000) -> list[str]:
    """Which transformer of a `WanPipeline` serves each sampling step, by the times of a flow's scheduler.

    Args:
        boundary_ratio: as `model_index.json` has it; None for one transformer.
        sigmas: where the steps begin.
    """
    if boundary_ratio is None:
        return ["transformer"] * len(sigmas)
    boundary = boundary_ratio * num_train_timesteps
    times = (sigma * num_train_timesteps for sigma in sigmas)
    return ["transformer" if time >= boundary else "transformer_2" for time in times]


def serving_faults(boundary_ratio: float, sigmas: Sequence[float], wanted: Sequence[str]) -> list[str]:
    """Where a Wan pipeline would take another transformer than is wanted, or might: at the boundary itself."""
    faults = []
    steps = zip(sigmas, serving(boundary_ratio, sigmas), wanted, strict=True)
    for number, (sigma, found, right) in enumerate(steps):
        if found != right:
            faults.append(f"step {number} at σ {sigma:.6f} is served by {found}, not {right}")
        elif abs(sigma - boundary_ratio) < 1e-4:  # a tenth of an integer time
            faults.append(f"step {number} lies at the boundary itself, σ {sigma:.6f}: rounding decides who serves it")
    return faults
