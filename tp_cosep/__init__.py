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
from tp_cosep.moments import ClassMoments
from tp_cosep.plan import GroupPlan, PruningPlan
from tp_cosep.pruner import CoSePPruner
from tp_cosep.recalibration import recalibrate
from tp_cosep.saving import load, save
from tp_cosep.selection import ChannelSelection

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
    "MissingDependencyError",
    "NotFittedError",
    "PruningError",
    "PruningPlan",
    "Repair",
    "attention_heads",
    "load",
    "recalibrate",
    "save",
]
