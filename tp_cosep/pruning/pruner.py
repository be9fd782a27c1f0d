"""A Torch-Pruning pruner that takes its counts from a selector and never leaves a model half pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from tp_cosep.compensation.compensator import Compensator
from tp_cosep.compensation.recovery import Recovery
from tp_cosep.errors import InputError, PruningError
from tp_cosep.graph.structure import describe_inputs, structure_of, versions
from tp_cosep.graph.tracing import (
    TRACE_OPTIONS,
    cannot_follow,
    check_plain,
    trace_options,
    tracing,
)
from tp_cosep.graph.verification import OutputCheck
from tp_cosep.pruning.budget import Preview, trade_offs
from tp_cosep.pruning.costs import UNITS
from tp_cosep.pruning.plan import PruningPlan
from tp_cosep.pruning.planner import PlannerMemory
from tp_cosep.pruning.selector_pruner import SelectorPruner
from tp_cosep.pruning.settings import (
    PruneSettings,
    check_fit_keywords,
    check_pruner,
    check_scored,
    check_target,
    own_options,
)
from tp_cosep.pruning.step import PruningStep
from tp_cosep.pruning.targets import budget_of
from tp_cosep.selection.cosep import CoSePSelector
from tp_cosep.selection.scored import ScoreSelector, name_of
from tp_cosep.selection.selector import Selector

__all__ = ["CoSePPruner"]


class CoSePPruner(SelectorPruner):
    """Prune a model with a selector: automatic counts per layer, a ratio, or a size of the whole model.

    It is Torch-Pruning's ``BasePruner`` with another default: ``pruning_ratio=None`` keeps in every group the number at
    the guarded knee of the selector's own curve (the Mean Simplified Silhouette for :class:`tp_cosep.CoSePSelector`,
    the retained variance for :class:`tp_cosep.ReconstructionSelector`). A ratio removes that share of every layer; the
    selector chooses which channels. Every other keyword of the stock pruner means what it means there.

    Groups whose channels are the model's output are left alone, so the output keeps its shape. After every group the
    model runs on ``example_inputs``; if that, the pruning or a callback fails, the model is as it was before the call.
    The model's mode (train or eval) is kept.

    Args:
        model: The model, as it was when the selector was fitted.
        example_inputs: For tracing and for forward passes: a tensor, a tuple of arguments or a dict.
        importance: A selector; it need not be fitted if ``loader`` is given. By default a
            :class:`tp_cosep.CoSePSelector`. Or any importance of Torch-Pruning, or a function of a group that scores
            its channels: those with the highest scores are kept, as many as ``pruning_ratio`` or ``target`` say; with
            ``target`` a component's score, normalised as the importance does, is what its removal loses. It has no
            counts of its own.
        global_pruning: Rank channels over all layers for one ``pruning_ratio``, as in the stock pruner.
        pruning_ratio: Share of channels to remove, in [0, 1], or ``None`` for the selector's own counts.
        target: What the pruned model may cost: ``{"macs": 0.5}``, ``{"params": 2e6}`` or ``{"latency": 0.5}``; below 1
            a share of the original, above the number itself (:func:`tp_cosep.pruning.costs.measure_costs`), of a
            latency milliseconds for all of ``example_inputs`` on the model's device. Channels are removed from the
            groups that lose least for what they save (:func:`tp_cosep.pruning.budget.allocate`); for a latency, pruned
            copies are timed. ``round_to`` makes widths that hardware likes.
        loader: Calibration data, to fit the selector (again) on and for ``compensate`` and ``recalibrate``, which are
            on if it is given and can be read again (a DataLoader or a list, not a generator).
        layerwise: Prune as the papers do: group after group in the order in which they run, with statistics collected
            again for each.
        fine_tune: ``fine_tune(model)``, called after every group with ``layerwise``, else once at the end of a step.
        adapt: ``adapt(model)``, called after every group before the model runs again, to write new sizes into
            attributes that the model keeps for itself, such as ``model.hidden_dim = model.conv_proj.out_channels``.
            Numbers and sizes of attention heads are written already.
        on_failure: What to do about a group that cannot be selected or pruned, or after which the model does not run:
            ``"raise"``, or ``"skip"`` to leave it as it was, with the reason in the plan, and go on. Skipping takes
            memory for one more copy of the weights.
        verify: After every group, compare the outputs on ``example_inputs`` with those of the model with the removed
            channels masked; a difference means that Torch-Pruning has mixed up channels, and counts as a failure.
            Groups with layers that look at all channels at once (LayerNorm, attention) are not compared. Turn it off
            for models that do so by other means, such as a mean over channels.
        compensate: Refit the consumers of a group just before it is pruned, see :class:`tp_cosep.Compensator`: ``True``
            or a mode, ``"one-shot"`` or ``"sequential"``, with the data of ``loader``; a compensator of your own for
            this model, fitted or not; or ``False``. By default it is ``True`` with a ``loader``. After fine-tuning it
            is fitted again before it is used again.
        recalibrate: Re-estimate BatchNorm statistics on ``loader`` after each step (each group with ``layerwise``),
            before fine-tuning, see :func:`tp_cosep.recalibrate`: ``True``, ``False``, or ``"auto"``, the default with a
            ``loader``, to keep the new statistics only if they bring the outputs for held-out batches nearer to the
            unpruned model's. ``plan.options["recalibrated"]`` says whether they stayed.
        embed: Record in the plan what :meth:`PruningPlan.report` draws of each group: its channels in the plane, and
            the class pairs that their clusters tell apart.
        fit_options: Keywords for the selector's ``fit``, such as ``target_fn``, which compensation and ``recalibrate``
            read batches with too.
        **options: Every other keyword of ``tp.pruner.BasePruner``.

    Attributes:
        plan: What was kept in each group and why; grows with every step.
        compensator: The compensator, with its ``refits``; ``None`` without one.

    Raises:
        InputError: If the options contradict each other.
        PruningError: If the model does not run on the inputs, or Torch-Pruning cannot follow it.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 3))
        >>> x, y = torch.randn(40, 1, 8, 8), torch.arange(40) % 3
        >>> from tp_cosep import CoSePSelector
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
        importance: Selector | Callable[[Any], Tensor | None] | None = None,
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
        compensate: bool | str | Compensator | None = None,
        recalibrate: bool | str | None = None,
        embed: bool = True,
        fit_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if importance is None:
            if loader is None:
                raise InputError("CoSePPruner: expected an importance, or loader= to fit a CoSePSelector on.")
            importance = CoSePSelector()
        self.selector = importance if isinstance(importance, Selector) else ScoreSelector(importance)
        check_plain(model)
        automatic = pruning_ratio is None and options.get("ch_sparsity") is None
        is_ranked = not automatic and bool(global_pruning)
        check_pruner(
            pruning_ratio,
            global_pruning=global_pruning,
            is_ranked=is_ranked,
            automatic=automatic,
            ranks_channels=self.selector.ranks_channels,
            on_failure=on_failure,
            calls={"fine_tune": fine_tune, "adapt": adapt},
            options=options,
        )
        checked_target = check_target(target, automatic=automatic, options=options)
        if isinstance(self.selector, ScoreSelector):
            check_scored(importance, has_count=not automatic or target is not None, layerwise=layerwise)
        if layerwise and loader is None:
            raise InputError("CoSePPruner: layerwise=True collects statistics again before every group; pass loader=.")
        self._trace_options = {k: v for k, v in options.items() if k in TRACE_OPTIONS}
        self.fit_options = check_fit_keywords(
            fit_options, importance.fit if isinstance(importance, Selector) else Selector.fit
        )
        is_readable = loader is not None and not hasattr(loader, "__next__")
        self.recovery = Recovery(
            model,
            example_inputs,
            loader,
            compensate=is_readable if compensate is None else compensate,
            recalibrate=("auto" if is_readable else False) if recalibrate is None else recalibrate,
            trace_options=self._trace_options,
            fit_options=self.fit_options,
        )
        self.example_inputs = example_inputs
        self.loader = loader
        self._init_stock(model, importance, global_pruning, 0.0 if automatic else pruning_ratio, options)
        self.settings = PruneSettings.of(
            self,
            automatic=automatic,
            is_ranked=is_ranked,
            layerwise=layerwise,
            target=checked_target,
            on_failure=on_failure,
            verify=verify,
            embed=embed,
            adapt=adapt,
            fine_tune=fine_tune,
            trace_options=self._trace_options,
        )
        asked = {"importance": name_of(importance), "pruning_ratio": pruning_ratio}
        asked |= {"global_pruning": global_pruning, "layerwise": layerwise}
        self.plan = PruningPlan(
            options=asked | ({} if target is None else {"target": dict(target)}),
            ignored_params=self.settings.ignored_params,
            structure=structure_of(model),
            inputs=describe_inputs(example_inputs),
            versions=versions(),
        )
        self.memory = PlannerMemory()
        self.output_check = OutputCheck(model, self.run)
        self._observed: list[str] | None = None
        self._step: PruningStep | None = None

    def _init_stock(
        self, model: nn.Module, importance: Any, global_pruning: bool, ratio: float | None, options: dict[str, Any]
    ) -> None:
        """Initialise the stock pruner, with dictionaries of this pruner's own: it writes into them."""
        options = own_options(model, options)
        try:
            with tracing(model):
                super().__init__(
                    model,
                    self.example_inputs,
                    importance,
                    global_pruning=global_pruning,
                    pruning_ratio=ratio,
                    **{**options, **trace_options(options)},
                )
        except Exception as error:
            # The stock constructor traces after it has noted what is ignored.
            if "ignored_params" in vars(self) and "DG" not in vars(self):
                raise PruningError(
                    cannot_follow(error, model, self.example_inputs, options.get("forward_fn"))
                ) from error
            raise

    def step(self, interactive: bool = False) -> Iterator[Any] | None:
        """Prune once: everything, or the next part of ``iterative_steps``.

        Args:
            interactive: Return a generator of groups and leave it to the caller to call ``group.prune()`` on
                each before asking for the next, or not to. Whatever is raised inside the generator puts the model back.

        Returns:
            The generator if ``interactive``, else ``None``.

        Raises:
            NotFittedError: If the selector saw no data and there is no ``loader``.
            InputError: If the statistics do not fit the model.
            PruningError: If a group cannot be pruned or the model does not run afterwards.
        """
        self._step = PruningStep(self)
        run = self._step.run(prune=not interactive)
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
            Multiply-accumulates, parameters, retained variance and the counts of every group at each size; ``str``
            makes a table of it.

        Raises:
            NotFittedError: If the selector saw no data and there is no ``loader``.
            InputError: If the unit is unknown, or ``n_points`` < 1.
        """
        target = self.settings.target
        unit = unit or (target[0] if target is not None else "macs")
        if unit not in UNITS or n_points < 1:
            raise InputError(
                f"preview: expected a unit of {list(UNITS)} and n_points ≥ 1, got {unit!r} and {n_points!r}."
            )
        if self.loader is not None and not self.selector.is_fitted:
            self.fit()
        step = min(self.current_step + 1, self.iterative_steps)
        planner = self.planner(self.memory.copy(), step)
        return trade_offs(budget_of(planner), self.model, self.run, unit, n_points)
