"""What the page shows of every group; the words around it are in ``assets/page.html.jinja``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from tp_cosep.functional.selection import ChannelSelection
from tp_cosep.report.labels import CRITERIA, Criterion, counted
from tp_cosep.report.svg import Plane
from tp_cosep.report.tables import group_label
from tp_cosep.selection.embedding import GroupEmbedding, kept_components
from tp_cosep.selection.result import GroupPlan

__all__ = ["Costs", "GroupRow", "Visit", "group_rows", "total_costs"]

#: By unit (``"macs"``, ``"params"``) and layer the cost before and after.
Costs = Mapping[str, Mapping[str, tuple[int, int]]]


@dataclass(frozen=True)
class Visit:
    """One visit to a group in which channels were selected.

    Attributes:
        group: The group's plan.
        selection: Its selection.
    """

    group: GroupPlan
    selection: ChannelSelection

    @property
    def embedding(self) -> GroupEmbedding | None:
        """The group in the plane, if it was recorded."""
        return self.group.embedding

    @property
    def unit(self) -> str:
        """What a component is: a channel, a head, or a slot of several channels."""
        has_slots = len(self.selection.labels) != self.selection.n_channels
        return "slot" if self.group.unit == "channel" and has_slots else self.group.unit

    @property
    def criterion(self) -> Criterion:
        """The words for what the curve shows."""
        return CRITERIA[self.selection.criterion]

    @property
    def n_kept_on_curve(self) -> int:
        """Components kept, as the curve counts them."""
        return len(kept_components(self.selection))

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Names and values, in order."""
        selection, unit = self.selection, self.unit
        n = counted(len(selection.labels), unit)
        heads = self.group.heads.items()
        facts = [
            ("count from", self.group.reason),
            ("selected among", f"{n}, channels that can only be pruned together" if unit == "slot" else ""),
            ("producers", ", ".join(self.group.layers)),
            ("heads", ", ".join(f"{name} {before} → {after}" for name, (before, after) in heads if before != after)),
            ("kept channels", _ranges(selection.keep_idxs)),
            (counted(len(selection.prune_idxs), "pruned channel"), _ranges(selection.prune_idxs) or "none"),
        ]
        return [(name, value) for name, value in facts if value]

    @cached_property
    def plane(self) -> Plane | None:
        """The components as they are drawn, if the embedding was recorded."""
        return None if self.embedding is None else Plane(self.selection, self.embedding)

    @property
    def clusters(self) -> dict[str, Any] | None:
        """The data that the script needs for the table of clusters and for the tips over the plane."""
        if self.plane is None:
            return None
        return {
            "labels": self.selection.labels,
            "medoids": self.selection.medoids,
            "kept": self.plane.kept,
            "colours": self.plane.colours,
            "xy": [x for position in self.plane.positions for x in position],
            "pairs": [
                [x for pair in pairs for x in (*pair[:2], round(pair[2], 2))] for pairs in self.plane.embedding.pairs
            ],
        }


@dataclass(frozen=True)
class GroupRow:
    """All visits to a group.

    Attributes:
        label: The group's label.
        ident: Its identifier, unique on the page.
        unit: ``"channel"`` or ``"head"``.
        groups: The group's plans, in the order of the visits.
        macs_shares: The multiply-accumulates of its layers before and after, as shares of those of the unpruned model;
            ``None`` if not known.
    """

    label: str
    ident: str
    unit: str
    groups: tuple[GroupPlan, ...]
    macs_shares: tuple[float | None, float | None]

    @property
    def visits(self) -> list[Visit | None]:
        """A view of every visit; ``None`` where the group was left alone."""
        return [Visit(group, group.selection) if group.selection is not None else None for group in self.groups]

    @property
    def pruning_visits(self) -> list[Visit]:
        """The visits in which channels were selected."""
        return [visit for visit in self.visits if visit is not None]

    @property
    def counts(self) -> tuple[int, int]:
        """Channels, or heads, after the last visit and before the first."""
        first, last = self.pruning_visits[0], self.pruning_visits[-1]
        if self.unit == "head":
            return len(kept_components(last.selection, last.embedding)), len(first.selection.labels)
        return len(last.selection.keep_idxs), first.selection.n_channels


def group_rows(groups: Iterable[GroupPlan], costs: Costs) -> list[GroupRow]:
    """One row per group, in the order in which the layers run where the costs say it."""
    macs, total = costs.get("macs", {}), total_costs(costs, "macs")
    order = {name: i for i, name in enumerate(macs)}
    visits: dict[tuple[str, str], list[GroupPlan]] = {}
    for group in groups:
        visits.setdefault((group_label(group), group.unit), []).append(group)
    found = []
    for i, ((label, unit), of_group) in enumerate(visits.items()):
        layers = {name for group in of_group for name in group.layers} & order.keys()
        before, after = (sum(macs[name][side] for name in layers) for side in (0, 1))
        shares = (before / total[0], after / total[0]) if layers and total and total[0] else (None, None)
        place = min((order[name] for name in layers), default=len(order))
        found.append((place, i, GroupRow(label, f"layer-{i}", unit, tuple(of_group), shares)))
    return [row for _, _, row in sorted(found, key=lambda entry: entry[:2])]


def total_costs(costs: Costs, unit: str) -> tuple[int, int] | None:
    """The costs of all layers before and after; ``None`` if not known."""
    of_layers = costs.get(unit)
    return (sum(n for n, _ in of_layers.values()), sum(n for _, n in of_layers.values())) if of_layers else None


def _ranges(idxs: Sequence[int]) -> str:
    """Ascending numbers, runs of three and more as ranges: 0, 3–7, 9."""
    parts: list[str] = []
    for _, run in groupby(enumerate(idxs), lambda pair: pair[1] - pair[0]):
        numbers = [n for _, n in run]
        parts += [f"{numbers[0]}–{numbers[-1]}"] if len(numbers) > 2 else map(str, numbers)
    return ", ".join(parts)
