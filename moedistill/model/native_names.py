"""What a model's makers call its tensors, where the network here has other names: ComfyUI and LightX2V know theirs.

A table says it once for a family, and is read in both directions. What a file must hold follows from it and from names
and shapes alone, so that a file which does not fit is refused before a number of it is read.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class NativeTensor:
    """A tensor as the makers have it, and the tensors of the network here that it is made of.

    Attributes:
        name, shape: the makers'.
        parts: names here, in the order in which they lie in it, one after the other along the first axis.
        rows: how many entries of the first axis each has; none where there is one part, which is taken as it is.
        swapped: whether its two halves stand the other way round here.
    """

    name: str
    shape: Shape
    parts: tuple[str, ...]
    rows: tuple[int, ...] = ()
    swapped: bool = False

    def join(self, parts: "Sequence[Tensor]") -> "Tensor":
        """The makers' tensor, of the tensors here in the order of `parts`."""
        from torch import cat

        whole = cat(list(parts)) if self.rows else parts[0]
        return _swap_halves(whole) if self.swapped else whole

    def split(self, whole: "Tensor") -> "dict[str, Tensor]":
        """The tensors here by name, of the makers' tensor: the inverse of `join`."""
        if self.swapped:
            whole = _swap_halves(whole)
        return dict(zip(self.parts, whole.split(self.rows) if self.rows else (whole,), strict=True))


def _swap_halves(tensor: "Tensor") -> "Tensor":
    from torch import cat

    first, second = tensor.chunk(2)
    return cat([second, first])


@dataclass(frozen=True)
class NativeNames:
    """The makers' names of a family's modules, and how what they hold lies in them.

    Args:
        table: by a module's or parameter's native path, the path here; where the makers have one linear for several,
            their paths in its order. `*` stands for a block's number, the same on both sides.
        swapped: native paths of linears whose two halves of outputs stand the other way round here.

    Example:
        `NativeNames({"blocks.*.qkv": ("layers.*.to_q", "layers.*.to_k", "layers.*.to_v"), "head": "proj_out"})`
    """

    table: Mapping[str, str | tuple[str, ...]]
    swapped: frozenset[str] = field(default_factory=frozenset)

    @cached_property
    def _places(self) -> list[tuple[re.Pattern[str], str, int]]:
        """For each path here: a pattern of names, the native path, and its place among the parts."""
        return [
            (re.compile(re.escape(part).replace(r"\*", r"(\d+)") + r"(\.weight|\.bias)?"), native, place)
            for native, parts in self.table.items()
            for place, part in enumerate(_several(parts))
        ]

    def _place_of(self, name: str) -> tuple[str, str, int] | None:
        """Of a name here: the native name, the row of the table that it is of, and its place among the parts."""
        for pattern, native, place in self._places:
            if match := pattern.fullmatch(name):
                *numbers, suffix = match.groups()
                path = native
                for number in numbers:
                    path = path.replace("*", number, 1)
                return path + (suffix or ""), native, place
        return None

    def tensors(self, shapes: Mapping[str, Sequence[int]]) -> list[NativeTensor]:
        """The makers' tensors of a network of which the names and shapes are known.

        Raises:
            ValueError: a tensor has no place in the table, or a part of one is missing.
        """
        parts: dict[str, dict[int, str]] = {}
        rows: dict[str, str] = {}
        unknown = []
        for name in shapes:
            place = self._place_of(name)
            if place is None:
                unknown.append(name)
                continue
            native, row, number = place
            rows[native] = row
            parts.setdefault(native, {})[number] = name
        incomplete = [name for name, found in parts.items() if len(found) != len(_several(self.table[rows[name]]))]
        if unknown or incomplete:
            raise ValueError(
                "the network is not one of those that the table of native names is of: "
                + "; ".join(
                    [f"{name} has no place in it" for name in unknown]
                    + [f"of {name} there is {', '.join(parts[name].values())} alone" for name in incomplete]
                )
            )
        return [self._tensor(native, rows[native], parts[native], shapes) for native in parts]

    def _tensor(
        self, native: str, row: str, parts: Mapping[int, str], shapes: Mapping[str, Sequence[int]]
    ) -> NativeTensor:
        names = tuple(parts[number] for number in sorted(parts))
        shape, swapped = tuple(shapes[names[0]]), row in self.swapped
        if len(names) == 1:
            return NativeTensor(native, shape, names, swapped=swapped)
        rows = tuple(shapes[name][0] for name in names)
        return NativeTensor(native, (sum(rows), *shape[1:]), names, rows, swapped)


def _several(parts: str | tuple[str, ...]) -> tuple[str, ...]:
    return (parts,) if isinstance(parts, str) else parts


def check_native(wanted: Sequence[NativeTensor], found: Mapping[str, Sequence[int]]) -> None:
    """That a file's names and shapes are exactly those of a network's native tensors.

    Raises:
        ValueError: with every name that is missing, left over, or of another shape.
    """
    shapes = {tensor.name: tensor.shape for tensor in wanted}
    misfits = [f"{name} is missing" for name in shapes if name not in found]
    misfits += [f"{name} is left over" for name in found if name not in shapes]
    misfits += [
        f"{name} is {list(found[name])}, not {list(shape)}"
        for name, shape in shapes.items()
        if name in found and tuple(found[name]) != shape
    ]
    if misfits:
        raise ValueError("; ".join(misfits))
