"""Which half limits a model: who should serve above DCM's boundary, and who below?

    python benchmarks/halves.py

Each model but the detail expert takes samples from noise to the boundary; each takes all of these on to the end. A row
of the tables shares what was lost above, a column what was lost below. Nothing is trained: the students are those of
`evidence.py`, which must have finished with the same --output. About a quarter of an hour of one core.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from evidence import DCM, PCM_EDGES, SEEDS, TITLES, Evidence, Job, as_json, markdown, tuned_rates
from safetensors.torch import load_file
from torch import Tensor

from moedistill.metrics.base import MetricInputs
from moedistill.model.backbone import TEACHER
from moedistill.model.mixture import Mixture
from moedistill.runs.sample import load_mixture
from moedistill.runs.tables import Estimate, Record, Table, tabulate
from moedistill.runtime.randomness import Draws
from moedistill.stages.evaluate import EvaluateConfig, stored_samples

BOUNDARY = 30
FEW = (50, 40, 30, 15)
"""The points at which DCM's steps begin."""
MANY = tuple(range(50, 0, -1))
SEMANTIC, DETAIL = "semantic expert", "detail expert"


@dataclass(frozen=True)
class Model:
    """One expert, at any noise level."""

    mixture: Mixture
    expert: str
    points: tuple[int, ...]

    def above(self, noise: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Its samples at the boundary."""
        return self._carry(noise, cond, [self._sigma(point) for point in self.points if point >= BOUNDARY])

    def below(self, x: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """What it makes of samples at the boundary."""
        return self._carry(x, cond, [*(self._sigma(point) for point in self.points if point <= BOUNDARY), 0.0])

    def _sigma(self, point: int) -> float:
        return self.mixture.trajectory.sigma(point)

    def _carry(self, x: Tensor, cond: Mapping[str, Tensor], sigmas: Sequence[float]) -> Tensor:
        mixture, router = self.mixture, self.mixture.router
        assert router is not None
        everywhere = {segment.expert: self.expert for segment in router.segments}
        return mixture.generate(x, cond, torch.tensor(sigmas), stand_ins=everywhere, guidance=mixture.guidance)


Kept = dict[tuple[tuple[int, ...], ...], Tensor]
"""Samples that only teachers made, by the points of their steps: the same for every training seed."""


def once(kept: Kept, models: Sequence[Model], make: Callable[[], Tensor]) -> Tensor:
    """`make()`, or what was kept of it."""
    if any(model.expert != TEACHER for model in models):
        return make()
    key = tuple(model.points for model in models)
    if key not in kept:
        kept[key] = make()
    return kept[key]


def cross(dcm: Job, single: Job, reference: Path, kept: Kept) -> Record:
    """Every pair of models for one training seed, as candidates "above + below".

    Args:
        dcm, single: finished runs of DCM, and of one student with its phases.
        reference: the stored samples of the teacher's evaluation, on the noise of both.
        kept: of other seeds; added to.
    """
    recipe, mixture = load_mixture(dcm.folder)
    _, student = load_mixture(single.folder)
    models = {
        "teacher, all steps": Model(mixture, TEACHER, MANY),
        "teacher, few steps": Model(mixture, TEACHER, FEW),
        SEMANTIC: Model(mixture, "semantic", FEW),
        DETAIL: Model(mixture, "detail", FEW),
        PCM_EDGES.title: Model(student, "student", FEW),
    }
    [config] = [stage for stage in recipe.stages if isinstance(stage, EvaluateConfig)]
    config = config.replace(reference_samples=str(reference))
    marked = "conditioning."
    cond = {name.removeprefix(marked): t for name, t in load_file(reference).items() if name.startswith(marked)}
    latents, backbone = stored_samples(config, recipe), mixture.backbone
    videos = backbone.decode(latents)
    noise = Draws(config.seed, "evaluate", 0, range(config.samples)).normal("noise", latents.shape[1:])
    metrics = {metric.kind: metric.build() for metric in config.metrics if metric.kind in TITLES}
    rows = {}
    for above, first in models.items():
        if above == DETAIL:
            continue
        x = once(kept, [first], partial(first.above, noise, cond))
        for below, second in models.items():
            made = once(kept, [first, second], partial(second.below, x, cond))
            inputs = MetricInputs(backbone.decode(made), made, videos, latents, cond, backbone.fps)
            rows[f"{above} + {below}"] = {kind: metric.rows(inputs) for kind, metric in metrics.items()}
            print(f"seed {recipe.seed}: {above} + {below}", flush=True)
    return Record(dcm.folder, recipe, rows, metrics, {}, {"samples": config.samples, "seed": config.seed})


def tables(records: Sequence[Record]) -> tuple[str, Table]:
    """For each metric who begins by row and who ends by column, and differences between columns and between rows.

    Also all of it, with the differences to the detail expert below.
    """
    method = records[0].recipe.name
    to_end = tabulate(records, against=method, counterpart=lambda pair: f"{pair.partition(' + ')[0]} + {DETAIL}")
    to_begin = tabulate(records, against=method, counterpart=lambda pair: f"{SEMANTIC} + {pair.partition(' + ')[2]}")
    values = {line.candidate: line.values for line in to_end.lines}
    from_end = {line.candidate: line.differences for line in to_end.lines}
    from_begin = {line.candidate: line.differences for line in to_begin.lines}
    parts = []
    for kind, title in TITLES.items():
        parts += [f"{title}:", _grid(values, kind)]
        parts += [f"Difference to the same beginning ended by the {DETAIL}:", _grid(from_end, kind)]
        parts += [f"Difference to the same end begun by the {SEMANTIC}:", _grid(from_begin, kind)]
    return "\n\n".join(parts), to_end


def _grid(values: Mapping[str, Mapping[str, Estimate]], kind: str) -> str:
    pairs = [candidate.split(" + ") for candidate, value in values.items() if kind in value]
    above, below = (list(dict.fromkeys(names)) for names in zip(*pairs, strict=True))
    rows = [[first, *(str(values[f"{first} + {second}"][kind]) for second in below)] for first in above]
    return markdown(["above \\ below", *below], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/evidence"))
    folder = parser.parse_args().output.resolve()
    torch.set_num_threads(1)
    evidence = Evidence(folder)
    rates = tuned_rates(folder)
    jobs = {method: evidence.finals(method, rates[method.title], SEEDS) for method in (DCM, PCM_EDGES)}
    missing = [job.folder for each in jobs.values() for job in each if job.metrics is None]
    if missing:
        raise SystemExit(f"{missing[0]} is not finished: run evidence.py first")
    reference = evidence.teacher(noise=0) / "evaluate/latents.safetensors"
    kept: Kept = {}
    records = [cross(*pair, reference, kept) for pair in zip(jobs[DCM], jobs[PCM_EDGES], strict=True)]
    shown, table = tables(records)
    file = folder / "halves.md"
    file.write_text(f"{shown}\n", encoding="utf-8")
    file.with_suffix(".json").write_text(as_json(table, folder), encoding="utf-8")
    print(file)


if __name__ == "__main__":
    main()
