"""Sampled positions of layer inputs: pseudo-random, and the same for the same sample.

Positions depend on the sample, the layer and a seed alone: not on the split of samples into batches, their order, or
the process that sees them. So second moments do not depend on the number of processes.

Letters: h is the finaliser of SplitMix64 (Steele, Lea & Flood, 2014) on 64-bit integers, γ its increment.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tp_cosep.utils.data import tensors_in

__all__ = ["PositionSampler", "SamplePositions"]

#: ``sample(n_samples, n, n_positions)``: n positions in 0 … n_positions − 1 for every sample, drawn with replacement,
#: ``[n_samples, n]`` int64 on the CPU.
SamplePositions = Callable[[int, int, int], Tensor]

_GAMMA, _MIX_1, _MIX_2 = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Largest number of values of a sample that its key is computed from, evenly spaced.
_MOST_VALUES = 4096


class PositionSampler:
    """Samples positions for every layer that reads a batch.

    A sample's key is Σ_j h(γ j) b_j over the bits b_j of its values in the first tensor of the inputs; its positions in
    a layer are h(key + γ (salt + p)) modulo their number, for p = 1, 2, …, with a salt of the layer and the seed.

    Args:
        inputs: A batch of the model's inputs; samples are in the first dimension of the first tensor.
        seed: Seed of all positions.

    Example:
        >>> x = torch.arange(12.0).view(3, 4)
        >>> whole = PositionSampler(x, seed=0).for_layer("conv1")(3, 5, 100)
        >>> torch.equal(PositionSampler(x[1:], seed=0).for_layer("conv1")(2, 5, 100), whole[1:])
        True
    """

    def __init__(self, inputs: Any, seed: int) -> None:
        first = next((x for x in tensors_in(inputs) if x.dim() and len(x)), None)
        self._keys = torch.zeros(1, dtype=torch.int64) if first is None else _keys(first)
        self._seed = seed

    def for_layer(self, name: str) -> SamplePositions:
        """The sampled positions of one layer.

        Args:
            name: Name of the layer.

        Returns:
            A function that samples positions. If a layer sees more samples than the batch has, each sample of the batch
            has the same number of parts, next to each other, with positions of their own.
        """
        digest = hashlib.blake2b(f"{self._seed} {name}".encode(), digest_size=6).digest()
        salt = int.from_bytes(digest, "little")

        def sample(n_samples: int, n: int, n_positions: int) -> Tensor:
            n_parts = -(-n_samples // len(self._keys))
            keys = self._keys.repeat_interleave(n_parts)[:n_samples]
            part = torch.arange(n_samples) % n_parts
            counter = salt + part[:, None] * n + torch.arange(1, n + 1)
            positions: Tensor = (_mixed(keys[:, None] + counter * _GAMMA) & (2**63 - 1)) % n_positions
            return positions

        return sample


def _keys(x: Tensor) -> Tensor:
    """One key for every sample, ``[samples]`` int64 on the CPU."""
    flat = x.detach().reshape(len(x), -1)
    if flat.shape[1] > _MOST_VALUES:
        flat = flat[:, torch.linspace(0, flat.shape[1] - 1, _MOST_VALUES, device=x.device).long()]
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten(1)
    if flat.is_floating_point():
        flat = flat.contiguous().view(_BITS[flat.element_size()])
    weights = _mixed(torch.arange(1, flat.shape[1] + 1, device=x.device) * _GAMMA)
    # Integer sums do not depend on the order of their terms; overflow is intended.
    return _mixed((flat.to(torch.int64) * weights).sum(1)).cpu()


def _mixed(x: Tensor) -> Tensor:
    """h, elementwise."""
    x = (x ^ _shifted(x, 30)) * _MIX_1
    x = (x ^ _shifted(x, 27)) * _MIX_2
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, n: int) -> Tensor:
    """Logical right shift by n bits."""
    shifted: Tensor = (x >> n) & (2 ** (64 - n) - 1)
    return shifted
