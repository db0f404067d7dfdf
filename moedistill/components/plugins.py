"""Plugins: the core's own components, installed packages (entry points of group `moedistill`), and local files.

All come through the same hook. A plugin that cannot be loaded is remembered with its reason and stops no other.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

import pluggy

from moedistill.components import builtin, hookspecs
from moedistill.components.registry import Components
from moedistill.runtime.reading import LARGEST_TEXT, check_file

GROUP = "moedistill"
BUILTIN = "moedistill"

hookimpl = pluggy.HookimplMarker("moedistill")
"""Marks a function of a plugin module as the implementation of the hook of the same name."""


@dataclass
class Plugins:
    """What plugins brought.

    Attributes:
        components: all registered components.
        manager: the pluggy manager; observers of a run are registered on it.
        broken: why a plugin could not be loaded, by plugin name.
        files: the local files among the plugins, by plugin name.
    """

    components: Components
    manager: pluggy.PluginManager
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def hook(self) -> pluggy.HookRelay:
        """Calls a hook of every plugin: `plugins.hook.on_step_end(training=…, metrics=…)`."""
        return self.manager.hook

    @property
    def broken(self) -> dict[str, str]:
        return self.components.broken


def load_plugins(files: Iterable[str | Path] = ()) -> Plugins:
    """Loads the built-ins, every installed plugin, and the local plugin `files`, in this order.

    Never raises for a plugin's sake: see `Plugins.broken`.
    """
    manager = pluggy.PluginManager("moedistill")
    manager.add_hookspecs(hookspecs)
    plugins = Plugins(Components(), manager)
    _add(plugins, BUILTIN, lambda: builtin)
    for entry_point in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        _add(plugins, entry_point.name, entry_point.load)
    for file in dict.fromkeys(map(Path, files)):
        plugins.files[str(file)] = file
        _add(plugins, str(file), lambda file=file: _import_file(file))  # type: ignore[misc]
    return plugins


def _add(plugins: Plugins, name: str, load: Callable[[], object]) -> None:
    """Loads one plugin, registers its hooks and lets it register its components; all of it or nothing."""
    manager, components = plugins.manager, plugins.components
    if manager.has_plugin(name):
        components.broken[f"{name} (the second)"] = "another plugin has this name already; rename its entry point"
        return
    try:
        manager.register(load(), name=name)
        manager.check_pending()  # A hook that nobody calls is a misspelt one.
        others = [plugin for other, plugin in manager.list_name_plugin() if other != name]
        components.begin(name)
        manager.subset_hook_caller("register_components", others)(components=components)
    except (Exception, SystemExit) as error:
        if manager.has_plugin(name):
            manager.unregister(name=name)
        components.withdraw(name, f"{type(error).__name__}: {error}")


LOCAL = "moedistill_local_"
"""Begins the module name of a local file."""


def plugin_of(module: str) -> str:
    """The package that a module is of; of a local file's the file's name."""
    root = module.partition(".")[0]
    return f"{root.removeprefix(LOCAL)}.py" if root.startswith(LOCAL) else root


def _import_file(file: Path) -> ModuleType:
    name = f"{LOCAL}{file.stem}"
    check_file(file, LARGEST_TEXT)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    # Annotations of its dataclasses are looked up there.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
