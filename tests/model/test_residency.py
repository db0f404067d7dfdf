"""What lies on the device and what waits on the host: what computes is never parked, what a stage has no use for is."""

import json

import pytest
import torch
from helpers import digits_inputs, distil, equal, set_up, tiny_recipe, trees, velocity_of
from torch.nn.modules.module import register_module_forward_pre_hook

from moedistill import hookimpl
from moedistill.components.plugins import load_plugins
from moedistill.model import residency
from moedistill.model.ema import EMA
from moedistill.recipe.loading import load_recipe
from moedistill.runs.loop import run
from moedistill.runtime.checkpoint import find_checkpoint, load_tree
from moedistill.runtime.quantized import held


class Watch:
    """Notes which tensors are parked; checks that no module computes with one, and what is there at every step."""

    def __init__(self, monkeypatch):
        self.parked, self.there, self.checked = {}, {}, 0
        monkeypatch.setattr(residency, "move", self.move)

    def move(self, tensor, device):
        # The device and the host are one here: a tensor's place is which of them was named.
        self.parked[tensor] = device is residency.HOST

    def check(self, module, _):
        self.checked += 1
        for tensor in module.parameters(recurse=False):
            assert not self.parked.get(tensor, False)

    @hookimpl
    def on_step_end(self, training, metrics):
        mixture = training.mixture
        names = {id(tensor): name for name, tensor in mixture.named_parameters(remove_duplicate=False)}
        there = {names[id(tensor)] for tensor, parked in self.parked.items() if not parked and id(tensor) in names}
        self.there[training.config.name] = there


@pytest.mark.parametrize("preview", [None, {"every": 1}])
def test_what_a_stage_does_not_use_is_parked(monkeypatch, tmp_path, preview):
    """Wan 2.2's other network, and the other expert's adapter; also after a preview, which has used both."""
    plugins, watch = load_plugins(), Watch(monkeypatch)
    plugins.manager.register(watch)
    hook = register_module_forward_pre_hook(watch.check)
    keys = [f"stages.{stage}.preview={json.dumps(preview)}" for stage in ("semantic", "detail")]
    recipe = load_recipe("dcm_wan22_a14b", keys, plugins)
    try:
        run(recipe, output=tmp_path / "run", device="cpu", smoke=True, plugins=plugins)
    finally:
        hook.remove()
    assert watch.checked > 1000
    for stage, other, number in (("semantic", "detail", 0), ("detail", "semantic", 1)):
        there = watch.there[stage]
        assert {name.split(".")[1] for name in there} == {str(number)}  # of the networks
        assert any(f"expert_{stage}" in name for name in there)
        assert not any(f"expert_{other}" in name for name in there)


# -- full experts that rest -------------------------------------------------------------------------------------------


def resting_recipe(**changes):
    """A full expert and an adapter on it, in bfloat16, with averages."""
    stages = [distil(steps=3, ema_decay=0.5), distil("detail", steps=3, ema_decay=0.5)]
    changes = {"backbone.dtype": "bfloat16", "training.checkpoint_every": 1, "training.keep_checkpoints": 9, **changes}
    return tiny_recipe(stages, changes)


class Dtypes:
    """Of the full expert's weights, by stage."""

    def __init__(self):
        self.seen = {}

    @hookimpl
    def on_step_end(self, training, metrics):
        parameters = training.mixture.experts["semantic"].parameters.values()
        self.seen[training.config.name] = {parameter.dtype for parameter in parameters}


@pytest.fixture(scope="module")
def rested(tmp_path_factory):
    folder, plugins, dtypes = tmp_path_factory.mktemp("rested"), load_plugins(), Dtypes()
    plugins.manager.register(dtypes)
    run(resting_recipe(), output=folder / "run", device="cpu", plugins=plugins)
    return folder / "run", dtypes.seen


def test_a_full_expert_rests_in_the_dtype_of_the_base(rested):
    assert rested[1] == {"semantic": {torch.float32}, "detail": {torch.bfloat16}}


def test_what_is_saved_stays_as_it_was_trained(rested):
    checkpoints = rested[0] / "checkpoints"
    trained = load_tree(checkpoints / "00_semantic_00000003", "experts")["semantic"]
    for number in (1, 2, 3):
        later = load_tree(checkpoints / f"01_detail_{number:08d}", "experts")["semantic"]
        assert equal(later, trained)
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in trained.values())


def test_a_run_that_goes_on_while_it_rests_is_the_same(rested, tmp_path):
    source = rested[0] / "checkpoints/01_detail_00000001"
    run(resting_recipe(), output=tmp_path / "run", device="cpu", resume_from=source)
    one, other = (trees(find_checkpoint(folder)) for folder in (rested[0], tmp_path / "run"))
    for each in (one, other):
        each["state"].pop("cost")
    assert equal(one, other)


def test_the_child_of_a_full_expert_starts_with_its_float32_weights():
    training, _ = set_up(resting_recipe())
    mixture = training.mixture
    with torch.no_grad():
        for parameter in mixture.experts["semantic"].parameters.values():
            parameter += 1e-3 * torch.randn(parameter.shape)
    expected = {name: weight.detach().clone() for name, weight in mixture.experts["semantic"].parameters.items()}
    mixture.settle()
    mixture.initialise(but=["semantic"])
    copied = [name for name in mixture.experts["detail"].parameters if "lora" not in name]
    assert copied
    assert all(torch.equal(mixture.experts["detail"].parameters[name], expected[name]) for name in copied)
    assert equal(dict(mixture.experts["semantic"].merged()), expected)
    mixture.settle("semantic")
    live = {name: weight.detach() for name, weight in mixture.experts["semantic"].parameters.items()}
    assert equal(live, expected)


def test_an_average_is_lent_to_a_full_expert_that_rests():
    training, _ = set_up(resting_recipe())
    mixture = training.mixture
    average = mixture.ema["semantic"]
    with torch.no_grad():
        for value in average.average.values():
            value += 0.01 * torch.randn(value.shape)
    kept = {name: value.clone() for name, value in average.average.items()}
    training.release()
    mixture.settle()
    inputs = digits_inputs()
    before = velocity_of(mixture, "semantic", inputs)
    with mixture.running("semantic", "ema"), torch.no_grad():
        averaged = mixture(*inputs)
    assert not torch.equal(averaged, before)
    assert torch.equal(velocity_of(mixture, "semantic", inputs), before)
    assert equal(average.average, kept)


@pytest.mark.parametrize("offload", [{"idle": None}, {"idle": "cpu", "averages": "cpu"}])
def test_where_things_lie_changes_no_bit(rested, tmp_path, offload):
    made = run(resting_recipe(**{"training.offload": offload}), output=tmp_path / "run", device="cpu")
    for tree in ("experts", "ema", "training"):
        assert equal(*(load_tree(find_checkpoint(folder), tree) for folder in (rested[0], made.output)))


def test_an_average_on_the_host_stays_there():
    weights = {"w": torch.nn.Parameter(torch.ones(3))}
    for on_host, where in ((True, "cpu"), (False, "meta")):
        average = EMA(weights, 0.5, on_host=on_host)
        average.to(torch.device("meta"))
        assert average.average["w"].device.type == where


def test_an_8_bit_weight_moves_and_stays_itself():
    quantization = pytest.importorskip("torchao.quantization")
    linear = torch.nn.Linear(32, 32, bias=False)
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig(set_inductor_config=False))
    weight = linear.weight
    residency.move(weight, torch.device("meta"))
    assert linear.weight is weight
    assert {each.device.type for each in held(weight)} == {"meta"}


def test_a_mixture_that_is_moved_by_others_knows_where_it_is():
    training, _ = set_up(resting_recipe())
    mixture = training.mixture
    assert mixture.device.type == "cpu"
    mixture.place("cpu")
    mixture.to("meta")
    assert mixture.device.type == "meta"
