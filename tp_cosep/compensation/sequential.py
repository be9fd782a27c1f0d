"""Paired inputs of a group's consumers, in the original model and in the model as pruned so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tp_cosep.compensation.refit import ConsumerState
from tp_cosep.errors import InputError
from tp_cosep.functional.second_moments import SecondMoments
from tp_cosep.graph.consumers import named, sampling_inputs
from tp_cosep.graph.patches import Patches
from tp_cosep.utils.data import CalibrationData, evaluating, n_samples
from tp_cosep.utils.sampling import PositionSampler

__all__ = ["paired_moments"]


def paired_moments(
    model: nn.Module,
    originals: Mapping[nn.Module, nn.Module],
    consumers: Mapping[nn.Module, ConsumerState],
    data: CalibrationData,
    *,
    run: Callable[[nn.Module, Any], object],
    max_positions: int | None,
    seed: int,
    n_expected: int,
) -> dict[nn.Module, list[SecondMoments]]:
    """Second moments of rows (inputs of a consumer in the original model, its kept inputs in the pruned model).

    Both models run on the same batches, and are sampled at the same positions.

    Args:
        model: The model as pruned so far.
        originals: The modules of the unpruned model by those of this one.
        consumers: The consumers by layer, with the inputs that they are about to lose.
        data: Calibration data, the same as in the first pass.
        run: ``run(model, inputs)`` runs a model.
        max_positions: Positions per sample, see :class:`tp_cosep.Compensator`.
        seed: Seed of the sampled positions.
        n_expected: Number of samples in the first pass.

    Returns:
        By layer the moments of each channel group.

    Raises:
        InputError: If there is less data than in the first pass, it no longer reaches a layer, the model does not run,
            or inputs are NaN or infinite.
    """
    now = {consumer.name: consumer.patches for consumer in consumers.values()}
    # The original's sizes determine the number of positions in both: rows have to match.
    before = {name: replace(patches, layer=originals[patches.layer]) for name, patches in now.items()}
    sums: dict[nn.Module, list[SecondMoments]] = {layer: [] for layer in consumers}
    n_seen = 0

    def rows_of(patches: Mapping[str, Patches], model: nn.Module, inputs: Any) -> dict[str, list[Tensor]]:
        rows: dict[str, list[Tensor]] = {name: [] for name in patches}
        hooks = sampling_inputs(
            patches,
            PositionSampler(inputs, seed),
            lambda name, x: rows[name].append(x),
            max_positions=max_positions,
            sized_by=before,
        )
        with evaluating(model), hooks, _as_pruned():
            run(model, inputs)
        return rows

    for _, inputs, _ in data.batches(data.adapter(model), "second moments"):
        n_seen += n_samples(inputs) or 0
        rows0, rows = rows_of(before, originals[model], inputs), rows_of(now, model, inputs)
        for layer, consumer in consumers.items():
            name = consumer.name
            if rows0[name] or rows[name]:  # else this batch did not reach it
                with named(name):
                    _add(sums[layer], consumer, rows0[name], rows[name])
    if n_seen < n_expected:
        came = f"{n_seen} of the {n_expected} samples" if n_seen else "none"
        raise InputError(
            "Compensator: mode='sequential' reads the data again for every group, and the loader gave "
            f"{came} this time; pass a DataLoader or a list of batches."
        )
    for layer, found in sums.items():
        if not found:
            raise InputError(f"layer {consumers[layer].name!r}: the data reached it in fit(), and no longer does.")
    return sums


@contextmanager
def _as_pruned() -> Iterator[None]:
    """Report any failure as that of the model as pruned so far: it does not run, or not on data of this type."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            "Compensator: mode='sequential' runs the model between groups, and as pruned so far it fails "
            f"({type(error).__name__}: {error}); after every group.prune() correct the sizes in its attributes, "
            "such as numbers of heads, and keep its dtype as it was in fit()."
        ) from error


def _add(sums: list[SecondMoments], consumer: ConsumerState, before: list[Tensor], now: list[Tensor]) -> None:
    """Add the rows of a batch, for each channel group separately."""
    n_before, n_now = (sum(map(len, parts)) for parts in (before, now))
    if n_before != n_now:
        raise InputError(
            f"read {n_before} rows of a batch in the original model and {n_now} as pruned so far; mode='sequential' "
            "requires a model that sends the same samples to a layer; use mode='one-shot'."
        )
    original, pruned = torch.cat(before), torch.cat(now)
    patches = consumer.patches
    kept = pruned[:, patches.features_of(consumer.kept_inputs()).to(pruned.device)]
    for j, pair in enumerate(zip(*(x.chunk(patches.groups, 1) for x in (original, kept)), strict=True)):
        x = torch.cat(pair, 1)
        if j == len(sums):
            sums.append(SecondMoments(x.shape[1], x.device))
        sums[j].update(x)
