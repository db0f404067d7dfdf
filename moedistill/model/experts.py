"""Experts: named changes to a shared set of base weights.

A network is never duplicated but for a `full` expert. Everything else is attached to it: low-rank adapters (peft) and
copies of whole modules, which `SharedNetwork.switch` turns on and off. Switching never touches `requires_grad` (or a
switch between forward and backward would drop gradients silently) and costs a loop over a cached list.
"""

import copy
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moedistill.backbone import Backbone
from moedistill.fields import Config, NonEmptyStr, PositiveFloat, PositiveInt
from moedistill.randomness import torch_seed

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

TEACHER = "teacher"
"""The reserved name of the pretrained weights with nothing active."""


def teacher_name(base: str, bases: Sequence[str]) -> str:
    """The name of one of the teacher's networks as an expert: `teacher` for the first, `teacher.base` for others."""
    return TEACHER if base == bases[0] else f"{TEACHER}.{base}"


@dataclass(kw_only=True)
class ExpertConfig(Config, ABC):
    """Recipe keys common to all experts.

    Args:
        from: what the expert starts as: `teacher` or another expert.
        base: which of the teacher's networks it changes, where there are several; that of `from`, if not given.
    """

    parent: Annotated[NonEmptyStr, Field(alias="from")] = TEACHER
    base: NonEmptyStr | None = None
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
        rank, alpha: the adapter adds alpha/rank · B·A to a linear's weight.
        targets: names of the backbone's groups of linears (such as `attention`).
        copies: modules trained in full: the backbone's `time_dependent` ones, `none`, or exact dotted paths.
    """

    rank: PositiveInt = 128
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


class Copies(nn.Module):
    """Stands in a module's place and runs the active expert's copy of it, or the original."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.copies = nn.ModuleDict()
        self.active: str | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module = self.original if self.active is None else self.copies[self.active]
        return module(*args, **kwargs)


class SharedNetwork:
    """A network, the adapters and copies attached to it, and the switch between them.

    Attributes:
        network: the module to call; which expert it computes is what was last switched on.
        weights: its own parameters by their names before anything was attached.
        paths: dotted paths of its modules, as they were then.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.weights: dict[str, nn.Parameter] = dict(network.named_parameters())
        self.paths = frozenset(path for path, _ in network.named_modules())
        self._linears = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
        self._lora: dict[str, LoraLayer] = {}
        self._copies: dict[str, Copies] = {}
        self._adapted_by: list[tuple[str, str]] = []
        self._copied_by: list[tuple[str, str]] = []
        self.chain: tuple[str, ...] = ()

    def linears(self, pattern: str) -> list[str]:
        """Dotted paths of the linears that a regular expression matches in full."""
        return [path for path in self._linears if re.fullmatch(pattern, path)]

    def claim(self, expert: str, adapted: Sequence[str], copied: Sequence[str]) -> None:
        """Notes which linears and modules an expert is about to adapt and copy.

        Raises:
            ValueError: an expert's copy would hide what is changed inside of the original.
        """
        self._adapted_by += [(path, expert) for path in adapted]
        self._copied_by += [(path, expert) for path in copied]
        for outer, copying in self._copied_by:
            hidden = [(inner, other) for inner, other in self._adapted_by if f"{inner}.".startswith(f"{outer}.")]
            hidden += [(inner, other) for inner, other in self._copied_by if inner.startswith(f"{outer}.")]
            for inner, other in hidden:
                raise ValueError(
                    f"expert {expert}: {inner!r} lies inside {outer!r}: {copying} runs a copy of that, without what "
                    f"{other} changes in it. Copy the same modules in both, or let one expert be full"
                )

    def add_lora(self, name: str, paths: Sequence[str], *, rank: int, alpha: float) -> "dict[str, LoraLayer]":
        """Attaches a float32 adapter to the linears at `paths`; returns the adapted layers by path."""
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        # A regular expression of exact paths: peft matches a list of names by suffix.
        pattern = "|".join(map(re.escape, paths))
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern)  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what we want
            inject_adapter_in_model(config, self.network, adapter_name=name)
        layers: dict[str, LoraLayer] = {}
        for path in paths:
            layer = self.network.get_submodule(path)
            assert isinstance(layer, LoraLayer), f"peft did not adapt {path}"
            layer.lora_A[name].float()
            layer.lora_B[name].float()
            layers[path] = layer
        self._lora.update(layers)
        self.switch(self.chain)
        return layers

    def add_copy(self, name: str, path: str) -> nn.Module:
        """Attaches a float32 copy of the module at `path`; returns the copy."""
        if path not in self._copies:
            parent_path, _, attribute = path.rpartition(".")
            wrapper = Copies(self.network.get_submodule(path))
            setattr(self.network.get_submodule(parent_path), attribute, wrapper)
            self._copies[path] = wrapper
        module = copy.deepcopy(self._copies[path].original).float()
        self._copies[path].copies[name] = module
        return module

    def switch(self, chain: tuple[str, ...]) -> None:
        """Turns on exactly the adapters in `chain`; of the copies of a module, the last in the chain runs."""
        self.chain = chain
        for layer in self._lora.values():
            layer._active_adapter = list(chain)
            layer._disable_adapters = not chain
        for wrapper in self._copies.values():
            wrapper.active = next((name for name in reversed(chain) if name in wrapper.copies), None)

    def active_module(self, path: str, chain: tuple[str, ...]) -> nn.Module:
        """The module that runs at a copied `path` when `chain` is on."""
        wrapper = self._copies[path]
        return next((wrapper.copies[name] for name in reversed(chain) if name in wrapper.copies), wrapper.original)

    def merged(self, chain: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        """Names and weights, one by one, of the plain network that computes what `chain` does: float32, read-only."""
        copied = {
            f"{path}.{name}": weight
            for path in self._copies
            for name, weight in self.active_module(path, chain).named_parameters()
        }
        for name, own in self.weights.items():
            weight = copied.get(name, own).detach().float()
            layer = self._lora.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            for key in chain:
                if layer is not None and key in layer.lora_A:
                    weight = weight + layer.get_delta_weight(key).detach()  # type: ignore[attr-defined]
            yield name, weight


class Expert(ABC):
    """A behaviour of a shared network: which network, and what is switched on in it.

    Attributes:
        name: as the recipe calls it.
        shared: the network it runs on.
        chain: what is switched on there.
        parameters: what its training changes, by name, float32; names do not depend on what else is attached.
    """

    name: str
    parent: "Expert | None"
    shared: SharedNetwork
    chain: tuple[str, ...]
    parameters: Mapping[str, nn.Parameter]

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
        self.parameters = {}

    def initialise(self, seed: int) -> None:
        """Nothing to do: it holds nothing of its own."""


class FullExpert(Expert):
    """A network of its own."""

    def __init__(self, name: str, parent: Expert, inference: bool = False) -> None:
        self.name, self.parent, self.chain = name, parent, ()
        network = copy.deepcopy(parent.shared.network)
        self.shared = SharedNetwork(network if inference else network.float())
        self.parameters = self.shared.weights

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        assert self.parent is not None
        for name, weight in self.parent.shared.merged(self.parent.chain):
            self.parameters[name].copy_(weight)


def _weight(linear: nn.Module) -> nn.Parameter:
    weight = linear.weight
    assert isinstance(weight, nn.Parameter)
    return weight


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
        self._layers = self.shared.add_lora(self._key, linears, rank=config.rank, alpha=config.alpha)
        self._copies = {path: self.shared.add_copy(self._key, path) for path in paths}
        self.parameters = {
            **{f"{path}.lora_A.weight": _weight(layer.lora_A[self._key]) for path, layer in self._layers.items()},
            **{f"{path}.lora_B.weight": _weight(layer.lora_B[self._key]) for path, layer in self._layers.items()},
            **{
                f"{path}.{name}": parameter
                for path, module in self._copies.items()
                for name, parameter in module.named_parameters()
            },
        }

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
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(seed, "expert", self.name))
            for layer in self._layers.values():
                layer.reset_lora_parameters(self._key, init_lora_weights=True)  # A random, B zero
        for path, module in self._copies.items():
            source = dict(self.shared.active_module(path, self.parent.chain).named_parameters())
            for name, parameter in module.named_parameters():
                parameter.copy_(source[name])
