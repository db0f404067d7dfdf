"""Table of contents of the core: its components, registered through the hook that every plugin uses."""

import pluggy

from moedistill.components.registry import Components

hookimpl = pluggy.HookimplMarker("moedistill")


@hookimpl
def register_components(components: Components) -> None:
    add = components.register

    add(
        "trajectory",
        "flow_matching",
        "moedistill.flow.trajectory:FlowMatching",
        "N steps of a shifted flow-matching grid",
    )
    add("trajectory", "native", "moedistill.flow.trajectory:Native", "N steps of the backbone's own sigma table")
    add("trajectory", "points", "moedistill.flow.trajectory:Points", "the sigmas given in the recipe")

    add("router", "timestep", "moedistill.flow.routers:TimestepRouterConfig", "one expert per range of noise levels")

    add("expert", "full", "moedistill.model.experts:FullConfig", "a copy of all weights of its own")
    add(
        "expert",
        "lora",
        "moedistill.model.experts:LoRAConfig",
        "an adapter on chosen linears, copies of chosen modules",
    )
    add("expert", "frozen", "moedistill.model.experts:FrozenConfig", "its parent as it is")

    add("dataset", "latents", "moedistill.data.latents:LatentsConfig", "latents and text embeddings computed before")
    add("dataset", "videos", "moedistill.data.videos:VideosConfig", "clips with captions, encoded on first use")
    add("dataset", "prompts", "moedistill.data.prompts:PromptsConfig", "prompts without videos, to sample from")

    add("loss", "huber", "moedistill.losses.base:HuberConfig", "pseudo-Huber distance to the target")
    add("loss", "mse", "moedistill.losses.base:MSEConfig", "mean squared distance to the target")

    add("stage", "finetune", "moedistill.stages.finetune:FinetuneConfig", "flow matching on data")
    add("stage", "consistency", "moedistill.stages.consistency:ConsistencyConfig", "consistency distillation")
    add("stage", "evaluate", "moedistill.stages.evaluate:EvaluateConfig", "metrics, pictures and a table")
    add("stage", "sample", "moedistill.stages.sample:SampleStageConfig", "videos of prompts")
    add("stage", "export", "moedistill.stages.export:ExportConfig", "files that others can load")

    add(
        "exporter",
        "diffusers",
        "moedistill.exporters.diffusers_format:DiffusersConfig",
        "a pipeline's folder, or LoRA files",
    )
    add(
        "exporter",
        "comfyui",
        "moedistill.exporters.comfyui:ComfyUIConfig",
        "weights and LoRA files under native names, and a workflow",
    )
    add(
        "exporter",
        "lightx2v",
        "moedistill.exporters.lightx2v:LightX2VConfig",
        "weights and LoRA files under native names, and a configuration",
    )

    add(
        "metric",
        "paired_distance",
        "moedistill.metrics.relative:PairedDistanceConfig",
        "distance to the reference's samples",
    )
    add(
        "metric",
        "median_distance",
        "moedistill.metrics.relative:MedianDistanceConfig",
        "median distance to the reference's samples",
    )
    add(
        "metric",
        "flips",
        "moedistill.metrics.relative:FlipsConfig",
        "share of samples far from the reference's",
    )
    add(
        "metric",
        "diversity",
        "moedistill.metrics.relative:DiversityConfig",
        "distance of samples of equal condition, relative to the reference",
    )
    add(
        "metric",
        "relative_sharpness",
        "moedistill.metrics.relative:RelativeSharpnessConfig",
        "edges relative to the reference",
    )
    add(
        "metric",
        "relative_flicker",
        "moedistill.metrics.relative:RelativeFlickerConfig",
        "unrest relative to the reference",
    )
    add("metric", "fvd", "moedistill.metrics.fvd:FVDConfig", "Fréchet video distance, with a network you bring")
    add("metric", "vbench", "moedistill.metrics.vbench:VBenchConfig", "VBench's dimensions, by a VBench you install")
