"""What the Wan plugin adds to moedistill."""

from typing import Any

from moedistill import hookimpl


@hookimpl
def register_components(components: Any) -> None:
    """Registers the backbone."""
    components.register("backbone", "wan", "moedistill_wan.backbone:WanConfig", "Wan 2.1 and 2.2, 1.3B to A14B")
