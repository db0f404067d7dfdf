"""Sets of shards: the same files for the same samples, whole or as they were, read sample by sample."""

import errno
import json
import os
import pickle
import re
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stored_sets import SHAPES, tensors

from moedistill.data import tensor_files, writing
from moedistill.data.check import Report, read_set
from moedistill.data.latents import LatentsConfig, SampleError, open_store
from moedistill.data.writing import Item, write_set
from moedistill.errors import WriteError

NAME = re.compile(r"samples-\d{5}-[0-9a-f]{12}\.safetensors")


def item(i, **entry):
    latents, text = tensors(i % 3)
    return Item(entry, lambda: {"latents": latents + i, **text})


def items(count, **entry):
    return [item(i, caption=f"caption {i}", **entry) for i in range(count)]


def text_item(i, shape=(4, 0, 2, 2), **entry):
    return Item({"shape": list(shape), **entry}, lambda: {"prompt_embeds": torch.full((6, 8), float(i))})


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def index_of(folder):
    return json.loads((folder / "index.json").read_text())


# -- what is written --------------------------------------------------------------------------------------------------


def test_what_is_in_the_index_and_in_the_shards(tmp_path):
    negative = {"prompt_embeds": torch.zeros(6, 8)}
    made_for = {"backbone": {"kind": "wan", "video": {"fps": 16.0}}}
    write_set(tmp_path, items(3, source="a.mp4", start=1.5), negative=negative, made_for=made_for, shard_samples=2)
    index = index_of(tmp_path)
    assert list(index) == ["format", "version", "negative", "made_for", "samples"]
    assert (index["format"], index["version"], index["made_for"]) == ("moedistill-latents", 2, made_for)
    assert [entry["key"] for entry in index["samples"]] == ["0000", "0001", "0000"]
    assert [tuple(entry["shape"]) for entry in index["samples"]] == SHAPES
    assert all((entry["source"], entry["start"]) == ("a.mp4", 1.5) for entry in index["samples"])
    first, second = dict.fromkeys(entry["file"] for entry in index["samples"])
    assert NAME.fullmatch(first)
    assert NAME.fullmatch(second)
    stored = load_file(tmp_path / first)
    assert set(stored) == {f"{key}/{name}" for key in ("0000", "0001") for name in ("latents", *tensors(0)[1])}
    assert torch.equal(stored["0001/latents"], tensors(1)[0] + 1)
    assert torch.equal(load_file(tmp_path / index["negative"])["prompt_embeds"], negative["prompt_embeds"])
    lines = (tmp_path / "index.json").read_text().splitlines()
    assert [json.loads(line.rstrip(",")) for line in lines[1:-1]] == index["samples"]  # a sample a line
    store = open_store(tmp_path)
    for i in range(3):
        assert torch.equal(store.read(i)[0], tensors(i)[0] + i)
        assert store.caption(i) == f"caption {i}"


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [
        ({}, [7]),
        ({"shard_samples": 3}, [3, 3, 1]),
        ({"shard_bytes": 2 * (96 + 102)}, [1, 1, 2, 1, 2]),  # of sample 1 mod 3, alone, 262 bytes
        ({"shard_bytes": 1}, [1] * 7),
    ],
)
def test_shards_are_cut_by_bytes_and_by_number(tmp_path, limits, sizes):
    write_set(tmp_path, items(7), **limits)
    found = [entry["file"] for entry in index_of(tmp_path)["samples"]]
    assert [found.count(name) for name in dict.fromkeys(found)] == sizes
    assert len(list(tmp_path.iterdir())) == len(sizes) + 1
    assert found == sorted(found)


def test_the_same_samples_make_the_same_files(tmp_path):
    for name in ("a", "b"):
        write_set(tmp_path / name, items(5), negative={"a": torch.ones(2)}, shard_samples=2)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()} == {0o666 & ~umask}


def test_what_an_entry_says_of_its_place_is_not_believed(tmp_path):
    write_set(tmp_path / "a", items(3))
    entries = index_of(tmp_path / "a")["samples"][::-1]
    again = [Item({**entry, "file": "else", "shape": [1]}, item(2 - i).load) for i, entry in enumerate(entries)]
    write_set(tmp_path / "b", again)
    assert [entry["key"] for entry in index_of(tmp_path / "b")["samples"]] == ["0000", "0001", "0002"]
    assert torch.equal(open_store(tmp_path / "b").read(0)[0], tensors(2)[0] + 2)


def test_letters_stay_letters_and_names_that_are_no_text_are_kept(tmp_path):
    source = os.fsdecode(b"m\xc3\xbchle\xff.mp4")
    write_set(tmp_path, [item(0, caption="海边的日出", source=source)])
    text = (tmp_path / "index.json").read_text(encoding="utf-8")
    assert "海边的日出" in text
    assert json.loads(text)["samples"][0]["source"] == source


# -- whole, or as it was ----------------------------------------------------------------------------------------------


def test_a_set_written_anew_keeps_what_is_the_same_and_removes_what_is_not_named(tmp_path):
    write_set(tmp_path, items(4), negative={"a": torch.ones(2)}, shard_samples=2)
    before = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    (tmp_path / "notes-00000-0123456789ab.safetensors").write_text("mine")
    (tmp_path / "00000000.safetensors").write_text("mine, too")
    (tmp_path / ".tmp-samples-00001-0123456789ab.safetensors").write_text("of a killed process")
    write_set(tmp_path, [*items(2), item(2, caption="other"), item(4, caption="new")], shard_samples=2)
    after = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    first = next(name for name in before if name.startswith("samples-00000"))
    assert after[first] == before[first]  # not written again
    assert {re.sub("-[0-9a-f]{12}", "", name) for name in after} == {
        "index.json", "samples-00000.safetensors", "samples-00001.safetensors",
        "notes-00000.safetensors", "00000000.safetensors",
    }  # fmt: skip
    assert not before.keys() & {name for name in after if name.startswith("samples-00001")}
    assert [open_store(tmp_path).caption(i) for i in range(4)] == ["caption 0", "caption 1", "other", "new"]


def test_until_the_new_set_is_complete_the_old_one_is(tmp_path):
    write_set(tmp_path, items(4), shard_samples=2)
    before = files(tmp_path)

    def stops():
        yield from (item(i) for i in (2, 1, 0))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_set(tmp_path, stops(), shard_samples=2)
    assert before.items() < files(tmp_path).items()  # and the first shard of the new one
    write_set(tmp_path, items(4), shard_samples=2)
    assert files(tmp_path) == before


@pytest.mark.parametrize("damage", [lambda data: data[:-8], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_shard_that_is_not_whole_is_written_again(tmp_path, damage):
    write_set(tmp_path, items(2))
    before = files(tmp_path)
    [shard] = tmp_path.glob("samples-*")
    shard.write_bytes(damage(shard.read_bytes()))
    write_set(tmp_path, items(2))
    assert files(tmp_path) == before


def test_a_full_disk_is_one_line_and_harms_no_set(tmp_path, monkeypatch):
    write_set(tmp_path, items(2))
    before = files(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "save_tensors", full)
    with pytest.raises(WriteError, match=r"^cannot write .*/samples-00000-[0-9a-f]{12}\.safetensors: No space left"):
        write_set(tmp_path, [item(1)])
    assert files(tmp_path) == before
    (tmp_path / "a").write_text("")
    with pytest.raises(WriteError, match=r"cannot write .*/a: File exists"):
        write_set(tmp_path / "a", items(1))


def test_one_shard_is_held_in_memory(tmp_path):
    alive, most = set(), 0

    def load(i):
        nonlocal most
        value = torch.ones(1, 1, 8, 8) * (i + 1)
        alive.add(i)
        most = max(most, len(alive))
        weakref.finalize(value, alive.discard, i)
        return {"latents": value}

    write_set(tmp_path, [Item({"caption": "x"}, lambda i=i: load(i)) for i in range(20)], shard_samples=4)
    assert most <= 2  # what `load` gives is copied; copies of a shard are what is kept


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "there are no samples to write"),
        ([Item({}, lambda: {"latents": torch.ones(1, 1, 1, 1)})], "sample 0 has neither conditioning nor a caption"),
        ([Item({}, lambda: {"latents": torch.ones(1, 0, 1, 1)})], r"sample 0 has latents \[1, 0, 1, 1\]"),
        ([Item({}, lambda: {"latents": torch.ones(1, 1, 1, 1), "a": torch.ones(2).to_sparse()})], "sparse"),
        ([Item({}, lambda: {"a": torch.ones(2)})], r"no latents, and the shape None; that of a text alone is \[C, 0"),
        ([text_item(0, (4, 1, 2, 2))], r"no latents, and the shape \[4, 1, 2, 2\]; that of a text alone is \[C, 0"),
        ([Item({"shape": [4, 0, 2, 2]}, dict)], "sample 0 has neither conditioning nor a caption"),
        ([item(0), text_item(1)], "sample 1 has no latents, and those before have some: write two sets"),
        ([text_item(0), item(1)], "sample 1 has latents, and those before have none: write two sets"),
    ],
)
def test_what_is_no_set_is_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        write_set(tmp_path, wrong)
    assert not (tmp_path / "index.json").exists()


# -- what is read -----------------------------------------------------------------------------------------------------


def test_a_set_of_texts_alone(tmp_path):
    write_set(tmp_path, [text_item(i, caption=str(i)) for i in range(3)])
    store = open_store(tmp_path)
    assert store.text_only
    assert [store.shape(i) for i in range(3)] == [(4, 0, 2, 2)] * 3
    latents, text = store.read(2)
    assert latents.shape == (4, 0, 2, 2)
    assert torch.equal(text["prompt_embeds"], torch.full((6, 8), 2.0))
    config = LatentsConfig(path=str(tmp_path))
    for use in (config.look_ahead, lambda: config.build(None)):
        with pytest.raises(
            ValueError, match=r"index.json is a set of texts alone, which .*; give .* \{kind: prompts\}"
        ):
            use()


def test_a_set_of_both_is_refused(tmp_path):
    write_set(tmp_path, items(3))
    index = index_of(tmp_path)
    index["samples"][1]["shape"] = [4, 0, 2, 2]
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"1 of 3 samples have no latents \(the first is sample 1\); make a set"):
        open_store(tmp_path)


def test_each_file_is_opened_once_while_few_are_read(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(tensor_files, "safe_open", lambda path, *rest: opened.append(path) or safe_open(path, *rest))
    monkeypatch.setattr(tensor_files, "MOST_OPEN", 8)
    write_set(tmp_path, items(24), shard_samples=2)
    opened.clear()
    store = open_store(tmp_path)
    for i in (*range(16), *range(16)):
        store.read(i)
        store.header(i)
    assert len(opened) == 8
    for i in range(24):
        store.read(i)
    assert len(opened) == 8 + 4  # the first eight were open
    store.read(0)
    assert len(opened) == 13


def test_large_files_do_not_stay_open(tmp_path, monkeypatch):
    write_set(tmp_path, items(24), shard_samples=2)
    opened = []
    monkeypatch.setattr(tensor_files, "safe_open", lambda path, *rest: opened.append(path) or safe_open(path, *rest))
    monkeypatch.setattr(tensor_files, "MOST_BYTES", 3 * max(path.stat().st_size for path in tmp_path.glob("samples-*")))
    store = open_store(tmp_path)
    for i in (0, 2, 4, 0, 2, 4):
        store.read(i)
    assert len(opened) == 3
    for i in (6, 8, 0):  # the third from the last is closed
        store.read(i)
    assert len(opened) == 6
    monkeypatch.setattr(tensor_files, "MOST_BYTES", 1)
    for i in (2, 3, 3):  # one alone is open whatever its size
        store.read(i)
    assert len(opened) == 7


def test_a_store_goes_to_another_process_without_its_open_files(tmp_path):
    write_set(tmp_path, items(2))
    store = open_store(tmp_path)
    store.read(0)
    assert torch.equal(pickle.loads(pickle.dumps(store)).read(1)[0], tensors(1)[0] + 1)


def test_a_file_that_changes_while_it_is_open_is_opened_anew(tmp_path):
    """What a file was cut to must not be touched as it was mapped: that ends the process by SIGBUS."""
    write_set(tmp_path, items(2))
    store = open_store(tmp_path)
    store.read(0)
    [shard] = tmp_path.glob("samples-*")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:4])
    with pytest.raises(SampleError, match=r"^sample 0: .*safetensors cannot be read .SafetensorError"):
        store.read(0)
    shard.write_bytes(whole)
    assert torch.equal(store.read(1)[0], tensors(1)[0] + 1)
    shard.unlink()
    with pytest.raises(SampleError, match=r"^sample 1: .*safetensors is missing"):
        store.read(1)


def rewrite(folder, change):
    """Changes the tensors of the one shard of a set in place."""
    [shard] = folder.glob("samples-*")
    stored = load_file(shard)
    change(stored)
    save_file(stored, shard)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("0001/latents"), "has no tensor '0001/latents'"),
        (lambda t: [t.pop(name) for name in list(t) if name.startswith("0001/")], "has no tensor '0001/latents'"),
        (lambda t: t.update({"0001/latents": torch.ones(4, 4, 2, 2)}), r"has latents \[4, 4, 2, 2\], but the index"),
        (lambda t: t.update({"0001/x": torch.ones(2).to(torch.float8_e5m2)}), "has x of F8_E5M2; it must be of"),
    ],
)
def test_what_is_wrong_in_a_shard_is_that_of_one_sample(tmp_path, change, message):
    write_set(tmp_path, items(3))
    rewrite(tmp_path, change)
    store = open_store(tmp_path)
    for read in (store.read, store.header):
        with pytest.raises(SampleError, match=rf"^sample 1: .*/samples-.* {message}"):
            read(1)
        read(0)
        read(2)


@pytest.mark.parametrize("key", ["", 3, "a/b"])
def test_a_key_that_is_none(tmp_path, key):
    write_set(tmp_path, items(2))
    index = index_of(tmp_path)
    index["samples"][1]["key"] = key
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(
        SampleError, match=rf"sample 1: .*index.json has key: {key!r}, which must be text without a sla"
    ):
        open_store(tmp_path).read(1)


def test_a_damaged_shard_is_looked_at_once_and_names_how_many_it_hits(tmp_path, monkeypatch):
    write_set(tmp_path, items(18), shard_samples=6)
    opened = []
    monkeypatch.setattr(tensor_files, "safe_open", lambda path, *rest: opened.append(path) or safe_open(path, *rest))
    first, second, third = sorted(tmp_path.glob("samples-*"))
    first.write_bytes(b"short")
    second.unlink()
    rewrite_nan = load_file(third)
    rewrite_nan["0001/latents"][0] = float("nan")
    save_file(rewrite_nan, third)
    report = Report("")
    contents = read_set(tmp_path, report)
    assert [sample.index for sample in contents.seen] == list(range(12, 18))
    assert opened == [first, third]
    assert [problem.message.split(":")[0] for problem in report.problems] == [
        "1 files are missing", "6 samples cannot be read", "1 numbers are NaN or infinite",
    ]  # fmt: skip
    missing, broken, bad = (problem.places for problem in report.problems)
    assert missing == [f"{second} (samples 6 to 11)"]
    assert broken[0].startswith(f"{first}: sample 0 cannot be read (SafetensorError")
    assert broken[0].endswith(" (as samples 1 to 5)")
    assert bad == [f"{third} (sample 13): latents"]
