"""Attention heads: finding them, and updating the attributes that state their number and size after pruning.

Torch-Pruning removes the channels of attention layers. The number and size of the heads are plain attributes of the
module around them, under names that differ between libraries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from tp_cosep.graph.protocols import DependencyGraph, DependencyGroup

__all__ = [
    "attention_groups",
    "attention_heads",
    "attention_layers_of",
    "head_parameters",
    "heads_of",
    "rerooted",
    "update_owners",
]

# The names under which timm, Transformers and other libraries keep these numbers.
_N_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "nheads")
_N_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
_N_REPEATS = ("num_key_value_groups", "num_kv_groups", "n_rep", "kv_groups")
_HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "dim_head", "dim_per_head", "d_head")
_WIDTH = ("attn_dim", "all_head_size", "inner_dim", "embed_dim")
_FUSED = ("qkv", "to_qkv", "qkv_proj", "query_key_value", "Wqkv", "in_proj")
_QUERY = ("q", "query", "q_proj", "to_q", "q_lin", "wq", "q_linear")
_KEY_VALUE = ("k", "v", "key", "value", "k_proj", "v_proj", "to_k", "to_v", "k_lin", "v_lin", "wk", "wv")
_FUSED_KEY_VALUE = ("kv", "to_kv", "kv_proj")


def attention_heads(model: nn.Module) -> dict[nn.Module, int]:
    """Find the query, key and value layers of a model and their numbers of heads, for ``num_heads=``.

    They are recognised by the names that timm, Transformers and similar code use: a child called ``qkv``, or
    ``query``, ``key`` and ``value``, ``q_proj`` … of a module with a number of heads or a head size. Check the result
    for models with other names.

    Args:
        model: Any module.

    Returns:
        Number of heads by layer; empty if none is found. Torch's ``MultiheadAttention`` is not included, since
        Torch-Pruning reads its number of heads itself.

    Example:
        >>> class Attention(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.num_heads, self.qkv = 4, nn.Linear(12, 36)
        >>> attention = Attention()
        >>> attention_heads(attention) == {attention.qkv: 4}
        True
    """
    found: dict[nn.Module, int] = {}
    for owner in model.modules():
        if isinstance(owner, nn.MultiheadAttention):
            continue
        n_heads, head_dim = _number(owner, _N_HEADS), _number(owner, _HEAD_DIM)
        for name, layer in owner.named_children():
            width = getattr(layer, "out_features", getattr(layer, "out_channels", None))
            parts = 3 if name in _FUSED else 2 if name in _FUSED_KEY_VALUE else 1
            if width is None or (parts == 1 and name not in _QUERY + _KEY_VALUE):
                continue
            is_kv = name in _KEY_VALUE + _FUSED_KEY_VALUE
            n = (_number(owner, _N_KV_HEADS) if is_kv else None) or n_heads
            if head_dim is not None and (n is None or (is_kv and n * head_dim * parts != width)):
                n = width // (parts * head_dim)
            if n is not None and n > 0 and width % (parts * n) == 0:
                found[layer] = n
    return found


def _number(owner: nn.Module, names: Iterable[str]) -> int | None:
    values = (getattr(owner, name, None) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)


def attention_layers_of(group: DependencyGroup, num_heads: Mapping[nn.Module, int]) -> list[nn.Module]:
    """The attention layers that lose output channels with a group."""
    graph = group._DG
    return [
        d.target.module for d, _ in group if d.target.module in num_heads and graph.is_out_channel_pruning_fn(d.handler)
    ]


def heads_of(group: DependencyGroup, num_heads: Mapping[nn.Module, int]) -> tuple[int, int]:
    """Numbers of query heads and of key-value heads of a group; 0, 0 if it has none."""
    numbers = [num_heads[layer] for layer in attention_layers_of(group, num_heads)]
    return (max(numbers), min(numbers)) if numbers else (0, 0)


def head_parameters(model: nn.Module, num_heads: Mapping[nn.Module, int]) -> dict[str, int]:
    """Find parameters with one entry per head, such as tables of relative positions or temperatures.

    Torch-Pruning mistakes their heads for channels; they have to be kept out of its groups and pruned with the heads.

    Args:
        model: The model.
        num_heads: Number of heads by attention layer.

    Returns:
        Dimension of the heads by parameter name.
    """
    names = {m: name for name, m in model.named_modules()}
    numbers: dict[str, int] = {}
    for layer, n in num_heads.items():
        path = names[layer].rpartition(".")[0]
        numbers[path] = max(n, numbers.get(path, 0))
    found = {}
    for path, n in numbers.items():
        for inner, module in model.get_submodule(path).named_modules():
            if type(module).__module__.startswith("torch.nn."):
                continue  # Torch-Pruning handles the parameters of layers
            for name, p in module.named_parameters(recurse=False):
                sizes = [i for i, size in enumerate(p.shape) if size > 1]
                if n > 1 and sizes and p.shape[sizes[-1]] == n:
                    found[".".join(part for part in (path, inner, name) if part)] = sizes[-1]
    return found


def update_owners(
    model: nn.Module, before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]]
) -> None:
    """Write new numbers of heads and head sizes into the modules that own attention layers.

    An attribute is changed only if its name is known and its value is that of the layer before pruning.

    Args:
        model: The model.
        before: Number of heads and head size by attention layer before pruning.
        after: Number of heads and head size by attention layer after pruning.
    """
    owners: dict[str, list[str]] = {}
    for name in before:
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    for path, names in owners.items():
        owner = model.get_submodule(path)
        query = max(names, key=lambda name: before[name][0])
        shared = min(names, key=lambda name: before[name][0])
        numbers = [_numbers(values[query], values[shared]) for values in (before, after)]
        for attributes, was, now in zip((_N_HEADS, _HEAD_DIM, _WIDTH, _N_KV_HEADS, _N_REPEATS), *numbers, strict=True):
            for attribute in attributes:
                if vars(owner).get(attribute) == was and was != now:
                    setattr(owner, attribute, now)


def _numbers(query: tuple[int, int], shared: tuple[int, int]) -> tuple[int, int, int, int, int]:
    n_heads, head_dim = query
    return n_heads, head_dim, n_heads * head_dim, shared[0], n_heads // max(shared[0], 1)


def rerooted(
    group: DependencyGroup, num_heads: Mapping[nn.Module, int], root_module_types: Iterable[type]
) -> DependencyGroup | None:
    """An attention group with its consumer as root, as in Torch-Pruning's own pruner.

    A channel of the consumer is one dimension of one head, for which a fused layer has three channels.

    Args:
        group: Any group.
        num_heads: Number of heads by attention layer.
        root_module_types: Types of layers that may be a root.

    Returns:
        The group of the consumer's inputs; ``None`` if there is no consumer. A group without attention layers is
        returned unchanged.
    """
    if not attention_layers_of(group, num_heads):
        return group
    graph, types = group._DG, tuple(root_module_types)
    found: DependencyGroup | None = None
    for dep, idxs in group:
        if isinstance(dep.target.module, types) and graph.is_in_channel_pruning_fn(dep.handler):
            found = graph.get_pruning_group(dep.target.module, dep.handler, idxs)
    return found


def attention_groups(
    graph: DependencyGraph, num_heads: Mapping[nn.Module, int], root_module_types: Iterable[type]
) -> list[DependencyGroup]:
    """All attention groups of a graph, rerooted, in the order of ``num_heads``."""
    found, seen = [], set[nn.Module]()
    for layer in num_heads:
        if layer in seen or layer not in graph.module2node:
            continue
        prune = graph.get_pruner_of_module(layer).prune_out_channels
        group = graph.get_pruning_group(layer, prune, list(range(graph.get_out_channels(layer))))
        seen.update(attention_layers_of(group, num_heads))
        from_consumer = rerooted(group, num_heads, root_module_types)
        if from_consumer is not None:
            found.append(from_consumer)
    return found
