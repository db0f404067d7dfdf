"""Every field of every config is changed by a test here, which sees behaviour or an error change.

`observes` notes which fields a test changes; `test_every_field_has_a_test` compares with the fields that there are. A
new field needs a test, of what the field does: that it is stored is not enough.
"""

import dataclasses
import json
import math
import multiprocessing
import typing
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
import torch
from click.testing import CliRunner
from footage_files import write_clip
from helpers import as_if_trained, digits_inputs, distil, evaluate, set_up, tiny_recipe, velocity_of
from PIL import Image
from safetensors.torch import load_file, save_file
from two_expert_runs import finished

from moedistill import cli, hookimpl
from moedistill.components.fields import Config
from moedistill.components.plugins import load_plugins
from moedistill.data.base import Sample
from moedistill.data.latents import write_latents
from moedistill.data.loading import Batch, load_batches
from moedistill.data.prompts import PromptsConfig
from moedistill.data.windows import plan_windows
from moedistill.errors import RecipeError, UserError
from moedistill.flow.routers import Boundary, TimestepRouterConfig
from moedistill.flow.sampling_points import SampleConfig
from moedistill.flow.trajectory import FlowMatching, Native, Points, Trajectory
from moedistill.losses.base import HuberConfig, ProbeLayout, StepTensors
from moedistill.losses.optim import OptimizerConfig
from moedistill.metrics import vbench
from moedistill.metrics.base import MetricInputs
from moedistill.metrics.fvd import FVDConfig
from moedistill.metrics.relative import FlipsConfig
from moedistill.model.backbone import VideoSize
from moedistill.model.guidance import Guidance
from moedistill.model.mixture import Mixture
from moedistill.model.residency import Residency
from moedistill.recipe.keys import Recipe
from moedistill.recipe.loading import load_recipe
from moedistill.runs.build import build_mixture, is_sharded, make_accelerator
from moedistill.runs.encode import with_encoded_videos
from moedistill.runs.loop import run
from moedistill.runs.sample import load_mixture
from moedistill.runtime.checkpoint import bytes_of, load_tree
from moedistill.stages.rehearsal import size
from moedistill.stages.run import Run
from moedistill.stages.training import Training
from moedistill_cogvideox.backbone import CogVideoXConfig
from moedistill_dcm.gan import GANConfig
from moedistill_dcm.losses import FeatureMatchingConfig, TemporalCoherenceConfig
from moedistill_digits.backbone import DigitsBackbone, DigitsBackboneConfig
from moedistill_digits.data import DigitsConfig
from moedistill_digits.network import Block
from moedistill_hunyuan_video.backbone import HunyuanVideoConfig
from moedistill_hunyuan_video_15.backbone import HunyuanVideo15Config
from moedistill_ltx.backbone import LTXConfig
from moedistill_open_sora.backbone import OpenSoraConfig
from moedistill_wan.backbone import WanConfig

GRID = Trajectory.flow_matching(8, 5.0)
"""The trajectory of the tiny recipe: p_3 = 0.75, p_4 = 5/6."""


# -- which fields there are, and which test changes them --------------------------------------------------------------


def nested_configs(cls):
    """The dataclasses in the annotations of a dataclass: configs that are no components."""

    def inside(hint):
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield hint
        for inner in typing.get_args(hint):
            yield from inside(inner)

    for hint in typing.get_type_hints(cls).values():
        for found in inside(hint):
            yield found
            yield from nested_configs(found)


def all_fields():
    components = load_plugins().components
    configs = {
        f"{entry.registry}.{entry.name}": components.get(entry.registry, entry.name)
        for entry in components
        if entry.plugin.startswith("moedistill")
    }
    for cls in [Recipe, *configs.values()]:
        configs |= {found.__name__: found for found in nested_configs(cls) if not issubclass(found, Config)}
    configs["Recipe"] = Recipe
    return {f"{name}.{field.name}" for name, cls in configs.items() for field in dataclasses.fields(cls)}


FIELDS = all_fields()
TABLE = {}
"""The test of each field."""


def observes(*patterns):
    """Says which fields the test changes: `component.field`, with a * for components, all of which it must try."""

    def note(test):
        assert test.__name__.startswith("test_")
        for pattern in patterns:
            assert "*" not in pattern.rpartition(".")[2], "a field that is not named may be a new one"
            names = [name for name in FIELDS if fnmatchcase(name, pattern)] or [pattern]
            for name in names:
                assert name not in TABLE, f"{name} is changed by {TABLE[name]} and {test.__name__}"
                TABLE[name] = test.__name__
        return test

    return note


def kinds(registry):
    return [entry.name for entry in load_plugins().components.entries(registry)]


def test_every_field_has_a_test():
    assert len(FIELDS) > 90
    assert FIELDS - set(TABLE) == set(), "fields that no test changes"
    assert set(TABLE) - FIELDS == set(), "tests of fields that there are not"


# -- tiny runs --------------------------------------------------------------------------------------------------------


class Done:
    """What a finished run left."""

    def __init__(self, folder):
        self.folder = folder
        metrics = folder / "metrics.jsonl"
        self.lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        self.checkpoints = sorted(path.name for path in (folder / "checkpoints").glob("*"))

    def tree(self, name):
        return load_tree(self.folder / "checkpoints" / self.checkpoints[-1], name)

    def table(self):
        return json.loads((self.folder / "evaluate" / "metrics.json").read_text())["candidates"]

    def latents(self):
        return load_file(self.folder / "evaluate" / "latents.safetensors")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Runs the tiny recipe with the given stages and changes; what was run before is not run again."""
    cache = {}

    def do(*stages, changes=()):
        recipe = tiny_recipe(stages or [distil()], changes)
        key = json.dumps(recipe)
        if key not in cache:
            cache[key] = Done(run(recipe, output=tmp_path_factory.mktemp("run") / "run", device="cpu").output)
        return cache[key]

    return do


@pytest.fixture
def watch(monkeypatch, tmp_path_factory):
    """Runs the tiny recipe and gives the calls of its network: x, sigma and conditioning."""
    seen = []
    velocity = DigitsBackbone.velocity

    def spy(self, network, x, sigma, cond):
        seen.append(SimpleNamespace(batch=len(x), sigma=sigma, digits=cond["digit"].tolist()))
        return velocity(self, network, x, sigma, cond)

    def do(*stages, changes=()):
        seen.clear()
        run(tiny_recipe(stages or [distil()], changes), output=tmp_path_factory.mktemp("run") / "run", device="cpu")
        return list(seen)

    monkeypatch.setattr(DigitsBackbone, "velocity", spy)
    return do


@pytest.fixture
def error_of(tmp_path):
    """The message with which the tiny recipe fails."""

    def do(*stages, changes=()):
        with pytest.raises(UserError) as caught:
            run(tiny_recipe(stages or [distil()], changes), output=tmp_path / "run", device="cpu")
        return " ".join(str(caught.value).split())

    return do


def built(changes=()):
    """The mixture of the tiny recipe."""
    return build_mixture(load_recipe(tiny_recipe([distil()], changes)))


def distance(first, second):
    """The greatest difference between two mappings of tensors, or two tensors."""
    if isinstance(first, torch.Tensor):
        return (first - second).abs().max().item()
    return max(distance(first[name], second[name]) for name in first)


# -- the recipe as a whole --------------------------------------------------------------------------------------------


@observes("Recipe.name")
def test_name_is_the_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        run(tiny_recipe([evaluate()], {"name": name}), device="cpu")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["one", "two"]


@observes("Recipe.description")
def test_description_is_listed(monkeypatch, tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(json.dumps(tiny_recipe([distil()], {"description": "what it is good for"})))
    monkeypatch.setattr("moedistill.recipe.loading.shipped_recipes", lambda: {"tiny": file})
    assert "what it is good for" in CliRunner().invoke(cli.cli, ["list", "recipe"]).output


@observes("Recipe.seed")
def test_seed(done):
    assert done().lines[0]["loss"] != done(changes={"seed": 1}).lines[0]["loss"]


@observes("Recipe.backbone", "Recipe.trajectory", "Recipe.router", "Recipe.experts")
def test_what_the_mixture_is_made_of():
    usual = built()
    assert usual.backbone.hidden_size == 16
    assert built({"backbone.width": 8}).backbone.hidden_size == 8
    assert torch.equal(usual.trajectory.points, GRID.points)
    assert built({"trajectory.num_steps": 10}).trajectory.num_steps == 10
    assert (usual.router.expert_at(0.8), usual.router.expert_at(0.9)) == ("detail", "semantic")
    assert built({"router.boundaries": [{"point": 3}]}).router.expert_at(0.8) == "semantic"
    assert usual.experts["detail"].parameters
    assert not built({"experts.detail": {"kind": "frozen"}}).experts["detail"].parameters


@observes("Recipe.data")
def test_data_is_needed(error_of):
    assert "data: is missing: stages.0 needs" in error_of(changes={"data": None})


@observes("Recipe.training", "TrainingConfig.batch_size")
def test_batch_size(watch):
    assert {call.batch for call in watch()} == {4}
    assert {call.batch for call in watch(changes={"training": {"batch_size": 6, "monitor": None}})} == {6}


@observes("Recipe.stages")
def test_stages(done):
    both = done(distil(), distil("detail")).lines
    assert [line["stage"] for line in both] == ["semantic", "semantic", "detail", "detail"]


@observes("Recipe.sample")
def test_sample_is_how_candidates_sample(watch):
    def levels(points):
        return [round(float(call.sigma[0]), 4) for call in watch(evaluate(), changes={"sample.points": points})]

    assert levels([8, 4]) == [1.0, 0.8333]
    assert levels([7, 4, 3]) == [0.9722, 0.8333, 0.75]


# -- training ---------------------------------------------------------------------------------------------------------


@observes("TrainingConfig.gradient_accumulation_steps")
def test_accumulation_cuts_the_batch_and_changes_nothing_else(done, watch):
    changes = {"training.gradient_accumulation_steps": 2}
    assert {call.batch for call in watch(changes=changes)} == {2}
    whole, halves = done(), done(changes=changes)
    for one, other in zip(whole.lines, halves.lines, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


@observes("TrainingConfig.gradient_checkpointing")
def test_checkpointing_recomputes(done, monkeypatch):
    forward, count = Block.forward, []
    monkeypatch.setattr(Block, "forward", lambda self, *args: count.append(1) or forward(self, *args))
    plain = done(distil(steps=1, name="plain"))
    once = len(count)
    again = done(distil(steps=1, name="plain"), changes={"training.gradient_checkpointing": True})
    assert len(count) - once == once + 2  # both blocks of the student's forward, a second time
    assert distance(plain.tree("experts")["semantic"], again.tree("experts")["semantic"]) == 0


@observes("TrainingConfig.num_threads")
def test_threads(tmp_path):
    class Observer:
        threads = 0

        @hookimpl
        def on_step_end(self, training, metrics):
            self.threads = torch.get_num_threads()

    for number, expected in ((None, 1), (2, 2)):
        plugins, observer = load_plugins(), Observer()
        plugins.manager.register(observer)
        recipe = tiny_recipe([distil(steps=1)], {"training.num_threads": number})
        run(recipe, output=tmp_path / str(number), device="cpu", plugins=plugins)
        assert observer.threads == expected
        assert torch.get_num_threads() == 1  # as conftest.py sets it


@observes("TrainingConfig.num_workers")
def test_workers(tmp_path):
    class Observer:
        workers = 0

        @hookimpl
        def on_step_end(self, training, metrics):
            self.workers = len(multiprocessing.active_children())

    for number in (0, 2):
        plugins, observer = load_plugins(), Observer()
        plugins.manager.register(observer)
        recipe = tiny_recipe([distil()], {"training.num_workers": number})
        run(recipe, output=tmp_path / str(number), device="cpu", plugins=plugins)
        assert observer.workers == number


@observes("TrainingConfig.checkpoint_every", "TrainingConfig.keep_checkpoints")
@pytest.mark.parametrize(("every", "keep", "left"), [(1, 9, [1, 2, 3]), (2, 9, [2, 3]), (None, 9, [3]), (1, 2, [2, 3])])
def test_checkpoints(done, every, keep, left):
    changes = {"training.checkpoint_every": every, "training.keep_checkpoints": keep}
    assert done(distil(steps=3), changes=changes).checkpoints == [f"00_semantic_{step:08}" for step in left]


@observes("TrainingConfig.log_every")
def test_log_every(done):
    steps = {every: [line["step"] for line in done(changes={"training.log_every": every}).lines] for every in (1, 2)}
    assert steps == {1: [1, 2], 2: [2]}


@observes("TrainingConfig.trackers")
def test_trackers(done, error_of):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked = done(changes={"training.trackers": ["tensorboard"]})
    [file] = tracked.folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    losses = [event.value for event in events.Scalars("semantic/loss")]
    assert losses == pytest.approx([line["loss"] for line in tracked.lines])
    assert not list(done().folder.rglob("events.out.tfevents.*"))
    assert "'tensorbored' is not installed or not known" in error_of(changes={"training.trackers": ["tensorbored"]})


# -- optimisers -------------------------------------------------------------------------------------------------------


def moved(steps=1, gradient=0.5, **config):
    """Where AdamW takes a parameter from 2 in steps with the given gradients."""
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    basis = {"lr": 0.1, "betas": (0.0, 0.0), "weight_decay": 0.0, "eps": 1e-12}
    optimizer, schedule = OptimizerConfig(**{**basis, **config}).build([parameter], 4)
    for step in range(steps):
        parameter.grad = torch.tensor([gradient * 2**step])
        optimizer.step()
        schedule.step()
    return parameter.item()


@observes(*(f"OptimizerConfig.{name}" for name in ("lr", "betas", "weight_decay", "eps")))
def test_adamw():
    assert moved() == pytest.approx(2 - 0.1)  # without moments: the gradient's sign
    assert moved(lr=0.2) == pytest.approx(2 - 0.2)
    assert moved(weight_decay=0.5) == pytest.approx(2 * (1 - 0.1 * 0.5) - 0.1)
    assert moved(eps=0.5) == pytest.approx(2 - 0.1 * 0.5 / (0.5 + 0.5))
    # Gradients ½ and 1; bias-corrected first moment (½·½·½ + ½·1) / (1 - ¼) = 5/6.
    assert moved(2, betas=(0.5, 0.0)) == pytest.approx(2 - 0.1 - 0.1 * 5 / 6)
    assert moved(2, betas=(0.0, 0.5)) == pytest.approx(2 - 0.1 - 0.1 / math.sqrt((0.25 * 0.25 + 0.5) / 0.75))


@observes("OptimizerConfig.schedule", "OptimizerConfig.warmup")
def test_learning_rates():
    def rates(**config):
        return [2 - moved(n, **config) for n in range(1, 5)]

    assert rates() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert rates(schedule="linear") == pytest.approx([0.1, 0.175, 0.225, 0.25])
    assert rates(schedule="cosine")[1] == pytest.approx(0.1 + 0.05 * (1 + math.cos(math.pi / 4)))
    assert rates(warmup=3) == pytest.approx([0.025, 0.075, 0.15, 0.25])


@observes("OptimizerConfig.states")
def test_moments_in_8_bits():
    pytest.importorskip("torchao")
    parameter = torch.nn.Parameter(torch.ones(64, 64))
    taken = {}
    for states in ("float32", "int8"):
        optimizer, _ = OptimizerConfig(states=states).build([parameter], 1)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        taken[states] = bytes_of(optimizer.state_dict()["state"])
    assert taken["int8"] < 0.26 * taken["float32"]


@observes("OptimizerConfig.max_grad_norm")
def test_gradients_are_clipped_to_a_norm(done):
    """With a large eps the first step is the gradient itself."""
    start = built().experts["teacher"].merged()
    for limit in (None, 1e-3):
        optimizer = {"lr": 1.0, "eps": 1.0, "weight_decay": 0.0, "max_grad_norm": limit}
        result = done(distil(steps=1, optimizer=optimizer))
        weights, norm = result.tree("experts")["semantic"], result.lines[0]["grad_norm/student"]
        assert norm > 2e-3
        length = math.sqrt(sum(float((weights[name] - start[name]).square().sum()) for name in start))
        assert length == pytest.approx(limit or norm, rel=0.02)


# -- all training stages ----------------------------------------------------------------------------------------------

TRAINING = pytest.mark.parametrize("kind", ["consistency", "finetune"])


@TRAINING
@observes(*(f"stage.{kind}.{name}" for kind in ("consistency", "finetune") for name in ("name", "expert", "steps")))
def test_which_expert_is_trained_for_how_long(done, kind):
    short, long = done(distil(kind=kind)), done(distil("detail", kind=kind, steps=3, name="texture"))
    assert [(line["stage"], line["step"]) for line in short.lines] == [("semantic", 1), ("semantic", 2)]
    assert [(line["stage"], line["step"]) for line in long.lines] == [("texture", 1), ("texture", 2), ("texture", 3)]
    assert (set(short.tree("experts")), set(long.tree("experts"))) == ({"semantic"}, {"detail"})


@TRAINING
@observes("stage.consistency.optimizer", "stage.finetune.optimizer")
def test_the_stage_s_optimizer(done, kind):
    start = built().experts["teacher"].merged()
    for lr in (1e-3, 1e-4):
        trained = done(distil(kind=kind, steps=1, optimizer={"lr": lr})).tree("experts")["semantic"]
        assert distance(trained, start) == pytest.approx(lr, rel=0.01)


@TRAINING
@observes("stage.consistency.losses", "stage.finetune.losses")
def test_the_stage_s_losses(done, kind):
    terms = [{"kind": "mse"}, {"kind": "huber", "c": 0.1}, {"kind": "huber"}]
    for count in (1, 3):
        line = done(distil(kind=kind, losses=terms[:count])).lines[0]
        names = ["loss/mse", "loss/huber", "loss/huber_2"][:count]
        assert {name for name in line if name.startswith("loss/")} == set(names)
        assert line["loss"] == pytest.approx(sum(line[name] for name in names), rel=1e-6)


@TRAINING
@observes("stage.consistency.ema_decay", "stage.finetune.ema_decay")
def test_ema_decay(done, kind):
    start = built().experts["teacher"].merged()
    assert done(distil(kind=kind)).tree("ema") == {}
    for decay in (0.25, 0.75):
        result = done(distil(kind=kind, steps=1, ema_decay=decay))
        weights, average = result.tree("experts")["semantic"], result.tree("ema")["semantic"]
        expected = {name: decay * start[name] + (1 - decay) * weights[name] for name in start}
        assert distance(average, expected) < 1e-6 < distance(average, weights)


@TRAINING
@observes("stage.consistency.probe", "stage.finetune.probe")
def test_probe(error_of, kind):
    matching = [{"kind": "feature_matching"}]
    assert "needs the teacher's features, but the stage has no probe" in error_of(distil(kind=kind, losses=matching))
    unread = error_of(distil(kind=kind, probe={"block_stride": 1}))
    assert "probe: no loss of the stage reads it" in unread
    assert ("finetune has no probe" in unread) == (kind == "finetune")


# -- consistency ------------------------------------------------------------------------------------------------------


@observes("stage.consistency.target")
def test_target_ema(done, error_of):
    assert "needs ema_decay" in error_of(distil(target="ema"))
    mixture, average = (done(distil(target=target, ema_decay=0.9)).lines for target in ("student", "ema"))
    assert mixture[0]["loss"] == average[0]["loss"]  # the average starts as the student
    assert mixture[1]["loss"] != average[1]["loss"]


@observes("stage.consistency.phases", "PhasePoints.points")
@pytest.mark.parametrize(("phases", "networks"), [(1, 3), (4, 2), ({"points": [6]}, 3), ({"points": [5, 6, 7]}, 2)])
def test_phases(watch, phases, networks):
    """The segment has 4 points; in a phase of one point the target jumps nowhere and needs no network."""
    assert len(watch(distil(phases=phases))) == 2 * networks


@observes("Probing.block_stride")
@pytest.mark.parametrize(("stride", "heads"), [(1, 2), (2, 1)])
def test_block_stride(done, stride, heads):
    gan = {"kind": "gan", "width": 4, "groups": 2}
    critic = done(distil(losses=[gan], probe={"block_stride": stride})).tree("training")["critics"]["gan"]
    assert {name.split(".")[1] for name in critic} == {str(head) for head in range(heads)}


# -- finetune ---------------------------------------------------------------------------------------------------------


@observes("stage.finetune.target")
def test_finetune_target(done):
    sample, exact = (done(distil(kind="finetune", target=target)).lines[0]["loss"] for target in ("sample", "exact"))
    assert sample != exact


@observes("stage.finetune.shifts", "stage.finetune.shift_weights")
def test_finetune_draws_sigma_by_shifts(watch):
    def drawn(shifts, weights=None):
        calls = watch(
            distil(kind="finetune", shifts=shifts, shift_weights=weights), changes={"training.batch_size": 16}
        )
        return torch.cat([call.sigma for call in calls])

    def place(sigma, shift):  # within the segment, in unshifted time
        low, sigma, high = (s / (shift - (shift - 1) * s) for s in (GRID.sigma(4), sigma, 1.0))
        return (sigma - low) / (high - low)

    even, shifted = drawn([1.0]), drawn([9.0])
    assert torch.allclose(place(even, 1.0), place(shifted, 9.0), atol=1e-4)
    assert torch.equal(drawn([1.0, 9.0], [1e6, 1e-6]), even)
    assert torch.equal(drawn([1.0, 9.0], [1e-6, 1e6]), shifted)
    is_even = torch.isclose(drawn([1.0, 9.0]), even)
    assert 4 < is_even.sum() < 28


# -- losses -----------------------------------------------------------------------------------------------------------


FACTORS = [
    ({}, [1, 1, 1]),
    ({"weight": 3.0}, [3, 3, 3]),
    ({"start": 1}, [None, 1, 1]),
    ({"warmup": 2}, [1 / 3, 2 / 3, 1]),
    ({"schedule": "linear"}, [1, 2 / 3, 1 / 3]),
]
"""What a term's keys make of it at each of three steps; None: it is not even computed."""


@observes("loss.*.weight", "loss.*.start", "loss.*.warmup", "loss.*.schedule")
@pytest.mark.parametrize("kind", kinds("loss"))
def test_a_term_s_weight(done, kind):
    basis = {"kind": kind, **({"width": 4, "groups": 2} if kind == "gan" else {})}
    probe = {"block_stride": 2} if kind in ("gan", "feature_matching") else None
    lines = done(distil("detail", steps=3, losses=[{**basis, **keys} for keys, _ in FACTORS], probe=probe)).lines
    for step, line in enumerate(lines):
        terms = [line.get(f"loss/{kind}_{i + 1}" if i else f"loss/{kind}") for i in range(len(FACTORS))]
        weights = [factors[step] for _, factors in FACTORS]
        assert [term is None for term in terms] == [weight is None for weight in weights]
        total = sum(term * weight for term, weight in zip(terms, weights, strict=True) if term is not None)
        assert line["loss"] == pytest.approx(total, rel=1e-5)


def value(config, difference=None, probe=None, layout=None):
    difference = torch.ones(1, 1, 1, 1, 1) if difference is None else difference
    tensors = StepTensors(difference, torch.zeros_like(difference), difference, torch.ones(1), None, probe)
    return float(config.build(layout)(tensors))


@observes("loss.huber.c", "loss.temporal_coherence.lag", "loss.feature_matching.space")
def test_what_terms_measure():
    assert value(HuberConfig(c=0.75)) == pytest.approx(1.25 - 0.75)
    assert value(HuberConfig(c=2.4)) == pytest.approx(2.6 - 2.4)
    frames = torch.arange(4.0).view(1, 1, 4, 1, 1)
    assert value(TemporalCoherenceConfig(lag=1), frames) == 1
    assert value(TemporalCoherenceConfig(lag=3), frames) == 9
    one = torch.ones(1)
    probe = SimpleNamespace(
        hidden_prediction=[2 * one], hidden_target=[one], latent_prediction=[4 * one], latent_target=[one]
    )
    assert value(FeatureMatchingConfig(space="hidden"), probe=probe) == 1
    assert value(FeatureMatchingConfig(space="latent"), probe=probe) == 9


@observes("loss.gan.width", "loss.gan.groups", "loss.gan.clip")
def test_gan():
    layout = ProbeLayout(num_taps=1, hidden_size=3)
    probe = SimpleNamespace(hidden_prediction=[torch.zeros(1, 1, 3)], grid=(1, 1, 1))
    for width, groups, clip, expected in ((4, 2, True, 0.0), (6, 3, False, -1.0)):
        gan = GANConfig(width=width, groups=groups, clip=clip).build(layout)
        [head] = gan.critic.heads
        assert (head.conv1.out_channels, head.norm1.num_groups) == (width, groups)
        with torch.no_grad():
            head.conv_out.weight.zero_()
            head.conv_out.bias.fill_(2.0)  # D = 2, beyond the margin
        tensors = StepTensors(*torch.zeros(3, 1, 1, 1, 1, 1), torch.ones(1), None, probe)
        assert float(gan(tensors)) == expected
    with pytest.raises(ValueError, match="width 4 is not a multiple of groups 3"):
        GANConfig(width=4, groups=3)


@observes("loss.gan.real")
def test_what_the_critic_takes_for_real(done):
    """The same start; after a step on other real features the critics differ."""
    probe = {"block_stride": 2}
    terms = [{"kind": "gan", "width": 4, "groups": 2, "real": real} for real in ("target", "data")]
    ours, theirs = (done(distil(losses=[term], probe=probe)).tree("training")["critics"]["gan"] for term in terms)
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


@observes("loss.gan.critic_updates", "loss.gan.optimizer")
def test_the_critic_s_optimizer(done):
    def critic(**config):
        term = {"kind": "gan", "width": 4, "groups": 2, **config}
        tree = done(distil(losses=[term], probe={"block_stride": 2})).tree("training")
        return tree["critics"]["gan"], tree["trained"]["gan"]["optimizer"]

    slow, optimizer = critic()
    assert (optimizer["param_groups"][0]["lr"], optimizer["param_groups"][0]["betas"]) == (1e-5, (0.0, 0.999))
    assert optimizer["state"][0]["step"] == 2
    fast, optimizer = critic(optimizer={"lr": 1e-2})
    assert optimizer["param_groups"][0]["lr"] == 1e-2
    assert 1e-3 < distance(slow, fast) < 3e-2
    assert critic(critic_updates=3)[1]["state"][0]["step"] == 6


# -- evaluate ---------------------------------------------------------------------------------------------------------

TRAINED = distil(optimizer={"lr": 0.02}, ema_decay=0.9)
"""A stage that takes the student far from the teacher, and its average half of the way."""
BOTH = [{"name": "a"}, {"name": "b", "model": "teacher"}]


@observes("stage.evaluate.samples", "stage.evaluate.batch_size")
def test_how_many_samples(watch):
    assert [call.batch for call in watch(evaluate())] == [4, 4]
    assert [call.batch for call in watch(evaluate(samples=5, batch_size=3))] == [3, 3, 2, 2]


@observes("stage.evaluate.seed", "stage.evaluate.prompts", "stage.evaluate.name", "stage.evaluate.save_latents")
def test_what_is_sampled(done):
    zero, one = done(evaluate()).latents(), done(evaluate(seed=1)).latents()
    assert distance(zero["student"], one["student"]) > 1
    assert zero["conditioning.digit"].tolist() != one["conditioning.digit"].tolist()
    asked = done(evaluate(prompts=["3 right", "", "7 up"])).latents()
    assert asked["conditioning.digit"].tolist() == [3, 10, 7, 3]
    assert asked["conditioning.direction"].tolist() == [0, 4, 3, 0]
    folder = done(evaluate(name="elsewhere", save_latents=False)).folder / "elsewhere"
    assert {path.name for path in folder.glob("[!.]*")} == {"metrics.json", "rows.safetensors"}


@observes("stage.evaluate.pictures")
def test_pictures(done):
    widths = {}
    for pictures in (1, 3):
        folder = done(evaluate(pictures=pictures)).folder / "evaluate"
        widths[pictures] = [Image.open(folder / name).width for name in ("contact_sheet.png", "side_by_side.webp")]
    assert widths[3] > widths[1]
    assert not (done(evaluate()).folder / "evaluate" / "contact_sheet.png").exists()


@observes("stage.evaluate.candidates", "stage.evaluate.reference", "stage.evaluate.metrics", "Candidate.name")
def test_the_table(done):
    for reference, other in ("ab", "ba"):
        table = done(TRAINED, evaluate(candidates=BOTH, reference=reference)).table()
        assert list(table) == ["a", "b"]
        assert table[reference] == {"paired_distance": 0}
        assert table[other]["paired_distance"] > 0.1
    assert list(done(evaluate()).table()) == ["student"]
    metrics = [kind for kind in kinds("metric") if kind not in ("fvd", "vbench")]  # which need files or programs
    assert list(done(evaluate(metrics=[{"kind": kind} for kind in metrics])).table()["student"]) == metrics


@observes("Candidate.model", "Candidate.steps", "Candidate.stand_ins")
def test_candidates(done):
    stand_ins = [{"semantic": "teacher"}, {"detail": "teacher"}, {"semantic": "teacher", "detail": "teacher"}]
    variants = [{"name": str(i), "stand_ins": stand_in} for i, stand_in in enumerate(stand_ins)]
    steps = [{"name": f"{n} steps", "steps": n} for n in (2, 3)]
    candidates = [*BOTH, *variants, *steps]
    latents = done(TRAINED, evaluate(candidates=candidates, reference="a")).latents()
    assert torch.equal(latents["2"], latents["b"])  # with the teacher everywhere the student is the teacher
    assert torch.equal(latents["2 steps"], latents["a"])  # points 8 and 4, as in the recipe
    for one, other in (("a", "b"), ("0", "a"), ("1", "a"), ("0", "b"), ("1", "b"), ("3 steps", "a")):
        assert distance(latents[one], latents[other]) > 1e-3, (one, other)


@observes("stage.evaluate.weights", "stage.export.weights", "stage.export.name")
def test_weights_trained_or_averaged(done, error_of):
    export = {"kind": "export"}
    trained = done(TRAINED, evaluate(), {**export, "name": "one"})
    average = done(TRAINED, evaluate(weights="ema"), {**export, "name": "two", "weights": "ema"})
    assert distance(trained.latents()["student"], average.latents()["student"]) > 1e-3
    for result, name, tree in ((trained, "one", "experts"), (average, "two", "ema")):
        assert distance(load_file(result.folder / name / "semantic.safetensors"), result.tree(tree)["semantic"]) == 0
    for stage in (evaluate(weights="ema"), {**export, "name": "export", "weights": "ema"}):
        assert "no stage keeps an average" in error_of(distil(), stage)


@observes("stage.export.formats", "exporter.diffusers.components")
def test_formats_of_an_export(tmp_path, error_of):
    stages = [{"name": "out", "kind": "export", "formats": ["diffusers"]}]
    stages.append({"name": "copies", "kind": "export", "formats": [{"kind": "diffusers", "components": "copy"}]})
    experts = {"semantic": {"kind": "full"}, "detail": {"kind": "full", "from": "semantic"}}  # all in one pipeline
    output = finished(tmp_path, "wan", more_stages=stages, experts=experts)
    folders = [output / name / "diffusers" for name in ("out", "copies")]
    assert [(folder / "vae").is_symlink() for folder in folders] == [True, False]
    assert not (output / "export/diffusers").exists()
    export = {"name": "export", "kind": "export"}
    refused = error_of(distil(), {**export, "formats": ["diffusers"]})
    assert "formats.0: diffusers cannot hold it: diffusers has no pipeline for backbone 'digits'" in refused
    assert "unknown exporter 'diffuser'" in error_of(distil(), {**export, "formats": ["diffuser"]})
    assert "each kind once" in error_of(distil(), {**export, "formats": ["diffusers", "diffusers"]})


# -- guidance, backbone, data -----------------------------------------------------------------------------------------

GUIDED = {"mode": "classifier_free", "scale": 3.0}


@observes("backbone.digits.guidance")
def test_guidance_is_the_teacher_s(watch):
    assert [call.batch for call in watch(distil(steps=1))] == [4, 4, 4]
    mixture, teacher, target = watch(distil(steps=1), changes={"backbone.guidance": GUIDED})
    assert (mixture.batch, teacher.batch, target.batch) == (4, 8, 4)
    assert teacher.digits == mixture.digits + [10] * 4


@observes("Guidance.mode", "Guidance.scale")
def test_guidance():
    mixture = built()
    inputs = digits_inputs()
    null = mixture.backbone.null_conditioning(inputs[2])
    with torch.no_grad():
        conditional, unconditional = mixture(*inputs), mixture(*inputs[:2], null)
        for scale in (0.5, 3.0):
            guided = mixture.guided(*inputs, Guidance(mode="classifier_free", scale=scale))
            assert distance(guided, unconditional + scale * (conditional - unconditional)) < 1e-5
        assert torch.equal(mixture.guided(*inputs, Guidance()), conditional)
    with pytest.raises(ValueError, match=r"scale 3.0 needs a mode"):
        Guidance(scale=3.0)


@observes(*(f"backbone.digits.{name}" for name in ("dtype", "pretrained", "width", "num_layers", "num_heads")))
def test_backbone(error_of, tmp_path):
    def build(**config):
        basis = {"pretrained": None, "width": 16, "num_layers": 2, "num_heads": 2}
        return DigitsBackboneConfig(**{**basis, **config}).build(0)

    def weights(backbone):
        return backbone.network.state_dict()

    usual, inputs = build(), digits_inputs()
    assert (usual.hidden_size, usual.blocks) == (16, ["blocks.0", "blocks.1"])
    assert (build(width=8).hidden_size, build(num_layers=1).blocks) == (8, ["blocks.0"])
    four = build(num_heads=4)
    assert distance(weights(four), weights(usual)) == 0
    assert distance(four.velocity(four.network, *inputs), usual.velocity(usual.network, *inputs)) > 1e-6
    assert {weight.dtype for weight in weights(build(dtype="bfloat16")).values()} == {torch.bfloat16}
    assert "float16 does not train on a CPU" in error_of(changes={"backbone.dtype": "float16"})
    save_file(weights(DigitsBackboneConfig(pretrained=None, width=16, num_layers=2).build(5)), tmp_path / "five")
    assert distance(weights(usual), load_file(tmp_path / "five")) > 0.1
    assert distance(weights(build(pretrained=str(tmp_path / "five"))), load_file(tmp_path / "five")) == 0
    assert "there is no file nowhere" in error_of(changes={"backbone.pretrained": "nowhere"})


@observes("dataset.digits.conditions")
def test_what_is_told_of_digits():
    data = DigitsConfig(styles_per_digit=1, conditions=["none", "digit"]).build(None)
    assert len(data) == 2 * 10 * 4 * 3
    assert [data[i].conditioning["digit"].item() for i in (0, 119, 120, 239)] == [10, 10, 0, 9]
    assert all(data[i].conditioning["direction"].item() == 4 for i in range(0, 240, 7))
    assert torch.equal(data[5].latents, data[125].latents)
    only = DigitsConfig(styles_per_digit=1, conditions=["direction"]).build(None)[119].conditioning
    assert (only["digit"].item(), only["direction"].item()) == (10, 3)
    with pytest.raises(ValueError, match="conditions none, none: name each once"):
        DigitsConfig(conditions=["none", "none"])


@observes("dataset.digits.text_dropout", "dataset.digits.styles_per_digit")
def test_dataset(watch):
    assert 10 not in watch()[0].digits
    assert watch(changes={"data.text_dropout": 1.0})[0].digits == [10] * 4
    one, three = (len(DigitsConfig(styles_per_digit=styles).build(None)) for styles in (1, 3))
    assert three == 3 * one


# -- trajectory, router, sampling steps -------------------------------------------------------------------------------


@observes(*(f"trajectory.flow_matching.{name}" for name in ("num_steps", "shift", "num_train_timesteps", "end")))
@observes("trajectory.native.num_steps", "trajectory.points.sigmas")
def test_trajectories():
    usual = FlowMatching(num_steps=4, shift=3.0, num_train_timesteps=100).build()
    assert usual.points.tolist() == pytest.approx([0.03 / 1.02, 0.5, 0.75, 0.9, 1])
    assert FlowMatching(num_steps=4, shift=1.0).build().points.tolist() == pytest.approx([0.001, 0.25, 0.5, 0.75, 1])
    assert FlowMatching(num_steps=2, shift=1.0, end="zero").build().points.tolist() == [0, 0.5, 1]
    assert FlowMatching(num_steps=2, shift=1.0, num_train_timesteps=10).build().points.tolist() == pytest.approx(
        [0.1, 0.5, 1]
    )
    table = torch.linspace(0.05, 1, 20)
    assert [len(Native(num_steps=steps).build(table).points) for steps in (4, 10)] == [5, 11]
    assert Points(sigmas=[0.0, 0.25, 1.0]).build().points.tolist() == [0, 0.25, 1]


@observes("router.timestep.experts", "router.timestep.boundaries", "router.timestep.closed")
def test_router():
    def at_boundary(experts=("a", "b"), point=4, **config):
        router = TimestepRouterConfig(experts=list(experts), boundaries=[Boundary(point=point)], **config).build(GRID)
        return router.expert_at(GRID.sigma(4))

    assert (at_boundary(), at_boundary("xy"), at_boundary(point=3), at_boundary(closed="high")) == ("b", "y", "a", "a")


@observes(*(f"Boundary.{unit}" for unit in ("point", "sigma", "timestep", "ratio", "snr")))
@pytest.mark.parametrize(
    ("unit", "fourth", "third"),
    [
        ("point", 4, 3),
        ("sigma", 0.833, 0.75),
        ("timestep", 833, 750),
        ("ratio", 0.833, 0.75),
        ("snr", 0.04, 1 / 9),
    ],
)
def test_boundaries(unit, fourth, third):
    assert Boundary(**{unit: fourth}).resolve(GRID)[0] == 4
    assert Boundary(**{unit: third}).resolve(GRID)[0] == 3


@observes(*(f"SampleConfig.{unit}" for unit in ("points", "sigmas", "timesteps", "steps")))
@pytest.mark.parametrize(
    ("unit", "two", "three"),
    [
        ("points", [8, 4], [8, 4, 3]),
        ("sigmas", [1.0, 0.833], [1.0, 0.833, 0.75]),
        ("timesteps", [1000, 833], [1000, 833, 750]),
        ("steps", 2, 8),
    ],
)
def test_sampling_steps(unit, two, three):
    p = GRID.points
    assert torch.equal(SampleConfig(**{unit: two}).resolve(GRID), torch.tensor([p[8], p[4], 0]))
    longer = torch.tensor([p[8], p[4], p[3], 0]) if unit != "steps" else torch.tensor([*p.flip(0)[:-1], 0])
    assert torch.equal(SampleConfig(**{unit: three}).resolve(GRID), longer)


# -- experts ----------------------------------------------------------------------------------------------------------


@observes("expert.*.parent")
@pytest.mark.parametrize("kind", kinds("expert"))
def test_parents(kind):
    for parent in ("teacher", "semantic"):
        mixture = built({"experts.detail": {"kind": kind, "from": parent}})
        as_if_trained(mixture.experts["semantic"], 0)
        mixture.experts["detail"].initialise(0)
        velocity = velocity_of(mixture, "detail", digits_inputs())
        assert torch.equal(velocity, velocity_of(mixture, parent, digits_inputs()))
        assert not torch.equal(
            velocity_of(mixture, "teacher", digits_inputs()), velocity_of(mixture, "semantic", digits_inputs())
        )


@observes("expert.*.init")
@pytest.mark.parametrize("kind", kinds("expert"))
def test_starts(kind, tmp_path):
    def detail(**init):
        return {"experts.detail": {"kind": kind, "from": "semantic", **init}}

    if kind == "frozen":
        with pytest.raises(RecipeError, match=r"experts\.detail\.init: .* holds no weights"):
            built(detail(init=str(tmp_path)))
        return
    stages = [distil("detail", steps=1), {"name": "export", "kind": "export"}]
    run(tiny_recipe(stages, detail()), output=tmp_path, device="cpu")
    started, fresh = built(detail(init=str(tmp_path))), built(detail())
    _, trained = load_mixture(tmp_path)
    velocities = [velocity_of(each, "detail", digits_inputs()) for each in (trained, started, fresh)]
    assert torch.equal(velocities[0], velocities[1])
    assert not torch.equal(velocities[0], velocities[2])


@observes(*(f"expert.lora.{name}" for name in ("rank", "alpha", "targets", "copies")))
def test_lora(error_of):
    linear = "blocks.0.attn.to_q"

    def build(**config):
        return built({"experts.detail": {"kind": "lora", "rank": 2, "alpha": 4.0, **config}}).experts["detail"]

    def change(expert):
        as_if_trained(expert, 0)
        return expert.merged()[f"{linear}.weight"] - dict(expert.shared.weights)[f"{linear}.weight"]

    def copied(expert):
        return {name.split(".")[0] for name in expert.parameters if "lora" not in name}

    assert [build(rank=rank).parameters[f"{linear}.lora_A.weight"].shape[0] for rank in (2, 5)] == [2, 5]
    assert distance(2 * change(build()), change(build(alpha=8.0))) < 1e-6 < distance(change(build()), torch.zeros(1))
    assert copied(build()) == {"time_embed", "norm_out", "proj_out"}
    assert (copied(build(copies="none")), copied(build(copies=["proj_out"]))) == (set(), {"proj_out"})
    targets = {"experts.detail": {"kind": "lora", "targets": ["attention", "mlp"]}}
    assert "no group of linears 'mlp'; it has attention" in error_of(changes=targets)


# -- stored latents and prompts ---------------------------------------------------------------------------------------


def store(folder, digits):
    """A set of digits latents that are all equal to their digit, in one direction; gives `data` for a recipe."""
    samples = [
        Sample(torch.full((12, 8, 4, 4), float(digit)), {"digit": torch.tensor(digit), "direction": torch.tensor(0)})
        for digit in digits
    ]
    write_latents(folder, samples)
    return {"kind": "latents", "path": str(folder)}


@observes("dataset.latents.path", "dataset.latents.text_dropout")
def test_stored_latents(watch, tmp_path):
    low, high = store(tmp_path / "low", [1, 2]), store(tmp_path / "high", [8, 9])
    assert set(watch(changes={"data": low})[0].digits) == {1, 2}
    assert set(watch(changes={"data": high})[0].digits) == {8, 9}
    assert set(watch(changes={"data": {"kind": "latents", "path": None}})[0].digits) == {10}  # synthetic: no digit
    assert watch(changes={"data": {**high, "text_dropout": 1.0}})[0].digits == [10] * 4


@observes("dataset.prompts.path", "dataset.prompts.text_dropout")
def test_prompts_as_data(watch, tmp_path):
    for name, text in (("one", "1 up"), ("both", "1 up\n3 left")):
        (tmp_path / name).write_text(text)
    data = {"kind": "prompts", "path": str(tmp_path / "one")}
    assert watch(evaluate(), changes={"data": data})[0].digits == [1] * 4
    both = {**data, "path": str(tmp_path / "both")}
    assert sorted(watch(evaluate(), changes={"data": both})[0].digits) == [1, 1, 3, 3]
    assert watch(evaluate(), changes={"data": {**data, "path": None}})[0].digits == [10] * 4
    # For stages that train on prompts alone; those of the core also want latents.
    recipe, backbone = load_recipe(tiny_recipe([distil()])), built().backbone
    for dropout, digits in ((0.0, [1, 1]), (1.0, [10, 10])):
        config = PromptsConfig(path=str(tmp_path / "one"), text_dropout=dropout)
        place = SimpleNamespace(device=torch.device("cpu"))
        changed = dataclasses.replace(recipe, data=config)
        run = Run(changed, tmp_path, place, build_mixture(recipe), config.build(backbone))
        options = {"batch_size": 2, "accumulation": 1, "seed": 0, "stage": "s", "steps": range(1)}
        [batch] = load_batches(run.dataset, **options)
        assert Training(run, recipe.stages[0]).begin(batch).conditioning["digit"].tolist() == digits


@observes(
    "dataset.videos.path", "dataset.videos.lengths", "dataset.videos.windows", "dataset.videos.stride",
    "dataset.videos.crop", "dataset.videos.upscale", "dataset.videos.caption", "dataset.videos.path_column",
    "dataset.videos.caption_column",
)  # fmt: skip
def test_which_samples_videos_make(tmp_path):
    (tmp_path / "clips").mkdir()
    clip = write_clip(tmp_path / "clips/long.mp4", size=(32, 48), fps=16, num_frames=30)
    clip.with_suffix(".txt").write_text("a long one")
    write_clip(tmp_path / "clips/mute.mp4", size=(16, 24), fps=16, num_frames=9)
    (tmp_path / "clips.csv").write_text("what,where,path,caption\ntext,clips/long.mp4,clips/mute.mp4,words\n")
    backbone = WanConfig(pretrained=None, video=VideoSize(num_frames=9, height=32, width=48))

    def windows(path="clips", **changes):
        data = {"kind": "videos", "path": str(tmp_path / path), **changes}
        config = load_recipe(tiny_recipe([distil()], {"data": data})).data
        return plan_windows(config, backbone, 16.0, config.sources()).windows

    [window] = windows()
    assert (window.source, window.start, window.num_frames, window.crop) == ("long.mp4", 0, 9, "center")
    assert [each.num_frames for each in windows(lengths=[17, 9])] == [17]
    assert [each.start for each in windows(windows=2)] == [0, 9]
    assert [each.start for each in windows(windows=2, stride=3)] == [0, 3]
    assert [each.crop for each in windows(crop="top")] == ["top"]
    captioned = windows(caption="x", upscale=True)
    assert [(each.source, each.caption) for each in captioned] == [("long.mp4", "a long one"), ("mute.mp4", "x")]
    assert [each.source for each in windows(caption="x")] == ["long.mp4"]
    listed = windows("clips.csv", upscale=True)
    assert [(each.source, each.caption) for each in listed] == [("clips/mute.mp4", "words")]
    listed = windows("clips.csv", path_column="where", caption_column="what")
    assert [(each.source, each.caption) for each in listed] == [("clips/long.mp4", "text")]


@observes("dataset.videos.cache", "dataset.videos.text_dropout")
def test_where_the_set_of_videos_lies(tmp_path, monkeypatch):
    backbone = WanConfig(pretrained=None, video=VideoSize(num_frames=9, height=32, width=48)).build()
    monkeypatch.setattr("moedistill.runs.encode._encode", lambda *arguments: None)
    monkeypatch.setattr(WanConfig, "skeleton", lambda self: backbone)
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/a.mp4").touch()

    def settled(**changes):
        data = {"kind": "videos", "path": str(tmp_path / "clips"), **changes}
        recipe = load_recipe(tiny_recipe([distil()], {"data": data}))
        recipe = dataclasses.replace(recipe, backbone=backbone.config)
        return with_encoded_videos(recipe, "cpu", lambda line: None).data

    assert settled(cache=str(tmp_path / "here")).path == str(tmp_path / "here")
    assert Path(settled().path).name.startswith("clips-")
    assert settled(text_dropout=0.5).text_dropout == 0.5


@TRAINING
@observes("stage.consistency.latent_frames", "stage.finetune.latent_frames")
def test_latent_frames(kind, tmp_path):
    """The first frames of each video, before anything else is done with it."""
    frames = torch.arange(5.0).view(1, 1, 5, 1, 1).expand(2, 12, 5, 4, 4)
    for cut, left in ((None, 5), (2, 2), (9, 5)):
        recipe = load_recipe(tiny_recipe([distil(kind=kind, latent_frames=cut)]))
        run = Run(recipe, tmp_path, SimpleNamespace(device=torch.device("cpu")), build_mixture(recipe), None)
        batch = Batch(frames, digits_inputs()[2], [0, 1], boundary=True)
        latents = Training(run, recipe.stages[0]).begin(batch).latents
        assert torch.equal(latents, frames[:, :, :left])


@observes("TrainingConfig.timeout")
def test_how_long_processes_wait_for_each_other(monkeypatch):
    given = []
    monkeypatch.setattr("accelerate.Accelerator", lambda **options: given.extend(options["kwargs_handlers"]))
    for settings, seconds in (([], 7 * 24 * 3600), (["training.timeout=90"], 90)):
        given.clear()
        make_accelerator(load_recipe("dcm_digits", settings), "cpu")
        assert [each.timeout.total_seconds() for each in given if hasattr(each, "timeout")] == [seconds]


@observes("TrainingConfig.sharding")
def test_how_a_run_s_processes_hold_its_networks():
    """One process holds them whole; the runs of several are in tests/runs/test_sharded_runs.py."""
    for sharding, cut in (("none", False), ("fsdp2", True)):
        recipe = load_recipe("dcm_digits", [f"training.sharding={sharding}"])
        assert is_sharded(recipe, SimpleNamespace(num_processes=2)) is cut
        assert is_sharded(recipe, SimpleNamespace(num_processes=1)) is False


@observes("TrainingConfig.offload", "OffloadConfig.idle")
def test_what_a_stage_does_not_use_waits_on_the_host(monkeypatch):
    parked = []
    monkeypatch.setattr(Residency, "park", lambda self: parked.append(self))
    for idle, times in (("cpu", 1), (None, 0)):
        parked.clear()
        recipe = load_recipe(tiny_recipe([distil()], {"training.offload": {"idle": idle}}))
        build_mixture(recipe).settle()
        assert len(parked) == times


@observes("OffloadConfig.averages")
def test_averages_on_the_host():
    for averages, where in (("cpu", "cpu"), (None, "meta")):
        recipe = tiny_recipe([distil(ema_decay=0.5)], {"training.offload": {"averages": averages}})
        training, _ = set_up(recipe)
        average = training.trained["student"].average
        average.to(torch.device("meta"))
        assert {each.device.type for each in average.average.values()} == {where}


# -- LTX-Video and HunyuanVideo 1.5 -----------------------------------------------------------------------------------


@observes(
    *(
        f"backbone.{kind}.{name}"
        for kind in ("ltx", "hunyuan_video_15")
        for name in ("pretrained", "revision", "variant", "dtype", "video", "guidance")
    )
)
@pytest.mark.parametrize(
    ("cls", "frames", "wanted"),
    [(LTXConfig, 25, ((8, 3, 2, 3), 4)), (HunyuanVideo15Config, 13, ((4, 3, 2, 3), 4))],
    ids=["ltx", "hunyuan_video_15"],
)
def test_models_of_one_network(tmp_path, cls, frames, wanted):
    config = cls(pretrained=None, video=cls.tiny_video)
    network = config.build().network
    network.save_pretrained(tmp_path / "transformer", variant="fp16")
    found = config.replace(pretrained=str(tmp_path), variant="fp16", dtype="bfloat16").build(seed=1).network
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.proj_out.weight, network.proj_out.weight.bfloat16())
    with pytest.raises(ValueError, match="cannot load"):
        config.replace(pretrained=str(tmp_path)).build()
    with pytest.raises(ValueError, match="hf download nobody/model --revision v2\n"):
        config.replace(pretrained="nobody/model", revision="v2").build()
    video = dataclasses.replace(config.video, num_frames=frames)
    assert (config.build().latent_shape(), config.replace(video=video).build().latent_shape()[1]) == wanted
    nulls = {}
    for prompt in ("blurry", "static"):
        backbone = config.replace(guidance=Guidance(negative_prompt=prompt)).build()
        nulls[prompt] = backbone.null_conditioning(backbone.encode(["a dog"]))["prompt_embeds"]
        assert torch.equal(nulls[prompt], backbone.encode([prompt])["prompt_embeds"])
    assert not torch.equal(nulls["blurry"], nulls["static"])
    with pytest.raises(ValueError, match="has no input for the scale"):
        config.replace(guidance=Guidance(mode="embedded", scale=3.0))


@observes(
    *(
        f"backbone.open_sora.{name}"
        for name in ("pretrained", "revision", "variant", "dtype", "video", "guidance", "motion_score")
    )
)
def test_open_sora(tmp_path):
    config = OpenSoraConfig(pretrained=None, video=OpenSoraConfig.tiny_video)
    network = config.build().network
    network.save_pretrained(tmp_path / "transformer", variant="fp16")
    found = config.replace(pretrained=str(tmp_path), variant="fp16", dtype="bfloat16").build(seed=1).network
    assert torch.equal(found.proj_out.weight, network.proj_out.weight.bfloat16())
    with pytest.raises(ValueError, match="hf download nobody/model --revision v2\n"):
        config.replace(pretrained="nobody/model", revision="v2").build()
    taller = dataclasses.replace(config.video, height=64)
    assert config.replace(video=taller).build().latent_shape() == (16, 5, 8, 6)
    for score, told in ((9, "rain. 24 FPS. 9 motion score."), (None, "rain. 24 FPS.")):
        assert config.replace(motion_score=score).build().told("rain") == told
    nulls = []
    for prompt in ("blurry", "static"):
        backbone = config.replace(guidance=Guidance(negative_prompt=prompt)).build()
        nulls.append(backbone.null_conditioning(backbone.encode(["a dog"]))["prompt_embeds"])
        assert torch.equal(nulls[-1], backbone.encode_negative(prompt)["prompt_embeds"])
    assert not torch.equal(*nulls)
    with pytest.raises(ValueError, match="has no input for the scale"):
        config.replace(guidance=Guidance(mode="embedded", scale=3.0))


# -- HunyuanVideo -----------------------------------------------------------------------------------------------------


@observes(*(f"backbone.hunyuan_video.{name}" for name in ("pretrained", "variant", "dtype", "video", "guidance")))
def test_hunyuan_video(tmp_path):
    config = HunyuanVideoConfig(pretrained=None, video=HunyuanVideoConfig.tiny_video)
    network = config.build().network
    network.save_pretrained(tmp_path / "transformer", variant="fp16")
    there = config.replace(pretrained=str(tmp_path), variant="fp16", dtype="bfloat16")
    found = there.build(seed=1).network
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.proj_out.weight, network.proj_out.weight.bfloat16())
    with pytest.raises(ValueError, match="cannot load"):
        there.replace(variant=None).build()
    video = dataclasses.replace(config.video, num_frames=25, width=64)
    assert config.build().latent_shape() == (16, 5, 4, 6)
    assert config.replace(video=video).build().latent_shape() == (16, 7, 4, 8)
    told = []
    for guidance in (Guidance(mode="embedded", scale=6.0), Guidance(mode="classifier_free", scale=6.0)):
        backbone = config.replace(guidance=guidance).build()
        told.append(backbone.pipeline_arguments()["guidance_scale"])
    assert told == [6.0, 1.0]


@observes("backbone.hunyuan_video.revision")
def test_revision_of_hunyuan_video(tmp_path, monkeypatch):
    """Of a model that was downloaded: its folder among those of the Hub's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = HunyuanVideoConfig(pretrained="someone/model", video=HunyuanVideoConfig.tiny_video)
    commits = {"main": "0" * 40, "v2": "1" * 40}
    for revision, commit in commits.items():
        place = tmp_path / "models--someone--model"
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / revision).write_text(commit)
        network = config.tiny().build(seed=int(commit[0])).network
        network.save_pretrained(place / "snapshots" / commit / "transformer")
    weights = {
        revision: config.replace(revision=revision).build().network.proj_out.weight for revision in (None, "main", "v2")
    }
    assert torch.equal(weights[None], weights["main"])
    assert not torch.equal(weights[None], weights["v2"])
    with pytest.raises(ValueError, match="hf download someone/model --revision v3\n"):
        config.replace(revision="v3").build()


@observes("Guidance.oscillate_from")
def test_which_steps_are_guided():
    steps = torch.arange(8)
    for start, left_out in ((None, []), (0, [1, 3, 5, 7]), (4, [5, 7])):
        guidance = Guidance(mode="classifier_free", scale=2.0, oscillate_from=start)
        assert steps[~guidance.guides(steps)].tolist() == left_out


@observes("Guidance.student_scale", "Guidance.negative_prompt")
def test_what_experts_and_dropped_text_are_told():
    embedded = {"mode": "embedded", "scale": 6.0}
    for guidance, told in ((embedded, 6000.0), ({**embedded, "student_scale": 2.0}, 2000.0)):
        backbone = {"kind": "hunyuan_video", "pretrained": None, "guidance": guidance}
        changes = {"backbone": backbone, "data": {"kind": "latents", "path": None}}
        mixture = build_mixture(load_recipe(tiny_recipe([distil()], changes)))
        scales = []
        for expert in ("semantic", "teacher"):
            shared = mixture.experts[expert].shared.network
            shared.time_text_embed.register_forward_pre_hook(lambda _, args, to=scales: to.append(args[2].item()))
            with torch.no_grad(), mixture.using(expert):
                mixture(torch.zeros(1, 16, 1, 2, 2), torch.ones(1), mixture.backbone.encode(["rain"]))
        assert scales == [told, 6000.0]
    with pytest.raises(ValueError, match=r"student_scale 2.0 needs mode: embedded"):
        Guidance(student_scale=2.0)
    nulls = {}
    for prompt in ("", "fog"):
        backbone = HunyuanVideoConfig(pretrained=None, guidance=Guidance(negative_prompt=prompt)).tiny().build()
        nulls[prompt] = backbone.null_conditioning(backbone.encode(["rain"]))
        assert all(torch.equal(value, backbone.encode([prompt])[name]) for name, value in nulls[prompt].items())
    assert not torch.equal(nulls[""]["prompt_embeds"], nulls["fog"]["prompt_embeds"])


# -- CogVideoX --------------------------------------------------------------------------------------------------------

COGVIDEOX = ("pretrained", "revision", "variant", "dtype", "model", "video", "guidance")


@observes(*(f"backbone.cogvideox.{name}" for name in COGVIDEOX))
def test_cogvideox(tmp_path):
    config = CogVideoXConfig(pretrained=None, video=CogVideoXConfig.tiny_video)
    network = config.build().network
    network.save_pretrained(tmp_path / "transformer", variant="fp16")
    there = config.replace(pretrained=str(tmp_path), variant="fp16", dtype="bfloat16")
    found = there.build(seed=1).network
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.proj_out.weight, network.proj_out.weight.bfloat16())
    with pytest.raises(ValueError, match="cannot load"):
        there.replace(variant=None).build()
    with pytest.raises(ValueError, match="hf download nobody/cogvideox --revision v2\n"):
        config.replace(pretrained="nobody/cogvideox", revision="v2").build()
    first = [config.replace(model=model).native_sigmas()[0].item() for model in ("2b", "5b", "1.5-5b")]
    assert first == pytest.approx([0.0481, 0.0283, 0.0283], abs=5e-5)
    shapes = [config.replace(model=model).build().latent_shape() for model in ("5b", "1.5-5b")]
    assert shapes == [(16, 5, 4, 6), (16, 6, 4, 6)]
    video = dataclasses.replace(config.video, num_frames=25, width=64)
    assert config.replace(video=video).build().latent_shape() == (16, 7, 4, 8)
    assert config.replace(video=None).build().latent_shape() == (16, 13, 60, 90)
    guided = {}
    for prompt in ("blurry", "static"):
        guidance = Guidance(mode="classifier_free", scale=6.0, negative_prompt=prompt)
        backbone = config.replace(guidance=guidance).build()
        guided[prompt] = backbone.null_conditioning(backbone.encode(["a dog"]))["prompt_embeds"]
        assert torch.equal(guided[prompt], backbone.encode([prompt])["prompt_embeds"])
    assert not torch.equal(guided["blurry"], guided["static"])
    with pytest.raises(ValueError, match="CogVideoX has no input for the scale"):
        config.replace(guidance=Guidance(mode="embedded", scale=3.0))


# -- Wan, the size of videos, networks of a teacher, samples ----------------------------------------------------------

WAN = ("pretrained", "variant", "dtype", "video", "guidance", "boundary_ratio")


@observes(*(f"backbone.wan.{name}" for name in WAN))
def test_wan(tmp_path):
    config = WanConfig(pretrained=None, video=WanConfig.tiny_video)
    network = config.build().network
    network.save_pretrained(tmp_path / "transformer", variant="fp16")
    there = config.replace(pretrained=str(tmp_path), variant="fp16", dtype="bfloat16")
    found = there.build(seed=1).network
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.proj_out.weight, network.proj_out.weight.bfloat16())
    with pytest.raises(ValueError, match="cannot load its transformer"):
        there.replace(variant=None).build()
    video = dataclasses.replace(config.video, num_frames=25)
    assert (config.build().latent_shape()[1], config.replace(video=video).build().latent_shape()[1]) == (5, 7)
    assert (config.bases(), config.replace(boundary_ratio=0.9).bases()) == (
        ("transformer",), ("transformer", "transformer_2"),
    )  # fmt: skip
    assert config.teacher_router(GRID) is None
    assert config.replace(boundary_ratio=0.9).teacher_router(GRID).boundaries == (0.9,)
    with pytest.raises(ValueError, match="Wan has no input for the scale"):
        config.replace(guidance=Guidance(mode="embedded", scale=3.0))


@observes("backbone.wan.revision")
def test_revision_of_wan(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--someone--model"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "v2").write_text("1" * 40)
    config = WanConfig(pretrained="someone/model", video=WanConfig.tiny_video)
    network = config.tiny().build().network
    network.save_pretrained(place / "snapshots" / ("1" * 40) / "transformer")
    assert torch.equal(config.replace(revision="v2").build().network.proj_out.weight, network.proj_out.weight)
    with pytest.raises(ValueError, match="hf download someone/model --revision v3\n"):
        config.replace(revision="v3").build()


@observes("VideoSize.num_frames", "VideoSize.height", "VideoSize.width")
def test_size_of_videos():
    backbone = WanConfig(pretrained=None).tiny().build()
    for changes, shape in (
        ({}, (16, 5, 4, 6)),
        ({"num_frames": 9}, (16, 3, 4, 6)),
        ({"height": 64}, (16, 5, 8, 6)),
        ({"width": 64}, (16, 5, 4, 8)),
    ):
        video = VideoSize(**{"num_frames": 17, "height": 32, "width": 48, **changes})
        assert backbone.latent_shape(video) == shape
        noise = torch.zeros(1, *shape)
        assert backbone.decode(noise).shape == (1, 3, video.num_frames, video.height, video.width)


FAMILIES = ("wan", "hunyuan_video", "hunyuan_video_15", "cogvideox", "ltx", "open_sora")


@observes(*(f"backbone.{kind}.fps" for kind in FAMILIES))
@pytest.mark.parametrize(
    ("config", "own"),
    [
        (WanConfig(pretrained=None), 16),
        (HunyuanVideoConfig(pretrained=None), 24),
        (HunyuanVideo15Config(pretrained=None), 24),
        (CogVideoXConfig(pretrained=None, model="1.5-5b"), 16),
        (CogVideoXConfig(pretrained=None), 8),
        (LTXConfig(pretrained=None), 25),
        (OpenSoraConfig(pretrained=None), 24),
    ],
)
def test_frame_rate(config, own, tmp_path):
    """In the files, and where a model is told: LTX-Video, in training and in its pipeline."""
    assert config.tiny().build().fps == own
    backbone = config.replace(fps=5.0).tiny().build()
    assert backbone.fps == 5.0
    if config.kind != "ltx":
        return
    x, cond = torch.ones(1, *backbone.latent_shape()), backbone.encode(["rain"])
    with torch.no_grad():
        slow, fast = (b.velocity(b.network, x, torch.ones(1), cond) for b in (backbone, config.tiny().build()))
    assert not torch.allclose(slow, fast, atol=1e-4)
    assert backbone.pipeline_arguments()["frame_rate"] == 5.0
    teacher = ["router.experts=[teacher]", "router.boundaries=[]", "experts={}"]
    recipe = load_recipe("dcm_ltx", ["backbone.fps=5", "stages=[{name: s, kind: sample, prompts: [rain]}]", *teacher])
    folder = run(recipe, smoke=True, output=tmp_path, device="cpu").output
    with av.open(folder / "s" / "000.mp4") as file:
        assert file.streams.video[0].average_rate == 5
    assert json.loads((folder / "s" / "samples.json").read_text())["fps"] == 5.0


@observes(*(f"backbone.{kind}.quantization" for kind in FAMILIES))
@pytest.mark.parametrize(
    "config", [WanConfig, HunyuanVideoConfig, HunyuanVideo15Config, CogVideoXConfig, LTXConfig, OpenSoraConfig]
)
def test_quantization(config):
    """Blocks take less, and the velocity is nearly the same."""
    pytest.importorskip("torchao")
    built = [config(pretrained=None, quantization=each).tiny().build() for each in (None, "int8")]
    sizes = [sum(map(size, backbone.network.parameters())) for backbone in built]
    assert sizes[1] < sizes[0]
    x, cond = torch.randn(1, *built[0].latent_shape()), built[0].encode(["rain"])
    with torch.no_grad():
        full, small = (each.velocity(each.network, x, torch.tensor([0.7]), cond) for each in built)
    assert 0 < (small - full).norm() < 0.02 * full.norm()


@observes("expert.*.base")
@pytest.mark.parametrize("kind", kinds("expert"))
def test_base_of_an_expert(kind):
    backbone = WanConfig(pretrained=None, boundary_ratio=0.9).tiny().build()
    for base, teacher in (("transformer", "teacher"), ("transformer_2", "teacher.transformer_2")):
        config = load_plugins().components.get("expert", kind)(base=base)
        mixture = Mixture(backbone, {"one": config})
        mixture.initialise()
        inputs = torch.ones(1, *backbone.latent_shape()), torch.ones(1), backbone.encode(["rain"])
        assert torch.equal(velocity_of(mixture, "one", inputs), velocity_of(mixture, teacher, inputs))
        backbone = WanConfig(pretrained=None, boundary_ratio=0.9).tiny().build()


@observes(*(f"stage.sample.{name}" for name in ("name", "prompts", "num", "seed", "weights")))
def test_samples(tmp_path, error_of):
    (tmp_path / "prompts.txt").write_text("# two\n3 right\n\n7 up\n")
    stage = {"name": "samples", "kind": "sample", "prompts": ["3 right"], "num": 1}
    changes = {"two": {"num": 2}, "seed": {"seed": 1}, "file": {"prompts": str(tmp_path / "prompts.txt")}}
    changes |= {"usual": {}, "ema": {"weights": "ema"}}
    stages = [distil(optimizer={"lr": 0.2}, ema_decay=0.9)]
    stages += [{**stage, "name": name, **change} for name, change in changes.items()]
    run(tiny_recipe(stages), output=tmp_path / "run", device="cpu")

    def made(name, file="000.mp4"):
        with av.open(tmp_path / "run" / name / file) as container:
            return torch.stack(
                [torch.from_numpy(frame.to_ndarray(format="gray")).float() for frame in container.decode(video=0)]
            )

    files = {name: tmp_path / "run" / name / "samples.json" for name in changes}
    prompts = {name: json.loads(file.read_text())["prompts"] for name, file in files.items()}
    assert prompts.pop("two") == ["3 right", "3 right"]
    assert prompts.pop("file") == ["3 right", "7 up"]
    assert set(map(tuple, prompts.values())) == {("3 right",)}
    usual = made("usual")
    # Equal but for the last bits, which compression may make a grey level of.
    equal = max((made(name) - usual).abs().mean() for name in ("two", "file"))
    others = [made("two", "001.mp4"), made("seed"), made("ema")]
    different = min((other - usual).abs().mean() for other in others)
    assert equal < 1 < 2 < different
    assert "ema: no stage keeps an average" in error_of(distil(), {**stage, "weights": "ema"})


# evaluate: stored samples


@observes("stage.evaluate.reference_samples")
def test_samples_of_another_evaluation(error_of, tmp_path):
    assert "cannot be read" in error_of(evaluate(reference_samples=str(tmp_path / "none")))


# -- the held-out loss, metrics with something brought ----------------------------------------------------------------


@observes("TrainingConfig.monitor", "MonitorConfig.every", "MonitorConfig.samples", "MonitorConfig.levels")
def test_the_held_out_loss(done):
    def found(config, steps=3):
        return done(distil(steps=steps), changes={"training.monitor": config}).lines

    usual = {"every": 2, "samples": 2, "levels": 2}
    assert not any("monitor" in line for line in found(None))
    assert [line["step"] for line in found(usual) if "monitor" in line] == [0, 2, 3]
    assert [line["step"] for line in found({**usual, "every": 9}) if "monitor" in line] == [0, 3]
    levels = {n: [name for name in found({**usual, "levels": n})[0] if name.startswith("monitor/")] for n in (2, 3)}
    assert {n: len(names) for n, names in levels.items()} == {2: 2, 3: 3}
    assert found({**usual, "samples": 3})[0]["monitor"] != found(usual)[0]["monitor"]


@observes(*(f"metric.fvd.{name}" for name in ("detector", "real", "frames", "size", "batch_size")))
def test_fvd(tmp_path):
    class Shape(torch.nn.Module):
        def forward(self, videos: torch.Tensor) -> torch.Tensor:
            return torch.tensor(videos.shape).expand(len(videos), 5) * 1.0

    torch.jit.script(Shape()).save(tmp_path / "shape.pt")
    for name, scale in (("one", 1.0), ("two", 2.0)):
        save_file({"features": scale * torch.eye(5)}, tmp_path / f"{name}.safetensors")
    usual = {"detector": str(tmp_path / "shape.pt"), "real": str(tmp_path / "one.safetensors")}
    videos = torch.zeros(3, 1, 20, 8, 8)
    inputs = MetricInputs(videos, videos, videos, videos, {})

    def rows(**changes):
        return FVDConfig(**{**usual, **changes}).build().rows(inputs).tolist()

    assert rows() == [[3, 3, 16, 224, 224]] * 3
    assert rows(frames=4, size=8, batch_size=2) == [[2, 3, 4, 8, 8]] * 2 + [[1, 3, 4, 8, 8]]
    other = {**usual, "real": str(tmp_path / "two.safetensors")}
    assert FVDConfig(**usual, size=8).build()(inputs) != FVDConfig(**other, size=8).build()(inputs)
    for key in ("detector", "real"):
        with pytest.raises(ValueError, match=f"{key} nowhere does not exist"):
            FVDConfig(**{**usual, key: "nowhere"}).look_ahead()


@observes("metric.flips.beyond")
def test_flips():
    latents, step = torch.zeros(4, 1, 1, 2, 2), torch.tensor([0.1, 0.4, 0.6, 0.9]).sqrt().view(4, 1, 1, 1, 1)
    inputs = MetricInputs(latents, latents + step, latents, latents, {})
    for beyond, share in ((0.5, 0.5), (0.2, 0.75)):
        assert FlipsConfig(beyond=beyond).build()(inputs) == share


@observes("metric.vbench.dimensions", "metric.vbench.command")
def test_vbench(monkeypatch):
    asked = []

    def run_vbench(command, dimension, videos, output):
        asked.append((command, dimension))
        return [{"video_path": str(path), "video_results": 0.5} for path in videos.iterdir()]

    monkeypatch.setattr(vbench, "run_vbench", run_vbench)
    videos = torch.zeros(2, 1, 3, 16, 16)
    for command, dimensions in (("one", ["dynamic_degree"]), ("two", ["subject_consistency", "motion_smoothness"])):
        metric = vbench.VBenchConfig(dimensions=dimensions, command=command).build()
        assert metric.rows(MetricInputs(videos, videos, videos, videos, {})).shape == (2, len(dimensions))
    assert asked == [("one", "dynamic_degree"), ("two", "subject_consistency"), ("two", "motion_smoothness")]


# SampleConfig and Candidate: noise drawn anew, and steps of a candidate's own


@observes("SampleConfig.eta", "Candidate.sample")
def test_steps_of_a_candidate_and_fresh_noise(done, error_of):
    own = {
        "plain": {"steps": 2},
        "other": {"points": [8, 3]},
        "some": {"steps": 2, "eta": 0.5},
        "all": {"steps": 2, "eta": 1},
    }
    candidates = [{"name": "usual"}, *({"name": name, "sample": sample} for name, sample in own.items())]
    latents = done(TRAINED, evaluate(candidates=candidates, reference="usual")).latents()
    assert torch.equal(latents["usual"], latents["plain"])  # points 8 and 4, as in the recipe
    for one, other in (("plain", "other"), ("plain", "some"), ("some", "all")):
        assert distance(latents[one], latents[other]) > 1e-3, (one, other)
    assert "give one of them" in error_of(
        evaluate(candidates=[{"name": "student", "steps": 2, "sample": {"steps": 2}}])
    )
