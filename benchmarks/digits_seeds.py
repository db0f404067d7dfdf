"""Does the 4-step student beat the 4-step teacher on digits? Several training seeds, paired bootstrap intervals.

    python benchmarks/digits_seeds.py --seeds 0 1 2 --output runs/digits_seeds

Every seed trains recipes/dcm_digits.yaml anew; noise and conditioning of the evaluation are the same for all. The
interval of a difference comes from resampling the evaluation's samples, the same ones for both models. For all seeds
together the seeds are resampled too.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from moedistill import load_recipe, run
from moedistill_digits.codec import Codec
from moedistill_digits.metrics import features, frechet_distance, real_features

RESAMPLES = 500


def bootstrap(student: list[torch.Tensor], teacher: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Fréchet distance of the student minus that of the teacher, `[RESAMPLES]`; one feature matrix per seed."""
    real, differences = real_features(), []
    for _ in range(RESAMPLES):
        rows = torch.randint(len(teacher), (len(teacher),), generator=generator)
        seed = int(torch.randint(len(student), (), generator=generator))
        differences.append(frechet_distance(student[seed][rows], real) - frechet_distance(teacher[rows], real))
    return torch.tensor(differences)


def interval(differences: torch.Tensor) -> str:
    low, high = torch.quantile(differences, torch.tensor([0.025, 0.975])).tolist()
    return f"95 % interval [{low:.1f}, {high:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="dcm_digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/digits_seeds"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of `moedistill run`")
    parser.add_argument("--student", default="DCM, 4 steps", help="candidate of the recipe's evaluation")
    parser.add_argument("--teacher", default="teacher, 4 steps", help="candidate to compare it with")
    args = parser.parse_args()
    torch.set_num_threads(1)

    student, teacher, tables = [], torch.empty(0), {}
    for seed in args.seeds:
        overrides = [*args.set, f"seed={seed}", "stages.evaluate.save_latents=true"]
        result = run(load_recipe(args.recipe, overrides), output=args.output / f"seed{seed}")
        tables[seed] = result.metrics["evaluate"]
        latents = load_file(result.output / "evaluate" / "latents.safetensors")
        codec = Codec.load()
        student.append(features(codec.decode(latents[args.student])))
        teacher = features(codec.decode(latents[args.teacher]))

    generator = torch.Generator().manual_seed(0)
    for seed, matrix in zip(args.seeds, student, strict=True):
        table = tables[seed]
        print(
            f"seed {seed}: FD {table[args.student]['frechet']:.1f} against {table[args.teacher]['frechet']:.1f}, "
            f"{interval(bootstrap([matrix], teacher, generator))}; paired distance "
            f"{table[args.student]['paired_distance']:.3f} against {table[args.teacher]['paired_distance']:.3f}"
        )
    print(f"all seeds: FD difference {interval(bootstrap(student, teacher, generator))}")
    (args.output / "tables.json").write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
