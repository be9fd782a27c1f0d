"""Tracing a model with Torch-Pruning, and layers as users name them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch.nn.parameter import is_lazy

from tp_cosep.errors import InputError, PruningError
from tp_cosep.utils.data import described, evaluating, run_model

__all__ = [
    "ROOT_TYPES",
    "TRACE_OPTIONS",
    "cannot_follow",
    "check_autograd",
    "check_plain",
    "frozen_kept",
    "resolve_layers",
    "resolve_ratios",
    "trace",
    "trace_options",
    "tracing",
]

#: Torch-Pruning's default types of root layers.
ROOT_TYPES: tuple[type[nn.Module], ...] = (nn.modules.conv._ConvNd, nn.Linear, nn.LSTM)
#: What :func:`trace` takes beside a model and its inputs, whoever is told of it.
TRACE_OPTIONS = ("forward_fn", "output_transform", "unwrapped_parameters", "customized_pruners")


def check_autograd() -> None:
    """Refuse to work in inference mode.

    Raises:
        InputError: If it is on.
    """
    if torch.is_inference_mode_enabled():
        raise InputError(
            "torch.inference_mode: expected it to be off, since a model is traced by its gradients, and parameters "
            "that are made in it cannot be trained; leave it before the call, which keeps no gradients anyway."
        )


def check_plain(model: nn.Module, *, may_be_empty: bool = False) -> None:
    """Refuse what cannot be measured and pruned, such as models in wrappers that hold on to their parameters.

    Args:
        model: The model.
        may_be_empty: Whether shapes are enough: parameters may be on the meta device.

    Raises:
        InputError: If it is no module, or wrapped for parallel training, compiled or sharded, or without weights that
            can be used; or if inference mode is on.
    """
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected an nn.Module, got {described(model)}; the model is the first argument.")
    check_autograd()
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise InputError(
            f"model: expected a plain module, got a {kind}, which holds on to parameters that pruning replaces; pass "
            "model.module, and wrap it again after pruning."
        )
    if hasattr(model, "_orig_mod"):
        raise InputError(
            f"model: expected a plain module, got a compiled one ({kind}), whose code is made for the shapes it has; "
            "pass model._orig_mod, and compile again after pruning."
        )
    sharded = next((name for name, p in model.named_parameters() if hasattr(p, "device_mesh")), None)
    is_fsdp = any(type(m).__name__ in ("FullyShardedDataParallel", "FlatParameter") for m in model.modules())
    if sharded is not None or is_fsdp:
        raise InputError(
            f"model: expected whole parameters, got sharded ones ({sharded or kind}); gather the model in every "
            "process first (torch.distributed.checkpoint.state_dict, full_state_dict=True), and shard it again after "
            "pruning."
        )
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if x.is_meta and not may_be_empty:
            raise InputError(
                f"model: expected weights with values, got {name!r} on the meta device; load the weights first "
                "(model.to_empty(device='cpu'), then load_state_dict)."
            )
        if not is_lazy(x) and x.is_inference():
            raise InputError(
                f"model: expected weights that can have gradients, got {name!r}, which was made under "
                "torch.inference_mode(); make or load the model outside of it."
            )


@contextmanager
def tracing(model: nn.Module) -> Iterator[None]:
    """Let Torch-Pruning trace a model and get the model back as it was, also after an exception.

    It follows the graph that autograd records, in which frozen layers are missing; so everything requires a
    gradient meanwhile. The hooks that an interrupted trace leaves behind are removed.
    """
    hooks = {m: set(m._forward_hooks) for m in model.modules()}
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        with evaluating(model), torch.enable_grad():
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
        for m, before in hooks.items():
            for key in set(m._forward_hooks) - before:
                del m._forward_hooks[key]


def trace(model: nn.Module, example_inputs: Any, **options: Any) -> Any:
    """Torch-Pruning's dependency graph of a model, see :func:`tracing` and :func:`trace_options`.

    Returns:
        A ``tp.DependencyGraph``.

    Raises:
        InputError: If inference mode is on.
        PruningError: If the model does not run on the inputs, or Torch-Pruning cannot follow it.
    """
    check_autograd()
    try:
        with tracing(model):
            return tp.DependencyGraph().build_dependency(
                model, example_inputs=example_inputs, **{**options, **trace_options(options)}
            )
    except Exception as error:
        raise PruningError(cannot_follow(error, model, example_inputs, options.get("forward_fn"))) from error


def cannot_follow(
    error: Exception, model: nn.Module, example_inputs: Any, forward_fn: Callable[[nn.Module, Any], Any] | None
) -> str:
    """What to say of an error in a trace: whether it is for the inputs or for Torch-Pruning."""
    try:
        with evaluating(model):
            (forward_fn or run_model)(model, example_inputs)
        advice = "the model runs on them, so it is one that Torch-Pruning cannot trace"
    except Exception:  # which is most likely the error that is told
        advice = "expected inputs that the model takes"
    fixed = f"{type(error).__name__}: {error}"
    return f"example_inputs: Torch-Pruning cannot follow the model on them ({fixed}); {advice}."


def trace_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """What Torch-Pruning's tracing needs beside the options that were given, or in place of them.

    Returns:
        An ``output_transform`` that leaves out what has no gradient (caches, ``None``) if there is none;
        ``unwrapped_parameters`` as a list of its own, since tracing adds to it.
    """
    changed: dict[str, Any] = {}
    if given.get("output_transform") is None:
        changed["output_transform"] = _with_gradient
    unwrapped = given.get("unwrapped_parameters")
    if unwrapped is not None:
        changed["unwrapped_parameters"] = [*unwrapped.items()] if isinstance(unwrapped, Mapping) else [*unwrapped]
    return changed


def _with_gradient(outputs: Any) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        return [outputs] if outputs.grad_fn is not None else []
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    parts = outputs if isinstance(outputs, (tuple, list)) else ()
    return [tensor for part in parts for tensor in _with_gradient(part)]


@contextmanager
def frozen_kept(model: nn.Module) -> Iterator[None]:
    """Keep frozen parameters frozen while pruning replaces them by new ones."""
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    yield
    parameters = dict(model.named_parameters())
    for name in frozen:
        parameters[name].requires_grad_(False)


def resolve_layers(model: nn.Module, layers: Iterable[Any] | None, where: str) -> list[Any]:
    """Layers given as modules, parameters, names of these, or module types, as modules and parameters of the model.

    A container of the caller's own that holds layers of the model stands for them.

    Returns:
        Modules and parameters.

    Raises:
        InputError: If they are no list, or one of them is not part of the model.
    """
    if isinstance(layers, (str, nn.Parameter)) or not isinstance(layers, Iterable | None):
        alone = repr(layers) if isinstance(layers, str) else "layer"
        raise InputError(f"{where}: expected a list of layers, got {described(layers)}; write [{alone}], in brackets.")
    names = {**dict(model.named_parameters()), **dict(model.named_modules())}
    modules, found = set(model.modules()), list[Any]()
    for layer in layers or ():
        if isinstance(layer, type):
            found.extend(m for m in modules if isinstance(m, layer))
        elif isinstance(layer, str) and layer in names:
            found.append(names[layer])
        elif isinstance(layer, nn.Parameter) or (isinstance(layer, nn.Module) and layer in modules):
            found.append(layer)
        elif isinstance(layer, nn.Module) and (inside := [m for m in layer.children() if m in modules]):
            found.extend(inside)
        else:
            raise InputError(
                f"{where}: expected modules of the model, their names or types, got {described(layer)} that is not "
                "part of it."
            )
    return found


def resolve_ratios(model: nn.Module, ratios: Mapping[Any, float] | None) -> dict[Any, float] | None:
    """A ``pruning_ratio_dict`` whose keys are layers or tuples of them, given as for :func:`resolve_layers`.

    Returns:
        The same ratios by module, or ``None`` for ``None``.

    Raises:
        InputError: If a key is not part of the model.
    """
    if ratios is None:
        return None
    resolved: dict[Any, float] = {}
    for layers, ratio in ratios.items():
        together = isinstance(layers, tuple)
        found = resolve_layers(model, layers if together else (layers,), "pruning_ratio_dict")
        resolved.update({tuple(found): ratio} if together else dict.fromkeys(found, ratio))
    return resolved
