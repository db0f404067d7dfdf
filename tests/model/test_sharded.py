"""After `fully_shard`, which puts new tensors in the place of all parameters: nobody works on the old ones.

One process of a gloo group and a mesh of its own, without any launcher; tensors are `DTensor`s all the same.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import digits_batch, digits_inputs, distil, set_up, tiny_recipe, velocity_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moedistill.losses.optim import OptimizerConfig
from moedistill.model.ema import EMA
from moedistill.recipe.loading import load_recipe
from moedistill.runs.build import build_mixture
from moedistill.runtime.checkpoint import load_tree, save_tree
from moedistill.runtime.sharding import whole, whole_tree
from moedistill.stages.consistency import ConsistencyConfig
from moedistill.stages.export import ExportConfig, read_export
from moedistill.stages.training import Training
from moedistill_digits.backbone import DigitsBackboneConfig

EXPERTS = {
    "semantic": {"kind": "full"},
    "detail": {"kind": "lora", "from": "semantic", "rank": 2, "alpha": 4},
}
ON_TEACHER = {**EXPERTS, "detail": {**EXPERTS["detail"], "from": "teacher"}}


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(mixture):
    """Every network a root, every block a unit."""
    mesh = init_device_mesh("cpu", (1,))
    for network in mixture.networks:
        for block in network.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(network, mesh=mesh)


def begun(experts, *, sharded=True, ema=0.5):
    """Both consistency stages of a recipe on a mixture that is sharded, and the run; nothing is set up yet."""
    stages = [distil(ema_decay=ema), distil("detail", ema_decay=ema)]
    training, _ = set_up(tiny_recipe(stages, {"experts": experts, "training.monitor": None}))
    training.release()
    run = training.run
    run.mixture.ema.clear()
    if sharded:
        shard(run.mixture)
    return run


def step(run, number):
    """One optimiser step of a stage: the training, and its expert's weights before it."""
    config = run.recipe.stages[number]
    run.mixture.initialise(but=[stage.expert for stage in run.recipe.stages[:number]])
    training, stage = Training(run, config), config.build()
    stage.setup(training)
    before = copied(run.mixture.experts[config.expert].parameters)
    with training.mixture.using(config.expert):
        stage.step(training, digits_batch(training))
    return training, before


def copied(weights):
    return {name: whole(weight.detach()).clone() for name, weight in weights.items()}


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("experts", [EXPERTS, ON_TEACHER], ids=["on semantic", "on the teacher"])
def test_a_step_moves_what_is_saved_averaged_and_exported(experts, tmp_path):
    run, plain = begun(experts), begun(experts, sharded=False)
    for number, name in enumerate(("semantic", "detail")):
        (training, before), (expected, _) = step(run, number), step(plain, number)
        parameters = run.mixture.experts[name].parameters
        assert all(isinstance(parameter, DTensor) for parameter in parameters.values())
        after = copied(parameters)
        # A key's bias adds the same to all logits of a query; A of a fresh adapter has no gradient, as B is 0.
        still = {key for key in before if key.endswith(("to_k.bias", "lora_A.weight"))}
        assert moved(before, after) >= before.keys() - still
        assert all(parameter.requires_grad for parameter in parameters.values())
        # The same step as without sharding, and as much of the gradient was seen and clipped.
        for key, value in plain.mixture.experts[name].parameters.items():
            torch.testing.assert_close(after[key], value.detach(), rtol=0, atol=1e-6)
        metrics, others = training.take_metrics(), expected.take_metrics()
        assert metrics["grad_norm/student"] == pytest.approx(others["grad_norm/student"], rel=1e-4)
        assert metrics["grad_norm/student"] > 0

        # The average is half-way.
        average = copied(run.mixture.ema[name].average)
        for key in before:
            torch.testing.assert_close(average[key], (before[key] + after[key]) / 2, rtol=0, atol=1e-7)

        # The state of the optimiser goes through a checkpoint, too.
        save_tree(tmp_path, f"{name}", whole_tree(training.state()))
        again = Training(run, run.recipe.stages[number])
        run.recipe.stages[number].build().setup(again)
        again.load_state(load_tree(tmp_path, f"{name}"))
        moments = [state["exp_avg"] for state in again.trained["student"].optimizer.state.values()]
        assert moments
        assert all(isinstance(moment, DTensor) for moment in moments)
        training.release()


def test_8_bit_moments_of_weights_that_are_cut_are_refused():
    """A moment is in blocks of 256 elements, of which a process would have parts."""
    pytest.importorskip("torchao")
    run = begun(EXPERTS)
    run.recipe.stages[0].optimizer.states = "int8"
    with pytest.raises(ValueError, match=r"optimizer\.states: int8 does not go with weights that are cut"):
        step(run, 0)


def test_the_next_stage_trains_its_own_and_leaves_the_others():
    run = begun(EXPERTS)
    step(run, 0)[0].release()
    teacher, semantic = (copied(run.mixture.experts[name].shared.weights) for name in ("teacher", "semantic"))
    start = velocity_of(run.mixture, "semantic", digits_inputs())
    training, before = step(run, 1)
    assert torch.equal(velocity_of(run.mixture, "semantic", digits_inputs()), start)
    assert not torch.equal(velocity_of(run.mixture, "detail", digits_inputs()), start)
    assert moved(before, copied(run.mixture.experts["detail"].parameters))
    for name, kept in (("teacher", teacher), ("semantic", semantic)):
        assert not moved(kept, copied(run.mixture.experts[name].shared.weights))
    trainable = [name for name, parameter in run.mixture.named_parameters() if parameter.requires_grad]
    assert len(trainable) == len(before)
    training.release()
    assert not any(parameter.requires_grad for parameter in run.mixture.parameters())


def test_saved_and_reloaded_weights_equal_the_live_ones(tmp_path):
    run = begun(EXPERTS)
    for number in (0, 1):
        step(run, number)[0].release()
    live = {name: copied(run.mixture.experts[name].parameters) for name in ("semantic", "detail")}
    averages = {name: copied(run.mixture.ema[name].average) for name in live}

    # Into a mixture that is not sharded, and into one that is.
    save_tree(tmp_path, "experts", live)
    for sharded in (False, True):
        other = build_mixture(run.recipe)
        if sharded:
            shard(other)
        other.load(load_tree(tmp_path, "experts"), averages, "the test")
        for name, weights in live.items():
            assert not moved(weights, copied(other.experts[name].parameters))
            assert not moved(averages[name], copied(other.ema[name].average))
            velocity = velocity_of(other, name, digits_inputs())
            torch.testing.assert_close(velocity, velocity_of(run.mixture, name, digits_inputs()), rtol=0, atol=1e-6)

    # An export holds them as plain tensors.
    run.output = tmp_path
    for weights, wanted in (("trained", live), ("ema", averages)):
        config = ExportConfig(name=f"export_{weights}", weights=weights)
        config.build().execute(run)
        assert json.loads((tmp_path / config.name / "export.json").read_text())["provenance"]["weights"] == weights
        for name in live:
            assert not moved(wanted[name], read_export(tmp_path / config.name)[1][name])


def test_an_update_leaves_what_else_is_trained_and_its_gradients(monkeypatch):
    """Though the loss went through both experts and a sharded critic."""
    monkeypatch.setattr(ConsistencyConfig, "trained_experts", lambda self: ["semantic", "detail"])
    run = begun(ON_TEACHER)
    run.mixture.initialise()
    training = Training(run, run.recipe.stages[0])
    critic = torch.nn.Linear(1, 1)
    fully_shard(critic, mesh=init_device_mesh("cpu", (1,)))
    for name, what in (("student", "semantic"), ("other", "detail"), ("critic", critic)):
        training.trains(name, what, OptimizerConfig(lr=1e-3))
    waiting = {key: torch.ones_like(parameter) for key, parameter in training.trained["student"].parameters.items()}
    for key, parameter in training.trained["student"].parameters.items():
        parameter.grad = waiting[key]
    before = {name: copied(each.parameters) for name, each in training.trained.items()}
    batch = digits_batch(training)
    sigma = torch.full((len(batch.latents),), 0.5)
    x = training.velocity(batch.latents, sigma, batch.conditioning)
    x = training.velocity(x, sigma, batch.conditioning, of="other")
    training.update("other", training.trained["critic"].module(x.reshape(-1, 1)).square().mean())
    after = {name: copied(each.parameters) for name, each in training.trained.items()}
    assert {name: bool(moved(before[name], after[name])) for name in before} == {
        "student": False, "other": True, "critic": False,
    }  # fmt: skip
    assert all(each.grad is waiting[key] for key, each in training.trained["student"].parameters.items())
    assert all(torch.equal(whole(gradient), torch.ones(gradient.shape)) for gradient in waiting.values())
    assert all(parameter.grad is None for parameter in training.trained["critic"].parameters.values())
    training.release()


def test_a_sharded_critic_is_saved_whole_and_taken_back(tmp_path):
    run = begun(EXPERTS)
    training = Training(run, run.recipe.stages[0])
    critic = torch.nn.Linear(3, 2)
    fully_shard(critic, mesh=init_device_mesh("cpu", (1,)))
    training.trains("critic", critic, OptimizerConfig(lr=1e-3))
    training.update("critic", critic(torch.ones(1, 3)).square().sum())
    live = copied(training.trained["critic"].parameters)
    save_tree(tmp_path, "training", whole_tree(training.state()))
    saved = load_tree(tmp_path, "training")
    assert not moved(live, saved["critics"]["critic"])
    training.update("critic", critic(torch.ones(1, 3)).square().sum())
    assert moved(live, copied(training.trained["critic"].parameters)) == live.keys()
    training.load_state(saved)
    assert not moved(live, copied(training.trained["critic"].parameters))
    with pytest.raises(ValueError, match="are missing"):
        training.load_state({**saved, "critics": {"critic": {}}})
    training.release()


def test_an_average_is_lent_and_put_back():
    run = begun(EXPERTS)
    step(run, 0)[0].release()
    mixture, inputs = run.mixture, digits_inputs()
    weights, average = copied(mixture.experts["semantic"].parameters), copied(mixture.ema["semantic"].average)
    trained = velocity_of(mixture, "semantic", inputs)
    with mixture.running("semantic", "ema"), torch.no_grad():
        averaged = mixture(*inputs)
        assert not moved(average, copied(mixture.experts["semantic"].parameters))
    assert not torch.equal(averaged, trained)
    assert torch.equal(velocity_of(mixture, "semantic", inputs), trained)
    assert not moved(weights, copied(mixture.experts["semantic"].parameters))


def test_an_average_that_was_loaded_before_is_cut_as_its_parameters_are():
    run = begun(EXPERTS, sharded=False)
    expert = run.mixture.experts["semantic"]
    average = EMA(expert.parameters, decay=0.5)
    before = copied(expert.parameters)
    shard(run.mixture)
    with torch.no_grad():
        for parameter in expert.parameters.values():
            parameter.add_(1.0)
    average.update()
    assert all(isinstance(value, DTensor) for value in average.average.values())
    for name, value in copied(average.average).items():
        torch.testing.assert_close(value, before[name] + 0.5, rtol=0, atol=1e-6)


def test_merged_weights_are_those_of_the_plain_network():
    run, plain = begun(EXPERTS), begun(EXPERTS, sharded=False)
    for each in (run, plain):
        each.mixture.initialise()
        for name in ("semantic", "detail"):
            with torch.no_grad():
                for parameter in each.mixture.experts[name].parameters.values():
                    parameter.add_(0.1)
    velocity_of(run.mixture, "detail", digits_inputs())  # leaves gathered copies behind
    for name in ("semantic", "detail"):
        merged = run.mixture.experts[name].merged()
        assert not any(isinstance(weight, DTensor) for weight in merged.values())
        for key, value in plain.mixture.experts[name].merged().items():
            torch.testing.assert_close(merged[key], value, rtol=0, atol=1e-6)


def test_a_fresh_adapter_is_the_same_however_it_is_cut():
    whole_recipe = load_recipe(tiny_recipe([distil(), distil("detail")], {"experts": EXPERTS}))
    plain, cut = build_mixture(whole_recipe), build_mixture(whole_recipe)
    shard(cut)
    cut.initialise()
    assert not moved(copied(plain.experts["detail"].parameters), copied(cut.experts["detail"].parameters))


def test_who_keeps_tensors_instead_works_on_dead_ones():
    """What all this is for: the tensors of before are in no network any more."""
    run = begun(EXPERTS, sharded=False)
    kept = dict(run.mixture.experts["semantic"].parameters)
    shard(run.mixture)
    optimizer, _ = OptimizerConfig(lr=1e-3).build(kept.values(), 1)
    start = velocity_of(run.mixture, "semantic", digits_inputs())
    for parameter in kept.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(velocity_of(run.mixture, "semantic", digits_inputs()), start)
    assert isinstance(EMA(run.mixture.experts["semantic"].parameters, 0.5).average["proj_out.weight"], DTensor)
    assert Path(run.output)  # the run itself is none the wiser


def test_weights_that_nobody_gives_are_named():
    class Forgetful(DigitsBackboneConfig):
        def give_weights(self, take, seed=0):
            def some(base, name, value):
                if "to_q" not in name:
                    take(base, name, value)

            super().give_weights(some, seed)

    mixture = build_mixture(load_recipe(tiny_recipe([distil()])))
    config = Forgetful(pretrained=None, width=16, num_layers=2, num_heads=2)
    with pytest.raises(ValueError, match=r"weights are not given, the first blocks\.0\.attn\.to_q"):
        mixture.fill(config)
