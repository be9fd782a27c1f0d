"""A pruned model in a folder: its plan, its weights, and a manifest that says that they belong together.

The weights are a file of safetensors and the rest is JSON, so nothing in a folder is ever executed. The architecture
itself is code, which :func:`load` is given as a function. The manifest has the size and the SHA-256 of the other files:
against mistakes (a copy that broke off, files of two saves), not against somebody who changes all three.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tp_cosep.errors import InputError
from tp_cosep.graph.structure import zeros_for
from tp_cosep.pruning.plan import PruningPlan
from tp_cosep.utils.data import device_of
from tp_cosep.utils.files import read_safetensors, replacing, write_safetensors

__all__ = ["FILES", "MANIFEST", "PLAN", "WEIGHTS", "load", "read_tensors", "save", "tensors_of"]

MANIFEST, PLAN, WEIGHTS = "manifest.json", "plan.json", "weights.safetensors"
FILES = (PLAN, WEIGHTS, MANIFEST)
_FORMAT, _VERSION = "tp_cosep.model", 1


def save(model: nn.Module, plan: PruningPlan, folder: str | os.PathLike[str]) -> None:
    """Write a pruned model: ``plan.json``, ``weights.safetensors`` and ``manifest.json``.

    Parameters and buffers are kept with their types, and tensors that several layers share are kept once. Other files
    in the folder stay. If writing fails or is interrupted the old model is kept; in the moment in which the three files
    take their places, an interruption leaves a folder that :func:`load` refuses.

    A model that several pruners pruned in turn is saved with the plan of the last; the function that :func:`load` is
    given then applies the earlier ones: ``lambda: first.apply(make(), example_inputs)``.

    Args:
        model: The model after pruning, and after anything that changed its weights since.
        plan: The plan that it was pruned by, from the model as its pruner got it.
        folder: Where to; made if it is missing.

    Raises:
        InputError: If the plan is of another model, or the model has something in it that is no plain tensor.

    Example:
        >>> import tempfile
        >>> from tp_cosep import CoSePPruner, CoSePSelector
        >>> def make():
        ...     return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
        >>> model, x, y = make().eval(), torch.randn(60, 6), torch.arange(60) % 3
        >>> pruner = CoSePPruner(model, x[:1], CoSePSelector().fit(model, [(x, y)]), pruning_ratio=0.5)
        >>> pruner.step()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, pruner.plan, folder)
        ...     again = load(folder, make)
        >>> torch.equal(again(x), model(x))
        True
    """
    _check_plan_of(model, plan)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, header = tensors_of(model)
    with (
        replacing(folder / MANIFEST, "manifest") as manifest,
        replacing(folder / PLAN, "plan") as plan_file,
        replacing(folder / WEIGHTS, "weights") as weights,
    ):
        write_safetensors(weights, tensors, {"format": _FORMAT, **header})
        plan.save(plan_file)
        files = {PLAN: _facts(plan_file), WEIGHTS: _facts(weights)}
        document = {"format": _FORMAT, "version": _VERSION, "files": files}
        manifest.write_text(json.dumps(document, indent=1), encoding="utf-8")


def load(
    folder: str | os.PathLike[str],
    model_factory: Callable[[], nn.Module],
    *,
    example_inputs: Any = None,
    adapt: Callable[[nn.Module], object] | None = None,
    **trace_options: Any,
) -> nn.Module:
    """Give back a model that :func:`save` wrote: the same answers, bit for bit, on the same machine.

    Args:
        folder: Of the model.
        model_factory: Makes the unpruned model; its weights do not matter.
        example_inputs: For tracing; by default zeros of the shapes and types that the plan remembers.
        adapt: As for :meth:`PruningPlan.apply`.
        **trace_options: As for ``DependencyGraph.build_dependency``.

    Returns:
        The pruned model in eval mode, on the device on which the factory made it.

    Raises:
        InputError: If a file is missing, changed, truncated or not of this kind, or the factory makes another model
            than the one that was pruned.
        PruningError: As for :meth:`PruningPlan.apply`.
    """
    folder = Path(folder)
    _check_files(folder)
    plan = PruningPlan.load(folder / PLAN)
    model = None if isinstance(model_factory, nn.Module) or not callable(model_factory) else model_factory()
    if not isinstance(model, nn.Module):
        came = f"a {type(model_factory).__name__}" if model is None else f"one that returns a {type(model).__name__}"
        raise InputError(f"load: expected a function that makes the unpruned model as model_factory, got {came}.")
    device = device_of(model)
    if example_inputs is None:
        example_inputs = _remembered(plan, folder, device)
    plan.apply(model, example_inputs, adapt=adapt, **trace_options)
    tensors, header = read_tensors(folder / WEIGHTS, device)
    _assign(model, tensors, header, folder / WEIGHTS)
    return model.eval()


def tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All parameters and buffers of a model, those that are one tensor under several names once.

    Returns:
        The tensors by their first name, and what else there is to know: where every name finds its tensor
        (``names``), strides where they are not the usual ones (``strides``), and the buffers that are not part of the
        ``state_dict`` (``unsaved``).

    Raises:
        InputError: If something in the ``state_dict`` is no dense tensor with values.
    """
    state: dict[str, Any] = dict(model.state_dict())
    unsaved = {n: x for n, x in model.named_buffers(remove_duplicate=False) if n not in state}
    names: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, x in {**state, **unsaved}.items():
        if not isinstance(x, Tensor) or x.is_meta or x.layout != torch.strided or x.is_quantized:
            what = f"a {x.layout} tensor on {x.device}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise InputError(f"save: expected dense tensors with values in the state_dict, got {what} as {name!r}.")
        # An empty tensor has no address.
        key = (x.data_ptr(), x.dtype, x.shape, x.stride(), x.device) if x.numel() else name
        names[name] = first.setdefault(key, name)
    tensors = {name: x.detach() for name, x in {**state, **unsaved}.items() if names[name] == name}
    strides = {name: found for name, x in tensors.items() if (found := _strides(x)) is not None}
    return tensors, {"names": names, "strides": strides, "unsaved": [*unsaved]}


def read_tensors(path: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and what was written beside them.

    Args:
        path: Of a file that :func:`tp_cosep.utils.files.write_safetensors` wrote.
        device: Where the tensors go.

    Returns:
        The tensors, and the header.

    Raises:
        InputError: If the file is damaged or of another kind.
    """
    try:
        tensors, header = read_safetensors(path)
    except ValueError as error:
        raise InputError(f"weights {str(path)!r}: damaged, or no file of safetensors ({error}).") from error
    if not isinstance(header, dict):
        raise InputError(f"weights {str(path)!r}: expected a file written by tp_cosep, got another one.")
    return {name: x.to(device) for name, x in tensors.items()}, header


def _check_plan_of(model: nn.Module, plan: PruningPlan) -> None:
    if not plan.structure:
        return
    added = {f"{name}.bias" for name in plan.new_biases}
    found = model.state_dict()
    for name in [*plan.structure, *found]:
        if (name in found) != (name in plan.structure or name in added):
            layer, _, tensor = name.rpartition(".")
            where = "in the model, but not in the plan" if name in found else "in the plan, but not in the model"
            raise InputError(
                f"save: layer {layer!r}: its {tensor} is {where}; expected the plan that pruned this model."
            )
    if plan.fingerprint is not None and any(g.selection and g.selection.prune_idxs for g in plan):
        shapes = {name: f"{list(x.shape)}" for name, x in found.items() if isinstance(x, Tensor)}
        if all(described.endswith(shapes[name]) for name, described in plan.structure.items()):
            raise InputError("save: the plan removes channels, but the model has all of them; pass the pruned model.")


def _facts(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _check_files(folder: Path) -> None:
    """Compare the files of a folder with its manifest."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"model {str(folder)!r}: expected a folder written by tp_cosep.save, found no {MANIFEST}.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"manifest {str(path)!r}: expected JSON, got {error}.") from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise InputError(f"manifest {str(path)!r}: expected a file written by tp_cosep.save.")
    if document.get("version") != _VERSION:
        raise InputError(
            f"manifest {str(path)!r}: expected version {_VERSION}, got {document.get('version')!r}; update tp_cosep."
        )
    files = document.get("files")
    if not isinstance(files, dict) or set(files) != {PLAN, WEIGHTS}:
        raise InputError(f"manifest {str(path)!r}: damaged, expected entries for {PLAN} and {WEIGHTS}.")
    for name, expected in files.items():
        if not (folder / name).is_file():
            raise InputError(f"model {str(folder)!r}: {name} is missing.")
        found = _facts(folder / name)
        if found != expected:
            raise InputError(
                f"model {str(folder)!r}: {name} is not the file that was saved with the others: expected {expected}, "
                f"got {found}; it was changed or cut short, or belongs to another save. Save the model again."
            )


def _remembered(plan: PruningPlan, folder: Path, device: torch.device) -> Any:
    if plan.inputs is None:
        raise InputError(f"model {str(folder)!r}: the plan does not say what inputs look like; pass example_inputs=.")
    try:
        return zeros_for(plan.inputs, device)
    except ValueError as error:
        raise InputError(f"model {str(folder)!r}: {error}; pass example_inputs=.") from error


def _assign(model: nn.Module, tensors: Mapping[str, Tensor], header: Mapping[str, Any], path: Path) -> None:
    """Put tensors in the place of a model's own, with their types and shared as they were."""
    if header.get("format") != _FORMAT or header.keys() < {"names", "strides", "unsaved"}:
        raise InputError(f"weights {str(path)!r}: expected the weights of a model written by tp_cosep.save.")
    try:
        laid_out = {name: _laid_out(x, header["strides"].get(name)) for name, x in tensors.items()}
        parameters = {name: nn.Parameter(x, requires_grad=False) for name, x in laid_out.items()}
        is_parameter = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        state = {name: (parameters if name in is_parameter else laid_out)[at] for name, at in header["names"].items()}
        unsaved = {name: state.pop(name) for name in header["unsaved"]}
        model.load_state_dict(state, assign=True)
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise InputError(
            f"weights {str(path)!r}: do not fit the model that the plan makes of the factory's ({error}); pass a "
            "factory of the model that was pruned."
        ) from error
    for name in unsaved.keys() & dict(model.named_buffers(remove_duplicate=False)).keys():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, unsaved[name])


def _strides(x: Tensor) -> list[int] | None:
    """Strides of a copy of a tensor that keeps its layout; ``None`` for the usual ones."""
    # Kernels are chosen by them even where they make no difference: of a 1 × 1 convolution in channels-last order.
    found = list(torch.empty_like(x, device="meta").stride())
    return None if found == list(torch.empty(x.shape, device="meta").stride()) else found


def _laid_out(x: Tensor, strides: list[int] | None) -> Tensor:
    """The same values in memory as they were."""
    if strides is None:
        return x
    last = sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
    if last + 1 != x.numel():
        raise ValueError(f"strides {strides} do not fit the shape {tuple(x.shape)}")
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
