"""Writing: whole or not at all, and what the disk says in one line; by real writers that hit a real limit."""

import errno
import os
import shutil
from contextlib import ExitStack, suppress
from types import SimpleNamespace

import pytest
import torch
from small_files import files_of

from moedistill import media, plotting
from moedistill.errors import UserError, WriteError
from moedistill.runtime.checkpoint import bytes_of, save_tensors, write_text
from moedistill.runtime.writing import disk_errors, new_file, refuse_used

LIMIT = 3000
"""Bytes of a file."""


def disk(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free, total=10**12))


def a_plot(path):
    chart, axes = plotting.figure("noise", 1)
    axes[0].plot(torch.rand(500))
    plotting.save(chart, path)


WRITERS = {
    "x.json": lambda path: path.write_text("x" * 5000),
    "x.safetensors": lambda path: save_tensors(path, {"x": torch.rand(5000)}),
    "x.mp4": lambda path: media.write_mp4(path, torch.rand(3, 4, 64, 64), fps=8),
    "x.png": lambda path: media.contact_sheet(path, {"x": torch.rand(2, 3, 4, 64, 64)}, ["a", "b"]),
    "x.webp": lambda path: media.side_by_side(path, {"x": torch.rand(2, 3, 4, 64, 64)}),
    "plot.png": a_plot,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path, name):
    (tmp_path / name).write_text("old")
    with pytest.raises(WriteError) as error, files_of(LIMIT), new_file(tmp_path / name) as new:
        WRITERS[name](new)
    assert str(error.value).startswith(f"cannot write {tmp_path / name}: File too large")
    assert str(error.value).endswith("; the limit is the file system's, or that of `ulimit -f`")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "old")]


def test_room_is_looked_at_first(tmp_path, monkeypatch):
    disk(monkeypatch, free=3_500_000)
    save_tensors(tmp_path / "small", {"x": torch.zeros(800_000)})
    with pytest.raises(WriteError) as error:
        save_tensors(tmp_path / "large", {"x": torch.zeros(1_000_000)})
    room = "it needs 3.81 MiB, and 3.34 MiB are free; make room there"
    assert str(error.value) == f"cannot write {tmp_path / 'large'}: {room}"
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0, total=0))  # some do not say
    save_tensors(tmp_path / "large", {"x": torch.zeros(1_000_000)})


def test_the_size_of_a_tree():
    tree = {"a": torch.zeros(3), "b": [torch.zeros(2, dtype=torch.float64), (torch.zeros(1, dtype=torch.int8), "text")]}
    assert bytes_of(tree) == 12 + 16 + 1


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "No space left on device (2 KiB needed, 1.43 MiB free there); make room there"),
        (
            errno.EDQUOT,
            "Disk quota exceeded (2 KiB needed, 1.43 MiB free there); make room there, or raise your quota",
        ),
        (errno.EROFS, "Read-only file system (2 KiB needed); choose another place: this file system can only be read"),
        (errno.EACCES, "Permission denied (2 KiB needed); allow writing there, or choose another place"),
        (errno.EIO, "Input/output error (2 KiB needed); look at the disk, or choose another place"),
        (errno.ENOTDIR, "Not a directory (2 KiB needed)"),
    ],
)
def test_what_the_disk_says(tmp_path, monkeypatch, number, message):
    disk(monkeypatch, free=1_500_000)
    with pytest.raises(WriteError) as error, disk_errors(tmp_path / ".tmp-x", 2048):
        raise OSError(number, os.strerror(number))
    assert str(error.value) == f"cannot write {tmp_path / 'x'}: {message}"


def test_what_is_no_error_of_the_disk_stays_what_it_is(tmp_path):
    with pytest.raises(OSError, match="cannot write mode"), disk_errors(tmp_path):
        raise OSError("cannot write mode F as PNG")


def test_several_files_appear_together(tmp_path):
    seen = []
    with ExitStack() as files:
        for name in ("index", "a", "b"):
            files.enter_context(new_file(tmp_path / name)).write_text("new")
            files.callback(lambda: seen.append(sorted(path.name for path in tmp_path.glob("[!.]*"))))
    assert seen == [[], ["b"], ["a", "b"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "index"]

    with suppress(KeyboardInterrupt), ExitStack() as files:
        for name in ("index", "a"):
            files.enter_context(new_file(tmp_path / name)).write_text("newer")
        raise KeyboardInterrupt
    assert [(path.name, path.read_text()) for path in sorted(tmp_path.iterdir())] == [
        (name, "new") for name in ("a", "b", "index")
    ]


def test_devices_and_links_are_written_to_as_they_are(tmp_path):
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(WriteError, match=r"full: No space left on device \(.* free there\); make room there"):
        write_text(tmp_path / "full", "x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "x")
    assert (tmp_path / "file").read_text() == "x"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "x")
    assert os.read(reader, 10) == b"x"
    assert (tmp_path / "full").is_symlink()
    assert (tmp_path / "link").is_symlink()


def test_used_folders_are_refused_by_what_is_in_them(tmp_path):
    refuse_used(tmp_path / "none")
    refuse_used(tmp_path)
    for name in (".lock", "log.txt", "slurm-7.out", "nohup.err", "mine.log"):
        (tmp_path / name).touch()
    refuse_used(tmp_path)
    for name in ("thesis.tex", "a", "b", "c", "d"):
        (tmp_path / name).touch()
    with pytest.raises(UserError) as error:
        refuse_used(tmp_path)
    names = "(a, b, c and 2 more)"
    assert str(error.value) == f"{tmp_path} is not empty {names}; choose another --output, a new or an empty folder"
    with pytest.raises(UserError, match="is a file; choose another --output"):
        refuse_used(tmp_path / "a")
