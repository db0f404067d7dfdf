"""report.html: its numbers, videos and text are those of the run's files; nothing in it reaches out, or is run."""

import base64
import json
import shutil
import sys
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from helpers import dcm_recipe, distil, evaluate, tiny_recipe

from moedistill.cli import main
from moedistill.components.plugins import load_plugins
from moedistill.errors import UserError, WriteError
from moedistill.plotting import save
from moedistill.recipe.loading import load_recipe
from moedistill.recipe.sampling import sampling_sigmas
from moedistill.runs import loop
from moedistill.runs.callbacks import curves
from moedistill.runs.loop import run
from moedistill.runs.page import charts, found, write
from moedistill.runs.page.write import write_page
from moedistill.runs.tables import read_records, tabulate

PLUGINS = load_plugins()
CANDIDATES = [
    {"name": "teacher, 8 steps", "model": "teacher", "steps": 8},
    {"name": "student"},
]


def recipe():
    made = dcm_recipe(6, **{"training.monitor": {"every": 3, "samples": 1, "levels": 2}})
    for stage in made["stages"]:
        stage["preview"] = {"every": 3, "prompts": ["3 right", "5 down"], "compare_teacher": True}
    metrics = [{"kind": "paired_distance"}, {"kind": "flicker"}]
    made["stages"] += [
        evaluate(candidates=CANDIDATES, reference="teacher, 8 steps", pictures=2, metrics=metrics, save_latents=False),
        {"name": "export", "kind": "export"},
        {"name": "sample", "kind": "sample", "prompts": ["7 left"]},
    ]
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run, and one as if of another seed: with twice the losses."""
    folder = tmp_path_factory.mktemp("page")
    run(recipe(), output=folder / "run0", device="cpu")
    other = shutil.copytree(folder / "run0", folder / "run1")
    saved = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(saved.replace("\nseed: 0\n", "\nseed: 1\n"))
    logged = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    doubled = [{**line, "loss": 2 * line["loss"]} if "loss" in line else line for line in logged]
    (other / "metrics.jsonl").write_text("\n".join(map(json.dumps, doubled)))
    return folder


@pytest.fixture
def one(whole, tmp_path):
    """A run of one's own to damage."""
    return shutil.copytree(whole / "run0", tmp_path / "run")


class Page(HTMLParser):
    """Elements with their attributes; text by tag; rows of tables by section."""

    def __init__(self, file):
        super().__init__()
        self.text = file.read_text()
        self.elements, self.open, self.rows, self.section, self.words = [], [], {}, "", {}
        self.feed(self.text)
        self.videos = json.loads(self.words["script"][0])

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "section":
            self.section = dict(attributes)["id"]
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")
        if tag not in ("meta", "link", "input", "use", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.words.setdefault(self.open[-1], []).append(data)
            if self.open[-1] in ("td", "th"):
                self.rows[self.section][-1][-1] += data

    def all(self, tag):
        return [attributes for each, attributes in self.elements if each == tag]

    def players(self):
        """Labels and keys of videos."""
        return [(each["aria-label"], json.loads(each["data-keys"])) for each in self.all("video")]


def made(folders, file, **options):
    write_page(folders, file, PLUGINS, **{"planned": False, "resamples": 10, **options})
    return Page(file)


@pytest.fixture(scope="module")
def page(whole):
    return made([whole / "run0"], whole / "page.html", planned=True)


def test_numbers_are_those_of_the_runs_files(whole, page):
    folder = whole / "run0"
    table = tabulate(read_records([folder]), resamples=10)
    assert page.rows["metrics"][1:] == [
        [line.candidate, *(f"{value}{'†' if value.samples_only else ''}" for value in line.values.values())]
        for line in table.lines
    ]
    saved = load_recipe(folder / "recipe.yaml")
    stops = [f"{sigma:.4f}" for sigma in sampling_sigmas(saved).tolist()]
    assert [row[1:3] for row in page.rows["steps-of-sampling"][1:]] == list(map(list, pairwise(stops)))
    assert [row[4] for row in page.rows["steps-of-sampling"][1:]] == ["semantic", "detail"]
    cost = json.loads((folder / "cost.json").read_text())
    memory = [json.loads(line) for line in (folder / "memory.jsonl").read_text().splitlines()]
    head, *rows = page.rows["time-and-memory"]
    for row, (stage, spent) in zip(rows, cost.items(), strict=True):
        shown = dict(zip(head, row, strict=True))
        assert (shown["stage"], shown["steps"]) == (stage, "6")
        assert shown["evaluations"] == shown["planned evaluations"] == f"{spent['forwards']:,}"
        assert shown["peak GiB"] == f"{max(line['memory'] for line in memory if line['stage'] == stage):.2f}"
    files = {file: int(size.replace(",", "")) for file, size in page.rows["files"][1:]}
    assert files == {f"run0/export/{path.name}": path.stat().st_size for path in (folder / "export").glob("[!.]*")}
    assert len(files) == 3
    assert page.words["pre"] == [(folder / "recipe.yaml").read_text()]
    environment = json.loads((folder / "environment.json").read_text())
    for fact in ("finished", "1 process, cpu, float32", environment["begun"], "semantic (full), detail (lora)"):
        assert fact in page.words["dd"]


def test_videos_are_the_files_side_by_side_and_over_time(whole, page):
    """The teacher and the student of the evaluation; a prompt; each stage's previews, the teacher's first."""
    folder, players = whole / "run0", page.players()
    previews = ["teacher, 8 steps", "teacher, 2 steps", "step 0", "step 3", "step 6"]
    assert [label for label, _ in players] == ["teacher, 8 steps", "student", "2 steps", *previews, *previews]
    files = {
        0: "evaluate/videos/00_0_teacher_8_steps.mp4",
        1: "evaluate/videos/00_1_student.mp4",
        2: "sample/000.mp4",
        3: "previews/semantic/teacher_8_steps/00_3_right.mp4",
        12: "previews/detail/step_00000006/00_3_right.mp4",
    }
    for number, file in files.items():
        shown = page.videos[players[number][1][0]]
        assert base64.b64decode(shown["uri"].partition(",")[2]) == (folder / file).read_bytes(), file
        assert (shown["frames"], shown["fps"]) == (8, 8.0)
    assert page.words["option"].count("3 right") == page.words["option"].count("5 down") == 2


def test_nothing_is_loaded_or_run_but_what_is_in_it(page):
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "data", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    [policy] = [each["content"] for each in page.all("meta") if "http-equiv" in each]
    assert policy.startswith("default-src 'none'; ")
    assert len(page.all("script")) == 2


@pytest.fixture
def figures(monkeypatch):
    """The charts of pages made from now on."""
    drawn = []
    monkeypatch.setattr(charts, "svg", lambda chart, label: drawn.append(chart) or f"<svg>{label}</svg>")
    return drawn


def test_what_is_drawn_by_noise_level_is_what_was_noted(whole, tmp_path, figures):
    made([whole / "run0"], tmp_path / "page.html")
    errors, gradients = figures[1].axes
    lines = [json.loads(line) for line in (whole / "run0" / "levels.jsonl").read_text().splitlines()]
    curves_of = [line for line in errors.lines if len(line.get_xdata()) and line.get_linestyle() in "-:"]
    drawn = {line.get_label(): line for line in curves_of}
    assert list(drawn) == [
        "semantic, steps 1–2", "semantic, steps 5–6", "detail, steps 1–2", "detail, steps 5–6",
    ]  # fmt: skip
    last = [line for line in lines if line["stage"] == "detail" and line["step"] > 4]
    for point, error in zip(*drawn["detail, steps 5–6"].get_data(), strict=True):
        rows = [
            (count, value)
            for line in last
            for at, count, value in zip(line["point"], line["samples"], line["error"], strict=True)
            if at == point
        ]
        assert error == pytest.approx((sum(n * e * e for n, e in rows) / sum(n for n, _ in rows)) ** 0.5, rel=1e-6)
    for axis in (errors, gradients):
        assert [line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == "--"] == [4]  # the boundary
    assert [text.get_text() for text in errors.texts] == ["semantic", "detail"]


def test_several_runs_are_overlaid(whole, tmp_path, figures):
    """They are one method: the table has one line for a candidate. Videos of the same noise come side by side."""
    page = made([whole / "run0", whole / "run1"], tmp_path / "page.html")
    names = ["tiny, seed 0", "tiny, seed 1"]
    losses = figures[0].axes[0]
    [legend] = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == names
    for seed, colour in ((0, "C0"), (1, "C1")):
        text = (whole / f"run{seed}" / "metrics.jsonl").read_text()
        logged = [line["loss"] for line in map(json.loads, text.splitlines()) if "loss" in line]
        drawn = [value for line in losses.lines if line.get_color() == colour for value in line.get_ydata()]
        assert drawn == logged
    assert [row[0] for row in page.rows["metrics"][1:]] == ["teacher, 8 steps", "student"]
    first = [label for label, _ in page.players()[:4]]
    assert first == [f"{name}: {model}" for name in names for model in ("teacher, 8 steps", "student")]
    assert [row[0] for row in page.rows["time-and-memory"]] == ["stage", "semantic", "detail"] * 2


def test_runs_of_other_noise_have_tables_of_their_own(whole, one, tmp_path):
    saved = (one / "recipe.yaml").read_text()
    (one / "recipe.yaml").write_text(saved.replace("seed: 0\n", "seed: 5\n"))
    page = made([whole / "run0", one], tmp_path / "page.html")
    assert "Each by itself: they were not evaluated on the same samples and noise." in page.text
    assert [row[0] for row in page.rows["metrics"]] == ["model", "teacher, 8 steps", "student"] * 2


def test_the_same_run_gives_the_same_bytes(whole, tmp_path):
    for name in ("one", "two"):
        made([whole / "run0"], tmp_path / f"{name}.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_a_page_keeps_to_its_size_and_says_what_is_left_out(whole, tmp_path, monkeypatch):
    full = made([whole / "run0"], tmp_path / "full.html")
    size = len(full.text.encode())
    videos = sum(len(each["uri"]) for each in full.videos.values())
    for limit, says in ((size - 1000, "smaller here"), (size - videos + 9000, "Videos left out")):
        monkeypatch.setattr(write, "LIMIT", limit)
        page = made([whole / "run0"], tmp_path / "page.html")
        assert len(page.text.encode()) <= limit
        assert says in page.text
        assert 0 < len(page.videos) <= len(full.videos)
    assert len(page.videos) < len(full.videos)
    assert page.players()[0][1][0] == "v0"  # the first sample of what comes first stays


HOSTILE = """</script></pre><script>alert(1)</script><img src=x onerror='alert(2)'> "$\\frac{x" ' & {y} $script"""


def test_hostile_text_stays_text(one, tmp_path):
    for file in (*one.glob("previews/*/*/preview.json"), one / "evaluate/videos/videos.json", one / "environment.json"):
        about = json.loads(file.read_text())
        about |= {key: [HOSTILE] * len(about[key]) for key in ("prompts", "captions") if key in about}
        about |= {key: HOSTILE for key in ("label", "begun") if key in about and file.parent.name != "step_00000003"}
        if "files" in about and isinstance(about["files"], dict):
            about["files"] = {f"{HOSTILE} {name}": files for name, files in about["files"].items()}
        file.write_text(json.dumps(about))
    text = (one / "recipe.yaml").read_text()
    described = text.replace("description: ''", f"description: {json.dumps(HOSTILE)}")
    assert described != text
    (one / "recipe.yaml").write_text(described)
    page = made([one], tmp_path / "page.html")
    assert len(page.all("script")) == 2
    assert not page.all("img")
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert HOSTILE in page.words["p"]
    assert HOSTILE in page.words["option"]
    assert HOSTILE in {each["aria-label"] for each in page.all("video")}


def test_a_file_outside_of_the_run_is_not_embedded(one, tmp_path):
    shutil.copy(one / "sample/000.mp4", tmp_path / "secret.mp4")
    about = one / "evaluate/videos/videos.json"
    content = json.loads(about.read_text())
    content["files"]["student"] = ["../../../secret.mp4", str(tmp_path / "secret.mp4")]
    about.write_text(json.dumps(content))
    page = made([one], tmp_path / "page.html")
    assert "cannot be read: 1." in page.text
    assert "student" not in dict(page.players())


@pytest.mark.parametrize("content", [b"", b"no video", None])
def test_a_video_that_cannot_be_read_is_left_out(one, tmp_path, content):
    """Nothing in it, or something else; None is the first half of one."""
    video = one / "evaluate/videos/00_1_student.mp4"
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2] if content is None else content)
    page = made([one], tmp_path / "page.html")
    assert "cannot be read: 1." in page.text
    teacher, student = page.players()[:2]
    assert None not in teacher[1]
    assert student[1][0] is None
    assert student[1][1] is not None


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"files": 3, "captions": [1]}', '{"prompts": null, "files": ["a"]}']
)
def test_what_is_damaged_is_left_out(one, tmp_path, content):
    for file in (
        *one.glob("previews/*/*/preview.json"), one / "evaluate/videos/videos.json", one / "environment.json",
        one / "sample/samples.json",
    ):  # fmt: skip
        file.write_text(content)
    (one / "levels.jsonl").write_text('{"stage": "semantic", "step": 1, "point": [99], "samples": [1]}\n[1]\n{"sta')
    page = made([one], tmp_path / "page.html")
    assert not page.players()
    assert "Nothing was noted by noise level." in page.text
    assert page.rows["metrics"]


def test_a_run_that_trains_nothing_and_has_no_sampling(tmp_path):
    run(tiny_recipe([evaluate(candidates=CANDIDATES[:1], reference="teacher, 8 steps")], {"sample": None}),
        output=tmp_path / "run", device="cpu")  # fmt: skip
    page = made([tmp_path / "run"], tmp_path / "page.html")
    for words in (
        "Nothing was trained.",
        "No stage made previews",
        "The recipe does not say how to sample.",
        "Nothing was exported.",
    ):
        assert words in page.text


def test_without_matplotlib_the_page_says_so_and_has_numbers(whole, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = made([whole / "run0"], tmp_path / "page.html")
    assert "No plots: plots need matplotlib: pip install &#x27;moedistill[plots]&#x27;." in page.text
    rows = page.rows["how-training-went"]
    logged = [json.loads(line) for line in (whole / "run0" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in logged if line["stage"] == "semantic" and "loss" in line]
    assert ["tiny", "semantic", "loss", f"{losses[0]:.4g}", f"{losses[-1]:.4g}"] in rows


def test_a_dollar_is_no_formula(tmp_path):
    """In names of runs and stages, which curves.png has too."""
    chart = curves.chart_of(tmp_path, [("semantic", 4)], "5$ or 6$_")
    save(chart, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").exists()


def test_every_run_ends_with_a_page(tmp_path, monkeypatch, no_page, capsys):
    monkeypatch.setattr(loop, "write_page", no_page)
    run(tiny_recipe([distil()]), output=tmp_path / "run", device="cpu")
    page = Page(tmp_path / "run" / "report.html")
    assert "finished, without an evaluation" in page.words["dd"]
    assert "no report.html" not in capsys.readouterr().out


@pytest.mark.parametrize("error", [WriteError("the disk is full"), UserError("no"), RuntimeError("no font")])
def test_a_page_that_cannot_be_written_is_a_line_and_the_run_is_done(tmp_path, monkeypatch, capsys, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(loop, "write_page", fail)
    assert run(tiny_recipe([distil()]), output=tmp_path / "run", device="cpu").checkpoint is not None
    out = capsys.readouterr().out
    assert out.count("warning: no report.html: ") == 1
    assert out.rstrip().endswith(f"done: {tmp_path / 'run'}")
    assert not (tmp_path / "run" / "ended.txt").exists()


def test_the_command(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(write, "Planner", lambda: None)  # it says that it cannot plan, and why
    file = tmp_path / "new" / "page.html"
    with pytest.raises(SystemExit) as ended:
        main(["report", str(whole / "run0"), "--html", str(file), "--resamples", "10"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{file}\n"
    assert "No plan: cannot be planned: " in Page(file).text
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path / "none"), "--html", str(file)])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_moments_of_training_are_spread_from_first_to_last(one, monkeypatch):
    monkeypatch.setattr(found, "MOMENTS", 2)
    [seen] = found.find([one], PLUGINS)
    assert list(seen.previews[0].columns) == ["teacher, 8 steps", "teacher, 2 steps", "step 0", "step 6"]
