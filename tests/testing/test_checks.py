"""The kit: right backbones pass, and each check fails for a backbone that is wrong in its way."""

import importlib
import re
import sys
import types
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from gaussian_plugin import GaussianBackboneConfig

from moedistill import Record, cli
from moedistill.flow.process import from_vp, to_vp, velocity_from_vp
from moedistill.flow.routers import TimestepRouter
from moedistill.model.backbone import VideoSize
from moedistill.model.conditioning import select
from moedistill.testing.checks import CHECKS
from moedistill.testing.new_backbone.write import write_plugin
from moedistill.testing.running import BackboneContract, check_backbone, read_config
from moedistill.testing.subject import Subject, Unchecked
from moedistill_digits.backbone import DigitsBackbone, DigitsBackboneConfig
from moedistill_open_sora.backbone import OpenSoraConfig
from moedistill_wan.backbone import WanBackbone, WanConfig

NAMES = [check.name for check in CHECKS]
OF_ALL = [check.name for check in CHECKS if not check.declared]
"""Without those of what only some backbones have."""
GAUSSIAN = Path(__file__).parents[1] / "gaussian_plugin.py"
FUNCTIONS = {check.name: check.function for check in CHECKS}


class TestDigits(BackboneContract):
    config = DigitsBackboneConfig()


class TestGaussian(BackboneContract):
    config = GaussianBackboneConfig()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The skeleton's backbone: one with a sampler of its own, checkpointing, text and a layout."""
    folder = tmp_path_factory.mktemp("toy")
    write_plugin("toy_of_the_kit", folder)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("moedistill_toy_of_the_kit.backbone")
    sys.path.remove(str(folder))


def changed(toy, change_backbone=None, change_network=None, **members):
    """A config of the toy with other members, and with something done to what is built."""
    cls = type("Changed", (toy.ToyOfTheKitBackbone,), members)

    class Config(toy.ToyOfTheKitConfig):
        def build(self, seed=0):
            backbone = super().build(seed)
            backbone.__class__ = cls
            if change_network is not None:
                change_network(backbone.network)
            if change_backbone is not None:
                change_backbone(backbone)
            return backbone

    return Config()


OF_A_PIPELINE = {"guided_steps", "text_encoders", "guided_once"}
"""Checks of which a backbone without a pipeline has nothing."""


def rows(config, passed):
    return {row.check.name for row in check_backbone(config) if row.passed is passed}


def test_a_right_backbone_passes(toy):
    found = check_backbone(changed(toy))
    assert [row.check.name for row in found] == [name for name in OF_ALL if name != "noise_recognised"]
    assert {row.check.name for row in found if row.passed is None} == OF_A_PIPELINE | {"encode_videos"}
    assert all(row.passed is not False for row in found)
    assert all(row.figure and "\n" not in row.figure for row in found)


def test_every_check_is_a_test_of_the_contract():
    tests = {name for name in dir(BackboneContract) if name.startswith("test_")}
    assert tests == {f"test_{name}" for name in NAMES}
    assert len(NAMES) > 18


# -- four wrong backbones, through the whole table --------------------------------------------------------------------


def own_prediction(self, network, x, sigma, cond):
    return network(x, 1000.0 * sigma, cond["text"])


def test_a_swapped_sign_fails_against_the_models_own_sampler(toy):
    def velocity(self, network, x, sigma, cond):
        return -network(x, 1000.0 * sigma, cond["text"])

    assert rows(changed(toy, velocity=velocity, native_prediction=own_prediction), False) == {"native_steps"}


def test_an_unscaled_time_fails_against_the_models_own_sampler(toy):
    def velocity(self, network, x, sigma, cond):
        return network(x, sigma, cond["text"])

    def unembed(self, network, hidden, x, sigma, cond):
        return toy.ToyOfTheKitBackbone.unembed(self, network, hidden, x, sigma / 1000.0, cond)

    assert rows(changed(toy, velocity=velocity, unembed=unembed), False) == {"native_steps"}


@pytest.mark.parametrize(
    ("copies", "forgotten"),
    [
        (("norm_out", "proj_out"), "time_embed.0"),
        (("time_embed", "proj_out"), "norm_out"),
        (("time_embed", "norm_out"), "proj_out, the final projection"),
    ],
)
def test_a_missing_copy_fails(toy, copies, forgotten):
    config = changed(toy, time_dependent=copies)
    assert rows(config, False) == {"copies_cover"}
    with pytest.raises(AssertionError, match=forgotten):
        FUNCTIONS["copies_cover"](Subject(config))


def test_what_is_shared_on_purpose_is_not_missing(toy):
    config = changed(toy, time_dependent=("norm_out", "proj_out"), time_shared=("time_embed",))
    assert rows(config, False) == set()


def test_a_wrong_layout_fails(toy):
    def swapped_grid(self, shape):
        t, h, w = shape[2], shape[3] // 2, shape[4] // 2
        return h, t, w

    def unembed(self, network, hidden, x, sigma, cond):
        grid = toy.ToyOfTheKitBackbone.token_grid(self, x.shape)
        embedding = network.embed(1000.0 * sigma, cond["text"])
        norm = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:])
        scale = 1 + network.norm_out(torch.nn.functional.silu(embedding))[:, None]
        return toy.unpatchify(network.proj_out(norm * scale), grid)

    # T and H swapped in the grid that losses lay features out on.
    assert rows(changed(toy, unembed=unembed), False) == set()
    assert rows(changed(toy, token_grid=swapped_grid, unembed=unembed), False) == {"tokens"}

    def velocity(self, network, x, sigma, cond):
        swapped = network(x.transpose(3, 4), 1000.0 * sigma, cond["text"])
        return swapped.transpose(3, 4)

    # H and W swapped on the way into the network and out of it.
    assert rows(changed(toy, velocity=velocity), False) == {"native_steps", "unembed"}


# -- the same four of a diffusers class: that of the tutorial ---------------------------------------------------------


@pytest.fixture(scope="module")
def mochi():
    """The tutorial's backbone."""
    text = (Path(__file__).parents[2] / "docs" / "tutorials" / "new_backbone.md").read_text(encoding="utf-8")
    code, _ = re.findall(r"^```python\n(# \S+/backbone\.py\n.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    module = types.ModuleType("moedistill_tutorial")
    sys.modules["moedistill_tutorial"] = module  # where annotations are looked up
    exec(compile(code, "new_backbone.md", "exec"), module.__dict__)
    yield module
    del sys.modules["moedistill_tutorial"]


def unswapped_sign(self, prediction, x, sigma):
    return prediction


def unscaled_time(self, x, sigma):
    return x, 1.0 - sigma


def frames_for_rows(self, network, x, timestep, cond):
    backbone = self.__class__.__mro__[1]
    return backbone.predict(self, network, x.transpose(2, 3), timestep, cond).transpose(2, 3)


@pytest.mark.parametrize(
    ("members", "failing"),
    [
        ({}, set()),
        ({"from_native": unswapped_sign}, {"native_steps", "guided_steps"}),
        ({"to_native": unscaled_time}, {"native_steps", "guided_steps"}),
        ({"time_dependent": ("norm_out", "proj_out")}, {"copies_cover"}),
        ({"predict": frames_for_rows}, {"native_steps", "guided_steps", "unembed"}),
    ],
    ids=["right", "sign", "time", "copies", "layout"],
)
def test_a_wrong_diffusers_backbone_fails_in_the_right_row(mochi, members, failing):
    class Config(mochi.MyMochiConfig):
        backbone_class = type("Changed", (mochi.MyMochiBackbone,), members)
        tiny_video = VideoSize(num_frames=19, height=32, width=48)  # as many latent frames as rows: they can be swapped

    assert rows(Config(pretrained=None), False) == failing


def guided_by_half(self, pipeline, cond):
    found = WanBackbone.guiding_arguments(self, pipeline, cond)
    return {**found, "guidance_scale": found["guidance_scale"] / 2 + 0.5}


def encode_without_padding(self, pipeline, prompts):
    found = WanBackbone.encode_with(self, pipeline, prompts)
    return {name: value[:, : max(map(len, prompts)) // 3] for name, value in found.items()}


def encode_as_a_mask(self, pipeline, prompts):
    found = WanBackbone.encode_with(self, pipeline, prompts)
    return {**found, "prompt_attention_mask": found["prompt_embeds"][..., 0] > 0}


def encode_two_frames_less(self, videos):
    return WanBackbone.encode_videos(self, videos)[:, :, 2:]


WRONG_PIPELINES = {
    "a scale of its own": ("guided_steps", "differs by", {"guiding_arguments": guided_by_half}),
    "text that depends on others": ("text_encoders", "of prompt", {"encode_with": encode_without_padding}),
    "a tensor that is no input": (
        "text_encoders",
        "encode_with gives prompt_embeds, prompt",
        {"encode_with": encode_as_a_mask},
    ),
    "frames that are lost": ("encode_videos", "become latents", {"encode_videos": encode_two_frames_less}),
    "passes that it has no names for": (
        "guided_once",
        r"runs its transformer for a pass that it calls 'cond'.*pass_names say which",
        {"pass_names": {}},
    ),
    "the wrong pass": (
        "guided_once",
        "unconditional pass first",
        {"pass_names": {"cond": "unconditional", "uncond": "conditional"}},
    ),
    "guided twice": (
        "guided_once",
        "latents at scale",
        {"pass_names": dict.fromkeys(("cond", "uncond"), "conditional")},
    ),
}


@pytest.mark.parametrize("wrong", WRONG_PIPELINES)
def test_each_check_of_a_pipeline_fails_for_what_it_is_about(wrong):
    check, message, members = WRONG_PIPELINES[wrong]

    class Config(WanConfig):
        backbone_class = type("Changed", (WanBackbone,), members)

    with pytest.raises((AssertionError, ValueError), match=message):
        FUNCTIONS[check](Subject(Config(pretrained=None)))


# -- one wrong backbone for every check -------------------------------------------------------------------------------


def toy_velocity(network, x, sigma, cond):
    return network(x, 1000.0 * sigma, cond["text"])


def encode_rows_last(self, prompts):
    return {"text": torch.ones(16, len(prompts), dtype=torch.int64)}


def encode_by_the_longest(self, prompts):
    longest = max(map(len, prompts))
    return {"text": torch.stack([torch.tensor(list(p.encode().ljust(longest))) for p in prompts])}


def velocity_blind_to_time(self, network, x, sigma, cond):
    return toy_velocity(network, x, torch.ones_like(sigma), cond)


def velocity_in_half(self, network, x, sigma, cond):
    return toy_velocity(network, x, sigma, cond)[:, :, :-1]


def velocity_without_an_end(self, network, x, sigma, cond):
    return toy_velocity(network, x, sigma, cond) / (1 - sigma).view(-1, 1, 1, 1, 1)


def velocity_of_the_first_sigma(self, network, x, sigma, cond):
    return toy_velocity(network, x, sigma[:1].expand(len(x)), cond)


def velocity_off_by_its_sample(self, network, x, sigma, cond):
    return toy_velocity(network, x, sigma, cond) + 0.01 * x


def null_in_place(self, cond):
    return {"text": cond["text"].zero_()}


def null_of_another_dtype(self, cond):
    return {"text": torch.zeros_like(cond["text"], dtype=torch.int32)}


def null_that_goes_on(self, cond):
    return {"text": (cond["text"] + 1) % 256}


def decode_unclamped(self, latents):
    return 2.0 * latents[:, :3]


def unembed_without_norm(self, network, hidden, x, sigma, cond):
    return self.__class__.__mro__[1].unembed(self, network, 2.0 * hidden + 1.0 + hidden**2, x, sigma, cond)


def unembed_that_mixes(self, network, hidden, x, sigma, cond):
    return self.__class__.__mro__[1].unembed(self, network, hidden + 0.1 * hidden.mean(1, keepdim=True), x, sigma, cond)


def prepare_the_batch_at_once(self, latents, cond):
    return latents / latents.std(), cond


def running_mean(network):
    """A buffer that every forward moves."""
    network.register_buffer("seen", torch.zeros(()))

    def count(module, args):
        module.seen += 1.0

    network.register_forward_pre_hook(count)


def dropout(network):
    network.patch_embed = torch.nn.Sequential(network.patch_embed, torch.nn.Dropout(0.1))


def other_weights_each_time(network):
    torch.nn.init.normal_(network.proj_out.weight)
    hidden = torch.rand(())
    network.register_forward_hook(lambda module, args, output: output * (1 + hidden))


def deaf_copy(network):
    network.unused = torch.nn.Linear(2, 2)


def idle_linear(network):
    network.blocks[0].to_nothing = torch.nn.Linear(2, 2)


def no_recomputing(network):
    network.enable_gradient_checkpointing = lambda gradient_checkpointing_func: None


def coarse(network):
    """Weights that bfloat16 cannot tell apart."""

    def shift(module, args, output):
        return (1000.0 * module.weight.view(-1)[0].sign() + output) - 1000.0 * module.weight.view(-1)[0].sign()

    network.proj_out.register_forward_hook(shift)


def reversed_blocks(backbone):
    backbone.blocks = backbone.blocks[::-1]


def wrong_width(backbone):
    backbone.hidden_size = 7


WRONG = {
    "batch last": ("encode", "shape", {"encode": encode_rows_last}),
    "text as long as the longest": ("encode", "depends on the other prompts", {"encode": encode_by_the_longest}),
    "no conditioning": ("encode", "gives nothing", {"encode": lambda self, prompts: {}}),
    "grid too fine": ("shapes", "tokens of", {"token_grid": lambda self, shape: (99, 2, 3)}),
    "another layout": ("shapes", "layout has", {"latent_shape": lambda self, video=None: (5, 3, 4, 8)}),
    "scaled by the batch": ("prepare", "one sample alone", {"prepare": prepare_the_batch_at_once}),
    "pixels out of range": ("decode", "pixels from", {"decode": decode_unclamped}),
    "blind to time": ("velocity", "does not depend on sigma", {"velocity": velocity_blind_to_time}),
    "a frame short": ("velocity", "velocity .* of latents", {"velocity": velocity_in_half}),
    "infinite at the end": ("velocity", "not finite at sigma 1", {"velocity": velocity_without_an_end}),
    "sampler that stands still": (
        "native_steps",
        "the jump from sigma 1 to 0.5: differs",
        {"native_trajectory": lambda self, noise, cond, n: [(1.0, noise), (0.5, noise), (0.0, noise)]},
    ),
    "sigmas that rise": (
        "native_steps",
        "do not fall",
        {"native_trajectory": lambda self, noise, cond, n, guided=False: [(0.0, noise), (0.5, noise), (1.0, noise)]},
    ),
    "the prediction is something else": (
        "identities",
        "native_prediction is not",
        {"velocity": velocity_off_by_its_sample, "native_prediction": own_prediction},
    ),
    "one sigma for all": ("sigma_per_sample", "one by one", {"velocity": velocity_of_the_first_sigma}),
    "null in place": ("null_conditioning", "changed what it was given", {"null_conditioning": null_in_place}),
    "null of another dtype": ("null_conditioning", "int32", {"null_conditioning": null_of_another_dtype}),
    "null of the null": ("null_conditioning", "null of the null", {"null_conditioning": null_that_goes_on}),
    "unembed is not the end": ("unembed", "differs by", {"unembed": unembed_without_norm}),
    "unembed mixes tokens": ("tokens", "changes latents elsewhere", {"unembed": unembed_that_mixes}),
    "blocks in another order": ("feature_taps", "blocks run as", {"change_backbone": reversed_blocks}),
    "another width": ("feature_taps", "gives", {"change_backbone": wrong_width}),
    "no recomputing": ("checkpointing", "recomputes nothing", {"change_network": no_recomputing}),
    "targets that are not there": ("lora_targets", "no linear|matches no module", {"lora_targets": {"attention": "x"}}),
    "targets of another kind": ("lora_targets", "is no linear", {"lora_targets": {"all": r"blocks\.0(\.to_q)?"}}),
    "a target without a part": (
        "lora_targets",
        "has no part",
        {"lora_targets": {"all": r"blocks\.0\.to_\w+"}, "change_network": idle_linear},
    ),
    "a copy that is not there": ("copies_cover", "no module embed", {"time_dependent": ("embed",)}),
    "a copy that is never called": (
        "copies_apart",
        "never called",
        {"time_dependent": ("time_embed", "unused"), "change_network": deaf_copy},
    ),
    "a forward that is random": ("fresh_expert", "is not its parent", {"change_network": dropout}),
    "a teacher that counts": ("teacher_untouched", "changes the teacher's seen", {"change_network": running_mean}),
    "a sum that is too coarse": ("bfloat16", "root mean square", {"change_network": coarse}),
    "weights without a seed": ("save_and_load", "differs|another one", {"change_network": other_weights_each_time}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_each_check_fails_for_what_it_is_about(toy, wrong):
    check, message, changes = WRONG[wrong]
    # In the table a message or an error of the backbone's own are one line each.
    with pytest.raises((AssertionError, ValueError), match=message):
        FUNCTIONS[check](Subject(changed(toy, **changes)))


def test_every_check_has_a_wrong_backbone():
    covered = {check for check, _, _ in [*WRONG.values(), *WRONG_PIPELINES.values()]} | {"noise_recognised"}
    assert covered == set(OF_ALL)


@pytest.mark.parametrize(
    ("shift", "off", "failing"), [(3.0, 0.0, set()), (2.0, 0.0, {"time_shift"}), (3.0, 1e-3, {"recorded"})]
)
def test_what_only_some_backbones_have_is_checked_where_they_say_so(toy, shift, off, failing):
    def native_trajectory(self, noise, cond, num_steps, *, guided=False):
        even = torch.linspace(1, 0, num_steps + 1)
        x, passed = noise, [(1.0, noise)]
        for sigma, following in pairwise((3 * even / (1 + 2 * even)).tolist()):
            x = x + (following - sigma) * self.velocity(self.network, x, torch.full((len(x),), sigma), cond)
            passed.append((following, x))
        return None if guided else passed

    class Config(type(changed(toy, native_trajectory=native_trajectory))):
        def time_shift(self):
            return shift

        def record(self, folder):
            backbone = self.tiny().build()
            x, sigma = torch.randn(2, *backbone.latent_shape()), torch.tensor([0.9, 0.2])
            cond = backbone.encode(["one", "another"])
            with torch.no_grad():
                v = backbone.velocity(backbone.network, x, sigma, cond)
            return Record(self.tiny(), x, sigma, [cond], [v + off])

    assert rows(Config(), False) == failing
    assert {"time_shift", "recorded"} - failing <= rows(Config(), True)


class WithoutEither(BackboneContract):
    config = DigitsBackboneConfig()


class WithBoth(WithoutEither):
    config = OpenSoraConfig(pretrained=None)


class LateConfig(BackboneContract):
    @property
    def config(self):
        return DigitsBackboneConfig()


def test_what_concerns_a_class_does_not_hang_on_that_above_it():
    assert WithBoth.test_recorded is BackboneContract.test_recorded
    assert LateConfig.test_recorded is BackboneContract.test_recorded


def test_as_tests_only_what_concerns_a_backbone_is_collected():
    assert WithoutEither.test_recorded is None
    assert WithoutEither.test_velocity is not None
    assert BackboneContract.test_recorded is not None


def test_trained_weights_recognise_noise():
    assert "cosine 0." in FUNCTIONS["noise_recognised"](Subject(DigitsBackboneConfig(), real=True))

    class Swapped(DigitsBackboneConfig):
        def build(self, seed=0):
            backbone = super().build(seed)
            backbone.velocity = lambda *args: -DigitsBackbone.velocity(backbone, *args)
            return backbone

    with pytest.raises(AssertionError, match=r"cosine -0\.88"):
        FUNCTIONS["noise_recognised"](Subject(Swapped(), real=True))
    with pytest.raises(Unchecked):
        FUNCTIONS["noise_recognised"](Subject(DigitsBackboneConfig()))


def test_native_predictions_of_several_kinds_are_known(toy):
    """Minus the velocity, v-prediction of a variance-preserving model, the noise, x0."""

    def of_kind(kind):
        def velocity(self, network, x, sigma, cond):
            native, column = toy_velocity(network, x, sigma, cond), sigma.view(-1, 1, 1, 1, 1)
            if kind == "minus velocity":
                return -native
            if kind == "v-prediction":
                return velocity_from_vp(to_vp(x, sigma), native, sigma)
            if kind == "noise":
                return torch.where(column < 1, (native - x) / (1 - column).clamp(min=1e-3), x)
            return (x - native) / column

        figure = FUNCTIONS["identities"](Subject(changed(toy, velocity=velocity, native_prediction=own_prediction)))
        return figure.removeprefix("native prediction: ")

    for kind in ("minus velocity", "v-prediction", "noise", "x0"):
        assert of_kind(kind).startswith(kind)

    def wrong_vp(self, network, x, sigma, cond):  # from_vp for to_vp: the factor the wrong way round
        return velocity_from_vp(from_vp(x, sigma), toy_velocity(network, x, sigma, cond), sigma)

    with pytest.raises(AssertionError, match="nearest: v-prediction"):
        FUNCTIONS["identities"](Subject(changed(toy, velocity=wrong_vp, native_prediction=own_prediction)))


# -- the subject ------------------------------------------------------------------------------------------------------


def test_a_miniature_is_moved_and_the_real_weights_are_not():
    plain, moved = DigitsBackboneConfig(pretrained=None, width=16), Subject(DigitsBackboneConfig(pretrained=None))
    real = Subject(plain, real=True)
    assert torch.equal(real.backbone().network.proj_out.weight, plain.build(0).network.proj_out.weight)
    first, second = moved.backbone(), moved.backbone()
    built = moved.config.build(0)
    for name, parameter in first.network.named_parameters():
        assert torch.equal(parameter, dict(second.network.named_parameters())[name])
        distance = (parameter - dict(built.network.named_parameters())[name]).std()
        assert 0.03 < distance < 0.07


@pytest.mark.parametrize(("order", "failing"), [((0, 1), set()), ((1, 0), {"native_steps"})], ids=["right", "swapped"])
def test_a_teacher_of_two_networks(toy, order, failing):
    """Each serves its own noise levels; with the wrong one the model's own sampler disagrees."""
    bases = ("transformer", "transformer_2")  # above sigma 0.9, and below

    class Two(toy.ToyOfTheKitBackbone):
        networks = property(lambda self: dict(zip(bases, (self.network, self.second), strict=True)))

        def native_trajectory(self, noise, cond, num_steps, *, guided=False):
            if guided:
                return None
            x, samples, sigmas = noise, [(1.0, noise)], [1.0, 0.95, 0.8, 0.4, 0.0]
            for sigma, after in pairwise(sigmas):
                network = self.network if sigma > 0.9 else self.second
                time = torch.full((len(x),), 1000.0 * sigma)
                x = x + (after - sigma) * network(x, time, cond["text"]).detach()
                samples.append((after, x))
            return samples

    class Config(toy.ToyOfTheKitConfig):
        def build(self, seed=0):
            backbone = super().build(seed)
            backbone.__class__, backbone.second = Two, super().build(seed + 1).network
            return backbone

        def bases(self):
            return bases

        def teacher_router(self, trajectory):
            return TimestepRouter([bases[k] for k in order], [0.9])

    found = {row.check.name: row for row in check_backbone(Config())}
    assert {name for name, row in found.items() if row.passed is False} == failing
    assert "2 networks" in found["velocity"].figure


def test_nothing_that_a_backbone_raises_gets_out(toy):
    def encode(self, prompts):
        raise KeyError("no such\ntokenizer")

    found = {row.check.name: row for row in check_backbone(changed(toy, encode=encode))}
    assert found["encode"].passed is False
    assert found["encode"].figure == "KeyError: 'no such\\ntokenizer'"
    # What needs its outcome is not checked; the rest is.
    assert found["unembed"].passed is None
    assert found["shapes"].passed is True


def test_inputs_are_several_prompts_at_several_sigmas(toy):
    x, sigma, cond = Subject(changed(toy)).inputs
    assert len(set(sigma.tolist())) == len(x) == 3
    texts = [select(cond, slice(k, k + 1))["text"] for k in range(3)]
    assert not torch.equal(texts[0], texts[1])


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def call(capsys):
    def call(*args):
        with pytest.raises(SystemExit) as stop:
            cli.main(["check-backbone", *map(str, args)])
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return call


def test_the_command_prints_a_table(call):
    code, out, _ = call("digits", "--set", "num_layers=3")
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "digits, a random miniature:"
    marks = {True: "–", False: "✔"}
    assert [line.split()[0] for line in lines[1:-1]] == [
        marks[name in OF_A_PIPELINE] for name in OF_ALL if name != "noise_recognised"
    ]
    assert f"{len(OF_ALL) - 1 - len(OF_A_PIPELINE)} ✔, 0 ✘, {len(OF_A_PIPELINE)} not checked" in lines[-1]
    code, out, _ = call("gaussian", "-p", str(GAUSSIAN))
    assert code == 0
    marked = [line for line in out.splitlines() if line.startswith("  –")]
    assert sum("not checked: native_trajectory gives None" in line for line in marked) == 2
    code, out, _ = call("digits", "--pretrained", "builtin")
    assert code == 0
    assert "digits, with its weights:" in out
    assert "cosine" in out


def test_the_command_fails_with_the_wrong_row(call, tmp_path):
    plugin = tmp_path / "wrong.py"
    plugin.write_text(
        "from dataclasses import dataclass\nfrom moedistill import hookimpl\n"
        "from moedistill_digits.backbone import DigitsBackboneConfig\n"
        "@dataclass(kw_only=True)\nclass Wrong(DigitsBackboneConfig):\n"
        "    size: int = 3\n"
        "    def build(self, seed=0):\n"
        "        if self.size != 3: raise RuntimeError('odd size')\n"
        "        backbone = super().build(seed)\n"
        "        backbone.time_dependent = ('norm_out', 'proj_out')\n"
        "        return backbone\n"
        "    def tiny(self):\n        return self.replace(pretrained=None)\n"
        "@hookimpl\ndef register_components(components):\n"
        "    components.register('backbone', 'wrong', Wrong, 'd')\n"
    )
    code, out, _ = call("wrong", "-p", plugin)
    assert code == 1
    [line] = [line for line in out.splitlines() if line.startswith("  ✘")]
    assert "copies cover" in line
    assert "time_embed.linear_1" in line
    code, out, err = call("wrong", "-p", plugin, "--set", "size=4")
    assert (code, out) == (2, "")
    assert "cannot be built: RuntimeError: odd size" in err


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("digts",), "did you mean 'digits'"),
        (("digits", "--set", "wdth=3"), "did you mean 'width'"),
        (("digits", "--set", "width=x"), "--set width=x"),
        (("digits", "--set", "width"), "must look like"),
        (("gaussian", "--set", "wide=3", "-p", GAUSSIAN), "did you mean 'width'"),
        (("gaussian", "--pretrained", "x", "-p", GAUSSIAN), "unknown key 'pretrained'"),
        (("digits", "--pretrained", "/nowhere"), "there is no file /nowhere"),
        (("digits", "--device", "cuda:77"), "cuda:77"),
    ],
)
def test_mistakes_exit_with_2(call, args, text):
    code, out, err = call(*args)
    assert (code, out) == (2, "")
    assert text in err
    assert "Traceback" not in err


def test_required_weights_are_not_needed_for_the_miniature(tmp_path):
    from moedistill.components.plugins import load_plugins

    plugin = tmp_path / "required.py"
    plugin.write_text(
        "from dataclasses import dataclass\nfrom moedistill import hookimpl\n"
        "from moedistill import BackboneConfig\n"
        "from moedistill_digits.backbone import DigitsBackboneConfig\n"
        "@dataclass(kw_only=True)\nclass Required(BackboneConfig):\n"
        "    pretrained: str\n"
        "    def build(self, seed=0):\n        raise AssertionError\n"
        "    def tiny(self):\n        return DigitsBackboneConfig(pretrained=None).tiny()\n"
        "@hookimpl\ndef register_components(components):\n"
        "    components.register('backbone', 'required', Required, 'd')\n"
    )
    plugins = load_plugins([plugin])
    assert rows(read_config("required", {}, (), plugins), False) == set()
    assert read_config("required", {"pretrained": "here"}, (), plugins).pretrained == "here"
