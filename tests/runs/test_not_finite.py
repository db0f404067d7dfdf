"""Numbers that are not finite: the step where they begin, the samples at fault, and what is saved, in one line."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import distil, tiny_recipe
from safetensors.torch import save_file
from stored_sets import write_version_1

from moedistill.components.plugins import load_plugins
from moedistill.data.base import Sample
from moedistill.data.latents import LatentsDataset
from moedistill.data.loading import batch_of_step
from moedistill.errors import UserError
from moedistill.losses.base import Loss, LossConfig
from moedistill.recipe.loading import load_recipe
from moedistill.runs.loop import run
from moedistill.stages.monitor import Monitor
from moedistill.stages.training import Training
from moedistill_digits.backbone import DigitsBackboneConfig
from moedistill_digits.data import DigitsDataset

MONITOR = {"samples": 2, "levels": 2, "every": 2}


@dataclass(kw_only=True)
class BreakingConfig(LossConfig):
    """A term that is 0, and infinite at one step; it has no gradient. With `spoil` it spoils the weights, too."""

    at: int = 3
    spoil: bool = False

    def build(self, layout):
        return Breaking(self)


class Breaking(Loss):
    def __init__(self, config):
        self.config, self.calls = config, 0

    def __call__(self, tensors):
        self.calls += 1
        if self.calls != self.config.at:
            return tensors.prediction.sum() * 0.0
        return tensors.prediction.sum() * float("nan") if self.config.spoil else torch.tensor(float("inf"))


@pytest.fixture
def plugins():
    loaded = load_plugins()
    loaded.components.begin("test")
    loaded.components.register("loss", "breaking", BreakingConfig)
    return loaded


def stopped(recipe, folder, plugins=None, **options):
    """What the run says, and the rows of its metrics as strict JSON."""
    with pytest.raises(UserError) as caught:
        run(recipe, output=folder, device="cpu", plugins=plugins, **options)
    assert "\n" not in str(caught.value)

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    text = (folder / "metrics.jsonl").read_text().splitlines()
    return str(caught.value), [json.loads(line, parse_constant=refuse) for line in text]


def breaking(steps=5, changes=(), **of_loss):
    stage = distil(steps=steps, losses=[{"kind": "huber"}, {"kind": "breaking", **of_loss}])
    return tiny_recipe([stage], {"training.checkpoint_every": 1, **dict(changes)})


@pytest.mark.parametrize("spoil", [False, True])
@pytest.mark.parametrize("at_once", [True, False], ids=["cpu", "gpu"])
def test_the_step_where_it_began_is_named_wherever_it_is_noticed(at_once, spoil, plugins, tmp_path, monkeypatch):
    """On a CPU at once; on a GPU when the numbers are looked at, of all steps since the last look."""
    if not at_once:
        monkeypatch.setattr(Training, "metrics_are_due", False)
    looks = []

    def take(self, usual=Training.take_metrics):
        looks.append(self.step)
        return usual(self)

    monkeypatch.setattr(Training, "take_metrics", take)
    recipe = breaking(20, {"training.log_every": 7, "training.checkpoint_every": None}, at=9, spoil=spoil)
    message, rows = stopped(recipe, tmp_path, plugins)
    broken = "grad_norm/student = nan, loss = nan, loss/breaking = nan" if spoil else "loss = inf, loss/breaking = inf"
    assert message == (
        f"stage semantic, step 9: {broken}. The samples of that step are finite, so it comes again if the run goes on "
        "as it is; no checkpoint is there yet. Lower stages.semantic.optimizer.lr 0.001 and begin anew with: "
        f"moedistill run {tmp_path}/recipe.yaml --set stages.semantic.optimizer.lr=0.0001"
        f" --output {tmp_path}-2 --device cpu"
    )
    assert looks == (list(range(1, 10)) if at_once else [7, 14])
    assert [row["step"] for row in rows] == [7, 9]
    assert [name for name, value in rows[-1].items() if value is None] == [
        part.split(" = ")[0] for part in broken.split(", ")
    ]
    assert all(value is not None for value in rows[0].values())


def test_the_newest_checkpoint_is_named_and_resuming_drops_the_broken_row(plugins, tmp_path):
    message, rows = stopped(breaking(4), tmp_path, plugins)
    newest = tmp_path / "checkpoints/00_semantic_00000002"
    assert f"as it is; the newest checkpoint is {newest}. Lower stages.semantic" in message
    assert sorted((tmp_path / "checkpoints").iterdir())[-1] == newest
    assert [row["step"] for row in rows] == [1, 2, 3]
    # The loss counts its calls anew, so that it would break three steps later.
    run(breaking(4), output=tmp_path, resume=True, device="cpu", plugins=plugins)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"] is not None) for row in rows] == [(step, True) for step in range(1, 5)]


def test_an_earlier_stages_checkpoint_is_offered(plugins, tmp_path):
    recipe = breaking(at=1)
    recipe["stages"].insert(0, distil("detail", name="first", steps=1))
    recipe["experts"]["detail"]["from"] = "teacher"
    message, _ = stopped(recipe, tmp_path, plugins)
    first = tmp_path / "checkpoints/00_first_00000001"
    assert f"the newest checkpoint is {first}. Lower stages.semantic.optimizer.lr 0.001 and begin anew" in message
    printed = shlex.split(message.split(" with: moedistill ")[1])
    assert printed[printed.index("--resume-from") + 1] == str(first)
    begun = load_recipe(f"{tmp_path}/recipe.yaml", [printed[printed.index("--set") + 1]], plugins)
    other = printed[printed.index("--output") + 1]
    with pytest.raises(UserError, match="stage semantic, step 1"):  # it breaks at any rate
        run(begun, resume_from=first, output=other, device="cpu", plugins=plugins)
    assert "optimizer:\n    lr: 0.0001" in Path(other, "recipe.yaml").read_text()


# -- the data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [True, False], ids=["cpu", "gpu"])
def test_samples_at_fault_are_named(at_once, tmp_path, monkeypatch):
    recipe = tiny_recipe([distil(steps=20)], {"training.checkpoint_every": 1, "training.log_every": 5})
    if not at_once:
        monkeypatch.setattr(Training, "metrics_are_due", False)
        recipe["training"]["checkpoint_every"] = None
    batches = [batch_of_step(DigitsDataset(1), batch_size=4, seed=0, stage="semantic", step=step) for step in range(20)]
    bad = batches[2][1]
    first = next(step for step, batch in enumerate(batches, start=1) if bad in batch)
    usual = DigitsDataset.__getitem__

    def spoilt(self, index):
        sample = usual(self, index)
        return Sample(sample.latents * float("inf"), sample.conditioning) if index == bad else sample

    monkeypatch.setattr(DigitsDataset, "__getitem__", spoilt)
    message, _ = stopped(recipe, tmp_path)
    assert message.startswith(f"stage semantic, step {first}: grad_norm/student = nan, loss = nan, loss/huber = nan. ")
    fault = f"The data are at fault: sample {bad} has latents with numbers that are not finite. Make them again; "
    assert fault in message
    newest = tmp_path / f"checkpoints/00_semantic_{first - 1:08d}"
    command = f"moedistill run {tmp_path}/recipe.yaml"
    if at_once and first > 1:
        assert f"saved is {newest}; go on with: {command} --resume-from {tmp_path}" in message
    else:
        assert f"nothing is saved yet; begin it anew with: {command} --output {tmp_path}" in message


def test_the_file_of_a_sample_at_fault(tmp_path, monkeypatch):
    """Of a stored set the dataset names the file itself, when the sample is drawn."""
    backbone = DigitsBackboneConfig(pretrained=None, width=16, num_layers=2, num_heads=2).build()
    cond = {name: value[0] for name, value in backbone.encode(["3 up"]).items()}
    write_version_1(tmp_path / "set", [Sample(torch.randn(backbone.latent_shape()), cond) for _ in range(4)])
    usual, larger = LatentsDataset.__getitem__, 1e30

    def spoilt(self, index):
        sample = usual(self, index)
        return sample if index < 2 else Sample(sample.latents.sign() * larger, sample.conditioning)

    monkeypatch.setattr(LatentsDataset, "__getitem__", spoilt)
    changes = {"data": {"kind": "latents", "path": str(tmp_path / "set")}, "backbone.dtype": "float32"}
    message, _ = stopped(tiny_recipe([distil()], changes), tmp_path / "run")
    # Finite, and so are they as float32: what is large is a matter of the check of a whole set.
    assert "The samples of that step are finite" in message
    larger = float("inf")
    message, _ = stopped(tiny_recipe([distil()], changes), tmp_path / "other")
    for i in (2, 3):
        assert f"sample {i} ({tmp_path / f'set/{i:08}.safetensors'}) has latents with numbers that are not" in message


# -- the monitor ------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_stop_at_step_0(tmp_path):
    weights = DigitsBackboneConfig(pretrained=None, width=16, num_layers=2, num_heads=2).build().network.state_dict()
    weights = {name: value.clone() for name, value in weights.items()}
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, tmp_path / "weights.safetensors")
    changes = {"backbone.pretrained": str(tmp_path / "weights.safetensors"), "training.monitor": MONITOR}
    message, rows = stopped(tiny_recipe([distil()], changes), tmp_path / "run")
    assert message.startswith("stage semantic, step 0: monitor = nan, monitor/sigma_")
    name = next(iter(weights))
    assert f". The model's own weights are at fault: {name} is not finite; get them again; nothing is saved" in message
    assert [(row["step"], row["monitor"]) for row in rows] == [(0, None)]
    changes["training.monitor"] = None
    message, _ = stopped(tiny_recipe([distil()], changes), tmp_path / "unwatched")
    assert "The model's own weights are at fault" in message  # not the learning rate


def test_a_monitors_own_samples_are_looked_at(tmp_path, monkeypatch):
    last = len(DigitsDataset(1)) - 1
    usual, spoilt = Monitor.measure, DigitsDataset.__getitem__

    def measure(self):
        return usual(self) if self._training.step < 2 else dict.fromkeys(usual(self), float("nan"))

    monkeypatch.setattr(Monitor, "measure", measure)
    recipe = tiny_recipe([distil(steps=4)], {"training.monitor": {**MONITOR, "samples": last + 1}})
    message, rows = stopped(recipe, tmp_path / "a")
    assert message.startswith("stage semantic, step 2: monitor = nan, ")
    assert rows[-1]["step"] == 2
    assert rows[-1]["loss"] > 0

    def give(self, index):
        sample = spoilt(self, index)
        return Sample(sample.latents * float("nan"), sample.conditioning) if index == last else sample

    monkeypatch.setattr(DigitsDataset, "__getitem__", give)
    message, _ = stopped(recipe, tmp_path / "b")
    assert message.startswith("stage semantic, step 0: monitor = nan, ")
    assert f"sample {last} has latents with numbers that are not finite" in message


def test_what_a_monitor_cannot_use_is_one_line(tmp_path, monkeypatch):
    def fail(self):
        raise ValueError("its samples do not fit")

    monkeypatch.setattr(Monitor, "measure", fail)
    with pytest.raises(UserError, match=r"^stage semantic: its samples do not fit$"):
        run(tiny_recipe([distil()], {"training.monitor": MONITOR}), output=tmp_path, device="cpu")
