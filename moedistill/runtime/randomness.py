"""Randomness that is addressed, not consumed.

Every draw is a pure function of (seed, stage, step, sample, name). So resuming is exact, the number of workers does not
matter, and one process and N processes draw the same numbers for the same global batch.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def generator(*address: object) -> np.random.Generator:
    """A counter-based generator (Philox) keyed by a hash of `address`."""
    digest = hashlib.blake2b("/".join(map(str, address)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def torch_seed(*address: object) -> int:
    """A seed for torch's own generators, derived from `address`."""
    return int(generator(*address).integers(2**63 - 1))


class Draws:
    """The random numbers of one step, one row per sample.

    Args:
        seed, stage, step: the address that the samples share.
        samples: positions of this process's samples in the global batch.
        device: where the tensors go; the numbers do not depend on it.
    """

    def __init__(
        self, seed: int, stage: str, step: int, samples: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        self._address = (seed, stage, step)
        self._samples = samples
        self._device = device

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Standard normal noise, float32 `[B, *shape]`."""
        rows = [
            generator(*self._address, sample, name).standard_normal(tuple(shape), dtype=np.float32)
            for sample in self._samples
        ]
        return torch.from_numpy(np.stack(rows)).to(self._device)

    def uniform(self, name: str) -> Tensor:
        """Uniform numbers in [0, 1), float64 `[B]`, on the CPU."""
        return torch.tensor(
            [generator(*self._address, sample, name).random() for sample in self._samples], dtype=torch.float64
        )

    def integers(self, name: str, low: int | Tensor, high: int | Tensor) -> Tensor:
        """Uniform integers in [low, high), int64 `[B]`, on the CPU; the limits may differ by sample."""
        return (low + torch.floor(self.uniform(name) * (high - low))).long()
