"""One check for `run` and `data check`, of every sample before anything is loaded; and what is likely wrong."""

import json
import math

import pytest
import torch
from helpers import distil
from safetensors.torch import save_file
from stored_sets import entry, write_index, write_version_1

from moedistill import cli
from moedistill.data.base import Sample
from moedistill.data.latents import LatentsConfig, open_store, write_latents
from moedistill.data.plausible import Spread, can_be_told, spread_warning
from moedistill.errors import UserError
from moedistill.recipe.loading import load_recipe
from moedistill.runs import loop
from moedistill.runs.check import check_set
from moedistill.runs.loop import run
from moedistill_hunyuan_video.backbone import HunyuanVideoConfig
from moedistill_wan.backbone import WanConfig

TEXT, WIDTH, POOLED = HunyuanVideoConfig.tiny_text
GRID = (5, 4, 6)


def recipe_on(path, kind="hunyuan_video", **backbone):
    """A recipe of one stage for a miniature, on the set at `path`."""
    guidance = {"mode": "none"} if kind == "hunyuan_video" else {"mode": "classifier_free", "scale": 1.0}
    return {
        "name": "tiny",
        "backbone": {"kind": kind, "pretrained": None, "video": VIDEO, "guidance": guidance, **backbone},
        "trajectory": {"kind": "flow_matching", "num_steps": 8, "shift": 5.0},
        "router": {"kind": "timestep", "experts": ["semantic"]},
        "experts": {"semantic": {"kind": "lora", "rank": 2, "targets": "attention"}},
        "data": {"kind": "latents", "path": str(path)},
        "training": {"batch_size": 1, "monitor": None},
        "stages": [distil(steps=1)],
    }


VIDEO = {"num_frames": 17, "height": 32, "width": 48}


def check(path, kind="hunyuan_video", **backbone):
    return check_set(path, load_recipe(recipe_on(path, kind, **backbone)))


def places(report):
    return [place for problem in report.problems for place in problem.places]


def published(folder, masks=(TEXT,) * 3):
    """A set as published for HunyuanVideo, the pooled text in the first row of `prompt_embeds`; masks so long."""
    for name in ("latent", "prompt_embed", "prompt_attention_mask"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    entries = []
    for i, length in enumerate(masks):
        generator = torch.Generator().manual_seed(i)
        torch.save(2.1 * torch.randn(16, *GRID, generator=generator), folder / "latent" / f"video.{i}.pt")
        torch.save(torch.randn(TEXT + 1, WIDTH, generator=generator), folder / "prompt_embed" / f"video.{i}.pt")
        torch.save(torch.arange(length or TEXT) < 4, folder / "prompt_attention_mask" / f"video.{i}.pt")
        name = f"video.{i}.pt"
        paths = dict.fromkeys(("latent_path", "prompt_embed_path", "prompt_attention_mask"), name)
        entries.append(entry(0, **(paths | ({} if length else {"prompt_attention_mask": None}))))
    write_index(folder, entries)
    return folder


# -- one check for both -----------------------------------------------------------------------------------------------


def test_a_published_set_is_unpacked_to_be_checked(tmp_path):
    report = check(published(tmp_path / "set"))
    assert (report.problems, report.warnings) == ([], [])
    run(recipe_on(tmp_path / "set"), output=tmp_path / "run", device="cpu")


@pytest.mark.parametrize(
    ("masks", "problem"),
    [
        ((TEXT, None, TEXT), "sample 1 has no prompt_attention_mask, which the model takes"),
        ((TEXT, TEXT, 4), f"sample 2 has prompt_attention_mask with 4 places for {TEXT + 1} tokens of prompt_embeds"),
        ((TEXT, TEXT + 1, TEXT), "sample 1 has no pooled_prompt_embeds, which the model takes"),
    ],
)
def test_a_later_sample_without_its_mask_stops_both_before_anything_is_loaded(
    tmp_path, monkeypatch, capsys, masks, problem
):
    """Published sets with a missing, null or short mask in one sample passed, and stopped the run when it was drawn."""
    published(tmp_path / "set", masks)
    monkeypatch.setattr(loop, "build_run", None)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe_on(tmp_path / "set")))
    with pytest.raises(SystemExit) as stop:
        cli.main(["data", "check", str(tmp_path / "set"), "--recipe", str(file)])
    said = capsys.readouterr().out
    assert stop.value.code == 2
    assert any(problem in place for place in places(check(tmp_path / "set")))
    assert "times a sample is not as hunyuan_video takes it" in said
    with pytest.raises(UserError) as error:
        run(json.loads(file.read_text()), output=tmp_path / "run", device="cpu")
    assert str(error.value).startswith(
        f"data.path: {tmp_path / 'set'}: 3 samples, published layout cannot be trained on"
    )
    assert said.split("problem: ")[1].splitlines()[1].split("set/")[-1][-40:] in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_mask_file_that_is_not_there(tmp_path):
    (published(tmp_path / "set") / "prompt_attention_mask" / "video.1.pt").unlink()
    with pytest.raises(UserError, match=r"1 files are missing"):
        run(recipe_on(tmp_path / "set"), output=tmp_path / "run", device="cpu")
    assert places(check(tmp_path / "set")) == [f"{tmp_path}/set/prompt_attention_mask/video.1.pt"]


def test_an_empty_mask_of_a_later_sample_is_seen_before_training(tmp_path):
    folder = published(tmp_path / "set")
    torch.save(torch.zeros(TEXT, dtype=torch.bool), folder / "prompt_attention_mask" / "video.2.pt")
    with pytest.raises(UserError, match="1 text is masked out altogether"):
        run(recipe_on(folder), output=tmp_path / "run", device="cpu")


def test_a_path_that_is_no_set_stops_a_run_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "build_run", None)
    way_out = f"holds neither .*; of clips, `moedistill data encode {tmp_path} SET --recipe RECIPE` makes a set"
    for path, message in ((tmp_path / "nowhere", "there is no file or folder"), (tmp_path, way_out)):
        with pytest.raises(UserError, match=message):
            run(recipe_on(path), output=tmp_path / "run", device="cpu")


def test_headers_alone_are_read_of_most_samples(tmp_path, monkeypatch):
    index = published(tmp_path / "set") / "videos2caption.json"
    entries = json.loads(index.read_text())
    write_index(index.parent, [entries[i % 3] for i in range(40)])
    read = []
    store_class = type(open_store(index))
    original = store_class.read
    monkeypatch.setattr(store_class, "read", lambda self, i: read.append(i) or original(self, i))
    assert check_set(index, load_recipe(recipe_on(index)), numbers=8).fits
    assert read == [0, 5, 10, 15, 20, 25, 30, 35]


# -- files that are no honest tensors ---------------------------------------------------------------------------------


def expanded():
    return torch.zeros(1).expand(16, 1_000_000, 1000, 12)


HOSTILE = {
    "float8": (
        lambda: torch.zeros(16, *GRID).to(torch.float8_e4m3fn),
        "has latents of torch.float8_e4m3fn; it must",
    ),
    "sparse": (lambda: torch.ones(16, *GRID).to_sparse(), "has latents that are sparse or nested; store a dense"),
    "meta": (lambda: torch.ones(16, *GRID, device="meta"), "has latents [16, 5, 4, 6] without numbers (a meta"),
    "expanded": (expanded, "has latents [16, 1000000, 1000, 12], 768,000,000,000 bytes, of which 4 are stored"),
    "complex": (lambda: torch.ones(16, *GRID, dtype=torch.complex64), "has latents of torch.complex64; it must be"),
    "integers": (lambda: torch.ones(16, *GRID, dtype=torch.int64), "has latents of torch.int64"),
    "zero": (lambda: torch.zeros(16, *GRID), "latents"),
    "infinite": (lambda: torch.full((16, *GRID), float("inf")), "latents"),
    "code": (lambda: {"latents": exec}, "cannot be read"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_a_finding_and_stops_a_run(tmp_path, kind):
    make, reason = HOSTILE[kind]
    folder = published(tmp_path / "set")
    torch.save(make(), folder / "latent" / "video.1.pt")
    [problem] = check(folder).problems
    [place] = problem.places
    assert "latent/video.1.pt" in place
    assert reason in place
    with pytest.raises(UserError, match=r"^data\.path: "):
        run(recipe_on(folder), output=tmp_path / "run", device="cpu")


def test_hostile_safetensors_are_findings(tmp_path):
    sample = Sample(torch.ones(16, *GRID), {"prompt_embeds": torch.ones(12, 24)})
    write_version_1(tmp_path / "set", [sample] * 2)
    tensors = {"latents": torch.ones(16, *GRID), "prompt_embeds": torch.ones(12, 24)}
    bad = tmp_path / "set" / "00000001.safetensors"
    save_file({**tensors, "x" * 5000: torch.ones(1)}, bad)
    report = check(tmp_path / "set", "wan")
    assert report.fits
    assert all(len(line) < 400 for line in report.lines())
    for name in ("latents", "prompt_embeds"):
        save_file({**tensors, name: tensors[name].to(torch.float8_e5m2)}, bad)
        [problem] = check(tmp_path / "set", "wan").problems
        assert problem.places == [f"{bad}: sample 1 has {name} of F8_E5M2; it must be of float64, float32, float16, "
                                  "bfloat16, or of whole numbers"]  # fmt: skip


def test_names_that_are_too_long_for_a_file(tmp_path):
    folder = published(tmp_path / "set")
    entries = json.loads((folder / "videos2caption.json").read_text())
    entries[1]["latent_path"] = "x" * 5000
    write_index(folder, entries)
    assert check(folder).problems[0].message.startswith("1 files are missing")


@pytest.mark.parametrize(
    ("latents", "reason"),
    [(torch.zeros(16, *GRID), "all zero"), (torch.full((16, *GRID), float("nan")), "NaN or infinite")],
)
def test_bad_numbers_are_not_written_and_named_where_they_are_drawn(tmp_path, latents, reason):
    """A run reads few samples before it starts; what it meets later has a name too."""
    text = {"prompt_embeds": torch.ones(12, 24)}
    with pytest.raises(ValueError, match=rf"sample 0 has latents that are {reason}"):
        write_latents(tmp_path / "a", [Sample(latents, text)])
    write_version_1(tmp_path / "b", [Sample(torch.ones(16, *GRID), text)] * 2)
    save_file({"latents": latents, **text}, tmp_path / "b" / "00000001.safetensors")
    dataset = LatentsConfig(path=str(tmp_path / "b")).build(WanConfig(pretrained=None).tiny().build())
    with pytest.raises(ValueError, match=rf"^sample 1: .*00000001\.safetensors has latents that are {reason}"):
        dataset[1]


# -- what is likely wrong ---------------------------------------------------------------------------------------------


def own_set(folder, latents, text=None, count=3):
    """A set for the miniature of Wan, whose latents are `latents(normal numbers)`, padded with zeros."""
    samples = []
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        normal = torch.randn(16, *GRID, generator=generator)
        words = torch.randn(12, 24, generator=generator) * (torch.arange(12) < 4)[:, None]
        samples.append(Sample(latents(normal), {"prompt_embeds": words if text is None else text}))
    write_latents(folder, samples)
    return folder


def as_the_vae_gives(normal):
    mean, std = WanConfig(pretrained=None).latent_moments()
    return mean.view(-1, 1, 1, 1) + std.view(-1, 1, 1, 1) * normal


@pytest.mark.parametrize(
    ("latents", "warning"),
    [
        (as_the_vae_gives, None),
        (lambda normal: as_the_vae_gives(0.7 * normal + 0.2), None),  # videos of a kind
        (lambda normal: normal, "they look scaled already; store what the VAE gives"),
        (lambda normal: 1000 * as_the_vae_gives(normal) + 50, "they are not what this VAE gives"),
        (lambda normal: as_the_vae_gives(normal + 5), "they are not what this VAE gives"),
    ],
)
def test_latents_that_are_not_what_the_vae_gives_are_warned_of(tmp_path, capsys, latents, warning):
    report = check(own_set(tmp_path / "set", latents), "wan")
    assert report.fits
    if warning is None:
        assert report.warnings == []
        return
    [said] = report.warnings
    assert said.startswith("the latents have mean ")
    assert warning in said
    assert f"warning: {said}" in report.lines()
    run(recipe_on(tmp_path / "set", "wan"), output=tmp_path / "run", device="cpu")  # it goes on, and says so first
    out = " ".join(capsys.readouterr().out.split())
    assert out.index(f"warning: {said}") < out.index("semantic")


def test_scaled_latents_of_hunyuan_video_are_warned_of(tmp_path):
    folder = published(tmp_path / "set")
    for file in (folder / "latent").iterdir():
        torch.save(0.476986 * torch.load(file), file)
    [said] = check(folder).warnings
    assert "deviation 0.4" in said
    assert "they look scaled already" in said


def test_text_that_is_not_padded_with_zeros_is_warned_of(tmp_path):
    [said] = check(own_set(tmp_path / "set", as_the_vae_gives, torch.randn(12, 24)), "wan").warnings
    assert said.startswith(
        "prompt_embeds of 3 samples, of 3 that were read, is of full length and does not end in zeros"
    )
    assert check(own_set(tmp_path / "short", as_the_vae_gives, torch.randn(5, 24)), "wan").warnings == []


@pytest.mark.parametrize(
    ("video", "warned"),
    [
        ({"num_frames": 17, "height": 32, "width": 48}, False),
        ({"num_frames": 17, "height": 48, "width": 32}, False),  # turned
        ({"num_frames": 17, "height": 48, "width": 48}, True),
        ({"num_frames": 81, "height": 32, "width": 48}, True),
        ({"num_frames": 81, "height": 480, "width": 832}, True),
    ],
)
def test_other_sizes_than_what_is_sampled_are_warned_of(tmp_path, video, warned):
    own_set(tmp_path / "set", as_the_vae_gives)
    warnings = check(tmp_path / "set", "wan", video=video).warnings
    size = "×".join(map(str, video.values()))
    wanted = f"3 videos have not the size of backbone.video, {size}, that is sampled: 17×32×48 × 3"
    assert warnings == [wanted] * warned


def test_without_the_weights_numbers_are_not_compared(tmp_path):
    own_set(tmp_path / "set", as_the_vae_gives, torch.zeros(12, 4096))
    report = check(tmp_path / "set", "wan", pretrained="Wan-AI/not-here")
    assert any(
        note.startswith("the latents' numbers are not compared with the VAE's: the wei") for note in report.notes
    )


NATIVE = {"trajectory": {"kind": "native", "num_steps": 8}}


# -- what a run meets later -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.arange(TEXT) >= 4, "has ones after zeros: the text must come first, and padding last"),
        (torch.where(torch.arange(TEXT) < 4, 0.0, -10000.0), "has other numbers than 0 and 1"),
        (2 * (torch.arange(TEXT) < 4), "has other numbers than 0 and 1"),
    ],
)
def test_a_mask_must_be_ones_for_the_text_and_zeros_after_it(tmp_path, mask, reason):
    """Left-padded and additive masks passed, and the model read the padding in the text's place."""
    folder = published(tmp_path / "set")
    torch.save(mask, folder / "prompt_attention_mask" / "video.1.pt")
    [problem] = check(folder).problems
    assert problem.message.startswith("1 masks are not ones for a text, and zeros for the padding after it")
    assert reason in problem.places[0]
    backbone = HunyuanVideoConfig(pretrained=None).tiny().build()
    cond = backbone.encode(["a"])
    with pytest.raises(ValueError, match=rf"prompt_attention_mask of sample 0 {reason}"):
        backbone.prepare(torch.zeros(1, *backbone.latent_shape()), {**cond, "prompt_attention_mask": mask[None]})
    with pytest.raises(ValueError, match=rf"prompt_attention_mask of the stored negative prompt {reason}"):
        backbone.set_null({**{name: value[0] for name, value in cond.items()}, "prompt_attention_mask": mask})


def wan_set(folder, *texts, **options):
    """A set for the miniature of Wan, whose samples have these texts, or a caption alone where that is None."""
    samples = [
        Sample(as_the_vae_gives(torch.randn(16, *GRID)), {} if text is None else {"prompt_embeds": text})
        for text in texts
    ]
    write_latents(folder, samples, captions=["rain"] * len(samples), **options)
    return folder


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (torch.ones(12, 24, dtype=torch.int64), "sample 1 has prompt_embeds of torch.int64; the model takes floating"),
        (torch.ones(()), "sample 1 has prompt_embeds []; the model takes [up to 12, 24]"),
        (torch.ones(13, 24), "sample 1 has prompt_embeds [13, 24]; the model takes [up to 12, 24]"),
    ],
)
def test_shapes_and_dtypes_of_every_sample_count(tmp_path, text, problem):
    folder = wan_set(tmp_path / "set", torch.zeros(12, 24), text)
    assert any(problem in place for place in places(check(folder, "wan")))
    with pytest.raises(UserError, match="times a sample is not as wan takes it"):
        run(recipe_on(folder, "wan"), output=tmp_path / "run", device="cpu")


def test_texts_of_unequal_length_are_padded_before_they_are_batched(tmp_path):
    """Stored ones, and one that is encoded."""
    folder = wan_set(tmp_path / "set", torch.ones(5, 24), torch.ones(7, 24), None)
    recipe = {**recipe_on(folder, "wan"), "training": {"batch_size": 3, "monitor": None}}
    assert check_set(folder, load_recipe(recipe)).fits
    assert run(recipe, output=tmp_path / "run", device="cpu").cost["semantic"]["steps"] == 1


def test_the_negative_prompt_is_looked_at_as_samples_are(tmp_path):
    mask = torch.zeros(TEXT, dtype=torch.bool)
    negative = {"prompt_embeds": torch.ones(TEXT, WIDTH), "prompt_attention_mask": mask}
    negative["pooled_prompt_embeds"] = torch.ones(POOLED)
    cond = {**negative, "prompt_attention_mask": ~mask}
    write_latents(tmp_path / "a", [Sample(torch.randn(16, *GRID), cond)] * 2, negative=negative)
    report = check(tmp_path / "a")
    [file] = (tmp_path / "a").glob("negative-*")
    assert places(report) == [f"{file}: prompt_attention_mask"]
    wan_set(tmp_path / "b", torch.ones(4, 24), negative={"prompt_embeds": torch.zeros(12, 24)})
    [said] = check(tmp_path / "b", "wan").warnings
    assert said == "prompt_embeds of 1 samples, of 2 that were read, is all zero: what is no text at all"


def test_an_encoded_negative_prompt_has_the_models_own_length(tmp_path):
    """Shorter samples passed, with the advice to train on one at a time, and stopped the run when they were drawn."""
    folder = published(tmp_path / "set")
    torch.save(torch.randn(TEXT - 2 + 1, WIDTH), folder / "prompt_embed" / "video.1.pt")
    torch.save(torch.arange(TEXT - 2) < 4, folder / "prompt_attention_mask" / "video.1.pt")
    assert check(folder).fits
    report = check(folder, guidance={"mode": "classifier_free", "scale": 3.0})
    assert [problem.message for problem in report.problems] == [
        "2 times the encoded negative prompt has another shape: encode both alike"
    ]


def test_unequal_texts_fit_where_each_process_has_one_at_a_time(tmp_path):
    folder = published(tmp_path / "set")
    torch.save(torch.randn(TEXT - 2 + 1, WIDTH), folder / "prompt_embed" / "video.1.pt")
    torch.save(torch.arange(TEXT - 2) < 4, folder / "prompt_attention_mask" / "video.1.pt")
    recipe = load_recipe({**recipe_on(folder), "training": {"batch_size": 4, "monitor": None}})
    assert not check_set(folder, recipe).fits
    assert check_set(folder, recipe, processes=4).fits


def test_other_tensors_may_be_what_they_like(tmp_path):
    """A flag that no model reads was taken for a mask of no token."""
    cond = {"prompt_embeds": torch.ones(4, 24), "is_portrait": torch.tensor(False), "seen": torch.zeros(3) > 1}
    write_latents(tmp_path / "set", [Sample(as_the_vae_gives(torch.randn(16, *GRID)), cond)] * 2)
    assert check(tmp_path / "set", "wan").fits


@pytest.mark.parametrize(
    ("vae", "factor", "said"),
    [
        (1 / 0.476986, 0.476986, "they look scaled already"),  # HunyuanVideo
        (1 / 0.7, 0.7, "they look scaled already"),  # CogVideoX 5B
        (1 / 0.7, 0.7 * 1.05, "they look scaled already"),
        (1 / 0.7, 0.7 * 0.7, "they are not what this VAE gives"),  # scaled twice
        (1 / 0.7, 1.0, ""),
        (1 / 0.7, 0.8, ""),
        (1 / 1.15258426, 1.15258426, ""),  # CogVideoX 2B, of which it cannot be told
        (1 / 1.03682, 1.03682, ""),  # HunyuanVideo 1.5
    ],
)
def test_scaled_latents_by_what_their_vae_gives(vae, factor, said):
    spread = Spread(4)
    spread.add(vae * factor * torch.randn(4, 8, 40, 40, generator=torch.Generator().manual_seed(0)))
    mean, std = torch.zeros(4), torch.full((4,), vae)
    warnings = list(spread_warning(spread, mean, std))
    assert len(warnings) == bool(said)
    assert said in "".join(warnings)
    assert can_be_told(mean, std) == (abs(math.log(vae)) > 0.3)


@pytest.mark.parametrize(("kind", "model"), [("hunyuan_video_15", None), ("cogvideox", "2b"), ("cogvideox", "5b")])
def test_where_it_cannot_be_told_a_note_says_so(tmp_path, kind, model):
    config = {"kind": kind, "pretrained": None, **({"model": model} if model else {})}
    changes = {"backbone": config} | (NATIVE if kind == "cogvideox" else {})
    backbone = load_recipe({**recipe_on("x", "wan"), **changes}).backbone.tiny().build()
    cond = {name: value[0] for name, value in backbone.encode(backbone.example_prompts[:1]).items()}
    write_latents(tmp_path / "set", [Sample(torch.randn(backbone.latent_shape()), cond)] * 2)
    report = check_set(tmp_path / "set", load_recipe({**recipe_on(tmp_path / "set", "wan"), **changes}))
    said = any("whether the latents were scaled already cannot be told" in note for note in report.notes)
    assert said == (model != "5b")


def test_frames_of_padding_are_no_other_size(tmp_path):
    """CogVideoX 1.5 pads the first latent frame; sets are stored with it or without."""
    config = {"kind": "cogvideox", "model": "1.5-5b", "pretrained": None}
    config["video"] = {"num_frames": 17, "height": 32, "width": 48}
    for frames, warned in ((5, False), (6, False), (7, True)):
        cond = {"prompt_embeds": torch.ones(12, 24)}
        folder = tmp_path / str(frames)
        write_latents(folder, [Sample(torch.randn(16, frames, 4, 6) / 0.7, cond)] * 2)
        report = check_set(folder, load_recipe({**recipe_on(folder, "wan"), "backbone": config, **NATIVE}))
        assert [warning.split(" have")[0] for warning in report.warnings] == ["2 videos"] * warned


def test_a_sample_that_cannot_be_learned_from_says_how_to_go_on(tmp_path):
    """Of twelve, the run has looked at eight: it meets the other one when it is drawn."""
    text = {"prompt_embeds": torch.ones(4, 24)}
    samples = [Sample(as_the_vae_gives(torch.randn(16, *GRID)), text) for _ in range(12)]
    samples[11].latents.fill_(float("nan"))
    folder = write_version_1(tmp_path / "set", samples)
    stages = [distil(steps=12)]
    with pytest.raises(UserError) as error:
        run({**recipe_on(folder, "wan"), "stages": stages}, output=tmp_path / "run", device="cpu")
    said = str(error.value)
    assert "sample 11: " in said
    assert "has latents that are NaN or infinite" in said
    assert said.split("; ")[-1].startswith("begin it anew with: moedistill run ")
