"""The kit: numerical checks of a backbone, for `moedistill check-backbone` and for pytest."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
