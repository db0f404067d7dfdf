"""What the pages say is so: references and links resolve, keys exist, plugins and examples run."""

import ast
import json
import re
import runpy
import shlex
import sys
from functools import cache
from pathlib import Path

import click
import pytest
import torch
from PIL import Image
from test_rooms import FLOORS

import moedistill
from moedistill.cli import cli, main
from moedistill.components.plugins import load_plugins
from moedistill.data.latents import LatentsConfig
from moedistill.data.loading import collate
from moedistill.data.prompts import read_prompts
from moedistill.flow.process import jump
from moedistill.flow.trajectory import Trajectory
from moedistill.recipe.loading import load_recipe
from moedistill.runs.check import check_set
from moedistill.runs.sample import load_mixture
from moedistill_wan.backbone import WanConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def named(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


@cache
def definitions(path: Path) -> set[str]:
    """Functions, classes, and methods as `Class.method`, of a file."""
    found: set[str] = set()

    def walk(body: list[ast.stmt], above: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(above + node.name)
                if isinstance(node, ast.ClassDef):
                    walk(node.body, f"{above}{node.name}.")

    walk(ast.parse(text_of(path)).body, "")
    return found


# -- references -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=named(PAGES))
def test_references_to_code_and_tests_resolve(page: Path) -> None:
    """`path/file.py:name` and `tests/path/file.py::name`, anywhere on a page."""
    for file, name in re.findall(r"`([\w/.]+\.py)::?([\w.]+)`", text_of(page)):
        assert (ROOT / file).is_file(), f"{page.name}: there is no {file}"
        assert name in definitions(ROOT / file), f"{page.name}: {file} defines no {name}"


@pytest.mark.parametrize("page", PAGES, ids=named(PAGES))
def test_files_and_folders_are_there(page: Path) -> None:
    names = {"recipes", "docs", "tests", "moedistill", "plugins", "benchmarks"}
    for path in re.findall(r"`((?:[\w-]+/)+[\w.-]*)`", text_of(page)):
        if path.split("/")[0] in names:
            known = [path, *(path + end for end in (".py", ".yaml"))]
            assert any((ROOT / name).exists() for name in known), f"{page.name}: there is no {path}"


@cache
def recipe(name: str) -> dict:
    return load_recipe(name, plugins=load_plugins()).resolved()


def value_of(tree: object, path: str) -> object:
    """The value at a dotted path; items of a list go by name, kind or number."""
    for step in path.split("."):
        if isinstance(tree, list):
            alike = [item for item in tree if isinstance(item, dict) and step in (item.get("name"), item.get("kind"))]
            tree = alike[0] if alike else tree[int(step)]
        else:
            assert isinstance(tree, dict)
            assert step in tree, f"{path}: no {step}; there are {', '.join(tree)}"
            tree = tree[step]
    return tree


def tables(page: Path) -> list[tuple[list[str], list[list[str]]]]:
    """Heads and rows of a page's tables."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text_of(page), flags=re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
        found.append((head, rows))
    return found


def test_every_part_of_dcm_has_code_and_keys_of_its_recipe_and_tests() -> None:
    found = 0
    for head, rows in tables(DOCS / "methods" / "dcm.md"):
        if head[:2] == ["part", "paper"]:
            assert head == ["part", "paper", "code", "recipe key", "test"]
            for part, _, code, keys, tests in rows:
                found += 1
                assert re.findall(r"`[\w/.]+\.py:[\w.]+`", code), part
                assert re.findall(r"`tests/[\w/.]+\.py::\w+`", tests), part
                for key in re.findall(r"`([\w.]+)`", keys):
                    value_of(recipe("dcm_hunyuan"), key)
    assert found > 25


def test_the_released_numbers_are_those_of_the_recipes() -> None:
    [rows] = [rows for head, rows in tables(DOCS / "methods" / "dcm.md") if head[0] == "recipe key"]
    for key, hunyuan, wan, _ in rows:
        for name, value in (("dcm_hunyuan_published", hunyuan), ("dcm_wan_1_3b_published", wan)):
            assert value_of(recipe(name), key.strip("`")) == json.loads(value), f"{name}: {key}"


def test_dcm_s_trajectory_is_as_the_page_says() -> None:
    trajectory = Trajectory.flow_matching()
    page = text_of(DOCS / "methods" / "dcm.md")
    assert f"`p_38` = {trajectory.sigma(38):.6f}" in page
    assert f"`p_0` = {trajectory.sigma(0):.4f}" in page


def test_the_rooms_are_on_their_floors() -> None:
    [rows] = [rows for head, rows in tables(DOCS / "architecture.md") if head[:2] == ["floor", "room"]]
    listed = {room.strip("`"): int(number) for number, room, *_ in rows}
    floors = {room: number for number, rooms in enumerate(FLOORS) for room in rooms if room != "__main__"}
    assert listed == floors
    for number, room, _, below in rows:
        wanted = {0: "nothing", 1: "floor 0"}.get(int(number), f"floors 0 to {int(number) - 1}")
        assert below == wanted, room


def test_the_glossary_is_in_order_and_knows_the_public_names() -> None:
    [(_, rows)] = tables(DOCS / "glossary.md")
    words = [row[0] for row in rows]
    assert words == sorted(words, key=str.lower)
    assert len(words) == len(set(words))
    for name in re.findall(r"`([A-Z][a-z]\w+)`", text_of(DOCS / "glossary.md")):
        assert name in moedistill.__all__, name


# -- commands ---------------------------------------------------------------------------------------------------------


def commands(page: Path) -> list[list[str]]:
    """The words of every command on a page: lines of code blocks without a language, and code within a line."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", prose)
    starts = ("moedistill ", "make ", "python -m pytest ")
    return [shlex.split(line, comments=True) for line in lines if line.startswith(starts)]


@pytest.mark.parametrize("page", PAGES, ids=named(PAGES))
def test_commands_exist_with_their_options(page: Path) -> None:
    """Those of the README, of the plugins and of the tutorial are run besides."""
    targets = re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), flags=re.MULTILINE)
    for program, *words in commands(page):
        said = f"{page.name}: {program} {' '.join(words)}"
        if program == "make":
            assert words[0] in targets, said
        elif program == "python":
            for path in (word for word in words[2:] if word.startswith("tests")):
                assert (ROOT / path).exists(), said
        else:
            command: click.Command = cli
            while isinstance(command, click.Group) and words and not words[0].startswith("-"):
                assert words[0] in command.commands, said
                command = command.commands[words.pop(0)]
            known = {"--help", "--version"} | {name for option in command.params for name in option.opts}
            assert {word for word in words if word.startswith("-") and word != "-"} <= known, said
            for word in words:
                assert not word.startswith("recipes/") or (ROOT / word).is_file(), said


def test_what_analyze_suggests_is_called_a_hypothesis_wherever_it_is_offered() -> None:
    assert cli.commands["analyze"].help is not None
    pages = [text_of(ROOT / "README.md"), text_of(ROOT / "moedistill" / "analysis" / "recipe.py")]
    for place in [*pages, cli.commands["analyze"].help]:
        assert "hypothesis to test" in " ".join(place.split())
        assert "166 against 129" in " ".join(place.split())
    page = text_of(DOCS / "results" / "2026-11-22.md")
    assert re.search(r"^\| boundary at point 38.* \| 166 ", page, flags=re.MULTILINE)
    assert re.search(r"^\| detail rate 9.5e-4 \| .* \| 129 ", page, flags=re.MULTILINE)


# -- links ------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Those of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text_of(page), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=named(PAGES))
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text_of(page)):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            links = re.findall(r"\]\((?!https?:)([^)#\s]+)", text_of(page))
            ahead += [(page.parent / link).resolve() for link in links]
    assert set(PAGES) - reached <= {ROOT / "CHANGELOG.md"}


@pytest.mark.parametrize("name", ["idea", "chord"])
def test_the_pictures_can_be_drawn(tmp_path: Path, name: str) -> None:
    runpy.run_path(str(ROOT / "benchmarks" / "pictures.py"))[f"draw_{name}"](tmp_path / "drawn.png")
    with Image.open(tmp_path / "drawn.png") as drawn, Image.open(DOCS / f"{name}.png") as kept:
        assert drawn.size == kept.size


def test_pictures_are_small() -> None:
    for picture in [*DOCS.rglob("*.png"), *DOCS.rglob("*.webp")]:
        assert picture.stat().st_size < 150_000, picture.name
    assert (DOCS / "idea.png").stat().st_size < 100_000


# -- plugins ----------------------------------------------------------------------------------------------------------

EXTENDING = text_of(DOCS / "extending.md")
PLUGINS = {
    name: (code, command)
    for name, code, command in re.findall(
        r"^```python\n# (\w+)\.py\n(.*?)^```\n\n```\n(moedistill .*?)\n```$", EXTENDING, flags=re.MULTILINE | re.DOTALL
    )
}


def first_line(folder: Path) -> dict:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in lines if line["step"] == 1)


def left_by_log_cosh(folder: Path) -> None:
    assert 0 < first_line(folder)["loss/log_cosh"] < 0.1


def left_by_follow(folder: Path) -> None:
    line = first_line(folder)
    assert line["loss/mse"] == line["loss"] > 0


def left_by_every_nth(folder: Path) -> None:
    config = load_recipe(folder / "recipe.yaml", plugins=load_plugins([str(folder.parents[1] / "every_nth.py")])).data
    whole, part = config.of.build(None), config.build(None)
    assert len(part) == len(whole) // 40
    assert torch.equal(part[3].latents, whole[120].latents)


def left_by_contrast(folder: Path) -> None:
    table = json.loads((folder / "result.json").read_text())["evaluate"]
    assert "contrast" in json.dumps(table)


def left_by_equal_steps(folder: Path) -> None:
    router = json.loads((folder / "export" / "export.json").read_text())["router"]
    assert router["boundaries"] == [Trajectory.flow_matching(50, 2.5).sigma(25)]


def left_by_state_dicts(folder: Path) -> None:
    exported = folder / "export" / "state_dicts"
    experts = {name: torch.load(exported / f"{name}.pt") for name in ("semantic", "detail")}
    assert all(tensor.dtype == torch.bfloat16 for state in experts.values() for tensor in state.values())
    own = load_mixture(folder)[1].experts
    for name, state in experts.items():
        merged = own[name].merged()
        assert set(state) == set(merged)
        assert all(torch.equal(state[key], weight.bfloat16()) for key, weight in merged.items())
    assert json.loads((exported / "moedistill.json").read_text())["files"]["semantic.pt"]["expert"] == "semantic"


def test_the_page_has_one_plugin_of_each_kind() -> None:
    assert set(PLUGINS) == {"log_cosh", "follow", "every_nth", "contrast", "equal_steps", "state_dicts"}
    assert EXTENDING.count("```") == 4 * len(PLUGINS)
    for code, _ in PLUGINS.values():
        imports = re.findall(r"^(?:from|import) (\w+)", code, flags=re.MULTILINE)
        assert set(imports) <= {"dataclasses", "typing", "math", "torch", "moedistill"}


@pytest.mark.parametrize("name", PLUGINS)
def test_plugins_run_and_do_what_they_are_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, command = PLUGINS[name]
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        main(shlex.split(command)[1:])
    assert exit_info.value.code == 0
    [folder] = (tmp_path / "runs").iterdir()
    globals()[f"left_by_{name}"](folder)


# -- examples ---------------------------------------------------------------------------------------------------------


def test_the_bare_transformer_example() -> None:
    torch.manual_seed(0)
    before = set(sys.modules)
    names = runpy.run_path(str(DOCS / "examples" / "bare_transformer.py"))
    assert not {"moedistill.model", "moedistill.recipe", "moedistill.runs"} & (set(sys.modules) - before)
    # By hand: two steps of each expert.
    x, sigmas = names["noise"], names["sigmas"].tolist()
    with torch.no_grad():
        for k, expert in enumerate(["semantic", "semantic", "detail", "detail"]):
            velocity = names["experts"][expert](x, torch.tensor([1000 * sigmas[k]]), **names["text"])[0]
            x = jump(x, velocity, sigmas[k], sigmas[k + 1])
    assert torch.allclose(names["latents"], x, atol=1e-5)
    core = (DOCS / "examples" / "bare_transformer.py").read_text().split("# This is all:\n")[1]
    assert len(core.splitlines()) == 5


def test_a_set_written_without_moedistill_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [script] = re.findall(r"^```python\n(.*?)^```$", text_of(DOCS / "data.md"), flags=re.MULTILINE | re.DOTALL)
    assert len([line for line in script.splitlines() if line]) <= 20
    assert set(re.findall(r"^(?:from|import) (.*?)(?: import .*)?$", script, flags=re.MULTILINE)) == {
        "json, os, torch", "safetensors.torch",
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "data.md", "exec"), {})
    monkeypatch.chdir("/")  # files are named relative to the index
    report = check_set(tmp_path / "my_set")
    assert (report.problems, report.warnings, report.notes) == ([], [], [])
    assert dict(report.facts)["latents"] == "[16, 5, 4, 6] × 12"
    backbone = WanConfig(pretrained=None).tiny().build()
    dataset = LatentsConfig(path=str(tmp_path / "my_set")).build(backbone)
    assert [dataset.shape(i) for i in range(12)] == [(16, 5, 4, 6)] * 12
    latents, cond = backbone.prepare(*collate([dataset[0], dataset[11]]))
    assert latents.shape == (2, 16, 5, 4, 6)
    assert cond["prompt_embeds"].shape == (2, 12, 24)
    assert dataset.null_conditioning() is not None
    assert read_prompts(tmp_path / "my_set")[7] == "clip 7"
