"""Complementary separability pruning (CoSeP) for Torch-Pruning."""

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
    "recalibrate",
]
