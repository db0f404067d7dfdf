"""What the HunyuanVideo plugin adds to moedistill."""

from typing import Any

from moedistill import hookimpl


@hookimpl
def register_components(components: Any) -> None:
    """Registers the backbone."""
    components.register(
        "backbone",
        "hunyuan_video",
        "moedistill_hunyuan_video.backbone:HunyuanVideoConfig",
        "HunyuanVideo text-to-video, 13B",
    )
