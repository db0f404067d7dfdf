import itertools
import sys
from collections.abc import Mapping

import pytest
import torch
from helpers import digits_backbone, distil, tiny_recipe
from safetensors.torch import load_file, save_file
from torch import Tensor

from moedistill.components.plugins import load_plugins
from moedistill.data.base import DatasetConfig, Sample
from moedistill.data.latents import write_latents
from moedistill.errors import UserError
from moedistill.metrics.base import MetricConfig, MetricInputs
from moedistill.metrics.statistics import frechet_distance
from moedistill.model.backbone import BackboneConfig
from moedistill.model.guidance import Guidance
from moedistill.runs.loop import run
from moedistill_digits import backbone as backbone_module
from moedistill_digits import metrics, plugin
from moedistill_digits.backbone import TEACHER_FILE, DigitsBackbone, DigitsBackboneConfig
from moedistill_digits.build_assets import build_assets
from moedistill_digits.classifier import CLASSIFIER_FILE, DigitsClassifier, train_classifier
from moedistill_digits.codec import CODEC_FILE, Codec, patches, unpatches
from moedistill_digits.data import (
    DIGITS,
    DIRECTIONS,
    STARTS,
    STEP,
    DigitsConfig,
    DigitsDataset,
    _load_digits,
    _resampling,
    load_styles,
    positions,
    render,
    split_indices,
)
from moedistill_digits.network import DigitsTransformer, patchify, preconditioning, unpatchify

PATHS = [(direction, start) for direction in range(4) for start in range(STARTS)]


@pytest.fixture(scope="module")
def dataset() -> DigitsDataset:
    return DigitsConfig(styles_per_digit=3).build(None)


@pytest.fixture(scope="module")
def backbone() -> DigitsBackbone:
    return DigitsBackboneConfig(pretrained=None).build(seed=3)


def inputs_for(backbone: DigitsBackbone, seed: int = 0) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
    """Four latents, sigmas of four noise levels and conditioning, one of them null."""
    x = torch.randn(4, *backbone.latent_shape(), generator=torch.Generator().manual_seed(seed))
    return x, torch.tensor([1.0, 0.7, 0.2, 0.02]), backbone.encode(["3 right", "7 up", "", "0 left"])


# --- data


def test_splits_are_disjoint_and_complete() -> None:
    _, labels = _load_digits()
    splits = {name: split_indices(labels, name) for name in ("train", "classifier", "reference")}
    assert [len(index) for index in splits.values()] == [400, 701, 696]
    assert torch.equal(torch.cat(list(splits.values())).sort().values, torch.arange(1797))
    assert torch.bincount(labels[splits["train"]]).tolist() == [40] * 10
    for split in splits:
        images, digits = load_styles(split)
        assert images.shape == (len(digits), 12, 12)
        assert images.min() >= 0
        assert images.max() <= 1
        assert torch.equal(digits, labels[splits[split]])


def test_resampling_keeps_straight_lines() -> None:
    matrix = _resampling(8, 12)
    line = matrix @ torch.arange(8, dtype=torch.float64)
    expected = (torch.arange(12, dtype=torch.float64) + 0.5) * 8 / 12 - 0.5
    torch.testing.assert_close(matrix.sum(1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(line[2:-2], expected[2:-2])  # away from the repeated edges


@pytest.mark.parametrize(("direction", "start"), PATHS)
def test_first_move_goes_in_the_labelled_direction_and_every_move_is_one_step(direction: int, start: int) -> None:
    path = positions(direction, start)
    row_step, column_step = {"right": (0, 3), "left": (0, -3), "down": (3, 0), "up": (-3, 0)}[DIRECTIONS[direction]]
    assert (path[1][0] - path[0][0], path[1][1] - path[0][1]) == (row_step, column_step)
    for (row, column), (next_row, next_column) in itertools.pairwise(path):
        moved = (abs(next_row - row), abs(next_column - column))
        assert moved == ((0, STEP) if row_step == 0 else (STEP, 0))
        assert 0 <= next_row <= 12
        assert 0 <= next_column <= 12

    style = load_styles("train")[0][77:78]
    video = render(style, direction, start)[0, 0]
    assert video.shape == (8, 24, 24)
    shifted = video[0].roll((row_step, column_step), dims=(0, 1))  # nothing wraps: the digit stays on the canvas
    assert torch.equal(video[1], shifted)
    torch.testing.assert_close(video.flatten(1).sum(1), style.sum().expand(8))


def test_all_paths_differ() -> None:
    assert len({tuple(positions(*path)) for path in PATHS}) == 12


def test_dataset_items_are_the_encoded_videos(dataset: DigitsDataset) -> None:
    assert len(dataset) == 10 * 4 * 3 * 3
    index = ((4 * 4 + 2) * 3 + 1) * 3 + 2  # digit 4, down, second style, last start
    sample = dataset[index]
    assert sample.conditioning["digit"].item() == 4
    assert sample.conditioning["direction"].item() == 2
    assert all(value.dtype == torch.int64 and value.ndim == 0 for value in sample.conditioning.values())
    assert sample.latents.dtype == torch.float32
    assert tuple(sample.latents.shape) == dataset.shape(index) == (12, 8, 4, 4)
    video = render(load_styles("train")[0][4 * 40 + 1][None], 2, 2)
    torch.testing.assert_close(sample.latents, Codec.load().encode(video)[0])
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_fewer_styles_are_a_part_of_more() -> None:
    config = DigitsConfig(styles_per_digit=3, text_dropout=0.1)
    assert config.tiny() == DigitsConfig(styles_per_digit=2, text_dropout=0.1)
    few, more = config.tiny().build(None), config.build(None)
    torch.testing.assert_close(few.latents, more.latents[:, :, : few.class_size])
    with pytest.raises(ValueError, match=r"styles_per_digit 41 is not in 1\.\.40"):
        DigitsDataset(41)


def test_the_file_is_read_as_scikit_learn_reads_it() -> None:
    from sklearn.datasets import load_digits  # a second, which collecting these tests need not take

    images, labels = _load_digits()
    digits = load_digits()
    assert torch.equal(images, torch.tensor(digits.images / 16.0))
    assert torch.equal(labels, torch.tensor(digits.target))


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r'pip install "moedistill\[digits\]"'):
        _load_digits()


# --- posterior mean


def members(dataset: DigitsDataset, digit: int, direction: int) -> Tensor:
    """The samples that fit a condition, found one by one."""
    chosen = []
    for index in range(len(dataset)):
        sample = dataset[index]
        fits = digit in (10, sample.conditioning["digit"]) and direction in (4, sample.conditioning["direction"])
        if fits:
            chosen.append(sample.latents.double())
    return torch.stack(chosen)


def test_posterior_mean_equals_brute_force(dataset: DigitsDataset) -> None:
    conditions = [(3, 0), (10, 4), (7, 4), (10, 2), (3, 0), (9, 3)]
    digit, direction = torch.tensor(conditions).unbind(1)
    sigma = torch.tensor([0.9, 0.95, 0.8, 0.85, 0.3, 0.99])
    x0 = torch.stack([members(dataset, *condition)[5] for condition in conditions]).float()
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    s = sigma.view(-1, 1, 1, 1, 1)
    x = (1 - s) * x0 + s * noise

    means = dataset.posterior_mean(x, sigma, {"digit": digit, "direction": direction})

    assert means.dtype == torch.float32
    for i, condition in enumerate(conditions):
        samples, s = members(dataset, *condition), sigma[i].double()
        distances = (x[i].double() - (1 - s) * samples).flatten(1).square().sum(1)
        weights = torch.softmax(-distances / (2 * s**2), 0)
        expected = (weights[:, None] * samples.flatten(1)).sum(0).view_as(x[i])
        torch.testing.assert_close(means[i], expected.float(), atol=1e-3, rtol=1e-3)
    # The cases are not trivial: several samples have weight.
    assert (means[0] - x0[0]).abs().max() > 0.01


def test_posterior_mean_weighs_two_neighbours(dataset: DigitsDataset) -> None:
    samples, s = dataset.latents[6, 1].double(), 0.2
    distances = torch.cdist(samples.flatten(1), samples.flatten(1)) + 1e9 * torch.eye(len(samples))
    i, j = divmod(int(distances.argmin()), len(samples))
    a, b = samples[i], samples[j]
    # Between the two, where log(weight of a / weight of b) is exactly 1: weights 0.731 and 0.269.
    x = (1 - s) * (a + b) / 2 + s**2 / (1 - s) * (a - b) / (a - b).square().sum()
    cond = {"digit": torch.tensor([6]), "direction": torch.tensor([1])}
    mean = dataset.posterior_mean(x[None].float(), torch.tensor([s]), cond)[0]
    weight = ((mean - b) * (a - b)).sum() / (a - b).square().sum()
    assert weight.item() == pytest.approx(0.7311, abs=0.02)


def test_posterior_mean_at_both_ends(dataset: DigitsDataset) -> None:
    samples = dataset.latents[6, 1]
    cond = {"digit": torch.full((len(samples),), 6), "direction": torch.full((len(samples),), 1)}

    # At sigma 0 a data point is its own mean, among its class and among all.
    zero = torch.zeros(len(samples))
    torch.testing.assert_close(dataset.posterior_mean(samples, zero, cond), samples)
    null = {"digit": torch.full_like(cond["digit"], 10), "direction": torch.full_like(cond["direction"], 4)}
    torch.testing.assert_close(dataset.posterior_mean(samples, zero, null), samples)
    torch.testing.assert_close(dataset.posterior_mean(0.98 * samples, zero + 0.02, cond), samples)

    # At sigma 1 nothing is known but the condition.
    noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(0))
    class_mean = samples.mean(0).expand_as(samples)
    torch.testing.assert_close(dataset.posterior_mean(noise, zero + 1, cond), class_mean, atol=1e-5, rtol=1e-5)
    mean = dataset.latents.flatten(0, 2).mean(0).expand_as(samples)
    torch.testing.assert_close(dataset.posterior_mean(noise, zero + 1, null), mean, atol=1e-5, rtol=1e-5)


# --- codec


def test_codec_keeps_real_videos() -> None:
    codec = Codec.load()
    videos = metrics.real_videos()
    error = (codec.decode(codec.encode(videos)) - videos).square().mean()
    variance = (patches(videos) - codec.mean).square().mean()
    assert error < 0.001
    assert 1 - error / variance > 0.98


def test_videos_may_have_colours_and_no_other_size() -> None:
    backbone, grey = digits_backbone(), torch.rand(2, 1, 8, 24, 24)
    torch.testing.assert_close(backbone.encode_videos(grey.expand(2, 3, 8, 24, 24)), backbone.encode_videos(grey))
    with pytest.raises(ValueError, match="digits have 8 frames of 24×24 pixels, and no other size"):
        backbone.encode_videos(torch.rand(1, 3, 8, 24, 30))


def test_prompts_come_one_by_one_too() -> None:
    backbone, prompts = digits_backbone(), ["3 right", "", "0 down"]
    together = backbone.encode(prompts)
    for number, one in enumerate(backbone.encode_each(iter(prompts))):
        assert {name: value.tolist() for name, value in one.items()} == {
            name: value[number].tolist() for name, value in together.items()
        }
    assert set(backbone.revisions()) == {"vae", "text"}


def test_codec_is_a_projection_and_latents_have_unit_variance() -> None:
    codec = Codec.load()
    torch.testing.assert_close(codec.components @ codec.components.T, torch.eye(12), atol=1e-5, rtol=0)
    latents = DigitsConfig().build(None).latents
    assert latents.var().item() == pytest.approx(1.0, abs=1e-3)
    assert latents.mean().abs() < 1e-4
    some = latents[0, 0, :4]
    torch.testing.assert_close(
        codec.encode(unpatches(some.movedim(1, -1) @ codec.components / codec.scale + codec.mean)),
        some,
        atol=1e-4,
        rtol=0,
    )
    assert codec.decode(100 * some).max() == 1
    assert codec.decode(100 * some).min() == 0


def test_patches_are_squares_of_pixels() -> None:
    video = torch.arange(8 * 24 * 24.0).view(1, 1, 8, 24, 24)
    assert torch.equal(patches(video)[0, 2, 1, 3].view(6, 6), video[0, 0, 2, 6:12, 18:24])
    assert torch.equal(unpatches(patches(video)), video)


# --- network and backbone


def test_shapes(backbone: DigitsBackbone) -> None:
    x, sigma, cond = inputs_for(backbone)
    assert sum(p.numel() for p in backbone.network.parameters()) == 680_664
    assert backbone.velocity(backbone.network, x, sigma, cond).shape == x.shape
    assert backbone.decode(x).shape == (4, 1, 8, 24, 24)
    assert backbone.latent_shape() == (12, 8, 4, 4)
    assert backbone.token_grid(x.shape) == (4, 4, 4)
    assert backbone.blocks == [f"blocks.{i}" for i in range(4)]
    with pytest.raises(ValueError, match="takes"):
        backbone.velocity(backbone.network, x[:, :, :4], sigma, cond)


def test_patchify_joins_pairs_of_frames() -> None:
    x = torch.randn(2, 12, 8, 4, 4)
    tokens = patchify(x)
    assert tokens.shape == (2, 64, 24)
    torch.testing.assert_close(tokens[1, (3 * 4 + 2) * 4 + 1], x[1, :, 6:8, 2, 1].flatten())
    assert torch.equal(unpatchify(tokens, (4, 4, 4)), x)


def test_preconditioning_is_the_best_linear_guess() -> None:
    sigma = torch.tensor([0.0, 0.3, 0.5, 1.0])
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 12, 8, 64, 64, generator=generator)  # unit variance, many of them
    s = sigma.view(-1, 1, 1, 1, 1)
    x, velocity = (1 - s) * x0 + s * noise, noise - x0
    skip, scale = preconditioning(sigma)
    residual = (velocity - skip * x) / scale
    torch.testing.assert_close(residual.flatten(1).var(1), torch.ones(4), atol=0.02, rtol=0)
    torch.testing.assert_close((residual * x).flatten(1).mean(1), torch.zeros(4), atol=0.01, rtol=0)
    torch.testing.assert_close((scale * x).flatten(1).var(1), torch.ones(4), atol=0.02, rtol=0)


def test_each_sample_has_its_own_sigma_and_condition(backbone: DigitsBackbone) -> None:
    x, sigma, cond = inputs_for(backbone)
    together = backbone.velocity(backbone.network, x, sigma, cond)
    for i in range(len(x)):
        one = {name: value[i : i + 1] for name, value in cond.items()}
        alone = backbone.velocity(backbone.network, x[i : i + 1], sigma[i : i + 1], one)
        torch.testing.assert_close(together[i : i + 1], alone, atol=2e-6, rtol=1e-5)
    # An untrained network already depends on both.
    assert (backbone.velocity(backbone.network, x, sigma, backbone.null_conditioning(cond)) != together).any()
    first, second = (backbone.network.embed(sigma - d, cond["digit"], cond["direction"]) for d in (0.0, 0.01))
    assert (first - second).abs().max() > 1e-3


def test_unembed_of_the_last_block_is_the_velocity(backbone: DigitsBackbone) -> None:
    x, sigma, cond = inputs_for(backbone)
    outputs: list[Tensor] = []
    block = backbone.network.get_submodule(backbone.blocks[-1])
    handle = block.register_forward_hook(
        lambda module, args, output: outputs.append(backbone.hidden(output, output.shape[1]))
    )
    velocity = backbone.velocity(backbone.network, x, sigma, cond)
    handle.remove()
    assert outputs[0].shape == (4, 64, backbone.hidden_size)
    assert torch.equal(backbone.unembed(backbone.network, outputs[0], x, sigma, cond), velocity)


def test_module_names(backbone: DigitsBackbone) -> None:
    import re

    names = [name for name, _ in backbone.network.named_modules()]
    found = [name for name in names if re.fullmatch(backbone.lora_targets["attention"], name)]
    assert len(found) == 4 * 4
    assert all(isinstance(backbone.network.get_submodule(name), torch.nn.Linear) for name in found)
    for name in backbone.time_dependent:
        assert sum(p.numel() for p in backbone.network.get_submodule(name).parameters()) > 0


def test_null_conditioning_is_the_empty_prompt(backbone: DigitsBackbone) -> None:
    cond = backbone.encode(["3 right", " 7  UP "])
    assert {name: value.tolist() for name, value in cond.items()} == {"digit": [3, 7], "direction": [0, 3]}
    null = backbone.null_conditioning(cond)
    assert {name: value.tolist() for name, value in null.items()} == {"digit": [10, 10], "direction": [4, 4]}
    assert all(torch.equal(value, null[name]) for name, value in backbone.encode(["", ""]).items())
    assert backbone.encode([])["digit"].shape == (0,)


@pytest.mark.parametrize("prompt", ["3", "right", "3 north", "11 up", "up 3", "-1 up", "3 right now"])
def test_other_prompts_are_refused_with_the_words_allowed(backbone: DigitsBackbone, prompt: str) -> None:
    with pytest.raises(ValueError, match=r"0 to 9.*right, left, down, up"):
        backbone.encode(["1 up", prompt])


@pytest.mark.parametrize("custom", [False, True])
def test_checkpointed_gradients_equal_plain_ones(custom: bool) -> None:
    config = DigitsBackboneConfig(pretrained=None).tiny()
    plain, checkpointed = config.build(0), config.build(0)
    called: list[torch.nn.Module] = []

    def checkpoint(module: torch.nn.Module, *args: Tensor) -> Tensor:
        called.append(module)
        return torch.utils.checkpoint.checkpoint(module.__call__, *args, use_reentrant=False)

    checkpointed.network.enable_gradient_checkpointing(checkpoint if custom else None)
    x, sigma, cond = inputs_for(plain)
    for backbone in (plain, checkpointed):
        backbone.velocity(backbone.network, x, sigma, cond).square().sum().backward()
    assert called == (list(checkpointed.network.blocks) if custom else [])
    for (name, a), (_, b) in zip(
        plain.network.named_parameters(), checkpointed.network.named_parameters(), strict=True
    ):
        assert a.grad is not None, name
        assert a.grad.abs().max() > 0, name
        assert b.grad is not None, name
        assert torch.equal(a.grad, b.grad), name


def test_build_takes_its_weights_from_the_seed_and_leaves_the_global_one_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    config = DigitsBackboneConfig(pretrained=None).tiny()
    one, same, other = config.build(1).network, config.build(1).network, config.build(2).network
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one.blocks[0].attn.to_q.weight, same.blocks[0].attn.to_q.weight)
    assert not torch.equal(one.blocks[0].attn.to_q.weight, other.blocks[0].attn.to_q.weight)


def test_bfloat16_weights_give_nearly_the_same_velocity(backbone: DigitsBackbone) -> None:
    half = DigitsBackboneConfig(pretrained=None, dtype="bfloat16").build(seed=3)
    assert next(half.network.parameters()).dtype == torch.bfloat16
    x, sigma, cond = inputs_for(backbone)
    velocity = half.velocity(half.network, x, sigma, cond)
    assert velocity.dtype == torch.float32
    torch.testing.assert_close(velocity, backbone.velocity(backbone.network, x, sigma, cond), atol=0.05, rtol=0.05)


def test_weights_from_a_file(tmp_path) -> None:
    config = DigitsBackboneConfig(pretrained=None, width=16, num_layers=1, num_heads=2)
    network = config.build(0).network
    path = tmp_path / "weights.safetensors"
    save_file(network.state_dict(), path)
    config.pretrained = str(path)
    assert torch.equal(config.build(9).network.proj_out.weight, network.proj_out.weight)


def test_weights_that_do_not_fit_are_named(tmp_path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(DigitsTransformer(16, 1, 2).state_dict() | {"extra": torch.zeros(2)}, path)

    def message(**keys: object) -> str:
        with pytest.raises(ValueError) as error:
            DigitsBackboneConfig(**{"pretrained": str(path), "num_heads": 2, **keys}).build()  # type: ignore[arg-type]
        assert len(str(error.value).splitlines()) <= 10
        return str(error.value)

    assert "unknown: extra [2]" in message(width=16, num_layers=1)
    assert "missing: blocks.1.attn.to_k.weight [16, 16]" in message(width=16, num_layers=2)
    text = message(width=32, num_layers=1)
    assert "positions: the file has [64, 16], the network [64, 32]" in text
    assert "set width, num_layers and num_heads" in text
    path.write_bytes(b"junk")
    assert "is not a safetensors file" in message()
    path.unlink()
    assert f"there is no file {path}" in message()


def test_missing_teacher_says_how_to_make_it(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(backbone_module, "TEACHER_FILE", tmp_path / "teacher.safetensors")
    with pytest.raises(ValueError, match=r"recipes/digits_teacher\.yaml.*null for random weights"):
        DigitsBackboneConfig().build()


def test_shipped_teacher_fits() -> None:
    assert TEACHER_FILE.stat().st_size <= 3.0e6
    network = DigitsBackboneConfig().build().network
    assert all(parameter.isfinite().all() for parameter in network.parameters())


def test_config_rules() -> None:
    with pytest.raises(ValueError, match="width 10 is not a multiple of num_heads 4"):
        DigitsBackboneConfig(width=10)
    with pytest.raises(ValueError, match="classifier_free"):
        DigitsBackboneConfig(guidance=Guidance(mode="embedded", scale=6.0))
    guidance = Guidance(mode="classifier_free", scale=2.0)
    tiny = DigitsBackboneConfig(guidance=guidance).tiny()
    assert tiny.pretrained is None
    assert tiny.guidance == guidance


# --- classifier and metrics


def test_classifier_reads_held_out_videos() -> None:
    classifier = DigitsClassifier.load()
    styles, digits = load_styles("reference")
    digit_accuracy, direction_accuracy = [], []
    with torch.no_grad():
        for direction in range(4):
            digit_logits, direction_logits = classifier(render(styles, direction, start=direction % STARTS))
            digit_accuracy.append((digit_logits.argmax(1) == digits).float().mean().item())
            direction_accuracy.append((direction_logits.argmax(1) == direction).float().mean().item())
    assert min(digit_accuracy) > 0.99
    assert min(direction_accuracy) > 0.999
    assert CLASSIFIER_FILE.stat().st_size < 200_000


def test_assets_are_made_again_the_same(tmp_path) -> None:
    build_assets(tmp_path, digit_steps=20, direction_steps=20)

    built, shipped = Codec(**load_file(tmp_path / CODEC_FILE.name)), Codec.load()
    # Up to signs, which another linear algebra library may choose otherwise.
    torch.testing.assert_close(built.components.abs(), shipped.components.abs(), atol=1e-4, rtol=0)
    torch.testing.assert_close(built.mean, shipped.mean)
    torch.testing.assert_close(built.scale, shipped.scale)

    classifier = load_file(tmp_path / CLASSIFIER_FILE.name)
    again = train_classifier(built, digit_steps=20, direction_steps=20).state_dict()
    assert classifier.keys() == again.keys() == load_file(CLASSIFIER_FILE).keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in classifier.items())


def metric_inputs(videos: Tensor, reference: Tensor, **cond: Tensor) -> MetricInputs:
    encode = Codec.load().encode
    return MetricInputs(videos, encode(videos), reference, encode(reference), cond)


def measure(kind: str, inputs: MetricInputs) -> float:
    return load_plugins().components.get("metric", kind)().build()(inputs)


def test_metrics_of_real_and_of_spoilt_videos() -> None:
    real = metrics.real_videos()
    assert real.shape == (1392, 1, 8, 24, 24)
    styles, digits = load_styles("train")
    videos = torch.cat([render(styles[path::12], *PATHS[path]) for path in range(12)])
    digits = torch.cat([digits[path::12] for path in range(12)])
    directions = torch.cat([torch.full((len(styles[path::12]),), PATHS[path][0]) for path in range(12)])
    cond = {"digit": digits, "direction": directions}

    good = metric_inputs(videos, videos, **cond)
    noise = 0.1 * torch.randn(videos.shape, generator=torch.Generator().manual_seed(0))
    noisy = metric_inputs((videos + noise).clamp(0, 1), videos, **cond)
    blurred = metric_inputs(torch.nn.functional.avg_pool3d(videos, (1, 3, 3), 1, (0, 1, 1)), videos, **cond)

    assert measure("frechet", metric_inputs(real, real)) == pytest.approx(0.0, abs=1e-3)
    assert 0 < measure("frechet", good) < 100
    assert measure("frechet", noisy) > 1.5 * measure("frechet", good)
    assert measure("digit_accuracy", good) > 0.98
    assert measure("direction_accuracy", good) == 1.0
    assert measure("sharpness", metric_inputs(real, real)) == pytest.approx(1.0, rel=1e-12)
    blunt, sharp, rough = (measure("sharpness", inputs) for inputs in (blurred, good, noisy))
    assert blunt < 0.7 < 0.95 < sharp < 1.05 < 1.2 < rough
    assert measure("flicker", good) == 0.0
    assert measure("flicker", noisy) > 0.05
    assert measure("speckle", metric_inputs(real, real)) == pytest.approx(1.0, rel=1e-12)
    blunt, usual, rough = (measure("speckle", inputs) for inputs in (blurred, good, noisy))
    assert blunt < 0.6 < 0.9 < usual < 1.1 < 3 < rough


def test_the_parts_of_the_frechet_distance() -> None:
    """Videos that run backwards look the same and move otherwise; a blur is seen in the frames."""
    real = metrics.real_videos()
    blurred = torch.nn.functional.avg_pool3d(real, (1, 5, 5), 1, (0, 2, 2))
    appearance, motion = (
        [measure(kind, metric_inputs(videos, real)) for videos in (real, real.flip(2), blurred)]
        for kind in ("frechet_appearance", "frechet_motion")
    )
    assert max(appearance[0], motion[0]) < 1e-3
    assert appearance[1] < 1e-3 < 100 < motion[1]
    assert appearance[2] > 5 * motion[2] > 0
    for part, kind in ((slice(0, 48), "frechet_appearance"), (slice(48, 64), "frechet_motion")):
        expected = frechet_distance(metrics.features(blurred)[:, part], metrics.real_features()[:, part])
        assert measure(kind, metric_inputs(blurred, real)) == expected


def test_speckle_is_the_distance_to_the_median_of_nine() -> None:
    videos = torch.rand(2, 1, 8, 24, 24, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(videos.flatten(0, 2).double()[:, None], (1, 1, 1, 1), mode="replicate")
    medians = torch.nn.functional.unfold(padded, 3).median(dim=1).values.view(2, 8, 24, 24)
    expected = (videos[:, 0] - medians).abs().mean((1, 2, 3))
    torch.testing.assert_close(metrics.speckle(videos), expected, rtol=1e-12, atol=0)
    dot = torch.zeros(1, 1, 8, 24, 24)
    dot[..., 5, 7] = 1.0
    assert metrics.speckle(dot).item() == pytest.approx(1 / 24**2)
    area = torch.zeros(1, 1, 8, 24, 24)
    area[..., :12] = 1.0
    assert metrics.speckle(area).item() == 0.0


def test_rows_of_accuracy_say_who_did_not_ask() -> None:
    styles, digits = load_styles("reference")
    videos, digits = render(styles[:6], 1, 0), digits[:6].clone()
    digits[1], digits[2] = 10, (digits[2] + 1) % DIGITS
    metric = metrics.DigitAccuracyConfig().build()
    rows = metric.rows(metric_inputs(videos, videos, digit=digits))
    assert (rows.shape, rows.dtype) == ((6, 1), torch.float64)
    assert rows.isnan().flatten().tolist() == [False, True, False, False, False, False]
    assert metric.value(rows) == 4 / 5
    assert metric.value(rows[[1, 2, 2, 3]]) == 1 / 3


def test_accuracy_counts_what_was_asked_for() -> None:
    styles, digits = load_styles("reference")
    videos, digits = render(styles[::70], 1, 0), digits[::70]
    wrong, null = (digits + 1) % DIGITS, torch.full_like(digits, 10)
    left, up, nowhere = (torch.full_like(digits, direction) for direction in (1, 3, 4))
    half = torch.where(torch.arange(len(digits)) < 5, digits, wrong)
    some = torch.where(torch.arange(len(digits)) < 5, digits, null)
    assert measure("digit_accuracy", metric_inputs(videos, videos, digit=half)) == 0.5
    assert measure("digit_accuracy", metric_inputs(videos, videos, digit=some)) == 1.0
    assert measure("direction_accuracy", metric_inputs(videos, videos, direction=left)) == 1.0
    assert measure("direction_accuracy", metric_inputs(videos, videos, direction=up)) == 0.0
    with pytest.raises(ValueError, match="no sample asked for anything"):
        measure("direction_accuracy", metric_inputs(videos, videos, direction=nowhere))
    with pytest.raises(ValueError, match=r"\[N, 1, 8, 24, 24\]"):
        metrics.features(videos[:, :, :4])


def test_everything_registered_can_be_built() -> None:
    import importlib

    registered: dict[tuple[str, str], type] = {}

    class Components:
        def register(self, registry: str, name: str, target: str, description: str) -> None:
            module, attribute = target.split(":")
            registered[registry, name] = getattr(importlib.import_module(module), attribute)
            assert description

    plugin.register_components(Components())
    kinds = {"backbone": BackboneConfig, "dataset": DatasetConfig, "metric": MetricConfig}
    assert all(issubclass(config, kinds[registry]) for (registry, _), config in registered.items())
    assert {name for registry, name in registered if registry == "metric"} == {
        "frechet",
        "frechet_appearance",
        "frechet_motion",
        "coverage",
        "density",
        "digit_accuracy",
        "direction_accuracy",
        "sharpness",
        "flicker",
        "speckle",
    }
    real = metrics.real_videos()[:4]
    cond = {"digit": torch.tensor([0, 1, 2, 3]), "direction": torch.tensor([0, 1, 2, 3])}
    for (registry, _), config in registered.items():
        if registry == "metric":
            assert isinstance(config().build()(metric_inputs(real, real, **cond)), float)


def test_captions_are_the_prompts(backbone: DigitsBackbone) -> None:
    prompts = ["3 right", "", "0 up"]
    assert backbone.captions(backbone.encode(prompts)) == prompts


def test_stored_samples_that_are_no_digits_are_refused(tmp_path):
    """Text of another width ended in a traceback of the network, and so did a digit that there is not."""

    def trained_on(digit, latents=(12, 8, 4, 4)):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        write_latents(folder, [Sample(torch.ones(latents), {"digit": digit, "direction": torch.tensor(1)})] * 2)
        recipe = tiny_recipe([distil(steps=1)], {"data": {"kind": "latents", "path": str(folder)}})
        return run(recipe, output=folder / "run", device="cpu")

    assert trained_on(torch.tensor(3)).cost["semantic"]["steps"] == 1
    with pytest.raises(UserError, match=r"sample 0 has digit \[3\]; the model takes \[\]"):
        trained_on(torch.tensor([3, 3, 3]))
    with pytest.raises(UserError, match=r"sample 0 has latents \[5, 8, 4, 4\]; the model's have 12 channels"):
        trained_on(torch.tensor(3), (5, 8, 4, 4))
    with pytest.raises(UserError, match=r"sample 0 has digit of torch.float32; the model takes whole numbers"):
        trained_on(torch.tensor(3.0))
    with pytest.raises(UserError, match=r"digit \[47\] must be from 0 to 10, which stands for none"):
        trained_on(torch.tensor(47))
