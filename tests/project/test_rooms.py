"""Rooms lie in floors and imports point down, without a circle; light modules stay light, and `--help` is instant."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moedistill

PACKAGE = Path(moedistill.__file__).parent
ROOT = PACKAGE.parent
PLUGINS = ROOT / "plugins"
HEAVY = {"diffusers", "peft", "accelerate", "transformers"}

FLOORS = [
    {"errors"},
    {"media", "plotting", "runtime"},
    {"components"},
    {"flow", "metrics"},
    {"model"},
    {"losses", "data"},
    {"recipe"},
    {"stages"},
    {"runs"},
    {"integrations", "exporters"},
    {"analysis", "importing", "testing"},
    {"cli"},
    {"__main__"},
]
"""From the ground. A room imports from the floors below its own; rooms of one floor do not import each other."""

HOMES = {
    "accelerate": {"stages", "runs"},
    "peft": {"model"},
    "diffusers": {"integrations", "exporters"},
    "transformers": {"integrations"},
}
"""What the core's few heavy dependencies are for."""


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {dotted(path): path for path in FILES}
"""All modules of the core by their name below `moedistill`; the package itself is the empty name."""


def imported(path: Path) -> set[str]:
    """Dotted names of everything imported anywhere in a file: in functions and for type checking too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide where things come from"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_modules(path: Path) -> set[str]:
    """The core's modules among them; a name that a package's face hands on counts as that package."""
    found = set()
    for name in imported(path):
        if name.split(".")[0] != "moedistill":
            continue
        below = name.removeprefix("moedistill").removeprefix(".")
        while below and below not in MODULES:
            below = below.rpartition(".")[0]
        found.add(below)
    return found


def floor(room: str) -> int:
    found = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    assert len(found) == 1, f"moedistill.{room} lies on no floor: give it one"
    return found[0]


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_point_down(module: str) -> None:
    room = module.split(".")[0]
    for name in imported(MODULES[module]):
        root = name.split(".")[0]
        assert not root.startswith("moedistill_"), f"{module} imports the plugin {name}"
        assert room in HOMES.get(root, {room}), f"{module} imports {root}; its home is {HOMES.get(root)}"
    for other in imported_modules(MODULES[module]):
        below = other.split(".")[0]
        assert below in (room, "") or floor(below) < floor(room), f"{module} imports {other}, which is not below it"


def test_there_is_no_circle() -> None:
    """Among all modules, whoever imports whom and for whatever purpose."""
    graph = {module: imported_modules(path) - {module} for module, path in MODULES.items()}
    done: set[str] = set()

    def follow(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"a circle: {' → '.join((*above[above.index(module) :], module))}"
        if module not in done:
            for other in sorted(graph[module]):
                follow(other, (*above, module))
            done.add(module)

    for module in graph:
        follow(module, ())


def test_few_modules_lie_outside_of_rooms_and_faces_hold_no_code() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 8
    for path in PACKAGE.rglob("__init__.py"):
        nodes = ast.parse(path.read_text(encoding="utf-8")).body
        kinds = {type(node) for node in nodes}
        assert kinds <= {ast.Expr, ast.Import, ast.ImportFrom, ast.Assign}, f"{path} does more than hand names on"


def test_losses_know_no_backbone_and_stages_know_no_model_family() -> None:
    for path in (PACKAGE / "losses").glob("*.py"):
        assert "model.backbone" not in imported_modules(path)
    for path in (PACKAGE / "stages").glob("*.py"):
        assert not imported_modules(path) & {"model.experts", "model.shared_network"}


def test_plugins_and_templates_import_public_names_alone() -> None:
    templates = sorted((PACKAGE / "testing" / "new_backbone" / "templates").rglob("*.py.txt"))
    files = [*sorted(PLUGINS.rglob("*.py")), *templates]
    assert len(files) > 20
    for path in files:
        own = "moedistill_my_model" if path in templates else path.relative_to(PLUGINS).parts[0]
        for name in imported(path):
            root, _, rest = name.partition(".")
            if root == "moedistill":
                assert rest in moedistill.__all__, f"{path.name} imports {name}, which is no public name"
            elif root.startswith("moedistill_"):
                assert root == own, f"{path.name} imports another plugin: {name}"


def test_public_names_are_there_and_documented() -> None:
    for name in moedistill.__all__:
        assert getattr(moedistill, name) is not None
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)
    assert sorted(listed) == sorted(moedistill.__all__)


def python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_light_names_bring_torch_alone() -> None:
    """Each in a fork of one process that has torch."""
    statements = [
        "from moedistill import Trajectory, TimestepRouter, sample",
        "from moedistill.flow import jump",
        "from moedistill.losses import pseudo_huber",
        "from moedistill import Loss, Draws",
    ]
    python(
        "import os, sys, torch\n"
        f"for statement in {statements}:\n"
        "    if (child := os.fork()) == 0:\n"
        "        exec(statement)\n"
        f"        assert not {HEAVY | {'pydantic', 'yaml'}} & set(sys.modules), statement\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0, statement\n"
    )


def test_help_needs_no_torch() -> None:
    unwanted = HEAVY | {"torch", "numpy", "pydantic", "yaml", "pluggy", "rich"}
    python(
        "import sys, moedistill.cli\n"
        "try: moedistill.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        f"found = {unwanted} & set(sys.modules)\n"
        "assert not found, found"
    )
    python(f"import sys, moedistill; assert not {unwanted} & set(sys.modules)")


def test_list_and_recipe_need_no_torch() -> None:
    python(
        "import sys, moedistill.cli, moedistill.recipe.loading\n"
        "try: moedistill.cli.main(['list'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )


def test_help_is_quick() -> None:
    # The target is 0.3 s on a free core. Time on the processor, the best of a few, does not depend on who else is busy.
    times = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-m", "moedistill.cli", "--help"], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(times) <= 0.5, f"--help takes {min(times):.2f} s"


def test_unknown_public_name() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = moedistill.no_such_name
    assert set(moedistill.__all__) <= set(dir(moedistill))


def test_the_version_is_written_once() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{moedistill.__version__}"' in project
