"""What a selector measures, keeps and forgets."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch_pruning as tp
from torch import Size, Tensor, nn

from tp_cosep.calibration.attention_maps import collect_attention
from tp_cosep.calibration.class_observer import measured_layers
from tp_cosep.calibration.collect import StatisticsSpec, estimate_memory, measure
from tp_cosep.calibration.input_observer import InputStatistics
from tp_cosep.calibration.io import fingerprint
from tp_cosep.calibration.memory import MemoryEstimate
from tp_cosep.calibration.statistics_io import load_measured, save_measured
from tp_cosep.errors import InputError, NotFittedError
from tp_cosep.functional.attention_distances import ATTENTION_JS
from tp_cosep.functional.class_moments import ClassMoments
from tp_cosep.functional.elimination import Elimination
from tp_cosep.functional.separability import PairMetric
from tp_cosep.graph.heads import attention_heads
from tp_cosep.graph.tracing import check_plain, resolve_layers
from tp_cosep.selection.input_space import INPUT_SPACES
from tp_cosep.selection.separability_space import weight_shape

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Measured"]


class Measured(tp.importance.Importance):  # type: ignore[misc]
    """The part of :class:`tp_cosep.CoSePSelector` that measures; options and attributes are explained there."""

    metric: str | PairMetric
    spatial: int | str | None
    space_name: str
    representative: str | Callable[[Any], Tensor | None]
    observe: str
    num_heads: dict[nn.Module, int]
    channel_dims: dict[type[nn.Module], int]
    memory_budget: int

    def __init__(self, num_heads: dict[nn.Module, int] | None) -> None:
        self._given_heads = num_heads
        self.num_heads = num_heads if num_heads is not None else {}
        self.moments: dict[str, ClassMoments] = {}
        self.attention: dict[str, Tensor] = {}
        self.consumers: dict[str, InputStatistics] = {}
        self.sampling_errors: dict[str, float] = {}
        self._shapes: dict[str, Size] = {}
        self._fingerprint = ""
        self._eliminations: dict[tuple[str, str], tuple[Any, Elimination, Tensor]] = {}

    def fit(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        layers: Iterable[str] | None = None,
        ignored_layers: Iterable[Any] = (),
        target_fn: Callable[[Any], tuple[Any, Any]] | None = None,
        labels: str = "given",
        rare_classes: str = "error",
        n_classes: int | None = None,
        num_heads: Mapping[nn.Module, int] | None = None,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 100,
    ) -> Self:
        """Measure a model's layers on calibration data, in one pass and in eval mode.

        Mode, weights, buffers and gradients stay as they are, also after an exception. What an earlier
        call measured is replaced; it is kept if this one fails. The other arguments are those of
        :func:`tp_cosep.calibration.class_observer.collect_moments`.

        Args:
            model: The model.
            loader: Batches of inputs and labels.
            layers: Names of the layers to measure. By default those that belong to a group that can be pruned,
                which a trace on the first samples shows.
            ignored_layers: As for the pruner: groups that contain one of these are not measured.
            target_fn: As in ``collect_moments``.
            labels: As in ``collect_moments``.
            rare_classes: As in ``collect_moments``.
            n_classes: As in ``collect_moments``.
            num_heads: Number of heads by attention layer, in place of the selector's own.
            progress: Show a progress bar on a terminal.
            checkpoint: A file that keeps the pass on the way. A pass that was interrupted goes on from it, behind the
                batches it has seen, so the loader has to give the same ones in the same order; one that was finished
                is not repeated. Delete the file to measure anew.
            checkpoint_every: Batches between two writes of it; after half a minute there is one in any case.

        Returns:
            The selector itself.

        Raises:
            InputError: If the loader, the labels or the activations cannot be used.
        """
        check_plain(model)
        self.num_heads = self._heads_of(model) if num_heads is None else dict(num_heads)
        if self.metric == ATTENTION_JS:
            if not self.num_heads:
                raise InputError(
                    "fit: metric='attention-js' compares attention heads, found none by name; pass num_heads= to the "
                    "selector."
                )
            self.attention = collect_attention(model, loader, self.num_heads, target_fn=target_fn, progress=progress)
            self._hold(model, {}, {})
            return self
        moments, consumers = measure(
            model,
            loader,
            self._spec,
            layers=layers,
            ignored=resolve_layers(model, ignored_layers, "ignored_layers"),
            target_fn=target_fn,
            labels=labels,
            rare_classes=rare_classes,
            n_classes=n_classes,
            progress=progress,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
        )
        self._hold(model, moments, consumers)
        return self

    def _heads_of(self, model: nn.Module) -> dict[nn.Module, int]:
        """Number of heads by attention layer: those that were given, or what the model says."""
        return attention_heads(model) if self._given_heads is None else dict(self._given_heads)

    def _hold(self, model: nn.Module, moments: dict[str, ClassMoments], consumers: dict[str, InputStatistics]) -> None:
        self.moments, self.consumers = moments, consumers
        self._eliminations.clear()
        self.sampling_errors.clear()
        shapes = {name: weight_shape(m) for name, m in measured_layers(model, self.channel_dims).items()}
        self._shapes = {name: shape for name, shape in shapes.items() if shape is not None and name in moments}
        self._fingerprint = fingerprint(model)

    @property
    def _spec(self) -> StatisticsSpec:
        by_inputs = self.space_name in INPUT_SPACES
        return StatisticsSpec(
            by_classes=not by_inputs,
            by_inputs=by_inputs or self.representative == "reconstruction",
            input_classes=self.space_name in ("class-means", "joint"),
            observe=self.observe,
            spatial=self.spatial,
            channel_dims=self.channel_dims,
            num_heads=self.num_heads,
            memory_budget=self.memory_budget,
        )

    def memory_estimate(
        self, model: nn.Module, example_inputs: Any, n_classes: int, *, ignored_layers: Iterable[Any] = ()
    ) -> MemoryEstimate:
        """What :meth:`fit` and a selection will take, found by a trace and a run on a few samples.

        Args:
            model: The model.
            example_inputs: As the model gets them, of the size of the calibration data; the batch may be small.
            n_classes: Number of classes.
            ignored_layers: As for :meth:`fit`.

        Returns:
            Bytes; :meth:`fit` refuses to begin if ``measuring`` is more than ``memory_budget``.

        Raises:
            InputError: If attention maps are what is measured: n_heads² · 8 bytes per sample, next to nothing.

        Example:
            >>> import torch
            >>> from tp_cosep import CoSePSelector
            >>> model = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 3))
            >>> estimate = CoSePSelector(space="separability").memory_estimate(model, torch.randn(2, 1, 8, 8), 1000)
            >>> estimate.class_moments  # 12 channels in 4 × 4 cells and 3 outputs, of 1000 classes
            3120000
        """
        if self.metric == ATTENTION_JS:
            raise InputError("memory_estimate: metric='attention-js' takes no moments, and next to no memory.")
        check_plain(model, may_be_empty=True)
        ignored = resolve_layers(model, ignored_layers, "ignored_layers")
        # It may be another model than the one that was measured, or that one after pruning.
        spec = replace(self._spec, num_heads=self._heads_of(model))
        return estimate_memory(model, example_inputs, spec, n_classes, ignored)

    def save_moments(self, path: str | os.PathLike[str]) -> None:
        """Write what was measured to a file, from which :meth:`load_moments` has it back without data.

        Args:
            path: Of the file, of safetensors; one that exists is replaced when the new one is complete. Of several
                processes one is to write, they hold the same.

        Raises:
            NotFittedError: Before :meth:`fit`.
        """
        self.check_fitted()
        save_measured(
            path,
            {"model": self._fingerprint, "measured": self._facts},
            self.moments,
            self.consumers,
            self.attention,
        )

    def load_moments(self, path: str | os.PathLike[str], model: nn.Module, *, n_classes: int | None = None) -> Self:
        """Take what a selector with the same options measured of the same model, in place of :meth:`fit`.

        Options that only decide what is chosen, such as ``knee`` or ``n_keep``, may differ.

        Args:
            path: Of the file.
            model: The model, as it was when it was measured.
            n_classes: If given, the number of classes that must have been seen.

        Returns:
            The selector itself.

        Raises:
            InputError: If the file is damaged, none of moments, or of another model, another number of classes or
                other options; the selector is as it was.
        """
        check_plain(model)
        moments, consumers, attention = load_measured(
            path, {"model": fingerprint(model), "measured": self._facts}, model, n_classes
        )
        self.num_heads, self.attention = self._heads_of(model), attention
        self._hold(model, moments, consumers)
        return self

    @property
    def _facts(self) -> list[Any]:
        """What a file says of the options."""
        return ["attention"] if self.metric == ATTENTION_JS else self._spec.facts()

    @property
    def is_fitted(self) -> bool:
        """Whether anything was measured."""
        return bool(self.measured)

    @property
    def measured(self) -> list[str]:
        """Names of the layers that were measured, in the order in which they ran."""
        if self.metric == ATTENTION_JS:
            return list(self.attention)
        return list(dict.fromkeys([*(self.consumers if self.space_name in INPUT_SPACES else ()), *self.moments]))

    def check_fitted(self) -> None:
        """Refuse to choose before :meth:`fit`."""
        if not self.is_fitted:
            raise NotFittedError("CoSePSelector: no data seen yet; call fit(model, loader) first.")
