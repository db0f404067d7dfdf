"""A run around its steps: trackers, progress, numbers that are not finite, devices."""

import io
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.tracking import TensorBoardTracker
from helpers import distil, tiny_recipe
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moedistill import hookimpl
from moedistill.components.plugins import load_plugins
from moedistill.errors import Interrupted, UserError
from moedistill.losses.base import Loss, LossConfig
from moedistill.runs.callbacks import Progress
from moedistill.runs.loop import run
from moedistill.stages.consistency import ConsistencyStage
from moedistill_digits.data import DigitsDataset

STAGES = [distil(steps=2), distil("detail", steps=2)]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logged(folder):
    """Steps and values in the event files, by tag."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_gets_what_metrics_jsonl_gets(tmp_path):
    recipe = tiny_recipe(STAGES, {"training.trackers": ["tensorboard"], "training.checkpoint_every": 1})
    result = run(recipe, output=tmp_path / "a", device="cpu")
    found = {file.parent for file in (tmp_path / "a").rglob("events.out.tfevents.*")}
    assert len(found) == 1
    values = logged(found.pop())
    for number, stage in enumerate(("semantic", "detail")):
        expected = [line for line in lines(tmp_path / "a") if line["stage"] == stage]
        for name in ("loss", "loss/huber", "grad_norm/student"):
            assert [step for step, _ in values[f"{stage}/{name}"]] == [2 * number + 1, 2 * number + 2]
            assert [value for _, value in values[f"{stage}/{name}"]] == pytest.approx([e[name] for e in expected])

    # A resumed run counts on.
    middle = result.checkpoint.parent / "01_detail_00000001"
    run(recipe, output=tmp_path / "b", resume_from=middle, device="cpu")
    (folder,) = {file.parent for file in (tmp_path / "b").rglob("events.out.tfevents.*")}
    assert logged(folder)["detail/loss"] == [values["detail/loss"][1]]


def test_an_unknown_tracker_is_refused_with_what_there_is(tmp_path):
    with pytest.raises(UserError, match=r"'tensorbord' is not installed or not known; installed here: .*tensorboard"):
        run(tiny_recipe(STAGES, {"training.trackers": ["tensorbord"]}), output=tmp_path, device="cpu")


def fail(*_, **__):
    raise ConnectionRefusedError(111, "Connection refused")


@pytest.fixture
def closed(monkeypatch):
    """The trackers that were closed, each of which then fails."""
    names = []

    def finish(self):
        names.append(self.name)
        fail()

    monkeypatch.setattr(TensorBoardTracker, "finish", finish)
    return names


TRACKED = {"training.trackers": ["tensorboard"], "training.checkpoint_every": 1}
UNCLOSED = (
    "warning: training.trackers: tensorboard cannot be closed: [Errno 111] Connection refused; "
    "what it was to get is in metrics.jsonl"
)


def test_a_tracker_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    with pytest.raises(UserError) as caught:
        run(tiny_recipe(STAGES, TRACKED), output=tmp_path, device="cpu")
    assert str(caught.value) == (
        "training.trackers: tensorboard cannot be written to: [Errno 111] Connection refused; nothing is saved yet; "
        f"begin it anew with: moedistill run {tmp_path}/recipe.yaml --output {tmp_path} --device cpu"
    )


def test_a_tracker_that_cannot_be_closed_hides_nothing(tmp_path, monkeypatch, closed, capsys):
    plugins = load_plugins()
    usual = plugins.manager.get_plugins()
    assert run(tiny_recipe(STAGES, TRACKED), output=tmp_path / "a", device="cpu", plugins=plugins).checkpoint
    assert UNCLOSED in capsys.readouterr().out

    def stop(*_):
        raise Interrupted(15, "stopped")

    monkeypatch.setattr(ConsistencyStage, "step", stop)
    with pytest.raises(Interrupted):
        run(tiny_recipe(STAGES, TRACKED), output=tmp_path / "b", device="cpu", plugins=plugins)
    assert closed == ["tensorboard"] * 2
    assert plugins.manager.get_plugins() == usual


def test_a_tracker_is_closed_where_a_run_does_not_begin(tmp_path, monkeypatch, closed):
    run(tiny_recipe(STAGES, TRACKED), output=tmp_path, device="cpu")

    def broken(*_, **__):
        raise UserError("cannot be read")

    monkeypatch.setattr("moedistill.runs.loop.read_weights", broken)
    with pytest.raises(UserError, match="cannot be read"):
        run(tiny_recipe(STAGES, TRACKED), output=tmp_path, resume=True, device="cpu")
    assert closed == ["tensorboard"] * 2


@dataclass(kw_only=True)
class BreakingConfig(LossConfig):
    """Not a number from its third call on."""

    def build(self, layout):
        return Breaking()


class Breaking(Loss):
    calls = 0

    def __call__(self, tensors):
        self.calls += 1
        return tensors.prediction.mean() * (float("nan") if self.calls > 2 else 0.0)


@pytest.mark.parametrize("log_every", [1, 100])
def test_numbers_that_are_not_finite_stop_the_run_before_they_are_saved(tmp_path, log_every):
    plugins = load_plugins()
    plugins.components.begin("test")
    plugins.components.register("loss", "breaking", BreakingConfig)
    recipe = tiny_recipe(
        [distil(steps=5, losses=[{"kind": "huber"}, {"kind": "breaking"}])],
        {"training.checkpoint_every": 1, "training.log_every": log_every},
    )
    with pytest.raises(
        UserError, match="stage semantic, step 3: grad_norm/student = nan, loss = nan, loss/breaking = nan"
    ):
        run(recipe, output=tmp_path, device="cpu", plugins=plugins)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "00_semantic_00000001",
        "00_semantic_00000002",
    ]


@pytest.mark.parametrize(("log_every", "logged"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (100, [5])])
def test_steps_are_logged_as_asked_whatever_is_saved(tmp_path, log_every, logged):
    calls = []

    class Observer:
        @hookimpl
        def on_step_end(self, training, metrics):
            calls.append((training.step, metrics["loss"]))

    plugins = load_plugins()
    plugins.manager.register(Observer())
    changes = {"training.checkpoint_every": 3, "training.log_every": log_every}
    run(tiny_recipe([distil(steps=5)], changes), output=tmp_path, device="cpu", plugins=plugins)
    assert [line["step"] for line in lines(tmp_path)] == logged
    assert calls == [(line["step"], line["loss"]) for line in lines(tmp_path)]


METRICS = {"grad_norm/student": 0.5, "loss": 1.25, "loss/huber": 0.0123}


def show(console):
    """The progress of a stage of ten steps, two of them done."""
    progress = Progress(console)
    config = SimpleNamespace(name="semantic", kind="consistency")
    stage = SimpleNamespace(config=config, expert="sem", step=0, steps=10)
    progress.on_stage_start(training=stage)
    for stage.step in (1, 2):
        progress.on_step_end(training=stage, metrics=METRICS)
    return progress, stage


def test_progress_is_plain_lines_where_there_is_no_terminal():
    file = io.StringIO()
    progress, stage = show(Console(file=file, width=60))
    progress.on_stage_end(training=stage)
    title, first, second = file.getvalue().splitlines()
    assert title == "semantic (consistency, expert sem, 10 steps)"
    assert first.startswith("  1/10  grad_norm/student 0.5  loss 1.25  huber 0.0123  ")
    assert second.startswith("  2/10  ")
    assert "steps/s" in second
    assert "GiB" in second
    assert second.endswith(" left")
    assert "\x1b" not in file.getvalue()


@pytest.mark.parametrize("width", [60, 160])
def test_progress_is_a_live_bar_in_a_terminal(width):
    file = io.StringIO()
    progress, _ = show(Console(file=file, force_terminal=True, width=width))
    assert progress._bar is not None
    progress._bar.refresh()
    progress.stop()
    text = file.getvalue()
    for shown in ("semantic (consistency, expert sem, 10 steps)", "━", "2/10", "huber 0.0123", "steps/s", "GiB"):
        assert shown in text, shown
    assert text.count("\x1b[?25l") == 1  # the cursor was hidden …
    assert text.count("\x1b[?25h") == 1  # … and is back
    progress.stop()  # after an error it is stopped twice


def test_the_bar_moves_at_every_step_and_keeps_what_was_measured_on_fixed_draws(tmp_path, monkeypatch):
    """Lines of metrics are written at steps 0, 3, 6 and 7, and the monitor measures at 0, 4 and 7."""
    seen = []

    class Watched(Progress):
        def __init__(self):
            super().__init__(Console(file=io.StringIO(), force_terminal=True))

        def advance(self, training):
            super().advance(training)
            seen.append((self._bar.tasks[0].completed, self._bar.numbers))

    monkeypatch.setattr("moedistill.runs.loop.Progress", Watched)
    monitor = {"every": 4, "samples": 1, "levels": 1}
    changes = {"training.log_every": 3, "training.monitor": monitor, "training.checkpoint_every": None}
    run(tiny_recipe([distil(steps=7)], changes), output=tmp_path, device="cpu")
    assert list(dict.fromkeys(step for step, _ in seen)) == [0, 1, 2, 3, 4, 5, 6, 7]
    at = {line["step"]: line["monitor"] for line in lines(tmp_path) if "monitor" in line}
    assert list(at) == [0, 4, 7]
    measured = {step: f"monitor {value:.3g} (step {step})" for step, value in at.items()}
    last = dict(seen)  # of each step, what was shown in the end
    assert [numbers.rpartition("  ")[2] for numbers in last.values()] == [
        *[measured[0]] * 4, *[measured[4]] * 3, measured[7],
    ]  # fmt: skip
    losses = {line["step"]: f"loss {line['loss']:.3g}" for line in lines(tmp_path) if "loss" in line}
    assert losses[3] in last[3]
    assert losses[4] in last[5]


def test_moving_the_bar_costs_next_to_nothing():
    console = Console(file=io.StringIO(), force_terminal=True)
    progress, stage = show(console)
    begun = time.process_time()
    for stage.step in range(1000):
        progress.advance(stage)
    assert time.process_time() - begun < 0.5  # of 1000 steps; it is drawn no more often for that
    progress.stop()


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("cpu", "float16", "float16 does not train on a CPU; use float32, or bfloat16"),
        ("gpu", "float32", "--device 'gpu'"),
        (f"cuda:{torch.cuda.device_count()}", "float32", f"there are {torch.cuda.device_count()} CUDA devices here"),
    ],
)
def test_a_device_that_will_not_do_is_refused(tmp_path, device, dtype, message):
    with pytest.raises(UserError, match=message):
        run(tiny_recipe(STAGES, {"backbone.dtype": dtype}), output=tmp_path / "run", device=device)
    assert not (tmp_path / "run").exists()


def test_an_exact_target_needs_a_posterior_mean(tmp_path, monkeypatch):
    monkeypatch.delattr(DigitsDataset, "posterior_mean")
    stage = {"name": "fit", "kind": "finetune", "expert": "semantic", "steps": 1, "target": "exact"}
    recipe = tiny_recipe([{**stage, "losses": [{"kind": "mse"}]}])
    with pytest.raises(UserError, match="stage fit: target: exact needs a posterior mean, which DigitsDataset lacks"):
        run(recipe, output=tmp_path / "run", device="cpu")


def test_an_error_in_a_step_ends_the_process_though_workers_wait(tmp_path):
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from helpers import distil, tiny_recipe\n"
        "from moedistill.stages.consistency import ConsistencyStage\n"
        "from moedistill import run\n"
        "def fail(*_): raise RuntimeError('a bug')\n"
        "ConsistencyStage.step = fail\n"
        "full = {'kind': 'full', 'from': 'semantic'}\n"  # LoRA takes seconds to import
        "recipe = tiny_recipe([distil(steps=50)], {'training.num_workers': 1, 'experts.detail': full})\n"
        f"run(recipe, output={str(tmp_path)!r}, device='cpu')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (1, "RuntimeError: a bug")
