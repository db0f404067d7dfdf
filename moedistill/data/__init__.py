"""What is learned from: the contract of datasets, stored latents, prompts, and batches of them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
