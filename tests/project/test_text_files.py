"""Text is UTF-8 in every locale: what is read and written, and what commands print."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import evaluate, tiny_recipe

import moedistill

ROOT = Path(moedistill.__file__).parents[1]
FILES = [path for room in ("moedistill", "plugins", "benchmarks") for path in sorted((ROOT / room).rglob("*.py"))]
NOT_TEXT = {"av", "Image", "os"}
"""Whose `open` opens no text."""


def without_encoding(code: str) -> list[int]:
    """Lines that read or write text in whatever encoding the locale has."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        options = {option.arg for option in node.keywords}
        name = getattr(node.func, "attr", None) or getattr(node.func, "id", "")
        owner = getattr(getattr(node.func, "value", None), "id", "")
        given = [
            each.value for each in [*node.args, *(k.value for k in node.keywords)] if isinstance(each, ast.Constant)
        ]
        binary = any(isinstance(mode, str) and "b" in mode and set(mode) <= set("rwaxb+") for mode in given)
        opens = (name == "open" and owner not in NOT_TEXT) or name == "fdopen"
        reads = name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute)
        pipes = bool(options & {"text", "universal_newlines"}) and name in ("run", "Popen", "check_output")
        opens = opens and not binary
        if (opens or reads or pipes) and "encoding" not in options:
            found.append(node.lineno)
    return found


@pytest.mark.parametrize(
    ("code", "refused"),
    [
        ("path.read_text()", True), ("path.read_text(encoding='utf-8')", False), ("(a / b).write_text(x)", True),
        ("write_text(path, x)", False), ("open(path)", True), ("open(path, 'rb')", False), ("path.open('a')", True),
        ("path.open('ab')", False), ("av.open(path)", False), ("os.open(path, 0)", False), ("os.fdopen(n, 'w')", True),
        ("subprocess.run(x, text=True)", True), ("subprocess.run(x)", False), ("open('b.txt')", True),
    ],
)  # fmt: skip
def test_what_counts_as_text(code: str, refused: bool) -> None:
    assert bool(without_encoding(code)) == refused


def test_all_text_has_an_encoding() -> None:
    assert len(FILES) > 100
    found = {str(path): lines for path in FILES if (lines := without_encoding(path.read_text(encoding="utf-8")))}
    assert not found, f'say encoding="utf-8" there: {found}'


def test_a_run_in_a_locale_without_utf8(tmp_path: Path) -> None:
    """Files, the recipe, a value of --set, our own signs and tables: UTF-8, whatever the locale knows."""
    full = {"kind": "full", "from": "semantic"}  # LoRA takes seconds to import
    recipe = tiny_recipe([evaluate(pictures=1)], {"description": "schön", "experts.detail": full})
    (tmp_path / "größe.yaml").write_text(json.dumps(recipe, ensure_ascii=False), encoding="utf-8")
    locale = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = ["run", "größe.yaml", "--output", "läuft", "--set", "description=été ✔"]
    done = subprocess.run(
        [sys.executable, "-m", "moedistill", *(word.encode() for word in words)],
        cwd=tmp_path, env={**os.environ, "PYTHONIOENCODING": "ascii:strict", **locale}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    said = done.stdout.decode("utf-8")
    assert said.splitlines()[1].startswith("tiny → l")
    assert "│" in said
    saved = yaml.safe_load((tmp_path / "läuft" / "recipe.yaml").read_text(encoding="utf-8"))
    assert saved["description"] == "été ✔"
