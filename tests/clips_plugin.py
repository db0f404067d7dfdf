"""Datasets of a stranger for a tiny Wan: `fine`, and those that do not fit, each in one way."""

from dataclasses import dataclass

import torch

from moedistill import Dataset, DatasetConfig, Sample, hookimpl

SIZE = (16, 5, 4, 6)
WIDTH = 24


def latents(*shape, dtype=torch.float32):
    return torch.randn(shape or SIZE, generator=torch.Generator().manual_seed(0)).to(dtype)


def text(*shape):
    return {"prompt_embeds": torch.randn(shape or (12, WIDTH), generator=torch.Generator().manual_seed(1))}


SAMPLES = {
    "fine": lambda: Sample(latents(), text()),
    "half": lambda: Sample(latents(dtype=torch.bfloat16), text()),
    "no sample": lambda: (latents(), text()),
    "nothing": lambda: None,
    "numpy": lambda: Sample(latents().numpy(), text()),
    "missing latents": lambda: Sample(None, text()),
    "frame": lambda: Sample(latents(16, 4, 6), text()),
    "batched": lambda: Sample(latents(1, *SIZE), text()),
    "integers": lambda: Sample(latents(dtype=torch.int64), text()),
    "channels": lambda: Sample(latents(8, 5, 4, 6), text()),
    "odd": lambda: Sample(latents(16, 5, 4, 5), text()),
    "no text": lambda: Sample(latents(), {}),
    "other text": lambda: Sample(latents(), {"words": torch.zeros(3)}),
    "strings": lambda: Sample(latents(), {"prompt_embeds": "a dog"}),
    "no mapping": lambda: Sample(latents(), [text()["prompt_embeds"]]),
    "no conditioning": lambda: Sample(latents(), None),
    "narrow": lambda: Sample(latents(), text(12, 8)),
    "batched text": lambda: Sample(latents(), text(1, 12, WIDTH)),
    "later frame": lambda: Sample(latents(), text()),
    "later shape": lambda: Sample(latents(), text()),
    "later text": lambda: Sample(latents(), text()),
    "other shape": lambda: Sample(latents(), text()),
    "short shape": lambda: Sample(latents(), text()),
    "no shape": lambda: Sample(latents(), text()),
    "empty": lambda: Sample(latents(), text()),
    "null text": lambda: Sample(latents(), text()),
    "null batched": lambda: Sample(latents(), text()),
}
LATER = {
    "later frame": lambda: Sample(latents(16, 4, 6), text()),
    "later shape": lambda: Sample(latents(16, 3, 4, 6), text()),
    "later text": lambda: Sample(latents(), {"prompt_embeds": None}),
}
SHAPES = {"other shape": (16, 5, 4, 8), "short shape": (16, 5, 4), "no shape": None}
NULLS = {"null text": {"prompt_embeds": "no"}, "null batched": text(1, 12, WIDTH)}


class Clips(Dataset):
    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 0 if self.how == "empty" else 4

    def __getitem__(self, index):
        return LATER.get(self.how, SAMPLES[self.how])() if index == 2 else SAMPLES[self.how]()

    def shape(self, index):
        return SHAPES[self.how] if self.how in SHAPES else super().shape(index)

    def null_conditioning(self):
        return NULLS.get(self.how, text())


@dataclass(kw_only=True)
class ClipsConfig(DatasetConfig):
    how: str = "fine"

    def build(self, backbone):
        return Clips(self.how)

    def tiny(self):
        return self


@hookimpl
def register_components(components):
    components.register("dataset", "clips", ClipsConfig, "a stranger's")
