"""A Torch-Pruning pruner that takes its counts from CoSeP and never leaves a model half pruned."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from tp_cosep.calibration.class_observer import measured_layers
from tp_cosep.compensation.compensator import Compensator
from tp_cosep.compensation.recovery import Recovery
from tp_cosep.errors import InputError, PruningError
from tp_cosep.graph.editing import build_group, prune_group
from tp_cosep.graph.groups import side_of
from tp_cosep.graph.heads import attention_heads, head_parameters
from tp_cosep.graph.structure import describe_inputs, structure_of, versions
from tp_cosep.graph.tracing import (
    TRACE_OPTIONS,
    cannot_follow,
    check_autograd,
    check_plain,
    resolve_layers,
    resolve_ratios,
    trace,
    trace_options,
    tracing,
)
from tp_cosep.graph.verification import OutputCheck
from tp_cosep.pruning.budget import Preview, trade_offs
from tp_cosep.pruning.costs import UNITS, costs_beside, layer_costs
from tp_cosep.pruning.plan import PruningPlan
from tp_cosep.pruning.planner import NOT_MEASURED, Planner
from tp_cosep.pruning.settings import check_fit_keywords, check_heads, check_pruner, check_target
from tp_cosep.selection.result import GroupPlan
from tp_cosep.selection.selector import Selector
from tp_cosep.utils.data import run_model
from tp_cosep.utils.snapshot import restored_on_error

__all__ = ["CoSePPruner"]

# What the stock pruner writes to while it prunes.
_STATE_DICTS = (
    "in_channel_groups",
    "out_channel_groups",
    "num_heads",
    "_scope_initial_channels",
    "_pending",
)


class CoSePPruner(tp.pruner.BasePruner):  # type: ignore[misc]
    """Prune a model with CoSeP: automatic counts per layer, or a ratio.

    It is Torch-Pruning's ``BasePruner`` with another default: ``pruning_ratio=None`` keeps in every group
    the number that the knee of its silhouette curve says. A number means that share of every layer, chosen
    as the k-medoids solution of exactly that size. Every other keyword of the stock pruner means what it
    means there.

    Groups whose channels are the model's output are left alone, so the output keeps its shape. After every
    group a forward pass on ``example_inputs`` is made; if it, the pruning or a callback fails, the model is
    as it was before the call. The model's mode (train or eval) is kept.

    Args:
        model: The model, as it was when the selector was fitted.
        example_inputs: For tracing and for the forward passes: a tensor, a tuple of arguments or a dict.
        importance: A :class:`CoSePSelector`; it need not be fitted if ``loader`` is given.
        global_pruning: As in the stock pruner; needs a ``pruning_ratio``.
        pruning_ratio: Share of channels to remove, or ``None`` for CoSeP's own counts.
        target: What the pruned model may cost, ``{"macs": 0.5}``, ``{"params": 2e6}`` or ``{"latency": 0.5}``: shares
            of the original below 1, numbers above (see :func:`tp_cosep.pruning.costs.measure_costs`). A latency is that of
            ``example_inputs``, all of the batch, on the model's device, above 1 in milliseconds. The channels come from
            where they lose least for what they save, over all layers (:func:`tp_cosep.pruning.allocation.allocate`); for a
            latency some pruned copies are timed. ``round_to`` makes widths that hardware likes.
        loader: Calibration data to (re)fit the selector on, for ``layerwise`` and ``iterative_steps``.
        layerwise: Prune as the papers do: group after group in the order in which they run, with fresh
            moments for each.
        fine_tune: ``fine_tune(model)``, called after every group with ``layerwise``, else once at the end of
            a step.
        adapt: ``adapt(model)``, called after every group before the model runs again, to write new sizes into
            attributes that the model keeps for itself, such as ``model.hidden_dim = model.conv_proj.out_channels``.
            (Numbers and sizes of attention heads are written already.)
        on_failure: What to do about a group that cannot be selected or pruned, or after which the model does not run:
            ``"raise"``, or ``"skip"`` to leave it as it was, with the reason in the plan, and go on. Skipping needs
            memory for one more copy of the weights.
        verify: After every group compare the outputs on ``example_inputs`` with those that the model had when nothing
            read the removed channels; a difference means that Torch-Pruning has mixed up channels, and counts as a
            failure. Groups with layers that look at all channels at once (LayerNorm, attention) are not compared. Turn
            it off for models that do so by other means, such as a mean over channels.
        compensate: Refit what reads a group just before it is pruned, see :class:`Compensator`: ``True`` or a mode,
            ``"one-shot"`` or ``"sequential"``, with the data of ``loader``; or a compensator of your own for this
            model, fitted or not. After fine-tuning it measures anew before it is used again.
        recalibrate: Estimate BatchNorm statistics anew on ``loader`` after each step (each group with ``layerwise``),
            before fine-tuning, see :func:`tp_cosep.recalibrate`.
        pictures: Record in the plan what :meth:`PruningPlan.report` draws of each group: its channels in the plane, and
            which classes their clusters tell apart.
        fit_options: Keywords for :meth:`CoSePSelector.fit`, such as ``target_fn``, which repair and ``recalibrate``
            read batches with too.
        **options: Every other keyword of ``tp.pruner.BasePruner``.

    Attributes:
        plan: What was kept in each group and why; grows with every step.
        compensator: The compensator, with its ``refits``; ``None`` without one.

    Raises:
        InputError: If the options contradict each other.
        PruningError: If the model does not run on the inputs, or Torch-Pruning cannot follow it.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 3))
        >>> x, y = torch.randn(40, 1, 8, 8), torch.arange(40) % 3
        >>> selector = CoSePSelector().fit(model, [(x, y)])
        >>> pruner = CoSePPruner(model, x[:1], importance=selector)
        >>> pruner.step()
        >>> len(pruner.plan.groups[0].selection.keep_idxs) == model[0].out_channels
        True
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: Selector,
        global_pruning: bool = False,
        pruning_ratio: float | None = None,
        *,
        target: Mapping[str, float] | None = None,
        loader: Iterable[Any] | None = None,
        layerwise: bool = False,
        fine_tune: Callable[[nn.Module], object] | None = None,
        adapt: Callable[[nn.Module], object] | None = None,
        on_failure: str = "raise",
        verify: bool = True,
        compensate: bool | str | Compensator = False,
        recalibrate: bool = False,
        pictures: bool = True,
        fit_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(importance, Selector):
            raise InputError(
                f"CoSePPruner: expected a selector of tp_cosep as importance, got {type(importance).__name__}; a stock pruner "
                "takes any other."
            )
        check_plain(model)
        automatic = pruning_ratio is None and options.get("ch_sparsity") is None
        check_pruner(
            pruning_ratio,
            global_pruning=global_pruning,
            is_ranked=not automatic and bool(global_pruning or options.get("isomorphic")),
            automatic=automatic,
            ranks_channels=importance.ranks_channels,
            on_failure=on_failure,
            calls={"fine_tune": fine_tune, "adapt": adapt},
            options=options,
        )
        self.target = check_target(target, automatic=automatic, options=options)
        if layerwise and loader is None:
            raise InputError("CoSePPruner: layerwise=True measures anew before every group; pass loader=.")
        self._trace_options = {k: v for k, v in options.items() if k in TRACE_OPTIONS}
        self.fit_options = check_fit_keywords(fit_options, importance.fit)
        self._recovery = Recovery(
            model,
            example_inputs,
            loader,
            compensate=compensate,
            recalibrate=recalibrate,
            trace_options=self._trace_options,
            fit_options=self.fit_options,
        )
        self.example_inputs = example_inputs
        self.automatic = automatic
        self.loader = loader
        self.layerwise = layerwise
        self.fine_tune = fine_tune
        self.adapt = adapt
        self.on_failure = on_failure
        self.verify = verify
        self.pictures = pictures
        self.plan = PruningPlan(
            options={"pruning_ratio": pruning_ratio, "global_pruning": global_pruning, "layerwise": layerwise}
            | ({} if target is None else {"target": dict(target)})
        )
        # The stock pruner writes into these, and its default dicts are shared by all pruners.
        if options.get("num_heads") is None:
            options["num_heads"] = attention_heads(model)
        for name in ("in_channel_groups", "out_channel_groups", "num_heads", "channel_groups"):
            options[name] = dict(options.get(name) or {})
        check_heads(model, options["num_heads"])
        options["ignored_layers"] = resolve_layers(model, options.get("ignored_layers"), "ignored_layers")
        options["ignored_layers"] += [model.get_parameter(n) for n in head_parameters(model, options["num_heads"])]
        options["pruning_ratio_dict"] = resolve_ratios(model, options.get("pruning_ratio_dict"))
        try:
            with tracing(model):
                super().__init__(
                    model,
                    example_inputs,
                    importance,
                    global_pruning=global_pruning,
                    pruning_ratio=0.0 if automatic else pruning_ratio,
                    **{**options, **trace_options(options)},
                )
        except Exception as error:
            # The stock constructor traces after it has noted what is ignored.
            if "ignored_params" in vars(self) and "DG" not in vars(self):
                raise PruningError(cannot_follow(error, model, example_inputs, options.get("forward_fn"))) from error
            raise
        names = {p: name for name, p in model.named_parameters()}
        self.plan = replace(
            self.plan,
            ignored_params=tuple(names[p] for p in self.ignored_params),
            structure=structure_of(model),
            inputs=describe_inputs(example_inputs),
            versions=versions(),
        )
        self.planner = Planner(self)
        self._check = OutputCheck(model, self.run)
        self._names: list[str] | None = None
        # Entries of groups that are due, and of groups that nothing is done to.
        self._pending: dict[tuple[nn.Module, str], GroupPlan] = {}
        self._left: list[GroupPlan] = []

    @property
    def compensator(self) -> Compensator | None:
        """The compensator; ``None`` without one."""
        return self._recovery.compensator

    def run(self, model: nn.Module | None = None) -> Any:
        """Run the model, or a copy of it, on the example inputs."""
        return (self._trace_options.get("forward_fn") or run_model)(
            self.model if model is None else model, self.example_inputs
        )

    def step(self, interactive: bool = False) -> Iterator[Any] | None:
        """Prune once: everything, or the next part of ``iterative_steps``.

        Args:
            interactive: Return a generator of groups and leave it to the caller to call ``group.prune()`` on
                each before asking for the next, or not to. Whatever is raised inside the generator puts the model back.

        Returns:
            The generator if ``interactive``, else ``None``.

        Raises:
            NotFittedError: If the selector saw no data and there is no ``loader``.
            InputError: If the moments do not fit the model.
            PruningError: If a group cannot be pruned or the model does not run afterwards.
        """
        run = self._run(prune=not interactive)
        if interactive:
            return run
        for _ in run:
            pass
        return None

    def preview(self, unit: str | None = None, n_points: int = 21) -> Preview:
        """What targets would leave, without touching the model.

        Args:
            unit: What is to be saved, ``"macs"``, ``"params"`` or ``"latency"``; by default that of ``target``, or
                ``"macs"``.
            n_points: Number of sizes between the whole model and the smallest one that the pruner's options allow.

        Returns:
            Multiply-accumulates, parameters, expected coverage and the counts of every group at each size; ``str``
            makes a table of it.

        Raises:
            NotFittedError: If the selector saw no data and there is no ``loader``.
            InputError: If the unit is unknown, or ``n_points`` < 1.
        """
        unit = unit or (self.target[0] if self.target is not None else "macs")
        if unit not in UNITS or n_points < 1:
            raise InputError(
                f"preview: expected a unit of {list(UNITS)} and n_points ≥ 1, got {unit!r} and {n_points!r}."
            )
        if self.loader is not None and not self.importance.is_fitted:
            self._fit()
        step = min(self.current_step + 1, self.iterative_steps)
        return trade_offs(self.planner.saved().budget(step), self.model, self.run, unit, n_points)

    def _run(self, *, prune: bool) -> Iterator[Any]:
        """Yield groups; check, record and call back after each; undo everything if anything fails."""
        check_autograd()
        undo = self._undo()
        try:
            with restored_on_error(self.model):
                self.current_step += 1
                self._pending.clear()
                self._left.clear()
                self._check.expect_shapes()
                costs = layer_costs(self.model, self.run)
                if self.loader is not None and (self.current_step > 1 or not self.importance.is_fitted):
                    self._fit()
                self._recovery.measure()
                for group in self._prune():
                    yield from self._visit(group, prune=prune)
                    if self.layerwise:
                        self._recovery.finish(self.fine_tune)
                for group_plan in (*self._pending.values(), *self._left):
                    self._record(group_plan.without(()))
                self._pending.clear()
                self._record_unvisited()
                if not self.layerwise:
                    self._recovery.finish(self.fine_tune)
                after = layer_costs(self.model, self.run)
                if self.target is not None:
                    self.planner.check_target(after)
                if self.compensator is not None:
                    self.plan = replace(self.plan, new_biases=tuple(self.compensator.new_biases))
                self.plan = replace(self.plan, costs=costs_beside(self.plan.costs, costs, after))
        except BaseException as error:
            # An interactive caller who stops early keeps what was pruned so far.
            if not isinstance(error, GeneratorExit):
                undo()
            raise

    def _visit(self, group: Any, *, prune: bool) -> Iterator[Any]:
        """Prune a group, or let the caller; with ``on_failure="skip"`` take a failure back and go on."""
        group_plan = self._with_heads_left(self._pending.pop(self._key(group)))
        plan, num_heads, channel_groups = self.plan, dict(self.num_heads), dict(self.out_channel_groups)
        put_back = self._recovery.saved()
        try:
            with restored_on_error(self.model) if self.on_failure == "skip" else nullcontext():
                yield from self._attempt(group, group_plan, prune=prune)
        except PruningError as error:
            if self.on_failure != "skip":
                raise
            self.plan = plan
            put_back()
            for now, before in ((self.num_heads, num_heads), (self.out_channel_groups, channel_groups)):
                now.clear()
                now.update(before)
            self.DG = self._trace()
            self._left.append(
                replace(group_plan, selection=None, reason=f"cannot be pruned: {error.__cause__ or error}")
            )

    def _attempt(self, group: Any, group_plan: GroupPlan, *, prune: bool) -> Iterator[Any]:
        left = replace(group_plan, selection=None, reason="the caller did not prune it")
        native, is_current = group.prune, True

        def prune_and_record(idxs: list[int] | None = None, record_history: bool = True) -> None:
            if group_plan.heads and not is_current:
                raise PruningError(
                    f"layer {group_plan.name!r}: its group was to be pruned before the next one was asked for: whole heads "
                    "and their dimensions are groups of their own, one after the other."
                )
            n_now, n_then = self._n_channels(group), group_plan.selection.n_channels if group_plan.selection else 0
            if n_now != n_then:
                raise PruningError(
                    f"layer {group_plan.name!r}: the choice was made among {n_then} channels, the layer has {n_now} now; "
                    "prune the groups of one step in the order in which they come."
                )
            gone = list(group[0].idxs if idxs is None else idxs)
            going = group
            if idxs is not None:
                going = build_group(self.DG, group[0].dep.target.module, group_plan.side, gone, group_plan.heads)
            self._recovery.before(going)
            if self.verify and not group_plan.heads:
                self._check.expect_without(going)
            prune_group(self.model, lambda: native(idxs, record_history), n_now, gone, group_plan.heads)
            self._follow_heads(group_plan)
            # A caller who collects the groups first prunes those that are recorded as left out already.
            self.plan = replace(self.plan, groups=tuple(g for g in self.plan if g is not left))
            self._record(group_plan.without(gone))

        group.prune = prune_and_record
        n_plans = len(self.plan)
        if prune:
            _prune_now(group, group_plan.name)
        yield group
        is_current = False
        if len(self.plan) == n_plans:
            self._record(left)
            return
        if self.adapt is not None:
            self.adapt(self.model)
        self._check(group_plan.name)

    def _prune(self) -> Iterator[Any]:
        if self._is_ranked and not self.layerwise:
            yield from super()._prune()
            return
        if self.current_step > self.iterative_steps:
            warnings.warn(
                f"step: this would exceed the maximum iterative steps, {self.iterative_steps}; nothing is pruned.",
                stacklevel=4,
            )
            return
        if not self.layerwise:
            if self.target is not None:
                self.planner.allocate_counts()
            yield from self._prune_chosen(None)
            return
        self.planner.begin()
        self._fit()
        if self.target is not None:
            self.planner.allocate_counts()
        # Moments come in the order in which the layers ran.
        for i, name in enumerate(self.importance.layers):
            if i and self.planner.has_begun:
                self._fit()
                self._recovery.measure()
            yield from self._prune_chosen(name)

    def _prune_chosen(self, current: str | None) -> Iterator[Any]:
        # Moments belong to the unpruned layers, so every choice is made before the first group is pruned.
        for group_plan in list(self.planner.group_plans(current)):
            if group_plan.selection is None or not group_plan.selection.prune_idxs:
                self._left.append(group_plan)
                continue
            layer = self.model.get_submodule(group_plan.name)
            group = build_group(self.DG, layer, group_plan.side, group_plan.selection.prune_idxs, group_plan.heads)
            if self.DG.check_pruning_group(group):
                self._pending[self._key(group)] = group_plan
                yield group
            else:
                reason = "Torch-Pruning refuses: a layer of it would lose all its channels"
                self._left.append(replace(group_plan, selection=None, reason=reason))

    @torch.no_grad()
    def estimate_importance(self, group: Any) -> Tensor | None:
        """Scores of a group for the stock pruner, which ranks them against those of other groups.

        Returns:
            ``[channels]``, or ``None`` to leave the group alone.
        """
        selector: Selector = self.importance
        scores: Tensor | None = None
        try:
            view = self.planner.view(group)
            group_plan = self.planner.group_plan(group, view)
            if not group_plan.reason:
                selection = selector.select(group, view=view)
                scores = selector.scores(group, self.num_heads, selection)
                reason = "ranked against other layers" if scores is not None else NOT_MEASURED
                group_plan = self.planner.with_embedding(
                    group, view, replace(group_plan, selection=selection, reason=reason)
                )
        except InputError as error:
            scores, group_plan = None, self.planner.refused(group, error)
        self._pending[self._key(group)] = group_plan
        return scores

    @property
    def _is_ranked(self) -> bool:
        """Whether the stock pruner ranks channels of several layers for one ratio."""
        return not self.automatic and bool(self.global_pruning or self.isomorphic)

    def _fit(self) -> None:
        selector: Selector = self.importance
        assert self.loader is not None
        if self._names is None:
            self._names = self.planner.measured_layers()
        options = {"layers": self._names, "num_heads": self.num_heads, **self.fit_options}
        selector.fit(self.model, self.loader, **options)

    def _with_heads_left(self, group_plan: GroupPlan) -> GroupPlan:
        """The entry with the numbers of heads that the stock pruner decided on, where it ranked them."""
        if not (self._is_ranked and group_plan.heads):
            return group_plan
        left = {name: self.num_heads[self.model.get_submodule(name)] for name in group_plan.heads}
        return replace(group_plan, heads={name: (before, left[name]) for name, (before, _) in group_plan.heads.items()})

    def _follow_heads(self, group_plan: GroupPlan) -> None:
        for name, (_, after) in group_plan.heads.items():
            layer = self.model.get_submodule(name)
            self.num_heads[layer] = self.out_channel_groups[layer] = after

    def _key(self, group: Any) -> tuple[nn.Module, str]:
        return group[0].dep.target.module, side_of(group)

    def _n_channels(self, group: Any) -> int:
        root, side = self._key(group)
        n: int = self.DG.get_out_channels(root) if side == "out" else self.DG.get_in_channels(root)
        return n

    def _record(self, group_plan: GroupPlan) -> None:
        self.plan = replace(self.plan, groups=(*self.plan.groups, group_plan))

    def _record_unvisited(self) -> None:
        """List the layers that no group showed to this pruner, so that the plan hides nothing."""
        planned = self.planner.seen | {name for group_plan in self.plan for name in group_plan.layers}
        for name, layer in measured_layers(self.model, self.importance.channel_dims).items():
            if name in planned:
                continue
            reason = "in ignored_layers, or pruned only together with a layer that is"
            if layer not in self.DG.module2node:
                reason = (
                    "Torch-Pruning's trace did not reach it: it runs without gradients, in training mode or on other "
                    "inputs only"
                )
            self._record(GroupPlan(name, "out", (name,), None, reason))

    def _undo(self) -> Callable[[], None]:
        """Remember the pruner's own state; the function puts it back and traces the restored model anew."""
        names = ("current_step", "plan", *_STATE_DICTS)
        state = {n: copy(getattr(self, n)) for n in names}
        state["planner"] = self.planner.saved()
        put_back = self._recovery.saved()

        def undo() -> None:
            self.__dict__.update(state)
            put_back()
            try:
                self.DG = self._trace()
            except Exception as error:
                warnings.warn(
                    f"step: cannot trace the restored model again ({error}); make a new pruner.", stacklevel=2
                )

        return undo

    def _trace(self) -> Any:
        return trace(self.model, self.example_inputs, ignored_params=self.ignored_params, **self._trace_options)


def _prune_now(group: Any, name: str) -> None:
    """Prune a group; whatever fails is for Torch-Pruning to answer for, but for the data of a repair."""
    try:
        group.prune()
    except InputError:
        raise
    except Exception as error:
        raise PruningError(
            f"layer {name!r}: Torch-Pruning failed to prune its group ({type(error).__name__}: {error}); "
            "the model is as it was. Put this layer into ignored_layers, ask for a count that it can have "
            "(round_to, num_heads), or leave such groups alone with on_failure='skip'."
        ) from error
