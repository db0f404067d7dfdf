"""A plan in words and numbers, for people."""

import shlex
import textwrap
from collections.abc import Iterator

from moedistill.runs.planning.plan import GIB, Plan, Remedy, StagePlan

ASSUMED = (
    "Assumed: attention keeps no scores (flash), masks cost nothing, autocast is that of CUDA.",
    "Not counted: what kernels take within themselves, the VAE and text encoders, workers.",
)


def lines(plan: Plan) -> Iterator[str]:
    """The whole plan, at most 100 columns wide."""
    gpus = f"{_gpus(plan.gpus)} of {plan.gpu_memory:g} GiB"
    yield f"{plan.recipe} on {gpus}, {plan.spare:.1f} of them left free; all in GiB"
    for stage in plan.stages:
        yield ""
        yield from _stage(stage)
    yield ""
    yield from _verdict(plan)
    if plan.remedies:
        yield ""
        yield "What would take less, the cheapest first:"
        for remedy in plan.remedies:
            yield from _remedy(remedy)
    yield from textwrap.wrap(plan.missing, 98)
    yield ""
    yield from ASSUMED


def _stage(stage: StagePlan) -> Iterator[str]:
    trains = f", trains {stage.expert}, {stage.micro_batch} at a time" if stage.expert is not None else ""
    yield f"{stage.name} ({stage.kind}{trains})"
    parts = {
        "weights": stage.weights, "trained": stage.trained, "gradients": stage.gradients, "moments": stage.moments,
        "averages": stage.averages, "distribution": stage.distribution, "activations": stage.activations,
    }  # fmt: skip
    said = "  ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size)
    yield from textwrap.wrap(said, 98, initial_indent="  ", subsequent_indent="  ")
    yield (
        f"  peak {_gib(stage.peak)} in the {stage.where.removeprefix('the ')}   host {_gib(stage.host)}"
        + (f"   checkpoint {_gib(stage.checkpoint)}" if stage.checkpoint else "")
    )
    yield f"  {stage.flops / 1e12:,.0f} TFLOP and {stage.evaluations} network evaluations a step"


def _verdict(plan: Plan) -> Iterator[str]:
    yield f"{'fits' if plan.fits else 'does not fit'}: at most {_gib(plan.peak)} on each of {_gpus(plan.gpus)}"
    fitting = [card for card, enough in plan.cards.items() if enough]
    others = [card for card, enough in plan.cards.items() if not enough]
    said = [f"fits {', '.join(fitting)}"] * bool(fitting) + [f"does not fit {', '.join(others)}"] * bool(others)
    yield f"  GPUs of so many GiB: {'; '.join(said)}"
    if len(plan.numbers) > 1:
        numbers = ", ".join(f"{number}: {_gib(peak)}" for number, peak in plan.numbers.items())
        yield f"  by the number of GPUs: {numbers}"


def _remedy(remedy: Remedy) -> Iterator[str]:
    verdict = "fits" if remedy.fits else "not enough"
    first, *others = textwrap.wrap(remedy.cost, 76)
    yield f"  {_gib(remedy.peak):>6}  {verdict:<10}  {first}"
    yield from (" " * 22 + line for line in others)
    how = [f"--set {shlex.quote(setting)}" for setting in remedy.settings]
    for given in [*how, *([f"--gpus {remedy.gpus}"] if remedy.gpus > 1 else [])]:
        yield " " * 22 + given


def _gpus(number: int) -> str:
    return f"{number} GPU{'s' * (number > 1)}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}"
