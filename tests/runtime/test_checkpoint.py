"""Checkpoints: what comes back is what was saved, bit for bit; what is not complete is never taken for one."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import equal

from moedistill.errors import UserError, WriteError
from moedistill.runtime import checkpoint, writing
from moedistill.runtime.checkpoint import (
    SUMS,
    Checkpoints,
    find_checkpoint,
    load_tree,
    newest_whole,
    save_tree,
    verify,
    write_text,
)
from moedistill.runtime.integrity import Damaged

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
        (Path, "unlink"), (Path, "rmdir"),
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

        # The run that goes on there tidies up, and makes the next checkpoint.
        checkpoints.remove_leftovers()
        if find_checkpoint(folder).name[-1] == "1":
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
        (["checkpoints/.tmp-00_a_00000001"], ".", "no checkpoint in"),
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


# -- what is not a checkpoint -----------------------------------------------------------------------------------------


def snapshot(folder):
    """Every file below a folder, links not followed."""
    return {path: path.read_bytes() if path.is_file() else path.is_symlink() for path in folder.rglob("*")}


def clutter(folder, real):
    """What people leave beside their checkpoints, much of it with a checkpoint's content."""
    shutil.copytree(real, folder / "my_backup_1")
    shutil.copytree(real, folder / "my_backup_2")
    shutil.copytree(real, folder / f"{real.name} (copy)")
    shutil.copytree(real, folder / "99_a_1")  # too few digits
    shutil.copytree(real, folder / "099_a_00000001")
    shutil.copytree(real, folder / ".tmp-mine")
    (folder / "98_a_00000001").write_text("a file")
    (folder / "97_a_00000001").symlink_to(real, target_is_directory=True)
    (folder / "96_a_00000001").symlink_to("nowhere")
    (folder / "95_a_00000001").mkdir()
    (folder / "95_a_00000001" / "notes.txt").write_text("mine")
    (folder / ".tmp-00_a_00000009").write_text("a file")
    (folder / "zzz").mkdir()


def test_what_is_the_user_s_is_never_deleted_and_never_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    real = checkpoints.save("00_a_00000001", trees(1))
    elsewhere = shutil.copytree(real, tmp_path / "elsewhere")
    clutter(checkpoints.folder, elsewhere)
    before = snapshot(checkpoints.folder)
    mine = {path for path in before if real not in (path, *path.parents)}
    assert checkpoints.all() == [real]
    assert find_checkpoint(tmp_path) == real
    newest = checkpoints.save("00_a_00000002", trees(2))
    assert checkpoints.all() == [newest]
    assert find_checkpoint(tmp_path) == newest
    after = snapshot(checkpoints.folder)
    assert {path: after[path] for path in mine} == {path: before[path] for path in mine}
    assert not real.exists()


def test_where_all_there_is_is_the_user_s_there_is_no_checkpoint_but_room_for_one(tmp_path):
    source = Checkpoints(tmp_path / "source", keep=1).save("00_a_00000001", trees(1))
    (tmp_path / "checkpoints").mkdir()
    clutter(tmp_path / "checkpoints", source)
    with pytest.raises(UserError, match="no checkpoint in"):
        find_checkpoint(tmp_path)
    said = []
    # Its name and its temporary name are taken by files.
    Checkpoints(tmp_path / "checkpoints", keep=1, say=said.append).save("00_a_00000009", trees(9))
    assert is_whole(find_checkpoint(tmp_path), 9)
    aside = tmp_path / "checkpoints" / "00_a_00000009.set-aside-1"
    assert aside.read_text() == "a file"
    assert said == [
        f"{tmp_path / 'checkpoints/.tmp-00_a_00000009'} was there already: it is {aside.name} now, "
        "and stays until you remove it"
    ]


def test_checkpoints_go_by_progress_not_by_letters(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=9)
    names = ["09_a_00000001", "10_Z_99999999", "10_Z_100000000", "99_b_00000001", "100_a_00000001"]
    for number, name in enumerate(names):
        checkpoints.save(name, trees(number))
    assert [path.name for path in checkpoints.all()] == names


# -- going back -------------------------------------------------------------------------------------------------------


def test_later_checkpoints_of_a_way_not_taken_are_set_aside(tmp_path):
    """With keep=1 the first save would otherwise delete itself, and the old ones would be resumed from."""
    said = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3, say=said.append)
    for step in (1, 2, 3):
        checkpoints.save(f"00_a_0000000{step}", trees(step))
    (checkpoints.folder / "00_a_00000002" / "experts.safetensors").write_bytes(b"damaged")
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, say=said.append)
    checkpoints.save("00_a_00000002", trees(22))  # the run went on from step 1
    assert is_whole(find_checkpoint(tmp_path), 22)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [
        "00_a_00000002", "00_a_00000002.set-aside-1", "00_a_00000003.set-aside-1",
    ]  # fmt: skip
    assert is_whole(checkpoints.folder / "00_a_00000003.set-aside-1", 3)
    assert is_whole(find_checkpoint(checkpoints.folder / "00_a_00000003.set-aside-1"), 3)
    assert len(said) == 2


def test_what_cannot_be_set_aside_is_the_disk_s_word(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    old = checkpoints.save("00_a_00000002", trees(2))
    monkeypatch.setattr(Path, "rename", lambda *_: denied())
    with pytest.raises(WriteError) as caught:
        checkpoints.save("00_a_00000001", trees(1))
    aside = old.with_name(f"{old.name}.set-aside-1")
    assert str(caught.value) == (
        f"cannot write {aside}: Permission denied; allow writing there, or choose another place"
    )
    assert is_whole(old, 2)


def denied():
    raise PermissionError(13, "Permission denied")


def test_the_newest_whole_one_is_found_by_sums_without_loading(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=9)
    saved = [checkpoints.save(f"00_a_0000000{step}", {**trees(step), "ema": {}}) for step in (1, 2, 3)]
    first, second, third = saved
    flip = (second / "experts.safetensors").read_bytes()
    (second / "experts.safetensors").write_bytes(flip[:-1] + bytes([flip[-1] ^ 1]))
    read = []
    usual = checkpoint.read_tensors
    monkeypatch.setattr(checkpoint, "read_tensors", lambda path: read.append(path) or usual(path))
    assert newest_whole(tmp_path, third) == first
    assert read == []
    (first / SUMS).unlink()
    assert newest_whole(tmp_path, third) == first
    assert {path.parent for path in read} == {first}


def test_a_checkpoint_written_whole_gets_its_name(tmp_path):
    """A kill between setting the old one aside and renaming the new one in its place."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    saved = {**trees(2), "state": {"step": 2, "stage": 0, "stage_name": "a"}}
    new = checkpoints.save("00_a_00000002", saved)
    spoilt = (("00_a_00000003", "experts.safetensors"), ("00_a_00000004", SUMS), ("00_a_00000005", None))  # another's
    for name, spoil in (("00_a_00000002", None), *spoilt):
        shutil.copytree(new, tmp_path / "checkpoints" / f".tmp-{name}")
        if spoil:
            (tmp_path / "checkpoints" / f".tmp-{name}" / spoil).unlink()
    new.rename(new.with_name("00_a_00000002.set-aside-1"))
    checkpoints.remove_leftovers()
    assert equal({name: load_tree(new, name) for name in saved}, saved)
    assert sorted(os.listdir(checkpoints.folder)) == ["00_a_00000002", "00_a_00000002.set-aside-1"]


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("crashed", [True, False])
def test_removing_a_checkpoint_leaves_what_else_lies_in_it(tmp_path, sums, crashed):
    said = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, say=said.append)
    old = checkpoints.save("00_a_00000001", trees(1))
    (old / "samples").mkdir()
    (old / "samples/000.mp4").write_text("mine")
    (old / "notes.txt").write_text("mine")
    if not sums:
        (old / SUMS).unlink()
        (old / "ema.json").write_text("{}")  # one of before is whole with it
    if crashed:
        old.rename(old.with_name(f".tmp-{old.name}-old"))
        checkpoints.remove_leftovers()
    else:
        checkpoints.save("00_a_00000002", trees(2))
    aside = old.with_name(f"{old.name}.set-aside-1")
    assert [path.relative_to(aside).as_posix() for path in sorted(aside.rglob("*"))] == [
        "notes.txt", "samples", "samples/000.mp4",
    ]  # fmt: skip
    assert said == [
        f"{old} is removed, but held more than a checkpoint: it is {aside.name} now, and stays until you remove it"
    ]
    assert not list(checkpoints.folder.glob(".*"))


def test_a_crash_at_any_point_of_writing_anew_loses_nothing(tmp_path, monkeypatch):
    for number in range(100):
        folder = tmp_path / str(number)
        checkpoints = Checkpoints(folder / "checkpoints", keep=3, say=lambda _: None)
        for step in (1, 2, 3):
            checkpoints.save(f"00_a_0000000{step}", trees(step))
        with monkeypatch.context() as patch:
            crash_at(patch, number)
            try:
                checkpoints.save("00_a_00000002", trees(22))
                crashed = False
            except Crash:
                crashed = True
        assert is_whole(checkpoints.folder / "00_a_00000001", 1)
        kept = [path for path in checkpoints.folder.iterdir() if not path.name.startswith(".")]
        values = {load_tree(path, "state")["step"] for path in kept}
        assert {1, 2, 3} <= values
        newest = find_checkpoint(folder)
        assert is_whole(newest, load_tree(newest, "state")["step"])
        checkpoints.save("00_a_00000002", trees(22))
        assert is_whole(find_checkpoint(folder), 22)
        if not crashed:
            break
    assert not crashed
    assert number > 10


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A checkpoint."""
    return Checkpoints(tmp_path / "run" / "checkpoints", keep=1).save("00_a_00000001", trees(1))


FILES = ["state.json", "experts.json", "experts.safetensors", "training.json", "sums.json"]


def test_the_files_of_a_checkpoint(saved):
    assert sorted(path.name for path in saved.iterdir()) == sorted(FILES)
    sums = json.loads((saved / "sums.json").read_text())
    assert sums == {
        name: {
            "bytes": len((saved / name).read_bytes()),
            "sha256": hashlib.sha256((saved / name).read_bytes()).hexdigest(),
        }
        for name in FILES[:-1]
    }


def found_and_verified(path):
    verify(find_checkpoint(path))


@pytest.mark.parametrize("file", FILES)
def test_any_flipped_bit_is_refused(saved, file):
    path = saved / file
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 5):  # of each byte one or two, in turn all eight
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(Damaged):
            found_and_verified(saved)
    path.write_bytes(whole)
    verify(saved)


def loop(path):
    path.symlink_to(path)


DAMAGE = {
    "missing": (lambda f: None, "is missing"),
    "empty": (lambda f: f.write_bytes(b""), "has 0 bytes"),
    "cut": (lambda f: f.write_bytes(b"x" * 20), "has 20 bytes"),
    "a folder": (lambda f: f.mkdir(), "is a folder, not a file"),
    "a pipe": (os.mkfifo, "is no file"),
    "a link to itself": (loop, "cannot be read: Too many levels of symbolic links"),
    "a link to nothing": (lambda f: f.symlink_to("nowhere"), "is missing"),
    "endless": (lambda f: f.symlink_to("/dev/zero"), "is no file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("file", FILES[:-1])
def test_a_damaged_file_is_named(saved, file, kind):
    damage, message = DAMAGE[kind]
    (saved / file).unlink()
    damage(saved / file)
    for source in (saved, saved.parent.parent):  # the run's newest checkpoint is never passed over in silence
        with pytest.raises(Damaged, match=message) as caught:
            find_checkpoint(source)
        assert str(caught.value).startswith(f"{saved / file} ")
        assert "\n" not in str(caught.value)
    assert Checkpoints(saved.parent, keep=1).all() == []
    with pytest.raises(Damaged):
        load_tree(saved, file.split(".")[0])


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{}", b'{"state.json": 3}', b"\xff\xfe", b"[" * 100_000])
def test_damaged_sums_are_named(saved, content):
    (saved / "sums.json").write_bytes(content)
    with pytest.raises(Damaged, match=r"sums\.json is damaged"):
        find_checkpoint(saved)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("method", ["stat", "open"])
def test_what_cannot_be_read_is_named(saved, monkeypatch, file, method):
    usual = getattr(Path, method)

    def forbidden(path, *args, **options):
        if path == saved / file:
            raise PermissionError(13, "Permission denied")
        return usual(path, *args, **options)

    monkeypatch.setattr(Path, method, forbidden)
    with pytest.raises(Damaged, match=rf"{file} cannot be read: Permission denied$"):
        found_and_verified(saved)


def test_a_checkpoint_of_before_is_read_without_sums(saved):
    (saved / "sums.json").unlink()
    save_tree(saved, "ema", {})
    assert find_checkpoint(saved.parent.parent) == saved
    assert is_whole(saved, 1)
    (saved / "training.json").unlink()
    with pytest.raises(Damaged, match=r"training\.json is missing"):
        find_checkpoint(saved.parent.parent)


def test_a_file_put_into_a_checkpoint_is_not_taken_for_its_own(saved):
    shutil.copy(saved / "experts.safetensors", saved / "training.safetensors")
    with pytest.raises(Damaged, match=r"training\.safetensors is no file of this checkpoint"):
        load_tree(saved, "training")
