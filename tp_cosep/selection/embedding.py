"""What a plan remembers of a group beside its selection, so that it can be drawn and explained without the model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tp_cosep.functional.class_moments import ClassMoments
from tp_cosep.functional.selection import ChannelSelection
from tp_cosep.functional.separability import profiles
from tp_cosep.functional.swap_table import few_threads
from tp_cosep.graph.groups import GroupView
from tp_cosep.selection.criterion import Criterion, LayerClasses

__all__ = ["N_COLOURS", "ClassPair", "GroupEmbedding", "cluster_colours", "embed_group", "kept_components", "plane"]

#: Colours that clusters are told apart by.
N_COLOURS = 6
_N_PAIRS = 3
# Values of class profiles that are computed for one group, so that an embedding costs little beside the choice.
_MOST_VALUES, _MOST_CELLS, _FEWEST_CLASSES = 2**21, 64, 10
_MOST_LANDMARKS, _MOST_PAIRS = 256, 2000


class ClassPair(NamedTuple):
    """Two classes, by label, and how far a cluster tells them apart: their Jeffries-Matusita distance, 0 … 2."""

    first: int
    second: int
    distance: float


@dataclass(frozen=True)
class GroupEmbedding:
    """A group's components in the plane, and what their clusters tell apart.

    Attributes:
        positions: Of every component in the plane, see :func:`plane`; in units of ``scale``, rounded to 3 decimals.
        scale: The largest coordinate, in the unit of the distances between components.
        shares: What share of the squared distances the two axes show.
        component_of: The component of every channel of the root; empty if every channel is its own.
        pairs: For every cluster the class pairs that it tells apart best, best first; empty if not known. The distance
            of a pair is the mean over the cluster's channels, the cells of their maps, and the layers of the group.
        n_classes: How many classes were compared for that, and how many there are.
        note: Why ``pairs`` are not known.
    """

    positions: tuple[tuple[float, float], ...]
    scale: float
    shares: tuple[float, float]
    component_of: tuple[int, ...] = ()
    pairs: tuple[tuple[ClassPair, ...], ...] = ()
    n_classes: tuple[int, int] = (0, 0)
    note: str = ""

    @property
    def points(self) -> Tensor:
        """``[components, 2]`` float64, positions in the unit of the distances."""
        return torch.tensor(self.positions, dtype=torch.float64).reshape(-1, 2) * self.scale

    def to_json(self) -> dict[str, Any]:
        """The embedding in lists and numbers."""
        return {
            "positions": [x for position in self.positions for x in position],
            "scale": self.scale,
            "shares": list(self.shares),
            "component_of": list(self.component_of),
            "pairs": [[x for pair in of_cluster for x in pair] for of_cluster in self.pairs],
            "n_classes": list(self.n_classes),
            "note": self.note,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any], selection: ChannelSelection) -> GroupEmbedding:
        """The inverse of :meth:`to_json`, for the selection of the same group.

        Returns:
            The embedding.

        Raises:
            ValueError: If it is not one of this selection, or damaged.
            KeyError: If something is missing.
        """
        n, k = len(selection.labels), len(selection.medoids)
        x = [float(value) for value in document["positions"]]
        first, second = (float(share) for share in document["shares"])
        scale = float(document["scale"])
        component_of = tuple(int(c) for c in document["component_of"])
        pairs = tuple(tuple(_pairs_of(of_cluster)) for of_cluster in document["pairs"])
        n_compared, n_classes = (int(count) for count in document["n_classes"])
        if len(x) != 2 * n or not all(map(math.isfinite, [*x, first, second, scale])):
            raise ValueError(f"embedding: expected 2 finite coordinates for each of {n} components")
        if component_of and (len(component_of) != selection.n_channels or not set(component_of) <= set(range(n))):
            raise ValueError(f"embedding: expected one of {n} components for each of {selection.n_channels} channels")
        if len(pairs) not in (0, k):
            raise ValueError(f"embedding: expected class pairs of {k} clusters, got {len(pairs)}")
        positions = tuple(zip(x[::2], x[1::2], strict=True))
        shares, counts, note = (first, second), (n_compared, n_classes), str(document["note"])
        return cls(positions, scale, shares, component_of, pairs, counts, note)


def _pairs_of(numbers: Sequence[float]) -> Iterator[ClassPair]:
    for a, b, distance in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True):
        if not math.isfinite(distance):
            raise ValueError("embedding: expected finite distances of class pairs")
        yield ClassPair(int(a), int(b), float(distance))


def kept_components(selection: ChannelSelection, embedding: GroupEmbedding | None = None) -> list[int]:
    """The components that a selection keeps.

    Args:
        selection: The selection among channels.
        embedding: Of the same group, which knows the component of every channel; else they are taken to be slots of
            channel groups, or blocks of consecutive channels (heads) if the kept ones cannot be slots.

    Returns:
        Components, ascending.
    """
    if embedding is not None and embedding.component_of:
        return sorted({embedding.component_of[c] for c in selection.keep_idxs})
    n = len(selection.labels)
    size = max(1, selection.n_channels // n)
    slots = {c % n for c in selection.keep_idxs}
    are_slots = len(slots) * size <= len(selection.keep_idxs)
    return sorted(slots if are_slots else {c // size for c in selection.keep_idxs})


@torch.no_grad()
def embed_group(criterion: Criterion, view: GroupView, selection: ChannelSelection) -> GroupEmbedding | None:
    """What is worth remembering of a group while its statistics are at hand.

    With many classes, those of which as many pairs can be computed in a moment are compared, evenly spaced among all
    labels; of large maps likewise some cells.

    Args:
        criterion: That of the selector which made the selection.
        view: The group, unpruned.
        selection: What was selected.

    Returns:
        The embedding, or ``None`` if the group's components cannot be compared.
    """
    # Class pairs that the selection was made by, or a sample of them: a drawing may cost less than the selection.
    sketch = criterion.sketched(_MOST_PAIRS)
    distances = sketch.head_distances([view]) if view.unit == "head" else sketch.distances(view)
    if distances is None:
        return None
    with few_threads(distances):
        points, shares = plane(distances)
        pairs, n_classes = _best_pairs(_described(criterion, view), selection)
    scale = float(points.abs().max())
    # Adding 0 makes 0 of −0.
    rounded = (points / (scale or 1.0)).mul(1000).round().div(1000).add(0.0).tolist()
    component_of = view.component_of[: selection.n_channels].tolist()
    return GroupEmbedding(
        positions=tuple((x, y) for x, y in rounded),
        scale=scale,
        shares=(round(shares[0], 4), round(shares[1], 4)),
        component_of=() if component_of == list(range(len(component_of))) else tuple(component_of),
        pairs=pairs,
        n_classes=n_classes,
        note="" if pairs else "classes were not observed where its channels are compared",
    )


def plane(distances: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """Classical multidimensional scaling to the plane.

    B = −½ J D² J with J = I − 11ᵀ/n; the coordinates are eigenvectors of B times the roots of their
    eigenvalues λ. For Euclidean distances Σ_ij D²_ij = 2 n Σ λ, so λ₁/Σλ and λ₂/Σλ are the shares of the squared
    distances that the two axes show. Negative eigenvalues, which only distances that are not Euclidean have,
    are left out.

    Of more than 256 components that many, evenly spaced, are landmarks, and the others are placed by their distances
    to them (de Silva & Tenenbaum, 2004): x = ½ Λ^(−½) Vᵀ (δ̄ − δ), with δ the squared distances of a component to the
    landmarks and δ̄ the mean of that over the landmarks.

    Args:
        distances: ``[n, n]``.

    Returns:
        ``[n, 2]`` coordinates, the largest of each axis positive, and the two shares, 0 if all distances are 0.
    """
    n = len(distances)
    landmarks = torch.linspace(0, n - 1, min(n, _MOST_LANDMARKS)).round().long()
    squared = distances.detach().to("cpu", torch.float64)[:, landmarks] ** 2
    between = squared[landmarks]
    centred = between - between.mean(0)
    centred = -0.5 * (centred - centred.mean(1, keepdim=True))
    values, vectors = torch.linalg.eigh((centred + centred.T) / 2)
    values = values.clamp(min=0).abs()  # no −0
    m = min(2, n)
    largest, axes = values.flip(0)[:m], vectors.flip(1)[:, :m]
    points = torch.zeros(n, 2, dtype=torch.float64)
    points[landmarks, :m] = axes * largest.sqrt()
    others = torch.ones(n, dtype=torch.bool)
    others[landmarks] = False
    inverse = torch.where(largest > 0, largest.rsqrt(), 0)
    points[others, :m] = 0.5 * (between.mean(0) - squared[others]) @ axes * inverse
    points *= torch.where(points.gather(0, points.abs().argmax(0)[None]) < 0, -1.0, 1.0)
    shown = [*largest.tolist(), 0.0]
    total = float(values.sum()) or 1.0
    return points, (shown[0] / total, shown[1] / total)


def cluster_colours(points: Tensor, selection: ChannelSelection) -> list[int]:
    """A colour per cluster: of all colours, the one whose clusters so far are the furthest away.

    Args:
        points: ``[components, 2]``.
        selection: Of the same components.

    Returns:
        Numbers from 0 to :data:`N_COLOURS` − 1, or −1 for a component that is alone in its cluster.
    """
    medoids = points.numpy()[list(selection.medoids)]
    sizes = Counter(selection.labels)
    # Of every colour, how near its nearest cluster is to each medoid.
    nearest = np.full((N_COLOURS, len(medoids)), np.inf)
    chosen = []
    for j, medoid in enumerate(medoids):
        colour = -1 if sizes[j] == 1 else int(nearest[:, j].argmax())
        if colour >= 0:
            nearest[colour] = np.minimum(nearest[colour], np.hypot(*(medoids - medoid).T))
        chosen.append(colour)
    return chosen


def _described(criterion: Criterion, view: GroupView) -> list[LayerClasses]:
    """The layers whose class moments describe a group; those that saw other classes than the first are left out."""
    found = criterion.layer_classes(view)
    return [layer for layer in found if torch.equal(layer.moments.classes, found[0].moments.classes)]


def _cells_of(layer: LayerClasses) -> Tensor:
    """The cells of one feature that are looked at."""
    return _evenly(layer.moments.n_components * layer.moments.n_cells // layer.n_features, _MOST_CELLS)


def _profiles_of(layer: LayerClasses, classes: Tensor) -> Tensor:
    """JM distances of the class pairs among some classes, ``[rows, pairs]``, means over cells."""
    # The classes first: what is copied after that is small.
    mean, m2 = (
        x[classes].reshape(len(classes), layer.n_features, -1)[:, layer.rows][:, :, _cells_of(layer)]
        for x in (layer.moments.mean, layer.moments.m2)
    )
    part = ClassMoments(layer.moments.classes[classes], layer.moments.count[classes], mean, m2)
    return profiles(part).reshape(len(layer.rows), -1, mean.shape[2]).mean(2).cpu()


def _evenly(n: int, most: int) -> Tensor:
    return torch.linspace(0, n - 1, min(n, most)).round().long()


def _best_pairs(
    layers: Sequence[LayerClasses], selection: ChannelSelection
) -> tuple[tuple[tuple[ClassPair, ...], ...], tuple[int, int]]:
    """For every cluster the pairs that it tells apart best, and how many classes were compared of how many."""
    if not layers or layers[0].moments.n_classes < 2:
        return (), (0, 0)
    classes = layers[0].moments.classes.cpu()
    n_values = sum(len(layer.rows) * len(_cells_of(layer)) for layer in layers)
    compared = _evenly(len(classes), max(_FEWEST_CLASSES, int((2 * _MOST_VALUES / n_values) ** 0.5)))
    first, second = torch.triu_indices(len(compared), len(compared), 1)
    labels = torch.tensor(selection.labels)
    total = torch.zeros(len(selection.medoids), len(first), dtype=torch.float64)
    n_rows = torch.zeros(len(selection.medoids), dtype=torch.float64)
    for layer in layers:
        of_rows = labels[layer.components]
        total.index_add_(0, of_rows, _profiles_of(layer, compared))
        n_rows.index_add_(0, of_rows, torch.ones(len(of_rows), dtype=torch.float64))
    best = (total / n_rows.clamp(min=1)[:, None]).topk(min(_N_PAIRS, len(first)))
    a, b = (classes[compared][side][best.indices].tolist() for side in (first, second))
    distances = best.values.mul(1000).round().div(1000).tolist()
    pairs = tuple(
        tuple(ClassPair(*pair) for pair in zip(*of_cluster, strict=True))
        for of_cluster in zip(a, b, distances, strict=True)
    )
    return pairs, (len(compared), len(classes))
