"""Models by name, and weights from files."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tp_cosep.cli.torchvision_shim import import_torchvision
from tp_cosep.errors import InputError, MissingDependencyError

__all__ = ["ImageSpec", "call", "function_of", "image_spec", "make_model", "module_of", "read_weights"]

_NESTED = ("state_dict", "model_state_dict", "model")


@dataclass(frozen=True)
class ImageSpec:
    """The images that a model is made for.

    Attributes:
        size: Height and width in pixels; ``None`` if unknown.
        mean: Mean by channel, of values in [0, 1]; ``None`` if unknown.
        std: Standard deviation by channel, of values in [0, 1]; ``None`` if unknown.
        n_channels: Input channels of the first convolution.
    """

    size: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    n_channels: int


def make_model(options: argparse.Namespace, *, with_weights: bool = True) -> nn.Module:
    """Make the model that ``--model`` names, with the weights of ``--weights`` if it was given.

    Args:
        options: Options of the command.
        with_weights: Whether to load the weights, or make the architecture alone.

    Returns:
        The model in eval mode, on the CPU.

    Raises:
        InputError: If the model, its arguments or its weights cannot be used.
        MissingDependencyError: If a package is not installed.
    """
    kind, _, name = options.model.partition(":")
    arguments, pretrained = dict(options.model_args), with_weights and options.pretrained
    if pretrained and kind not in ("torchvision", "timm"):
        raise InputError(f"--pretrained: expected a model of torchvision or timm, got {options.model!r}.")
    make = {"torchvision": _torchvision, "timm": _timm, "hf": _hugging_face}.get(kind)
    if make is None:
        function = function_of(options.model, "model")
        model = call(options.model, lambda: function(**arguments))
    else:
        model = call(options.model, lambda: make(name, arguments, pretrained))
    if not isinstance(model, nn.Module):
        raise InputError(f"model {options.model!r}: expected an nn.Module, got a {type(model).__name__}.")
    if with_weights and options.allow_pickle is not None and options.weights is None:
        raise InputError("--allow-pickle: expected --weights with the same file.")
    if with_weights and options.weights is not None:
        read_weights(model, options.weights, options.allow_pickle)
    return model.eval()


def read_weights(model: nn.Module, path: Path, allow_pickle: Path | None = None) -> None:
    """Load a ``state_dict`` from a file into a model.

    Args:
        model: The model.
        path: A safetensors file, or one of ``torch.save``, of which no code is run.
        allow_pickle: The same file, if it may be unpickled in full.

    Raises:
        InputError: If the file is damaged, requires unpickling, or does not fit the model.
    """
    if allow_pickle is not None and allow_pickle.resolve() != path.resolve():
        raise InputError(f"--allow-pickle: expected the file of --weights, {str(path)!r}, got {str(allow_pickle)!r}.")
    if not path.is_file():
        raise InputError(f"weights {str(path)!r}: no such file.")
    state = _safe_tensors(path) if path.suffix == ".safetensors" else _unpickled(path, allow_pickle is not None)
    for key in _NESTED:
        if isinstance(state, Mapping) and isinstance(state.get(key), (Mapping, nn.Module)):
            state = state[key]
    if isinstance(state, nn.Module):
        state = state.state_dict()
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise InputError(f"weights {str(path)!r}: expected a state_dict, got a {type(state).__name__}.")
    if state and all(key.startswith("module.") for key in state):  # of a model wrapped for data parallelism
        state = {key.removeprefix("module."): x for key, x in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(
            f"weights {str(path)!r}: do not fit the model ({error}); set its arguments with --model-args, such as "
            "num_classes=10."
        ) from error


def _safe_tensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"weights {str(path)!r}: expected a safetensors file, got {error}.") from error


def _unpickled(path: Path, allowed: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=not allowed)
    except pickle.UnpicklingError as error:
        if allowed:
            raise InputError(f"weights {str(path)!r}: damaged ({error}).") from error
        raise InputError(
            f"weights {str(path)!r}: more than tensors, or damaged. Reading it would run any code in it; if "
            f"you trust its author, add --allow-pickle {path}, or save model.state_dict() as safetensors."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"weights {str(path)!r}: expected a file of torch.save, got {error}.") from error


def function_of(name: str, what: str) -> Callable[..., Any]:
    """The function that MODULE:FUNCTION names; the working directory is searched, too.

    Args:
        name: ``MODULE:FUNCTION``.
        what: The kind of thing that is named, for messages.

    Returns:
        The function.

    Raises:
        InputError: If there is no such function.
    """
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in module.split(".")) or not attribute.isidentifier():
        raise InputError(f"{what} {name!r}: expected a name that --help lists, or MODULE:FUNCTION.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise InputError(f"{what} {name!r}: its module needs {error.name!r}, which is not installed.") from error
        raise InputError(f"{what} {name!r}: no module {error.name!r} in the working directory or installed.") from error
    if not callable(found):
        raise InputError(f"{what} {name!r}: the module has no function {attribute!r}.")
    function: Callable[..., Any] = found
    return function


def module_of(package: str, extra: str) -> Any:
    """Import an optional package.

    Args:
        package: Name of the package.
        extra: The extra of tp_cosep that installs it.

    Returns:
        The module.

    Raises:
        MissingDependencyError: If it is not installed.
        ModuleNotFoundError: If a package that it needs is not installed.
    """
    try:
        return import_torchvision() if package == "torchvision" else import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package.partition(".")[0]:
            raise
        raise MissingDependencyError(f"{package} is not installed; pip install 'tp_cosep[{extra}]'.") from error


def image_spec(options: argparse.Namespace, model: nn.Module) -> ImageSpec:
    """The images that a model is made for, as far as its library says."""
    kind, _, name = options.model.partition(":")
    size, mean, std = None, None, None
    if kind == "torchvision":
        models = module_of("torchvision", "cli").models
        how = models.get_model_weights(name).DEFAULT.transforms()
        size, mean, std = how.crop_size[0], how.mean, how.std
    elif kind == "timm":
        config = module_of("timm", "hub").data.resolve_data_config({}, model=model)
        size, mean, std = config["input_size"][-1], config["mean"], config["std"]
    elif kind == "hf":
        size, mean, std = _hugging_face_images(Path(name))
        size = size or getattr(model.config, "image_size", None)
        size = size[0] if isinstance(size, (list, tuple)) else size
    convolutions = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    n_channels = next((m.in_channels for m in convolutions), 3)
    return ImageSpec(size, tuple(mean) if mean else None, tuple(std) if std else None, n_channels)


def call(name: str, make: Callable[[], Any]) -> Any:
    """Call a function that the user named.

    Args:
        name: Its name, for the message.
        make: The call.

    Returns:
        What the call returns.

    Raises:
        InputError: If it fails.
        MissingDependencyError: If it needs a package that is not installed.
    """
    try:
        return make()
    except (InputError, MissingDependencyError):
        raise
    except Exception as error:
        raise InputError(f"{name!r} failed: {type(error).__name__}: {error}") from error


def _torchvision(name: str, arguments: dict[str, Any], pretrained: bool) -> nn.Module:
    models = module_of("torchvision", "cli").models
    _check_name(f"torchvision:{name}", name, models.list_models(models))
    model: nn.Module = models.get_model(name, weights="DEFAULT" if pretrained else None, **arguments)
    return model


def _timm(name: str, arguments: dict[str, Any], pretrained: bool) -> nn.Module:
    timm = module_of("timm", "hub")
    _check_name(f"timm:{name}", name.partition(".")[0], timm.list_models())
    model: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
    return model


def _hugging_face(name: str, arguments: dict[str, Any], pretrained: bool) -> nn.Module:
    if not (Path(name) / "config.json").is_file():
        raise InputError(f"model 'hf:{name}': expected a folder with config.json and model.safetensors.")
    auto = module_of("transformers", "hub").AutoModelForImageClassification
    safe = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    model: nn.Module = auto.from_pretrained(name, **{**arguments, **safe})
    return model


def _hugging_face_images(folder: Path) -> tuple[int | None, Any, Any]:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return None, None, None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        size = config.get("crop_size") or config.get("size")
        if isinstance(size, dict):
            size = size.get("height") or size.get("shortest_edge")
        return (None if size is None else int(size)), config.get("image_mean"), config.get("image_std")
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"model: {str(path)!r} is damaged ({error}).") from error


def _check_name(full: str, name: str, known: Iterable[str]) -> None:
    if name not in (names := list(known)):
        nearest = difflib.get_close_matches(name, names, 3, 0)
        raise InputError(f"model {full!r}: no such model; similar names: {', '.join(nearest)}.")
