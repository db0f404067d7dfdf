"""What the CogVideoX plugin adds to moedistill."""

from typing import Any

from moedistill import hookimpl


@hookimpl
def register_components(components: Any) -> None:
    """Registers the backbone."""
    components.register(
        "backbone", "cogvideox", "moedistill_cogvideox.backbone:CogVideoXConfig", "CogVideoX 2B, 5B, 1.5"
    )
