"""Complementary separability pruning (CoSeP) for Torch-Pruning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tp_cosep.compensator import Compensator, Repair
    from tp_cosep.errors import (
        CoSePError,
        DistributedError,
        InputError,
        MissingDependencyError,
        NotFittedError,
        PruningError,
    )
    from tp_cosep.heads import attention_heads
    from tp_cosep.importance import CoSePSelector
    from tp_cosep.knee import KneeMethod
    from tp_cosep.memory import MemoryEstimate
    from tp_cosep.moments import ClassMoments
    from tp_cosep.plan import GroupPlan, PruningPlan
    from tp_cosep.pruner import CoSePPruner
    from tp_cosep.recalibration import recalibrate
    from tp_cosep.saving import load, save
    from tp_cosep.selection import ChannelSelection
    from tp_cosep.sharing import Preview, TradeOff

__version__ = "0.1.0"

__all__ = [
    "ChannelSelection",
    "ClassMoments",
    "CoSePError",
    "CoSePPruner",
    "CoSePSelector",
    "Compensator",
    "DistributedError",
    "GroupPlan",
    "InputError",
    "KneeMethod",
    "MemoryEstimate",
    "MissingDependencyError",
    "NotFittedError",
    "Preview",
    "PruningError",
    "PruningPlan",
    "Repair",
    "TradeOff",
    "attention_heads",
    "load",
    "recalibrate",
    "save",
]

# Names are looked up when they are first asked for, so that ``tp-cosep --help`` need not wait for torch.
_MODULE_OF = {
    "ChannelSelection": "selection",
    "ClassMoments": "moments",
    "CoSePError": "errors",
    "CoSePPruner": "pruner",
    "CoSePSelector": "importance",
    "Compensator": "compensator",
    "DistributedError": "errors",
    "GroupPlan": "plan",
    "InputError": "errors",
    "KneeMethod": "knee",
    "MemoryEstimate": "memory",
    "MissingDependencyError": "errors",
    "NotFittedError": "errors",
    "Preview": "sharing",
    "PruningError": "errors",
    "PruningPlan": "plan",
    "Repair": "compensator",
    "TradeOff": "sharing",
    "attention_heads": "heads",
    "load": "saving",
    "recalibrate": "recalibration",
    "save": "saving",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
