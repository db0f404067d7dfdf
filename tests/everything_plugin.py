"""One plugin that brings a component of every kind that a run may need and sampling does not, and a backbone's twin."""

from dataclasses import dataclass

import router_plugin
import torch
from helpers import digits_backbone

from moedistill import hookimpl
from moedistill.data.base import Dataset, DatasetConfig, Sample
from moedistill.losses import Loss, LossConfig
from moedistill.metrics import Metric, MetricConfig
from moedistill.model.backbone import BackboneConfig
from moedistill.runtime.randomness import generator
from moedistill.stages.consistency import ConsistencyConfig


class Absolute(Loss):
    def __call__(self, tensors):
        return tensors.difference.float().abs().mean()


@dataclass(kw_only=True)
class AbsoluteConfig(LossConfig):
    def build(self, layout):
        return Absolute()


class Brightness(Metric):
    def rows(self, inputs):
        return inputs.videos.flatten(1).mean(1, keepdim=True).double()


@dataclass(kw_only=True)
class BrightnessConfig(MetricConfig):
    def build(self):
        return Brightness()


class Noise(Dataset):
    def __init__(self, backbone):
        self.shape_, self.cond = backbone.latent_shape(), backbone.encode(["3 right"])

    def __len__(self):
        return 4

    def __getitem__(self, index):
        latents = torch.from_numpy(generator("noise", index).standard_normal(self.shape_, dtype="float32"))
        return Sample(latents, {name: value[0] for name, value in self.cond.items()})


@dataclass(kw_only=True)
class NoiseConfig(DatasetConfig):
    def build(self, backbone):
        return Noise(backbone)


@dataclass(kw_only=True)
class DistilConfig(ConsistencyConfig):
    """The consistency stage under another name, with a key of its own."""

    mood: str = "patient"


@dataclass(kw_only=True)
class TwinConfig(BackboneConfig):
    def build(self, seed=0):
        return digits_backbone()


@hookimpl
def register_components(components):
    components.register("loss", "absolute", AbsoluteConfig, "mean |difference|")
    components.register("metric", "brightness", BrightnessConfig, "mean of pixels")
    components.register("dataset", "noise", NoiseConfig, "noise")
    components.register("stage", "distil", DistilConfig, "consistency")
    components.register("backbone", "twin", TwinConfig, "tiny digits")
    components.register("router", "halves_too", router_plugin.HalvesConfig, "parted in the middle")
    components.register("router", "shares_too", router_plugin.SharesConfig, "by numbers of points")
