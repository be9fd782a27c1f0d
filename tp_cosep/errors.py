"""Exceptions of tp_cosep: one base class, and a subclass for each condition that a caller may handle."""

__all__ = ["CoSePError", "DistributedError", "InputError", "MissingDependencyError", "NotFittedError", "PruningError"]


class CoSePError(Exception):
    """Base class of every error that tp_cosep raises on purpose."""


class InputError(CoSePError, ValueError):
    """An argument, a batch or an option is not valid."""


class NotFittedError(CoSePError, RuntimeError):
    """A selection was requested before ``fit``."""


class PruningError(CoSePError, RuntimeError):
    """Pruning failed; the model is as it was before the call."""


class DistributedError(CoSePError, RuntimeError):
    """Another process of a distributed run failed or is gone."""


class MissingDependencyError(CoSePError, ImportError):
    """An optional package is not installed; the message names the extra to install."""
