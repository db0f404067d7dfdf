"""Tiny recipes and raw networks for tests of weights that were distilled elsewhere."""

from pathlib import Path

import pytest
import torch

from moedistill.cli import main
from moedistill.recipe.loading import load_recipe

ROUTER = {"kind": "timestep", "experts": ["high", "low"], "boundaries": [{"point": 4}]}
DUAL = {"semantic": {"kind": "full"}, "detail": {"kind": "lora", "from": "semantic", "rank": 4, "alpha": 8}}


def recipe_of(family, experts, **changes):
    """A recipe of two experts, from high noise to low, on a random miniature."""
    training = {"kind": "consistency", "steps": 1, "losses": [{"kind": "huber"}], "optimizer": {"lr": 1e-9}}
    names = list(experts)
    return {
        "name": f"tiny_{family}",
        "backbone": {"kind": family, "pretrained": None, "video": {"num_frames": 9, "height": 32, "width": 32}},
        "trajectory": {"kind": "flow_matching", "num_steps": 8, "shift": 5.0},
        "router": {**ROUTER, "experts": names},
        "experts": experts,
        "data": {"kind": "latents", "path": None},
        "training": {"batch_size": 1, "monitor": None},
        "stages": [{"name": name, "expert": name, **training} for name in names],
        "sample": {"points": [8, 4]},
        **changes,
    }


@torch.no_grad()
def raw_network(config, seed):
    """A network of the backbone's class with weights of its own, as any library would make it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = config.network_class()(**config.tiny_network()).eval()
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def inputs_of(backbone):
    """Noisy latents, sigmas and conditioning."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, *backbone.latent_shape(), generator=generator)[..., :2, :4, :4]
    cond = {}
    for name, each in backbone.config.inputs().items():
        shape = (2, *(size if size is not None else 2 for size in each.shape))
        ones = each.role == "mask"
        cond[name] = torch.ones(shape, dtype=torch.bool) if ones else torch.randn(shape, generator=generator)
    return x, torch.tensor([0.9, 0.4]), cond


@torch.no_grad()
def error_of(mixture, expert, network):
    """How far an expert's velocities are from a raw network's."""
    inputs = inputs_of(mixture.backbone)
    with mixture.using(expert):
        found = mixture(*inputs)
    return (found - mixture.backbone.velocity(network, *inputs)).abs().max().item()


@torch.no_grad()
def with_weights(network, changes):
    """The network with other values for some tensors, by name."""
    state = network.state_dict()
    assert changes.keys() <= state.keys()
    network.load_state_dict({**state, **changes})
    return network


def convert(kind, source, dest, recipe, capsys, *options):
    """The command, and what it prints; the recipe is written to a file beside `dest`."""
    file = Path(dest).with_suffix(".yaml")
    file.write_text(load_recipe(recipe).to_yaml())
    with pytest.raises(SystemExit) as ended:
        main(["convert", kind, str(source), str(dest), "--recipe", str(file), *options])
    printed = capsys.readouterr()
    # A library that is imported for the first time may say what else is not installed.
    said = [line for line in printed.err.splitlines(keepends=True) if not line.startswith("Unable to import")]
    return ended.value.code, printed.out, "".join(said)


def refused(kind, source, dest, recipe, capsys):
    """The one line that says why; nothing was written."""
    code, out, err = convert(kind, source, dest, recipe, capsys)
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not Path(dest).exists()
    return err
