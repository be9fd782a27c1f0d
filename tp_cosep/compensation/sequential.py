"""What the readers of a group see in a model as pruned so far, beside what they saw in the original."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tp_cosep.compensation.refit import ConsumerState
from tp_cosep.errors import InputError
from tp_cosep.functional.second_moments import SecondMoments
from tp_cosep.graph.consumers import affordable, named, on_inputs
from tp_cosep.graph.patches import Patches
from tp_cosep.utils.data import evaluating, n_samples
from tp_cosep.utils.sampling import PositionSampler

__all__ = ["paired_moments"]


def paired_moments(
    model: nn.Module,
    originals: Mapping[nn.Module, nn.Module],
    consumers: Mapping[nn.Module, ConsumerState],
    batches: Iterable[Any],
    *,
    run: Callable[[nn.Module, Any], object],
    max_positions: int | None,
    seed: int,
    n_expected: int,
) -> dict[nn.Module, list[SecondMoments]]:
    """Second moments of rows (what a layer read in the original model, what it reads now of the channels that stay).

    Both models see the same batches, and are looked at in the same positions.

    Args:
        model: The model as pruned so far.
        originals: The modules of the unpruned model by those of this one.
        consumers: The layers, and what they are about to lose.
        batches: Inputs.
        run: ``run(model, inputs)``.
        max_positions: Positions per sample, see :class:`tp_cosep.Compensator`.
        seed: Of the positions.
        n_expected: Samples that there were before, for which the data has to be read again.

    Returns:
        For every layer the moments of each channel group.

    Raises:
        InputError: If there is less data than before, it no longer reaches a layer, the model does not run, or inputs
            are NaN or infinite.
    """
    of_original = {
        originals[layer]: replace(r, patches=_original(r.patches, originals)) for layer, r in consumers.items()
    }
    sums: dict[nn.Module, list[SecondMoments]] = {layer: [] for layer in consumers}
    n_seen = 0

    def n_positions(patches: Patches, shape: torch.Size) -> int:
        # As many as the original can afford: what is left of a layer has to be seen where it was.
        return max_positions or affordable(_original(patches, originals), shape)

    for inputs in batches:
        n = n_samples(inputs)
        if n == 0:
            continue
        n_seen += n or 0
        positions = PositionSampler(inputs, seed)
        with evaluating(originals[model]), _batch_options(of_original, n_positions, positions) as before, _as_pruned():
            run(originals[model], inputs)
        with evaluating(model), _batch_options(consumers, n_positions, positions) as now, _as_pruned():
            run(model, inputs)
        for layer, known in consumers.items():
            if before[originals[layer]] or now[layer]:  # else this batch did not reach it
                with named(known.name):
                    _add(sums[layer], known, before[originals[layer]], now[layer])
    if n_seen < n_expected:
        came = f"{n_seen} of the {n_expected} samples" if n_seen else "none"
        raise InputError(
            "Compensator: mode='sequential' reads the data again for every group, and the loader gave "
            f"{came} this time; pass a DataLoader or a list of batches."
        )
    for layer, found in sums.items():
        if not found:
            raise InputError(f"layer {consumers[layer].name!r}: the data reached it in fit(), and does not any more.")
    return sums


@contextmanager
def _batch_options(
    consumers: Mapping[nn.Module, ConsumerState],
    n_positions: Callable[[Patches, torch.Size], int],
    positions: PositionSampler,
) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """Note what layers read, ``[rows, features]`` float64 every time that they are called."""
    found: dict[nn.Module, list[Tensor]] = {layer: [] for layer in consumers}

    def take(layer: nn.Module, x: Tensor) -> None:
        known = consumers[layer]
        n = n_positions(known.patches, x.shape)
        found[layer].append(known.patches.sampler(x.shape, n, positions.for_layer(known.name))(x))

    with on_inputs(consumers, take):
        yield found


@contextmanager
def _as_pruned() -> Iterator[None]:
    """Say of whatever fails that the model as pruned so far does not run, or that the data is no longer of its type."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            "Compensator: mode='sequential' runs the model between groups, and as pruned so far it fails "
            f"({type(error).__name__}: {error}); after every group.prune() correct sizes that it keeps for "
            "itself, such as numbers of heads, and keep its type as it was in fit()."
        ) from error


def _original(patches: Patches, originals: Mapping[nn.Module, nn.Module]) -> Patches:
    """How the layer of the unpruned model reads; that of one of its own layers as it is."""
    return replace(patches, layer=originals.get(patches.layer, patches.layer))


def _add(sums: list[SecondMoments], known: ConsumerState, before: list[Tensor], now: list[Tensor]) -> None:
    """Add the rows of a batch, every channel group by itself."""
    n_before, n_now = (sum(map(len, parts)) for parts in (before, now))
    if n_before != n_now:
        raise InputError(
            f"read {n_before} rows of a batch in the original model and {n_now} as pruned so far; sequential repair "
            "needs a model that sends the same samples to a layer; use mode='one-shot'."
        )
    read, left = torch.cat(before), torch.cat(now)
    staying = left[:, known.patches.features_of(known.staying()).to(left.device)]
    for j, pair in enumerate(zip(*(x.chunk(known.patches.groups, 1) for x in (read, staying)), strict=True)):
        x = torch.cat(pair, 1)
        if j == len(sums):
            sums.append(SecondMoments(x.shape[1], x.device))
        sums[j].update(x)
