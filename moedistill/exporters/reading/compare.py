"""What a consumer makes of a file, and how far that is from what was trained."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from moedistill.errors import shorten
from moedistill.exporters.lora_files import Change
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
Shapes = Mapping[str, tuple[int, ...]]


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


@dataclass(frozen=True)
class Wanted:
    """The changes of a network that a file is to carry.

    Attributes:
        shapes: of all tensors of the network, by diffusers' names.
        names: of the tensors that training changed.
        change: gives the change of one of `shapes`, float32.
        original: gives what it is a change of.
        part: the file is to carry a part of the change, the nearest of some rank, and not the whole of it.
    """

    shapes: Mapping[str, tuple[int, ...]]
    names: frozenset[str]
    change: Callable[[str], Tensor]
    original: Callable[[str], Tensor]
    part: bool = False


def whole_change(expert: Change) -> Wanted:
    """The change that an adapter is."""
    names = frozenset({*expert.copies, *(f"{path}.weight" for path in expert.pairs)})

    def change(name: str) -> Tensor:
        if name in expert.copies:
            return expert.copies[name].float() - expert.original(name).float()
        if name in names:
            a, b = expert.pairs[name.removesuffix(".weight")]
            return b @ a  # and not by way of the sum, which rounds a small change off
        return torch.zeros(expert.shapes[name])

    return Wanted(expert.shapes, names, change, expert.original)


def part_of_change(expert: ExpertSource) -> Wanted:
    """The change of the pretrained network that an expert is, of which a file carries a part: of linears alone."""
    linears = {name.removesuffix(".weight") for name, shape in expert.shapes.items() if len(shape) == 2}
    ours = [name for name in expert.shapes if name.rpartition(".")[0] in linears]
    names = frozenset(name for name in ours if not expert.tensor(name).float().equal(expert.pretrained(name).float()))

    def change(name: str) -> Tensor:
        return expert.tensor(name).float() - expert.pretrained(name).float()

    return Wanted(expert.shapes, names, change, expert.pretrained, part=True)


def distance(found: Tensor, trained: Tensor, part: bool) -> float:
    """How far what is added is from the trained change, as a share of it.

    Of a part, how far it is from being one: the nearest matrix of a rank has no component along what it leaves out.
    """
    if part:
        return abs(_share(((trained - found) * found).sum(), found.square().sum()))
    return _share((found - trained).norm(), trained.norm())


def compare_changes(reading: Reading, layout: Layout, wanted: Wanted, dtype: torch.dtype) -> Comparison:
    """Compares what is added to each parameter with what training added.

    Args:
        dtype: of the file: the tolerance is that of `OF_A_CHANGE`.
    """
    tolerance, compared, worst, off = OF_A_CHANGE[dtype], 0, 0.0, []
    unseen, faults = set(wanted.names), reading.all_faults()
    for name, found in _parts(reading, layout, wanted, faults):
        unseen.discard(name)
        if found.shape != wanted.shapes[name]:
            faults.append(f"{name} would be {list(found.shape)}, and is {list(wanted.shapes[name])}")
            continue
        error = distance(found, wanted.change(name), wanted.part)
        compared, worst = compared + 1, max(worst, error)
        if not error <= tolerance:  # also where it is no number
            off.append((error, name))
    if unseen:
        faults.append(f"{len(unseen)} trained changes are missing: {some(sorted(unseen))}")
    return Comparison(compared, worst, [*faults, *_said(off, "of what training changed", tolerance)])


def compare_values(reading: Reading, layout: Layout, shapes: Shapes, take: Callable[[str], Tensor]) -> Comparison:
    """Compares each parameter with the trained one: it must be that, rounded once to the dtype of the file.

    Args:
        shapes: of all tensors of the network, by diffusers' names.
        take: gives the trained one.
    """
    compared, worst, off = 0, 0.0, []
    unseen, faults = set(shapes), reading.all_faults()
    for name, make in reading.values.items():
        for part, found in layout.parts(name, make()).items():
            if part not in unseen:
                faults.append(f"{name} is {part}, which the network has not, or has already")
                continue
            unseen.discard(part)
            trained = take(part).float()
            if found.shape != trained.shape:
                faults.append(f"{part} would be {list(found.shape)}, and is {list(trained.shape)}")
                continue
            off_by, allowed = (found.float() - trained).norm(), rounding(trained, found.dtype)
            error = _share(off_by, trained.norm())
            compared, worst = compared + 1, max(worst, error)
            if not off_by <= allowed:
                off.append((error, part))
    if unseen:
        faults.append(f"{len(unseen)} weights are missing: {some(sorted(unseen))}")
    return Comparison(compared, worst, [*faults, *_said(off, "of the trained weight", None)])


def rounding(trained: Tensor, dtype: torch.dtype) -> Tensor:
    """How far from the trained tensor a stored one may be: what it costs to round it once to `dtype`."""
    return OF_ROUNDING * (trained.to(dtype).float() - trained).norm() + 1e-6 * trained.norm()


def _parts(reading: Reading, layout: Layout, wanted: Wanted, faults: list[str]) -> Iterator[tuple[str, Tensor]]:
    """What is added to each of diffusers' tensors, one at a time."""
    for name, make in reading.added.items():
        for part, added in layout.parts(name, make()).items():
            if part in wanted.shapes:
                yield part, added
            else:
                faults.append(f"{name} is {part}, which the network has not")
    for name, make in reading.values.items():
        for part, value in layout.parts(name, make()).items():
            yield part, value.float() - wanted.original(part).float()


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
