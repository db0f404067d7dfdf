"""What is minimised: the contracts of losses, the core's own, the probe, and optimisers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
