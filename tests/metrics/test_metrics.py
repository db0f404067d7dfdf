"""Metrics: one row per sample and a function of rows, those of any backbone, and those that need something brought."""

import math
import shutil
import stat
import sys

import pytest
import torch
from helpers import distil, evaluate, tiny_recipe
from safetensors.torch import save_file

from moedistill.components.plugins import load_plugins
from moedistill.errors import RecipeError, UserError
from moedistill.media import write_mp4
from moedistill.metrics import fvd, relative
from moedistill.metrics.base import MetricInputs
from moedistill.metrics.fvd import FVDConfig
from moedistill.metrics.manifold import Coverage, Density
from moedistill.metrics.statistics import edge_energy, frechet_distance, in_balls, unrest
from moedistill.metrics.vbench import VBenchConfig
from moedistill.recipe.loading import load_recipe
from moedistill.runs.loop import run

BRING = {"fvd", "vbench"}
"""Metrics that cannot be built without files or programs of the user's."""
PAIRS = {"diversity"}
METRICS = [entry.name for entry in load_plugins().components.entries("metric") if entry.name not in BRING]


def build(kind, **keys):
    return load_plugins().components.get("metric", kind)(**keys).build()


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(videos, reference=None, **changes):
    reference = videos if reference is None else reference
    return MetricInputs(videos, videos, reference, reference, {}, **changes)


# -- rows and values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", METRICS)
def test_a_metric_is_rows_and_a_function_of_them(kind):
    """Any subset or resampling of rows is that of the samples; every row depends on its sample alone, but for pairs."""
    videos, reference = random(9, 1, 8, 24, 24), random(9, 1, 8, 24, 24, seed=1)
    cond = {"digit": torch.arange(9), "direction": torch.arange(9) % 4}
    metric = build(kind)
    rows = metric.rows(MetricInputs(videos, videos, reference, reference, cond))
    assert (rows.ndim, len(rows), rows.dtype) == (2, 9, torch.float64)
    for chosen in ([8, 0, 3, 3, 1], list(range(9))):
        asked = {name: value[chosen] for name, value in cond.items()}
        some = MetricInputs(*(tensor[chosen] for tensor in (videos, videos, reference, reference)), asked)
        if kind not in PAIRS:
            torch.testing.assert_close(metric.rows(some), rows[chosen], rtol=1e-5, atol=1e-5)
        value = metric.value(rows[chosen])
        assert isinstance(value, float)
        assert metric(some) == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True)


def test_rows_are_written_and_give_the_table(tmp_path):
    from safetensors.torch import load_file

    metrics = [{"kind": kind} for kind in METRICS]
    candidates = [{"name": "teacher/4", "model": "teacher"}, {"name": "b", "model": "teacher", "steps": 3}]
    stage = evaluate(metrics=metrics, candidates=candidates, reference="b", samples=6)
    result = run(tiny_recipe([distil(), stage]), output=tmp_path, device="cpu")
    rows = load_file(tmp_path / "evaluate" / "rows.safetensors")
    assert set(rows) == {f"{kind}/{name}" for kind in METRICS for name in ("teacher/4", "b")}
    for key, row in rows.items():
        kind, _, name = key.partition("/")
        assert (row.dtype, len(row)) == (torch.float64, 6)
        assert build(kind).value(row) == pytest.approx(
            result.metrics["evaluate"][name][kind], rel=0, abs=0, nan_ok=True
        )
    assert rows["frechet/b"].shape == (6, 64)


def test_rows_that_are_none_are_refused(tmp_path, monkeypatch):
    from moedistill.metrics.relative import PairedDistance

    for wrong, found in (
        (torch.zeros(4, dtype=torch.float64), r"float64 \[4\]"),
        (torch.zeros(4, 1), r"float32 \[4, 1\]"),
        (torch.zeros(3, 1, dtype=torch.float64), r"float64 \[3, 1\]"),
    ):
        monkeypatch.setattr(PairedDistance, "rows", lambda self, inputs, wrong=wrong: wrong)
        with pytest.raises(UserError, match=rf"paired_distance: its rows are {found}; they must be float64 \[4, D\]"):
            run(tiny_recipe([evaluate()]), output=tmp_path, device="cpu")


# -- metrics of any backbone ------------------------------------------------------------------------------------------


def test_frechet_distance_of_gaussians():
    samples = torch.randn(500, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = (samples - samples.mean(0)) @ torch.diag(torch.arange(1.0, 7.0, dtype=torch.float64))
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0, 3.0], dtype=torch.float64)
    trace = samples.var(0).sum().item()
    assert frechet_distance(samples, samples) == pytest.approx(0.0, abs=1e-8)
    assert frechet_distance(samples, samples + shift) == pytest.approx(14.25)
    assert frechet_distance(samples, 3 * samples) == pytest.approx(4 * trace)
    # Fewer samples than dimensions: singular covariances.
    assert frechet_distance(samples[:3], samples[:3] + shift) == pytest.approx(14.25, abs=1e-5)
    with pytest.raises(ValueError, match="at least 2 samples"):
        frechet_distance(samples[:1], samples)


def test_paired_distance():
    latents = torch.randn(3, 12, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    step = torch.tensor([0.0, 0.1, 0.2]).view(3, 1, 1, 1, 1)
    metric, inputs = build("paired_distance"), MetricInputs(latents, latents + step, latents, latents, {})
    rows = metric.rows(inputs)
    assert rows.flatten().tolist() == pytest.approx([0.0, 10.0, 40.0], rel=1e-4)
    assert metric(inputs) == metric.value(rows) == pytest.approx(50 / 3, rel=1e-4)
    assert metric.value(rows[[1, 2]]) == pytest.approx(25, rel=1e-4)


def test_median_and_flips_see_what_the_mean_does_not():
    """One sample of five in another mode: it makes nearly all of the mean, and nothing of the median."""
    latents, step = torch.zeros(5, 12, 2, 4, 4), torch.tensor([0.1, 0.2, 0.1, 1.4, 0.3]).view(5, 1, 1, 1, 1)
    inputs = MetricInputs(latents, latents + step, latents, latents, {})
    assert build("paired_distance")(inputs) == pytest.approx(1000 * (0.01 + 0.04 + 0.01 + 1.96 + 0.09) / 5, rel=1e-5)
    assert build("median_distance")(inputs) == pytest.approx(40, rel=1e-5)
    assert build("flips")(inputs) == 0.2
    assert build("flips", beyond=0.03)(inputs) == pytest.approx(3 / 5)


def test_diversity_is_the_mean_distance_of_pairs_of_equal_condition(monkeypatch):
    samples, reference = random(7, 3, 2, 4, 4), random(7, 3, 2, 4, 4, seed=1)
    asked = {"digit": torch.tensor([4, 1, 4, 1, 2, 4, 1]), "text": torch.zeros(7, 2, 3, dtype=torch.bfloat16)}
    pairs = [(0, 2), (0, 5), (2, 5), (1, 3), (1, 6), (3, 6)]

    def mean(x, chosen=pairs):
        return sum(float((x[i] - x[j]).double().square().mean().sqrt()) for i, j in chosen) / len(chosen)

    metric = build("diversity")
    rows = metric.rows(MetricInputs(samples, samples, reference, reference, asked))
    assert metric.value(rows) == pytest.approx(mean(samples) / mean(reference), rel=1e-6)
    # A sample that is drawn twice is no pair with itself, and counts twice with others.
    twice = [(0, 2), (0, 2), (1, 3)]
    assert metric.value(rows[[0, 0, 2, 1, 3, 4]]) == pytest.approx(
        mean(samples, twice) / mean(reference, twice), rel=1e-6
    )
    # By parts, as large latents are.
    monkeypatch.setattr(relative, "PART", 7)
    torch.testing.assert_close(metric.rows(MetricInputs(samples, samples, reference, reference, asked)), rows)
    # Half as far apart; all the same; no two of one condition.
    assert metric(MetricInputs(samples / 2, samples / 2, samples, samples, asked)) == pytest.approx(0.5)
    same = samples[:1].expand_as(samples)
    assert metric(MetricInputs(same, same, samples, samples, asked)) == pytest.approx(0, abs=1e-6)
    alone = {"digit": torch.arange(7)}
    assert math.isnan(metric(MetricInputs(samples, samples, reference, reference, alone)))


def test_coverage_and_density_by_brute_force():
    """Naeem et al., equations 4 and 5; and in 1-D by hand."""
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # with one neighbour the balls reach 1, 1, 2 and 4 far
    samples = torch.tensor([[0.5], [3.5], [20.0]])
    inside = in_balls(samples, real, 1)
    assert inside.tolist() == [[True, True, False, False], [False, False, True, True], [False] * 4]
    with pytest.raises(ValueError, match="neighbours 4: there must be more than that of real samples, not 4"):
        in_balls(samples, real, 4)

    real, samples = torch.randn(160, 5), torch.randn(70, 5) * 0.5
    inputs = inputs_of(random(70, 1, 2, 4, 4))
    radii = [sorted(float((a - b).norm()) for b in real)[5] for a in real]
    near = [[float((s - r).norm()) < radius for r, radius in zip(real, radii, strict=True)] for s in samples]
    for cls, expected in (
        (Density, sum(map(sum, near)) / 5 / 70),
        (Coverage, sum(any(column) for column in zip(*near, strict=True)) / 160),
    ):
        metric = cls(lambda _: samples, lambda: real)
        assert metric(inputs) == pytest.approx(expected)
    rows = metric.rows(inputs)
    assert metric.value(rows[[3, 3, 9]]) == pytest.approx(
        sum(a or b for a, b in zip(near[3], near[9], strict=True)) / 160
    )


def test_edge_energy_and_unrest_by_hand():
    video = torch.zeros(2, 3, 2, 4, 4)
    video[1, :, :, :, 2:] = 0.5  # one edge, of 3 places along the rows
    video[1, :, 1] = 1.0 - video[1, :, 1]  # half the pixels stay at 0.5, the others go from 0 to 1
    assert edge_energy(video).tolist() == pytest.approx([0.0, 0.25 / 3])
    # Frame 0 has 8 pixels of 0 and 8 of 0.5, frame 1 has 8 of 0.5 and 8 of 1: each grey value moves by 0.5.
    assert unrest(video).tolist() == pytest.approx([0.0, 0.5])
    assert unrest(video.flip(-1)).tolist() == unrest(video).tolist()


def test_sharpness_and_flicker_relative_to_the_reference():
    reference = random(4, 3, 5, 12, 12)
    blurred = torch.nn.functional.avg_pool3d(reference, (1, 3, 3), 1, (0, 1, 1))
    for kind, measure in (("relative_sharpness", edge_energy), ("relative_flicker", unrest)):
        metric = build(kind)
        assert metric(inputs_of(reference, reference)) == 1.0
        expected = (measure(blurred).sum() / measure(reference).sum()).item()
        assert metric(inputs_of(blurred, reference)) == pytest.approx(expected)
    assert build("relative_sharpness")(inputs_of(blurred, reference)) < 0.3
    assert build("relative_flicker")(inputs_of(reference[:, :, [0] * 5], reference)) == 0.0
    # Samples that differ much count for what they have: a ratio of sums, not a mean of ratios.
    faint = reference * torch.tensor([1.0, 0.0, 0.0, 0.0]).view(4, 1, 1, 1, 1)
    assert build("relative_sharpness")(inputs_of(reference, faint)) == pytest.approx(4, rel=0.2)


# -- fvd --------------------------------------------------------------------------------------------------------------


class Network(torch.nn.Module):
    """Mean and spread of each colour of a video, and how much it moves: 7 features."""

    def forward(self, videos: torch.Tensor) -> torch.Tensor:
        flat = videos.flatten(2)
        motion = (videos[:, :, 1:] - videos[:, :, :-1]).abs().flatten(1).mean(1, keepdim=True)
        return torch.cat([flat.mean(2), flat.std(2), motion], 1)


class Selective(torch.nn.Module):
    """As StyleGAN-V's file: classes, unless its features are asked for; rescales unless told not to."""

    def forward(self, videos: torch.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False):
        if rescale or resize or not return_features:
            return torch.zeros(len(videos), 2)
        return torch.stack(
            [videos.flatten(1).amax(1), videos.flatten(1).amin(1), videos[:, :, 0].flatten(1).mean(1)], 1
        )


def coloured(number, width):
    """A video of one colour that brightens: compression keeps it."""
    colour = random(3, 1, 1, 1, seed=number) * torch.linspace(0.4, 1.0, 7).view(1, 7, 1, 1)
    return colour.expand(3, 7, 32, width)


@pytest.fixture(scope="module")
def brought(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fvd")
    torch.jit.script(Network()).save(folder / "network.pt")
    torch.jit.script(Selective()).save(folder / "selective.pt")
    (folder / "real").mkdir()
    for number in range(4):
        write_mp4(folder / "real" / f"{number}.mp4", coloured(number, width=32 + 16 * (number % 2)), fps=8)
    (folder / "real" / "notes.txt").write_text("not a video")
    return folder


def test_fvd_is_the_frechet_distance_of_the_networks_features(brought, tmp_path):
    """Of the first frames, scaled to [-1, 1] and resized."""
    videos = random(5, 3, 9, 16, 24)
    features = random(6, 7).double()
    save_file({"features": features}, tmp_path / "features.safetensors")
    keys = {"detector": str(brought / "network.pt"), "frames": 6, "size": 16, "batch_size": 2}
    config = FVDConfig(**keys, real=str(tmp_path / "features.safetensors"))
    config.look_ahead()
    metric = config.build()
    rows = metric.rows(inputs_of(videos))
    seen = torch.nn.functional.interpolate(2 * videos[:, :, :6] - 1, (6, 16, 16), mode="trilinear")
    torch.testing.assert_close(rows, Network()(seen).double())
    assert metric(inputs_of(videos)) == pytest.approx(frechet_distance(rows, features))
    # Grey videos are seen as coloured ones.
    assert metric.rows(inputs_of(videos[:, :1])).shape == (5, 7)
    with pytest.raises(ValueError, match="a video has 5 frames, fewer than frames: 6"):
        metric.rows(inputs_of(videos[:, :, :5]))


def test_fvd_to_real_videos_in_a_folder(brought):
    config = FVDConfig(detector=str(brought / "network.pt"), real=str(brought / "real"), frames=7, size=32)
    config.look_ahead()
    metric = config.build()
    real = torch.stack([coloured(number, width=32) for number in range(4)])
    close, far = metric(inputs_of(real)), metric(inputs_of(1 - real))
    assert close < 0.01 < 0.1 < far


def test_features_of_real_videos_are_made_once(brought, tmp_path, monkeypatch):
    """For all metrics of the same settings and files, as a report has them."""
    real = tmp_path / "real"
    shutil.copytree(brought / "real", real)
    read, seen = fvd._read, []
    monkeypatch.setattr(fvd, "_read", lambda path, frames: seen.append(path.name) or read(path, frames))
    keys = {"detector": str(brought / "network.pt"), "real": str(real), "frames": 7, "size": 32}
    rows = random(5, 7).double()

    def value(**changes):
        return FVDConfig(**{**keys, **changes}).build().value(rows)

    first = value()
    assert len(seen) == 4
    assert value() == value(batch_size=2) == first
    assert len(seen) == 4
    assert value(size=16) != first
    assert value(frames=3) != first
    assert len(seen) == 12
    (real / "3.mp4").unlink()
    assert value() != first
    assert len(seen) == 15


def test_the_usual_network_is_asked_for_features(brought, tmp_path):
    save_file({"features": random(4, 3)}, tmp_path / "real.safetensors")
    keys = {"frames": 4, "size": 8, "real": str(tmp_path / "real.safetensors")}
    videos = torch.stack([torch.zeros(3, 4, 8, 8), torch.ones(3, 4, 8, 8)])
    rows = FVDConfig(detector=str(brought / "selective.pt"), **keys).build().rows(inputs_of(videos))
    assert rows.tolist() == [[-1, -1, -1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"detector": "i3d.pt"}, "detector i3d.pt does not exist; it is a TorchScript file"),
        ({"real": "nowhere"}, "real nowhere does not exist; give a folder of real videos"),
        ({"real": "few"}, "real few holds 1 videos"),
        ({"real": "other.safetensors"}, r"holds mean \[3\]; it must hold 'features' \[M, D\] of M ≥ 2"),
        ({"real": "text"}, "real text is neither a folder nor a safetensors file"),
    ],
)
def test_what_fvd_lacks_is_said_before_training(brought, tmp_path, monkeypatch, keys, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "0.mp4").write_text("")
    (tmp_path / "text").write_text("nothing")
    save_file({"mean": torch.zeros(3)}, "other.safetensors")
    metric = {"kind": "fvd", "detector": str(brought / "network.pt"), "real": str(brought / "real"), **keys}
    with pytest.raises(UserError, match=message):
        run(tiny_recipe([distil(), evaluate(metrics=[metric])]), output=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_detector_that_is_none(brought, tmp_path):
    (tmp_path / "weights.pt").write_text("nothing")
    torch.jit.script(torch.nn.Flatten(0)).save(tmp_path / "flat.pt")
    for name, message in (
        ("weights.pt", "is no TorchScript file"),
        ("flat.pt", r"makes \[\d+\] of 2 videos; it must be"),
    ):
        metric = FVDConfig(detector=str(tmp_path / name), real=str(brought / "real"), frames=2, size=4).build()
        with pytest.raises(ValueError, match=message):
            metric.rows(inputs_of(random(2, 1, 2, 4, 4)))


# -- vbench -----------------------------------------------------------------------------------------------------------

FAKE = """#!{python}
import json, os, sys
import av
import numpy as np

assert sys.argv[1] == "evaluate"
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
assert options["--mode"] == "custom_input"
assert os.environ["PATH"].startswith({folder!r})
results = []
for name in sorted(os.listdir(options["--videos_path"]), reverse=True):
    path = os.path.join(options["--videos_path"], name)
    with av.open(path) as container:
        rate = float(container.streams.video[0].average_rate)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    score = bool(rate == 12) if options["--dimension"] == "dynamic_degree" else float(np.mean(frames)) / 2.55
    results.append({{"video_path": path, "video_results": score}})
print("loading networks")
if {fails}:
    sys.exit("CUDA is needed")
os.makedirs(options["--output_path"])
with open(os.path.join(options["--output_path"], "results_now_eval_results.json"), "w") as file:
    json.dump({{options["--dimension"]: [0.0, results[{dropped}:]]}}, file)
"""


def fake(folder, fails=False, dropped=0):
    """A program that speaks as VBench's does, and measures brightness and the frame rate."""
    program = folder / "vbench"
    program.write_text(FAKE.format(python=sys.executable, folder=str(folder), fails=fails, dropped=dropped))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


def test_vbench_gives_a_column_for_each_dimension(tmp_path):
    videos = torch.linspace(0.2, 0.8, 4).view(4, 1, 1, 1, 1).expand(4, 1, 3, 16, 16)
    metric = VBenchConfig(dimensions=["imaging_quality", "dynamic_degree"], command=fake(tmp_path)).build()
    rows = metric.rows(inputs_of(videos, fps=12.0))
    assert rows.dtype == torch.float64
    assert rows[:, 0].tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8], abs=0.02)  # VBench says 0 to 100
    assert rows[:, 1].tolist() == [1.0] * 4
    assert metric.value(rows) == pytest.approx(0.75, abs=0.02)
    assert metric.rows(inputs_of(videos, fps=8.0))[:, 1].tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fails": True}, "left no results of imaging_quality; it said: loading networks\nCUDA is needed"),
        ({"dropped": 1}, "3 results of imaging_quality for 4 videos"),
    ],
)
def test_a_vbench_that_fails_is_heard(tmp_path, changes, message):
    metric = VBenchConfig(dimensions=["imaging_quality"], command=fake(tmp_path, **changes)).build()
    with pytest.raises(ValueError, match=message):
        metric.rows(inputs_of(random(4, 1, 2, 16, 16)))


def test_vbench_is_looked_for_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    stages = [distil(), evaluate(metrics=[{"kind": "vbench", "dimensions": ["imaging_quality"]}])]
    with pytest.raises(UserError, match=r"there is no program 'vbench'\. Install VBench in an environment of its own"):
        run(tiny_recipe(stages), output=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
    fake(tmp_path)
    VBenchConfig(dimensions=["imaging_quality"]).look_ahead()


@pytest.mark.parametrize("dimensions", [[], ["color"], ["imaging_quality", "imaging_quality"]])
def test_dimensions_that_do_not_work_are_refused(dimensions):
    with pytest.raises(RecipeError, match="dimensions"):
        load_recipe(tiny_recipe([evaluate(metrics=[{"kind": "vbench", "dimensions": dimensions}])]))
