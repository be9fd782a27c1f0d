"""What a pruner does with every group of a model in one step: how many components are kept, and which."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from math import ceil, gcd
from typing import Any

import torch
from torch import nn

from tp_cosep.calibration.class_observer import channel_dim_of
from tp_cosep.errors import InputError
from tp_cosep.functional.selection import ChannelSelection
from tp_cosep.graph.groups import GroupView, is_output, prunable_groups, read_group, side_of
from tp_cosep.graph.heads import attention_layers_of, heads_of, rerooted
from tp_cosep.graph.protocols import DependencyGraph, DependencyGroup
from tp_cosep.pruning.settings import PruneSettings
from tp_cosep.selection.result import GroupPlan
from tp_cosep.selection.scored import ScoreSelector
from tp_cosep.selection.selector import Selector, ratio_for

__all__ = ["Key", "Planner", "PlannerMemory", "Subject"]

#: A group: its root, and which channels of it (``"out"``, ``"in"``, or ``"head"`` for whole heads).
Key = tuple[nn.Module, str]
_Choice = tuple[ChannelSelection | None, str]


@dataclass(frozen=True)
class Subject:
    """The model as it is now, and how Torch-Pruning sees it.

    Attributes:
        model: The model.
        example_inputs: What it is traced and run on.
        graph: Its dependency graph.
        num_heads: Number of heads by attention layer.
        in_channel_groups: Channel groups by layer that the pruner was given for inputs.
        out_channel_groups: The same for outputs.
        run: Runs the model, or a copy of it, on the example inputs.
        may_prune: Whether a group has more channels than the pruner has to leave.
    """

    model: nn.Module
    example_inputs: Any
    graph: DependencyGraph
    num_heads: Mapping[nn.Module, int]
    in_channel_groups: Mapping[nn.Module, int]
    out_channel_groups: Mapping[nn.Module, int]
    run: Callable[..., Any]
    may_prune: Callable[[DependencyGroup], bool]


@dataclass
class PlannerMemory:
    """What is remembered from one step to the next.

    Attributes:
        n_initial: Components of every group at first sight.
        schedules: Ratios by step of groups whose counts the selector decided.
        counts: Components that groups keep for a target, once that is allocated; ``None`` before.
        cost: What the unpruned model costs in the unit of the target; ``None`` before that is known.
        done: Groups that had their turn, with ``layerwise``.
        seen: Names of the layers that lose channels in some group that was looked at.
    """

    n_initial: dict[Key, int] = field(default_factory=dict)
    schedules: dict[Key, Sequence[float]] = field(default_factory=dict)
    counts: dict[Key, int] | None = None
    cost: float | None = None
    done: set[Key] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)

    def copy(self) -> PlannerMemory:
        """A copy that later steps do not change."""
        return PlannerMemory(**{name: copy(value) for name, value in vars(self).items()})


class Planner:
    """Plans every group of a model in one step.

    Args:
        selector: Fitted before anything is planned.
        settings: Those of the pruner.
        subject: The model as it is.
        memory: What earlier steps left; changed by this one.
        step: The number of the step, from 1.
    """

    def __init__(
        self,
        selector: Selector | ScoreSelector,
        settings: PruneSettings,
        subject: Subject,
        memory: PlannerMemory,
        step: int,
    ) -> None:
        self.selector = selector
        self.settings = settings
        self.subject = subject
        self.memory = memory
        self.step = step

    def groups(self) -> Iterator[DependencyGroup]:
        """The groups that the stock pruner would visit, attention groups rooted at the layer that consumes them."""
        types = self.settings.root_module_types
        for group in prunable_groups(self.subject.graph, self.settings.ignored_layers, types):
            seen = rerooted(group, self.subject.num_heads, types)
            if seen is not None:
                yield seen

    def view(self, group: DependencyGroup) -> GroupView:
        """A group with the channel groups that the pruner was given."""
        view = read_group(group, self.subject.in_channel_groups, self.subject.out_channel_groups)
        self.memory.seen.update(m.name for m in view.producers)
        return view

    def layers(self) -> list[str]:
        """Names of the layers whose statistics the groups need."""
        return sorted({m.name for group in self.groups() for m in self.view(group).observed(self.selector.observe)})

    def fixed_ratios_of(self, view: GroupView) -> Sequence[float] | None:
        """The ratios by step that ``pruning_ratio_dict`` gives a group."""
        fixed = self.settings.fixed_ratios
        return next((fixed[m.layer] for m in view.producers if m.layer in fixed), None)

    def n_initial_of(self, view: GroupView) -> int:
        """Components of a group at first sight."""
        return self.memory.n_initial.setdefault((view.root, view.side), view.n_components)

    def num_heads_of(self, group: DependencyGroup) -> dict[str, int]:
        """Numbers of heads of a group's attention layers, by name."""
        num_heads, names = self.subject.num_heads, self.subject.graph._module2name
        return {names[m]: num_heads[m] for m in attention_layers_of(group, num_heads)}

    def step_size(self, view: GroupView) -> int | None:
        """``round_to`` in components: of every channel group, or of all together if the groups are narrow."""
        step = self.settings.round_to
        if step is None or view.n_components >= step:
            return step
        return step // gcd(step, view.n_channel_groups)

    @torch.no_grad()
    def group_plans(self, layer: str | None = None) -> Iterator[GroupPlan]:
        """What to do with every group of the model, or with those that a layer describes.

        Args:
            layer: The name of that layer; a group has its turn once.

        Yields:
            One plan per group; for attention groups one for whole heads and one for their dimensions.
        """
        rows = _Rows()
        attention = []
        for group in self.groups():
            try:
                view = self.view(group)
                plan = self.unselected(group, view)
                key = view.root, view.side
                if layer is not None and (key in self.memory.done or layer not in self.selector.layers_of(view)):
                    continue
                self.memory.done.add(key)
                if not plan.reason:
                    rows.take(view)
                if not plan.reason and self.num_heads_of(group):
                    attention.append((group, view, plan))
                else:
                    yield plan if plan.reason else self._selected(group, view, plan)
            except InputError as error:
                yield self.refused(group, error)
        yield from self._attention_plans(attention)

    def unselected(self, group: DependencyGroup, view: GroupView) -> GroupPlan:
        """The plan of a group before anything is selected; with a reason if nothing is to be."""
        reason = ""
        if is_output(group):
            reason = "its channels are the model's output"
        elif any(isinstance(m.layer, nn.RNNBase) for m in view.producers):
            reason = "Torch-Pruning cannot prune the outputs of a recurrent layer"
        elif not self.subject.may_prune(group):
            reason = "it has a single channel, or as few as max_pruning_ratio leaves"
        heads = {name: (n, n) for name, n in self.num_heads_of(group).items()}
        dims = self.selector.channel_dims
        producers = [m.name for m in view.producers if channel_dim_of(m.layer, dims) is not None]
        layers = tuple(producers or (m.name for m in view.producers))
        return GroupPlan(view.name, view.side, layers, None, reason, heads=heads)

    def refused(self, group: DependencyGroup, error: InputError) -> GroupPlan:
        """The plan of a group that cannot be read or selected, if such groups are to be skipped.

        Returns:
            A plan without a selection.

        Raises:
            InputError: The error itself, if not.
        """
        if self.settings.on_failure != "skip":
            raise error
        name = self.subject.graph._module2name.get(group[0].dep.target.module, "?")
        self.memory.seen.add(name)
        return GroupPlan(name, side_of(group), (name,), None, str(error))

    def with_embedding(self, view: GroupView, plan: GroupPlan) -> GroupPlan:
        """The plan with an embedding of its group, if there is a selection to draw; before anything is pruned."""
        if plan.selection is None or not self.settings.embed:
            return plan
        return replace(plan, embedding=self.selector.embedding(view, plan.selection))

    def _selected(self, group: DependencyGroup, view: GroupView, plan: GroupPlan) -> GroupPlan:
        selection, reason = self._select(group, view)
        if selection is not None and (remark := self.selector.remark(view)):
            reason = f"{reason}; {remark}"
        return self.with_embedding(view, replace(plan, selection=selection, reason=reason))

    def _select(self, group: DependencyGroup, view: GroupView) -> _Choice:
        """Selection of a group with the count that this step is to keep, and how that count came about."""
        settings, key = self.settings, (view.root, view.side)
        n = self.n_initial_of(view)
        fixed, step = self.fixed_ratios_of(view), self.step_size(view)
        schedule = fixed
        if fixed is not None:
            reason = "pruning_ratio_dict"
        elif self.memory.counts is not None and settings.target is not None:
            if key not in self.memory.counts:
                return None, self.selector.unmeasured
            selection = self.selector.select(group, view=view, n_keep=self.memory.counts[key])
            return selection, self.selector.unmeasured if selection is None else f"target in {settings.target[0]}"
        elif not settings.automatic:
            reason, schedule = "pruning_ratio", settings.ratios
        else:
            reason = "knee" if self.selector.is_automatic else "count set in the selector"
            schedule = self.memory.schedules.get(key)
        if schedule is None:
            free = self.selector.select(group, view=view, round_to=step)
            if free is None:
                return None, self.selector.unmeasured
            if settings.n_steps == 1 and free.k >= n * (1 - settings.max_pruning_ratio):
                return free, _in_words(free) if reason == "knee" else reason
            schedule = settings.schedule(ratio_for(free.k, n), settings.n_steps)
            self.memory.schedules[key] = schedule
        n_keep = int(n * (1 - min(schedule[self.step], settings.max_pruning_ratio)))
        n_keep = min(max(n_keep, 1), view.n_components)
        selection = self.selector.select(group, view=view, n_keep=n_keep, round_to=step)
        if selection is None:
            return None, self.selector.unmeasured
        return selection, _in_words(selection) if reason == "knee" else reason

    def _attention_plans(
        self, attention: Sequence[tuple[DependencyGroup, GroupView, GroupPlan]]
    ) -> Iterator[GroupPlan]:
        """Whole heads first, then dimensions of those that are kept."""
        settings = self.settings
        nothing: list[_Choice] = [(None, "prune_num_heads and prune_head_dims are off")] * len(attention)
        chosen = self._select_heads([group for group, _, _ in attention]) if settings.prune_num_heads else nothing
        for (group, view, plan), (heads, reason) in zip(attention, chosen, strict=True):
            before = {name: n for name, (n, _) in plan.heads.items()}
            n_heads = max(before.values())
            n_kept = n_heads if heads is None else n_heads * len(heads.keep_idxs) // view.n_channels
            # Keys and values that several query heads share are kept.
            after = {name: n_kept if n == n_heads else n for name, n in before.items()}
            if heads is not None or not settings.prune_head_dims:
                changed = {name: (n, after[name]) for name, n in before.items()}
                whole = replace(plan, selection=heads, reason=reason, unit="head", heads=changed)
                yield self.with_embedding(read_group(group, n_heads=n_heads), whole)
            if settings.prune_head_dims:
                dims, reason = self._select(group, view)
                if dims is not None:
                    dims = dims.first_channels(view.n_channels // n_heads * n_kept)
                unchanged = {name: (n, n) for name, n in after.items()}
                yield self.with_embedding(view, replace(plan, selection=dims, reason=reason, heads=unchanged))

    def _select_heads(self, groups: list[DependencyGroup]) -> list[_Choice]:
        """Selections of whole heads with the counts that this step is to keep, and how these came about."""
        selector, num_heads = self.selector, self.subject.num_heads
        numbers = [heads_of(group, num_heads)[0] for group in groups]
        keys = [(group[0].dep.target.module, "head") for group in groups]
        n = [self.memory.n_initial.setdefault(key, k) for key, k in zip(keys, numbers, strict=True)]
        ratios = [self._head_ratio(group) for group in groups]
        each = [max(1, k - ceil((ratio or 0) * k - 1e-9)) for k, ratio in zip(n, ratios, strict=True)]
        counts: int | list[int] | None
        counts, reason = _in_scope(selector, each), "head_pruning_ratio"
        if all(ratio is None for ratio in ratios):
            reason = "no head_pruning_ratio, so all heads are kept"
            if self.settings.automatic and selector.is_automatic:
                counts, reason = None, ""
        least = [max(1, ceil(k * (1 - self.settings.max_pruning_ratio) - 1e-9)) for k in n]
        found: list[_Choice] = []
        selections = selector.select_heads(groups, num_heads, n_keep=counts)
        for group, s, now, fewest in zip(groups, selections, numbers, least, strict=True):
            if s is None:
                found.append((None, selector.unmeasured))
            elif now * len(s.keep_idxs) < fewest * s.n_channels:
                bounded = selector.select_heads([group], num_heads, n_keep=_in_scope(selector, [fewest]))
                found.append((bounded[0], "heads, as few as max_pruning_ratio leaves"))
            else:
                found.append((s, reason or f"heads, {_in_words(s)}"))
        return found

    def _head_ratio(self, group: DependencyGroup) -> float | None:
        """The share of heads to remove by this step, if any was specified."""
        fixed = self.settings.fixed_head_ratios
        of_layers = (fixed.get(layer) for layer in attention_layers_of(group, self.subject.num_heads))
        schedule = next((s for s in of_layers if s is not None), self.settings.head_ratios)
        return None if schedule is None else min(schedule[self.step], 1.0)


class _Rows:
    """Which channels of which layers some group has taken, so that none is in two groups."""

    def __init__(self) -> None:
        self._group_of: dict[tuple[str, int], str] = {}

    def take(self, view: GroupView) -> None:
        for member in view.producers:
            for row in member.rows.tolist():
                other = self._group_of.setdefault((member.name, row), view.name)
                if other != view.name:
                    raise InputError(
                        f"layer {member.name!r}: its channel {row} belongs to the groups of {other!r} and of "
                        f"{view.name!r}, which would be selected apart; put one of these into ignored_layers."
                    )


def _in_scope(selector: Selector | ScoreSelector, each: list[int]) -> int | list[int]:
    """Numbers of heads as ``select_heads`` takes them: one for all layers, or one for each."""
    return sum(each) if selector.scope == "model" else each


def _in_words(selection: ChannelSelection) -> str:
    if selection.knee_k is None:
        return "all alike" if selection.k == 1 else "no knee"
    return f"knee at {selection.knee_k}" + (", guarded" if selection.k > selection.knee_k else "")
