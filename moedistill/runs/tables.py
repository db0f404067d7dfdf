"""Tables of finished runs: means over training seeds, intervals, paired differences.

Everything is read from what a run leaves behind (`recipe.yaml`, `cost.json`, and each evaluation's `rows.safetensors`):
nothing is sampled again. Runs of one recipe that differ in their seed are one method.

An interval is mean ± sqrt(a² + b²). a is 1.96 bootstrap standard deviations (Efron, 1979) over the evaluation's
samples, drawn with replacement, the same ones for every method and seed because all have the same noise. b is Student's
t times the standard error over training seeds; with one seed there is none, and the interval is of the samples alone:
the table marks it. An interval of a share ends at 0 and 1, and one of a difference of shares at -1 and 1: what is cut
off cannot be the truth, so that the rest holds it as often.
A difference is formed within each draw of samples and, where both methods have the same seeds, within each seed, so
that what they share cancels.
"""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from moedistill.components.plugins import Plugins, load_plugins
from moedistill.errors import UserError, user_errors
from moedistill.metrics.base import Metric
from moedistill.recipe.keys import Recipe
from moedistill.recipe.loading import read_saved
from moedistill.runs.resume import comparable
from moedistill.runtime.integrity import Damaged, misfit, read_json, read_tensors
from moedistill.stages.evaluate import ROWS, EvaluateConfig
from moedistill.stages.run import COST, MINIATURE

LEVEL = 0.95
"""Of all intervals."""
NORMAL = 1.959964
STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
"""Two-sided quantiles at that level: of the normal law, and of Student's t for 1, 2, … degrees of freedom."""


@dataclass
class Record:
    """What one run left.

    Attributes:
        folder: the run's.
        recipe: as it was run.
        rows: by candidate and metric, one row per sample, `[N, D]` float64.
        metrics: by kind: what turns rows into a number.
        cost: of the training stages, as `RunResult.cost`; empty if the run trained nothing.
        noise: what decides noise and conditioning of the samples; runs that share it can be compared in pairs.
        untrained: the candidates in which no expert runs: training seeds change nothing of theirs.
        smoke: whether it was a miniature.
    """

    folder: Path
    recipe: Recipe
    rows: dict[str, dict[str, Tensor]]
    metrics: dict[str, Metric]
    cost: dict[str, dict[str, float]]
    noise: dict[str, Any]
    untrained: frozenset[str] = frozenset()
    smoke: bool = False

    def total(self, what: str) -> float:
        """`steps`, `forwards` or `seconds` of all training stages."""
        return sum(stage[what] for stage in self.cost.values())


@dataclass
class Estimate:
    """A number with its uncertainty.

    Attributes:
        mean: over training seeds.
        low, high: 95 % interval, of samples and training seeds together.
        seeds: the number for each training seed.
        samples_only: whether something trained was there with one seed alone, so that the interval is of the
            evaluation's samples and not of training.
    """

    mean: float
    low: float
    high: float
    seeds: list[float]
    samples_only: bool = False

    def __str__(self) -> str:
        mean, low, high = (f"{x:.0f}" if abs(x) >= 1000 else f"{x:.3g}" for x in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"


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
        runs: every run that counts: its method, seed, folder and cost.
        notes: which runs do not count, and why.
    """

    lines: list[Line]
    runs: list[dict[str, Any]]
    against: str | None = None
    notes: list[str] = field(default_factory=list)

    def markdown(self, width: int | None = None) -> str:
        """The table as Markdown; differences, where there are any, in a second one.

        What is wider than `width` is a list instead: a metric to a line, below the name of the model.
        """
        parts = [_shown([(line, line.values) for line in self.lines], width)]
        compared = [(line, line.differences) for line in self.lines if line.differences]
        if compared:
            parts.append(f"Difference to {self.against}:\n\n{_shown(compared, width)}")
        if any(
            value.samples_only for line in self.lines for value in [*line.values.values(), *line.differences.values()]
        ):
            parts.append(ONE_SEED if width is None else "\n".join(textwrap.wrap(ONE_SEED, width)))
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
            "notes": self.notes,
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
    recipe = read_saved(folder / "recipe.yaml", plugins)
    stages = [stage for stage in recipe.stages if isinstance(stage, EvaluateConfig)]
    done = [stage for stage in stages if (folder / stage.name / ROWS).is_file()]
    data = recipe.resolved()["data"]
    noises = [{"samples": s.samples, "seed": s.seed, "prompts": s.prompts, "data": data} for s in done]
    if not done:
        raise UserError(f"{folder}: its recipe.yaml is of another run: it has no stage of the evaluation that is there")
    if any(noise != noises[0] for noise in noises):
        raise UserError(
            f"{folder}: its evaluations have different noise or prompts ({_differing(noises)}), so no table can hold "
            "them all; give them the same and evaluate again, or read each one's metrics.json"
        )
    rows: dict[str, dict[str, Tensor]] = {}
    untrained = set()
    for stage in done:
        tensors = read_tensors(folder / stage.name / ROWS)
        prefix = f"{stage.name}: " if len(done) > 1 else ""
        for candidate in stage.candidates:
            kinds = [metric.kind for metric in stage.metrics]
            found = {kind: tensors.get(f"{kind}/{candidate.name}") for kind in kinds}
            if measured := {kind: value for kind, value in found.items() if value is not None}:
                rows[prefix + candidate.name] = measured
                untrained |= {prefix + candidate.name} if candidate.model != "student" else set()
    cost = _read_cost(folder / COST)
    with user_errors(str(folder)):
        metrics = {metric.kind: metric.build() for stage in done for metric in stage.metrics}
    return Record(folder, recipe, rows, metrics, cost, noises[0], frozenset(untrained), was_miniature(folder))


def was_miniature(folder: Path) -> bool:
    """Whether the run in this folder was one; of earlier ones only the folder's name says so."""
    with (folder / "recipe.yaml").open(encoding="utf-8") as file:
        return file.readline() == MINIATURE or folder.absolute().parent.name.endswith("-smoke")


def _read_cost(file: Path) -> dict[str, dict[str, float]]:
    """Cost of the training stages; none where none was written."""
    cost: dict[str, dict[str, float]] = read_json(file) if file.exists() else {}
    own = dict.fromkeys(cost, COSTS) if isinstance(cost, dict) else {}
    if fault := misfit(cost, own):
        raise Damaged(file, f"is damaged: {fault}")
    return cost


def _differing(noises: Sequence[dict[str, Any]]) -> str:
    """The keys in which they differ, with their values."""
    found = {key: list(dict.fromkeys(str(noise[key]) for noise in noises)) for key in noises[0]}
    return "; ".join(f"{key} {' and '.join(values)}" for key, values in found.items() if len(values) > 1)


ONE_SEED = (
    "† of one training seed: the interval is that of the evaluation's samples alone (bootstrap); "
    "a model of another seed may lie outside."
)

COSTS = {"steps": 0, "forwards": 0, "seconds": 0.0}
"""What is written of each stage."""

IGNORED = ("seed", "description", "reference_samples")
"""Ends of keys that do not make another method."""


class OfARecipe(Protocol):
    """What is told apart by method: a run."""

    folder: Path
    recipe: Recipe
    smoke: bool


RunT = TypeVar("RunT", bound=OfARecipe)


def methods(runs: Sequence[RunT]) -> dict[str, list[RunT]]:
    """Runs by method: the recipe's name, and what else differs, apart from the seed, among those of that name."""
    named: dict[tuple[str, bool], list[RunT]] = {}
    for run in runs:
        named.setdefault((run.recipe.name, run.smoke), []).append(run)
    grouped: dict[str, list[RunT]] = {}
    for (name, smoke), alike in named.items():
        settings = [comparable(run.recipe.resolved()) for run in alike]
        keys = {key for one in settings for key in one}
        keys = {key for key in keys if not key.endswith(IGNORED)}
        differing = sorted(key for key in keys if len({repr(one.get(key)) for one in settings}) > 1)
        for run, setting in zip(alike, settings, strict=True):
            extra = [*(["miniature"] if smoke else []), *(f"{key}={setting.get(key)}" for key in differing)]
            grouped.setdefault(f"{name} ({', '.join(extra)})" if extra else name, []).append(run)
    return grouped


def newest_of_each_seed(grouped: Mapping[str, Sequence[RunT]]) -> tuple[dict[str, list[RunT]], dict[Path, Path]]:
    """Of a method's runs of one seed that which was evaluated last; and by folder, which one the others yield to."""
    counted: dict[str, list[RunT]] = {}
    others: dict[Path, Path] = {}
    for method, alike in grouped.items():
        last = {run.recipe.seed: run for run in sorted(alike, key=lambda run: (_evaluated(run.folder), run.folder))}
        counted[method] = [run for run in alike if last[run.recipe.seed] is run]
        others |= {run.folder: last[run.recipe.seed].folder for run in alike if last[run.recipe.seed] is not run}
    return counted, others


def _evaluated(folder: Path) -> float:
    return max((rows.stat().st_mtime for rows in folder.glob(f"*/{ROWS}")), default=0.0)


def tabulate(
    records: Sequence[Record],
    *,
    against: str | None = None,
    metrics: Sequence[str] | None = None,
    resamples: int = 200,
    seed: int = 0,
    counterpart: Callable[[str], str] = str,
) -> Table:
    """Every method's candidates by metric, with intervals.

    Args:
        records: runs; those of one method are its training seeds.
        against: a method, to which differences are taken.
        metrics: kinds to tabulate, in this order; all if not given.
        resamples: bootstrap draws.
        seed: of these draws.
        counterpart: names the candidate of `against` that a candidate's difference is taken to: the one of its own
            name, if not given.

    Raises:
        UserError: `against` is no method of theirs, or the runs cannot be compared because their noise differs.
    """
    grouped, others = newest_of_each_seed(methods(records))
    records = [record for alike in grouped.values() for record in alike]
    if against is not None and against not in grouped:
        raise UserError(f"--against {against}: there is no such method; there are {', '.join(grouped)}")
    noises = [record.noise for record in records]
    if any(noise != noises[0] for noise in noises):
        raise UserError(
            f"the runs were evaluated on different noise ({_differing(noises)}), and one table would compare chance. "
            f"Name those that share it, such as {_sharing(records)}; without --table all are listed"
        )
    known = list(dict.fromkeys(kind for record in records for kind in record.metrics))
    unknown = [kind for kind in metrics or () if kind not in known]
    if unknown:
        raise UserError(f"--metric {unknown[0]}: the runs have {', '.join(known)}")
    samples = records[0].noise["samples"]
    draws = torch.randint(samples, (resamples, samples), generator=torch.Generator().manual_seed(seed))
    measured = {method: _measure(alike, draws, metrics or known) for method, alike in grouped.items()}
    seeds = {method: [record.recipe.seed for record in alike] for method, alike in grouped.items()}
    lines = []
    for method, alike in grouped.items():
        forwards = fmean(record.total("forwards") for record in alike)
        for candidate, values in measured[method].items():
            line = Line(method, candidate, forwards, {kind: _estimate(value) for kind, value in values.items()})
            single = len(alike) == 1 and _trained(alike, candidate)
            if against is not None and (method, candidate) != (against, counterpart(candidate)):
                base = measured[against].get(counterpart(candidate), {})
                paired = seeds[method] == seeds[against]
                line.differences = {k: _difference(v, base[k], paired) for k, v in values.items() if k in base}
                other = len(grouped[against]) == 1 and _trained(grouped[against], counterpart(candidate))
                _finish(line.differences, alike[0].metrics, single or other, low=-1.0)
            _finish(line.values, alike[0].metrics, single, low=0.0)
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
    notes = [
        f"{older} is not counted: {newer} is of the same method and seed, and newer" for older, newer in others.items()
    ]
    return Table(lines, runs, against, notes)


def _trained(alike: Sequence[Record], candidate: str) -> bool:
    """Whether training has a part in a candidate of these runs."""
    return candidate not in alike[0].untrained and any(record.total("steps") for record in alike)


def _finish(estimates: Mapping[str, Estimate], metrics: Mapping[str, Metric], samples_only: bool, low: float) -> None:
    """Marks estimates, and ends the intervals of shares where shares, or their differences, end."""
    for kind, estimate in estimates.items():
        estimate.samples_only = samples_only
        if metrics[kind].share:
            estimate.low, estimate.high = max(low, estimate.low), min(1.0, estimate.high)


def _sharing(records: Sequence[Record]) -> str:
    """The folders of those that have the noise of the most."""
    groups = [[str(other.folder) for other in records if other.noise == record.noise] for record in records]
    return " ".join(sorted(groups, key=len, reverse=True)[0])


Values = Tensor
"""`[seeds, 1 + resamples]`: a metric for each training seed, first of all samples, then of each draw of them."""


def _measure(alike: Sequence[Record], draws: Tensor, kinds: Sequence[str]) -> dict[str, dict[str, Values]]:
    """Values by candidate and metric, of the candidates that all records of a method have."""
    first, *others = (record.rows for record in alike)
    shared = [candidate for candidate in first if all(candidate in rows for rows in others)]
    return {
        candidate: {
            kind: torch.stack([_values(record.metrics[kind], record.rows[candidate][kind], draws) for record in alike])
            for kind in kinds
            if kind in first[candidate]
        }
        for candidate in shared
    }


def _values(metric: Metric, rows: Tensor, draws: Tensor) -> Tensor:
    return torch.tensor([metric.value(rows), *(metric.value(rows[draw]) for draw in draws)], dtype=torch.float64)


def _estimate(values: Values) -> Estimate:
    each = values[:, 0]
    return _with_interval(each, _sampling_error(values), _standard_error(each), len(each) - 1)


def _difference(values: Values, base: Values, paired: bool) -> Estimate:
    """`values` minus `base`; `paired` says that their seeds correspond."""
    if paired:
        return _estimate(values - base)
    each, other = values[:, 0], base[:, 0]
    sampling = _sampling_error(values.mean(0, keepdim=True) - base.mean(0, keepdim=True))
    # One seed, such as an untrained teacher's, has no spread to count.
    freedom = min((len(v) - 1 for v in (each, other) if len(v) > 1), default=0)
    training = math.hypot(_standard_error(each), _standard_error(other))
    return _with_interval(each - other.mean(), sampling, training, freedom)


def _sampling_error(values: Values) -> float:
    """Standard deviation over draws of samples, of the mean over seeds; a draw's own bias does not count in it.

    Draws in which there was nothing to measure do not count, unless they are the most.
    """
    means = values[:, 1:].mean(0)
    measured = means[means.isfinite()]
    return float(measured.std()) if 2 * len(measured) > len(means) else math.nan


def _standard_error(each: Tensor) -> float:
    return float(each.std()) / math.sqrt(len(each)) if len(each) > 1 else 0.0


def _with_interval(each: Tensor, sampling: float, training: float, freedom: int) -> Estimate:
    mean = float(each.mean())
    student = STUDENT[min(freedom, len(STUDENT)) - 1] if freedom else 0.0
    half = math.hypot(NORMAL * sampling, student * training)
    return Estimate(mean, mean - half, mean + half, each.tolist())


def _shown(lines: Sequence[tuple[Line, Mapping[str, Estimate]]], width: int | None) -> str:
    """As Markdown, or where that is wider than `width`, as a list."""
    table = _markdown(lines)
    if width is None or max(map(len, table.splitlines())) <= width:
        return table
    names = {kind: kind.replace("_", " ") for _, values in lines for kind in values}
    longest = max(map(len, names.values()), default=0)
    blocks = []
    for line, values in lines:
        title = f"{line.method}, {line.candidate}: {line.forwards:,.0f} forwards, {_seeds(values)} seed(s)"
        block = textwrap.wrap(title, width, subsequent_indent="    ")
        block += [f"  {names[kind]:{longest}}  {_cell(value)}" for kind, value in values.items()]
        blocks.append("\n".join(block))
    return "\n".join(blocks)


def _markdown(lines: Sequence[tuple[Line, Mapping[str, Estimate]]]) -> str:
    kinds = list(dict.fromkeys(kind for _, values in lines for kind in values))
    head = ["method", "candidate", "forwards", "seeds", *(kind.replace("_", " ") for kind in kinds)]
    rows = [
        [
            line.method,
            line.candidate,
            f"{line.forwards:,.0f}",
            str(_seeds(values)),
            *(_cell(values[kind]) if kind in values else "" for kind in kinds),
        ]
        for line, values in lines
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _seeds(values: Mapping[str, Estimate]) -> int:
    return max(len(value.seeds) for value in values.values())


def _cell(value: Estimate) -> str:
    return f"{value}{ONE_SEED[0] if value.samples_only else ''}"
