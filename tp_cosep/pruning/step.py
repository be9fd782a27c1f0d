"""One pruning step: visits groups, prunes them, checks the model after each, and can be taken back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import nn

from tp_cosep.calibration.class_observer import measured_layers
from tp_cosep.compensation.compensator import Compensator
from tp_cosep.compensation.recovery import Recovery
from tp_cosep.errors import InputError, PruningError
from tp_cosep.graph.editing import build_group, prune_group
from tp_cosep.graph.edits import ParameterEdit
from tp_cosep.graph.groups import side_of
from tp_cosep.graph.protocols import DependencyGraph, DependencyGroup
from tp_cosep.graph.tracing import check_autograd
from tp_cosep.graph.verification import OutputCheck
from tp_cosep.pruning.costs import costs_beside, layer_costs
from tp_cosep.pruning.plan import PruningPlan
from tp_cosep.pruning.planner import Key, Planner, PlannerMemory
from tp_cosep.pruning.settings import PruneSettings
from tp_cosep.pruning.targets import allocate_counts, check_target
from tp_cosep.selection.result import GroupPlan
from tp_cosep.selection.scored import ScoreSelector
from tp_cosep.selection.selector import Selector
from tp_cosep.utils.snapshot import restored_on_error

__all__ = ["GroupVisit", "PrunerState", "PruningStep", "StepHost", "key_of", "n_channels_of"]

# What a pruner writes to while it prunes.
_STATE = ("current_step", "plan", "in_channel_groups", "out_channel_groups", "num_heads", "_scope_initial_channels")


def key_of(group: DependencyGroup) -> Key:
    """The root of a group, and which of its channels the group removes."""
    return group[0].dep.target.module, side_of(group)


def n_channels_of(graph: DependencyGraph, key: Key) -> int:
    """Channels of a group's root as it is now."""
    root, side = key
    return graph.get_out_channels(root) if side == "out" else graph.get_in_channels(root)


class StepHost(Protocol):
    """What a step asks of its pruner.

    Attributes:
        model: The model.
        DG: The dependency graph.
        plan: Grows with every group.
        num_heads: Number of heads by attention layer.
        out_channel_groups: Channel groups by layer.
        current_step: Number of steps begun.
        settings: The pruner's settings.
        memory: What the planner remembers.
        recovery: Compensation, BatchNorm re-estimation and fine-tuning.
        output_check: Runs the model and compares its outputs.
        selector: The selector, or an importance in its place.
        loader: Calibration data, or ``None``.
    """

    model: nn.Module
    DG: DependencyGraph
    plan: PruningPlan
    num_heads: dict[nn.Module, int]
    out_channel_groups: dict[nn.Module, int]
    current_step: int
    settings: PruneSettings
    memory: PlannerMemory
    recovery: Recovery
    output_check: OutputCheck
    selector: Selector | ScoreSelector
    loader: Iterable[Any] | None

    @property
    def compensator(self) -> Compensator | None:
        """The compensator; ``None`` without one."""
        ...

    def run(self, model: nn.Module | None = None) -> Any:
        """Run the model on the example inputs."""
        ...

    def fit(self) -> None:
        """Collect the selector's statistics of the model as it is."""
        ...

    def planner(self) -> Planner:
        """What plans the groups of the model as it is."""
        ...

    def ranked_groups(self) -> Iterator[Any]:
        """The groups of the stock pruner, which ranks channels of several layers."""
        ...

    def retrace(self) -> DependencyGraph:
        """Trace the model as it is."""
        ...


@dataclass
class GroupVisit:
    """The visit to one group, whose own ``prune`` is replaced by :meth:`prune`.

    Attributes:
        group: The group.
        plan: What is planned for it.
        host: The pruner.
        record: ``record(visit, plan, edits)`` is called when the group was pruned, with the plan of what was removed
            and the parameters that were replaced.
        is_current: Whether the next group was not asked for yet.
        is_pruned: Whether the group was pruned.
        not_pruned: The plan to record if it is not.
    """

    group: DependencyGroup
    plan: GroupPlan
    host: StepHost
    record: Callable[[GroupVisit, GroupPlan, Sequence[ParameterEdit]], None]
    is_current: bool = field(default=True, init=False)
    is_pruned: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._remove = self.group.prune
        self.group.prune = self.prune
        self.not_pruned = replace(self.plan, selection=None, reason="the caller did not prune it")

    def prune(self, idxs: list[int] | None = None, record_history: bool = True) -> None:
        """Remove channels of the group, compensated for, and record them.

        Args:
            idxs: Channels of the root to remove, by default those of the group.
            record_history: Whether Torch-Pruning notes them in its history.

        Raises:
            PruningError: If the visit of an attention group is over, or the layer has other channels by now.
        """
        plan, key = self.plan, key_of(self.group)
        if plan.heads and not self.is_current:
            raise PruningError(
                f"layer {plan.name!r}: its group was to be pruned before the next one was asked for: whole heads "
                "and their dimensions are groups of their own, one after the other."
            )
        n_now, n_then = n_channels_of(self.host.DG, key), plan.selection.n_channels if plan.selection else 0
        if n_now != n_then:
            raise PruningError(
                f"layer {plan.name!r}: the choice was made among {n_then} channels, the layer has {n_now} now; "
                "prune the groups of one step in the order in which they come."
            )
        removed = list(self.group[0].idxs if idxs is None else idxs)
        group = self.group
        if idxs is not None:
            group = build_group(self.host.DG, key[0], plan.side, removed, plan.heads)
        self.host.recovery.before(group)
        if self.host.settings.verify and not plan.heads:
            self.host.output_check.expect_without(group)
        edits = prune_group(self.host.model, lambda: self._remove(idxs, record_history), n_now, removed, plan.heads)
        self.is_pruned = True
        self.record(self, plan.without(removed), edits)

    def prune_now(self) -> None:
        """Prune the group as planned.

        Raises:
            InputError: If the data cannot be used for compensation.
            PruningError: If anything else fails, which is then for Torch-Pruning to answer for.
        """
        try:
            self.prune()
        except InputError:
            raise
        except Exception as error:
            raise PruningError(
                f"layer {self.plan.name!r}: Torch-Pruning failed to prune its group ({type(error).__name__}: {error}); "
                "the model is as it was. Put this layer into ignored_layers, ask for a count that it can have "
                "(round_to, num_heads), or leave such groups alone with on_failure='skip'."
            ) from error


class PrunerState:
    """What a pruner knows now, to be restored if a step fails.

    Args:
        host: The pruner.
    """

    def __init__(self, host: StepHost) -> None:
        self._host = host
        self._values = {name: copy(getattr(host, name)) for name in _STATE}
        self._memory = host.memory.copy()
        self._restore_recovery = host.recovery.saved()

    def restore(self) -> None:
        """Put the pruner's own state back and trace the restored model again; the model is restored elsewhere."""
        vars(self._host).update(self._values, memory=self._memory)
        self._restore_recovery()
        try:
            self._host.DG = self._host.retrace()
        except Exception as error:
            warnings.warn(f"step: cannot trace the restored model again ({error}); make a new pruner.", stacklevel=2)


class PruningStep:
    """A step of a pruner: visits its groups, records what became of them, and takes everything back if it fails.

    Args:
        host: The pruner, as it is before the step.

    Attributes:
        planned: Plans of groups that were not visited yet.
        left_alone: Plans of groups that nothing is done to.
    """

    def __init__(self, host: StepHost) -> None:
        self.host = host
        self.planned: dict[Key, GroupPlan] = {}
        self.left_alone: list[GroupPlan] = []

    def run(self, *, prune: bool) -> Iterator[DependencyGroup]:
        """Yield groups; check, record and call back after each; undo everything if anything fails.

        Args:
            prune: Whether groups are pruned here, or by the caller.

        Yields:
            The groups that lose channels.

        Raises:
            BaseException: What failed; the model and the pruner are then as they were.
        """
        check_autograd()
        host, settings = self.host, self.host.settings
        if host.current_step >= settings.n_steps:
            host.current_step += 1
            warnings.warn(
                f"step: this would exceed the maximum iterative steps, {settings.n_steps}; nothing is pruned.",
                stacklevel=3,
            )
            return
        before = PrunerState(host)
        try:
            with restored_on_error(host.model):
                host.current_step += 1
                host.output_check.expect_shapes()
                costs = layer_costs(host.model, host.run)
                if host.loader is not None and (host.current_step > 1 or not host.selector.is_fitted):
                    host.fit()
                host.recovery.measure()
                for group in self._groups():
                    yield from self._visit(group, prune=prune)
                    if settings.layerwise:
                        host.recovery.finish(settings.fine_tune)
                self._record_rest()
                if not settings.layerwise:
                    host.recovery.finish(settings.fine_tune)
                after = layer_costs(host.model, host.run)
                if settings.target is not None:
                    check_target(host.planner(), after)
                biases = host.plan.new_biases if host.compensator is None else tuple(host.compensator.new_biases)
                options = dict(host.plan.options)
                if host.recovery.is_recalibrated is not None:
                    options["recalibrated"] = host.recovery.is_recalibrated
                both = costs_beside(host.plan.costs, costs, after)
                host.plan = replace(host.plan, new_biases=biases, costs=both, options=options)
        except BaseException as error:
            # An interactive caller who stops early keeps what was pruned so far.
            if not isinstance(error, GeneratorExit):
                before.restore()
            raise

    def _groups(self) -> Iterator[DependencyGroup]:
        """The groups that are to lose channels."""
        host, settings = self.host, self.host.settings
        if settings.is_ranked and not settings.layerwise:
            yield from host.ranked_groups()
            return
        if settings.layerwise:
            host.memory.done.clear()
            host.fit()
        if settings.target is not None:
            allocate_counts(host.planner())
        if not settings.layerwise:
            yield from self._planned(None)
            return
        # Statistics come in the order in which the layers ran.
        for i, name in enumerate(host.selector.layers):
            if i and host.memory.done:
                host.fit()
                host.recovery.measure()
            yield from self._planned(name)

    def _planned(self, layer: str | None) -> Iterator[DependencyGroup]:
        """The groups that are to lose channels, of those that a layer describes."""
        host = self.host
        # Statistics belong to the unpruned layers, so every selection is made before the first group is pruned.
        for plan in list(host.planner().group_plans(layer)):
            if plan.selection is None or not plan.selection.prune_idxs:
                self.left_alone.append(plan)
                continue
            root = host.model.get_submodule(plan.name)
            group = build_group(host.DG, root, plan.side, plan.selection.prune_idxs, plan.heads)
            if host.DG.check_pruning_group(group):
                self.planned[key_of(group)] = plan
                yield group
            else:
                self._leave_alone(plan, "Torch-Pruning refuses: a layer of it would lose all its channels")

    def _visit(self, group: DependencyGroup, *, prune: bool) -> Iterator[DependencyGroup]:
        """Prune a group, or let the caller; with ``on_failure="skip"`` take a failure back and go on.

        Args:
            group: One of the groups that are planned.
            prune: Whether it is pruned here.

        Yields:
            The group.

        Raises:
            PruningError: If the group cannot be pruned, or the model does not run after it.
        """
        host = self.host
        may_skip = host.settings.on_failure == "skip"
        plan = self._with_ranked_heads(self.planned.pop(key_of(group)))
        before, dicts = host.plan, [(d, dict(d)) for d in (host.num_heads, host.out_channel_groups)]
        restore_recovery = host.recovery.saved()
        try:
            with restored_on_error(host.model) if may_skip else nullcontext():
                visit = GroupVisit(group, plan, host, self._record_pruned)
                if prune:
                    visit.prune_now()
                yield group
                visit.is_current = False
                if not visit.is_pruned:
                    self._record(visit.not_pruned)
                    return
                if host.settings.adapt is not None:
                    host.settings.adapt(host.model)
                host.output_check(plan.name)
        except PruningError as error:
            if not may_skip:
                raise
            host.plan = before
            restore_recovery()
            for now, then in dicts:
                now.clear()
                now.update(then)
            host.DG = host.retrace()
            self._leave_alone(plan, f"cannot be pruned: {error.__cause__ or error}")

    def _record(self, plan: GroupPlan) -> None:
        """Add a group to the pruner's plan."""
        self.host.plan = replace(self.host.plan, groups=(*self.host.plan.groups, plan))

    def _leave_alone(self, plan: GroupPlan, reason: str) -> None:
        """Note that nothing is done to a group, and why."""
        self.left_alone.append(replace(plan, selection=None, reason=reason))

    def _record_rest(self) -> None:
        """Record groups that were not pruned, and layers that no group showed, so that the plan hides nothing."""
        host = self.host
        for plan in (*self.planned.values(), *self.left_alone):
            self._record(plan.without(()))
        self.planned.clear()
        shown = host.memory.seen | {name for plan in host.plan for name in plan.layers}
        for name, layer in measured_layers(host.model, host.selector.channel_dims).items():
            if name in shown:
                continue
            reason = "in ignored_layers, or pruned only together with a layer that is"
            if layer not in host.DG.module2node:
                reason = (
                    "Torch-Pruning's trace did not reach it: it runs without gradients, in training mode or on other "
                    "inputs only"
                )
            self._record(GroupPlan(name, "out", (name,), None, reason))

    def _record_pruned(self, visit: GroupVisit, plan: GroupPlan, edits: Sequence[ParameterEdit]) -> None:
        host = self.host
        for name, (_, after) in plan.heads.items():
            layer = host.model.get_submodule(name)
            host.num_heads[layer] = host.out_channel_groups[layer] = after
        # A caller who collects the groups first prunes those that are recorded as left out already.
        groups = tuple(g for g in host.plan if g is not visit.not_pruned)
        host.plan = replace(host.plan, groups=(*groups, plan), history=host.plan.history.extended(host.model, edits))

    def _with_ranked_heads(self, plan: GroupPlan) -> GroupPlan:
        """The plan with the numbers of heads that the stock pruner decided on, if it ranked them."""
        host = self.host
        if not (host.settings.is_ranked and plan.heads):
            return plan
        now = {name: host.num_heads[host.model.get_submodule(name)] for name in plan.heads}
        return replace(plan, heads={name: (before, now[name]) for name, (before, _) in plan.heads.items()})
