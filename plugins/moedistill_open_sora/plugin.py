"""What the Open-Sora plugin adds to moedistill."""

from typing import Any

from moedistill import hookimpl


@hookimpl
def register_components(components: Any) -> None:
    """Registers the backbone."""
    components.register(
        "backbone", "open_sora", "moedistill_open_sora.backbone:OpenSoraConfig", "Open-Sora 2.0 text-to-video, 11B"
    )
