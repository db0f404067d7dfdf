"""Whether written files are what was trained, to those who load them; it is asked after every export.

Nothing that wrote them takes part: files are read by their consumers' rules, and by the diffusers that is installed.
"""

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from moedistill.exporters.low_rank import as_linears
from moedistill.exporters.options import Verdict, WrittenFile
from moedistill.exporters.reading import comfyui, lightx2v
from moedistill.exporters.reading import diffusers as by_rules
from moedistill.exporters.reading.calls import trained_calls
from moedistill.exporters.reading.compare import (
    OF_A_CHANGE,
    Comparison,
    Layout,
    Reading,
    Wanted,
    compare_changes,
    compare_values,
    part_of_change,
    whole_change,
)
from moedistill.exporters.reading.files import TensorFile
from moedistill.exporters.reading.fresh import Call, Fresh, Stock
from moedistill.exporters.reading.native import BY_CLASS, Native
from moedistill.exporters.reading.steps import Served, configuration_steps, step_faults, workflow_steps
from moedistill.exporters.source import ExpertSource, Source


def verify_comfyui(source: Source, folder: Path, files: Sequence[WrittenFile]) -> Iterator[Verdict]:
    """Reads all files of weights as ComfyUI does."""
    yield from _in_native_names(source, folder, files, "ComfyUI", comfyui.read_changes, comfyui.read_values)
    if (folder / "workflow.json").is_file():
        served = workflow_steps(json.loads((folder / "workflow.json").read_text(encoding="utf-8")))
        yield _steps(source, files, "workflow.json", "ComfyUI", served)


def verify_lightx2v(source: Source, folder: Path, files: Sequence[WrittenFile]) -> Iterator[Verdict]:
    """Reads all files of weights as LightX2V does, which merges LoRA files into the weights."""
    yield from _in_native_names(
        source, folder, files, "LightX2V", lightx2v.read_changes,
        lambda stored, network: lightx2v.read_values([stored], network),
    )  # fmt: skip
    if (folder / "lightx2v.json").is_file():
        served = configuration_steps(json.loads((folder / "lightx2v.json").read_text(encoding="utf-8")))
        yield _steps(source, files, "lightx2v.json", "LightX2V", served)


def _in_native_names(
    source: Source,
    folder: Path,
    files: Sequence[WrittenFile],
    reader: str,
    read_changes: Callable[[TensorFile, Any], Reading],
    read_values: Callable[[TensorFile, Any], Reading],
) -> Iterator[Verdict]:
    """Reads each file of weights by a consumer's two rules, of LoRA files and of whole networks."""
    for file in _of_weights(files):
        expert, network = _expert(source, file), _native(source, file)
        stored = TensorFile(folder / file.path)
        if file.form == "lora":
            wanted = _wanted(source, expert, file)
            yield _changes(file.path, reader, read_changes(stored, network), network, wanted, stored)
        else:
            take = _take(source, expert, file)
            yield _values(file.path, reader, read_values(stored, network), network, expert, take)
        expert.release()


def verify_diffusers(source: Source, folder: Path, files: Sequence[WrittenFile]) -> Iterator[Verdict]:
    """Reads all files of weights by diffusers' rules, and then with diffusers itself, in a process of its own."""
    calls, weights = trained_calls(source), list(_of_weights(files))
    with Fresh(_stock(source)) as process:
        for file in (file for file in weights if file.form == "lora"):
            yield from _lora(source, folder, file, process, calls)
        merged = [file for file in weights if file.form == "merged"]
        for place, parts in groupby(merged, lambda file: str(Path(file.path).parent)):
            yield from _network(source, folder, place, list(parts), process, calls)
    if (folder / "model_index.json").is_file():
        yield _serving(source, folder)


def _lora(
    source: Source, folder: Path, file: WrittenFile, process: Fresh, calls: Mapping[str, Call]
) -> Iterator[Verdict]:
    expert, stored = _expert(source, file), TensorFile(folder / file.path)
    wanted, call = _wanted(source, expert, file), calls.get(expert.name)
    reading = by_rules.read_changes(stored)
    yield (by_rule := _changes(file.path, "diffusers", reading, by_rules.Own(), wanted, stored))
    if not by_rule.faults:
        if wanted.part:  # what is left out was told; here the two readings are compared
            wanted, call = _as_read(reading, wanted), None
        into = "transformer_2" if _is_second(source, expert) else "transformer"
        found = process.read_changes(stored.path, stored.coarsest, wanted, into, call)
        yield _of_changes(file.path, "diffusers itself", found)
    expert.release()


def _network(
    source: Source,
    folder: Path,
    place: str,
    parts: Sequence[WrittenFile],
    process: Fresh,
    calls: Mapping[str, Call],
) -> Iterator[Verdict]:
    expert, stored = _expert(source, parts[0]), [TensorFile(folder / part.path) for part in parts]
    take = _take(source, expert, parts[0])
    yield (by_rule := _values(place, "diffusers", by_rules.read_values(stored), by_rules.Own(), expert, take))
    if not by_rule.faults:
        dtype = min((file.coarsest for file in stored), key=list(OF_A_CHANGE)[::-1].index)
        trained = ((name, take(name)) for name in expert.shapes)
        call = calls.get(expert.name) if take == expert.tensor else None
        yield _of_values(place, "diffusers itself", process.read_weights(folder / place, dtype, trained, call))
    expert.release()


def _of_weights(files: Sequence[WrittenFile]) -> Iterable[WrittenFile]:
    return (file for file in files if file.form is not None)


def _expert(source: Source, file: WrittenFile) -> ExpertSource:
    """The expert in a file, or, where the file is only what another one stands on, that other one."""
    if file.expert in source.experts:
        return source.experts[file.expert]
    return next(expert for expert in source.experts.values() if expert.over == file.expert)


def _take(source: Source, expert: ExpertSource, file: WrittenFile) -> Callable[[str], Tensor]:
    return expert.tensor if file.expert in source.experts else expert.original


def _native(source: Source, file: WrittenFile) -> Native:
    config: Any = source.recipe.backbone
    return BY_CLASS[config.network_class().__name__](_expert(source, file).shapes)


def _wanted(source: Source, expert: ExpertSource, file: WrittenFile) -> Wanted:
    """The change in a LoRA's file; that of a full expert was cut to a rank."""
    if file.cut:
        return part_of_change(expert)
    return whole_change(as_linears(expert, source.recipe.backbone))


def _as_read(reading: Reading, wanted: Wanted) -> Wanted:
    return Wanted(wanted.shapes, frozenset(reading.added), lambda name: reading.added[name](), wanted.original)


def _changes(path: str, reader: str, reading: Reading, layout: Layout, wanted: Wanted, stored: TensorFile) -> Verdict:
    return _of_changes(path, reader, compare_changes(reading, layout, wanted, stored.coarsest))


def _values(
    path: str, reader: str, reading: Reading, layout: Layout, expert: ExpertSource, take: Callable[[str], Tensor]
) -> Verdict:
    return _of_values(path, reader, compare_values(reading, layout, expert.shapes, take))


def _of_changes(path: str, reader: str, found: Comparison) -> Verdict:
    said = f"all {found.compared} changed tensors, off by at most {found.error:.1e} of their change"
    return Verdict(path, reader, said, found.faults)


def _of_values(path: str, reader: str, found: Comparison) -> Verdict:
    return Verdict(path, reader, f"all {found.compared} tensors, off by at most {found.error:.1e}", found.faults)


def _stock(source: Source) -> Stock:
    config: Any = source.recipe.backbone
    network: Any = next(iter(config.skeleton().networks.values()))
    parameters = inspect.signature(config.pipeline_class()).parameters.values()
    needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    told = {name: value for name, value in network.config.items() if not name.startswith("_")}
    return Stock(config.network_class().__name__, told, config.pipeline_class().__name__, needed)


def _is_second(source: Source, expert: ExpertSource) -> bool:
    """Whether a pipeline of two networks has this expert as its second."""
    config: Any = source.recipe.backbone
    two = "transformer_2" in inspect.signature(config.pipeline_class()).parameters
    return two and list(source.experts)[1:2] == [expert.name]


def _serving(source: Source, folder: Path) -> Verdict:
    """Whether a pipeline takes the right network in each step."""
    ratio = json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("boundary_ratio")
    slots = dict(zip(source.experts, ("transformer", "transformer_2"), strict=False))
    sigmas, wanted = [step.sigma_from for step in source.steps], [slots[step.expert] for step in source.steps]
    faults = by_rules.serving_faults(ratio, sigmas, wanted)
    return Verdict("model_index.json", "diffusers", f"each of the {len(sigmas)} steps by its own expert", faults)


def _steps(source: Source, files: Sequence[WrittenFile], path: str, reader: str, served: Sequence[Served]) -> Verdict:
    """Whether the steps are the recipe's, each with the files of its expert."""
    weights = list(_of_weights(files))
    wanted = []
    for step in source.steps:
        expert = source.experts[step.expert]
        own = [file for file in weights if file.expert == expert.name]
        if any(file.form == "lora" and not file.cut for file in own):
            own += [file for file in weights if file.expert == expert.over]
        wanted.append(Served(step.sigma_from, step.sigma_to, frozenset(file.path for file in own)))
    faults = step_faults(served, wanted, frozenset(file.path for file in weights))
    return Verdict(path, reader, f"the recipe's {len(wanted)} steps, each with the files of its expert", faults)
