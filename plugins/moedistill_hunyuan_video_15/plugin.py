"""What the HunyuanVideo 1.5 plugin adds to moedistill."""

from typing import Any

from moedistill import hookimpl


@hookimpl
def register_components(components: Any) -> None:
    """Registers the backbone."""
    components.register(
        "backbone",
        "hunyuan_video_15",
        "moedistill_hunyuan_video_15.backbone:HunyuanVideo15Config",
        "HunyuanVideo 1.5 text-to-video, 8.3B",
    )
