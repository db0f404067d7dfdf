"""Moments in 8 bits: AdamW's steps, how near to float32 they stay, what they take, and that runs go on bit for bit."""

import sys

import pytest
import torch
from helpers import distil, equal, set_up, tiny_recipe, trees
from torch import nn
from torch._dynamo.utils import counters

from moedistill.errors import UserError
from moedistill.losses.optim import OptimizerConfig, moments_of
from moedistill.runs import ahead
from moedistill.runs.loop import run
from moedistill.runtime.checkpoint import bytes_of, load_tree, save_tree
from moedistill.runtime.quantized import held
from moedistill.stages.rehearsal import needed
from moedistill.stages.training import Training

pytest.importorskip("torchao")

SMALL, LARGE = (15, 256), (16, 256)
"""A tensor below 4096 elements, and one of just as many."""


def optimised(states, steps=20, parameters=None, **config):
    """Two parameters, of the shapes above, after noisy steps towards 0, and their optimiser."""
    generator = torch.Generator().manual_seed(0)
    parameters = parameters or [nn.Parameter(torch.randn(shape, generator=generator)) for shape in (SMALL, LARGE)]
    basis = {"lr": 0.01, "weight_decay": 0.1, "schedule": "linear", "warmup": 3}
    optimizer, schedule = OptimizerConfig(**{**basis, **config}, states=states).build(parameters, 40)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = parameter.detach() + torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        schedule.step()
    return parameters, optimizer, schedule


def test_the_steps_are_those_of_adamw():
    """Where moments are whole they are the same; in 8 bits within 2 % of the way."""
    start = [one.detach().clone() for one in optimised("float32", steps=0)[0]]
    exact, rounded = ([one.detach() for one in optimised(states)[0]] for states in ("float32", "int8"))
    errors = [
        float((one - other).norm() / (one - at).norm()) for one, other, at in zip(exact, rounded, start, strict=True)
    ]
    assert errors[0] < 5e-5
    assert 1e-4 < errors[1] < 0.02


def test_decay_and_eps_are_those_of_adamw():
    for config in ({"weight_decay": 0.5}, {"eps": 0.5}, {"betas": (0.5, 0.9)}):
        exact, rounded = optimised("float32", steps=3, **config)[0], optimised("int8", steps=3, **config)[0]
        torch.testing.assert_close(rounded[0], exact[0], rtol=0, atol=1e-6)


def test_what_its_moments_take():
    """2 of 4 bytes for each element below 4096 of them, else 2 of 1 byte, with 4 for each 256 and the 256 values."""
    parameters, optimizer, _ = optimised("int8", steps=1)
    saved = optimizer.state_dict()["state"]
    counted = [bytes_of(moments_of(optimizer, parameter)) for parameter in parameters]
    assert counted == [2 * 15 * 256 * 4, 2 * (16 * 256 + 4 * 16)]
    assert counted == [bytes_of({k: v for k, v in saved[number].items() if k != "step"}) for number in (0, 1)]
    assert bytes_of(moments_of(optimised("float32", steps=1)[1], parameters[1])) == 2 * 16 * 256 * 4
    kept = optimizer.state[parameters[1]]
    assert sum(map(bytes_of, held(kept["exp_avg"]))) == 16 * 256 + 4 * 16 + 4 * 256


def test_its_state_is_of_plain_tensors_and_goes_on_bit_for_bit(tmp_path):
    parameters, optimizer, schedule = optimised("int8", steps=3)
    save_tree(tmp_path, "state", {"optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict()})
    tree = load_tree(tmp_path, "state")
    moment = tree["optimizer"]["state"][1]["exp_avg"]
    assert {name: value.dtype for name, value in moment.items()} == {"codes": torch.uint8, "scale": torch.float32}

    copies = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    _, again, again_schedule = optimised("int8", steps=0, parameters=copies)
    again.load_state_dict(tree["optimizer"])
    again_schedule.load_state_dict(tree["scheduler"])
    for _ in range(2):
        for one, other in zip(parameters, copies, strict=True):
            one.grad = one.detach().cos()
            other.grad = one.grad.clone()
        for each in (optimizer, schedule, again, again_schedule):
            each.step()
        assert all(map(torch.equal, parameters, copies))
    assert equal(again.state_dict(), optimizer.state_dict())


def test_nothing_is_compiled_on_a_cpu():
    """There may be no compiler, and compiling takes seconds for each shape."""
    counters.clear()
    optimised("int8", steps=1)
    assert not counters["stats"]


# -- runs -------------------------------------------------------------------------------------------------------------

WIDE = {"backbone.width": 64, "training.checkpoint_every": 1, "training.keep_checkpoints": 9}
"""So wide that linears have 4096 elements and more."""


def wide(states, steps=6, **changes):
    optimizer = {"lr": 1e-3, "schedule": "cosine", "warmup": 1, "states": states}
    return tiny_recipe([distil(steps=steps, optimizer=optimizer, ema_decay=0.9)], {**WIDE, **changes})


def flat(path, expert="semantic"):
    return torch.cat([value.flatten() for value in load_tree(path, "experts")[expert].values()])


def test_a_run_stays_near_float32_and_goes_on_bit_for_bit(tmp_path):
    exact, rounded = (run(wide(states), output=tmp_path / states, device="cpu") for states in ("float32", "int8"))
    paths = sorted(rounded.checkpoint.parent.iterdir())
    start = flat(sorted(exact.checkpoint.parent.iterdir())[0])
    way = (flat(exact.checkpoint) - start).norm()
    error = float((flat(rounded.checkpoint) - flat(exact.checkpoint)).norm() / way)
    print(f"after {len(paths) - 1} steps {error:.1e} of the way")
    assert 1e-4 < error < 0.05

    again = run(wide("int8"), output=tmp_path / "again", resume_from=paths[2], device="cpu")
    assert equal(trees(again.checkpoint), trees(rounded.checkpoint))
    sizes = [(one.checkpoint / "training.safetensors").stat().st_size for one in (exact, rounded)]
    assert sizes[1] < 0.4 * sizes[0]


def test_the_other_kind_of_moments_is_not_taken_over(tmp_path):
    exact = run(wide("float32", steps=2), output=tmp_path / "float32", device="cpu")
    with pytest.raises(UserError, match="states"):
        run(wide("int8", steps=2), output=tmp_path / "int8", resume_from=sorted(exact.checkpoint.parent.iterdir())[0])


def test_memory_is_counted_as_it_is_held(tmp_path, monkeypatch):
    """Of moments, weights and gradients at an update; a codebook of 256 values for each moment is not counted."""
    counted, measured, codebooks = [], [], []

    def look(run_, parts, usual=ahead._check_memory):
        counted.append(needed(parts[0], accumulating=False))
        usual(run_, parts)

    def clip(self, trainable, parameters, limit, usual=Training._clip):
        states = [value for one in trainable.optimizer.state.values() for key, value in one.items() if key != "step"]
        gradients = [one.grad for one in parameters if one.grad is not None]
        average = list(trainable.average.average.values())
        measured.append(sum(map(bytes_of, [inner for each in [*states, *gradients, *average] for inner in held(each)])))
        codebooks.append(4 * 256 * sum(len(held(state)) > 1 for state in states))
        return usual(self, trainable, parameters, limit)

    monkeypatch.setattr(ahead, "_check_memory", look)
    monkeypatch.setattr(Training, "_clip", clip)
    run(wide("int8", steps=2), output=tmp_path / "run", device="cpu")
    assert codebooks[-1] > 0
    assert counted == [measured[-1] - codebooks[-1]]


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_without_torchao_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "moedistill.losses.eight_bit", None)
    with pytest.raises(UserError, match=r"stage semantic: optimizer\.states: int8 needs torchao: pip install 'moedis"):
        run(wide("int8"), output=tmp_path / "run", device="cpu")
    optimised("float32", steps=1)


def test_moments_of_another_form_are_refused(tmp_path):
    recipe = wide("int8", steps=1)
    state = load_tree(run(recipe, output=tmp_path / "run", device="cpu").checkpoint, "training")
    training, _ = set_up(recipe)
    training.load_state(state)
    moments = next(
        each for each in state["trained"]["student"]["optimizer"]["state"].values() if isinstance(each["exp_avg"], dict)
    )
    moments["exp_avg"]["codes"] = moments["exp_avg"]["codes"].float()
    with pytest.raises(ValueError, match=r"does not fit what is trained: .*exp_avg\.codes' is float32 \["):
        training.load_state(state)
    moments["exp_avg"] = moments["exp_avg"]["codes"]
    with pytest.raises(ValueError, match=r"exp_avg' is float32 \[.*\], and must be a mapping"):
        training.load_state(state)
