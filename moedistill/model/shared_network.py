"""A network that several experts share, what is attached to it, and the switch between them.

Attached are low-rank adapters (peft) and copies of whole modules. Switching never touches `requires_grad` (or a switch
between forward and backward would drop gradients silently) and costs a loop over a cached list.
"""

import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moedistill.model.live_parameters import LiveParameters
from moedistill.runtime.devices import HOST
from moedistill.runtime.quantized import plain, quantized_in
from moedistill.runtime.sharding import is_sharded, rest, whole

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


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

    Args:
        network: the module to call; which expert it computes is what was last switched on.
        resting: of one that is trained, float32: the dtypes of its parameters while it is not.

    Attributes:
        weights: its own parameters by their names before anything was attached, wherever they are now.
        paths: dotted paths of its modules, as they were then.
    """

    def __init__(self, network: nn.Module, resting: Mapping[str, torch.dtype] | None = None) -> None:
        self.network = network
        self._resting = resting or {}
        self._masters: dict[str, Tensor] = {}
        self.weights = LiveParameters(network, [name for name, _ in network.named_parameters()], self._place_of_weight)
        self.paths = frozenset(path for path, _ in network.named_modules())
        self._linears = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
        self._quantized = quantized_in(network)
        self._lora: dict[str, LoraLayer] = {}
        self._copies: dict[str, Copies] = {}
        self._adapted_by: list[tuple[str, str]] = []
        self._copied_by: list[tuple[str, str]] = []
        self.chain: tuple[str, ...] = ()

    def _place_of_weight(self, name: str) -> str:
        """Where one of the network's own parameters is now: what is attached to a module takes it one level down."""
        module, _, last = name.rpartition(".")
        for path in self._copies:
            if f"{module}.".startswith(f"{path}."):
                return f"{path}.original{module[len(path) :]}.{last}"
        return f"{module}.base_layer.{last}" if module in self._lora else name

    def rest(self) -> None:
        """Takes the dtypes of a network that is not trained; the float32 weights wait on the host."""
        for name, dtype in self._resting.items():
            parameter = self.weights[name]
            if parameter.dtype != dtype and not is_sharded(parameter):
                if not parameter.is_meta:
                    self._masters[name] = parameter.data.to(HOST)
                parameter.data = parameter.data.to(dtype)

    def wake(self) -> None:
        """Takes the float32 weights back."""
        for name, weight in self._masters.items():
            parameter = self.weights[name]
            parameter.data = weight.to(parameter.device)
        self._masters.clear()

    @property
    def saved(self) -> Mapping[str, Tensor]:
        """Its own weights by name, in the precision that they were trained in."""
        return {**self.weights, **self._masters}

    def linears(self, pattern: str) -> list[str]:
        """Dotted paths of the linears that a regular expression matches in full."""
        return [path for path in self._linears if re.fullmatch(pattern, path)]

    def claim(self, expert: str, adapted: Sequence[str], copied: Sequence[str]) -> None:
        """Notes which linears and modules an expert is about to adapt and copy.

        Raises:
            ValueError: an expert's copy would hide what is changed inside of the original, or would be of 8 bits.
        """
        for path in copied:
            if any(name.startswith(f"{path}.") for name in self._quantized):
                raise ValueError(
                    f"expert {expert}: {path!r} is kept in 8 bits, and copies are trained: leave it out of copies, or "
                    "leave backbone.quantization out"
                )
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
            warnings.filterwarnings("ignore", ".*`get_apply_tensor_subclass`")  # for merging into 8 bits: not done here
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

    def active_weights(self, path: str, chain: tuple[str, ...]) -> dict[str, Tensor]:
        """Parameters by name of the module that runs at a copied `path` when `chain` is on."""
        wrapper = self._copies[path]
        key = next((name for name in reversed(chain) if name in wrapper.copies), None)
        if key is not None:
            return dict(wrapper.copies[key].named_parameters())
        own = wrapper.original.named_parameters()
        return {name: self._masters.get(f"{path}.{name}", parameter) for name, parameter in own}

    def merged(self, chain: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        """Names and weights, one by one, of the plain network that computes what `chain` does.

        They are float32, to be read only, and whole on every process.
        """
        rest(self.network)
        copied = {
            f"{path}.{name}": weight
            for path in self._copies
            for name, weight in self.active_weights(path, chain).items()
        }
        for name, own in self.saved.items():
            weight = plain(whole(copied.get(name, own).detach())).float()
            layer = self._lora.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            for key in chain:
                if layer is not None and key in layer.lora_A:
                    delta = whole(layer.get_delta_weight(key).detach())  # type: ignore[attr-defined]
                    weight = weight + delta.to(weight.device)
            yield name, weight
