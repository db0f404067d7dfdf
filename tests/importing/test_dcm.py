"""A file in DCM's released layout becomes an export: both experts compute what its raw tensors do."""

import gzip
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from importing_helpers import DUAL, convert, error_of, raw_network, recipe_of, refused, with_weights
from safetensors.torch import save_file

from moedistill.importing import dcm
from moedistill.recipe.loading import load_recipe
from moedistill.runs.loop import run
from moedistill.runs.planning.fake_step import empty_mixture
from moedistill.runs.sample import load_mixture, sample_run

RECORDS = Path(__file__).parents[1] / "records" / "dcm_layout"
COPIED = {
    "wan": ("condition_embedder", "proj_out"),
    "hunyuan_video": ("time_text_embed", "norm_out", "proj_out"),
}
TARGETS = {
    "wan": ("attn1", "attn2"),
    "hunyuan_video": ("attn",),
}
LINEARS = ("to_q", "to_k", "to_v", "to_out.0")


def is_adapted(family, path):
    """As the published training chooses them."""
    return any(f".{attention}.{linear}" in f".{path}" for attention in TARGETS[family] for linear in LINEARS)


def released(family, seed=0):
    """A raw network, what the detail expert changes of it, and the file's tensors; all by hand."""
    config = load_recipe(recipe_of(family, DUAL)).backbone
    network = raw_network(config, seed)
    generator = torch.Generator().manual_seed(seed)
    tensors, detail = {}, {}
    for name, value in network.state_dict().items():
        module, _, last = name.rpartition(".")
        if is_adapted(family, module):
            tensors[f"{module}.base_layer.{last}"] = value.clone()
            if last == "weight":
                a = torch.randn(4, value.shape[1], generator=generator)
                b = torch.randn(value.shape[0], 4, generator=generator) / 10
                tensors[f"{module}.lora_A.lora1.weight"], tensors[f"{module}.lora_B.lora1.weight"] = a, b
                detail[name] = value + 2 * b @ a
        else:
            tensors[name] = value.clone()
        for path in COPIED[family]:
            if name.startswith(f"{path}."):
                detail[name] = value + torch.randn(value.shape, generator=generator) / 10
                tensors[f"{path}_lora{name.removeprefix(path)}"] = detail[name]
    return network, detail, tensors


@pytest.mark.parametrize("family", ["wan", "hunyuan_video"])
def test_both_experts_compute_what_the_raw_tensors_do(family, tmp_path, capsys):
    network, detail, tensors = released(family)
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    code, out, err = convert("dcm", tmp_path, tmp_path / "export", recipe_of(family, DUAL), capsys)
    assert (code, err) == (0, "")
    assert (
        out == f"{tmp_path / 'export'}: an export with semantic and detail; sample it, or give it as experts.X.init\n"
    )
    recipe, mixture = load_mixture(tmp_path / "export")
    assert error_of(mixture, "semantic", network) <= 1e-5
    assert error_of(mixture, "detail", network) > 0.01
    assert error_of(mixture, "detail", with_weights(network, detail)) <= 1e-5
    assert recipe.sample.points == [8, 4]
    assert [segment.expert for segment in mixture.router.segments] == ["semantic", "detail"]


def test_a_file_in_bfloat16_is_read_as_it_is(tmp_path, capsys):
    _, _, tensors = released("wan")
    save_file({name: each.bfloat16() for name, each in tensors.items()}, tmp_path / "dcm.safetensors")
    convert("dcm", tmp_path / "dcm.safetensors", tmp_path / "export", recipe_of("wan", DUAL), capsys)
    _, mixture = load_mixture(tmp_path / "export")
    weight = mixture.experts["semantic"].merged()["patch_embedding.weight"]
    assert torch.equal(weight, tensors["patch_embedding.weight"].bfloat16().float())


def test_training_goes_on_from_it_and_it_is_sampled(tmp_path, capsys):
    _, _, tensors = released("wan")
    save_file(tensors, tmp_path / "dcm.safetensors")
    recipe = recipe_of("wan", DUAL)
    convert("dcm", tmp_path / "dcm.safetensors", tmp_path / "export", recipe, capsys)
    experts = {name: {**config, "init": str(tmp_path / "export")} for name, config in DUAL.items()}
    recipe = recipe_of("wan", experts)
    # The data of a miniature are made up; smoke would leave `init` out.
    recipe["data"] = {"kind": "latents", "path": None}
    went_on = run(recipe, output=tmp_path / "run", device="cpu")
    (_, mixture), (_, original) = load_mixture(went_on.output), load_mixture(tmp_path / "export")
    for name in DUAL:
        found, given = mixture.experts[name].parameters, original.experts[name].parameters
        moved = max((found[key] - given[key]).abs().max().item() for key in given)
        assert 0 < moved < 1e-7, name
    sampled = sample_run(tmp_path / "export", prompts=["a dog runs along a beach"], output=tmp_path / "samples")
    assert sampled.videos.isfinite().all()
    assert sampled.notes == []


@pytest.mark.parametrize(
    ("recipe", "record", "counts"),
    [("dcm_hunyuan_published", "hunyuan_video", (1264, 432)), ("dcm_wan_1_3b_published", "wan_1_3b", (825, 492))],
)
def test_the_released_names_and_shapes_are_those_of_the_published_recipes(recipe, record, counts, monkeypatch):
    with gzip.open(RECORDS / f"{record}.json.gz", "rt") as file:
        shapes = {name: tuple(shape) for name, shape in json.load(file).items()}
    files = SimpleNamespace(shapes=shapes, place="released", __getitem__=None)
    monkeypatch.setattr(dcm, "open_weights", lambda _: files)
    loaded = load_recipe(recipe)
    found, _ = dcm.read_dcm(Path("released"), loaded, empty_mixture(loaded, loaded.backbone.skeleton()))
    assert (len(found["semantic"]), len(found["detail"])) == counts
    assert sum(map(len, found.values())) == len(shapes)


# -- what is refused --------------------------------------------------------------------------------------------------


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.fixture(scope="module")
def wan_tensors():
    return released("wan")[2]


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (
            lambda t: {name: each for name, each in t.items() if "attn1.to_q.base_layer.weight" not in name},
            "missing: blocks.{0-1}.attn1.to_q.base_layer.weight; get it again",
        ),
        (
            lambda t: {**t, "blocks.0.more": torch.zeros(1), "y.weight": torch.zeros(1)},
            "left over: blocks.0.more, y.weight",
        ),
        (lambda t: {**t, "proj_out.bias": torch.zeros(3)}, "of another shape: proj_out.bias is [3] and must be [64]"),
        (lambda t: {**t, "proj_out.bias": t["proj_out.bias"].long()}, "stored in other numbers (proj_out.bias I64)"),
        (
            lambda t: {**t, "proj_out_lora.bias": torch.full_like(t["proj_out.bias"], torch.nan)},
            "expert 'detail': proj_out.bias is not finite in the source",
        ),
    ],
    ids=["missing", "extra", "shape", "dtype", "not finite"],
)
def test_a_file_that_does_not_fit(broken, says, wan_tensors, tmp_path, capsys):
    save_file(broken(dict(wan_tensors)), tmp_path / "dcm.safetensors")
    message = refused("dcm", tmp_path / "dcm.safetensors", tmp_path / "export", recipe_of("wan", DUAL), capsys)
    assert says in message
    assert {path.name for path in tmp_path.iterdir()} <= {"dcm.safetensors", "export.yaml", ".export.lock"}


def test_a_file_cut_short_and_a_pickle_that_would_run_code(wan_tensors, tmp_path, capsys):
    file = tmp_path / "dcm.safetensors"
    save_file(wan_tensors, file)
    file.write_bytes(file.read_bytes()[:-9])
    assert f"cannot read {file}" in refused("dcm", file, tmp_path / "export", recipe_of("wan", DUAL), capsys)
    went_off = tmp_path / "went off"
    for name in ("dcm.pt", "pytorch_model.bin"):
        bomb = tmp_path / name.split(".")[0] / name
        bomb.parent.mkdir()
        bomb.write_bytes(pickle.dumps({"proj_out.weight": Bomb(went_off)}))
        for place in (bomb, bomb.parent):
            message = refused("dcm", place, tmp_path / "export", recipe_of("wan", DUAL), capsys)
            assert f"{bomb} is a pickle, which can run code when it is read, so it is not" in message
    disguised = tmp_path / "disguised.safetensors"
    disguised.write_bytes(pickle.dumps({"proj_out.weight": Bomb(went_off)}))
    assert "cannot read" in refused("dcm", disguised, tmp_path / "export", recipe_of("wan", DUAL), capsys)
    assert not went_off.exists()
    pickle.loads(disguised.read_bytes())  # it would have
    assert went_off.exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"detail": {**DUAL["detail"], "alpha": 4}}, "scales the adapter by 1, and the released training by 2"),
        ({"detail": {**DUAL["detail"], "rank": 2, "alpha": 4}}, "lora_A.lora1.weight is [4, 32] and must be [2, 32]"),
        ({"detail": {**DUAL["detail"], "from": "teacher"}}, "the recipe must have a full one, and a lora one from it"),
    ],
)
def test_a_recipe_that_is_not_of_it(changes, says, wan_tensors, tmp_path, capsys):
    save_file(wan_tensors, tmp_path / "dcm.safetensors")
    recipe = recipe_of("wan", {**DUAL, **changes})
    assert says in refused("dcm", tmp_path / "dcm.safetensors", tmp_path / "export", recipe, capsys)


def test_a_place_that_is_taken_and_one_that_is_not_there(wan_tensors, tmp_path, capsys):
    save_file(wan_tensors, tmp_path / "dcm.safetensors")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    code, _, err = convert("dcm", tmp_path / "dcm.safetensors", tmp_path / "taken", recipe_of("wan", DUAL), capsys)
    assert (code, [path.name for path in (tmp_path / "taken").iterdir()]) == (2, ["mine"])
    assert "is there already; choose another DEST" in err
    message = refused("dcm", tmp_path / "nowhere", tmp_path / "export", recipe_of("wan", DUAL), capsys)
    assert message == f"error: convert: there is no file or folder {tmp_path / 'nowhere'}\n"
    message = refused("dmc", tmp_path, tmp_path / "export", recipe_of("wan", DUAL), capsys)
    assert "there is no kind 'dmc' of weights for a recipe; did you mean 'dcm'?" in message
