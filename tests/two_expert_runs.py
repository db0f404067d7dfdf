"""Real runs of two stages on miniatures of each family, saved as diffusers saves them, text encoders and all."""

import torch
from saved_pipelines import save_pipeline

from moedistill.data.base import Sample
from moedistill.data.latents import write_latents
from moedistill.recipe.loading import load_recipe
from moedistill.runs.loop import run

FAMILIES = ("wan", "wan22", "hunyuan_video", "cogvideox_2b", "ltx")
VIDEOS = {"ltx": {"num_frames": 17, "height": 64, "width": 96}}
SMALL = {"num_frames": 9, "height": 32, "width": 48}
BACKBONES = {
    "wan": "wan",
    "wan22": "wan",
    "wan22_i2v": "wan",
    "hunyuan_video": "hunyuan_video",
    "cogvideox_2b": "cogvideox",
    "ltx": "ltx",
}


def two_expert_recipe(family, model, semantic="lora", more_stages=(), guidance=None, **changes):
    """Three sampling steps over the network or networks of a family: semantic, semantic, detail."""
    backbone = {"kind": BACKBONES[family], "pretrained": str(model), "video": VIDEOS.get(family, SMALL)}
    if guidance is not None:
        backbone["guidance"] = guidance
    experts = changes.get("experts") or own_experts(family, semantic)
    router = {"kind": "timestep", "experts": ["semantic", "detail"], "boundaries": [{"point": 8}]}
    sample = {"points": [20, 14, 8]}
    if family.startswith("wan22"):  # the teacher's own boundary
        backbone["boundary_ratio"] = 0.875
        router |= {"boundaries": [{"ratio": 0.875}], "closed": "high"}
        sample = {"points": [20, 14, 5]}
    if family == "cogvideox_2b":
        backbone["model"] = "2b"
    stages = [
        {
            "name": name, "kind": "consistency", "expert": name, "steps": 2, "losses": [{"kind": "huber"}],
            "optimizer": {"lr": 0.02},
        }
        for name in experts
    ]  # fmt: skip
    return {
        "name": f"few_{family}",
        "backbone": backbone,
        "trajectory": {"kind": "native" if family == "cogvideox_2b" else "flow_matching", "num_steps": 20},
        "router": router,
        "experts": experts,
        "training": {"batch_size": 1, "monitor": None},
        "stages": [*stages, {"name": "export", "kind": "export"}, *more_stages],
        "sample": sample,
        **changes,
    }


def own_experts(family, semantic):
    detail = {"kind": "lora", "from": "semantic", "rank": 2, "alpha": 8}
    experts = {"semantic": {"kind": semantic}, "detail": detail}
    if semantic == "lora":
        experts["semantic"] |= {"rank": 3, "alpha": 6, "copies": "none"}
    if family.startswith("wan22"):
        experts["semantic"] |= {"base": "transformer"}
        detail |= {"from": "teacher", "base": "transformer_2"}
    return experts


def finished(folder, family, semantic="lora", **changes):
    """A run in a new folder, with its base model beside it; returns the run's folder."""
    model = save_pipeline(folder / "model", family)
    recipe = two_expert_recipe(family, model, semantic, **changes)
    recipe["data"] = {"kind": "latents", "path": str(folder / "data")}
    backbone = load_recipe(recipe).backbone.build()
    cond = backbone.encode(["a", "b"])
    latents = torch.randn(2, *backbone.latent_shape(), generator=torch.Generator().manual_seed(0))
    if family.endswith("i2v"):
        cond["image_latents"] = latents.repeat(1, 2, 1, 1, 1)[:, :20]
    samples = [Sample(latents[k], {name: value[k] for name, value in cond.items()}) for k in range(2)]
    write_latents(folder / "data", samples)
    return run(load_recipe(recipe), output=folder / "run", device="cpu").output
