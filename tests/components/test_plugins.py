"""Plugins: a stranger's package, local files, and plugins that are broken in every way."""

import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from moedistill import cli
from moedistill.components import hookspecs
from moedistill.components.plugins import BUILTIN, load_plugins
from moedistill.components.registry import REGISTRIES, Components
from moedistill.recipe.loading import load_recipe

STRANGER = '''
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from moedistill import hookimpl
from moedistill import PositiveFloat
from moedistill.losses import Loss, LossConfig
from moedistill import RouterConfig, TimestepRouter


class Power(Loss):
    def __init__(self, exponent):
        self.exponent = exponent

    def __call__(self, tensors):
        return (tensors.difference.float().abs() ** self.exponent).mean()


@dataclass(kw_only=True)
class PowerConfig(LossConfig):
    """Mean of |difference| to a power."""

    exponent: Annotated[PositiveFloat, Field(alias="to")] = 2.0

    def build(self, layout):
        return Power(self.exponent)


@dataclass(kw_only=True)
class HalvesConfig(RouterConfig):
    """Two experts, parted in the middle of the trajectory."""

    experts: list[str]

    def build(self, trajectory):
        return TimestepRouter.from_points(trajectory, self.experts, [trajectory.num_steps // 2])
'''
STRANGER_PLUGIN = """
from moedistill import hookimpl

@hookimpl
def register_components(components):
    components.register("loss", "power", "stranger.components:PowerConfig", "a power of the difference")
    components.register("router", "halves", "stranger.components:HalvesConfig", "two halves")
"""
PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "stranger"
version = "1.0"

[project.entry-points.moedistill]
stranger = "stranger.plugin"
crashing = "stranger.crashing"
"""
RECIPE = """
name: strange
backbone: {kind: digits, pretrained: null}
router: {kind: halves, experts: [high, low]}
experts: {high: {kind: full}, low: {kind: full}}
data: {kind: digits}
stages:
  - {name: high, kind: consistency, expert: high, steps: 3, losses: [{kind: power, to: 1.5}]}
"""
USE = """
import torch
from moedistill import load_recipe
from moedistill.losses import StepTensors
from moedistill import Trajectory
import sys
recipe = load_recipe(sys.argv[1])
router = recipe.router.build(Trajectory.flow_matching(10, 3.0))
x = torch.full((1, 1, 1, 1, 1), 4.0)
loss = recipe.stages[0].losses[0].build(None)
print(router.expert_at(1.0), router.expert_at(0.1), float(loss(StepTensors(x, x, x, torch.ones(1), None))))
"""


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A package with an entry point of its own, installed into a folder; and a second plugin that raises on import."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    package = source / "stranger"
    package.mkdir()
    (source / "pyproject.toml").write_text(PYPROJECT)
    (package / "__init__.py").write_text("")
    (package / "components.py").write_text(STRANGER)
    (package / "plugin.py").write_text(STRANGER_PLUGIN)
    (package / "crashing.py").write_text("raise RuntimeError('no such accelerator')")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--disable-pip-version-check", "--target", target, source], check=True, timeout=120)
    return target


def python(stranger: Path, *args: object) -> str:
    path = os.pathsep.join(filter(None, [str(stranger), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *map(str, args)], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_strangers_components_are_used_by_name(stranger, tmp_path):
    recipe = tmp_path / "strange.yaml"
    recipe.write_text(RECIPE)
    # In one process: `moedistill list`, then the recipe, then what it builds.
    listed = python(stranger, "-m", "moedistill.cli", "list")
    assert "power" in listed
    assert ["power", "stranger", "a", "power"] in [line.split()[:4] for line in listed.splitlines()]
    # The broken one is reported, and stopped nothing.
    assert "crashing: RuntimeError: no such accelerator" in listed
    assert "huber" in listed
    assert python(stranger, "-c", USE, recipe) == "high low 8.0\n"


def test_builtins_come_through_the_hook():
    plugins = load_plugins()
    assert plugins.components.get("loss", "huber").__name__ == "HuberConfig"
    owners = {entry.plugin for entry in plugins.components}
    assert {BUILTIN, "moedistill_digits"} <= owners
    for entry in plugins.components:
        assert entry.description, f"{entry.registry} {entry.name} has no description"


@pytest.mark.parametrize("registry", REGISTRIES)
def test_every_registered_component_can_be_loaded(registry):
    components = load_plugins().components
    for entry in components.entries(registry):
        components.get(registry, entry.name)


def test_first_party_plugins_work():
    assert load_plugins().broken == {}


def plugin_file(folder: Path, text: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text("from moedistill import hookimpl\n" + text)
    return path


REGISTER = (
    "@hookimpl\ndef register_components(components):\n    components.register('loss', {name!r}, {target!r}, 'd')\n"
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("import no_such_package", "ModuleNotFoundError"),
        ("def (", "SyntaxError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("@hookimpl\ndef on_step_ended(training): ...", "on_step_ended"),  # a misspelt hook
        ("@hookimpl\ndef on_step_end(training, metric): ...", "metric"),  # a misspelt argument
        (REGISTER.format(name="huber", target="a:B"), "registered by both 'moedistill' and"),
        (REGISTER.format(name="mine", target="a.b"), "package.module:Class"),
        (REGISTER.replace("'loss'", "'lose'").format(name="mine", target="a:B"), "did you mean 'loss'"),
        (REGISTER.format(name="mine", target="a:B") + "    raise KeyError('late')", "KeyError"),
    ],
)
def test_a_broken_plugin_stops_nobody(tmp_path, text, reason):
    broken = plugin_file(tmp_path, text)
    fine = plugin_file(tmp_path, REGISTER.format(name="fine", target="a:B"), "fine.py")
    plugins = load_plugins([broken, fine])
    assert list(plugins.broken) == [str(broken)]
    assert reason in plugins.broken[str(broken)]
    assert {"huber", "fine"} <= set(plugins.components.names("loss"))
    assert "mine" not in plugins.components.names("loss")  # nothing of it stays
    assert not plugins.manager.has_plugin(str(broken))
    with pytest.raises(ValueError, match=r"broken plugins: .*mine\.py"):
        plugins.components.get("loss", "nothing")


def test_two_plugins_with_one_name(tmp_path):
    first = plugin_file(tmp_path, REGISTER.format(name="mine", target="a:First"), "first.py")
    second = plugin_file(tmp_path, REGISTER.format(name="mine", target="a:Second"), "second.py")
    plugins = load_plugins([first, second])
    assert list(plugins.broken) == [str(second)]
    assert str(first) in plugins.broken[str(second)]
    assert plugins.components.entries("loss")[-1].target != "a:Second"
    [entry] = [entry for entry in plugins.components.entries("loss") if entry.name == "mine"]
    assert entry.target == "a:First"


def test_a_broken_entry_point_stops_nobody(monkeypatch, tmp_path):
    points = [EntryPoint("bad", "no_such_module", "moedistill"), EntryPoint("odd", "math:nothing", "moedistill")]
    points += [EntryPoint("moedistill", "math", "moedistill")]
    monkeypatch.setattr("moedistill.components.plugins.entry_points", lambda group: points)
    plugins = load_plugins()
    assert set(plugins.broken) == {"bad", "odd", "moedistill (the second)"}
    assert "huber" in plugins.components.names("loss")


def test_a_local_file_gives_components(tmp_path):
    text = (
        "from dataclasses import dataclass\nfrom moedistill.losses import LossConfig\n"
        "@dataclass(kw_only=True)\nclass Mine(LossConfig):\n    'L.'\n    size: 'int' = 3\n"
        "    def build(self, layout): ...\n"
        "@hookimpl\ndef register_components(components):\n    components.register('loss', 'mine', Mine, 'd')\n"
    )
    plugins = load_plugins([plugin_file(tmp_path, text)])
    source = RECIPE.replace("kind: power, to: 1.5", "kind: mine, size: 4").replace("kind: halves", "kind: timestep")
    path = tmp_path / "recipe.yaml"
    path.write_text(source.replace("[high, low]", "[high, low], boundaries: [{point: 20}]"))
    recipe = load_recipe(path, plugins=plugins)
    assert recipe.stages[0].losses[0].size == 4


def test_a_file_that_was_asked_for_must_load(tmp_path, capsys):
    broken = plugin_file(tmp_path, "raise RuntimeError('boom')")
    with pytest.raises(SystemExit) as stop:
        cli.main(["schema", "-p", str(broken)])
    assert stop.value.code == 2
    assert "RuntimeError: boom" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["list", "-p", str(broken)])
    assert stop.value.code == 0
    assert "RuntimeError: boom" in capsys.readouterr().out


def test_hooks_reach_their_plugins(tmp_path):
    text = "calls = []\n@hookimpl\ndef on_step_end(training, metrics):\n    calls.append((training, metrics))\n"
    plugins = load_plugins([plugin_file(tmp_path, text)])
    plugins.hook.on_step_end(training="the stage", metrics={"loss": 1.0})
    module = plugins.manager.get_plugin(str(tmp_path / "mine.py"))
    assert module.calls == [("the stage", {"loss": 1.0})]


def test_every_hook_is_documented():
    hooks = [value for name, value in vars(hookspecs).items() if hasattr(value, "moedistill_spec")]
    assert {hook.__name__ for hook in hooks} == {
        "register_components", "on_stage_start", "on_step_end", "on_checkpoint", "on_preview",
        "on_stage_end",
    }  # fmt: skip
    assert all(hook.__doc__ for hook in hooks)


def test_unknown_names():
    components = Components()
    components.begin("test")
    components.register("loss", "huber", dict)
    with pytest.raises(ValueError, match="unknown loss 'hubr'; did you mean 'huber'"):
        components.get("loss", "hubr")
    with pytest.raises(ValueError, match="must be a dataclass"):
        components.get("loss", "huber")
    with pytest.raises(ValueError, match="non-empty string"):
        components.register("loss", "", dict)
