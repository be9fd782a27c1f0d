"""Complementary separability pruning (CoSeP) for Torch-Pruning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tp_cosep._version import __version__ as __version__

if TYPE_CHECKING:
    from tp_cosep.calibration.memory import MemoryEstimate
    from tp_cosep.compensation.bn_statistics import recalibrate
    from tp_cosep.compensation.compensator import Compensator
    from tp_cosep.compensation.refit import Refit
    from tp_cosep.errors import (
        CoSePError,
        DistributedError,
        InputError,
        MissingDependencyError,
        NotFittedError,
        PruningError,
    )
    from tp_cosep.functional.class_moments import ClassMoments
    from tp_cosep.functional.selection import ChannelSelection
    from tp_cosep.graph.heads import attention_heads
    from tp_cosep.pruning.budget import Preview, TradeOff
    from tp_cosep.pruning.optimizers import carry_over
    from tp_cosep.pruning.plan import PruningPlan
    from tp_cosep.pruning.pruner import CoSePPruner
    from tp_cosep.pruning.saving import load, save
    from tp_cosep.selection.attention import AttentionMapSelector
    from tp_cosep.selection.cosep import CoSePSelector
    from tp_cosep.selection.reconstruction import ReconstructionSelector
    from tp_cosep.selection.result import GroupPlan
    from tp_cosep.selection.selector import Selector

__all__ = [
    "AttentionMapSelector",
    "ChannelSelection",
    "ClassMoments",
    "CoSePError",
    "CoSePPruner",
    "CoSePSelector",
    "Compensator",
    "DistributedError",
    "GroupPlan",
    "InputError",
    "MemoryEstimate",
    "MissingDependencyError",
    "NotFittedError",
    "Preview",
    "PruningError",
    "PruningPlan",
    "ReconstructionSelector",
    "Refit",
    "Selector",
    "TradeOff",
    "attention_heads",
    "carry_over",
    "load",
    "recalibrate",
    "save",
]

# Names are looked up when they are first asked for, so that ``tp-cosep --help`` need not wait for torch.
_MODULE_OF = {
    "AttentionMapSelector": "selection.attention",
    "ChannelSelection": "functional.selection",
    "ClassMoments": "functional.class_moments",
    "CoSePError": "errors",
    "CoSePPruner": "pruning.pruner",
    "CoSePSelector": "selection.cosep",
    "Compensator": "compensation.compensator",
    "DistributedError": "errors",
    "GroupPlan": "selection.result",
    "InputError": "errors",
    "MemoryEstimate": "calibration.memory",
    "MissingDependencyError": "errors",
    "NotFittedError": "errors",
    "Preview": "pruning.budget",
    "PruningError": "errors",
    "PruningPlan": "pruning.plan",
    "ReconstructionSelector": "selection.reconstruction",
    "Refit": "compensation.refit",
    "Selector": "selection.selector",
    "TradeOff": "pruning.budget",
    "attention_heads": "graph.heads",
    "carry_over": "pruning.optimizers",
    "load": "pruning.saving",
    "recalibrate": "compensation.bn_statistics",
    "save": "pruning.saving",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
