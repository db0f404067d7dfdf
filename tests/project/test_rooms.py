"""Imports point one way, light modules stay light, and `--help` is instant."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import moedistill

PACKAGE = Path(moedistill.__file__).parent
PLUGINS = PACKAGE.parent / "plugins"
HEAVY = {"diffusers", "peft", "accelerate", "transformers"}

# A module may import modules of the layers below its own, and of its own.
LAYERS = [
    {"fields", "errors"},
    {
        "flow",
        "optim",
        "randomness",
        "conditioning",
        "ema",
        "features",
        "media",
        "signals",
        "checkpoint",
        "devices",
        "plotting",
    },
    {"trajectory"},
    {"routers"},
    {"sampling", "steps", "losses", "backbone", "data", "metrics"},
    {"experts"},
    {"student", "mixture"},
    {"context"},
    {"stages"},
    {"registry", "yaml_tree"},
    {"hookspecs", "builtin", "plugins", "validation", "schema"},
    {"recipe", "callbacks"},
    {"smoke", "train", "heldout", "sample_run"},
    {"analysis", "report"},
    {"integrations"},
    {"cli", "__main__", "testing", "new_backbone"},
]
# What the core's few heavy dependencies are for.
HOMES = {"accelerate": {"train", "context", "callbacks", "testing"}, "peft": {"experts"}, "diffusers": {"integrations"}}


def module_name(path: Path) -> str:
    relative = path.relative_to(PACKAGE).with_suffix("")
    return relative.parts[0]


def imports(path: Path) -> set[str]:
    """Dotted names of all modules imported anywhere in a file, functions included, but for type checking."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide where things come from"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def core_files() -> list[Path]:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    return files


def layer(name: str) -> int:
    found = [number for number, names in enumerate(LAYERS) if name in names]
    assert len(found) == 1, f"moedistill.{name} has no layer in this test: give it one"
    return found[0]


@pytest.mark.parametrize("path", core_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_of_the_core_point_down(path):
    name = module_name(path)
    if name == "__init__":
        return  # lazy: see below
    for imported in imports(path):
        root, *rest = imported.split(".")
        assert not root.startswith("moedistill_"), f"{name} imports the plugin {imported}"
        if root in HOMES:
            assert name in HOMES[root], f"{name} imports {root}; its home is {HOMES[root]}"
        assert root != "transformers"
        if (
            root == "moedistill"
            and rest
            and (PACKAGE / rest[0]).with_suffix(".py").exists() | (PACKAGE / rest[0]).is_dir()
        ):
            below = layer(rest[0])
            assert below <= layer(name), f"{name} imports {imported}, which lies above it"


def test_stages_and_losses_know_no_backbone():
    for path in (PACKAGE / "stages").glob("*.py"):
        assert not any(name.startswith("moedistill.backbone") for name in imports(path))
    assert not {name for name in imports(PACKAGE / "losses.py") if ".student" in name or ".backbone" in name}


def test_plugins_import_public_names_of_the_core():
    files = sorted(PLUGINS.rglob("*.py"))
    assert len(files) > 5
    for path in files:
        own = path.relative_to(PLUGINS).parts[0]
        for imported in imports(path):
            if imported.split(".")[0].startswith("moedistill_"):
                assert imported.startswith(own), f"{path.name} imports another plugin: {imported}"
            elif imported.startswith("moedistill."):
                assert not any(part.startswith("_") and part != "__version__" for part in imported.split("."))


def python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("module", ["flow", "trajectory", "routers", "sampling", "losses"])
def test_light_modules_stay_light(module):
    python(f"import moedistill.{module}, sys; assert not {HEAVY | {'pydantic', 'yaml'}} & set(sys.modules)")


def test_help_needs_no_torch():
    unwanted = HEAVY | {"torch", "numpy", "pydantic", "yaml", "pluggy", "rich"}
    python(
        "import sys, moedistill.cli\n"
        "try: moedistill.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        f"found = {unwanted} & set(sys.modules)\n"
        "assert not found, found"
    )
    python(f"import sys, moedistill; assert not {unwanted} & set(sys.modules)")


def test_list_and_recipe_need_no_torch():
    python(
        "import sys, moedistill.cli, moedistill.recipe\n"
        "try: moedistill.cli.main(['list'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )


def test_help_is_quick():
    # The target is 0.3 s on a free core. Time on the processor, the best of a few, does not depend on who else is busy.
    times = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-m", "moedistill.cli", "--help"], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(times) <= 0.5, f"--help takes {min(times):.2f} s"


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = moedistill.no_such_name
    assert set(moedistill.__all__) <= set(dir(moedistill))


def test_the_version_is_written_once() -> None:
    project = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{moedistill.__version__}"' in project
