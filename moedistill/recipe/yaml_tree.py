"""Recipes as text: YAML read as plain data, with the line of every key; `extends` and `--set`.

A recipe is data. PyYAML only composes its node tree here; tags, merge keys and duplicate keys are errors, and scalars
follow YAML 1.2 (`1e-5` is a number; `on`, `off`, `yes` and `no` are words), which is what people expect today.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from moedistill.errors import Problem, shorten, suggest
from moedistill.runtime.reading import read_bytes, reason

MAX_BYTES = 256 * 1024
MAX_NODES = 50_000
MAX_DEPTH = 40

_TAG = "tag:yaml.org,2002:"
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  PyYAML's own attribute


for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)


@dataclass
class Node:
    """A value of a recipe and where it stands.

    Attributes:
        value: a scalar, a list of nodes, or nodes by key.
        where: `file:line` of its key, or the `--set` that brought it.
    """

    value: Any
    where: str = ""

    def plain(self) -> Any:
        """The value as plain lists, mappings and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def where_is(self, path: Iterable[str | int]) -> str:
        """Where the value at `path` stands, or the nearest thing around it that exists."""
        node = self
        for step in path:
            child: Node | None = None
            if isinstance(node.value, dict):
                child = node.value.get(step)
            elif isinstance(node.value, list) and isinstance(step, int) and step < len(node.value):
                child = node.value[step]
            if child is None:
                break
            node = child
        return node.where


def dotted(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path))


def read_file(path: Path, problems: list[Problem]) -> Node:
    """Reads a recipe file; what is wrong with it goes to `problems`, and what can be read is returned."""
    try:
        data = read_bytes(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        problems.append(Problem("", f"cannot read {shorten(str(path), 120)} as a recipe: {reason(error)}"))
        return Node({})
    return read_text(data, str(path), problems)


def read_text(data: bytes | str, source: str, problems: list[Problem]) -> Node:
    """Reads a recipe from text; as `read_file`."""
    node = _compose(data, source, problems)
    if node is None:
        return Node({})
    tree = _Reader(source, problems).read(node, source, (), ())
    if isinstance(tree.value, dict):
        return tree
    problems.append(Problem("", f"a recipe is a mapping of keys to values, not {describe(tree.plain())}", source))
    return Node({})


def _compose(data: bytes | str, source: str, problems: list[Problem]) -> yaml.Node | None:
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        node = _composed(text)
    except UnicodeDecodeError as error:
        problems.append(Problem("", f"not a text file: byte {error.start} is not UTF-8", source))
    except yaml.reader.ReaderError as error:
        problems.append(Problem("", f"not a text file: character {error.position} is {error.reason}", source))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = " ".join(part for part in (error.context, error.problem) if part)
        where = f"{source}:{mark.line + 1}" if mark else source
        problems.append(Problem("", f"not valid YAML: {reason}", where))
    except RecursionError:
        problems.append(Problem("", "nested too deeply", source))
    except (ValueError, OverflowError) as error:  # PyYAML on impossible escapes
        problems.append(Problem("", f"not valid YAML: {error}", source))
    else:
        if node is None:
            problems.append(Problem("", "the file is empty; a recipe has at least name, backbone and stages", source))
        return node
    return None


@lru_cache(maxsize=32)
def _composed(text: str) -> yaml.Node | None:
    """PyYAML's nodes, which nobody changes; kept, as many recipes extend the same few, and PyYAML is slow."""
    return yaml.compose(text, Loader=_Loader)


class _Reader:
    """Turns PyYAML's nodes into ours."""

    def __init__(self, source: str, problems: list[Problem]) -> None:
        self.source = source
        self.problems = problems
        self.count = 0

    def read(self, node: yaml.Node, where: str, path: tuple[str | int, ...], above: tuple[int, ...]) -> Node:
        self.count += 1
        if id(node) in above:
            return self.wrong("an alias (*name) that contains itself", where, path)
        if len(above) > MAX_DEPTH:
            return self.wrong("nested too deeply", where, path)
        if self.count > MAX_NODES:
            # Said once: aliases of aliases multiply.
            return self.wrong("too many values", where, path) if self.count == MAX_NODES + 1 else Node(None, where)
        tag = node.tag.removeprefix(_TAG)
        above = (*above, id(node))
        if isinstance(node, yaml.MappingNode) and tag == "map":
            return Node(self.mapping(node, path, above), where)
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            items = [self.read(item, self.line(item), (*path, k), above) for k, item in enumerate(node.value)]
            return Node(items, where)
        if isinstance(node, yaml.ScalarNode) and tag in ("str", "null", "bool", "int", "float"):
            return self.scalar(tag, node.value, where, path)
        shown = f"!!{tag}" if node.tag.startswith(_TAG) else node.tag
        return self.wrong(f"tag {shorten(shown, 60)} is not allowed: a recipe is data", where, path, "remove the tag")

    def mapping(self, node: yaml.MappingNode, path: tuple[str | int, ...], above: tuple[int, ...]) -> dict[str, Node]:
        result: dict[str, Node] = {}
        for key_node, value in node.value:
            where, key = self.line(key_node), key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or not key or _has_surrogate(key):
                self.wrong("a key must be a word", where, path)
            elif key == "<<" and key_node.style is None:
                self.wrong("merge keys (<<) are not allowed", where, path, "write the keys out, or use `extends: FILE`")
            elif key in result:
                first = result[key].where.rpartition(":")[2]
                self.wrong(f"duplicate key {key!r}, first in line {first}", where, (*path, key), "remove one of them")
            else:
                result[key] = self.read(value, where, (*path, key), above)
        return result

    def scalar(self, tag: str, text: str, where: str, path: tuple[str | int, ...]) -> Node:
        if tag == "null":
            return Node(None, where)
        if tag == "bool":
            return Node(text.lower() == "true", where)
        if tag == "str":
            return (
                self.wrong("text holds half a character (a surrogate)", where, path)
                if _has_surrogate(text)
                else (Node(text, where))
            )
        try:
            number = int(text) if tag == "int" else _float(text)
        except ValueError:
            return self.wrong(f"{shorten(text, 40)!r} is not a number", where, path)
        return self.number(number, text, where, path)

    def number(self, number: float, text: str, where: str, path: tuple[str | int, ...]) -> Node:
        """A number, if it is finite and fits into 64 bits: no key of a recipe means anything else."""
        if isinstance(number, float) and not math.isfinite(number):
            return self.wrong(f"{shorten(text, 40)} is not a finite number", where, path)
        if isinstance(number, int) and not -(2**63) <= number < 2**63:
            return self.wrong(f"{shorten(text, 40)} does not fit into 64 bits", where, path)
        return Node(number, where)

    def line(self, node: yaml.Node) -> str:
        return f"{self.source}:{node.start_mark.line + 1}"

    def wrong(self, message: str, where: str, path: tuple[str | int, ...], hint: str = "") -> Node:
        self.problems.append(Problem(dotted(path), message, where, hint))
        return Node(INVALID, where)


class _Invalid:
    """Stands for a value that was reported as a problem when it was read."""

    def __repr__(self) -> str:
        return "an invalid value"


INVALID = _Invalid()


def _float(text: str) -> float:
    return float(re.sub(r"\.(inf|nan)", r"\1", text.lower()))


def reads_as_number(text: str) -> bool:
    """Whether `text` is a finite number in a recipe, where it has no quotes; `nan` and `1_000` are text."""
    numbers = (pattern for name, pattern, _ in _SCALARS if name in ("int", "float"))
    return any(re.fullmatch(pattern, text) for pattern in numbers) and math.isfinite(_float(text))


def _has_surrogate(text: str) -> bool:
    return any(0xD800 <= ord(char) < 0xE000 for char in text)


def from_data(data: Any, problems: list[Problem]) -> Node:
    """A tree of plain Python data: mappings with text keys, lists, tuples, text, numbers, booleans, None."""
    reader = _Reader("", problems)

    def convert(value: Any, path: tuple[str | int, ...]) -> Node:
        reader.count += 1
        if len(path) > MAX_DEPTH:
            return reader.wrong("nested too deeply", "", path)
        if reader.count > MAX_NODES:
            return reader.wrong("too many values", "", path) if reader.count == MAX_NODES + 1 else Node(None)
        if isinstance(value, Mapping):
            return Node({str(key): convert(item, (*path, str(key))) for key, item in value.items()})
        if isinstance(value, list | tuple):
            return Node([convert(item, (*path, k)) for k, item in enumerate(value)])
        if value is None or isinstance(value, bool):
            return Node(value)
        if isinstance(value, str):
            return reader.scalar("str", str(value), "", path)
        if isinstance(value, int | float):
            return reader.number(value, repr(value), "", path)
        rule = "a recipe holds text, numbers, lists and mappings"
        return reader.wrong(f"{shorten(repr(value), 60)} is a {type(value).__name__}; {rule}", "", path)

    return convert(data, ())


def merge(base: Node, child: Node, problems: list[Problem], path: tuple[str, ...] = ()) -> Node:
    """`child` over `base`: mappings are merged key by key, all else is replaced.

    - Where both name a different `kind` the mapping is replaced whole: keys of one component mean nothing to another.
    - `null` in place of a component (a mapping with a `kind`) takes it out. Elsewhere null is a value like any other.
    - A mapping over a list changes the list's items, which are named as in `--set`; the others stay as they are. `null`
      takes an item out. A list in an item's place puts the item there several times, each with the changes of its own.
    - A list over a list replaces it.
    """
    if isinstance(base.value, list) and isinstance(child.value, dict):
        return _change_items(base, child, problems, path)
    if not (isinstance(base.value, dict) and isinstance(child.value, dict)):
        return child
    kinds = [node.value["kind"].value for node in (base, child) if "kind" in node.value]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        return child
    merged = dict(base.value)
    for key, node in child.value.items():
        if key not in merged:
            merged[key] = node
        elif node.value is None and isinstance(merged[key].value, dict) and "kind" in merged[key].value:
            del merged[key]
        else:
            merged[key] = merge(merged[key], node, problems, (*path, key))
    return Node(merged, child.where)


def _change_items(base: Node, child: Node, problems: list[Problem], path: tuple[str, ...]) -> Node:
    """A list with the changes that a mapping names; see `merge`."""
    changed: dict[int, list[Node]] = {}
    for name, change in child.value.items():
        here = (*path, name)
        number = _item(base.value, name, here, change.where, problems)
        if number is None:
            continue
        if number in changed:
            problems.append(Problem(dotted(here), "the same item is named twice", change.where, "join both"))
        several = isinstance(change.value, list) and not isinstance(base.value[number].value, list)
        changes = change.value if several else [] if change.value is None else [change]
        # Copies, so that --set can change one of several.
        changed[number] = [merge(deepcopy(base.value[number]), one, problems, here) for one in changes]
    items = [node for number, item in enumerate(base.value) for node in changed.get(number, [item])]
    return Node(items, child.where)


def apply_override(root: Node, override: str, problems: list[Problem]) -> None:
    """Sets one value: `a.b.c=VALUE`, VALUE in YAML; a list's item is named by its name, its kind or its number."""
    key, equals, text = override.partition("=")
    where = f"--set {shorten(override, 80)}"
    steps = key.strip().split(".")
    if not equals or not all(steps):
        problems.append(Problem("", "must look like a.b.c=value", where))
        return
    if not text.strip():
        problems.append(Problem(key, "no value", where, "write null for none, '\"\"' for empty text"))
        return
    value = _compose(text, where, problems)
    if value is None:
        return
    new = _Reader(where, problems).read(value, where, tuple(steps), ())
    _relabel(new, where)
    if len(steps) > MAX_DEPTH:
        problems.append(Problem(shorten(key, 60), "nested too deeply", where))
        return
    node = root
    for depth, step in enumerate(steps[:-1]):
        child = _child(node, step, tuple(steps[: depth + 1]), where, problems)
        if child is None:
            return
        if child.value is None:
            child.value = {}
        node = child
    last = steps[-1]
    if isinstance(node.value, dict):
        node.value[last] = new
    else:
        item = _child(node, last, tuple(steps), where, problems)
        if item is not None:
            item.value, item.where = new.value, new.where


def _child(node: Node, step: str, path: tuple[str, ...], where: str, problems: list[Problem]) -> Node | None:
    if isinstance(node.value, dict):
        return node.value.setdefault(step, Node({}, where))
    if not isinstance(node.value, list):
        message = f"{dotted(path[:-1])} is {describe(node.plain())} and has no keys"
        problems.append(Problem(dotted(path), message, where))
        return None
    number = _item(node.value, step, path, where, problems)
    item: Node | None = None if number is None else node.value[number]
    return item


def _item(items: list[Node], step: str, path: tuple[str, ...], where: str, problems: list[Problem]) -> int | None:
    """The place of the item that is named by its name, kind or number; None, and a problem, if there is not one."""
    labels = [{key: _text(item, key) for key in ("name", "kind")} for item in items]
    for key in ("name", "kind"):
        found = [number for number, label in enumerate(labels) if label[key] == step]
        if len(found) == 1:
            return found[0]
        if found:
            problems.append(Problem(dotted(path), f"{len(found)} items have the {key} {step!r}", where, "use a number"))
            return None
    if step.isascii() and step.isdigit() and len(step) < 6 and int(step) < len(items):
        return int(step)
    names = [label["name"] or label["kind"] or str(k) for k, label in enumerate(labels)]
    numbers = f" (or 0 to {len(items) - 1})" if items else ""
    message = f"no item {shorten(step, 40)!r}; {suggest(step, names)}{numbers}"
    problems.append(Problem(dotted(path), message, where))
    return None


def _text(node: Node, key: str) -> str | None:
    value = node.value.get(key) if isinstance(node.value, dict) else None
    return value.value if value is not None and isinstance(value.value, str) else None


def _relabel(node: Node, where: str) -> None:
    node.where = where
    children = node.value.values() if isinstance(node.value, dict) else node.value
    for child in children if isinstance(node.value, dict | list) else ():
        _relabel(child, where)


def describe(value: Any) -> str:
    """A value in a message: short, and saying what it is."""
    if isinstance(value, dict):
        return f"a mapping with the keys {shorten(', '.join(value), 60)}" if value else "an empty mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return shorten(repr(value), 60)


# -- writing ----------------------------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """Plain block style; numbers as YAML 1.2 and our reader take them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # What YAML 1.1 takes for text but YAML 1.2 for a number, such as 1e-5, needs quotes too.
    style = "'" if re.fullmatch(r"[-+.0-9].*", text) else None
    if re.search("[\x85\u2028\u2029\ufeff]", text):  # line breaks to YAML: written out, they are read as blanks
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    flow = not any(isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flow)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)


def dump_yaml(data: Mapping[str, Any]) -> str:
    """Plain data as YAML in the order given."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
