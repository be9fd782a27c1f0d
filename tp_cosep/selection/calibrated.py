"""Statistics of a model: collected by ``fit``, kept in files, held by a selector."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import ref

from torch import nn

from tp_cosep.calibration.collect import collect, estimate_memory, weight_shapes
from tp_cosep.calibration.io import load_statistics, save_statistics
from tp_cosep.calibration.memory import MemoryEstimate
from tp_cosep.calibration.statistics import Statistics, StatisticsSpec
from tp_cosep.errors import NotFittedError
from tp_cosep.graph.heads import attention_heads
from tp_cosep.graph.tracing import check_plain, resolve_layers
from tp_cosep.utils.data import CalibrationData, DataOptions

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["Calibrated"]


class Calibrated(ABC):
    """Collects the statistics that its spec requires, and holds them.

    Attributes:
        statistics: What was collected of the model; empty before :meth:`fit`.
        num_heads: Number of heads by attention layer, as :meth:`fit` was given or found them; a stock pruner takes the
            same dictionary.
    """

    def __init__(self) -> None:
        self.num_heads: dict[nn.Module, int] = {}
        self.statistics = Statistics()
        self._source: _Source | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy has the statistics, but neither the data nor the model to collect them again.
        return {**self.__dict__, "_source": None}

    @property
    @abstractmethod
    def _spec(self) -> StatisticsSpec:
        """Which statistics are required."""

    def fit(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        layers: Iterable[str] | None = None,
        ignored_layers: Iterable[Any] = (),
        num_heads: Mapping[nn.Module, int] | None = None,
        refit: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 100,
        **data_options: Unpack[DataOptions],
    ) -> Self:
        """Collect statistics of a model on calibration data, in one pass and in eval mode.

        Mode, weights, buffers and gradients stay as they are, also after an exception. Statistics of an earlier call
        are replaced; they are kept if this one fails.

        Args:
            model: The model. Inputs are moved to its device, and floating inputs are cast to its floating type if it
                has just one.
            loader: Batches ``(inputs, labels)``; inputs a tensor, a tuple of arguments or a dict of keyword arguments;
                labels integers ≥ 0, one per sample.
            layers: Names of the layers to observe. By default those of groups that can be pruned, which a trace on the
                first samples shows.
            ignored_layers: Groups that contain one of these (modules, names or types) are left out, as by the pruner.
            num_heads: Number of heads by attention layer; by default :func:`tp_cosep.attention_heads` finds them.
            refit: Keep the loader, and a weak reference to the model: where a selection finds the model pruned since,
                as in the second of several ``iterative_steps``, statistics are collected again by themselves. A loader
                that can be read once is not kept, nor is anything in copies of the selector.
            checkpoint: A file that keeps the pass on the way. An interrupted pass goes on from it, behind the batches
                that it has seen, so the loader has to give the same ones in the same order; a finished one is not
                repeated. Delete the file to collect again.
            checkpoint_every: Batches between two writes of it; after half a minute there is one in any case.
            **data_options: How batches are read: ``target_fn``, ``labels``, ``rare_classes``, ``n_classes``,
                ``progress``, see :class:`tp_cosep.utils.data.CalibrationData`.

        Returns:
            The selector itself.

        Raises:
            InputError: If the loader, the labels or the activations cannot be used.
        """
        check_plain(model)
        self.num_heads = _heads_of(model, num_heads)
        is_kept = refit and not hasattr(loader, "__next__")
        # Iterators are read here; anything that is no list of layers is refused where it is looked at.
        layers = list(layers) if isinstance(layers, Iterator) else layers
        ignored_layers = list(ignored_layers) if isinstance(ignored_layers, Iterator) else ignored_layers
        options = {"layers": layers, "ignored_layers": ignored_layers, **data_options}
        source = _Source(ref(model), loader, options) if is_kept else None
        self._hold(
            collect(
                model,
                CalibrationData(loader, **data_options),
                self._spec,
                layers=layers,
                ignored=resolve_layers(model, ignored_layers, "ignored_layers"),
                checkpoint=checkpoint,
                checkpoint_every=checkpoint_every,
            )
        )
        self._source = source
        return self

    def refresh(self, layer: nn.Module) -> bool:
        """Collect statistics again if the fitted model was pruned since; selections call it.

        Args:
            layer: A layer that is asked about; nothing is done if it is another model's, such as an unpruned copy's.

        Returns:
            Whether statistics were collected: the model was pruned, and :meth:`fit` has kept the loader.
        """
        source = self._source
        model = None if source is None else source.model()
        if source is None or model is None or _has_shapes(model, self.statistics):
            return False
        if not any(m is layer for m in model.modules()):
            return False
        # Numbers of heads follow the pruning in the layers; those that are not found by name stay as they were given.
        found, modules = attention_heads(model), set(model.modules())
        heads = {m: found.get(m, n) for m, n in self.num_heads.items() if m in modules}
        self.fit(model, source.loader, num_heads=heads, **source.options)
        return True

    def _hold(self, statistics: Statistics) -> None:
        self.statistics = statistics

    def memory_estimate(
        self,
        model: nn.Module,
        example_inputs: Any,
        n_classes: int,
        *,
        ignored_layers: Iterable[Any] = (),
        num_heads: Mapping[nn.Module, int] | None = None,
    ) -> MemoryEstimate:
        """What :meth:`fit` and a selection take, found by a trace and a run on a few samples.

        Args:
            model: The model.
            example_inputs: As the model gets them, of the size of the calibration data; the batch may be small.
            n_classes: Number of classes.
            ignored_layers: As for :meth:`fit`.
            num_heads: As for :meth:`fit`.

        Returns:
            Bytes; :meth:`fit` refuses to begin if ``measuring`` is more than ``memory_budget``.
        """
        check_plain(model, may_be_empty=True)
        ignored = resolve_layers(model, ignored_layers, "ignored_layers")
        # It may be another model than the fitted one, or that one after pruning.
        spec = replace(self._spec, num_heads=_heads_of(model, num_heads))
        return estimate_memory(model, example_inputs, spec, n_classes, ignored)

    def save_statistics(self, path: str | os.PathLike[str]) -> None:
        """Write the statistics to a file, from which :meth:`load_statistics` takes them without data.

        Args:
            path: Of the file, of safetensors; an existing one is replaced when the new one is complete. Of several
                processes one is to write, they hold the same.

        Raises:
            NotFittedError: Before :meth:`fit`.
        """
        self.check_fitted()
        save_statistics(path, {"measured": self._spec.facts()}, self.statistics)

    def load_statistics(
        self,
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        n_classes: int | None = None,
        num_heads: Mapping[nn.Module, int] | None = None,
    ) -> Self:
        """Take the statistics that a selector with the same options collected of the same model, without data.

        Options that only decide what is selected, such as ``knee`` or ``keep``, may differ.

        Args:
            path: Of the file.
            model: The model, as it was when it was observed.
            n_classes: If given, the number of classes that must have been seen.
            num_heads: As for :meth:`fit`.

        Returns:
            The selector itself.

        Raises:
            InputError: If the file is damaged, none of statistics, or of another model, another number of classes or
                other options; the selector is as it was.
        """
        check_plain(model)
        statistics = load_statistics(path, {"measured": self._spec.facts()}, model, n_classes)
        statistics.weight_shapes = weight_shapes(model, statistics.moments)
        self._source = None
        self.num_heads = _heads_of(model, num_heads)
        self._hold(statistics)
        return self

    @property
    def layers(self) -> list[str]:
        """Names of the layers that selections are made by, in the order in which they ran."""
        return self.statistics.layers

    @property
    def is_fitted(self) -> bool:
        """Whether there are statistics."""
        return bool(self.layers)

    def check_fitted(self) -> None:
        """Refuse to select before :meth:`fit`.

        Raises:
            NotFittedError: If there are no statistics.
        """
        if not self.is_fitted:
            raise NotFittedError(f"{type(self).__name__}: no data seen yet; call fit(model, loader) first.")


@dataclass(frozen=True)
class _Source:
    """What statistics were collected of, and how."""

    model: ref[nn.Module]
    loader: Iterable[Any]
    options: dict[str, Any]


def _has_shapes(model: nn.Module, statistics: Statistics) -> bool:
    """Whether the observed layers have the weights' shapes that they had when they were observed."""
    shapes = {**statistics.weight_shapes, **{name: of_layer.shape for name, of_layer in statistics.inputs.items()}}
    layers = dict(model.named_modules())
    return all(name in layers and getattr(layers[name], "weight", None) is not None for name in shapes) and all(
        layers[name].get_parameter("weight").shape == shape for name, shape in shapes.items()
    )


def _heads_of(model: nn.Module, given: Mapping[nn.Module, int] | None) -> dict[nn.Module, int]:
    return attention_heads(model) if given is None else dict(given)
