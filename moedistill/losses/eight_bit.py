"""AdamW whose moments are kept in 8 bits, by torchao: it is imported with this module."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torchao.optim import AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit

SIGNED = {"exp_avg": True, "exp_avg_sq": False}
"""The moments, and whether they have a sign."""


class Int8AdamW(AdamW8bit):
    """torchao's AdamW, with a saved state of plain tensors: of each 8-bit moment its `codes` and `scale`.

    Moments of parameters with fewer than 4096 elements, or not a multiple of the block's 256, stay as they are.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """It is compiled, once for each shape; on a CPU, where that takes longer than it saves, it just runs."""
        on_cpu = all(each.device.type == "cpu" for group in self.param_groups for each in group["params"])
        with torch.compiler.set_stance("force_eager") if on_cpu else nullcontext():
            return super().step(closure)

    def form_of(self, parameter: Tensor) -> dict[str, Any]:
        """The moments of a parameter as a state has them, without memory."""
        like = torch.empty_like(parameter, device="meta")
        return {name: _plain(self._new_buffer(like, signed)) for name, signed in SIGNED.items()}

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        plain = {
            number: {name: _plain(value) for name, value in each.items()} for number, each in state["state"].items()
        }
        return {**state, "state": plain}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        packed = {
            number: {name: _packed(name, value) for name, value in each.items()}
            for number, each in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": packed})
        for group in self.param_groups:  # a rate is a tensor here, and beside its parameters when it is new
            group["lr"] = group["lr"].to(group["params"][0].device)


def _plain(moment: Any) -> Any:
    if not isinstance(moment, OptimState8bit):
        return moment
    return {"codes": moment.codes, "scale": moment.scale}


def _packed(name: str, moment: Any) -> Any:
    if not isinstance(moment, Mapping):
        return moment
    codes, scale, signed = moment["codes"], moment["scale"], SIGNED[name]
    values = OptimState8bit.zeros((1,), signed, 1, codes.device).qmap
    return OptimState8bit(codes, scale, values, signed, dtype=torch.float32)
