"""Writes what was learned, to load where no recipe file, checkpoint or trainer is."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from moedistill.components.fields import Component, Config
from moedistill.components.plugins import BUILTIN, plugin_of
from moedistill.errors import UserError
from moedistill.flow.routers import TimestepRouter
from moedistill.model.ema import WhichWeights
from moedistill.model.mixture import Mixture
from moedistill.recipe.keys import Finding, StageConfig, TrainingStageConfig
from moedistill.recipe.sampling import sampling_sigmas
from moedistill.runtime.checkpoint import save_tensors
from moedistill.runtime.integrity import Damaged, read_json, read_tensors, sum_of
from moedistill.runtime.sharding import whole
from moedistill.runtime.writing import disk_errors, new_file
from moedistill.stages.base import Stage
from moedistill.stages.run import Run

if TYPE_CHECKING:
    from moedistill.recipe.keys import Recipe

FORMAT = 3
"""Format 2 has sha256 sums: of each expert's file, and of the index itself; one of format 1 is read without. Format 3
has a prefix before the names in an adapter's file: see `PREFIX`.
"""

INDEX = "export.json"
NO_SUM = "0" * 64
PREFIX = "moedistill."
"""Begins all names in an adapter's file. A loader of LoRAs finds no linear of such a name, and refuses the file; else
it would take the scale for 1, which is in no tensor, and put one expert's copies in the place of the base's layers.
"""


@dataclass(kw_only=True)
class ExportConfig(StageConfig):
    """Writes `export.json` (router, trajectory, sampling steps, experts, provenance) and one safetensors per expert.

    A full expert's file holds the weights of a plain network, under its own names. A LoRA expert's holds `lora_A`,
    `lora_B` and the copied modules, by `moedistill.` and their dotted paths, which no other tool takes for a LoRA; rank
    and alpha are in its header and in export.json. So are sha256 sums: a changed file is refused. Who edits export.json
    by hand sets `format` to 1; it is then read without sums.

    Args:
        weights: the experts' `trained` weights or, of those that have one, their `ema`.
        formats: what is written besides for other tools, each to a folder of its name in the stage's, as `moedistill
            export` does it: `[diffusers]`, or with keys `[{kind: diffusers, components: copy}]`.
    """

    weights: WhichWeights = "trained"
    formats: list[Annotated[Any, Component("exporter", by_name=True)]] = field(default_factory=list)

    def build(self) -> "ExportStage":
        return ExportStage(self)

    def check(self, recipe: "Recipe") -> Iterable[Finding]:
        started = any(getattr(expert, "init", None) for expert in (recipe.experts or {}).values())
        if not started and not any(stage.trained_experts() for stage in recipe.stages if stage is not None):
            yield "", "there is nothing to export: no stage trains an expert"
        kinds = [each.kind for each in self.formats]
        if len(kinds) > len(set(kinds)):
            yield "formats", f"each kind once, not {', '.join(kinds)}: each has one folder"
        for number, each in enumerate(self.formats if recipe.backbone is not None else ()):
            if (reason := each.suits(recipe)) is not None:
                yield f"formats.{number}", f"{each.kind} cannot hold it: {reason}"
        if self.weights == "ema" and not any(getattr(stage, "ema_decay", None) is not None for stage in recipe.stages):
            yield "weights", "ema: no stage keeps an average; give one ema_decay"
        if self.weights == "ema":
            stages = [stage for stage in recipe.stages if isinstance(stage, TrainingStageConfig)]
            averaged = {stage.expert for stage in stages if stage.ema_decay is not None}
            for name in (name for stage in stages for name in stage.trained_experts()):
                expert = (recipe.experts or {}).get(name)
                if expert is not None and not expert.copies_base and expert.parent in averaged:
                    yield "weights", f"ema: {name!r} was trained on {expert.parent!r} as trained, not on its average"


class ExportStage(Stage):
    """See `ExportConfig`."""

    def __init__(self, config: ExportConfig) -> None:
        self.config = config

    def execute(self, run: Run) -> None:
        folder = run.folder(self.config.name) if run.main else run.output / self.config.name
        with ExitStack() as files:
            self._write(run, folder, files)
        for each in self.config.formats if run.main else ():
            shutil.rmtree(folder / each.kind, ignore_errors=True)  # of the stage's own earlier time
            each.export(folder, recipe=run.recipe, say=run.say)

    def _write(self, run: Run, folder: Path, files: ExitStack) -> None:
        mixture, recipe = run.mixture, run.recipe
        if run.main:
            index_file = files.enter_context(new_file(folder / INDEX))  # first in, so last out: it says all is there
        trained = recipe.started().union(*(stage.trained_experts() for stage in recipe.stages))
        experts: dict[str, Any] = {}
        for name, config in recipe.resolved()["experts"].items():
            experts[name] = {"file": None, **config}
            if name in trained:
                weights: Mapping[str, Tensor] = mixture.experts[name].saved
                if self.config.weights == "ema" and name in mixture.ema:
                    weights = mixture.ema[name].average
                # Every process gathers what is sharded; one writes.
                weights = {key: whole(weight.detach()).cpu() for key, weight in weights.items()}
                if run.main:
                    file = ExpertFile(name, config, adapter=not recipe.experts[name].copies_base)
                    new = files.enter_context(new_file(folder / file.name))
                    save_tensors(new, {file.key(key): each for key, each in weights.items()}, metadata=file.header)
                    experts[name] |= file.entry(sum_of(new))
        if not run.main:
            return
        text = make_index(recipe, mixture, experts, _provenance(run, self.config.weights))
        with disk_errors(folder / INDEX):
            index_file.write_text(text, encoding="utf-8")
        run.metrics[self.config.name] = {"folder": str(folder)}
        run.say(f"  {folder}")


class ExpertFile:
    """How an expert's tensors are written to a file of an export.

    Args:
        expert: its name.
        config: its keys, resolved.
        adapter: whether what it trains is beside the weights of a network; else it is all of them.

    Attributes:
        name: of the file.
        header: its metadata.
    """

    def __init__(self, expert: str, config: Mapping[str, Any], *, adapter: bool) -> None:
        self.name, self._prefix = f"{expert}.safetensors", PREFIX if adapter else ""
        scale = {key: str(config[key]) for key in ("rank", "alpha") if key in config}
        self.header = {"format": "pt", "moedistill_expert": expert, **scale}

    def key(self, name: str) -> str:
        """The name in the file of what the expert calls `name`."""
        return f"{self._prefix}{name}"

    def entry(self, sha256: str) -> dict[str, str]:
        """What the index says of the file, beside the expert's keys."""
        return {"file": self.name, "sha256": sha256, "prefix": self._prefix}


def make_index(
    recipe: "Recipe", mixture: Mixture, experts: Mapping[str, Mapping[str, Any]], provenance: Mapping[str, Any]
) -> str:
    """The text of an export's index, with its own sum.

    Args:
        experts: by name: `file`, its `sha256`, and the expert's keys in the recipe.
    """
    index = {
        "format": FORMAT,
        "sha256": NO_SUM,
        "experts": experts,
        "router": mixture.router.to_dict() if mixture.router else None,
        "trajectory": mixture.trajectory.points.tolist(),
        "sigmas": sampling_sigmas(recipe).tolist() if recipe.sample else None,
        "eta": recipe.sample.eta if recipe.sample else 0.0,
        "provenance": provenance,
        "recipe": recipe.resolved(),
    }
    text = json.dumps(index, indent=1)
    return text.replace(NO_SUM, hashlib.sha256(text.encode()).hexdigest(), 1)


def where_from(recipe: "Recipe") -> dict[str, Any]:
    """What every export says of where it comes from; a run adds what its stages did."""
    from moedistill import __version__

    return {
        "moedistill": __version__,
        "torch": torch.__version__,
        "seed": recipe.seed,
        "weights": "trained",
        "smoke": False,
        "plugins": _plugins(recipe),
        "stages": {},
        "metrics": {},
    }


def _provenance(run: Run, weights: str) -> dict[str, Any]:
    return {
        **where_from(run.recipe),
        "weights": weights,
        "smoke": run.smoke,
        "stages": {
            stage.name: {"kind": stage.kind, "experts": list(stage.trained_experts()), "steps": stage.steps}
            for stage in run.recipe.stages
            if isinstance(stage, TrainingStageConfig)
        },
        "metrics": dict(run.metrics),
    }


def _plugins(recipe: "Recipe") -> dict[str, str]:
    """Where the components come from that sampling needs and that are not moedistill's own, by registry and kind."""
    needed: dict[str, Sequence[Config | None]] = {
        "backbone": [recipe.backbone],
        "trajectory": [recipe.trajectory],
        "router": [recipe.router],
        "expert": list(recipe.experts.values()),
    }
    modules = {f"{name} {one.kind}": type(one).__module__ for name, configs in needed.items() for one in configs if one}
    return {name: plugin for name, module in modules.items() if (plugin := plugin_of(module)) != BUILTIN}


class _Expert(TypedDict):
    file: str | None
    sha256: NotRequired[str]
    prefix: NotRequired[str]


class _Provenance(TypedDict):
    plugins: NotRequired[dict[str, str]]


class _Index(TypedDict):
    format: Annotated[int, Field(ge=1)]
    experts: dict[str, _Expert]
    router: dict[str, Any] | None
    trajectory: list[float]
    sigmas: list[float] | None
    eta: Annotated[float, Field(ge=0, le=1)]
    provenance: _Provenance
    recipe: dict[str, Any]


_INDEX = TypeAdapter(_Index)


def read_export(
    folder: Path, *, only: str | None = None, verified: bool = False
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """An export's index, and its experts' tensors by name.

    Args:
        only: of one expert alone.
        verified: the experts' files were compared with their sums before.

    Raises:
        UserError: a file is missing or not what was written, or the format is a newer one.
    """
    index = read_index(folder)
    try:
        weights = {}
        for name, expert in index["experts"].items():
            if expert["file"] is not None and only in (None, name):
                file = folder / expert["file"]
                if not verified and index["format"] > 1 and sum_of(file) != expert.get("sha256"):
                    raise Damaged(file, f"is damaged: it is not what was written (its sha256 is not that of {INDEX})")
                prefix = expert.get("prefix", "")
                weights[name] = {key.removeprefix(prefix): tensor for key, tensor in read_tensors(file).items()}
    except Damaged as error:
        raise UserError(f"{error}; copy or export it again") from error
    return index, weights


def read_index(folder: Path) -> dict[str, Any]:
    """An export's index.

    Raises:
        UserError: it is missing or not what was written, or the format is a newer one.
    """
    try:
        return _read_index(folder / INDEX)
    except Damaged as error:
        raise UserError(f"{error}; copy or export it again") from error


def _read_index(file: Path) -> dict[str, Any]:
    index: dict[str, Any] = read_json(file)
    if isinstance(index, dict) and isinstance(index.get("format"), int) and index["format"] > FORMAT:
        version = index["format"]
        raise UserError(f"{file} has format {version}; this moedistill reads up to {FORMAT}: update it")
    try:
        _INDEX.validate_python(index, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise Damaged(file, f"is not the index of an export, or is damaged: {where}: {first['msg']}") from error
    if index["format"] > 1:
        _check_sum(file, index)
    for name, expert in index["experts"].items():
        place = expert["file"]
        if place is not None and (place in ("", "..") or Path(place).name != place or not place.isprintable()):
            raise Damaged(
                file, f"is damaged: the file of expert {name!r} is {place!r}; it must be a name, in the folder"
            )
    if index["router"] is not None and index["router"].get("kind") == "timestep":
        try:
            TimestepRouter.from_dict(index["router"])
        except (ValueError, TypeError) as error:
            raise Damaged(file, f"is damaged: router: {error}") from error
    return index


def _check_sum(file: Path, index: Mapping[str, Any]) -> None:
    """Damaged if the text of the index is another than the one that was written."""
    said = str(index.get("sha256"))
    written = file.read_bytes().replace(said.encode(), NO_SUM.encode(), 1)
    if hashlib.sha256(written).hexdigest() != said:
        raise Damaged(file, "is damaged: it is not what was written (its own sha256 is another)")
