"""Tables of finished runs: means over training seeds, intervals by resampling, paired differences.

Everything is read from what a run leaves behind (`recipe.yaml`, `cost.json`, and each evaluation's `rows.safetensors`):
nothing is sampled again. Runs of one recipe that differ in their seed are one method.

Intervals come from the bootstrap (Efron, 1979): the evaluation's samples are drawn anew with replacement, the same ones
for every method, because all have the same noise; so are each method's training seeds. A difference is formed within
each draw, so that what all methods share cancels.

A resampling has fewer different samples than the original, which raises a Fréchet distance. So only the spread of the
draws is used: an interval is their quantiles, moved by the difference between the estimate and the draws' mean.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from moedistill.errors import UserError
from moedistill.metrics import Metric
from moedistill.plugins import Plugins, load_plugins
from moedistill.recipe import Recipe, flat, load_recipe
from moedistill.stages.evaluate import ROWS, EvaluateConfig
from moedistill.train import COST

LEVEL = 0.95
"""Of all intervals."""


@dataclass
class Record:
    """What one run left.

    Attributes:
        folder: the run's.
        recipe: as it was run.
        rows: by candidate and metric, one row per sample, `[N, D]` float64.
        metrics: by kind: what turns rows into a number.
        cost: of the training stages, as `RunResult.cost`; empty if the run trained nothing.
        noise: number of samples and the seed of noise and conditioning; runs that share it can be compared in pairs.
    """

    folder: Path
    recipe: Recipe
    rows: dict[str, dict[str, Tensor]]
    metrics: dict[str, Metric]
    cost: dict[str, dict[str, float]]
    noise: tuple[int, int]

    def total(self, what: str) -> float:
        """`steps`, `forwards` or `seconds` of all training stages."""
        return sum(stage[what] for stage in self.cost.values())


@dataclass
class Estimate:
    """A number with its uncertainty.

    Attributes:
        mean: over training seeds.
        low, high: 95 % interval, over samples and training seeds together.
        seeds: the number for each training seed.
    """

    mean: float
    low: float
    high: float
    seeds: list[float]

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass
class Line:
    """One model: a method's candidate."""

    method: str
    candidate: str
    forwards: float
    values: dict[str, Estimate]
    differences: dict[str, Estimate] = field(default_factory=dict)


@dataclass
class Table:
    """All models of all methods, by metric.

    Attributes:
        lines: in the order of the runs.
        against: the method that differences were taken to, if any.
        runs: every run read: its method, seed, folder and cost.
    """

    lines: list[Line]
    runs: list[dict[str, Any]]
    against: str | None = None

    def markdown(self) -> str:
        """The table as Markdown; differences, where there are any, in a second one."""
        parts = [_markdown([(line, line.values) for line in self.lines])]
        compared = [(line, line.differences) for line in self.lines if line.differences]
        if compared:
            parts.append(f"Difference to {self.against} at the same candidate:\n\n{_markdown(compared)}")
        return "\n\n".join(parts)

    def plain(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return {
            "against": self.against,
            "lines": [
                {
                    "method": line.method,
                    "candidate": line.candidate,
                    "forwards": line.forwards,
                    "values": {kind: vars(value) for kind, value in line.values.items()},
                    "differences": {kind: vars(value) for kind, value in line.differences.items()},
                }
                for line in self.lines
            ],
            "runs": self.runs,
        }


def read_records(folders: Sequence[str | Path], plugins: Plugins | None = None) -> list[Record]:
    """The finished runs among `folders` and below them, in the order of their paths.

    Raises:
        UserError: a folder does not exist, or there is no evaluated run in it.
    """
    plugins = plugins or load_plugins()
    records = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder; give runs' folders, or one that holds runs")
        evaluated = sorted({rows.parent.parent for rows in folder.rglob(ROWS)})
        if not evaluated:
            raise UserError(f"{folder}: no run in it has evaluated anything ({ROWS}); run a recipe with `evaluate`")
        records += [_read(run, plugins) for run in evaluated]
    return list({record.folder.resolve(): record for record in records}.values())


def _read(folder: Path, plugins: Plugins) -> Record:
    recipe = load_recipe(folder / "recipe.yaml", plugins=plugins)
    stages = [stage for stage in recipe.stages if isinstance(stage, EvaluateConfig)]
    done = [stage for stage in stages if (folder / stage.name / ROWS).is_file()]
    noise = {(stage.samples, stage.seed) for stage in done}
    if len(noise) > 1:
        raise UserError(f"{folder}: its evaluations have different noise (samples, seed): {sorted(noise)}")
    rows: dict[str, dict[str, Tensor]] = {}
    for stage in done:
        for name, tensor in load_file(folder / stage.name / ROWS).items():
            kind, _, candidate = name.partition("/")
            rows.setdefault(candidate, {})[kind] = tensor
    order = [candidate.name for stage in done for candidate in stage.candidates]
    cost = folder / COST
    return Record(
        folder,
        recipe,
        {name: rows[name] for name in order if name in rows},
        {metric.kind: metric.build() for stage in done for metric in stage.metrics},
        json.loads(cost.read_text()) if cost.is_file() else {},
        noise.pop(),
    )


def methods(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by method: the recipe's name, and what else differs, apart from the seed, among those of that name."""
    named: dict[str, list[Record]] = {}
    for record in records:
        named.setdefault(record.recipe.name, []).append(record)
    grouped: dict[str, list[Record]] = {}
    for name, alike in named.items():
        settings = [flat(record.recipe.resolved()) for record in alike]
        keys = {key for one in settings for key in one}
        differing = sorted(key for key in keys if key != "seed" and len({repr(one.get(key)) for one in settings}) > 1)
        for record, setting in zip(alike, settings, strict=True):
            extra = ", ".join(f"{key}={setting.get(key)}" for key in differing)
            grouped.setdefault(f"{name} ({extra})" if extra else name, []).append(record)
    for method, alike in grouped.items():
        seeds = [record.recipe.seed for record in alike]
        if len(set(seeds)) != len(seeds):
            raise UserError(
                f"{method}: seed {next(s for s in seeds if seeds.count(s) > 1)} is there twice, in "
                f"{' and '.join(str(record.folder) for record in alike)}; a seed counts once: name one of them"
            )
    return grouped


def tabulate(records: Sequence[Record], *, against: str | None = None, resamples: int = 200, seed: int = 0) -> Table:
    """Every method's candidates by metric, with intervals.

    Args:
        records: runs; those of one method are its training seeds.
        against: a method, to which the others' differences are taken, candidate by candidate.
        resamples: bootstrap draws.
        seed: of these draws.

    Raises:
        UserError: `against` is no method of theirs, or the runs cannot be compared because their noise differs.
    """
    grouped = methods(records)
    if against is not None and against not in grouped:
        raise UserError(f"--against {against}: there is no such method; there are {', '.join(grouped)}")
    if len({record.noise for record in records}) > 1:
        found = sorted({f"{samples} samples, seed {seed}" for samples, seed in (record.noise for record in records)})
        raise UserError(f"the runs were evaluated on different noise ({'; '.join(found)}): report them one by one")
    samples = records[0].noise[0]
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(samples, (resamples, samples), generator=generator)
    # Of a method, and of the one it is compared with: their seeds have nothing to do with each other.
    seeds, base_seeds = torch.rand(2, resamples, max(map(len, grouped.values())), generator=generator)
    measured = {method: _measure(alike, draws) for method, alike in grouped.items()}
    lines = []
    for method, alike in grouped.items():
        forwards = fmean(record.total("forwards") for record in alike)
        for candidate, values in measured[method].items():
            line = Line(method, candidate, forwards, {k: _estimate(v, seeds) for k, v in values.items()})
            base = measured[against].get(candidate, {}) if against not in (None, method) else {}
            line.differences = {k: _difference(v, base[k], seeds, base_seeds) for k, v in values.items() if k in base}
            lines.append(line)
    runs = [
        {
            "method": method,
            "seed": record.recipe.seed,
            "folder": str(record.folder),
            "steps": record.total("steps"),
            "forwards": record.total("forwards"),
            "seconds": round(record.total("seconds"), 1),
        }
        for method, alike in grouped.items()
        for record in alike
    ]
    return Table(lines, runs, against)


Values = Tensor
"""`[seeds, 1 + resamples]`: a metric for each training seed, first of all samples, then of each draw of them."""


def _measure(alike: Sequence[Record], draws: Tensor) -> dict[str, dict[str, Values]]:
    """Values by candidate and metric, of the candidates that all records of a method have."""
    first, *others = (record.rows for record in alike)
    shared = [candidate for candidate in first if all(candidate in rows for rows in others)]
    return {
        candidate: {
            kind: torch.stack([_values(record.metrics[kind], record.rows[candidate][kind], draws) for record in alike])
            for kind in first[candidate]
        }
        for candidate in shared
    }


def _values(metric: Metric, rows: Tensor, draws: Tensor) -> Tensor:
    return torch.tensor([metric.value(rows), *(metric.value(rows[draw]) for draw in draws)], dtype=torch.float64)


def _resampled(values: Values, seeds: Tensor) -> Tensor:
    """The mean over as many seeds as there are, drawn with replacement, in each draw of samples: `[resamples]`."""
    count = len(values)
    chosen = (seeds[:, :count] * count).long()
    return values[:, 1:].T.gather(1, chosen).mean(1)


def _interval(estimate: float, resampled: Tensor) -> tuple[float, float]:
    tail = (1.0 - LEVEL) / 2.0
    centred = resampled - resampled.mean() + estimate
    low, high = torch.quantile(centred, torch.tensor([tail, 1.0 - tail], dtype=centred.dtype)).tolist()
    return low, high


def _estimate(values: Values, seeds: Tensor) -> Estimate:
    mean = float(values[:, 0].mean())
    return Estimate(mean, *_interval(mean, _resampled(values, seeds)), values[:, 0].tolist())


def _difference(values: Values, base: Values, seeds: Tensor, base_seeds: Tensor) -> Estimate:
    """`values` minus `base`, the samples paired; each method's seeds are drawn on their own."""
    differences = _resampled(values, seeds) - _resampled(base, base_seeds)
    each = values[:, 0] - base[:, 0].mean()
    mean = float(each.mean())
    return Estimate(mean, *_interval(mean, differences), each.tolist())


def _markdown(lines: Sequence[tuple[Line, Mapping[str, Estimate]]]) -> str:
    kinds = list(dict.fromkeys(kind for _, values in lines for kind in values))
    head = ["method", "candidate", "seeds", *(kind.replace("_", " ") for kind in kinds)]
    rows = [
        [
            line.method,
            line.candidate,
            str(max(len(value.seeds) for value in values.values())),
            *(str(values[kind]) if kind in values else "" for kind in kinds),
        ]
        for line, values in lines
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
