"""`moedistill new-backbone`, and the tutorial that is built around what it writes: every command and file of it."""

import importlib
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moedistill import cli
from moedistill.errors import UserError
from moedistill.testing.new_backbone.write import TEMPLATES, write_plugin

ROOT = Path(__file__).parents[2]
TUTORIAL = (ROOT / "docs" / "tutorials" / "new_backbone.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TUTORIAL, flags=re.MULTILINE | re.DOTALL)
COMMANDS = ("moedistill", "pip", "pytest", "sed")


class Place:
    """A folder as a user's, with the plugin in `plugin` installed as `pip install -e` would.

    `moedistill` runs in this process, and pytest in a fork of it: torch is already imported. All else is a process.
    """

    def __init__(self, folder, plugin, monkeypatch, capsys):
        self.folder, self.plugin, self.target, self.capsys = folder, folder / plugin, folder / "site", capsys
        monkeypatch.chdir(folder)
        # The metadata lie in `site`, copies of the files too; those in the plugin's own folder come first.
        self.path = [str(self.plugin), str(self.target)]
        for entry in reversed(self.path):
            monkeypatch.syspath_prepend(entry)

    def command(self, line):
        """Runs a line of the tutorial; gives its output. `# exits with N` says that it is to fail."""
        words = shlex.split(line, comments=True)
        wanted = int(re.search(r"# exits with (\d)", line)[1]) if "# exits" in line else 0
        if words[:3] == ["pip", "install", "-e"]:
            options = ["-q", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--no-index"]
            words = ["-m", "pip", "install", *options, "--target", str(self.target), str(self.folder / words[3])]
        if words[0] == "moedistill":
            code, output = self.moedistill(words[1:])
        elif words[0] == "pytest":
            code, output = self.pytest([*words[1:], "-p", "no:cacheprovider"])
        else:
            code, output = self.process(words if words[0] == "sed" else [sys.executable, *words])
        assert code == wanted, f"{line} exits with {code}:\n{output}"
        assert "Traceback" not in output
        return output

    def moedistill(self, words):
        forget_plugins()
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        captured = self.capsys.readouterr()
        return stop.value.code or 0, captured.out + captured.err

    def pytest(self, words):
        log = self.folder / "log"
        forked = multiprocessing.get_context("fork").Process(target=run_pytest, args=(words, log))
        forked.start()
        forked.join(300)
        return forked.exitcode, log.read_text()

    def process(self, command):
        path = os.pathsep.join([*self.path, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        done = subprocess.run(
            command, cwd=self.folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr


def run_pytest(words, log):
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    forget_plugins()
    sys.exit(pytest.main(words))


def forget_plugins():
    """The next command imports the plugin's files anew, as another process would."""
    importlib.invalidate_caches()
    for name in list(sys.modules):
        if name.startswith(("moedistill_my_mochi", "moedistill_deep_water")):
            del sys.modules[name]


@pytest.fixture
def place(tmp_path, monkeypatch, capsys):
    yield lambda plugin: Place(tmp_path, plugin, monkeypatch, capsys)
    forget_plugins()


def write_named(folder, code):
    """Writes a block that begins with `# the/path/of/a.file`."""
    path = re.match(r"# (\S+\.\w+)\n", code)
    assert path, f"a block of the tutorial names no file: {code[:60]}"
    assert (folder / path[1]).exists(), f"{path[1]} replaces nothing"
    (folder / path[1]).write_text(code, encoding="utf-8")


def test_the_tutorial(place):
    """From top to bottom, as a reader would."""
    place, done = place("my_plugin"), []
    # By how many files are written: as it begins, with a pipeline, without one.
    rows = {0: "20 ✔, 0 ✘, 4 not checked", 2: "24 ✔, 0 ✘, 0", 4: "23 ✔, 0 ✘, 1 not checked"}
    for language, text in BLOCKS:
        if language in ("python", "yaml"):
            write_named(place.folder, text)
            done.append(language)
        for line in text.splitlines() if not language else ():
            if line.split()[:1] and line.split()[0] in COMMANDS:
                output = place.command(line)
                done.append(line.split("#")[0].strip())
                if "check-backbone" in line and "exits" not in line:
                    assert rows[done.count("python")] in output
                if "check-backbone" in line and "exits" in line:
                    failed = [row for row in output.splitlines() if row.startswith("  ✘")]
                    assert [row.split()[1] for row in failed] == ["one", "unembed"]
                if line.startswith("moedistill list"):
                    assert "my_mochi" in output
                if line.startswith("pytest"):
                    assert re.search(r"\d\d passed, [12] skipped", output)
    # Nothing of it was passed over.
    assert done.count("moedistill check-backbone my_mochi") == 4
    assert done[-1] == "moedistill run my_plugin/recipe.yaml --smoke"
    assert {"python", "yaml", "pip install -e my_plugin", "pytest -q my_plugin"} <= set(done)
    assert "MochiTransformer3DModel" in (place.folder / "my_plugin/moedistill_my_mochi/backbone.py").read_text()


def test_the_tutorial_shows_the_files_that_are_written(tmp_path):
    shown = next(text for _, text in BLOCKS if text.startswith("my_plugin/\n")).splitlines()[1:]
    written = {path.relative_to(tmp_path).as_posix() for path in write_plugin("my_mochi", tmp_path)}
    assert written - {line.split()[0] for line in shown} == {"moedistill_my_mochi/__init__.py"}
    assert {line.split()[0] for line in shown} <= written


def test_the_tutorials_table_names_rows_of_the_kit():
    from moedistill.testing.checks import CHECKS

    table = TUTORIAL.partition("What a ✘ usually means:")[2].partition("The miniature")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 9
    titles = [check.title for check in CHECKS]
    for part in (part for row in rows for part in row.split(", training")):
        assert any(title.startswith(part.split(",")[0]) or part in title for title in titles), part


# -- the skeleton -----------------------------------------------------------------------------------------------------


@pytest.fixture
def call(capsys):
    def call(*args):
        with pytest.raises(SystemExit) as stop:
            cli.main(["new-backbone", *map(str, args)])
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return call


def test_the_skeleton_passes_its_own_tests_and_its_recipe_runs(place, tmp_path):
    """Under another name and in another place than the tutorial's."""
    place = place("there/plugin")
    place.command("moedistill new-backbone deep_water_2 there/plugin")
    place.command("pip install -e there/plugin")
    assert "20 passed, 5 skipped" in place.command("pytest -q there/plugin")
    output = place.command("moedistill run there/plugin/recipe.yaml --smoke --output out")
    assert "stage export" in output
    assert (tmp_path / "out" / "export" / "detail.safetensors").is_file()


def test_names_are_put_in_everywhere(tmp_path):
    files = write_plugin("deep_water_2", tmp_path / "new")
    assert len(files) == len(list(TEMPLATES.rglob("*.txt"))) == 7
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert path.is_file()
        assert "my_model" not in text
        assert "MyModel" not in text
        assert "deep_water_2" in text or "DeepWater2" in text
        assert "TODO" not in text
        if path.suffix == ".py":
            compile(text, str(path), "exec")
    assert tmp_path / "new" / "moedistill_deep_water_2" / "backbone.py" in files


def test_it_says_what_it_wrote(call, tmp_path):
    code, out, _ = call("mine", tmp_path / "plugin")
    assert code == 0
    lines = out.splitlines()
    assert lines[-1] == f"next: {tmp_path / 'plugin' / 'README.md'}"
    assert all(Path(line).is_file() for line in lines[:-1])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("My-Model", "cannot name a backbone"),
        ("2d", "beginning with a letter"),
        ("class", "cannot name a backbone"),
        ("../up", "cannot name a backbone"),
        ("x" * 60, "cannot name a backbone"),
        ("", "cannot name a backbone"),
        ("digits", "there is a backbone 'digits' already"),
        ("dcm", "there is a package moedistill_dcm already"),
    ],
)
def test_names_that_cannot_be(call, tmp_path, name, text):
    code, out, err = call(name, tmp_path / "plugin")
    assert (code, out) == (2, "")
    assert text in err
    assert not (tmp_path / "plugin").exists()


def test_nothing_is_overwritten(call, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    code, _, err = call("mine", tmp_path)
    assert code == 2
    assert "not empty" in err
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"
    # An empty folder is fine, a file is not.
    (tmp_path / "empty").mkdir()
    assert call("mine", tmp_path / "empty")[0] == 0
    with pytest.raises(UserError, match="cannot write to"):
        write_plugin("mine", tmp_path / "README.md")
    with pytest.raises(UserError, match="cannot write to"):
        write_plugin("mine", tmp_path / "README.md" / "below")
