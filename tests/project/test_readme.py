"""Every command and snippet of README.md runs; its make targets exist and CI runs them."""

import re
import shlex
from pathlib import Path

import pytest

from moedistill.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
SNIPPETS = [code for language, code in BLOCKS if language == "python"]
SCREENS = [code for language, code in BLOCKS if language == "" and code.startswith("moedistill")]
COMMANDS = [line for language, code in BLOCKS if language == "" for line in code.splitlines() if line]


def test_the_readme_has_what_it_promises() -> None:
    assert len(SNIPPETS) >= 2
    assert {command.split()[0] for command in COMMANDS} == {"make", "moedistill"}
    assert sum(command.startswith("moedistill") for command in COMMANDS) == sum(len(s.splitlines()) for s in SCREENS)
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_make_targets_exist_and_ci_runs_them() -> None:
    makefile, ci = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run").read_text()
    for command in COMMANDS:
        if command.startswith("make "):
            target = command.split()[1]
            assert f"\n{target}:" in makefile
            # The demo's smoke mode is the same code path with smaller numbers.
            assert f"make {'smoke' if target == 'demo' else target}" in ci


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
