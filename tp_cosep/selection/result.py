"""What was kept of a group and why, as a value that can be saved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from tp_cosep.functional.selection import ChannelSelection
from tp_cosep.selection.embedding import GroupEmbedding

if TYPE_CHECKING:
    pass

__all__ = ["GroupPlan", "group_from_json", "group_to_json"]
_CRITERIA = ("silhouette", "retained variance", "retained score")


@dataclass(frozen=True)
class GroupPlan:
    """One group of a plan.

    Attributes:
        name: The root layer, by whose channels the group is pruned.
        side: ``"out"`` or ``"in"``: which channels of the root.
        layers: The layers that create the channels.
        selection: What is kept; ``None`` if the group was left alone.
        reason: Why it was left alone, or how the count came about.
        unit: What was chosen among: ``"channel"``, or ``"head"`` for whole attention heads.
        heads: For attention layers their numbers of heads before and after, by name.
        embedding: The group in the plane and what its clusters tell apart, where that was recorded.
    """

    name: str
    side: str
    layers: tuple[str, ...]
    selection: ChannelSelection | None
    reason: str
    unit: str = "channel"
    heads: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    embedding: GroupEmbedding | None = None

    def without(self, idxs: Iterable[int]) -> GroupPlan:
        """The entry with the channels that really went: ranking across layers decides them late."""
        if self.selection is None:
            return self
        gone = set(idxs)
        kept = tuple(c for c in range(self.selection.n_channels) if c not in gone)
        return replace(self, selection=replace(self.selection, keep_idxs=kept, prune_idxs=tuple(sorted(gone))))


def group_to_json(group: GroupPlan) -> dict[str, Any]:
    """A group plan in lists, numbers and strings."""
    selection = None
    if group.selection is not None:
        selection = {f.name: getattr(group.selection, f.name) for f in fields(ChannelSelection)}
        selection["scores"] = group.selection.scores.tolist()
    return {
        "name": group.name,
        "side": group.side,
        "layers": group.layers,
        "reason": group.reason,
        "unit": group.unit,
        "heads": {name: list(numbers) for name, numbers in group.heads.items()},
        "selection": selection,
        "embedding": None if group.embedding is None else group.embedding.to_json(),
    }


def _check_selection(name: str, selection: ChannelSelection) -> None:
    if sorted(selection.keep_idxs + selection.prune_idxs) != list(range(selection.n_channels)):
        raise ValueError(f"layer {name!r}: kept and pruned channels do not add up")
    if len(selection.scores) != selection.n_channels:
        raise ValueError(f"layer {name!r}: {len(selection.scores)} scores for its channels")
    knee = 0 if selection.knee_k is None else selection.knee_k
    numbers = (selection.k, knee, selection.knee_strength, *selection.ks, *selection.mss)
    if not selection.ks or len(selection.ks) != len(selection.mss) or not all(map(math.isfinite, numbers)):
        raise ValueError(f"layer {name!r}: expected a finite number for each k of its curve")
    n_clusters, n = len(selection.medoids), len(selection.labels)
    if not set(selection.labels) <= set(range(n_clusters)) or not set(selection.medoids) <= set(range(n)):
        raise ValueError(f"layer {name!r}: labels and medoids do not fit each other")
    if selection.criterion not in _CRITERIA:
        raise ValueError(f"layer {name!r}: criterion is {selection.criterion!r}")


def group_from_json(document: dict[str, Any]) -> GroupPlan:
    """The inverse of :func:`group_to_json`.

    Returns:
        The group plan.

    Raises:
        ValueError: If the parts of the selection do not fit each other.
        TypeError: If the selection is no object.
    """
    selection = None
    if document["side"] not in ("out", "in"):
        raise ValueError(f"layer {document['name']!r}: side is {document['side']!r}")
    if document["selection"] is not None:
        if not isinstance(document["selection"], dict):
            raise TypeError(f"layer {document['name']!r}: selection is no object")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in document["selection"].items()}
        values["scores"] = torch.tensor(values["scores"], dtype=torch.float64)
        selection = ChannelSelection(**values)
        _check_selection(document["name"], selection)
    heads = {name: (int(before), int(after)) for name, (before, after) in document.get("heads", {}).items()}
    embedding = None
    if selection is not None and document.get("embedding") is not None:
        embedding = GroupEmbedding.from_json(document["embedding"], selection)
    return GroupPlan(
        document["name"],
        document["side"],
        tuple(document["layers"]),
        selection,
        document["reason"],
        document.get("unit", "channel"),
        heads,
        embedding,
    )
