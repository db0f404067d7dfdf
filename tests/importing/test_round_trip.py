"""What was exported to other tools comes back as the same experts."""

import pytest
import torch
from importing_helpers import convert, inputs_of, recipe_of, refused

from moedistill.cli import main
from moedistill.runs.loop import run
from moedistill.runs.sample import load_mixture

LORA = {"kind": "lora", "rank": 3, "alpha": 6}


def recipe(high, low):
    """Experts on the miniature of Wan 2.2's two networks, trained so fast that they can be told apart."""
    made = recipe_of("wan", {"high": {**high, "base": "transformer"}, "low": {**low, "base": "transformer_2"}})
    made["backbone"]["boundary_ratio"] = 0.875
    made["router"] |= {"boundaries": [{"ratio": 0.875}], "closed": "high"}
    for stage in made["stages"]:
        stage["optimizer"] = {"lr": 0.01}
        stage["steps"] = 2
    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two adapters."""
    return run(recipe(LORA, LORA), output=tmp_path_factory.mktemp("adapters") / "run", device="cpu").output


def exported(folder, kind, form, output, capsys):
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "export",
                str(folder),
                "--format",
                kind,
                form,
                "--dtype",
                "float32",
                "--no-verify",
                "--output",
                str(output),
            ]
        )
    assert ended.value.code == 0, capsys.readouterr().err
    capsys.readouterr()
    return output


@torch.no_grad()
def velocities(folder):
    _, mixture = load_mixture(folder)
    found = {}
    for expert in ("high", "low", "teacher"):
        with mixture.using(expert):
            found[expert] = mixture(*inputs_of(mixture.backbone))
    return found


@pytest.mark.parametrize(
    ("kind", "form", "back", "expert"),
    [
        ("comfyui", "--lora", "loras", LORA),
        ("lightx2v", "--lora", "loras", LORA),
        ("diffusers", "--lora", "loras", LORA),
        ("diffusers", "--lora", "loras", {"kind": "full"}),
        ("diffusers", "--merge", "diffusers", {"kind": "full"}),
        ("comfyui", "--merge", "comfyui", {"kind": "full"}),
    ],
)
def test_it_comes_back(kind, form, back, expert, finished, tmp_path, capsys):
    files = exported(finished, kind, form, tmp_path / "files", capsys)
    code, _, err = convert(back, files, tmp_path / "export", recipe(expert, expert), capsys)
    assert code == 0, err
    original, again = velocities(finished), velocities(tmp_path / "export")
    for name in ("high", "low"):
        assert (original[name] - again[name]).abs().max() <= 1e-5
        assert (original[name] - original["teacher"]).abs().max() > 1e-3


def test_a_change_of_another_expert_is_not_taken_for_one_of_the_pretrained_weights(tmp_path, capsys):
    experts = {"high": {"kind": "full"}, "low": {**LORA, "from": "high"}}
    made = recipe_of("wan", experts)
    folder = run(made, output=tmp_path / "run", device="cpu").output
    with pytest.raises(SystemExit):
        main(["export", str(folder), "--format", "comfyui", "--output", str(tmp_path / "files")])
    capsys.readouterr()
    [low] = (tmp_path / "files").glob("*low*.safetensors")
    alone = recipe_of("wan", {"only": LORA})
    alone["router"] = {"kind": "timestep", "experts": ["only"], "boundaries": []}
    message = refused("loras", low, tmp_path / "export", alone, capsys)
    assert "tiny_wan_low_noise.safetensors says that it is a change of 'tiny_wan_high_noise" in message
    assert "and not of the pretrained weights" in message
