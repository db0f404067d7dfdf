"""curves.png: which numbers are drawn, when, and that a run goes on without them."""

import json
import sys
from types import SimpleNamespace

import pytest
from helpers import dcm_recipe, distil, tiny_recipe
from matplotlib.figure import Figure

from moedistill import plotting
from moedistill.errors import WriteError
from moedistill.runs.callbacks import curves
from moedistill.runs.loop import run


@pytest.fixture
def drawing(no_curves, monkeypatch):
    """Lets runs draw; gives the figures."""
    charts = []
    monkeypatch.setattr(curves, "draw", no_curves)
    monkeypatch.setattr(curves, "save", lambda chart, path: charts.append(chart) or plotting.save(chart, path))
    return charts


def lines_of(chart):
    """By the title of a panel, how its lines look: first and last step, and values."""
    return {
        axis.get_ylabel(): [
            (*line.get_xdata()[[0, -1]], line.get_ydata())
            for line in axis.lines
            if len(line.get_xdata()) and line.get_linestyle() != "--"
        ]
        for axis in chart.axes
    }


def file_lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    recipe = dcm_recipe(4, **{"training.monitor": {"every": 2, "samples": 1, "levels": 2}})
    return run(recipe, output=tmp_path_factory.mktemp("curves") / "run", device="cpu").output


def test_what_is_drawn_is_what_was_logged(whole, drawing):
    curves.draw(whole, [("semantic", 4), ("detail", 4), ("evaluate", 0)])
    found = lines_of(drawing[0])
    assert list(found) == ["loss", "monitor, by noise level", "gradient norm", "learning rate", "peak memory, GiB"]
    logged = file_lines(whole)
    for title, name, stages in (("loss", "loss", (0, 4)), ("learning rate", "lr", (0, 4))):
        for first, stage in zip(stages, ("semantic", "detail"), strict=True):
            expected = [line[name] for line in logged if line["stage"] == stage and name in line]
            assert any(list(values) == expected and last == first + 4 for _, last, values in found[title]), (
                title,
                stage,
            )
    assert len(found["loss"]) == 3 + 5  # of DCM's stages: the sum and its terms
    assert len(found["gradient norm"]) == 1 + 2  # the student's, and the critic's
    assert len(found["monitor, by noise level"]) == 4
    assert all(values.min() > 0.05 for *_, values in found["peak memory, GiB"])
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_memory_is_logged_beside_and_equal_runs_have_equal_metrics(whole):
    metrics, memory = file_lines(whole), file_lines(whole, "memory.jsonl")
    assert [(line["stage"], line["step"]) for line in memory] == [(line["stage"], line["step"]) for line in metrics]
    assert all(line["memory"] > 0.05 for line in memory)
    assert not any("memory" in line for line in metrics)


def test_they_go_on_where_a_run_does(whole, tmp_path, drawing):
    recipe = dcm_recipe(4, **{"training.monitor": {"every": 2, "samples": 1, "levels": 2}})
    run(recipe, output=tmp_path, resume_from=whole / "checkpoints" / "01_detail_00000002", device="cpu")
    curves.draw(whole, [("semantic", 4), ("detail", 4)])
    resumed, uninterrupted = map(lines_of, drawing)
    for title in ("loss", "monitor, by noise level", "gradient norm", "learning rate"):
        pairs = zip(resumed[title], uninterrupted[title], strict=True)
        assert all(list(one[2]) == list(other[2]) for one, other in pairs), title
    places = [
        [(line["stage"], line["step"]) for line in file_lines(folder, "memory.jsonl")] for folder in (tmp_path, whole)
    ]
    assert places[0] == places[1]


def test_numbers_that_are_not_finite_and_lines_that_are_cut_are_passed_over(tmp_path, drawing):
    rows = [{"stage": "semantic", "step": step, "loss": loss} for step, loss in ((1, 1.0), (2, None), (3, 3.0))]
    text = "\n".join(map(json.dumps, rows)) + '\n{"stage": "other", "step": 1, "loss": 9}\n[1]\n{"stage": "sem'
    (tmp_path / "metrics.jsonl").write_text(text)
    curves.draw(tmp_path, [("semantic", 4)])
    [(first, last, values)] = lines_of(drawing[0])["loss"]
    assert (first, last, values[0], values[2]) == (1, 3, 1.0, 3.0)
    assert values[1] != values[1]


def test_a_long_run_is_drawn_of_some_of_its_points(tmp_path, drawing):
    rows = [json.dumps({"stage": "semantic", "step": step, "loss": 1.0}) for step in range(1, 9001)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    curves.draw(tmp_path, [("semantic", 9000)])
    [(_, _, values)] = lines_of(drawing[0])["loss"]
    assert len(values) == 1800


def test_they_are_drawn_at_a_stages_end_and_in_between_if_it_is_not_too_soon(tmp_path, monkeypatch):
    """Drawing takes 2 % of the time at most: with 1 s, every 50 s."""
    now, drawn = [0.0], []
    monkeypatch.setattr(curves, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def draw(folder, stages):
        drawn.append(now[0])
        now[0] += 1.0

    monkeypatch.setattr(curves, "draw", draw)
    training = SimpleNamespace(recipe=SimpleNamespace(stages=[]))
    observer = curves.Curves(tmp_path)
    for second in (60, 76, 100, 127, 129):
        now[0] = second
        observer.on_checkpoint(training, tmp_path)
    observer.on_stage_end(training)
    assert drawn == [76, 129, 130]


def test_without_matplotlib_one_line_says_so_and_the_run_goes_on(tmp_path, drawing, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run(tiny_recipe([distil(), distil("detail")]), output=tmp_path, device="cpu")
    assert result.checkpoint is not None
    said = [line for line in capsys.readouterr().out.splitlines() if "note" in line]
    assert said == ["note: no curves.png: plots need matplotlib: pip install 'moedistill[plots]'"]
    assert not (tmp_path / "curves.png").exists()


def test_a_drawing_that_fails_is_said_once_and_a_full_disk_stops_the_run(tmp_path, drawing, monkeypatch, capsys):
    def fail(*_, **__):
        raise ValueError("no font")

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", fail)
        run(tiny_recipe([distil(), distil("detail")]), output=tmp_path / "one", device="cpu")
    assert capsys.readouterr().out.count("note: no curves.png: ValueError: no font") == 1

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(WriteError, match=r"^cannot write .*/curves.png: No space left on device .*; saved is "):
        run(tiny_recipe([distil()]), output=tmp_path / "two", device="cpu")
