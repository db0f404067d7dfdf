"""A checkpoint gives back any tree, bit for bit."""

import tempfile
from pathlib import Path

import properties  # noqa: F401  its settings
import torch
from helpers import equal
from hypothesis import given
from hypothesis import strategies as st

from moedistill.runtime.checkpoint import Checkpoints, load_tree

NUMBERS = st.integers() | st.floats()
KEYS = st.text() | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) * 100
    if draw(st.booleans()):
        tensor = tensor.transpose(0, -1) if tensor.ndim else tensor
    return tensor.to(draw(st.sampled_from(DTYPES)))


TREES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text() | tensors(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS | st.sampled_from(["$tensor", "$items", "$tuple", "a/b", "1"]), inner, max_size=4)
    ),
)


@given(TREES)
def test_any_tree_comes_back(tree):
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), keep=1)
        path = checkpoints.save("00_semantic_00000001", {"state": {"stage": 0}, "training": tree})
        assert equal(load_tree(path, "training"), tree)
        assert checkpoints.all() == [path]
