"""Files that ComfyUI loads as it comes, and a workflow that runs them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moedistill.exporters.base import ExporterConfig
from moedistill.exporters.comfyui_workflow import MINIMUM, decimal, no_workflow, workflow
from moedistill.exporters.lora_files import NATIVE
from moedistill.exporters.native_files import loaded, steps_text, write_native
from moedistill.exporters.options import ExportOptions, Verdict, WrittenFile
from moedistill.exporters.reading.verify import verify_comfyui
from moedistill.exporters.source import Source

WORKFLOW = "workflow.json"


@dataclass(kw_only=True)
class ComfyUIConfig(ExporterConfig):
    """What ComfyUI loads as it comes: for each expert a LoRA file or whole weights, and a workflow that runs them."""

    def applies(self, source: Source) -> str | None:
        config = source.recipe.backbone
        if config.comfyui() is None or config.native_names() is None:
            return f"how ComfyUI loads and samples backbone {config.kind!r} is not known here"
        return None

    def write(self, source: Source, folder: Path, options: ExportOptions) -> Sequence[WrittenFile]:
        tool = source.recipe.backbone.comfyui()
        assert tool is not None
        written = write_native(source, folder, options, replace(NATIVE, renamed=tool.renamed))
        if no_workflow(source) is None:
            content = workflow(source, loaded(source, options), _note(source, options))
            (folder / WORKFLOW).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            written.append(WrittenFile(path=WORKFLOW))
        return written

    def verify(self, source: Source, folder: Path, files: Sequence[WrittenFile]) -> Iterable[Verdict]:
        return verify_comfyui(source, folder, files)

    def usage(self, source: Source, files: Sequence[WrittenFile], options: ExportOptions) -> str:
        note = _note(source, options)
        if (reason := no_workflow(source)) is not None:
            return f"{note}\n\nThere is no workflow beside the files: {reason}."
        return f"{note}\n\n`{WORKFLOW}` is opened by dropping it on ComfyUI's window, {MINIMUM} or newer."


def _note(source: Source, options: ExportOptions) -> str:
    """What belongs where, and what to keep to, in Markdown."""
    tool = source.recipe.backbone.comfyui()
    assert tool is not None
    models = loaded(source, options)
    whole = sorted({model.weights for model in models.values() if model.weights})
    loras = [model.lora for model in models.values() if model.lora]
    lines = []
    if whole:
        lines.append(f"- `models/diffusion_models`: {', '.join(f'`{file}`' for file in whole)}")
    if loras:
        lines.append(f"- `models/loras`: {', '.join(f'`{file}`' for file in loras)}, at strength 1")
    if source.sigmas is not None:
        lines.append(f"- {steps_text(source)}; sampler euler, sigmas {', '.join(map(decimal, source.sigmas))}")
        experts = [name for name, expert in source.experts.items() if expert.kind != "teacher"]
        lines.append(f"- cfg 1 for {' and '.join(experts)}: guidance is in the weights")
    for name, model in models.items():
        if model.lora:
            base = model.weights or tool.networks.get(source.experts[name].base) or tool.checkpoint
            lines.append(f"- `{model.lora}` is a change of `{base}`, and of no other weights")
    return "\n".join(lines)
