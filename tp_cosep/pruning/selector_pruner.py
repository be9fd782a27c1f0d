"""The pruner's side of a step: what :class:`tp_cosep.pruning.step.PruningStep` asks of it, and Torch-Pruning does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from tp_cosep.compensation.compensator import Compensator
from tp_cosep.compensation.recovery import Recovery
from tp_cosep.errors import InputError
from tp_cosep.graph.tracing import trace
from tp_cosep.graph.verification import OutputCheck
from tp_cosep.pruning.plan import PruningPlan
from tp_cosep.pruning.planner import Planner, PlannerMemory, Subject
from tp_cosep.pruning.settings import PruneSettings
from tp_cosep.pruning.step import PruningStep, key_of
from tp_cosep.selection.scored import ScoreSelector
from tp_cosep.selection.selector import Selector
from tp_cosep.utils.data import run_model

__all__ = ["SelectorPruner"]


class SelectorPruner(tp.pruner.BasePruner):  # type: ignore[misc]
    """Torch-Pruning's pruner with a selector, or an importance in its place: the part that steps work with.

    :class:`tp_cosep.CoSePPruner` sets all attributes.
    """

    plan: PruningPlan
    selector: Selector | ScoreSelector
    settings: PruneSettings
    memory: PlannerMemory
    recovery: Recovery
    output_check: OutputCheck
    example_inputs: Any
    loader: Iterable[Any] | None
    fit_options: dict[str, Any]
    _trace_options: dict[str, Any]
    _observed: list[str] | None
    _step: PruningStep | None

    @property
    def compensator(self) -> Compensator | None:
        """The compensator; ``None`` without one."""
        return self.recovery.compensator

    def run(self, model: nn.Module | None = None) -> Any:
        """Run the model, or a copy of it, on the example inputs."""
        return (self._trace_options.get("forward_fn") or run_model)(
            self.model if model is None else model, self.example_inputs
        )

    def planner(self, memory: PlannerMemory | None = None, step: int | None = None) -> Planner:
        """What plans the groups of the model as it is.

        Args:
            memory: What is remembered of earlier steps; by default the pruner's own.
            step: Number of the step; by default the current one.

        Returns:
            The planner.
        """
        subject = Subject(
            self.model,
            self.example_inputs,
            self.DG,
            self.num_heads,
            self.in_channel_groups,
            self.out_channel_groups,
            self.run,
            self._check_pruning_ratio,
        )
        return Planner(
            self.selector,
            self.settings,
            subject,
            self.memory if memory is None else memory,
            self.current_step if step is None else step,
        )

    @torch.no_grad()
    def estimate_importance(self, group: Any) -> Tensor | None:
        """Scores of a group for the stock pruner, which ranks them against those of other groups.

        Returns:
            ``[channels]``, or ``None`` to leave the group alone.
        """
        planner = self.planner()
        scores: Tensor | None = None
        try:
            view = planner.view(group)
            plan = planner.unselected(group, view)
            if not plan.reason:
                selection = self.selector.select(group, view=view)
                scores = self.selector.scores(group, self.num_heads, selection)
                reason = "ranked against other layers" if scores is not None else self.selector.unmeasured
                plan = planner.with_embedding(view, replace(plan, selection=selection, reason=reason))
        except InputError as error:
            scores, plan = None, planner.refused(group, error)
        if self._step is not None:
            self._step.planned[key_of(group)] = plan
        return scores

    def fit(self) -> None:
        """Collect the selector's statistics of the model as it is; an importance in its place has none."""
        if isinstance(self.selector, ScoreSelector):
            return
        assert self.loader is not None  # those who call it have looked
        if self._observed is None:
            self._observed = self.planner().layers()
        options = {"layers": self._observed, "num_heads": self.num_heads, **self.fit_options}
        self.selector.fit(self.model, self.loader, **options)

    def ranked_groups(self) -> Iterator[Any]:
        """The groups of the stock pruner, which ranks channels of several layers.

        Yields:
            The groups, each with the channels that are to be removed.
        """
        yield from self._prune()

    def retrace(self) -> Any:
        """Trace the model as it is.

        Returns:
            Its dependency graph.
        """
        return trace(self.model, self.example_inputs, ignored_params=self.ignored_params, **self._trace_options)
