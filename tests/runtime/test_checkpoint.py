"""Checkpoints: what comes back is what was saved, bit for bit; what is not complete is never taken for one."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import equal

from moedistill.errors import UserError
from moedistill.runtime import checkpoint, writing
from moedistill.runtime.checkpoint import Checkpoints, find_checkpoint, load_tree, save_tree, write_text

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_come_back_bit_for_bit(tmp_path, dtype):
    bits = torch.randint(0, 256, (1024,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tensor = bits.bool() if dtype == torch.bool else bits.view(dtype)  # NaNs, infinities and denormals among them
    tree = {"flat": tensor, "scalar": tensor[7], "empty": tensor[:0], "strided": tensor.view(-1, 2).T[:, ::3]}
    save_tree(tmp_path, "x", tree)
    assert equal(load_tree(tmp_path, "x"), {name: value.contiguous() for name, value in tree.items()})


T = [torch.tensor([float(k)]) for k in range(4)]
SHARED = torch.arange(6.0)


@pytest.mark.parametrize(
    "tree",
    [
        {"state": {0: {"step": T[1], "exp_avg": T[2]}, 1: {}}, "param_groups": [{"betas": (0.9, 0.999), "lr": 1e-4}]},
        {1: T[0], "1": T[1], None: T[2], 1.5: T[3]},
        {"a/b": T[0], "a": {"b": T[1]}, "a/b'": T[2]},
        {"$tensor": "/x", "$tuple": [1], "$items": T[1]},
        {"nothing": None, "no": {}, "nor": [], "neither": (), "nested": ((), [()], {"x": ({},)})},
        [0.1, 1e-310, float("inf"), float("nan"), -0.0, 2**70, True, 1, 1.0, "1", "σ\n"],
        {"whole": SHARED, "part": SHARED[2:4], "again": SHARED},
        T[3],
        "text",
    ],
)
def test_structure_comes_back(tmp_path, tree):
    save_tree(tmp_path, "x", tree)
    assert equal(load_tree(tmp_path, "x"), tree)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": [1, {2}]}, "set at /a/1"),
        ({"a": {(0, 1): 2}}, "key of type tuple at /a"),
        ({"run": object()}, "object at /run"),
    ],
)
def test_what_cannot_be_saved_is_an_error(tmp_path, tree, message):
    with pytest.raises(TypeError, match=message):
        save_tree(tmp_path, "x", tree)


def trees(value):
    return {"state": {"step": value}, "experts": {"e": {"w": torch.full((3,), float(value))}}, "training": {}}


def is_whole(path, value):
    return equal({name: load_tree(path, name) for name in trees(value)}, trees(value))


def test_the_newest_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    names = ["00_a_00000009", "00_a_00000010", "01_A_00000001", "01_A_00000002"]
    for number, name in enumerate(names):
        assert checkpoints.save(name, trees(number)) == tmp_path / "checkpoints" / name
        assert [path.name for path in checkpoints.all()] == names[max(0, number - 1) : number + 1]
    assert find_checkpoint(tmp_path).name == names[-1]
    assert all(is_whole(path, number) for number, path in enumerate(checkpoints.all(), 2))
    assert len(list(checkpoints.folder.iterdir())) == 2


class Crash(Exception):
    pass


def crash_at(monkeypatch, number):
    """Lets everything that touches the disk raise at call `number`, and before it does anything."""
    calls = iter(range(number))

    def breaking(function):
        def call(*args, **kwargs):
            if next(calls, None) is None:
                raise Crash
            return function(*args, **kwargs)

        return call

    for owner, name in [
        (checkpoint, "save_file"), (checkpoint, "sync"), (writing, "sync"), (shutil, "rmtree"),
        (Path, "mkdir"), (Path, "write_text"), (Path, "rename"), (Path, "replace"),
    ]:  # fmt: skip
        monkeypatch.setattr(owner, name, breaking(getattr(owner, name)))


def test_a_crash_at_any_point_of_a_save_leaves_a_valid_checkpoint(tmp_path, monkeypatch):
    seen = set()
    for number in range(100):
        folder = tmp_path / str(number)
        checkpoints = Checkpoints(folder / "checkpoints", keep=1)
        checkpoints.save("00_a_00000001", trees(1))
        with monkeypatch.context() as patch:
            crash_at(patch, number)
            try:
                checkpoints.save("00_a_00000002", trees(2))
                crashed = False
            except Crash:
                crashed = True
        newest = find_checkpoint(folder)
        step = int(newest.name[-1])
        assert is_whole(newest, step)
        leftovers = [path.name for path in checkpoints.folder.iterdir() if path.name.startswith(".")]
        seen.add((step, bool(leftovers)))

        # The run that goes on there makes the same checkpoint again, and tidies up.
        assert is_whole(checkpoints.save("00_a_00000002", trees(2)), 2)
        checkpoints.save("00_a_00000003", trees(3))
        assert [path.name for path in checkpoints.folder.iterdir()] == ["00_a_00000003"]
        if not crashed:
            break
    assert not crashed
    assert number > 10
    assert seen >= {(1, False), (1, True), (2, True), (2, False)}


def test_a_file_is_replaced_at_once(tmp_path, monkeypatch):
    write_text(tmp_path / "x", "old")
    for number in range(3):
        with monkeypatch.context() as patch:
            crash_at(patch, number)
            with pytest.raises(Crash):
                write_text(tmp_path / "x", "new")
        assert (tmp_path / "x").read_text() == "old"
    write_text(tmp_path / "x", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "new")]


def test_a_checkpoint_is_found_by_itself_or_by_its_run(tmp_path):
    path = Checkpoints(tmp_path / "checkpoints", keep=1).save("00_a_00000001", trees(1))
    assert find_checkpoint(path) == find_checkpoint(tmp_path) == path


@pytest.mark.parametrize(
    ("folders", "asked", "message"),
    [
        ([], "nowhere", "no such folder"),
        ([], ".", "no checkpoint in"),
        (["checkpoints"], ".", "no checkpoint in"),
        (["checkpoints/.tmp-00_a_00000001"], ".", "starts afresh"),
        (["checkpoints/.tmp-00_a_00000001"], "checkpoints/.tmp-00_a_00000001", "never finished"),
    ],
)
def test_no_checkpoint_is_an_error(tmp_path, folders, asked, message):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        save_tree(tmp_path / folder, "state", {})
        if not folder.startswith("checkpoints/"):
            (tmp_path / folder / "state.json").unlink()
    with pytest.raises(UserError, match=message):
        find_checkpoint(tmp_path / asked)


@pytest.mark.parametrize("damage", [lambda f: f.write_bytes(f.read_bytes()[:-20]), lambda f: f.unlink()])
@pytest.mark.parametrize("file", ["experts.safetensors", "experts.json"])
def test_a_damaged_file_is_the_users_to_know(tmp_path, file, damage):
    path = Checkpoints(tmp_path, keep=1).save("00_a_00000001", trees(1))
    damage(path / file)
    with pytest.raises(UserError, match=r"00_a_00000001 is not complete or damaged \(experts"):
        load_tree(path, "experts")
