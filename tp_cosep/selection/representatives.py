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

__all__ = ["REPRESENTATIVES", "Preference", "preference_of", "weights_of"]

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
    sums = _summed_scores(representative, group, view, "the importance that chooses the representatives")
    return None if sums is None else sums / torch.bincount(view.component_of)


def weights_of(weights: Callable[[Any], Tensor | None], group: Any, view: GroupView) -> Tensor | None:
    """How much every component counts, by an importance.

    Args:
        weights: The importance; of ``[channels]`` numbers ≥ 0.
        group: The group.
        view: What there is to know of it.

    Returns:
        ``[components]`` float64, summed over the channels of each; ``None`` if the importance has no opinion.

    Raises:
        InputError: If the importance fails, or gives scores of another shape, negative ones, or only zeros.
    """
    sums = _summed_scores(weights, group, view, "the importance that gives the weights")
    if sums is not None and not (torch.isfinite(sums).all() and (sums >= 0).all() and sums.any()):
        raise InputError(
            f"layer {view.name!r}: expected finite weights ≥ 0, at least one positive, from {described(weights)}, got "
            f"{[round(x, 4) for x in sums.tolist()[:10]]}."
        )
    return sums


def _summed_scores(importance: Callable[[Any], Tensor | None], group: Any, view: GroupView, role: str) -> Tensor | None:
    """An importance's scores, summed over the channels of each component."""
    try:
        scores = importance(group)
    except CoSePError:
        raise
    except Exception as error:
        raise InputError(
            f"layer {view.name!r}: {role}, {described(importance)}, could not score its group "
            f"({type(error).__name__}: {error}); one that needs gradients, such as Taylor's, requires loss.backward() "
            "on some batches first."
        ) from error
    if scores is None:
        return None
    if not isinstance(scores, Tensor) or scores.shape != (view.n_channels,):
        came = tuple(scores.shape) if isinstance(scores, Tensor) else described(scores)
        raise InputError(
            f"layer {view.name!r}: expected one number per channel, a tensor of shape ({view.n_channels},), from "
            f"{role}, got {came}."
        )
    scores = scores.detach().to("cpu", torch.float64)
    return torch.zeros(view.n_components, dtype=torch.float64).index_add_(0, view.component_of, scores)


def _last_to_go(consumers: Sequence[Consumer], n: int) -> Callable[[Tensor], Tensor]:
    """Prefer the members that are eliminated last, while every cluster keeps one."""

    def preference(labels: Tensor) -> Tensor:
        order = backward_elimination(consumers, n, labels.to(consumers[0].covariance.device)).order
        return torch.empty(n, dtype=torch.float64).scatter_(0, order, torch.arange(n).double())

    return preference
