"""How many components every group keeps, when the model as a whole may cost so much."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

from torch import Tensor

from tp_cosep.errors import InputError
from tp_cosep.pruning.costs import Costs

__all__ = ["allocate"]


def allocate(
    losses: Sequence[Tensor], costs: Costs, target: float, *, least: Sequence[int], steps: Sequence[int]
) -> list[int]:
    """Take components away from wherever it loses least for what it saves, until a target is met.

    Again and again the group goes next whose next components have the lowest ratio of loss to saving. Savings shrink
    while other groups lose components, since a layer's cost is a product of its inputs and outputs, so a ratio only
    grows, and the lowest one that is up to date is the lowest of all. Where losses grow with every component, as they
    do here, this is the steepest descent that keeps the sum of losses low. The last step is the one that loses least.

    Args:
        losses: For every group ``[n]``, what the first, second … component to go loses, ascending.
        costs: What the model costs; components are taken away from it.
        target: The cost to reach.
        least: The number of components that every group keeps whatever the target.
        steps: The number of components that every group loses at once.

    Returns:
        The number of components that every group keeps.

    Raises:
        InputError: If the target is out of reach.
    """
    whole = costs.total
    kept = [len(x) for x in losses]

    def step(g: int) -> int:
        # The first step of a group of odd size makes it a multiple.
        return kept[g] % steps[g] or steps[g]

    def loss(g: int) -> float:
        first = len(losses[g]) - kept[g]
        return float(losses[g][first : first + step(g)].sum())

    def ratio(g: int) -> float:
        saving = costs.saving(g, step(g))
        return loss(g) / saving if saving > 0 else float("inf")

    def may_go_on(g: int) -> bool:
        return kept[g] - step(g) >= max(least[g], 1)

    heap = [(ratio(g), g) for g in range(len(kept)) if may_go_on(g)]
    heapify(heap)
    while costs.total > target and heap:
        known, g = heappop(heap)
        now = ratio(g)
        if heap and now > known and now > heap[0][0]:
            heappush(heap, (now, g))
            continue
        if costs.total - costs.saving(g, step(g)) <= target:
            # A single step is left: of those that are enough the one that loses least.
            enough = [h for _, h in heap if costs.total - costs.saving(h, step(h)) <= target]
            g = min([g, *enough], key=loss)
        n = step(g)
        costs.remove(g, n)
        kept[g] -= n
        if may_go_on(g):
            heappush(heap, (ratio(g), g))
    if costs.total > target:
        raise InputError(
            f"target: expected one that can be reached, got {target:.4g} of {whole:.4g}; with every group at its least "
            f"{costs.total:.4g} are left. Set a target above that, raise max_pruning_ratio, lower round_to, or ignore "
            "fewer layers."
        )
    _give_back(kept, losses, costs, target, steps)
    return kept


def _give_back(kept: list[int], losses: Sequence[Tensor], costs: Costs, target: float, steps: Sequence[int]) -> None:
    """Let groups have components back, those first that are missed most, as far as the target allows."""
    while True:
        fitting = []
        for g, n_kept in enumerate(kept):
            n = min(steps[g], len(losses[g]) - n_kept)
            if n > 0 and costs.total - costs.saving(g, -n) <= target:
                first = len(losses[g]) - n_kept - n
                fitting.append((float(losses[g][first : first + n].sum()), g, n))
        if not fitting:
            return
        _, g, n = max(fitting)
        costs.remove(g, -n)
        kept[g] += n
