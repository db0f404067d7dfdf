"""Stored latents and prompts: both layouts read to the bit, broken files named, training and evaluation on them."""

import json
import os
import re
from functools import partial

import pytest
import torch
from helpers import digits_backbone, distil, evaluate, tiny_recipe
from safetensors.torch import load_file, save_file
from stored_sets import NAMES, SHAPES, entry, tensors, write_index, write_own, write_published, write_version_1

from moedistill.data import tensor_files
from moedistill.data.base import Sample
from moedistill.data.latents import LatentsConfig, open_store, write_latents
from moedistill.data.loading import collate, load_batches
from moedistill.data.prompts import PromptsConfig, read_prompts
from moedistill.data.writing import Item, write_set
from moedistill.errors import RecipeError, UserError
from moedistill.model.conditioning import stack
from moedistill.recipe.loading import load_recipe
from moedistill.recipe.miniature import miniature
from moedistill.runs.loop import run
from moedistill_digits.data import DigitsConfig


class Encoder:
    """The part of a backbone that datasets use. A prompt is encoded to its length, and to its letters."""

    def __init__(self):
        self.asked = []

    def encode(self, prompts):
        self.asked.append(list(prompts))
        rows = [torch.tensor([[float(ord(letter))] for letter in prompt[:6].ljust(6)]) for prompt in prompts]
        return {"prompt_embeds": torch.stack(rows), "length": torch.tensor([len(prompt) for prompt in prompts])}

    def latent_shape(self):
        return (4, 3, 2, 6)

    def unpack(self, cond):
        return cond


def build(path, backbone=None):
    return LatentsConfig(path=str(path)).build(backbone or Encoder())


def own_samples():
    return [Sample(*tensors(i)) for i in range(3)]


def same(one, other):
    return one.dtype == other.dtype and torch.equal(one, other)


# -- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["published", "batch of one", "old format", "own", "version 1"])
def test_samples_are_what_was_stored(tmp_path, layout):
    if layout == "own":
        path = write_own(tmp_path / "set")
    elif layout == "version 1":
        path = write_version_1(tmp_path / "set", own_samples())
    else:
        path = write_published(tmp_path / "set", layout == "batch of one", zipped=layout != "old format")
    for dataset in (build(path), build(tmp_path / "set")):
        assert len(dataset) == 3
        for i in range(3):
            latents, text = tensors(i)
            sample = dataset[i]
            assert same(sample.latents, latents.float())  # latents as numbers to compute with …
            assert set(sample.conditioning) == set(text)
            assert all(same(sample.conditioning[name], text[name]) for name in text)  # … text as it is
            assert dataset.shape(i) == SHAPES[i]
        assert dataset.null_conditioning() is None


def test_shapes_come_from_headers_alone(tmp_path, monkeypatch):
    """No number of the latents is read: those of the published set are mapped, and our own index knows."""
    path, own = write_published(tmp_path / "published"), write_own(tmp_path / "own")
    loads = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: loads.append(options) or load(*args, **options))
    dataset = build(path)
    assert loads == []
    assert [dataset.shape(i) for i in (0, 1, 2, 0, 1)] == [*SHAPES, *SHAPES[:2]]
    assert [(options["mmap"], options["weights_only"]) for options in loads] == [(True, True)] * 3  # and once each
    monkeypatch.setattr(tensor_files, "safe_open", None)
    assert [open_store(own).shape(i) for i in range(3)] == SHAPES


def test_what_a_pt_file_may_hold_is_a_tensor_and_no_code(tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    path = write_published(tmp_path / "set")
    for value, reason in ((Code(), "UnpicklingError"), ({"latent": torch.ones(1)}, "it holds a dict, not a tensor")):
        torch.save(value, tmp_path / "set" / "latent" / NAMES[1])
        with pytest.raises(ValueError, match=rf"^sample 1: .*video\.1\.pt cannot be read .*{reason}.* data check"):
            build(path)[1]
    assert not (tmp_path / "run").exists()


def test_mixed_shapes_are_bucketed(tmp_path):
    dataset = build(write_published(tmp_path / "set"))
    options = {"batch_size": 2, "accumulation": 1, "seed": 0, "stage": "s"}
    shapes = [tuple(batch.latents.shape) for batch in load_batches(dataset, **options, steps=range(2))]
    assert sorted(shapes) == [(2, 4, 3, 2, 2), (2, 4, 5, 2, 2)]


# -- captions ---------------------------------------------------------------------------------------------------------


def test_captions_without_embeddings_are_encoded_once(tmp_path):
    bare = {"prompt_embed_path": None, "prompt_attention_mask": None}
    entries = [
        entry(0, **bare, caption="sea"),
        entry(1),
        entry(2, **bare, caption="hills"),
        entry(0, **bare, caption="sea"),
    ]
    for keyless in (False, True):
        if keyless:
            entries = [{key: value for key, value in one.items() if value is not None} for one in entries]
        encoder = Encoder()
        dataset = build(write_published(tmp_path / str(keyless), entries=entries), encoder)
        lengths = [dataset[i].conditioning.get("length") for i in (0, 2, 3, 0)]
        assert [int(length) for length in lengths] == [3, 5, 3, 3]
        assert encoder.asked == [["sea", "hills"]]
        assert same(dataset[1].conditioning["prompt_embeds"], tensors(1)[1]["prompt_embeds"])
        assert dataset[2].conditioning["prompt_embeds"][:, 0].tolist() == [float(ord(letter)) for letter in "hills "]


def test_own_samples_may_have_captions_only(tmp_path):
    samples = [Sample(tensors(i)[0], tensors(i)[1] if i == 1 else {}) for i in range(3)]
    write_latents(tmp_path, samples, captions=["a", "b", "cc"])
    dataset = build(tmp_path)
    assert [set(dataset[i].conditioning) for i in range(3)] == [
        {"prompt_embeds", "length"}, {"prompt_embeds", "prompt_attention_mask"}, {"prompt_embeds", "length"},
    ]  # fmt: skip
    assert dataset[2].conditioning["length"] == 2


# -- our own layout ---------------------------------------------------------------------------------------------------


def test_the_negative_prompt_is_stored(tmp_path):
    negative = {"prompt_embeds": torch.full((6, 8), 0.5, dtype=torch.bfloat16)}
    dataset = build(write_own(tmp_path, negative=negative, captions=["x", "y", "z"]))
    assert same(dataset.null_conditioning()["prompt_embeds"], negative["prompt_embeds"])
    index = json.loads((tmp_path / "index.json").read_text())
    assert re.fullmatch(r"negative-[0-9a-f]{12}\.safetensors", index["negative"])
    assert [sample["caption"] for sample in index["samples"]] == ["x", "y", "z"]
    assert (index["format"], index["version"]) == ("moedistill-latents", 2)


def test_views_are_stored_by_themselves(tmp_path):
    whole = torch.arange(2 * 4 * 3 * 2 * 2.0).view(2, 4, 3, 2, 2)
    write_latents(tmp_path, [Sample(half.transpose(2, 3), {"a": half[0, 0], "b": half[0, 0]}) for half in whole])
    assert torch.equal(build(tmp_path)[1].latents, whole[1].transpose(2, 3))
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 1100


def test_a_set_is_complete_or_has_no_index(tmp_path):
    def stops():
        yield Sample(*tensors(0))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_latents(tmp_path, stops())
    (tmp_path / "samples-00000-0123456789ab.safetensors").touch()  # a whole shard was written before
    with pytest.raises(ValueError, match=r"neither videos2caption.json nor index.json; its index.json is written last"):
        build(tmp_path)
    write_own(tmp_path)
    assert len(build(tmp_path)) == 3
    assert len(list(tmp_path.iterdir())) == 2  # what was left over is gone
    with pytest.raises(ValueError, match=r"holds a set already; choose another folder, or remove its index.json"):
        write_own(tmp_path)


@pytest.mark.parametrize(
    ("samples", "captions", "message"),
    [
        ([], None, "no samples to write"),
        ([Sample(torch.ones(3, 2, 2), {"a": torch.ones(1)})], None, r"sample 0 has latents \[3, 2, 2\]"),
        ([Sample(torch.ones(1, 1, 1, 1).long(), {"a": torch.ones(1)})], None, "latents of torch.int64"),
        ([Sample(torch.ones(1, 1, 1, 1), {})], None, "neither conditioning nor a caption"),
        ([Sample(torch.ones(1, 1, 1, 1), {"latents": torch.ones(1)})], None, "the latents' name"),
        ([Sample(*tensors(0)), Sample(*tensors(1))], ["one"], "sample 1 has no caption"),
        ([Sample(*tensors(0))], ["one", "two"], "sample 1 has no latents"),
    ],
)
def test_what_cannot_be_written(tmp_path, samples, captions, message):
    with pytest.raises(ValueError, match=message):
        write_latents(tmp_path, samples, captions=captions)
    assert not (tmp_path / "index.json").exists()


# -- what is broken ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "neither videos2caption.json nor index.json"),
        ("{", "videos2caption.json cannot be read as JSON"),
        (b"\xff\xfe[", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "lists no samples"),
        ("7", "neither a list of samples"),
        ('{"format": "other"}', "neither a list of samples"),
        ('{"format": "moedistill-latents", "version": 3}', "has version 3, this moedistill reads 1 and 2; update"),
        ('{"format": "moedistill-latents", "version": 1, "samples": {}}', "samples must be a list"),
        ('{"format": "moedistill-latents", "version": 1, "samples": [], "negative": 3}', "negative a file's name"),
        ('["x"]', "sample 0: .* has 'x' where a sample's keys must be"),
        ("[{}]", "sample 0: .* gives it no 'latent_path'"),
        ('[{"latent_path": 3}]', "has latent_path: 3, which must be a file's name"),
        ('[{"latent_path": "a.pt", "prompt_embed_path": []}]', r"has prompt_embed_path: \[\]"),
        ('[{"latent_path": "a.pt"}]', "latent/a.pt is missing"),
    ],
)
def test_a_broken_index(tmp_path, content, message):
    file = tmp_path / "videos2caption.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        build(tmp_path)
    with pytest.raises(ValueError, match=r"there is no file or folder .*nowhere"):
        build(tmp_path / "nowhere")


@pytest.mark.parametrize("folder", ["latent", "prompt_embed", "prompt_attention_mask"])
def test_a_missing_file_is_seen_when_the_dataset_is_built(tmp_path, folder):
    path = write_published(tmp_path / "set")
    (tmp_path / "set" / folder / NAMES[2]).unlink()
    with pytest.raises(ValueError, match=rf"sample 2: .*/{folder}/video.2.pt is missing; .*out of the index"):
        build(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x80\x04", b"text"])
def test_a_damaged_file_is_named(tmp_path, content):
    path = write_published(tmp_path / "set")
    dataset = build(path)
    for folder in ("latent", "prompt_embed"):
        (tmp_path / "set" / folder / NAMES[1]).write_bytes(content)
        with pytest.raises(ValueError, match=rf"sample 1: .*/{folder}/video.1.pt cannot be read"):
            dataset[1]
        torch.save(tensors(1)[0], tmp_path / "set" / folder / NAMES[1])
    own = write_version_1(tmp_path / "own", own_samples())
    dataset = build(own)
    dataset[1]
    (own / "00000001.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"sample 1: .*00000001.safetensors cannot be read"):
        dataset[1]


def test_a_file_that_vanishes_and_one_that_does_not_agree_with_the_index(tmp_path):
    dataset = build(write_version_1(tmp_path, own_samples()))
    (tmp_path / "00000000.safetensors").unlink()
    save_file({"latents": torch.ones(4, 4, 2, 2)}, tmp_path / "00000001.safetensors")
    save_file({"text": torch.ones(1)}, tmp_path / "00000002.safetensors")
    for i, reason in enumerate(
        ["is missing", r"\[4, 4, 2, 2\], but the index says \[4, 5, 2, 2\]", "no tensor 'latents'"]
    ):
        with pytest.raises(ValueError, match=rf"sample {i}: .*0000000{i}.safetensors .*{reason}"):
            dataset[i]
    torch.save(torch.ones(3, 2, 2), write_published(tmp_path / "set").parent / "latent" / NAMES[0])
    for read in (lambda data: data[0], lambda data: data.shape(0)):
        with pytest.raises(ValueError, match=r"video.0.pt has latents \[3, 2, 2\], which must be \[C, T, H, W\]"):
            read(build(tmp_path / "set"))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_sample_stops_the_run_without_a_traceback(tmp_path, num_workers):
    dataset = build(write_published(tmp_path / "set"))
    (tmp_path / "set" / "prompt_embed" / NAMES[1]).write_bytes(b"")
    options = {"batch_size": 1, "accumulation": 1, "seed": 0, "stage": "s", "steps": range(3)}
    with pytest.raises(UserError) as caught:
        list(load_batches(dataset, **options, num_workers=num_workers))
    message = str(caught.value)
    assert message.startswith("data: sample 1: ")
    assert f"prompt_embed/{NAMES[1]} cannot be read" in message
    assert "Traceback" not in message
    assert "worker" not in message


@pytest.mark.parametrize("num_workers", [0, 1])
def test_texts_of_unequal_length_make_no_batch(tmp_path, num_workers):
    samples = [Sample(tensors(0)[0], {"prompt_embeds": torch.ones(length, 8)}) for length in (5, 6)]
    write_latents(tmp_path, samples)
    options = {"batch_size": 2, "accumulation": 1, "seed": 0, "stage": "s", "steps": range(1)}
    with pytest.raises(
        UserError, match=r"\[., 8\].* and .*\[., 8\].*: give all prompts the same padded length"
    ) as caught:
        list(load_batches(build(tmp_path), **options, num_workers=num_workers))
    assert "Traceback" not in str(caught.value)
    assert len(list(load_batches(build(tmp_path), **{**options, "accumulation": 2}))) == 2  # one at a time
    with pytest.raises(ValueError, match=r"\{'a': \[1\]\} and \{'b': \[1\]\}"):
        stack([{"a": torch.ones(1)}, {"b": torch.ones(1)}])


# -- synthetic samples ------------------------------------------------------------------------------------------------


def test_synthetic_samples():
    config, encoder = LatentsConfig(path=None), Encoder()
    dataset = config.build(encoder)
    assert encoder.asked == [[f"synthetic {i}" for i in range(8)]]
    assert (len(dataset), dataset.shape(3)) == (8, (4, 3, 2, 6))
    all_latents = torch.stack([dataset[i].latents for i in range(8)])
    assert all_latents.dtype == torch.float32
    assert abs(all_latents.mean()) < 0.1
    assert abs(all_latents.std() - 1) < 0.1
    assert len({float(one.flatten()[0]) for one in all_latents}) == 8
    assert torch.equal(config.build(Encoder())[5].latents, all_latents[5])
    assert dataset[5].conditioning["prompt_embeds"].shape == (6, 1)
    digits = LatentsConfig(path=None).build(digits_backbone())  # which takes no such prompts, but the empty one
    assert (digits[7].latents.shape, digits[7].conditioning["digit"]) == ((12, 8, 4, 4), 10)


def test_a_smoke_run_needs_no_files():
    for kind in ("latents", "prompts"):
        data = {"kind": kind, "path": "no/such/file", "text_dropout": 0.5}
        small = miniature(load_recipe(tiny_recipe([evaluate()], {"data": data}))).data
        assert (small.kind, small.path, small.text_dropout) == (kind, None, 0.5)


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_read_prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(
        "\ufeff# seas\r\nthe sea, calm \r\n\r\n  # not this\n a #hash inside\nthe sea, calm\nhügel".encode()
    )
    assert read_prompts(file) == ["the sea, calm", "a #hash inside", "the sea, calm", "hügel"]
    index = write_published(tmp_path / "set")
    captions = ["caption 0", "caption 1", "caption 2"]
    assert read_prompts(index) == read_prompts(str(index.parent)) == captions
    assert read_prompts(write_own(tmp_path / "own", captions=captions)) == captions
    write_index(tmp_path, [{"caption": "of no video"}])
    assert read_prompts(tmp_path / "videos2caption.json") == ["of no video"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "there is no file .*a.txt; give a text file with one prompt per line"),
        ("a.txt", b"\n # x\n", "has no prompts"),
        ("a.txt", b"\xff\xff", "cannot be read as text .* give UTF-8"),
        ("a.json", None, "there is no file or folder"),
        ("a.json", b'[{"caption": "x"}, {}]', "sample 1 has no caption"),
        ("a.json", b'[{"caption": ["x"]}]', r"sample 0: .*has the caption \['x'\], which must be text"),
        (".", None, "neither videos2caption.json nor index.json"),
    ],
)
def test_prompts_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_prompts_are_samples_without_frames(tmp_path):
    (tmp_path / "prompts").write_text("3 right\n7 up\n")
    backbone = digits_backbone()
    dataset = PromptsConfig(path=str(tmp_path / "prompts")).build(backbone)
    assert len(dataset) == 2
    latents, cond = backbone.prepare(*collate([dataset[0], dataset[1]]))
    assert latents.shape == (2, 12, 0, 4, 4)
    assert (cond["digit"].tolist(), cond["direction"].tolist()) == ([3, 7], [0, 3])
    assert dataset.shape(1) == (12, 0, 4, 4)
    assert len(PromptsConfig(path=None).build(Encoder())) == 8


@pytest.mark.parametrize("layout", ["published", "own", "texts alone"])
def test_prompts_of_a_set_are_used_as_they_are_stored(tmp_path, layout):
    """Without a look at its latents; captions that have nothing else are encoded."""
    text, negative = {"prompt_embeds": torch.randn(6, 1)}, {"prompt_embeds": torch.randn(6, 1)}
    if layout == "published":
        bare = {"prompt_embed_path": None, "prompt_attention_mask": None}
        write_published(tmp_path, entries=[{**entry(0), "latent_path": "none"}, entry(1, **bare, caption="sea")])
        text = tensors(0)[1]
    elif layout == "own":
        samples = [Sample(tensors(0)[0], text), Sample(tensors(1)[0], {})]
        write_latents(tmp_path, samples, captions=["hill", "sea"], negative=negative)
    else:
        stored = [({"caption": "hill"}, text), ({"caption": "sea"}, {})]
        items = [Item({"shape": [4, 0, 2, 2], **keys}, partial(dict, tensors)) for keys, tensors in stored]
        write_set(tmp_path, items, negative=negative)
    encoder = Encoder()
    config = PromptsConfig(path=str(tmp_path))
    config.look_ahead()
    dataset = config.build(encoder)
    assert len(dataset) == 2
    assert encoder.asked == [["sea"]]
    assert dataset[0].latents.shape == dataset.shape(1) == (4, 0, 2, 6)
    assert all(same(dataset[0].conditioning[name], text[name]) for name in text)
    assert dataset[1].conditioning["length"] == 3
    if layout != "published":
        assert read_prompts(tmp_path) == ["hill", "sea"]
        assert same(dataset.null_conditioning()["prompt_embeds"], negative["prompt_embeds"])


def test_what_is_wrong_with_a_set_of_prompts(tmp_path):
    config = PromptsConfig(path=str(tmp_path))
    bad = {"prompt_embeds": torch.ones(6, 1)}
    write_set(tmp_path, [Item({"shape": [4, 0, 2, 2]}, lambda: bad)])
    [shard] = tmp_path.glob("samples-*")
    save_file({"0000/prompt_embeds": torch.full((6, 1), float("nan"))}, shard)
    with pytest.raises(ValueError, match=r"^sample 0: .*samples-.* has prompt_embeds that are NaN or infinite"):
        config.build(Encoder())[0]
    shard.unlink()
    with pytest.raises(ValueError, match=r"^sample 0: .*samples-.* is missing"):
        config.look_ahead()
    write_index(tmp_path / "..", [{"caption": "of no video"}, {"latent_path": "a"}])
    with pytest.raises(
        ValueError, match=r"^sample 1: .*2caption.json has neither stored text embeddings nor a caption"
    ):
        PromptsConfig(path=str(tmp_path / ".." / "videos2caption.json")).look_ahead()


def test_prompts_cannot_be_trained_on(tmp_path):
    data = {"data": {"kind": "prompts", "path": str(tmp_path / "prompts")}}
    with pytest.raises(RecipeError, match=r"'prompts' has no latents, which stages.0 needs[\s\S]*kind: latents"):
        load_recipe(tiny_recipe([distil(), evaluate()], data))
    assert load_recipe(tiny_recipe([evaluate()], data)).data.kind == "prompts"


# -- runs -------------------------------------------------------------------------------------------------------------


def losses_of(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_training_on_stored_latents_equals_training_on_their_source(tmp_path):
    source = DigitsConfig(styles_per_digit=1).build(None)
    write_latents(tmp_path / "set", [source[i] for i in range(len(source))])
    stored = {"kind": "latents", "path": str(tmp_path / "set")}
    for name, data in (("a", {"kind": "digits", "styles_per_digit": 1}), ("b", stored)):
        run(tiny_recipe([distil(), evaluate()], {"data": data}), output=tmp_path / name, device="cpu")
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b")
    assert min(losses_of(tmp_path / "b")) > 0
    one, other = (load_file(tmp_path / name / "evaluate" / "latents.safetensors") for name in "ab")
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_on_a_broken_set_exits_cleanly(tmp_path):
    source = DigitsConfig(styles_per_digit=1).build(None)
    write_version_1(tmp_path / "set", [source[i] for i in range(4)])
    recipe = tiny_recipe([distil()], {"data": {"kind": "latents", "path": str(tmp_path / "set")}})
    (tmp_path / "set" / "00000002.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"^data.path: .*\n.*1 samples cannot be read.*\n.*t be read .SafetensorError"):
        run(recipe, output=tmp_path / "run", device="cpu")
    (tmp_path / "set" / "00000002.safetensors").unlink()
    with pytest.raises(UserError, match=r"^data.path: .*\n.*1 files are missing.*\n.*00000002.safetensors$"):
        run(recipe, output=tmp_path / "run", device="cpu")


def test_evaluation_over_prompts_in_a_file(tmp_path):
    """The file of the stage, and that of the data; the same prompts in the recipe give the same samples."""
    (tmp_path / "prompts").write_text("3 right\n7 up\n# 9 up\n")

    def digits(name, changes=(), **stage):
        folder = run(tiny_recipe([evaluate(**stage)], changes), output=tmp_path / name, device="cpu").output
        return load_file(folder / "evaluate" / "latents.safetensors")

    listed, filed = digits("a", prompts=["3 right", "7 up"]), digits("b", prompts=str(tmp_path / "prompts"))
    assert listed["conditioning.digit"].tolist() == [3, 7, 3, 7]
    assert all(torch.equal(listed[name], filed[name]) for name in listed)
    data = digits("c", {"data": {"kind": "prompts", "path": str(tmp_path / "prompts")}})
    assert sorted(data["conditioning.digit"].tolist()) == [3, 3, 7, 7]
    with pytest.raises(UserError, match=r"stage evaluate: there is no file .*nowhere"):
        digits("d", prompts=str(tmp_path / "nowhere"))


def test_evaluation_over_data_of_mixed_shapes(tmp_path):
    """The conditioning of all samples is wanted, and none of their videos."""
    conds = [{"digit": torch.tensor(i), "direction": torch.tensor(0)} for i in range(4)]
    shapes = [(12, 8, 4, 4), (12, 16, 4, 4)] * 2
    write_latents(
        tmp_path / "set", [Sample(torch.ones(shape), cond) for shape, cond in zip(shapes, conds, strict=True)]
    )
    recipe = tiny_recipe([evaluate()], {"data": {"kind": "latents", "path": str(tmp_path / "set")}})
    folder = run(recipe, output=tmp_path / "run", device="cpu").output
    assert sorted(load_file(folder / "evaluate" / "latents.safetensors")["conditioning.digit"].tolist()) == [0, 1, 2, 3]
