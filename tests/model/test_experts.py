"""Experts on a shared base: each starts as its parent, and nothing of one is felt by another or by the teacher."""

import pytest
import torch
from helpers import as_if_trained, digits_backbone, digits_inputs, digits_mixture, velocity_of
from torch import nn

from moedistill.model.backbone import TEACHER, Backbone
from moedistill.model.experts import FrozenConfig, FullConfig, LoRAConfig
from moedistill.model.mixture import Mixture
from moedistill.model.shared_network import Copies
from moedistill_digits.network import DigitsTransformer

COPIED = ("time_embed", "norm_out", "proj_out")


def lora(parent=TEACHER, **settings):
    return LoRAConfig(parent=parent, rank=2, alpha=4.0, **settings)


def full(parent=TEACHER):
    return FullConfig(parent=parent)


def frozen(parent=TEACHER):
    return FrozenConfig(parent=parent)


# --- An expert starts as its parent


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("child", [lora, frozen])
def test_a_fresh_expert_equals_the_teacher_bit_for_bit(child, dtype):
    mixture = Mixture(digits_backbone(dtype), {"child": child()})
    mixture.autocast_dtype = None if dtype == "float32" else torch.bfloat16
    inputs = digits_inputs()
    for _ in range(2):  # as attached, and as initialised
        assert torch.equal(velocity_of(mixture, "child", inputs), velocity_of(mixture, TEACHER, inputs))
        mixture.experts["child"].initialise(0)


@pytest.mark.parametrize(
    ("parent", "child"),
    [
        (full(), full("parent")),
        (full(), lora("parent")),
        (full(), frozen("parent")),
        (lora(), lora("parent")),
        (lora(), lora("parent", copies="none")),
        (lora(copies="none"), lora("parent")),
        (lora(copies=["proj_out"]), lora("parent", copies=["time_embed"])),
        (lora(), frozen("parent")),
    ],
    ids=lambda config: f"{type(config).__name__}-{getattr(config, 'copies', '')}",
)
def test_a_child_equals_its_trained_parent_bit_for_bit(parent, child):
    mixture, inputs = digits_mixture(child=child, parent=parent), digits_inputs()
    mixture.experts["child"].initialise(0)
    trained = velocity_of(mixture, "parent", inputs)
    assert (trained - velocity_of(mixture, TEACHER, inputs)).abs().max() > 1e-3
    assert torch.equal(velocity_of(mixture, "child", inputs), trained)


def test_a_full_child_equals_its_lora_parent():
    mixture, inputs = (
        digits_mixture(child=full("parent"), parent=lora("grandparent"), grandparent=lora()),
        digits_inputs(),
    )
    mixture.experts["child"].initialise(0)
    trained = velocity_of(mixture, "parent", inputs)
    assert (trained - velocity_of(mixture, "grandparent", inputs)).abs().max() > 1e-3
    torch.testing.assert_close(velocity_of(mixture, "child", inputs), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [lora(), full()], ids=["lora", "full"])
def test_initialising_is_in_place_and_by_seed_and_name(config):
    mixture = digits_mixture(one=config, two=config)
    one, two = mixture.experts["one"].parameters, mixture.experts["two"].parameters
    places = [parameter.data_ptr() for parameter in one.values()]

    def initialised(seed):
        for name in ("one", "two"):
            mixture.experts[name].initialise(seed)
        return {name: parameter.detach().clone() for name, parameter in one.items()}

    torch.manual_seed(123)
    first, again, other = initialised(0), initialised(0), initialised(1)
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(123)))
    assert [parameter.data_ptr() for parameter in one.values()] == places
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        random = name.endswith("lora_A.weight")
        assert torch.equal(parameter, other[name]) != random
        assert torch.equal(other[name], two[name]) != random
        assert not name.endswith("lora_B.weight") or not parameter.any()


# --- Nothing of one expert is felt by another


def test_each_trained_tensor_changes_its_own_experts_only():
    mixture = digits_mixture(
        full=full(), lora=lora(), other=lora(), on_full=lora("full", copies=["proj_out"]), on_lora=lora("lora")
    )
    inputs = digits_inputs()
    before = {name: velocity_of(mixture, name, inputs) for name in mixture.experts}
    weights = {name: weight.clone() for name, weight in mixture.experts[TEACHER].shared.weights.items()}
    heirs = {"full": {"full", "on_full"}, "lora": {"lora", "on_lora"}}
    for name, expert in mixture.experts.items():
        for key, parameter in expert.parameters.items():
            kept = parameter.detach().clone()
            with torch.no_grad():
                parameter += 0.1
            expected = heirs.get(name, {name})
            if key.startswith(COPIED):  # a child has copies of its own
                expected = {name, "on_full"} if name == "full" and not key.startswith("proj_out") else {name}
            changed = {other for other in before if not torch.equal(velocity_of(mixture, other, inputs), before[other])}
            # A key's bias adds the same to all logits of a query.
            assert changed == expected or (key.endswith("to_k.bias") and changed <= expected), (name, key)
            with torch.no_grad():
                parameter.copy_(kept)
    assert {name for name, expert in mixture.experts.items() if expert.parameters} == set(mixture.experts) - {TEACHER}
    for name, weight in mixture.experts[TEACHER].shared.weights.items():
        assert torch.equal(weight, weights[name]), name


# --- Which modules an expert changes


class Twins(nn.Module):
    """Modules of the same names at different depths, some with names that begin or end alike."""

    def __init__(self, depth=1):
        super().__init__()
        self.proj_out, self.original, self.to_q = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.pre_to_q, self.proj_out_2 = nn.Linear(4, 4), nn.Linear(4, 4)
        self.inner = Twins(depth - 1) if depth else None

    def forward(self, x):
        for module in self.children():
            x = x + module(x)
        return x


class TwinsBackbone(Backbone):
    velocity = null_conditioning = encode_prompts = latent_shape = decode = token_grid = unembed = None

    def __init__(self):
        self.network, self.lora_targets, self.time_dependent = Twins(), {"attention": "to_q"}, ("proj_out", "original")


def test_only_exact_paths_are_adapted_and_copied():
    mixture = Mixture(TwinsBackbone(), {"lora": lora()})
    trained = {"to_q.lora_A.weight", "to_q.lora_B.weight"}
    trained |= {f"{path}.{name}" for path in ("proj_out", "original") for name in ("weight", "bias")}
    assert set(mixture.experts["lora"].parameters) == trained
    network = mixture.backbone.network
    assert [name for name, module in network.named_modules() if isinstance(module, Copies)] == ["proj_out", "original"]
    changed = {name for name, module in network.named_children() if type(module) is not nn.Linear}
    assert changed == {"proj_out", "original", "to_q", "inner"}
    assert all(type(module) is nn.Linear for name, module in network.inner.named_children() if name != "inner")
    x = torch.randn(3, 4)
    as_if_trained(mixture.experts["lora"], 0)
    expected = Twins()
    expected.load_state_dict(mixture.experts["lora"].merged())
    with mixture.using("lora"), torch.no_grad():
        torch.testing.assert_close(network(x), expected(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("copied", ["inner.original", "inner.proj_out"])
def test_a_path_may_name_any_module(copied):
    """Also one named as our own wrappers name what they wrap, and with other copies about."""
    mixture = Mixture(TwinsBackbone(), {"other": lora(), "lora": lora(copies=[copied])})
    assert f"{copied}.weight" in mixture.experts["lora"].parameters


def test_no_adapter_inside_a_copy():
    mixture = digits_mixture(lora=lora(copies=["blocks.0", "proj_out"]))
    names = mixture.experts["lora"].parameters
    adapted = {name.split(".lora_")[0] for name in names if ".lora_" in name}
    assert adapted == {f"blocks.1.attn.{linear}" for linear in ("to_q", "to_k", "to_v", "to_out")}
    plain = {name for name, _ in DigitsTransformer(16, 2, 2).named_parameters()}
    assert {name for name in names if ".lora_" not in name} == {
        n for n in plain if n.startswith(("blocks.0.", "proj_out."))
    }


@pytest.mark.parametrize("targets", ["attention", ["attention", "attention"]])
def test_names_do_not_depend_on_what_else_is_attached(targets):
    config = lora(targets=targets)
    alone, among = digits_mixture(lora=config), digits_mixture(first=lora(), on=lora("lora"), lora=config, full=full())
    assert list(alone.experts["lora"].parameters) == list(among.experts["lora"].parameters)
    assert set(among.experts["full"].parameters) == set(dict(DigitsTransformer(16, 2, 2).named_parameters()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "atention"}, "no group of linears 'atention'; it has attention"),
        ({"targets": ["attention", "mlp"]}, "no group of linears 'mlp'"),
        ({"copies": ["time_embed", "proj"]}, "no module 'proj' to copy; its time-dependent ones are time_embed"),
        ({"copies": ["proj_out.original"]}, "no module 'proj_out.original'"),
        ({"copies": ["time_embed", "time_embed.linear_1"]}, "'time_embed.linear_1' lies inside 'time_embed'"),
        ({"copies": ["blocks.0", "blocks.1"]}, "all the linears .* lie inside"),
    ],
)
def test_what_the_backbone_does_not_have_is_refused(settings, message):
    with pytest.raises(ValueError, match=f"expert lora: .*{message}"):
        Mixture(digits_backbone(), {"first": lora(), "lora": lora(**settings)})


@pytest.mark.parametrize("order", [("copying", "adapting"), ("adapting", "copying")])
def test_an_expert_cannot_copy_what_another_adapts(order):
    """The copy would hold the other's adapter, or the adapter would sit in a module that does not run."""
    configs = {"copying": lora(copies=["blocks.0"]), "adapting": lora()}
    with pytest.raises(
        ValueError, match=rf"expert {order[1]}: .*blocks\.0.*copying runs a copy of that, without what adapting"
    ):
        Mixture(digits_backbone(), {name: configs[name] for name in order})


# --- dtypes, and weights as a plain network


def test_trained_tensors_are_float32_whatever_the_base():
    mixture = digits_mixture(
        digits_backbone("bfloat16"), full=full(), lora=lora(), on_full=lora("full"), on_lora=lora("lora")
    )
    mixture.autocast_dtype = torch.bfloat16
    inputs = digits_inputs()
    assert {weight.dtype for weight in mixture.experts[TEACHER].shared.weights.values()} == {torch.bfloat16}
    for name, expert in mixture.experts.items():
        assert all(parameter.dtype == torch.float32 for parameter in expert.parameters.values())
        velocity = velocity_of(mixture, name, inputs)
        assert velocity.dtype == torch.float32
        assert velocity.isfinite().all()
        mixture.train_only(name)
        before = {key: parameter.detach().clone() for key, parameter in expert.parameters.items()}
        if not before:
            continue
        with mixture.using(name):
            mixture(*inputs).square().sum().backward()
        torch.optim.AdamW(expert.parameters.values(), lr=1e-6, weight_decay=0.0).step()
        unmoved = {key for key, parameter in expert.parameters.items() if torch.equal(parameter, before[key])}
        assert all(key.endswith("to_k.bias") for key in unmoved), (name, unmoved)


@pytest.mark.parametrize("expert", ["full", "lora", "on_full", "on_lora", "frozen", TEACHER])
def test_merged_weights_make_a_plain_network_equal_to_the_expert(expert):
    mixture = digits_mixture(
        full=full(),
        lora=lora(),
        on_full=lora("full", copies=["norm_out"]),
        on_lora=lora("lora"),
        frozen=frozen("on_lora"),
    )
    merged = mixture.experts[expert].merged()
    assert all(weight.dtype == torch.float32 and not weight.requires_grad for weight in merged.values())
    plain = DigitsTransformer(16, 2, 2)
    plain.load_state_dict(merged)
    x, sigma, cond = digits_inputs()
    expected = velocity_of(mixture, expert, (x, sigma, cond))
    with torch.no_grad():
        torch.testing.assert_close(plain(x, sigma, **cond), expected, rtol=0, atol=1e-5)
    for weight in merged.values():  # its own memory
        weight.zero_()
    assert torch.equal(velocity_of(mixture, expert, (x, sigma, cond)), expected)


@pytest.mark.parametrize("expert", ["full", "lora", "on_lora", None])
def test_only_the_expert_in_training_takes_gradients(expert):
    mixture = digits_mixture(full=full(), lora=lora(), on_lora=lora("lora"))
    mixture.train_only("full")
    mixture.train_only(*([expert] if expert else []))
    trainable = {id(parameter) for parameter in mixture.parameters() if parameter.requires_grad}
    assert trainable == ({id(p) for p in mixture.experts[expert].parameters.values()} if expert else set())
