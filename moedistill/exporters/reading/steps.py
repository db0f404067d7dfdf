"""Which files serve which sampling step, by what ComfyUI and LightX2V make of a workflow and a configuration."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

CLOSE = 1e-6
"""How far a sigma may be from the recipe's: near 1, float32 knows none closer than 6e-8."""
LOADERS = ("UNETLoader", "LoraLoaderModelOnly", "CheckpointLoaderSimple")


class Served(NamedTuple):
    """A sampling step, and the files that are loaded for it."""

    sigma_from: float
    sigma_to: float
    files: frozenset[str]


def workflow_steps(workflow: Mapping[str, Any]) -> list[Served]:
    """What a workflow of ComfyUI's samples, sampler after sampler, by following its links."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {number: (nodes[node], slot) for number, node, slot, *_ in workflow["links"]}

    def before(node: Mapping[str, Any], name: str) -> Iterator[tuple[dict[str, Any], int]]:
        return (links[each["link"]] for each in node["inputs"] if each["name"] == name)

    def sigmas(node: dict[str, Any], slot: int) -> list[float]:
        if node["type"] == "ManualSigmas":  # plain decimals; what stands between them does not matter
            return [float(number) for number in re.findall(r"[-+]?\d*\.?\d+", node["widgets_values"][0])]
        assert node["type"] == "SplitSigmas", node["type"]
        whole, step = sigmas(*next(before(node, "sigmas"))), node["widgets_values"][0]
        return whole[: step + 1] if slot == 0 else whole[step:]

    def files(node: dict[str, Any]) -> set[str]:
        own = {node["widgets_values"][0]} if node["type"] in LOADERS else set()
        return own.union(*(files(above) for above, _ in before(node, "model")))

    served = []
    for node in workflow["nodes"]:
        if node["type"] == "SamplerCustom":
            stops, loaded = sigmas(*next(before(node, "sigmas"))), frozenset(files(node))
            served += [Served(*pair, loaded) for pair in pairwise(stops)]
    return served


def configuration_steps(config: Mapping[str, Any]) -> list[Served]:
    """What LightX2V samples with a configuration: steps on an even grid of 1000, which it shifts."""
    grid = torch.linspace(1.0, 0.0, 1001)[:-1]
    shift = config["sample_shift"]
    shifted = shift * grid / (1 + (shift - 1) * grid)
    stops = [float(shifted[1000 - number]) for number in config["denoising_step_list"]] + [0.0]
    first_low = config.get("boundary_step_index", len(stops))
    loras = {each.get("name"): each["path"] for each in config.get("lora_configs", [])}
    served = []
    for number, pair in enumerate(pairwise(stops)):
        noise = "high_noise" if number < first_low else "low_noise"
        keys = (f"{noise}_original_ckpt", "dit_original_ckpt")
        found = {config.get(key) for key in keys} | {loras.get(f"{noise}_model", loras.get(None))}
        served.append(Served(*pair, frozenset(file for file in found if file is not None)))
    return served


def step_faults(served: Sequence[Served], wanted: Sequence[Served], ours: frozenset[str]) -> list[str]:
    """Where what is sampled is not what is wanted.

    Args:
        ours: the files that were written: which others are loaded for them is not looked at.
    """
    if len(served) != len(wanted):
        return [f"it makes {len(served)} steps, not {len(wanted)}"]
    faults = []
    for number, (found, right) in enumerate(zip(served, wanted, strict=True)):
        if abs(found.sigma_from - right.sigma_from) > CLOSE or abs(found.sigma_to - right.sigma_to) > CLOSE:
            pair = f"from σ {right.sigma_from:.6f} to {right.sigma_to:.6f}"
            faults.append(f"step {number} goes from σ {found.sigma_from:.6f} to {found.sigma_to:.6f}, not {pair}")
        if (loaded := found.files & ours) != right.files:
            faults.append(f"step {number} is served by {_named(loaded)}, not by {_named(right.files)}")
    return faults


def _named(files: frozenset[str]) -> str:
    return " and ".join(sorted(files)) or "none of the files"
