"""Experts inside stock pipelines: what `sample` gives, `apply` gives too, and `undo` leaves no trace."""

import gc
import json
import shutil
import socket
import warnings
import weakref
from itertools import count

import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKLWan, DiffusionPipeline
from helpers import distil, tiny_recipe
from saved_pipelines import FAMILIES, PROMPT, VIDEO, distil_fast, make_pipeline, pipeline_recipe, save_pipeline
from transformers import UMT5EncoderModel

import moedistill
from moedistill import cli
from moedistill.errors import UserError
from moedistill.flow.routers import TimestepRouter
from moedistill.integrations.diffusers.apply import apply
from moedistill.model.generate import generate
from moedistill.model.mixture import Mixture
from moedistill.recipe.loading import load_recipe
from moedistill.runs.build import build_mixture
from moedistill.runs.loop import run
from moedistill.runs.sample import load_mixture, sample_run, sampling_steps
from moedistill_digits.backbone import DigitsBackboneConfig
from moedistill_wan.backbone import WanConfig


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder of a family's pipeline, made once."""
    made = {}

    def find(family):
        if family not in made:
            made[family] = save_pipeline(tmp_path_factory.mktemp(family) / "pipeline", family)
        return made[family]

    return find


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    """The folder of a finished run of a family, made once; with `changes` of its recipe under a name."""
    made = {}

    def find(family, name="usual", **changes):
        if (family, name) not in made:
            recipe = pipeline_recipe(family, place(family), **changes)
            made[family, name] = run(recipe, output=tmp_path_factory.mktemp(f"{family}_{name}"), device="cpu").output
        return made[family, name]

    return find


@pytest.fixture(scope="module")
def loaded(place):
    """A freshly loaded stock pipeline."""

    def load(family, **options):
        pipeline = DiffusionPipeline.from_pretrained(place(family), local_files_only=True, **options)
        pipeline.set_progress_bar_config(disable=True)
        for name in ("transformer", "transformer_2"):  # where ours lie: at other addresses the last bits differ
            for parameter in getattr(getattr(pipeline, name, None), "parameters", list)():
                parameter.data = parameter.data.clone()
        return pipeline

    return load


def frames(pipeline, seed, **options):
    """A video `[C, T, H, W]` of a pipeline."""
    options = {"prompt": PROMPT, **VIDEO, **options}
    video = pipeline(**options, generator=torch.Generator().manual_seed(seed), output_type="pt").frames[0]
    return video.permute(1, 0, 2, 3).float()


@pytest.fixture
def sampled(tmp_path):
    numbers = count()
    return lambda source, **options: (
        sample_run(source, output=tmp_path / str(next(numbers)), **{"prompts": [PROMPT], "seed": 3, **options}).videos
    )


def state(pipeline):
    """Everything about a pipeline that `apply` might change."""
    networks = [pipeline.transformer, getattr(pipeline, "transformer_2", None)]
    modules = [module for network in networks if network is not None for module in network.modules()]
    return {
        "components": {name: id(component) for name, component in pipeline.components.items()},
        "config": dict(pipeline.config),
        "modules": [id(module) for module in modules],
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules],
        "attributes": [sorted(vars(module)) for module in modules],
        "training": [module.training for module in modules],
        "trainable": [p.requires_grad for network in networks if network is not None for p in network.parameters()],
        "keys": [list(network.state_dict()) for network in networks if network is not None],
    }


# -- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_apply_gives_what_sample_gives_and_undo_what_was_before(family, trained, loaded, sampled):
    videos = sampled(trained(family), num=2)
    pipeline = loaded(family)
    pipeline.transformer.proj_out.requires_grad_(False)
    teacher, before = frames(pipeline, 3, num_inference_steps=3), state(pipeline)
    applied = moedistill.apply(pipeline, trained(family))
    calls = [(0, {}), (1, {"num_inference_steps": 7, "guidance_scale": 1.0})]
    for k, options in [*calls, (1, {"num_inference_steps": 2, "guidance_scale": 7.5})]:
        assert torch.equal(frames(pipeline, 3 + k, **options), videos[k]), (k, options)
    assert 0.01 < (videos[0] - teacher).abs().mean() < 0.9
    assert (videos[0] - videos[1]).abs().mean() > 0.01
    applied.undo()
    assert state(pipeline) == before
    assert torch.equal(frames(pipeline, 3, num_inference_steps=3), teacher)
    applied.undo()  # once more does nothing
    assert state(pipeline) == before


def test_a_prompt_and_its_place_decide(trained, sampled):
    both = sampled(trained("wan"), prompts=["a cat", PROMPT])
    assert torch.equal(both[1:], sampled(trained("wan"), seed=4))
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize("family", ["wan22", "cogvideox_2b"])
def test_samples_are_what_our_own_sampler_gives(family, trained, sampled):
    """Through pipeline, routed transformer and scheduler, or without any of them; also from below the top."""
    recipe, mixture = load_mixture(trained(family))
    backbone, cogvideox = mixture.backbone, family.startswith("cogvideox")
    c, t, h, w = backbone.latent_shape()
    noise = torch.randn((1, t, c, h, w) if cogvideox else (1, c, t, h, w), generator=torch.Generator().manual_seed(3))
    noise, cond = noise.transpose(1, 2) if cogvideox else noise, backbone.encode([PROMPT])
    for options in ({}, {"sigmas": [0.9, 0.3]}):
        path = sampling_steps(recipe, **options)
        ours = backbone.decode(mixture.generate(noise, cond, path, guidance=mixture.guidance))
        assert (ours - sampled(trained(family), **options)).abs().max() < 1e-4, options


def test_an_export_serves_where_the_model_and_data_are_elsewhere(place, loaded, sampled, tmp_path):
    folder = shutil.copytree(place("wan"), tmp_path / "model")
    stages = [distil_fast("semantic"), distil_fast("detail"), {"name": "export", "kind": "export"}]
    output = run(pipeline_recipe("wan", folder, stages=stages), output=tmp_path / "run", device="cpu").output
    video = sampled(output / "export")[0]
    shutil.rmtree(folder)
    pipeline = loaded("wan")
    apply(pipeline, output / "export")
    assert torch.equal(frames(pipeline, 3), video)
    with pytest.raises(UserError, match="there is no such folder"):
        sampled(output / "export")


def test_steps_sigmas_and_averages(trained, loaded, sampled):
    averaged = trained("wan", "ema", stages=[distil_fast("semantic", ema_decay=0.5), distil_fast("detail")])
    usual = sampled(averaged)
    pipeline = loaded("wan")
    for options in ({"steps": 2}, {"sigmas": [1.0, 0.9, 0.3]}, {"weights": "ema"}):
        video = sampled(averaged, **options)[0]
        with apply(pipeline, averaged, **options):
            assert torch.equal(frames(pipeline, 3), video), options
        assert not torch.allclose(video, usual[0], atol=1e-3), options
    for options, message in (
        ({"steps": 2, "sigmas": [1.0]}, "--steps or --sigmas, not both"),
        ({"steps": 9}, "--steps: steps 9 is more than"),
        ({"steps": 2.5}, r"apply: steps 2\.5 must be a whole number of at least 1"),
        ({"steps": "2"}, "apply: steps '2' must be a whole number of at least 1"),
        ({"sigmas": 0.9}, r"apply: sigmas must be a list, not 0\.9"),
        ({"sigmas": ["1"]}, r"sigma '1' \(str\) must be a number"),
        ({"sigmas": [1.0, float("nan")]}, "sigma nan is outside"),
        ({"sigmas": [0.3, 1.0]}, "values must descend strictly"),
        ({"weights": "best"}, "weights 'best' are unknown: use trained or ema"),
    ):
        with pytest.raises(UserError, match=message):
            apply(pipeline, averaged, **options)
    with pytest.raises(UserError, match="holds no averaged weights"):
        apply(pipeline, trained("wan"), weights="ema")


# -- inside -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def watch():
    """What reaches the networks of a pipeline that carries experts: (expert, times, arguments) of each call."""

    def spy(pipeline):
        mixture, calls = pipeline.transformer.mixture, []

        def note(_module, _args, arguments):
            calls.append((mixture.active, arguments["timestep"], arguments))

        for network in {expert.shared.network for expert in mixture.experts.values()}:
            network.register_forward_pre_hook(note, with_kwargs=True)
        return calls

    return spy


@pytest.mark.parametrize("family", ["wan22", "hunyuan_video", "cogvideox_2b"])
def test_each_step_runs_its_expert_at_the_exact_time(family, trained, loaded, watch):
    """Also where a pipeline rounds the time that it passes to bfloat16: 833.3 becomes 832."""
    pipeline = loaded(family, torch_dtype=torch.bfloat16)
    apply(pipeline, trained(family))

    def rounding(_module, args, arguments):
        return args, {**arguments, "timestep": arguments["timestep"].bfloat16()}

    pipeline.transformer.register_forward_pre_hook(rounding, with_kwargs=True)
    calls = watch(pipeline)
    assert frames(pipeline, 0, guidance_scale=6.0).isfinite().all()
    recipe, mixture = load_mixture(trained(family))
    sigmas = recipe.sample.resolve(mixture.trajectory)[:-1]
    assert [expert for expert, _, _ in calls] == [mixture.router.expert_at(sigma) for sigma in sigmas]
    assert {expert for expert, _, _ in calls} == {"semantic", "detail"}
    times = torch.cat([times for _, times, _ in calls])
    assert times.dtype == torch.float32
    assert torch.equal(times, mixture.backbone.to_native(torch.zeros(4, 1, 1, 1, 1), sigmas)[1])
    assert {len(arguments["hidden_states"]) for _, _, arguments in calls} == {1}  # no unconditional half
    if family == "hunyuan_video":
        guidance = torch.cat([arguments["guidance"] for _, _, arguments in calls])
        assert guidance.tolist() == [6000.0] * 4


def test_the_caller_s_guidance_does_not_reach_an_expert(trained, place, loaded, watch):
    backbone = pipeline_recipe("hunyuan_video", place("hunyuan_video"))["backbone"]
    guidance = {"mode": "embedded", "scale": 6.0, "student_scale": 3.0}
    pipeline = loaded("hunyuan_video")
    apply(pipeline, trained("hunyuan_video", "told", backbone={**backbone, "guidance": guidance}))
    calls = watch(pipeline)
    frames(pipeline, 0, guidance_scale=1.5, true_cfg_scale=4.0, negative_prompt="a cat")
    assert len(calls) == 4
    assert {arguments["guidance"].item() for _, _, arguments in calls} == {3000.0}


def test_two_prompts_at_once(trained, loaded):
    """Also where both come from equal noise, which looks like a guided pipeline's doubled batch."""
    pipeline = loaded("cogvideox_2b")
    apply(pipeline, trained("cogvideox_2b"))
    one = torch.randn(1, 3, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    options = {**VIDEO, "output_type": "latent"}
    alone = [pipeline(prompt=prompt, latents=one, **options).frames for prompt in (PROMPT, "a cat")]
    for scale in (1.0, 6.0):
        both = pipeline(prompt=[PROMPT, "a cat"], latents=torch.cat([one, one]), guidance_scale=scale, **options).frames
        assert torch.allclose(both, torch.cat(alone), atol=1e-5)
    assert not torch.allclose(*alone, atol=1e-3)
    options |= {"guidance_scale": 6.0, "use_dynamic_cfg": True}
    assert torch.allclose(pipeline(prompt=PROMPT, latents=one, **options).frames, alone[0], atol=1e-5)


TEACHERS = {
    "teacher": {"router": {"kind": "timestep", "experts": ["semantic", "teacher"], "boundaries": [{"point": 4}]}},
    "frozen": {"router": {"kind": "timestep", "experts": ["semantic", "still"], "boundaries": [{"point": 4}]}},
}


@pytest.mark.parametrize("name", TEACHERS)
def test_the_teacher_s_steps_are_guided(name, trained, place, loaded, sampled, watch):
    """By the recipe's scale in `sample`, by the caller's after `apply`."""
    experts = {"semantic": {"kind": "full"}, **({"still": {"kind": "frozen"}} if name == "frozen" else {})}
    guidance = {"mode": "classifier_free", "scale": 50.0}
    backbone = {**pipeline_recipe("wan", place("wan"))["backbone"], "guidance": guidance}
    changes = {**TEACHERS[name], "backbone": backbone, "experts": experts, "stages": [distil_fast("semantic")]}
    source = trained("wan", name, **changes)
    video = sampled(source)[0]
    pipeline = loaded("wan")
    apply(pipeline, source)
    calls = watch(pipeline)
    assert torch.allclose(frames(pipeline, 3, guidance_scale=50.0), video, atol=1e-6)
    assert len(calls) == 6  # a step of an expert is one call, of the teacher two
    assert (frames(pipeline, 3, guidance_scale=1.0) - video).abs().max() > 1e-3
    recipe, mixture = load_mixture(source)
    backbone, path = mixture.backbone, recipe.sample.resolve(mixture.trajectory)
    noise = torch.randn(1, *backbone.latent_shape(), generator=torch.Generator().manual_seed(3))
    latents = mixture.generate(noise, backbone.encode([PROMPT]), path, guidance=mixture.guidance)
    assert (backbone.decode(latents)[0] - video).abs().max() < 1e-4


def test_each_of_two_teachers_has_its_own_guidance(trained, loaded, sampled):
    """Wan 2.2: the low noise is the untouched `transformer_2`, guided with its own scale."""
    lora = {"kind": "lora", "rank": 2, "alpha": 4, "base": "transformer"}
    experts = {"semantic": lora, "detail": {"kind": "frozen", "base": "transformer_2"}}
    source = trained("wan22", "frozen", experts=experts, stages=[distil_fast("semantic")])
    video = sampled(source)[0]
    pipeline = loaded("wan22")
    with apply(pipeline, source):
        assert torch.allclose(frames(pipeline, 3, guidance_scale=9.0, guidance_scale_2=3.0), video, atol=1e-6)
        assert (frames(pipeline, 3, guidance_scale=9.0, guidance_scale_2=4.0) - video).abs().max() > 1e-3
    recipe, mixture = load_mixture(source)
    backbone, path = mixture.backbone, recipe.sample.resolve(mixture.trajectory)
    noise = torch.randn(1, *backbone.latent_shape(), generator=torch.Generator().manual_seed(3))
    latents = mixture.generate(noise, backbone.encode([PROMPT]), path, guidance=mixture.guidance)
    assert (backbone.decode(latents)[0] - video).abs().max() < 1e-5


def test_bfloat16(trained, loaded, place, sampled):
    backbone = {**pipeline_recipe("wan", place("wan"))["backbone"], "dtype": "bfloat16"}
    source = trained("wan", "bfloat16", backbone=backbone)
    video = sampled(source)[0]
    vae = AutoencoderKLWan.from_pretrained(place("wan") / "vae")
    pipeline = loaded("wan", torch_dtype=torch.bfloat16, vae=vae)
    apply(pipeline, source)
    assert torch.equal(frames(pipeline, 3), video)
    other = loaded("wan")  # in the pipeline's dtype, whatever the recipe's
    apply(other, source)
    assert other.transformer.mixture.autocast_dtype is None
    assert 0 < (frames(other, 3) - video).abs().mean() < 0.05


def test_gradient_checkpointing_is_for_training(trained, loaded):
    source = trained("wan", "checkpointing", training={"batch_size": 1, "gradient_checkpointing": True})
    pipeline = loaded("wan")
    with apply(pipeline, source):
        assert not pipeline.transformer.mixture.backbone.network.is_gradient_checkpointing


# -- memory -----------------------------------------------------------------------------------------------------------


def test_for_inference_full_experts_have_the_dtype_of_the_base(place):
    recipe = pipeline_recipe("wan", place("wan"))
    recipe = load_recipe({**recipe, "backbone": {**recipe["backbone"], "dtype": "bfloat16"}})
    for inference, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        experts = build_mixture(recipe, inference=inference).experts
        assert experts["semantic"].parameters["proj_out.weight"].dtype == dtype
        assert experts["detail"].parameters["proj_out.weight"].dtype == torch.float32
        islands = [name for name in experts["semantic"].parameters if "time_embedder" in name]
        assert {experts["semantic"].parameters[name].dtype for name in islands} == {torch.float32}


def test_text_encoders_and_vae_are_freed(trained, place, sampled, monkeypatch):
    made = []
    for cls in (UMT5EncoderModel, AutoencoderKLWan):
        original = cls.from_pretrained.__func__

        def loading(cls, *args, original=original, **options):
            model = original(cls, *args, **options)
            made.append(weakref.ref(model[0]))  # with the library's report
            return model

        monkeypatch.setattr(cls, "from_pretrained", classmethod(loading))
    _, mixture = load_mixture(trained("wan"))
    backbone = mixture.backbone
    backbone.encode([PROMPT])
    gc.collect()
    assert [model() for model in made] == [None]
    backbone.decode(torch.zeros(1, *backbone.latent_shape()))
    gc.collect()
    assert [model() for model in made] == [None, None]
    sampled(trained("wan"))
    gc.collect()
    assert len(made) == 4
    assert [model() for model in made] == [None] * 4


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return run(tiny_recipe([distil(steps=1)]), output=tmp_path_factory.mktemp("digits"), device="cpu").output


def test_sources_and_pipelines_that_do_not_fit(trained, loaded, digits, tmp_path):
    wan, wan22, cog = loaded("wan"), loaded("wan22"), loaded("cogvideox_2b")
    for pipeline, source, message in (
        (wan, tmp_path / "nowhere", "there is no such folder"),
        (wan, digits, "was made for backbone 'digits', which has no diffusers pipeline"),
        (cog, trained("wan"), "was made for a WanPipeline, not a CogVideoXPipeline"),
        (wan22, trained("wan"), "a model with transformer; this pipeline has transformer and transformer_2"),
        (wan, trained("wan22"), "a model with transformer and transformer_2; this pipeline has transformer"),
    ):
        before = state(pipeline)
        with pytest.raises(UserError, match=message):
            apply(pipeline, source)
        assert state(pipeline) == before


def test_a_failure_leaves_the_pipeline_clean(trained, loaded, monkeypatch):
    pipeline, source = loaded("wan22"), trained("wan22")  # both networks carry adapters
    teacher, before = frames(pipeline, 3, num_inference_steps=2), state(pipeline)
    other = make_pipeline("wan")
    other.transformer = type(other.transformer).from_config({**other.transformer.config, "num_layers": 1})
    with pytest.raises(UserError, match=r"the weights of expert '\w+' in .* do not fit"):
        apply(other, trained("wan"))
    assert not any("lora" in name for name in other.transformer.state_dict())

    def broken(*_args, **_options):
        raise ZeroDivisionError

    for place in ("moedistill.model.mixture.Mixture.initialise", "moedistill.model.experts.LoRAExpert._copied_paths"):
        with monkeypatch.context() as patch:
            patch.setattr(place, broken)
            with pytest.raises(ZeroDivisionError):
                apply(pipeline, source)
        assert state(pipeline) == before
    assert torch.equal(frames(pipeline, 3, num_inference_steps=2), teacher)


def test_applying_twice(trained, loaded):
    pipeline = loaded("wan")
    with apply(pipeline, trained("wan")):
        inside = state(pipeline)
        with pytest.raises(UserError, match="carries experts already; call undo"):
            apply(pipeline, trained("wan"))
        assert state(pipeline) == inside
    with apply(pipeline, trained("wan")):
        assert state(pipeline) != inside


def test_applying_an_early_checkpoint_says_who_is_not_trained(trained, loaded):
    early = sorted((trained("wan") / "checkpoints").iterdir())[0]
    assert early.name.startswith("00_")
    note = "expert 'detail' is not trained: it is still a copy of 'semantic'"
    with pytest.warns(UserWarning, match=note):
        applied = apply(loaded("wan"), early)
    assert applied.notes == [note]


def test_applying_other_steps_says_which_were_not_trained_for(trained, loaded):
    pipeline = loaded("wan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert apply(pipeline, trained("wan")).notes == []
    before = state(pipeline := loaded("wan"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="sampling goes beyond"):
            apply(pipeline, trained("wan"), sigmas=[1.0])
    assert state(pipeline) == before
    with pytest.warns(UserWarning, match="sampling goes beyond the end of a phase") as said:
        applied = apply(loaded("wan"), trained("wan"), sigmas=[1.0])
    assert [str(warning.message) for warning in said] == applied.notes


def test_an_offloaded_pipeline(trained, loaded):
    pipeline = loaded("wan")
    pipeline.transformer.blocks[0]._hf_hook = object()
    with pytest.raises(UserError, match="apply the experts first, then offload"):
        apply(pipeline, trained("wan"))


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ({"num_frames": 10}, "num_frames 10 must be 1 more than a multiple of 4: 9 or 13"),
        ({"height": 40}, "height 40 must be a multiple of 16: 32"),
        ({"width": 56}, "width 56 must be a multiple of 16: 48 or 64"),
    ],
)
def test_sizes_that_do_not_fit(trained, tmp_path, video, message):
    with pytest.raises(UserError, match=f"sample: {message}"):
        sample_run(trained("wan"), video=video, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_sizes(trained, loaded, sampled):
    video = {"num_frames": 5, "height": 48, "width": None}
    pipeline = loaded("wan")
    apply(pipeline, trained("wan"))
    wanted = frames(pipeline, 3, num_frames=5, height=48, width=48)
    assert torch.equal(sampled(trained("wan"), video=video)[0], wanted)


# -- the network is never asked ---------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    """No environment variable says so, but every attempt to connect is an error of this test."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    attempts = []

    def refuse(*args):
        attempts.append(args)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert attempts == []


def command(tmp_path, recipe, *options):
    """Exit code and error of `moedistill run`."""
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    try:
        done = CliRunner().invoke(cli.cli, ["run", str(file), "--output", str(tmp_path / "out"), *options])
    except UserError as error:  # as `main` prints it, with exit code 2
        return str(error)
    assert isinstance(done.exception, UserError), done.exception
    return str(done.exception)


def test_a_saved_folder_needs_no_network(offline, place, sampled, tmp_path):
    recipe = pipeline_recipe("hunyuan_video", place("hunyuan_video"))
    output = run(recipe, output=tmp_path / "run", device="cpu").output
    assert sampled(output).isfinite().all()


def test_a_hub_id_that_is_not_there(offline, tmp_path):
    error = command(tmp_path, pipeline_recipe("wan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"))
    assert "the weights of Wan-AI/Wan2.1-T2V-1.3B-Diffusers are not on this machine" in error
    assert "hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in error
    for what in ("GB", "--set backbone.pretrained=FOLDER", "--smoke"):
        assert what in error
    assert len(error.splitlines()) <= 20
    assert max(map(len, error.splitlines())) <= 240


def test_a_folder_that_is_not_there(offline, tmp_path):
    error = command(tmp_path, pipeline_recipe("wan", tmp_path / "nowhere"))
    assert "nowhere: there is no such folder" in error


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "wan22",
            {"boundary_ratio": 0.9},
            "boundary_ratio 0.9 is not .*; set backbone.boundary_ratio to 0.875",
        ),
        ("wan22", {"boundary_ratio": None}, "boundary_ratio None is not that of .* to 0.875"),
        ("wan", {"boundary_ratio": 0.875}, "boundary_ratio 0.875 is not that of .* to null: it is one network"),
    ],
)
def test_a_boundary_that_is_not_the_model_s(family, changes, message, place):
    config = load_recipe(pipeline_recipe(family, place(family))).backbone.replace(**changes)
    with pytest.raises(ValueError, match=message):
        config.build()


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("text_encoder", "a prompt must be encoded, but .* has no text_encoder; give the whole model's folder"),
        ("tokenizer", "a prompt must be encoded, but .* has no tokenizer"),
        ("model_index.json", "cannot load its text encoders: "),
        ("transformer", r"there is no .*transformer.config\.json; give the folder of the whole model"),
        ("vae", r"vae.config\.json is missing|cannot load its VAE"),
        ("scheduler", "cannot make its pipeline: "),
    ],
)
def test_a_folder_that_is_not_complete(gone, message, place, tmp_path):
    folder = shutil.copytree(place("wan"), tmp_path / "model")
    shutil.rmtree(folder / gone) if (folder / gone).is_dir() else (folder / gone).unlink()
    recipe = pipeline_recipe("wan", folder)
    recipe["stages"].append({"name": "samples", "kind": "sample", "prompts": [PROMPT]})
    with pytest.raises(UserError, match=message) as error:
        run(recipe, output=tmp_path / "run", device="cpu")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("config", [WanConfig(pretrained=None), DigitsBackboneConfig(pretrained=None)])
def test_some_prompts_of_a_list_give_what_they_give_in_it(config):
    """By the model's own pipeline, and by our sampler."""
    mixture = Mixture(config.tiny().build(), {}, router=TimestepRouter(["teacher"], []))
    prompts = list(mixture.backbone.example_prompts)[:3]
    sigmas = torch.tensor([1.0, 0.5, 0.0])
    whole = list(generate(mixture, prompts, sigmas, seed=1))
    some = list(generate(mixture, prompts[1:], sigmas, seed=1, places=[1, 2]))
    assert all(torch.equal(one, other) for one, other in zip(some, whole[1:], strict=True))
    assert not torch.equal(next(iter(generate(mixture, prompts[1:], sigmas, seed=1))), whole[1])
