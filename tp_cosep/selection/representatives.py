"""Which member of a cluster stands for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tp_cosep.errors import CoSePError, InputError
from tp_cosep.functional.elimination import Consumer, backward_elimination
from tp_cosep.graph.groups import GroupView, l1_norms
from tp_cosep.utils.data import described

__all__ = ["REPRESENTATIVES", "Preference", "preference_of"]

#: The ways to choose a cluster's representative, beside an importance.
REPRESENTATIVES = ("medoid", "max_norm", "reconstruction")

#: ``[components]``, the most preferred member being kept; or that as a function of the clusters' labels; or ``None``
#: for the medoid.
Preference: TypeAlias = Tensor | Callable[[Tensor], Tensor] | None


def preference_of(
    representative: str | Callable[[Any], Tensor | None], group: Any, view: GroupView, consumers: Sequence[Consumer]
) -> Preference:
    """What decides which member of a cluster is kept.

    Args:
        representative: ``"medoid"``, ``"max_norm"``, ``"reconstruction"`` or an importance, see
            :class:`tp_cosep.CoSePSelector`.
        group: The group, for an importance.
        view: What there is to know of it.
        consumers: The group's consumers, for ``"reconstruction"``; without any the medoid is kept.

    Returns:
        The preference.

    Raises:
        CoSePError: Whatever else of that type an importance raises.
        InputError: If an importance fails or gives scores of another shape.
    """
    if representative == "medoid":
        return None
    if representative == "max_norm":
        return l1_norms(view)
    if representative == "reconstruction":
        return _last_to_go(consumers, view.n_components) if consumers else None
    assert callable(representative)
    try:
        scores = representative(group)
    except CoSePError:
        raise
    except Exception as error:
        raise InputError(
            f"layer {view.name!r}: the importance that chooses the representatives, {described(representative)}, could "
            f"not score its group ({type(error).__name__}: {error}); one that needs gradients, such as Taylor's, wants "
            "loss.backward() on some batches first."
        ) from error
    if scores is None:
        return None
    if not isinstance(scores, Tensor) or scores.shape != (view.n_channels,):
        came = tuple(scores.shape) if isinstance(scores, Tensor) else described(scores)
        raise InputError(
            f"layer {view.name!r}: expected one preference per component, a tensor of shape ({view.n_channels},), from "
            f"the importance that chooses the representatives, got {came}."
        )
    scores = scores.detach().to("cpu", torch.float64)
    sums = torch.zeros(view.n_components, dtype=torch.float64).index_add_(0, view.component_of, scores)
    return sums / torch.bincount(view.component_of)


def _last_to_go(consumers: Sequence[Consumer], n: int) -> Callable[[Tensor], Tensor]:
    """Prefer the members that are eliminated last, while every cluster keeps one."""

    def preference(labels: Tensor) -> Tensor:
        order = backward_elimination(consumers, n, labels.to(consumers[0].covariance.device)).order
        return torch.empty(n, dtype=torch.float64).scatter_(0, order, torch.arange(n).double())

    return preference
