"""The kit: checks that tell whether a backbone is right, numerically, on its miniature or with its real weights.

A check is a function of a `Subject`. It returns a figure, raises AssertionError (or anything else) where the backbone
is wrong, and `Unchecked` where there is nothing to check. pytest runs them through `BackboneContract`, one test each,
and `moedistill check-backbone` as a table.

Of a random miniature every weight is moved a little first: final layers that start at zero would make checks vacuous.
"""

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moedistill.flow.process import add_noise, jump, to_vp, velocity_from_vp
from moedistill.flow.routers import TimestepRouter
from moedistill.flow.trajectory import Trajectory
from moedistill.integrations.diffusers.backbone import DiffusersBackbone, DiffusersBackboneConfig
from moedistill.integrations.diffusers.models import DiffusersModels, DiffusersModelsConfig
from moedistill.integrations.diffusers.pipeline import attach
from moedistill.model import conditioning
from moedistill.model.backbone import TEACHER, Backbone, BackboneConfig, teacher_name
from moedistill.model.conditioning import Conditioning
from moedistill.model.experts import LoRAConfig
from moedistill.model.guidance import Guidance
from moedistill.model.latent_video import LatentVideoBackbone, LatentVideoConfig
from moedistill.model.mixture import Mixture
from moedistill.runtime.checkpoint import load_tree, save_tree
from moedistill.testing.subject import BATCH, Subject, Unchecked, move, prompts_for

NATIVE_STEPS = 6
SCALE = 3.0
SCALES = (1.5, 6.0)
"""Guidance scales that are tried."""


@torch.no_grad()
def _run(mixture: Mixture, expert: str, *inputs: Any) -> Tensor:
    with mixture.using(expert):
        return mixture(*inputs)


def _difference(found: Tensor, wanted: Tensor, scale: Tensor | None = None) -> float:
    """The largest difference over the largest value."""
    largest = (wanted if scale is None else scale).abs().max().item()
    return (found - wanted).abs().max().item() / max(largest, 1e-30)


def _agree(what: str, found: Tensor, wanted: Tensor, tolerance: float, scale: Tensor | None = None) -> float:
    assert found.shape == wanted.shape, f"{what}: shape {list(found.shape)}, not {list(wanted.shape)}"
    difference = _difference(found, wanted, scale)
    # Written so that NaN fails too.
    assert difference <= tolerance, f"{what}: differs by {difference:.1e} of the largest value, more than {tolerance:g}"
    return difference


def _same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Args:
        function: returns a figure, or raises.
        trained: a miniature cannot have it.
        declared: a method of the config by which a backbone says what is looked at; one that has none has no such row.
    """

    name: str
    title: str
    function: Callable[[Subject], str]
    trained: bool = False
    declared: str = ""

    def concerns(self, config: BackboneConfig) -> bool:
        """Whether a backbone of this config has what is looked at."""
        name = self.declared
        return not name or getattr(type(config), name) is not getattr(BackboneConfig, name)


CHECKS: list[Check] = []


Function = Callable[[Subject], str]


def _check(title: str, *, trained: bool = False, declared: str = "") -> Callable[[Function], Function]:
    def add(function: Function) -> Function:
        CHECKS.append(Check(function.__name__, title, function, trained, declared))
        return function

    return add


@_check("encode gives batch-first conditioning")
def encode(subject: Subject) -> str:
    backbone = subject.teacher.backbone
    prompts = prompts_for(backbone)
    cond = backbone.encode(prompts)
    assert cond, "encode gives nothing; an unconditional model needs one tensor too, for the batch size"
    for name, value in cond.items():
        assert isinstance(value, Tensor), f"{name} is {type(value).__name__}, not a tensor"
        assert value.shape[:1] == (BATCH,), f"{name} has shape {list(value.shape)} for {BATCH} prompts"
    assert _same(cond, backbone.encode(prompts)), "the same prompts give something else the second time"
    captions = backbone.captions(conditioning.to(cond, "cpu"))
    assert len(captions) == BATCH, f"captions gives {len(captions)} for {BATCH} samples"
    for k, prompt in enumerate(prompts):
        for name, value in backbone.encode([prompt]).items():
            assert value.shape[1:] == cond[name].shape[1:], f"{name}: its shape depends on the other prompts"
            if value.is_floating_point():
                _agree(f"{name} of prompt {k} alone", value[0].float(), cond[name][k].float(), 1e-3)
            else:
                assert torch.equal(value[0], cond[name][k]), f"{name} of prompt {k} is something else when alone"
    for k, one in enumerate(backbone.encode_each(prompts)):
        unpacked = backbone.unpack({name: value[None] for name, value in one.items()})
        # Of an image it gives nothing: that is made of videos.
        alone = {name: cond[name][k : k + 1].cpu() for name in unpacked if name in cond}
        assert unpacked, f"encode_each gives nothing for prompt {k}"
        assert _same(unpacked, alone), f"encode_each gives something else for prompt {k}, unpacked"
    return ", ".join(f"{name} {list(value.shape)}" for name, value in cond.items())


@_check("latent_shape, token_grid and layout agree")
def shapes(subject: Subject) -> str:
    backbone = subject.teacher.backbone
    channels, *size = backbone.latent_shape()
    assert len(size) == 3, f"latent_shape gives {[channels, *size]}, not (C, T, H, W)"
    grid = backbone.token_grid((BATCH, channels, *size))
    assert len(grid) == 3, f"token_grid gives {grid}, not (T', H', W')"
    for name, tokens, latents in zip("THW", grid, size, strict=True):
        assert 1 <= tokens <= latents, f"{tokens} tokens of {latents} latents in {name}"
    layout = subject.config.layout()
    if layout is not None:
        assert layout.channels == channels, f"layout has {layout.channels} channels, latent_shape {channels}"
        for name, latents, multiple in zip("THW", size, layout.multiple, strict=True):
            assert latents % multiple == 0, f"latent_shape has {name} = {latents}, no multiple of layout's {multiple}"
    return f"latents {[channels, *size]}, tokens {list(grid)}" + ("" if layout else ", no layout")


@_check("prepare gives what the network takes")
def prepare(subject: Subject) -> str:
    backbone, (x, sigma, cond) = subject.teacher.backbone, subject.inputs
    latents, prepared = backbone.prepare(x.clone(), cond)
    assert latents.shape == x.shape, f"latents {list(x.shape)} become {list(latents.shape)}"
    assert latents.is_floating_point(), f"latents become {latents.dtype}"
    for name, value in prepared.items():
        assert len(value) == BATCH, f"{name} has shape {list(value.shape)} for a batch of {BATCH}"
    alone, _ = backbone.prepare(x[1:2].clone(), conditioning.select(cond, slice(1, 2)))
    _agree("one sample alone", alone[0], latents[1], 1e-6)
    assert _difference(latents[0], latents[1]) > 1e-3, "different latents become the same"
    assert _run(subject.teacher, TEACHER, latents.float(), sigma, prepared).isfinite().all(), "velocity is not finite"
    stored = None
    with suppress(ValueError):  # a backbone need not have it
        stored = backbone.stored(x)
    if stored is not None:
        again, _ = backbone.prepare(stored.clone(), {})
        _agree("stored, prepared and stored again", backbone.stored(again), stored, 1e-5)
    return f"latents scaled by {(latents.std() / x.std()).item():.3g}"


@_check("decode gives pixels in [0, 1]")
def decode(subject: Subject) -> str:
    x, _, _ = subject.inputs
    with torch.no_grad():
        video = subject.teacher.backbone.decode(x[:2])
    assert video.ndim == 5, f"decode gives {list(video.shape)}, not [B, C, T, H, W]"
    assert video.shape[0] == 2, f"{video.shape[0]} videos of 2 latents"
    assert video.shape[1] in (1, 3), f"{video.shape[1]} channels; a picture has 1 or 3"
    assert video.dtype == torch.float32, f"pixels are {video.dtype}, not float32"
    low, high = video.min().item(), video.max().item()
    assert 0 <= low <= high <= 1, f"pixels from {low:.3g} to {high:.3g}"
    assert high - low > 1e-4, f"all pixels are {low:.3g}"
    if (size := subject.video) is not None:
        found, wanted = list(video.shape[2:]), [size.num_frames, size.height, size.width]
        assert found == wanted, f"latent_shape() decodes to (T, H, W) = {found}, but the video has {wanted}"
    return f"{list(video.shape)}, {low:.2f} to {high:.2f}"


@_check("velocity: shape, dtype, finite, depends on x and sigma")
def velocity(subject: Subject) -> str:
    mixture, (x, sigma, cond) = subject.teacher, subject.inputs
    effects = []
    for base in mixture.bases:
        name = teacher_name(base, mixture.bases)
        v = _run(mixture, name, x, sigma, cond)
        assert v.shape == x.shape, f"{base}: velocity {list(v.shape)} of latents {list(x.shape)}"
        assert v.dtype == torch.float32, f"{base}: velocity is {v.dtype}"
        for level in subject.sigmas:
            at_level = _run(mixture, name, x, subject.column(level), cond)
            assert at_level.isfinite().all(), f"{base}: velocity is not finite at sigma {level:g}"
        effects += [
            (f"{base}: velocity does not depend on {what}", _difference(_run(mixture, name, *changed), v))
            for what, changed in (("x", (-x, sigma, cond)), ("sigma", (x, sigma.flip(0), cond)))
        ]
    for message, effect in effects:
        assert effect > 1e-4, message
    count = len(mixture.bases)
    return f"{list(x.shape)} float32, sigma {subject.sigmas[0]:g} to 1" + (f", {count} networks" if count > 1 else "")


@_check("x0, noise and velocity fit the native prediction at every sigma")
@torch.no_grad()
def identities(subject: Subject) -> str:
    mixture, (x, _, cond) = subject.teacher, subject.inputs
    backbone = mixture.backbone
    residuals: dict[str, float] = {}
    for level in subject.sigmas:
        sigma = subject.column(level)
        v = _run(mixture, TEACHER, x, sigma, cond)
        x0, noise = jump(x, v, sigma, 0.0), jump(x, v, sigma, 1.0)
        scale = torch.stack([x.abs().max(), v.abs().max()])
        _agree(f"x from its own x0 and noise at sigma {level:g}", add_noise(x0, noise, sigma), x, 1e-5, scale)
        native = backbone.native_prediction(backbone.network, x, sigma, cond).float()
        for kind, left, right in _parametrisations(x, v, x0, noise, native, sigma, level):
            error = (left - right).abs().max().item() / scale.max().item()
            residuals[kind] = max(residuals.get(kind, 0.0), error)
    kind, residual = min(residuals.items(), key=lambda item: item[1])
    assert residual <= 1e-5, (
        f"native_prediction is not {', '.join(residuals)} of the velocity at all of {subject.sigmas} "
        f"(nearest: {kind}, off by {residual:.1e}); translate it in `velocity` at the edge, or let it give the velocity"
    )
    return f"native prediction: {kind}, {residual:.1e}"


def _parametrisations(
    x: Tensor, v: Tensor, x0: Tensor, noise: Tensor, native: Tensor, sigma: Tensor, level: float
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What a network may predict: pairs that are equal where it does. None divides by sigma or 1 - sigma."""
    yield "velocity", v, native
    yield "minus velocity", v, -native
    yield "v-prediction (variance preserving)", v, velocity_from_vp(to_vp(x, sigma), native, sigma)
    yield "noise", (1 - level) * noise, (1 - level) * native
    yield "x0", level * x0, level * native


@_check("one step of the model's own sampler is one jump")
@torch.no_grad()
def native_steps(subject: Subject) -> str:
    mixture, (noise, _, cond) = subject.teacher, subject.inputs
    pairs = mixture.backbone.native_trajectory(noise, cond, NATIVE_STEPS)
    if pairs is None:
        raise Unchecked("native_trajectory gives None")
    assert len(pairs) >= 3, f"native_trajectory gives {len(pairs)} samples for {NATIVE_STEPS} steps"
    sigmas = [float(sigma) for sigma, _ in pairs]
    assert all(1.0 >= high > low >= 0.0 for high, low in pairwise(sigmas)), f"sigmas {sigmas} do not fall within [0, 1]"
    if len(mixture.bases) > 1:
        points = sorted({1.0, *sigmas})
        mixture.teacher_router = subject.config.teacher_router(Trajectory.from_sigmas(points))
    worst, travelled = 0.0, 0.0
    for (sigma, x), (sigma_next, x_next) in pairwise(pairs):
        v = _run(mixture, mixture.teacher_at(sigma), x.float(), subject.column(sigma), cond)
        where = f"the jump from sigma {sigma:.4g} to {sigma_next:.4g}"
        worst = max(worst, _agree(where, jump(x.float(), v, sigma, sigma_next), x_next.float(), 1e-5))
        travelled = max(travelled, _difference(x_next.float(), x.float()))
    assert travelled > 1e-3, "the model's own sampler does not move; native_trajectory gives no samples of it"
    return f"{len(pairs) - 1} steps, {worst:.1e}"


@_check("the time shift is that of the model's own sampler", declared="time_shift")
@torch.no_grad()
def time_shift(subject: Subject) -> str:
    backbone, config, (noise, _, cond) = subject.teacher.backbone, subject.config, subject.inputs
    if isinstance(config, LatentVideoConfig) and subject.video is not None:
        config = config.replace(video=subject.video)
    shift = config.time_shift()
    if shift is None:
        raise Unchecked("time_shift gives None")
    pairs = backbone.native_trajectory(noise, cond, NATIVE_STEPS)
    if pairs is None:
        raise Unchecked("native_trajectory gives None")
    wanted = torch.tensor([float(sigma) for sigma, _ in pairs])
    found = Trajectory.flow_matching(NATIVE_STEPS, shift, end="zero").points.flip(0)
    return f"{shift:.5g}, {_agree('sigmas', found, wanted, 1e-6):.1e}"


@_check("the guided teacher is the model's own sampler, guided")
@torch.no_grad()
def guided_steps(subject: Subject) -> str:
    backbone, (noise, _, cond) = _guided(subject, SCALE, subject.teacher.backbone.networks), subject.inputs
    guidance = _guidance(subject, SCALE)
    # So many that a guidance that oscillates has begun to.
    steps = NATIVE_STEPS if guidance.oscillate_from is None else guidance.oscillate_from + 3
    pairs = backbone.native_trajectory(noise, cond, steps, guided=True)
    if pairs is None:
        raise Unchecked("native_trajectory gives None, guided")
    trajectory = Trajectory.from_sigmas(sorted({1.0, *(float(sigma) for sigma, _ in pairs)}))
    mixture = Mixture(backbone, {}, trajectory=trajectory, guidance=guidance).to(subject.device)
    if len(mixture.bases) > 1:
        mixture.teacher_router = subject.config.teacher_router(trajectory)
    worst, effect = 0.0, 0.0
    for (sigma, x), (sigma_next, x_next) in pairwise(pairs):
        level = subject.column(sigma)
        with mixture.using(mixture.teacher_at(sigma)):
            v = mixture.guided(x.float(), level, cond, guidance)
            plain = mixture(x.float(), level, cond)
        where = f"the guided jump from sigma {sigma:.4g} to {sigma_next:.4g}"
        worst = max(worst, _agree(where, jump(x.float(), v, sigma, sigma_next), x_next.float(), 1e-5))
        effect = max(effect, _difference(v, plain))
    assert effect > 1e-4, "guidance has no effect: the null conditioning is that of the prompts"
    return f"scale {SCALE:g}, {len(pairs) - 1} steps, {worst:.1e}"


def _guided(subject: Subject, scale: float, networks: Mapping[str, nn.Module]) -> Backbone:
    """A backbone whose teacher is guided by two forwards: around these networks, which real weights have no room for
    twice; where it cannot be put around any, a miniature of its own.
    """
    try:
        config = subject.config.replace(guidance=_guidance(subject, scale))
        if isinstance(config, DiffusersModelsConfig):
            return config.wrap(networks)
        if not subject.real:
            return Subject(config, device=subject.device).backbone()
    except ValueError as error:
        raise Unchecked(f"the config takes no classifier-free guidance: {error}") from error
    raise Unchecked("on the miniature only")


def _guidance(subject: Subject, scale: float) -> Guidance:
    """Of two forwards with this scale, which oscillates as the config's own does by default."""
    bases, own = subject.config.bases(), subject.config.guidance
    by_base = scale if len(bases) == 1 else dict.fromkeys(bases, scale)
    return Guidance(mode="classifier_free", scale=by_base, oscillate_from=own.oscillate_from)


@_check("what the model's own code gave is given again", declared="record")
@torch.no_grad()
def recorded(subject: Subject) -> str:
    with tempfile.TemporaryDirectory() as folder:
        record = subject.config.record(Path(folder))
        if record is None:
            raise Unchecked("there is no record of it")
        backbone = record.config.build()
        for asked, told in record.told.items():
            assert isinstance(backbone, LatentVideoBackbone), "only a LatentVideoBackbone is told what is not asked for"
            assert backbone.told(asked) == told, f"asked for {asked!r}, the model is told {backbone.told(asked)!r}"
        mixture, worst = Mixture(backbone, {}), 0.0
        for number, (cond, velocity) in enumerate(zip(record.conditionings, record.velocities, strict=True)):
            v = _run(mixture, TEACHER, record.x, record.sigma, cond)
            worst = max(worst, _agree(f"velocity with conditioning {number}", v, velocity, 5e-6))
        taps = mixture.hidden_states(record.x, record.sigma, record.conditionings[0], backbone.blocks)
        for path, found, wanted in zip(backbone.blocks, taps, record.hidden, strict=bool(record.hidden)):
            worst = max(worst, _agree(f"states after {path}", found, wanted, 5e-6))
    return f"{len(record.velocities)} velocities, states of {len(record.hidden)} blocks, {worst:.1e}"


@_check("text encoders: what they make of prompts is what the network takes")
@torch.no_grad()
def text_encoders(subject: Subject) -> str:
    config, backbone = subject.config, subject.teacher.backbone
    if not isinstance(config, DiffusersModelsConfig) or not isinstance(backbone, DiffusersModels):
        raise Unchecked("no text encoders of diffusers' or transformers'")
    x, sigma, cond = subject.inputs
    if not isinstance(config, DiffusersBackboneConfig):
        named, components = ", ".join(config.text_classes()) or "none", ", ".join(config.text_components)
        assert named == components, f"text_classes names {named}, text_components are {components}"
    prompts = [backbone.told(prompt) for prompt in prompts_for(backbone)]
    if subject.real:
        encode: Callable[[list[str]], Conditioning] = backbone.encode
    else:
        encoders = config.text_model(_tiny_text(config))
        encode = lambda prompts: backbone.encode_with(encoders, prompts)  # noqa: E731
    found = encode(prompts)
    of_text = ("text", "mask", "pooled")
    wanted = {name: each for name, each in config.inputs().items() if each.required and each.role in of_text}
    assert set(found) == set(wanted), f"encode_with gives {', '.join(found)}, not {', '.join(wanted)}"
    for name, value in found.items():
        assert value.shape[:1] == (BATCH,), f"{name} has shape {list(value.shape)} for {BATCH} prompts"
        assert wanted[name].fits(value.shape[1:]), f"{name} is {list(value.shape[1:])}, not {wanted[name].pattern()}"
        if wanted[name].role == "mask":
            lengths = value.bool().sum(1)
            places = torch.arange(value.shape[1], device=value.device)
            assert torch.equal(value.bool(), places < lengths[:, None]), f"{name}: the text is not first, padding last"
            empty = [prompt for prompt, length in zip(prompts, lengths.tolist(), strict=True) if not length]
            assert not empty or wanted[name].may_be_empty, (
                f"{name} masks all of {empty[0]!r}; give `example_prompts` that it encodes, or declare may_be_empty"
            )
    for k, prompt in enumerate(prompts):
        for name, value in encode([prompt]).items():
            _agree(f"{name} of prompt {k} alone", value[0].float(), found[name][k].float(), 1e-3)
    cond = {**cond, **conditioning.to(found, subject.device)}
    v = _run(subject.teacher, TEACHER, x, sigma, cond)
    assert v.isfinite().all(), "velocity of what they give is not finite"
    return ", ".join(f"{name} {list(value.shape[1:])}" for name, value in found.items())


def _tiny_text(config: DiffusersModelsConfig) -> Mapping[str, Any]:
    """The config's tiny text encoders."""
    encoders = config.tiny_text_encoders()
    if not encoders:
        raise Unchecked("the config names no tiny_text_encoders")
    assert set(encoders) == set(config.text_components), (
        f"tiny_text_encoders gives {', '.join(encoders)}, text_components are {', '.join(config.text_components)}"
    )
    return encoders


@_check("videos are encoded to what is stored, and decoded again")
@torch.no_grad()
def encode_videos(subject: Subject) -> str:
    backbone = subject.teacher.backbone
    x, _, _ = subject.inputs
    latents = x[:2] if not subject.real else x[:1]
    videos = backbone.decode(latents)
    try:
        stored = backbone.encode_videos(videos)
    except ValueError as error:
        raise Unchecked(str(error)) from error
    prepared, _ = backbone.prepare(stored, {})
    assert list(prepared.shape) == list(latents.shape), (
        f"videos {list(videos.shape)} become latents {list(stored.shape)}, prepared {list(prepared.shape)}, "
        f"not {list(latents.shape)}"
    )
    assert prepared.isfinite().all(), "latents are not finite"
    _agree("one video alone", backbone.encode_videos(videos[:1])[0], stored[0], 1e-4)
    given, layout = backbone.given_frames(videos), subject.config.layout()
    if layout is not None and given:
        asked = replace(layout, conditioning={name: layout.conditioning[name] for name in given})
        for fault in asked.conditioning_problems(given, stored.shape[1:]):
            raise AssertionError(f"given_frames: a sample {fault}")
    again = backbone.decode(prepared)
    assert again.shape == videos.shape, f"decoded again they are {list(again.shape)}, not {list(videos.shape)}"
    assert _difference(backbone.encode_videos(1 - videos), stored) > 1e-3, "other videos become the same latents"
    return f"{list(videos.shape[1:])} → {list(stored.shape[1:])}, round trip {_difference(again, videos):.1e}"


@_check("an applied pipeline gives the same at any guidance scale")
@torch.no_grad()
def guided_once(subject: Subject) -> str:
    if not isinstance(subject.teacher.backbone, DiffusersBackbone):
        raise Unchecked("no pipeline of diffusers'")
    found: dict[float, Tensor] = {}
    noise, _, cond = subject.inputs
    noise, cond = noise[:1], conditioning.select(cond, slice(0, 1))
    sigmas = torch.tensor([1.0, 0.8, 0.4, 0.0])
    networks = subject.backbone().networks
    scales = (1.0, *SCALES)
    backbones: dict[float, Any] = {s: _guided(subject, max(s, SCALES[0]), networks) for s in scales}
    first = backbones[1.0]
    config = LoRAConfig(rank=2, alpha=4.0, targets=list(first.lora_targets), base=subject.config.bases()[0])
    mixture = Mixture(first, {"expert": config}, router=TimestepRouter(["expert"])).to(subject.device)
    mixture.initialise()
    _as_if_trained(mixture)
    for scale, backbone in backbones.items():
        mixture.backbone = backbone
        try:
            pipeline = backbone.pipeline()
        except ValueError as error:
            raise Unchecked(str(error)) from error
        pipeline.set_progress_bar_config(disable=True)
        with attach(pipeline, mixture, sigmas):
            found[scale] = backbone.call_pipeline(pipeline, noise, cond, len(sigmas) - 1, guided=scale != 1.0).float()
    worst = max(_agree(f"latents at scale {scale:g}", found[scale], found[1.0], 1e-5) for scale in SCALES)
    return f"scales 1, {', '.join(f'{scale:g}' for scale in SCALES)}: {worst:.1e}"


@_check("noise is recognised at sigma 1", trained=True)
def noise_recognised(subject: Subject) -> str:
    if not subject.real:
        raise Unchecked("a miniature is not trained")
    x, _, cond = subject.inputs
    v = _run(subject.teacher, TEACHER, x, subject.column(1.0), cond)
    # Velocity is noise - x0, and x is the noise: wrong sign, time or layout leave no trace of it.
    cosine = torch.nn.functional.cosine_similarity(v.flatten(), x.flatten(), dim=0).item()
    assert cosine > 0.3, f"velocity and noise have cosine {cosine:.2f}; is it noise - x0, are time and layout right?"
    return f"cosine {cosine:.2f}"


@_check("one sigma per sample equals one by one")
def sigma_per_sample(subject: Subject) -> str:
    mixture, (x, sigma, cond) = subject.teacher, subject.inputs
    together = _run(mixture, TEACHER, x, sigma, cond)
    rows = [slice(k, k + 1) for k in range(BATCH)]
    alone = [_run(mixture, TEACHER, x[row], sigma[row], conditioning.select(cond, row)) for row in rows]
    return f"{_agree('samples one by one', torch.cat(alone), together, 1e-5):.1e}"


@_check("null conditioning: same names, shapes and dtypes")
def null_conditioning(subject: Subject) -> str:
    mixture, (x, sigma, cond) = subject.teacher, subject.inputs
    before = {name: value.clone() for name, value in cond.items()}
    null = mixture.backbone.null_conditioning(cond)
    assert _same(cond, before), "null_conditioning changed what it was given"
    assert set(null) == set(cond), f"names {sorted(null)}, not {sorted(cond)}"
    for name, value in null.items():
        wanted = cond[name]
        assert (value.shape, value.dtype, value.device) == (wanted.shape, wanted.dtype, wanted.device), (
            f"{name} is {value.dtype} {list(value.shape)} on {value.device}, "
            f"not {wanted.dtype} {list(wanted.shape)} on {wanted.device}"
        )
    again = mixture.backbone.null_conditioning(null)
    assert all(torch.equal(again[name], null[name]) for name in null), "the null of the null is something else"
    v, v_null = _run(mixture, TEACHER, x, sigma, cond), _run(mixture, TEACHER, x, sigma, null)
    assert v_null.isfinite().all(), "velocity is not finite"
    effect = _difference(v_null, v)
    return f"changes the velocity by {effect:.1e}" if effect else "no effect: the model takes no conditioning"


@_check("unembed of the last block is the native prediction")
@torch.no_grad()
def unembed(subject: Subject) -> str:
    mixture, (x, sigma, cond) = subject.teacher, subject.inputs
    backbone, worst = mixture.backbone, 0.0
    for base, network in backbone.networks.items():
        with mixture.using(teacher_name(base, mixture.bases)):
            [hidden] = mixture.hidden_states(x, sigma, cond, [backbone.blocks[-1]])
            native = backbone.native_prediction(network, x, sigma, cond).float()
            worst = max(worst, _agree(base, mixture.unembed(hidden, x, sigma, cond), native, 1e-5))
    return f"{worst:.1e}"


@_check("each token makes the latents that token_grid says")
@torch.no_grad()
def tokens(subject: Subject) -> str:
    mixture, (x, sigma, cond) = subject.teacher, subject.inputs
    backbone = mixture.backbone
    grid = backbone.token_grid(x.shape)
    [hidden] = mixture.hidden_states(x, sigma, cond, [backbone.blocks[-1]])
    count = grid[0] * grid[1] * grid[2]
    assert hidden.shape[1] == count, f"{hidden.shape[1]} tokens in a block's output, {count} on the grid {list(grid)}"
    plain = mixture.unembed(hidden, x, sigma, cond)
    tried = sorted({round(k * (count - 1) / 11) for k in range(12)})
    for token in tried:
        moved = hidden.clone()
        move(moved[:, token], 1.0, "token", token)
        change = (mixture.unembed(moved, x, sigma, cond) - plain).abs().amax(dim=(0, 1))  # [T, H, W]
        place = (token // (grid[1] * grid[2]), token // grid[2] % grid[1], token % grid[2])
        box = tuple(
            slice(k * size // n, -(-(k + 1) * size // n)) for k, n, size in zip(place, grid, x.shape[2:], strict=True)
        )
        inside = change[box].max().item()
        change[box] = 0.0
        assert change.max().item() <= 1e-5 * inside, (
            f"token {token}, at {place} of the grid (T', H', W') = {list(grid)}, changes latents elsewhere: "
            "tokens lie in another order, the grid is another one, or the patches are put together otherwise"
        )
        assert inside > 0, f"token {token} changes no latents"
    return f"{len(tried)} of {count} tokens, grid {list(grid)}"


@_check("feature taps: count, shape, order, gradients")
def feature_taps(subject: Subject) -> str:
    backbone, (x, sigma, cond) = subject.teacher.backbone, subject.inputs
    blocks = list(backbone.blocks)
    order, features, gradient = _features(subject.mixture(), x, sigma, cond)
    assert order == blocks, f"blocks run as {_listed(order)}, not as {_listed(blocks)}"
    grid = backbone.token_grid(x.shape)
    wanted = [BATCH, grid[0] * grid[1] * grid[2], backbone.hidden_size]
    assert len(features) == len(blocks), f"{len(features)} features of {len(blocks)} blocks"
    for path, hidden in zip(blocks, features, strict=True):
        assert list(hidden.shape) == wanted, f"{path} gives {list(hidden.shape)}, not {wanted}"
        assert hidden.isfinite().all(), f"{path} gives what is not finite"
    for (path, hidden), (after, later) in pairwise(zip(blocks, features, strict=True)):
        assert not torch.equal(hidden, later), f"{path} and {after} give the same"
    if not backbone.can_checkpoint:
        return f"{len(blocks)} × {wanted}, no checkpointing"
    _, again, gradient_again = _features(subject.mixture(checkpointing=True), x, sigma, cond)
    for path, hidden, other in zip(blocks, features, again, strict=True):
        _agree(f"{path} with checkpointing", other, hidden, 1e-6)
    difference = _agree("gradients with checkpointing", gradient_again, gradient, 1e-6)
    return f"{len(blocks)} × {wanted}, with checkpointing {difference:.1e}"


def _features(mixture: Mixture, x: Tensor, sigma: Tensor, cond: Conditioning) -> tuple[list[str], list[Tensor], Tensor]:
    """Blocks as they ran, the features of each, and the gradient of their mean square, of x and the weights, as one."""
    order: list[str] = []
    blocks, expert = mixture.backbone.blocks, mixture.experts["low_rank"]
    for path in blocks:
        expert.shared.network.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: order.append(path))
    mixture.train_only("low_rank")
    leaves = [x.clone().requires_grad_(), *expert.parameters.values()]
    with mixture.using("low_rank"):
        features = mixture.hidden_states(leaves[0], sigma, cond, blocks)
    for path, hidden in zip(blocks, features, strict=True):
        assert hidden.requires_grad, f"{path} gives features without gradients"
    forward_order = list(order)  # the backward pass may run them again
    total = torch.stack([hidden.square().mean() for hidden in features]).sum()
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    vector = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])
    assert vector.abs().max() > 0, "the features' gradients are zero"
    return forward_order, [hidden.detach() for hidden in features], vector


@_check("checkpointed gradients equal plain ones")
def checkpointing(subject: Subject) -> str:
    if not subject.teacher.backbone.can_checkpoint:
        raise Unchecked("the network has no enable_gradient_checkpointing")
    plain, recomputing = (_gradients(subject, on) for on in (False, True))
    assert set(plain[0]) == set(recomputing[0]), "other parameters get gradients"
    assert recomputing[1] > plain[1], "enable_gradient_checkpointing recomputes nothing in the backward pass"
    scale = torch.stack([gradient.abs().max() for gradient in plain[0].values()])
    worst = max(_agree(name, recomputing[0][name], wanted, 1e-6, scale) for name, wanted in plain[0].items())
    return f"{len(plain[0])} gradients, {worst:.1e}"


def _gradients(subject: Subject, checkpointing: bool) -> tuple[dict[str, Tensor], int]:
    """Gradients of a trained low-rank expert, and how often its blocks ran for them, forward and backward."""
    runs: list[None] = []
    mixture = subject.mixture(checkpointing=checkpointing)
    expert = mixture.experts["low_rank"]
    for path in mixture.backbone.blocks:
        expert.shared.network.get_submodule(path).register_forward_pre_hook(lambda *_: runs.append(None))
    _as_if_trained(mixture)
    mixture.train_only("low_rank")
    with mixture.using("low_rank"):
        loss = mixture(*subject.inputs).square().mean()
    loss.backward()  # under the teacher: recomputing must find the expert by itself
    return {name: p.grad for name, p in expert.parameters.items() if p.grad is not None}, len(runs)


def _as_if_trained(mixture: Mixture) -> None:
    """Moves every trained weight, so that no expert equals its parent."""
    for expert in mixture.experts.values():
        for name, parameter in expert.parameters.items():
            move(parameter, 0.05, "trained", expert.name, name)


@_check("LoRA targets are linears that take part")
def lora_targets(subject: Subject) -> str:
    mixture = subject.mixture()
    network, groups = subject.teacher.backbone.network, mixture.backbone.lora_targets
    figures = []
    for group, pattern in groups.items():
        found = [path for path, module in network.named_modules() if re.fullmatch(pattern, path) and path]
        assert found, f"group {group}: {pattern!r} matches no module; it must match full dotted paths"
        others = [path for path in found if not isinstance(network.get_submodule(path), nn.Linear)]
        assert not others, f"group {group}: {_listed(others)} is no linear"
        figures.append(f"{group} {len(found)}")
    expert = mixture.experts["low_rank"]
    mixture.train_only("low_rank")
    with mixture.using("low_rank"):
        mixture(*subject.inputs).square().mean().backward()
    idle = [name for name, p in expert.parameters.items() if name.endswith("lora_B.weight") and p.grad is None]
    assert not idle, f"{_listed(idle)} has no part in the velocity: take it out of lora_targets"
    plain = _run(mixture, TEACHER, *subject.inputs)
    for name, parameter in expert.parameters.items():
        if name.endswith("lora_B.weight"):
            move(parameter, 0.1, "adapter", name)
    effect = _difference(_run(mixture, "low_rank", *subject.inputs), plain)
    assert effect > 1e-6, "moving all adapters changes nothing"
    return ", ".join(figures)


@_check("copies cover all that reads the time, and the final projection")
def copies_cover(subject: Subject) -> str:
    backbone, (x, sigma, cond) = subject.teacher.backbone, subject.inputs
    paths = set(dict(backbone.network.named_modules()))
    missing = [path for path in [*backbone.time_dependent, *backbone.time_shared] if path not in paths]
    assert not missing, f"the network has no module {_listed(missing)}"
    first = _inputs_outside_blocks(backbone, x, sigma, cond)
    other_time = _inputs_outside_blocks(backbone, x, sigma.flip(0), cond)
    other_x = _inputs_outside_blocks(backbone, -x, sigma, cond)
    # Reads the time and nothing of x: an embedding of it, or a modulation by that. What reads both is fed by a copy.
    reads_time = [
        path
        for path, calls in first.items()
        if any(
            not torch.equal(a, b) and torch.equal(a, c)
            for a, b, c in zip(calls, other_time.get(path, []), other_x.get(path, []), strict=False)
        )
    ]
    last = list(first)[-1:]

    def covered(path: str, by: Sequence[str]) -> bool:
        return any(f"{path}.".startswith(f"{outer}.") for outer in by)

    forgotten = [path for path in reads_time if not covered(path, [*backbone.time_dependent, *backbone.time_shared])]
    assert not forgotten, (
        f"{_listed(forgotten)} reads the time and holds weights, but lies in none of time_dependent "
        f"({', '.join(backbone.time_dependent)}); if experts are to share it on purpose, name it in time_shared"
    )
    assert all(covered(path, backbone.time_dependent) for path in last), (
        f"{last[0]}, the final projection, lies in none of time_dependent ({', '.join(backbone.time_dependent)})"
    )
    return f"{len(reads_time)} modules read the time; {', '.join(backbone.time_dependent)}"


@torch.no_grad()
def _inputs_outside_blocks(backbone: Backbone, x: Tensor, sigma: Tensor, cond: Conditioning) -> dict[str, list[Tensor]]:
    """The input tensors of every module with weights of its own outside of lists of blocks, in running order."""
    found: dict[str, list[Tensor]] = {}
    lists = [path for path, module in backbone.network.named_modules() if isinstance(module, nn.ModuleList)]
    inside = tuple(f"{path}." for path in [*lists, *backbone.blocks])

    def keep(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            found.setdefault(path, []).extend(value.detach().clone() for value in values)

        return hook

    handles = [
        module.register_forward_pre_hook(keep(path), with_kwargs=True)
        for path, module in backbone.network.named_modules()
        if path and not f"{path}.".startswith(inside) and any(True for _ in module.parameters(recurse=False))
    ]
    try:
        backbone.velocity(backbone.network, x, sigma, cond)
    finally:
        for handle in handles:
            handle.remove()
    return found


@_check("a copy changes its expert, and only that")
def copies_apart(subject: Subject) -> str:
    mixture = subject.mixture()
    others = [name for name in mixture.experts if name != "low_rank"]
    before = {name: _run(mixture, name, *subject.inputs) for name in mixture.experts}
    with_weights = 0
    for path in mixture.backbone.time_dependent:
        mine = {
            name: p
            for name, p in mixture.experts["low_rank"].parameters.items()
            if name.startswith(f"{path}.") and not re.search(r"\.lora_[AB]\.weight\Z", name)
        }
        if not mine:
            continue
        with_weights += 1
        kept = {name: parameter.detach().clone() for name, parameter in mine.items()}
        for name, parameter in mine.items():
            move(parameter, 0.1, "copy", name)
        effect = _difference(_run(mixture, "low_rank", *subject.inputs), before["low_rank"])
        assert effect > 1e-6, f"moving the copy of {path} changes nothing: it is never called"
        for name in others:
            assert torch.equal(_run(mixture, name, *subject.inputs), before[name]), f"the copy of {path} changes {name}"
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(kept[name])
    assert with_weights, "time_dependent names no module with weights"
    return f"{with_weights} of {len(mixture.backbone.time_dependent)} with weights"


@_check("a fresh expert equals its parent bit for bit")
def fresh_expert(subject: Subject) -> str:
    mixture = subject.mixture()
    teacher = _run(mixture, TEACHER, *subject.inputs)
    for name in subject.experts:
        assert torch.equal(_run(mixture, name, *subject.inputs), teacher), f"the fresh {name} expert is not its parent"
    if "full" not in subject.experts:
        return "low-rank on the teacher"
    for name, parameter in mixture.experts["full"].parameters.items():
        move(parameter, 0.05, "trained", name)
    mixture.initialise(but=["full"])
    full = _run(mixture, "full", *subject.inputs)
    assert not torch.equal(full, teacher), "moving a full expert's weights changes nothing"
    assert torch.equal(_run(mixture, "child", *subject.inputs), full), "a fresh child is not its trained parent"
    return "low-rank and full on the teacher, low-rank on a trained full one"


@_check("training an expert leaves the teacher as it is")
def teacher_untouched(subject: Subject) -> str:
    mixture = subject.mixture()
    shared = mixture.experts[TEACHER].shared
    weights = {name: value.clone() for name, value in shared.network.state_dict().items() if "expert_" not in name}
    before = _run(mixture, TEACHER, *subject.inputs)
    for name in subject.experts:
        expert = mixture.experts[name]
        start = _run(mixture, name, *subject.inputs)
        mixture.train_only(name)
        optimizer = torch.optim.AdamW(expert.parameters.values(), lr=1e-2)
        with mixture.using(name):
            mixture(*subject.inputs).square().mean().backward()
        optimizer.step()
        assert not torch.equal(_run(mixture, name, *subject.inputs), start), (
            f"one step of training leaves {name} as it is"
        )
        assert torch.equal(_run(mixture, TEACHER, *subject.inputs), before), f"training {name} changes the teacher"
    after = shared.network.state_dict()
    changed = [name for name, value in weights.items() if not torch.equal(after[name], value)]
    assert not changed, f"training changes the teacher's {_listed(changed)}"
    return f"{len(weights)} tensors equal after a step of each of {len(subject.experts)} experts"


@_check("bfloat16 stays near float32")
def bfloat16(subject: Subject) -> str:
    backbone = subject.backbone("bfloat16")
    wanted = _run(subject.teacher, TEACHER, *subject.inputs)
    with torch.no_grad():  # random weights drawn in another dtype are other weights
        for name, network in backbone.networks.items():
            source = dict(subject.teacher.backbone.networks[name].named_parameters())
            for path, parameter in network.named_parameters():
                parameter.copy_(source[path])
    mixture = Mixture(backbone, {}).to(subject.device)
    mixture.autocast_dtype = torch.bfloat16
    found = _run(mixture, TEACHER, *subject.inputs)
    assert found.dtype == torch.float32, f"the student's velocity is {found.dtype}"
    error = ((found - wanted).norm() / wanted.norm()).item()
    assert error <= 5e-2, f"the velocity differs by {error:.1e} (root mean square), more than 0.05"
    # Probes hand tapped states over in float32, whatever the network computes in.
    with torch.no_grad():
        last = mixture.hidden_states(*subject.inputs, backbone.blocks[-1:])[0]
        latents = mixture.unembed(last, *subject.inputs)
    assert latents.shape == found.shape, f"unembed gives {list(latents.shape)}, the network {list(found.shape)}"
    return f"{error:.1e}"


@_check("experts are the same after saving and loading")
def save_and_load(subject: Subject) -> str:
    mixture = subject.mixture()
    _as_if_trained(mixture)
    wanted = {name: _run(mixture, name, *subject.inputs) for name in subject.experts}
    merged = {name: _merged(subject, mixture, name) for name in subject.experts}
    worst = max(_agree(f"{name}, merged into one network", merged[name], wanted[name], 1e-5) for name in wanted)
    saved = {name: dict(mixture.experts[name].parameters) for name in subject.experts}
    with tempfile.TemporaryDirectory() as folder:
        save_tree(Path(folder), "experts", saved)
        loaded = load_tree(Path(folder), "experts")
    del mixture, saved  # a real model is big
    other = subject.mixture()
    other.load(loaded, {}, "the kit")
    for name, velocity_before in wanted.items():
        after = _run(other, name, *subject.inputs)
        assert torch.equal(after, velocity_before), f"{name} is another one after loading"
    return f"bit for bit; merged into a plain network {worst:.1e}"


@torch.no_grad()
def _merged(subject: Subject, mixture: Mixture, name: str) -> Tensor:
    """Velocity of a plain network that holds the expert's weights under the network's own names."""
    backbone, expert = subject.backbone(), mixture.experts[name]
    network = backbone.network.to(subject.device)
    parameters = dict(network.named_parameters())
    for path, weight in expert.shared.merged(expert.chain):
        assert path in parameters, f"{name}: the network has no {path}"
        parameters.pop(path).copy_(weight)
    assert not parameters, f"{name} has no {_listed(list(parameters))}"
    return backbone.velocity(network, *subject.inputs).float()
