"""Damaged checkpoints, run folders and exports: refused, or what comes out is right.

A checkpoint's bits are compared by what comes of them: weights and moments at the end of the resumed run, or the
videos that are sampled, against those of the undamaged one. Metrics that were edited by hand stay as they are.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from .case import Fault, Part, Reference, Result, check_end, lines, newest, reference_of, sound, succeeded, tensors
from .warm import run_command

Damage = Callable[[Path, Random], None]

# -- of a file --------------------------------------------------------------------------------------------------------


def _missing(file: Path, _: Random) -> None:
    file.unlink()


def _empty(file: Path, _: Random) -> None:
    file.write_bytes(b"")


def _cut(file: Path, moves: Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: moves.randrange(len(data))])


def _longer(file: Path, moves: Random) -> None:
    file.write_bytes(file.read_bytes() + moves.randbytes(9))


def _one_bit(file: Path, moves: Random) -> None:
    """Mostly in the second half, which is numbers."""
    data = bytearray(file.read_bytes())
    place = moves.randrange(len(data) // 2 if moves.random() < 0.7 else 0, len(data))
    data[place] ^= 1 << moves.randrange(8)
    file.write_bytes(data)


def _zeros(file: Path, moves: Random) -> None:
    """A block that the disk has lost."""
    data = bytearray(file.read_bytes())
    begin = moves.randrange(len(data))
    data[begin : begin + 512] = bytes(len(data[begin : begin + 512]))
    file.write_bytes(data)


def _folder(file: Path, _: Random) -> None:
    file.unlink()
    file.mkdir()


def _fifo(file: Path, _: Random) -> None:
    file.unlink()
    os.mkfifo(file)


def _link_to_itself(file: Path, _: Random) -> None:
    file.unlink()
    file.symlink_to(file.name)


def _endless(file: Path, _: Random) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def _linked(file: Path, _: Random) -> None:
    """Nothing is wrong with a link to a whole file."""
    file.rename(file.with_name(f"{file.name}.elsewhere"))
    file.symlink_to(f"{file.name}.elsewhere")


FILE: Sequence[Damage] = (
    _missing, _empty, _cut, _longer, _one_bit, _one_bit, _one_bit, _one_bit, _zeros, _folder, _fifo, _link_to_itself,
    _endless, _linked,
)  # fmt: skip

# -- of a safetensors file --------------------------------------------------------------------------------------------


def _rewrite(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The file with another header over the same numbers."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def _some(header: Mapping[str, Any], moves: Random) -> str:
    return moves.choice(sorted(name for name in header if name != "__metadata__"))


def _renamed_tensor(file: Path, moves: Random) -> None:
    def change(header: dict[str, Any]) -> None:
        header["other"] = header.pop(_some(header, moves))

    _rewrite(file, change)


def _other_dtype(file: Path, moves: Random) -> None:
    """float32 numbers are read as int32 ones."""

    def change(header: dict[str, Any]) -> None:
        each = header[_some(header, moves)]
        each["dtype"] = {"F32": "I32", "I64": "F64"}.get(each["dtype"], "I32")

    _rewrite(file, change)


def _other_shape(file: Path, moves: Random) -> None:
    def change(header: dict[str, Any]) -> None:
        each = header[_some(header, moves)]
        each["shape"] = moves.choice([each["shape"][::-1], [1, *each["shape"]], [*each["shape"], 1]])

    _rewrite(file, change)


def _swapped_tensors(file: Path, _: Random) -> None:
    """Two of one shape change places."""

    def change(header: dict[str, Any]) -> None:
        by_shape: dict[str, list[str]] = {}
        for name, each in header.items():
            if name != "__metadata__":
                by_shape.setdefault(f"{each['dtype']} {each['shape']}", []).append(name)
        a, b, *_ = [*max(by_shape.values(), key=len), ""]
        if b:
            header[a], header[b] = header[b], header[a]

    _rewrite(file, change)


def _reversed_names(file: Path, _: Random) -> None:
    def change(header: dict[str, Any]) -> None:
        for name in [name for name in header if name != "__metadata__"]:
            header[name[::-1]] = header.pop(name)

    _rewrite(file, change)


def _huge_header(file: Path, _: Random) -> None:
    file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes()[8:])


TENSORS: Sequence[Damage] = (
    _renamed_tensor, _other_dtype, _other_shape, _swapped_tensors, _reversed_names, _huge_header
)  # fmt: skip

# -- of a JSON file ---------------------------------------------------------------------------------------------------


def _edited(file: Path, moves: Random) -> None:
    """One value or key of it is another; it stays JSON."""
    tree = json.loads(file.read_text(encoding="utf-8"))
    parents = [tree, *(node for node in _nodes(tree) if isinstance(node, dict | list) and node)]
    parent = moves.choice([node for node in parents if node] or [tree])
    if isinstance(parent, dict):
        key = moves.choice(sorted(parent))
        if moves.random() < 0.4:
            value = parent.pop(key)
            parent |= {f"{key}x": value} if moves.random() < 0.5 else {}
        else:
            parent[key] = _other(parent[key], moves)
    elif isinstance(parent, list):
        number = moves.randrange(len(parent))
        parent[number] = _other(parent[number], moves)
    file.write_text(json.dumps(tree), encoding="utf-8")


def _nodes(tree: Any) -> list[Any]:
    below = list(tree.values()) if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    return [node for each in below for node in (each, *_nodes(each))]


def _other(value: Any, moves: Random) -> Any:
    others = [None, "", "x", -1, 10**30, float("nan"), [], {}, [value], {"a": value}, "../x", "/etc/passwd", 0.5, True]
    if isinstance(value, int | float) and not isinstance(value, bool):
        others += [value + 1, value - 1, value * 2] * 3
    return moves.choice(others)


def _no_mapping(file: Path, moves: Random) -> None:
    file.write_text(
        moves.choice(["[]", "null", "7", '"x"', "{}", "[" * 100_000, '{"a": 1e999}', "NaN"]), encoding="utf-8"
    )


JSON: Sequence[Damage] = (_edited, _edited, _edited, _edited, _no_mapping)

# -- of the folder ----------------------------------------------------------------------------------------------------


def _backups(run: Path, _: Random) -> None:
    for number in (1, 2, 3):  # as many as are kept
        shutil.copytree(_newest(run), run / "checkpoints" / f"my_backup_{number}")


def _notes(run: Path, _: Random) -> None:
    (run / "checkpoints" / "zz_notes").mkdir()
    (run / "checkpoints" / "zz_notes.txt").write_text("mine", encoding="utf-8")


def _empty_newest(run: Path, _: Random) -> None:
    """A folder of a checkpoint's name with nothing in it: what is left after somebody has made room."""
    (run / "checkpoints" / "01_detail_00000005").mkdir()


def _file_of_its_name(run: Path, _: Random) -> None:
    (run / "checkpoints" / "01_detail_00000009").write_text("mine", encoding="utf-8")


def _dangling(run: Path, _: Random) -> None:
    (run / "checkpoints" / "01_detail_00000099").symlink_to("nowhere")


def _moved(run: Path, _: Random) -> None:
    """The checkpoints lie on another disk."""
    (run / "checkpoints").rename(run / "elsewhere")
    (run / "checkpoints").symlink_to("elsewhere")


def _half_written(run: Path, _: Random) -> None:
    shutil.copytree(_newest(run), run / "checkpoints" / ".tmp-01_detail_00000005")


FOLDER: Sequence[Damage] = (_backups, _notes, _empty_newest, _file_of_its_name, _dangling, _moved, _half_written)
"""None of these may keep a run from going on, and none of the user's things may vanish."""


def _newest(run: Path) -> Path:
    found = newest(run)
    assert found is not None
    return found


# -- checkpoints ------------------------------------------------------------------------------------------------------

STOPPED = "01_detail_00000004"


def _stopped(reference: Reference, folder: Path) -> Path:
    """A copy of the run as it was just after the second stage's checkpoint at step 4, with those before."""
    ignored = shutil.ignore_patterns("evaluate", "export", "samples", "result.json")
    run = Path(shutil.copytree(reference.run, folder / "run", ignore=ignored))
    for path in (run / "checkpoints").iterdir():
        if path.name > STOPPED:
            shutil.rmtree(path)
    text = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    after = max(n for n, line in enumerate(lines(run)) if (line["stage"], line["step"]) == ("detail", 4)) + 1
    (run / "metrics.jsonl").write_text("".join(text[:after]), encoding="utf-8")
    return run


def _checkpoints(number: int, moves: Random, folder: Path) -> Result:
    reference = reference_of(folder)
    run = _stopped(reference, folder)
    if number % 6 == 5:
        return _foreign(number // 6, moves, folder, run, reference)
    files = sorted(path for path in _newest(run).iterdir())
    file = files[number % len(files)]
    damage, whole = _choose(file, moves), file.read_bytes()
    damage(file, moves)
    what = f"{file.name}, {damage.__name__.strip('_')}"
    if number % 3 == 2:
        other_numbers = file.name == "experts.safetensors" and _other_numbers(file, whole)
        expected = _sample_of(reference, "run/checkpoints/" + STOPPED)
        return _sampled(folder, "run", what, expected, other_numbers, must_name=_before(run).name)
    outcome = sound(run_command(*reference.arguments("--resume"), folder=folder, seconds=30), what)
    if not outcome.refused:
        if different := reference.differs(run, reports=False):
            raise Fault("wrong", f"{what}: resumes without a word, and ends otherwise: {different}")
        return Result("right")
    # As the message must say: an earlier whole one is there, and the way is open afterwards.
    earlier = _before(run)
    if earlier.name not in outcome.output:
        raise Fault("lost", f"{what}: {earlier.name} is whole, and is not named: {outcome.refusal()[:300]}")
    hint = outcome.hint()
    if hint is None:
        raise Fault("lost", f"{what}: no command to go on from {earlier.name} is printed: {outcome.refusal()[:300]}")
    own = ["run", reference.recipe, "--device", "cpu", "--resume-from", f"run/checkpoints/{earlier.name}"]
    way = hint if number % 2 else own
    succeeded(run_command(*way, folder=folder), "lost", f"{what}, refused by --resume; then from the earlier one")
    if different := reference.differs(run):
        raise Fault("wrong", f"{what}: from the earlier checkpoint it ends otherwise: {different}")
    again = run_command(*reference.arguments("--resume"), folder=folder)
    succeeded(again, "lost", f"{what}: after it was done from an earlier checkpoint")
    return Result("refused", counts=("commands followed as printed",) if way is hint else ())


def _before(run: Path) -> Path:
    """The newest checkpoint of those before the damaged one, which are whole."""
    return sorted(path for path in (run / "checkpoints").iterdir() if path.name < STOPPED)[-1]


def _choose(file: Path, moves: Random) -> Damage:
    own = TENSORS if file.suffix == ".safetensors" else JSON
    return moves.choice(own if moves.random() < 0.4 else FILE)


def _foreign(number: int, moves: Random, folder: Path, run: Path, reference: Reference) -> Result:
    """Something else lies in the folder: the run goes on, and it stays."""
    damage = FOLDER[number % len(FOLDER)]
    before = set(run.rglob("*"))
    damage(run, moves)
    foreign = {path for path in run.rglob("*") if path not in before and not path.name.startswith(".tmp-")}
    foreign = {path for path in foreign if not any(part.startswith(".tmp-") for part in path.parts)}
    foreign -= {path for path in foreign if "elsewhere" in path.parts or path.name == "01_detail_00000005"}
    what = damage.__name__.strip("_")
    outcome = run_command(*reference.arguments("--resume"), folder=folder, seconds=30)
    succeeded(outcome, "lost", f"{what} in its folder")
    check_end(reference, run)
    if gone := sorted(str(path.relative_to(run)) for path in foreign if not path.is_symlink() and not path.exists()):
        raise Fault("lost", f"{what}: the user's own {gone[0]} is deleted")
    return Result("right")


# -- samples ----------------------------------------------------------------------------------------------------------


@cache
def _sample_of(reference: Reference, source: str) -> Mapping[str, bytes]:
    """The files that sampling an undamaged source makes, but for what names its place."""
    folder = reference.folder / f"sample-{source.replace('/', '-')}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "run").symlink_to(reference.run)
    if source.endswith(STOPPED):
        (folder / "run").unlink()
        _stopped(reference, folder)
    succeeded(run_command(*_sample(source), folder=folder), "lost", "undamaged")
    return _pictures(folder / "out")


def _sample(source: str) -> list[str]:
    return ["sample", source, "--prompt", "3 right", "--output", "out"]


def _pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".png", ".mp4", ".webp")}


def _sampled(
    folder: Path, source: str, what: str, expected: Mapping[str, bytes], other_numbers: bool, must_name: str = ""
) -> Result:
    outcome = sound(run_command(*_sample(source), folder=folder, seconds=30), what)
    if outcome.refused:
        if must_name not in outcome.output:
            raise Fault("lost", f"{what}: {must_name} is whole, and is not named: {outcome.refusal()[:300]}")
        return Result("refused")
    if other_numbers or _pictures(folder / "out") != expected:
        raise Fault("wrong", f"{what}: sampled without a word, with other numbers")
    return Result("right")


def _other_numbers(file: Path, whole: bytes) -> bool:
    """Whether a damaged file holds other tensors than before: too little to be seen in a picture, perhaps."""
    if not _is_regular(file):
        return True
    before = file.with_name(f"{file.name}.before")
    before.write_bytes(whole)
    try:
        return tensors(file) != tensors(before)
    except (ValueError, OSError, KeyError, TypeError, struct.error):
        return True
    finally:
        before.unlink()


def _is_regular(file: Path) -> bool:
    """Whether it can be read to its end; `is_file` raises for a link to itself."""
    try:
        return file.is_file()
    except OSError:
        return False


# -- exports and reports ----------------------------------------------------------------------------------------------

REPORTED = ("result.json", "cost.json", "recipe.yaml", "metrics.jsonl", "evaluate/rows.safetensors")


def _exports(number: int, moves: Random, folder: Path) -> Result:
    reference = reference_of(folder)
    run = Path(shutil.copytree(reference.run, folder / "run"))
    if number % 3 == 2:
        return _report(number // 3, moves, folder, run)
    files = [path for path in sorted((run / "export").iterdir()) if path.is_file()]
    file = files[number // 3 % len(files)]
    damage, whole = _choose(file, moves), file.read_bytes()
    damage(file, moves)
    what = f"{file.name}, {damage.__name__.strip('_')}"
    if damage is _edited:  # a valid edit of an export's index is what its user wants
        return Result("refused" if sound(run_command(*_sample("run/export"), folder=folder), what).refused else "right")
    other_numbers = file.suffix == ".safetensors" and _other_numbers(file, whole)
    return _sampled(folder, "run/export", what, _sample_of(reference, "run/export"), other_numbers)


def _report(number: int, moves: Random, folder: Path, run: Path) -> Result:
    """Whatever a run's folder holds, `report` and `--resume` of a finished run end in words."""
    files = [run / name for name in REPORTED if (run / name).is_file()]
    file = files[number % len(files)]
    damage = _choose(file, moves) if file.suffix in (".json", ".safetensors") else moves.choice(FILE)
    damage(file, moves)
    what = f"{file.name}, {damage.__name__.strip('_')}"
    table = ["--table"] if moves.random() < 0.5 else []
    outcome = sound(run_command("report", "run", *table, folder=folder, seconds=30), what)
    if file.suffix != ".safetensors":
        reference = reference_of(folder)
        again = sound(run_command(*reference.arguments("--resume"), folder=folder, seconds=30), what)
        if not again.refused and (different := reference.differs(run, reports=False)):
            raise Fault("wrong", f"{what}: ends otherwise: {different}")
    return Result("refused" if outcome.refused else "right")


PARTS = (
    Part("checkpoints", "damaged checkpoints", 120, 300, _checkpoints),
    Part("exports", "damaged exports and run folders", 60, 60, _exports),
)
