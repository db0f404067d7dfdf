"""Which bytes of tensors are alive, and what of it at most and where; floating-point operations. On any device.

Counted by storage, from one operation to the next: what an operation takes only within itself is not seen.
"""

import weakref
from bisect import bisect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

OTHER = "other"
"""The kind of all that nobody has named: activations, gradients on their way, what an operation makes in passing."""


Alive = tuple[int, ...]
"""Bytes by kind, in the order of `Tracker.watched`."""


@dataclass
class Passage:
    """A part of a step.

    Attributes:
        name: for people.
        most: where the most is alive of all kinds together, by place among the blocks.
        most_of_first: the same of the first kind alone.
        flops: of its operations.
    """

    name: str
    most: dict[str, Alive] = field(default_factory=dict)
    most_of_first: dict[str, Alive] = field(default_factory=dict)
    flops: int = 0

    def see(self, place: str, alive: Alive) -> None:
        """Looks at what is alive after an operation at `place`."""
        if place not in self.most or sum(alive) > sum(self.most[place]):
            self.most[place] = alive
        if place not in self.most_of_first or alive[0] > self.most_of_first[place][0]:
            self.most_of_first[place] = alive


class Tracker(TorchDispatchMode):
    """Counts while it is entered, and of what was there before what it is told of.

    Args:
        watched: kinds of bytes, of which passages keep the numbers.
        operate: carries an operation out; as it is, if not given.
        stored: the tensor whose storage counts as that of another.

    Attributes:
        bytes: alive now, by kind.
        peak: the largest number of all kinds together since it was last set.
        passages: the parts of what was done, in order, with what nobody named as "".
    """

    def __init__(
        self,
        watched: Iterable[str] = (OTHER,),
        operate: Callable[..., Any] | None = None,
        stored: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        super().__init__()
        self.watched = tuple(watched)
        self.bytes: dict[str, int] = defaultdict(int)
        self.peak = 0
        self.passages: list[Passage] = [Passage("")]
        self._open = [self.passages[0]]
        self._known: dict[int, tuple[Any, int, str]] = {}
        self._operate, self._stored = operate, stored
        self._place = ""
        self._places: list[tuple[int, str]] = [(-1, "")]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs) if self._operate is None else self._operate(func, args, kwargs)
        for leaf in (made,) if isinstance(made, Tensor) else tree_leaves(made):
            if isinstance(leaf, Tensor) and self._is_new(leaf, args, kwargs):
                self.hold(leaf)
        counted = flop_registry.get(func._overloadpacket)
        if counted is not None:
            self.compute(counted(*args, **kwargs, out_val=made))
        self._open[-1].see(self._place or self._place_in_backward(), tuple(self.bytes[kind] for kind in self.watched))
        self.peak = max(self.peak, self.now())
        return made

    def _is_new(self, made: Tensor, args: Any, kwargs: Any) -> bool:
        """Whether an operation made a tensor, and did not only look at what was there before it was entered."""
        place = self._stored(made).untyped_storage()._cdata
        if place in self._known:
            return False
        given = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return all(self._stored(leaf).untyped_storage()._cdata != place for leaf in given)

    def now(self) -> int:
        """Bytes that are alive, of all kinds."""
        return sum(self.bytes.values())

    def compute(self, flops: int) -> None:
        """Adds floating-point operations of the passage under way."""
        self._open[-1].flops += flops

    def hold(self, tensor: Tensor, kind: str | None = None) -> None:
        """Counts a tensor's storage as of a kind until it is freed; what is known keeps its own, if none is given."""
        storage = self._stored(tensor).untyped_storage()
        place = storage._cdata
        known = self._known.get(place)
        if known is not None:
            if kind is None or kind == known[2]:
                return
            self._forget(place)
        size, kind = storage.nbytes(), kind or OTHER
        self._known[place] = (weakref.ref(storage, lambda _: self._forget(place)), size, kind)
        self.bytes[kind] += size

    def _forget(self, place: int) -> None:
        known = self._known.pop(place, None)
        if known is not None:
            self.bytes[known[2]] -= known[1]

    @contextmanager
    def passage(self, name: str) -> Iterator[None]:
        """What the block does is a part of the step of its own."""
        self._open.append(Passage(name))
        self.passages.append(self._open[-1])
        self._place = ""
        try:
            yield
        finally:
            self._open.pop()
            self._place = ""  # a block that is recomputed stops where nothing more is needed, and is never left

    def place(self, module: nn.Module, name: str) -> None:
        """Lets what a module computes, and the gradients of that, have a place of this name, anew each time."""
        times = count(1)

        def enter(*_: Any) -> None:
            self._place = f"{name}, {next(times)}"
            self._places.append((torch.autograd._get_sequence_nr(), self._place))

        def leave(*_: Any) -> None:
            self._place = ""
            self._places.append((torch.autograd._get_sequence_nr(), ""))

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def _place_in_backward(self) -> str:
        """Where in the forward pass the gradient was made that is computed now, by autograd's own numbers."""
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return ""
        return self._places[bisect(self._places, node._sequence_nr(), key=lambda each: each[0]) - 1][1]

    @property
    def under_way(self) -> str:
        """The name of the passage."""
        return self._open[-1].name

    @property
    def flops(self) -> int:
        """Of all passages."""
        return sum(passage.flops for passage in self.passages)


def attention_flops(query: torch.Size, key: torch.Size, value: torch.Size) -> int:
    """Of attention forwards, of `[B, heads, tokens, width]`: both products."""
    *batch, queries, width = query
    count = 1
    for size in batch:
        count *= size
    return 2 * count * queries * key[-2] * (width + value[-1])
