"""The report: estimates and intervals that statistics predicts, methods told apart, and what cannot be compared."""

import json
import math
import os
import re
import shutil
import textwrap

import pytest
import torch
from helpers import distil, evaluate, tiny_recipe
from safetensors.torch import load_file, save_file

from moedistill.cli import main
from moedistill.components.plugins import load_plugins
from moedistill.errors import UserError
from moedistill.recipe.loading import load_recipe
from moedistill.runs.loop import run
from moedistill.runs.tables import (
    ONE_SEED,
    Estimate,
    Line,
    Record,
    Table,
    _estimate,
    _sampling_error,
    methods,
    read_records,
    tabulate,
)
from moedistill.stages.evaluate import EvaluateConfig

SAMPLES = 400


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One tiny run; tests take copies of it."""
    folder = tmp_path_factory.mktemp("report") / "run"
    metrics = [{"kind": "paired_distance"}, {"kind": "digit_accuracy"}]
    candidates = [{"name": "teacher", "model": "teacher"}, {"name": "student"}]
    stages = [distil(steps=3), distil("detail"), evaluate(metrics=metrics, candidates=candidates, reference="teacher")]
    run(tiny_recipe(stages), output=folder)
    return folder


def copy_of(finished, folder, *, name="tiny", seed=0, rows=None, evaluation=None, **settings):
    """A run's folder with another name, seed, settings and `rows` of the student's paired distance."""
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("checkpoints"))
    text = (folder / "recipe.yaml").read_text()
    text = text.replace("name: tiny", f"name: {name}").replace("seed: 0\nbackbone", f"seed: {seed}\nbackbone")
    samples = SAMPLES if rows is not None else 4
    text = text.replace("samples: 4", f"samples: {samples}")
    for old, new in (evaluation or {}).items():
        assert old in text
        text = text.replace(old, new)
    (folder / "recipe.yaml").write_text(text)
    if rows is not None:
        save_file({"paired_distance/student": rows.double()[:, None]}, folder / "evaluate" / "rows.safetensors")
    return folder


def normal(seed, mean=10.0, spread=2.0):
    return mean + spread * torch.randn(SAMPLES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_values_are_the_evaluations(finished):
    table = tabulate(read_records([finished]), resamples=10)
    result = json.loads((finished / "result.json").read_text())["evaluate"]
    assert [line.candidate for line in table.lines] == ["teacher", "student"]
    for line in table.lines:
        assert {kind: value.mean for kind, value in line.values.items()} == pytest.approx(result[line.candidate])


def test_costs_are_counted(finished):
    [record] = read_records([finished])
    # Three forwards a step (student, teacher, target), but where every jump of a batch has zero length.
    assert record.cost["semantic"]["steps"] == 3
    assert 2 * 3 * 4 <= record.cost["semantic"]["forwards"] <= 3 * 3 * 4
    assert record.total("steps") == 5
    assert record.total("seconds") > 0


def test_an_interval_is_that_of_the_mean(finished, tmp_path):
    rows = normal(1)
    record = read_records([copy_of(finished, tmp_path / "run", rows=rows)])
    [line] = tabulate(record, resamples=2000).lines
    estimate = line.values["paired_distance"]
    half = 1.96 * float(rows.std()) / math.sqrt(SAMPLES)
    assert estimate.mean == pytest.approx(float(rows.mean()), rel=1e-12)
    assert estimate.high - estimate.mean == pytest.approx(half, rel=0.1)
    assert estimate.mean - estimate.low == pytest.approx(half, rel=0.1)


def test_the_interval_of_a_frechet_distance_holds_it(finished, tmp_path):
    """Every resampling's distance is larger, by its repeated samples; the interval is put where the estimate is."""
    features = torch.randn(SAMPLES, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    folder = copy_of(finished, tmp_path / "run", rows=normal(1), evaluation={"kind: digit_accuracy": "kind: frechet"})
    save_file({"frechet/student": features}, folder / "evaluate" / "rows.safetensors")
    [line] = tabulate(read_records([folder]), resamples=50).lines
    estimate = line.values["frechet"]
    assert estimate.low < estimate.mean < estimate.high
    assert estimate.high - estimate.low < 0.1 * estimate.mean


def test_the_interval_has_the_spread_of_seeds(finished, tmp_path):
    """By Student's t: of three seeds the quantile is 4.303 standard errors, and the samples hardly count."""
    means = torch.tensor([0.0, 40.0, 110.0])
    for seed, mean in enumerate(means.tolist()):
        copy_of(finished, tmp_path / f"seed{seed}", seed=seed, rows=normal(seed, mean, 0.1))
    [line] = tabulate(read_records([tmp_path]), resamples=100).lines
    estimate = line.values["paired_distance"]
    assert estimate.seeds == pytest.approx(means.tolist(), abs=0.1)
    assert estimate.mean == pytest.approx(50.0, abs=0.1)
    assert estimate.high - estimate.mean == pytest.approx(4.3027 * float(means.std()) / math.sqrt(3), rel=0.01)
    assert estimate.mean - estimate.low == pytest.approx(estimate.high - estimate.mean)


def test_draws_without_anything_to_measure_do_not_count():
    """As a draw of samples of which no two have a condition in common."""
    values = torch.randn(1, 41, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    some, most = values.clone(), values.clone()
    some[0, 5], most[0, 5:30] = math.nan, math.nan
    kept = [k for k in range(1, 41) if k != 5]
    assert _sampling_error(some) == pytest.approx(values[0, kept].std().item())
    assert math.isnan(_sampling_error(most))


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Three seeds of 50 samples, both with a spread: of 400 studies about 95 % hold the mean."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(50, (100, 50), generator=generator)
    held = 0
    for _ in range(400):
        shared = torch.randn(50, generator=generator, dtype=torch.float64)
        rows = [shared + 0.3 * torch.randn((), generator=generator) for _ in range(3)]
        estimate = _estimate(torch.stack([torch.stack([r.mean(), *(r[draw].mean() for draw in draws)]) for r in rows]))
        held += estimate.low <= 0.0 <= estimate.high
    assert 0.93 <= held / 400 <= 1.0


def test_what_samples_and_seeds_share_cancels_in_a_difference(finished, tmp_path):
    rows = normal(1, spread=50.0)
    for seed, shift in enumerate((0.0, 100.0)):
        copy_of(finished, tmp_path / f"a{seed}", name="base", seed=seed, rows=rows + shift)
        other = rows + shift + normal(2, mean=3.0, spread=0.1)
        copy_of(finished, tmp_path / f"b{seed}", name="other", seed=seed, rows=other)
    base, other = tabulate(read_records([tmp_path]), against="base").lines
    assert base.differences == {}
    difference = other.differences["paired_distance"]
    assert difference.mean == pytest.approx(3.0, abs=0.02)
    assert difference.high - difference.low < 0.04
    assert other.values["paired_distance"].high - other.values["paired_distance"].low > 100


def test_numbers_are_short_and_plain():
    assert str(Estimate(4896.4, -0.01234, 12345.6, [])) == "4896 [-0.0123, 12346]"


def test_a_difference_can_be_taken_to_another_candidate(finished, tmp_path):
    """Also within the method that differences are taken to; never of a candidate to itself."""
    rows = normal(1)
    for name, shift in (("base", 0.0), ("other", 3.0)):
        folder = copy_of(finished, tmp_path / name, name=name, rows=rows + shift)
        values = {"paired_distance/student": rows + shift, "paired_distance/teacher": rows + 2 * shift + 1}
        save_file({key: value.double()[:, None] for key, value in values.items()}, folder / "evaluate/rows.safetensors")
    lines = tabulate(read_records([tmp_path]), against="base", counterpart=lambda name: "student").lines
    differences = {
        (line.method, line.candidate): line.differences["paired_distance"].mean for line in lines if line.differences
    }
    assert differences == {
        ("base", "teacher"): pytest.approx(1.0),
        ("other", "student"): pytest.approx(3.0),
        ("other", "teacher"): pytest.approx(7.0),
    }


def test_other_seeds_are_no_pairs(finished, tmp_path):
    """Each method's seeds then add their own spread; a single run adds none."""
    for name, seeds in (("base", (0, 1)), ("other", (2, 3)), ("single", (0,))):
        for seed, mean in zip(seeds, (0.0, 100.0), strict=False):
            copy_of(finished, tmp_path / f"{name}{seed}", name=name, seed=seed, rows=normal(1, mean))
    lines = tabulate(read_records([tmp_path]), against="base").lines
    other, single = (line.differences["paired_distance"] for line in lines[1:])
    error = 100 / math.sqrt(2) / math.sqrt(2)
    assert other.mean == pytest.approx(0.0, abs=1e-9)
    assert other.high == pytest.approx(12.7062 * math.hypot(error, error), rel=0.01)
    assert single.mean == pytest.approx(-50.0, abs=1e-6)
    assert single.high - single.mean == pytest.approx(12.7062 * error, rel=0.01)


def test_methods_are_named_by_what_differs(finished, tmp_path):
    copy_of(finished, tmp_path / "a")
    copy_of(finished, tmp_path / "b", seed=1)
    copy_of(finished, tmp_path / "c", evaluation={"rank: 2": "rank: 3"})
    grouped = methods(read_records([tmp_path]))
    assert {name: [record.recipe.seed for record in runs] for name, runs in grouped.items()} == {
        "tiny (experts.detail.rank=2)": [0, 1],
        "tiny (experts.detail.rank=3)": [0],
    }


def test_a_folder_counts_once(finished, tmp_path):
    copy_of(finished, tmp_path / "a")
    assert [record.folder for record in read_records([tmp_path, tmp_path / "a"])] == [tmp_path / "a"]


def refuse(folders, words, **arguments):
    with pytest.raises(UserError) as error:
        tabulate(read_records(folders), **arguments)
    for word in words:
        assert word in str(error.value)


def test_what_cannot_be_compared_is_refused(finished, tmp_path):
    copy_of(finished, tmp_path / "a")
    refuse([tmp_path], ["--against nobody", "tiny"], against="nobody")
    copy_of(finished, tmp_path / "b", name="other", rows=normal(1))
    refuse([tmp_path], ["different noise (samples 4 and 400)"])
    refuse([tmp_path / "a"], ["--metric nothing", "paired_distance, digit_accuracy"], metrics=["nothing"])
    ways = f"Name those that share it, such as {tmp_path / 'a'}; without --table all are listed"
    refuse([tmp_path], [ways])
    refuse([tmp_path / "nowhere"], ["nowhere", "no such folder"])
    (tmp_path / "empty").mkdir()
    refuse([tmp_path / "empty"], ["empty", "rows.safetensors"])


def command(*words):
    with pytest.raises(SystemExit) as stopped:
        main(["report", *map(str, words)])
    return stopped.value.code


def test_the_command(finished, tmp_path, capsys):
    copy_of(finished, tmp_path / "a", name="base")
    copy_of(finished, tmp_path / "b", name="other")
    assert command(tmp_path) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == ["base", "other"]
    assert "5 steps" in listed[0]
    assert listed[0].endswith(f"finished  {tmp_path / 'a'}")

    assert command(tmp_path, "--table", "--against", "base", "--json", tmp_path / "new" / "table.json") == 0
    shown = capsys.readouterr().out
    assert len(re.findall(r"\| other \| student \| \d\d \| 1 \|", shown)) == 2  # the values, and the differences
    assert "Difference to base" in shown
    plain = json.loads((tmp_path / "new" / "table.json").read_text())
    assert [run["method"] for run in plain["runs"]] == ["base", "other"]
    last = plain["lines"][-1]
    assert last["differences"]["paired_distance"]["mean"] == 0.0
    rows = load_file(finished / "evaluate" / "rows.safetensors")["paired_distance/student"]
    assert last["values"]["paired_distance"]["mean"] == pytest.approx(float(rows.mean()))

    assert command(tmp_path, "--table", "--metric", "paired_distance") == 0
    assert "accuracy" not in capsys.readouterr().out
    assert command(tmp_path, "--against", "base") == 2
    assert command(tmp_path, "--table", "--against", "nobody") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_of_two_runs_of_a_seed_the_newer_one_counts(finished, tmp_path, capsys):
    for name, written, mean in (("new", 2000, 5.0), ("old", 1000, 9.0)):
        folder = copy_of(finished, tmp_path / name, rows=normal(1, mean))
        os.utime(folder / "evaluate" / "rows.safetensors", (written, written))
    table = tabulate(read_records([tmp_path]), resamples=10)
    [line] = table.lines
    assert line.values["paired_distance"].seeds == [pytest.approx(5.0, abs=0.5)]
    old, new = tmp_path / "old", tmp_path / "new"
    assert table.notes == [f"{old} is not counted: {new} is of the same method and seed, and newer"]
    assert command(tmp_path, "--table", "--json", tmp_path / "table.json") == 0
    assert f"note: {table.notes[0]}\n" in capsys.readouterr().err
    assert json.loads((tmp_path / "table.json").read_text())["notes"] == table.notes
    assert command(tmp_path) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0].endswith(f"finished  {new}")
    assert listed[1].endswith(f"finished  older than {new} of the same seed: not counted  {old}")


def test_an_interval_of_one_seed_says_so(finished, tmp_path):
    """Not the teacher's, in which no seed has a part; and differences to a method of one seed."""
    rows = normal(1)
    for name, seeds in (("one", (0,)), ("two", (0, 1))):
        for seed in seeds:
            folder = copy_of(finished, tmp_path / f"{name}{seed}", name=name, seed=seed, rows=rows)
            values = {f"paired_distance/{model}": rows[:, None].clone() for model in ("student", "teacher")}
            save_file(values, folder / "evaluate/rows.safetensors")
    table = tabulate(read_records([tmp_path]), against="one", resamples=10)
    marked = {(line.method, line.candidate): line.values["paired_distance"].samples_only for line in table.lines}
    assert marked == {
        ("one", "student"): True, ("one", "teacher"): False, ("two", "student"): False, ("two", "teacher"): False,
    }  # fmt: skip
    [student] = [line for line in table.lines if (line.method, line.candidate) == ("two", "student")]
    assert student.differences["paired_distance"].samples_only
    shown = table.markdown()
    assert re.search(r"\| one \| student \| \d\d \| 1 \| [^|]*\]† \|", shown)
    assert re.search(r"\| two \| student \| \d\d \| 2 \| [^|]*\] \|", shown)
    assert shown.endswith(
        "† of one training seed: the interval is that of the evaluation's samples alone (bootstrap); "
        "a model of another seed may lie outside."
    )
    assert "†" not in tabulate(read_records([tmp_path / "two0", tmp_path / "two1"]), resamples=10).markdown()


def test_shares_stay_shares(finished, tmp_path):
    """399 of 400 right: mean ± 1.96 errors goes beyond 1; so does a difference of nearly 1."""
    right = torch.ones(SAMPLES, 1, dtype=torch.float64)
    right[0] = 0.0
    for name, rows in (("good", right), ("bad", 1 - right)):
        folder = copy_of(finished, tmp_path / name, name=name, rows=normal(1))
        save_file({"digit_accuracy/student": rows}, folder / "evaluate/rows.safetensors")
    bad, good = tabulate(read_records([tmp_path]), against="bad", resamples=200).lines
    value, difference = good.values["digit_accuracy"], good.differences["digit_accuracy"]
    assert (value.mean, value.high) == (399 / 400, 1.0)
    assert 0.99 < value.low < value.mean
    assert (bad.values["digit_accuracy"].low, difference.high) == (0.0, 1.0)
    assert difference.mean == pytest.approx(398 / 400)


def test_metrics_that_are_shares():
    components = load_plugins().components
    settings = {"fvd": {"detector": "x", "real": "x"}, "vbench": {"dimensions": ["dynamic_degree"]}}
    kinds = components.names("metric")
    built = {k: components.get("metric", k)(**settings.get(k, {})).build() for k in kinds if k not in ("fvd",)}
    assert sorted(kind for kind, metric in built.items() if metric.share) == [
        "coverage", "digit_accuracy", "direction_accuracy", "flips",
    ]  # fmt: skip


def test_a_wide_table_is_a_list_on_a_terminal(finished, tmp_path):
    """With all metrics that a shipped recipe of digits has, and names as long as theirs."""
    recipe = load_recipe("evidence_digits")
    [stage] = [stage for stage in recipe.stages if isinstance(stage, EvaluateConfig)]
    kinds = [metric.kind for metric in stage.metrics]
    assert len(kinds) >= 10
    estimate = Estimate(-0.01234, -1234.5, 12345.6, [0.0], samples_only=True)
    values = dict.fromkeys(kinds, estimate)
    name = "ablations/digits_two_full_experts (stages.detail.optimizer.lr=1e-05, experts.detail.rank=4)"
    lines = [Line(name, one.name, 1234567.0, values, values) for one in stage.candidates]
    table = Table(lines, [], against="evidence_digits")
    assert max(map(len, table.markdown().splitlines())) > 300
    shown = table.markdown(80)
    assert max(map(len, shown.splitlines())) <= 80
    for kind in kinds:
        assert shown.count(f"  {kind.replace('_', ' ')}  ") == 2 * len(lines)
    assert shown.count("-0.0123 [-1234, 12346]†") == 2 * len(lines) * len(kinds)
    narrow = Table([Line("a", "b", 1.0, {"frechet": estimate})], [])
    assert narrow.markdown(80) == "\n".join(narrow.markdown().splitlines()[:4]) + "\n" + "\n".join(
        textwrap.wrap(ONE_SEED, 80)
    )


def test_records_hold_no_more_than_they_say(finished):
    [record] = read_records([finished])
    assert isinstance(record, Record)
    assert (record.noise["samples"], record.noise["seed"], record.noise["prompts"]) == (4, 0, None)
    assert set(record.rows["student"]) == set(record.metrics) == {"paired_distance", "digit_accuracy"}
    assert all(len(rows) == 4 for rows in record.rows["student"].values())
