"""Patches (im2col): the inputs of a convolution or linear layer as rows of features, and its weights as matrices.

Contract: features are ``[channel, kernel position]`` in row-major order, over the channels of one channel group; a
*weight matrix* is ``[groups, features, outputs, positions]``. Per position, every kernel position of every channel is
a feature, and ``positions`` is 1. Otherwise a feature is a channel, and the kernel positions are positions at which
the same features are multiplied by different weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules.conv import _ConvNd

from tp_cosep.utils.sampling import SamplePositions

__all__ = ["Patches", "has_computed_weight", "n_outputs", "patches_of", "weight_shape"]


@dataclass(frozen=True)
class Patches:
    """The im2col description of a layer's input.

    Attributes:
        layer: A convolution or linear layer.
        per_position: Whether every kernel position of a channel is a feature of its own.
        repeat: Number of consecutive inputs of a linear layer per channel (a flattened map); 1 otherwise.
    """

    layer: nn.Module
    per_position: bool = False
    repeat: int = 1

    @property
    def groups(self) -> int:
        """Number of channel groups of a grouped convolution; 1 otherwise."""
        return int(getattr(self.layer, "groups", 1))

    @property
    def is_transposed(self) -> bool:
        """Whether the layer is a transposed convolution."""
        return bool(getattr(self.layer, "transposed", False))

    @property
    def n_channels(self) -> int:
        """Number of input channels, over all channel groups."""
        layer = self.layer
        n: int = layer.in_channels if isinstance(layer, _ConvNd) else layer.in_features // self.repeat  # type: ignore
        return n

    @property
    def features_per_channel(self) -> int:
        """Number of features per channel."""
        return prod(self.layer.kernel_size) if self.per_position else 1  # type: ignore[arg-type]

    @property
    def n_features(self) -> int:
        """Number of features, over all channel groups."""
        return self.n_channels * self.features_per_channel

    @property
    def n_features_per_position(self) -> int:
        """Number of features if kernel positions, and positions of flattened maps, are features of their own."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return layer.in_features
        return self.n_channels * (1 if self.is_transposed else prod(layer.kernel_size))  # type: ignore[arg-type]

    def n_products(self, shape: torch.Size) -> int:
        """Number of products that the layer computes per sample of an input of the given shape."""
        if isinstance(self.layer, nn.Linear):
            n_positions = prod(shape[1:-1])
        elif self.is_transposed:
            n_positions = prod(shape[2:])
        else:
            n_positions = prod(_map_sizes(self.layer, shape)[2])
        return n_positions * self.layer.weight.numel()  # type: ignore[operator]

    @property
    def takes_constant(self) -> bool:
        """Whether a constant input gives a constant output: not if kernels overlap unevenly, as transposed ones do."""
        return not self.is_transposed

    def features_of(self, channels: Sequence[int] | Tensor) -> Tensor:
        """Features of the given channels, in their order."""
        q = self.features_per_channel
        channels = torch.as_tensor(channels, dtype=torch.int64)
        return (channels[:, None] * q + torch.arange(q)).flatten()

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """The layer's weight as ``[groups, features, outputs per group, positions]`` float64, a copy."""
        w = weight.detach().to(torch.float64)
        if isinstance(self.layer, nn.Linear):
            w = _split(w, 1, self.repeat)
        w = w.flatten(2)
        w = w.reshape(self.groups, -1, *w.shape[1:])  # [groups, outputs, channels, kernel positions], or transposed
        w = w if self.is_transposed else w.transpose(1, 2)
        if not self.per_position:
            return w.clone()
        return w.transpose(2, 3).flatten(1, 2).unsqueeze(3).clone()

    def weight_from_matrix(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The inverse of :meth:`weight_matrix`, with the shape and dtype of ``like``."""
        if self.per_position:
            matrix = _split(matrix[..., 0], 1, self.features_per_channel).transpose(2, 3)
        w = matrix if self.is_transposed else matrix.transpose(1, 2)
        return w.flatten(0, 1).reshape(like.shape).to(like.dtype)

    def sampler(self, shape: torch.Size, n: int, sample: SamplePositions) -> _Sampler:
        """Sample the positions of an input.

        Args:
            shape: Shape of the layer's input.
            n: Rows per sample; if there are no more than that, all of them.
            sample: Samples the positions, see :class:`tp_cosep.utils.sampling.PositionSampler`.

        Returns:
            A function from the input to its rows, ``[rows, features of all channel groups]`` float64.
        """
        if isinstance(self.layer, nn.Linear):
            return _sample_rows(shape, self.repeat, n, sample)
        return _sample_maps(self, shape, n, sample)


@dataclass(frozen=True)
class _Sampler:
    """Gathers sampled positions of an input: ``x[sample, :, position]``, or zero outside of the map.

    Attributes:
        positions: ``[samples, rows per sample, kernel positions]``.
        repeat: Number of consecutive inputs of a linear layer per channel; 0 for a convolution.
        inside: ``[samples, rows per sample, kernel positions]``, whether a position is in the map; ``None`` if all are.
        padding: Arguments of ``pad``, if padding is with other values than zeros.
    """

    positions: Tensor
    repeat: int
    inside: Tensor | None = None
    padding: tuple[list[int], str] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Rows ``[rows, channels × kernel positions]`` float64 of an input."""
        n_samples, n, n_kernel_positions = self.positions.shape
        if self.padding is not None:
            x = pad(x, *self.padding)
        if self.repeat:
            x = x.reshape(n_samples, -1, x.shape[-1] // self.repeat, self.repeat)
            x = x.transpose(2, 3).flatten(1, 2)
        else:
            x = x.flatten(2).transpose(1, 2)
        n_places, n_channels = x.shape[1:]
        places = self.positions.to(x.device).flatten(1)
        if x.is_contiguous():
            # Channels last: a position is contiguous in memory.
            places = places + torch.arange(n_samples, device=x.device)[:, None] * n_places
            taken = x.flatten(0, 1).index_select(0, places.flatten())
        else:
            taken = x.transpose(1, 2).gather(2, places[:, None].expand(-1, n_channels, -1)).transpose(1, 2)
        taken = taken.reshape(n_samples, n, n_kernel_positions, n_channels)
        if self.inside is not None:
            taken = taken * self.inside.to(x.device)[..., None]
        rows = torch.empty(n_samples * n, n_channels, n_kernel_positions, dtype=torch.float64, device=x.device)
        return rows.copy_(taken.flatten(0, 1).transpose(1, 2)).flatten(1)


def _split(x: Tensor, dim: int, size: int) -> Tensor:
    """Split a dimension into two, the second of the given size."""
    return x.reshape(*x.shape[:dim], -1, size, *x.shape[dim + 1 :])


def _sample_rows(shape: torch.Size, repeat: int, n: int, sample: SamplePositions) -> _Sampler:
    """Sample rows of a linear layer's input, ``[samples, ..., features]``."""
    n_samples = shape[0] if len(shape) > 1 else 1
    n_rows = prod(shape[:-1]) // max(n_samples, 1)
    return _Sampler(_positions(n_samples, n_rows * repeat, n, sample)[..., None], repeat)


def _sample_maps(patches: Patches, shape: torch.Size, n: int, sample: SamplePositions) -> _Sampler:
    """Sample patches of a convolution's input, ``[samples, channels, ...]``, padding included."""
    conv = patches.layer
    assert isinstance(conv, _ConvNd)
    if patches.is_transposed:
        return _Sampler(_positions(shape[0], prod(shape[2:]), n, sample)[..., None], 0)
    sizes, before, n_out = _map_sizes(conv, shape)
    padding = None if conv.padding_mode == "zeros" else (conv._reversed_padding_repeated_twice, conv.padding_mode)
    kernel, stride, dilation = conv.kernel_size, conv.stride, conv.dilation
    kernel_positions = torch.tensor(list(product(*map(range, kernel))))  # [kernel positions, dims]
    if patches.per_position:
        out_at = _positions(shape[0], prod(n_out), n, sample)[..., None]
        kernel_at = torch.arange(len(kernel_positions))[None, None]
    else:
        pairs = _positions(shape[0], prod(n_out) * len(kernel_positions), n, sample)[..., None]
        out_at, kernel_at = pairs // len(kernel_positions), pairs % len(kernel_positions)
    position = torch.zeros_like(out_at + kernel_at)
    inside = torch.ones_like(position, dtype=torch.bool)
    for i, at in enumerate(torch.unravel_index(out_at, tuple(n_out))):
        place = at * stride[i] + kernel_positions[kernel_at, i] * dilation[i] - before[i]
        inside &= (place >= 0) & (place < sizes[i])
        position = position * sizes[i] + place.clamp(0, sizes[i] - 1)
    return _Sampler(position, 0, None if bool(inside.all()) else inside, padding)


def _map_sizes(layer: nn.Module, shape: torch.Size) -> tuple[list[int], list[int], list[int]]:
    """Sizes of a convolution's input map, zeros padded before it, and sizes of its output map.

    Padding with other values than zeros is part of the input map.

    Returns:
        Three lists, each with one number per dimension.
    """
    assert isinstance(layer, _ConvNd)
    sizes, around = list(shape[2:]), layer._reversed_padding_repeated_twice  # the last dimension first, both sides
    n = len(sizes)
    before, after = ([around[2 * (n - 1 - i) + side] for i in range(n)] for side in (0, 1))
    if layer.padding_mode != "zeros":
        sizes = [size + a + b for size, a, b in zip(sizes, before, after, strict=True)]
        before, after = [0] * n, [0] * n
    n_out = [
        (size + a + b - d * (k - 1) - 1) // s + 1
        for size, a, b, d, k, s in zip(
            sizes, before, after, layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
    ]
    return sizes, before, n_out


def _positions(n_samples: int, n_of: int, n: int, sample: SamplePositions) -> Tensor:
    """Sample n of ``n_of`` positions of every sample, ``[samples, n]``; all of them if there are no more than n."""
    return torch.arange(n_of).repeat(n_samples, 1) if n_of <= n else sample(n_samples, n, n_of)


def patches_of(layer: nn.Module, *, per_position: bool = False, repeat: int = 1) -> Patches | None:
    """The patches of a layer whose weights can be refitted.

    Args:
        layer: Any layer.
        per_position: Whether every kernel position of a channel is a feature of its own; not for transposed
            convolutions.
        repeat: Number of consecutive inputs of a linear layer per channel (a flattened map).

    Returns:
        The patches; ``None`` for layers of other types, for depthwise convolutions, which mix no channels, and for
        weights that are computed from other parameters (parametrizations, weight norm, masks).
    """
    if not isinstance(layer, (nn.Linear, _ConvNd)) or has_computed_weight(layer):
        return None
    if isinstance(layer, nn.Linear):
        return Patches(layer, repeat=repeat)
    if layer.groups > 1 and layer.groups == layer.in_channels:
        return None
    patches = Patches(layer)
    is_per_position = per_position and not patches.is_transposed and prod(layer.kernel_size) > 1
    return replace(patches, per_position=is_per_position)


def has_computed_weight(layer: nn.Module) -> bool:
    """Whether the weight of a convolution or linear layer is computed from other parameters."""
    return isinstance(layer, (nn.Linear, _ConvNd)) and layer._parameters.get("weight") is None


def weight_shape(layer: nn.Module) -> torch.Size | None:
    """Shape of a layer's weights, to see whether it is the one that was measured."""
    weight = getattr(layer, "weight", None)
    return weight.shape if isinstance(weight, Tensor) else None


def n_outputs(layer: nn.Module) -> int:
    """Number of output channels of a convolution or linear layer."""
    n: int = layer.out_channels if isinstance(layer, _ConvNd) else layer.out_features  # type: ignore[assignment]
    return n
