"""Files of weights that others made: safetensors alone, opened and never run, their tensors mapped one at a time."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from moedistill.integrations.diffusers.converting import PublishedWeights
from moedistill.integrations.diffusers.loading import read_json

Shape = tuple[int, ...]

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


class WeightFiles(Mapping[str, Tensor]):
    """The floating-point tensors of a network in its files, by name.

    Attributes:
        place: the file, or the folder of several, as messages name it.
        files: all of them.
        shapes: by name, from the files' headers.
        metadata: what the first file's header says besides.
    """

    def __init__(self, place: Path, files: Sequence[Path]) -> None:
        """ValueError where one cannot be read, holds other numbers, or a name that another one has too."""
        self.place, self.files = place, list(files)
        self._of: dict[str, PublishedWeights] = {}
        self.shapes: dict[str, Shape] = {}
        for file in files:
            weights = PublishedWeights(file)
            if twice := sorted(weights.names & self._of.keys()):
                raise ValueError(f"{place}: {listed(twice)} is in {file.name} and in another file; keep one of them")
            self._of |= dict.fromkeys(sorted(weights.names), weights)
            self.shapes |= {name: tuple(weights.on_meta(name).shape) for name in sorted(weights.names)}
        with safe_open(self.files[0], "pt") as opened:
            self.metadata: dict[str, str] = opened.metadata() or {}

    def __getitem__(self, name: str) -> Tensor:
        return self._of[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)


def open_weights(place: Path) -> WeightFiles:
    """A file of weights, or a folder with one, or with shards and their index.

    Raises:
        ValueError: there is none, or it is none that can be read without running what is in it.
    """
    if place.is_file():
        if place.suffix in PICKLES:
            raise ValueError(_refused(place))
        return WeightFiles(place, [place])
    if not place.is_dir():
        raise ValueError(f"there is no file or folder {place}")
    if indices := sorted(place.glob("*.safetensors.index.json")):
        return WeightFiles(place, _shards(place, indices))
    files = sorted(place.glob("*.safetensors"))
    if not files and (pickles := sorted(file for file in place.iterdir() if file.suffix in PICKLES)):
        raise ValueError(_refused(pickles[0]))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{place} must hold one .safetensors file, or shards and their index; it has {found}")
    return WeightFiles(place, files)


def _refused(file: Path) -> str:
    return (
        f"{file} is a pickle, which can run code when it is read, so it is not; get the weights as .safetensors, or "
        "write them as such where you trust the file"
    )


def _shards(folder: Path, indices: Sequence[Path]) -> list[Path]:
    if len(indices) > 1:
        raise ValueError(f"{folder} has several networks: {', '.join(file.name for file in indices)}; keep one of them")
    map_ = read_json(indices[0]).get("weight_map")
    names = sorted(set(map_.values())) if isinstance(map_, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"{indices[0]} does not say which files hold the weights; get it again")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder / missing[0]} is missing, which {indices[0].name} names; get the whole folder")
    return [folder / name for name in names]


def places_by_noise(source: Path, experts: Sequence[str]) -> list[Path]:
    """Where in `source` the weights of each of `experts` are, which are in order from high noise to low.

    Of one expert it is `source` itself. Of two, it is a folder with a file or folder that has `high` in its name, and
    one that has `low`; of more, with one for each expert's name.

    Raises:
        ValueError: it is not that.
    """
    if len(experts) == 1:
        return [source]
    words = ("high", "low") if len(experts) == 2 else experts
    if not source.is_dir():
        raise ValueError(
            f"{source} is no folder; the recipe has experts {', '.join(experts)}: give a folder with a file for each, "
            f"with {' and '.join(words)} in their names"
        )
    entries = [path for path in sorted(source.iterdir()) if path.suffix in (".safetensors", *PICKLES) or path.is_dir()]
    found = []
    for expert, word in zip(experts, words, strict=True):
        named = [path for path in entries if re.search(rf"(?<![a-z]){re.escape(word.lower())}", path.name.lower())]
        if len(named) != 1:
            what = ", ".join(path.name for path in named) or f"none of {', '.join(path.name for path in entries)}"
            raise ValueError(
                f"{source} must hold one file for expert {expert!r}, with {word!r} in its name; it has {what}"
            )
        found += named
    return found


def check_names(wanted: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], place: object) -> None:
    """ValueError, with every name, unless the tensors that were `found` are those that are `wanted`."""
    shapes = [
        f"{name} is {list(found[name])} and must be {list(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    faults = {
        "missing": listed(name for name in wanted if name not in found),
        "left over": listed(name for name in found if name not in wanted),
        "of another shape": ", ".join(shapes),
    }
    if any(faults.values()):
        said = "; ".join(f"{what}: {names}" for what, names in faults.items() if names)
        raise ValueError(f"{place} does not fit the recipe: {said}; get it again, or give its own recipe")


def listed(names: Iterable[str]) -> str:
    """All names in few words: those that differ in their first number alone are one, as `blocks.{0-3,7}.norm`."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        head, number, tail = [*re.split(r"(?<=[._])(\d+)(?=[._])", name, maxsplit=1), "", ""][:3]
        numbers.setdefault((head, tail), []).extend([int(number)] if number else [])
    return ", ".join(
        head + (str(found[0]) if len(found) == 1 else "{" + _ranges(sorted(found)) + "}" if found else "") + tail
        for (head, tail), found in numbers.items()
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, neighbours as a range: 0-3,7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
