"""From plain data to config objects: every dataclass is checked against its own annotations, all problems at once.

Components (fields marked with `fields.Component`) are built first, innermost first; then the mapping around them is
checked by pydantic with each component standing for itself. What failed leaves a `Partial` behind, so that everything
else, and the rules between fields, can still be checked in the same go.
"""

import dataclasses
import json
import types
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo

from moedistill.components.fields import Component
from moedistill.components.registry import Components
from moedistill.errors import Problem, nearest, shorten, suggest
from moedistill.recipe.yaml_tree import INVALID, Node, describe, dotted, reads_as_number

Path = tuple[str | int, ...]


class _Failed:
    """Stands for a value that failed; so does everything inside it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "FAILED"


FAILED: Any = _Failed()


class Partial:
    """What could be read of a dataclass that failed as a whole: good fields and class attributes; others are FAILED."""

    def __init__(self, cls: type, values: Mapping[str, Any]) -> None:
        self._cls = cls
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in {field.name for field in dataclasses.fields(self._cls)}:
            return FAILED
        value = getattr(self._cls, name)
        return FAILED if callable(value) or isinstance(value, property) else value


def failed(value: Any) -> bool:
    """Whether `value`, or a part of it, could not be read."""
    return value is FAILED or isinstance(value, Partial)


class Builder:
    """Builds config objects from a tree of plain data and collects what is wrong with it.

    Attributes:
        problems: at most one per path.
    """

    def __init__(self, components: Components, root: Node) -> None:
        self.components = components
        self.root = root
        self.problems: dict[str, Problem] = {}
        self._table: list[Any] = []

    def problem(self, path: Path, message: str, hint: str = "") -> None:
        key = dotted(path)
        self.problems.setdefault(key, Problem(key, message, self.root.where_is(path), hint))

    def component(self, registry: str, raw: Any, path: Path) -> Any:
        """The config object of a component mapping, or what is left of it: a `Partial` or FAILED."""
        if raw is INVALID:
            return FAILED
        if not isinstance(raw, dict):
            names = self.components.names(registry)
            example = raw if isinstance(raw, str) and raw in names else nearest(str(raw), names)
            hint = f"write {{kind: {example}}}" if example else f"one of: {shorten(', '.join(names), 300)}"
            self.problem(path, f"{describe(raw)} is not a {registry}: it must be a mapping with a kind", hint)
            return FAILED
        name = raw.get("kind")
        if name is INVALID:
            return FAILED
        if not isinstance(name, str):
            what = "the key 'kind' is missing" if name is None else f"kind must be a name, not {describe(name)}"
            known = ", ".join(self.components.names(registry))
            self.problem((*path, "kind"), what, f"{registry} kinds: {shorten(known, 300) or 'none'}")
            return FAILED
        try:
            cls = self.components.get(registry, name)
        except ValueError as error:
            self.problem((*path, "kind"), str(error))
            return FAILED
        config = self.build(cls, {key: value for key, value in raw.items() if key != "kind"}, path)
        if not failed(config):
            _set_kind(config, name)
        return config

    def build(self, cls: type, raw: Any, path: Path) -> Any:
        """An object of the dataclass `cls`, or the `Partial` that is left of it."""
        try:
            adapter, hints = _adapter(cls), field_types(cls)
        except (PydanticUserError, NameError, TypeError) as error:
            self.problem(path, f"the fields of {cls.__name__} cannot be checked: {shorten(str(error), 200)}")
            return FAILED
        failures = len([value for value in self._table if failed(value)])
        ready = {
            key: self._insert(hints[key], value, (*path, key)) if key in hints else value for key, value in raw.items()
        }
        broken = failures < len([value for value in self._table if failed(value)]) or _has_invalid(raw)
        try:
            config = self._validate(adapter, ready)
        except ValidationError as error:
            for problem in _translate(cls, raw, error):
                # A rule between fields says nothing where one of the fields is not there.
                if not (broken and problem.between_fields):
                    self.problem((*path, *problem.path), problem.message, problem.hint)
        except Exception:
            if not broken:
                raise
        else:
            if not broken:
                self._name_defaults(config)
                return config
        return Partial(cls, self._good_fields(cls, hints, ready))

    def _validate(self, adapter: "TypeAdapter[Any]", value: Any) -> Any:
        # JSON, because strict checks of Python data would refuse a list for a tuple and a mapping for a dataclass.
        text = json.dumps(value, default=lambda _: None)
        return adapter.validate_json(text, strict=True, extra="forbid", by_alias=True, context=self._table)

    def _good_fields(self, cls: type, hints: Mapping[str, Any], ready: Mapping[str, Any]) -> dict[str, Any]:
        values = {}
        for key, field in aliases(cls).items():
            if key in ready:
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # An alias means nothing to a field that stands alone.
                        values[field.name] = self._validate(TypeAdapter(hints[key]), ready[key])
                except Exception:
                    values[field.name] = FAILED
            else:
                values[field.name] = _default(field)
        return values

    def _insert(self, hint: Any, raw: Any, path: Path) -> Any:
        """`raw` with every component in it built, and replaced by its place in the table."""
        if not _has_component(hint):
            return raw
        base, mark = _unwrap(hint)
        if mark is not None:
            if raw is None and type(None) in get_args(base):
                return None
            if mark.by_name and isinstance(raw, str):
                raw = {"kind": raw}
            self._table.append(self.component(mark.registry, raw, path))
            return {"$component": len(self._table) - 1}
        origin, args = get_origin(base), get_args(base)
        if origin in (Union, types.UnionType):
            arms = [arm for arm in args if _has_component(arm)]
            simple = len(args) - len(arms) > (type(None) in args)
            if (raw is None and type(None) in args) or (simple and not isinstance(raw, dict | list)):
                return raw
            return self._insert(arms[0], raw, path)
        if isinstance(raw, list) and args:
            return [self._insert(args[0], item, (*path, k)) for k, item in enumerate(raw)]
        if isinstance(raw, dict) and dataclasses.is_dataclass(base):
            hints = field_types(base)  # type: ignore[arg-type]
            return {key: self._insert(hints[key], v, (*path, key)) if key in hints else v for key, v in raw.items()}
        if isinstance(raw, dict) and len(args) == 2:
            return {key: self._insert(args[1], value, (*path, key)) for key, value in raw.items()}
        return raw

    def _name_defaults(self, config: Any) -> None:
        """Gives components that came from a field's default their `kind`."""
        for field, hint in zip(dataclasses.fields(config), field_types(type(config)).values(), strict=True):
            _, mark = _unwrap(hint)
            value = getattr(config, field.name)
            if mark is not None and value is not None and not failed(value) and not value.kind:
                _set_kind(value, self.components.name_of(mark.registry, type(value)))


def to_plain(value: Any) -> Any:
    """A config object as the plain data of a recipe: `kind` first, keys as a recipe writes them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = getattr(value, "kind", "")
        keys = {key: to_plain(getattr(value, field.name)) for key, field in aliases(type(value)).items() if field.init}
        return {"kind": kind, **keys} if kind else keys
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def _set_kind(config: Any, name: str) -> None:
    object.__setattr__(config, "kind", name)  # Also where the dataclass is frozen.


@cache
def _adapter(cls: type) -> "TypeAdapter[Any]":
    return TypeAdapter(cls)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


@cache
def aliases(cls: type) -> "dict[str, dataclasses.Field[Any]]":
    """The fields of a dataclass by the keys that a recipe uses for them."""
    return {_alias(_hints(cls)[field.name]) or field.name: field for field in dataclasses.fields(cls)}


def field_types(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields by the keys that a recipe uses for them."""
    return {key: _hints(cls)[field.name] for key, field in aliases(cls).items()}


def _alias(hint: Any) -> str | None:
    metadata = getattr(hint, "__metadata__", ())
    return next((item.alias for item in metadata if isinstance(item, FieldInfo) and item.alias), None)


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else FAILED


def _unwrap(hint: Any) -> tuple[Any, Component | None]:
    """An annotation without its metadata, and the mark if it is of a component."""
    if get_origin(hint) is not Annotated:
        return hint, None
    base, *metadata = get_args(hint)
    return base, next((item for item in metadata if isinstance(item, Component)), None)


def _has_component(hint: Any, above: tuple[Any, ...] = ()) -> bool:
    base, mark = _unwrap(hint)
    if mark is not None:
        return True
    if dataclasses.is_dataclass(base):
        inner = () if base in above else tuple(field_types(base).values())  # type: ignore[arg-type]
    else:
        inner = get_args(base) if get_origin(base) is not typing.Literal else ()
    return any(_has_component(arg, (*above, base)) for arg in inner)


def _has_invalid(raw: Any) -> bool:
    if isinstance(raw, dict):
        return any(map(_has_invalid, raw.values()))
    return any(map(_has_invalid, raw)) if isinstance(raw, list) else raw is INVALID


@dataclasses.dataclass(frozen=True)
class _Translated:
    path: Path
    message: str
    hint: str = ""
    depth: int = 0
    between_fields: bool = False


def _translate(cls: type, raw: Any, error: ValidationError) -> list[_Translated]:
    """What pydantic found, in our words; the alternatives of a union become one problem."""
    groups: dict[Path, list[_Translated]] = {}
    for item in error.errors(include_url=False):
        path, union_at = _real_path(raw, item["loc"], missing=item["type"] == "missing")
        translated = dataclasses.replace(_in_words(cls, raw, dict(item), path), path=path, depth=len(path))
        groups.setdefault(path if union_at is None else union_at, []).append(translated)
    return [_joined(group) for group in groups.values()] if groups else []


def _joined(group: Sequence[_Translated]) -> _Translated:
    """Of several complaints at one place the most specific: that of the alternative which got furthest."""
    deepest = max(item.depth for item in group)
    best = [item for item in group if item.depth == deepest]
    messages = list(dict.fromkeys(item.message for item in best))
    return dataclasses.replace(best[0], message="; or ".join(messages))


def _real_path(raw: Any, loc: Sequence[str | int], *, missing: bool) -> tuple[Path, Path | None]:
    """`loc` without pydantic's names of union members, and where the outermost union stands."""
    path: list[str | int] = []
    union_at: Path | None = None
    for k, step in enumerate(loc):
        if isinstance(raw, dict) and step in raw:
            raw = raw[step]
        elif isinstance(raw, list) and isinstance(step, int):
            raw = raw[step] if step < len(raw) else None
        elif not (missing and k == len(loc) - 1):
            union_at = tuple(path) if union_at is None else union_at
            continue
        path.append(step)
    return tuple(path), union_at


_WANTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing_size": "an integer",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "dataclass_type": "a mapping",
    "none_required": "null",
}
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
    "multiple_of": ("multiple_of", "a multiple of"),
}


def _in_words(cls: type, raw: Any, item: dict[str, Any], path: Path) -> _Translated:
    """The message of one pydantic error; `raw` is the mapping that was checked against `cls`."""
    kind, context = item["type"], item.get("ctx") or {}
    value = _at(raw, path)
    shown = describe(value)
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return _unknown_key(cls, path)
    if kind == "missing":
        if isinstance(path[-1], int):
            return _Translated(path, f"item {path[-1]} is missing: the list is too short")
        return _Translated(path, f"the key {path[-1]!r} is missing")
    if kind in _WANTED:
        return _Translated(path, f"must be {_WANTED[kind]}, not {shown}", _type_hint(_WANTED[kind], value))
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return _Translated(path, f"must be {words} {context[key]:g}, not {shown}")
    if kind == "literal_error":
        names = [str(name) for name in _literals(cls, path)] or [str(context["expected"])]
        return _Translated(path, f"{shown} is not known; {suggest(str(value), names)}")
    if kind == "string_too_short":
        return _Translated(path, "must not be empty")
    if kind in ("too_short", "too_long"):
        limit = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
        return _Translated(path, f"must hold {limit} item(s), not {context.get('actual_length')}")
    if kind == "value_error":
        inner = (not path and dataclasses.is_dataclass(cls)) or isinstance(value, dict)
        return _Translated(path, str(context["error"]), between_fields=bool(inner))
    return _Translated(path, f"{item['msg']}, not {shown}")


def _unknown_key(cls: type, path: Path) -> _Translated:
    owner = _owner(cls, path[:-1])
    key = str(path[-1])
    allowed = list(aliases(owner)) if owner else []
    hint = ""
    if owner is not None and key in (renamed := getattr(owner, "renamed", {})):
        return _Translated(path, f"the key {key!r} is called {renamed[key]!r} now", f"write {renamed[key]}:")
    if owner is not None and nearest(key, allowed) is None:
        inside = [outer for outer, hint_ in field_types(owner).items() if key in _keys_inside(hint_)]
        hint = f"{key!r} belongs inside {inside[0]!r}" if inside else ""
    return _Translated(path, f"unknown key {shorten(key, 60)!r}; {suggest(key, allowed)}", hint)


def _keys_inside(hint: Any) -> set[str]:
    base, _ = _unwrap(hint)
    if dataclasses.is_dataclass(base):
        return set(aliases(base))  # type: ignore[arg-type]
    return set().union(*(_keys_inside(arg) for arg in get_args(base) if get_origin(base) is not typing.Literal))


def _type_hint(wanted: str, value: Any) -> str:
    if wanted == "an integer" and isinstance(value, float):
        return (
            f"write {value:.0f}"
            if value.is_integer() and abs(value) < 2**63
            else "a number with a fraction cannot be used"
        )
    if wanted == "text" and isinstance(value, int | float) and not isinstance(value, bool):
        return f"YAML reads this as a number; put it in quotes: '{value}'"
    if wanted == "text" and isinstance(value, bool):
        return f"put it in quotes: '{str(value).lower()}'"
    if wanted in ("an integer", "a number") and isinstance(value, str) and reads_as_number(value):
        return f"leave the quotes away: {shorten(value, 40)}"
    if wanted == "true or false" and isinstance(value, str) and value.lower() in ("on", "yes", "off", "no"):
        return f"write {'true' if value.lower() in ('on', 'yes') else 'false'}"
    if wanted == "a list" and isinstance(value, str | int | float):
        return f"write [{shorten(str(value), 40)}]"
    if wanted == "a list" and isinstance(value, dict):
        return "begin every item with a dash: `- name: …`"
    return ""


def _at(raw: Any, path: Path) -> Any:
    for step in path:
        try:
            raw = raw[step]
        except (KeyError, IndexError, TypeError):
            return None
    return raw


def _owner(cls: Any, path: Path) -> type | None:
    """The dataclass whose keys stand at `path` below `cls`."""
    hint: Any = cls
    for step in path:
        hint = _below(hint, step)
    return _dataclass_in(hint)


def _literals(cls: type, path: Path) -> list[Any]:
    hint: Any = cls
    for step in path:
        hint = _below(hint, step)
    return _literals_in(hint)


def _literals_in(hint: Any) -> list[Any]:
    base, _ = _unwrap(hint)
    if get_origin(base) is typing.Literal:
        return list(get_args(base))
    if get_origin(base) in (Union, types.UnionType):
        return [value for arm in get_args(base) for value in _literals_in(arm)]
    return []


def _dataclass_in(hint: Any) -> type | None:
    base, _ = _unwrap(hint)
    if isinstance(base, type) and dataclasses.is_dataclass(base):
        return base
    if get_origin(base) in (Union, types.UnionType):
        return next((found for arm in get_args(base) if (found := _dataclass_in(arm)) is not None), None)
    return None


def _below(hint: Any, step: str | int) -> Any:
    """The annotation of what stands under `step` in a value of annotation `hint`."""
    base, _ = _unwrap(hint)
    owner = _dataclass_in(base)
    if owner is not None and isinstance(step, str):
        return field_types(owner).get(step)
    if get_origin(base) in (Union, types.UnionType):
        found = (_below(arm, step) for arm in get_args(base))
        return next((inner for inner in found if inner is not None), None)
    args = get_args(base)
    if not args or get_origin(base) is typing.Literal:
        return None
    if isinstance(step, str):
        return args[1] if len(args) == 2 and issubclass(get_origin(base) or object, Mapping) else None
    return args[step] if get_origin(base) is tuple and step < len(args) and args[-1] is not Ellipsis else args[0]
