"""Mutated recipes: what `validate` says of them, and how those that it takes run in miniature.

A recipe that breaks its own JSON Schema, or holds a number that is not finite, must be refused.
"""

import copy
import json
import math
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from .case import Fault, Part, Result, follow, lines, sound
from .warm import Outcome, run_command

Path_ = tuple[str | int, ...]

NAN, INF = float("nan"), float("inf")
JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, -7, 10**6, 10**9, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 0.0, 0.5, -0.5,
    1e-300, 1e-45, 1e30, 1e308, NAN, INF, -INF, "", " ", "0", "1", "-1", "1e-5", "nan", ".inf", "true", "null", "~",
    "none", "teacher", "student", "semantic", "detail", "auto", "x" * 5000, "ä→😀", "\u202e", "a\nb", "a\x00b", "../..",
    "/", "/dev/zero", "/dev/null", "/proc/self/mem", "${HOME}", "!!python/object:os.system", [], [[]], [None], {},
    {"kind": "huber"}, {"kind": 7}, {"kind": None}, {"kind": "no_such"}, {"a": {"b": {"c": [1, {"d": 2}]}}},
    [1, "a", None], ["semantic", "semantic"], list(range(300)),
]  # fmt: skip

# -- trees ------------------------------------------------------------------------------------------------------------


@cache
def _shipped() -> list[tuple[str, str]]:
    from moedistill.recipe.loading import shipped_recipes

    return [(name, path.read_text(encoding="utf-8")) for name, path in shipped_recipes().items()]


@cache
def _trees(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A shipped recipe as it is written, with what it extends, and with all defaults filled in."""
    from moedistill.recipe.loading import load_recipe, read_recipe

    return read_recipe(name, (), []).plain(), load_recipe(name, (), _plugins()).resolved()


@cache
def _plugins() -> Any:
    from moedistill.components.plugins import load_plugins

    return load_plugins()


@cache
def _schema() -> dict[str, Any]:
    from moedistill.recipe.json_schema import json_schema

    return json_schema()


def places(tree: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Of all values below the root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def at(tree: Any, path: Path_) -> Any:
    for step in path:
        tree = tree[step]
    return tree


def put(tree: Any, path: Path_, value: Any) -> None:
    at(tree, path[:-1])[path[-1]] = value


def options(path: Path_, tree: Any) -> list[dict[str, Any]]:
    """The alternatives of the schema for the value at `path`."""
    found = [_schema()]
    node = tree
    for step in path:
        node = node[step]
        below = []
        for schema in found:
            if isinstance(step, int):
                below += [schema["items"]] if isinstance(schema.get("items"), dict) else []
            elif step in schema.get("properties", {}):
                below.append(schema["properties"][step])
            elif isinstance(schema.get("additionalProperties"), dict):
                below.append(schema["additionalProperties"])
        found = [leaf for schema in below for leaf in _alternatives(schema, node)]
    return found


def _alternatives(schema: Mapping[str, Any], value: Any) -> list[dict[str, Any]]:
    """Without references and choices; of components the one whose kind `value` has, if it has one."""
    if "$ref" in schema:
        return _alternatives(_schema()["$defs"][schema["$ref"].removeprefix("#/$defs/")], value)
    parts = schema.get("anyOf", schema.get("oneOf"))
    if not parts:
        return [dict(schema)]
    leaves = [leaf for part in parts for leaf in _alternatives(part, value)]
    kind = value.get("kind") if isinstance(value, dict) else None
    chosen = [leaf for leaf in leaves if kind is not None and _kind(leaf) == kind]
    return chosen or leaves


def _kind(schema: Mapping[str, Any]) -> Any:
    return schema.get("properties", {}).get("kind", {}).get("const")


# -- mutations --------------------------------------------------------------------------------------------------------

WORK = (
    "steps", "num", "samples", "num_steps", "every", "levels", "batch_size", "gradient_accumulation_steps", "pictures",
    "reference_samples", "critic_updates", "styles_per_digit", "num_workers",
)  # fmt: skip
"""Keys whose large values mean long runs or many processes, which is no fault, or hard on the machine."""


def within(schema: Mapping[str, Any], value: Any, moves: Random, *, brief: bool = False) -> Any:
    """Another value that the schema allows; `value` where none comes to mind.

    Args:
        brief: no number that could only make a run longer.
    """
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return moves.choice(schema["enum"])
    kind = schema.get("type")
    if kind == "boolean":
        return not value if isinstance(value, bool) else moves.random() < 0.5
    if kind == "null":
        return None
    if kind in ("integer", "number"):
        return _number(schema, value, moves, brief)
    if kind == "array" and isinstance(value, list) and value:
        items = list(value)
        change = moves.randrange(4)
        if change == 0:
            items.insert(moves.randrange(len(items) + 1), copy.deepcopy(moves.choice(items)))
        elif change == 1:
            moves.shuffle(items)
        elif change == 2:
            del items[moves.randrange(len(items))]
        else:
            items.reverse()
        return items
    if kind == "string":
        return moves.choice(
            ["teacher", "semantic", "detail", "student", "attention", "all", "x", "ä", "3 right", "a/b"]
        )
    return value


def _number(schema: Mapping[str, Any], value: Any, moves: Random, brief: bool) -> float:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    usual = value if isinstance(value, int | float) and not isinstance(value, bool) else 1
    if schema["type"] == "integer":
        least = int(low) + ("exclusiveMinimum" in schema) if low is not None else -3
        numbers = [least, least + 1, least + 2, usual + 1, max(usual // 2, least), 2 * usual, 3, 5, 17]
        if not brief:
            numbers += [1000, 10**6, 10**9, 2**31 - 1, 2**63 - 1] if high is None else [int(high), int(high) - 1]
        within_ = [n for n in numbers if n >= least and (high is None or n <= high)]
        return moves.choice([n for n in within_ if n <= 24] or within_) if brief else moves.choice(within_)
    numbers = [usual / 3, usual * 3, usual + 0.25, 1e-8, 0.01, 0.5, 0.999, 1.0, 1.5, 7.25, 1e4]
    numbers += [] if low is None else [low, low + 1e-9]
    numbers += [1e30, 1e300] if high is None else [high, high - 1e-9]
    above = [n for n in numbers if low is None or n > low or (n == low and "minimum" in schema)]
    return moves.choice(
        [n for n in above if high is None or n < high or (n == high and "maximum" in schema)] or [usual]
    )


def change_within(tree: Any, moves: Random, *, brief: bool = False) -> str:
    """One value of the tree becomes another that the schema allows, a component one of another recipe; says which."""
    for _ in range(50):
        path = moves.choice(list(places(tree)))
        value = at(tree, path)
        if isinstance(value, dict) and "kind" in value:
            if moves.random() < 0.5:
                other, _ = moves.choice(_shipped())
                peers = [p for p in places(_trees(other)[0]) if _alike(p, path) and isinstance(_at(other, p), dict)]
                new = copy.deepcopy(_at(other, moves.choice(peers))) if peers else value
            else:
                new = _with_a_key_more(value, options(path, tree), moves, brief)
        else:
            schemas = options(path, tree)
            if not schemas:
                continue
            new = within(moves.choice(schemas), value, moves, brief=brief and path[-1] in WORK)
        if new != value:
            put(tree, path, new)
            return f"{'.'.join(map(str, path))} = {str(new)[:80]}"
    return "nothing"


def _with_a_key_more(
    value: dict[str, Any], schemas: list[dict[str, Any]], moves: Random, brief: bool
) -> dict[str, Any]:
    """A component with a key that was left out, and has a simple value."""
    known = {key: schema for each in schemas for key, schema in each.get("properties", {}).items() if key not in value}
    if not known:
        return value
    key = moves.choice(sorted(known))
    schema = moves.choice(_alternatives(known[key], None))
    return {**value, key: within(schema, schema.get("default"), moves, brief=brief and key in WORK)}


def _at(recipe: str, path: Path_) -> Any:
    return at(_trees(recipe)[0], path)


def _alike(one: Path_, other: Path_) -> bool:
    """Whether values of two places are of one kind: the same but for numbers of items and names of experts."""
    same = [a == b or (isinstance(a, int) and isinstance(b, int)) for a, b in zip(one, other, strict=False)]
    return len(one) == len(other) and (all(same) or (one[:1] == other[:1] == ("experts",) and len(one) == 2))


def break_structure(tree: Any, moves: Random) -> str:
    """One thing about the tree is changed, whatever the schema says; tells what."""
    path = moves.choice(list(places(tree)))
    parent, key, value = at(tree, path[:-1]), path[-1], at(tree, path)
    how = moves.randrange(9)
    if how == 0:
        del parent[key]
    elif how == 1 and isinstance(parent, dict):
        new = moves.choice([f"{key}s", str(key)[:-1], str(key).upper(), "kind", "ä", "x" * 400, 7, None, True])
        changed = {new if k == key else k: v for k, v in parent.items()}
        parent.clear()
        parent.update(changed)
    elif how == 2 and isinstance(parent, list):
        parent.insert(moves.randrange(len(parent) + 1), copy.deepcopy(value))
    elif how == 3 and isinstance(value, list):
        moves.shuffle(value)
    elif how == 4:
        put(tree, path, [value])
    elif how == 5:
        put(tree, path, {str(key): value})
    elif how == 6 and isinstance(value, int | float):
        put(tree, path, moves.choice([str(value), -value, value * 10**6, value / 7, [value] * 3, value + 0.5]))
    elif how == 7:
        put(tree, path, copy.deepcopy(at(tree, moves.choice([p for p in places(tree) if p != path] or [path]))))
    else:
        put(tree, path, copy.deepcopy(moves.choice(JUNK)))
    return f"{'.'.join(map(str, path))}: change {how}"


def _dump(tree: Any) -> str:
    from moedistill.recipe.yaml_tree import dump_yaml

    return dump_yaml(tree)


def must_be_refused(tree: Any) -> str:
    """Why no recipe may be so; empty if it may."""
    from jsonschema import Draft202012Validator

    for path in places(tree):
        value = at(tree, path)
        if isinstance(value, float) and not math.isfinite(value):
            return f"{'.'.join(map(str, path))} is {value}"
    if any(
        not isinstance(key, str) for path in places(tree) for key in path[-1:] if isinstance(at(tree, path[:-1]), dict)
    ):
        return ""  # a key such as 7 is text in YAML as we read it
    error = next(Draft202012Validator(_schema()).iter_errors(tree), None)
    return f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" if error is not None else ""


# -- text -------------------------------------------------------------------------------------------------------------


def break_text(text: str, moves: Random, folder: Path, number: int) -> tuple[bytes, str]:
    """The file of a recipe that is no longer quite one, and why it must be refused, if it must; all ways by turns."""
    lines_ = text.splitlines()
    here, how = moves.randrange(len(lines_)), number % 18
    keyed = [k for k, line in enumerate(lines_) if line[:1].isalpha()]
    data, must = text.encode(), ""
    if how == 0:
        data = data[: moves.randrange(len(data))]
    elif how == 1:
        lines_[here] = "\t" + lines_[here]
        data = "\n".join(lines_).encode()
    elif how == 2:
        line = lines_[moves.choice(keyed)]
        data, must = f"{text}\n{line.split(':')[0]}: 1\n".encode(), "a key is there twice"
    elif how == 3:
        bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        )
        data, must = (bomb + text).encode(), "unknown keys, an alias bomb"
    elif how == 4:
        data = b"\xef\xbb\xbf" + data
    elif how == 5:
        data = data.replace(b"\n", b"\r\n")
    elif how == 6:
        data, must = moves.randbytes(300), "no text"
    elif how == 7:
        data, must = text.encode("utf-16"), "not UTF-8"
    elif how == 8:
        place = moves.randrange(len(data))
        data = data[:place] + bytes([data[place] ^ (1 << moves.randrange(8))]) + data[place + 1 :]
    elif how == 9:
        data, must = f"{text}\nx: !!python/object/apply:os.system [touch ran]\n".encode(), "a tag"
    elif how == 10:
        data, must = f"{text}\n<<: {{seed: 1}}\n".encode(), "a merge key"
    elif how == 11:
        data, must = ("[" * 50_000).encode(), "no YAML"
    elif how == 12:
        targets = ["recipe.yaml", "fifo", "/dev/zero", ".", "no_such.yaml", "", "/proc/self/mem", "\\0"]
        target = targets[number // 18 % len(targets)]
        os.mkfifo(folder / "fifo")
        data, must = f'extends: "{target}"\n{text}'.encode(), "extends what is no recipe"
    elif how == 13:
        data, must = b"", "empty"
    elif how == 14:
        data, must = b"x: 1\n" * 100_000, "far too large"
    elif how == 15:
        del lines_[here]
        data = "\n".join(lines_).encode()
    elif how == 16:
        there = moves.randrange(len(lines_))
        lines_[here], lines_[there] = lines_[there], lines_[here]
        data = "\n".join(lines_).encode()
    else:
        data = f"{text}\n---\n{text}".encode()
        must = "two documents"
    return data, must


# -- what has gone wrong before ---------------------------------------------------------------------------------------

GAN = ("stages", 1, "losses", 1)
KNOWN: list[tuple[str, Path_, Any]] = [
    ("a critic that no memory holds", (*GAN, "width"), 10**9),
    ("more threads than any system has", ("training", "num_threads"), 10**6),
    ("a later stage's optimiser that torch refuses", (*GAN, "optimizer", "betas"), [0.9, 1.0]),
    ("a learning rate above float32", ("stages", 1, "optimizer", "lr"), 1e39),
    ("a rank above the widths", ("experts", "detail", "rank"), 10**9),
    ("a tracker that is not there", ("training", "trackers"), ["no_such_tracker"]),
    ("a run's name that is a path", ("name",), "../outside"),
    ("a stage's name that is a path", ("stages", 3, "name"), "../../outside"),
    ("a probe of no block", ("stages", 1, "probe", "block_stride"), 10**6),
    ("a sample list that does not descend", ("sample", "points"), [15, 30]),
    ("prompts from a FIFO", ("stages", 2), {"name": "s", "kind": "sample", "prompts": "fifo"}),
    ("prompts without end", ("stages", 2), {"name": "s", "kind": "sample", "prompts": "/dev/zero"}),
    ("prompts in a folder", ("stages", 2), {"name": "s", "kind": "sample", "prompts": "."}),
    ("a codec that is not there", ("backbone", "pretrained"), "/dev/zero"),
    ("latents without end", ("data",), {"kind": "latents", "path": "/dev/zero"}),
]
"""Single values of `dcm_digits`, by place; what becomes of them is judged like all else."""

# -- the cases --------------------------------------------------------------------------------------------------------


def _validate(number: int, moves: Random, folder: Path) -> Result:
    name, text = _shipped()[number % len(_shipped())]
    file, more, must = folder / "recipe.yaml", [], ""
    style = number % 5
    written, resolved = _trees(name)
    tree = copy.deepcopy(moves.choice([written, resolved]))
    if style == 0:
        data, must = break_text(_dump(tree) if "extends:" in text else text, moves, folder, number // 5)
        file.write_bytes(data)
    elif style == 1:
        file.write_text(_dump(tree), encoding="utf-8")
        more = ["--set", _setting(tree, moves)]
    else:
        for _ in range(moves.choice([1, 1, 1, 2, 4])):
            break_structure(tree, moves) if style in (2, 3) else change_within(tree, moves)
            if not tree:
                break
        must = must_be_refused(tree)
        file.write_text(_dump(tree), encoding="utf-8", errors="surrogatepass")
    outcome = sound(run_command("validate", "recipe.yaml", *more, folder=folder, seconds=20))
    if (folder / "ran").exists():
        raise Fault("wrong", "a tag in the file was run")
    if outcome.refused:
        return Result("refused")
    if must:
        raise Fault("wrong", f"{name} with {must} is called valid")
    return Result("right")


def _setting(tree: Any, moves: Random) -> str:
    """What somebody may write after --set."""
    path = ".".join(map(str, moves.choice(list(places(tree)))))
    value = moves.choice([*(json.dumps(junk) for junk in JUNK[:40]), "[1,", "{a: 1", "*x", "!!int 3", "'", "a: b: c"])
    return moves.choice([f"{path}={value}", f"{path}.{value}", f"{path}", f"={value}", f"{path}.x={value}"]).replace(
        "\0", ""
    )


def _smoke(number: int, moves: Random, folder: Path) -> Result:
    """A recipe with values changed within the schema, the first that `validate` takes, as a miniature."""
    if number >= RANDOM:
        return _known(number - RANDOM, folder)
    names = [name for name, _ in _shipped() if not name.startswith("ablations/")]
    name = "dcm_digits" if number % 2 else names[number // 2 % len(names)]  # ablations evaluate a lot, and are digits
    file, plugins, written = folder / "recipe.yaml", _plugins(), _trees(name)[0]

    def prepare() -> None:
        from moedistill.errors import UserError
        from moedistill.recipe.loading import load_recipe

        for _ in range(40):
            tree = copy.deepcopy(written)
            said = [change_within(tree, moves, brief=True) for _ in range(moves.choice([1, 2, 3]))]
            file.write_text(f"# {name} with {'; '.join(said)}\n{_dump(tree)}".replace("\0", ""), encoding="utf-8")
            try:
                load_recipe(file, (), plugins)
            except UserError:
                continue
            return
        file.write_text(f"# {name}\n{_dump(written)}", encoding="utf-8")

    outcome = run_command(*SMOKE, folder=folder, seconds=120, prepare=prepare)
    return _judged(outcome, file.read_text(encoding="utf-8").splitlines()[0][:200] if file.exists() else "", folder)


SMOKE = ("run", "recipe.yaml", "--smoke", "--device", "cpu", "--output", "run")
RANDOM = 120


def _known(number: int, folder: Path) -> Result:
    what, path, value = KNOWN[number]
    tree = copy.deepcopy(_trees("dcm_digits")[1])
    put(tree, path, value)
    (folder / "recipe.yaml").write_text(_dump(tree), encoding="utf-8")
    os.mkfifo(folder / "fifo")
    sound(run_command("validate", "recipe.yaml", folder=folder, seconds=30), what)
    result = _judged(run_command(*SMOKE, folder=folder, seconds=60), what, folder)
    if outside := [path for path in folder.parent.iterdir() if "outside" in path.name]:
        raise Fault("wrong", f"{what}: wrote {outside[0]}")
    return result


def _judged(outcome: Outcome, changes: str, folder: Path) -> Result:
    if fault := outcome.fault():
        raise Fault(fault[0], f"{fault[1]} ({changes})")
    rows = lines(folder / "run")
    if outcome.refused:
        if rows and "finite" not in outcome.output:
            raise Fault("lost", f"refused only after training had begun: {outcome.refusal()[:300]} ({changes})")
        if "data are at fault" not in outcome.output:  # which nobody mends here
            follow(outcome, folder, changes)
        return Result("refused")
    if any(isinstance(value, float) and not math.isfinite(value) for row in rows for value in row.values()):
        raise Fault("wrong", f"done, with numbers that are not finite ({changes})")
    return Result("right")


PARTS = (
    Part("recipes", "recipes, validated", 1100, 300, _validate),
    Part("smoke", "recipes, run in miniature", RANDOM + len(KNOWN), 700, _smoke),
)
