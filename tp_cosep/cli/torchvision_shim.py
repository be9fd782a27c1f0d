"""Import torchvision where its compiled operators do not fit the installed torch.

The demo and the tests use this module; the library proper never imports torchvision.

A torchvision wheel built for CUDA cannot load its operators with a CPU build of torch. torchvision ignores that
failure, and then registers shape functions of ``nms`` and ``qnms``, which torch does not know. Classifiers, transforms
and data sets need neither operator, nor does timm, so it suffices to declare the two; calling a detection operator
raises torchvision's own error.

The module imports nothing of tp_cosep at its top, so that it can be loaded by its path before torch_pruning.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

__all__ = ["import_torchvision"]

_SYMPTOM = "operator torchvision::nms does not exist"
_NMS_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def import_torchvision() -> ModuleType:
    """Import torchvision; declare its two missing operators if it fails for lack of them.

    A working installation is imported unchanged. Call this before the first ``import torch_pruning`` if timm is
    installed: Torch-Pruning imports timm once, which imports torchvision, and ignores timm after a failure.

    Returns:
        The module ``torchvision``.

    Raises:
        MissingDependencyError: If torchvision is not installed.
        ModuleNotFoundError: If a package that torchvision needs is not installed.
        RuntimeError: If the import fails for another reason; the error is the original one.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        from tp_cosep.errors import MissingDependencyError

        raise MissingDependencyError(
            "import_torchvision: torchvision is not installed; pip install 'tp_cosep[demo]'."
        ) from error
    except RuntimeError as error:
        if str(error) != _SYMPTOM:
            raise
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", _NMS_SCHEMA)
    for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
        del sys.modules[module]
    return importlib.import_module("torchvision")
