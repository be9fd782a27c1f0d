"""What a pruner kept of every group and why, as a value that can be saved and applied again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from tp_cosep.errors import InputError, PruningError
from tp_cosep.functional.selection import ChannelSelection
from tp_cosep.graph.editing import add_biases, build_group, prune_group
from tp_cosep.graph.edits import EditHistory
from tp_cosep.graph.structure import check_structure, fingerprint_of
from tp_cosep.graph.tracing import trace
from tp_cosep.report.benchmark import ModelStats
from tp_cosep.report.html import PageContent, write_page
from tp_cosep.selection.result import GroupPlan, group_from_json, group_to_json
from tp_cosep.utils.data import evaluating, run_model
from tp_cosep.utils.files import replacing
from tp_cosep.utils.snapshot import restored_on_error

__all__ = ["PruningPlan"]

_FORMAT, _VERSION = "tp_cosep.plan", 1


@dataclass(frozen=True)
class PruningPlan:
    """The groups that a pruner visited, in the order in which it pruned them.

    Attributes:
        groups: One entry per visit; iterative pruning visits a group several times.
        options: The options that led here, for people.
        ignored_params: Names of parameters outside of layers that the groups leave alone.
        new_biases: Names of layers that were given a bias by a :class:`tp_cosep.Compensator`; :meth:`apply` gives
            them one of zeros, for weights to be loaded into.
        costs: By unit (``"macs"``, ``"params"``) and layer what it costs before and after, see
            :func:`tp_cosep.pruning.costs.layer_costs`; empty if that was not recorded.
        structure: The model before pruning, see :func:`tp_cosep.graph.structure.structure_of`; :meth:`apply` refuses
            models of another one. Empty if it is not known.
        inputs: Shapes and types of the example inputs (:func:`tp_cosep.graph.structure.describe_inputs`), or ``None``.
        versions: The versions of this library, torch and Torch-Pruning that made the plan.
        history: The parameters that the pruner replaced, for :func:`tp_cosep.carry_over`. Not saved, and empty in a
            copy.
    """

    groups: tuple[GroupPlan, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    ignored_params: tuple[str, ...] = ()
    new_biases: tuple[str, ...] = ()
    costs: Mapping[str, Mapping[str, tuple[int, int]]] = field(default_factory=dict)
    structure: dict[str, str] = field(default_factory=dict)
    inputs: Any = None
    versions: dict[str, str] = field(default_factory=dict)
    history: EditHistory = field(default_factory=EditHistory, repr=False, compare=False)

    @property
    def fingerprint(self) -> str | None:
        """A short name for the structure of the model that the plan was made for."""
        return fingerprint_of(self.structure) if self.structure else None

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[GroupPlan]:
        return iter(self.groups)

    def __str__(self) -> str:
        lines = []
        for group in self.groups:
            chosen = group.selection
            kept = f"{len(chosen.keep_idxs)}/{chosen.n_channels} kept" if chosen else "left alone"
            lines.append(f"{group.name}: {kept} ({group.reason})")
        return "\n".join(lines) or "empty plan"

    def apply(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        adapt: Callable[[nn.Module], object] | None = None,
        **trace_options: Any,
    ) -> nn.Module:
        """Prune a fresh copy of the model that the plan was made for, in place.

        Args:
            model: Unpruned, with the layers of the plan.
            example_inputs: For tracing.
            adapt: As for :class:`tp_cosep.CoSePPruner`.
            **trace_options: As for ``DependencyGraph.build_dependency``.

        Returns:
            The model.

        Raises:
            InputError: If the model has another structure than the one that the plan was made for (the first layer
                that differs is named), or a layer of the plan is missing or has another number of channels.
            PruningError: If Torch-Pruning cannot prune a group, or the model does not run after it. In
                every case the model is as it was.
        """
        if self.structure:
            check_structure(model, self.structure)
        with restored_on_error(model):
            parameters = dict(model.named_parameters())
            if missing := [name for name in self.ignored_params if name not in parameters]:
                raise InputError(
                    f"parameter {missing[0]!r}: in the plan, but not in the model; apply it to the model it was made "
                    "for."
                )
            ignored = [parameters[name] for name in self.ignored_params]
            graph = trace(model, example_inputs, ignored_params=ignored, **trace_options)
            add_biases(model, self.new_biases)
            for group in self.groups:
                if group.selection is not None and group.selection.prune_idxs:
                    _prune(graph, model, group, group.selection)
                    if adapt is not None:
                        adapt(model)
            try:
                with evaluating(model):
                    (trace_options.get("forward_fn") or run_model)(model, example_inputs)
            except Exception as error:
                raise PruningError(
                    f"plan: the model does not run on example_inputs after the plan was applied "
                    f"({type(error).__name__}: {error}); the model is as it was. If the plan was made with adapt=, "
                    "pass the same function here."
                ) from error
        return model

    def report(
        self,
        path: str | os.PathLike[str],
        *,
        stats: Mapping[str, ModelStats] | None = None,
        class_names: Sequence[str] | Mapping[int, str] | None = None,
        title: str | None = None,
    ) -> None:
        """Write an HTML page about the plan, one file that needs nothing but a browser.

        Args:
            path: The file; an existing one is replaced only when the new one is complete.
            stats: Measurements by the name of the model, the first one unpruned and the last one the result, see
                :func:`tp_cosep.report.measure_models`.
            class_names: Names by label; a label without a name stands for itself.
            title: The page's title.

        Raises:
            InputError: If the folder does not exist, or ``stats`` or ``class_names`` is of the wrong type.
        """
        write_page(PageContent(self.groups, self.costs, self.options, stats, class_names, title), path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; an existing file is replaced only when the new one is complete.

        What the file holds is described by ``plan.schema.json`` in this package.

        Raises:
            InputError: If the folder does not exist.
        """
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "versions": self.versions,
            "model": {"fingerprint": self.fingerprint, "tensors": self.structure} if self.structure else None,
            "inputs": self.inputs,
            "options": self.options,
            "ignored_params": self.ignored_params,
            "new_biases": self.new_biases,
            "costs": self.costs,
            "groups": [group_to_json(group) for group in self.groups],
        }
        with replacing(path, "plan") as temporary:
            temporary.write_text(json.dumps(document, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Read a plan that :meth:`save` wrote.

        Returns:
            The plan.

        Raises:
            InputError: If the file is not a plan, or of a version that this release does not know.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"plan {str(path)!r}: expected JSON, got {error}.") from error
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise InputError(f"plan {str(path)!r}: expected a file written by PruningPlan.save.")
        if document.get("version") != _VERSION:
            raise InputError(
                f"plan {str(path)!r}: expected version {_VERSION}, got {document.get('version')!r}; update tp_cosep."
            )
        try:
            groups = tuple(group_from_json(group) for group in document["groups"])
            return cls(
                groups,
                dict(document["options"]),
                tuple(document.get("ignored_params", ())),
                tuple(document.get("new_biases", ())),
                _costs_from_json(document.get("costs", {})),
                structure=_structure_from_json(document.get("model")),
                inputs=document.get("inputs"),
                versions=dict(document.get("versions", {})),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"plan {str(path)!r}: damaged, {type(error).__name__}: {error}.") from error


def _structure_from_json(document: dict[str, Any] | None) -> dict[str, str]:
    if document is None:
        return {}
    structure = dict(document["tensors"])
    if fingerprint_of(structure) != document["fingerprint"]:
        raise ValueError(f"the model's fingerprint is {document['fingerprint']!r}, that of its tensors is another")
    return structure


def _prune(graph: Any, model: nn.Module, group: GroupPlan, selection: ChannelSelection) -> None:
    layer = dict(model.named_modules()).get(group.name)
    if layer is None or layer not in graph.module2node:
        raise InputError(
            f"layer {group.name!r}: in the plan, but not in the model; apply it to the model it was made for."
        )
    n = graph.get_out_channels(layer) if group.side == "out" else graph.get_in_channels(layer)
    if n != selection.n_channels:
        raise InputError(
            f"layer {group.name!r}: the plan is for {selection.n_channels} channels, the layer has {n}; "
            "apply it to an unpruned copy of the model it was made for."
        )
    found = build_group(graph, layer, group.side, selection.prune_idxs, group.heads)
    if not graph.check_pruning_group(found):
        raise PruningError(
            f"layer {group.name!r}: Torch-Pruning refuses to remove {len(selection.prune_idxs)} channels."
        )
    try:
        prune_group(model, found.prune, n, selection.prune_idxs, group.heads)
    except Exception as error:
        raise PruningError(
            f"layer {group.name!r}: Torch-Pruning failed to prune its group ({type(error).__name__}: {error})."
        ) from error


def _costs_from_json(document: Mapping[str, Any]) -> dict[str, dict[str, tuple[int, int]]]:
    return {
        unit: {name: (int(before), int(after)) for name, (before, after) in by_layer.items()}
        for unit, by_layer in document.items()
    }
