"""Pipeline folders in diffusers' layout, as published models come in: tiny, with random weights, made offline.

Everything but the sizes is as published: the classes, the text's length, the VAE's compression, the scheduler.
"""

from functools import cache, partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

FAMILIES = ("wan", "wan22", "hunyuan_video", "cogvideox_2b", "cogvideox_5b")
FROM_IMAGES = ("wan_i2v", "wan_flf2v", "wan22_i2v", "cogvideox_5b_i2v", "cogvideox_1.5_i2v")
"""Image-to-video, one of them from the first and the last frame."""
PROMPT = "a dog runs"
TEXT_WIDTH = 24
POOLED_WIDTH = 16


def save_pipeline(folder, family):
    """Writes a pipeline to `folder`, which it returns: one of `FAMILIES`, of `FROM_IMAGES`, or ltx; always the same."""
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make_pipeline(family).save_pretrained(folder)
    return folder


def make_pipeline(family):
    """A stock pipeline with random weights, float32, in evaluation mode."""
    made = {
        "wan": wan,
        "wan22": wan22,
        "wan_i2v": wan_from_images,
        "wan_flf2v": partial(wan_from_images, frames=2),
        "wan22_i2v": wan22_from_images,
        "hunyuan_video": hunyuan_video,
        "ltx": ltx,
        "cogvideox_5b_i2v": partial(cogvideox_from_images, "5b"),
        "cogvideox_1.5_i2v": partial(cogvideox_from_images, "1.5-5b"),
    }
    pipeline = made[family]() if family in made else cogvideox(family.removeprefix("cogvideox_"))
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# -- families ---------------------------------------------------------------------------------------------------------


def wan(pipeline_class="WanPipeline", **options):
    import diffusers
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler

    return getattr(diffusers, pipeline_class)(
        tokenizer=t5_tokenizer(),
        text_encoder=UMT5EncoderModel(UMT5Config(**_t5())),
        vae=AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
        **{"transformer": _wan_transformer(), **options},
    )


def wan22():
    return wan(transformer_2=_wan_transformer(), boundary_ratio=0.875)


def wan_from_images(frames=1):
    """Wan 2.1, with CLIP; of two frames it is told the place of each token of their images."""
    told = {"image_dim": 8, "added_kv_proj_dim": 32, "pos_embed_seq_len": 514 if frames == 2 else None}
    clip = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3}
    return wan(
        "WanImageToVideoPipeline",
        transformer=_wan_transformer(in_channels=36, **told),
        image_encoder=CLIPVisionModel(CLIPVisionConfig(**clip, image_size=224, patch_size=14)),
        image_processor=CLIPImageProcessor(),
    )


def wan22_from_images():
    transformers = {name: _wan_transformer(in_channels=36) for name in ("transformer", "transformer_2")}
    return wan("WanImageToVideoPipeline", **transformers, boundary_ratio=0.875)


def _wan_transformer(**options):
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, ffn_dim=64, freq_dim=32, text_dim=TEXT_WIDTH,
        **options,
    )  # fmt: skip


def ltx():
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    widths, layers = (8, 8, 8, 8), (1, 1, 1, 1, 1)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=widths, decoder_block_out_channels=widths, layers_per_block=layers,
        decoder_layers_per_block=layers,
    )  # fmt: skip
    vae.latents_mean += torch.linspace(-0.5, 0.5, 8)
    vae.latents_std += torch.linspace(-0.5, 0.5, 8)
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024,
            max_image_seq_len=4096, shift_terminal=0.1,
        ),
        vae=vae,
        text_encoder=T5EncoderModel(T5Config(**_t5())),
        tokenizer=t5_tokenizer(),
        transformer=LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
            num_layers=2, caption_channels=TEXT_WIDTH,
        ),
    )  # fmt: skip


def hunyuan_video():
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )

    clip = {"hidden_size": POOLED_WIDTH, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    llama = {"hidden_size": TEXT_WIDTH, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
    return HunyuanVideoPipeline(
        text_encoder=LlamaModel(LlamaConfig(**llama, **_vocabulary())),
        tokenizer=llama_tokenizer(),
        text_encoder_2=CLIPTextModel(CLIPTextConfig(**clip, **_vocabulary())),
        tokenizer_2=clip_tokenizer(),
        transformer=HunyuanVideoTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=2, num_refiner_layers=1,
            text_embed_dim=TEXT_WIDTH, pooled_projection_dim=POOLED_WIDTH, rope_axes_dim=(4, 6, 6),
        ),
        vae=AutoencoderKLHunyuanVideo(
            latent_channels=16, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip


def cogvideox_from_images(model):
    return cogvideox(model, "CogVideoXImageToVideoPipeline", in_channels=32)


def cogvideox(model, pipeline_class="CogVideoXPipeline", **options):
    import diffusers
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

    if model == "1.5-5b":
        options |= {"patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 16 if "in_channels" in options else None}
    return getattr(diffusers, pipeline_class)(
        tokenizer=t5_tokenizer(),
        text_encoder=T5EncoderModel(T5Config(**_t5())),
        vae=AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
            latent_channels=16, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2,
            scaling_factor=1.15258426 if model == "2b" else 0.7, invert_scale_latents=model == "1.5-5b",
        ),
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, num_layers=2, time_embed_dim=16, text_embed_dim=TEXT_WIDTH,
            sample_width=6, sample_height=4, sample_frames=17, max_text_seq_length=226,
            use_rotary_positional_embeddings=model != "2b", **options,
        ),
        scheduler=CogVideoXDDIMScheduler(
            beta_start=0.00085, beta_end=0.0120, beta_schedule="scaled_linear", prediction_type="v_prediction",
            timestep_spacing="trailing", rescale_betas_zero_snr=True, snr_shift_scale=3.0 if model == "2b" else 1.0,
            clip_sample=False, set_alpha_to_one=True,
        ),
    )  # fmt: skip


def _t5():
    sizes = {"d_model": TEXT_WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return {**sizes, "vocab_size": len(_words()), "feed_forward_proj": "gated-gelu"}


def _vocabulary():
    ids = {f"{name}_token_id": _words()[f"[{name.upper()}]"] for name in ("pad", "bos", "eos")}
    return {"vocab_size": len(_words()), **ids}


# -- tokenizers -------------------------------------------------------------------------------------------------------


@cache
def _words():
    """The words of HunyuanVideo's template as tokens, and ASCII characters for everything else."""
    words = [word for word, _ in pre_tokenizers.WhitespaceSplit().pre_tokenize_str(_template())]
    characters = [chr(code) for code in range(33, 127)]
    tokens = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", *words, *characters, *(f"##{one}" for one in characters)]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def _template():
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    return DEFAULT_PROMPT_TEMPLATE["template"]


def _tokenizer(form, length):
    tokenizer = Tokenizer(models.WordPiece(_words(), unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(name, _words()[name]) for name in ("[BOS]", "[EOS]")]
    tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=ends)
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "bos", "eos")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **special)


def t5_tokenizer():
    return _tokenizer("$A [EOS]", 512)


def clip_tokenizer():
    return _tokenizer("[BOS] $A [EOS]", 77)


def llama_tokenizer():
    """With so much before the template that a prompt begins where the pipeline cuts: after 95 tokens."""
    before = len(pre_tokenizers.WhitespaceSplit().pre_tokenize_str(_template().split("{}")[0]))
    return _tokenizer("[BOS] " * (95 - before) + "$A", 512)


# -- recipes ----------------------------------------------------------------------------------------------------------

VIDEO = {"num_frames": 9, "height": 32, "width": 48}
BACKBONES = {
    "wan": {"kind": "wan", "guidance": {"mode": "classifier_free", "scale": 5.0}},
    "wan22": {
        "kind": "wan",
        "boundary_ratio": 0.875,
        "guidance": {"mode": "classifier_free", "scale": {"transformer": 4.0, "transformer_2": 3.0}},
    },
    "hunyuan_video": {"kind": "hunyuan_video", "guidance": {"mode": "embedded", "scale": 6.0}},
    "cogvideox_2b": {"kind": "cogvideox", "model": "2b", "guidance": {"mode": "classifier_free", "scale": 6.0}},
    "cogvideox_5b": {"kind": "cogvideox", "model": "5b", "guidance": {"mode": "classifier_free", "scale": 6.0}},
    "wan_i2v": {"kind": "wan", "guidance": {"mode": "classifier_free", "scale": 5.0}},
    "wan_flf2v": {"kind": "wan", "guidance": {"mode": "classifier_free", "scale": 5.0}},
    "wan22_i2v": {"kind": "wan", "boundary_ratio": 0.875, "guidance": {"mode": "classifier_free", "scale": 3.5}},
    "ltx": {"kind": "ltx", "guidance": {"mode": "classifier_free", "scale": 3.0}},
    "cogvideox_5b_i2v": {"kind": "cogvideox", "model": "5b", "guidance": {"mode": "classifier_free", "scale": 6.0}},
    "cogvideox_1.5_i2v": {
        "kind": "cogvideox", "model": "1.5-5b", "guidance": {"mode": "classifier_free", "scale": 6.0},
    },
}  # fmt: skip


def pipeline_recipe(family, folder, **changes):
    """Two experts on a saved pipeline, a step of training each, so fast that both can be told from the teacher."""
    lora = {"kind": "lora", "rank": 2, "alpha": 4}
    experts = {"semantic": {"kind": "full"}, "detail": {**lora, "from": "semantic"}}
    router = {"kind": "timestep", "experts": ["semantic", "detail"], "boundaries": [{"point": 4}]}
    trajectory = {"kind": "flow_matching", "num_steps": 8, "shift": 5.0}
    if family.startswith("wan22"):
        experts = {"semantic": {**lora, "base": "transformer"}, "detail": {**lora, "base": "transformer_2"}}
        router |= {"boundaries": [{"ratio": 0.875}], "closed": "high"}
    if family.startswith("cogvideox"):
        trajectory = {"kind": "native", "num_steps": 8}
    return {
        "name": f"tiny_{family}",
        "backbone": {**BACKBONES[family], "pretrained": str(folder), "video": VIDEO},
        "trajectory": trajectory,
        "router": router,
        "experts": experts,
        "data": {"kind": "latents", "path": None},
        "training": {"batch_size": 1},
        "stages": [distil_fast("semantic"), distil_fast("detail")],
        "sample": {"steps": 4},
        **changes,
    }


def distil_fast(expert, **changes):
    losses, optimizer = [{"kind": "huber"}], {"lr": 0.01}
    stage = {"name": expert, "kind": "consistency", "expert": expert, "steps": 1, "optimizer": optimizer}
    return {**stage, "losses": losses, **changes}
