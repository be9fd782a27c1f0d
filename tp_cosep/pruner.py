"""A Torch-Pruning pruner that takes its counts from CoSeP and never leaves a model half pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import copy
from dataclasses import replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.ops import OPTYPE

from tp_cosep.collect import MEASURED_TYPES, evaluating, run_model
from tp_cosep.errors import InputError, PruningError
from tp_cosep.groups import GroupView, frozen_kept, read_group, resolve_layers, resolve_ratios, trace, tracing
from tp_cosep.importance import CoSePSelector, ratio_for
from tp_cosep.plan import GroupPlan, PruningPlan
from tp_cosep.selection import ChannelSelection
from tp_cosep.snapshot import restored_on_error

__all__ = ["CoSePPruner"]

# What the stock pruner writes to while it prunes.
_STATE_DICTS = (
    "in_channel_groups",
    "out_channel_groups",
    "num_heads",
    "pruning_ratio_dict",
    "_layer_to_scope",
    "_scope_initial_channels",
    "_schedules",
    "_n_initial",
    "_pending",
    "_done",
)
_TRACE_OPTIONS = ("forward_fn", "output_transform", "unwrapped_parameters", "customized_pruners")


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
        loader: Calibration data to (re)fit the selector on, for ``layerwise`` and ``iterative_steps``.
        layerwise: Prune as the papers do: group after group in the order in which they run, with fresh
            moments for each.
        fine_tune: ``fine_tune(model)``, called after every group with ``layerwise``, else once at the end of
            a step.
        fit_options: Keywords for :meth:`CoSePSelector.fit`, such as ``target_fn``.
        **options: Every other keyword of ``tp.pruner.BasePruner``.

    Attributes:
        plan: What was kept in each group and why; grows with every step.

    Raises:
        InputError: If the options contradict each other.

    Example:
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
        importance: CoSePSelector,
        global_pruning: bool = False,
        pruning_ratio: float | None = None,
        *,
        loader: Iterable[Any] | None = None,
        layerwise: bool = False,
        fine_tune: Callable[[nn.Module], object] | None = None,
        fit_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(importance, CoSePSelector):
            raise InputError(
                f"CoSePPruner: expected a CoSePSelector as importance, got {type(importance).__name__}; a stock pruner "
                "takes any other."
            )
        automatic = pruning_ratio is None and options.get("ch_sparsity") is None
        if automatic and global_pruning:
            raise InputError(
                "CoSePPruner: global_pruning compares layers for one overall ratio, so it needs a pruning_ratio, got "
                "None; without it every layer has its own count."
            )
        if not automatic and pruning_ratio is not None and not 0 <= pruning_ratio <= 1:
            raise InputError(f"CoSePPruner: expected pruning_ratio in [0, 1] or None, got {pruning_ratio!r}.")
        if layerwise and loader is None:
            raise InputError("CoSePPruner: layerwise=True measures anew before every group; pass loader=.")
        self.example_inputs = example_inputs
        self.automatic = automatic
        self.loader = loader
        self.layerwise = layerwise
        self.fine_tune = fine_tune
        self.fit_options = fit_options or {}
        self.plan = PruningPlan(
            options={"pruning_ratio": pruning_ratio, "global_pruning": global_pruning, "layerwise": layerwise}
        )
        self._trace_options = {k: v for k, v in options.items() if k in _TRACE_OPTIONS}
        # The stock pruner writes into these, and its default dicts are shared by all pruners.
        for name in ("in_channel_groups", "out_channel_groups", "num_heads", "channel_groups"):
            options[name] = dict(options.get(name) or {})
        options["ignored_layers"] = resolve_layers(model, options.get("ignored_layers"), "ignored_layers")
        options["pruning_ratio_dict"] = resolve_ratios(model, options.get("pruning_ratio_dict"))
        with tracing(model):
            super().__init__(
                model,
                example_inputs,
                importance,
                global_pruning=global_pruning,
                pruning_ratio=0.0 if automatic else pruning_ratio,
                **options,
            )
        self._told = dict(self.pruning_ratio_dict)
        self._schedules: dict[tuple[nn.Module, str], list[float]] = {}
        self._n_initial: dict[tuple[nn.Module, str], int] = {}
        self._pending: dict[tuple[nn.Module, str], GroupPlan] = {}
        # Layerwise: the layer whose group is due, and the groups that had their turn.
        self._due: nn.Module | None = None
        self._done: set[tuple[nn.Module, str]] = set()

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

    def _run(self, *, prune: bool) -> Iterator[Any]:
        """Yield groups; check, record and call back after each; undo everything if anything fails."""
        undo = self._undo()
        try:
            with restored_on_error(self.model):
                self.current_step += 1
                self._pending.clear()
                shapes = self._output_shapes()
                if self.loader is not None and (self.current_step > 1 or not self.importance.moments):
                    self._fit()
                for group in self._prune():
                    yield from self._visit(group, shapes, prune=prune)
                    if self.layerwise and self.fine_tune is not None:
                        self.fine_tune(self.model)
                for entry in self._pending.values():
                    self._record(entry.without(()))
                self._pending.clear()
                self._record_unvisited()
                if not self.layerwise and self.fine_tune is not None:
                    self.fine_tune(self.model)
        except BaseException as error:
            # An interactive caller who stops early keeps what was pruned so far.
            if not isinstance(error, GeneratorExit):
                undo()
            raise

    def _visit(self, group: Any, shapes: list[tuple[int, ...]], *, prune: bool) -> Iterator[Any]:
        entry = self._pending.pop(self._key(group))
        left = replace(entry, selection=None, reason="the caller did not prune it")
        native = group.prune

        def prune_and_record(idxs: list[int] | None = None, record_history: bool = True) -> None:
            with frozen_kept(self.model):
                native(idxs, record_history)
            # A caller who collects the groups first prunes those that are recorded as left out already.
            self.plan = replace(self.plan, groups=tuple(g for g in self.plan if g is not left))
            self._record(entry.without(group[0].idxs if idxs is None else idxs))

        group.prune = prune_and_record
        n_entries = len(self.plan)
        if prune:
            try:
                group.prune()
            except Exception as error:
                raise PruningError(
                    f"layer {entry.name!r}: Torch-Pruning failed to prune its group ({type(error).__name__}: {error}); "
                    "the model is as it was. Put this layer into ignored_layers, or ask for a count that it can "
                    "have (round_to, num_heads)."
                ) from error
        yield group
        if len(self.plan) == n_entries:
            self._record(left)
        else:
            self._check_output(entry.name, shapes)

    def _prune(self) -> Iterator[Any]:
        if not self.layerwise:
            yield from super()._prune()
            return
        self._done.clear()
        self._fit()
        # Moments come in the order in which the layers ran.
        for i, layer in enumerate([self.model.get_submodule(name) for name in self.importance.moments]):
            self._due = layer
            if i and self._done:
                self._fit()
            yield from super()._prune()
        self._due = None

    @torch.no_grad()
    def estimate_importance(self, group: Any) -> Tensor | None:
        """Scores of a group; its count goes to the stock pruner as a ratio of a scope of its own.

        Returns:
            ``[channels]``, or ``None`` to leave the group alone.
        """
        view = read_group(group, self.in_channel_groups, self.out_channel_groups)
        key = self._key(group)
        if self._due is not None:
            if key in self._done or all(m.layer is not self._due for m in view.members):
                return None
            self._done.add(key)
        measured = [m.name for m in view.members if isinstance(m.layer, MEASURED_TYPES)]
        layers = tuple(measured or (m.name for m in view.members))
        entry = GroupPlan(view.name, key[1], layers, None, "")
        selection: ChannelSelection | None = None
        if self._is_output(group):
            reason = "its channels are the model's output"
        else:
            selection, reason = self._select(group, view)
        self._pending[key] = replace(entry, selection=selection, reason=reason)
        return None if selection is None else selection.scores

    def _select(self, group: Any, view: GroupView) -> tuple[ChannelSelection | None, str]:
        """Selection of a group with the count that this step is to keep, and how that count came about."""
        selector: CoSePSelector = self.importance
        selection: ChannelSelection | None = None
        key = self._key(group)
        n = self._n_initial.setdefault(key, view.n_components)
        told = next((self._told[m.layer] for m in view.members if m.layer in self._told), None)
        if told is not None:
            reason, schedule = "pruning_ratio_dict", told
        elif self.automatic:
            reason, schedule = "knee" if selector.is_automatic else "count set in the selector", []
            if key not in self._schedules:
                selection = selector.select(group, view=view)
                k = selection.k if selection is not None else n
                self._schedules[key] = self.iterative_pruning_ratio_scheduler(ratio_for(k, n), self.iterative_steps)
            schedule = self._schedules[key]
        elif self._is_ranked:
            return selector.select(group, view=view), "ranked against other layers"
        else:
            reason, schedule = "pruning_ratio", self.per_step_pruning_ratio
        n_keep = self._rounded(int(n * (1 - min(schedule[self.current_step], self.max_pruning_ratio))), view)
        if selection is None or selection.k != n_keep:
            selection = selector.select(group, view=view, n_keep=n_keep)
        if selection is None:
            return None, "none of its layers could be measured"
        if not (told is not None and self.global_pruning):
            self._dictate(key, view, n_keep, n)
        return selection, _knee_in_words(selection) if reason == "knee" else reason

    def _dictate(self, key: tuple[nn.Module, str], view: GroupView, n_keep: int, n: int) -> None:
        """Make the stock pruner keep exactly ``n_keep`` of n: a scope of the group's own, with the ratio for it."""
        scope = (f"CoSeP {view.name} {key[1]}", [m.layer for m in view.members])
        for member in view.members:
            self._layer_to_scope[member.layer] = scope
            self.pruning_ratio_dict[member.layer] = [ratio_for(n_keep, n)] * (self.iterative_steps + 1)

    def _rounded(self, n_keep: int, view: GroupView) -> int:
        """At least one, at most all, and the nearest multiple of ``round_to`` within that."""
        n = view.n_components
        if self.round_to:
            n_keep = max(1, round(n_keep / self.round_to)) * self.round_to
        return min(max(n_keep, 1), n)

    @property
    def _is_ranked(self) -> bool:
        """Whether the stock pruner ranks channels of several layers for one ratio."""
        return not self.automatic and bool(self.global_pruning or self.isomorphic)

    def _round_to(self, n_pruned: int, current_channels: int, round_to: int) -> int:
        if not self._is_ranked:
            return n_pruned  # the count was rounded before the channels were chosen, see _rounded
        n: int = super()._round_to(n_pruned, current_channels, round_to)
        return n

    def _fit(self) -> None:
        self.importance.fit(self.model, self.loader, **self.fit_options)

    def _is_output(self, group: Any) -> bool:
        """Whether something that loses channels has nothing behind it but the caller of the model."""
        return any(
            dep.target.type == OPTYPE.OUTPUT or not dep.target.outputs
            for dep, _ in group
            if self.DG.is_out_channel_pruning_fn(dep.handler)
        )

    def _key(self, group: Any) -> tuple[nn.Module, str]:
        dep = group[0].dep
        return dep.target.module, "out" if self.DG.is_out_channel_pruning_fn(dep.handler) else "in"

    def _n_channels(self, group: Any) -> int:
        root, side = self._key(group)
        n: int = self.DG.get_out_channels(root) if side == "out" else self.DG.get_in_channels(root)
        return n

    def _record(self, entry: GroupPlan) -> None:
        self.plan = replace(self.plan, groups=(*self.plan.groups, entry))

    def _record_unvisited(self) -> None:
        """List the measured layers that no group showed to this pruner, so that the plan hides nothing."""
        planned = {name for entry in self.plan for name in entry.layers}
        modules = dict(self.model.named_modules())
        for name in self.importance.moments:
            if name in planned or name not in modules:
                continue
            reason = "in ignored_layers, or pruned only together with a layer that is"
            if modules[name] not in self.DG.module2node:
                reason = "Torch-Pruning's trace did not reach it: it runs without gradients, or on other inputs only"
            self._record(GroupPlan(name, "out", (name,), None, reason))

    def _output_shapes(self) -> list[tuple[int, ...]]:
        forward = self._trace_options.get("forward_fn") or run_model
        with evaluating(self.model):
            outputs = tp.utils.flatten_as_list(forward(self.model, self.example_inputs))
        return [tuple(t.shape) for t in outputs if isinstance(t, Tensor)] if isinstance(outputs, list) else []

    def _check_output(self, name: str, expected: list[tuple[int, ...]]) -> None:
        try:
            shapes = self._output_shapes()
        except Exception as error:
            raise PruningError(
                f"layer {name!r}: the model no longer runs on example_inputs after its group was pruned "
                f"({type(error).__name__}: {error}); the model is as it was. Put this layer into ignored_layers."
            ) from error
        if shapes != expected:
            raise PruningError(
                f"layer {name!r}: pruning its group changed the output from {expected} to {shapes}; the model is as it "
                "was. Put this layer into ignored_layers."
            )

    def _undo(self) -> Callable[[], None]:
        """Remember the pruner's own state; the function puts it back and traces the restored model anew."""
        names = ("current_step", "plan", *_STATE_DICTS)
        state = {n: copy(getattr(self, n)) for n in names}

        def undo() -> None:
            self.__dict__.update(state)
            self._due = None
            self.DG = trace(self.model, self.example_inputs, ignored_params=self.ignored_params, **self._trace_options)

        return undo


def _knee_in_words(selection: ChannelSelection) -> str:
    if selection.knee_k is None:
        return "all alike" if selection.k == 1 else "no knee"
    return f"knee at {selection.knee_k}" + (", guarded" if selection.k > selection.knee_k else "")
