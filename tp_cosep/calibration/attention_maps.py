"""Attention maps of a model's heads, averaged over data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tp_cosep.errors import InputError
from tp_cosep.utils.data import CalibrationData, evaluating, run_model

__all__ = ["collect_attention"]

_SOFTMAX = (torch.softmax, torch.Tensor.softmax, F.softmax)


def collect_attention(
    model: nn.Module,
    data: CalibrationData,
    num_heads: Mapping[nn.Module, int],
    *,
    size: int = 8,
) -> dict[str, Tensor]:
    """Average the attention maps of every head over data.

    What the model itself computes is used, with its masks, biases and positions: the argument of its softmax, or
    of ``scaled_dot_product_attention``. A map belongs to the attention layers that ran last before it.

    Args:
        model: Any module; runs in eval mode on its own device.
        data: Batches of inputs, with or without labels.
        num_heads: Number of heads by attention layer.
        size: Maps are average-pooled to ``size`` × ``size``.

    Returns:
        Maps ``[heads, size, size]`` in float64, by layer name, their rows summing to one.

    Raises:
        InputError: If there are no batches, or no attention map was seen after an attention layer.
    """
    names = {m: name for name, m in model.named_modules()}
    adapter = data.adapter(model)
    mode = _Watching(size)

    def hook(layer: nn.Module, _args: Any, _output: Any) -> None:
        mode.expect(names[layer], num_heads[layer])

    handles = [layer.register_forward_hook(hook) for layer in num_heads]
    try:
        with evaluating(model):
            for _, inputs, _ in data.batches(adapter, "attention maps"):
                with mode:
                    run_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    silent = sorted({names[layer] for layer in num_heads} - set(mode.sums))
    if silent:
        raise InputError(
            f"fit: expected an attention map after every layer of num_heads, saw none after {', '.join(silent)}: no "
            "softmax or scaled_dot_product_attention over as many heads followed, or the loader gave no batches."
        )
    return {name: total / total.sum(-1, keepdim=True) for name, total in mode.sums.items()}


class _Watching(TorchFunctionMode):
    """Picks up attention maps ``[batch, heads, queries, keys]`` while a model runs."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.sums: dict[str, Tensor] = {}
        self._size = size
        self._expected: dict[str, int] = {}

    def expect(self, name: str, n_heads: int) -> None:
        self._expected[name] = n_heads

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._expected:
            if func is F.scaled_dot_product_attention:
                self._take(_attention(*args, **kwargs))
            elif func in _SOFTMAX and isinstance(result, Tensor):
                self._take(result)
        return result

    def _take(self, attention: Tensor) -> None:
        if attention.dim() != 4 or attention.shape[1] != max(self._expected.values()):
            return
        pooled = F.adaptive_avg_pool2d(attention.double(), self._size).sum(0)
        for name in self._expected:
            self.sums[name] = self.sums[name] + pooled if name in self.sums else pooled
        self._expected.clear()


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The weights inside ``scaled_dot_product_attention``, see there."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    logits = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        allowed = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        logits = logits.masked_fill(~allowed, -torch.inf)
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    return logits.softmax(-1).nan_to_num()
