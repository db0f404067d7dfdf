"""Mistakes around the large models that would otherwise cost hours: found before training, or said in one line."""

from types import SimpleNamespace

import pytest
import torch
from saved_pipelines import PROMPT, VIDEO, pipeline_recipe, save_pipeline

from moedistill.data.base import Dataset, Sample
from moedistill.data.latents import write_latents
from moedistill.errors import RecipeError, UserError
from moedistill.model.guidance import Guidance
from moedistill.model.layout import Input, SampleLayout
from moedistill.recipe.loading import load_recipe
from moedistill.runs.build import _check_samples, build_mixture
from moedistill.runs.loop import run
from moedistill.runs.sample import sample_run
from moedistill_ltx.backbone import LTXConfig
from moedistill_wan.backbone import WanConfig

WAN22 = "dcm_wan22_a14b"


def smoke(name, *settings):
    return load_recipe(name, ["backbone.pretrained=null", "training.batch_size=2", *settings])


def stored(folder, backbone, change=lambda latents, cond: (latents, cond), negative=None):
    """Four stored samples, the third of them changed."""
    samples = []
    for k in range(4):
        cond = {name: value[0] for name, value in backbone.encode([f"sample {k}"]).items()}
        latents = torch.randn(backbone.latent_shape())
        samples.append(Sample(*change(latents, cond)) if k == 2 else Sample(latents, cond))
    write_latents(folder, samples, negative=negative)
    return folder


def test_an_expert_changes_the_network_that_serves_its_segment():
    swapped = ["experts.semantic.base=transformer_2", "experts.detail.base=transformer"]
    with pytest.raises(RecipeError) as error:
        load_recipe(WAN22, swapped)
    text = " ".join(str(error.value).split())
    assert "'transformer_2' is not what serves the segment of 'semantic': that is transformer" in text
    assert "experts.detail.base" in text
    load_recipe(WAN22, ["experts.semantic.base=transformer"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda latents, cond: (latents[:8], cond), r"sample 2 has latents \[8, 5, 4, 6\]; the model's have 16"),
        (lambda latents, cond: (latents[..., :5], cond), r"\(T, H, W\) must be multiples of \(1, 2, 2\)"),
    ],
    ids=["channels", "size"],
)
def test_latents_that_do_not_fit_stop_a_run_before_it_trains(change, message, tmp_path):
    backbone = smoke("dcm_wan_1_3b").backbone.tiny().build()
    data = stored(tmp_path / "data", backbone, change)
    recipe = smoke("dcm_wan_1_3b", f"data.path={data}", *(f"backbone.video.{k}={v}" for k, v in VIDEO.items()))
    with pytest.raises(UserError, match=message):
        run(recipe, output=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_text_without_its_mask_is_one_line(tmp_path):
    config = LTXConfig(pretrained=None)
    backbone = config.tiny().build()
    without = {"prompt_embeds": torch.zeros(12, 16)}
    with pytest.raises(
        ValueError, match="the stored negative prompt has no prompt_attention_mask, which the model takes"
    ):
        backbone.set_null(without)
    data = stored(
        tmp_path / "data", backbone, lambda latents, cond: (latents, {"prompt_embeds": cond["prompt_embeds"]})
    )
    with pytest.raises(UserError, match="prompt_attention_mask"):
        run(
            smoke("dcm_ltx", f"data.path={data}", "training.batch_size=4"),
            output=tmp_path / "run", device="cpu",
        )  # fmt: skip


def test_prompts_are_looked_for_before_training(tmp_path):
    recipe = smoke("dcm_wan_1_3b", "data.path=null", f"stages.samples.prompts={tmp_path / 'none.txt'}")
    with pytest.raises(UserError, match=r"stage samples: .*none\.txt"):
        run(recipe, output=tmp_path / "run", device="cpu")
    with pytest.raises(UserError, match="there is no prompt"):
        sample_run(tmp_path, prompts=[])


def test_a_cut_video_takes_its_image_latents_along(monkeypatch):
    from helpers import set_up

    from moedistill.data.loading import Batch
    from moedistill_wan.backbone import WanConfig

    usual = WanConfig.tiny_network
    monkeypatch.setattr(WanConfig, "tiny_network", lambda self: {**usual(self), "in_channels": 36})
    recipe = smoke("dcm_wan_1_3b", "data.path=null", "stages.semantic.latent_frames=3").resolved()
    started, _ = set_up(recipe)
    backbone = started.mixture.backbone
    latents = torch.randn(2, *backbone.latent_shape())
    text = backbone.encode(["a", "b"])
    batch = started.begin(
        Batch(latents, {**text, "image_latents": torch.randn(2, 20, *latents.shape[2:])}, [0, 1], True)
    )
    assert batch.latents.shape[2] == batch.conditioning["image_latents"].shape[2] == 3
    assert batch.conditioning["prompt_embeds"].shape == text["prompt_embeds"].shape


@pytest.mark.parametrize(
    "scale", [{"transformer": 1.0, "transformer_2": 4.0}, {"transformer": 4.0, "transformer_2": 1.0}]
)
def test_a_guidance_scale_of_one_leaves_the_other_networks_guided(scale):
    guidance = Guidance(mode="classifier_free", scale=scale, negative_prompt="blurred")
    backbone = WanConfig(pretrained=None, boundary_ratio=0.875, guidance=guidance).tiny().build()
    recipe = smoke(
        WAN22,
        "backbone.dtype=float32",
        "router.experts=[teacher]",
        "router.boundaries=[]",
        "experts={}",
        "stages=[{name: s, kind: sample, prompts: [a]}]",
    )
    mixture = build_mixture(recipe, backbone=backbone)
    mixture.guidance = guidance
    sigmas = torch.tensor([1.0, 0.9, 0.6, 0.0])
    [video] = backbone.generate(mixture, [PROMPT], sigmas, seed=0)
    noise = torch.randn(1, *backbone.latent_shape(), generator=torch.Generator().manual_seed(0))
    latents = mixture.generate(noise, backbone.encode([PROMPT]), sigmas, guidance=guidance)
    assert (backbone.decode(latents)[0] - video).abs().max() < 1e-4


def test_a_scale_below_one_and_a_pipeline_with_an_adapter_are_refused(tmp_path):
    from diffusers import WanPipeline
    from peft import LoraConfig

    import moedistill

    backbone = WanConfig(pretrained=None, guidance=Guidance(mode="classifier_free", scale=0.5)).tiny().build()
    with pytest.raises(ValueError, match=r"scales of 1 and more, not 0\.5"):
        backbone.guiding_arguments(backbone.pipeline(), backbone.encode([PROMPT]))

    model = save_pipeline(tmp_path / "model", "wan")
    done = run(pipeline_recipe("wan", model), output=tmp_path / "run", device="cpu")
    pipeline = WanPipeline.from_pretrained(model)
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "mine")
    with pytest.raises(UserError, match="carries a LoRA already"):
        moedistill.apply(pipeline, done.output)
    assert "mine" in pipeline.transformer.peft_config


def test_a_model_of_another_kind_is_refused(tmp_path):
    model = save_pipeline(tmp_path / "model", "wan")
    index = model / "model_index.json"
    index.write_text(index.read_text().replace('"expand_timesteps": false', '"expand_timesteps": true'))
    with pytest.raises(ValueError, match="not supported"):
        WanConfig(pretrained=str(model)).build()


def test_a_folder_of_another_model_is_one_line(tmp_path):
    model = save_pipeline(tmp_path / "model", "hunyuan_video")
    with pytest.raises(
        ValueError, match="transformer is a HunyuanVideoTransformer3DModel, not a WanTransformer3DModel"
    ):
        WanConfig(pretrained=str(model)).build()
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", model / "transformer"):
        with pytest.raises(ValueError, match=r"there is no .*config\.json; give the folder of the whole model"):
            WanConfig(pretrained=str(folder)).build()


def test_sizes_are_checked_without_weights():
    for setting, message in (("num_frames=100", r"97\s+or\s+101"), ("height=500", r"496\s+or 512")):
        with pytest.raises(RecipeError, match=message):
            load_recipe("dcm_hunyuan", [f"backbone.video.{setting}"])
    with pytest.raises(RecipeError, match=r"1\s+more\s+than\s+a\s+multiple\s+of\s+8"):
        load_recipe("dcm_cogvideox_2b", ["backbone.video.num_frames=53"])


def test_text_of_another_width_stops_a_run_that_leaves_no_folder(tmp_path):
    backbone = smoke("dcm_wan_1_3b").backbone.tiny().build()
    samples = [Sample(torch.randn(backbone.latent_shape()), {"prompt_embeds": torch.randn(12, 4096)}) for _ in range(2)]
    write_latents(tmp_path / "data", samples)
    with pytest.raises(UserError, match=r"sample 0 has prompt_embeds \[12, 4096\]; the model takes \[up to 12, 24\]"):
        run(smoke("dcm_wan_1_3b", f"data.path={tmp_path / 'data'}"), output=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_targets_that_match_nothing_are_named():
    backbone = smoke("dcm_wan_1_3b").backbone.tiny().build()
    backbone.lora_targets = {"attention": "to_q"}
    with pytest.raises(UserError, match="'attention' matches no linear of the network; its pattern is to_q"):
        build_mixture(smoke("dcm_wan_1_3b"), backbone=backbone)


def test_samples_never_replace_others(tmp_path):
    recipe = smoke("dcm_digits").resolved()
    recipe["stages"] = [
        dict(recipe["stages"][0], steps=1),
        {"name": "samples", "kind": "sample", "prompts": ["3 up"] * 2},
    ]
    recipe["backbone"] = {"kind": "digits", "pretrained": None, "width": 16, "num_layers": 2, "num_heads": 2}
    recipe["data"]["styles_per_digit"] = 1
    done = run(recipe, output=tmp_path / "run", device="cpu").output
    first = (done / "samples/000.mp4").read_bytes()
    assert sample_run(done, prompts=["4 up"]).output == done / "samples-2"
    assert (done / "samples/000.mp4").read_bytes() == first
    with pytest.raises(UserError, match="samples is not empty"):
        sample_run(done, prompts=["4 up"], output=done / "samples")
    assert [file.name for file in sorted((done / "samples").glob("*.mp4"))] == ["000.mp4", "001.mp4"]
    for options in ({"steps": 0}, {"sigmas": []}):
        with pytest.raises(UserError, match="at least one step"):
            sample_run(done, prompts=["4 up"], **options)


def test_a_backbone_of_any_kind_misses_the_text_that_its_layout_names():
    sample = Sample(torch.zeros(16, 4, 4, 6), {"label": torch.zeros(3)})
    backbone = SimpleNamespace(prepare=lambda latents, cond: (latents, cond))
    layout = SampleLayout(16, (2, 2, 2), {"words": Input("text", (5, 3), any_length=True)})
    recipe = SimpleNamespace(
        backbone=SimpleNamespace(layout=lambda: layout, unpack=dict), data=SimpleNamespace(kind="mine")
    )
    mixture = SimpleNamespace(backbone=backbone)

    class One(Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return sample

    with pytest.raises(ValueError, match="sample 0 has no words, which the model takes"):
        _check_samples(recipe, mixture, One())
    sample.conditioning["words"] = torch.zeros(5, 3)
    sample.latents = torch.zeros(16, 5, 4, 6)  # an odd frame, which a stage may cut off
    _check_samples(recipe, mixture, One())
    sample.latents = torch.zeros(16, 4, 5, 6)
    with pytest.raises(ValueError, match="must be multiples"):
        _check_samples(recipe, mixture, One())
