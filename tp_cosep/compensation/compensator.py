"""Repair while Torch-Pruning prunes: the layers that read a group learn to do without the channels that go."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tp_cosep.calibration.reduce import merged_seconds
from tp_cosep.compensation.masked_norms import normalised_without
from tp_cosep.compensation.options import check_compensator
from tp_cosep.compensation.refit import ConsumerState, Refit, Solution, apply, refit_to_original, refit_without
from tp_cosep.compensation.sequential import paired_moments
from tp_cosep.errors import InputError, NotFittedError
from tp_cosep.graph.consumers import affordable, find_consumers, named, on_inputs
from tp_cosep.graph.groups import graph_of, module_names
from tp_cosep.graph.heads import attention_heads
from tp_cosep.graph.patches import Patches, has_computed_weight, patches_of
from tp_cosep.graph.tracing import check_plain
from tp_cosep.graph.tying import tied_parameters
from tp_cosep.utils.data import BatchAdapter, check_loader, evaluating, n_samples, progress_bar, run_model
from tp_cosep.utils.distributed import agreed, is_distributed
from tp_cosep.utils.sampling import PositionSampler
from tp_cosep.utils.snapshot import restored_on_error

__all__ = ["Compensator", "Solution"]


@dataclass(frozen=True)
class _Data:
    """Calibration data, to be read as often as needed.

    Attributes:
        n_samples: How many there were in ``fit``.
    """

    loader: Iterable[Any]
    target_fn: Callable[[Any], tuple[Any, Any]] | None
    progress: bool
    n_samples: int = 0

    def inputs(self, model: nn.Module) -> Iterator[Any]:
        """The inputs of every batch, on the model's device."""
        adapter = BatchAdapter(model, self.target_fn, predicted=True)
        for i, batch in enumerate(progress_bar(self.loader, self.loader, "second moments", shown=self.progress)):
            yield adapter.split(batch, i)[0]


class Compensator:
    """Refits the layers that read a Torch-Pruning group, in closed form and without labels, just before it is pruned.

    It serves any importance and any pruner::

        compensator = Compensator(model, example_inputs).fit(loader)
        for group in pruner.step(interactive=True):
            compensator(group)
            group.prune()

    What a reader loses is predicted from what it keeps, by ridge regression on the second moments of its inputs
    (:mod:`tp_cosep.functional.least_squares`), so its outputs change as little as any weights allow. If a removed channel is a
    linear combination of kept ones, they do not change. The constant part goes into the bias; a convolution
    without one that is followed by BatchNorm alone has it taken from the running mean, any other gets a bias.

    A kernel's taps have coefficients of their own (padding included) up to ``max_features`` features, which
    repairs much more; beyond that all taps of a channel share them, which near borders leaves an error where a
    channel has a constant part, and padding counts as zeros that are read as often as they are. Inputs of a
    linear layer behind a flattened map likewise.

    A LayerNorm or GroupNorm between a group and its readers averages over channels, and does it anew over those that
    stay; only sequential mode foresees that, and only its errors count it. Use it for transformers.

    The ridge is the one that does best on held-out data (of every batch one half for the other, so other batches may
    give another one) among those that do not make a layer much more sensitive to its inputs, since other groups change
    these: :func:`tp_cosep.functional.least_squares.fit_linear`.

    Convolutions of any kernel, stride, dilation and number of channel groups, transposed ones (without a constant), and
    linear layers are refitted. Depthwise convolutions mix no channels and stay; other readers (``MultiheadAttention``,
    recurrent layers, your own) and attention logits are left alone, and :attr:`refits` says so.

    Args:
        model: The model, unpruned.
        example_inputs: For tracing.
        mode: ``"one-shot"`` fits to inputs of the unpruned model. ``"sequential"`` goes on to measure, before each
            group, what its readers see in the pruned model, and fits that to the outputs of the original:
            ``min ‖W x − W′ x′‖²``, so that errors do not pile up. It keeps a copy of the model, and every group costs
            two passes over the loader, which has to give the same data again.
        max_positions: Positions per sample of a convolution's map (or rows of a linear layer) that are measured, drawn
            by chance; by default as many as cost a third of the layer's own products, from 3 to 12.
        max_features: See above.
        ridge: Ridge strength in units of an input's variance; by default as said above.
        memory_budget: Bytes that the second moments may take.
        seed: Of the positions.
        forward_fn: As for the pruner.
        **trace_options: As for the pruner: ``unwrapped_parameters``, ``output_transform``, ``customized_pruners``.

    Attributes:
        refits: One :class:`Refit` per reader of every group so far.
        new_biases: Names of the layers that were given a bias.

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
        check_compensator(
            mode=mode,
            max_positions=max_positions,
            max_features=max_features,
            ridge=ridge,
            memory_budget=memory_budget,
            seed=seed,
            forward_fn=forward_fn,
            trace_options=trace_options,
        )
        check_plain(model)
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
        self.refits: list[Refit] = []
        self.new_biases: list[str] = []
        self._consumers: dict[nn.Module, ConsumerState] = {}
        self._attention: set[nn.Module] = set()
        self._original: dict[nn.Module, nn.Module] = {}
        self._data: _Data | None = None

    @property
    def is_fitted(self) -> bool:
        """Whether anything was measured."""
        return self._data is not None

    def fit(
        self,
        loader: Iterable[Any],
        *,
        target_fn: Callable[[Any], tuple[Any, Any]] | None = None,
        progress: bool = True,
    ) -> Compensator:
        """Measure the inputs of all layers that read prunable channels, in one pass and in eval mode.

        Args:
            loader: Batches of inputs, or of inputs and labels, which are not looked at. Some hundred samples do
                for small networks; a layer with n features wants more than n positions of all samples.
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
        self._check_memory(all_patches)
        consumers = {r.layer: ConsumerState.whole(name, r) for name, r in all_patches.items()}
        data = _Data(loader, target_fn, progress)
        n_seen = self._measure(data.inputs(self.model), consumers)
        _warn_of_few(consumers.values())
        self._consumers, self._data = consumers, replace(data, n_samples=n_seen)
        self._attention = set(attention_heads(self.model))
        if self.mode == "sequential":
            original = deepcopy(self.model)
            self._original = dict(zip(self.model.modules(), original.modules(), strict=True))
        return self

    def _check_memory(self, all_patches: Mapping[str, Patches]) -> None:
        sizes = sorted(((16 * (r.n_features + 1) ** 2, name) for name, r in all_patches.items()), reverse=True)
        needed = sum(size for size, _ in sizes)
        if needed > self.memory_budget:
            largest = ", ".join(f"{name!r} {size / 2**20:,.0f} MiB" for size, name in sizes[:3])
            raise InputError(
                f"Compensator: the second moments need {needed / 2**20:,.0f} MiB, the memory_budget is "
                f"{self.memory_budget / 2**20:,.0f} MiB (the largest: {largest}); raise memory_budget, or lower "
                "max_features to share coefficients between the taps of kernels."
            )

    def _measure(self, batches: Iterable[Any], consumers: Mapping[nn.Module, ConsumerState]) -> int:
        """Take the moments of everything that is read; returns the number of samples."""

        def take(positions: PositionSampler, layer: nn.Module, x: Tensor) -> None:
            consumer = consumers[layer]
            with named(consumer.name):
                n = self.max_positions or affordable(consumer.patches, x.shape)
                consumer.moments.update(consumer.patches.sampler(x.shape, n, positions.for_layer(consumer.name))(x))

        def run() -> tuple[int, int]:
            n_batches, n_seen = 0, 0
            with evaluating(self.model):
                for inputs in batches:
                    n = n_samples(inputs)
                    if n != 0:
                        with on_inputs(consumers, partial(take, PositionSampler(inputs, self.seed))):
                            self._run(self.model, inputs)
                        n_batches += 1
                        n_seen += n or 0
            return n_batches, n_seen

        n_batches, n_seen = agreed(run)
        merged_seconds([consumer.moments for consumer in consumers.values()])
        if not n_batches and not any(consumer.moments.n_rows for consumer in consumers.values()):
            raise InputError("Compensator: expected at least one batch, the loader gave none.")
        return n_seen

    def _run(self, model: nn.Module, inputs: Any) -> None:
        (self.forward_fn or run_model)(model, inputs)

    @torch.no_grad()
    def __call__(self, group: Any) -> list[Refit]:
        """Refit what reads a group; call it just before ``group.prune()``.

        In layers that are refitted, weights of inputs that go become zero, so the model is consistent also if the group
        is not pruned.

        Args:
            group: A group of a graph of this model.

        Returns:
            One entry per reader; they are also added to :attr:`refits`.

        Raises:
            NotFittedError: Before :meth:`fit`.
            InputError: If the model is not the one that was measured. It stays as it was.
        """
        if not self.is_fitted:
            raise NotFittedError("Compensator: no data seen yet; call fit(loader) first.")
        self._consumers = {layer: r.settled() for layer, r in self._consumers.items()}
        losing, left_alone = self._losing(group)
        sequential = self.mode == "sequential" and bool(losing)
        with restored_on_error(self.model) if sequential else nullcontext():
            # All are fitted before any is changed.
            refits = self._applied(group, [refit_without(known, self.ridge) for known in losing.values()])
            self._consumers.update(losing)
            if sequential:
                with normalised_without(group):
                    solutions = self._from_pruned(losing)
                refits = self._applied(group, solutions)
        self.refits += [*refits, *left_alone]
        return [*refits, *left_alone]

    def saved(self) -> Callable[[], None]:
        """Remember what is known now; the function that is returned puts it back, for a model that is put back too."""
        state = {
            "refits": [*self.refits],
            "new_biases": [*self.new_biases],
            "_readers": dict(self._consumers),
            "_attention": self._attention,
            "_original": self._original,
            "_data": self._data,
        }

        def restore() -> None:
            self.__dict__.update(state)

        return restore

    def _check_measured(self, graph: Any, names: Mapping[nn.Module, str]) -> None:
        if graph.model is not self.model:
            raise InputError(
                "Compensator: expected a group of the model that was measured, got one of another (a copy is another "
                "model); make a compensator of the model that is pruned."
            )
        layers = {name: layer for layer, name in names.items()}
        for layer, known in self._consumers.items():
            if layers.get(known.name) is not layer:
                raise InputError(f"layer {known.name!r}: it is not the one that was measured; call fit() again.")

    def _losing(self, group: Any) -> tuple[dict[nn.Module, ConsumerState], list[Refit]]:
        """The readers of a group with what they lose, and those that are left alone."""
        graph, names = graph_of(group), module_names(group)
        self._check_measured(graph, names)
        tied = {self.model.get_submodule(n.rpartition(".")[0]) for found in tied_parameters(self.model) for n in found}
        inputs: dict[nn.Module, set[int]] = {}
        left_alone = []
        for dep, idxs in group:
            layer = dep.target.module
            if layer not in names or not idxs:
                continue
            is_in, is_out = (f(dep.handler) for f in (graph.is_in_channel_pruning_fn, graph.is_out_channel_pruning_fn))
            known = self._consumers.get(layer)
            if is_out and known is not None:
                self._consumers[layer] = replace(known, losing_outputs=known.losing_outputs | set(idxs))
            if is_out and layer in self._attention:
                reason = "products of queries and keys are not refitted, only what reads the values"
                left_alone.append(Refit(names[layer], len(idxs), reason=reason))
            # What is both treats every channel by itself, but for attention.
            if not is_in or (is_out and not isinstance(layer, nn.MultiheadAttention)):
                continue
            if known is not None and known.moments.n_rows and layer not in tied:
                inputs.setdefault(layer, set()).update(idxs)
            elif reason := _why_not(layer, is_known=known is not None, is_tied=layer in tied):
                left_alone.append(Refit(names[layer], len(idxs), reason=reason))
        losing = dict[nn.Module, ConsumerState]()
        for layer, gone in inputs.items():
            known = self._consumers[layer]
            if known.patches.n_channels != len(known.inputs):
                raise InputError(
                    f"layer {known.name!r}: measured with {len(known.inputs)} input channels, it has "
                    f"{known.patches.n_channels}; call fit() again after pruning without the compensator."
                )
            channels = frozenset(i // known.patches.repeat for i in gone)
            losing[layer] = replace(self._consumers[layer], losing_inputs=channels)
        return losing, left_alone

    def _applied(self, group: Any, solutions: Sequence[Solution]) -> list[Refit]:
        for solution in solutions:
            if apply(solution, self.model, group._DG, self._original):
                self.new_biases.append(solution.known.name)
        return [solution.refit for solution in solutions]

    def _from_pruned(self, losing: Mapping[nn.Module, ConsumerState]) -> list[Solution]:
        """Fit what the readers see in the pruned model to what they computed in the original."""
        assert self._data is not None
        sums = paired_moments(
            self.model,
            self._original,
            losing,
            self._data.inputs(self.model),
            run=self._run,
            max_positions=self.max_positions,
            # Other positions for every group, so that what is fitted to one draw is tried on another.
            seed=self.seed + 1 + len(self.refits),
            n_expected=self._data.n_samples,
        )
        return [
            refit_to_original(known, self._original[layer], sums[layer], self.ridge) for layer, known in losing.items()
        ]


def _warn_of_few(consumers: Iterable[ConsumerState]) -> None:
    """Say so where there is so little data that a repair may do harm."""
    few = [(r.name, r.moments.n_rows, r.moments.n_features) for r in consumers if r.moments.n_rows]
    few = [(name, n, f) for name, n, f in few if n < f / 4]
    if few:
        shown = ", ".join(f"{name!r} {n} for {f}" for name, n, f in few[:3])
        warnings.warn(
            f"Compensator: few samples for what {len(few)} layers read (positions for features: {shown}); a repair may "
            "do harm there. Use more data, or lower max_features.",
            stacklevel=3,
        )


def _why_not(layer: nn.Module, *, is_known: bool, is_tied: bool) -> str:
    """Why a layer that reads channels is left alone; empty for one that has no weights to refit."""
    if isinstance(layer, nn.Embedding) or next(layer.parameters(), None) is None:
        return ""
    if is_tied:
        return "another layer has the same weight"
    if is_known:
        return "the calibration data never reached it"
    if patches_of(layer) is not None:
        return "not measured: it was not part of any group when fit() was called"
    if has_computed_weight(layer):
        return "its weight is computed from other parameters"
    return f"a {type(layer).__name__} is not refitted"
