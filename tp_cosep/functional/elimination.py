"""Which inputs linear readers can best do without: backward elimination of columns.

Readers compute ``y = W x``. If some of x are left out and W is refitted to the rest, the outputs lose
``Σ_o (w_o − ŵ_o)ᵀ C (w_o − ŵ_o)``, C being the covariance of x. Losing one block b more costs, exactly,

    tr( (P_bb)⁻¹ K_bb ),    P = C⁻¹,  K = W Wᵀ  (of what is left, refitted),

after which ``G = (P_bb)⁻¹ P_b``, ``P ← P − P_·b G`` and ``W ← W − Gᵀ W_b``. Taking away what costs least, again and
again, is Optimal Brain Surgeon (Hassibi & Stork 1993) for whole columns, and the mirror image of greedy column-subset
selection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Consumer", "Elimination", "backward_elimination", "precision_of"]

# Added to the covariance, as shares of each variance and of the mean variance: copies of a channel stay invertible.
_RIDGE, _FLOOR = 1e-4, 1e-10
# Rows of low rank that wait until they are subtracted together: one large product is faster than many small ones.
_MOST_PENDING = 64


@dataclass(frozen=True)
class Consumer:
    """What one reader of a group sees.

    Attributes:
        covariance: ``[f, f]`` of its inputs, C.
        costs: ``[f, f]``, K = Σ_o w_o w_oᵀ over its outputs, each scaled by what an error there costs.
        components: ``[f]`` int64, the component that each input goes with; −1 for inputs that stay.
        precision: ``[f, f]``, what :func:`precision_of` makes of C, if it is known already.
    """

    covariance: Tensor
    costs: Tensor
    components: Tensor
    precision: Tensor | None = None


def precision_of(covariance: Tensor) -> Tensor:
    """The inverse of a covariance to which as much is added that copies and constant inputs can be told apart.

    Returns:
        Like the covariance.
    """
    variance = covariance.diagonal()
    # An input that never moves costs nothing, and stays invertible by the floor.
    floor = _FLOOR * variance.mean()
    inverse: Tensor = torch.linalg.inv(covariance + torch.diag(_RIDGE * variance + (floor if floor > 0 else 1)))
    return inverse


@dataclass(frozen=True)
class Elimination:
    """An order in which components go.

    Attributes:
        order: ``[n]`` int64, components from the first to go to the last.
        costs: ``[n]`` float64, what losing each of them then cost.
    """

    order: Tensor
    costs: Tensor


def backward_elimination(
    consumers: Sequence[Consumer], n_components: int, clusters: Tensor | None = None
) -> Elimination:
    """Take away, again and again, the component that the readers can best do without once refitted.

    Args:
        consumers: What reads the components; costs add up.
        n_components: Number of components, n.
        clusters: ``[n]`` int64; the last member of a cluster goes only when every cluster has a single one left.

    Returns:
        All components in the order in which they go; of equally cheap ones the highest index goes first.

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
    alive = torch.ones(n_components, dtype=torch.bool, device=device)
    order, costs = [], []
    members = None if clusters is None else torch.bincount(clusters).tolist()
    labels = None if clusters is None else clusters.tolist()
    for _ in range(n_components):
        cost = torch.stack([state.costs() for state in states]).sum(0).masked_fill(~alive, torch.inf)
        if members is not None and labels is not None and max(members) > 1:
            last = torch.tensor([members[label] == 1 for label in labels], device=device)
            cost = cost.masked_fill(last, torch.inf)
        # argmin takes any of equal ones; the lowest index is to stay.
        goes = int((cost == cost.min()).nonzero()[-1])
        order.append(goes)
        costs.append(float(cost[goes]))
        alive[goes] = False
        if members is not None and labels is not None:
            members[labels[goes]] -= 1
        for state in states:
            state.remove(goes)
    return Elimination(torch.tensor(order), torch.tensor(costs, dtype=torch.float64))


class _State:
    """P and K of one reader, as matrices and products of low rank that are subtracted from them now and then.

    Where components differ in their number of inputs, inert inputs fill them up.
    """

    def __init__(self, consumer: Consumer, n_components: int) -> None:
        precision = precision_of(consumer.covariance) if consumer.precision is None else consumer.precision
        # What stays has done its part in the inverse.
        ours = (consumer.components >= 0).nonzero()[:, 0]
        components = consumer.components[ours]
        width, f = int(torch.bincount(components, minlength=n_components).max()), len(ours)
        self._n_features = f
        p = torch.eye(f + width, dtype=precision.dtype, device=precision.device)
        p[:f, :f] = precision[ours[:, None], ours]
        k = torch.zeros_like(p)
        k[:f, :f] = consumer.costs[ours[:, None], ours]
        self._p, self._k = _Lazy(p), _Lazy(k)
        own = [(components == i).nonzero()[:, 0] for i in range(n_components)]
        inert = torch.arange(f, f + width, device=p.device)
        self._blocks = torch.stack([torch.cat([b, inert[: width - len(b)]]) for b in own])
        rows, columns = self._blocks[:, :, None], self._blocks[:, None, :]
        self._p_blocks, self._k_blocks = p[rows, columns], k[rows, columns]  # [n, q, q]
        self._gone = torch.zeros(n_components, dtype=torch.bool, device=p.device)

    def costs(self) -> Tensor:
        """What losing each component costs now, ``[n]``; 0 for one that is gone."""
        if self._blocks.shape[1] == 1:
            return (self._k_blocks / self._p_blocks)[:, 0, 0].clamp(min=0)
        costs: Tensor = torch.linalg.solve(self._p_blocks, self._k_blocks).diagonal(dim1=1, dim2=2).sum(1)
        return costs.clamp(min=0)

    def remove(self, component: int) -> None:
        block = self._blocks[component]
        block = block[block < self._n_features]
        p_b, k_b = self._p.rows(block), self._k.rows(block)  # [q, f]
        g = torch.linalg.solve(p_b[:, block], p_b)
        h = k_b - k_b[:, block] @ g  # the rows of K once the block's own share is off: K is symmetric
        self._p.subtract(p_b, g)
        # K of W − Gᵀ W_b: K − Gᵀ K_b − (K_·b − Gᵀ K_bb) G
        self._k.subtract(torch.cat([g, h]), torch.cat([k_b, g]))
        p_b, k_b, g, h = (x[:, self._blocks].transpose(0, 1) for x in (p_b, k_b, g, h))  # [n, inputs, q]
        self._p_blocks -= p_b.transpose(1, 2) @ g
        self._k_blocks -= g.transpose(1, 2) @ k_b + h.transpose(1, 2) @ g
        self._gone[component] = True
        self._p_blocks[self._gone] = torch.eye(self._blocks.shape[1], dtype=g.dtype, device=g.device)
        self._k_blocks[self._gone] = 0


class _Lazy:
    """A matrix from which products of low rank are subtracted, many of them at a time."""

    def __init__(self, x: Tensor) -> None:
        self._x = x
        self._left: list[Tensor] = []
        self._right: list[Tensor] = []
        self._n_pending = 0

    def rows(self, idxs: Tensor) -> Tensor:
        """Rows as they are now, ``[n, f]``."""
        rows = self._x[idxs]
        if self._left:
            rows = rows - torch.cat(self._left)[:, idxs].T @ torch.cat(self._right)
        return rows

    def subtract(self, left: Tensor, right: Tensor) -> None:
        """Take off leftᵀ @ right, ``[r, f]`` each."""
        self._left.append(left)
        self._right.append(right)
        self._n_pending += len(left)
        if self._n_pending >= _MOST_PENDING:
            self._x = self._x - torch.cat(self._left).T @ torch.cat(self._right)
            self._left, self._right, self._n_pending = [], [], 0
