"""What an export takes at its most: a network of a few hundred million bytes, each format in a process of its own.

python benchmarks/export_memory.py [LAYERS] [FOLDER]

The bound is one expert, as it was saved, and one file of weights. Memory is the peak of the resident set above what it
is after all imports; pages of mapped files count in it. Some minutes, and ten times the network's size on the disk.
"""

import json
import multiprocessing
import resource
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moedistill.data.base import Sample
from moedistill.data.latents import write_latents
from moedistill.exporters.export import export
from moedistill.exporters.options import ExportOptions, chosen_formats
from moedistill.recipe.loading import load_recipe
from moedistill.runs.loop import run

MIB = 2**20
TEXT = (512, 64)
"""Tokens, and their width."""
CASES = (
    ("diffusers", {}),
    ("diffusers", {"form": "merged"}),
    ("diffusers", {"form": "merged", "dtype": torch.float32}),
    ("comfyui", {"form": "merged"}),
    ("diffusers", {"svd": 16}),
)


def trained(folder: Path, layers: int) -> Path:
    """A run of one step for each expert on a Wan of random weights, with a full and a low-rank expert."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    vae.save_pretrained(folder / "model" / "vae")  # whose config has the latents' scaling
    model = WanTransformer3DModel(
        num_attention_heads=12, attention_head_dim=64, num_layers=layers, ffn_dim=3072, freq_dim=256, text_dim=TEXT[1]
    )
    model.to(torch.bfloat16).save_pretrained(folder / "model" / "transformer")
    del model
    generator = torch.Generator().manual_seed(0)
    samples = [
        Sample(torch.randn(16, 3, 4, 6, generator=generator), {"prompt_embeds": torch.randn(TEXT, generator=generator)})
        for _ in range(2)
    ]
    write_latents(folder / "data", samples)
    recipe = {
        "name": "wan",
        "backbone": {
            "kind": "wan", "pretrained": str(folder / "model"), "dtype": "bfloat16",
            "video": {"num_frames": 9, "height": 32, "width": 48},
        },
        "trajectory": {"kind": "flow_matching", "num_steps": 20},
        "router": {"kind": "timestep", "experts": ["semantic", "detail"], "boundaries": [{"point": 8}]},
        "experts": {"semantic": {"kind": "full"}, "detail": {"kind": "lora", "from": "semantic", "rank": 32}},
        "data": {"kind": "latents", "path": str(folder / "data")},
        "training": {"batch_size": 1, "monitor": None},
        "stages": [*map(stage, ("semantic", "detail")), {"name": "export", "kind": "export"}],
        "sample": {"points": [20, 14, 8]},
    }  # fmt: skip
    return run(load_recipe(recipe), output=folder / "run", device="cpu").output / "export"


def stage(expert: str) -> dict[str, Any]:
    """Of one step."""
    optimizer, losses = {"lr": 1e-3}, [{"kind": "huber"}]
    stage = {"name": expert, "kind": "consistency", "expert": expert, "steps": 1, "optimizer": optimizer}
    return {**stage, "losses": losses}


def peak(source: Path, name: str, options: Mapping[str, Any], folder: Path, told: Any) -> None:
    """Exports once; tells its peak above all imports, that of its children, and the size of the largest file."""
    import diffusers.loaders.single_file_utils

    from moedistill.components.plugins import load_plugins

    formats = chosen_formats(load_plugins().components, [name])
    with torch.device("meta"):
        diffusers.WanTransformer3DModel(num_layers=1)  # brings what the library imports late
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is counted from here
    [made] = export(source, formats, folder, ExportOptions(**options))
    above = status("VmHWM") - before
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    told.send((above, children, max(file.stat().st_size for file in made.folder.rglob("*.safetensors"))))


def status(field: str) -> int:
    """A number of bytes that the kernel keeps of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def main(layers: int, folder: Path) -> None:
    source = trained(folder, layers) if not (folder / "run").is_dir() else folder / "run" / "export"
    index = json.loads((source / "export.json").read_text(encoding="utf-8"))
    files = {name: entry["file"] for name, entry in index["experts"].items()}
    expert = (source / files["semantic"]).stat().st_size
    print(f"a full expert of {expert / MIB:.0f} MiB in float32, an adapter of "
          f"{(source / files['detail']).stat().st_size / MIB:.0f}")  # fmt: skip
    print("| format | options | verified | peak, MiB | bound, MiB | share | process of diffusers, MiB |")
    print("|---|---|---|---|---|---|---|")
    spawn = multiprocessing.get_context("spawn")
    for number, (name, options) in enumerate(CASES):
        for verify in (False, True):
            here, there = spawn.Pipe()
            place = folder / f"out_{number}_{verify}"
            process = spawn.Process(target=peak, args=(source, name, {**options, "verify": verify}, place, there))
            process.start()
            there.close()
            above, children, shard = here.recv()
            process.join()
            said = ", ".join(f"{key} {str(value).removeprefix('torch.')}" for key, value in options.items()) or "none"
            bound = expert + shard
            print(f"| {name} | {said} | {'yes' if verify else 'no'} | {above / MIB:.0f} | {bound / MIB:.0f} | "
                  f"{above / bound:.2f} | {f'{children / MIB:.0f}' if children else ''} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    if len(sys.argv) > 2:
        main(layers, Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(layers, Path(scratch))
