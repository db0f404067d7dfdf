"""Tiny real models that several test files share."""

from pathlib import Path

import torch

from moedistill.data.loading import Batch
from moedistill.model.mixture import Mixture
from moedistill.recipe.loading import load_recipe
from moedistill.runs.build import build_mixture, make_accelerator
from moedistill.runtime.checkpoint import load_tree
from moedistill.stages.run import Run
from moedistill.stages.training import Training
from moedistill_digits.backbone import DigitsBackbone, DigitsBackboneConfig


def digits_backbone(dtype="float32"):
    return DigitsBackboneConfig(pretrained=None, width=16, num_layers=2, num_heads=2, dtype=dtype).build(seed=0)


def digits_inputs(batch=2, seed=0):
    """Noisy latents, sigmas and conditioning for the digits network."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *DigitsBackbone.latent_shape(None), generator=generator)
    cond = {"digit": torch.arange(batch) % 10, "direction": torch.arange(batch) % 4}
    return x, torch.linspace(0.95, 0.35, batch), cond


def digits_mixture(backbone=None, *, gradient_checkpointing=False, **experts):
    """A student on the tiny digits network, its experts different from their parents: as if trained."""
    mixture = Mixture(backbone or digits_backbone(), experts, gradient_checkpointing=gradient_checkpointing)
    mixture.initialise()
    for seed, expert in enumerate(mixture.experts.values()):
        as_if_trained(expert, seed)
    return mixture


@torch.no_grad()
def as_if_trained(expert, seed):
    """Moves every trained tensor of an expert."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in expert.parameters.values():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def velocity_of(mixture, expert, inputs):
    with mixture.using(expert):
        return mixture(*inputs)


# -- tiny runs --------------------------------------------------------------------------------------------------------


def tiny_recipe(stages, changes=()):
    """Two experts on the tiny digits network; `changes` are values by dotted path, with numbers for list items."""
    recipe = {
        "name": "tiny",
        "backbone": {"kind": "digits", "pretrained": None, "width": 16, "num_layers": 2, "num_heads": 2},
        "trajectory": {"kind": "flow_matching", "num_steps": 8, "shift": 5.0},
        "router": {"kind": "timestep", "experts": ["semantic", "detail"], "boundaries": [{"point": 4}]},
        "experts": {
            "semantic": {"kind": "full"},
            "detail": {"kind": "lora", "from": "semantic", "rank": 2, "alpha": 4},
        },
        "data": {"kind": "digits", "styles_per_digit": 1},
        "training": {"batch_size": 4, "log_every": 1, "monitor": None},
        "stages": list(stages),
        "sample": {"points": [8, 4]},
    }
    for path, value in dict(changes).items():
        *steps, last = (int(step) if step.isdigit() else step for step in path.split("."))
        node = recipe
        for step in steps:
            node = node[step] if isinstance(node, list) else node.setdefault(step, {})
        node[last] = value
    return recipe


def distil(expert="semantic", **changes):
    """A consistency stage of two steps, named after its expert."""
    losses = [{"kind": "huber"}]
    basis = {"name": expert, "kind": "consistency", "expert": expert, "steps": 2, "optimizer": {"lr": 1e-3}}
    return {**basis, "losses": losses, **changes}


def evaluate(**changes):
    """An evaluation that keeps its latents and draws nothing."""
    basis = {"name": "evaluate", "kind": "evaluate", "samples": 4, "pictures": 0, "save_latents": True}
    metrics = [{"kind": "paired_distance"}]
    return {**basis, "candidates": [{"name": "student"}], "reference": "student", "metrics": metrics, **changes}


def dcm_recipe(steps=5, **changes):
    """Both stages of DCM with everything that has a state: critic, averages, schedules, accumulation; all is kept."""
    optimizer = {"lr": 1e-3, "schedule": "cosine", "warmup": 2}
    critic = {"lr": 1e-3, "betas": [0.0, 0.999], "schedule": "linear", "warmup": 1}
    losses = [
        {"kind": "huber"},
        {"kind": "gan", "weight": 0.1, "width": 8, "groups": 2, "optimizer": critic},
        {"kind": "feature_matching", "weight": 0.1, "warmup": 3},
    ]
    shared = {"steps": steps, "ema_decay": 0.9}
    plain = [{"kind": "huber"}, {"kind": "temporal_coherence"}]
    stages = [
        distil(**shared, losses=plain, optimizer=dict(optimizer), target="ema"),
        distil("detail", **shared, losses=losses, optimizer=dict(optimizer), probe={"block_stride": 1}),
    ]
    training = {"gradient_accumulation_steps": 2, "checkpoint_every": 1, "keep_checkpoints": 99}
    dotted = {f"training.{key}": value for key, value in training.items()}
    return tiny_recipe(stages, {**dotted, "data.text_dropout": 0.3, **changes})


TREES = ("state", "experts", "ema", "training")
"""Of a checkpoint."""


def trees(path):
    """All of a checkpoint but the seconds that it took."""
    found = {name: load_tree(path, name) for name in TREES}
    for cost in found["state"]["cost"].values():
        assert cost.pop("seconds") > 0
    return found


def equal(a, b):
    """Whether two trees are the same, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape)
        return same and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def set_up(recipe, number=0):
    """Stage `number` of a recipe, ready for its first step: its `Run` and the built stage."""
    recipe = load_recipe(recipe)
    mixture = build_mixture(recipe)
    dataset = recipe.data.build(mixture.backbone)
    training = Training(
        Run(recipe, Path("unused"), make_accelerator(recipe, "cpu"), mixture, dataset), recipe.stages[number]
    )
    stage = recipe.stages[number].build()
    stage.setup(training)
    return training, stage


def set_up_trained(expert, changes=(), **stage):
    """The stage of `expert`, with the keys `stage`, in a mixture whose experts are as if trained: `Run` and stage."""
    stages = [distil("semantic"), distil("detail")]
    number = ["semantic", "detail"].index(expert)
    stages[number].update(stage)
    training, built = set_up(tiny_recipe(stages, changes), number)
    for seed, name in enumerate(["semantic", "detail"]):
        as_if_trained(training.mixture.experts[name], seed)
    return training, built


def digits_batch(training, batch=4, seed=0):
    """A batch for a step of `run`, of random latents."""
    x, _, cond = digits_inputs(batch, seed)
    return training.begin(Batch(x, cond, list(range(batch)), boundary=True))
