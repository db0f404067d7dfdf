"""The Python code with which a pipeline of diffusers runs what was exported; it goes into the model card."""

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moedistill.exporters.source import Source
from moedistill.runtime.integrity import read_json


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network that the code loads.

    Args:
        folder: beside the card; None for the base model's own.
        base: the base model's network, by name.
    """

    folder: str | None
    base: str


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What was written, as the code has to load it.

    Args:
        whole: all of it is a pipeline's folder.
        slots: a pipeline's names for networks.
        networks: by the names that the code gives them.
        experts: from high noise to low: the network of each, and the file of the LoRA on it, if there is one.
        missing: components of a pipeline's folder that it lacks.
    """

    whole: bool
    slots: Sequence[str]
    networks: dict[str, Network]
    experts: Sequence[tuple[str, str | None]]
    missing: Sequence[str] = ()

    @property
    def has_slots(self) -> bool:
        """Whether a pipeline has a place for every expert, and chooses by itself."""
        return len(self.experts) <= len(self.slots)


def few_step_code(source: Source, layout: Layout, dtype: torch.dtype) -> str:
    """Loads the files from the folder that it is run in, and samples a video of a prompt."""
    flow = _backbone_class(source).prediction_type == "flow_prediction"
    config: Any = source.recipe.backbone
    scheduler = "FlowMatchEulerDiscreteScheduler" if flow else type(config.scheduler()).__name__
    names = [scheduler, pipeline_name(config)]
    if not layout.whole:
        names.append(config.network_class().__name__)
    lines = [
        *([] if flow else ["import math"]),
        "import torch",
        f"from diffusers import {', '.join(sorted(names))}",
        f"from diffusers.utils import export_to_video{', load_image' if _from_images(config) else ''}",
        "",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        f"dtype = {_dtypes(source, dtype)}",
        *(_whole(config, layout.missing) if layout.whole else _parts(source, layout, dtype)),
        "",
        f"SIGMAS = {(source.sigmas or [])[:-1]}",
        *(_flow_steps() if flow else _vp_steps(source, scheduler)),
        *([] if layout.has_slots else _switch(source, layout)),
        "",
        *_call(source, switched=not layout.has_slots),
    ]
    return "\n".join(lines)


def _backbone_class(source: Source) -> Any:
    config: Any = source.recipe.backbone
    return config.backbone_class


def pipeline_name(config: Any) -> str:
    """The class of the base model's pipeline: of a model that makes videos from images another than the plugin's."""
    index = config.locate() / "model_index.json" if config.pretrained is not None else None
    own = str(config.pipeline_class().__name__)
    return str(read_json(index).get("_class_name", own)) if index is not None and index.is_file() else own


def _from_images(config: Any) -> bool:
    return "ImageToVideo" in pipeline_name(config)


def _dtypes(source: Source, dtype: torch.dtype) -> str:
    """That of a pipeline's components; the VAE of some models is kept in float32."""
    config: Any = source.recipe.backbone
    if config.vae_dtype is None or config.vae_dtype == dtype:
        return str(dtype)
    return f'{{"default": {dtype}, "vae": {config.vae_dtype}}}'


def _base(config: Any) -> str:
    named = {"revision": config.revision, "variant": config.variant}
    return ", ".join(
        [_text(config.pretrained or "BASE"), *(f"{key}={_text(value)}" for key, value in named.items() if value)]
    )


def _text(value: str) -> str:
    """A string as code."""
    return json.dumps(value, ensure_ascii=False)


def _whole(config: Any, missing: Sequence[str]) -> list[str]:
    arguments = [*(f"{name}=None" for name in missing), "torch_dtype=dtype"]
    arguments += (
        [f"variant={_text(config.variant)}"] if config.variant else []
    )  # of the components that are as they were
    said = [f"# Without {', '.join(missing)}, which did not lie with the base model: give your own."] if missing else []
    return [*said, f'pipe = {pipeline_name(config)}.from_pretrained(".", {", ".join(arguments)}).to(device)']


def _parts(source: Source, layout: Layout, dtype: torch.dtype) -> list[str]:
    """The base model's pipeline around networks that are loaded one by one, and adapters on them."""
    config: Any = source.recipe.backbone
    network, pipeline = config.network_class().__name__, pipeline_name(config)
    lines = []
    for name, each in layout.networks.items():
        place = (
            f'".", subfolder={_text(each.folder)}' if each.folder else f"{_base(config)}, subfolder={_text(each.base)}"
        )
        lines.append(f"{name} = {network}.from_pretrained({place}, torch_dtype={dtype}).to(device)")
    slots = layout.slots if layout.has_slots else layout.slots[:1]
    placed = [f"{slot}={name}" for slot, (name, _) in zip(slots, layout.experts, strict=False)]
    if layout.has_slots and len(layout.experts) > 1:
        placed.append(f"boundary_ratio={source.boundary()}")
    placed = [*placed, "torch_dtype=dtype"]
    lines.append(f"pipe = {pipeline}.from_pretrained({_base(config)}, {', '.join(placed)}).to(device)")
    for number, (name, file) in enumerate(layout.experts):
        if file is None:
            continue
        if not layout.has_slots:
            lines.append(f"pipe.transformer = {name}")
        into = f", load_into_{layout.slots[number]}=True" if layout.has_slots and number else ""
        lines.append(f'pipe.load_lora_weights(".", weight_name="{file}", adapter_name="{_adapter(file)}"{into})')
    return lines


def _adapter(file: str) -> str:
    """The name of a file's adapter: without dots, in which peft sees the end of a name."""
    return file.removesuffix(".safetensors").replace(".", "_")


def _flow_steps() -> list[str]:
    """Every call then takes the steps of the list, whichever it asks for."""
    return [
        "pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)",
        "euler = pipe.scheduler.set_timesteps",
        "def few_steps(n=None, device=None, sigmas=None, **_):",
        "    euler(sigmas=SIGMAS, device=device)",
        "pipe.scheduler.set_timesteps = few_steps",
    ]


def _vp_steps(source: Source, scheduler: str) -> list[str]:
    """Of a variance-preserving model with v-prediction: a step keeps its estimates of the video and of the noise."""
    times = [source.trajectory.timestep(sigma) for sigma in (source.sigmas or [])[:-1]]
    return [
        f"TIMES = {times}",
        "SCALES = [((1 - s) / math.hypot(s, 1 - s), s / math.hypot(s, 1 - s)) for s in [*SIGMAS, 0.0]]",
        "",
        f"class FewSteps({scheduler}):",
        "    def set_timesteps(self, *_, device=None, **__):",
        "        self.timesteps, self.at = torch.tensor(TIMES, device=device), 0",
        "",
        "    def step(self, v, t, x, **_):",
        "        (a, s), (a_next, s_next), self.at = SCALES[self.at], SCALES[self.at + 1], self.at + 1",
        "        return (a_next * (a * x - s * v) + s_next * (s * x + a * v),)",
        "",
        "pipe.scheduler = FewSteps.from_config(pipe.scheduler.config)",
    ]


def _switch(source: Source, layout: Layout) -> list[str]:
    """Where a pipeline has one network: the next step's expert is put there after each step."""
    names = list(source.experts)
    serving = [names.index(step.expert) for step in source.steps]
    if any(file for _, file in layout.experts):
        experts = [f"({name}, {_text(_adapter(file))})" if file else f"({name}, None)" for name, file in layout.experts]
        put = [
            "    pipe.transformer, adapter = EXPERTS[SERVES[(step + 1) % len(SERVES)]]",
            "    if adapter is not None:",
            "        pipe.enable_lora()",
            "        pipe.set_adapters(adapter)",
            '    elif hasattr(pipe.transformer, "peft_config"):',
            "        pipe.disable_lora()",
        ]
    else:
        experts = [name for name, _ in layout.experts]
        put = ["    pipe.transformer = EXPERTS[SERVES[(step + 1) % len(SERVES)]]"]
    return [
        f"EXPERTS, SERVES = [{', '.join(experts)}], {serving}",
        "",
        "def switch(pipe, step, t, inputs):",
        *put,
        "    return inputs",
        "",
        "switch(pipe, -1, None, {})",
    ]


def _call(source: Source, *, switched: bool) -> list[str]:
    config: Any = source.recipe.backbone
    backbone: Any = config.skeleton()
    video, guidance = config.video, config.guidance
    arguments: dict[str, Any] = backbone.pipeline_arguments()
    if guidance.student_scale is not None:
        arguments["guidance_scale"] = guidance.student_scale
    told = "".join(f"{name}={value!r}, " for name, value in arguments.items())
    guided = "guider" in inspect.signature(config.pipeline_class()).parameters
    guider = ["pipe.guider = type(pipe.guider)(guidance_scale=1.0)"] if guided else []
    return [
        *guider,
        "video = pipe(",
        *(['    image=load_image("first_frame.png"),'] if _from_images(config) else []),
        '    prompt="a red fox runs through deep snow",',
        f"    num_frames={video.num_frames}, height={video.height}, width={video.width},",
        f"    num_inference_steps=len(SIGMAS), {told}generator=torch.Generator().manual_seed(0),",
        *(["    callback_on_step_end=switch,"] if switched else []),
        ").frames[0]",
        f'export_to_video(video, "video.mp4", fps={round(backbone.fps)})',
    ]
