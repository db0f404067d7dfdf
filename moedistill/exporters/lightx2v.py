"""Files that LightX2V loads, and its configuration for them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from moedistill.exporters.base import ExporterConfig
from moedistill.exporters.native_files import loaded, write_native
from moedistill.exporters.options import ExportOptions, Verdict, WrittenFile
from moedistill.exporters.reading.verify import verify_lightx2v
from moedistill.exporters.source import Source

CONFIG = "lightx2v.json"
GRID = 1000
"""LightX2V counts steps on an even grid of so many, which it then shifts."""
CLOSE = 1e-6
"""How far a sigma of LightX2V's may be from the recipe's: float32 is not closer near 1."""
NETWORKS = ("high_noise_model", "low_noise_model")


@dataclass(kw_only=True)
class LightX2VConfig(ExporterConfig):
    """What LightX2V loads: for each expert a LoRA file or whole weights, and a configuration with its list of steps."""

    def applies(self, source: Source) -> str | None:
        config = source.recipe.backbone
        if not config.in_lightx2v:
            return f"how LightX2V runs backbone {config.kind!r} is not known here"
        if len(source.experts) > len(NETWORKS):
            return f"LightX2V takes two networks, and sampling uses {', '.join(source.experts)}"
        return None

    def write(self, source: Source, folder: Path, options: ExportOptions) -> Sequence[WrittenFile]:
        written = write_native(source, folder, options)
        if no_configuration(source) is None:
            content = configuration(source, options)
            (folder / CONFIG).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            written.append(WrittenFile(path=CONFIG))
        return written

    def verify(self, source: Source, folder: Path, files: Sequence[WrittenFile]) -> Iterable[Verdict]:
        return verify_lightx2v(source, folder, files)

    def usage(self, source: Source, files: Sequence[WrittenFile], options: ExportOptions) -> str:
        if (reason := no_configuration(source)) is not None:
            return f"There is no configuration of LightX2V's beside the files: {reason}."
        model_class = "wan2.2_moe_distill" if len(source.experts) == len(NETWORKS) else "wan2.1_distill"
        name, layout = _published(source), source.recipe.backbone.layout()
        assert layout is not None
        from_images = layout.of_role("video") + layout.of_role("image")
        task, more = ("i2v", " --image_path image.png") if from_images else ("t2v", "")
        return "\n".join(
            [
                f"In this folder, with `{name}` where the model's own files are, as its makers publish them:",
                "",
                "```sh",
                f"python -m lightx2v.infer --model_cls {model_class} --task {task} --model_path {name} \\",
                f'    --config_json {CONFIG} --prompt "a prompt"{more} --save_result_path video.mp4',
                "```",
                "",
                "- Paths in the configuration are seen from where the command is run.",
                "- LoRA files are merged as they are loaded. With `lora_dynamic_apply: true` LightX2V leaves out what "
                "they change of time, text and output layers, without a word.",
            ]
        )


def no_configuration(source: Source) -> str | None:
    """Why LightX2V cannot sample as the recipe does; None if it can."""
    config = source.recipe.backbone
    if source.sigmas is None:
        return "the recipe has no sample list"
    if source.eta:
        return f"sampling draws fresh noise between the steps (eta {source.eta:g}), which it does not"
    for name, expert in source.experts.items():
        if expert.kind == "teacher" and config.guidance.classifier_free_scale(expert.base) != 1:
            return f"{name} is guided in its steps, and LightX2V guides all steps or none"
    if _counts(source) is None:
        shift = _shift(source)
        return f"its steps lie on a grid of {GRID} that is shifted by {shift:g}, and the recipe's sigmas do not"
    return None


def configuration(source: Source, options: ExportOptions) -> dict[str, Any]:
    """LightX2V's configuration for a source that `no_configuration` has nothing against."""
    config: Any = source.recipe.backbone
    video, two = config.video, len(source.experts) == len(NETWORKS)
    counts = _counts(source)
    assert counts is not None
    content: dict[str, Any] = {
        "infer_steps": len(counts),
        "target_video_length": video.num_frames,
        "target_height": video.height,
        "target_width": video.width,
        "text_len": 512,
        # As torch has it; others, such as flash_attn3, are faster where they are installed.
        "self_attn_1_type": "torch_sdpa",
        "cross_attn_1_type": "torch_sdpa",
        "cross_attn_2_type": "torch_sdpa",
        "enable_cfg": False,
        "sample_guide_scale": [1.0, 1.0] if two else 1.0,
        "sample_shift": _shift(source),
        "denoising_step_list": counts,
        "cpu_offload": False,
        "lora_dynamic_apply": False,
    }
    if two:
        first = next(iter(source.experts))
        content["boundary_step_index"] = sum(step.expert == first for step in source.steps)
    loras = []
    for place, (name, files) in zip(NETWORKS, loaded(source, options).items(), strict=False):
        weights = files.weights or _pretrained(source, source.experts[name].base, place if two else None)
        if weights is not None:
            key = f"{place.removesuffix('_model')}_original_ckpt" if two else "dit_original_ckpt"
            content[key] = weights
        if files.lora is not None:
            loras.append({**({"name": place} if two else {}), "path": files.lora, "strength": 1.0})
    return content | ({"lora_configs": loras} if loras else {})


def _shift(source: Source) -> float:
    return source.trajectory.shift or 1.0


def _counts(source: Source) -> list[int] | None:
    """The sampling steps as LightX2V counts them, from 1000 down; None where one lies between its numbers."""
    shift = _shift(source)
    counts = []
    for step in source.steps:
        sigma = step.sigma_from
        count = round(GRID * sigma / (shift - (shift - 1) * sigma))
        u = count / GRID
        if abs(shift * u / (1 + (shift - 1) * u) - sigma) > CLOSE:
            return None
        counts.append(count)
    return counts


def _published(source: Source) -> str:
    """What the makers call the model: its folder's name, without what tells diffusers' layout apart."""
    config: Any = source.recipe.backbone
    return PurePath(config.pretrained or "Wan").name.removesuffix("-Diffusers")


def _pretrained(source: Source, base: str, place: str | None) -> str | None:
    """Where a pretrained network lies in the makers' folder; None where LightX2V looks for it by itself."""
    bases = source.recipe.backbone.bases()
    if place is None:
        return None
    if len(bases) == 1:
        return _published(source)
    own = NETWORKS[list(bases).index(base)]
    return None if own == place else f"{_published(source)}/{own}"
