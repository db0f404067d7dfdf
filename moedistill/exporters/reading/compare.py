"""What a consumer makes of a file, and how far that is from what was trained."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from moedistill.errors import shorten
from moedistill.exporters.source import ExpertSource

OF_A_CHANGE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""By the dtype of a file of changes: how far the change of a weight may be from the trained one, as a share of it, in
the Frobenius norm. A product of two rounded matrices is off by about the square root of 2 times a rounding error, which
is at most 2⁻⁹ in bfloat16; a wrong scale is off by half.
"""
OF_ROUNDING = 1.05
"""How many times the error of rounding once a stored weight may be off by: another network's weights, however close
in training, are off by more."""
NAMED = 4
"""How many of the tensors concerned a fault names."""

Make = Callable[[], Tensor]


@dataclass
class Reading:
    """What a consumer makes of a file.

    Attributes:
        added: what it adds to its own parameters, by their names; made when called, float32.
        values: what it puts in their place; made when called, in the dtype of the file.
        left_over: tensors of the file that it does not use.
        faults: what else goes wrong when it reads the file, in words.
    """

    added: dict[str, Make] = field(default_factory=dict)
    values: dict[str, Make] = field(default_factory=dict)
    left_over: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def all_faults(self) -> list[str]:
        """The faults, with what is left over."""
        unused = f"{len(self.left_over)} tensors are not used: {some(self.left_over)}" if self.left_over else ""
        return [*self.faults, *([unused] if unused else [])]


class Layout(Protocol):
    """How a consumer's network and diffusers' network of the same model correspond."""

    def parts(self, name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        """One of the consumer's parameters as diffusers has it, by name: of fused ones several."""


@dataclass
class Comparison:
    """How far a reading is from what was trained.

    Attributes:
        compared: how many tensors of diffusers' network were.
        error: the largest distance, as a share of the trained change or value.
        faults: what is wrong, in words.
    """

    compared: int
    error: float
    faults: list[str]


def compare_changes(reading: Reading, layout: Layout, expert: ExpertSource, dtype: torch.dtype) -> Comparison:
    """Compares what is added to each parameter with what training added.

    Args:
        dtype: of the file: the tolerance is that of `OF_A_CHANGE`.
    """
    tolerance, compared, worst, off = OF_A_CHANGE[dtype], 0, 0.0, []
    unseen = changed(expert)
    faults = reading.all_faults()
    for name, found in _parts(reading, layout, expert, faults):
        unseen.discard(name)
        trained = change(expert, name)
        if found.shape != trained.shape:
            faults.append(f"{name} would be {list(found.shape)}, and is {list(trained.shape)}")
            continue
        error = _share((found - trained).norm(), trained.norm())
        compared, worst = compared + 1, max(worst, error)
        if not error <= tolerance:  # also where it is no number
            off.append((error, name))
    if unseen:
        faults.append(f"{len(unseen)} trained changes are missing: {some(sorted(unseen))}")
    return Comparison(compared, worst, [*faults, *_said(off, "of what training changed", tolerance)])


def compare_values(reading: Reading, layout: Layout, expert: ExpertSource) -> Comparison:
    """Compares each parameter with the trained one: it must be that, rounded once to the dtype of the file."""
    compared, worst, off = 0, 0.0, []
    unseen = set(expert.shapes)
    faults = reading.all_faults()
    for name, make in reading.values.items():
        for part, found in layout.parts(name, make()).items():
            if part not in unseen:
                faults.append(f"{name} is {part}, which the network has not, or has already")
                continue
            unseen.discard(part)
            trained = expert.tensor(part).float()
            if found.shape != trained.shape:
                faults.append(f"{part} would be {list(found.shape)}, and is {list(trained.shape)}")
                continue
            distance, allowed = (found.float() - trained).norm(), rounding(trained, found.dtype)
            error = _share(distance, trained.norm())
            compared, worst = compared + 1, max(worst, error)
            if not distance <= allowed:
                off.append((error, part))
    if unseen:
        faults.append(f"{len(unseen)} weights are missing: {some(sorted(unseen))}")
    return Comparison(compared, worst, [*faults, *_said(off, "of the trained weight", None)])


def changed(expert: ExpertSource) -> set[str]:
    """Names of the tensors in which an expert differs from what it is a change of."""
    if expert.kind == "adapter":
        return {*expert.copies, *(f"{path}.weight" for path in expert.pairs)}
    return set(expert.shapes) if expert.kind == "full" else set()


def change(expert: ExpertSource, name: str) -> Tensor:
    """What an expert adds to one of the tensors of `shapes`, float32."""
    path = name.removesuffix(".weight")
    if expert.kind == "adapter" and name not in expert.copies and path != name and path in expert.pairs:
        a, b = expert.pairs[path]
        return b @ a  # not by way of the sum, which rounds a small change off
    if name not in changed(expert):
        return torch.zeros(expert.shapes[name])
    return expert.tensor(name).float() - expert.original(name).float()


def rounding(trained: Tensor, dtype: torch.dtype) -> Tensor:
    """How far from the trained tensor a stored one may be: what it costs to round it once to `dtype`."""
    return OF_ROUNDING * (trained.to(dtype).float() - trained).norm() + 1e-6 * trained.norm()


def _parts(reading: Reading, layout: Layout, expert: ExpertSource, faults: list[str]) -> Iterator[tuple[str, Tensor]]:
    """What is added to each of diffusers' tensors, one at a time."""
    for name, make in reading.added.items():
        for part, added in layout.parts(name, make()).items():
            if part in expert.shapes:
                yield part, added
            else:
                faults.append(f"{name} is {part}, which the network has not")
    for name, make in reading.values.items():
        for part, value in layout.parts(name, make()).items():
            yield part, value.float() - expert.original(part).float()


def _share(distance: Tensor, whole: Tensor) -> float:
    """A distance as a share; infinite where there should have been nothing at all."""
    if not whole:
        return float("inf") if distance else 0.0
    return float(distance / whole)


def _said(off: Sequence[tuple[float, str]], whole: str, tolerance: float | None) -> list[str]:
    if not off:
        return []
    error, name = max(off)
    limit = "more than rounding costs" if tolerance is None else f"more than {tolerance:.0e}"
    return [f"{len(off)} tensors are not the trained ones: {name} is off by {error:.2g} {whole}, {limit}"]


def some(names: Sequence[str]) -> str:
    """The first few of several names."""
    return ", ".join(shorten(name, 80) for name in names[:NAMED]) + (", …" if len(names) > NAMED else "")
