"""The lock on a folder: one writer, said who; nothing that is dead holds it, nothing that lives loses it."""

import fcntl
import json
import multiprocessing
import os
import signal
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest

from moedistill.errors import UserError
from moedistill.runtime import lock
from moedistill.runtime.lock import claimed, in_turn, is_held, locked

fork = multiprocessing.get_context("fork")


def refused(folder):
    with pytest.raises(UserError) as error, locked(folder):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


def taken(folder):
    with locked(folder):
        return json.loads((folder / ".lock").read_text())["pid"] == os.getpid()


def hold(folder, held):
    with locked(folder):
        if not (worker := os.fork()):  # as data workers are; they outlive a run that is killed
            time.sleep(5)
            os._exit(0)
        (folder / ".worker").write_text(str(worker))
        held.set()
        time.sleep(100)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path`."""
    held = fork.Event()
    process = fork.Process(target=hold, args=(tmp_path, held))
    process.start()
    assert held.wait(30)
    yield process
    process.kill()
    process.join()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.02)
    monkeypatch.setattr(lock, "WATCH", 0.5)


def test_a_second_one_is_refused_and_told_who_is_there(tmp_path, holder, monkeypatch):
    assert f"{tmp_path} is in use by process {holder.pid} on " in refused(tmp_path)
    with locked_by_us(tmp_path / "other", monkeypatch, "/somewhere/moedistill", "run", "a b.yaml"):
        message = refused(tmp_path / "other")
    assert f"process {os.getpid()} on " in message
    assert ": moedistill run 'a b.yaml'); wait for it or stop it, or choose another --output" in message


def locked_by_us(folder, monkeypatch, *arguments):
    folder.mkdir()
    monkeypatch.setattr("sys.argv", list(arguments))
    return locked(folder)


def test_it_goes_away_and_can_be_taken_again(tmp_path):
    for _ in range(2):
        assert taken(tmp_path)
        with pytest.raises(ZeroDivisionError), locked(tmp_path):
            raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_one_that_looks_sees_who_lives(tmp_path, holder, monkeypatch):
    """It takes nothing away, and waits for nobody."""
    assert is_held(tmp_path)
    assert is_held(tmp_path)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert (tmp_path / ".lock").exists()
    assert not is_held(tmp_path)
    assert not is_held(tmp_path / "none")
    # Of a machine to which flock does not reach, and of a file system without one, the time tells.
    for holding, without in (({"machine": "another"}, False), ({"machine": lock._machine()}, True)):
        (tmp_path / ".lock").write_text(json.dumps(holding))
        with monkeypatch.context() as patch:
            if without:
                patch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(38, "Function not implemented")))
            assert is_held(tmp_path)
            os.utime(tmp_path / ".lock", (1, 1))
            assert not is_held(tmp_path)


def test_a_killed_process_holds_nothing_though_its_workers_live_on(tmp_path, holder):
    holder.kill()
    holder.join()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == holder.pid
    assert taken(tmp_path)
    os.kill(int((tmp_path / ".worker").read_text()), signal.SIGKILL)  # raises if it is no longer there


def test_a_stopped_process_holds_on(tmp_path, holder, quick):
    """Its heart does not beat, but it may go on at any time."""
    os.kill(holder.pid, signal.SIGSTOP)
    assert "is in use by" in refused(tmp_path)


def test_a_forked_worker_that_ends_does_not_give_it_away(tmp_path):
    with locked(tmp_path):
        worker = fork.Process(target=str)
        worker.start()
        worker.join()
        assert "is in use by" in refused(tmp_path)


def left_by(machine, folder):
    (folder / ".lock").write_text(json.dumps({"pid": 7, "host": "node7", "machine": machine, "since": "then"}))


def test_what_a_dead_machine_left_is_taken_after_a_while(tmp_path, quick, capsys):
    left_by("another", tmp_path)
    assert taken(tmp_path)
    said = f"{tmp_path}: is process 7 on node7 (since then: None) still writing there? watching for 0 s\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(("name", "ago", "watched"), [("ours", 10**9, 0), ("ours", 0, 1), ("node7", 10**9, 1)])
def test_what_this_machine_left_before_it_started_anew_is_taken_at_once(
    tmp_path, quick, monkeypatch, capsys, name, ago, watched
):
    """Another machine may have our name; it would have touched its lock since we were started."""
    left_by("an earlier start", tmp_path)
    os.utime(tmp_path / ".lock", (time.time() - ago,) * 2)
    monkeypatch.setattr(lock.platform, "node", lambda: "node7" if name == "ours" else name + "b")
    assert taken(tmp_path)
    assert capsys.readouterr().err.count("watching for") == watched


def beat(path):
    while True:
        os.utime(path)
        time.sleep(0.02)


def test_a_live_machine_whose_flock_does_not_reach_here_keeps_its_lock(tmp_path, quick):
    left_by("another", tmp_path)
    other = fork.Process(target=beat, args=(tmp_path / ".lock",))
    other.start()
    try:
        assert "is in use by process 7 on node7" in refused(tmp_path)
    finally:
        other.kill()


def test_without_flock_the_heart_beat_tells(tmp_path, quick, monkeypatch):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock, "fcntl", SimpleNamespace(flock=none, LOCK_EX=0, LOCK_NB=0))
    with locked(tmp_path):
        assert f"is in use by process {os.getpid()} on " in refused(tmp_path)
    left_by(lock._machine(), tmp_path)
    assert taken(tmp_path)


def test_a_lock_that_vanishes_while_it_is_taken_protects_nothing(tmp_path, monkeypatch):
    """Its holder removes it just after it was opened: the file that is locked then is no longer in the folder."""
    calls = []

    def flock(descriptor, how):
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        fcntl.flock(descriptor, how)

    monkeypatch.setattr(lock, "fcntl", SimpleNamespace(flock=flock, LOCK_EX=fcntl.LOCK_EX, LOCK_NB=fcntl.LOCK_NB))
    with locked(tmp_path):
        assert len(calls) == 2
        assert "is in use by" in refused(tmp_path)


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_name_that_is_taken_gets_a_number(tmp_path):
    with claimed(tmp_path / "a/b", numbered=True) as first, claimed(tmp_path / "a/b", numbered=True) as second:
        assert (first, second) == (tmp_path / "a/b", tmp_path / "a/b-2")
    with claimed(tmp_path / "a/b", numbered=True) as third:
        assert third == tmp_path / "a/b-3"


def test_a_new_folder_goes_away_with_an_error_unless_it_holds_something(tmp_path):
    (tmp_path / "old").mkdir()
    for name, make in (("new", str), ("old", str), ("full", lambda: (tmp_path / "full/x").touch())):
        with suppress(ZeroDivisionError), claimed(tmp_path / name):
            make()
            raise ZeroDivisionError
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "old", "x"]


def test_a_place_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for numbered in (False, True):
        with pytest.raises(UserError) as error, claimed(tmp_path / "file/run", numbered=numbered):
            pass
        assert str(error.value).startswith("cannot write to ")
        assert str(error.value).endswith("; choose another --output")
        assert "\n" not in str(error.value)


def work(path, order):
    with in_turn(path / ".turn"):
        order.put("in")
        time.sleep(0.1)
        order.put("out")


def test_processes_take_turns_and_leave_nothing(tmp_path):
    order = fork.Queue()
    processes = [fork.Process(target=work, args=(tmp_path, order)) for _ in range(4)]
    for process in processes:
        process.start()
    seen = [order.get(timeout=30) for _ in range(8)]
    for process in processes:
        process.join()
    assert seen == ["in", "out"] * 4
    assert list(tmp_path.iterdir()) == []


def test_a_turn_ends_where_the_work_fails(tmp_path):
    for _ in range(2):
        with pytest.raises(FileNotFoundError), in_turn(tmp_path / ".turn"):
            (tmp_path / "none").read_text()
    with pytest.raises(UserError, match="cannot write"), in_turn(tmp_path / "no folder" / ".turn"):
        pass
