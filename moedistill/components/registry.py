"""Which components exist: config classes by registry and name, each from a plugin, imported on first use."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module

from moedistill.errors import suggest

REGISTRIES = ("backbone", "trajectory", "router", "expert", "dataset", "loss", "stage", "metric", "exporter")


@dataclass(frozen=True)
class Entry:
    """One registered component. `target` is its config class, or where that is: `package.module:Class`."""

    registry: str
    name: str
    target: "type | str"
    description: str
    plugin: str


class Components:
    """All components by registry and name.

    Attributes:
        broken: why a plugin could not be loaded, by plugin; errors about unknown names mention them.
    """

    def __init__(self) -> None:
        self.broken: dict[str, str] = {}
        self._entries: dict[str, dict[str, Entry]] = {registry: {} for registry in REGISTRIES}
        self._loaded: dict[tuple[str, str], type] = {}
        self._plugin = "unnamed"

    def register(self, registry: str, name: str, target: "type | str", description: str = "") -> None:
        """Registers a component of the plugin that is being loaded.

        Args:
            registry: one of `REGISTRIES`.
            name: the `kind` under which recipes choose it.
            target: its config dataclass, or `"package.module:Class"`, which is imported on first use.
            description: one line for `moedistill list`.

        Raises:
            ValueError: for an unknown registry, a malformed target, or a name that is taken.
        """
        if registry not in self._entries:
            raise ValueError(f"unknown registry {registry!r}; {suggest(registry, REGISTRIES)}")
        if not isinstance(name, str) or not name:
            raise ValueError(f"the name of a {registry} must be a non-empty string, got {name!r}")
        if not isinstance(target, type) and not (isinstance(target, str) and target.count(":") == 1):
            raise ValueError(f"{registry} {name!r}: target must be a class or 'package.module:Class', got {target!r}")
        taken = self._entries[registry].get(name)
        if taken is not None:
            raise ValueError(
                f"{registry} {name!r} is registered by both {taken.plugin!r} and {self._plugin!r}; rename one of them"
            )
        self._entries[registry][name] = Entry(registry, name, target, description, self._plugin)

    def get(self, registry: str, name: str) -> type:
        """The config class of a component; it is imported on first use.

        Raises:
            ValueError: if the name is unknown (with the nearest match and the names allowed) or its import fails.
        """
        if (registry, name) in self._loaded:
            return self._loaded[registry, name]
        entry = self._entries[registry].get(name)
        if entry is None:
            broken = f"; broken plugins: {', '.join(sorted(self.broken))}" if self.broken else ""
            raise ValueError(f"unknown {registry} {name!r}; {suggest(name, self._entries[registry])}{broken}")
        self._loaded[registry, name] = _load(entry)
        return self._loaded[registry, name]

    def names(self, registry: str) -> list[str]:
        """The names of a registry, sorted."""
        return sorted(self._entries[registry])

    def entries(self, registry: str) -> list[Entry]:
        """The components of a registry, sorted by name; nothing is imported."""
        return [self._entries[registry][name] for name in self.names(registry)]

    def name_of(self, registry: str, cls: type) -> str:
        """The name of a config class, or an empty string if it is registered under none."""
        path = f"{cls.__module__}:{cls.__qualname__}"
        return next((e.name for e in self.entries(registry) if e.target is cls or e.target == path), "")

    def begin(self, plugin: str) -> None:
        """What is registered from now on belongs to `plugin`."""
        self._plugin = plugin

    def withdraw(self, plugin: str, reason: str) -> None:
        """Takes back what a plugin registered, and remembers why it is broken."""
        self.broken[plugin] = reason
        for entry in list(self):
            if entry.plugin == plugin:
                del self._entries[entry.registry][entry.name]

    def __iter__(self) -> Iterator[Entry]:
        return (entry for registry in REGISTRIES for entry in self.entries(registry))


def _load(entry: Entry) -> type:
    what = f"{entry.registry} {entry.name!r} of plugin {entry.plugin!r}"
    cls: object = entry.target
    if isinstance(entry.target, str):
        module, _, attribute = entry.target.partition(":")
        try:
            cls = getattr(import_module(module), attribute)
        except Exception as error:
            message = f"{what} cannot be loaded from {entry.target}: {type(error).__name__}: {error}"
            raise ValueError(message) from error
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls):
        raise ValueError(f"{what} must be a dataclass, but {entry.target} is {cls!r}")
    return cls
