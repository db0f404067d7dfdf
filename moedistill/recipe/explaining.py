"""What a component's keys mean, in words, from its config class alone: what `moedistill list KIND NAME` prints."""

import dataclasses
import inspect
import json
import re
import textwrap
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from moedistill.components.fields import FLOAT32_MAX, MOST, Component
from moedistill.recipe.building import aliases, field_types, to_plain

WIDTH = 80
_BOUNDS = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most", "multiple_of": "a multiple of"}


def explain(cls: type, description: str = "") -> list[str]:
    """What a component is, then its keys: each with type, default and meaning; as lines of at most `WIDTH` characters.

    Args:
        cls: a component's config class.
        description: taken where the class has no docstring.
    """
    lines = [line for part in _summary(cls) or [description] for line in [*_wrapped(part, 2), ""]]
    return lines + (_keys(cls, {}, 2) or ["  It has no keys."])


def outline(recipe: Mapping[str, Any]) -> list[str]:
    """What a resolved recipe is for, its parts by their kinds, and its stages."""
    lines = [*_wrapped(recipe["description"], 2), ""]
    lines += [
        f"  {name}: {recipe[name]['kind']}" for name in ("backbone", "trajectory", "router", "data") if recipe[name]
    ]
    experts = ", ".join(f"{name} ({one['kind']})" for name, one in recipe["experts"].items())
    lines += [*(_wrapped(f"experts: {experts}", 2, hanging=2) if experts else []), "  stages:"]
    for stage in recipe["stages"]:
        what = f"{stage['name']}: {stage['kind']}"
        if {"expert", "steps"} <= stage.keys():
            what += f" of expert {stage['expert']}, {stage['steps']} steps"
        for listed in ("losses", "metrics"):
            if stage.get(listed):
                what += f", {listed} {', '.join(one['kind'] for one in stage[listed])}"
        lines += _wrapped(what, 4, hanging=2)
    return lines


def key_texts(cls: type) -> dict[str, str]:
    """By key, what the `Args` of a config class or of those it derives from say of it; empty where none does."""
    said: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        said |= _args(owner)
    return {key: said.get(key) or said.get(field.name, "") for key, field in aliases(cls).items() if field.init}


def _keys(cls: type, given: Mapping[str, Any], indent: int, above: tuple[type, ...] = ()) -> list[str]:
    """The keys of a dataclass; what is `given` for some, by field name, takes the place of their own defaults."""
    lines = []
    fields, hints = aliases(cls), field_types(cls)
    for key, text in key_texts(cls).items():
        default = given.get(fields[key].name, _default(fields[key]))
        below = vars(default) if dataclasses.is_dataclass(default) else {}  # shown with the keys inside
        value = "" if below else f"; {_in_yaml(default)}"
        lines += _wrapped(f"{key}: {in_words(hints[key])}{value}", indent, hanging=2)
        lines += _wrapped(text, indent + 4)
        for inner in _dataclasses_in(hints[key]):
            if inner not in above:
                about = " ".join(_summary(inner)[:1])
                lines += [] if about.lower() in text.lower() else _wrapped(about, indent + 4)
                lines += _keys(inner, below, indent + 4, (*above, cls, inner))
    return lines


def in_words(hint: Any) -> str:
    """An annotation for people: `a number, from 0 to 1`, `one of a, b`, `a list, not empty; each text`."""
    if get_origin(hint) is Annotated:
        base, *marks = get_args(hint)
        for mark in marks:
            if isinstance(mark, Component):
                return f"a {mark.registry}, by its kind (see moedistill list {mark.registry})"
        words, semicolon, items = in_words(base).partition(";")
        return ", ".join([words, *_bounds(marks)]) + semicolon + items
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"{'one of ' if len(args) > 1 else ''}{', '.join(map(str, args))}"
    if origin in (Union, types.UnionType):
        arms = [in_words(arm) for arm in args if arm is not type(None)]
        return ", or ".join([*arms, *(["null"] if type(None) in args else [])])
    if origin is tuple and Ellipsis not in args:
        return f"a list of {len(args)}: {'; '.join(map(in_words, args))}"
    if origin in (list, tuple):
        return f"a list; each {in_words(args[0])}"
    if origin is dict:
        return f"a mapping of names; each value {in_words(args[1])}"
    if dataclasses.is_dataclass(hint):
        return "a mapping"
    plain = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a mapping",
    }
    return plain.get(hint, "any value")


def _bounds(marks: list[Any]) -> list[str]:
    limits = {name: getattr(mark, name) for mark in marks for name in _BOUNDS if getattr(mark, name, None) is not None}
    limits = {name: limit for name, limit in limits.items() if limit not in (MOST, FLOAT32_MAX)}  # which say nothing
    if limits.keys() == {"ge", "le"}:
        return [f"from {limits['ge']:g} to {limits['le']:g}"]
    bounds = [f"{_BOUNDS[name]} {limit:g}" for name, limit in limits.items()]
    return bounds + ["not empty" for mark in marks if getattr(mark, "min_length", 0)]


def _dataclasses_in(hint: Any) -> list[type]:
    """Those whose keys stand inside; components are explained by themselves."""
    base, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if any(isinstance(mark, Component) for mark in marks) or get_origin(base) is Literal:
        return []
    if isinstance(base, type) and dataclasses.is_dataclass(base):
        return [base]
    return [found for arg in get_args(base) for found in _dataclasses_in(arg)]


def _default(field: "dataclasses.Field[Any]") -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _in_yaml(default: Any) -> str:
    if default is dataclasses.MISSING:
        return "required"
    plain = to_plain(default)
    return f"default {plain if isinstance(plain, str) and plain else json.dumps(plain, ensure_ascii=False)}"


def _docstring(cls: type) -> str:
    """As written; the signature that a dataclass without one gets is none."""
    text = cls.__dict__.get("__doc__") or ""
    return "" if text.startswith(f"{cls.__name__}(") else inspect.cleandoc(text)


def _summary(cls: type) -> list[str]:
    """The paragraphs before the docstring's first section."""
    text = re.split(r"^\w+:$", _docstring(cls), maxsplit=1, flags=re.MULTILINE)[0]
    return [" ".join(part.split()) for part in text.strip().split("\n\n") if part]


def _args(cls: type) -> dict[str, str]:
    """The entries of the docstring's `Args`, by name; `a, b: text` is an entry of both."""
    section = re.search(r"^Args:\n((?:[ ].*\n?|\n)*)", _docstring(cls), flags=re.MULTILINE)
    entries = re.split(r"^ {4}(?=\S)", section[1], flags=re.MULTILINE) if section else []
    found = {}
    for entry in entries:
        names, colon, text = entry.partition(":")
        for name in names.split(",") if colon else ():
            found[name.strip()] = " ".join(text.split())
    return found


def _wrapped(text: str, indent: int, hanging: int = 0) -> list[str]:
    first, other = " " * indent, " " * (indent + hanging)
    text = text.replace("`", "")
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=other, break_on_hyphens=False)
