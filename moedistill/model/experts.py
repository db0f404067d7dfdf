"""Experts: named changes to a shared set of base weights.

A network is never duplicated but for a `full` expert. Everything else is attached to it: see `SharedNetwork`.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt, Le
from pydantic import Field
from torch import Tensor, nn

from moedistill.components.fields import Config, NonEmptyStr, PositiveFloat
from moedistill.model.backbone import QUANTIZED, TEACHER, Backbone
from moedistill.model.live_parameters import LiveParameters
from moedistill.model.shared_network import SharedNetwork
from moedistill.runtime.quantized import quantized_in
from moedistill.runtime.randomness import torch_seed
from moedistill.runtime.sharding import fill, rest


@dataclass(kw_only=True)
class ExpertConfig(Config, ABC):
    """Recipe keys common to all experts.

    Args:
        from: what the expert starts as: `teacher` or another expert.
        base: which of the teacher's networks it changes, where there are several; that of `from`, if not given.
        init: weights to start with, in place of those of `from`: an export, a run or a checkpoint that has an expert
            like it of the same name, or `PATH#NAME` where that has another; null for none.
    """

    parent: Annotated[NonEmptyStr, Field(alias="from")] = TEACHER
    base: NonEmptyStr | None = None
    init: NonEmptyStr | None = None
    trainable: ClassVar[bool] = True
    copies_base: ClassVar[bool] = False

    @abstractmethod
    def build(self, name: str, parent: "Expert", backbone: Backbone, inference: bool = False) -> "Expert":
        """Attaches the expert's modules; what they hold is decided later, by `Expert.initialise`.

        For `inference` a copy of the base has its dtype; what is trained is float32.
        """


@dataclass(kw_only=True)
class FullConfig(ExpertConfig):
    """A copy of all weights of its own, float32."""

    copies_base: ClassVar[bool] = True

    def build(self, name: str, parent: "Expert", backbone: Backbone, inference: bool = False) -> "Expert":
        return FullExpert(name, parent, inference)


@dataclass(kw_only=True)
class LoRAConfig(ExpertConfig):
    """A low-rank adapter on chosen linears of the frozen parent, and own copies of chosen modules.

    Args:
        rank, alpha: the adapter adds alpha/rank · B·A to a linear's weight. A rank above the width of all of them is
            refused: B·A has at most that.
        targets: names of the backbone's groups of linears (such as `attention`).
        copies: modules trained in full: the backbone's `time_dependent` ones, `none`, or exact dotted paths.
    """

    rank: Annotated[int, Gt(0), Le(16_384)] = 128
    alpha: PositiveFloat = 256.0
    targets: NonEmptyStr | list[NonEmptyStr] = "attention"
    copies: Literal["time_dependent", "none"] | list[NonEmptyStr] = "time_dependent"

    def build(self, name: str, parent: "Expert", backbone: Backbone, inference: bool = False) -> "Expert":
        return LoRAExpert(name, parent, backbone, self)


@dataclass(kw_only=True)
class FrozenConfig(ExpertConfig):
    """Its parent as it is: the untouched teacher, or another expert's weights."""

    trainable: ClassVar[bool] = False

    def build(self, name: str, parent: "Expert", backbone: Backbone, inference: bool = False) -> "Expert":
        return FrozenExpert(name, parent)


class Expert(ABC):
    """A behaviour of a shared network: which network, and what is switched on in it.

    Attributes:
        name: as the recipe calls it.
        shared: the network it runs on.
        chain: what is switched on there.
        parameters: what its training changes, by name, float32; names do not depend on what else is attached, and
            tensors are looked up when they are asked for.
    """

    name: str
    parent: "Expert | None"
    shared: SharedNetwork
    chain: tuple[str, ...]
    parameters: LiveParameters

    @property
    def saved(self) -> Mapping[str, Tensor]:
        """`parameters` as they were trained, float32: a full expert that rests may have them in another dtype."""
        return self.parameters

    def rest(self) -> None:  # noqa: B027  most have nothing that could
        """Called when it is not to be trained now."""

    def wake(self) -> None:  # noqa: B027
        """Called when it is to be trained."""

    @abstractmethod
    def initialise(self, seed: int) -> None:
        """Makes the expert equal to its parent, in place; random numbers come from `seed` and the expert's name."""

    def merged(self) -> dict[str, Tensor]:
        """The weights of a plain network equal to this expert, by the network's own names, float32."""
        return {name: weight.clone() for name, weight in self.shared.merged(self.chain)}


class FrozenExpert(Expert):
    """Its parent's behaviour under another name; without a parent, the teacher itself."""

    def __init__(self, name: str, parent: Expert | None, shared: SharedNetwork | None = None) -> None:
        assert (parent is None) != (shared is None)
        self.name, self.parent = name, parent
        self.shared, self.chain = (parent.shared, parent.chain) if parent else (shared, ())  # type: ignore[assignment]
        self.parameters = LiveParameters(self.shared.network, ())

    def initialise(self, seed: int) -> None:
        """Nothing to do: it holds nothing of its own."""


class FullExpert(Expert):
    """A network of its own, float32 while it is trained; else it rests in the dtypes of the base."""

    def __init__(self, name: str, parent: Expert, inference: bool = False) -> None:
        if quantized_in(parent.shared.network):
            raise ValueError(f"expert {name}: {QUANTIZED}")
        self.name, self.parent, self.chain = name, parent, ()
        network = copy.deepcopy(parent.shared.network)
        dtypes = {key: parameter.dtype for key, parameter in network.named_parameters()}
        self.shared = SharedNetwork(network) if inference else SharedNetwork(network.float(), dtypes)
        self.parameters = self.shared.weights

    @property
    def saved(self) -> Mapping[str, Tensor]:
        return self.shared.saved

    def rest(self) -> None:
        self.shared.rest()

    def wake(self) -> None:
        self.shared.wake()

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        assert self.parent is not None
        self.wake()
        for name, weight in self.parent.shared.merged(self.parent.chain):
            fill(self.parameters[name], weight)


class LoRAExpert(Expert):
    """Adapters and copied modules on the parent's network, on top of whatever the parent switches on."""

    def __init__(self, name: str, parent: Expert, backbone: Backbone, config: LoRAConfig) -> None:
        self.name, self.parent, self.shared = name, parent, parent.shared
        self._key = f"expert_{name}"
        self.chain = (*parent.chain, self._key)
        paths = self._copied_paths(config, backbone)
        inside_copies = tuple(f"{path}." for path in paths)
        linears = [path for path in self._target_linears(config, backbone) if not f"{path}.".startswith(inside_copies)]
        if not linears:
            raise ValueError(
                f"expert {name}: no linear to adapt: all the linears of targets lie inside the copied modules"
            )
        self.shared.claim(name, linears, paths)
        self.shared.add_lora(self._key, linears, rank=config.rank, alpha=config.alpha)
        copies = {path: self.shared.add_copy(self._key, path) for path in paths}
        self._linears, self._copied = linears, paths
        self._places = {
            **{f"{path}.lora_A.weight": f"{path}.lora_A.{self._key}.weight" for path in linears},
            **{f"{path}.lora_B.weight": f"{path}.lora_B.{self._key}.weight" for path in linears},
            **{
                f"{path}.{name}": f"{path}.copies.{self._key}.{name}"
                for path, module in copies.items()
                for name, _ in module.named_parameters()
            },
        }
        self.parameters = LiveParameters(self.shared.network, list(self._places), self._places.__getitem__)

    def _target_linears(self, config: LoRAConfig, backbone: Backbone) -> list[str]:
        groups = [config.targets] if isinstance(config.targets, str) else config.targets
        linears: list[str] = []
        for group in groups:
            if group not in backbone.lora_targets:
                raise ValueError(
                    f"expert {self.name}: the backbone has no group of linears {group!r}; "
                    f"it has {', '.join(backbone.lora_targets)}"
                )
            matching = self.shared.linears(backbone.lora_targets[group])
            if not matching:
                raise ValueError(
                    f"expert {self.name}: the group {group!r} matches no linear of the network; its pattern is "
                    f"{backbone.lora_targets[group]}, which must match a whole dotted path"
                )
            linears += matching
        return list(dict.fromkeys(linears))

    def _copied_paths(self, config: LoRAConfig, backbone: Backbone) -> list[str]:
        if config.copies == "none":
            return []
        paths = list(backbone.time_dependent) if config.copies == "time_dependent" else list(config.copies)
        for path in paths:
            if path not in self.shared.paths:
                raise ValueError(
                    f"expert {self.name}: the network has no module {path!r} to copy; its time-dependent ones are "
                    f"{', '.join(backbone.time_dependent)}"
                )
        return paths

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        assert self.parent is not None
        rest(self.shared.network)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(seed, "expert", self.name))
            for path in self._linears:
                # As peft initialises it, drawn whole: a part of it is then the same however many processes there are.
                a = torch.empty(self.parameters[f"{path}.lora_A.weight"].shape)
                fill(self.parameters[f"{path}.lora_A.weight"], nn.init.kaiming_uniform_(a, a=math.sqrt(5)))
                self.parameters[f"{path}.lora_B.weight"].zero_()
        for path in self._copied:
            for name, weight in self.shared.active_weights(path, self.parent.chain).items():
                fill(self.parameters[f"{path}.{name}"], weight)
