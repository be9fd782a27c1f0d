"""Tracing a model with Torch-Pruning, checks of traceable models, and resolving user-specified layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch.nn.parameter import is_lazy

from tp_cosep.errors import InputError, PruningError
from tp_cosep.graph.protocols import DependencyGraph
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
#: Options of :func:`trace`, under the names that pruner, selector and compensator share.
TRACE_OPTIONS = ("forward_fn", "output_transform", "unwrapped_parameters", "customized_pruners")


def check_autograd() -> None:
    """Refuse inference mode.

    Raises:
        InputError: If it is on.
    """
    if torch.is_inference_mode_enabled():
        raise InputError(
            "torch.inference_mode: expected it to be off, since models are traced through autograd, and parameters "
            "created in it cannot be trained; leave it before the call, which keeps no gradients anyway."
        )


def check_plain(model: nn.Module, *, may_be_empty: bool = False) -> None:
    """Refuse models that cannot be measured and pruned, such as those in wrappers that reference their parameters.

    Args:
        model: The model.
        may_be_empty: Whether parameters may be on the meta device, since only their shapes are used.

    Raises:
        InputError: If the model is no module, or is wrapped for parallel training, compiled or sharded, or its weights
            are on the meta device or were created in inference mode; or if inference mode is on.
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
    """Prepare a model for a trace, and restore it afterwards, also after an exception.

    Torch-Pruning follows the graph that autograd records, in which frozen layers are missing; so all parameters
    require a gradient during the trace. Hooks that an interrupted trace leaves behind are removed.
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


def trace(model: nn.Module, example_inputs: Any, **options: Any) -> DependencyGraph:
    """Build Torch-Pruning's dependency graph of a model, see :func:`tracing` and :func:`trace_options`.

    Args:
        model: The model.
        example_inputs: Inputs for tracing.
        **options: Options of ``DependencyGraph.build_dependency``.

    Returns:
        A ``tp.DependencyGraph``.

    Raises:
        InputError: If inference mode is on.
        PruningError: If the model does not run on the inputs, or Torch-Pruning cannot follow it.
    """
    check_autograd()
    try:
        with tracing(model):
            graph: DependencyGraph = tp.DependencyGraph().build_dependency(
                model, example_inputs=example_inputs, **{**options, **trace_options(options)}
            )
    except Exception as error:
        raise PruningError(cannot_follow(error, model, example_inputs, options.get("forward_fn"))) from error
    return graph


def cannot_follow(
    error: Exception, model: nn.Module, example_inputs: Any, forward_fn: Callable[[nn.Module, Any], Any] | None
) -> str:
    """The message for an error in a trace: whether the inputs do not fit the model, or Torch-Pruning does not."""
    try:
        with evaluating(model):
            (forward_fn or run_model)(model, example_inputs)
        advice = "the model runs on them, so it is one that Torch-Pruning cannot trace"
    except Exception:  # most likely the error that is reported
        advice = "expected inputs that the model takes"
    fixed = f"{type(error).__name__}: {error}"
    return f"example_inputs: Torch-Pruning cannot follow the model on them ({fixed}); {advice}."


def trace_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of Torch-Pruning's trace that are added to the user-specified ones, or replace them.

    Returns:
        An ``output_transform`` that keeps the outputs with a gradient (no caches, no ``None``), unless one is given;
        ``unwrapped_parameters`` as a copy, since tracing appends to it.
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
    """Keep frozen parameters frozen, although pruning replaces them by new ones."""
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    yield
    parameters = dict(model.named_parameters())
    for name in frozen:
        parameters[name].requires_grad_(False)


def resolve_layers(model: nn.Module, layers: Iterable[Any] | None, where: str) -> list[Any]:
    """Resolve user-specified layers: modules, parameters, their names, or module types.

    Args:
        model: The model.
        layers: The layers; a container outside of the model stands for the layers of the model in it.
        where: Name of the option, for errors.

    Returns:
        Modules and parameters of the model.

    Raises:
        InputError: If ``layers`` is no list, or one of them is not part of the model.
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
    """Resolve the keys of a ``pruning_ratio_dict``: layers as in :func:`resolve_layers`, or tuples of them.

    Args:
        model: The model.
        ratios: Ratios by layer or tuple of layers.

    Returns:
        Ratios by module or tuple of modules; ``None`` for ``None``.

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
