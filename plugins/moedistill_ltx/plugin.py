"""What the LTX plugin adds to moedistill."""

from typing import Any

from moedistill import hookimpl


@hookimpl
def register_components(components: Any) -> None:
    """Registers the backbone."""
    components.register("backbone", "ltx", "moedistill_ltx.backbone:LTXConfig", "LTX-Video text-to-video, 2B")
