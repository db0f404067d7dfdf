"""A table of native names: what it makes of a network's tensors, there and back, and what it refuses."""

import re

import pytest
import torch

from moedistill.model.native_names import NativeNames, NativeTensor, check_native

NAMES = NativeNames(
    {
        "layers.*.qk": ("blocks.*.to_q", "blocks.*.to_k"),
        "layers.*.norm2": "blocks.*.norm3",
        "layers.*.norm3": "blocks.*.norm2",
        "final.0": "norm_out",
        "shift": "scale_shift_table",
    },
    swapped=frozenset({"final.0"}),
)
SHAPES = {
    "blocks.10.to_q.weight": (2, 3),
    "blocks.10.to_q.bias": (2,),
    "blocks.10.to_k.bias": (4,),
    "blocks.10.to_k.weight": (4, 3),
    "blocks.10.norm2.weight": (3,),
    "norm_out.weight": (6, 3),
    "scale_shift_table": (1, 3),
}


def network():
    return {name: torch.randn(shape, generator=torch.Generator().manual_seed(7)) for name, shape in SHAPES.items()}


def test_linears_lie_one_after_the_other_and_halves_the_other_way_round() -> None:
    here, tensors = network(), {tensor.name: tensor for tensor in NAMES.tensors(SHAPES)}
    native = {name: tensor.join([here[part] for part in tensor.parts]) for name, tensor in tensors.items()}
    assert sorted(native) == [
        "final.0.weight", "layers.10.norm3.weight", "layers.10.qk.bias", "layers.10.qk.weight", "shift",
    ]  # fmt: skip
    assert native["layers.10.qk.weight"].equal(
        torch.cat([here["blocks.10.to_q.weight"], here["blocks.10.to_k.weight"]])
    )
    assert native["layers.10.qk.bias"].equal(torch.cat([here["blocks.10.to_q.bias"], here["blocks.10.to_k.bias"]]))
    assert native["layers.10.norm3.weight"].equal(here["blocks.10.norm2.weight"])
    first, second = here["norm_out.weight"].chunk(2)
    assert native["final.0.weight"].equal(torch.cat([second, first]))
    assert {name: tuple(tensor.shape) for name, tensor in native.items()} == {t.name: t.shape for t in tensors.values()}

    back = {name: part for tensor in tensors.values() for name, part in tensor.split(native[tensor.name]).items()}
    assert back.keys() == here.keys()
    assert all(back[name].equal(here[name]) for name in here)


def test_a_network_of_another_kind_is_refused_with_all_that_does_not_fit() -> None:
    shapes = {**SHAPES, "blocks.10.gate": (1,), "blocks.x.norm2.weight": (3,)}
    del shapes["blocks.10.to_k.bias"]
    wrong = (
        "blocks.10.gate has no place in it; blocks.x.norm2.weight has no place in it; "
        "of layers.10.qk.bias there is blocks.10.to_q.bias alone"
    )
    with pytest.raises(ValueError, match=re.escape(wrong)):
        NAMES.tensors(shapes)


def test_a_file_that_does_not_fit_is_refused_with_every_name() -> None:
    wanted = [NativeTensor("a.weight", (2, 3), ("x",)), NativeTensor("b.weight", (2,), ("y",))]
    check_native(wanted, {"b.weight": [2], "a.weight": [2, 3]})
    with pytest.raises(
        ValueError, match=re.escape("b.weight is missing; c is left over; a.weight is [3, 2], not [2, 3]")
    ):
        check_native(wanted, {"a.weight": [3, 2], "c": [1]})
