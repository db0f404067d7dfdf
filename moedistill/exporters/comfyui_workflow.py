"""A ComfyUI workflow that samples as the recipe does: its exact list of sigmas, each expert for its own steps.

KSamplerAdvanced, in common use for two networks, knows schedules and no list; so the list is ManualSigmas', cut by
SplitSigmas, and each part is sampled by a SamplerCustom of plain Euler steps: the first adds the noise.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moedistill.exporters.native_files import Loaded
from moedistill.exporters.source import ExpertSource, Source
from moedistill.model.comfyui import ComfyUI

MINIMUM = "0.7.0"
"""The first version of ComfyUI with ManualSigmas; names, inputs and outputs of all nodes are as they are in it."""

PROMPT = "A cat walks through grass, realistic"


class Out(NamedTuple):
    """An output of a node."""

    node: int
    slot: int
    type: str


class _Graph:
    """Nodes and links as ComfyUI's interface stores them."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []

    def add(
        self,
        kind: str,
        inputs: Mapping[str, Out],
        widgets: Sequence[Any],
        outputs: Sequence[tuple[str, str]] = (),
        *,
        column: int,
        title: str | None = None,
        height: int = 110,
    ) -> list[Out]:
        """Adds a node, below the others of its column; returns its outputs.

        Args:
            inputs: links by the input's name.
            widgets: values of the others, in the order that the node has them in.
            outputs: names and types.
        """
        number = len(self.nodes) + 1
        taken = [node["pos"][1] + node["size"][1] + 50 for node in self.nodes if node["pos"][0] == 420 * column]
        node: dict[str, Any] = {
            "id": number,
            "type": kind,
            "pos": [420 * column, max(taken, default=0)],
            "size": [370, height],
            "flags": {},
            "order": number - 1,
            "mode": 0,
            "inputs": [],
            "outputs": [
                {"name": name, "type": type_, "slot_index": slot, "links": []}
                for slot, (name, type_) in enumerate(outputs)
            ],
            "properties": {"Node name for S&R": kind, "cnr_id": "comfy-core", "ver": MINIMUM},
            "widgets_values": list(widgets),
        }
        if title is not None:
            node["title"] = title
        self.nodes.append(node)
        for slot, (name, out) in enumerate(inputs.items()):
            link = len(self.links) + 1
            self.links.append([link, out.node, out.slot, number, slot, out.type])
            node["inputs"].append({"name": name, "type": out.type, "link": link})
            self.nodes[out.node - 1]["outputs"][out.slot]["links"].append(link)
        return [Out(number, slot, type_) for slot, (_, type_) in enumerate(outputs)]

    def saved(self) -> dict[str, Any]:
        """The file's content."""
        return {
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }


def no_workflow(source: Source) -> str | None:
    """Why the recipe's sampling is no workflow of ComfyUI's own nodes; None if it is one."""
    config = source.recipe.backbone
    tool, guidance = config.comfyui(), config.guidance
    teachers = [expert for expert in source.experts.values() if expert.kind == "teacher"]
    if source.sigmas is None:
        return "the recipe has no sample list"
    if source.eta:
        return f"sampling draws fresh noise between the steps (eta {source.eta:g}), which its euler does not"
    if tool is None or tool.latents is None:
        return "the model makes videos of more than text"
    if teachers and guidance.oscillate_from is not None:
        return f"{teachers[0].name} is guided in some of its steps alone (guidance.oscillate_from)"
    if teachers and guidance.student_scale not in (None, guidance.scale):
        return f"{teachers[0].name} is told another scale than the experts (guidance.student_scale)"
    return None


def workflow(source: Source, models: Mapping[str, Loaded], note: str) -> dict[str, Any]:
    """The workflow of a source that `no_workflow` has nothing against.

    Args:
        models: how each expert is loaded, from high noise to low.
        note: shown beside it.
    """
    config: Any = source.recipe.backbone
    tool, graph = config.comfyui(), _Graph()
    graph.add("MarkdownNote", {}, [note], column=-1, title=source.recipe.name, height=420)
    loaders = _Loaders(graph, tool)
    positive, negative = _texts(graph, tool, loaders.text_encoders(), config.guidance.negative_prompt)
    video = config.video
    size = [video.width, video.height, video.num_frames, 1]
    (latent,) = graph.add(tool.latents, {}, size, [("LATENT", "LATENT")], column=1, height=130)
    (sampler,) = graph.add("KSamplerSelect", {}, ["euler"], [("SAMPLER", "SAMPLER")], column=2)
    assert source.sigmas is not None
    text = ", ".join(map(decimal, source.sigmas))
    (rest,) = graph.add("ManualSigmas", {}, [text], [("SIGMAS", "SIGMAS")], column=2)
    for number, (name, expert) in enumerate(source.experts.items()):
        sigmas = rest
        if number < len(source.experts) - 1:
            count = sum(step.expert == name for step in source.steps)
            names = [("high_sigmas", "SIGMAS"), ("low_sigmas", "SIGMAS")]
            sigmas, rest = graph.add("SplitSigmas", {"sigmas": rest}, [count], names, column=2)
        links = {
            "model": loaders.network(expert, models[name]),
            "positive": positive,
            "negative": negative,
            "sampler": sampler,
            "sigmas": sigmas,
            "latent_image": latent,
        }
        scale = config.guidance.classifier_free_scale(expert.base) if expert.kind == "teacher" else 1.0
        values = [number == 0, 0, "fixed", scale]  # the third is what the interface does to the seed after a run
        outputs = [("output", "LATENT"), ("denoised_output", "LATENT")]
        latent, _ = graph.add("SamplerCustom", links, values, outputs, column=3, title=name, height=230)
    decode = {"samples": latent, "vae": loaders.vae()}
    (images,) = graph.add("VAEDecode", decode, [], [("IMAGE", "IMAGE")], column=4, height=60)
    (made,) = graph.add("CreateVideo", {"images": images}, [tool.fps], [("VIDEO", "VIDEO")], column=4)
    graph.add("SaveVideo", {"video": made}, [f"video/{source.recipe.name}", "auto", "auto"], column=4, height=400)
    return graph.saved()


def decimal(sigma: float) -> str:
    """A float32 number in plain decimals that give it back: ManualSigmas reads no exponents."""
    return np.format_float_positional(np.float32(sigma), trim="-")


class _Loaders:
    """What is loaded from files, each once."""

    def __init__(self, graph: _Graph, tool: ComfyUI) -> None:
        self._graph, self._tool = graph, tool
        self._found: dict[tuple[str, str], list[Out]] = {}

    def _load(self, kind: str, file: str, more: Sequence[Any], outputs: Sequence[str]) -> list[Out]:
        if (kind, file) not in self._found:
            names = [(name, name) for name in outputs]
            self._found[kind, file] = self._graph.add(kind, {}, [file, *more], names, column=0)
        return self._found[kind, file]

    def _checkpoint(self) -> list[Out]:
        assert self._tool.checkpoint is not None
        return self._load("CheckpointLoaderSimple", self._tool.checkpoint, [], ["MODEL", "CLIP", "VAE"])

    def network(self, expert: ExpertSource, model: Loaded) -> Out:
        """An expert's network, with its LoRA."""
        if model.weights is None and self._tool.checkpoint is not None:
            network = self._checkpoint()[0]
        else:
            file = model.weights or self._tool.networks[expert.base]
            (network,) = self._load("UNETLoader", file, ["default"], ["MODEL"])
        if model.lora is None:
            return network
        (network,) = self._graph.add(
            "LoraLoaderModelOnly", {"model": network}, [model.lora, 1.0], [("MODEL", "MODEL")], column=1
        )
        return network

    def text_encoders(self) -> Out:
        first, *others = self._tool.text_encoders
        kind = "DualCLIPLoader" if others else "CLIPLoader"
        return self._load(kind, first, [*others, self._tool.text_type, "default"], ["CLIP"])[0]

    def vae(self) -> Out:
        return self._load("VAELoader", self._tool.vae, [], ["VAE"])[0] if self._tool.vae else self._checkpoint()[2]


def _texts(graph: _Graph, tool: ComfyUI, encoder: Out, negative: str) -> tuple[Out, Out]:
    """The prompt, and the one that guides away from it where a teacher is guided."""
    texts = {}
    for name, text in (("positive", PROMPT), ("negative", negative)):
        conditioning = [("CONDITIONING", "CONDITIONING")]
        (texts[name],) = graph.add("CLIPTextEncode", {"clip": encoder}, [text], conditioning, column=1, title=name)
    if tool.told is not None:
        kind, inputs, value = tool.told
        names = [name if name in texts else "positive" for name in inputs]
        outputs = [(name if name in texts else "CONDITIONING", "CONDITIONING") for name in inputs]
        links = {name: texts[text] for name, text in zip(inputs, names, strict=True)}
        texts |= zip(names, graph.add(kind, links, [value], outputs, column=1), strict=True)
    return texts["positive"], texts["negative"]
