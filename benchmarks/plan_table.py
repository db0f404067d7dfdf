"""Plans every shipped recipe for a large model, and writes the table into docs/benchmarks.md. Some minutes, no GPU.

python benchmarks/plan_table.py [RECIPE …]
"""

import sys
import time
from pathlib import Path

from moedistill.components.plugins import load_plugins
from moedistill.errors import UserError
from moedistill.recipe.keys import Recipe
from moedistill.recipe.loading import load_recipe, shipped_recipes
from moedistill.runs.planning.count import GIB
from moedistill.runs.planning.plan import Plan, Planner, fits, plan
from moedistill.runs.planning.remedies import plan_with_remedies

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- plans -->", "<!-- end of plans -->"
SIZES = ((125, 720, 1280), (61, 720, 1280), (125, 480, 848), (61, 480, 848))
NUMBERS = (1, 2, 3, 6)


def is_large(recipe: Recipe) -> bool:
    """Whether it is for a model whose weights are published elsewhere."""
    return "/" in str(getattr(recipe.backbone, "pretrained", None))


def row(made: Plan, seconds: float) -> str:
    """One recipe: its stages' peaks, where the largest is, whether it fits, and the cheapest change that makes it."""
    trained = [stage for stage in made.stages if stage.expert is not None]
    largest = max(trained, key=lambda stage: stage.peak)
    peaks = ", ".join(f"{stage.name} {stage.peak / GIB:.1f}" for stage in trained)
    enough = next((each for each in made.remedies if each.fits), None)
    change = "" if made.fits else "none that was tried" if enough is None else f"{enough.cost}: {enough.peak / GIB:.1f}"
    parts = [
        made.recipe,
        made.gpus,
        largest.micro_batch,
        peaks,
        largest.where,
        "yes" if made.fits else "no",
        change,
        f"{seconds:.0f}",
    ]
    return f"| {' | '.join(map(str, parts))} |"


def sizes() -> list[str]:
    """dcm_hunyuan, sharded: the peak by the size of its videos and the number of GPUs."""
    planner = Planner()
    lines = [
        "",
        "`dcm_hunyuan` with `training.sharding: fsdp2` and without context parallel, GiB on each GPU by their number "
        "(of its batch of 6; those that fit 80 GiB with 10 to spare in bold):",
        "",
        f"| videos | {' | '.join(map(str, NUMBERS))} |",
        f"|---|{'---|' * len(NUMBERS)}",
    ]
    for frames, height, width in SIZES:
        values = []
        for gpus in NUMBERS:
            recipe = load_recipe(
                "dcm_hunyuan",
                [
                    "training.sharding=fsdp2", f"training.gradient_accumulation_steps={6 // gpus}",
                    f"backbone.video.num_frames={frames}", f"backbone.video.height={height}",
                    f"backbone.video.width={width}",
                ],
            )  # fmt: skip
            peak = plan(recipe, gpus=gpus, planner=planner).peak
            values.append(f"**{peak / GIB:.0f}**" if fits(peak, 80) else f"{peak / GIB:.0f}")
        lines.append(f"| {height}×{width}×{frames} | {' | '.join(values)} |")
        print(lines[-1], flush=True)
    return lines


def main(names: list[str]) -> None:
    plugins, rows = load_plugins(), []
    for name in names or list(shipped_recipes()):
        recipe = load_recipe(name, (), plugins)
        if not is_large(recipe):
            continue
        begun = time.process_time()
        try:
            alone = recipe.training.sharding == "fsdp2" or recipe.training.gradient_accumulation_steps > 1
            made = plan_with_remedies(recipe, name, (), plugins, gpus=None if alone else recipe.training.batch_size)
        except UserError as error:
            print(f"{name}: {error}", flush=True)
            continue
        rows.append(row(made, time.process_time() - begun))
        print(rows[-1], flush=True)
    columns = (
        "recipe",
        "GPUs",
        "samples at a time",
        "peaks, GiB",
        "where",
        "fits",
        "what makes it fit, GiB",
        "CPU seconds",
    )
    head = f"| {' | '.join(columns)} |"
    table = [BEGIN, head, f"|{'---|' * len(columns)}", *rows, *(sizes() if not names else []), END]
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(before + "\n".join(table) + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
