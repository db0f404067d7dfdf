"""A network without weights; and random ones, bit for bit those of a network that is made whole, without one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Puts what modules are given as parameters in the block on torch's meta device; buffers stay real."""

    def emptied(module: nn.Module, name: str, parameter: nn.Parameter) -> Any:
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(emptied)
    try:
        yield
    finally:
        hook.remove()


def draw(make: Callable[[], nn.Module], take: Callable[[str, Tensor], object], seed: int) -> None:
    """Makes a network, handing the tensors of each module to `take` when it is attached to another, and dropping them.

    A network draws its numbers as its modules are made, so nothing but making it gives the same ones. It is made once
    more before, on torch's meta device, where parameters that are registered in the same order get their names.

    Raises:
        ValueError: it changes a module after that was attached.
    """
    with torch.device("meta"), _registered() as order:
        known = {id(parameter): name for name, parameter in make().named_parameters()}
    names = [known.get(id(parameter)) for parameter in order]
    taken: dict[int, int] = {}

    def hand_over(module: nn.Module) -> None:
        mine = {id(parameter) for parameter in module.parameters()}
        for number, parameter in enumerate(made):
            name = names[number]
            if name is not None and number not in taken and id(parameter) in mine:
                take(name, parameter.detach())
                parameter.data = parameter.data.new_empty(0)
                taken[number] = parameter._version

    with torch.random.fork_rng(devices=[]), _registered() as made:
        torch.manual_seed(seed)
        hook = register_module_module_registration_hook(lambda _, __, module: hand_over(module))
        try:
            network = make()
        finally:
            hook.remove()
        hand_over(network)
    if changed := [names[number] for number, version in taken.items() if made[number]._version != version]:
        raise ValueError(f"{type(network).__name__} changes {changed[0]} after it is made; give it weights in a folder")
    own = dict(network.named_parameters())
    for name, buffer in network.state_dict().items():
        if name not in own:
            take(name, buffer)


@contextmanager
def _registered() -> Iterator[list[nn.Parameter]]:
    """All parameters that modules are given in the block, in order."""
    order: list[nn.Parameter] = []
    hook = register_module_parameter_registration_hook(lambda _, __, parameter: order.append(parameter))
    try:
        yield order
    finally:
        hook.remove()
