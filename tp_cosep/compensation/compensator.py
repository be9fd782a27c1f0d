"""Compensation while Torch-Pruning prunes: consumers of a group are refitted to compensate for the pruned channels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from math import inf
from numbers import Integral
from typing import Any

import torch
from torch import nn

from tp_cosep.calibration.reduce import merged_seconds
from tp_cosep.compensation.losses import check_measured, with_lost_inputs, with_lost_outputs
from tp_cosep.compensation.masked_norms import normalised_without
from tp_cosep.compensation.refit import ConsumerState, Refit, Solution, apply, refit_to_original, refit_without
from tp_cosep.compensation.sequential import paired_moments
from tp_cosep.errors import InputError, NotFittedError
from tp_cosep.graph.consumers import find_consumers, sampling_inputs
from tp_cosep.graph.groups import DependencyGroup, graph_of
from tp_cosep.graph.heads import attention_heads
from tp_cosep.graph.patches import Patches
from tp_cosep.graph.tracing import TRACE_OPTIONS, check_plain
from tp_cosep.utils.checks import is_count, is_number
from tp_cosep.utils.data import CalibrationData, check_loader, evaluating, n_samples, run_model
from tp_cosep.utils.distributed import agreed, is_distributed
from tp_cosep.utils.sampling import PositionSampler
from tp_cosep.utils.snapshot import restored_on_error

__all__ = ["MODES", "Compensator"]

#: How consumers are refitted: once per group, on inputs of the unpruned model; or again, on inputs of the pruned model.
MODES = ("one-shot", "sequential")


class Compensator:
    """Refits the consumers of a Torch-Pruning group, in closed form and without labels, just before it is pruned.

    It works with any importance and any pruner::

        compensator = Compensator(model, example_inputs).fit(loader)
        for group in pruner.step(interactive=True):
            compensator(group)
            group.prune()

    A consumer's removed inputs are predicted from its kept ones, by ridge regression on the second moments of its
    inputs (:mod:`tp_cosep.functional.least_squares`), so its outputs change as little as possible for a linear layer.
    If a removed channel is a linear combination of kept ones, they do not change. The constant part goes into the bias.
    If there is none, it is subtracted from the running mean of a BatchNorm that is the only consumer, or a bias is
    added.

    Kernel positions (padding included) have coefficients of their own in layers of up to ``max_features`` features,
    which compensates far more. In larger layers all kernel positions of a channel share them: then an error remains
    near borders for channels with a constant part, and padding counts as zeros with its frequency. The same holds for
    the positions of a flattened map in a linear layer.

    LayerNorms and GroupNorms between a group and its consumers take statistics over channels, which pruning changes.
    Only sequential mode accounts for that, in the fit and in its errors; use it for transformers.

    The default ridge is the best on held-out data (halves of every batch are fitted and held out in turn, so it may
    depend on the batches) among those that do not make a layer much more sensitive to its inputs, since pruning other
    groups changes these: :func:`tp_cosep.functional.least_squares.fit_linear`.

    Convolutions of any kernel, stride, dilation and number of channel groups, transposed ones (without a constant), and
    linear layers are refitted. Depthwise convolutions mix no channels and are left alone, as are other consumers
    (``MultiheadAttention``, recurrent layers, custom layers) and attention logits, which :attr:`refits` records.

    Args:
        model: The unpruned model.
        example_inputs: Inputs for tracing.
        mode: ``"one-shot"`` fits to inputs of the unpruned model. ``"sequential"`` then measures, before each group,
            its consumers' inputs x′ in the pruned model, and fits to the outputs of the original,
            ``min ‖W x − W′ x′‖²``, so that errors do not accumulate. It keeps a copy of the model, and every group
            costs two passes over the loader, which has to give the same data every time.
        max_positions: Sampled positions per sample of a convolution's map (or rows of a linear layer); by default as
            many as cost a third of the layer's own products, from 3 to 12.
        max_features: Largest number of features, kernel positions included, for which kernel positions have
            coefficients of their own; ≥ 0.
        ridge: Ridge strength > 0, in units of an input's variance; selected per channel group by default.
        memory_budget: Bytes for the second moments.
        seed: Seed of the sampled positions.
        forward_fn: ``forward_fn(model, inputs)`` runs the model; by default the inputs are its arguments.
        **trace_options: Options of the trace: ``unwrapped_parameters``, ``output_transform``, ``customized_pruners``.

    Attributes:
        refits: One :class:`Refit` per consumer of every group so far.
        new_biases: Names of the layers to which a bias was added.

    Raises:
        InputError: If an option is unknown or out of range.

    Example:
        >>> import torch_pruning as tp
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> x = torch.randn(200, 8)
        >>> with torch.no_grad():  # the second half repeats the first, scaled
        ...     _ = model[0].weight[8:].copy_(2 * model[0].weight[:8])
        ...     _ = model[0].bias[8:].copy_(2 * model[0].bias[:8])
        >>> before = model(x)
        >>> compensator = Compensator(model, x[:1]).fit([x])
        >>> graph = tp.DependencyGraph().build_dependency(model, x[:1])
        >>> group = graph.get_pruning_group(model[0], tp.prune_linear_out_channels, list(range(8, 16)))
        >>> refits = compensator(group)
        >>> group.prune()
        >>> torch.allclose(model(x), before, atol=1e-5)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        mode: str = "one-shot",
        max_positions: int | None = None,
        max_features: int = 2304,
        ridge: float | None = None,
        memory_budget: int = 2**32,
        seed: int = 0,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        **trace_options: Any,
    ) -> None:
        self.model = model
        self.example_inputs = example_inputs
        self.mode = mode
        self.max_positions = max_positions
        self.max_features = max_features
        self.ridge = ridge
        self.memory_budget = memory_budget
        self.seed = seed
        self.forward_fn = forward_fn
        self.trace_options = trace_options
        _check_options(self)
        check_plain(model)
        self.refits: list[Refit] = []
        self.new_biases: list[str] = []
        self._consumers: dict[nn.Module, ConsumerState] = {}
        self._attention: set[nn.Module] = set()
        self._original: dict[nn.Module, nn.Module] = {}
        self._data: CalibrationData | None = None
        self._n_samples = 0

    @property
    def is_fitted(self) -> bool:
        """Whether :meth:`fit` was called."""
        return self._data is not None

    def fit(
        self,
        loader: Iterable[Any],
        *,
        target_fn: Callable[[Any], tuple[Any, Any]] | None = None,
        progress: bool = True,
    ) -> Compensator:
        """Measure the inputs of all consumers of prunable channels, in one pass and in eval mode.

        Args:
            loader: Batches of inputs, or of inputs and labels, which are ignored. A few hundred samples suffice for
                small networks; a layer with n features requires more than n positions over all samples.
            target_fn: Reads any other kind of batch: ``target_fn(batch) -> (inputs, labels)``.
            progress: Show a progress bar on a terminal.

        Returns:
            The compensator itself.

        Raises:
            InputError: If the loader gives nothing or can be read only once in sequential mode, the second moments
                need more than ``memory_budget``, or inputs are NaN or infinite.
        """
        check_loader(loader, "Compensator")
        if self.mode == "sequential" and is_distributed():
            raise InputError(
                "Compensator: mode='sequential' measures in a single process; under torch.distributed use "
                "mode='one-shot'."
            )
        if self.mode == "sequential" and iter(loader) is loader:
            raise InputError(
                "Compensator: mode='sequential' reads the data again for every group; pass a DataLoader or a list of "
                f"batches, got a {type(loader).__name__} that can be read once."
            )
        all_patches = find_consumers(
            self.model,
            self.example_inputs,
            max_features=self.max_features,
            forward_fn=self.forward_fn,
            **self.trace_options,
        )
        _check_memory(all_patches, self.memory_budget)
        consumers = {p.layer: ConsumerState.unpruned(name, p) for name, p in all_patches.items()}
        data = CalibrationData(loader, target_fn, progress=progress)
        n_seen = _measure(self, data, consumers)
        _warn_of_few(consumers.values())
        self._consumers, self._data, self._n_samples = consumers, data, n_seen
        self._attention = set(attention_heads(self.model))
        if self.mode == "sequential":
            original = deepcopy(self.model)
            self._original = dict(zip(self.model.modules(), original.modules(), strict=True))
        return self

    def run(self, model: nn.Module, inputs: Any) -> None:
        """Run a model on inputs, by ``forward_fn`` if there is one."""
        (self.forward_fn or run_model)(model, inputs)

    @torch.no_grad()
    def __call__(self, group: DependencyGroup) -> list[Refit]:
        """Refit the consumers of a group; call it just before ``group.prune()``.

        Refitted layers have zero weights for the pruned inputs, so the model is consistent even if the group is not
        pruned.

        Args:
            group: A group of a graph of this model.

        Returns:
            One record per consumer; they are also appended to :attr:`refits`.

        Raises:
            NotFittedError: Before :meth:`fit`.
            InputError: If the model is not the one that was measured; it is unchanged.
        """
        if not self.is_fitted:
            raise NotFittedError("Compensator: no data seen yet; call fit(loader) first.")
        self._consumers = {layer: consumer.settled() for layer, consumer in self._consumers.items()}
        check_measured(group, self.model, self._consumers)
        self._consumers = with_lost_outputs(group, self._consumers)
        losing, left_alone = with_lost_inputs(group, self.model, self._consumers, self._attention)
        sequential = self.mode == "sequential" and bool(losing)
        with restored_on_error(self.model) if sequential else nullcontext():
            # All are fitted before any is changed.
            refits = self._applied(group, [refit_without(c, self.ridge) for c in losing.values()])
            self._consumers.update(losing)
            if sequential:
                with normalised_without(group):
                    solutions = self._from_pruned(losing)
                refits = self._applied(group, solutions)
        self.refits += [*refits, *left_alone]
        return [*refits, *left_alone]

    def saved(self) -> Callable[[], None]:
        """Save the state; the returned function restores it, for a caller that restores the model, too."""
        state = {
            "refits": [*self.refits],
            "new_biases": [*self.new_biases],
            "_consumers": dict(self._consumers),
            "_attention": self._attention,
            "_original": self._original,
            "_data": self._data,
            "_n_samples": self._n_samples,
        }

        def restore() -> None:
            self.__dict__.update(state)

        return restore

    def _applied(self, group: DependencyGroup, solutions: Sequence[Solution]) -> list[Refit]:
        for solution in solutions:
            if apply(solution, self.model, graph_of(group), self._original):
                self.new_biases.append(solution.consumer.name)
        return [solution.refit for solution in solutions]

    def _from_pruned(self, losing: Mapping[nn.Module, ConsumerState]) -> list[Solution]:
        """Fit the consumers' inputs in the pruned model to their outputs in the original."""
        assert self._data is not None
        sums = paired_moments(
            self.model,
            self._original,
            losing,
            self._data,
            run=self.run,
            max_positions=self.max_positions,
            # Other positions for every group, so that errors are not estimated on the positions of earlier fits.
            seed=self.seed + 1 + len(self.refits),
            n_expected=self._n_samples,
        )
        return [
            refit_to_original(consumer, self._original[layer], sums[layer], self.ridge)
            for layer, consumer in losing.items()
        ]


def _measure(options: Compensator, data: CalibrationData, consumers: Mapping[nn.Module, ConsumerState]) -> int:
    """Measure the inputs of all consumers; returns the number of samples."""
    moments = {consumer.name: consumer.moments for consumer in consumers.values()}
    patches = {consumer.name: consumer.patches for consumer in consumers.values()}

    def run() -> tuple[int, int]:
        n_batches, n_seen = 0, 0
        with evaluating(options.model):
            for _, inputs, _ in data.batches(data.adapter(options.model), "second moments"):
                positions = PositionSampler(inputs, options.seed)
                with sampling_inputs(
                    patches,
                    positions,
                    lambda name, rows: moments[name].update(rows),
                    max_positions=options.max_positions,
                ):
                    options.run(options.model, inputs)
                n_batches += 1
                n_seen += n_samples(inputs) or 0
        return n_batches, n_seen

    n_batches, n_seen = agreed(run)
    merged_seconds(list(moments.values()))
    if not n_batches and not any(m.n_rows for m in moments.values()):
        raise InputError("Compensator: expected at least one batch, the loader gave none.")
    return n_seen


def _warn_of_few(consumers: Iterable[ConsumerState]) -> None:
    """Warn of layers with so little data that a refit may do harm."""
    few = [(c.name, c.moments.n_rows, c.moments.n_features) for c in consumers if c.moments.n_rows]
    few = [(name, n, f) for name, n, f in few if n < f / 4]
    if few:
        shown = ", ".join(f"{name!r} {n} for {f}" for name, n, f in few[:3])
        warnings.warn(
            f"Compensator: few samples for the inputs of {len(few)} layers (positions for features: {shown}); a refit "
            "may do harm there. Use more data, or lower max_features.",
            stacklevel=3,
        )


def _check_memory(all_patches: Mapping[str, Patches], budget: int) -> None:
    """Refuse second moments that exceed the memory budget."""
    sizes = sorted(((16 * (r.n_features + 1) ** 2, name) for name, r in all_patches.items()), reverse=True)
    needed = sum(size for size, _ in sizes)
    if needed > budget:
        largest = ", ".join(f"{name!r} {size / 2**20:,.0f} MiB" for size, name in sizes[:3])
        raise InputError(
            f"Compensator: the second moments need {needed / 2**20:,.0f} MiB, the memory_budget is "
            f"{budget / 2**20:,.0f} MiB (the largest: {largest}); raise memory_budget, or lower max_features to share "
            "coefficients between kernel positions."
        )


def _check_options(options: Compensator) -> None:
    """Refuse options that are unknown or out of range."""
    o = options
    if o.mode not in MODES:
        raise InputError(f"Compensator: expected mode of {list(MODES)}, got {o.mode!r}.")
    if o.max_positions is not None and not is_count(o.max_positions):
        raise InputError(f"Compensator: expected max_positions ≥ 1 or None, got {o.max_positions!r}.")
    if not (is_count(o.max_features) or (isinstance(o.max_features, Integral) and o.max_features == 0)):
        raise InputError(f"Compensator: expected max_features ≥ 0, a whole number, got {o.max_features!r}.")
    if o.ridge is not None and not (is_number(o.ridge) and 0 < o.ridge < inf):
        raise InputError(f"Compensator: expected ridge > 0 or None, got {o.ridge!r}.")
    if not (is_number(o.memory_budget) and o.memory_budget > 0):
        raise InputError(f"Compensator: expected memory_budget > 0, in bytes, got {o.memory_budget!r}.")
    if not isinstance(o.seed, Integral):
        raise InputError(f"Compensator: expected seed to be a whole number, got {o.seed!r}.")
    if o.forward_fn is not None and not callable(o.forward_fn):
        raise InputError(f"Compensator: expected forward_fn to be a function or None, got {o.forward_fn!r}.")
    if unknown := set(o.trace_options) - set(TRACE_OPTIONS):
        raise InputError(
            f"Compensator: got unknown options {sorted(unknown)}; for tracing it takes {sorted(TRACE_OPTIONS)}."
        )
