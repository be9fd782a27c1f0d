"""Options of the selectors, checked before anything is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tp_cosep.calibration.labels import OBSERVED
from tp_cosep.errors import InputError
from tp_cosep.functional.attention_distances import ATTENTION_JS
from tp_cosep.functional.kmedoids import BACKENDS
from tp_cosep.functional.knee import KNEE_RULES
from tp_cosep.functional.separability import PairMetric, check_metric
from tp_cosep.selection.input_space import INPUT_SPACES
from tp_cosep.utils.checks import check_one_of, is_count, is_number

__all__ = ["DEFAULT_METHODS", "check_selector", "default_space"]
_REPRESENTATIVES = ("medoid", "max_norm", "reconstruction")
_METHODS = ("k-medoids", "column-subset")
#: How channels are chosen in every space unless told otherwise.
DEFAULT_METHODS = {
    "separability": "k-medoids",
    "correlation": "k-medoids",
    "class-means": "column-subset",
    "reconstruction": "column-subset",
    "joint": "column-subset",
}


def check_selector(
    *,
    metric: str | PairMetric,
    observe: str,
    scope: str,
    knee: str,
    backend: str,
    representative: str | Callable[[Any], Tensor | None] | None,
    space: str,
    method: str | None,
    n_keep: int | None,
    keep_ratio: float | None,
    max_class_pairs: int | None,
) -> None:
    """Check the options of :class:`tp_cosep.CoSePSelector`.

    Raises:
        InputError: If one is unknown or out of range, or two contradict each other.
    """
    if metric != ATTENTION_JS:
        check_metric(metric)
    for name, value, known in (
        ("observe", observe, list(OBSERVED)),
        ("knee", knee, list(KNEE_RULES)),
        ("backend", backend, sorted(BACKENDS)),
        ("space", space, ["separability", *INPUT_SPACES]),
    ):
        check_one_of(name, value, known, "CoSePSelector")
    if scope not in ("layer", "model"):
        raise InputError(f"CoSePSelector: expected scope 'layer' or 'model', got {scope!r}.")
    if representative is not None and not callable(representative) and representative not in _REPRESENTATIVES:
        raise InputError(
            f"CoSePSelector: expected representative of {list(_REPRESENTATIVES)} or an importance, got "
            f"{representative!r}."
        )
    _check_space(space, method, metric, observe, representative)
    _check_count(n_keep, keep_ratio)
    if max_class_pairs is not None and not is_count(max_class_pairs):
        raise InputError(
            f"CoSePSelector: expected max_class_pairs to be an integer ≥ 1 or None, got {max_class_pairs!r}."
        )


def _check_count(n_keep: int | None, keep_ratio: float | None) -> None:
    if n_keep is not None and keep_ratio is not None:
        raise InputError("CoSePSelector: expected n_keep or keep_ratio, got both.")
    if n_keep is not None and not is_count(n_keep):
        raise InputError(f"CoSePSelector: expected n_keep to be an integer ≥ 1 or None, got {n_keep!r}.")
    if keep_ratio is not None and not (is_number(keep_ratio) and 0 < keep_ratio <= 1):
        raise InputError(f"CoSePSelector: expected keep_ratio in (0, 1] or None, got {keep_ratio!r}.")


def default_space(*, metric: str | PairMetric, observe: str, representative: object | None, method: str | None) -> str:
    """The space if none is named: joint, unless an option is about clusters in separability space.

    Returns:
        Its name.
    """
    is_about_clusters = metric != "jm" or observe != "outputs" or representative is not None or method == "k-medoids"
    return "separability" if is_about_clusters else "joint"


def _check_space(
    space: str, method: str | None, metric: str | PairMetric, observe: str, representative: object | None
) -> None:
    if method is not None and method not in _METHODS:
        raise InputError(f"CoSePSelector: expected method of {list(_METHODS)} or None, got {method!r}.")
    if space == "separability":
        if method == "column-subset":
            raise InputError(
                "CoSePSelector: method='column-subset' asks what readers can do without, which separability profiles "
                f"do not tell; use it with a space of {list(INPUT_SPACES)}."
            )
        return
    for name, value, default in (("metric", metric, "jm"), ("observe", observe, "outputs")):
        if value != default:
            raise InputError(f"CoSePSelector: {name}={value!r} belongs to space='separability', got space={space!r}.")
    if representative is not None and (method or DEFAULT_METHODS[space]) != "k-medoids":
        raise InputError(
            f"CoSePSelector: representative={representative!r} chooses among the members of a cluster, and "
            f"space={space!r} makes no clusters; add method='k-medoids', or leave one of them out."
        )
