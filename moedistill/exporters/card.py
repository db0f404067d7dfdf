"""The model card that goes with exported files: what they are, how they are sampled, and how they are used."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from moedistill.exporters.options import ExportOptions, WrittenFile
from moedistill.exporters.pipeline_code import pipeline_name
from moedistill.exporters.source import Source
from moedistill.model.latent_video import HUB_ID, LatentVideoConfig


def model_card(source: Source, usage: str, files: Sequence[WrittenFile], options: ExportOptions, kind: str) -> str:
    """The card as Markdown, with the Hub's metadata on top.

    Args:
        usage: how the files are used, in Markdown.
        kind: the format.
    """
    recipe, config = source.recipe, source.recipe.backbone
    parts = [
        f"---\n{yaml.safe_dump(_metadata(source, files, kind), sort_keys=False, allow_unicode=True)}---",
        f"# {recipe.name}",
        recipe.description or f"Few-step experts of {_base_name(config)}.",
        f"Timestep experts distilled with moedistill: {len(source.steps)} steps, each by one pass of one expert.",
        "\n".join(_facts(source, files, options)),
        "## Steps",
        "\n".join(_steps(source)),
        "\n\n".join(_boundaries(source)),
        "## Use",
        usage,
        "## Files",
        "\n".join(_file_table(files)),
        *(["## Metrics", "\n".join(metrics)] if (metrics := list(_metrics(source))) else []),
        "## Licence",
        f"The licence of {_base_name(config)} holds for its weights and for what is made of them.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _base_name(config: Any) -> str:
    return str(getattr(config, "pretrained", None) or f"a random miniature of {config.kind}")


def _metadata(source: Source, files: Sequence[WrittenFile], kind: str) -> dict[str, Any]:
    """What the Hub reads."""
    config: Any = source.recipe.backbone
    pretrained = getattr(config, "pretrained", None) or ""
    is_lora = any(file.form == "lora" for file in files)
    found: dict[str, Any] = _licence(config)
    if HUB_ID.fullmatch(pretrained) and not Path(pretrained).is_dir():
        found |= {"base_model": pretrained, "base_model_relation": "adapter" if is_lora else "finetune"}
    from_images = config.has_pipeline and "ImageToVideo" in pipeline_name(config)
    library = {"library_name": "diffusers"} if kind == "diffusers" else {}
    tags = ["moedistill", "distillation", "few-step", *(["lora"] if is_lora else [])]
    return {**found, **library, "pipeline_tag": "image-to-video" if from_images else "text-to-video", "tags": tags}


def _licence(config: Any) -> dict[str, Any]:
    """What the base model's own card says of its licence, if it lies with its weights."""
    folder = config.find() if isinstance(config, LatentVideoConfig) and config.pretrained else None
    card = folder / "README.md" if folder else None
    if card is None or not card.is_file():
        return {}
    head = card.read_text(encoding="utf-8", errors="replace").split("---")
    try:
        said = yaml.safe_load(head[1]) if len(head) > 2 and not head[0].strip() else None
    except yaml.YAMLError:
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: said[key] for key in keys if key in said} if isinstance(said, dict) else {}


def _facts(source: Source, files: Sequence[WrittenFile], options: ExportOptions) -> Iterator[str]:
    recipe, config = source.recipe, source.recipe.backbone
    revision = getattr(config, "revision", None)
    yield "| | |\n|---|---|"
    yield f"| base model | {_base_name(config)}{f', revision {revision}' if revision else ''} |"
    yield f"| recipe | {recipe.name}, seed {recipe.seed} |"
    for name, expert in source.experts.items():
        on = f", an adapter on {expert.over or 'the base model'}" if expert.kind == "adapter" else ""
        what = {"full": "all weights its own", "adapter": "low-rank", "teacher": "the base model as it is"}
        yield f"| expert {name} | {what[expert.kind]}{on} |"
    if recipe.data is not None:
        yield f"| data | {recipe.data.kind} |"
    video = getattr(config, "video", None)
    if video is not None:
        yield f"| video | {video.num_frames} frames, {video.width} × {video.height} |"
    dtype = str(options.dtype).removeprefix("torch.")
    error = max((file.error or 0.0 for file in files), default=0.0)
    yield f"| stored in | {dtype}{f', which costs {error:.1e} of the size of the weights' if error else ''} |"
    if source.provenance.get("smoke"):
        yield "| **miniature** | a run in miniature: its weights mean nothing |"


def _steps(source: Source) -> Iterator[str]:
    yield "| step | from sigma | to sigma | time | expert |\n|---|---|---|---|---|"
    for number, step in enumerate(source.steps):
        time = source.trajectory.timestep(step.sigma_from)
        yield f"| {number} | {step.sigma_from:.6f} | {step.sigma_to:.6f} | {time:.3f} | {step.expert} |"


def _boundaries(source: Source) -> Iterator[str]:
    """Who serves which steps, in every unit that tools ask for."""
    runs = [(name, len(list(steps))) for name, steps in groupby(step.expert for step in source.steps)]
    first, said = 0, []
    for number, (name, count) in enumerate(runs):
        noise = ("high", "low")[number] if len(runs) == 2 else name
        said.append(f"steps {first}–{first + count} {noise} ({name})")
        first += count
    yield f"{', '.join(said)}, of {len(source.steps)}."
    trajectory = source.trajectory
    at = 0
    for after, (_, count) in enumerate(runs[:-1]):
        at += count
        sigma = source.boundary(after)
        units = [f"sigma {sigma:.6f}", f"time {trajectory.timestep(sigma):.3f}", f"step {at}"]
        if trajectory.shift is not None:
            raw = trajectory.unshift(sigma)
            units.append(f"raw time {1000 * raw:.3f} of 1000 before the shift of {trajectory.shift:g}")
        between = f"{source.steps[at - 1].expert} and {source.steps[at].expert}"
        yield (
            f"Boundary between {between}, in the middle of the gap between their points: {', '.join(units)}. "
            "It is of the shifted sigma; from it up is the former's."
        )


def _file_table(files: Sequence[WrittenFile]) -> Iterator[str]:
    yield "| file | holds |\n|---|---|"
    for file in files:
        forms = {"lora": "LoRA of expert", "merged": "weights of expert"}
        yield f"| {file.path} | {f'{forms[file.form]} {file.expert}' if file.form else 'settings'} |"
    for file in files:
        for group, error in file.cut.items():
            yield f"| {file.path}, {group} | {100 * error:.1f} % of the change is left out by its rank |"


def _metrics(source: Source) -> Iterator[str]:
    tables = [
        (stage, found)
        for stage, found in source.provenance.get("metrics", {}).items()
        if isinstance(found, Mapping) and found and all(isinstance(each, Mapping) and each for each in found.values())
    ]
    for stage, candidates in tables:
        kinds = list(dict.fromkeys(kind for values in candidates.values() for kind in values))
        yield f"| {stage} | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}"
        for name, values in candidates.items():
            yield f"| {name} | {' | '.join(_number(values.get(kind)) for kind in kinds)} |"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "–"
