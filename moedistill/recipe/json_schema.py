"""The JSON Schema of a recipe, gathered from the annotations of all config dataclasses."""

import warnings
from typing import Any

from pydantic import TypeAdapter

from moedistill.components.plugins import Plugins, load_plugins
from moedistill.components.registry import REGISTRIES, Components
from moedistill.recipe.keys import Recipe


def json_schema(plugins: Plugins | None = None) -> dict[str, Any]:
    """The JSON Schema of a recipe with all components that can be loaded; for editors."""
    return recipe_schema(Recipe, (plugins or load_plugins()).components)


def recipe_schema(recipe: type, components: Components) -> dict[str, Any]:
    """The schema of the dataclass `recipe`: each registry is a choice of its components by `kind`.

    Components that cannot be loaded are left out.
    """
    definitions: dict[str, Any] = {}
    root = _object_schema(recipe, "recipe", definitions)
    root["properties"]["extends"] = {"type": "string", "description": "a recipe file to start from"}
    # What a recipe extends may bring the required keys.
    root["anyOf"] = [{"required": ["extends"]}, {"required": root.pop("required")}]
    for registry in REGISTRIES:
        choices = []
        for entry in components.entries(registry):
            try:
                cls = components.get(registry, entry.name)
            except ValueError:
                continue
            schema = _object_schema(cls, f"{registry}.{entry.name}", definitions)
            schema["properties"] = {"kind": {"const": entry.name}, **schema.get("properties", {})}
            schema["required"] = ["kind", *schema.get("required", [])]
            if entry.description:
                schema["description"] = entry.description
            definitions[f"{registry}.{entry.name}"] = schema
            choices.append({"$ref": f"#/$defs/{registry}.{entry.name}"})
        definitions[registry] = {"anyOf": choices} if choices else {"not": {}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "$defs": definitions}


def _object_schema(cls: type, prefix: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of one dataclass; what it refers to goes to `definitions` under names that begin with `prefix`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Defaults that are objects are left out of the schema.
        schema = TypeAdapter(cls).json_schema()
    for name, inner in schema.pop("$defs", {}).items():
        definitions[f"{prefix}.{name}"] = _adapt(inner, prefix)
    adapted: dict[str, Any] = _adapt(schema, prefix)
    return adapted


def _adapt(schema: Any, prefix: str) -> Any:
    """Component marks become references, references get the prefix, objects with known keys admit no others."""
    if isinstance(schema, list):
        return [_adapt(item, prefix) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$component" in schema:
        component = {"$ref": f"#/$defs/{schema['$component']}"}
        return {"anyOf": [{"type": "string"}, component]} if "$by_name" in schema else component
    result = {key: _adapt(value, prefix) for key, value in schema.items()}
    if isinstance(result.get("$ref"), str):
        result["$ref"] = result["$ref"].replace("#/$defs/", f"#/$defs/{prefix}.")
    if result.get("type") == "object" and "properties" in result:
        result["additionalProperties"] = False
    return result
