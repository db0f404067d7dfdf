"""What a GPU has to say to the plan: memory of a step against what was counted, and a step under FSDP2 on one GPU.

    python benchmarks/gpu_check.py            made to take less than 8 minutes on one GPU; not run yet
    python benchmarks/gpu_check.py --tiny     the same path with a miniature, on a CPU as well: nothing is measured

A HunyuanVideo of 1.7 billion random weights, of the published widths with fewer blocks, is written to a folder, and
both stages of `dcm_hunyuan_1gpu` run on it for a few steps. Printed is a table for docs/benchmarks.md, and its JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

RECIPE = Path(__file__).parents[1] / "recipes/dcm_hunyuan_1gpu.yaml"
STEPS = 4
CASES = {
    "one process": [],
    "one process, nothing recomputed": ["training.gradient_checkpointing=false", "stages.detail.latent_frames=4"],
    "FSDP2 on one GPU": ["training.sharding=fsdp2"],
}

PROBE = """
import json, time
from pathlib import Path
import torch
from moedistill import hookimpl

FILE, seen = Path(__file__).with_suffix(".json"), {}


@hookimpl
def on_stage_start(training):
    if training.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seen[training.config.name] = {"times": [time.perf_counter()], "losses": []}


@hookimpl
def on_step_end(training, metrics):
    own, cuda = seen[training.config.name], training.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        own["peak"] = torch.cuda.max_memory_allocated()
    own["times"].append(time.perf_counter())
    own["losses"].append(metrics.get("loss"))
    FILE.write_text(json.dumps(seen), encoding="utf-8")
"""


def write_model(folder: Path, tiny: bool) -> None:
    """A transformer of the published widths with random weights, and what else a folder needs to be trained on."""
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel

    from moedistill_hunyuan_video.backbone import HunyuanVideoConfig

    config = HunyuanVideoConfig(pretrained=None if tiny else "hunyuanvideo-community/HunyuanVideo")
    sizes = dict(config.tiny_network() if tiny else config.real_network())
    if not tiny:
        sizes |= {"num_layers": 2, "num_single_layers": 5}
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        network: Any = HunyuanVideoTransformer3DModel(**sizes)
    network.to(torch.bfloat16).save_pretrained(folder / "transformer")
    vae: Any = AutoencoderKLHunyuanVideo
    vae(latent_channels=16, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2).save_pretrained(
        folder / "vae"
    )


def write_data(folder: Path, tiny: bool) -> None:
    """Four samples of random numbers, of the recipe's size."""
    from moedistill import Sample, write_latents

    generator = torch.Generator().manual_seed(0)
    shape, text, pooled = ((16, 5, 4, 6), (10, 24), 16) if tiny else ((16, 16, 60, 106), (256, 4096), 768)

    def sample() -> Sample:
        cond = {
            "prompt_embeds": torch.randn(text, generator=generator).bfloat16(),
            "prompt_attention_mask": torch.ones(text[0], dtype=torch.bool),
            "pooled_prompt_embeds": torch.randn(pooled, generator=generator).bfloat16(),
        }
        return Sample(torch.randn(shape, generator=generator), cond)

    write_latents(folder, (sample() for _ in range(4)))


def write_recipe(file: Path, model: Path, data: Path, tiny: bool) -> None:
    """The shipped recipe on this model: a few steps, no samples."""
    training = {"log_every": 1, "monitor": None, "num_workers": 0}
    backbone: dict[str, Any] = {"pretrained": str(model)}
    experts = {name: {"rank": 8, "alpha": 16} for name in ("semantic", "detail")} if tiny else {}
    if tiny:
        backbone["video"] = {"num_frames": 17, "height": 32, "width": 48}
    recipe = {
        "extends": str(RECIPE),
        "backbone": backbone,
        "data": {"path": str(data)},
        "experts": experts,
        "training": training,
        "stages": {"semantic": {"steps": 2}, "detail": {"steps": STEPS}, "samples": None, "export": None},
    }
    file.write_text(json.dumps(recipe), encoding="utf-8")


def run(recipe: Path, settings: list[str], place: Path, device: str) -> dict[str, Any]:
    """What the probe saw of both stages, run by the command."""
    place.mkdir()
    (place / "probe.py").write_text(PROBE, encoding="utf-8")
    command = [sys.executable, "-m"]
    if any("sharding" in setting for setting in settings):
        command += ["torch.distributed.run", "--standalone", "--nproc_per_node", "1", "-m"]
    command += ["moedistill", "run", str(recipe), "--device", device, "--output", str(place / "run")]
    command += ["-p", str(place / "probe.py"), *(item for setting in settings for item in ("--set", setting))]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    seen: dict[str, Any] = json.loads((place / "probe.json").read_text(encoding="utf-8"))
    return {**seen, "first line": done.stdout.splitlines()[0]}


def planned(recipe: Path, settings: list[str]) -> dict[str, int]:
    """The peak that the plan counts, by stage."""
    command = [sys.executable, "-m", "moedistill", "plan", str(recipe), "--gpus", "1", "--json"]
    command += [item for setting in settings for item in ("--set", setting)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
    return {stage["name"]: stage["peak"] for stage in json.loads(done.stdout)["stages"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a miniature; on a CPU nothing is measured")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.tiny:
        raise SystemExit("there is no GPU here; --tiny tries the script itself")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model, data, recipe = (Path(folder) / name for name in ("model", "data", "recipe.yaml"))
        write_model(model, arguments.tiny)
        write_data(data, arguments.tiny)
        write_recipe(recipe, model, data, arguments.tiny)
        for number, (name, settings) in enumerate(CASES.items()):
            counted = planned(recipe, settings)
            seen = run(recipe, settings, Path(folder) / f"case-{number}", device)
            for stage in ("semantic", "detail"):
                times, peak = seen[stage]["times"], seen[stage].get("peak")
                rows.append({
                    "case": name, "stage": stage, "planned": counted[stage], "measured": peak,
                    "seconds": times[-1] - times[-2], "losses": seen[stage]["losses"], "line": seen["first line"],
                })  # fmt: skip
    print("| case | stage | planned GiB | measured GiB | measured / planned | s per step |\n|---|---|---|---|---|---|")
    for row in rows:
        peak = row["measured"]
        shown = f"{peak / 2**30:.1f} | {peak / row['planned']:.2f}" if peak else "not measured | –"
        print(f"| {row['case']} | {row['stage']} | {row['planned'] / 2**30:.1f} | {shown} | {row['seconds']:.2f} |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
