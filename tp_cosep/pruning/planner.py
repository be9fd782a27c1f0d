"""What a pruner does with every group of a model in one step: how many components stay, and which."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import replace
from math import ceil, gcd
from typing import Any

import torch
from torch import nn

from tp_cosep.calibration.class_observer import channel_dim_of
from tp_cosep.errors import InputError
from tp_cosep.functional.selection import ChannelSelection
from tp_cosep.graph.groups import GroupView, is_output, prunable_groups, read_group, side_of
from tp_cosep.graph.heads import attention_layers_of, heads_of, rerooted
from tp_cosep.graph.patches import patches_of
from tp_cosep.pruning.budget import Budget, counts_for_latency
from tp_cosep.pruning.plan import PruningPlan
from tp_cosep.selection.embedding import embed_group
from tp_cosep.selection.result import GroupPlan
from tp_cosep.selection.selector import Selector, ratio_for
from tp_cosep.utils.data import device_of
from tp_cosep.utils.timing import median_times

__all__ = ["NOT_MEASURED", "Planner"]

NOT_MEASURED = "none of its layers could be measured"
_Key = tuple[nn.Module, str]
_Choice = tuple[ChannelSelection | None, str]


class Planner:
    """Reads a pruner's options and groups, and asks its selector.

    Args:
        pruner: A :class:`tp_cosep.CoSePPruner`, its stock part initialised.

    Attributes:
        seen: Names of the layers that lose channels in some group that was looked at.
    """

    def __init__(self, pruner: Any) -> None:
        self._pruner = pruner
        self._fixed_ratios = dict(pruner.pruning_ratio_dict)
        self._schedules: dict[_Key, list[float]] = {}
        self._n_initial: dict[_Key, int] = {}
        # Components that groups keep for the pruner's target, once that is shared out.
        self._counts: dict[_Key, int] | None = None
        self._whole: float | None = None
        # Layerwise: the groups that had their turn.
        self._done: set[_Key] = set()
        self._draws = True
        self.seen: set[str] = set()

    @property
    def _selector(self) -> Selector:
        selector: Selector = self._pruner.importance
        return selector

    def saved(self) -> Planner:
        """A copy that later choices do not change."""
        saved = copy(self)
        for name in ("_schedules", "_n_initial", "_counts", "_done", "seen"):
            setattr(saved, name, copy(getattr(self, name)))
        return saved

    def begin(self) -> None:
        """Forget which groups had their turn."""
        self._done.clear()

    @property
    def has_begun(self) -> bool:
        """Whether a group had its turn."""
        return bool(self._done)

    def groups(self) -> Iterator[Any]:
        """The groups that the stock pruner would visit, attention groups seen from the layer that reads them."""
        p = self._pruner
        for group in prunable_groups(p.DG, p.ignored_layers, p.root_module_types):
            seen = rerooted(group, p.num_heads, p.root_module_types)
            if seen is not None:
                yield seen

    def view(self, group: Any) -> GroupView:
        """What is to know of a group, with the channel groups that the pruner was told of."""
        view = read_group(group, self._pruner.in_channel_groups, self._pruner.out_channel_groups)
        self.seen.update(m.name for m in view.producers)
        return view

    def measured_layers(self) -> list[str]:
        """Names of the layers whose moments the groups need."""
        return sorted({m.name for group in self.groups() for m in self.view(group).observed(self._selector.observe)})

    @torch.no_grad()
    def budget(self, step: int) -> Budget:
        """What the groups can lose, as the pruner's options allow.

        What a component loses is its score, the share of what a group's readers see that goes with it, times the
        number of these readers.

        Args:
            step: Of the pruner's steps, from 1.

        Returns:
            It.
        """
        p, budget = self._pruner, Budget()
        for group in self.groups():
            try:
                view = self.view(group)
                chosen = None if self.group_plan(group, view).reason else self._selector.select(group, view=view)
            except InputError as error:
                self.refused(group, error)
                continue
            if chosen is None or (self.num_heads_of(group) and not p.prune_head_dims):
                continue
            n = self._n_initial.setdefault((view.root, view.side), view.n_components)
            scores = torch.empty(view.n_components, dtype=torch.float64)
            scores[view.component_of] = chosen.scores
            n_consumers = sum(patches_of(m.layer) is not None for m in view.consumers)
            fixed = self._fixed_ratio_of(view)
            ratio = p.max_pruning_ratio if fixed is None else fixed[step]
            least = max(1, n - int(n * ratio))
            if fixed is not None:
                budget.fixed[len(budget.views)] = view.n_components - least
            budget.views.append(view)
            budget.losses.append(scores.sort().values * max(n_consumers, 1))
            budget.least.append(least if fixed is None else view.n_components)
            budget.steps.append(self._step(view) or 1)
        return budget

    def allocate_counts(self) -> None:
        """Decide how many components every group keeps, so that the model meets the pruner's target in this step.

        Raises:
            InputError: If the target is out of reach.
        """
        p = self._pruner
        budget = self.budget(p.current_step)
        costs, whole = budget.costs(p.model, p.run, p.target[0])
        if p.target[0] == "latency":
            whole = now = self._seconds({"now": p.model})["now"]
        is_first, self._whole = self._whole is None, self._whole or whole
        if is_first and self._goal() >= whole:
            warnings.warn(
                f"step: the target of {p.target[1]:.6g} {p.target[0]} asks for nothing, the model is at "
                f"{whole * (1000 if p.target[0] == 'latency' else 1):.6g}; shares are below 1.",
                stacklevel=6,
            )
        if p.target[0] == "latency":
            kept = counts_for_latency(budget, costs, lambda kept: self._share_of(budget, kept), self._target() / now)
        else:
            kept = budget.kept(costs, self._target())
        self._count(budget, kept)

    def _count(self, budget: Budget, kept: Sequence[int]) -> None:
        self._counts = {(v.root, v.side): k for v, k in zip(budget.views, kept, strict=True)}

    def _share_of(self, budget: Budget, kept: Sequence[int]) -> float:
        """The time of a copy that keeps so many components, as a share of the model's."""
        p, trial = self._pruner, self.saved()
        trial.begin()
        trial._draws = False
        trial._count(budget, kept)
        group_plans = tuple(trial.group_plans())
        # Together, since trace options may name parameters of the model.
        model, options = deepcopy((p.model, p._trace_options))
        plan = PruningPlan(group_plans, ignored_params=p.plan.ignored_params)
        times = self._seconds({"now": p.model, "then": plan.apply(model, p.example_inputs, adapt=p.adapt, **options)})
        return times["then"] / times["now"]

    def _seconds(self, models: dict[str, nn.Module]) -> dict[str, float]:
        return median_times(models, self._pruner.run, device_of(self._pruner.model))

    def _goal(self) -> float:
        """What the model may cost in the end, in the unit's own measure, seconds for a latency."""
        unit, value = self._pruner.target
        goal: float = value * (self._whole or 0.0) if value < 1 else value / (1000 if unit == "latency" else 1)
        return goal

    def _target(self) -> float:
        """What the model may cost after this step."""
        p, whole = self._pruner, self._whole or 0.0
        now: float = whole - (whole - self._goal()) * p.current_step / p.iterative_steps
        return now

    def check_target(self, costs: Mapping[str, Mapping[str, int]]) -> None:
        """Say so if the target was missed, which groups that were skipped or not pruned by the caller make it be.

        A latency is not measured again: a busy machine would make it miss by chance.

        Args:
            costs: Of what is left, see :func:`tp_cosep.pruning.costs.layer_costs`.
        """
        p = self._pruner
        if p.target[0] == "latency" or self._whole is None or p.current_step > p.iterative_steps:
            return
        left = sum(costs[p.target[0]].values())
        if left > 1.02 * self._target():
            warnings.warn(
                f"step: the target of {self._target():.4g} {p.target[0]} was missed, {left:.4g} are left: groups that "
                "were to lose channels did not, see the plan.",
                stacklevel=5,
            )

    def _fixed_ratio_of(self, view: GroupView) -> list[float] | None:
        """What ``pruning_ratio_dict`` says of a group, step by step."""
        return next((self._fixed_ratios[m.layer] for m in view.producers if m.layer in self._fixed_ratios), None)

    @torch.no_grad()
    def group_plans(self, current: str | None = None) -> Iterator[GroupPlan]:
        """What to do with every group of the model, or with those that a layer describes.

        Args:
            current: The name of that layer; a group has its turn once.

        Yields:
            One entry per group; for attention groups one for whole heads and one for their dimensions.
        """
        rows = _Rows()
        attention = []
        for group in self.groups():
            try:
                view = self.view(group)
                group_plan = self.group_plan(group, view)
                key = view.root, view.side
                if current is not None and (key in self._done or current not in self._selector.layers_of(view)):
                    continue
                self._done.add(key)
                if not group_plan.reason:
                    rows.take(view)
                if not group_plan.reason and self.num_heads_of(group):
                    attention.append((group, view, group_plan))
                else:
                    yield group_plan if group_plan.reason else self._chosen(group, view, group_plan)
            except InputError as error:
                yield self.refused(group, error)
        yield from self._attention_plans(attention)

    def refused(self, group: Any, error: InputError) -> GroupPlan:
        """The entry of a group that cannot be read or selected, if such groups are to be skipped.

        Returns:
            An entry without a selection.

        Raises:
            InputError: The error itself, if not.
        """
        if self._pruner.on_failure != "skip":
            raise error
        layer, side = group[0].dep.target.module, side_of(group)
        name = group._DG._module2name.get(layer, "?")
        self.seen.add(name)
        return GroupPlan(name, side, (name,), None, str(error))

    def _chosen(self, group: Any, view: GroupView, group_plan: GroupPlan) -> GroupPlan:
        selection, reason = self._choose(group, view)
        return self.with_embedding(group, view, replace(group_plan, selection=selection, reason=reason))

    def with_embedding(self, group: Any, view: GroupView, group_plan: GroupPlan) -> GroupPlan:
        """The entry with a picture of its group, if there is a choice to draw; before anything is pruned."""
        if group_plan.selection is None or not (self._draws and self._pruner.pictures):
            return group_plan
        return replace(group_plan, embedding=embed_group(self._selector.criterion, view, group_plan.selection))

    def group_plan(self, group: Any, view: GroupView) -> GroupPlan:
        """The entry of a group before anything is chosen; with a reason if nothing is to be."""
        reason = ""
        if is_output(group):
            reason = "its channels are the model's output"
        elif any(isinstance(m.layer, nn.RNNBase) for m in view.producers):
            reason = "Torch-Pruning cannot prune the outputs of a recurrent layer"
        elif not self._pruner._check_pruning_ratio(group):
            reason = "it has a single channel, or as few as max_pruning_ratio leaves"
        heads = {name: (n, n) for name, n in self.num_heads_of(group).items()}
        producers = [m.name for m in view.producers if channel_dim_of(m.layer, self._selector.channel_dims) is not None]
        layers = tuple(producers or (m.name for m in view.producers))
        return GroupPlan(view.name, view.side, layers, None, reason, heads=heads)

    def num_heads_of(self, group: Any) -> dict[str, int]:
        """Numbers of heads of a group's attention layers, by name."""
        p = self._pruner
        return {p.DG._module2name[m]: p.num_heads[m] for m in attention_layers_of(group, p.num_heads)}

    def _choose(self, group: Any, view: GroupView) -> _Choice:
        """Selection of a group with the count that this step is to keep, and how that count came about."""
        p, key = self._pruner, (view.root, view.side)
        n = self._n_initial.setdefault(key, view.n_components)
        fixed = self._fixed_ratio_of(view)
        step = self._step(view)
        schedule: list[float] | None = fixed
        if fixed is not None:
            reason = "pruning_ratio_dict"
        elif self._counts is not None:
            if key not in self._counts:
                return None, NOT_MEASURED
            selection = self._selector.select(group, view=view, n_keep=self._counts[key])
            return selection, NOT_MEASURED if selection is None else f"target in {p.target[0]}"
        elif not p.automatic:
            reason, schedule = "pruning_ratio", p.per_step_pruning_ratio
        else:
            reason = "knee" if self._selector.is_automatic else "count set in the selector"
            schedule = self._schedules.get(key)
        if schedule is None:
            free = self._selector.select(group, view=view, round_to=step)
            if free is None:
                return None, NOT_MEASURED
            if p.iterative_steps == 1 and free.k >= n * (1 - p.max_pruning_ratio):
                return free, _in_words(free) if reason == "knee" else reason
            schedule = p.iterative_pruning_ratio_scheduler(ratio_for(free.k, n), p.iterative_steps)
            self._schedules[key] = schedule
        n_keep = int(n * (1 - min(schedule[p.current_step], p.max_pruning_ratio)))
        n_keep = min(max(n_keep, 1), view.n_components)
        selection = self._selector.select(group, view=view, n_keep=n_keep, round_to=step)
        if selection is None:
            return None, NOT_MEASURED
        return selection, _in_words(selection) if reason == "knee" else reason

    def _step(self, view: GroupView) -> int | None:
        """``round_to`` in components: of every channel group, or of all together where the groups are narrow."""
        step: int | None = self._pruner.round_to or None
        if step is None or view.n_components >= step:
            return step
        return step // gcd(step, view.n_channel_groups)

    def _attention_plans(self, attention: Sequence[tuple[Any, GroupView, GroupPlan]]) -> Iterator[GroupPlan]:
        """Whole heads first, then dimensions of those that are left."""
        p = self._pruner
        nothing: list[_Choice] = [(None, "prune_num_heads and prune_head_dims are off")] * len(attention)
        chosen = self._choose_heads([group for group, _, _ in attention]) if p.prune_num_heads else nothing
        for (group, view, group_plan), (heads, reason) in zip(attention, chosen, strict=True):
            before = {name: n for name, (n, _) in group_plan.heads.items()}
            n_heads = max(before.values())
            n_left = n_heads if heads is None else n_heads * len(heads.keep_idxs) // view.n_channels
            # Keys and values that several query heads share stay.
            after = {name: n_left if n == n_heads else n for name, n in before.items()}
            if heads is not None or not p.prune_head_dims:
                changed = {name: (n, after[name]) for name, n in before.items()}
                whole = replace(group_plan, selection=heads, reason=reason, unit="head", heads=changed)
                yield self.with_embedding(group, read_group(group, n_heads=n_heads), whole)
            if p.prune_head_dims:
                dims, reason = self._choose(group, view)
                if dims is not None:
                    dims = dims.first_channels(view.n_channels // n_heads * n_left)
                left = {name: (n, n) for name, n in after.items()}
                yield self.with_embedding(group, view, replace(group_plan, selection=dims, reason=reason, heads=left))

    def _choose_heads(self, groups: list[Any]) -> list[_Choice]:
        """Selections of whole heads with the counts that this step is to keep, and how these came about."""
        p, selector = self._pruner, self._selector
        numbers = [heads_of(group, p.num_heads)[0] for group in groups]
        n = [
            self._n_initial.setdefault((g[0].dep.target.module, "head"), k)
            for g, k in zip(groups, numbers, strict=True)
        ]
        ratios = [self._head_ratio(group) for group in groups]
        each = [max(1, k - ceil((ratio or 0) * k - 1e-9)) for k, ratio in zip(n, ratios, strict=True)]
        counts: int | list[int] | None
        counts, reason = _in_scope(selector, each), "head_pruning_ratio"
        if all(ratio is None for ratio in ratios):
            reason = "no head_pruning_ratio, so all heads stay"
            if p.automatic and selector.is_automatic:
                counts, reason = None, ""
        least = [max(1, ceil(k * (1 - p.max_pruning_ratio) - 1e-9)) for k in n]
        found: list[_Choice] = []
        selections = selector.select_heads(groups, p.num_heads, n_keep=counts)
        for group, s, now, fewest in zip(groups, selections, numbers, least, strict=True):
            if s is None:
                found.append((None, NOT_MEASURED))
            elif now * len(s.keep_idxs) < fewest * s.n_channels:
                bounded = selector.select_heads([group], p.num_heads, n_keep=_in_scope(selector, [fewest]))
                found.append((bounded[0], "heads, as few as max_pruning_ratio leaves"))
            else:
                found.append((s, reason or f"heads, {_in_words(s)}"))
        return found

    def _head_ratio(self, group: Any) -> float | None:
        """The share of heads to remove that was asked for by this step, if any was."""
        p = self._pruner
        fixed = (p.head_pruning_ratio_dict.get(layer) for layer in attention_layers_of(group, p.num_heads))
        schedule = next((s for s in fixed if s is not None), None)
        if schedule is None:
            schedule = p.per_step_head_pruning_ratio if p.head_pruning_ratio > 0 else None
        return None if schedule is None else min(schedule[p.current_step], 1.0)


class _Rows:
    """Which channels of which layers some group has taken, to see that none is in two groups."""

    def __init__(self) -> None:
        self._group_of: dict[tuple[str, int], str] = {}

    def take(self, view: GroupView) -> None:
        for member in view.producers:
            for row in member.rows.tolist():
                other = self._group_of.setdefault((member.name, row), view.name)
                if other != view.name:
                    raise InputError(
                        f"layer {member.name!r}: its channel {row} belongs to the groups of {other!r} and of "
                        f"{view.name!r}, which would be chosen apart; put one of these into ignored_layers."
                    )


def _in_scope(selector: Selector, each: list[int]) -> int | list[int]:
    """How numbers of heads of layers are told to ``select_heads``: one for all of them, or one for each."""
    return sum(each) if selector.scope == "model" else each


def _in_words(selection: ChannelSelection) -> str:
    if selection.knee_k is None:
        return "all alike" if selection.k == 1 else "no knee"
    return f"knee at {selection.knee_k}" + (", guarded" if selection.k > selection.knee_k else "")
