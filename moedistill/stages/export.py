"""Writes what was learned, to load where no recipe file, checkpoint or trainer is."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moedistill.components.fields import Config
from moedistill.components.plugins import BUILTIN, plugin_of
from moedistill.errors import UserError
from moedistill.model.ema import WhichWeights
from moedistill.recipe.keys import Finding, StageConfig, TrainingStageConfig
from moedistill.recipe.sampling import sampling_sigmas
from moedistill.runtime.checkpoint import save_tensors
from moedistill.runtime.reading import read_text
from moedistill.runtime.sharding import whole
from moedistill.stages.base import Stage
from moedistill.stages.run import Run

if TYPE_CHECKING:
    from moedistill.recipe.keys import Recipe

FORMAT = 1
INDEX = "export.json"


@dataclass(kw_only=True)
class ExportConfig(StageConfig):
    """Writes `export.json` (router, trajectory, sampling steps, experts, provenance) and one safetensors per expert.

    A full expert's file holds the weights of a plain network, under its own names. A LoRA expert's holds `lora_A`,
    `lora_B` and the copied modules, by dotted path; rank and alpha are in export.json.

    Args:
        weights: the experts' `trained` weights or, of those that have one, their `ema`.
    """

    weights: WhichWeights = "trained"

    def build(self) -> "ExportStage":
        return ExportStage(self)

    def check(self, recipe: "Recipe") -> Iterable[Finding]:
        if not any(stage.trained_experts() for stage in recipe.stages if stage is not None):
            yield "", "there is nothing to export: no stage trains an expert"
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
        folder, mixture = run.output / self.config.name, run.mixture
        if run.main:
            folder.mkdir(parents=True, exist_ok=True)
        recipe = run.recipe
        trained = {name for stage in recipe.stages for name in stage.trained_experts()}
        experts: dict[str, Any] = {}
        for name, config in recipe.resolved()["experts"].items():
            file = f"{name}.safetensors" if name in trained else None
            experts[name] = {"file": file, **config}
            if file:
                weights: Mapping[str, Tensor] = mixture.experts[name].parameters
                if self.config.weights == "ema" and name in mixture.ema:
                    weights = mixture.ema[name].average
                # Every process gathers what is sharded; one writes.
                weights = {key: whole(weight.detach()).cpu() for key, weight in weights.items()}
                if run.main:
                    save_tensors(folder / file, weights, metadata={"format": "pt", "moedistill_expert": name})
        if not run.main:
            return
        index = {
            "format": FORMAT,
            "experts": experts,
            "router": mixture.router.to_dict() if mixture.router else None,
            "trajectory": mixture.trajectory.points.tolist(),
            "sigmas": sampling_sigmas(recipe).tolist() if recipe.sample else None,
            "eta": recipe.sample.eta if recipe.sample else 0.0,
            "provenance": _provenance(run, self.config.weights),
            "recipe": recipe.resolved(),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=1))
        run.metrics[self.config.name] = {"folder": str(folder)}
        run.say(f"  {folder}")


def _provenance(run: Run, weights: str) -> dict[str, Any]:
    from moedistill import __version__

    return {
        "moedistill": __version__,
        "torch": torch.__version__,
        "seed": run.recipe.seed,
        "weights": weights,
        "smoke": run.smoke,
        "plugins": _plugins(run.recipe),
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


def read_export(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """An export's index, and its experts' tensors by name.

    Raises:
        UserError: a file is missing or broken, or the format is a newer one.
    """
    try:
        index = json.loads(read_text(folder / INDEX))
        version, experts, _ = int(index["format"]), index["experts"], index["recipe"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / INDEX} is not the index of an export, or is broken; export again") from error
    if version > FORMAT:
        raise UserError(f"{folder} has format {version}; this moedistill reads up to {FORMAT}: update it")
    weights = {}
    for name, file in ((name, folder / expert["file"]) for name, expert in experts.items() if expert["file"]):
        if not file.is_file():
            raise UserError(f"{folder} is not complete: {file.name} is missing; copy or export it again")
        try:
            weights[name] = load_file(file)
        except SafetensorError as error:
            raise UserError(f"{file} is broken ({error}); copy or export it again") from error
    return index, weights
