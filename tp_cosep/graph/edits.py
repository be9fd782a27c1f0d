"""Which entries of which parameters pruning kept, observed while it happens.

Pruning replaces a parameter by a new object that holds a selection of the old one's entries. What is selected is
observed in the tensor operations themselves, not derived from the group, so it is exact for layers of any type: coupled
and concatenated channels, channel groups, flattened maps, fused attention, heads, and pruners of the user's own.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["EditHistory", "ParameterEdit", "Selections", "recorded_edits", "selected"]

#: Positions that are kept along a dimension, one dimension after the other.
Selections = tuple[tuple[int, Tensor], ...]
_Key = tuple[Any, ...]


@dataclass(frozen=True)
class ParameterEdit:
    """A parameter that pruning replaced.

    Attributes:
        name: Its name in the model.
        old: The replaced parameter, which is not kept alive.
        selections: What the new one holds of it; ``None`` if that is not a selection of entries.
    """

    name: str
    old: weakref.ref[nn.Parameter]
    selections: Selections | None


@dataclass(frozen=True)
class EditHistory:
    """The replaced parameters of a model, in order. It holds on to neither; a copy or pickle of it is empty.

    Attributes:
        model: The model; ``None`` if nothing was pruned.
        edits: The edits.
    """

    model: weakref.ref[nn.Module] | None = None
    edits: tuple[ParameterEdit, ...] = ()

    def __reduce__(self) -> tuple[type[EditHistory], tuple[()]]:
        return EditHistory, ()

    def extended(self, model: nn.Module, edits: Sequence[ParameterEdit]) -> EditHistory:
        """The history with the edits of one more group."""
        return EditHistory(weakref.ref(model), (*self.edits, *edits))

    def edits_since(self, parameter: nn.Parameter) -> dict[str, list[ParameterEdit]]:
        """The edits that turned a parameter into what the model has in its place.

        Args:
            parameter: Any parameter that the model had before or between its edits.

        Returns:
            The edits by name, more than one name for tied parameters; empty if the parameter was not replaced.
        """
        found: dict[str, list[ParameterEdit]] = {}
        for edit in self.edits:
            if edit.name in found or edit.old() is parameter:
                found.setdefault(edit.name, []).append(edit)
        return found


def selected(x: Tensor, selections: Selections) -> Tensor:
    """The entries of a tensor that a parameter of its shape kept."""
    for dim, idxs in selections:
        x = x.index_select(dim, idxs.to(x.device))
    return x


@contextmanager
def recorded_edits(model: nn.Module) -> Iterator[list[ParameterEdit]]:
    """Record the parameters that a block replaces.

    Args:
        model: The model.

    Yields:
        A list, which is filled when the block ends without an error.
    """
    # Parameters are kept until the end, so that no other tensor takes their memory.
    before = dict(model.named_parameters(remove_duplicate=False))
    keys = {name: _key(p) for name, p in before.items()}
    edits: list[ParameterEdit] = []
    with _Observer(keys.values()) as observer:
        yield edits
    after = dict(model.named_parameters(remove_duplicate=False))
    for name, p in before.items():
        q = after.get(name)
        if q is p and _key(p) == keys[name]:
            continue
        selections = None if q is None or q is p else observer.selections(keys[name], q)
        edits.append(ParameterEdit(name, weakref.ref(p), selections))


class _Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows selections from tensor to tensor.

    Args:
        sources: The tensors to begin with.
    """

    def __init__(self, sources: Iterable[_Key]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = set(sources)
        self._found: dict[_Key, tuple[_Key, Selections]] = {}
        self._alive: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        found = _selections_of(func, args)
        if found is not None and (source := _key(args[0])) in self._known:
            self._found[_key(out)] = source, found
            self._known.add(_key(out))
            self._alive.append(out)
        return out

    def selections(self, source: _Key, x: Tensor) -> Selections | None:
        """What a tensor holds of another one; ``None`` if it was made otherwise."""
        found: Selections = ()
        key = _key(x)
        while key != source:
            if key not in self._found:
                return None
            key, last = self._found[key]
            found = (*last, *found)
        return found


def _selections_of(func: Any, args: Sequence[Any]) -> Selections | None:
    """What an operation selects of its first argument; ``None`` if it does anything else."""
    aten = torch.ops.aten
    if func is aten.clone.default:
        return ()
    if func is aten.index_select.default:
        x, dim, idxs = args
        return ((dim % x.dim(), idxs.cpu()),)
    if func is aten.index.Tensor:
        given = [(dim, idxs) for dim, idxs in enumerate(args[1]) if idxs is not None]
        if len(given) == 1 and given[0][1].dim() == 1:
            dim, idxs = given[0]
            kept = idxs.nonzero().flatten() if idxs.dtype == torch.bool else idxs % args[0].shape[dim]
            return ((dim, kept.cpu()),)
    return None


def _key(x: Tensor) -> _Key:
    """A tensor by its memory: the same for a parameter, its ``data`` and its detached views of the same shape."""
    return x.device, x.data_ptr(), tuple(x.shape), x.stride()
