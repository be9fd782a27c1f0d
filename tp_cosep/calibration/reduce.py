"""Statistics of several processes made those of all data, see :mod:`tp_cosep.utils.distributed`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from tp_cosep.calibration.class_observer import ClassObserver
from tp_cosep.calibration.input_observer import InputStatistics
from tp_cosep.errors import InputError
from tp_cosep.functional.class_moments import ClassMoments
from tp_cosep.functional.second_moments import SecondMoments
from tp_cosep.graph.patches import Patches
from tp_cosep.utils.distributed import gathered, is_distributed, summed

__all__ = ["merged_classes", "merged_inputs", "merged_seconds"]


def merged_classes(observer: ClassObserver | None, device: torch.device) -> tuple[dict[str, ClassMoments], set[str]]:
    """Class moments of the data of all processes.

    Args:
        observer: What this process gathered; layers and classes may be missing where no sample reached them.
        device: Of the model.

    Returns:
        By layer name, of all layers that some process measured; and the layers that are unclear in one.

    Raises:
        InputError: If a layer has other channels or cells in another process.
    """
    moments = {} if observer is None else observer.moments
    unclear = set() if observer is None else observer.unclear
    if not is_distributed():
        return moments, unclear
    seen: dict[str, list[tuple[list[int], int, int]]] = {}
    own = {n: (m.classes.tolist(), m.n_components, m.n_cells) for n, m in moments.items()}
    for shapes, of_one in gathered((own, unclear)):
        unclear = unclear | of_one
        for name, shape in shapes.items():
            seen.setdefault(name, []).append(shape)
    return {name: _merged(moments.get(name), name, shapes, device) for name, shapes in seen.items()}, unclear


def merged_inputs(
    found: dict[str, InputStatistics], model: nn.Module, device: torch.device
) -> dict[str, InputStatistics]:
    """Second moments of the data of all processes; class moments are left out.

    Args:
        found: What this process saw, by layer name.
        model: The model.
        device: Of the model.

    Returns:
        By layer name, of all layers that some process measured.
    """
    if not is_distributed():
        return found
    seen: dict[str, tuple[int, int]] = {}
    for sizes in gathered({name: (m.patches.repeat, m.second.n_features) for name, m in found.items()}):
        seen = {**sizes, **seen}
    merged = {}
    for name, (repeat, n_features) in seen.items():
        layer = model.get_submodule(name)
        second = found[name].second if name in found else SecondMoments(n_features, device, n_folds=1)
        second.sum_up(summed)
        merged[name] = InputStatistics(Patches(layer, repeat=repeat), layer.weight.shape, second)  # type: ignore[arg-type]
    return merged


def _merged(
    own: ClassMoments | None, name: str, shapes: list[tuple[list[int], int, int]], device: torch.device
) -> ClassMoments:
    sizes = {shape[1:] for shape in shapes if shape[0]}
    if len(sizes) > 1:
        raise InputError(
            f"layer {name!r}: expected as many channels and cells in every process, got {sorted(sizes)}; give all of "
            "them inputs of one size, and with spatial='auto' n_classes."
        )
    if not sizes:
        return ClassMoments()
    classes = torch.tensor(sorted({label for shape in shapes for label in shape[0]}), device=device)
    count = torch.zeros(len(classes), dtype=torch.int64, device=device)
    total = torch.zeros(len(classes), *sizes.pop(), dtype=torch.float64, device=device)
    squares, has_own = torch.zeros_like(total), own is not None and not own.is_empty
    if own is not None and has_own:
        rows = torch.searchsorted(classes, own.classes)
        count[rows] = own.count
        total[rows] = own.mean * own.count[:, None, None]
    count = summed(count)
    mean = summed(total) / count[:, None, None]
    if own is not None and has_own:
        # About the common mean: M2 + n (mean − common mean)².
        squares[rows] = own.m2 + own.count[:, None, None] * (own.mean - mean[rows]).square()
    return ClassMoments(classes, count, mean, summed(squares))


def merged_seconds(moments: Iterable[SecondMoments]) -> None:
    """Make second moments those of the data of all processes, in place; every process has the same layers."""
    if is_distributed():
        for second in moments:
            second.sum_up(summed)
