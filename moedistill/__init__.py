"""moedistill: distil a video diffusion model into a few-step mixture of experts, one per range of noise levels.

Names are imported on first use, so that `import moedistill.routers` brings torch and nothing else of weight.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moedistill.analysis import analyze
    from moedistill.integrations.diffusers import apply
    from moedistill.plugins import hookimpl
    from moedistill.recipe import load_recipe
    from moedistill.train import run

__version__ = "0.1.0.dev0"
__all__ = ["__version__", "analyze", "apply", "hookimpl", "load_recipe", "run"]

_HOMES = {
    "analyze": "moedistill.analysis",
    "apply": "moedistill.integrations.diffusers",
    "hookimpl": "moedistill.plugins",
    "load_recipe": "moedistill.recipe",
    "run": "moedistill.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
