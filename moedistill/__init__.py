"""moedistill: distil a video diffusion model into a few-step mixture of experts, one per range of noise levels.

Every public name is here, imported on first use: `from moedistill import Trajectory, TimestepRouter, sample` brings
torch and nothing else of weight. The list, with its homes, is `__init__.pyi`.
"""

import lazy_loader

__version__ = "0.1.0.dev0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
