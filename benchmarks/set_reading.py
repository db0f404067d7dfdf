"""How fast a stored set is read: how long until the first batch, time of a batch, and memory over an epoch. Minutes.

python benchmarks/set_reading.py [NUMBER_OF_SAMPLES] [FOLDER]
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from moedistill.data.latents import LatentsConfig
from moedistill.data.loading import load_batches
from moedistill.data.writing import Item, write_set
from moedistill.recipe.loading import load_recipe
from moedistill.runs.build import build_mixture, make_accelerator
from moedistill.runs.check import check_before

SEED, BATCH, STEP = 0, 8, 0.020
SHAPES = ((12, 8, 4, 4), (12, 8, 4, 8), (12, 16, 4, 4))
"""Of the latents: three buckets, as of videos of several sizes and lengths."""


def items(count: int) -> Iterator[Item]:
    """Samples for the digits model, of 7 KiB in the mean."""
    generator = torch.Generator().manual_seed(SEED)
    for i in range(count):
        latents = torch.randn(SHAPES[i % 3], generator=generator)
        tensors = {"latents": latents, "digit": torch.tensor(i % 10), "direction": torch.tensor(i % 4)}
        yield Item({"caption": f"the digit {i % 10}, moving, as number {i} of a set"}, lambda: tensors)  # noqa: B023


def memory() -> tuple[float, float]:
    """MiB that this process and its workers hold: of their own, and of files that they mapped, the disk's cache."""
    own = mapped = 0
    parent = str(Path("/proc/self").resolve().name)
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.partition(":\t")[::2] for line in status.read_text(encoding="utf-8").splitlines())
        except OSError:  # it has ended
            continue
        if parent in (lines["Pid"], lines["PPid"]) and "RssAnon" in lines:
            own += int(lines["RssAnon"].split()[0])
            mapped += int(lines["RssFile"].split()[0])
    return own / 1024, mapped / 1024


def main(count: int, folder: Path) -> None:
    started = time.perf_counter()
    write_set(folder, items(count))
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    print(f"{count} samples in {len(sizes)} shards, {sum(sizes) / 2**20:.0f} MiB, written in "
          f"{time.perf_counter() - started:.1f} s")  # fmt: skip
    recipe = load_recipe("dcm_digits", [f"training.batch_size={BATCH}"])
    recipe = replace(recipe, data=LatentsConfig(path=str(folder)))
    accelerator = make_accelerator(recipe, "cpu")
    mixture = build_mixture(recipe, accelerator.device)

    started = time.perf_counter()
    check_before(recipe)
    checked = time.perf_counter()
    assert isinstance(recipe.data, LatentsConfig)
    dataset = recipe.data.build(mixture.backbone)
    built = time.perf_counter()
    steps = count // BATCH
    batches = load_batches(
        dataset, batch_size=BATCH, accumulation=1, seed=SEED, stage="s", steps=range(steps), num_workers=1
    )
    next(batches)
    first = time.perf_counter()
    print(f"until the first batch {first - started:.2f} s: checked {checked - started:.2f}, opened "
          f"{built - checked:.2f}, drawn {first - built:.2f}")  # fmt: skip

    waited, most_waited, seen = 0.0, 0.0, []
    for step in range(1, steps):
        if step % max(1, steps // 8) == 0:
            seen.append(memory())
        time.sleep(STEP)  # a training step on another device
        began = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - began
        most_waited = max(most_waited, time.perf_counter() - began)
    print(f"with one worker, a step of {STEP * 1000:.0f} ms waits {waited / (steps - 1) * 1000:.2f} ms in the mean, "
          f"{most_waited * 1000:.0f} ms at most, for a batch of {BATCH}")  # fmt: skip
    print("MiB over the epoch, own + mapped: " + ", ".join(f"{own:.0f} + {mapped:.0f}" for own, mapped in seen))

    began = time.perf_counter()
    for i in torch.randperm(count, generator=torch.Generator().manual_seed(SEED)).tolist():
        dataset[i]
    each = (time.perf_counter() - began) / count * 1000
    print(f"read in any order, by one process: {each:.2f} ms a sample, {1000 / each / BATCH:.0f} batches/s")


if __name__ == "__main__":
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    if len(sys.argv) > 2:
        main(number, Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(number, Path(temporary))
