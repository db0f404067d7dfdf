"""Tensors without numbers, and what a GPU would do to them: kernels of attention, and what autocast makes float32.

Shapes, dtypes and storages are those of the real thing; nothing is computed. What is real when it comes in, such as a
noise level, stays real among its likes, so that it can be looked at; where it meets a tensor without numbers, the
result has none.
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from moedistill.runs.planning.tracker import Tracker, attention_flops

BACKWARD = 2.5
"""Attention's backward pass computes the scores once more: five products in place of two."""

FLOAT32 = (
    "layer_norm", "group_norm", "softmax.int", "log_softmax.int", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "rsqrt",
    "reciprocal", "exp", "log", "softplus", "sum", "sum.dim_IntList", "cumsum",
)  # fmt: skip
"""What autocast computes in float32 on CUDA and not on a CPU, of what video models and losses call."""


SMALL = 4096
"""Elements of a new tensor, made of no other, that is real: it may be a number that is looked at."""


class Numberless(Tensor):
    """A tensor that has no numbers, and says that it is on the CPU, so that autocast and autograd treat it so.

    Attributes:
        shape_of: the same on torch's meta device.
    """

    shape_of: Tensor

    @staticmethod
    def __new__(cls, shape_of: Tensor) -> "Numberless":
        made: Numberless = torch.Tensor._make_wrapper_subclass(
            cls, shape_of.shape, strides=shape_of.stride(), storage_offset=shape_of.storage_offset(),
            dtype=shape_of.dtype, device=torch.device("cpu"),
        )  # fmt: skip
        made.shape_of = shape_of
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return operate(func, args, kwargs or {})


def operate(func: Any, args: Any, kwargs: Any) -> Any:
    """Carries an operation out: on what is real as it is, and on shapes alone where a tensor without numbers is met.

    A large new tensor, made of no other, has none.
    """
    tensors = list(_tensors((*args, *kwargs.values())))
    if not tensors:
        if "device" not in kwargs or str(kwargs["device"]) == "meta":  # a module that is built without weights
            return func(*args, **kwargs)
        made = func(*args, **{**kwargs, "device": "meta"})
        return Numberless(made) if made.numel() > SMALL else func(*args, **kwargs)
    if not any(isinstance(tensor, Numberless) for tensor in tensors):
        return func(*args, **kwargs)
    if func._overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
        args = (args[0], [_places(index) for index in args[1]], *args[2:])
    known: dict[int, Tensor] = {}
    given = _shapes_of(args, known)
    options = {name: _shapes_of(value, known) for name, value in kwargs.items()}
    if options.get("device") is not None:
        options["device"] = "meta"
    return _numberless(_made(func, given, options, known), known)


_MADE: dict[Any, tuple[Any, ...]] = {}
"""Of element-wise operations: size, strides and dtype of what they make, by what they are given."""


def _made(func: Any, args: Any, kwargs: Any, known: dict[int, Tensor]) -> Any:
    """What an operation makes of shapes. For element-wise ones torch works that out in Python, slowly: once will do."""
    if torch.Tag.pointwise not in func.tags or func._schema.is_mutable:
        return func(*args, **kwargs)
    shapes = tuple((each.shape, each.stride(), each.dtype) for each in _tensors((*args, *kwargs.values())))
    others = tuple(type(each) if isinstance(each, Tensor) else each for each in (*args, *kwargs.items()))
    key = (func, shapes, others)
    try:
        size, strides, dtype = _MADE[key]
    except (KeyError, TypeError):
        made = func(*args, **kwargs)
        if isinstance(made, Tensor) and all(isinstance(each, int | float | bool | type | tuple) for each in others):
            _MADE[key] = (made.shape, made.stride(), made.dtype)
        return made
    return torch.empty_strided(size, strides, dtype=dtype, device="meta")


def _shapes_of(value: Any, known: dict[int, Tensor]) -> Any:
    """An argument with shapes in place of tensors; `known` says what they are of."""
    if isinstance(value, Tensor):
        shape = value.shape_of if isinstance(value, Numberless) else value.to("meta")
        known[id(shape)] = value
        return shape
    if isinstance(value, list | tuple):
        return type(value)([_shapes_of(each, known) for each in value])
    return value


def _numberless(made: Any, known: dict[int, Tensor]) -> Any:
    """What an operation made: of the tensors that it was given themselves, or new ones."""
    if isinstance(made, Tensor):
        return known[id(made)] if id(made) in known else Numberless(made)
    if isinstance(made, list | tuple):
        return type(made)([_numberless(each, known) for each in made])
    return made


class Imagined:
    """The world in which tensors have no numbers.

    Args:
        as_cuda: autocast makes float32 of what it does on CUDA; else of what it does on a CPU.
    """

    def __init__(self, watched: tuple[str, ...], *, as_cuda: bool = True) -> None:
        self._as_cuda = as_cuda
        self.tracker = Tracker(watched, operate, lambda tensor: getattr(tensor, "shape_of", tensor))

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor without numbers."""
        tensor = Numberless(torch.empty(shape, dtype=dtype, device="meta"))
        self.tracker.hold(tensor)
        return tensor

    def inhabit(self, module: nn.Module, kind: str) -> None:
        """Puts tensors without numbers in the place of a module's parameters and buffers, which may be on meta."""
        made: dict[int, Tensor] = {}
        for each in module.modules():
            for name, own in [*each._parameters.items(), *each._buffers.items()]:
                if own is None or isinstance(own, Numberless):
                    continue
                if id(own) not in made:
                    tensor = self.empty(*own.shape, dtype=own.dtype)
                    self.tracker.hold(tensor, kind)
                    made[id(own)] = nn.Parameter(tensor, own.requires_grad) if isinstance(own, nn.Parameter) else tensor
                place: Any = each._parameters if name in each._parameters else each._buffers
                place[name] = made[id(own)]

    @contextmanager
    def entered(self) -> Iterator[Tracker]:
        """The block computes nothing, and is counted."""
        with ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a CPU would do, and of a library's own
            stack.enter_context(_attention(self.tracker))
            if self._as_cuda:
                stack.enter_context(_autocast_of_cuda())
            stack.enter_context(self.tracker)
            yield self.tracker


def _tensors(values: Any) -> Iterator[Tensor]:
    """Those among an operation's arguments; quicker than a walk through any tree."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _places(index: Any) -> Any:
    """A real mask as the numbers of what it picks."""
    return index.nonzero().squeeze(-1) if isinstance(index, Tensor) and index.dtype == torch.bool else index


@contextmanager
def _attention(tracker: Tracker) -> Iterator[None]:
    """In place of what a CPU does: as flash attention, which keeps its inputs, its output and a number for each query.

    A mask is taken for one that costs nothing.
    """
    original = F.scaled_dot_product_attention

    class Flash(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            *batch, heads, tokens, _ = query.shape
            out = query.new_empty(*batch, tokens, heads, value.shape[-1]).transpose(-3, -2)
            normaliser = query.new_empty(*batch, heads, tokens, dtype=torch.float32)
            tracker.compute(attention_flops(query.shape, key.shape, value.shape))
            ctx.save_for_backward(query, key, value, out, normaliser)
            return out

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
            query, key, value, *_ = ctx.saved_tensors
            tracker.compute(int(BACKWARD * attention_flops(query.shape, key.shape, value.shape)))
            return tuple(torch.empty_like(each) for each in (query, key, value))

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(query, Numberless):
            return original(query, key, value, *args, **kwargs)
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = (each.to(dtype) for each in (query, key, value))
        attended: Tensor = Flash.apply(query, key, value)
        return attended

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


@contextmanager
def _autocast_of_cuda() -> Iterator[None]:
    """Autocast on the CPU makes float32 of what it does on CUDA."""
    library: Any = torch.library.Library("aten", "IMPL")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def in_float32(op: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            def up(leaf: Any) -> Any:
                low = isinstance(leaf, Tensor) and leaf.dtype in (torch.bfloat16, torch.float16)
                return leaf.float() if low else leaf

            with torch._C._ExcludeDispatchKeyGuard(keys):
                return op(*tree_map(up, args), **kwargs)

        return run

    try:
        for name in FLOAT32:
            packet, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.aten, packet), overload or "default")
            library.impl(name, in_float32(op), "AutocastCPU")
        yield
    finally:
        library._destroy()
