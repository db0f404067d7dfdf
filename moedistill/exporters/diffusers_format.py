"""Files for diffusers: a pipeline's folder, networks' folders, and LoRA files."""

import inspect
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moedistill.exporters.base import ExporterConfig
from moedistill.exporters.lora_files import DIFFUSERS, linear_changes, own_names, write_lora
from moedistill.exporters.low_rank import as_linears, cut_to_rank
from moedistill.exporters.options import ExportOptions, Verdict, WrittenFile, ending, file_stem
from moedistill.exporters.pipeline_code import Layout, Network, few_step_code
from moedistill.exporters.reading.verify import verify_diffusers
from moedistill.exporters.source import ExpertSource, Source
from moedistill.exporters.writing import write_network
from moedistill.recipe.keys import Recipe
from moedistill.runtime.integrity import read_json
from moedistill.runtime.writing import disk_errors

INDEX = "model_index.json"
_SERVING = (
    "The steps also stand in `model_index.json` (`dmd2_…`), as vLLM-Omni's few-step pipelines of Wan read them; "
    "diffusers says that it ignores them."
)


@dataclass(kw_only=True)
class DiffusersConfig(ExporterConfig):
    """What diffusers loads without moedistill.

    Where every expert leaves merged, and a pipeline of the model's has a place for each (two, in Wan's), it is a
    pipeline's folder, which `DiffusionPipeline.from_pretrained` opens. Else it is a folder for each merged network, a
    LoRA file for each adapter, and code that puts them into the base model's pipeline.

    Args:
        components: of a pipeline's folder, what is as it was (VAE, text encoders): a `link` to the base model's, or a
            `copy`.
    """

    components: Literal["link", "copy"] = "link"

    def suits(self, recipe: Recipe) -> str | None:
        if not recipe.backbone.has_pipeline:
            return f"diffusers has no pipeline for backbone {recipe.backbone.kind!r}"
        if recipe.sample is None:
            return "the recipe has no sample list, and a pipeline must be told its steps"
        if recipe.sample.eta:
            return (
                f"sampling draws fresh noise between the steps (eta {recipe.sample.eta:g}), which its pipelines do not"
            )
        return None

    def applies(self, source: Source) -> str | None:
        if (reason := self.suits(source.recipe)) is not None:
            return reason
        config = source.recipe.backbone
        teachers = [expert for expert in source.experts.values() if expert.kind == "teacher"]
        if guided := [each.name for each in teachers if config.guidance.classifier_free_scale(each.base) != 1.0]:
            return f"{guided[0]} serves some of the steps with guidance, and its pipelines guide all of them or none"
        return None

    def write(self, source: Source, folder: Path, options: ExportOptions) -> Sequence[WrittenFile]:
        if _is_whole(source, options):
            return self._write_pipeline(source, folder, options)
        return _write_parts(source, folder, options)

    def verify(self, source: Source, folder: Path, files: Sequence[WrittenFile]) -> Iterable[Verdict]:
        return verify_diffusers(source, folder, files)

    def usage(self, source: Source, files: Sequence[WrittenFile], options: ExportOptions) -> str:
        layout = _layout(source, options, _is_whole(source, options))
        code = f"```python\n{few_step_code(source, layout, options.dtype)}\n```"
        if not layout.whole or not _for_serving(source):
            return code
        return f"{code}\n\n{_SERVING}"

    def _write_pipeline(self, source: Source, folder: Path, options: ExportOptions) -> list[WrittenFile]:
        config: Any = source.recipe.backbone
        networks, written = config.skeleton().networks, []
        slots = dict(zip(_slots(source), source.experts.values(), strict=False))
        for slot, expert in slots.items():
            error = write_network(expert, networks[expert.base], folder / slot, options.dtype)
            written += _files_in(folder, slot, expert.name, error)
        index = _index(source, config, slots)
        scheduler: dict[str, Any] = {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,  # of which a sigma is a fraction, to the networks of all flow models
            "shift": source.trajectory.shift or 1.0,
        }
        base = config.locate() if config.pretrained is not None else None
        own = [name for name, entry in index.items() if isinstance(entry, list) and name not in slots]
        for name in own:
            if name == "scheduler" and _is_flow(source):
                _write_json(folder / name / "scheduler_config.json", scheduler)
                index[name] = ["diffusers", scheduler["_class_name"]]
            elif base is not None and (base / name).is_dir():
                self._take_over(base / name, folder / name)
            else:
                index[name] = [None, None]
        _write_json(folder / INDEX, index | _for_serving(source))
        return [*written, WrittenFile(path=INDEX)]

    def _take_over(self, component: Path, place: Path) -> None:
        with disk_errors(place):
            if self.components == "link":
                os.symlink(component.resolve(), place, target_is_directory=True)
            else:
                shutil.copytree(component, place)


def _is_whole(source: Source, options: ExportOptions) -> bool:
    """Whether all of it is one pipeline's folder."""
    merged = all(options.form_of(expert) == "merged" for expert in source.experts.values())
    return merged and len(source.experts) <= len(_slots(source))


def _slots(source: Source) -> list[str]:
    """The names by which the model's pipeline calls its networks."""
    config: Any = source.recipe.backbone
    return [name for name in inspect.signature(config.pipeline_class()).parameters if name.startswith("transformer")]


def _is_flow(source: Source) -> bool:
    config: Any = source.recipe.backbone
    return bool(config.backbone_class.prediction_type == "flow_prediction")


def _index(source: Source, config: Any, slots: dict[str, ExpertSource]) -> dict[str, Any]:
    """The pipeline's index: the base model's own, with our networks in it."""
    base = config.locate() / INDEX if config.pretrained is not None else None
    if base is not None and base.is_file():
        index = read_json(base)
    else:
        parameters = inspect.signature(config.pipeline_class()).parameters
        components = {name: [None, None] for name, each in parameters.items() if each.default is each.empty}
        index = {"_class_name": config.pipeline_class().__name__, **components}
    for slot in _slots(source):
        index[slot] = ["diffusers", config.network_class().__name__] if slot in slots else [None, None]
    if len(slots) > 1:
        index["boundary_ratio"] = source.boundary()
    elif "boundary_ratio" in index:
        index["boundary_ratio"] = None
    return index


def _for_serving(source: Source) -> dict[str, Any]:
    """The steps under the keys that vLLM-Omni's few-step pipelines of Wan read: times that the network is told, which
    divided by 1000 and shifted are the sigmas of plain Euler steps, each without guidance.
    """
    config: Any = source.recipe.backbone
    if "boundary_ratio" not in inspect.signature(config.pipeline_class()).parameters:
        return {}
    times = [1000 * sigma for sigma in (source.sigmas or [])[:-1]]
    return {
        "dmd2_denoising_timesteps": times,
        "dmd2_num_inference_steps": len(times),
        "dmd2_guidance_scale": 1.0,
        "dmd2_scheduler_shift": 1.0,
    }


def _network_of(source: Source, expert: ExpertSource, options: ExportOptions) -> tuple[str, str | None]:
    """What an expert's network is called in the code, and its folder; none for the base model's own."""
    if options.form_of(expert) == "merged" and expert.kind != "teacher":
        ours: str | None = expert.name
    else:
        ours = None if options.svd is not None else expert.over
    if ours is None:
        return expert.base, None
    name = ending(source, ours) if ours in source.experts else ours
    return name, name


def _layout(source: Source, options: ExportOptions, whole: bool) -> Layout:
    slots, networks = _slots(source), {}
    experts: list[tuple[str, str | None]] = []
    for number, (name, expert) in enumerate(source.experts.items()):
        network, folder = _network_of(source, expert, options)
        if network in networks and len(source.experts) <= len(slots):
            network = slots[number]  # a pipeline that holds all of them needs one for each
        networks[network] = Network(folder=folder, base=expert.base)
        is_lora = options.form_of(expert) == "lora"
        experts.append((network, f"{file_stem(source, name)}.safetensors" if is_lora else None))
    missing = _missing(source) if whole else []
    return Layout(whole=whole, slots=slots, networks=networks, experts=experts, missing=missing)


def _missing(source: Source) -> list[str]:
    """The components of the pipeline that the base model lacks; the networks and the scheduler are ours."""
    config: Any = source.recipe.backbone
    base = config.locate() if config.pretrained is not None else None
    parameters = inspect.signature(config.pipeline_class()).parameters.values()
    needed = [each.name for each in parameters if each.default is each.empty]
    ours = {"scheduler", *_slots(source)} if _is_flow(source) else set(_slots(source))
    return [name for name in needed if name not in ours and not (base and (base / name).is_dir())]


def _write_parts(source: Source, folder: Path, options: ExportOptions) -> list[WrittenFile]:
    config: Any = source.recipe.backbone
    networks, written = config.skeleton().networks, []
    for name, expert in source.experts.items():
        _, place = _network_of(source, expert, options)
        is_lora = options.form_of(expert) == "lora"
        if place is not None and not (folder / place).exists():
            error = write_network(expert, networks[expert.base], folder / place, options.dtype, under=is_lora)
            written += _files_in(folder, place, expert.over if is_lora else name, error)
        if is_lora:
            written.append(_write_lora(source, expert, folder, options))
    return written


def _write_lora(source: Source, expert: ExpertSource, folder: Path, options: ExportOptions) -> WrittenFile:
    config: Any = source.recipe.backbone
    if options.svd is not None and (expert.kind == "full" or expert.over is not None):
        backbone = config.backbone_class
        change = cut_to_rank(expert, options.svd, backbone.lora_targets, backbone.time_dependent)
    else:
        change = as_linears(expert, config)
    file = f"{file_stem(source, expert.name)}.safetensors"
    changes = linear_changes(change, own_names(expert.shapes))
    stands_on = "pretrained" if options.svd is not None or expert.over is None else expert.over
    header = {"moedistill_expert": expert.name, "moedistill_over": stands_on, "base_model": str(config.pretrained)}
    error = write_lora(folder / file, changes, DIFFUSERS, dtype=options.dtype, metadata=header)
    expert.release()
    return WrittenFile(path=file, expert=expert.name, form="lora", error=error, cut=dict(change.errors))


def _files_in(folder: Path, place: str, expert: str | None, error: float) -> list[WrittenFile]:
    paths = sorted(path.relative_to(folder).as_posix() for path in (folder / place).iterdir())
    return [
        WrittenFile(path=path, expert=expert, form="merged", error=error)
        if path.endswith(".safetensors")
        else WrittenFile(path=path)
        for path in paths
    ]


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
