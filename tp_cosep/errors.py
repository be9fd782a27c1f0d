"""Exceptions of tp_cosep: one base class, one subclass per thing a caller may want to handle."""

__all__ = ["CoSePError", "DistributedError", "InputError", "MissingDependencyError", "NotFittedError", "PruningError"]


class CoSePError(Exception):
    """Base class of every error that tp_cosep raises on purpose."""


class InputError(CoSePError, ValueError):
    """An argument, a batch or an option is not what it has to be."""


class NotFittedError(CoSePError, RuntimeError):
    """A selector was asked for a selection before it saw any data."""


class PruningError(CoSePError, RuntimeError):
    """Pruning failed; the model is as it was before the call."""


class DistributedError(CoSePError, RuntimeError):
    """Another process of a distributed run failed or is gone."""


class MissingDependencyError(CoSePError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""
