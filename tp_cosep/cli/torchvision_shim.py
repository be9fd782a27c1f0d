"""Importing torchvision where its compiled operators do not fit the installed torch.

The demo and the tests use this module; the library proper never imports torchvision.

A torchvision wheel built for CUDA cannot load its operators beside a CPU build of torch. torchvision
swallows that failure, and then stumbles over it: it describes the shapes of ``nms`` and ``qnms`` to torch,
which has never heard of them. Classifiers, transforms and data sets need neither operator, and neither does
timm. So it is enough to declare the two; whoever calls a detection operator gets torchvision's own error.

At its top this file imports nothing of tp_cosep, so that it can be loaded by its path, before the package and with it
torch_pruning.
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
    """Import torchvision, with its two missing operators declared if it fails for lack of them.

    An installation that works is imported as it is. Call this before the first ``import torch_pruning``
    where timm is installed: Torch-Pruning tries timm once, timm imports torchvision, and a failure there
    makes Torch-Pruning do without timm for good.

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
