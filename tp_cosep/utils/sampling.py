"""Positions at which what layers read is looked at, drawn by chance and yet the same for the same sample.

They depend on the sample, the layer and a seed alone: neither on how samples are put into batches, nor on their order,
nor on the process that sees them. So several processes find the moments that one would.

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

#: ``draw(samples, n, n_of)``: n places out of 0 … n_of − 1 for every sample, ``[samples, n]`` int64 on the CPU.
SamplePositions = Callable[[int, int, int], Tensor]

_GAMMA, _MIX_1, _MIX_2 = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Values of a sample that its key is made of, evenly spaced.
_MOST_VALUES = 4096


class PositionSampler:
    """Draws for the samples of a batch.

    A sample's key is Σ_j h(γ j) b_j over the bits b_j of its values, which are those of the first tensor of the
    inputs; a layer's places are h(key + γ (salt + p)) modulo their number, for p = 1, 2, …

    Args:
        inputs: Of the model; samples in the first dimension of the first tensor.
        seed: Of all draws.
    """

    def __init__(self, inputs: Any, seed: int) -> None:
        first = next((x for x in tensors_in(inputs) if x.dim() and len(x)), None)
        self._keys = torch.zeros(1, dtype=torch.int64) if first is None else _keys(first)
        self._seed = seed

    def of(self, name: str) -> SamplePositions:
        """The draw for a layer, by its name."""
        digest = hashlib.blake2b(f"{self._seed} {name}".encode(), digest_size=6).digest()
        salt = int.from_bytes(digest, "little")

        def sample(n_samples: int, n: int, n_of: int) -> Tensor:
            # A layer that sees parts of samples sees as many of each, next to each other, with draws of their own.
            n_parts = -(-n_samples // len(self._keys))
            keys = self._keys.repeat_interleave(n_parts)[:n_samples]
            part = torch.arange(n_samples) % n_parts
            counter = salt + part[:, None] * n + torch.arange(1, n + 1)
            places: Tensor = (_mixed(keys[:, None] + counter * _GAMMA) & (2**63 - 1)) % n_of
            return places

        return sample


def _keys(x: Tensor) -> Tensor:
    """One number for every sample, ``[samples]`` int64."""
    flat = x.detach().reshape(len(x), -1)
    if flat.shape[1] > _MOST_VALUES:
        flat = flat[:, torch.linspace(0, flat.shape[1] - 1, _MOST_VALUES, device=x.device).long()]
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten(1)
    if flat.is_floating_point():
        flat = flat.contiguous().view(_BITS[flat.element_size()])
    weights = _mixed(torch.arange(1, flat.shape[1] + 1, device=x.device) * _GAMMA)
    # Sums of integers do not depend on their order; they overflow, as is meant.
    return _mixed((flat.to(torch.int64) * weights).sum(1)).cpu()


def _mixed(x: Tensor) -> Tensor:
    """h: bits that look like chance."""
    x = (x ^ _shifted(x, 30)) * _MIX_1
    x = (x ^ _shifted(x, 27)) * _MIX_2
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, n: int) -> Tensor:
    """The bits moved down by n, zeros above."""
    shifted: Tensor = (x >> n) & (2 ** (64 - n) - 1)
    return shifted
