"""Backward elimination of the inputs of linear consumers.

A consumer computes ``y = Wᵀ x`` with W ``[features, outputs]``. If some features are pruned and W is refitted to the
kept ones, the outputs lose ``tr (W − Ŵ)ᵀ C (W − Ŵ)``, with C the covariance of x. Pruning one more
block b of features costs exactly

    tr( (P_bb)⁻¹ K_bb ),    P = C⁻¹,  K = W Wᵀ  (of the kept features, refitted),

after which ``G = (P_bb)⁻¹ P_b``, ``P ← P − P_·b G`` and ``W ← W − Gᵀ W_b``. Repeatedly pruning the cheapest block is
Optimal Brain Surgeon (Hassibi & Stork, 1993) for whole columns, the reverse of greedy column-subset selection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Consumer", "Elimination", "backward_elimination", "precision_of", "refit_losses"]

# Added to the covariance, as shares of each variance and of the mean variance: it is singular for copies of a channel.
_RIDGE, _FLOOR = 1e-4, 1e-10
# Rows of low-rank updates that are collected before they are applied: one large product is faster than many small ones.
_MOST_PENDING = 64


@dataclass(frozen=True)
class Consumer:
    """A consumer of a group, with f features.

    Attributes:
        covariance: C, ``[f, f]`` float64, of the features.
        costs: K = Σ_o w_o w_oᵀ, ``[f, f]`` float64, with w_o ``[f]`` the weights of output o, scaled by the cost of an
            error in it.
        components: ``[f]`` int64, the component that each feature belongs to; −1 for features that are always kept.
        precision: ``[f, f]`` float64, :func:`precision_of` C, if it is known already.
    """

    covariance: Tensor
    costs: Tensor
    components: Tensor
    precision: Tensor | None = None


def precision_of(covariance: Tensor) -> Tensor:
    """The inverse of a covariance with a small ridge.

        P = (C + diag(1e-4 C_ff + 1e-10 mean_f C_ff))⁻¹

    The ridge keeps the covariance of copies and of constant features invertible; 1 takes the place of the second term
    where no feature varies.

    Args:
        covariance: C, ``[f, f]`` float64.

    Returns:
        P, ``[f, f]`` float64.
    """
    inverse: Tensor = torch.linalg.inv(_ridged(covariance))
    return inverse


def _ridged(covariance: Tensor) -> Tensor:
    variance = covariance.diagonal()
    floor = _FLOOR * variance.mean()
    return covariance + torch.diag(_RIDGE * variance + (floor if floor > 0 else 1))


@dataclass(frozen=True)
class Elimination:
    """An order in which components are pruned.

    Attributes:
        order: ``[n]`` int64, components from the first to be pruned to the last.
        costs: ``[n]`` float64, the cost of pruning each of ``order`` after those before it, at least 0.
    """

    order: Tensor
    costs: Tensor


def backward_elimination(
    consumers: Sequence[Consumer], n_components: int, clusters: Tensor | None = None
) -> Elimination:
    """Prune, one after the other, the component whose loss costs the refitted consumers least.

    The cost of a component is tr((P_bb)⁻¹ K_bb), summed over the consumers; b are its features among those kept.
    A feature that never varies costs nothing.

    Source: Optimal Brain Surgeon (Hassibi & Stork, 1993), for blocks of inputs.

    Args:
        consumers: All consumers of the components.
        n_components: Number of components, n.
        clusters: ``[n]`` int64 labels; the last member of a cluster is pruned only when every cluster has a single
            member left.

    Returns:
        All components in the order of pruning; of equally cheap ones the highest index comes first.

    Example:
        >>> x = torch.randn(500, 3, dtype=torch.float64)
        >>> x = torch.cat([x, x[:, :1] + x[:, 1:2]], 1)  # the last one is the sum of the first two
        >>> consumer = Consumer(x.T.cov(), torch.eye(4, dtype=torch.float64), torch.arange(4))
        >>> elimination = backward_elimination([consumer], 4)
        >>> int(elimination.order[0]) in (0, 1, 3), bool(elimination.costs[0] < 0.01)
        (True, True)
    """
    states = [_State(consumer, n_components) for consumer in consumers]
    device = consumers[0].covariance.device
    is_kept = torch.ones(n_components, dtype=torch.bool, device=device)
    order, costs = [], []
    members = None if clusters is None else torch.bincount(clusters).tolist()
    labels = None if clusters is None else clusters.tolist()
    for _ in range(n_components):
        cost = torch.stack([state.costs() for state in states]).sum(0).masked_fill(~is_kept, torch.inf)
        if members is not None and labels is not None and max(members) > 1:
            last = torch.tensor([members[label] == 1 for label in labels], device=device)
            cost = cost.masked_fill(last, torch.inf)
        # argmin returns any of equal costs; the lowest index is to be kept.
        cheapest = int((cost == cost.min()).nonzero()[-1])
        order.append(cheapest)
        costs.append(float(cost[cheapest]))
        is_kept[cheapest] = False
        if members is not None and labels is not None:
            members[labels[cheapest]] -= 1
        for state in states:
            state.remove(cheapest)
    return Elimination(torch.tensor(order), torch.tensor(costs, dtype=torch.float64))


def refit_losses(consumers: Sequence[Consumer], order: Tensor) -> Tensor:
    """What the refitted consumers lose by each component, if components are pruned in a given order.

    With the features sorted from the last to be pruned to the first, those always kept before all, and L the Cholesky
    factor of C, a feature costs (Lᵀ K L)_ff: what the output varies by that part of the feature which the ones before
    it do not tell. The cost of a component, that of :func:`backward_elimination` for the same order, is the sum over
    its features.

    Args:
        consumers: All consumers of the components.
        order: ``[n]`` int64, all components from the first to be pruned to the last.

    Returns:
        ``[n]`` float64 on the CPU, ≥ 0: the cost of each of ``order`` after those before it.

    Example:
        >>> consumer = Consumer(torch.diag(torch.tensor([1.0, 4.0]).double()), torch.eye(2).double(), torch.arange(2))
        >>> [round(x, 2) for x in refit_losses([consumer], torch.tensor([0, 1])).tolist()]
        [1.0, 4.0]
    """
    n = len(order)
    position = torch.empty(n + 1, dtype=torch.int64)
    position[order.cpu()], position[-1] = torch.arange(n), n  # features that are always kept: component −1
    losses = torch.zeros(n + 1, dtype=torch.float64)
    for consumer in consumers:
        at = position.to(consumer.components.device)[consumer.components]
        by_rank = at.argsort(descending=True, stable=True)
        factor = torch.linalg.cholesky(_ridged(consumer.covariance)[by_rank[:, None], by_rank])
        costs = (factor * (consumer.costs[by_rank[:, None], by_rank] @ factor)).sum(0).clamp(min=0)
        losses.index_add_(0, at[by_rank].cpu(), costs.cpu())
    return losses[:n]


class _State:
    """P and K of one consumer, and their diagonal blocks ``[n, q, q]``.

    Components with fewer than q features, the largest number of all, are filled up with inert ones.
    """

    def __init__(self, consumer: Consumer, n_components: int) -> None:
        precision = precision_of(consumer.covariance) if consumer.precision is None else consumer.precision
        # Features that are always kept matter for the inverse alone.
        prunable = (consumer.components >= 0).nonzero()[:, 0]
        components = consumer.components[prunable]
        width, f = int(torch.bincount(components, minlength=n_components).max()), len(prunable)
        self._n_features = f
        p = torch.eye(f + width, dtype=precision.dtype, device=precision.device)
        p[:f, :f] = precision[prunable[:, None], prunable]
        k = torch.zeros_like(p)
        k[:f, :f] = consumer.costs[prunable[:, None], prunable]
        self._p, self._k = _LowRankUpdated(p), _LowRankUpdated(k)
        own = [(components == i).nonzero()[:, 0] for i in range(n_components)]
        inert = torch.arange(f, f + width, device=p.device)
        self._blocks = torch.stack([torch.cat([b, inert[: width - len(b)]]) for b in own])
        rows, columns = self._blocks[:, :, None], self._blocks[:, None, :]
        self._p_blocks, self._k_blocks = p[rows, columns], k[rows, columns]  # [n, q, q]
        self._pruned = torch.zeros(n_components, dtype=torch.bool, device=p.device)

    def costs(self) -> Tensor:
        """Cost of pruning each component next, ``[n]``; 0 for one that is pruned already."""
        if self._blocks.shape[1] == 1:
            return (self._k_blocks / self._p_blocks)[:, 0, 0].clamp(min=0)
        costs: Tensor = torch.linalg.solve(self._p_blocks, self._k_blocks).diagonal(dim1=1, dim2=2).sum(1)
        return costs.clamp(min=0)

    def remove(self, component: int) -> None:
        """Update P and K for a component that is pruned."""
        block = self._blocks[component]
        block = block[block < self._n_features]
        p_b, k_b = self._p.rows(block), self._k.rows(block)  # [q, f]
        g = torch.linalg.solve(p_b[:, block], p_b)
        h = k_b - k_b[:, block] @ g  # K_b − K_bb G; K is symmetric
        self._p.subtract(p_b, g)
        # K of W − Gᵀ W_b: K − Gᵀ K_b − (K_·b − Gᵀ K_bb) G
        self._k.subtract(torch.cat([g, h]), torch.cat([k_b, g]))
        p_b, k_b, g, h = (x[:, self._blocks].transpose(0, 1) for x in (p_b, k_b, g, h))  # [n, inputs, q]
        self._p_blocks -= p_b.transpose(1, 2) @ g
        self._k_blocks -= g.transpose(1, 2) @ k_b + h.transpose(1, 2) @ g
        self._pruned[component] = True
        self._p_blocks[self._pruned] = torch.eye(self._blocks.shape[1], dtype=g.dtype, device=g.device)
        self._k_blocks[self._pruned] = 0


class _LowRankUpdated:
    """A matrix from which low-rank products are subtracted, several at once."""

    def __init__(self, x: Tensor) -> None:
        self._x = x
        self._left: list[Tensor] = []
        self._right: list[Tensor] = []
        self._n_pending = 0

    def rows(self, idxs: Tensor) -> Tensor:
        """Rows of the updated matrix, ``[n, f]``."""
        rows = self._x[idxs]
        if self._left:
            rows = rows - torch.cat(self._left)[:, idxs].T @ torch.cat(self._right)
        return rows

    def subtract(self, left: Tensor, right: Tensor) -> None:
        """Subtract leftᵀ @ right, ``[r, f]`` each."""
        self._left.append(left)
        self._right.append(right)
        self._n_pending += len(left)
        if self._n_pending >= _MOST_PENDING:
            self._x = self._x - torch.cat(self._left).T @ torch.cat(self._right)
            self._left, self._right, self._n_pending = [], [], 0
