"""Every command and snippet of README.md runs; its tree, its table and its make targets are as they are in the code."""

import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_rooms import FLOORS

from moedistill.cli import main
from moedistill.recipe.loading import load_recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
SNIPPETS = [code for language, code in BLOCKS if language == "python"]
SCREENS = [code for language, code in BLOCKS if language == "" and code.startswith("moedistill")]
COMMANDS = [line for language, code in BLOCKS if language == "" for line in code.splitlines() if line]
TABLE, TREE = (code for language, code in BLOCKS if language == "text")
[INSTALL] = (code for language, code in BLOCKS if language == "bash")


def test_the_readme_has_what_it_promises() -> None:
    assert len(SNIPPETS) == 3
    assert {command.split()[0] for command in COMMANDS} == {"make", "moedistill"}
    assert sum(command.startswith("moedistill") for command in COMMANDS) == sum(len(s.splitlines()) for s in SCREENS)
    assert {language for language, _ in BLOCKS} == {"", "python", "text", "bash", "bibtex"}


def test_make_targets_exist_and_ci_runs_them() -> None:
    makefile, ci = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run").read_text()
    for command in COMMANDS:
        if command.startswith("make "):
            target = command.split()[1]
            assert f"\n{target}:" in makefile
            # The demo's miniature is the same code path with smaller numbers.
            assert f"make {'smoke' if target == 'demo' else target}" in ci


def test_the_demo_s_table_is_that_of_its_recipe() -> None:
    assert "moedistill run recipes/dcm_digits.yaml\n" in (ROOT / "Makefile").read_text()
    [evaluate] = [stage for stage in load_recipe("dcm_digits").stages if stage.name == "evaluate"]
    heads, rows = (
        [re.split(f" *{bar} *", line)[1:-1] for line in TABLE.splitlines() if line[:1] == bar] for bar in "┃│"
    )
    assert f"evaluate: {evaluate.samples} samples" in TABLE
    names = [" ".join(parts).strip() for parts in zip(*heads, strict=True)]  # folded
    assert names == ["metric", *(candidate.name for candidate in evaluate.candidates)]
    assert [row[0] for row in rows] == [metric.kind.replace("_", " ") for metric in evaluate.metrics]


def test_the_tree_lists_every_room_from_the_ground_up() -> None:
    package = ROOT / "moedistill"
    there = {path.name for path in package.iterdir() if path.is_dir() and not path.name.startswith("__")}
    files = {path.name for path in package.glob("*.py") if not path.name.startswith("__")}
    inside = re.findall(r"^  (\w+)(/|\.py)", TREE, flags=re.MULTILINE)
    assert {name + end for name, end in inside} == {f"{name}/" for name in there} | files
    floors = [next(number for number, rooms in enumerate(FLOORS) if name in rooms) for name, _ in inside]
    assert floors == sorted(floors)
    for top in re.findall(r"^(\w+)/", TREE, flags=re.MULTILINE):
        assert (ROOT / top).is_dir(), top


def test_a_wheel_is_made_and_holds_what_the_readme_says(tmp_path: Path) -> None:
    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    for name in re.findall(r"\.\[(.*?)\]", INSTALL)[0].split(","):
        assert f"\n{name} = [" in extras
    lines = INSTALL.splitlines()
    assert [line.split()[:2] for line in lines] == [["pip", "install"], ["pip", "wheel"], ["pip", "install"]]
    words = shlex.split(lines[1])[1:]
    words[words.index("dist")] = str(tmp_path)
    quiet = ["-q", "--disable-pip-version-check", "--no-build-isolation", "--no-index"]
    subprocess.run([sys.executable, "-m", "pip", *words, *quiet], cwd=ROOT, check=True, timeout=120)
    [wheel] = tmp_path.glob(Path(lines[2].split()[-1]).name)
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"moedistill/recipes/dcm_digits.yaml", "moedistill/__init__.pyi", "moedistill_dcm/gan.py"} <= names


@pytest.fixture
def in_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a user's, with the recipes beside; the snippets that name a file are written there."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for code in SNIPPETS:
        name = re.match(r"# (\w+\.py)\n", code)
        if name:
            (tmp_path / name[1]).write_text(code)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("code", SNIPPETS, ids=lambda code: code.strip().splitlines()[0])
def test_snippet(code: str, in_a_copy: Path) -> None:
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("screen", SCREENS, ids=lambda screen: screen.splitlines()[0])
def test_commands(screen: str, in_a_copy: Path) -> None:
    """Those of one block, one after the other."""
    for command in screen.splitlines():
        with pytest.raises(SystemExit) as exit_info:
            main(shlex.split(command)[1:])
        assert exit_info.value.code == 0, command
