"""`moedistill data check`: all that is in a set, all that is broken, all that does not fit; never a traceback."""

import json
import os

import pytest
import torch
from helpers import distil, evaluate, tiny_recipe
from stored_sets import NAMES, entry, tensors, write_index, write_own, write_published, write_version_1

from moedistill import cli
from moedistill.data.base import Sample
from moedistill.data.writing import Item, write_set
from moedistill.model.layout import Input, SampleLayout
from moedistill.recipe.loading import load_recipe
from moedistill.runs.check import check_set
from moedistill_digits.backbone import DigitsBackboneConfig

TEXT = {
    "prompt_embeds": Input("text", (6, 8), any_length=True),
    "prompt_attention_mask": Input("mask", (6,), any_length=True),
}
UNFIT = "times a sample is not as digits takes it"
LAYOUT = SampleLayout(4, (1, 2, 2), TEXT)
"""What the samples of test_latents.py are: [4, 3 or 5, 2, 2] with text [6, 8]."""


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Checks the set in `tmp_path` against the tiny recipe, with changes, on a backbone that takes `layout`."""

    def do(*stages, changes=(), layout=LAYOUT, path=tmp_path):
        monkeypatch.setattr(DigitsBackboneConfig, "layout", lambda self: layout)
        data = {"data": {"kind": "latents", "path": str(tmp_path)}, "training.batch_size": 1}
        recipe = load_recipe(tiny_recipe(stages or [distil()], {**data, **dict(changes)}))
        return check_set(path, recipe)

    return do


@pytest.fixture
def call(capsys):
    def do(*args):
        with pytest.raises(SystemExit) as stop:
            cli.main(["data", "check", *map(str, args)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return stop.value.code, captured.out, captured.err

    return do


def publish(folder, **options):
    write_published(folder / "set", **options)
    for name in os.listdir(folder / "set"):
        (folder / "set" / name).rename(folder / name)
    return folder


def problem(report):
    """The one problem of a report: its message and places."""
    [found] = report.problems
    return found.message, found.places


def facts(report):
    return dict(report.facts)


# -- what is there ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["published", "moedistill"])
def test_what_is_in_a_set(tmp_path, check, layout):
    if layout == "published":
        publish(tmp_path)
    else:
        negative = {"prompt_embeds": torch.ones(6, 8), "prompt_attention_mask": torch.ones(6)}
        write_own(tmp_path, captions=["a", "b", "c"], negative=negative)
    report = check_set(tmp_path)
    assert report.title == f"{tmp_path}: 3 samples, {layout} layout"
    assert {**facts(report), "dtypes": set(facts(report)["dtypes"].split(", "))} == {
        "latents": "[4, 3, 2, 2] × 2, [4, 5, 2, 2] × 1",
        "latent frames": "3 × 2, 5 × 1",
        "prompt_embeds": "[6, 8] × 3",
        "prompt_attention_mask": "[6] × 3",
        "text length": "3 to 5 by prompt_attention_mask, mean 4",
        "dtypes": {"latents bfloat16", "prompt_embeds float16", "prompt_attention_mask bool"},
        "captions": "3; 0 samples have nothing else",
        "files": "none not finite, none missing, none broken",
        "negative prompt": "stored" if layout == "moedistill" else "not stored",
    }
    assert report.fits
    assert report.notes == []
    fitting = check()
    assert (fitting.problems, fitting.notes, fitting.facts) == ([], [], report.facts)
    starts = {line.index(value) for line, (_, value) in zip(report.lines()[1:], report.facts, strict=True)}
    assert starts == {2 + len("prompt_attention_mask") + 2}  # aligned


def test_all_that_is_missing_broken_and_not_a_number(tmp_path):
    entries = [entry(i % 3) for i in range(6)]
    entries[4] = {"caption": "of nothing"}
    entries[5] = entry(2, prompt_embed_path="other.pt", prompt_attention_mask="another.pt")
    publish(tmp_path, entries=entries)
    torch.save(torch.tensor([1.0, float("nan")]).view(1, 2, 1, 1), tmp_path / "latent" / NAMES[0])
    torch.save(torch.full((6, 8), float("inf")), tmp_path / "prompt_embed" / NAMES[0])
    torch.save(torch.zeros(6), tmp_path / "prompt_attention_mask" / NAMES[0])
    (tmp_path / "latent" / NAMES[1]).write_bytes(b"")
    found = {found.message.split(":")[0]: found.places for found in check_set(tmp_path).problems}
    assert set(found) == {
        "2 files are missing", "2 samples cannot be read", "4 numbers are NaN or infinite",
        "2 text is masked out altogether, which makes the attention of some models NaN",
    }  # fmt: skip
    folder = str(tmp_path)
    assert found["2 files are missing"] == [
        f"{folder}/prompt_embed/other.pt", f"{folder}/prompt_attention_mask/another.pt"
    ]  # fmt: skip
    empty, nameless = found["2 samples cannot be read"]
    assert empty.startswith(f"{folder}/latent/{NAMES[1]}: sample 1 cannot be read (EOFError")
    assert nameless == f"{folder}/videos2caption.json: sample 4 gives it no 'latent_path'"
    assert found["4 numbers are NaN or infinite"] == [
        f"{folder}/latent/{NAMES[0]}: {name}" for name in ("latents", "prompt_embeds") * 2
    ]


def test_a_set_of_texts_alone(tmp_path, check):
    _, text = tensors(0)
    write_set(tmp_path, [Item({"shape": [4, 0, 2, 2]}, lambda: text)] * 3)
    report = check_set(tmp_path)
    assert facts(report)["latents"] == "none: texts alone"
    assert "latent frames" not in facts(report)
    assert "latents" not in facts(report)["dtypes"]
    assert facts(report)["prompt_embeds"] == "[6, 8] × 3"
    assert report.fits
    prompts = {"data": {"kind": "prompts", "path": str(tmp_path)}}
    fitting = check(evaluate(), changes=prompts)
    assert (fitting.problems, fitting.notes, fitting.warnings) == ([], [], [])
    other = SampleLayout(4, (1, 2, 2), {"prompt_embeds": Input("text", (6, 9))})
    assert len(problem(check(evaluate(), changes=prompts, layout=other))[1]) == 3
    videos = {"pictures": Input("video", (3, None, None, None), droppable=False)}
    for frames, fits in ((2, True), (3, False)):
        latents = (3, frames, 2, 2)
        cond = {"pictures": torch.ones(1, 3, 2, 2, 2)}
        assert (not list(SampleLayout(3, (1, 1, 1), videos).conditioning_problems(cond, latents))) == fits
        assert not list(SampleLayout(3, (1, 1, 1), videos).conditioning_problems(cond, (3, 0, 2, 2)))
    message, _ = problem(check(evaluate(), changes={"data": {"kind": "latents", "path": str(tmp_path)}}))
    assert message == "the set is of texts alone, which can be sampled from with kind: prompts"


def test_captions_alone(tmp_path):
    bare = {"prompt_embed_path": None, "prompt_attention_mask": None}
    publish(tmp_path, entries=[entry(0, **bare), entry(1), entry(2, **bare, caption=None)])
    report = check_set(tmp_path)
    assert facts(report)["captions"] == "2; 1 samples have nothing else"
    assert report.notes == [
        "1 of 3 samples have a caption only: it will be encoded with the model's text encoder"
    ]  # fmt: skip
    assert problem(report)[1] == [
        f"{tmp_path}/latent/{NAMES[2]}: sample 2 has neither stored text embeddings nor a caption"
    ]


def test_texts_that_make_no_batch(tmp_path, check):
    publish(tmp_path)
    torch.save(torch.ones(7, 8), tmp_path / "prompt_embed" / NAMES[2])  # of the shape of sample 0; sample 1 has another
    [note] = check_set(tmp_path).notes
    assert note.startswith("1 samples have the latent shape, but not the conditioning of others")
    assert check().fits  # one sample at a time
    message, [place] = problem(check(changes={"training.batch_size": 2}))
    assert message.endswith("pad all texts to the same length")
    assert f"{NAMES[2]}: prompt_embeds [7, 8]" in place
    assert f"{NAMES[0]}: prompt_embeds [6, 8]" in place
    assert check(changes={"training.batch_size": 2, "training.gradient_accumulation_steps": 2}).fits


def test_the_stored_negative_prompt(tmp_path, check):
    negative = {"prompt_embeds": torch.full((5, 8), float("nan")), "prompt_attention_mask": torch.ones(6)}
    write_own(tmp_path, negative=negative)
    places = [found.places for found in check_set(tmp_path).problems]
    [file] = tmp_path.glob("negative-*")
    assert places[0] == [f"{file}: prompt_embeds"]
    assert [place.rpartition(": ")[2] for place in places[1]] == ["prompt_embeds [6, 8], not [5, 8]"] * 3
    file.unlink()
    report = check_set(tmp_path)
    assert problem(report)[1] == [f"{file}: is missing"]
    assert facts(report)["negative prompt"] == "cannot be read"


# -- what does not fit a recipe ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "message", "place"),
    [
        (SampleLayout(16, (1, 2, 2), {}), UNFIT, ": sample 0 has latents [4, 3, 2, 2]; the model's have 16 channels"),
        (
            SampleLayout(4, (1, 2, 4), {}),
            UNFIT, ": sample 0 has latents [4, 3, 2, 2]: (T, H, W) must be multiples of (1, 2, 4)",
        ),
        (SampleLayout(4, (3, 1, 1), {}), "must be multiples of (3, 1, 1)", ": [5, 2, 2]"),
        (
            SampleLayout(4, (1, 1, 1), {"prompt_embeds": Input("text", (1, 9), any_length=True)}),
            UNFIT, ": sample 0 has prompt_embeds [6, 8]; the model takes [any, 9]",
        ),
        (
            SampleLayout(4, (1, 1, 1), {"prompt_embeds": Input("text", (8,))}),
            UNFIT, ": sample 0 has prompt_embeds [6, 8]; the model takes [8]",
        ),
        (
            SampleLayout(4, (1, 1, 1), {"prompt_embeds": Input("text", (5, 8), padded=True)}),
            UNFIT, ": sample 0 has prompt_embeds [6, 8]; the model takes [up to 5, 8]",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_backbone(tmp_path, check, layout, message, place):
    publish(tmp_path)
    found, places = problem(check(layout=layout))
    assert message in found
    first = NAMES[1] if "3, 1" in message else NAMES[0]
    assert places[0] == f"{tmp_path}/latent/{first}{place}"
    assert found.startswith(f"{len(places)} ")
    assert check(layout=None).fits


def test_conditioning_that_is_not_stored_or_not_read(tmp_path, check):
    write_own(tmp_path / "own")
    publish(tmp_path)
    layout = SampleLayout(
        4, (1, 1, 1), {"prompt_embeds": Input("text", (6, 8)), "pooled_prompt_embeds": Input("pooled", (8,))}
    )
    for path in (tmp_path, tmp_path / "own"):
        report = check(layout=layout, path=path)
        assert "stored, but no input of digits: prompt_attention_mask" in report.notes
        message, places = problem(report)
        assert message == f"3 {UNFIT}"
        assert places[1].endswith(
            ": sample 1 has no pooled_prompt_embeds, which the model takes; encode it and store it"
        )


def test_frames_after_the_cut_of_each_stage(tmp_path, check):
    publish(tmp_path)
    layout = SampleLayout(4, (2, 1, 1), {})
    assert check(distil(latent_frames=2), layout=layout).fits
    assert len(problem(check(distil(latent_frames=2), distil("detail"), layout=layout))[1]) == 3
    assert [place.rpartition(" [")[2] for place in problem(check(distil(latent_frames=4), layout=layout))[1]] == [
        "3, 2, 2]", "3, 2, 2]"
    ]  # fmt: skip


def test_videos_too_short_for_a_loss(tmp_path, check):
    publish(tmp_path)

    def coherence(lag, **stage):
        return distil(losses=[{"kind": "huber"}, {"kind": "temporal_coherence", "lag": lag}], **stage)

    assert check(coherence(2)).fits
    message, places = problem(check(coherence(3)))
    assert "too short for temporal_coherence of stage semantic, which needs more than 3 latent frames" in message
    assert [place.rpartition("/")[2] for place in places] == [f"{NAMES[0]}: 3", f"{NAMES[2]}: 3"]
    assert len(problem(check(coherence(4)))[1]) == 2
    message, places = problem(check(coherence(2, latent_frames=2)))
    assert len(places) == 3
    assert message.endswith("and more than latent_frames 2")


def test_notes_on_the_recipe(tmp_path, check):
    publish(tmp_path)
    batch = check(changes={"training.batch_size": 2})
    less = "fewer samples of a shape than training.batch_size 2, so they are repeated: [4, 5, 2, 2] × 1"
    assert batch.notes == [less]
    guided = {"backbone.guidance": {"mode": "classifier_free", "scale": 3.0}, "data.text_dropout": 0.1}
    [note] = check(changes=guided).notes
    assert note.startswith("classifier-free guidance and text_dropout, but no stored negative prompt: it will be enc")
    [note] = check(changes={"data.text_dropout": 0.1}).notes
    assert note.startswith("text_dropout, but no stored")
    assert check(path=tmp_path / "videos2caption.json").notes == []  # the same set by another name
    other = {"data.path": str(tmp_path / "latent")}
    assert check(changes=other).notes == [f"the recipe's data.path is {tmp_path / 'latent'}, not {tmp_path}"]
    assert "data.path is null" in check(changes={"data.path": None}).notes[0]
    digits = check(changes={"data": {"kind": "digits"}})
    assert digits.notes == ["the recipe's data are not of kind latents or prompts but digits"]
    assert all(report.fits for report in (batch, digits, check(changes=guided)))


def test_a_stored_negative_prompt_needs_no_note(tmp_path, check):
    write_own(tmp_path, negative={"prompt_embeds": torch.ones(6, 8), "prompt_attention_mask": torch.ones(6)})
    assert check(changes={"data.text_dropout": 0.1}).notes == []


def test_prompts_of_a_stage(tmp_path, check):
    publish(tmp_path)
    message, places = problem(check(distil(), evaluate(prompts=str(tmp_path / "nowhere"))))
    assert message == "what stages will read is missing, or does not fit"
    assert places[0].startswith(f"stage evaluate: there is no file {tmp_path / 'nowhere'}")
    assert check(distil(), evaluate(prompts=str(tmp_path / "videos2caption.json"))).fits


def test_a_backbone_that_cannot_tell(tmp_path, check, monkeypatch):
    publish(tmp_path)

    def raises(self):
        raise ValueError("its folder is empty")

    recipe = load_recipe(tiny_recipe([distil()]))
    monkeypatch.setattr(DigitsBackboneConfig, "layout", raises)
    assert problem(check_set(tmp_path, recipe))[1] == ["backbone: its folder is empty"]


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, call):
    cond = {"digit": torch.tensor(3), "direction": torch.tensor(1)}
    write_version_1(tmp_path / "set", [Sample(torch.ones(12, 8, 4, 4), cond)] * 9)
    recipe = tmp_path / "recipe.json"
    changes = {"data": {"kind": "latents", "path": str(tmp_path / "set")}, "training.batch_size": 9}
    recipe.write_text(json.dumps(tiny_recipe([distil()], changes)))
    code, out, err = call(tmp_path / "set", "--recipe", recipe)
    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path}/set: 9 samples, moedistill layout\n  latents")
    assert "note" not in out
    code, out, _ = call(tmp_path / "set", "--recipe", recipe, "--set", "training.batch_size=10")
    assert code == 0
    assert out.splitlines()[-1].endswith("than training.batch_size 10, so they are repeated: [12, 8, 4, 4] × 9")
    (tmp_path / "set" / "00000003.safetensors").unlink()
    code, out, _ = call(tmp_path / "set")
    assert code == 2
    assert out.splitlines()[-2].startswith("problem: 1 files are missing")
    assert out.splitlines()[-1] == f"    {tmp_path}/set/00000003.safetensors"
    code, _, err = call(tmp_path / "set", "--set", "training.batch_size=10")
    assert code == 2
    assert "give one with --recipe" in err
    assert call(tmp_path / "set", "--recipe", "no_such_recipe")[0] == 2
    assert "Example:" in call("-h")[1]


def test_a_report_fits_a_screen(tmp_path):
    entries = [entry(i % 3, latent_path=f"no.{i}.pt") for i in range(40)] + [{} for _ in range(40)]
    entries += [entry(0) for _ in range(40)]
    publish(tmp_path, entries=entries)
    torch.save(torch.full((4, 3, 2, 2), float("nan")), tmp_path / "latent" / NAMES[0])
    report = check_set(tmp_path)
    assert [len(found.places) for found in report.problems] == [40, 1, 40]
    assert report.problems[1].message.startswith("40 samples cannot be read")
    assert report.problems[1].places[0].endswith("sample 40 gives it no 'latent_path' (as samples 41 to 79)")
    lines = report.lines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 170
    assert lines.count("    … and 38 more") == 2
    report.facts.clear()
    del report.problems[1:]
    assert report.lines()[-1] == "    … and 30 more"


BROKEN = [
    None, b"", b"{", b"[]", b"{}", b"null", b"[null]", b"[[]]", b"[{}]", b'[{"latent_path": null}]', b"\x00\xff",
    b'[{"latent_path": "../../../../dev/null"}]', b'[{"latent_path": ".", "caption": "x"}]',
    b'[{"latent_path": "a\\u0000"}]', b'[{"latent_path": "x", "caption": 4}]',
    b'{"format": "moedistill-latents", "version": 1, "samples": [1]}',
    b'{"format": "moedistill-latents", "version": 1, "samples": [{"file": "index.json", "shape": [1,1,1,1]}]}',
    b'{"format": "moedistill-latents", "version": 1, "samples": [{"file": "x", "shape": "big"}], "negative": "x"}',
    b'{"format": "moedistill-latents", "version": 1, "samples": [{"file": ".", "shape": [1]}], "negative": "."}',
    b'{"format": "moedistill-latents", "version": 2, "samples": [{"file": "x", "key": 3, "shape": [1,0,1,1]}]}',
    b'{"format": "moedistill-latents", "version": 2, "samples": [{"file": ".", "key": "a", "shape": [1,1,1,1]}, 4]}',
    b'{"format": "moedistill-latents", "version": [2], "samples": []}',
]  # fmt: skip


@pytest.mark.parametrize("name", ["index.json", "videos2caption.json"])
@pytest.mark.parametrize("content", BROKEN)
def test_no_broken_folder_makes_a_traceback(tmp_path, call, name, content):
    (tmp_path / "latent").mkdir()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, out, _ = call(tmp_path)
    assert code == 2
    assert "problem: " in out
    assert call(tmp_path, "--recipe", "dcm_digits")[0] == 2
    assert call(tmp_path / name)[0] == 2


def test_a_folder_of_damaged_files_makes_no_traceback(tmp_path, call):
    publish(tmp_path)
    samples = write_own(tmp_path / "own")
    for folder in (tmp_path / "latent", tmp_path / "prompt_embed", samples):
        for file in folder.glob("*.[ps]*"):
            content = file.read_bytes()
            for cut in (0, 1, 8, len(content) // 2, len(content) - 1):
                file.write_bytes(content[:cut])
                assert call(tmp_path if folder != samples else samples)[0] == 2
            file.write_bytes(content)
    assert call(tmp_path)[0] == call(samples)[0] == 0
    index = write_index(tmp_path, [entry(0)])
    index.chmod(0)
    assert call(tmp_path)[0] in (0, 2)  # 0 for root, who may read everything
