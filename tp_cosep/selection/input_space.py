"""How components compare in what their readers see: covariances of the readers' inputs, and distances from them.

Three covariances are known: that of the inputs over positions and samples (*reconstruction*: what can be computed from
what); that of class means alone (*class means*: what tells classes apart, all that a linear reader of averages needs);
and the first plus α times the second (*joint*), which lets no class contrast be lost for the sake of mere variance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tp_cosep.calibration.input_observer import InputStatistics
from tp_cosep.errors import InputError
from tp_cosep.functional.elimination import Consumer, precision_of
from tp_cosep.graph.groups import GroupView, Member

__all__ = ["CLASS_WEIGHT", "INPUT_SPACES", "consumers_of", "correlation_distances", "measured_consumers"]

#: The spaces that are made of what readers see.
INPUT_SPACES = ("correlation", "class-means", "reconstruction", "joint")
#: α, by how much the covariance of class means counts on top in the joint space.
CLASS_WEIGHT = 3.0


def measured_consumers(view: GroupView, moments: Mapping[str, InputStatistics], space: str) -> list[Member]:
    """The readers of a group that were measured for a space and whose channels are the group's."""
    needs_classes = space == "class-means"
    return [
        m
        for m in view.consumers
        if m.name in moments and len(m.rows) and not (needs_classes and moments[m.name].classes.is_empty)
    ]


def consumers_of(view: GroupView, moments: Mapping[str, InputStatistics], space: str) -> list[Consumer]:
    """What the readers of a group see in a space.

    An error of an output costs by the variance of that output, ``w_o / sqrt(w_oᵀ C w_o)``, so that layers and channels
    of all scales count alike.

    Args:
        view: The group.
        moments: By layer name.
        space: One of :data:`INPUT_SPACES`.

    Returns:
        One entry per reader and channel group; none if no reader was measured.

    Raises:
        InputError: If the moments do not fit the layers.
    """
    found = []
    for member, covariance, measured, components in _parts(view, moments, space):
        maps = measured.patches.weight_matrix(member.layer.weight)  # type: ignore[arg-type]
        n = maps.shape[1]
        precisions = _precisions(measured, covariance, space, n)
        for i, w in enumerate(maps):
            block = slice(i * n, (i + 1) * n)
            total = measured.covariance[block, block]
            variance = torch.einsum("fop,fg,gop->o", w, total, w)
            # An output that never moves has nothing to lose.
            w = (w * torch.where(variance > 0, variance.rsqrt(), 0)[:, None]).flatten(1)
            found.append(Consumer(covariance[block, block], w @ w.T, components[block], precisions[i]))
    return found


def _precisions(measured: InputStatistics, covariance: Tensor, space: str, n: int) -> list[Tensor]:
    """Of every channel group of a reader; inverted once, however many groups of channels it reads."""
    found = measured.precisions.get(space)
    if found is None or found[0] != measured.second.n_rows:
        blocks = [covariance[i : i + n, i : i + n] for i in range(0, len(covariance), n)]
        found = measured.precisions[space] = measured.second.n_rows, [precision_of(c) for c in blocks]
    return found[1]


def correlation_distances(view: GroupView, moments: Mapping[str, InputStatistics], space: str) -> Tensor | None:
    """``1 − |ρ|`` between components, ρ the correlation in a space, averaged over readers.

    Where a component has several inputs of a reader, |ρ| is the mean over pairs in turn.

    Returns:
        ``[components, components]`` float64; ``None`` if no reader was measured.

    Raises:
        InputError: If the moments do not fit the layers.
    """
    total: Tensor | None = None
    n_parts = 0
    for _, covariance, _, components in _parts(view, moments, space):
        scale = covariance.diagonal().clamp(min=torch.finfo(covariance.dtype).tiny).rsqrt()
        rho = (covariance * scale[:, None] * scale).abs().clamp(max=1)
        for inputs, of in _in_turns(components):
            if total is None:
                total = rho.new_zeros(view.n_components, view.n_components)
            total[of[:, None], of] += 1 - rho[inputs[:, None], inputs]
            n_parts += 1
    if total is None:
        return None
    return total.fill_diagonal_(0) / n_parts


def _parts(
    view: GroupView, moments: Mapping[str, InputStatistics], space: str
) -> Iterator[tuple[Member, Tensor, InputStatistics, Tensor]]:
    """Readers, their covariance, moments, and the component of every feature (−1 where it is not of the group)."""
    for member in measured_consumers(view, moments, space):
        measured = moments[member.name]
        weight = member.layer.weight
        if weight.shape != measured.shape:
            raise InputError(
                f"layer {member.name!r}: measured with weights of shape {tuple(measured.shape)}, they are "
                f"{tuple(weight.shape)} now; call fit() again after pruning "  # type: ignore[arg-type]
                "(iterative_steps: pass loader= to CoSePPruner)."
            )
        covariance = {
            "class-means": lambda m=measured: m.between_classes,
            "joint": lambda m=measured: m.covariance + CLASS_WEIGHT * m.between_classes,
        }.get(space, lambda m=measured: m.covariance)()
        components = torch.full((len(covariance),), -1, dtype=torch.int64)
        components[member.rows // measured.patches.repeat] = member.components
        yield member, covariance, measured, components.to(covariance.device)


def _in_turns(components: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Features with their components, every component at most once at a time."""
    left = (components >= 0).nonzero()[:, 0]
    while len(left):
        of = components[left]
        is_first = torch.tensor([i == 0 or bool((of[:i] != c).all()) for i, c in enumerate(of)], device=of.device)
        yield left[is_first], of[is_first]
        left = left[~is_first]
