"""What is read for an export, tensor by tensor, is what the trained mixture computes with."""

import pytest
import torch
from helpers import distil, tiny_recipe

from moedistill.errors import UserError
from moedistill.exporters.source import open_source
from moedistill.runs.loop import run
from moedistill.runs.sample import load_mixture
from moedistill.runtime.checkpoint import find_checkpoint

ADAPTERS = {"experts.semantic": {"kind": "lora", "rank": 3, "alpha": 4, "copies": ["proj_out"]}}
"""Two adapters, the second on top of the first."""


def finished_run(folder, changes=(), stages=("semantic", "detail")):
    recipe = tiny_recipe([*(distil(name) for name in stages), {"kind": "export", "name": "export"}], changes)
    for stage in recipe["stages"][: len(stages)]:
        stage["optimizer"] = {"lr": 0.05}  # so that every tensor moves
    return run(recipe, output=folder, device="cpu").output


@pytest.fixture(scope="module")
def full_and_adapter(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("full") / "run")


@pytest.fixture(scope="module")
def two_adapters(tmp_path_factory):
    changes = ADAPTERS | {"experts.detail.copies": ["proj_out"]}
    return finished_run(tmp_path_factory.mktemp("adapters") / "run", changes)


def places(folder):
    return [folder, find_checkpoint(folder), folder / "export"]


def check_merged(source, mixture):
    for name, expert in source.experts.items():
        own = mixture.experts[name].merged()
        given = dict(expert.merged())
        assert list(given) == list(expert.shapes)
        assert set(given) == set(own)
        assert all(torch.allclose(given[key].float(), own[key], atol=1e-6) for key in own)
        assert all(tuple(given[key].shape) == shape for key, shape in expert.shapes.items())


def test_experts_merge_to_what_the_mixture_merges_to_from_a_run_a_checkpoint_and_an_export(
    full_and_adapter, two_adapters
):
    for folder in (full_and_adapter, two_adapters):
        for place in places(folder):
            source = open_source(place)
            assert list(source.experts) == ["semantic", "detail"]
            check_merged(source, load_mixture(place)[1])


def test_an_adapter_on_a_full_expert_is_a_change_of_that_expert(full_and_adapter):
    source, (_, mixture) = open_source(full_and_adapter), load_mixture(full_and_adapter)
    semantic, detail = source.experts.values()
    assert (semantic.kind, semantic.over, len(semantic.pairs), len(semantic.copies)) == ("full", None, 0, 0)
    assert (detail.kind, detail.over) == ("adapter", "semantic")
    under, own = mixture.experts["semantic"].merged(), mixture.experts["detail"].merged()
    for path, (a, b) in detail.pairs.items():
        assert (a.shape[0], b.shape[1]) == (2, 2)
        assert torch.allclose(b @ a, own[f"{path}.weight"] - under[f"{path}.weight"], atol=1e-6)
        assert torch.equal(detail.original(f"{path}.weight"), under[f"{path}.weight"])
    for name, value in detail.copies.items():
        assert torch.equal(value, own[name])
        assert not torch.equal(value, under[name])
    changed = {name for name in own if not torch.equal(own[name], under[name])}
    assert changed == {f"{path}.weight" for path in detail.pairs} | set(detail.copies)


def test_a_chain_of_adapters_is_one_change_of_the_pretrained_network(two_adapters):
    source, (_, mixture) = open_source(two_adapters), load_mixture(two_adapters)
    semantic, detail = source.experts.values()
    assert (semantic.over, detail.over) == (None, None)
    base, own = mixture.experts["teacher"].merged(), mixture.experts["detail"].merged()
    for path, (a, b) in detail.pairs.items():
        assert (a.shape[0], b.shape[1]) == (5, 5)
        assert torch.allclose(b @ a, own[f"{path}.weight"] - base[f"{path}.weight"], atol=1e-6)
    assert set(detail.copies) == set(semantic.copies) == {"proj_out.weight", "proj_out.bias"}
    assert torch.equal(detail.copies["proj_out.weight"], own["proj_out.weight"])
    assert not torch.equal(detail.copies["proj_out.weight"], semantic.copies["proj_out.weight"])


def test_steps_name_who_serves_them_and_the_boundary_lies_between_points(full_and_adapter):
    source = open_source(full_and_adapter)
    points = source.trajectory.points.tolist()
    assert source.sigmas == [1.0, points[4], 0.0]
    assert [tuple(step) for step in source.steps] == [("semantic", 1.0, points[4]), ("detail", points[4], 0.0)]
    assert source.boundary() == (points[4] + points[5]) / 2
    for sigma in points[1:]:
        assert (sigma >= source.boundary()) == (source.router.expert_at(sigma) == "semantic")
    with pytest.raises(ValueError, match="samples with semantic and detail: there is no boundary 1"):
        source.boundary(1)


def test_an_expert_that_is_not_trained_yet_is_its_parent(tmp_path):
    source = open_source(finished_run(tmp_path / "run", stages=["semantic"]))
    semantic, detail = source.experts.values()
    assert (detail.name, detail.kind, detail.over) == ("detail", "full", None)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(semantic.merged(), detail.merged(), strict=True))


def test_the_teacher_is_read_as_it_is(tmp_path):
    changes = {"router.experts": ["semantic", "teacher"], "experts": {"semantic": {"kind": "full"}}}
    folder = finished_run(tmp_path / "run", changes, stages=["semantic"])
    source, (_, mixture) = open_source(folder), load_mixture(folder)
    assert source.experts["teacher"].kind == "teacher"
    own = mixture.experts["teacher"].merged()
    assert all(torch.equal(tensor, own[name]) for name, tensor in source.experts["teacher"].merged())


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        open_source(tmp_path / "nothing")
