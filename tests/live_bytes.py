"""Counts the bytes of tensors that are alive, on any device: by storage, from one operation to the next."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Of what is made while it is entered. `now()` gives them; `peak` is their largest number so far."""

    def __init__(self):
        super().__init__()
        self.known, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        made = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            held = isinstance(leaf, torch.Tensor) and leaf.device.type != "meta" and not hasattr(leaf, "full_tensor")
            if held and (place := id_of(leaf)) not in given:
                storage = leaf.untyped_storage()
                self.known[place] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now())
        return made

    def now(self):
        self.known = {place: pair for place, pair in self.known.items() if not pair[0].expired()}
        return sum(size for _, size in self.known.values())


def id_of(tensor):
    return tensor.untyped_storage()._cdata
