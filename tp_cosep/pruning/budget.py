"""From a target for the whole model to the number of components that every group keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Any

from torch import Tensor, nn

from tp_cosep.errors import InputError
from tp_cosep.graph.groups import GroupView
from tp_cosep.pruning.costs import Costs, measure_costs

__all__ = ["Budget", "Preview", "TradeOff", "allocate", "counts_for_latency", "trade_offs"]

# A latency that was met by less than this share is close enough, and so many pruned copies are tried at most.
_CLOSE, _N_TRIES = 0.02, 8


@dataclass
class Budget:
    """What the groups of a model can lose.

    Attributes:
        views: The groups.
        losses: For every group ``[n]``, the loss of removing the first, second … component, ascending: the share of a
            consumer's variance, summed over the group's consumers.
        least: The number of components that every group keeps for any target.
        steps: The number of components that every group loses at once.
        fixed: Components that groups lose for any target, by position; these groups lose no others.
    """

    views: list[GroupView] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    least: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    fixed: dict[int, int] = field(default_factory=dict)

    def costs(self, model: nn.Module, run: Callable[[], Any], unit: str) -> tuple[Costs, float]:
        """What the model costs without its fixed components, and what it costs as it is."""
        costs = measure_costs(model, run, self.views, unit)
        whole = costs.total
        for i, n in self.fixed.items():
            costs.remove(i, n)
        return costs, whole

    def kept(self, costs: Costs, target: float) -> list[int]:
        """How many components every group keeps for a target; ``costs`` are changed."""
        return allocate(self.losses, costs, target, least=self.least, steps=self.steps)

    def lost(self, kept: list[int]) -> float:
        """The sum of the losses of removed components, as a share of all."""
        removed = sum(float(x[: len(x) - k].sum()) for x, k in zip(self.losses, kept, strict=True))
        return removed / max(sum(float(x.sum()) for x in self.losses), 1e-30)


@dataclass(frozen=True)
class TradeOff:
    """A size that a model can be pruned to.

    Attributes:
        macs: Multiply-accumulates for one sample, see :func:`tp_cosep.pruning.costs.measure_costs`.
        params: Parameters.
        retained_variance: Share of the variance of consumers' inputs that is kept: 1 for the whole model. It does not
            tell the accuracy of a fine-tuned model, but where the next channels begin to cost more.
        n_kept: Channels (or other components) that every group keeps, by its root layer.
    """

    macs: float
    params: float
    retained_variance: float
    n_kept: Mapping[str, int]


@dataclass(frozen=True)
class Preview:
    """The sizes that a model can be pruned to, from the whole model down.

    Attributes:
        points: At least the whole model.
    """

    points: tuple[TradeOff, ...]

    def __str__(self) -> str:
        whole = self.points[0]
        lines = ["     MACs    of all      params    of all  retained"]
        lines += [
            f"{p.macs:9.4g}  {p.macs / whole.macs:8.3f}  {p.params:10,.0f}  {p.params / whole.params:8.3f}  "
            f"{p.retained_variance:8.4f}"
            for p in self.points
        ]
        return "\n".join(lines)


def trade_offs(budget: Budget, model: nn.Module, run: Callable[[], Any], unit: str, n_points: int) -> Preview:
    """Sizes between the whole model and the smallest that is allowed.

    Args:
        budget: What the groups can lose.
        model: The model.
        run: Runs it on example inputs.
        unit: What is saved for the loss that it takes, see :func:`tp_cosep.pruning.costs.measure_costs`.
        n_points: Number of sizes, evenly spaced in the unit; the same size is listed once.

    Returns:
        The sizes.
    """
    units = {name: budget.costs(model, run, name)[0] for name in dict.fromkeys(("macs", "params", unit))}
    fresh = units[unit]
    smallest = deepcopy(fresh)
    for i, (x, least) in enumerate(zip(budget.losses, budget.least, strict=True)):
        smallest.remove(i, len(x) - least)
    points: list[TradeOff] = []
    for i in range(n_points):
        target = fresh.total - (fresh.total - smallest.total) * i / max(n_points - 1, 1)
        try:
            kept = budget.kept(deepcopy(fresh), target)
        except InputError:  # steps of round_to do not reach the very end
            break
        left = {name: deepcopy(units[name]) for name in ("macs", "params")}
        for costs in left.values():
            for g, (x, n) in enumerate(zip(budget.losses, kept, strict=True)):
                costs.remove(g, len(x) - n)
        n_kept = {
            view.name: n - budget.fixed.get(g, 0) for g, (view, n) in enumerate(zip(budget.views, kept, strict=True))
        }
        point = TradeOff(left["macs"].total, left["params"].total, 1 - budget.lost(kept), n_kept)
        if not points or points[-1].n_kept != n_kept:
            points.append(point)
    return Preview(tuple(points))


def counts_for_latency(
    budget: Budget, costs: Costs, share_of: Callable[[list[int]], float], target: float
) -> list[int]:
    """How many components every group keeps so that the model takes a share of its time.

    What layers take one by one says where time is saved, but neither what hardware makes of another width nor what is
    lost between layers; so pruned copies are timed, at sizes between which the target lies.

    Args:
        budget: What the groups can lose.
        costs: Seconds of the layers.
        share_of: Prunes a copy to some counts and tells its time, as a share of the model's.
        target: The share to reach.

    Returns:
        The counts of the largest copy that was timed and met the target.

    Raises:
        InputError: If the smallest model that is allowed takes longer.
    """
    smallest = deepcopy(costs)
    for i, (x, n) in enumerate(zip(budget.losses, budget.least, strict=True)):
        smallest.remove(i, (len(x) - n) // budget.steps[i] * budget.steps[i])
    least = smallest.total * (1 + 1e-9)
    low, high = least, costs.total
    at = max(target * costs.total, low)
    best: list[int] | None = None
    found: dict[tuple[int, ...], float] = {}
    for _ in range(_N_TRIES):
        kept = budget.kept(deepcopy(costs), at)
        share = found[tuple(kept)] if tuple(kept) in found else share_of(kept)
        found[tuple(kept)] = share
        if share <= target:
            best, low = kept, at
            if share >= target * (1 - _CLOSE):
                break
        elif at <= least:
            raise InputError(
                f"target: expected a latency that can be reached, got {target:.3f} of the model's; with every group at "
                f"its least {share:.3f} are left. Set a target above that, raise max_pruning_ratio, lower round_to, "
                "or ignore fewer layers."
            )
        else:
            high = at
        # After two that are too slow the smallest that there is, to see whether it can be done.
        at = least if best is None and len(found) > 2 else (low + high) / 2
    assert best is not None  # the third try at the latest meets the target or raises
    return best


def allocate(
    losses: Sequence[Tensor], costs: Costs, target: float, *, least: Sequence[int], steps: Sequence[int]
) -> list[int]:
    """Remove components where that loses least for what it saves, until a target is met.

    Again and again the next components of that group are removed that have the lowest ratio of loss to saving. Savings
    shrink while other groups lose components, since a layer's cost is a product of its inputs and outputs, so a
    ratio only grows, and the lowest one that is up to date is the lowest of all. Where losses grow with every
    component, as they do here, this is the steepest descent that keeps the sum of losses low. The last step is the one
    that loses least.

    Args:
        losses: For every group ``[n]``, the loss of removing the first, second … component, ascending.
        costs: What the model costs; components are taken away from it.
        target: The cost to reach.
        least: The number of components that every group keeps for any target.
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
