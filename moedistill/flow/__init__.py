"""The ODE, in torch alone: noise process, trajectory, routers, sampler. Formulas stand in `process`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
