"""Parameters by name, looked up where they are now."""

from collections.abc import Callable, ItemsView, Iterator, Mapping, Sequence, ValuesView

from torch import nn

from moedistill.runtime.sharding import rest


class LiveParameters(Mapping[str, nn.Parameter]):
    """A mapping of names to a network's parameters that never holds one of them.

    `fully_shard`, quantisation and others put new tensors in the place of a network's; whoever kept the old ones would
    train, average, save and export tensors that no forward reads, and see no error.

    Args:
        network: where they live.
        names: in order.
        place: the dotted path of a name in the network, as it is now.
    """

    def __init__(self, network: nn.Module, names: Sequence[str], place: Callable[[str], str] = str) -> None:
        self._network, self._names, self._place = network, tuple(names), place
        self._known = frozenset(self._names)

    def __getitem__(self, name: str) -> nn.Parameter:
        if name not in self._known:
            raise KeyError(name)
        rest(self._network)
        return self._look_up(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def items(self) -> ItemsView[str, nn.Parameter]:
        """Names and parameters as they are now."""
        return self._now().items()

    def values(self) -> ValuesView[nn.Parameter]:
        """The parameters as they are now."""
        return self._now().values()

    def _now(self) -> dict[str, nn.Parameter]:
        rest(self._network)
        return {name: self._look_up(name) for name in self._names}

    def _look_up(self, name: str) -> nn.Parameter:
        return self._network.get_parameter(self._place(name))
