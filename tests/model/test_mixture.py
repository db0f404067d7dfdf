"""Switching between experts: it nests, survives exceptions, and never costs or misdirects a gradient."""

import pytest
import torch
from helpers import digits_backbone, digits_inputs, digits_mixture, velocity_of

from moedistill.errors import UserError
from moedistill.model.backbone import TEACHER
from moedistill.model.experts import FullConfig, LoRAConfig
from moedistill.model.guidance import Guidance

EXPERTS = {
    "full": FullConfig(),
    "lora": LoRAConfig(rank=2, alpha=4.0),
    "other": LoRAConfig(rank=2, alpha=4.0),
    "on_full": LoRAConfig(parent="full", rank=2, alpha=4.0),
    "on_lora": LoRAConfig(parent="lora", rank=2, alpha=4.0, copies=["proj_out"]),
}
BLOCKS = ("blocks.0", "blocks.1")


@pytest.fixture(scope="module")
def mixture():
    return digits_mixture(**EXPERTS)


@pytest.fixture(scope="module")
def checkpointing():
    return digits_mixture(gradient_checkpointing=True, **EXPERTS)


# --- The switch


def test_using_nests_and_restores(mixture):
    inputs = digits_inputs()
    alone = {name: velocity_of(mixture, name, inputs) for name in mixture.experts}

    def now():
        with torch.no_grad():
            return next(name for name, velocity in alone.items() if torch.equal(mixture(*inputs), velocity))

    def descend(names):
        if names:
            before = now()
            with mixture.using(names[0]):
                assert mixture.active == now() == names[0]
                descend(names[1:])
                assert mixture.active == now() == names[0]
            assert mixture.active == now() == before

    assert now() == TEACHER
    descend(["lora", "other", "full", "on_full", "full", TEACHER, "on_lora", "lora", "lora", "on_full", "other"])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_using_restores_after_exceptions(mixture, error):
    inputs = digits_inputs()
    expected = velocity_of(mixture, "lora", inputs)
    with mixture.using("lora"):
        with pytest.raises(error), mixture.using("on_full"), mixture.using("other"):
            raise error
        assert mixture.active == "lora"
        with torch.no_grad():
            assert torch.equal(mixture(*inputs), expected)
    assert mixture.active == TEACHER


def test_an_unknown_expert_changes_nothing(mixture):
    with mixture.using("lora"):
        with pytest.raises(KeyError, match="loar"), mixture.using("loar"):
            pass
        assert mixture.active == "lora"


def test_using_never_changes_requires_grad(mixture):
    mixture.train_only("on_lora")
    expected = [parameter.requires_grad for parameter in mixture.parameters()]
    assert 0 < sum(expected) < len(expected)
    for name in mixture.experts:
        with mixture.using(name):
            assert [parameter.requires_grad for parameter in mixture.parameters()] == expected


def test_initialising_goes_from_parents_to_children():
    """Also where a full expert, attached before all others, descends from them; trained experts are left out."""
    configs = {"youngest": FullConfig(parent="middle"), "middle": LoRAConfig(parent="eldest", rank=2, alpha=4.0)}
    mixture, inputs = digits_mixture(**configs, eldest=FullConfig()), digits_inputs()
    trained = velocity_of(mixture, "eldest", inputs)
    mixture.initialise(but=["eldest"])
    assert torch.equal(velocity_of(mixture, "eldest", inputs), trained)
    assert torch.equal(velocity_of(mixture, "middle", inputs), trained)
    torch.testing.assert_close(velocity_of(mixture, "youngest", inputs), trained, rtol=0, atol=1e-5)
    mixture.initialise()
    teacher = velocity_of(mixture, TEACHER, inputs)
    assert (teacher - trained).abs().max() > 1e-3
    for name in mixture.experts:
        torch.testing.assert_close(velocity_of(mixture, name, inputs), teacher, rtol=0, atol=1e-5)


# --- Gradients


def gradients(mixture, expert, *, meanwhile=None, through_teacher=False, repeat=1):
    """Gradients of `expert`; between forward and backward, and around the backward, `meanwhile` is active."""
    inputs = digits_inputs()
    mixture.train_only(expert)
    mixture.zero_grad()
    with mixture.using(expert):
        velocity = mixture(*inputs)
    loss = velocity.square().mean()
    if through_teacher:
        with mixture.using(TEACHER):
            features = mixture.hidden_states(inputs[0] - velocity, *inputs[1:], BLOCKS)
        loss = loss + sum(state.square().mean() for state in features)
    if meanwhile is None:
        with mixture.using(expert):
            loss.backward()
    else:
        with mixture.using(meanwhile):
            with torch.no_grad():
                mixture(*inputs)
            for _ in range(repeat):
                loss.backward(retain_graph=repeat > 1)
    return {name: parameter.grad for name, parameter in mixture.named_parameters() if parameter.grad is not None}


def assert_same_gradients(ours, expected, factor=1):
    assert ours.keys() == expected.keys()
    assert len(expected) > 0
    for name, gradient in expected.items():
        assert torch.equal(ours[name], factor * gradient), name


@pytest.mark.parametrize("expert", EXPERTS)
def test_every_trained_tensor_and_nothing_else_gets_a_gradient(mixture, expert):
    found = gradients(mixture, expert)
    shared = {id(parameter): name for name, parameter in mixture.named_parameters()}
    expected = {shared[id(parameter)] for parameter in mixture.experts[expert].parameters.values()}
    assert found.keys() == expected
    assert all(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("meanwhile", [TEACHER, "full", "other"])
@pytest.mark.parametrize("expert", ["full", "lora", "on_full", "on_lora"])
def test_a_switch_between_forward_and_backward_loses_no_gradient(mixture, expert, meanwhile):
    expected = gradients(mixture, expert)
    assert_same_gradients(gradients(mixture, expert, meanwhile=meanwhile), expected)


@pytest.mark.parametrize("through_teacher", [False, True], ids=["", "through_teacher"])
@pytest.mark.parametrize("meanwhile", [None, TEACHER, "full", "other", "on_full"])
@pytest.mark.parametrize("expert", ["full", "lora", "on_full", "on_lora"])
def test_checkpointing_recomputes_with_the_expert_of_the_forward(
    mixture, checkpointing, expert, meanwhile, through_teacher
):
    expected = gradients(mixture, expert, through_teacher=through_teacher)
    found = gradients(checkpointing, expert, meanwhile=meanwhile, through_teacher=through_teacher)
    assert_same_gradients(found, expected)
    assert checkpointing.active == TEACHER


def test_checkpointed_graphs_can_be_walked_twice(mixture, checkpointing):
    expected = gradients(mixture, "lora")
    assert_same_gradients(gradients(checkpointing, "lora", meanwhile="other", repeat=2), expected, factor=2)


def test_checkpointing_does_recompute(checkpointing):
    calls = []
    block = checkpointing.experts["lora"].shared.network.get_submodule("blocks.1.attn")
    handle = block.register_forward_hook(lambda *_: calls.append(checkpointing.active))
    gradients(checkpointing, "lora", meanwhile=None)
    handle.remove()
    assert calls == ["lora", "lora"]


def test_a_network_that_cannot_checkpoint_is_refused(monkeypatch):
    backbone = digits_backbone()
    monkeypatch.delattr(type(backbone.network), "enable_gradient_checkpointing")
    with pytest.raises(ValueError, match="gradient_checkpointing: DigitsTransformer cannot recompute activations"):
        digits_mixture(backbone, gradient_checkpointing=True)


# --- Guidance


def test_a_jump_over_several_steps_has_the_mean_of_their_guidance(mixture):
    x, _, cond = digits_inputs(batch=2)
    points, guidance = mixture.trajectory.points, Guidance(mode="classifier_free", scale=4.0, oscillate_from=10)

    def guided(start, end, guidance=guidance):
        sigma, until = points[start].item(), 0.0 if end is None else points[end].item()
        with torch.no_grad():
            return mixture.guided(x, torch.full((2,), sigma), cond, guidance, until=until)

    for start, end, scale in (
        (50, 40, 4.0),
        (40, 39, 4.0),
        (39, 38, 1.0),
        (40, 38, 2.5),
        (44, 36, 3.25),
        (40, None, 2.5),
    ):
        constant = Guidance(mode="classifier_free", scale=scale)
        torch.testing.assert_close(guided(start, end), guided(start, end, constant), rtol=1e-5, atol=1e-5)
    assert mixture.share_guided(Guidance(mode="classifier_free", scale=4.0), 0.5, 0.1) == 1.0


def test_an_oscillating_guidance_leaves_out_every_odd_step_from_where_it_begins(mixture):
    """Of a trajectory of 50 steps, whose step i begins at point 50 - i."""
    x, _, cond = digits_inputs(batch=6)
    steps = [0, 9, 10, 11, 12, 49]
    sigma = mixture.trajectory.points[[50 - step for step in steps]]
    guidance = Guidance(mode="classifier_free", scale=4.0, oscillate_from=10)
    calls = []
    network = mixture.experts[TEACHER].shared.network
    handle = network.register_forward_hook(lambda _module, args, _output: calls.append(len(args[0])))
    before = mixture.forwards
    with torch.no_grad():
        found = mixture.guided(x, sigma, cond, guidance)
        assert calls == [10]  # one forward, of four samples with and of two without
        assert mixture.forwards - before == 10
        v = mixture(x, sigma, cond)
        always = mixture.guided(x, sigma, cond, Guidance(mode="classifier_free", scale=4.0))
        none = mixture.guided(x[[3, 5]], sigma[[3, 5]], {name: value[[3, 5]] for name, value in cond.items()}, guidance)
    handle.remove()
    for row, step in enumerate(steps):
        wanted, other = (v, always) if step in (11, 49) else (always, v)
        torch.testing.assert_close(found[row], wanted[row], rtol=1e-5, atol=1e-5)
        assert (found[row] - other[row]).abs().max() > 1e-3
    torch.testing.assert_close(none, v[[3, 5]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("expert", [TEACHER, "lora"])
def test_guided_is_one_batched_forward_equal_to_two(mixture, expert):
    x, sigma, cond = digits_inputs()
    calls = []
    network = mixture.experts[expert].shared.network
    handle = network.register_forward_hook(lambda _module, args, _output: calls.append(len(args[0])))
    with mixture.using(expert), torch.no_grad():
        guided = mixture.guided(x, sigma, cond, Guidance(mode="classifier_free", scale=4.0))
        assert calls == [4]
        v_cond, v_null = mixture(x, sigma, cond), mixture(x, sigma, mixture.backbone.null_conditioning(cond))
        torch.testing.assert_close(guided, v_cond + 3.0 * (v_cond - v_null), rtol=1e-5, atol=1e-5)
        assert (guided - v_cond).abs().max() > 1e-3
        for guidance in (Guidance(), Guidance(mode="classifier_free"), Guidance(mode="embedded", scale=6.0)):
            calls.clear()
            assert torch.equal(mixture.guided(x, sigma, cond, guidance), v_cond)
            assert calls == [2]
    handle.remove()


# --- What is loaded


@pytest.mark.parametrize("part", ["experts", "averages"])
def test_weights_that_do_not_fit_are_refused_with_their_source(part):
    mixture = digits_mixture(lora=LoRAConfig(rank=2, alpha=4.0))
    weights = {name: value.detach().clone() for name, value in mixture.experts["lora"].parameters.items()}
    other = {name: torch.zeros(3) for name in weights}
    kept = velocity_of(mixture, "lora", digits_inputs())
    for wrong, message in (
        (
            {"lora": other},
            "of expert 'lora' in there do not fit the recipe: 'blocks.0.attn.to_q.lora_A.weight' is float32",
        ),
        ({"ghost": weights}, "there has weights of an expert 'ghost', which the recipe does not name"),
    ):
        experts, averages = (wrong, {}) if part == "experts" else ({"lora": weights}, wrong)
        with pytest.raises(UserError, match=message):
            mixture.load(experts, averages, "there")
    assert torch.equal(velocity_of(mixture, "lora", digits_inputs()), kept)
