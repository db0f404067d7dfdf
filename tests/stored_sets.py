"""Small stored sets, in the published layout and in our own."""

import json

import torch
from safetensors.torch import save_file

from moedistill.data.base import Sample
from moedistill.data.latents import write_latents

SHAPES = [(4, 3, 2, 2), (4, 5, 2, 2), (4, 3, 2, 2)]
NAMES = [f"video.{i}.pt" for i in range(3)]


def tensors(i, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(i)
    latents = torch.randn(SHAPES[i], generator=generator).to(dtype)
    text = torch.randn(6, 8, generator=generator).to(torch.float16)
    return latents, {"prompt_embeds": text, "prompt_attention_mask": torch.arange(6) < 3 + i}


def write_published(folder, batch_dimension=False, zipped=True, entries=None):
    """A published set of three samples; gives its index file."""
    for name in ("latent", "prompt_embed", "prompt_attention_mask"):
        (folder / name).mkdir(parents=True)
    for i, name in enumerate(NAMES):
        latents, text = tensors(i)
        latents = latents[None] if batch_dimension else latents
        options = {"_use_new_zipfile_serialization": zipped}
        torch.save(latents, folder / "latent" / name, **options)
        torch.save(text["prompt_embeds"], folder / "prompt_embed" / name, **options)
        torch.save(text["prompt_attention_mask"], folder / "prompt_attention_mask" / name, **options)
    return write_index(folder, [entry(i) for i in range(3)] if entries is None else entries)


def entry(i, **changes):
    keys = ("latent_path", "prompt_embed_path", "prompt_attention_mask")
    return {**dict.fromkeys(keys, NAMES[i]), "caption": f"caption {i}", **changes}


def write_index(folder, entries):
    index = folder / "videos2caption.json"
    index.write_text(json.dumps(entries))
    return index


def write_own(folder, **options):
    write_latents(folder, (Sample(*tensors(i)) for i in range(3)), **options)
    return folder


def write_version_1(folder, samples, captions=None):
    """A set of our own layout as it was at first: a file for each sample."""
    folder.mkdir(exist_ok=True)
    entries = []
    for i, sample in enumerate(samples):
        save_file({"latents": sample.latents, **sample.conditioning}, folder / f"{i:08}.safetensors")
        entries.append({"file": f"{i:08}.safetensors", "shape": list(sample.latents.shape)})
        if captions is not None:
            entries[i]["caption"] = captions[i]
    index = {"format": "moedistill-latents", "version": 1, "samples": entries, "negative": None}
    (folder / "index.json").write_text(json.dumps(index))
    return folder
