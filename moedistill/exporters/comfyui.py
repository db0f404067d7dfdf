"""Files that ComfyUI loads as it comes, and a workflow that runs them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moedistill.exporters.base import ExporterConfig
from moedistill.exporters.comfyui_workflow import MINIMUM, no_workflow, workflow
from moedistill.exporters.lora_files import NATIVE
from moedistill.exporters.native_files import loaded, write_native
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
        places = _places(source, options)
        if (reason := no_workflow(source)) is not None:
            return f"{places}\n\nThere is no workflow beside the files: {reason}."
        return f"{places}\n\n`{WORKFLOW}` is opened by dropping it on ComfyUI's window, {MINIMUM} or newer."


def _places(source: Source, options: ExportOptions) -> str:
    """Which file belongs where, and on what, in Markdown."""
    tool = source.recipe.backbone.comfyui()
    assert tool is not None
    experts = loaded(source, options)
    whole = dict.fromkeys(files.weights for files in experts.values() if files.weights)
    loras = [files.lora for files in experts.values() if files.lora]
    lines = []
    if whole:
        lines.append(f"- `models/diffusion_models`: {', '.join(f'`{file}`' for file in whole)}")
    if loras:
        lines.append(f"- `models/loras`: {', '.join(f'`{file}`' for file in loras)}, at strength 1")
    for name, files in experts.items():
        if files.lora:
            base = files.weights or tool.networks.get(source.experts[name].base) or tool.checkpoint
            lines.append(f"- `{files.lora}` is a change of `{base}`, and of no other weights")
    return "\n".join(lines)


def _note(source: Source, options: ExportOptions) -> str:
    """What the workflow shows beside itself, in Markdown."""
    said, start = [], 0
    for number, name in enumerate(source.experts):
        count = sum(step.expert == name for step in source.steps)
        noise = f"{('high', 'low')[number]} ({name})" if len(source.experts) == 2 else name
        said.append(f"{start}–{start + count} {noise}")
        start += count
    trained = [name for name, expert in source.experts.items() if expert.kind != "teacher"]
    lines = [
        f"ComfyUI {MINIMUM} or newer",
        "",
        _places(source, options),
        f"- steps {', '.join(said)}",
        f"- cfg 1 for {' and '.join(trained)}: their guidance is what they were distilled with",
    ]
    return "\n".join(lines)
